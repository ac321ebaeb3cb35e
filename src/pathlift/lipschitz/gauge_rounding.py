"""What bounds owe to the rounding of θ' on its way into the gauge of θ (mathematics §4, "Gauge")."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pathlift.lipschitz.outputs import Ball, per_input
from pathlift.metric.comparison import Comparison
from pathlift.passes.programs import NormProgram
from pathlift.passes.rounded import rounded_up
from pathlift.rescaling.alignment import lifting_error


def rounding_of_computed(comparison: Comparison, ball: Ball) -> Tensor:
    """Bound how far both networks may be from what they are when weights are computed from parameters in exact arithmetic.

    Args:
        comparison: The comparison.
        ball: The inputs, each with everything around it.

    Returns:
        (samples, outputs); one 0 when no such weight differs.
    """
    zero = torch.zeros((), dtype=torch.float64, device=comparison.network.device)
    wide = Ball({name: size + ball.radius for name, size in ball.sizes.items()}, 0.0)
    return sum((per_input(side, wide) for side in comparison.computed), zero)


def rounding_of_gauge(comparison: Comparison, feed: Mapping[str, Tensor] | None) -> Tensor:
    """Bound |R_θ'(x) − R_{λ∘θ'}(x)|, λ∘θ' as it was rounded: depth·u·Σ_p |Φ_p(θ')|·|x̄(p₀)|, by Theorem 4.1 fed with |x|.

    Args:
        comparison: The comparison.
        feed: Input layer to |x|, (samples, *shape); None for ones, then it bounds ‖Φ(θ') − Φ(λ∘θ')‖₁ for each output.

    Returns:
        (samples, outputs) or (outputs,); one 0 when nothing was rounded.
    """
    part = lifting_error(comparison.network, comparison.roundings)
    if not part or comparison.others is None:
        return torch.zeros((), dtype=torch.float64, device=comparison.network.device)
    network, others = comparison.network, comparison.others
    return part * rounded_up(network, lambda dtype: NormProgram(network, others, dtype, feed=feed), 0, others)
