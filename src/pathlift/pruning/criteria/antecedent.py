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
from pathlift.graph.layers import Concat, Extremum, Node, Start, Term
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
    nodes = tuple(made for node in compacted(network).nodes for made in _rewritten(node))
    compact = compacted(network)
    return replace(compact, graph=replace(compact.graph, nodes=nodes))


def _rewritten(node: Node) -> Iterator[Node]:
    if not isinstance(node.nonlinearity, Extremum):
        yield node
        return
    terms = [term if term.weight is not None else replace(term, edges=Largest(term.edges)) for term in node.terms]
    if len(terms) == 1 and not node.starts:
        yield replace(node, terms=tuple(terms))
        return
    apart = replace(node, unit_dim=None, unit_name=None, concat=None, nonlinearity=None)
    names = [f"{node.name} antecedent {place}" for place in range(len(terms) + len(node.starts))]
    brought: list[tuple[tuple[Term, ...], tuple[Start, ...]]] = [((term,), ()) for term in terms]
    brought += [((), (start,)) for start in node.starts]
    parts = [replace(apart, name=name, terms=own, starts=starts) for name, (own, starts) in zip(names, brought, strict=True)]
    yield from parts
    axes = None if node.axes is None else (Axis.full(len(parts)), *node.axes)
    stacked = tuple(Term(part.name, Move(lambda x: x.unsqueeze(0))) for part in parts)
    beside = Concat(0, (1,) * len(parts))
    shape = (len(parts), *node.shape)
    side = replace(apart, name=f"{node.name} antecedents", shape=shape, axes=axes, terms=stacked, starts=(), concat=beside)
    yield side
    yield replace(node, terms=(Term(side.name, First()),), starts=())
