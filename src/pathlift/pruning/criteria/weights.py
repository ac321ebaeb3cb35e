"""Criteria that look at the weights one by one: magnitude and chance."""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.graph.expressions import widen
from pathlift.graph.network import Network
from pathlift.pruning.scope import eligible


@torch.no_grad()
def magnitude(network: Network) -> dict[str, Tensor]:
    """Score |θ_i|. Any rescaling of neurons changes it.

    Args:
        network: The network.

    Returns:
        Name to scores, for every parameter that can be pruned.
    """
    return {name: widen(network.state[name]).abs() for name in eligible(network)}


def random_scores(network: Network, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Score by chance, uniformly in [0, 1).

    Args:
        network: The network.
        generator: Source of randomness, on the CPU; PyTorch's own when None.

    Returns:
        Name to scores, for every parameter that can be pruned.
    """
    shapes = {name: network.state[name].shape for name in eligible(network)}
    drawn = {name: torch.rand(shape, dtype=torch.float32, generator=generator) for name, shape in shapes.items()}
    return {name: score.to(network.device) for name, score in drawn.items()}
