"""What a change of weights shifts, and by how much it scales, is taken up by what follows them (mathematics §9).

A change Δ of the rows shifts their outputs by E[Δu] = Δ·m: subtracted from the bias, or added to the running mean of the batch
norm. The variance of the outputs is wᵀCw with C = H − m·mᵀ: a running variance may be multiplied by what that becomes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.graph.network import Network
from pathlift.statistics.input_moments import InputMoments


def corrections(
    network: Network, moments: InputMoments, shift: Tensor, spread: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the parameters and buffers that a change of a weight asks to be changed.

    Args:
        network: The network, with the state as it is by now.
        moments: What the weight multiplies.
        shift: E[Δu] of each row, float64, shape (groups·rows,).
        spread: Variances of the outputs before and after, (groups, rows), for the running variance to be estimated anew.

    Returns:
        Name to its new value; empty when nothing follows that could take it up.
    """
    name = moments.following
    if name is None:
        return {}
    old = network.state[name]
    sign = -1.0 if name in network.parameters else 1.0
    changed = {name: (old.double() + sign * shift.to(old.device)).to(old.dtype)}
    if spread is not None and moments.variance is not None:
        changed[moments.variance] = scaled(network.state[moments.variance], *spread)
    return {name: value for name, value in changed.items() if not torch.equal(value, network.state[name])}


def scaled(variance: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return a running variance times the ratio of variances, as it is where one of these is 0.

    Args:
        variance: The running variance.
        before: Variances of the channels as they were, of any shape with as many entries.
        after: As they are now.

    Returns:
        Of the shape and type of the running variance.
    """
    before, after = (part.reshape(-1).to(variance.device) for part in (before, after))
    there = (before > 0) & (after > 0)
    ratio = torch.where(there, after / torch.where(there, before, 1.0), 1.0)
    return (variance.double() * ratio).to(variance.dtype)


def quadratic(rows: Tensor, moment: Tensor) -> Tensor:
    """Return wᵀ H w of each row.

    Args:
        rows: w, shape (groups, rows, columns).
        moment: H, shape (groups, columns, columns); the products with its rows are of its type.

    Returns:
        float64, shape (groups, rows).
    """
    return ((rows.to(moment.dtype) @ moment).double() * rows.double()).sum(2)
