"""Correlations between the channels of a layer at small distances, without data (mathematics §9, propagated covariances).

    R_δ[i, j] = Corr(u_i(p), u_j(p + δ)) over inputs and positions p, for |δ|_∞ ≤ 2, and R_{−δ} = R_δᵀ.

What is stored are correlations, which no rescaling changes; variances stand beside them (`Moments`). One step through each
layer:

- a convolution: K'_δ = Σ_{t,t'} F·W_t K_λ W_{t'}ᵀ, where λ is the distance of what the taps t at p and t' at p+δ read, and F
  how often both read a neuron: λ = s·δ + d·(t' − t) for stride s and dilation d; phases of a transposed convolution likewise;
- a batch norm, and any other elementwise weight: correlations stay, up to signs;
- a kink: Cov(f(z_i), f(z_j)) = Σ_{k≥1} c_k(i)·c_k(j)·R_ij^k with five Hermite coefficients, exact on the diagonal: what is left
  of the variance goes with the sixth power;
- sums of branches: covariances add up, those across branches are left out; so are those between the pieces of a concatenation;
- constant maps along space (pooling, interpolation, padding, moves): K'_δ = Σ_λ c_δ(λ)·K_λ. Maxima are taken as means here;
- flattening: the covariance of two positions is that of their distance.

Beyond a distance of 2, correlations decay geometrically. A layer of which nothing is known has None: its neurons count as
independent.

Wide layers, of more than `FULL` channels, have R_0, R_ε of one step along each dimension, and of the other distances only
a_δ(i) = R_δ[i, i]: R_δ[i, j] is taken to be R_ε[i, j]·√(a_δ(i)·a_δ(j))/√(a_ε(i)·a_ε(j)), which is what it is where space and
channels have nothing to do with each other. Eleven of 13 matrices are not made.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pathlift.edges import AxisMap, Convolution, Move, Reduce, Window
from pathlift.edges.wall import Beside
from pathlift.graph.layers import Connection, Layer
from pathlift.statistics.kinks import Kink, hermite
from pathlift.statistics.transfer import Elementwise, Weighted

REACH = 2
"""Largest distance along each dimension at which correlations are carried."""

TERMS = 5
"""Hermite coefficients."""

WIDEST = 4096
"""Neurons of a flattened layer up to which all of their correlations are laid out."""

FULL = 1280
"""Channels up to which correlations between them are carried at all distances. What is made of fewer need not be positive
definite, and is then flattened: the classifier behind 1280 channels of MobileNetV2 lost by that."""

MOST = 2.0
"""By what factor correlations of a channel at other distances are at most larger than at one step, for others to go along."""

LEAST = 1e-6
"""Share of the variance of independent inputs that a sum of correlated ones keeps at least: what float32 resolves."""

PIXEL = 0.96
"""Correlation of neighbouring pixels of an image."""

COLOURS = ((1.0, 0.95, 0.88), (0.95, 1.0, 0.95), (0.88, 0.95, 1.0))
"""Correlations between red, green and blue."""

AT_ONCE = 1 << 17
"""Entries of a correlation matrix that are worked on together: they and what is made of them stay within a cache."""

PRODUCTS = 1 << 23
"""Entries of the products K_λ W_{t'}ᵀ that are held at once."""

Lag = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Lags:
    """Correlations of a layer of shape (1, channels, *space).

    Attributes:
        at: Distance to R_δ, float32, (channels, channels), or to its diagonal, (channels,), in wide layers: for 0 and those
            that come after it in lexicographic order.
        space: Sides of the image.
    """

    at: dict[Lag, Tensor]
    space: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.at[(0,) * len(self.space)])

    @cached_property
    def decay(self) -> float:
        """By how much the correlation of a channel with itself falls with each step beyond the reach."""
        ratios = [
            float(self.of_itself(far).mean() / self.of_itself(near).mean().clamp(min=LEAST)) for near, far in self._ends()
        ]
        return min(1.0, max(0.0, sum(ratios) / len(ratios))) if ratios else 0.0

    def _ends(self) -> list[tuple[Lag, Lag]]:
        """Return the distances of one step and of `REACH` along each dimension that has as many: they tell the decay."""

        def along(dim: int, step: int) -> Lag:
            return tuple(step if other == dim else 0 for other in range(len(self.space)))

        return [(along(dim, 1), along(dim, REACH)) for dim, size in enumerate(self.space) if size > REACH]

    def known(self, lag: Lag) -> tuple[Lag, float]:
        """Return the distance within reach that stands for any, and the factor to it."""
        near = tuple(
            max(-limit, min(limit, step))
            for step, limit in zip(lag, (min(REACH, size - 1) for size in self.space), strict=True)
        )
        beyond = sum(abs(step - close) for step, close in zip(lag, near, strict=True))
        return near, 1.0 if beyond == 0 else self.decay**beyond

    @property
    def full(self) -> bool:
        """Whether all of R is carried at all distances."""
        return all(stored.dim() == 2 for stored in self.at.values())

    def _stored(self, lag: Lag) -> Tensor:
        """Return what is carried at a distance within reach, (channels, channels) or (channels,)."""
        if lag in self.at:
            return self.at[lag]
        stored = self.at[tuple(-step for step in lag)]
        return stored.T if stored.dim() == 2 else stored

    def _made_of(self, lag: Lag) -> tuple[Tensor, Tensor, Tensor]:
        """Return R_ε, or its transpose, by what its rows and columns are multiplied, and a_δ: R_δ of a wide layer."""
        alone, step = self.of_itself(lag), self.at[one_step(self.space)]
        own = step.diagonal()
        share = torch.where(own > LEAST, alone.clamp(min=0.0) / own, 0.0).clamp(max=MOST).sqrt()
        return step if lag in self.at else step.T, share, alone

    def of_itself(self, lag: Lag) -> Tensor:
        """Return the correlation of each channel with itself at a distance within reach, (channels,)."""
        stored = self._stored(lag)
        return stored if stored.dim() == 1 else stored.diagonal()

    def near(self, lag: Lag) -> Tensor:
        """Return R at a distance within reach."""
        return self.some_rows_of(lag, slice(None))

    def some_rows_of(self, lag: Lag, rows: slice) -> Tensor:
        """Return rows of R at a distance within reach."""
        stored = self._stored(lag)
        if stored.dim() == 2:
            return stored[rows]
        step, share, alone = self._made_of(lag)
        part = step[rows] * share[rows, None] * share
        first, last, _ = rows.indices(len(alone))
        part[:, first:last].diagonal().copy_(alone[rows])
        return part

    def entries(self, lag: Lag, first: Tensor, second: Tensor) -> Tensor:
        """Return entries of R at a distance within reach, by two tensors of numbers of channels that broadcast."""
        stored = self._stored(lag)
        if stored.dim() == 2:
            return stored[first, second]
        step, share, alone = self._made_of(lag)
        return torch.where(first == second, alone[first], step[first, second] * share[first] * share[second])

    def times(self, lag: Lag, matrix: Tensor) -> Tensor:
        """Return R·M at a distance within reach, M of shape (channels, any)."""
        stored = self._stored(lag)
        if stored.dim() == 2:
            return stored @ matrix
        step, share, alone = self._made_of(lag)
        product = (step @ (matrix * share[:, None])).mul_(share[:, None])
        return product.addcmul_(matrix, (alone - share**2 * step.diagonal())[:, None])

    def summed_of_itself(self, terms: Mapping[Lag, float]) -> Tensor:
        """Return the diagonal of Σ_δ c_δ·R_δ over distances within reach, (channels,)."""
        out = torch.zeros_like(self.at[(0,) * len(self.space)][0])
        for lag, value in terms.items():
            out.add_(self.of_itself(lag), alpha=value)
        return out

    def summed(self, terms: Mapping[Lag, float]) -> Tensor:
        """Return Σ_δ c_δ·R_δ over distances within reach."""
        here = self.at[(0,) * len(self.space)]
        out = torch.zeros_like(here)
        if self.full:
            for rows in some_rows(out, len(terms)) if terms else ():
                parts = [self.some_rows_of(lag, rows) * value for lag, value in terms.items()]
                torch.sum(torch.stack(parts), 0, out=out[rows])
            return out
        several: dict[int, tuple[Tensor, list[Tensor], list[float]]] = {}
        for lag, value in terms.items():
            matrix, share = self._made_of(lag)[:2] if any(lag) else (here, torch.ones_like(here[0]))
            kind = 0 if not any(lag) else 1 if lag in self.at else 2  # R_0, R_ε, its transpose
            _, shares, values = several.setdefault(kind, (matrix, [], []))
            shares.append(share)
            values.append(value)
        for matrix, shares, values in several.values():
            stacked, weights = torch.stack(shares, 1), torch.tensor(values, dtype=out.dtype, device=out.device)
            for rows in some_rows(out):
                out[rows].addcmul_(matrix[rows], (stacked[rows] * weights) @ stacked.T)
        out.diagonal().copy_(self.summed_of_itself(terms))
        return out

    def __getitem__(self, lag: Lag) -> Tensor:
        """Return R at any distance."""
        near, factor = self.known(lag)
        return self.near(near) if factor == 1.0 else self.near(near) * factor

    def given_up(self) -> Iterator[tuple[Lag, Tensor]]:
        """Yield each distance and R there, or its diagonal, which is then forgotten: what is made of it may take its place."""
        for lag in list(self.at):
            yield lag, self.at.pop(lag)

    def of_its_own(self) -> Lags:
        """Return the same matrices under a dictionary of its own, that may be given up."""
        return Lags(dict(self.at), self.space)

    def kept(self, reach: Sequence[int]) -> Lags:
        """Return what is needed up to some distance along each dimension; with the decay, if one of them is beyond reach."""
        ends = set(itertools.chain(*self._ends())) if max(reach, default=0) > REACH else set()
        needed = [
            lag for lag in self.at if lag in ends or all(abs(step) <= most for step, most in zip(lag, reach, strict=True))
        ]
        if any(self.at[lag].dim() == 1 for lag in needed) and one_step(self.space) not in needed:
            needed.append(one_step(self.space))
        return Lags({lag: self.at[lag] for lag in needed}, self.space)


