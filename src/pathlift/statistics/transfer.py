"""How means and variances go along one bundle of edges (mathematics §9).

Means go as activations do. Variances go along the squares of the weights, but for what several taps of one channel have in
common: with the correlation ρ of two taps, R = (1−ρ)I + ρ11ᵀ and F[t, t'] the share of positions above at which both t and t'
read a neuron (less than 1 where a window reaches into zero padding, or meets the zeros of a transposed convolution),

    m(o) = Σ_it w_oit·F[t, t]·m(i),      v(o) = Σ_i v(i)·w_oiᵀ (F ∘ R) w_oi.

This map is linear in v, and its transpose carries sensitivities back. There are four kinds of bundles:

- weighted ones with a pattern (`pathlift.edges.pattern`): convolutions, linear layers, products with a parameter. Each channel
  below is taken as stationary: the positions that share a weight have the mean of their moments;
- elementwise ones, x·w;
- sums over windows and dimensions, and data movement: the neurons of one channel are correlated, those of several are not;
- constant matrices along one dimension.

Any other constant map (`fold`) sums what it reads as if it were independent.

A tensor of moments has the dimensions of its layer, with size 1 where all positions are alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


def collapsed(tensor: Tensor) -> Tensor:
    """Return a tensor with size 1 along every dimension along which it is constant."""
    for dim, size in enumerate(tensor.shape):
        first = tensor.narrow(dim, 0, min(size, 1))
        if size > 1 and bool((tensor == first).all()):
            tensor = first
    return tensor


def fitted(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor with the mean along the dimensions that a shape has not, and expanded along those that it has more of."""
    dims = [dim for dim, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=True)) if size > wanted]
    return (tensor.mean(dims, keepdim=True) if dims else tensor).expand(shape)


class Transfer(ABC):
    """The moments that one bundle of edges brings to the layer above."""

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


@dataclass(frozen=True, eq=False)
class Elementwise(Transfer):
    """x·w, w broadcast over the layer."""

    weight: Tensor

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
    """

    edges: Edges
    below: tuple[int, ...]
    weight: Tensor | None
    channel: int | None

    def _sum(self, x: Tensor) -> Tensor:
        return self.edges.sum(x.expand(self.below), None)

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

    def own(self) -> Tensor:
        """Return what multiplies 1 − ρ."""
        return self.together * self.merged if self.lags is None else torch.diag(self.together.diagonal())


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

    def per_channel(self, x: Tensor) -> Tensor:
        """Return the mean of moments over the positions of each channel below, shape (groups, ins)."""
        return self.pattern.below.split(x.expand(self.below)).mean(2)

    def over_positions(self, mean: Tensor) -> Tensor:
        """Return the variance of means over the positions of each channel below, shape (groups, ins)."""
        full = self.pattern.below.split(mean.expand(self.below))
        return full.var(2, unbiased=False) if collapsed(full).shape[2] > 1 else full.new_zeros(full.shape[:2])

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the weight, (groups, rows, ins, taps), in float64."""
        blocks = self.pattern.weight.split(self.weight)
        step = max(1, CHUNK // max(1, blocks.numel() // max(1, blocks.shape[1])))
        for first in range(0, blocks.shape[1], step):
            yield slice(first, first + step), blocks[:, first : first + step].double()

    def _placed(self, rows: Tensor) -> Tensor:
        """Give every position above what belongs to its row."""
        layout: Layout = self.pattern.above
        full = layout.join(rows.unsqueeze(2).expand(layout.shape))
        return full if rows.requires_grad else collapsed(full)

    @override
    def mean(self, mean: Tensor) -> Tensor:
        below, single = self.per_channel(mean), self.reads.single.to(mean.device)
        return self._placed(torch.cat([torch.einsum("goit,gi->got", w, below) @ single for _, w in self.chunks()], 1))

    @override
    def variance_of_means(self, mean: Tensor, correlation: Tensor) -> Tensor | None:
        """Windows within and such that reach into the padding differ, (w·m)ᵀ (F − F_tt·F_t't') (w·m); and what differs below."""
        single, varied = self.reads.single, self.over_positions(mean)
        excess = (self.reads.together - single[:, None] * single[None, :]).to(mean.device)
        pieces: list[Tensor] = []
        if bool(varied.any()):
            rho = self.per_channel(correlation)
            pieces.append(torch.cat([torch.einsum("goi,gi->go", gain, varied) for _, gain in self.gains(rho)], 1))
        if self.reads.lags is not None and bool(excess.any()):
            below = self.per_channel(mean)
            sums = [torch.einsum("goit,gi->got", w, below) for _, w in self.chunks()]
            pieces.append(torch.cat([((part @ excess) * part).sum(2).clamp(min=0.0) for part in sums], 1))
        return self._placed(sum(pieces[1:], pieces[0])) if pieces else None

    @override
    def variance(self, variance: Tensor, correlation: Tensor) -> Tensor:
        rows: Tensor = _Gains.apply(  # type: ignore[no-untyped-call]
            self.per_channel(variance), self.per_channel(correlation), self
        )
        return self._placed(rows)

    def gains(self, rho: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the matrix from variances below to those above, (groups, rows, ins)."""
        own, common = self.reads.own().to(rho.device), self.reads.common().to(rho.device)
        for rows, w in self.chunks():
            apart, alike = (((w @ form) * w).sum(3) for form in (own, common))
            yield rows, apart * (1.0 - rho)[:, None] + alike * rho[:, None]


class _Gains(torch.autograd.Function):
    """v(o) = Σ_i gain_oi·v(i), worked off in chunks in either direction."""

    @staticmethod
    def forward(ctx: Any, variance: Tensor, rho: Tensor, transfer: Weighted) -> Tensor:  # type: ignore[override]
        ctx.rho, ctx.transfer = rho, transfer
        return torch.cat([torch.einsum("goi,gi->go", gain, variance) for _, gain in transfer.gains(rho)], 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        parts = [torch.einsum("goi,go->gi", gain, g[:, rows]) for rows, gain in ctx.transfer.gains(ctx.rho)]
        return sum(parts[1:], parts[0]), None, None


def transfer_of(
    edges: Edges, weight: Tensor | None, below: tuple[int, ...], above: tuple[int, ...], channel: int | None
) -> Transfer:
    """Return how moments go along a bundle of edges.

    Args:
        edges: The edges, between full layers.
        weight: Their weight, None for 1.
        below: Shape of the neurons below.
        above: Shape of those above.
        channel: The dimension that counts channels below.

    Returns:
        The transfer.
    """
    if isinstance(edges, (Identity, Scale)):
        one = torch.ones([1] * len(below), dtype=torch.float64, device=None if weight is None else weight.device)
        return Elementwise(one if weight is None else edges.sum(one, computed(weight.double())))
    if isinstance(edges, AxisMap):
        assert weight is not None
        return Along(edges, below, weight.double(), channel)
    if isinstance(edges, (Move, Reduce, Window, Beside)) or weight is None or weight.dim() == 0:
        return Sums(edges, below, None if weight is None else weight.double(), channel)
    pattern = edges.pattern(below, tuple(weight.shape))
    return Weighted(weight, pattern, reads_of(edges, pattern, weight.shape[2:], below, above), below)
