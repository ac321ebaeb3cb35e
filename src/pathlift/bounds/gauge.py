"""What bounds owe to the rounding of θ' on its way into the gauge of θ (SPEC §4, "Gauge")."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pathlift.bounds.outputs import Ball, per_input, run
from pathlift.bounds.spread import Spread
from pathlift.passes.programs import NormProgram
from pathlift.symmetry.aligned import moved


def rounding_of_computed(spread: Spread, ball: Ball) -> Tensor:
    """Bound how far both networks may be from what they are when weights are computed from parameters in exact arithmetic.

    Args:
        spread: The comparison.
        ball: The inputs, each with everything around it.

    Returns:
        (samples, outputs); one 0 when no such weight differs.
    """
    zero = torch.zeros((), dtype=torch.float64, device=spread.network.device)
    wide = Ball({name: size + ball.radius for name, size in ball.sizes.items()}, 0.0)
    return sum((per_input(own, wide) for own in spread.computed), zero)


def rounding_of_gauge(spread: Spread, feed: Mapping[str, Tensor] | None) -> Tensor:
    """Bound |R_θ'(x) − R_{λ∘θ'}(x)|, λ∘θ' as it was rounded: depth·u·Σ_p |Φ_p(θ')|·|x̄(p₀)|, by Theorem 4.1 fed with |x|.

    Args:
        spread: The comparison.
        feed: Input node to |x|, (samples, *shape); None for ones, then it bounds ‖Φ(θ') − Φ(λ∘θ')‖₁ for each output.

    Returns:
        (samples, outputs) or (outputs,); one 0 when nothing was rounded.
    """
    part = moved(spread.network, spread.roundings)
    if not part or spread.others is None:
        return torch.zeros((), dtype=torch.float64, device=spread.network.device)
    network, others = spread.network, spread.others
    return part * run(network, lambda dtype: NormProgram(network, others, dtype, feed=feed), 0, others)
