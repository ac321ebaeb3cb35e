"""An unbiased estimate of ‖Φ(θ)−Φ(θ')‖₁ from sampled paths (mathematics §4, "Unbiased estimate").

Paths are drawn backwards from the outputs: at a neuron v the edge from u is taken with probability w(u→v)·A(u)/A(v), or a
bias b with b/A(v), so a path has the probability of its product of w over the sum of all. Three samplers take turns, with
w = |θ|, |θ'| and g, and each path counts by the mean of the three probabilities (the balance heuristic): no path of either
network is missed, and the numbers that are averaged are bounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from pathlift.arguments.common import Randomness, source_of
from pathlift.edges.base import Edges
from pathlift.edges.chain import Chain
from pathlift.edges.movement import Move, StridedView
from pathlift.edges.unit import Gather, Identity
from pathlift.edges.weights import Weights
from pathlift.graph.layers import Bias, Connection, Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.metric.common_gauge import CommonGauge
from pathlift.metric.outputs import times
from pathlift.norm import LOG10_OF_2
from pathlift.passes.characters import CharacterProgram, ComparisonWeights, Moments
from pathlift.passes.programs import NormProgram
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.scaled import Scaled, power
from pathlift.passes.tracks import Program
from pathlift.results import Result

NEAR, FAR = (0.15, 0.15, 0.7), (0.45, 0.45, 0.1)
"""Shares of the samples that |θ|, |θ'| and g draw, for networks near each other and far from each other."""

CHUNK = 1 << 22
"""Antecedents that are looked at together."""


@dataclass(frozen=True, repr=False)
class Estimate(Result, line=("value", "low", "high", "confidence", "samples")):
    """An unbiased estimate.

    Attributes:
        value: The estimate; inf past float64's range.
        low: Lower end of the confidence interval.
        high: Upper end.
        log10_value: log₁₀ of the estimate; the ends likewise.
        log10_low: −inf for 0.
        log10_high: See ``log10_value``.
        confidence: Probability with which such intervals cover the truth, for many samples (normal approximation).
        samples: Number of sampled paths.
    """

    value: float
    low: float
    high: float
    log10_value: float
    log10_low: float
    log10_high: float
    confidence: float
    samples: int


def estimated(
    pair: CommonGauge,
    g: ComparisonWeights,
    near: bool,
    samples: int,
    confidence: float,
    source: Randomness,
) -> Estimate:
    """Estimate the path-metric.

    Args:
        pair: The networks.
        g: The comparison weights.
        near: Whether the networks are near each other; decides who draws how many paths.
        samples: Number of paths.
        confidence: Of the interval.
        source: Of randomness, on the CPU; or a seed.

    Returns:
        The estimate.

    Raises:
        NumericalError: A weight is not finite.
    """
    generator = _on(pair.network.device, source)
    draws = [_Draw(pair, g, program, generator) for program in _programs(pair, g)]
    totals = [draw.total for draw in draws]
    shares = [0.0 if math.isinf(total) else share for share, total in zip(NEAR if near else FAR, totals, strict=True)]
    if not any(shares):
        return Estimate(0.0, 0.0, 0.0, -math.inf, -math.inf, -math.inf, confidence, samples)
    counts = _apportioned(shares, samples)
    drawn = [draw.paths(count) for draw, count in zip(draws, counts, strict=True)]
    unit = max(totals)
    means, variance = 0.0, 0.0
    for paths in drawn:
        if len(paths.first):
            values = paths.weighted([count / samples for count in counts], totals, unit)
            share = len(values) / samples
            means += share * float(values.mean())
            second = float(values.var()) if len(values) > 1 else float(values[0]) ** 2
            variance += share**2 * second / len(values)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance)
    (value, log10), (low, log10_low), (high, log10_high) = (
        times(end, unit * LOG10_OF_2) for end in (means, max(means - half, 0.0), means + half)
    )
    return Estimate(value, low, high, log10, log10_low, log10_high, confidence, samples)


def _on(device: torch.device, source: Randomness) -> torch.Generator:
    """Return a source of randomness on a device: the given one, or one that begins with a number from it."""
    source = source_of(source)
    if source.device.type == device.type:
        return source
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=source, device=source.device)))


def _apportioned(shares: list[float], samples: int) -> list[int]:
    """Split a number of samples; a sampler that is to draw draws at least two, or g alone does, which misses no path."""
    total = sum(shares)
    counts = [max(2, int(samples * share / total)) if share else 0 for share in shares]
    most = max(range(len(shares)), key=shares.__getitem__)
    counts[most] += samples - sum(counts)
    return counts if counts[most] >= 2 else [0, 0, samples]


