"""Memory is identity: which parameter or buffer a tensor is, whatever name or container it is reached by.

Two tensors with the same memory are one; one that views a part of another is computed from it. Parameters whose memory
overlaps are one as well: the one that holds the others keeps its name, the others are views of it. Disjoint parts of one
buffer stay apart, also when they alternate. What cannot be told is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.errors import Problem, UnsupportedModelError
from pathlift.graph.expressions import Expression, FunctionCall, StateTensor


@dataclass(frozen=True)
class Span:
    """The bytes between the first and the last element of a tensor.

    Attributes:
        space: What the addresses count in: a device, or one storage of the meta device.
        start: Address of the first byte.
        stop: Address behind the last byte.
    """

    space: object
    start: int
    stop: int

    def meets(self, other: Span) -> bool:
        """Whether two spans have a byte in common."""
        return self.space == other.space and self.start < other.stop and other.start < self.stop


def span(tensor: Tensor) -> Span | None:
    """Return where a tensor lies, None for one without elements or without strides.

    Args:
        tensor: Any tensor.

    Returns:
        Its span.
    """
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if tensor.is_meta:
        space: object = ("meta", tensor.untyped_storage()._cdata)
        start = tensor.storage_offset() * tensor.itemsize
    else:
        space, start = tensor.device, tensor.data_ptr()
    return Span(space, int(start), int(start + reach * tensor.itemsize))


def _elements(tensor: Tensor, extent: Span) -> Tensor:
    """Return the address of each element, in elements from the start of its span."""
    reach = (extent.stop - extent.start) // tensor.itemsize
    return torch.arange(reach, device="cpu").as_strided(tensor.shape, tensor.stride())


def view_of(holder: Tensor, part: Tensor, described: Expression) -> Expression | None:
    """Express a tensor by another that shares its memory.

    Args:
        holder: The tensor that may hold the other.
        part: The other.
        described: The expression of the first.

    Returns:
        The expression; None when ``part`` has elements that are not elements of ``holder``.
    """
    holder_span, part_span = span(holder), span(part)
    if holder_span is None or part_span is None or not holder_span.meets(part_span) or holder.dtype != part.dtype:
        return None
    if holder_span == part_span and holder.shape == part.shape and holder.stride() == part.stride():
        return described
    offset = part_span.start - holder_span.start
    if offset % holder.itemsize or part_span.start < holder_span.start or part_span.stop > holder_span.stop:
        return None
    offset //= holder.itemsize
    if holder.is_contiguous():
        return FunctionCall(strided_part, (described, tuple(part.shape), tuple(part.stride()), offset))
    numbers = torch.full(((holder_span.stop - holder_span.start) // holder.itemsize,), -1)
    numbers[_elements(holder, holder_span).reshape(-1)] = torch.arange(holder.numel())
    index = numbers[_elements(part, part_span) + offset]
    return None if bool((index < 0).any()) else FunctionCall(taken, (described, index))


def strided_part(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
    """Return a view of a part of a tensor's elements, as they lie in memory when it is contiguous."""
    contiguous = tensor.contiguous()
    return contiguous.as_strided(shape, strides, offset + contiguous.storage_offset())


def taken(tensor: Tensor, index: Tensor) -> Tensor:
    """Return elements by their number."""
    return torch.take(tensor.contiguous(), index.to(tensor.device))


