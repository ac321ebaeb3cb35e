"""What the bounds of the literature for layered ReLU perceptrons are made of: (2), (8), (9), Corollary G.1.

L layers, W the largest width, R ≥ 1 the largest ℓ¹ norm of a neuron's incoming weights and bias in either network. All
but (8) are multiples of R^{L−1}·‖θ−θ'‖_∞, so rescaling a layer by λ makes them worse by any factor while the networks stay the
same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pathlift.edges import Dense, Identity
from pathlift.errors import Problem, UnsupportedModelError
from pathlift.graph.expressions import widen
from pathlift.graph.layers import Layer
from pathlift.graph.network import Network
from pathlift.metric.comparison import Comparison


@dataclass(frozen=True)
class Layered:
    """The numbers that these bounds are made of.

    Attributes:
        depth: L, the number of linear layers.
        width: W, the largest number of neurons in a layer, inputs included.
        antecedents: W, or W + 1 where a layer has biases: a bias is one more antecedent, of activation 1.
        radius: R, rounded up.
        distance: ‖θ−θ'‖_∞, rounded up.
        outputs: Number of output neurons.
    """

    depth: int
    width: int
    antecedents: int
    radius: float
    distance: float
    outputs: int

    @property
    def factor(self) -> float:
        """R^{L−1}·‖θ−θ'‖_∞, rounded up."""
        return _power(self.radius, self.depth - 1) * self.distance * (1.0 + 8 * self.depth * 2.0**-53)


def layers_of(network: Network) -> list[Layer] | Layer:
    """Return the linear layers of a layered ReLU perceptron in order, or the first layer that does not belong to one.

    Args:
        network: The graph.

    Returns:
        The layers, or the layer.
    """
    layers: list[Layer] = []
    below = network.layers[0].name
    for number, layer in enumerate(network.layers):
        if layer.kind == "input":
            if number > 0 or len(layer.shape) != 2:
                return layer
            continue
        if len(layer.connections) != 1 or layer.connections[0].source != below or layer.concat is not None:
            return layer
        connection = layer.connections[0]
        if isinstance(connection.edges, Dense) and all(bias.weight.score_name is not None for bias in layer.biases):
            layers.append(layer)
        elif not (isinstance(connection.edges, Identity) and connection.weight is None and not layer.biases):
            return layer
        below = layer.name
    return layers if layers and network.outputs == (below,) else network.layers[-1]


def layered(comparison: Comparison) -> Layered:
    """Read off L, W, R and the distance.

    Args:
        comparison: The comparison.

    Returns:
        The numbers.

    Raises:
        UnsupportedModelError: The model is no layered perceptron.
    """
    layers = layers_of(comparison.network)
    if isinstance(layers, Layer):
        reason = "This bound is for layered ReLU perceptrons: one chain of linear layers and ReLU, one vector as input."
        origin = layers.origin
        raise UnsupportedModelError((
            Problem(origin.module, origin.op, origin.where, reason, "Use kind='per_input' or kind='theorem'."),
        ))
    radius = 1.0
    width = max(comparison.network.layers[0].shape[-1], *(layer.shape[-1] for layer in layers))
    for layer in layers:
        weights = [layer.connections[0].weight, *(bias.weight for bias in layer.biases)]
        for values in (comparison.values, comparison.most):
            sizes = [widen(values[weight]).double().abs().reshape(layer.shape[-1], -1).sum(1) for weight in weights if weight]
            radius = max(radius, float(torch.stack(sizes).sum(0).max()))
    gaps = [torch.zeros(1, dtype=torch.float64, device="cpu")]
    for weight in comparison.values:
        first = comparison.gap[0][weight].double()
        gaps.append((first if len(comparison.gap) == 1 else first - comparison.gap[1][weight].double()).abs().amax().reshape(1))
    up = 1.0 + 2 * (width + 2) * 2.0**-53  # of a sum of so many numbers
    distance = max(float(gap) for gap in gaps) * up
    antecedents = width + any(layer.biases for layer in layers)
    return Layered(len(layers), width, antecedents, max(1.0, radius * up), distance, layers[-1].shape[-1])


def _power(base: float, exponent: int) -> float:
    try:
        return base**exponent
    except OverflowError:
        return float("inf")
