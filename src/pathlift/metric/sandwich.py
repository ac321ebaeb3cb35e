"""The best of all bounds, output neuron by output neuron, and their improvement step by step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.budget import running
from pathlift.errors import NumericalError
from pathlift.metric.affinities import affinity_bounds
from pathlift.metric.common_gauge import Frame
from pathlift.metric.comparison_weights import chosen
from pathlift.metric.moments import Sides, moment_bounds, moment_sums, near_moment
from pathlift.metric.per_output import counts, laid, log2_sum
from pathlift.metric.tightening import Dual, Tightened
from pathlift.norm import LOG10_OF_2
from pathlift.passes.characters import ComparisonWeights
from pathlift.passes.differences import PivotProgram
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.rounding import rounding_factor
from pathlift.rescaling.alignment import lifting_error
from pathlift.results import Result

SHARP, LOOSE = 1.4, 2.0
"""Up to the first ratio (for fewer than six moments the second) one kind of bound is enough if no more is asked; above the
second the pivot bounds are added."""

LOPSIDED = 0.25
"""Where |D−D'| is predicted to be a larger part of D+D' than this, the pivot bounds may be sharp and are computed too."""

FINE = 20.0
"""Bits by which a bound is larger than what the rounding of the gauge may change."""

LIKE = 0.05
"""Networks whose path-liftings have a cosine below this (by a rough model) are compared by affinities first."""


@dataclass(frozen=True, repr=False)
class Step(Result):
    """What a step reached.

    Attributes:
        number: 0 for the bounds before tightening.
        by: What was done: a bound's name, or what was improved.
        log10_lower: log₁₀ of the lower bound so far.
        log10_upper: log₁₀ of the upper bound so far.
        seconds: Time since the start.
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


@dataclass(frozen=True)
class Enclosed:
    """Bounds on the path-metric.

    Attributes:
        lower: log₂ per output neuron of the compact graph.
        upper: The same.
        log2_lower: log₂ of the sum.
        log2_upper: The same.
        lower_by: The bound that gave most of it.
        upper_by: The same.
        passes: Sums over all paths that were taken.
        history: All steps.
        reference: The g that was found.
        near: Whether the path-liftings are alike, by a rough model.
        stopped: The time of the call was up before all was done that was asked for.
    """

    lower: Tensor
    upper: Tensor
    log2_lower: float
    log2_upper: float
    lower_by: str
    upper_by: str
    passes: int
    history: tuple[Step, ...]
    reference: ComparisonWeights
    near: bool
    stopped: bool


class _Best:
    """The best bounds so far."""

    def __init__(self, pair: Frame, progress: Callable[[Step], None] | None) -> None:
        self.count = counts(pair.network)
        self.lower = torch.full_like(self.count, -math.inf)
        self.upper = torch.full_like(self.count, math.inf)
        self.rounding = lifting_error(pair.network, pair.roundings)
        self.moved = torch.full_like(self.count, math.inf if self.rounding else -math.inf)
        self.names: list[str] = []
        self.sources = [torch.zeros_like(self.count, dtype=torch.long) for _ in range(2)]
        self.passes = 0
        self.history: list[Step] = []
        self.progress = progress
        self.started = time.monotonic()
        self.stopped = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def take(self, sides: Sides, passes: int, step: int = 0) -> None:
        """Keep what is better than before.

        What rounding may have changed when both networks were brought into one gauge is added: by Lemma 4.2, networks whose
        weights are off by u are apart by at most (depth·u)·‖Φ‖₁. Nothing is where all factors are powers of two.
        """
        if sides.mass is not None and self.rounding:
            self.moved = torch.minimum(self.moved, sides.mass + math.log2(self.rounding))
        if sides.name not in self.names:
            self.names.append(sides.name)
        place = self.names.index(sides.name)
        lower = torch.where(sides.lower > self.moved, sides.lower + torch.log2(-torch.expm1(self._gap(sides.lower))), -math.inf)
        upper = torch.logaddexp2(sides.upper, self.moved)
        above, below = lower > self.lower, upper < self.upper
        self.lower, self.upper = torch.where(above, lower, self.lower), torch.where(below, upper, self.upper)
        for source, better in zip(self.sources, (above, below), strict=True):
            source[better] = place
        self.passes += passes
        low, high = log2_sum(self.lower, self.count), log2_sum(self.upper, self.count)
        self.history.append(Step(step, sides.name, low * LOG10_OF_2, high * LOG10_OF_2, self.seconds))
        if self.progress is not None:
            self.progress(self.history[-1])

    def _gap(self, lower: Tensor) -> Tensor:
        """Ln of what moved, relative to a lower bound."""
        return torch.where(lower > self.moved, (self.moved - lower) * math.log(2.0), -1.0)

    def over(self) -> bool:
        """Whether the time of the call is up; then more is left undone."""
        self.stopped = self.stopped or running().over()
        return self.stopped

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
        return log2_sum(self.moved, self.count) > log2_sum(self.upper, self.count) - FINE

    def by(self, end: int) -> str:
        """Return the name of the bound that gave the largest part."""
        values = (self.lower, self.upper)[end]
        shares = self.count * torch.exp2(values - values.max()) if bool(torch.isfinite(values.max())) else self.count
        parts = torch.zeros(len(self.names), dtype=torch.float64, device=shares.device)
        return self.names[int(parts.index_add_(0, self.sources[end], torch.nan_to_num(shares)).argmax())]

    def result(self, reference: ComparisonWeights, near: bool) -> Enclosed:
        return Enclosed(
            self.lower,
            self.upper,
            log2_sum(self.lower, self.count),
            log2_sum(self.upper, self.count),
            self.by(0),
            self.by(1),
            self.passes,
            tuple(self.history),
            reference,
            near,
            self.stopped,
        )