def one_step(space: Sequence[int]) -> Lag:
    """Return the distance of one step along each dimension that has several positions."""
    return tuple(min(1, size - 1) for size in space)


def is_carried(lag: Lag, channels: int, space: Sequence[int]) -> bool:
    """Whether all of R is carried at a distance, not only its diagonal."""
    return channels <= FULL or not any(lag) or lag == one_step(space)


def some_rows(matrix: Tensor, matrices: int = 1) -> Iterator[slice]:
    """Yield the rows of a matrix, of which there are several, that are worked on together."""
    step = max(1, AT_ONCE // max(1, matrices * matrix.shape[1]))
    for first in range(0, len(matrix), step):
        yield slice(first, first + step)


def half(space: Sequence[int]) -> list[Lag]:
    """Return 0 and the distances after it, within reach and within an image."""
    ranges = [range(-min(REACH, size - 1), min(REACH, size - 1) + 1) for size in space]
    return [lag for lag in itertools.product(*ranges) if lag >= (0,) * len(ranges)]


def of_input(layer: Layer, pixel: float, device: torch.device) -> Lags | None:
    """Return the correlations of an input: images have correlated colours and neighbours, other inputs are independent."""
    if len(layer.shape) < 2:
        return None
    channels, space = layer.shape[1], layer.shape[2:]
    between = (
        torch.tensor(COLOURS, dtype=torch.float32, device=device)
        if channels == len(COLOURS) and len(space) == 2
        else torch.eye(channels, dtype=torch.float32)
    )
    between = between.to(device, torch.float32)
    parts = {lag: between if is_carried(lag, channels, space) else between.diagonal() for lag in half(space)}
    return Lags({lag: part * pixel ** sum(map(abs, lag)) for lag, part in parts.items()}, tuple(space))


def through_kink(below: Lags, kink: Kink, mean: Tensor, variance: Tensor, out: Tensor) -> Lags:
    """Return the correlations of f(z).

    Args:
        below: Those of z, which are given up.
        kink: f.
        mean: E z, one for each channel, broadcastable.
        variance: Var z.
        out: Var f(z).

    Returns:
        Correlations.
    """
    channels = below.channels
    size = torch.where(out > 0, out.rsqrt(), 0.0)
    parts = [(part * size).expand(_spread(size, channels)).reshape(-1).float() for part in hermite(kink, mean, variance, TERMS)]
    rest = (1.0 - torch.stack(parts).square().sum(0)).clamp(min=0.0)
    at = {}
    for lag, correlation in below.given_up():
        correlation_above = torch.zeros_like(correlation)
        if correlation.dim() == 2:
            for rows in some_rows(correlation):
                _through_terms(correlation[rows], [part[rows, None] for part in parts], parts, correlation_above[rows])
            same, same_above = correlation.diagonal(), correlation_above.diagonal()
        else:
            _through_terms(correlation, parts, parts, correlation_above)
            same, same_above = correlation, correlation_above
        power = same.clone()
        for _ in parts:
            power *= same
        same_above += rest * power
        at[lag] = _unit(correlation_above, lag)
        del correlation, same
    return Lags(at, below.space)


def _through_terms(correlation: Tensor, first: Sequence[Tensor], second: Sequence[Tensor], out: Tensor) -> None:
    """Add Σ_k c_k(i)·c_k(j)·R^k."""
    power = torch.ones_like(correlation)
    for one, other in zip(first, second, strict=True):
        power *= correlation
        out += power * one * other


def _spread(tensor: Tensor, channels: int) -> list[int]:
    return [channels if dim == 1 else 1 for dim in range(tensor.dim())]


def _unit(correlation: Tensor, lag: Lag) -> Tensor:
    """Move correlations that were made just now into [−1, 1], and to 1 on the diagonal where the distance is 0."""
    correlation.clamp_(-1.0, 1.0)
    if not any(lag) and correlation.dim() == 2:
        correlation.diagonal().fill_(1.0)
    return correlation


def joined(branches: Sequence[tuple[Lags | None, Tensor]], channels: int, space: tuple[int, ...], correlation: float) -> Lags:
    """Return the correlations of a sum of independent branches.

    Args:
        branches: Correlations, which are given up, and variances of each, (channels,); None: channels independent of each
            other.
        channels: Number of channels.
        space: Sides of the image.
        correlation: Of two taps of a channel, where nothing else is known.

    Returns:
        Correlations.
    """
    total = torch.stack([variance for _, variance in branches]).sum(0)
    shares = [torch.where(total > 0, variance / total, 0.0).sqrt().float() for _, variance in branches]
    at = {}
    for lag in half(space):
        full = is_carried(lag, channels, space)
        correlation_of_sum = torch.zeros([channels] * (1 + full), dtype=torch.float32, device=total.device)
        same = correlation_of_sum.diagonal() if full else correlation_of_sum
        for (lags, _), share in zip(branches, shares, strict=True):
            if lags is None:
                same += share**2 * (correlation if any(lag) else 1.0)
            elif not full:
                near, factor = lags.known(lag)
                same += lags.of_itself(near) * factor * share**2
            else:
                one = lags.at.pop(lag) if lags.space == space and lags.full else lags[lag]
                for rows in some_rows(one):
                    correlation_of_sum[rows] += one[rows] * share[rows, None] * share
        at[lag] = _unit(correlation_of_sum, lag)
    return Lags(at, space)


def blurred(lags: Lags, variance: Tensor, more: Tensor) -> Lags:
    """Return the correlations where each channel has an error of its own, the same at all positions.

    Args:
        lags: Correlations without it, which are given up.
        variance: Variances without it, (channels,).
        more: Variance of the error, (channels,).

    Returns:
        Correlations.
    """
    total = variance + more
    there = total > 0
    share = torch.where(there, variance / torch.where(there, total, 1.0), 1.0).float()
    size, at = share.sqrt(), {}
    for lag, correlation in lags.given_up():
        correlation_above = torch.empty_like(correlation)
        if correlation.dim() == 1:
            torch.mul(correlation, share, out=correlation_above).add_(1.0 - share)
        else:
            for rows in some_rows(correlation):
                correlation_above[rows] = correlation[rows] * size[rows, None] * size
            correlation_above.diagonal().add_(1.0 - share)
        at[lag] = _unit(correlation_above, lag)
    return Lags(at, lags.space)


def side_by_side(
    pieces: Sequence[tuple[Lags | None, int]], space: tuple[int, ...], correlation: float, device: torch.device
) -> Lags:
    """Return the correlations of pieces that are concatenated along the channels."""
    at, channels = {}, sum(size for _, size in pieces)
    for lag in half(space):
        if not is_carried(lag, channels, space):
            at[lag] = torch.cat([_alone(lags, lag, size, correlation, device) for lags, size in pieces])
            continue
        blocks = [
            torch.eye(size, dtype=torch.float32, device=device) * (correlation if any(lag) else 1.0)
            if lags is None
            else lags[lag]
            for lags, size in pieces
        ]
        at[lag] = torch.block_diag(*blocks)
    return Lags(at, space)


def _alone(lags: Lags | None, lag: Lag, size: int, correlation: float, device: torch.device) -> Tensor:
    """Return the correlation of each channel with itself at any distance other than 0."""
    if lags is None:
        return torch.full((size,), correlation, dtype=torch.float32, device=device)
    near, factor = lags.known(lag)
    return lags.of_itself(near) * factor


# ---- constant maps along space


def along_space(below: Lags, matrices: Sequence[Tensor | None]) -> tuple[Lags, Tensor]:
    """Carry correlations through a constant map along each dimension, the same for all channels.

    Args:
        below: Correlations below.
        matrices: For each dimension the map, (positions above, positions below); None where nothing happens.

    Returns:
        Correlations above, and the variance of each channel as a multiple of that below, on average over positions.
    """
    space = tuple(size if matrix is None else len(matrix) for size, matrix in zip(below.space, matrices, strict=True))
    weights = [
        {lag: {lag: 1.0} for lag in range(-REACH, REACH + 1)} if matrix is None else _coefficients(matrix.double().cpu())
        for matrix in matrices
    ]
    covariances = {}
    for lag in half(space):
        coefficients: dict[Lag, float] = {}
        for steps in itertools.product(*(weight[step].items() for weight, step in zip(weights, lag, strict=True))):
            near, factor = below.known(tuple(step for step, _ in steps))
            coefficients[near] = coefficients.get(near, 0.0) + factor * math.prod(value for _, value in steps)
        terms = {near: value for near, value in coefficients.items() if value != 0.0}
        full = is_carried(lag, below.channels, space)
        covariances[lag] = below.summed(terms) if full else below.summed_of_itself(terms)
    return _normalised(covariances, space)


def _coefficients(matrix: Tensor) -> dict[int, dict[int, float]]:
    """Return c_δ(λ): the mean over p of Σ_q M[p, q]·M[p+δ, q+λ]."""
    outs, ins = matrix.shape
    coefficients = {}
    for lag in range(-min(REACH, outs - 1), min(REACH, outs - 1) + 1):
        first, last = max(0, -lag), outs - max(0, lag)
        products = matrix[first:last].T @ matrix[first + lag : last + lag] / (last - first)
        coefficients[lag] = {
            step: value for step in range(1 - ins, ins) if (value := float(products.diagonal(step).sum())) != 0.0
        }
    return coefficients


def _normalised(covariances: dict[Lag, Tensor], space: tuple[int, ...]) -> tuple[Lags, Tensor]:
    """Return correlations, which take the place of covariances that were made just now, and variances."""
    variance = covariances[(0,) * len(space)].diagonal().clamp(min=LEAST).clone()
    size, at = variance.rsqrt(), {}
    for lag, covariance in covariances.items():
        correlation = covariance.mul_(size[:, None]).mul_(size) if covariance.dim() == 2 else covariance.div_(variance)
        at[lag] = _unit(correlation, lag)
    return Lags(at, space), variance.double()


def space_maps(
    connection: Connection, below: tuple[int, ...], above: tuple[int, ...], matrix: Tensor | None
) -> list[Tensor | None] | None:
    """Return the constant map along each dimension of space that edges without a weight of their own make; None for others."""
    edges = connection.edges.pool if isinstance(connection.edges, Beside) else connection.edges
    dims = range(2, len(below))
    if isinstance(edges, Window) and len(edges.kernel) <= len(below) - 2:
        reads = edges.reads(above)
        return [_read_matrix(reads[dim], below[dim]) if dim in reads else None for dim in dims]
    if isinstance(edges, Reduce) and all(dim in dims for dim in edges.dims):
        return [torch.ones(1, below[dim], dtype=torch.float64) if dim in edges.dims else None for dim in dims]
    if isinstance(edges, AxisMap) and edges.dim in dims and matrix is not None:
        return [matrix if dim == edges.dim else None for dim in dims]
    if isinstance(edges, Move) and isinstance(edges.spatial, tuple) and len(below) == len(above):
        if any(dim % len(below) < 2 for dim in edges.spatial):
            return None
        return [_moved_matrix(edges, below, dim) for dim in dims]
    return None


def _read_matrix(reads: Tensor, size: int) -> Tensor:
    inside = (reads >= 0) & (reads < size)
    matrix = torch.zeros(len(reads), size + 1, dtype=torch.float64)
    return matrix.scatter_add(1, torch.where(inside, reads, size), torch.ones(reads.shape, dtype=torch.float64))[:, :size]


def _moved_matrix(edges: Move, below: tuple[int, ...], dim: int) -> Tensor:
    numbers = torch.arange(1, below[dim] + 1, dtype=torch.float64).reshape([
        -1 if other == dim else 1 for other in range(len(below))
    ])
    moved = edges.gather(numbers.expand(below))
    read = moved.amax([other for other in range(moved.dim()) if other != dim]).long() - 1
    return _read_matrix(read[:, None], below[dim])


def moved_channels(edges: Move, below: tuple[int, ...], above: tuple[int, ...]) -> Tensor | None:
    """Return which channel below each channel above is when a view moves whole channels about; None for other moves."""
    if len(above) < 2 or above[2:] != below[2:]:
        return None
    numbers = torch.arange(math.prod(below), dtype=torch.float64).reshape(below)
    moved = edges.gather(numbers)
    if tuple(moved.shape) != above:
        return None
    size = math.prod(below[2:])
    first = (moved.reshape(above[1], -1)[:, 0] / size).long()
    expected = first[:, None] * size + torch.arange(size)
    return first if torch.equal(moved.reshape(above[1], -1), expected.double()) else None


def flattened(below: Lags) -> Lags | None:
    """Return the correlations of all neurons, channel by channel; None where there are too many."""
    positions = list(itertools.product(*map(range, below.space)))
    count = below.channels * len(positions)
    if count > WIDEST:
        return None
    correlation = torch.empty(
        below.channels,
        len(positions),
        below.channels,
        len(positions),
        dtype=torch.float32,
        device=below.at[(0,) * len(below.space)].device,
    )
    for (first, p), (second, q) in itertools.product(enumerate(positions), repeat=2):
        correlation[:, first, :, second] = below[tuple(b - a for a, b in zip(p, q, strict=True))]
    return Lags({(): correlation.reshape(count, count)}, ())


# ---- weights


def through_weight(
    below: Lags, connection: Connection, transfer: Weighted, deviation: Tensor, above: tuple[int, ...]
) -> tuple[Lags, Tensor] | None:
    """Carry correlations through a convolution or a linear layer.

    Args:
        below: Correlations below.
        connection: The edges.
        transfer: How moments go along them.
        deviation: √v of the channels below, (channels,).
        above: Shape of the neurons above.

    Returns:
        Correlations and variances above, (channels,); None where the edges are neither.
    """
    groups, _, ins, taps = transfer.pattern.weight.shape
    weight = torch.cat([w for _, w in transfer.chunks()], 1) * deviation.reshape(groups, 1, ins, 1)
    norm = weight.square().sum((2, 3), keepdim=True).sqrt()
    rows = torch.where(norm > 0, weight / norm, 0.0).float()
    if isinstance(connection.edges, Convolution):
        pairs = _tap_pairs(connection, transfer, tuple(above[2:]))
    elif groups == taps == 1 and not below.space:
        pairs = {(): [(0, 0, (), 1.0)]}
    else:
        return None
    covariances = (_depthwise if ins == 1 and groups > 1 else _dense)(below, rows, pairs, tuple(above[2:]))
    lags, variance = _normalised(covariances, tuple(above[2:]))
    return lags, variance * norm.reshape(-1) ** 2


Pairs = dict[Lag, list[tuple[int, int, Lag, float]]]
"""For each distance above: pairs of taps, the distance of what they read, and how often both read a neuron."""


def _tap_pairs(connection: Connection, transfer: Weighted, space: tuple[int, ...]) -> Pairs:
    edges, kernel = connection.edges, transfer.weight.shape[2:]
    assert isinstance(edges, Convolution)
    tables = [edges.taps(dim, outputs, size) for dim, (outputs, size) in enumerate(zip(space, kernel, strict=True))]
    sizes = transfer.below[2:]
    pairs: Pairs = {}
    for lag in half(space):
        each = [_along(table, size, step) for table, size, step in zip(tables, sizes, lag, strict=True)]
        taps = []
        for combination in itertools.product(*each):
            first = second = 0
            for (t, s, _, _), size in zip(combination, kernel, strict=True):
                first, second = first * size + t, second * size + s
            taps.append((first, second, tuple(c[2] for c in combination), math.prod(c[3] for c in combination)))
        pairs[lag] = taps
    return pairs


def _along(table: Tensor, size: int, lag: int) -> list[tuple[int, int, int, float]]:
    """Return pairs of taps along one dimension, the distance of what they read at p and p + lag, and how often."""
    outputs, taps = table.shape
    first, last = max(0, -lag), outputs - max(0, lag)
    here, there = table[first:last], table[first + lag : last + lag]
    pairs = []
    for t, s in itertools.product(range(taps), repeat=2):
        both = (here[:, t] >= 0) & (here[:, t] < size) & (there[:, s] >= 0) & (there[:, s] < size)
        if bool(both.any()):
            distance = int((there[:, s] - here[:, t])[both][0])
            pairs.append((t, s, distance, float(both.double().mean())))
    return pairs


def _dense(below: Lags, rows: Tensor, pairs: Pairs, space: Sequence[int]) -> dict[Lag, Tensor]:
    """Σ F·W_t K_λ W_{t'}ᵀ, with each K_λ W_{t'}ᵀ made once for so many channels above as can be held."""
    groups, outs, _, taps = rows.shape
    kernels = [torch.block_diag(*rows[..., tap]) if groups > 1 else rows[0, :, :, tap].contiguous() for tap in range(taps)]
    turned = [kernel.T.contiguous() for kernel in kernels]
    count = groups * outs
    full = {lag: is_carried(lag, count, space) for lag in pairs}
    covariances = {lag: torch.zeros([count] * (1 + full[lag]), dtype=torch.float32, device=rows.device) for lag in pairs}
    terms: dict[tuple[Lag, int], list[tuple[tuple[Lag, int], float]]] = {}
    for lag, taps_of_both in pairs.items():
        for first, second, distance, share in taps_of_both:
            near, factor = below.known(distance)
            terms.setdefault((lag, first), []).append(((near, second), share * factor))
    uses = Counter(key for several in terms.values() for key, _ in several)
    width = max(64, PRODUCTS // (below.channels * len(uses)))
    for start in range(0, count, width):
        block = slice(start, min(start + width, count))
        products: dict[tuple[Lag, int], Tensor] = {}
        left = uses.copy()
        for (lag, first), several in terms.items():
            sums: Tensor | None = None
            for key, weight in several:
                if key not in products:
                    products[key] = below.times(key[0], turned[key[1]][:, block])
                left[key] -= 1
                term = products[key] if left[key] else products.pop(key)
                if sums is not None:
                    sums.add_(term, alpha=weight)
                else:
                    sums = term if weight == 1.0 and not left[key] else term * weight
            assert sums is not None
            if full[lag]:
                covariances[lag][:, block].addmm_(kernels[first], sums)
            else:
                covariances[lag][block] += torch.linalg.vecdot(turned[first][:, block], sums, dim=0)
    return covariances


def _depthwise(below: Lags, rows: Tensor, pairs: Pairs, space: Sequence[int]) -> dict[Lag, Tensor]:
    """Σ F·w_t w_{t'}ᵀ ∘ K_λ, for one channel below in each group."""
    groups, outs, _, taps = rows.shape
    kernels = rows.reshape(groups * outs, taps)
    covariances = {}
    for lag, several in pairs.items():
        forms: dict[Lag, Tensor] = {}
        for first, second, distance, share in several:
            near, factor = below.known(distance)
            forms.setdefault(near, torch.zeros(taps, taps, dtype=torch.float32, device=rows.device))[first, second] += (
                share * factor
            )
        full = is_carried(lag, groups * outs, space)
        out = torch.zeros([groups * outs] * (1 + full), dtype=torch.float32, device=rows.device)
        for near, form in forms.items():
            shares = kernels @ form
            if not full:
                out += (shares * kernels).sum(1) * below.of_itself(near).repeat_interleave(outs)
                continue
            for some in some_rows(out):
                ins = slice(some.start // outs, -(-min(some.stop, len(out)) // outs))
                correlation = below.some_rows_of(near, ins)
                if outs > 1:
                    correlation = correlation.repeat_interleave(outs, 0).repeat_interleave(outs, 1)
                    correlation = correlation[some.start - ins.start * outs :][: len(out[some])]
                out[some].addcmul_(shares[some] @ kernels.T, correlation)
        covariances[lag] = out
    return covariances


def signed(below: Lags, transfer: Elementwise) -> Lags | None:
    """Return correlations behind a weight for each channel, or for all; None where it has an extent along space."""
    weight = transfer.weight
    if any(size > 1 for dim, size in enumerate(weight.shape) if dim != 1) or weight.dim() != 2 + len(below.space):
        return None
    if bool((weight >= 0).all()):
        return below.of_its_own()
    sign = weight.sign().expand(_spread(weight, below.channels)).reshape(-1).float()
    return Lags(
        {
            lag: correlation if correlation.dim() == 1 else _unit((correlation * sign[:, None]).mul_(sign), lag)
            for lag, correlation in below.at.items()
        },
        below.space,
    )
