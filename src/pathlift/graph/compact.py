"""The compact form of a network: every layer of neurons stored by classes of equal positions (`pathlift.edges.axis`).

Fed with ones, path activations, difference tracks and the path masses that come back are constant on each class, whatever
the weights are. So the network is rewritten once into a smaller one that the passes run in its place: they do not know.

Layers that only repeat the one below (a ReLU) are left out, because path activations do not see them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from torch import Tensor

from pathlift.edges.axis import Axis, choice, compact_shape, full_axes, refinement
from pathlift.edges.base import Chain, Edges
from pathlift.edges.unit import Gather, Identity, weighted_dims
from pathlift.graph.expressions import Apply
from pathlift.graph.layers import Node, Slopes, Term
from pathlift.graph.network import CompactGraph, CompactNetwork, Graph, Network
from pathlift.precision import plainly


def compacted(network: Network) -> CompactNetwork:
    """Return a network for inputs that are constant along all dimensions but the first two, such as ones.

    Args:
        network: As captured; a compact one is returned as it is.

    Returns:
        A network with the same leaves (and some constants moved about) whose nodes have `Node.axes`.
    """
    if isinstance(network, CompactNetwork):
        return network
    return CompactNetwork(network.remembered(_compact_graph), network.state, network.device)


def _compact_graph(network: Network) -> CompactGraph:
    with plainly():  # kept with the graph, whatever the caller's state
        return _Compaction(network.graph).run()


class _Compaction:
    """The walk over the nodes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.axes: dict[str, tuple[Axis, ...]] = {}
        self.leaves = list(graph.leaves)
        self.same: dict[str, str] = {}

    def run(self) -> CompactGraph:
        nodes = []
        for node in self.graph.nodes:
            terms = tuple(replace(term, source=self.same.get(term.source, term.source)) for term in node.terms)
            node = self._node(replace(node, terms=terms))
            if node.name not in self.graph.outputs and _repeats(node):
                self.same[node.name] = node.terms[0].source
            else:
                nodes.append(node)
        fields = {field.name: getattr(self.graph, field.name) for field in dataclasses.fields(Graph) if field.init}
        return CompactGraph(**fields | {"nodes": tuple(nodes), "leaves": tuple(self.leaves)})

    def _node(self, node: Node) -> Node:
        if node.kind == "input":
            axes = tuple(Axis.full(size) if dim < 2 else Axis.constant(size) for dim, size in enumerate(node.shape))
            terms: tuple[Term, ...] = ()
        else:
            found = [self._term(node, place, term) for place, term in enumerate(node.terms)]
            axes = self._joined(node, [own for _, own in found])
            terms = tuple(self._spread(node, term, own, axes) for term, own in found)
        self.axes[node.name] = axes
        return replace(node, shape=compact_shape(axes), axes=axes, terms=terms)

    def _term(self, node: Node, place: int, term: Term) -> tuple[Term, tuple[Axis, ...]]:
        """Return the compact form of a term, and the axes of what it brings."""
        shape = node.shape if node.concat is None else node.concat.shape(place, node.shape)
        below = self.axes[term.source]
        weight = None if term.weight is None else term.weight.shape
        compact = term.edges.compact(below, shape, weight)
        before: Edges | None = None
        if isinstance(compact, frozenset):
            before = Gather({dim: below[dim].index for dim in compact})
            below = tuple(Axis.full(axis.size) if dim in compact else axis for dim, axis in enumerate(below))
            compact = term.edges.compact(below, shape, weight)
            assert not isinstance(compact, frozenset)
        edges = compact.edges if before is None else Chain(before, compact.edges, weighted=1)
        leaf = term.weight
        if compact.weight is not None:
            assert leaf is not None
            assert leaf.score_name is None
            leaf = replace(leaf, expression=Apply(compact.weight, (leaf.expression,)), shape=())
            self.leaves.append(leaf)
        return Term(term.source, edges, leaf), compact.axes

    def _joined(self, node: Node, found: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
        """Return the common refinement of all summands, full along what is concatenated and where biases vary."""
        if not found:
            return full_axes(node.shape)
        axes = [
            Axis.full(size) if node.concat is not None and dim == node.concat.dim else refinement(own)
            for dim, (size, own) in enumerate(zip(node.shape, zip(*found, strict=True), strict=True))
        ]
        for start in node.starts:
            for dim in weighted_dims(axes, start.view):
                axes[dim] = Axis.full(axes[dim].size)
        return tuple(axes)

    def _spread(self, node: Node, term: Term, own: tuple[Axis, ...], axes: tuple[Axis, ...]) -> Term:
        """Bring what a term brings to the axes of the node."""
        index: dict[int, Tensor] = {}
        for dim, (axis, finer) in enumerate(zip(own, axes, strict=True)):
            along = node.concat is not None and dim == node.concat.dim
            chosen = choice(axis, Axis.full(axis.size) if along else finer)
            if chosen is not None:
                index[dim] = chosen
        return replace(term, edges=Chain(term.edges, Gather(index), weighted=0)) if index else term


def _repeats(node: Node) -> bool:
    """Whether the neurons of a layer have the path activations and the scales of those below, one by one."""
    if node.starts or len(node.terms) != 1 or node.unit_name is not None:
        return False
    (term,) = node.terms
    same = term.weight is None and isinstance(term.edges, Identity)
    return same and (node.nonlinearity is None or isinstance(node.nonlinearity, Slopes))