def pivot_bounds(pair: Frame) -> Sides:
    """Bound by the difference tracks through the pivot m: |D − D'| and D + D' (SPEC §4).

    Args:
        pair: The networks.

    Returns:
        The bounds per output neuron.
    """
    network = pair.network

    def attempt(_: torch.dtype) -> tuple[Tensor, float]:
        return laid(network, propagate(network, PivotProgram(network, pair)), range(4))

    (mine, first, other, second), exponent = in_range(attempt, torch.float64, *pair.values)
    slack = rounding_factor(network) * (first + second)
    lower = ((first - second).abs() - slack).clamp(min=0.0)
    ends = (torch.log2(end) + exponent for end in (lower, first + second + slack, mine + other))
    return Sides("pivot", *ends)


def enclosed(pair: Frame, order: int, tighten: int, ratio: float, progress: Callable[[Step], None] | None) -> Enclosed:
    """Enclose the path-metric.

    Args:
        pair: The networks.
        order: Highest moment and order of the affinities; 0 for the pivot bound alone.
        tighten: Most steps of tightening.
        ratio: Stop at this ratio of the bounds.
        progress: Called with each step.

    Returns:
        The bounds; the best ones so far when the time of the call is up.
    """
    best = _Best(pair, progress)
    reference = chosen(pair)
    near = reference.likeness >= LIKE

    def pivot() -> None:
        best.take(pivot_bounds(pair), 6)

    def take(sides: Sides, passes: int) -> None:
        best.take(sides, passes)
        if best.coarse and not best.pivoted:
            pivot()
            best.take(sides, 0)

    more = tighten > 0 or ratio > 1
    enough = ratio if more else SHARP

    def moments() -> None:
        for sides, passes in _moments(pair, order, reference, reference.covered):
            take(sides, passes)
            if best.ratio <= enough or best.over():
                return

    def affinities() -> None:
        take(affinity_bounds(pair, order), (order + 1) * (2 if pair.flips else 1))

    if order < 4 or ratio > 1 or reference.lopsided > LOPSIDED:  # the cheapest bound may reach the ratio, or be the best
        pivot()
    if not order:
        return best.result(reference, near)
    first, second = (moments, affinities) if near else (affinities, moments)
    if best.ratio > ratio:
        first()
    if best.ratio > max(ratio, LOOSE) and not best.pivoted:
        pivot()
    if best.ratio > ratio and (more or best.ratio > (SHARP if order >= 6 else LOOSE)) and not best.over():
        second()
    if tighten and pair.changed and best.ratio > ratio and not best.over():
        search = Tightened(pair, reference)
        _tightened(pair, best, order, tighten, ratio, search)
        return best.result(search.reference, near)
    return best.result(reference, near)


def _moments(pair: Frame, order: int, reference: ComparisonWeights, covered: float | None) -> Iterator[tuple[Sides, int]]:
    """Yield bounds by moments, and how many sums they took; moments that rounding spoils are summed anew when more is asked."""
    sums = moment_sums(pair, order, reference)
    passes = sum(k + 1 for k in sums)
    known = {0: sums.pop(0)}
    for k, own in sums.items():
        if own.blurred:
            if len(known) > 1:
                yield moment_bounds(known, covered=covered), passes
                passes = 0
            with contextlib.suppress(NumericalError):  # where it leaves the range of float64, the blurred sum is a bound still
                own, more = near_moment(pair, k, reference)
                passes += more
        known[k] = own
    yield moment_bounds(known, covered=covered), passes


def _tightened(pair: Frame, best: _Best, order: int, steps: int, ratio: float, search: Tightened) -> None:
    """Improve g and the dual certificate in turns; what is reached is looked at with all moments at the end of each stage."""
    dual = Dual(pair)
    for number in range(1, steps + 1):
        stage = search.stage(number, steps)
        best.take(search.step(stage), 4 * search.evaluations, number)
        if not best.over():
            best.take(dual.step(), 6 * 2, number)
        last = number == steps or search.stage(number + 1, steps) != stage
        done = best.ratio <= ratio
        if (last or done) and not best.over():
            with torch.no_grad():
                for sides, passes in _moments(pair, order, search.reference, None):
                    best.take(sides, passes, number)
                    if best.ratio <= ratio:
                        break
        if best.ratio <= ratio or (number < steps and best.over()):
            return
