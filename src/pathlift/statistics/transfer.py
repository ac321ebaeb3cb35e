"""How means and variances go along one bundle of edges (mathematics §9).

Means go as activations do. Variances go along the squares of the weights, but for what several taps of one channel have in
common: with the correlation ρ of two taps, R = (1−ρ)I + ρ11ᵀ and F[t, t'] the share of positions above at which both t and t'
read a neuron (less than 1 where a window reaches into zero padding, or meets the zeros of a transposed convolution),

    m(o) = Σ_it w_oit·F[t, t]·m(i),      v(o) = Σ_i v(i)·w_oiᵀ (F ∘ R) w_oi.

This map is linear in v, and its transpose carries sensitivities back. There are four kinds of bundles:

- weighted ones with a pattern (`pathlift.edges.pattern`): convolutions, linear layers, products with a parameter, where all
  positions of a channel below are alike; where they are not, every neuron above adds up its own, taken as independent;
- elementwise ones, x·w;
- sums over windows and dimensions, and data movement: the neurons of one channel are correlated, those of several are not;
- constant matrices along one dimension.

Any other constant map (`fold`) sums what it reads as if it were independent.

A tensor of moments has the dimensions of its layer, with size 1 where all positions are alike: they have the same scale under
every rescaling, since no weight tells them apart. They are taken as stationary, with the moments that they have on average,
borders included. Which these are follows from the graph, never from values that happen to be equal: numbers of classes
(`Transfer.classes`) travel through the same edges.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pathlift.edges import AxisMap, Convolution, Edges, Identity, Move, Reduce, Scale, Window
from pathlift.edges.pattern import Layout, Pattern
from pathlift.edges.wall import Beside
from pathlift.edges.weights import computed

CHUNK = 1 << 22
"""Weights are squared in chunks of about this many elements."""


def collapsed(classes: Tensor, but: float | None = None) -> Tensor:
    """Return classes with size 1 along every dimension along which all are equal.

    Args:
        classes: A number for each neuron.
        but: The number of neurons that are like any other.

    Returns:
        The same numbers.
    """
    for dim, size in enumerate(classes.shape):
        largest = classes.amax(dim, keepdim=True)
        if size > 1 and bool(((classes == largest) | (False if but is None else classes == but)).all()):
            classes = largest
    return classes


def numbered(tensor: Tensor) -> Tensor:
    """Return a tensor with random whole numbers, always the same, in place of its different values: sums of them are exact."""
    index = tensor.unique(return_inverse=True)[1]
    source = torch.Generator(device="cpu").manual_seed(0)
    numbers = torch.randint(1, 1 << 30, (int(index.max()) + 1,), generator=source, device="cpu").double()
    return numbers.to(tensor.device)[index]


def told_apart(*classes: Tensor) -> Tensor:
    """Return numbers that are equal where those of all tensors are, which broadcast."""
    joined = numbered(classes[0])
    for more in classes[1:]:
        joined = numbered(joined * 3.0 + numbered(more) * 7.0)
    return joined


def each_apart(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return a class of its own for each entry."""
    return torch.arange(math.prod(shape), device=device, dtype=torch.float64).reshape(tuple(shape))


def stationary(mean: Tensor, variance: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean and variance over alike positions, too.

    Args:
        mean: Means.
        variance: Variances.
        shape: Size 1 where positions are alike.

    Returns:
        Both under that shape; what means differ by is part of the variance.
    """
    dims = [dim for dim, (size, wanted) in enumerate(zip(mean.shape, shape, strict=True)) if size > wanted]
    if dims:
        centre = mean.mean(dims, keepdim=True)
        between = (mean - centre).square().mean(dims, keepdim=True)
        mean, variance = centre, variance.expand(torch.broadcast_shapes(mean.shape, variance.shape))
        variance = fitted(variance, [min(pair) for pair in zip(variance.shape, centre.shape, strict=True)]) + between
    return mean.expand(tuple(shape)), fitted(variance, shape)


def fitted(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor with the mean along the dimensions that a shape has not, and expanded along those that it has more of."""
    dims = [dim for dim, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=True)) if size > wanted]
    return (tensor.mean(dims, keepdim=True) if dims else tensor).expand(shape)


