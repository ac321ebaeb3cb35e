"""The path-metric ‖Φ(θ) − Φ(θ')‖_q of any two networks of one architecture: exact, or enclosed from both sides (§4)."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

import pathlift.drawing as drawing
from pathlift.arguments import public
from pathlift.arguments.common import Randomness
from pathlift.budget import limited
from pathlift.errors import InputError
from pathlift.graph.compact import compacted
from pathlift.graph.expressions import FunctionCall
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.metric.bracket import Bracket, Step, bracketed, quotient
from pathlift.metric.common_gauge import CommonGauge, in_common_gauge
from pathlift.metric.comparison_weights import chosen, likeness
from pathlift.metric.exact import (
    checked_pair,
    differing,
    norm_tracks,
    ordered_difference,
    squared_difference,
    subtracted,
    unequal,
)
from pathlift.metric.outputs import expanded, multiplicities, per_output, times
from pathlift.metric.sampling import Estimate, estimated
from pathlift.metric.standing import REMEDY, Standing, standing
from pathlift.norm import LOG10_OF_2, to_float
from pathlift.passes.backward import sum_of_outputs
from pathlift.passes.intervals import unrounded
from pathlift.passes.programs import Values
from pathlift.passes.propagate import blame
from pathlift.passes.rounding import rounding_factor, weights_factor
from pathlift.passes.scaled import Scaled
from pathlift.reading import Inputs, capture
from pathlift.reading.second import Other, other_state
from pathlift.rescaling.alignment import AlignedWeights, aligned, gauge_fit, lifting_error
from pathlift.results import Result


@dataclass(frozen=True, repr=False)
class PathMetric(Result, line=("lower", "upper", "ratio", "q", "method", "sampled")):
    """The path-metric ‖Φ(θ) − Φ(θ')‖_q, or an interval that contains it.

    An interval can be improved by `tighten` and `estimate` while the weights of both networks are there and unchanged; a result
    holds none. A deep copy or a pickled one cannot.

    Attributes:
        lower: Lower bound.
        upper: Upper bound.
        exact: Whether the value is known up to rounding; ``lower`` and ``upper`` enclose it with its rounding error.
        value: The path-metric when ``exact``, else NaN.
        log10_lower: log₁₀ of ``lower`` (−inf for 0).
        log10_upper: log₁₀ of ``upper``.
        method: How it was found: ``equal``, ``lemma 4.2``, ``l2 tracks``, or the bound from below and the one from above
            (one name where they are the same); ``…, aligned`` after a rescaling of θ' that made it exact.
        q: Order.
        lower_by: The bound from below that gave most of ``lower``.
        upper_by: The bound from above that gave most of ``upper``.
        passes: How many sums over all paths were taken.
        history: What each step of tightening reached.
        sampled: The sampled estimate, when one was asked for and the metric is not exact.
        stopped: The seconds were over before all was done that was asked for; the bounds are valid.
    """

    lower: float
    upper: float
    exact: bool
    value: float
    log10_lower: float
    log10_upper: float
    method: str
    q: float
    lower_by: str = ""
    upper_by: str = ""
    passes: int = 0
    history: tuple[Step, ...] = ()
    sampled: Estimate | None = None
    stopped: bool = False
    _log2_per_output: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    _standing: ClassVar[Standing | None] = None
    """What it can be gone on from: of one result, beside its fields, because it is no part of what the result says."""

    def _standing_at(self, basis: Standing | None) -> PathMetric:
        vars(self)["_standing"] = basis
        return self

    @property
    def ratio(self) -> float:
        """Upper over lower bound: 1 up to rounding when exact, inf when the lower bound is 0 and the upper is not."""
        return quotient(self.log10_lower, self.log10_upper)

    @property
    def log10_lower_per_output(self) -> Tensor:
        """log₁₀ of the lower bound for the paths into each output neuron, float64, −inf for 0; only for q = 1.

        Of the output's shape without the batch dimension, or flat over all outputs when the model returns several.
        """
        return self._per_output(0)

    @property
    def log10_upper_per_output(self) -> Tensor:
        """log₁₀ of the upper bound for the paths into each output neuron; see `log10_lower_per_output`."""
        return self._per_output(1)

    def _per_output(self, end: int) -> Tensor:
        if self._log2_per_output is None:
            raise AttributeError("Bounds per output neuron are computed for q = 1 only.")
        return self._log2_per_output[end] * LOG10_OF_2

    @override
    def _draw(self, ax: drawing.Picture) -> None:
        drawing.intervals(ax, {"": self._interval()}, f"path-metric $‖Φ(θ)-Φ(θ')‖_{{{self.q:g}}}$")

    def _interval(self) -> drawing.Interval:
        """Return what a picture shows of it."""
        sampled = self.sampled
        inner = None if sampled is None else (sampled.log10_value, sampled.log10_low, sampled.log10_high)
        return self.log10_lower, self.log10_upper, inner

    @public
    @torch.no_grad()
    def tighten(
        self,
        steps: int = 20,
        *,
        seconds: float = math.inf,
        ratio: float = 1.0,
        progress: Callable[[Step], None] | None = None,
    ) -> PathMetric:
        """Improve the bounds step by step, from where they stand.

        Where fewer than eight moments were taken, those that are missing come first. A step improves g for the upper bound and
        a dual certificate for the lower one. Bounds never get worse, and g begins with what an earlier search has found for
        each layer.

        Args:
            steps: At most so many steps, each a few forward and backward passes.
            seconds: Stop after this time with the best bounds so far.
            ratio: Stop as soon as upper/lower is at most this.
            progress: Called with each `Step`.

        Returns:
            The metric with these bounds; itself when it is exact.

        Raises:
            InputError: It is a copy, the weights of a network are gone, or q is 2.
            MismatchError: The weights of a network have changed since.

        Example:
            >>> from torch import nn
            >>> model, other = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
            >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
            >>> _ = other.weight.data.copy_(torch.tensor([[2.0, 2.0, 1.0]]))
            >>> metric = path_metric(model, other, (3,), moments=0)  # |D − D'| and D + D'
            >>> better = metric.tighten(5)
            >>> round(metric.ratio), better.ratio < 1.2, better.lower <= 3 <= better.upper
            (3, True, True)
        """
        return self._improved(lambda pair, before: bracketed(pair, None, steps, ratio, progress, before)[0], None, seconds)

    @public
    @torch.no_grad()
    def estimate(self, samples: int, *, confidence: float = 0.95, generator: Randomness = 0) -> PathMetric:
        """Estimate the value without bias from sampled paths.

        Args:
            samples: Number of paths.
            confidence: Probability with which the interval of the estimate covers the truth.
            generator: Source of randomness, on the CPU, or a seed.

        Returns:
            The same bounds with ``sampled``; itself when it is exact.

        Raises:
            InputError: It is a copy, the weights of a network are gone, or q is 2.
            MismatchError: The weights of a network have changed since.

        Example:
            >>> from torch import nn
            >>> model, other = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
            >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
            >>> _ = other.weight.data.copy_(torch.tensor([[2.0, 2.0, 1.0]]))
            >>> sampled = path_metric(model, other, (3,)).estimate(1000).sampled
            >>> sampled.low < 3 < sampled.high
            True
        """

        def sample(pair: CommonGauge, before: Bracket) -> Estimate:
            return estimated(pair, before.by_layer or chosen(pair), likeness(pair).near, samples, confidence, generator)

        return self._improved(None, sample, math.inf)

    def _improved(
        self,
        tightened: Callable[[CommonGauge, Bracket], Bracket] | None,
        sample: Callable[[CommonGauge, Bracket], Estimate] | None,
        seconds: float,
    ) -> PathMetric:
        """Return the metric with better bounds or with an estimate, of the same networks."""
        if self.q != 1:
            raise InputError("For q = 2 the path-metric is computed, not searched for: tighten and estimate are for q = 1.")
        if self.exact:
            return self
        if self._standing is None:
            raise InputError(f"A copy of a path-metric, or one of weights on disk, cannot be improved. {REMEDY}")
        with limited(None if seconds == math.inf else seconds):
            network, state = self._standing.networks()
            pair = in_common_gauge(network, gauge_fit(network, state))
            if sample is not None:
                return replace(self, sampled=sample(pair, self._standing.bracket))._standing_at(self._standing)
            assert tightened is not None
            bracket = tightened(pair, self._standing.bracket)
        return _result(pair.network, bracket, self.sampled)._standing_at(replace(self._standing, bracket=bracket))


@public
@torch.no_grad()
def path_metric(
    model: nn.Module | Network,
    other: Other,
    inputs: Inputs | None = None,
    *,
    q: float = 1,
    moments: int | None = None,
    tighten: int = 0,
    ratio: float = 1.0,
    seconds: float = math.inf,
    estimate: int = 0,
    generator: Randomness = 0,
    progress: Callable[[Step], None] | None = None,
) -> PathMetric:
    """Compute the path-metric between two networks of one architecture.

    The bounds are on exact real arithmetic on the weights as they are stored; those of a batch norm are its scale and shift as
    evaluated in float64, and others that a model computes from parameters (weight_norm) are taken as evaluated. For q = 2 the
    value is found for every pair and any signs, with its rounding error; ``exact`` is False where that error is all there is.
    For q = 1 it is known up to rounding when the weights are ordered: |θ| ≥ |θ'| with no sign changed, or the other way round
    (Lemma 4.2: pruning, rounding towards or away from zero). The condition is checked on the weights as the theory sees them
    (a batch norm: scale s and shift t), and again after a rescaling of θ' by powers of two. A copy rescaled by other factors
    has rounded weights: it is another network, and enclosed like any other.

    Any other pair is enclosed by moments of (Φ'−Φ)/Φ(g) and by affinities, neuron by neuron the best of what is computed: by
    affinities of order 4 or 8 where a model of both networks promises an upper over lower bound within 1.4, else by four
    moments, and by eight where it is not within 1.4 then. ``moments=0`` takes the lower bound (6) and the
    pivot bound alone, in one pass. The result can be improved: `PathMetric.tighten`, `PathMetric.estimate`; the options of
    these names do so at once. Everything is computed in a gauge that depends on neither network's, so that rescaling one of
    them changes nothing but rounding.

    Args:
        model: A module, or a captured `Network`: θ.
        other: θ', see `Other`.
        inputs: As for `capture`; not needed for a Network.
        q: Order, 1 or 2.
        moments: 2, 4, 6 or 8: the highest moment of (Φ'−Φ)/Φ(g), and the order of the affinities; 0 for neither. None: as
            many as are needed; 8 where ``tighten`` is positive or ``ratio`` is above 1.
        tighten: At most so many steps that improve g and the dual certificate, each a few forward and backward passes.
        ratio: Stop as soon as upper/lower is at most this.
        seconds: Stop after this time with the best bounds so far, which take at least one pass of each network.
        estimate: Number of paths to sample for an unbiased estimate; 0 for none.
        generator: Source of randomness of the sampling, on the CPU, or a seed.
        progress: Called with each `Step`.

    Returns:
        The metric.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        MismatchError: ``other`` has other parameters, shapes or another graph.
        InputError: ``inputs`` or an option is malformed.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> from torch import nn
        >>> model, pruned = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> _ = pruned.weight.data.copy_(torch.tensor([[3.0, 0.0]]))
        >>> path_metric(model, pruned, (2,)).value
        1.0
        >>> _ = pruned.weight.data.copy_(torch.tensor([[2.0, -1.5]]))
        >>> metric = path_metric(model, pruned, (2,))
        >>> metric.lower <= 1.5 <= metric.upper, metric.ratio < 1.1
        (True, True)
    """
    if q == 2 and (moments is not None or tighten or estimate):
        raise InputError("For q = 2 the path-metric is exact: moments, tighten and estimate are for q = 1.")
    if moments == 0 and tighten:
        raise InputError("moments=0 takes one pass, and tighten improves the bounds of moments: leave one of them out.")
    start = time.monotonic()
    network = capture(model, inputs)
    state = other_state(network, other)
    compact = compacted(network)
    values, others = checked_pair(compact, state)
    states = network.state, state
    exact = None if q == 2 else _exact(compact, states, values, others, "")
    if exact is not None:
        return exact
    blame(values)
    blame(others)
    both = gauge_fit(network, state)
    matched = aligned(network, state, others, both)
    if q == 2:
        return _l2(compact, values, matched)
    if matched.values is not others and not matched.roundings:
        exact = _exact(compact, states, values, matched.values, ", aligned")
        if exact is not None:
            return exact
    pair = in_common_gauge(network, both)
    with limited(None if seconds == math.inf else max(seconds - (time.monotonic() - start), 0.0)):
        bracket, weights = bracketed(pair, moments, tighten, ratio, progress)
    sampled = None
    if estimate:
        sampled = estimated(pair, weights or chosen(pair), likeness(pair).near, estimate, 0.95, generator)
    return _result(compact, bracket, sampled)._standing_at(standing(network, state, bracket))


def _exact(network: Network, states: States, values: Values, others: Values, suffix: str) -> PathMetric | None:
    """Return the metric of equal or ordered networks, None for others."""
    above, below = differing(network, values, others)
    if above and below:
        return None
    if not above and not below:
        blame(values)
        nothing = torch.full((len(multiplicities(network)),), -math.inf, dtype=torch.float64, device=network.device)
        return _known(network, nothing, f"equal{suffix}", 0)
    sides = (values, others) if above else (others, values)
    computed = weights_factor(network, _rounded(network, states, values))
    error = rounding_factor(network) + computed
    norms = subtracted(network, *sides, above or below, computed, 2.0 * error)
    if norms is not None:
        return _known(network, norms.log2, f"lemma 4.2{suffix}", 2, norms.total, norms.error)
    tracks = ordered_difference(network, *sides, above or below)
    tensor, exponent = per_output(network, tracks, [1])
    return _known(network, torch.log2(tensor[0]) + exponent, f"lemma 4.2{suffix}", 3, sum_of_outputs(network, tracks, 1), error)


States: TypeAlias = "tuple[Mapping[str, Tensor], Mapping[str, Tensor]]"
"""Parameters and buffers of both networks."""


def _rounded(network: Network, states: States, values: Values) -> dict[WeightTensor, torch.dtype]:
    """Return the weights that are computed from parameters in fewer digits than float64 has, and their types."""
    computed = {
        weight: values[weight].dtype
        for weight in network.weights
        if isinstance(weight.expression, FunctionCall) and weight.requires
    }
    return {
        weight: dtype
        for weight, dtype in computed.items()
        if dtype != torch.float64 and not all(unrounded(weight.expression, state) for state in states)
    }


def _known(
    network: Network, log2: Tensor, method: str, passes: int, total: Scaled | None = None, error: float = 0.0
) -> PathMetric:
    """Return a metric that is known up to a factor between exp(−error) and exp(error), with ends that enclose it."""
    value, log10 = to_float(total)
    ends = [_outward(value * math.exp(side * error), log10 + side * error / math.log(10), side) for side in (-1, 1)]
    below, above = (log2 + side * (error / math.log(2) + _blur(log2)) for side in (-1, 1))
    each = expanded(network, below), expanded(network, above)
    return PathMetric(
        ends[0][0],
        ends[1][0],
        True,
        value,
        ends[0][1],
        ends[1][1],
        method,
        1.0,
        method,
        method,
        passes,
        _log2_per_output=each,
    )


BLUR = 2.0**-46
"""What logarithms may lose to rounding, relative to 1 and to themselves."""

LEAST, MOST = 2.0**-1074, sys.float_info.max


def _blur(logs: Tensor) -> Tensor:
    """Return what the logarithms of bounds are moved outwards by; 0 for those of 0 and inf."""
    return torch.where(torch.isfinite(logs), BLUR * (1 + logs.abs()), 0.0)


def _outward(value: float, log10: float, side: int) -> tuple[float, float]:
    """Round a bound and its log₁₀ outwards (side −1: down, 1: up); 0 stays 0."""
    if math.isinf(log10):
        return value, log10
    blurred = log10 + side * BLUR * (1 + abs(log10))
    if side < 0:
        return (MOST if math.isinf(value) else value * (1 - BLUR)), blurred
    return max(value * (1 + BLUR), LEAST), blurred


def _plain(log2: float, side: int) -> tuple[float, float]:
    """Return 2**log2 as a float (inf past its range), and log₁₀ of it, rounded outwards."""
    if log2 == -math.inf:
        return 0.0, -math.inf
    log2 += side * BLUR * (1 + abs(log2))
    exponent = math.floor(log2)
    return _outward(
        *to_float(Scaled(torch.tensor(2.0 ** (log2 - exponent), dtype=torch.float64, device="cpu"), float(exponent))), side
    )


def _result(network: Network, bracket: Bracket, sampled: Estimate | None) -> PathMetric:
    log2_lower, log2_upper = bracket.log2
    (lower, log10_lower), (upper, log10_upper) = _plain(log2_lower, -1), _plain(log2_upper, 1)
    return PathMetric(
        lower,
        upper,
        False,
        math.nan,
        log10_lower,
        log10_upper,
        " and ".join(dict.fromkeys(bracket.by)),
        1.0,
        *bracket.by,
        bracket.passes,
        bracket.history,
        sampled,
        bracket.stopped,
        (expanded(network, bracket.lower - _blur(bracket.lower)), expanded(network, bracket.upper + _blur(bracket.upper))),
    )


def _l2(network: Network, values: Values, other: AlignedWeights) -> PathMetric:
    """Return ‖Φ(θ)−Φ(θ')‖₂ with its rounding error: of the sums, and of the weights of θ' in the gauge of θ."""
    if other.values is values or not (unequal(values, other.values) or other.roundings):
        return PathMetric(0.0, 0.0, True, 0.0, -math.inf, -math.inf, "l2 tracks", 2.0, passes=0)
    squared, magnitude, norm = (_root(part) for part in squared_difference(network, values, other.values))
    unit = max(magnitude, norm)
    if math.isinf(unit):  # one of both has no paths
        unit = magnitude = squared = _root(sum_of_outputs(network, norm_tracks(network, other.values, q=2.0)))
    if math.isinf(unit):
        return PathMetric(0.0, 0.0, True, 0.0, -math.inf, -math.inf, "l2 tracks", 2.0, passes=11)
    square, error, size = (100.0 ** (part - unit) for part in (squared, magnitude, norm))
    error, spoilt = rounding_factor(network) * error, 2 * (math.sqrt(size) + math.sqrt(error))
    slack = (lifting_error(network, other.roundings) + UNDERFLOW) * spoilt
    low, high = math.sqrt(max(square - error, 0.0)) - slack, math.sqrt(square + error) + slack
    (lower, log10_lower), (upper, log10_upper) = (
        _outward(*times(end * (1 + side * OFF), unit), side) for end, side in ((max(low, 0.0), -1), (high, 1))
    )
    exact = high - low <= KNOWN * high
    value = times(math.sqrt(square), unit)[0] if exact else math.nan
    return PathMetric(lower, upper, exact, value, log10_lower, log10_upper, "l2 tracks", 2.0, "l2 tracks", "l2 tracks", 11)


UNDERFLOW = 1e-140
"""What squares of differences lose that fall below the range of float64, relative to ‖Φ‖₂."""


def _root(value: Scaled | None) -> float:
    """Return log₁₀ of the root of a number, −inf where there is none or rounding made it negative."""
    return -math.inf if value is None or float(value.tensor) <= 0 else to_float(value, 2.0)[1]


KNOWN = 1e-6
"""A value whose rounding error is a smaller part of it is known."""

OFF = 1e-12
"""What powers of ten lose to rounding."""


__all__ = ["Estimate", "PathMetric", "Step", "path_metric"]
