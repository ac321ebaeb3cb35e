"""Sums over the paths of two networks of one architecture, output by output, with any weights on the inputs (mathematics §4).

Fed with ones they bound the path-metric, fed with |x| how far the outputs can be apart: both rooms share them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pathlift.graph.layers import WeightTensor
from pathlift.metric.comparison import Comparison
from pathlift.passes.programs import DifferenceProgram, NormProgram, Values
from pathlift.passes.propagate import TooWideError, in_range, propagate
from pathlift.passes.rounded import flat, never_nan, output_count, rounded_up
from pathlift.passes.rounding import rounding_factor
from pathlift.passes.scaled import Scaled
from pathlift.passes.squares import HellingerProgram
from pathlift.passes.tracks import Program


def difference(
    comparison: Comparison, feed: Mapping[str, Tensor] | None, *, from_inputs: bool = True, from_biases: bool = True
) -> Tensor:
    """Σ_p |Φ_p(upper) − Φ_p(lower)|·|x̄(p₀)| over the halves of a comparison: exact or the pivot bound.

    Args:
        comparison: Two networks, or a set.
        feed: Input layer to non-negative values, (samples, *shape); None for ones, without such a dimension.
        from_inputs: Whether paths from inputs count.
        from_biases: Whether paths from biases count.

    Returns:
        (samples, outputs) or (outputs,), rounded up.
    """
    lead = () if feed is None else (len(next(iter(feed.values()))),)
    total = torch.zeros((*lead, output_count(comparison.network)), dtype=torch.float64, device=comparison.network.device)
    for first, second, changed in comparison.halves:

        def make(
            dtype: torch.dtype, first: Values = first, second: Values = second, changed: set[WeightTensor] = changed
        ) -> Program:
            return DifferenceProgram(
                comparison.network,
                first,
                second,
                dtype,
                changed,
                feed=feed,
                from_inputs=from_inputs,
                from_biases=from_biases,
                through=comparison.through,
            )

        total = total + rounded_up(comparison.network, make, 1, first, second)
    return total


def three_step(comparison: Comparison, feed: Mapping[str, Tensor]) -> Tensor:
    """Θ → θ·1[θθ'>0] → θ'·1[θθ'>0] → θ': both outer steps exact by Lemma 4.2, the middle one by Hellinger (mathematics §4).

    With S = Σ|Φ||x̄| and S' of the middle pair and H² = Σ(√|Φ| − √|Φ'|)²·|x̄|, the middle step is at most
    √(H²·(2(S+S') − H²)). Any pair.

    Args:
        comparison: Two networks.
        feed: Input layer to non-negative values, (samples, *shape).

    Returns:
        (samples, outputs), rounded up.
    """
    assert comparison.others is not None
    network, batch = comparison.network, len(next(iter(feed.values())))
    masks = {
        weight: torch.sign(value) * torch.sign(comparison.others[weight]) > 0 for weight, value in comparison.values.items()
    }
    middle = [
        {weight: torch.where(masks[weight], value, 0.0) for weight, value in side.items()}
        for side in (comparison.values, comparison.others)
    ]
    outer = [
        Comparison(network, side, kept, None) for side, kept in zip((comparison.values, comparison.others), middle, strict=True)
    ]
    total = sum((difference(step, feed) for step in outer), torch.zeros((), dtype=torch.float64, device="cpu"))
    changed = Comparison(network, middle[0], middle[1], None).changed

    def attempt(_: torch.dtype) -> tuple[Tensor, Tensor]:
        tracks = propagate(network, HellingerProgram(network, middle[0], middle[1], changed, feed=feed))
        squares, errors = ([tracks[name][track] for name in network.outputs] for track in (2, 4))
        signed = [None if value is None else Scaled(value.tensor.clamp(min=0.0), value.exponent) for value in squares]
        slack = rounding_factor(network) * flat(network, errors, batch)
        per_output = flat(network, signed, batch)
        return (per_output - slack).clamp(min=0.0), per_output + slack

    try:
        low, high = in_range(attempt, torch.float64, *middle)
    except TooWideError:
        return torch.full((batch, output_count(network)), math.inf, dtype=torch.float64, device=network.device)
    norms = [
        rounded_up(network, lambda dtype, kept=kept: NormProgram(network, kept, dtype, feed=feed), 0, kept)  # type: ignore[misc]
        for kept in middle
    ]
    # Increasing in H² up to S+S', which H² cannot exceed.
    sums = norms[0] + norms[1]
    hellinger = torch.sqrt(torch.minimum(high, sums)) * torch.sqrt((2 * sums - low).clamp(min=0.0)) * (1.0 + 8 * 2.0**-53)
    hellinger = torch.minimum(never_nan(hellinger), difference(Comparison(network, middle[0], middle[1], None), feed))
    return (total + hellinger) * (1.0 + 4 * 2.0**-53)