class Transfer(ABC):
    """The moments that one bundle of edges brings to the layer above."""

    @abstractmethod
    def classes(self, classes: Tensor, *, alone: bool) -> Tensor:
        """Carry classes of alike neurons.

        Args:
            classes: A number for each class below, with size 1 where neurons are alike.
            alone: There are no other edges to these neurons: those without any (zero padding) are like any other.

        Returns:
            The same above.
        """

    @abstractmethod
    def mean(self, mean: Tensor) -> Tensor:
        """Return what the edges bring to the means.

        Args:
            mean: Means below.

        Returns:
            Means above, broadcastable.
        """

    @abstractmethod
    def variance(self, variance: Tensor, correlation: Tensor) -> Tensor:
        """Return what the edges bring to the variances: linear in those below, and differentiable.

        Args:
            variance: Variances below.
            correlation: ρ below, broadcastable to them.

        Returns:
            Variances above, broadcastable.
        """

    def variance_of_means(self, mean: Tensor, correlation: Tensor) -> Tensor | None:
        """Return what means that are not alike at all positions add to the variance over positions, None for nothing.

        Args:
            mean: Means below.
            correlation: ρ below.

        Returns:
            Variances above.
        """
        del mean, correlation
        return None


@dataclass(frozen=True, eq=False)
class Elementwise(Transfer):
    """x·w, w broadcast over the layer."""

    weight: Tensor
    apart: Tensor | None = None

    def joined(self, other: Elementwise) -> Elementwise:
        """Return what both bring from the same neurons."""
        apart = [part for part in (self.apart, other.apart) if part is not None]
        return Elementwise(self.weight + other.weight, told_apart(*apart) if apart else None)

    @override
    def classes(self, classes: Tensor, *, alone: bool) -> Tensor:
        classes = classes.reshape([1] * (self.weight.dim() - classes.dim()) + list(classes.shape))
        return classes if self.apart is None else told_apart(classes, self.apart)

    @override
    def mean(self, mean: Tensor) -> Tensor:
        return mean * self.weight

    @override
    def variance(self, variance: Tensor, correlation: Tensor) -> Tensor:
        return variance * self.weight**2


@dataclass(frozen=True, eq=False)
class Sums(Transfer):
    """Unit edges, and one weight for each neuron above.

    Attributes:
        edges: The edges.
        below: Shape of the neurons below.
        weight: Weights that broadcast over the neurons above, None for 1.
        channel: The dimension that counts channels below, None when there is no such.
        apart: Classes of neurons above that a parameter among the weights tells apart.
    """

    edges: Edges
    below: tuple[int, ...]
    weight: Tensor | None
    channel: int | None
    apart: Tensor | None = None

    def _sum(self, x: Tensor) -> Tensor:
        return self.edges.sum(x.expand(self.below), None)

    @override
    def classes(self, classes: Tensor, *, alone: bool) -> Tensor:
        edges = self.edges.pool if isinstance(self.edges, Beside) else self.edges
        dims: tuple[int, ...] = ()
        if isinstance(edges, Window):
            dims = tuple(range(len(self.below) - len(edges.kernel), len(self.below)))
        elif isinstance(edges, Reduce):
            dims = edges.dims
        if dims and all(classes.shape[dim] == 1 for dim in dims):
            return classes.squeeze(dims) if isinstance(edges, Reduce) and not edges.keepdim else classes
        padded = alone and isinstance(edges, Move) and isinstance(edges.spatial, tuple)
        carried = collapsed(self._sum(classes), but=0.0 if padded else None)
        return numbered(carried) if self.apart is None else told_apart(carried, self.apart)

    @override
    def mean(self, mean: Tensor) -> Tensor:
        out = self._sum(mean)
        return out if self.weight is None else out * self.weight

    @override
    def variance(self, variance: Tensor, correlation: Tensor) -> Tensor:
        alike = self._alike(variance)
        if alike is None:
            out = self._sum(variance)
        else:
            out = self._sum(variance * (1.0 - correlation)) + alike * self._sum(variance * correlation)
        return out if self.weight is None else out * self.weight**2

    def _alike(self, like: Tensor) -> Tensor | int | None:
        """Return how many neurons of one channel each neuron above reads; None for one."""
        edges = self.edges.pool if isinstance(self.edges, Beside) else self.edges
        if isinstance(edges, Window):
            if self.channel is not None and self.channel >= len(self.below) - len(edges.kernel):
                return None
            return edges.sum(like.new_ones(self.below), None)
        if isinstance(edges, Reduce):
            return math.prod(self.below[dim] for dim in edges.dims if dim != self.channel)
        return None


