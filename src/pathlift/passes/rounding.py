"""How far a computed number can be from the exact one (mathematics §8): counts of roundings, and what they amount to.

A sum of n products computed in floating point, in any order, is the exact sum for weights that are off by a relative error of
at most n·u (u: the unit roundoff; Jeannerod and Rump, 2013). So rounding is a change of weights like any other. In a pass of
non-negative numbers relative errors do not grow in a sum, Σ(1 + e_i)·x_i lies in (1 ± max|e_i|)·Σ x_i, and multiply along a
path: the result is off by at most (roundings on the longest chain)·u, to first order; the factor `tracks` and the spare
roundings of each layer are far more than what second order adds while the product is below 0.1. A signed pass is covered by
letting every weight of a neuron vary by n·u.

An example: a perceptron (3, 4, 2) with biases. Its input has no roundings but 8 spare ones, its layers 4 + 8, 1 + 8 (the ReLU)
and 5 + 8, and the sum of the two outputs 2 more: 44 on the longest chain, in float64 a relative 4·44·2⁻⁵³ = 2e-14.

Winograd and FFT convolutions are outside this model of arithmetic; factors rounded to TF32
or bfloat16, where PyTorch's switches allow it, are inside (`Arithmetic.factors`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.edges.convolution import Convolution
from pathlift.graph.averaged import averaged, averaging
from pathlift.graph.compact import compacted
from pathlift.graph.layers import Layer, WeightTensor
from pathlift.graph.network import CompactNetwork, Network
from pathlift.passes.forward import carried, weighted
from pathlift.passes.propagate import in_forward_order
from pathlift.precision import factor_units


@dataclass(frozen=True)
class Format:
    """A floating-point type as error analysis sees it.

    Attributes:
        unit: Unit roundoff.
        least: What a result may be off by when it underflows, gradually or to 0.
        flushed: Operands below this may be taken for 0.
        largest: The largest finite number.
    """

    unit: float
    least: float
    flushed: float
    largest: float

    def holds(self, other: Format) -> bool:
        """Whether every number of the other type is one of this type."""
        return self.unit <= other.unit and self.least <= other.least and self.largest >= other.largest


def _format(dtype: torch.dtype, digits: int, *, flushes: bool = True) -> Format:
    kind = torch.finfo(dtype)
    least = kind.tiny if flushes else kind.tiny * kind.eps
    return Format(2.0**-digits, least, kind.tiny if flushes else 0.0, kind.max)


FORMATS = {
    torch.float64: _format(torch.float64, 53),
    torch.float32: _format(torch.float32, 24),
    torch.bfloat16: _format(torch.bfloat16, 8),
    torch.float16: _format(torch.float16, 11, flushes=False),  # no processor flushes the small numbers of half precision
}
"""The types that networks compute in."""

DOUBLE = FORMATS[torch.float64]

UNIT = {dtype: kind.unit for dtype, kind in FORMATS.items()}
"""Unit roundoff of each precision."""

SPARE = 8
"""Roundings per neuron besides those of its sum: weights made from parameters, exponents, a nonlinearity."""


def fan_in(network: Network) -> Mapping[str, int]:
    """Count the summands of a neuron, for each layer: edges into it and biases, at most.

    The network is run once with every weight 1 and every value 1, so that each neuron counts its edges; a constant counts where
    it is not 0.

    Args:
        network: The graph, compact or not.

    Returns:
        Layer name to the largest count among its neurons.
    """
    return network.remembered(_fan_in)


@torch.no_grad()
def _fan_in(network: Network) -> Mapping[str, int]:
    if not isinstance(network, CompactNetwork):  # layers that repeat one have one summand
        return {layer.name: 1 for layer in network.layers} | dict(fan_in(compacted(network)))
    values = network.values()
    ones = weighted(values, dtype=torch.float64, transform=torch.ones_like)
    there = weighted(values, dtype=torch.float64, transform=_there)
    counts: dict[str, int] = {}

    def step(layer: Layer, below: Mapping[str, Tensor]) -> Tensor:
        if layer.kind == "input" or not layer.connections:
            counts[layer.name] = len(layer.biases)
        else:
            edges = carried(layer, below, lambda weight: ones(weight) if weight.requires else there(weight))
            counts[layer.name] = int(edges.max()) + len(layer.biases)
        return torch.ones((1, *layer.shape), dtype=torch.float64, device=network.device)

    in_forward_order(network, step)
    return counts


def _there(value: Tensor) -> Tensor:
    """1 where a constant is an edge."""
    return (value != 0).to(value.dtype)


def chain(network: Network, spare: int = SPARE) -> int:
    """Return the number of roundings on the longest chain from an input to an output, the final sum included.

    Args:
        network: The graph.
        spare: Roundings per neuron besides those of its sum.

    Returns:
        The number.
    """
    outputs = sum(math.prod(network.layer[name].full_shape) for name in network.outputs)
    summands = fan_in(network)
    return _longest(network, lambda layer: summands[layer.name] + spare) + outputs


def _longest(network: Network, count: Callable[[Layer], int]) -> int:
    """Add up what each layer counts on the way from an input to an output where that is most."""
    depth: dict[str, int] = {}
    for layer in network.layers:
        depth[layer.name] = max((depth[connection.source] for connection in layer.connections), default=0) + count(layer)
    return max(depth[name] for name in network.outputs)


def rounding_factor(network: Network, dtype: torch.dtype = torch.float64, tracks: int = 4, spare: int = SPARE) -> float:
    """Bound the relative error of a non-negative pass: (roundings on the longest chain)·u, those of its averages among them.

    Args:
        network: The graph.
        dtype: Precision of the pass.
        tracks: How many tracks may add up in one neuron.
        spare: See `chain`.

    Returns:
        The bound.
    """
    return tracks * (chain(network, spare) + averaging(averaged(network))) * UNIT[dtype]


def weights_factor(network: Network, rounded: Mapping[WeightTensor, torch.dtype]) -> float:
    """Bound what path activations are off by, relatively, because weights were computed from parameters in few digits.

    Args:
        network: The graph.
        rounded: Those weights, and their types. Each is taken to be off by as many units of it as its neuron has summands,
            which is what a norm over them does (weight_norm), and `SPARE` more.

    Returns:
        The bound.
    """
    units = {UNIT.get(dtype, 0.0) for dtype in rounded.values()}

    def count(layer: Layer) -> int:
        weights = [connection.weight for connection in layer.connections] + [bias.weight for bias in layer.biases]
        return fan_in(network)[layer.name] + SPARE if any(weight in rounded for weight in weights) else 0

    return 2 * _longest(network, count) * max(units, default=0.0)


class Arithmetic:
    """How the model itself computes each of its layers: the type, and what its products do to their factors."""

    def __init__(self, network: Network) -> None:
        """Look at the model as it is now, and at PyTorch's switches.

        Args:
            network: The graph.
        """
        self.network = network
        kinds = [network.kind_of(name) for name in network.parameters]
        coarsest = max((FORMATS[kind] for kind in kinds if kind in FORMATS), key=lambda kind: kind.unit, default=DOUBLE)
        layers = [FORMATS.get(layer.dtype, DOUBLE) for layer in network.layers]
        self._cast = None if any(kind.unit >= coarsest.unit for kind in layers) else coarsest  # a model cast after its capture
        self._factors = factor_units(network.device.type)

    def of(self, layer: Layer) -> Format:
        """Return the type of a layer."""
        kind = FORMATS.get(layer.dtype, DOUBLE)
        return kind if self._cast is None or kind.unit >= self._cast.unit else self._cast

    def inner(self, layer: Layer) -> Format:
        """Return the type in which PyTorch's kernels hold what is between their operands and their results."""
        kind = self.of(layer)
        return kind if kind.unit <= UNIT[torch.float32] else FORMATS[torch.float32]

    def exact(self, layer: Layer) -> bool:
        """Whether a layer hands on values as they are."""
        kind = self.of(layer)
        return layer.moves and all(
            kind.holds(self.of(self.network.layer[connection.source])) for connection in layer.connections
        )

    def factors(self, layer: Layer) -> float:
        """Return what the factors of a layer's products are rounded to, 0 for nothing beyond the layer's own type."""
        if self.of(layer) is not FORMATS[torch.float32]:
            return 0.0
        with_weights = [connection for connection in layer.connections if connection.weight is not None]
        units = [self._factors[0 if isinstance(connection.edges, Convolution) else 1] for connection in with_weights]
        return max(units, default=0.0)

    @property
    def words(self) -> str:
        """Name the types, the coarsest first."""
        named = {kind: str(dtype).removeprefix("torch.") for dtype, kind in FORMATS.items()}
        kinds = sorted({self.of(layer) for layer in self.network.layers}, key=lambda kind: -kind.unit)
        plain = " and ".join(named[kind] for kind in kinds)
        rounded = max((self.factors(layer) for layer in self.network.layers), default=0.0)
        return plain if rounded == 0.0 else f"{plain} with factors rounded to a relative {rounded:.1g}"
