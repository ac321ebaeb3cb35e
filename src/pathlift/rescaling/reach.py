"""Which neurons an output depends on, and the maps between them one by one (mathematics §7).

Neurons that no output depends on may be scaled at will, and are in no group: they get no label, and ask for nothing. They
are found once, going backwards, before labels go forwards. A neuron matters when an edge leads from it to one that does; an
edge with a constant weight 0 is none, one whose weight scales, or may change, always is.

Worked example: a slice x[:, :2] of three channels, then a linear layer with a constant matrix ((1, 0), (0, 0)). The output
of the second row reads nothing, so both outputs matter but only channel 0 of x does.

A connection is a chain of maps, of which one carries the weight. Each is a `Link`: labels go up through it in
`pathlift.rescaling.constraints`, by the way that `Link` tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.budget import running
from pathlift.edges import Edges, Identity, Weights
from pathlift.edges.chain import Chain
from pathlift.edges.pattern import Pattern
from pathlift.edges.weights import Support
from pathlift.graph.layers import Connection, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.forward import value_of
from pathlift.rescaling.antecedents import PATTERNED
from pathlift.rescaling.parameters import ParameterScales
from pathlift.rescaling.relations import SEARCH
from pathlift.rescaling.repeats import one_place, settled, thinned


@dataclass(frozen=True, eq=False)
class Link:
    """One map of a connection.

    Attributes:
        edges: The map.
        weights: Constant weights, where some are 0 or they stand on no pattern; 1 where they are not 0.
        pattern: Which weight stands on which edge, for weights that scale and for constant ones of `PATTERNED` maps.
        scales: Whether the weights scale.
        below: Shape of the neurons below.
        above: Shape of the neurons above.
    """

    edges: Edges
    weights: Weights | None
    pattern: Pattern | None
    scales: bool
    below: tuple[int, ...]
    above: tuple[int, ...]


class Reach:
    """The maps of all connections, and the neurons on their ways that matter.

    Attributes:
        alive: Layer to which of its neurons matter.
        links: Connection to its maps, first to last.
        alive_above: Connection to which of the neurons above each of its maps matter.
        supports: Constants that were asked for, to where they are not zero.
    """

    def __init__(self, network: Network, parameters: ParameterScales) -> None:
        """Go through the network backwards.

        Args:
            network: The network.
            parameters: Which of its weights scale.
        """
        self.network, self.parameters = network, parameters
        self.values = network.values()
        self.supports: dict[WeightTensor, Tensor] = {}
        self.links: dict[Connection, list[Link]] = {}
        self.alive_above: dict[Connection, list[Tensor]] = {}
        none, every = torch.tensor(False, device="cpu"), torch.tensor(True, device="cpu")
        self.alive = {
            layer.name: (every if layer.name in network.outputs else none).expand(layer.shape) for layer in network.layers
        }
        for layer in reversed(network.layers):
            running().check(SEARCH)
            offset = 0
            for index, connection in enumerate(layer.connections):
                above = self.alive[layer.name]
                if layer.concat is not None:
                    above = above.narrow(layer.concat.dim, offset, layer.concat.sizes[index])
                    offset += layer.concat.sizes[index]
                self.links[connection] = self._links_of(connection, network.layer[connection.source].shape)
                below = self._alive_below(connection, above)
                known = self.alive[connection.source]
                self.alive[connection.source] = settled((thinned(known) | thinned(below)).expand(below.shape))

    # ---- constants

    def support(self, weight: WeightTensor) -> Weights:
        """Return 1 where a constant is not zero; derived weights and buffers, which may change, count as nowhere zero."""
        value = value_of(weight, self.values)
        if self._may_change(weight):
            value = torch.ones_like(value)
        elif weight.scalar is None:
            self.supports[weight] = value != 0
        return Support(Weights((value.detach().to(self.network.device),), torch.abs, torch.float64))

    def _may_change(self, weight: WeightTensor) -> bool:
        return weight not in self.parameters.products or bool(weight.requires)

    def _dense(self, weight: WeightTensor) -> bool:
        """Whether weights that do not scale count as nowhere zero."""
        return self._may_change(weight) or bool((self.support(weight).full() > 0).all())

    # ---- maps

    def _links_of(self, connection: Connection, shape: tuple[int, ...]) -> list[Link]:
        links: list[Link] = []
        for edges, weighted in _links(connection.edges):
            weight = connection.weight if weighted else None
            scales = weight is not None and not self.parameters.constant(weight)
            pattern = None
            if weight is not None and (scales or isinstance(edges, PATTERNED)):
                pattern = edges.pattern(shape, tuple(value_of(weight, self.values).shape))
            plain = weight is None or scales or (pattern is not None and self._dense(weight))
            weights = None if weight is None or plain else self.support(weight)
            if pattern is not None:
                above = pattern.above.original
            elif isinstance(edges, Identity) and (weights is None or weights.full().dim() == 0):
                above = shape
            else:
                above = tuple(edges.max(self._zeros(shape), weights).shape)
            links.append(Link(edges, weights, pattern, scales, shape, above))
            shape = above
        return links

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.network.device).expand(shape)

    # ---- backwards

    def _alive_below(self, connection: Connection, above: Tensor) -> Tensor:
        """Return which neurons below a connection matter, for those above; keep which do in between."""
        kept: list[Tensor] = []
        above = _summed_to(above, self.links[connection][-1].above)
        for link in reversed(self.links[connection]):
            kept.insert(0, above)
            if link.pattern is not None and link.weights is None:
                live = one_place(link.pattern.above.split(above)).any(1)
                above = link.pattern.below.join(_read(link.pattern, live))
            elif not isinstance(link.edges, Identity):
                there = above.double().to(self.network.device)
                back, _ = link.edges.adjoint(self._zeros(link.below), link.weights, there, below=True, share=False)
                assert back is not None
                above = settled(back.cpu() > 0)
            elif link.weights is not None:
                above = _summed_to(above & (link.weights.full().cpu() > 0), link.below)
        self.alive_above[connection] = kept
        return above


def _links(edges: Edges, weighted: bool = True) -> Iterator[tuple[Edges, bool]]:
    """Yield the maps of a connection one after the other, and whether each carries the weight."""
    if isinstance(edges, Chain):
        for index, link in enumerate(edges.links):
            yield from _links(link, weighted and index == edges.weighted)
    else:
        yield edges, weighted


def _summed_to(above: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return whether any of the neurons is alive that a broadcast value goes to."""
    return above if tuple(above.shape) == shape else above.double().sum_to_size(shape) > 0


def _read(pattern: Pattern, live: Tensor) -> Tensor:
    """Return which neurons below are read by places above that matter.

    Args:
        pattern: The map.
        live: Which places above matter, (groups, places), or with one place for all.

    Returns:
        Shape (groups, ins, places).
    """
    _, source, target = pattern.triples.unbind(1)
    groups, _, positions = pattern.below.shape
    if live.shape[1] == 1:
        read = live & torch.zeros(positions, dtype=torch.bool, device="cpu").index_fill_(0, source, value=True)
    else:
        none = torch.zeros(groups, positions, dtype=torch.uint8, device="cpu")
        read = none.scatter_reduce_(1, source.expand(groups, -1), live[:, target].byte(), "amax") > 0
    read = read[:1, :1] if bool(read.all()) else read
    return read.expand(groups, positions)[:, None].expand(pattern.below.shape)
