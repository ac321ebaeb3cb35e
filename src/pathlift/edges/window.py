"""Edge maps of sums over windows and over dimensions (pooling, means), and their compact forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pathlift.edges.axis import Axis, Table, multiplicity, through_taps
from pathlift.edges.base import Compact
from pathlift.edges.unit import UnitEdges


@dataclass(frozen=True)
class Reduce(UnitEdges):
    """Sum over the dimensions ``dims`` of x."""

    dims: tuple[int, ...]
    keepdim: bool

    def gather(self, x: Tensor) -> Tensor:
        """Sum over the dimensions."""
        return x.sum(self.dims, keepdim=self.keepdim)

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest over the dimensions."""
        return x.amax(self.dims, keepdim=self.keepdim)

    @override
    def antecedents(self, x: Tensor) -> Tensor:
        rest = [dim for dim in range(x.dim()) if dim not in self.dims]
        out = x.permute(*self.dims, *rest).reshape(-1, *(x.shape[dim] for dim in rest))
        return out.reshape(-1, *(1 if dim in self.dims else size for dim, size in enumerate(x.shape))) if self.keepdim else out

    @override
    def compact_unit(self, axes: tuple[Axis, ...], out: tuple[int, ...]) -> Compact:
        del out
        counts = multiplicity(
            [axis if dim in self.dims else Axis.full(1) for dim, axis in enumerate(axes)], torch.device("cpu")
        )
        kept = [
            Axis.full(1) if dim in self.dims else axis for dim, axis in enumerate(axes) if self.keepdim or dim not in self.dims
        ]
        if counts is None:
            return Compact(self, tuple(kept))
        return Compact(Counted(self, counts), tuple(kept))


