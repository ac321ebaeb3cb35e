"""All bounds on the path-metric ‖Φ(θ)−Φ(θ')‖₁ that the paper states or compares with, in one table (mathematics §4).

The bounds themselves: `pathlift.metric.lemmas`, `pathlift.metric.exact` (Lemma 4.2), `pathlift.metric.pivot`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pathlift.arguments import public
from pathlift.errors import UnsupportedModelError
from pathlift.graph.network import Network
from pathlift.metric.comparison import Comparison, compact, compared_with
from pathlift.metric.exact import norm_tracks
from pathlift.metric.lemmas import (
    NotApplicableError,
    lemma_4_3,
    lemma_4_4,
    lemma_f1,
    log10_of,
    log10_of_float,
    log10_sum,
    theorem_f2,
)
from pathlift.metric.metric import path_metric
from pathlift.metric.pivot import three_step
from pathlift.passes.backward import sum_of_outputs
from pathlift.passes.programs import TELESCOPING, DifferenceProgram, Values
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.rounding import rounding_factor
from pathlift.passes.scaled import Scaled
from pathlift.reading import Inputs, capture
from pathlift.reading.second import Other
from pathlift.rescaling.alignment import lifting_error
from pathlift.results import Result


@dataclass(frozen=True, repr=False)
class MetricBound(Result):
    """One bound on the path-metric.

    Attributes:
        name: Short name.
        reference: Where it is stated.
        side: Whether it bounds from below or from above.
        log10: log₁₀ of the bound, −inf for 0, inf past float64's range, NaN where it does not apply.
        invariant: Whether no rescaling of both networks alike changes it.
        reason: Why it does not apply, "" when it does.
    """

    name: str
    reference: str
    side: Literal["lower", "upper"]
    log10: float
    invariant: bool
    reason: str = ""


@public
@torch.no_grad()
def path_metric_bounds(
    model: nn.Module | Network,
    other: Other,
    inputs: Inputs | None = None,
    *,
    moments: int | None = None,
    progress: Callable[[MetricBound], object] | None = None,
) -> tuple[MetricBound, ...]:
    """Compute every bound on ‖Φ(θ)−Φ(θ')‖₁, loosest upper bound first, lower bounds last.

    Lemma 4.4 (9) and Lemma 4.3 (8) are for layered perceptrons; all others hold for any network. Where Lemma 4.2 applies,
    the exact value stands in the table as both a lower and an upper bound.

    Args:
        model: A module, or a captured `Network`: θ.
        other: θ', as for `path_metric`.
        inputs: As for `capture`; not needed for a Network.
        moments: 2, 4, 6 or 8: the bounds of `path_metric` with so many moments are listed too; they cost more than all others.
        progress: Called with each bound as soon as it is there, in the order of what they cost; those that do not apply, too.

    Returns:
        The bounds; those that do not apply come last of all, with the reason.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        MismatchError: ``other`` has other parameters.
        InputError: ``inputs`` or ``moments`` is malformed.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> from torch import nn
        >>> model, pruned = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> _ = pruned.weight.data.copy_(torch.tensor([[3.0, 0.0]]))
        >>> sorted((b.name, b.side) for b in path_metric_bounds(model, pruned, (2,)) if "exact" in b.name)
        [('Lemma 4.2, exact', 'lower'), ('Lemma 4.2, exact', 'upper')]
    """
    network = capture(model, inputs)
    comparison = compared_with(network, other)
    bounds: list[MetricBound] = []

    def keep(bound: MetricBound) -> None:
        bounds.append(bound)
        if progress is not None:
            progress(bound)

    metric = path_metric(network, other, moments=0)
    exact = "Lemma 4.2, exact" if metric.exact else ""
    keep(MetricBound(exact or "norm difference", "(6), Lemma 4.2", "lower", metric.log10_lower, invariant=True))
    keep(MetricBound(exact or "pivot", "pathlift", "upper", metric.log10_upper, invariant=True))
    extra = _rounding_of_gauge(comparison)

    def bound(name: str, reference: str, compute: Callable[[], float], *, invariant: bool = True) -> None:
        keep(_bound(name, reference, compute, extra, invariant))

    bound("telescoping", "pathlift", lambda: _telescoping(comparison))
    bound("Hellinger in three steps", "pathlift", lambda: log10_of_float(_sum_in_three_steps(comparison)))
    bound("Lemma F.1", "Lemma F.1", lambda: lemma_f1(comparison), invariant=False)
    bound("Theorem F.2", "Theorem F.2", lambda: theorem_f2(comparison))
    bound("Lemma 4.3", "(8), Lemma 4.3", lambda: lemma_4_3(comparison))
    bound("Lemma 4.4", "(9), Lemma 4.4", lambda: lemma_4_4(comparison), invariant=False)
    closer = None if moments is None else path_metric(network, other, moments=moments)
    if closer is not None and not closer.exact:
        if closer.upper_by != "pivot":
            keep(MetricBound(closer.upper_by, "pathlift", "upper", closer.log10_upper, invariant=True))
        keep(MetricBound(closer.lower_by, "pathlift", "lower", closer.log10_lower, invariant=True))
    applying = [bound for bound in bounds if not bound.reason]
    uppers = sorted((bound for bound in applying if bound.side == "upper"), key=lambda bound: -bound.log10)
    lowers = sorted((bound for bound in applying if bound.side == "lower"), key=lambda bound: -bound.log10)
    return (*uppers, *lowers, *(bound for bound in bounds if bound.reason))


def _bound(name: str, reference: str, compute: Callable[[], float], extra: float, invariant: bool) -> MetricBound:
    try:
        log10 = log10_sum(compute(), extra)
    except UnsupportedModelError as error:
        return MetricBound(name, reference, "upper", math.nan, invariant, error.problems[0].reason)
    except NotApplicableError as error:
        return MetricBound(name, reference, "upper", math.nan, invariant, str(error))
    return MetricBound(name, reference, "upper", log10 + (BLUR * (1 + abs(log10)) if math.isfinite(log10) else 0.0), invariant)


BLUR = 2.0**-44
"""What logarithms may lose to rounding, relative to 1 and to themselves."""


def _rounding_of_gauge(comparison: Comparison) -> float:
    """Return log₁₀ of what the weights of θ' may have lost on their way into the gauge of θ; see `rounding_of_gauge`."""
    part = lifting_error(comparison.network, comparison.roundings)
    if not part:
        return -math.inf
    thin = compact(comparison)
    assert thin.others is not None
    return log10_of(sum_of_outputs(thin.network, norm_tracks(thin.network, thin.others))) + math.log10(part)


def _sum_in_three_steps(comparison: Comparison) -> float:
    inputs = [layer for layer in comparison.network.layers if layer.kind == "input"]
    ones = {n.name: torch.ones((1, *n.shape), dtype=torch.float64, device=comparison.network.device) for n in inputs}
    return float(three_step(comparison, ones).sum())


def _telescoping(comparison: Comparison) -> float:
    thin = compact(comparison)
    assert thin.others is not None
    orders = [(thin.values, thin.others), (thin.others, thin.values)]

    def log10(first: Values, second: Values) -> float:
        def attempt(_: torch.dtype) -> Scaled | None:
            program = DifferenceProgram(thin.network, first, second, torch.float64, thin.changed, through=TELESCOPING)
            return sum_of_outputs(thin.network, propagate(thin.network, program), 1)

        return log10_of(in_range(attempt, torch.float64, first, second))

    return min(log10(*order) for order in orders) + math.log10(1.0 + rounding_factor(thin.network))
