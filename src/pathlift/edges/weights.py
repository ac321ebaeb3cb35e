"""The weights that a pass sends along edges: functions of θ, or of θ and θ', computed when they are needed.

A weight enters a pass as f(θ) or f(θ, θ') for an elementwise f: |θ|, |θ|^q, |θ| − |θ'|, θ·θ'. f is homogeneous of some
degree d, f(c·θ) = c^d·f(θ), so a power of two is taken out before f and put back after it, by its exponent:

    f(θ) = f(θ·2^-shift)·2^(shift·d).

Example: |θ|² of θ = 2^-90 is 0 in float32. With ``shift`` −90 and ``degree`` 2 what travels is |1|² with the exponent −180,
exactly: a multiplication by a power of two rounds nothing.

f(θ) is never kept. Where an edge map can work row by row it asks for `Weights.rows`, blocks that stay in a cache, so a pass
over ones costs one read of the parameters and no memory of their size: |θ| of 16 million weights takes a quarter of the time
of `torch.abs`, which has to be given new memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from pathlift.fused import Recipe

BLOCK_ELEMENTS = 1 << 21
"""Weights are transformed in blocks of at most this many elements where a map can work block by block (8 MiB in float32)."""

PAIR_ELEMENTS = BLOCK_ELEMENTS // 4
"""The same where two tensors are compared, which has results of the same size between."""

BUNDLE_ELEMENTS, LAUNCHED_ELEMENTS = 1 << 16, 1 << 22
"""The same where many functions of the same weights are computed at once; and where each operation has to be launched."""


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
        extent: tuple[float, float] | None = None,
    ) -> None:
        """Describe the weights.

        Args:
            values: Tensors of one shape (θ, θ', …).
            transform: Elementwise and homogeneous function of them.
            dtype: Precision of the result.
            shift: The values are divided by 2**shift before ``transform`` sees them.
            degree: Degree of homogeneity of ``transform``.
            ready: The weights, if they have been computed already; never written to.
            extent: The smallest and the largest of them, if that is known.
        """
        self.values = values
        self.transform = transform
        self.dtype = dtype
        self.scale = 2.0**-shift
        self.exponent = shift * degree
        self.ready = ready
        self._extent = extent

    @property
    def shape(self) -> torch.Size:
        """Shape of the weights."""
        return self.values[0].shape

    @cached_property
    def extent(self) -> tuple[float, float] | None:
        """The smallest and the largest of the weights, where it costs nothing to know: of what has been computed already.

        None elsewhere, and on an accelerator, which would have to be waited for.
        """
        if self._extent is not None or self.ready is None or self.ready.device.type != "cpu" or self.ready.numel() == 0:
            return self._extent
        low, high = torch.aminmax(self.ready.detach())
        return low.item(), high.item()

    @property
    def nothing(self) -> bool:
        """Whether the weights are all 0, and not only too small for a float."""
        if self.extent is not None and self.extent != (0.0, 0.0):
            return False
        if self.extent is not None and self.transform is torch.abs and self.dtype == self.values[0].dtype and self.scale == 1.0:
            return True
        if len(self.values) == 1:  # a power of a weight vanishes only with the weight, whatever underflows
            low, high = torch.aminmax(self.values[0].detach())  # `any` takes three times as long
            return low.item() == high.item() == 0.0
        return not (bool(self.full().any()) or bool(Support(self).full().any()))

    @property
    def magnitudes_of(self) -> Tensor | None:
        """W if the weights are |W| and are still to be computed, else None."""
        return self.values[0] if self.transform is torch.abs and self.scale == 1.0 and self.ready is None else None

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
        # Autograd would keep each block for the way back, and a tape of many small operations is slower than one of few.
        blocks = 1 if torch.is_grad_enabled() else min(units, -(-self.shape.numel() // size))
        if blocks <= 1:
            yield slice(0, count), self._apply(self.values, brief=True)
            return
        step = -(-units // blocks) * multiple
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


def computed(weight: Tensor, exponent: float = 0.0) -> Weights:
    """Return weights that have been computed already.

    Args:
        weight: Their values.
        exponent: What travels along an edge is 2**exponent times that.

    Returns:
        The weights.
    """
    weights = Weights((weight,), torch.clone, weight.dtype, ready=weight)
    weights.exponent = exponent
    return weights


def extents_of(joined: Tensor, sizes: Sequence[int]) -> Sequence[tuple[float, float] | None]:
    """Return the smallest and the largest of each of some tensors that lie end to end, in two operations.

    Args:
        joined: Flat.
        sizes: Their numbers of elements.

    Returns:
        `Weights.extent` of each; None where one of them is empty, and on an accelerator, which would have to be waited for.
    """
    if joined.device.type != "cpu" or min(sizes) == 0:
        return [None] * len(sizes)
    array, starts = joined.detach().numpy(), np.cumsum([0, *sizes[:-1]])
    ends = (reduce(array, starts).tolist() for reduce in (np.minimum.reduceat, np.maximum.reduceat))
    return list(zip(*ends, strict=True))


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


_SCRATCH = threading.local()


def magnitude(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return |value| in scratch memory of this thread; see the head of this module.

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


LARGE_PAGES = 1 << 20
"""Elements from which on NumPy asks the operating system for large pages: new memory of such a size costs half."""


def new_memory(like: Tensor, shape: torch.Size) -> Tensor:
    """Return memory that nothing is in yet.

    Args:
        like: A tensor of the same type, on the same device.
        shape: Its shape.

    Returns:
        The memory.
    """
    if like.device.type != "cpu" or shape.numel() < LARGE_PAGES or like.dtype not in _NUMPY:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(shape, _NUMPY[like.dtype]))


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


Entry: TypeAlias = "tuple[int, int]"
"""(to, from): the tracks that a function of the weights joins."""

Stream: TypeAlias = "Iterable[tuple[Entry, Tensor]]"
"""Functions of some weights with their keys, one after the other: each is to be used before the next is asked for."""


class Bundle:
    """Several functions of the same weights: what a pass of several tracks sends along an edge, computed block by block.

    A pass of tracks x_0, x_1, … takes them from layer to layer by a matrix of maps, x_i' = Σ_j f_ij(θ)·x_j. An entry (i, j)
    is one f_ij. Reading and preparing the weights is done once for all entries; the value of one is
    ``tensor * 2**exponent``.

    Example: the norm and its derivative along a direction θ' travel as x' = |θ|·x and y' = |θ|·y + sgn(θ)θ'·x, which are
    the entries (0, 0), (1, 1) and (1, 0).
    """

    def __init__(
        self,
        values: tuple[Tensor, ...],
        keys: Sequence[Entry],
        entries: Callable[..., Stream],
        dtype: torch.dtype,
        *,
        shift: float = 0.0,
        degree: float = 1.0,
        overwrites: bool = False,
        recipe: Recipe | None = None,
    ) -> None:
        """Describe the functions.

        Args:
            values: Tensors of one shape (θ, θ', …).
            keys: The tracks that the functions join.
            entries: Elementwise and homogeneous functions of the values, by key; each may be made in the memory of the one
                before, so that what is multiplied next lies in a cache.
            dtype: Precision of the results.
            shift: The values are divided by 2**shift before ``entries`` sees them.
            degree: Degree of homogeneity.
            overwrites: The functions write to the tensors that they are given, which are copies, and to one more.
            recipe: What the functions are, where a loop that reads the weights once knows them (`pathlift.fused`).
        """
        self.values = values
        self.overwrites = overwrites
        self.keys = tuple(keys)
        self.entries = entries
        self.dtype = dtype
        self.scale = 2.0**-shift
        self.exponent = shift * degree
        self.recipe = recipe if shift == 0.0 else None

    @property
    def shape(self) -> torch.Size:
        """Shape of the weights."""
        return self.values[0].shape

    def full(self) -> Stream:
        """Return the whole tensors."""
        return self._apply(self.values)

    def rows(self, multiple: int = 1) -> Iterator[tuple[slice, Stream]]:
        """Yield slices of the first dimension and their entries; see `Weights.rows`.

        Args:
            multiple: The length of a slice is a multiple of this.

        Yields:
            A slice of about `BUNDLE_ELEMENTS` weights (of all when gradients are recorded), and the entries.
        """
        units = max(1, self.shape[0] // multiple)
        step = -(-units // min(units, self.blocks)) * multiple
        yield from self._split(step, 0)

    def antecedents(self) -> Iterator[tuple[slice, Stream]]:
        """Yield slices of the second dimension and their entries, as `rows` does of the first."""
        yield from self._split(-(-self.shape[1] // min(self.shape[1], self.blocks)), 1)

    @property
    def blocks(self) -> int:
        """How many parts of about `BUNDLE_ELEMENTS` the weights have; one when gradients are recorded."""
        size = BUNDLE_ELEMENTS if self.values[0].device.type == "cpu" else LAUNCHED_ELEMENTS
        return 1 if torch.is_grad_enabled() else max(1, -(-self.shape.numel() // size))

    def _split(self, step: int, dim: int) -> Iterator[tuple[slice, Stream]]:
        first = 0
        for values in zip(*(value.split(step, dim) for value in self.values), strict=True):
            last = first + values[0].shape[dim]
            yield slice(first, last), self._apply(values)
            first = last

    def _apply(self, values: tuple[Tensor, ...]) -> Stream:
        if self.overwrites:
            copies = [self._room(value, slot).copy_(value) for slot, value in enumerate(values, 1)]
            scaled = copies if self.scale == 1.0 else [copy.mul_(self.scale) for copy in copies]
            return self.entries(*scaled, self._room(values[0], 0))
        wide = tuple(value.to(self.dtype) for value in values)
        return self.entries(*(wide if self.scale == 1.0 else (value * self.scale for value in wide)))

    def _room(self, like: Tensor, slot: int) -> Tensor:
        """Return memory for a block of weights; on a processor that of the block before, which is done with."""
        if torch.is_grad_enabled() or like.device.type != "cpu" or like.numel() > 2 * BUNDLE_ELEMENTS:
            return torch.empty_like(like, dtype=self.dtype)
        return _scratch(like, self.dtype, 2 * BUNDLE_ELEMENTS, slot)


def add_scaled(totals: dict[int, Tensor], track: int, part: Tensor, factor: float) -> None:
    """Add ``factor * part`` to the total of a track, whose memory is free to be overwritten.

    Args:
        totals: Where to add.
        track: Which track.
        part: New memory.
        factor: A number.
    """
    grad = torch.is_grad_enabled()
    if track not in totals:
        totals[track] = part if factor == 1.0 else part * factor if grad else part.mul_(factor)
    else:
        totals[track] = torch.add(totals[track], part, alpha=factor) if grad else totals[track].add_(part, alpha=factor)
