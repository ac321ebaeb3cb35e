"""The compact form of a network: every layer of neurons stored by classes of equal positions (`pathlift.edges.axis`).

Fed with ones, path activations, difference tracks and the path masses that come back are constant on each class, whatever
the weights are. So the network is rewritten once into a smaller one that the passes run in its place: they do not know.

An example: a 3×3 convolution with a border of zeros over a 224×224 image of ones gives 3 different values along each dimension,
at the first position, at the last, and at the 222 between: 3×3 entries stand for 224×224.

Layers that only repeat the one below (a ReLU) are left out, because path activations do not see them. And a concatenation that
begins with the pieces of an earlier one, as each of a dense block does, reads that one: n pieces are n − 1 joints in the place
of n²/2. In a block of three layers, f₀f₁ and f₀f₁f₂ are joined as f₀f₁ and (f₀f₁)f₂; on the way back f₀f₁ is handed one sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pathlift.edges.axis import Axis, choice, compact_shape, full_axes, refinement
from pathlift.edges.base import Edges
from pathlift.edges.chain import Chain
from pathlift.edges.unit import Gather, Identity, weighted_dims
from pathlift.graph.expressions import FunctionCall
from pathlift.graph.layers import Concat, Connection, Layer, Slopes
from pathlift.graph.network import CompactGraph, CompactNetwork, Graph, Network
from pathlift.precision import plainly


def compacted(network: Network) -> CompactNetwork:
    """Return a network for inputs that are constant along all dimensions but the first two, such as ones.

    Args:
        network: As captured; a compact one is returned as it is.

    Returns:
        A network with the same weight tensors (and some constants moved about) whose layers have `Layer.axes`.
    """
    if isinstance(network, CompactNetwork):
        return network
    return CompactNetwork(network.remembered(_compact_graph), network.state, network.device)


def _compact_graph(network: Network) -> CompactGraph:
    with plainly():  # kept with the graph, whatever the caller's state
        return _Compaction(network.graph).run()


class _Compaction:
    """The way over the layers, from the inputs up."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.axes: dict[str, tuple[Axis, ...]] = {}
        self.weights = list(graph.weights)
        self.same: dict[str, str] = {}
        self.joined: dict[tuple[int, tuple[str, ...]], str] = {}

    def run(self) -> CompactGraph:
        layers = []
        for layer in self.graph.layers:
            connections = tuple(
                replace(connection, source=self.same.get(connection.source, connection.source))
                for connection in layer.connections
            )
            layer = self._layer(self._continued(replace(layer, connections=connections)))
            if layer.name not in self.graph.outputs and _repeats(layer):
                self.same[layer.name] = layer.connections[0].source
            else:
                layers.append(layer)
        fields = {field.name: getattr(self.graph, field.name) for field in dataclasses.fields(Graph) if field.init}
        return CompactGraph(**fields | {"layers": tuple(_with_room(layers)), "weights": tuple(self.weights)})

    def _continued(self, layer: Layer) -> Layer:
        """Let a concatenation read an earlier one in the place of the pieces that this has laid side by side already."""
        if layer.concat is None or not all(map(_same, layer.connections)):
            return layer
        pieces, dim = tuple(connection.source for connection in layer.connections), layer.concat.dim
        known = [key for key in self.joined if key[0] == dim and len(key[1]) > 1 and pieces[: len(key[1])] == key[1]]
        self.joined.setdefault((dim, pieces), layer.name)
        if not known:
            return layer
        longest = max(known, key=lambda key: len(key[1]))
        count, sizes = len(longest[1]), layer.concat.sizes
        first = replace(layer.connections[0], source=self.joined[longest])
        concat = Concat(dim, (sum(sizes[:count]), *sizes[count:]))
        return replace(layer, connections=(first, *layer.connections[count:]), concat=concat)

    def _layer(self, layer: Layer) -> Layer:
        if layer.kind == "input":
            axes = tuple(Axis.full(size) if dim < 2 else Axis.constant(size) for dim, size in enumerate(layer.shape))
            connections: tuple[Connection, ...] = ()
        else:
            brought = [self._connection(layer, number, connection) for number, connection in enumerate(layer.connections)]
            axes = self._common_axes(layer, [brought_axes for _, brought_axes in brought])
            connections = tuple(self._refined(layer, connection, coarse, axes) for connection, coarse in brought)
        self.axes[layer.name] = axes
        return replace(layer, shape=compact_shape(axes), axes=axes, connections=connections)

    def _connection(self, layer: Layer, number: int, connection: Connection) -> tuple[Connection, tuple[Axis, ...]]:
        """Return the compact form of a connection, and the axes of what it brings."""
        shape = layer.shape if layer.concat is None else layer.concat.shape(number, layer.shape)
        below = self.axes[connection.source]
        weight = connection.weight
        extent = None if weight is None else weight.shape
        compact = connection.edges.compact(below, shape, extent)
        before: Edges | None = None
        if isinstance(compact, frozenset):
            before = Gather({dim: below[dim].index for dim in compact})
            below = tuple(Axis.full(axis.size) if dim in compact else axis for dim, axis in enumerate(below))
            compact = connection.edges.compact(below, shape, extent)
            assert not isinstance(compact, frozenset)
        edges = compact.edges if before is None else Chain(before, compact.edges, weighted=1)
        if compact.weight is not None:
            assert weight is not None
            assert weight.score_name is None
            weight = replace(weight, expression=FunctionCall(compact.weight, (weight.expression,)), shape=())
            self.weights.append(weight)
        return Connection(connection.source, edges, weight), compact.axes

    def _common_axes(self, layer: Layer, brought: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
        """Return the common refinement of all summands, full along what is concatenated and where biases vary."""
        if not brought:
            return full_axes(layer.shape)
        axes = [
            Axis.full(size) if layer.concat is not None and dim == layer.concat.dim else refinement(along)
            for dim, (size, along) in enumerate(zip(layer.shape, zip(*brought, strict=True), strict=True))
        ]
        for bias in layer.biases:
            for dim in weighted_dims(axes, bias.view):
                axes[dim] = Axis.full(axes[dim].size)
        return tuple(axes)

    def _refined(self, layer: Layer, connection: Connection, coarse: tuple[Axis, ...], axes: tuple[Axis, ...]) -> Connection:
        """Repeat what a connection brings along the finer axes of the layer."""
        index: dict[int, Tensor] = {}
        for dim, (axis, finer) in enumerate(zip(coarse, axes, strict=True)):
            along = layer.concat is not None and dim == layer.concat.dim
            chosen = choice(axis, Axis.full(axis.size) if along else finer)
            if chosen is not None:
                index[dim] = chosen
        return replace(connection, edges=Chain(connection.edges, Gather(index), weighted=0)) if index else connection


def _with_room(layers: Sequence[Layer]) -> list[Layer]:
    """Let each concatenation that others go on from have room for the longest of them (`Concat`)."""
    concats = {layer.name: layer.concat for layer in layers if layer.concat is not None}
    heirs: dict[str, list[str]] = {name: [] for name in concats}
    for layer in layers:
        if layer.concat is not None and _same(layer.connections[0]):
            before = concats.get(layer.connections[0].source)
            if before is not None and before.dim == layer.concat.dim and math.prod(layer.shape[: before.dim]) == 1:
                heirs[layer.connections[0].source].append(layer.name)
    length = {name: sum(concat.sizes) for name, concat in concats.items()}
    room, going_on = dict.fromkeys(concats, 0), set[str]()
    for name in reversed(concats):  # those that go on from it come first
        if heirs[name]:
            longest = max(heirs[name], key=lambda heir: length[heir])
            room[name] = length[name] = length[longest]
            going_on.add(longest)
    return [
        layer
        if layer.concat is None
        else replace(layer, concat=replace(layer.concat, room=room[layer.name], goes_on=layer.name in going_on))
        for layer in layers
    ]


def _repeats(layer: Layer) -> bool:
    """Whether the neurons of a layer have the path activations and the scales of those below, one by one."""
    if layer.biases or len(layer.connections) != 1 or layer.unit_name is not None:
        return False
    return _same(layer.connections[0]) and (layer.nonlinearity is None or isinstance(layer.nonlinearity, Slopes))


def _same(connection: Connection) -> bool:
    """Whether a bundle of edges only hands on what is below."""
    return connection.weight is None and isinstance(connection.edges, Identity)
