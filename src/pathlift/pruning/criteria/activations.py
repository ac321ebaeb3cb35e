"""Criteria made of the activations on data: Wanda."""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.edges.weights import Weights
from pathlift.graph.calling import Samples
from pathlift.graph.layers import Connection, WeightTensor
from pathlift.graph.network import Network
from pathlift.graph.origins import is_moved, moved_back
from pathlift.passes.forward import along, feed_of, forward, unchanged
from pathlift.passes.propagate import blame
from pathlift.pruning.scope import prunable


def wanda(network: Network, x: Samples) -> dict[str, Tensor]:
    """Score |θ_i|·√(Σ u²), u the values that weight i multiplies, over all samples and positions.

    A rescaling multiplies the scores of one output channel by one factor, so comparisons within an output channel
    (selection ``per_output``) do not change.

    Args:
        network: The network.
        x: Inputs, shape (samples, …), one tensor per input of the model.

    Returns:
        Name to scores, for the weights of convolutions and linear layers.

    Raises:
        InputError: ``x`` is malformed.
        NumericalError: A weight is NaN or infinite.

    References:
        Sun, Liu, Bair, Kolter, "A simple and effective pruning approach for large language models", ICLR 2024.
    """
    names = set(prunable(network))
    values = network.values()
    blame(values)
    with torch.no_grad():
        activations = forward(network, values, feed_of(network, x), network.dtype, keep=True)
    squares: dict[str, Tensor] = {}
    for layer in network.layers:
        for connection in layer.connections:
            if connection.weight is not None and connection.weight.requires & names:
                for name, square in _squares(network, connection, connection.weight, activations[connection.source]).items():
                    squares[name] = squares[name] + square if name in squares else square
    size = {name: network.state[name].detach().double().abs() for name in network.parameters if name in squares}
    return {name: magnitude * squares[name].sqrt() for name, magnitude in size.items()}


def _squares(network: Network, connection: Connection, weight: WeightTensor, below: Tensor) -> dict[str, Tensor]:
    """Σ u² over everything that a weight multiplies: the derivative by w of the layer run on u² and summed, in float64."""
    with torch.enable_grad():
        ones = torch.ones(weight.shape, dtype=torch.float64, device=network.device, requires_grad=True)
        out = along(connection, below.double().square(), Weights((ones,), unchanged, torch.float64)).sum()
        (gradient,) = torch.autograd.grad(out, ones)
    return moved_back(network, weight, gradient) if is_moved(network, weight) else {weight.label: gradient}
