"""Generalisation bounds from the path-norm, with every constant read off the captured graph (mathematics §5).

For n samples, inputs with ‖x‖_∞ ≤ B (B ≥ 1) and a loss that is K-Lipschitz for ‖·‖₁ on the outputs, the gap between
expected and empirical loss of networks with path-norm at most r is bounded in expectation by the toolkit's Theorem 3.1,
and for layered perceptrons also by covering numbers: on each quadrant of fixed signs Theorem 4.1 and Lemma 4.3 turn a grid
of normalised parameters into a cover of the functions, and Dudley's integral turns covers into a Rademacher complexity.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn

from pathlift.arguments import public
from pathlift.edges import Identity, Move
from pathlift.errors import Problem, UnsupportedModelError
from pathlift.graph.layers import Extremum, Layer, Slopes
from pathlift.graph.network import Network
from pathlift.metric import perceptron
from pathlift.norm import path_norm
from pathlift.passes.rounding import fan_in
from pathlift.reading import Inputs, capture
from pathlift.results import Result


@dataclass(frozen=True, repr=False)
class GeneralisationBound(Result):
    """Bounds on the expected generalisation gap, as log₁₀; a value above log₁₀ of the loss's range says nothing.

    Attributes:
        log10_theorem: 4·B·K/√n·r·√(D·log((3+2P)·K) + log(((3+2P)/(1+P))·(d_in+1)·d_out)).
        log10_sharpened: 4·B·K/√n·r·√(D·log 3 + M·log K + log((d_in+1)·d_out)).
        log10_covering: By covering numbers; NaN for networks that are no layered perceptrons.
        depth: D, the number of layers of neurons on the longest path.
        pools: P, the number of distinct kinds of k-max-pooling.
        kernel: K, the most antecedents of a pooling neuron; 1 without pooling.
        pools_on_a_path: M, the most pooling neurons on a path.
        log10_path_norm: log₁₀ r.
    """

    log10_theorem: float
    log10_sharpened: float
    log10_covering: float
    depth: int
    pools: int
    kernel: int
    pools_on_a_path: int
    log10_path_norm: float

    @public
    def vacuous(self, loss_range: float = 1.0) -> bool:
        """Tell whether every bound exceeds the range of the loss, so that none of them says anything.

        Args:
            loss_range: Largest minus smallest value of the loss.

        Returns:
            True when vacuous.
        """
        known = [b for b in (self.log10_theorem, self.log10_sharpened, self.log10_covering) if not math.isnan(b)]
        return min(known) >= math.log10(loss_range)


@public
@torch.no_grad()
def generalisation_bound(
    model: nn.Module | Network,
    inputs: Inputs | None = None,
    *,
    samples: int,
    input_bound: float = 1.0,
    loss_lipschitz: float = 1.0,
) -> GeneralisationBound:
    """Compute the generalisation bounds that the path-norm gives.

    Args:
        model: A module, or a captured `Network`, of ReLU, k-max-pooling and identity neurons.
        inputs: As for `capture`; not needed for a Network.
        samples: n, the number of training samples.
        input_bound: B, the largest ‖x‖_∞ of an input; 1 where it is smaller.
        loss_lipschitz: K of the loss for ‖·‖₁ on the outputs (1 for cross-entropy).

    Returns:
        The bounds and the constants they are made of.

    Raises:
        UnsupportedModelError: An activation is not among those for which the theorem is proved.
        InputError: A number is out of range.

    References:
        Gonon et al., "A path-norm toolkit for modern networks", ICLR 2024, Theorem 3.1; Gonon et al., ICML 2025, §4.1.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> bound = generalisation_bound(model, (4,), samples=1000)
        >>> bound.depth, bound.pools, bound.kernel
        (2, 0, 1)
    """
    bound = max(input_bound, 1.0)
    network = capture(model, inputs)
    _refuse_other_activations(network)
    depth, pools_on_a_path = _longest(network)
    kinds = {kind for layer in network.layers if (kind := _pool_kind(network, layer)) is not None}
    pools, kernel = len({k for k, _ in kinds}), max((size for _, size in kinds), default=1)
    d_in = sum(math.prod(layer.shape) for layer in network.layers if layer.kind == "input")
    d_out = sum(math.prod(network.layer[name].shape) for name in network.outputs)
    log10_norm = path_norm(network).log10
    log10_unit = math.log10(bound) + math.log10(loss_lipschitz)
    factor = math.log10(4) + log10_unit - math.log10(samples) / 2 + log10_norm
    theorem = depth * math.log((3 + 2 * pools) * kernel) + math.log((3 + 2 * pools) / (1 + pools) * (d_in + 1) * d_out)
    sharpened = depth * math.log(3) + pools_on_a_path * math.log(kernel) + math.log((d_in + 1) * d_out)
    return GeneralisationBound(
        factor + 0.5 * math.log10(theorem),
        factor + 0.5 * math.log10(sharpened),
        _covering(network, log10_norm, samples) + log10_unit,
        depth,
        pools,
        kernel,
        pools_on_a_path,
        log10_norm,
    )


def _refuse_other_activations(network: Network) -> None:
    problems = []
    for layer in network.layers:
        kind = layer.nonlinearity
        relu = isinstance(kind, Slopes) and (kind.plus, kind.minus) in {(1.0, 0.0), (1.0, 1.0)}
        if kind is not None and not isinstance(kind, Extremum) and not relu:
            origin = layer.origin
            reason = "The generalisation bound is proved for ReLU, k-max-pooling and identity neurons."
            problems.append(Problem(origin.module, origin.op, origin.where, reason, "Use ReLU."))
    if problems:
        raise UnsupportedModelError(tuple(problems))


def _pool_kind(network: Network, layer: Layer) -> tuple[int, int] | None:
    """Return (k, antecedents) of a pooling layer."""
    if not isinstance(layer.nonlinearity, Extremum):
        return None
    size = fan_in(network)[layer.name] + layer.nonlinearity.zero
    return (1 if layer.nonlinearity.largest else size), size


def _longest(network: Network) -> tuple[int, int]:
    """Return the depth, and the most pooling neurons on a path.

    A ReLU belongs to the neuron whose sum it takes, and moving neurons about adds none.
    """
    depth: dict[str, int] = {}
    pools: dict[str, int] = {}
    for layer in network.layers:
        moves = all(
            isinstance(connection.edges, (Identity, Move)) and connection.weight is None for connection in layer.connections
        )
        pooled = isinstance(layer.nonlinearity, Extremum)
        adds = pooled or not (moves and not layer.biases and (layer.concat is not None or len(layer.connections) <= 1))
        depth[layer.name] = max((depth[connection.source] for connection in layer.connections), default=0) + adds
        pools[layer.name] = max((pools[connection.source] for connection in layer.connections), default=0) + pooled
    return max(depth[name] for name in network.outputs), max(pools[name] for name in network.outputs)


def _covering(network: Network, log10_norm: float, count: int) -> float:
    """2·Rademacher complexity/(K·B) by Dudley's integral over the quadrants of fixed signs, log₁₀; layered perceptrons only."""
    layers = perceptron.layers_of(network)
    if isinstance(layers, Layer) or not -300 < log10_norm < 300:
        return math.nan
    r = max(10.0**log10_norm, 1e-300)
    width = max(network.layers[0].shape[-1], *(layer.shape[-1] for layer in layers)) + 1
    scale = width**2 + r * len(layers) * width
    sizes = [
        sum(math.prod(weight.shape) for weight in (n.connections[0].weight, *(s.weight for s in n.biases)) if weight)
        for n in layers
    ]
    hidden, outer = sum(sizes[:-1]), sizes[-1]

    def entropy(epsilon: float) -> float:
        """Log of the covering number: cells of side ε/scale in each quadrant, hidden weights in [0, 1], outer in [0, r]."""
        cells = hidden * math.log1p(scale / epsilon) + outer * math.log1p(scale / epsilon * r)
        return cells + (hidden + outer) * math.log(2)

    radius, best = r, math.inf
    grid = [radius * 10.0 ** (-step / 20) for step in range(241)]
    integral = 0.0
    for high, low in itertools.pairwise(grid):
        integral += (high - low) * math.sqrt(max(entropy(low), 0.0))  # entropy decreases, so this is above the integral
        best = min(best, 4 * low + 12 / math.sqrt(count) * integral)
    return math.log10(2 * best)