@dataclass(frozen=True, eq=False)
class Along(Transfer):
    """A constant matrix along one dimension.

    Attributes:
        edges: The edges.
        below: Shape of the neurons below.
        matrix: Its values, (out, in).
        channel: See `Sums`.
    """

    edges: AxisMap
    below: tuple[int, ...]
    matrix: Tensor
    channel: int | None

    def _times(self, matrix: Tensor, x: Tensor) -> Tensor:
        return self.edges.sum(x.expand(self.below), computed(matrix))

    @override
    def classes(self, classes: Tensor, *, alone: bool) -> Tensor:
        if classes.shape[self.edges.dim] == 1:
            return classes
        carried = self._times(self.matrix, classes)
        one = torch.tensor(1.0, dtype=torch.float64, device=classes.device)
        close = (carried / carried.abs().amax().clamp(min=one) * 2.0**40).round()  # equal rows may be summed in another order
        return numbered(collapsed(close))

    @override
    def mean(self, mean: Tensor) -> Tensor:
        return self._times(self.matrix, mean)

    @override
    def variance(self, variance: Tensor, correlation: Tensor) -> Tensor:
        """(1−ρ)·Σ w²·v + ρ·(Σ w)²·v̄, with v̄ = Σ |w|·v / Σ |w|."""
        if self.channel == self.edges.dim:
            return self._times(self.matrix**2, variance)
        size = self.matrix.abs().sum(1, keepdim=True)
        common = torch.where(size > 0, self.matrix.sum(1, keepdim=True) ** 2 / size, 0.0) * self.matrix.abs()
        return self._times(self.matrix**2, variance * (1.0 - correlation)) + self._times(common, variance * correlation)


