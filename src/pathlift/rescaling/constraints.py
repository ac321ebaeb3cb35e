"""From a network to the constraints on the scales of its neurons, by the edge maps of its operators (mathematics §7).

If the activation of each neuron v is multiplied by 2^s(v) and the function of the network is to stay, a weight on the
edge u → v changes by 2^(s(v)−s(u)) and a bias of v by 2^s(v). So

- inputs, outputs and whatever meets a constant have s = 0;
- antecedents that an operator compares, adds without a weight or clamps share one s (`antecedents`);
- a weight that stands on several edges has the same s(v) − s(u) on all of them (`shared_weights`);
- a weight that is no parameter of its own scales as the parameters that it is made of (`parameters`).

Neurons get labels going forwards; equal labels are tied as they are met, everything else is an equation, solved at the end
(`relations`). The walk runs on the compact network: neurons that read the same weights from the same neurons have the same s.

Worked example: x → W → ReLU → V → y with one input, two hidden neurons, one output. x has label 1, the scale 0. The weights
W are free and stand on one edge each, so the hidden neurons get new labels, 2 and 3; so would y, 4, but it is an output: 4
is tied to 1. No equation is left: two groups, s = (g_1, g_2), W_i scales by 2^(g_i − 0) and V_i by 2^(0 − g_i). With a skip
connection h_2 = h_1 + W'h_1 the sum ties the label of W'h_1 to that of h_1, and h_2 gets it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.budget import running
from pathlift.edges import Identity
from pathlift.edges.pattern import Layout
from pathlift.graph.compact import compacted
from pathlift.graph.expressions import evaluate
from pathlift.graph.layers import Bias, Clamp, Connection, Layer, Origin, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.propagate import in_forward_order
from pathlift.rescaling.antecedents import tie_pattern, tie_through
from pathlift.rescaling.parameters import ParameterScales
from pathlift.rescaling.reach import Link, Reach
from pathlift.rescaling.relations import FIXED, NOTHING, SEARCH, Relations, Solution
from pathlift.rescaling.repeats import one_place, settled, side_by_side, thinned
from pathlift.rescaling.scaling import NO_CLASS, Scaling
from pathlift.rescaling.shared_weights import WeightedEdges, ends, ends_in_any, labelled, share

VARYING = -1
"""In the place of a channel's label: its scale differs from place to place."""


@dataclass(frozen=True, eq=False)
class ScaleConstraints:
    """Everything that the function of a network asks of the scales of its neurons.

    Attributes:
        solution: The general solution of all relations.
        scalings: How each parameter (and running mean) scales that takes part.
        upwards: Names of ``scalings`` in the order of the weights that they make, going up the network; those that make
            several weights come last.
        weights: How each weight of the graph scales that does, however it follows from the parameters.
        labels: Labels of the neurons of each layer; broadcast to the shape of the compact layer.
        channels: Module to the label of each of its output channels or units, as it was when first given; `VARYING` where
            scales differ from place to place.
        relations: The relations, for reasons.
        supports: Where the constants of the graph were not zero: a tensor that a model holds may be written to.
    """

    solution: Solution
    scalings: Mapping[str, Scaling]
    upwards: tuple[str, ...]
    weights: Mapping[WeightTensor, Scaling]
    labels: Mapping[str, Tensor]
    channels: Mapping[str, Tensor]
    relations: Relations
    supports: Mapping[WeightTensor, Tensor]

    def hold_for(self, network: Network) -> bool:
        """Tell whether these are the constraints of a network as it is now.

        Args:
            network: A network of the same graph.

        Returns:
            True when its constants are zero where they were.
        """
        return all(torch.equal(_constant_of(weight, network) != 0, there) for weight, there in self.supports.items())


def _constant_of(weight: WeightTensor, network: Network) -> Tensor:
    return torch.as_tensor(evaluate(weight.expression, network.state), device=network.device)


def scale_constraints(network: Network) -> ScaleConstraints:
    """Find all constraints on the scales of a network's neurons, for any values of its parameters and buffers.

    The graph remembers them.

    Args:
        network: The network as captured.

    Returns:
        The general solution, and how parameters scale by it.

    Raises:
        OutOfTimeError: The seconds of the call are over: groups that are half known are no answer, finer ones than there
            are would change the function.
    """
    compact = compacted(network)
    known = network.remembered(solved)
    if not known.hold_for(compact):  # a constant that a model holds was written to
        network.graph.known[solved] = known = solved(network)
    return known


def solved(network: Network) -> ScaleConstraints:
    """Return the same, found anew."""
    return _Labelling(compacted(network)).run()