@dataclass(frozen=True)
class Window(UnitEdges):
    """Sum over sliding windows of the last ``len(kernel)`` dimensions.

    Padding holds no neurons. ``extra`` is what ``ceil_mode`` adds on the right so that the last window fits. The largest of
    windows is folded, one tap after the other: a seventh to a third of the time of `torch.max_pool2d`, which finds indices.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    extra: tuple[int, ...]

    def gather(self, x: Tensor) -> Tensor:
        """Sum over each window, one dimension after the other."""
        plain = len(self.kernel) == 2 and x.dim() == 4 and set(self.dilation) == {1} and not any(self.extra)
        if plain and all(2 * pad <= size for pad, size in zip(self.padding, self.kernel, strict=True)):
            return F.avg_pool2d(x, self.kernel, self.stride, self.padding, False, True, 1)
        return self._fold(x, torch.add)

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest of each window, one dimension after the other."""
        return self._fold(x, torch.maximum)

    @override
    def antecedents(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0)
        for axis in range(len(self.kernel)):
            x = torch.cat(list(self._taps(x, axis, -math.inf)))
        return x

    @override
    def largest(self, x: Tensor) -> Tensor:
        return self._fold(x, torch.maximum, -math.inf)

    def _fold(self, x: Tensor, combine: Callable[[Tensor, Tensor], Tensor], border: float = 0.0) -> Tensor:
        for axis, size in enumerate(self.kernel):
            first, *rest = self._taps(x, axis, border)
            for tap in rest:
                first = combine(first, tap)
            x = first.clone() if size == 1 else first
        return x

    def _taps(self, x: Tensor, axis: int, border: float) -> Iterator[Tensor]:
        """Yield what the windows read along one of their dimensions, for each tap of the kernel."""
        dim = x.dim() - len(self.kernel) + axis
        kernel, stride, dilation = self.kernel[axis], self.stride[axis], self.dilation[axis]
        pad = [0, 0] * (x.dim() - dim)
        pad[-2:] = [self.padding[axis], self.padding[axis] + self.extra[axis]]
        x = F.pad(x, pad, value=border) if any(pad) else x
        count = (x.shape[dim] - dilation * (kernel - 1) - 1) // stride + 1
        for tap in range(kernel):
            index = [slice(None)] * x.dim()
            index[dim] = slice(tap * dilation, tap * dilation + (count - 1) * stride + 1, stride)
            yield x[tuple(index)]

    def reads(self, above: Sequence[int]) -> dict[int, Tensor]:
        """Return the positions below that the positions above read, dimension by dimension.

        Args:
            above: Shape of the neurons above.

        Returns:
            Dimension to positions, shape (positions above, taps); those outside hold no neuron.
        """
        dims = range(len(above) - len(self.kernel), len(above))
        options = zip(dims, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return {
            dim: (torch.arange(above[dim], device="cpu") * stride - padding)[:, None]
            + dilation * torch.arange(kernel, device="cpu")
            for dim, kernel, stride, padding, dilation in options
        }

    @override
    def compact_unit(self, axes: tuple[Axis, ...], out: tuple[int, ...]) -> Compact:
        result, tables = list(axes), {}
        for dim, taps in self.reads(out).items():
            result[dim], tables[dim] = through_taps(axes[dim], taps)
        return Compact(Taps(tables, {dim: axes[dim].count for dim in tables}), tuple(result))


@dataclass(frozen=True, eq=False)
class Counted(UnitEdges):
    """A sum over dimensions where each entry counts several times.

    Attributes:
        pool: The sum where each counts once.
        counts: How often each entry counts; broadcasts against x.
    """

    pool: Reduce
    counts: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Sum."""
        return self.pool.gather(x * self.counts.to(x.device, x.dtype))

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest."""
        return self.pool.gather_max(x)


JOINT = 1 << 14
"""Two matrices along neighbouring dimensions are one, of up to so many entries: a product is worth less than its start."""


class Averages(UnitEdges):
    """Sums along dimensions with given numbers, dimension by dimension (`pathlift.graph.averaged`): out = M·x along each."""

    def __init__(self, matrices: Mapping[int, Tensor]) -> None:
        """Describe the map.

        Args:
            matrices: Dimension to the numbers, shape (above, below), float64, non-negative.
        """
        self.matrices = dict(matrices)
        self._placed: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    @cached_property
    def factors(self) -> list[tuple[int, int, Tensor]]:
        """The products one after the other: first and last dimension, and a matrix for what lies along them, end to end."""
        dims = sorted(self.matrices)
        if len(dims) == 2 and dims[0] + 1 == dims[1] and math.prod(own.numel() for own in self.matrices.values()) <= JOINT:
            return [(dims[0], dims[1], torch.kron(self.matrices[dims[0]], self.matrices[dims[1]]))]
        return [(dim, dim, self.matrices[dim]) for dim in self.matrices]

    def _matrix(self, number: int, like: Tensor) -> Tensor:
        key = (number, like.device, like.dtype)
        if key not in self._placed:
            self._placed[key] = self.factors[number][2].to(like.device, like.dtype)
        return self._placed[key]

    def gather(self, x: Tensor) -> Tensor:
        """Multiply by the matrices."""
        for number, (first, last, _) in enumerate(self.factors):
            above = [len(self.matrices[dim]) for dim in range(first, last + 1)]
            x = along(x.flatten(first, last), self._matrix(number, x), first).unflatten(first, above)
        return x

    def scatter(self, x: Tensor, g: Tensor) -> Tensor:
        """Multiply by the transposed matrices."""
        del x
        for number, (first, last, _) in reversed(list(enumerate(self.factors))):
            below = [self.matrices[dim].shape[1] for dim in range(first, last + 1)]
            g = along(g.flatten(first, last), self._matrix(number, g).T, first).unflatten(first, below)
        return g


class Taps(Averages):
    """A sum over windows along dimensions, each given by the classes that it reads."""

    def __init__(self, tables: Mapping[int, Tensor], counts: Mapping[int, int]) -> None:
        """Describe the map.

        Args:
            tables: Dimension to classes, shape (outputs, taps); the number of classes below stands for "no neuron".
            counts: Dimension to the number of classes below.
        """
        self.tables = {dim: Table(table) for dim, table in tables.items()}
        super().__init__({
            dim: torch
            .zeros(len(table), counts[dim] + 1, dtype=torch.float64)
            .scatter_add_(1, table, torch.ones(table.shape, dtype=torch.float64))
            .narrow(1, 0, counts[dim])
            for dim, table in tables.items()
        })

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest of each window, dimension by dimension."""
        for dim, table in self.tables.items():
            x = read(x, table.on(x.device), dim).amax(dim + 1)
        return x


def read(x: Tensor, table: Tensor, dim: int, none: float = 0.0) -> Tensor:
    """Put what a table of positions says in the place of dimension ``dim`` of x; the position after the last holds ``none``."""
    padded = torch.cat([x, torch.full_like(x.narrow(dim, 0, 1), none)], dim)
    out: Tensor = padded.index_select(dim, table.reshape(-1)).unflatten(dim, tuple(table.shape))
    return out


def along(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Multiply a matrix (out, in) to dimension ``dim`` of x."""
    if dim == x.dim() - 1:
        return F.linear(x, matrix)
    if dim == x.dim() - 2:
        return torch.matmul(matrix, x)
    return F.linear(x.movedim(dim, -1), matrix).movedim(-1, dim)