def _programs(pair: CommonGauge, g: ComparisonWeights) -> list[Program]:
    """Return the path programs of |θ|, |θ'| and g."""
    network = pair.network
    programs: list[Program] = [NormProgram(network, values, torch.float64) for values in pair.values]
    return [*programs, CharacterProgram(network, pair, [Moments(0, g)])]


class _Paths:
    """What is known of sampled paths: log₂|Φ|, log₂ Φ(g), ln|Φ'/Φ| where both are not 0, log₂|Φ'|, and the sign of ΦΦ'."""

    def __init__(self, count: int, device: torch.device) -> None:
        zeros = torch.zeros(count, dtype=torch.float64, device=device)
        self.first, self.second, self.third, self.apart = (zeros.clone() for _ in range(4))
        self.sign = torch.ones_like(zeros)

    def step(self, samples: Tensor, a: Tensor, b: Tensor, g: Tensor) -> None:
        """Multiply by the weights of one edge each."""
        self.first[samples] += torch.log2(a.abs())
        self.second[samples] += torch.log2(b.abs())
        self.third[samples] += torch.log2(g)
        self.sign[samples] *= torch.sign(a) * torch.sign(b)
        ratio = (b - a) / torch.where(a != 0, a, 1.0)
        same = a * b > 0
        near = torch.log1p(torch.where(same, ratio, 0.0))
        self.apart[samples] += torch.where(same, near, torch.log(b.abs()) - torch.log(a.abs()))

    def weighted(self, shares: list[float], totals: list[float], unit: float) -> Tensor:
        """Return |Φ'−Φ| over the mean probability, in units of 2**unit."""
        a, b = self.first, self.second
        larger = torch.maximum(a, b)
        gap = torch.where(self.sign > 0, torch.expm1(-self.apart.abs()).abs(), 1.0 + torch.exp2(-(a - b).abs()))
        gap = torch.where(torch.isinf(torch.minimum(a, b)), 1.0, gap)
        logs = torch.stack([size - total for size, total in zip((a, b, self.third), totals, strict=True)])
        logs = torch.where(torch.isnan(logs), -math.inf, logs)
        weights = torch.tensor(shares, dtype=torch.float64, device=a.device)[:, None]
        top = logs.amax(0)
        density = torch.log2((weights * torch.exp2(logs - top)).sum(0)) + top
        return torch.where(torch.isinf(larger), 0.0, gap * torch.exp2(larger - density - unit))