class _Labelling:
    """The state of one walk up the network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.relations = Relations()
        self.parameters = ParameterScales(network, self.relations)
        self.reach = Reach(network, self.parameters)
        self.uses: dict[WeightTensor, list[WeightedEdges]] = {}
        self.units: dict[str, Tensor] = {}

    def run(self) -> ScaleConstraints:
        """Label all neurons, write down what is left to say of weights and owners, and solve."""
        relations, parameters = self.relations, self.parameters
        labels = in_forward_order(self.network, self._layer, keep=True)
        for weight, several in self.uses.items():
            if weight in parameters.free:
                share(relations, several, parameters.labels.get(weight))
        parameters.define_owners(self.uses)
        relations.neurons = list(labels.values())
        solution = relations.solve()
        channels = {name: self._channels(units) for name, units in self.units.items()}
        weights = self._weight_scalings(solution)
        scalings = parameters.scalings(solution, weights)
        return ScaleConstraints(solution, scalings, tuple(scalings), weights, labels, channels, relations, self.reach.supports)

    # ---- labels

    def _layer(self, layer: Layer, below: Mapping[str, Tensor]) -> Tensor:
        """Label the neurons of a layer: all that is added up in a neuron shares its label."""
        running().check(SEARCH)
        relations, alive = self.relations, thinned(self.reach.alive[layer.name])
        if layer.kind == "input":
            return torch.where(alive, FIXED, NOTHING)
        relations.reason = described(layer.origin)
        summands: list[Tensor] = []
        for index, connection in enumerate(layer.connections):
            piece = self._connection(connection, below[connection.source])
            summands.append(piece if layer.concat is None else piece.expand(layer.concat.shape(index, layer.shape)))
        if layer.unit_name is not None and layer.unit_dim is not None and layer.unit_name not in self.units:
            wide = list(thinned(summands[0].expand(layer.shape)).shape)
            wide[layer.unit_dim] = layer.shape[layer.unit_dim]
            units = summands[0].expand(wide).movedim(layer.unit_dim, 0)
            self.units[layer.unit_name] = units.reshape(wide[layer.unit_dim], -1)
        if layer.concat is not None:
            out = side_by_side(summands, layer.concat.dim)
        else:
            summands += [self._bias(layer, bias) for bias in layer.biases]
            out = summands[0] if summands else torch.zeros(layer.shape, dtype=torch.long, device="cpu")
            for summand in summands[1:]:
                relations.tie(out, summand)
                out = torch.maximum(relations.find(out), relations.find(summand))
        out = torch.where(alive, relations.find(thinned(out)), NOTHING)
        if layer.name in self.network.outputs:
            relations.reason = "the output"
            relations.fix(out)
        return relations.find(out)

    def _bias(self, layer: Layer, bias: Bias) -> Tensor:
        """Label what a bias brings: by how it scales, or 0 where it is a constant."""
        weight = bias.weight
        if self.parameters.constant(weight):
            there = self.reach.support(weight).full().cpu().reshape(bias.view) != 0
            what = "clamps at" if isinstance(layer.nonlinearity, Clamp) else "brings in"
            self.relations.reason = f"a constant that {described(layer.origin)} {what}"
            if weight not in self.parameters.products:
                self.relations.reason = f"the derived bias '{weight.label}'"
            out = torch.where(there, FIXED, NOTHING)
        else:
            out = self.parameters.labels_of(weight).reshape(bias.view)
        return torch.where(thinned(self.reach.alive[layer.name]), out, NOTHING)

    def _connection(self, connection: Connection, labels: Tensor) -> Tensor:
        """Label what a connection brings, map by map, from thin labels of the neurons below; thin again."""
        for link, alive in zip(self.reach.links[connection], self.reach.alive_above[connection], strict=True):
            labels = self.relations.find(labels)
            if link.scales:
                assert connection.weight is not None
                labels = thinned(self._weighted(connection.weight, link, labels.expand(link.below), alive))
            elif isinstance(link.edges, Identity):
                there = True if link.weights is None else link.weights.full().cpu() > 0
                labels = torch.where(thinned(alive) & there, labels, NOTHING)
            else:
                labels = thinned(settled(self._tied(link, labels.expand(link.below))))
                labels = torch.where(thinned(alive), labels, NOTHING)
        return labels

    def _weighted(self, weight: WeightTensor, link: Link, labels: Tensor, alive: Tensor) -> Tensor:
        """Label the neurons above a map whose weights scale: by new labels, for a free weight makes up for any."""
        assert link.pattern is not None
        edges = labelled(self.relations, link.pattern, labels, alive)
        self.uses.setdefault(weight, []).append(edges)
        if weight not in self.parameters.free:
            scale = link.pattern.weight.split(self.parameters.labels_of(weight))
            top, bottom = ends(edges)
            self.relations.equation([top, bottom, scale], [1, -1, -1])
        return link.pattern.above.join(edges.above)

    def _tied(self, link: Link, labels: Tensor) -> Tensor:
        """Give each neuron above the label of its antecedents, which must have one and the same."""
        pattern = link.pattern
        if pattern is None:
            return tie_through(self.relations, link.edges, link.weights, labels, link.above, self.network.device)
        there = None if link.weights is None else pattern.weight.split(link.weights.full().cpu() > 0)
        return pattern.above.join(tie_pattern(self.relations, pattern, there, one_place(pattern.below.split(labels))))

    # ---- the result

    def _channels(self, labels: Tensor) -> Tensor:
        """Return one label per channel from labels of shape (channels, places)."""
        classes = self.relations.find(labels)
        largest = classes.amax(1)
        alike = ((classes == largest[:, None]) | (classes == NOTHING)).all(1)
        return torch.where(alike, labels.amax(1), VARYING)

    def _weight_scalings(self, solution: Solution) -> dict[WeightTensor, Scaling]:
        """Return how the weights of edges and the biases scale that do."""
        made: dict[WeightTensor, Scaling] = {}
        for weight in dict.fromkeys([*self.uses, *self.parameters.labels]):
            if weight in self.uses:
                top, bottom = ends_in_any(self.uses[weight])
                layout = self.uses[weight][0].pattern.weight
                below = _without_taps(solution.classes[bottom])
            else:
                layout = Layout.plain(weight.shape)
                top, below = self.parameters.labels_of(weight).reshape(layout.shape), NO_CLASS
            made[weight] = Scaling(_without_taps(solution.classes[top]), below, layout)
        return {weight: scaling for weight, scaling in made.items() if scaling.moves}


def _without_taps(classes: Tensor) -> Tensor:
    """Drop the taps when all have the same classes."""
    return classes[..., :1] if bool((classes == classes[..., :1]).all()) else classes


def described(origin: Origin) -> str:
    """Name an operator: its name and its module."""
    operator = origin.op.removeprefix("aten.").split(".")[0]
    return f"{operator} in '{origin.module}'" if origin.module else operator
