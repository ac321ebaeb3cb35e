"""What a rounded layer shifts, and by how much it scales, is taken up by what follows it (`pathlift.compensation`)."""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift import compensation
from pathlift.graph.network import Network
from pathlift.quantisation.layer import Rounded, energy


def corrections(network: Network, rounded: Rounded, weight: Tensor, *, variance: bool) -> dict[str, Tensor]:
    """Return the parameters and buffers that a rounded tensor asks to be changed.

    Args:
        network: The network, with the state as it is by now.
        rounded: The tensor.
        weight: What it was, shape (groups, rows, columns).
        variance: Whether the running variance is estimated anew as well.

    Returns:
        Name to its new value; empty when nothing follows that could take it up.
    """
    if not rounded.corrected:
        return {}
    after = weight + rounded.change
    spread = (_spread(rounded, weight), _spread(rounded, after)) if variance else None
    return compensation.corrections(network, rounded.moments, weight, after, spread)


def _spread(rounded: Rounded, rows: Tensor) -> Tensor:
    """Return wᵀ (H − m·mᵀ) w of each row."""
    means: Tensor = (rows @ rounded.moments.mean[:, :, None])[:, :, 0]
    return torch.clamp(energy(rows, rounded.moments) - means**2, min=0.0)