class _Draw:
    """One sampler."""

    def __init__(self, pair: CommonGauge, g: ComparisonWeights, program: Program, generator: torch.Generator) -> None:
        self.pair = pair
        self.network: Network = pair.network
        self.g = g
        self.program = program
        self.generator = generator
        self.tracks = in_range(lambda _: propagate(self.network, program, keep=True), torch.float64, *pair.values)
        sums = []
        for name in self.network.outputs:
            layer, value = self.network.layer[name], self.tracks[name][0]
            if value is not None:
                count = layer.multiplicity(self.network.device)
                mass = (value.tensor if count is None else value.tensor * count).expand(layer.shape)
                sums.append((name, mass.reshape(-1), value.exponent))
        self.outputs = sums
        self.exponent = max((exponent for _, _, exponent in sums), default=0.0)
        self.masses = torch.cat([mass * power(exponent - self.exponent) for _, mass, exponent in sums]) if sums else None

    @property
    def total(self) -> float:
        """log₂ of the sum over all paths."""
        if self.masses is None or float(self.masses.sum()) == 0.0:
            return -math.inf
        return math.log2(float(self.masses.sum())) + self.exponent

    def paths(self, count: int) -> _Paths:
        """Draw paths."""
        device = self.network.device
        paths = _Paths(count, device)
        if not count:
            return paths
        assert self.masses is not None
        chosen = _picked(self.masses.expand(1, -1), self._uniform(count))
        waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}
        start = 0
        for name, mass, _ in self.outputs:
            here = ((chosen >= start) & (chosen < start + len(mass))).nonzero()[:, 0]
            waiting.setdefault(name, []).append((here, chosen[here] - start))
            start += len(mass)
        for layer in reversed(self.network.layers):
            arrived = waiting.pop(layer.name, [])
            if not arrived or layer.kind == "input":
                continue
            samples, at = (torch.cat(parts) for parts in zip(*arrived, strict=True))
            if len(samples):
                self._passed_on(layer, samples, at, paths, waiting)
        return paths

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, dtype=torch.float64, device=self.network.device, generator=self.generator)

    def _passed_on(
        self, layer: Layer, samples: Tensor, at: Tensor, paths: _Paths, waiting: dict[str, list[tuple[Tensor, Tensor]]]
    ) -> None:
        """Send the samples that have come to the neurons ``at`` of a layer on, each along one edge or to a bias."""
        choice = self._chosen(layer, at)
        options: list[Connection | Bias] = [*layer.connections, *layer.biases]
        for number, option in enumerate(options):
            here = (choice == number).nonzero()[:, 0]
            if not len(here):
                continue
            drawn, spots = samples[here], at[here]
            if isinstance(option, Bias):
                self._start(layer, option, drawn, spots, paths)
                continue
            connection = option
            if layer.concat is not None:
                index = torch.unravel_index(spots, layer.shape)
                first = sum(layer.concat.sizes[:number])
                shape = layer.concat.shape(number, layer.shape)
                spots = _flat([axis - first if dim == layer.concat.dim else axis for dim, axis in enumerate(index)], shape)
            else:
                shape = layer.shape
            waiting.setdefault(connection.source, []).append((drawn, self._edge(connection, shape, drawn, spots, paths)))

    def _chosen(self, layer: Layer, at: Tensor) -> Tensor:
        """Choose for each sample which bundle of edges, or after them which bias, it goes along."""
        if layer.concat is not None:
            along = torch.unravel_index(at, layer.shape)[layer.concat.dim]
            ends = torch.tensor(layer.concat.sizes, device=at.device).cumsum(0)
            return torch.searchsorted(ends, along.contiguous(), right=True)
        if len(layer.connections) + len(layer.biases) == 1:
            return torch.zeros_like(at)
        values = [self._brought(connection) for connection in layer.connections] + [self._biases(bias) for bias in layer.biases]
        top = max((value.exponent for value in values if value is not None), default=0.0)
        nothing = torch.zeros(len(at), dtype=torch.float64, device=at.device)
        rows = [nothing if value is None else value.at(top).expand(layer.shape).reshape(-1)[at] for value in values]
        return _picked(torch.stack(rows, 1), self._uniform(len(at)))

    def _brought(self, connection: Connection) -> Scaled | None:
        below = self.tracks[connection.source][0]
        weights = self._weights(connection)
        if below is None:
            return None
        exponent = below.exponent + (0.0 if weights is None else weights.exponent)
        return Scaled(connection.edges.sum(below.tensor, weights), exponent)

    def _weights(self, connection: Connection) -> Weights | None:
        return None if connection.weight is None else self.program.edge(connection.weight)[0, 0]

    def _biases(self, bias: Bias) -> Scaled | None:
        weights = self.program.start(bias.weight).get(0)
        return None if weights is None else Scaled(weights.full().reshape(bias.view), weights.exponent)

    def _start(self, layer: Layer, bias: Bias, samples: Tensor, at: Tensor, paths: _Paths) -> None:
        weight = bias.weight
        if weight in self.pair.changed:
            index = torch.arange(math.prod(weight.shape), device=at.device).reshape(bias.view).expand(layer.shape)
            paths.step(samples, *self._values(weight, torch.unravel_index(index.reshape(-1)[at], weight.shape)))

    def _values(self, weight: WeightTensor, where: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return θ, θ' and g at some positions of a weight tensor."""
        a, b = self.pair.joined(*(part[where].double() for part in self.pair.parts(weight)))
        return a, b, self.g(weight, a, b, *(extra[where] for extra in self.g.extras(weight)))

    def _edge(self, connection: Connection, shape: tuple[int, ...], samples: Tensor, at: Tensor, paths: _Paths) -> Tensor:
        """Choose an antecedent for each sample; returns where it is below."""
        below = self.tracks[connection.source][0]
        assert below is not None
        links = connection.edges.links if isinstance(connection.edges, Chain) else (connection.edges,)
        weighted = connection.edges.weighted if isinstance(connection.edges, Chain) else 0
        weights = self._weights(connection)
        values = [below.tensor]
        for number, link in enumerate(links[:-1]):
            values.append(link.sum(values[-1], weights if number == weighted else None))
        shapes = [*(tuple(value.shape) for value in values[1:]), shape]
        for number in reversed(range(len(links))):
            link_weights = weights if number == weighted else None
            weight = connection.weight if number == weighted else None
            if weight is not None and weight in self.pair.changed:
                at = self._weighted(links[number], weight, values[number], samples, at, paths)
            else:
                at = self._unweighted(links[number], values[number], link_weights, shapes[number], at)
        return at

    def _unweighted(self, edges: Edges, x: Tensor, w: Weights | None, shape: tuple[int, ...], at: Tensor) -> Tensor:
        """Edges whose weights are the same in both networks: only where they lead to matters."""
        if isinstance(edges, (Identity, Move, Gather, StridedView)):
            numbers = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device).reshape(x.shape)
            return edges.gather(numbers).expand(shape).reshape(-1)[at].long() - 1
        unique, which = torch.unique(at, return_inverse=True)
        out = torch.empty_like(at)
        uniform = self._uniform(len(at))
        like = edges.sum(x, w)
        for number, neuron in enumerate(unique.tolist()):
            unit = torch.zeros(shape, dtype=x.dtype, device=x.device)
            unit.view(-1)[neuron] = 1.0
            back, _ = edges.adjoint(x, w, unit.sum_to_size(like.shape), below=True, share=False)
            assert back is not None
            here = (which == number).nonzero()[:, 0]
            out[here] = _picked((back * x).reshape(1, -1), uniform[here])
        return out

    def _weighted(self, edges: Edges, weight: WeightTensor, x: Tensor, samples: Tensor, at: Tensor, paths: _Paths) -> Tensor:
        """Edges of weights that differ: the pattern of the map says which weight stands where."""
        pattern = edges.pattern(tuple(x.shape), weight.shape)
        device = x.device
        numbered = torch.arange(math.prod(pattern.above.original), device=device).reshape(pattern.above.original)
        spots = _inverse(pattern.above.split(numbered))
        group, out, position = (axis[at] for axis in spots)
        taps, sources = _by_position(pattern.triples.to(device), pattern.above.shape[2])
        below = pattern.below.split(torch.arange(x.numel(), device=device).reshape(pattern.below.original))
        masses = pattern.below.split(x.reshape(pattern.below.original))
        index = pattern.weight.split(torch.arange(math.prod(weight.shape), device=device).reshape(pattern.weight.original))
        result = torch.empty_like(at)
        step = max(1, CHUNK // max(1, masses.shape[1] * taps.shape[1]))
        for part in torch.arange(len(at), device=device).split(step):
            groups, outs, positions = group[part], out[part], position[part]
            tap, source = taps[positions], sources[positions]  # (samples, most antecedents of a position)
            there = tap >= 0
            tap, source = tap.clamp(min=0), source.clamp(min=0)
            ins = torch.arange(masses.shape[1], device=device)[None, :, None]
            where = index[groups[:, None, None], outs[:, None, None], ins, tap[:, None, :]]
            a, b, g = self._values(weight, torch.unravel_index(where, weight.shape))
            offered = self._offered(a, b, g) * masses[groups[:, None, None], ins, source[:, None, :]] * there[:, None, :]
            choice = _picked(offered.flatten(1), self._uniform(len(part)))
            row = torch.arange(len(part), device=device)
            i, t = choice // tap.shape[1], choice % tap.shape[1]
            result[part] = below[groups, i, source[row, t]]
            paths.step(samples[part], a[row, i, t], b[row, i, t], g[row, i, t])
        return result

    def _offered(self, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        """Return the weights of this sampler."""
        if isinstance(self.program, NormProgram):
            return (a if self.program.values[0] is self.pair.values[0] else b).abs()
        return g


def _picked(weights: Tensor, uniform: Tensor) -> Tensor:
    """Choose a column for each row (or from one row for all), with probability proportional to its weight."""
    sums = weights.cumsum(1)
    targets = uniform * sums[:, -1]
    # the first column whose sum exceeds the target: never a column of weight 0
    if len(weights) == 1:
        columns = torch.searchsorted(sums[0].contiguous(), targets, right=True)
    else:
        columns = torch.searchsorted(sums, targets[:, None], right=True)[:, 0]
    return columns.clamp(max=weights.shape[1] - 1)


def _flat(index: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    flat = torch.zeros_like(index[0])
    for axis, size in zip(index, shape, strict=True):
        flat = flat * size + axis
    return flat


def _inverse(numbered: Tensor) -> tuple[Tensor, ...]:
    """Return where each number 0, 1, … stands in a tensor of all of them."""
    order = torch.empty(numbered.numel(), dtype=torch.long, device=numbered.device)
    order[numbered.reshape(-1)] = torch.arange(numbered.numel(), device=numbered.device)
    return torch.unravel_index(order, numbered.shape)


def _by_position(triples: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the taps and the positions below that each position above reads, padded with −1: (positions above, most)."""
    order = torch.argsort(triples[:, 2], stable=True)
    tap, source, position = triples[order].T
    counts = torch.bincount(position, minlength=count)
    column = torch.arange(len(position), device=position.device) - (counts.cumsum(0) - counts)[position]
    tables = [torch.full((count, max(1, int(counts.max()))), -1, dtype=torch.long, device=position.device) for _ in range(2)]
    tables[0][position, column] = tap
    tables[1][position, column] = source
    return tables[0], tables[1]
