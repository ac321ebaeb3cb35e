"""The path-metric ‖Φ(θ) − Φ(θ')‖: exact where Lemma 4.2 applies, enclosed for any pair (SPEC §4).

With m the pivot (the smaller magnitude where signs agree, 0 elsewhere), D = ‖Φ(θ)−Φ(m)‖₁ and D' = ‖Φ(θ')−Φ(m)‖₁ are
two non-negative difference tracks. Then |D − D'| ≤ ‖Φ(θ)−Φ(θ')‖₁ ≤ D + D': the left side is the lower bound (6), since
D − D' = ‖Φ(θ)‖₁ − ‖Φ(θ')‖₁, the right side is the pivot bound. One of the two is 0 exactly when θ and θ' are ordered
weight by weight, and then the metric is exact. Norms are never subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pathlift.capture import Inputs, capture
from pathlift.edges.base import PAIR_ELEMENTS
from pathlift.errors import InputError, MismatchError
from pathlift.network import Leaf, Network, widen
from pathlift.passes.joint import SquaredDifferenceProgram
from pathlift.passes.norm import LOG10_OF_2, to_float
from pathlift.passes.other import Other, other_state
from pathlift.passes.programs import ORDERED, PIVOT, DifferenceProgram, Through, Values
from pathlift.passes.propagate import blame, in_range, propagate
from pathlift.passes.pull_back import sum_of_outputs
from pathlift.passes.rounding import rounding_factor
from pathlift.passes.scaled import Scaled, total
from pathlift.symmetry.compare import gauge_matched, snapped


@dataclass(frozen=True)
class PathMetric:
    """The path-metric ‖Φ(θ) − Φ(θ')‖_q, or an interval that contains it.

    Attributes:
        lower: Lower bound.
        upper: Upper bound.
        exact: Whether the value is known up to rounding; then ``lower == upper == value`` for q = 1, and for q = 2 the
            two enclose the value with its rounding error.
        value: The path-metric when ``exact``, else NaN.
        log10_lower: log₁₀ of ``lower`` (−inf for 0).
        log10_upper: log₁₀ of ``upper``.
        method: How it was found: ``equal``, ``lemma 4.2``, ``pivot`` or ``l2 tracks``; ``…, aligned`` after a rescaling of
            θ'.
        q: Order.
    """

    lower: float
    upper: float
    exact: bool
    value: float
    log10_lower: float
    log10_upper: float
    method: str
    q: float


@torch.no_grad()
def path_metric(model: nn.Module | Network, other: Other, inputs: Inputs | None = None, *, q: float = 1) -> PathMetric:
    """Compute the path-metric between two networks of one architecture.

    For q = 1 it is exact when the weights are ordered: |θ| ≥ |θ'| with no sign changed, or the other way round (Lemma
    4.2: pruning, rounding towards or away from zero). The condition is checked on the weights as the theory sees them
    (a batch norm counts by its scale s and shift t). For any other pair the lower bound (6) and the pivot bound enclose
    it. For q = 2 it is exact for every pair and any signs.

    Φ does not see a rescaling, but the comparison of weights does. A pair that is not ordered as it stands and agrees much
    better after a rescaling of θ' (`align`) is compared after it, so a pruned copy that was then rescaled is still known to
    be exact, up to the rounding of its rescaling.

    Args:
        model: A module, or a captured `Network`: θ.
        other: θ', see `Other`.
        inputs: As for `capture`; not needed for a Network.
        q: Order, 1 or 2.

    Returns:
        The metric.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        MismatchError: ``other`` has other parameters, shapes or another graph.
        InputError: ``inputs`` or ``q`` is malformed.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> from torch import nn
        >>> model, pruned = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> _ = pruned.weight.data.copy_(torch.tensor([[3.0, 0.0]]))
        >>> path_metric(model, pruned, (2,)).value
        1.0
    """
    if q not in (1, 2):
        raise InputError(f"q must be 1 or 2 for the path-metric, found {q!r}.")
    network = capture(model, inputs)
    state = other_state(network, other)
    compact = network.compact
    values, other_values = checked_pair(compact, state)
    if q == 2:
        return _l2(compact, values, other_values)
    above, below = differing(compact, values, other_values)
    if not above or not below:
        return _l1(compact, values, other_values, (above, below))
    matched = gauge_matched(network, state)
    if all(matched[name] is tensor for name, tensor in state.items()):
        return _l1(compact, values, other_values, (above, below))
    values, other_values = checked_pair(compact, snapped(network, state, matched))
    found = _l1(compact, values, other_values, differing(compact, values, other_values))
    return replace(found, method=f"{found.method}, aligned")


def checked_pair(network: Network, state: Mapping[str, Tensor]) -> tuple[Values, Values]:
    """Evaluate the weights of both networks.

    Args:
        network: The first network.
        state: Parameters and buffers of the second (`other_state`).

    Returns:
        Leaf to tensor, for each.

    Raises:
        MismatchError: The shapes of a derived weight differ.
    """
    values, others = network.values(), network.values(state)
    for leaf in network.leaves:
        if leaf.scalar is None and values[leaf].shape != others[leaf].shape:
            raise MismatchError(
                f"'{leaf.label}' has shape {tuple(values[leaf].shape)} in the first network and "
                f"{tuple(others[leaf].shape)} in the second."
            )
    return values, others


def _differs(first: Tensor, second: Tensor) -> tuple[bool, bool, bool]:
    """Return whether |θ| > |m| somewhere, |θ'| > |m| somewhere, and θ ≠ θ' somewhere; block by block."""
    above, below, different = False, False, False
    dtype = torch.promote_types(widen(first).dtype, widen(second).dtype)
    pairs = zip(first.reshape(-1).split(PAIR_ELEMENTS), second.reshape(-1).split(PAIR_ELEMENTS), strict=True)
    for one, two in pairs:
        one, two = one.to(dtype), two.to(dtype)
        if torch.equal(one, two):
            continue
        different = True
        step = one - two  # |θ| > |m| where it leads away from 0 to θ, |θ'| > |m| where it leads towards 0 from θ'
        above = above or bool((step * one.sign()).amax() > 0)
        below = below or bool((step * two.sign()).amin() < 0)
        if above and below:
            break
    return above, below, different


def differing(network: Network, values: Values, other: Values) -> tuple[set[Leaf], set[Leaf]]:
    """Return the leaves with |θ| > |m| somewhere, and those with |θ'| > |m| somewhere, m the pivot.

    Args:
        network: The graph.
        values: θ.
        other: θ'.

    Returns:
        Two sets; all leaves where a weight is not a number, so that a pass finds and names it.
    """
    above: set[Leaf] = set()
    below: set[Leaf] = set()
    for leaf in network.leaves:
        if leaf.scalar is None:
            larger, smaller, different = _differs(values[leaf], other[leaf])
            above |= {leaf} if larger else set()
            below |= {leaf} if smaller else set()
            if different and not (larger or smaller):
                return set(network.leaves), set(network.leaves)  # NaN compares with nothing
    return above, below


def _l1(network: Network, values: Values, other: Values, ordered: tuple[set[Leaf], set[Leaf]]) -> PathMetric:
    above, below = ordered
    if not above and not below:
        blame(values)
        return PathMetric(0.0, 0.0, True, 0.0, -math.inf, -math.inf, "equal", 1.0)
    both = bool(above) and bool(below)
    precision, through = (torch.float64, PIVOT) if both else (network.dtype, ORDERED)
    first = _difference(network, values, other, above, precision, through) if above else None
    second = _difference(network, other, values, below, precision, through) if below else None
    if not both:
        value, log10 = to_float(first if first is not None else second)
        return PathMetric(value, value, True, value, log10, log10, "lemma 4.2", 1.0)
    return _enclosed(network, first, second)


def _enclosed(network: Network, first: Scaled | None, second: Scaled | None) -> PathMetric:
    """|D − D'| less its rounding error, and D + D'."""
    known = [value for value in (first, second) if value is not None]
    if not known:
        return PathMetric(0.0, 0.0, True, 0.0, -math.inf, -math.inf, "pivot", 1.0)
    upper, _ = total(known, fresh=False)
    signed = [
        Scaled(value.tensor * sign, value.exponent) for value, sign in ((first, 1.0), (second, -1.0)) if value is not None
    ]
    gap, _ = total(signed, fresh=False)
    error = rounding_factor(network) * float(upper.tensor) * 2.0 ** (upper.exponent - gap.exponent)
    lower = max(abs(float(gap.tensor)) - error, 0.0)
    lower_value, log10_lower = to_float(Scaled(torch.tensor(lower, dtype=torch.float64), gap.exponent))
    upper_value, log10_upper = to_float(upper)
    return PathMetric(lower_value, upper_value, False, math.nan, log10_lower, log10_upper, "pivot", 1.0)


def _difference(
    network: Network, values: Values, other: Values, changed: set[Leaf], precision: torch.dtype, through: Through
) -> Scaled | None:
    def attempt(dtype: torch.dtype) -> Scaled | None:
        program = DifferenceProgram(network, values, other, dtype, changed, through=through)
        return sum_of_outputs(network, propagate(network, program), 1)

    return in_range(attempt, precision, values, other, memory=network.memory("path_metric", through))


def _l2(network: Network, values: Values, other: Values) -> PathMetric:
    changed = {
        leaf
        for leaf in network.leaves
        if leaf.scalar is None and not torch.equal(widen(values[leaf]), widen(other[leaf]).to(widen(values[leaf]).dtype))
    }

    def attempt(_: torch.dtype) -> tuple[Scaled | None, Scaled | None]:
        tracks = propagate(network, SquaredDifferenceProgram(network, values, other, changed))
        return sum_of_outputs(network, tracks, 2), sum_of_outputs(network, tracks, 4)

    squared, magnitude = in_range(attempt, torch.float64, values, other)
    if magnitude is None:
        return PathMetric(0.0, 0.0, True, 0.0, -math.inf, -math.inf, "l2 tracks", 2.0)
    center = 0.0 if squared is None else float(squared.tensor) * 2.0 ** (squared.exponent - magnitude.exponent)
    error = rounding_factor(network) * float(magnitude.tensor)
    ends = [max(center - error, 0.0), max(center, 0.0), center + error]
    (low, log10_low), (value, _), (high, log10_high) = (
        to_float(Scaled(torch.tensor(end, dtype=torch.float64), magnitude.exponent), 2.0) for end in ends
    )
    return PathMetric(low, high, True, value, log10_low, log10_high, "l2 tracks", 2.0)


__all__ = ["LOG10_OF_2", "PathMetric", "path_metric"]
