"""What a rounded layer shifts, and by how much it scales, is taken up by what follows it (mathematics §9).

A change Δ of the rows shifts their outputs by E[Δu] = Δ·m: subtracted from the bias, or added to the running mean of the batch
norm. The variance of the outputs is wᵀCw with C = H − m·mᵀ: a running variance may be multiplied by what that becomes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pathlift.graph.expressions import Expression, StateTensor
from pathlift.graph.network import Network
from pathlift.quantisation.layer import Rounded


def corrections(network: Network, rounded: Rounded, *, variance: bool) -> dict[str, Tensor]:
    """Return the parameters and buffers that a rounded tensor asks to be changed.

    Args:
        network: The network, with the state as it is by now.
        rounded: The tensor.
        variance: Whether the running variance is estimated anew as well.

    Returns:
        Name to its new value; empty when nothing follows that could take it up.
    """
    name = rounded.moments.following
    if not rounded.corrected or name is None:
        return {}
    before = network.state[name]
    sign = -1.0 if name in network.parameters else 1.0
    changed = {name: (before.double() + sign * rounded.shift.to(before.device)).to(before.dtype)}
    if variance and sign > 0:
        changed |= _variance(network, rounded, name)
    return {name: value for name, value in changed.items() if not torch.equal(value, network.state[name])}


def name_of(expression: Expression) -> str | None:
    """Return the name of a parameter or buffer, None for anything that is computed."""
    return expression.name if isinstance(expression, StateTensor) else None


def _variance(network: Network, rounded: Rounded, mean: str) -> Mapping[str, Tensor]:
    """Return the running variance that belongs to a running mean, times the ratio of variances after and before."""
    norms = [norm for layer in network.layers if (norm := layer.normalisation()) is not None]
    variance = next((name_of(norm.variance) for norm in norms if name_of(norm.mean) == mean), None)
    if variance is None:
        return {}

    before, after = rounded.variances.reshape(2, -1)
    ratio = torch.where((before > 0) & (after > 0), after / before.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
    value = network.state[variance]
    return {variance: (value.double() * ratio.to(value.device)).to(value.dtype)}
