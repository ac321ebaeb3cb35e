"""What a rounded layer shifts, and by how much it scales, is taken up by what follows it (`pathlift.compensation`)."""

from __future__ import annotations

from torch import Tensor

from pathlift import compensation
from pathlift.graph.network import Network
from pathlift.quantisation.layer import Rounded


def corrections(network: Network, rounded: Rounded) -> dict[str, Tensor]:
    """Return the parameters and buffers that a rounded tensor asks to be changed.

    Args:
        network: The network, with the state as it is by now.
        rounded: The tensor.

    Returns:
        Name to its new value; empty when nothing follows that could take it up.
    """
    if not rounded.corrected:
        return {}
    return compensation.corrections(network, rounded.moments, rounded.shift, rounded.variances)
