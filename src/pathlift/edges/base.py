"""The interface of an edge map, and the weights that a pass sends along it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pathlift.edges.axis import Axis, full_axes
from pathlift.edges.pattern import Pattern

BLOCK_ELEMENTS = 1 << 21
"""Weights are transformed in blocks of at most this many elements where a map can work block by block (8 MiB in float32)."""

PAIR_ELEMENTS = BLOCK_ELEMENTS // 4
"""The same where two tensors are compared, which has results of the same size between."""


class Weights:
    """The tensor f(θ, θ', …)·2^(-exponent) for an elementwise f, computed when asked for, whole or in blocks of rows.

    The value that travels along an edge is ``full() * 2**exponent``. Nothing of the size of the parameters is kept.
    """

    def __init__(
        self,
        values: tuple[Tensor, ...],
        transform: Callable[..., Tensor],
        dtype: torch.dtype,
        *,
        shift: float = 0.0,
        degree: float = 1.0,
        ready: Tensor | None = None,
    ) -> None:
        """Describe the weights.

        Args:
            values: Tensors of one shape (θ, θ', …).
            transform: Elementwise and homogeneous function of them.
            dtype: Precision of the result.
            shift: The values are divided by 2**shift before ``transform`` sees them.
            degree: Degree of homogeneity of ``transform``.
            ready: The weights, if they have been computed already; never written to.
        """
        self.values = values
        self.transform = transform
        self.dtype = dtype
        self.scale = 2.0**-shift
        self.exponent = shift * degree
        self.ready = ready

    @property
    def shape(self) -> torch.Size:
        """Shape of the weights."""
        return self.values[0].shape

    def full(self) -> Tensor:
        """Return the whole tensor, not to be written to."""
        return self._apply(self.values) if self.ready is None else self.ready

    def brief(self) -> Tensor:
        """Return the whole tensor for use at once: the next call of `brief` or `rows` may overwrite it."""
        return self._apply(self.values, brief=True) if self.ready is None else self.ready

    def rows(self, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the first dimension and their weights, each for use at once.

        Args:
            multiple: The length of a slice is a multiple of this.

        Yields:
            A slice of at most about `BLOCK_ELEMENTS` weights, all alike in size (of all when gradients are recorded), and
            the weights.
        """
        count = self.shape[0]
        if self.ready is not None:
            yield slice(0, count), self.ready
            return
        units = max(1, count // multiple)
        size = BLOCK_ELEMENTS if len(self.values) == 1 else PAIR_ELEMENTS
        blocks = 1 if torch.is_grad_enabled() else min(units, -(-self.shape.numel() // size))
        step = -(-units // max(blocks, 1)) * multiple
        first = 0
        for values in zip(*(value.split(step) for value in self.values), strict=True):
            last = first + len(values[0])
            yield slice(first, last), self._apply(values, brief=True)
            first = last

    def _apply(self, values: tuple[Tensor, ...], *, brief: bool = False) -> Tensor:
        if brief and self.transform is torch.abs and self.scale == 1.0 and not torch.is_grad_enabled():
            return magnitude(values[0], self.dtype)
        values = tuple(value.to(torch.promote_types(value.dtype, self.dtype)) for value in values)
        if self.scale != 1.0:
            values = tuple(value * self.scale for value in values)
        return self.transform(*values).to(self.dtype)


_SCRATCH = threading.local()


def magnitude(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return |value| in scratch memory of this thread; fresh memory would cost more than the arithmetic.

    Args:
        value: Any tensor.
        dtype: Precision of the result.

    Returns:
        The magnitudes, valid until the next call.
    """
    out = _scratch(value, dtype, BLOCK_ELEMENTS, 0)
    return torch.abs(value if value.dtype == dtype else out.copy_(value), out=out)


def _scratch(like: Tensor, dtype: torch.dtype, least: int, slot: int) -> Tensor:
    """Return scratch memory of this thread of a tensor's shape, at least for so many elements at once."""
    buffers: dict[tuple[int, torch.device, torch.dtype], Tensor] = _SCRATCH.__dict__.setdefault("buffers", {})
    buffer, count = buffers.get((slot, like.device, dtype)), like.numel()
    if buffer is None or buffer.numel() < count:
        buffer = buffers[slot, like.device, dtype] = torch.empty(max(count, least), dtype=dtype, device=like.device)
    return buffer[:count].view(like.shape)


JOINT_ELEMENTS, LAUNCHED_ELEMENTS = 1 << 16, 1 << 22
"""The same where many functions of the same weights are computed at once; and where each operation has to be launched."""

Entry: TypeAlias = "tuple[int, int]"
"""(to, from): the tracks that a function of the weights joins."""


class Bundle:
    """Several functions of the same weights: what a pass of several tracks sends along an edge, computed block by block.

    Reading and preparing the weights is done once for all tracks. The value of an entry is ``tensor * 2**exponent``.
    """

    def __init__(
        self,
        values: tuple[Tensor, ...],
        keys: Sequence[Entry],
        entries: Callable[..., Mapping[Entry, Tensor]],
        dtype: torch.dtype,
        *,
        shift: float = 0.0,
        degree: float = 1.0,
        overwrites: bool = False,
    ) -> None:
        """Describe the functions.

        Args:
            values: Tensors of one shape (θ, θ', …).
            keys: The tracks that the functions join.
            entries: Elementwise and homogeneous functions of the values, by key.
            dtype: Precision of the results.
            shift: The values are divided by 2**shift before ``entries`` sees them.
            degree: Degree of homogeneity.
            overwrites: The functions write to the tensors that they are given, which are copies, and to one more.
        """
        self.values = values
        self.overwrites = overwrites
        self.keys = tuple(keys)
        self.entries = entries
        self.dtype = dtype
        self.scale = 2.0**-shift
        self.exponent = shift * degree

    @property
    def shape(self) -> torch.Size:
        """Shape of the weights."""
        return self.values[0].shape

    def full(self) -> Mapping[Entry, Tensor]:
        """Return the whole tensors."""
        return self._apply(self.values)

    def rows(self, multiple: int = 1) -> Iterator[tuple[slice, Mapping[Entry, Tensor]]]:
        """Yield slices of the first dimension and their entries; see `Weights.rows`.

        Args:
            multiple: The length of a slice is a multiple of this.

        Yields:
            A slice of about `JOINT_ELEMENTS` weights (of all when gradients are recorded), and the entries.
        """
        units = max(1, self.shape[0] // multiple)
        step = -(-units // min(units, self.blocks)) * multiple
        yield from self._split(step, 0)

    def antecedents(self) -> Iterator[tuple[slice, Mapping[Entry, Tensor]]]:
        """Yield slices of the second dimension and their entries, as `rows` does of the first."""
        yield from self._split(-(-self.shape[1] // min(self.shape[1], self.blocks)), 1)

    @property
    def blocks(self) -> int:
        """How many parts of about `JOINT_ELEMENTS` the weights have; one when gradients are recorded."""
        size = JOINT_ELEMENTS if self.values[0].device.type == "cpu" else LAUNCHED_ELEMENTS
        return 1 if torch.is_grad_enabled() else max(1, -(-self.shape.numel() // size))

    def _split(self, step: int, dim: int) -> Iterator[tuple[slice, Mapping[Entry, Tensor]]]:
        first = 0
        for values in zip(*(value.split(step, dim) for value in self.values), strict=True):
            last = first + values[0].shape[dim]
            yield slice(first, last), self._apply(values)
            first = last

    def _apply(self, values: tuple[Tensor, ...]) -> Mapping[Entry, Tensor]:
        if self.overwrites:
            copies = [self._room(value, slot).copy_(value) for slot, value in enumerate(values, 1)]
            scaled = copies if self.scale == 1.0 else [copy.mul_(self.scale) for copy in copies]
            return self.entries(*scaled, self._room(values[0], 0))
        wide = tuple(value.to(self.dtype) for value in values)
        return self.entries(*(wide if self.scale == 1.0 else (value * self.scale for value in wide)))

    def _room(self, like: Tensor, slot: int) -> Tensor:
        """Return memory for a block of weights; on a processor that of the block before, which is done with."""
        if torch.is_grad_enabled() or like.device.type != "cpu" or like.numel() > 2 * JOINT_ELEMENTS:
            return torch.empty_like(like, dtype=self.dtype)
        return _scratch(like, self.dtype, 2 * JOINT_ELEMENTS, slot)


class Support(Weights):
    """1 where a weight is not zero and 0 elsewhere: which edges are there at all."""

    def __init__(self, weights: Weights) -> None:
        """Wrap weights.

        Args:
            weights: The weights whose support this is.
        """
        super().__init__(weights.values, weights.transform, weights.dtype)
        self.scale = weights.scale
        self.exponent = 0.0

    def _apply(self, values: tuple[Tensor, ...], *, brief: bool = False) -> Tensor:
        del brief
        if len(values) == 1:  # a power of a weight vanishes only with the weight, whatever underflows
            return (values[0] != 0).to(self.dtype)
        return (self.transform(*(value.double() for value in values)) != 0).to(self.dtype)


@dataclass(frozen=True)
class Compact:
    """An edge map between compact tensors.

    Attributes:
        edges: The map.
        axes: Axes of its result.
        weight: What becomes of the weight tensor, None when it stays as it is.
    """

    edges: Edges
    axes: tuple[Axis, ...]
    weight: Callable[[Tensor], Tensor] | None = None


class Edges(ABC):
    """A bilinear map (x, w) ↦ out. ``fresh``: `sum` returns new memory, never a view of x. ``chooses``: it is not bilinear."""

    fresh: bool = True
    chooses: bool = False

    @abstractmethod
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """Return Σ_u x[u]·w[k(u→v)] for every neuron v above.

        Args:
            x: Values of the neurons below.
            w: The weights; None means that every edge weighs 1.

        Returns:
            Values of the neurons above.
        """

    def sums(self, xs: Mapping[int, Tensor], bundle: Bundle, factors: Mapping[Entry, float]) -> dict[int, Tensor]:
        """Apply the map to several tracks at once: out_i = Σ_j factor_ij · sum(x_j, w_ij).

        Args:
            xs: Track to values of the neurons below, all of one shape; a track that is not there is 0.
            bundle: The weights.
            factors: Numbers by entry; entries without one are left out.

        Returns:
            Track to values of the neurons above, new memory.
        """
        found: dict[int, Tensor] = {}
        for entry, weight in bundle.full().items():
            if entry in factors:
                part = self.sum(xs[entry[1]], Weights((weight,), _same, bundle.dtype, ready=weight))
                add_scaled(found, entry[0], part, factors[entry])
        return found

    @abstractmethod
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """Return max_u x[u]·w[k(u→v)] for non-negative x and w (0 where there is no edge).

        Args:
            x: Values of the neurons below, non-negative.
            w: The weights, non-negative; None means that every edge weighs 1.

        Returns:
            Values of the neurons above.
        """

    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        """Return Σ_u |x[u]·w[k(u→v)] − ratio[v]·y[u]·z[k(u→v)]| for every neuron v above, edge by edge.

        Args:
            x: Values of the neurons below.
            w: Their weights; 1 where the edges have none.
            y: Other values of the neurons below.
            z: Other weights.
            ratio: One number per neuron above.

        Returns:
            Values of the neurons above.

        Raises:
            NotImplementedError: The map has several antecedents per neuron and no list of them.
        """
        raise NotImplementedError(type(self).__name__)

    def largest(self, x: Tensor) -> Tensor:
        """Return the largest antecedent of each neuron above, for values of any sign.

        Args:
            x: Values of the neurons below.

        Returns:
            Values of the neurons above.
        """
        return self.antecedents(x).amax(0)

    def antecedents(self, x: Tensor) -> Tensor:
        """Lay the antecedents of each neuron above side by side, for values of any sign; weights are not looked at.

        Only the maps of pooling operators have it.

        Args:
            x: Values of the neurons below.

        Returns:
            Shape (antecedents, *shape of the neurons above); −inf where a neuron has fewer.

        Raises:
            NotImplementedError: The map belongs to no pooling operator.
        """
        raise NotImplementedError(type(self).__name__)

    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        """Tell which weight stands on which edge (`pathlift.edges.pattern`); for maps that a parameter can weigh.

        Args:
            below: Shape of the neurons below.
            weight: Shape of the weight.

        Returns:
            The pattern.

        Raises:
            NotImplementedError: Only constants can be the weights of this map.
        """
        raise NotImplementedError(type(self).__name__)

    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        """Return the same map between compact tensors (`pathlift.edges.axis`).

        Args:
            axes: Axes of the neurons below.
            out: Full shape of the neurons above.
            weight: Shape of the weight, None when there is none.

        Returns:
            The compact map, or the dimensions that have to be full for there to be one. When all dimensions are full, a
            map may always return itself.
        """
        del weight
        compact = frozenset(dim for dim, axis in enumerate(axes) if axis.classes is not None)
        return compact or Compact(self, full_axes(out))

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Go back from the neurons above: to those below, and to the weights.

        Args:
            x: Values of the neurons below in the forward pass.
            w: The weights of the forward pass.
            g: One number per neuron above.
            below: Whether the first result is wanted.
            share: Whether the second result is wanted.

        Returns:
            Σ_v g[v]·w[k(u→v)] per neuron u below, and w[k]·Σ_{edges of k} x[u]·g[v] per weight k; None for what was not
            wanted.
        """
        with torch.inference_mode(False), torch.enable_grad():
            values = recordable(x).requires_grad_()
            weight = None if w is None else recordable(w.full()).requires_grad_()
            fixed = None if w is None or weight is None else Weights((weight,), _same, w.dtype)
            out = self.sum(values, fixed)
            wanted = ([values] if below else []) + ([weight] if share and weight is not None else [])
            found = list(torch.autograd.grad(out, wanted, g))
        to_below = found.pop(0) if below else None
        to_weight = found.pop(0) * weight.detach() if share and weight is not None else None
        return to_below, to_weight


def recordable(x: Tensor) -> Tensor:
    """Return the same values as a leaf of autograd; a tensor of inference mode has to be copied."""
    return x.clone() if x.is_inference() else x.detach()


def _same(value: Tensor) -> Tensor:
    return value


def add_scaled(found: dict[int, Tensor], key: int, part: Tensor, factor: float) -> None:
    """Add ``factor * part`` to an entry of ``found``, whose memory is free to be overwritten.

    Args:
        found: Where to add.
        key: Which entry.
        part: New memory.
        factor: A number.
    """
    grad = torch.is_grad_enabled()
    if key not in found:
        found[key] = part if factor == 1.0 else part * factor if grad else part.mul_(factor)
    else:
        found[key] = torch.add(found[key], part, alpha=factor) if grad else found[key].add_(part, alpha=factor)


class Chain(Edges):
    """Edge maps one after the other, of which at most one carries the weight."""

    def __init__(self, *links: Edges, weighted: int) -> None:
        """Describe the map.

        Args:
            links: The maps, first to last.
            weighted: Which one has the weight.
        """
        self.links = links
        self.weighted = weighted
        self.fresh = any(link.fresh for link in links)

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        for place, link in enumerate(self.links):
            x = link.sum(x, w if place == self.weighted else None)
        return x

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        for place, link in enumerate(self.links):
            x = link.max(x, w if place == self.weighted else None)
        return x

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Edges.adjoint`."""
        values = [x]
        for place, link in enumerate(self.links[:-1]):
            values.append(link.sum(values[-1], w if place == self.weighted else None))
        to_weight: Tensor | None = None
        for place in reversed(range(len(self.links))):
            own = place == self.weighted
            wanted = below or place > 0
            to_below, found = self.links[place].adjoint(values[place], w if own else None, g, below=wanted, share=share and own)
            to_weight = found if own else to_weight
            if to_below is None:
                return None, to_weight
            g = to_below
        return g, to_weight
