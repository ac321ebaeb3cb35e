"""The best of all bounds, output neuron by output neuron, and their improvement step by step (mathematics §4).

A bracket is what is known of ‖Φ(θ)−Φ(θ')‖₁ from both sides. Bounds of several kinds are taken one after the other until they
are close enough; whatever comes later, a bracket never widens, and it can be gone on with.

Why neuron by neuron. ‖Φ−Φ'‖₁ is the sum over the output neurons of what the paths into each contribute, and each kind of bound
is one for every neuron. So the best may be another one for each, and for each end. Example with two outputs: the pivot says
[1, 8] and [2, 3], four moments say [4, 6] and [1, 9], with sums [3, 11] and [5, 15]. The bracket is [4, 6] + [2, 3] = [6, 9].

The ladder. Affinities of order n cost n + 1 sums over all paths, one more where signs differ; four moments cost 9, eight 25. If
ln(Φ'/Φ) is small and has a normal distribution over the paths, both give an upper over lower bound of √3 = 1.73 for n = 4 and
1.33 for n = 8. But moments have a g to choose, so they bear paths that differ by factors of all sizes, and networks so near
each other that affinities cancel. So who asks for no number of moments gets the affinities that by a model of both networks are
within 1.4, if any are; and where they are not, or turn out not to be, four moments, and then the other four. Before them all
comes the pivot, 6 sums, where much of the difference points one way.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pathlift.budget import running
from pathlift.errors import NumericalError
from pathlift.graph.averaged import averaged
from pathlift.metric.affinities import Signs, affinity_bounds, expected_ratio, family_of
from pathlift.metric.common_gauge import CommonGauge
from pathlift.metric.comparison_weights import ByLayer, ComparisonWeights, Likeness, chosen, likeness
from pathlift.metric.moments import Sides, Sum, moment_bounds, moment_sums, near_moment
from pathlift.metric.outputs import log2_sum, multiplicities, per_output
from pathlift.metric.tightening import Dual, Tightened
from pathlift.norm import LOG10_OF_2
from pathlift.passes.differences import PivotProgram
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.rounding import rounding_factor
from pathlift.rescaling.alignment import lifting_error
from pathlift.results import Result

LADDER = (4, 8)
"""Moments that are taken one after the other where nobody says how many …"""

AFFINITIES = (4, 8)
"""… and orders of affinities, of which the first that promises enough comes before."""

SHARP, LOOSE = 1.4, 2.0
"""Up to the first ratio (for fewer than six moments the second) one kind of bound is enough if no more is asked; above the
second the pivot bounds are added."""

LOPSIDED = 0.25
"""Where |D−D'| is predicted to be a larger part of D+D' than this, the pivot bounds may be sharp and are computed too."""

FINE = 20.0
"""Bits by which a bound is larger than what the rounding of the gauge may change."""


@dataclass(frozen=True, repr=False)
class Step(Result):
    """What a step reached.

    Attributes:
        number: 0 for the bounds before tightening.
        by: What was done: a bound's name, or what was improved.
        log10_lower: log₁₀ of the lower bound so far.
        log10_upper: log₁₀ of the upper bound so far.
        seconds: Time since the start, without the time between one call and the next.
    """

    number: int
    by: str
    log10_lower: float
    log10_upper: float
    seconds: float

    @property
    def ratio(self) -> float:
        """Upper over lower bound; see `quotient`."""
        return quotient(self.log10_lower, self.log10_upper)


def quotient(log10_lower: float, log10_upper: float) -> float:
    """Return upper over lower bound: 1 where they are the same, inf when only the lower one is 0."""
    if log10_upper == log10_lower:
        return 1.0
    return math.inf if math.isinf(log10_lower) else 10.0 ** min(log10_upper - log10_lower, 300.0)


@dataclass(frozen=True, eq=False)
class Bracket:
    """Bounds on the path-metric, and what is needed to go on from them: numbers per output neuron and per layer, no weights.

    Attributes:
        count: How many output neurons each entry of the tensors below stands for.
        lower: log₂ per output neuron of the compact graph.
        upper: The same.
        rounding: log₂ of what both networks may have moved when they were rounded into one gauge, at most; the same.
        names: The bounds that were taken.
        sources: For each output neuron which of them gave the lower, and which the upper bound.
        passes: Sums over all paths that were taken.
        history: All steps.
        order: The highest moment and order of the affinities that were asked for so far.
        sums: The moments that are known, by order, of the first choice of g.
        by_layer: g, as far as it is a few numbers for each layer; None where it was not asked for.
        stopped: The time of the call was up before all was done that was asked for.
    """

    count: Tensor
    lower: Tensor
    upper: Tensor
    rounding: Tensor
    names: tuple[str, ...]
    sources: tuple[Tensor, Tensor]
    passes: int
    history: tuple[Step, ...]
    order: int
    sums: Mapping[int, Sum]
    by_layer: ByLayer | None
    stopped: bool

    @property
    def log2(self) -> tuple[float, float]:
        """log₂ of the sums of both bounds over the output neurons."""
        return log2_sum(self.lower, self.count), log2_sum(self.upper, self.count)

    @property
    def by(self) -> tuple[str, str]:
        """The names of the bounds that gave the largest part of the lower and of the upper bound."""
        return self._by(0), self._by(1)

    def _by(self, end: int) -> str:
        values = (self.lower, self.upper)[end]
        shares = self.count * torch.exp2(values - values.max()) if bool(torch.isfinite(values.max())) else self.count
        parts = torch.zeros(len(self.names), dtype=torch.float64, device=shares.device)
        return self.names[int(parts.index_add_(0, self.sources[end], torch.nan_to_num(shares)).argmax())]


class _Narrowing:
    """A bracket in the making: the best bounds so far."""

    def __init__(self, pair: CommonGauge, progress: Callable[[Step], None] | None, before: Bracket | None) -> None:
        self.pair = pair
        self.progress = progress
        self.gauge_rounding = lifting_error(pair.network, pair.roundings)
        self.started = time.monotonic()
        self.stopped = False
        if before is not None:
            self.count, self.lower, self.upper, self.rounding = before.count, before.lower, before.upper, before.rounding
            self.names, self.passes, self.history = list(before.names), before.passes, list(before.history)
            self.sources = [source.clone() for source in before.sources]
            self.started -= before.history[-1].seconds
            return
        self.count = multiplicities(pair.network)
        self.lower, self.upper = torch.full_like(self.count, -math.inf), torch.full_like(self.count, math.inf)
        self.rounding = torch.full_like(self.count, math.inf if self.gauge_rounding else -math.inf)
        self.names, self.passes, self.history = [], 0, []
        self.sources = [torch.zeros_like(self.count, dtype=torch.long) for _ in range(2)]

    def take(self, sides: Sides, passes: int, step: int | None = None) -> None:
        """Keep what is better than before.

        What rounding may have changed when both networks were brought into one gauge is added: by Lemma 4.2, networks whose
        weights are off by u are apart by at most (depth·u)·‖Φ‖₁. Nothing is where all factors are powers of two.
        """
        if sides.mass is not None and self.gauge_rounding:
            self.rounding = torch.minimum(self.rounding, sides.mass + math.log2(self.gauge_rounding))
        if sides.name not in self.names:
            self.names.append(sides.name)
        number = self.names.index(sides.name)
        above_rounding = sides.lower > self.rounding
        gap = torch.where(above_rounding, (self.rounding - sides.lower) * math.log(2.0), -1.0)  # ln(rounding/lower) < 0
        lower = torch.where(above_rounding, sides.lower + torch.log2(-torch.expm1(gap)), -math.inf)
        upper = torch.logaddexp2(sides.upper, self.rounding)
        better = lower > self.lower, upper < self.upper
        self.lower, self.upper = torch.where(better[0], lower, self.lower), torch.where(better[1], upper, self.upper)
        for source, here in zip(self.sources, better, strict=True):
            source[here] = number
        self.passes += passes
        low, high = log2_sum(self.lower, self.count), log2_sum(self.upper, self.count)
        step = self.steps if step is None else step
        self.history.append(Step(step, sides.name, low * LOG10_OF_2, high * LOG10_OF_2, time.monotonic() - self.started))
        if self.progress is not None:
            self.progress(self.history[-1])

    def over(self) -> bool:
        """Whether the time of the call is up; then more is left undone."""
        self.stopped = self.stopped or running().over()
        return self.stopped

    @property
    def steps(self) -> int:
        """How many steps of tightening were made."""
        return self.history[-1].number if self.history else 0

    @property
    def ratio(self) -> float:
        return self.history[-1].ratio if self.history else math.inf

    @property
    def pivoted(self) -> bool:
        """Whether the pivot bounds are known."""
        return "pivot" in self.names

    @property
    def coarse(self) -> bool:
        """Whether more is known to be lost by the rounding of the gauge than need be."""
        return log2_sum(self.rounding, self.count) > log2_sum(self.upper, self.count) - FINE

    def result(self, order: int, sums: Mapping[int, Sum], by_layer: ByLayer | None) -> Bracket:
        sources = self.sources[0], self.sources[1]
        return Bracket(
            self.count, self.lower, self.upper, self.rounding, tuple(self.names), sources, self.passes, tuple(self.history),
            order, sums, by_layer, self.stopped,
        )  # fmt: skip


def pivot_bounds(pair: CommonGauge) -> Sides:
    """Bound by the difference tracks through the pivot m: |D − D'| and D + D' (mathematics §4).

    Args:
        pair: The networks.

    Returns:
        The bounds per output neuron.
    """
    network = averaged(pair.network)

    def attempt(_: torch.dtype) -> tuple[Tensor, float]:
        return per_output(network, propagate(network, PivotProgram(network, pair)), range(4))

    (norm, first, other_norm, second), exponent = in_range(attempt, torch.float64, *pair.values)
    slack = rounding_factor(network) * (first + second)
    lower = ((first - second).abs() - slack).clamp(min=0.0)
    ends = (torch.log2(end) + exponent for end in (lower, first + second + slack, norm + other_norm))
    return Sides("pivot", *ends)


def bracketed(
    pair: CommonGauge,
    order: int | None,
    tighten: int,
    ratio: float,
    progress: Callable[[Step], None] | None,
    before: Bracket | None = None,
) -> tuple[Bracket, ComparisonWeights | None]:
    """Bound the path-metric from both sides.

    Args:
        pair: The networks.
        order: Highest moment and order of the affinities; 0 for the pivot bound alone, None for as many as are needed.
        tighten: Most steps of tightening.
        ratio: Stop at this ratio of the bounds.
        progress: Called with each step.
        before: What is known already.

    Returns:
        The bounds, the best ones so far when the time of the call is up; and the g that was found, weight by weight, if one
        was looked for.
    """
    best = _Narrowing(pair, progress, before)
    reached = before.order if before is not None else -1
    more = tighten > 0 or ratio > 1
    goal = ratio if more else SHARP
    steps = _Steps(best, goal, before)
    if order is None and reached < 0 and not more and steps.promised():
        reached = 0
    for rung in (order,) if order is not None else LADDER[-1:] if more else LADDER:
        if rung > reached and (reached < 0 or (best.ratio > goal and not best.over())):
            steps.take_all(rung, ratio, more=more)
            reached = rung
    weights: ComparisonWeights | None = steps.by_layer
    if tighten and pair.changed and best.ratio > ratio and not best.over():
        search = Tightened(pair, steps.g)
        _tightened(best, reached, tighten, ratio, search)
        weights, steps.by_layer, steps.sums = search.weights, search.weights.by_layer(), {}
    return best.result(reached, steps.sums, steps.by_layer), weights


class _Steps:
    """The bounds that need no search for a better g, and what they share: g by layer, and the moments that are known."""

    def __init__(self, best: _Narrowing, goal: float, before: Bracket | None) -> None:
        self.best, self.pair, self.goal = best, best.pair, goal
        self.by_layer = before.by_layer if before is not None else None
        self.sums = dict(before.sums) if before is not None else {}

    @property
    def g(self) -> ByLayer:
        """g, chosen when it is needed."""
        if self.by_layer is None:
            self.by_layer = chosen(self.pair)
        return self.by_layer

    @cached_property
    def likeness(self) -> Likeness:
        """What both networks share, by the model."""
        return likeness(self.pair)

    def promised(self) -> bool:
        """Take what promises to reach the goal with few sums.

        Where much of the difference points one way, as behind pruning, that is the pivot, which is exact where all of it does;
        else affinities of the lowest order that promises it.

        Returns:
            Whether anything was taken.
        """
        if self.likeness.lopsided > LOPSIDED:
            self._pivot()
            if self.best.ratio <= self.goal:
                return True
        for order in AFFINITIES:
            if expected_ratio(self.pair, order, self.likeness.of_order(order)) <= self.goal:
                self._affinities(order, Signs.MIDDLE)
                return True
        return self.best.pivoted

    def take_all(self, order: int, ratio: float, *, more: bool) -> None:
        """Take bounds, the most promising first, until they are close enough."""
        best = self.best
        # the cheapest bound may reach the ratio, or be the best
        if not best.pivoted and (order < 4 or ratio > 1 or self.likeness.lopsided > LOPSIDED):
            self._pivot()
        if not order:
            return
        kinds = (self._moments, self._affinities)
        first, second = kinds if self.likeness.near else reversed(kinds)
        if best.ratio > ratio:
            first(order)
        if best.ratio > max(ratio, LOOSE) and not best.pivoted:
            self._pivot()
        if best.ratio > ratio and (more or best.ratio > (SHARP if order >= 6 else LOOSE)) and not best.over():
            second(order)

    def _take(self, sides: Sides, passes: int) -> None:
        self.best.take(sides, passes)
        if self.best.coarse and not self.best.pivoted:
            self._pivot()
            self.best.take(sides, 0)

    def _pivot(self) -> None:
        self.best.take(pivot_bounds(self.pair), 6)

    def _moments(self, order: int) -> None:
        for sides, passes in _moments(self.pair, order, self.g, self.sums, self.g.covered):
            self._take(sides, passes)
            if self.best.ratio <= self.goal or self.best.over():
                return

    def _affinities(self, order: int, signs: Signs = Signs.ALL) -> None:
        self._take(affinity_bounds(self.pair, order, signs), family_of(self.pair, order, signs).count)


def _moments(
    pair: CommonGauge, order: int, g: ComparisonWeights, sums: dict[int, Sum], covered: float | None
) -> Iterator[tuple[Sides, int]]:
    """Yield bounds by moments, and how many sums they took; moments that rounding spoils are summed anew when more is asked.

    ``sums`` are the moments that are known already; those that are summed here are added to them.
    """
    fresh, passes = moment_sums(pair, order, g, above=max(sums, default=-1))
    for k, moment in fresh.items():
        better, anew = moment, 0
        if moment.blurred and k:
            if len(sums) > 1:
                yield moment_bounds(sums, covered=covered), passes
                passes = 0
            with contextlib.suppress(NumericalError):  # where it leaves the range of float64, the blurred sum is a bound still
                better, anew = near_moment(pair, k, g)
        passes += anew
        sums[k] = better
    yield moment_bounds(sums, covered=covered), passes


def _tightened(best: _Narrowing, order: int, steps: int, ratio: float, search: Tightened) -> None:
    """Improve g and the dual certificate in turns; what is reached is looked at with all moments at the end of each stage."""
    dual, made = Dual(best.pair), best.steps
    for number in range(1, steps + 1):
        stage = search.stage(number, steps)
        best.take(search.step(stage), 4 * search.evaluations, made + number)
        if not best.over():
            best.take(dual.step(), 6 * 2, made + number)
        last = number == steps or search.stage(number + 1, steps) != stage
        done = best.ratio <= ratio
        if (last or done) and not best.over():
            with torch.no_grad():
                for sides, passes in _moments(best.pair, order, search.weights, {}, None):
                    best.take(sides, passes, made + number)
                    if best.ratio <= ratio:
                        break
        if best.ratio <= ratio or (number < steps and best.over()):
            return
