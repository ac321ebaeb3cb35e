"""The network in which each neuron that takes an extremum has one antecedent, the largest: what SynFlow runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from pathlift.edges.axis import Axis
from pathlift.edges.base import Edges
from pathlift.edges.movement import Move
from pathlift.edges.unit import UnitEdges
from pathlift.graph.compact import compacted
from pathlift.graph.layers import Bias, Concat, Connection, Extremum, Layer
from pathlift.graph.network import Network


class Largest(UnitEdges):
    """Each neuron above has the largest of its antecedents alone; values are not negative."""

    chooses = True

    def __init__(self, edges: Edges) -> None:
        """Describe the map.

        Args:
            edges: The map of all antecedents, without a weight.
        """
        self.edges = edges

    def gather(self, x: Tensor) -> Tensor:
        """Take the largest."""
        return self.edges.max(x, None)


class First(UnitEdges):
    """Each neuron above is the largest of those along the first dimension, the first of equal ones."""

    chooses = True

    def gather(self, x: Tensor) -> Tensor:
        """Take the largest."""
        return x.max(0).values


def one_antecedent(network: Network) -> Network:
    """Rewrite a network so that its path-norm lets one antecedent of each extremum through.

    Args:
        network: The network as captured.

    Returns:
        A network with the same weights, compact; only its path-magnitudes have a meaning.
    """
    layers = tuple(made for layer in compacted(network).layers for made in _rewritten(layer))
    compact = compacted(network)
    return replace(compact, graph=replace(compact.graph, layers=layers))


def _rewritten(layer: Layer) -> Iterator[Layer]:
    if not isinstance(layer.nonlinearity, Extremum):
        yield layer
        return
    connections = [
        connection if connection.weight is not None else replace(connection, edges=Largest(connection.edges))
        for connection in layer.connections
    ]
    if len(connections) == 1 and not layer.biases:
        yield replace(layer, connections=tuple(connections))
        return
    apart = replace(layer, unit_dim=None, unit_name=None, concat=None, nonlinearity=None)
    names = [f"{layer.name} antecedent {number}" for number in range(len(connections) + len(layer.biases))]
    brought: list[tuple[tuple[Connection, ...], tuple[Bias, ...]]] = [((connection,), ()) for connection in connections]
    brought += [((), (bias,)) for bias in layer.biases]
    parts = [
        replace(apart, name=name, connections=bundle, biases=biases)
        for name, (bundle, biases) in zip(names, brought, strict=True)
    ]
    yield from parts
    axes = None if layer.axes is None else (Axis.full(len(parts)), *layer.axes)
    stacked = tuple(Connection(part.name, Move(lambda x: x.unsqueeze(0))) for part in parts)
    beside = Concat(0, (1,) * len(parts))
    shape = (len(parts), *layer.shape)
    side = replace(
        apart, name=f"{layer.name} antecedents", shape=shape, axes=axes, connections=stacked, biases=(), concat=beside
    )
    yield side
    yield replace(layer, connections=(Connection(side.name, First()),), biases=())
