"""The bounds of the literature for layered ReLU perceptrons, which no rescaling leaves alone: (2), (9), Corollary G.1.

L layers, W the largest width, R ≥ 1 the largest ℓ¹ norm of a neuron's incoming weights and bias in either network. All
are multiples of R^{L−1}·‖θ−θ'‖_∞, so rescaling a layer by λ makes them worse by any factor while the networks stay the
same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pathlift.edges import Dense, Identity
from pathlift.errors import Problem, UnsupportedModelError
from pathlift.graph.expressions import widen
from pathlift.graph.layers import Node
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


def layers_of(network: Network) -> list[Node] | Node:
    """Return the linear layers of a layered ReLU perceptron in order, or the first node that does not belong to one.

    Args:
        network: The graph.

    Returns:
        The layers, or the node.
    """
    layers: list[Node] = []
    below = network.nodes[0].name
    for place, node in enumerate(network.nodes):
        if node.kind == "input":
            if place > 0 or len(node.shape) != 2:
                return node
            continue
        if len(node.terms) != 1 or node.terms[0].source != below or node.concat is not None:
            return node
        term = node.terms[0]
        if isinstance(term.edges, Dense) and all(start.weight.score_name is not None for start in node.starts):
            layers.append(node)
        elif not (isinstance(term.edges, Identity) and term.weight is None and not node.starts):
            return node
        below = node.name
    return layers if layers and network.outputs == (below,) else network.nodes[-1]


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
    if isinstance(layers, Node):
        reason = "This bound is for layered ReLU perceptrons: one chain of linear layers and ReLU, one vector as input."
        origin = layers.origin
        raise UnsupportedModelError((
            Problem(origin.module, origin.op, origin.where, reason, "Use kind='per_input' or kind='theorem'."),
        ))
    radius = 1.0
    width = max(comparison.network.nodes[0].shape[-1], *(node.shape[-1] for node in layers))
    for node in layers:
        leaves = [node.terms[0].weight, *(start.weight for start in node.starts)]
        for found in (comparison.values, comparison.most):
            sizes = [widen(found[leaf]).double().abs().reshape(node.shape[-1], -1).sum(1) for leaf in leaves if leaf]
            radius = max(radius, float(torch.stack(sizes).sum(0).max()))
    gaps = [torch.zeros(1, dtype=torch.float64, device="cpu")]
    for leaf in comparison.values:
        first = comparison.gap[0][leaf].double()
        gaps.append((first if len(comparison.gap) == 1 else first - comparison.gap[1][leaf].double()).abs().amax().reshape(1))
    up = 1.0 + 2 * (width + 2) * 2.0**-53  # of a sum of so many numbers
    distance = max(float(gap) for gap in gaps) * up
    antecedents = width + any(node.starts for node in layers)
    return Layered(len(layers), width, antecedents, max(1.0, radius * up), distance, layers[-1].shape[-1])


def _power(base: float, exponent: int) -> float:
    try:
        return base**exponent
    except OverflowError:
        return float("inf")


def lemma_4_4(comparison: Comparison) -> float:
    """Equation (9), ‖Φ(θ)−Φ(θ')‖₁ ≤ L·W²·R^{L−1}·‖θ−θ'‖_∞; with biases one W becomes W + 1.

    D ≤ R·D + (W·A + 1)·‖θ−θ'‖_∞ for a neuron whose antecedents have D and A ≤ R^l (A ≥ 1 counted as 1), for W outputs.

    Args:
        comparison: The comparison.

    Returns:
        The bound.
    """
    own = layered(comparison)
    return own.depth * own.width * own.antecedents * own.factor * (1.0 + 8 * 2.0**-53)
