"""The averaged form of a network: positions that are read only as averages are stored as these averages.

A pass over path activations is linear, so a mean over space may be taken before the products that lead to it: the mean of a
convolution is a convolution of means. So each axis of each layer stores as few averages as the layers above ask for, where
they are fewer than its positions: this is the transpose of `pathlift.edges.axis`, which stores few positions because the layers
below can make no more. Sums of non-negative numbers lose nothing. Averages rather than sums, because a bias that is the same at
all positions then stays what it is.

An example: a 3×3 convolution with padding over 7×7 positions, then a mean over all 49. It needs one number of each channel
above. Along a dimension the three taps read the positions 0…5, 0…6 and 1…6, so of each channel below 3·3 averages are
needed, each with the part of the outputs that read there at all: 6/7, 1 and 6/7. There is 1 column instead of 49. A
convolution below that one has to make 9 positions instead of 49 and reads 5·5 averages: 0…4, 0…5, 0…6, 1…6 and 2…6.

A pooling window is a sum, too: a convolution in front of it makes as many positions as there are windows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeAlias

import torch
from torch import Tensor

from pathlift.edges.axis import Axis
from pathlift.edges.base import Edges
from pathlift.edges.chain import Chain
from pathlift.edges.gathered import GatheredConvolution
from pathlift.edges.unit import Gather, Identity, Scale
from pathlift.edges.window import Averages, Counted, Reduce, Taps
from pathlift.graph.compact import compacted
from pathlift.graph.layers import Connection, Layer
from pathlift.graph.network import CompactGraph, CompactNetwork, Network
from pathlift.precision import plainly

Row: TypeAlias = "tuple[int, ...]"
"""Whole numbers, one for each position along an axis, without a common factor: their average is Σ_i row_i·x_i / Σ_i row_i."""

Part: TypeAlias = "tuple[Row, Fraction]"
"""A multiple of an average."""


LARGEST = 1 << 30
"""Rows with larger numbers are left alone: one pooling after the other makes them, and their sums have to be exact."""


class AveragedGraph(CompactGraph):
    """A compact graph whose layers hold averages; their ``axes`` tell of outputs only."""


def averaged(network: Network) -> CompactNetwork:
    """Return a network that gives the same sums over paths at its outputs, and shares of weights, biases and channels.

    Args:
        network: As captured, or compact; an averaged one is returned as it is.

    Returns:
        A network with the same weight tensors, for programs that add up and are fed with ones.
    """
    compact = compacted(network)
    if isinstance(compact.graph, AveragedGraph):
        return compact
    return CompactNetwork(compact.remembered(_averaged_graph), compact.state, compact.device)


def _averaged_graph(network: Network) -> AveragedGraph:
    with plainly():  # kept with the graph, whatever the caller's state
        return _Averaging(network.graph.layers, network.graph.outputs).run(network)


def averaging(network: Network) -> int:
    """Return how many roundings averages add to a path at most: those of all layers together.

    Args:
        network: The averaged network.

    Returns:
        The number.
    """
    links = [link for layer in network.layers for connection in layer.connections for link in _links(connection.edges)]
    return sum(matrix.shape[1] + 2 for link in links if isinstance(link, Averages) for _, _, matrix in link.factors)


def _links(edges: Edges) -> Sequence[Edges]:
    return edges.links if isinstance(edges, Chain) else (edges,)


@dataclass(frozen=True)
class _Reading:
    """What an edge map reads of the neurons below, along some of their dimensions, to make averages of those above.

    Attributes:
        parts: Dimension below to what is read along it; other dimensions are read position by position.
        edges: The map between what is read and the averages above.
    """

    parts: Mapping[int, Sequence[Part]]
    edges: Edges


class _Averaging:
    """The way over the layers, from the outputs down to choose averages and up to join them."""

    def __init__(self, layers: Sequence[Layer], outputs: Sequence[str]) -> None:
        self.layers = layers
        self.layer = {layer.name: layer for layer in layers}
        self.outputs = frozenset(outputs)
        self.asked: dict[tuple[str, int], dict[Row, None]] = {}  # what layers above ask for, in order
        self.whole: set[tuple[str, int]] = set()  # axes of which some layer above reads every position
        self.rows: dict[str, dict[int, tuple[Row, ...]]] = {}  # what is stored in the place of positions
        self.readings: dict[tuple[str, int], _Reading | None] = {}

    def run(self, network: Network) -> AveragedGraph:
        for layer in reversed(self.layers):
            self.rows[layer.name] = self._chosen(layer)
            for number, connection in enumerate(layer.connections):
                self._ask(layer, number, connection)
        fields = {field.name: getattr(network.graph, field.name) for field in dataclasses.fields(CompactGraph) if field.init}
        return AveragedGraph(**fields | {"layers": tuple(self._joined(layer) for layer in self.layers)})

    def _chosen(self, layer: Layer) -> dict[int, tuple[Row, ...]]:
        """Choose the dimensions of a layer that store averages: those where fewer are asked for than there are positions."""
        if layer.kind == "input" or layer.name in self.outputs:
            return {}
        kept = set() if layer.concat is None else {layer.concat.dim}
        for bias in layer.biases:
            kept |= _extent(bias.view, len(layer.shape))
        chosen = {}
        for dim in range(2, len(layer.shape)):
            asked = tuple(self.asked.get((layer.name, dim), {}))
            if dim in kept or (layer.name, dim) in self.whole or not 0 < len(asked) < layer.shape[dim]:
                continue
            if max(map(max, asked)) <= LARGEST:
                chosen[dim] = asked
        return chosen

    def _ask(self, layer: Layer, number: int, connection: Connection) -> None:
        """Find out what a connection reads of the layer below."""
        below = self.layer[connection.source]
        extent = () if connection.weight is None else connection.weight.shape
        reading = _read(connection.edges, self.rows[layer.name], below, len(layer.shape), extent)
        self.readings[layer.name, number] = reading
        for dim in range(2, len(below.shape)):
            if reading is None or dim not in reading.parts:
                self.whole.add((below.name, dim))
            else:
                self.asked.setdefault((below.name, dim), {}).update(dict.fromkeys(row for row, _ in reading.parts[dim]))

    def _joined(self, layer: Layer) -> Layer:
        """Return a layer of averages."""
        rows = self.rows[layer.name]
        connections = tuple(self._connection(layer, *numbered) for numbered in enumerate(layer.connections))
        shape = tuple(len(rows[dim]) if dim in rows else size for dim, size in enumerate(layer.shape))
        assert layer.axes is not None
        axes = tuple(Axis.full(len(rows[dim])) if dim in rows else axis for dim, axis in enumerate(layer.axes))
        return replace(layer, connections=connections, shape=shape, axes=axes)

    def _connection(self, layer: Layer, number: int, connection: Connection) -> Connection:
        reading, above = self.readings[layer.name, number], self.rows[layer.name]
        if reading is None:  # the positions above are made, and averaged
            matrices = {dim: torch.tensor([_average(row) for row in rows], dtype=torch.float64) for dim, rows in above.items()}
            edges = Chain(connection.edges, Averages(matrices), weighted=0) if matrices else connection.edges
            return replace(connection, edges=edges)
        below, matrices = self.rows[connection.source], {}
        for dim, parts in reading.parts.items():
            matrix = _matrix(parts, below.get(dim))
            if matrix.shape[0] != matrix.shape[1] or not torch.equal(matrix, torch.eye(len(matrix), dtype=torch.float64)):
                matrices[dim] = matrix
        if not matrices:
            return replace(connection, edges=reading.edges)
        if isinstance(reading.edges, Identity) and connection.weight is None:
            return replace(connection, edges=Averages(matrices))
        return replace(connection, edges=_after(Averages(matrices), reading.edges))


def _after(first: Edges, edges: Edges) -> Chain:
    if isinstance(edges, Chain):
        return Chain(first, *edges.links, weighted=edges.weighted + 1)
    return Chain(first, edges, weighted=1)


def _extent(shape: Sequence[int], rank: int) -> set[int]:
    """Return the dimensions along which something that broadcasts against a tensor varies."""
    return {dim + rank - len(shape) for dim, size in enumerate(shape) if size > 1}


def _average(row: Row) -> list[float]:
    total = sum(row)
    return [number / total for number in row]


def _matrix(parts: Sequence[Part], stored: tuple[Row, ...] | None) -> Tensor:
    """Return the matrix that makes parts, from positions or from the averages that are stored in their place."""
    if stored is None:
        rows = [[float(factor * number / sum(row)) for number in row] for row, factor in parts]
    else:
        place = {row: number for number, row in enumerate(stored)}
        rows = [[float(factor) if number == place[row] else 0.0 for number in range(len(stored))] for row, factor in parts]
    return torch.tensor(rows, dtype=torch.float64)


def _part(numbers: Sequence[int], total: int) -> Part | None:
    """Return Σ_i numbers_i·x_i / total as a multiple of an average; None where nothing is read."""
    divisor, whole = math.gcd(*numbers), sum(numbers)
    return None if whole == 0 else (tuple(number // divisor for number in numbers), Fraction(whole, total))


def _read(
    edges: Edges, above: Mapping[int, tuple[Row, ...]], below: Layer, rank: int, weight: Sequence[int]
) -> _Reading | None:
    """Tell what a bundle of edges reads below.

    Args:
        edges: The map.
        above: Dimension to the averages that are asked for.
        below: The layer below.
        rank: How many dimensions the layer above has.
        weight: Shape of the weight; () for none.

    Returns:
        What is read; None where the map is not known to go with averages, so that every position above is to be made.
    """
    if edges.chooses:
        return None  # what it reads depends on the values
    if isinstance(edges, Chain):
        return _read_chain(edges, above, below, rank, weight)
    if isinstance(edges, GatheredConvolution):
        return _read_convolution(edges, above)
    if isinstance(edges, (Identity, Scale)):
        extent = edges.view if isinstance(edges, Scale) and edges.view is not None else weight
        alike = rank == len(below.shape) and not _extent(extent, rank) & above.keys()
        parts = {dim: [(row, Fraction(1)) for row in rows] for dim, rows in above.items()}
        fits = alike and all(below.shape[dim] == len(rows[0]) for dim, rows in above.items())
        return _Reading(parts, edges) if fits else None
    if isinstance(edges, Taps) and not _extent(weight, rank) & above.keys():
        return _read_taps(edges, above)
    if isinstance(edges, (Reduce, Counted)) and not _extent(weight, rank):
        return _read_all(edges, above, below)
    return None


def _read_convolution(edges: GatheredConvolution, above: Mapping[int, tuple[Row, ...]]) -> _Reading | None:
    """Each tap reads an average of its own."""
    tables, counts, parts = list(edges.tables), list(edges.counts), {}
    for dim, rows in above.items():
        table, places = tables[dim - 2], dict[Part, int]()
        read = torch.empty(len(rows), table.shape[1], dtype=torch.long)
        for tap, classes in enumerate(table.T):
            times = torch.zeros(len(rows), counts[dim - 2] + 1, dtype=torch.long).index_add_(1, classes, torch.tensor(rows))
            for number, (numbers, row) in enumerate(zip(times[:, :-1].tolist(), rows, strict=True)):
                part = _part(numbers, sum(row))
                read[number, tap] = -1 if part is None else places.setdefault(part, len(places))
        if not places:
            return None  # all of it is padding
        tables[dim - 2] = torch.where(read < 0, len(places), read)
        counts[dim - 2], parts[dim] = len(places), list(places)
    return _Reading(parts, GatheredConvolution(tables, counts, groups=edges.groups, transposed=edges.transposed))


def _read_taps(edges: Taps, above: Mapping[int, tuple[Row, ...]]) -> _Reading | None:
    """A window is a sum of what it reads."""
    parts: dict[int, list[Part]] = {}
    for dim in sorted({*edges.matrices, *above}):
        if dim not in edges.matrices:
            parts[dim] = [(row, Fraction(1)) for row in above[dim]]
            continue
        # each position above by itself where no averages are asked for
        matrix, rows = edges.matrices[dim].long(), above.get(dim)
        read = (matrix if rows is None else torch.tensor(rows) @ matrix).tolist()
        found = [_part(numbers, 1 if rows is None else sum(rows[number])) for number, numbers in enumerate(read)]
        known = [part for part in found if part is not None]
        if dim < 2 or len(known) < len(found):
            return None
        parts[dim] = known
    return _Reading(parts, Identity())


def _read_all(edges: Reduce | Counted, above: Mapping[int, tuple[Row, ...]], below: Layer) -> _Reading | None:
    """A sum over dimensions is a multiple of their average."""
    pool = edges.pool if isinstance(edges, Counted) else edges
    dims = {dim % len(below.shape) for dim in pool.dims}
    if above or min(dims) < 2:
        return None
    assert below.axes is not None
    parts = {}
    for dim in dims:
        part = _part(below.axes[dim].multiplicity.tolist(), 1)
        assert part is not None
        parts[dim] = [part]
    return _Reading(parts, pool)


def _read_chain(
    edges: Chain, above: Mapping[int, tuple[Row, ...]], below: Layer, rank: int, weight: Sequence[int]
) -> _Reading | None:
    """A map whose positions are repeated along the finer axes of the layer above: an average of them counts them as often."""
    first, *rest = edges.links
    if edges.weighted != 0 or len(rest) != 1 or not isinstance(rest[0], Gather):
        return None
    tables, between = {dim: table.index for dim, table in rest[0].tables.items()}, dict(above)
    for dim in tables.keys() & above.keys():
        counts = [torch.bincount(tables[dim], torch.tensor(row), _size(first, dim, below)) for row in above[dim]]
        if any(len(each) != _size(first, dim, below) for each in counts):
            return None  # some read no neuron
        parts = [_part([int(number) for number in each], sum(row)) for each, row in zip(counts, above[dim], strict=True)]
        between[dim] = tuple(part[0] for part in parts if part is not None)
    reading = _read(first, between, below, rank, weight)
    left = {dim: table for dim, table in tables.items() if dim not in above}
    if reading is None or not left:
        return reading
    return _Reading(reading.parts, Chain(reading.edges, Gather(left), weighted=0))


def _size(edges: Edges, dim: int, below: Layer) -> int:
    """Return how many positions an edge map makes along a dimension."""
    if isinstance(edges, GatheredConvolution):
        return edges.spatial[dim - 2]
    if isinstance(edges, Taps) and dim in edges.matrices:
        return len(edges.matrices[dim])
    return below.shape[dim]


__all__ = ["AveragedGraph", "averaged", "averaging"]
