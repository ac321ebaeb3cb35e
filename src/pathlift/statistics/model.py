"""What is known of the activations of one network: the moments of every layer, and what errors do to its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.graph.network import Network
from pathlift.passes.propagate import blame
from pathlift.statistics.propagation import Propagation, Step
from pathlift.statistics.sensitivity import sensitivities

TAPS = 0.5
"""The correlation of two taps of one channel where nothing else is known."""


@dataclass(frozen=True, eq=False)
class ActivationModel:
    """The moments of all activations of a network.

    Attributes:
        propagation: The way forward, with the moments of every layer.
        sensitivity: Layer name to g, see `pathlift.statistics.sensitivity`.
    """

    propagation: Propagation
    sensitivity: Mapping[str, Tensor]

    @property
    def network(self) -> Network:
        """The network."""
        return self.propagation.network

    @property
    def steps(self) -> Mapping[str, Step]:
        """Layer name to what it does to moments."""
        return self.propagation.steps


@torch.no_grad()
def activation_model(
    network: Network, *, moments: Mapping[str, tuple[Tensor, Tensor]] | None = None, correlation: float = TAPS
) -> ActivationModel:
    """Work out what the activations of a network look like.

    Args:
        network: The network.
        moments: Input layer to mean and variance, broadcastable to its shape; 0 and 1 for others.
        correlation: Of two taps of one channel.

    Returns:
        The model.

    Raises:
        NumericalError: A weight is NaN or infinite, or numbers leave the range of float64.
    """
    propagation = Propagation(network, moments or {}, correlation)
    blame(propagation.values)
    propagation.run()
    return ActivationModel(propagation, sensitivities(propagation))