@dataclass(frozen=True, eq=False)
class Reads:
    """What the taps of a kernel read, over all positions above.

    Attributes:
        together: F, shape (taps, taps): share of the positions above at which both read a neuron.
        lags: Shape (taps, taps, dimensions): how far apart these are, the second minus the first; None when all taps read the
            same neuron.
        merged: How many neurons of one channel each neuron above reads with each tap.
    """

    together: Tensor
    lags: Tensor | None
    merged: int = 1

    @property
    def single(self) -> Tensor:
        """How many neurons each tap reads, on average: shape (taps,)."""
        return self.together.diagonal() * self.merged

    def common(self) -> Tensor:
        """Return what multiplies ρ in w·(…)·w, shape (taps, taps)."""
        return self.together * self.merged * (self.merged if self.lags is None else 1)

    def independent(self) -> Tensor:
        """Return what multiplies 1 − ρ."""
        return self.together * self.merged if self.lags is None else torch.diag(self.together.diagonal())

    def forms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what multiplies products of means, 1 − ρ, and ρ, each (taps, taps)."""
        return self.together * self.merged**2, self.independent(), self.common()


def reads_of(edges: Edges, pattern: Pattern, kernel: Sequence[int], below: Sequence[int], above: Sequence[int]) -> Reads:
    """Find what the taps of a weighted bundle read.

    Args:
        edges: The edges.
        pattern: Their pattern.
        kernel: Shape of the weight beyond the first two dimensions, for a convolution.
        below: Shape of the neurons below.
        above: Shape of those above.

    Returns:
        The reads.
    """
    if not isinstance(edges, Convolution):
        taps, positions = pattern.weight.shape[3], pattern.above.shape[2]
        ones = torch.ones(taps, taps, dtype=torch.float64, device="cpu")
        return Reads(ones, None, len(pattern.triples) // (taps * positions))
    together, lags = torch.ones(1, 1, dtype=torch.float64, device="cpu"), []
    for dim, (size, outputs, inputs) in enumerate(zip(kernel, above[2:], below[2:], strict=True)):
        table = edges.taps(dim, outputs, size)
        there = (table >= 0) & (table < inputs)
        both = there[:, :, None] & there[:, None, :]
        distance = torch.where(both, table[:, None, :] - table[:, :, None], 0)
        lags.append(distance.abs().amax(0) * distance.sum(0).sign())
        together = torch.kron(together, both.double().mean(0))
    grids = [torch.arange(size, device="cpu") for size in kernel]
    digits = torch.cartesian_prod(*grids).reshape(-1, len(kernel)) if kernel else torch.zeros(1, 0, dtype=torch.long)
    steps = [lag[digits[:, dim][:, None], digits[:, dim][None, :]] for dim, lag in enumerate(lags)]
    return Reads(together, torch.stack(steps, 2) if steps else torch.zeros(1, 1, 0, dtype=torch.long))


@dataclass(frozen=True, eq=False)
class Weighted(Transfer):
    """Edges with a weight of several channels.

    Attributes:
        weight: Its value.
        pattern: Its pattern.
        reads: What its taps read.
        below: Shape of the neurons below.
    """

    weight: Tensor
    pattern: Pattern
    reads: Reads
    below: tuple[int, ...]

    @override
    def classes(self, classes: Tensor, *, alone: bool) -> Tensor:
        groups, outs, _, _ = self.pattern.weight.shape
        return numbered(collapsed(self._placed(each_apart((groups, outs), classes.device))))

    def per_channel(self, x: Tensor) -> Tensor:
        """Return the mean of moments over the positions of each channel below, shape (groups, ins)."""
        return self.pattern.below.split(x.expand(self.below)).mean(2)

    def squares(self, mean: Tensor, variance: Tensor, rho: Tensor) -> Tensor:
        """Return E u² of each column.

        Args:
            mean: Of each channel below, (groups, ins).
            variance: Likewise.
            rho: Likewise.

        Returns:
            Shape (groups, ins·taps).
        """
        below = (mean**2, variance * (1.0 - rho), variance * rho)
        taps = (form.diagonal().to(mean.device) for form in self.reads.forms())
        return torch.stack([torch.einsum("gi,t->git", *pair).flatten(1) for pair in zip(below, taps, strict=True)]).sum(0)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the weight, (groups, rows, ins, taps), in float64."""
        blocks = self.pattern.weight.split(self.weight)
        step = max(1, CHUNK // max(1, blocks.numel() // max(1, blocks.shape[1])))
        for first in range(0, blocks.shape[1], step):
            yield slice(first, first + step), blocks[:, first : first + step].double()

    def _placed(self, rows: Tensor) -> Tensor:
        """Give every position above what belongs to its row."""
        layout: Layout = self.pattern.above
        return layout.join(rows.unsqueeze(2).expand(layout.shape))

    @override
    def mean(self, mean: Tensor) -> Tensor:
        below, single = self.per_channel(mean), self.reads.single.to(mean.device)
        return self._placed(torch.cat([torch.einsum("goit,gi->got", w, below) @ single for _, w in self.chunks()], 1))

    @override
    def variance_of_means(self, mean: Tensor, correlation: Tensor) -> Tensor | None:
        """Windows within and such that reach into the padding differ: (w·m)ᵀ (F − F_tt·F_t't') (w·m)."""
        del correlation
        single = self.reads.single
        excess = (self.reads.together - single[:, None] * single[None, :]).to(mean.device)
        if self.reads.lags is None or not bool(excess.any()):
            return None
        below = self.per_channel(mean)
        sums = [torch.einsum("goit,gi->got", w, below) for _, w in self.chunks()]
        return self._placed(torch.cat([((part @ excess) * part).sum(2).clamp(min=0.0) for part in sums], 1))

    @override
    def variance(self, variance: Tensor, correlation: Tensor) -> Tensor:
        rows: Tensor = _Gains.apply(self.per_channel(variance), self.per_channel(correlation), self)
        return self._placed(rows)

    def gains(self, rho: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the matrix from variances below to those above, (groups, rows, ins)."""
        independent, common = self.reads.independent().to(rho.device), self.reads.common().to(rho.device)
        apart_from_others = self.reads.lags is not None or len(common) == 1  # then the first form is diagonal
        for rows, w in self.chunks():
            squares = w.square()
            apart = squares @ independent.diagonal() if apart_from_others else ((w @ independent) * w).sum(3)
            alike = squares @ common.diagonal() if len(common) == 1 else ((w @ common) * w).sum(3)
            yield rows, apart * (1.0 - rho)[:, None] + alike * rho[:, None]


class _Gains(torch.autograd.Function):
    """v(o) = Σ_i gain_oi·v(i), worked off in chunks in either direction."""

    @staticmethod
    def forward(ctx: Any, variance: Tensor, rho: Tensor, transfer: Weighted) -> Tensor:
        ctx.rho, ctx.transfer = rho, transfer
        return torch.cat([torch.einsum("goi,gi->go", gain, variance) for _, gain in transfer.gains(rho)], 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        parts = [torch.einsum("goi,go->gi", gain, g[:, rows]) for rows, gain in ctx.transfer.gains(ctx.rho)]
        return sum(parts[1:], parts[0]), None, None


@dataclass(frozen=True, eq=False)
class Apart(Transfer):
    """Edges with a weight, between neurons that have their own moments at every position.

    Attributes:
        edges: The edges.
        weight: Its value, float64.
        below: Shape of the neurons below.
    """

    edges: Edges
    weight: Tensor
    below: tuple[int, ...]

    def carried(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return Σ x·w."""
        return self.edges.sum(x.expand(self.below), computed(weight))

    @override
    def classes(self, classes: Tensor, *, alone: bool) -> Tensor:
        numbers = numbered(each_apart(self.weight.shape, classes.device)) % (1 << 12)
        return numbered(collapsed(self.carried(classes % (1 << 12), numbers)))

    @override
    def mean(self, mean: Tensor) -> Tensor:
        return self.carried(mean, self.weight)

    @override
    def variance(self, variance: Tensor, correlation: Tensor) -> Tensor:
        return self.carried(variance, self.weight**2)


def transfer_of(
    edges: Edges,
    weight: Tensor | None,
    below: tuple[int, ...],
    above: tuple[int, ...],
    channel: int | None,
    classes: Tensor,
    *,
    constant: bool,
) -> Transfer:
    """Return how moments go along a bundle of edges.

    Args:
        edges: The edges, between full layers.
        weight: Their weight, None for 1.
        below: Shape of the neurons below.
        above: Shape of those above.
        channel: The dimension that counts channels below.
        classes: Those of the neurons below.
        constant: The weight is no parameter: neurons that it tells apart have the same scale all the same.

    Returns:
        The transfer.
    """
    if isinstance(edges, (Identity, Scale)):
        one = torch.ones([1] * len(below), dtype=torch.float64, device=classes.device)
        placed = one if weight is None else edges.sum(one, computed(weight.double()))
        return Elementwise(placed, None if constant else each_apart(placed.shape, classes.device))
    if isinstance(edges, AxisMap):
        assert weight is not None
        return Along(edges, below, weight.double(), channel)
    if isinstance(edges, (Move, Reduce, Window, Beside)) or weight is None or weight.dim() == 0:
        apart = None if weight is None or constant else each_apart(weight.shape, classes.device)
        return Sums(edges, below, None if weight is None else weight.double(), channel, apart)
    pattern = edges.pattern(below, tuple(weight.shape))
    if collapsed(pattern.below.split(classes.expand(below))).shape[2] > 1:
        return Apart(edges, weight.double(), below)
    reads = reads_of(edges, pattern, weight.shape[2:], below, above)
    return Weighted(weight, replace(pattern, triples=pattern.triples[:0].clone()), reads, below)  # the triples may be many