def _share_elements(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors whose spans meet have a byte in common."""
    first_span, second_span = span(first), span(second)
    assert first_span is not None
    assert second_span is not None
    unit = math.gcd(first.itemsize, second.itemsize, abs(first_span.start - second_span.start) or first.itemsize)
    base = min(first_span.start, second_span.start)
    units = []
    for tensor, extent in ((first, first_span), (second, second_span)):
        per = tensor.itemsize // unit
        start = (_elements(tensor, extent).reshape(-1, 1) * per + torch.arange(per)).reshape(-1)
        units.append(start + (extent.start - base) // unit)
    return bool(torch.isin(units[0], units[1]).any())


class Memory:
    """The parameters and buffers of a model by the memory that they live in.

    Attributes:
        state: Name to tensor; of tensors that share memory, the one that holds all others.
        aliases: Names of the same tensor, shape and strides included, to the name in ``state``.
        views: Names of tensors that are computed from another one in ``state``.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Sort names by memory.

        Args:
            named: Names and tensors, a tensor under each of its names.

        Raises:
            UnsupportedModelError: Two parameters overlap in part.
        """
        self.state: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.views: dict[str, Expression] = {}
        by_identity: dict[object, str] = {}
        for name, tensor in named:
            extent = span(tensor)
            key: object = id(tensor) if extent is None else (extent, tensor.shape, tensor.stride(), tensor.dtype)
            first = by_identity.setdefault(key, name)
            if first == name:
                self.state[name] = tensor
            else:
                self.aliases[name] = first
        order = sorted(
            ((extent, name) for name, tensor in self.state.items() if (extent := span(tensor)) is not None), key=_by_address
        )
        crowded = {name for pair in _meetings(order) for name in pair}
        roots: list[str] = []
        for name in sorted(crowded, key=lambda name: (-self.state[name].numel(), not self.state[name].is_contiguous())):
            self._place(name, roots)
        self._order = [(extent, name) for extent, name in order if name in self.state]

    def _place(self, name: str, roots: list[str]) -> None:
        """Make a tensor a view of the root that holds it, or a root itself."""
        tensor = self.state[name]
        overlapping = [root for root in roots if _share_elements(self.state[root], tensor)]
        if not overlapping:
            roots.append(name)
            return
        view = view_of(self.state[overlapping[0]], tensor, StateTensor(overlapping[0])) if len(overlapping) == 1 else None
        if view is None:
            names = " and ".join(f"'{sharer}'" for sharer in (name, *overlapping))
            reason = f"{names} share a part of their memory, and none holds the others."
            advice = (
                "Give each parameter memory of its own (parameter.detach().clone()), or register the whole as one parameter."
            )
            raise UnsupportedModelError((Problem("", "export", "", reason, advice),))
        self.views[name] = view
        del self.state[name]
        for alias, target in list(self.aliases.items()):
            if target == name:
                self.views[alias] = view
                del self.aliases[alias]

    @property
    def names(self) -> list[str]:
        """Every name."""
        return [*self.state, *self.aliases, *self.views]

    def expression(self, name: str) -> Expression:
        """Return what a parameter or buffer is.

        Args:
            name: Any of its names.

        Returns:
            Its expression.
        """
        return self.views[name] if name in self.views else StateTensor(self.aliases.get(name, name))

    def find(self, tensor: Tensor) -> Expression | None:
        """Return what a tensor is, by the memory that it lives in.

        Args:
            tensor: Any tensor.

        Returns:
            The expression of a parameter or buffer, or of a part of one; None for memory that belongs to none.

        Raises:
            LookupError: It overlaps with parameters or buffers of which it is no part; the message names them.
        """
        extent = span(tensor)
        if extent is None:
            return None
        meeting = [name for other, name in self._order if other.meets(extent) and _share_elements(self.state[name], tensor)]
        if not meeting:
            return None
        expression = view_of(self.state[meeting[0]], tensor, StateTensor(meeting[0])) if len(meeting) == 1 else None
        if expression is None:
            raise LookupError(", ".join(meeting))
        return expression


def _by_address(entry: tuple[Span, str]) -> tuple[str, int, int]:
    return str(entry[0].space), entry[0].start, -entry[0].stop


def _meetings(order: list[tuple[Span, str]]) -> Iterator[tuple[str, str]]:
    """Yield the pairs whose spans meet, of spans in the order of their starts."""
    open_: list[tuple[Span, str]] = []
    for extent, name in order:
        open_ = [(other, earlier) for other, earlier in open_ if other.meets(extent)]
        for _, earlier in open_:
            yield earlier, name
        open_.append((extent, name))


def contents(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's elements, one after the other; the memory around a view is left out.

    Args:
        tensor: Any tensor that has values.

    Returns:
        The bytes, without a copy where the elements lie so on the CPU.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
