"""From a network to the relations between the scales of its neurons, by the edge maps of its operators (SPEC §7).

If the activation of each neuron v is multiplied by 2^s(v) and the function of the network is to stay, a weight on the
edge u → v changes by 2^(s(v)−s(u)) and a bias of v by 2^s(v). So antecedents that an operator compares, adds without a
weight or clamps share one s; a weight that stands on several edges has the same s(v) − s(u) on all of them; inputs,
outputs and whatever meets a constant have s = 0.

The walk runs on the compact network: neurons that read the same weights from the same neurons have the same s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.budget import running
from pathlift.edges import Edges, Identity, Weights
from pathlift.edges.chain import Chain
from pathlift.edges.pattern import Layout, Pattern
from pathlift.edges.unit import Overlap
from pathlift.edges.weights import Support
from pathlift.graph.compact import compacted
from pathlift.graph.expressions import evaluate
from pathlift.graph.layers import Bias, Clamp, Connection, Layer, Origin, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.forward import value_of
from pathlift.passes.propagate import in_forward_order
from pathlift.rescaling.antecedents import PATTERNED, blocks, lines, tie_lines, tie_overlap, tie_pattern, tie_stars
from pathlift.rescaling.monomials import Factor, Product, factors, products
from pathlift.rescaling.relations import FIXED, NOTHING, SEARCH, Relations, Solution, components

VARYING = -1
LARGE = 2.0**40
"""Above every label; a maximum of LARGE − label finds the smallest label."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """How one parameter scales: by 2^(s(above) − s(below)), element by element.

    Attributes:
        above: Classes, broadcasting against ``layout.shape``.
        below: Classes, broadcasting against ``layout.shape``.
        layout: How the (moved) parameter is laid out.
        index: Elements of the flattened parameter that are laid out; None for all in order.
        divides: The network divides by the parameter.
    """

    above: Tensor
    below: Tensor
    layout: Layout
    index: Tensor | None = None
    divides: bool = False

    def split(self, tensor: Tensor) -> Tensor:
        """Lay out a tensor of the parameter's shape."""
        return self.layout.split(tensor if self.index is None else tensor.reshape(-1)[self.index.to(tensor.device)])

    def axes(self, shape: Sequence[int]) -> tuple[int | None, int | None]:
        """Return the axes of the parameter along which the classes above and below change.

        Args:
            shape: Shape of the parameter.

        Returns:
            Two axes; None for one that is no axis of the parameter.
        """
        if self.index is not None or math.prod(shape) != math.prod(self.layout.whole):
            return None, None
        wide = [dim for dim, size in enumerate(self.layout.whole) if size > 1]
        own = [dim for dim, size in enumerate(shape) if size > 1]
        if [self.layout.whole[dim] for dim in wide] != [shape[dim] for dim in own]:
            return None, None
        place = dict(zip(wide, own, strict=True))
        first, second = (None if dim is None else place.get(dim) for dim in self.layout.axes())
        return first, second

    def join(self, laid: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `split`.

        Args:
            laid: What is laid out; broadcasts against ``layout.shape``.
            shape: Shape of the parameter.

        Returns:
            Tensor of that shape, 0 where an element is not laid out.
        """
        flat = self.layout.join(laid.expand(self.layout.shape))
        if self.index is None:
            return flat.reshape(tuple(shape))
        out = flat.new_zeros(torch.Size(shape).numel())
        out[self.index.reshape(-1).to(out.device)] = flat.reshape(-1)
        return out.reshape(tuple(shape))


@dataclass(frozen=True, eq=False)
class _Use:
    """A connection with a weight: labels of the neurons below (groups, ins, places) and above (groups, outs, places)."""

    pattern: Pattern
    below: Tensor
    above: Tensor


@dataclass(frozen=True, eq=False)
class _Step:
    """One map of a bundle of edges.

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


@dataclass(frozen=True, eq=False)
class Tied:
    """What the walk finds.

    Attributes:
        solution: The general solution of all relations.
        scalings: How each parameter (and running mean) scales that takes part.
        weights: How each weight of the graph scales that does, however it follows from the parameters.
        labels: Labels of the neurons of each layer; broadcast to the shape of the compact layer.
        channels: Module to the label of each of its output channels or units, as it was when first given; `VARYING` where
            scales differ from place to place.
        relations: The relations, for reasons.
        supports: Where the constants of the graph were not zero: a tensor that a model holds may be written to.
    """

    solution: Solution
    scalings: Mapping[str, Scaling]
    weights: Mapping[WeightTensor, Scaling]
    labels: Mapping[str, Tensor]
    channels: Mapping[str, Tensor]
    relations: Relations
    supports: Mapping[WeightTensor, Tensor]

    def hold_for(self, network: Network) -> bool:
        """Tell whether these are the relations of a network as it is now.

        Args:
            network: A network of the same graph.

        Returns:
            True when its constants are zero where they were.
        """
        return all(torch.equal(_constant_of(weight, network) != 0, there) for weight, there in self.supports.items())


def _constant_of(weight: WeightTensor, network: Network) -> Tensor:
    return torch.as_tensor(evaluate(weight.expression, network.state), device=network.device)


def tied(network: Network) -> Tied:
    """Find all relations between the scales of a network's neurons, for any values of its parameters and buffers.

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
    known = network.remembered(_solved)
    if not known.hold_for(compact):  # a constant that a model holds was written to
        network.graph.known[_solved] = known = _solved(network)
    return known


def _solved(network: Network) -> Tied:
    return _Tying(compacted(network)).run()


class _Tying:
    """The state of one walk."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.device = network.device
        self.values = network.values()
        self.supports: dict[WeightTensor, Tensor] = {}
        self.relations = Relations()
        self.products: dict[WeightTensor, tuple[Product, ...]] = {}
        self.derived: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self._read_weights()
        self.definitions: list[tuple[WeightTensor, Product, Factor]] = []
        self.whole = self._owned()
        self.elements: dict[str, Tensor] = {}
        self.weight_labels: dict[WeightTensor, Tensor] = {}
        self.uses: dict[WeightTensor, list[_Use]] = {}
        self.units: dict[str, Tensor] = {}
        self.alive = self._alive()

    # ---- leaves

    def _read_weights(self) -> None:
        for weight in self.network.weights:
            found = products(self.network, weight)
            if found is None:
                self.derived.update(dict.fromkeys(weight.requires & set(self.network.parameters), weight.label))
            else:
                self.products[weight] = found
                for factor in factors(found):
                    self.counts[factor.name] = self.counts.get(factor.name, 0) + 1

    def _owned(self) -> dict[WeightTensor, Factor | None]:
        """Find the weight tensors that scale freely, because each of their products has a parameter of its own.

        Returns:
            Weight tensor to the one parameter that it is, None when it is a sum.
        """
        open_products = {(weight, product) for weight, found in self.products.items() for product in found if product}
        owners: dict[tuple[WeightTensor, Product], Factor] = {}
        while True:
            settled = {pair: own for pair in open_products if (own := self._owner(pair[1])) is not None}
            if not settled:
                break
            for (weight, product), own in settled.items():
                open_products.discard((weight, product))
                owners[weight, product] = own
                for factor in product:
                    self.counts[factor.name] -= 1
        whole: dict[WeightTensor, Factor | None] = {}
        for weight, found in self.products.items():
            if any((weight, product) not in owners for product in found):
                continue
            own = owners[weight, found[0]]
            single = len(found) == 1 and len(found[0]) == 1
            whole[weight] = own if single else None
            self.definitions += [] if single else [(weight, product, owners[weight, product]) for product in found]
        return whole

    def _owner(self, product: Product) -> Factor | None:
        for factor in product:
            free = self.counts[factor.name] == 1 and factor.name not in self.derived
            if free and (factor.index is None or len(torch.unique(factor.index)) == factor.index.numel()):
                return factor
        return None

    def _constant(self, weight: WeightTensor) -> bool:
        """Whether a weight tensor does not scale."""
        return self.products.get(weight, ((),)) == ((),)

    def _element_labels(self, name: str) -> Tensor:
        """Return one label per element of a parameter that is used in several ways."""
        if name not in self.elements:
            shape = self.network.state[name].shape
            self.elements[name] = self.relations.new(shape.numel()).reshape(shape)
            if name in self.derived:
                self.relations.reason = f"the derived weight '{self.derived[name]}'"
                self.relations.fix(self.elements[name])
        return self.elements[name]

    def _labels_of(self, weight: WeightTensor) -> Tensor:
        """Return labels for how the elements of a weight tensor scale."""
        if weight in self.weight_labels:
            return self.weight_labels[weight]
        found = self.products[weight]
        shape = torch.Size(weight.shape)
        single = found[0][0] if len(found) == 1 and len(found[0]) == 1 else None
        if weight not in self.whole and single is not None and single.degree == 1:
            elements = self._element_labels(single.name)
            labels = elements if single.index is None else elements.reshape(-1)[single.index]
        else:
            labels = self.relations.new(shape.numel()).reshape(shape)
            if weight not in self.whole:
                for product in found:
                    own = [self._element_of(factor) for factor in product]
                    self.relations.equation([labels, *own], [1, *(-factor.degree for factor in product)])
        self.weight_labels[weight] = labels.reshape(shape)
        return self.weight_labels[weight]

    def _element_of(self, factor: Factor) -> Tensor:
        elements = self._element_labels(factor.name)
        return elements if factor.index is None else elements.reshape(-1)[factor.index]

    # ---- edge maps, link by link

    def _links(self, connection: Connection) -> Iterator[tuple[Edges, bool]]:
        """Yield the maps of a connection one after the other, and whether each carries the weight."""

        def unrolled(edges: Edges, weighted: bool) -> Iterator[tuple[Edges, bool]]:
            if isinstance(edges, Chain):
                for place, link in enumerate(edges.links):
                    yield from unrolled(link, weighted and place == edges.weighted)
            else:
                yield edges, weighted

        yield from unrolled(connection.edges, True)

    def _support(self, weight: WeightTensor) -> Weights:
        """Return 1 where a constant is not zero; derived weights and buffers, which may change, count as nowhere zero."""
        value = value_of(weight, self.values)
        if weight not in self.products or weight.requires:
            value = torch.ones_like(value)
        elif weight.scalar is None:
            self.supports[weight] = value != 0
        return Support(Weights((value.detach().to(self.device),), torch.abs, torch.float64))

    def _dense(self, weight: WeightTensor) -> bool:
        """Whether weights that do not scale count as nowhere zero."""
        return weight not in self.products or bool(weight.requires) or bool((self._support(weight).full() > 0).all())

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device).expand(shape)

    def _steps(self, connection: Connection, shape: tuple[int, ...]) -> list[_Step]:
        """Return the maps of a connection, first to last."""
        weight = connection.weight
        steps: list[_Step] = []
        for edges, weighted in self._links(connection):
            own = weight if weighted else None
            scales = own is not None and not self._constant(own)
            pattern = None
            if own is not None and (scales or isinstance(edges, PATTERNED)):
                pattern = edges.pattern(shape, tuple(value_of(own, self.values).shape))
            weights = None if own is None or scales or (pattern is not None and self._dense(own)) else self._support(own)
            if pattern is not None:
                above = pattern.above.whole
            elif isinstance(edges, Identity) and (weights is None or weights.full().dim() == 0):
                above = shape
            else:
                above = tuple(edges.max(self._zeros(shape), weights).shape)
            step = _Step(edges, weights, pattern, scales, shape, above)
            steps.append(step)
            shape = step.above
        return steps

    # ---- which neurons matter

    def _alive(self) -> dict[str, Tensor]:
        """Find the neurons from which an output can be reached, going backwards."""
        network = self.network
        self.steps: dict[Connection, list[_Step]] = {}
        self.inner: dict[Connection, list[Tensor]] = {}
        none, every = torch.tensor(False, device="cpu"), torch.tensor(True, device="cpu")
        alive = {layer.name: (every if layer.name in network.outputs else none).expand(layer.shape) for layer in network.layers}
        for layer in reversed(network.layers):
            running().check(SEARCH)
            offset = 0
            for place, connection in enumerate(layer.connections):
                above = alive[layer.name]
                if layer.concat is not None:
                    above = above.narrow(layer.concat.dim, offset, layer.concat.sizes[place])
                    offset += layer.concat.sizes[place]
                self.steps[connection] = self._steps(connection, network.layer[connection.source].shape)
                found = self._alive_below(connection, above)
                alive[connection.source] = settled((thinned(alive[connection.source]) | thinned(found)).expand(found.shape))
        return alive

    def _alive_below(self, connection: Connection, above: Tensor) -> Tensor:
        kept: list[Tensor] = []
        above = _summed_to(above, self.steps[connection][-1].above)
        for step in reversed(self.steps[connection]):
            kept.insert(0, above)
            if step.pattern is not None and step.weights is None:
                above = step.pattern.below.join(_read(step.pattern, slim(step.pattern.above.split(above)).any(1)))
            elif not isinstance(step.edges, Identity):
                there = above.double().to(self.device)
                back, _ = step.edges.adjoint(self._zeros(step.below), step.weights, there, below=True, share=False)
                assert back is not None
                above = settled(back.cpu() > 0)
            elif step.weights is not None:
                above = _summed_to(above & (step.weights.full().cpu() > 0), step.below)
        self.inner[connection] = kept
        return above

    # ---- the walk upwards

    def run(self) -> Tied:
        labels = in_forward_order(self.network, self._node, keep=True)
        self._share_uses()
        for weight, product, own in self.definitions:
            self._define(weight, product, own)
        self.relations.neurons = list(labels.values())
        solution = self.relations.solve()
        channels = {name: self._channels(own) for name, own in self.units.items()}
        weights = self._leaf_scalings(solution)
        return Tied(solution, self._scalings(solution, weights), weights, labels, channels, self.relations, self.supports)

    def _channels(self, labels: Tensor) -> Tensor:
        """Return one label per channel from labels of shape (channels, places)."""
        own = self.relations.find(labels)
        first = own.amax(1)
        alike = ((own == first[:, None]) | (own == NOTHING)).all(1)
        return torch.where(alike, labels.amax(1), VARYING)

    def _node(self, layer: Layer, below: Mapping[str, Tensor]) -> Tensor:
        running().check(SEARCH)
        relations, alive = self.relations, thinned(self.alive[layer.name])
        if layer.kind == "input":
            return torch.where(alive, FIXED, NOTHING)
        relations.reason = described(layer.origin)
        found: list[Tensor] = []
        for place, connection in enumerate(layer.connections):
            piece = self._term(connection, below[connection.source])
            found.append(piece if layer.concat is None else piece.expand(layer.concat.shape(place, layer.shape)))
        if layer.unit_name is not None and layer.unit_dim is not None and layer.unit_name not in self.units:
            wide = list(thinned(found[0].expand(layer.shape)).shape)
            wide[layer.unit_dim] = layer.shape[layer.unit_dim]
            self.units[layer.unit_name] = found[0].expand(wide).movedim(layer.unit_dim, 0).reshape(wide[layer.unit_dim], -1)
        if layer.concat is not None:
            out = _side_by_side(found, layer.concat.dim)
        else:
            found += [self._start(layer, bias) for bias in layer.biases]
            out = found[0] if found else torch.zeros(layer.shape, dtype=torch.long, device="cpu")
            for other in found[1:]:
                relations.tie(out, other)
                out = torch.maximum(relations.find(out), relations.find(other))
        out = torch.where(alive, relations.find(thinned(out)), NOTHING)
        if layer.name in self.network.outputs:
            relations.reason = "the output"
            relations.fix(out)
        return relations.find(out)

    def _start(self, layer: Layer, bias: Bias) -> Tensor:
        weight = bias.weight
        if self._constant(weight):
            there = self._support(weight).full().cpu().reshape(bias.view) != 0
            what = "clamps at" if isinstance(layer.nonlinearity, Clamp) else "brings in"
            self.relations.reason = f"a constant that {described(layer.origin)} {what}"
            if weight not in self.products:
                self.relations.reason = f"the derived bias '{weight.label}'"
            out = torch.where(there, FIXED, NOTHING)
        else:
            out = self._labels_of(weight).reshape(bias.view)
        return torch.where(thinned(self.alive[layer.name]), out, NOTHING)

    def _term(self, connection: Connection, labels: Tensor) -> Tensor:
        """Label what a bundle of edges brings, from thin labels of the neurons below; thin again."""
        for step, alive in zip(self.steps[connection], self.inner[connection], strict=True):
            labels = self.relations.find(labels)
            if step.scales:
                assert connection.weight is not None
                assert step.pattern is not None
                labels = thinned(self._weighted(connection.weight, step.pattern, labels.expand(step.below), alive))
            elif isinstance(step.edges, Identity):
                there = True if step.weights is None else step.weights.full().cpu() > 0
                labels = torch.where(thinned(alive) & there, labels, NOTHING)
            else:
                labels = thinned(settled(self._tied_antecedents(step, labels.expand(step.below))))
                labels = torch.where(thinned(alive), labels, NOTHING)
        return labels

    def _tied_antecedents(self, step: _Step, labels: Tensor) -> Tensor:
        """Give each neuron above the label of its antecedents, which must have one and the same."""
        edges, weights, pattern = step.edges, step.weights, step.pattern
        if pattern is not None:
            there = None if weights is None else pattern.weight.split(weights.full().cpu() > 0)
            return pattern.above.join(tie_pattern(self.relations, pattern, there, slim(pattern.below.split(labels))))
        found = lines(edges, step.below, step.above)
        if found:
            thin, dims = thinned(labels), {line.dim for line in found}
            wide = [size if dim in dims else own for dim, (size, own) in enumerate(zip(step.below, thin.shape, strict=True))]
            tie_lines(self.relations, found, thin.expand(wide))
        elif isinstance(edges, Overlap):
            tie_overlap(self.relations, edges, labels, step.above, self.device)
        while True:
            labels = self.relations.find(labels)
            x = labels.double().to(self.device)
            high = edges.max(x, weights).cpu()
            low = LARGE - edges.max(torch.where(x > NOTHING, LARGE - x, 0.0), weights).cpu()
            apart = (high > NOTHING) & (high != low)
            if not bool(apart.any()):
                return high.long()
            self.relations.tie(high[apart].long(), low[apart].long())

    def _weighted(self, weight: WeightTensor, pattern: Pattern, labels: Tensor, alive: Tensor) -> Tensor:
        """Label the neurons above a map whose weights scale."""
        below, live = slim(pattern.below.split(labels)), slim(pattern.above.split(alive))
        above = self._uniform(pattern, below, live)
        if above is None:
            above = self._general(pattern, _wide(below, pattern.below), _wide(live, pattern.above))
        use = _Use(pattern, below, above)
        self.uses.setdefault(weight, []).append(use)
        if weight not in self.whole:
            scale = pattern.weight.split(self._labels_of(weight))
            top, bottom = _representatives(use)
            self.relations.equation([top, bottom, scale], [1, -1, -1])
        return pattern.above.join(above)

    def _uniform(self, pattern: Pattern, below: Tensor, live: Tensor) -> Tensor | None:
        """Label the neurons above when each channel below has one label at all places; None when it has not.

        Two places above have one label in each channel when they read a tap in common, and places that are linked by a
        chain of such pairs.

        Args:
            pattern: The map.
            below: Labels below, (groups, ins, places), or with one place for all.
            live: Which neurons above matter, (groups, outs, places), or with one place for all.

        Returns:
            Labels above, (groups, outs, places).
        """
        real = below > NOTHING
        some, any_live = real.any(1), live.any(1)
        top = below.amax(2, keepdim=True)
        alike = ((below == top) | ~real).all()
        if not alike or not _all_or_none(real, some) or not _all_or_none(live, any_live):
            return None
        there = torch.cat([_wide(some, pattern.below), _wide(any_live, pattern.above)], 1)
        if bool((there == there[:1]).all()):
            kinds, kind = there[:1], torch.zeros(len(there), dtype=torch.long, device="cpu")
        else:
            kinds, kind = torch.unique(there, dim=0, return_inverse=True)
        places = pattern.below.shape[2]
        parts = torch.stack([_linked(pattern, own[:places], own[places:]) for own in kinds])[kind]
        groups, outs, _ = pattern.above.shape
        if parts.numel() and bool((parts == 0).all()):
            parts = parts[:, :1]
        count = int(parts.max()) + 1 if parts.numel() else 0
        fresh = self.relations.new(groups * outs * count).reshape(groups, outs, count)
        if not count:
            return torch.zeros((), dtype=torch.long, device="cpu").expand(pattern.above.shape)
        chosen = fresh.gather(2, parts.clamp(min=0)[:, None].expand(groups, outs, parts.shape[1]))
        return torch.where(live & (parts >= 0)[:, None], chosen, NOTHING).expand(pattern.above.shape)

    def _general(self, pattern: Pattern, below: Tensor, live: Tensor) -> Tensor:
        """Label the neurons above when places differ, and write down what weights at several places demand."""
        tap, source, place = pattern.triples.unbind(1)
        above = torch.zeros(live.shape, dtype=torch.long, device="cpu")
        for group in range(len(below)):
            x, y = below[group], above[group]
            read = torch.zeros(live.shape[2], dtype=torch.bool, device="cpu").index_fill_(
                0, place[(x > NOTHING).any(0)[source]], value=True
            )
            there = live[group] & read
            ins, outs = (x > NOTHING).any(1).nonzero()[:, 0], there.any(1).nonzero()[:, 0]
            if not len(ins) or not len(outs):
                continue
            if _all_or_none((x > NOTHING)[None], (x > NOTHING).any(0)[None]) and _all_or_none(there[None], there.any(0)[None]):
                kept = (x[ins[0]] > NOTHING)[source] & there[outs[0]][place]
                found = self._separate(x[ins], tap[kept], source[kept], place[kept], (len(outs), y.shape[1]))
                y[outs] = torch.where(there[outs], found, NOTHING)
            else:
                y[there] = self.relations.new(int(there.sum()))
                for own in range(int(tap.max()) + 1):
                    self._pairwise(x[:, source[tap == own]], y[:, place[tap == own]])
        return above

    def _separate(self, x: Tensor, tap: Tensor, source: Tensor, place: Tensor, shape: tuple[int, int]) -> Tensor:
        """Label the neurons above a block of weights all of whose channels are at the same places.

        For two edges of one tap, s(v) − s(u) = s(v') − s(u') for all pairs of channels. So where places are linked by taps
        s is a function of the channel plus one of the place, on both sides, and the functions of the place differ along all
        edges of a tap by one number. Places below at which one channel has the same s have it in all channels; places
        above that read such places by the same tap have the same s too.

        Args:
            x: Labels below, shape (ins, places below).
            tap: Of each edge.
            source: Place below of each edge.
            place: Place above of each edge.
            shape: Number of channels and of places above.

        Returns:
            Labels above, of that shape.
        """
        relations, low, (outs, high) = self.relations, x.shape[1], shape
        taps = int(tap.max()) + 1 if len(tap) else 0
        linked = components(low + taps, source, low + tap)[:low]
        kind = components(low, *_alike(relations.find(x) + (linked << 32)))
        kinds = int(kind.max()) + 1
        x = tie_stars(relations, x, torch.arange(low, device="cpu"), kind, kinds)
        self._sums(x, components(kinds + taps, kind[source], kinds + tap)[:kinds])

        spot = components(high + taps * kinds, place, high + tap * kinds + kind[source])[:high]
        spots = int(spot.max()) + 1
        y = relations.new(outs * spots).reshape(outs, spots)
        edges = torch.stack([tap, kind[source], spot[place]])
        if kinds < low or spots < high:
            edges = torch.unique(edges, dim=1)
        tap, source, place = edges
        self._sums(y, components(spots + taps, place, spots + tap)[:spots])
        first = _first(tap, taps)[tap]
        self.relations.equation([y[0, place], y[0, place[first]], x[0, source], x[0, source[first]]], [1, -1, -1, 1])
        return y[:, spot]

    def _sums(self, labels: Tensor, linked: Tensor) -> None:
        """Write down that among linked places s is a sum of a function of the channel and one of the place.

        Args:
            labels: Shape (channels, places).
            linked: Number of its set for each place.
        """
        first = _first(linked, int(linked.max()) + 1)[linked]
        other = (first != torch.arange(len(first), device="cpu")).nonzero()[:, 0]
        first = first[other]
        for part in blocks(len(labels) - 1, len(other)):
            rows = labels[1:][part]
            self.relations.equation([rows[:, other], rows[:, first], labels[:1, other], labels[:1, first]], [1, -1, -1, 1])

    def _pairwise(self, low: Tensor, high: Tensor) -> None:
        """Write down s(v) − s(u) = s(v') − s(u') for all edges of each weight of one tap.

        Args:
            low: Labels below, (ins, edges).
            high: Labels above, (outs, edges).
        """
        there = (low > NOTHING)[None] & (high > NOTHING)[:, None]
        first = there.byte().argmax(2, keepdim=True)
        x, y = low[None].expand(there.shape), high[:, None].expand(there.shape)
        masked = torch.where(there, y, NOTHING)
        self.relations.equation([masked, y.gather(2, first), x, x.gather(2, first)], [1, -1, -1, 1])

    def _share_uses(self) -> None:
        """Make a weight that several bundles of edges use, or that is a bias too, scale in the same way everywhere."""
        for weight, uses in self.uses.items():
            if weight not in self.whole:
                continue
            found = [_representatives(use) for use in uses]
            if weight in self.weight_labels:
                labels = uses[0].pattern.weight.split(self.weight_labels[weight])
                for top, bottom in found:
                    self.relations.equation([top, bottom, labels], [1, -1, -1])
            for place, (top, bottom) in enumerate(found):
                for other_top, other_bottom in found[place + 1 :]:
                    self._same_ratio(top, bottom, other_top, other_bottom)

    def _same_ratio(self, top: Tensor, bottom: Tensor, other_top: Tensor, other_bottom: Tensor) -> None:
        parts, signs = [top, bottom, other_top, other_bottom], [1, -1, -1, 1]
        separate = top.shape[2] == other_top.shape[2] == 1 and bottom.shape[1] == other_bottom.shape[1] == 1
        if not separate:
            self.relations.equation(parts, signs)
            return
        for group in range(top.shape[0]):
            for tap in range(top.shape[3]):
                high, other_high = top[group, :, 0, tap], other_top[group, :, 0, tap]
                low, other_low = bottom[group, 0, :, tap], other_bottom[group, 0, :, tap]
                outs, ins = (high > NOTHING) & (other_high > NOTHING), (low > NOTHING) & (other_low > NOTHING)
                if not bool(outs.any()) or not bool(ins.any()):
                    continue
                high, other_high, low, other_low = high[outs], other_high[outs], low[ins], other_low[ins]
                self.relations.equation([high, low[:1], other_high, other_low[:1]], signs)
                self.relations.equation([high[:1], low, other_high[:1], other_low], signs)

    def _define(self, weight: WeightTensor, product: Product, own: Factor) -> None:
        """Write down how the parameter of its own scales that makes a product scale like its weight tensor."""
        mine = self._element_of(own)
        labels, signs = [self._labels_of(weight), mine], [1, -own.degree]
        for factor in product:
            if factor is not own:
                for part, sign in self._scale_of(factor):
                    labels.append(part)
                    signs.append(-factor.degree * sign)
        self.relations.equation(labels, signs)

    def _scale_of(self, factor: Factor) -> list[tuple[Tensor, int]]:
        """Return how a factor scales, as labels and signs."""
        for weight, own in self.whole.items():
            if own is not None and own.name == factor.name and own.index is None:
                if weight not in self.uses:
                    break
                use = self.uses[weight][0]
                shape, layout = weight.shape, use.pattern.weight
                top, bottom = (layout.join(part.expand(layout.shape)).reshape(shape) for part in _representatives(use))
                return [(top, own.degree), (bottom, -own.degree)]
        return [(self._element_of(factor), 1)]

    # ---- the result

    def _leaf_scalings(self, solution: Solution) -> dict[WeightTensor, Scaling]:
        """Return how the weights of edges and the biases scale that do."""
        found: dict[WeightTensor, Scaling] = {}
        for weight in dict.fromkeys([*self.uses, *self.weight_labels]):
            if weight in self.uses:
                top, bottom = self._joined(self.uses[weight])
                layout = self.uses[weight][0].pattern.weight
            else:
                layout = Layout.plain(weight.shape)
                top = self._labels_of(weight).reshape(layout.shape)
                bottom = torch.zeros(1, 1, 1, 1, dtype=torch.long, device="cpu")
            found[weight] = Scaling(_thin(solution.classes[top]), _thin(solution.classes[bottom]), layout)
        return {weight: scaling for weight, scaling in found.items() if self._moves(scaling)}

    def _scalings(self, solution: Solution, weights: Mapping[WeightTensor, Scaling]) -> dict[str, Scaling]:
        found: dict[str, Scaling] = {}
        for weight, own in self.whole.items():
            if own is not None and weight in weights:
                above, below = weights[weight].above, weights[weight].below
                if own.degree < 0:
                    above, below = below, above
                found[own.name] = Scaling(above, below, weights[weight].layout, own.index, own.degree < 0)
        for name, labels in self.elements.items():
            layout = Layout.plain(labels.shape)
            above = solution.classes[labels.reshape(layout.shape)]
            found[name] = Scaling(above, torch.zeros(1, 1, 1, 1, dtype=torch.long, device="cpu"), layout)
        return {name: scaling for name, scaling in found.items() if self._moves(scaling)}

    @staticmethod
    def _moves(scaling: Scaling) -> bool:
        return bool((scaling.above > 0).any()) or bool((scaling.below > 0).any())

    def _joined(self, uses: list[_Use]) -> tuple[Tensor, Tensor]:
        """Return the labels by which a weight scales, from the first of its uses in which both its ends are there."""
        found = [_representatives(use) for use in uses]
        top, bottom = found[0]
        for other_top, other_bottom in found[1:]:
            there = (top > NOTHING) & (bottom > NOTHING)
            other_there = (other_top > NOTHING) & (other_bottom > NOTHING)
            if bool((other_there & ~there).any()):
                top, bottom = torch.where(there, top, other_top), torch.where(there, bottom, other_bottom)
        return top, bottom


def thinned(x: Tensor) -> Tensor:
    """Return the tensor with size 1 along dimensions along which it only repeats itself."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(dim, 0, 1)
    return x


def settled(x: Tensor) -> Tensor:
    """Return the tensor as a view that repeats it along the dimensions along which its values are constant."""
    shape = x.shape
    for dim in range(2, x.dim()):
        if x.shape[dim] > 1 and x.stride(dim):
            first = x.narrow(dim, 0, 1)
            x = first if bool((x == first).all()) else x
    return x.expand(shape)


def slim(x: Tensor) -> Tensor:
    """Return (groups, channels, places) with one place when all places are the same."""
    return x.narrow(2, 0, 1) if x.shape[2] > 1 and x.stride(2) == 0 else x


def _wide(x: Tensor, layout: Layout) -> Tensor:
    """Undo `slim`, for a tensor with places last."""
    return x.expand(*x.shape[:-1], layout.shape[2])


def _side_by_side(found: list[Tensor], dim: int) -> Tensor:
    """Concatenate, leaving out dimensions along which every piece only repeats itself."""
    thin = [
        place
        for place in range(found[0].dim())
        if place != dim and all(piece.shape[place] == 1 or piece.stride(place) == 0 for piece in found)
    ]
    shape = list(found[0].shape)
    shape[dim] = sum(piece.shape[dim] for piece in found)
    for place in thin:
        found = [piece.narrow(place, 0, 1) for piece in found]
    return torch.cat(found, dim).expand(shape)


def _summed_to(above: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return whether any of the neurons is alive that a broadcast value goes to."""
    return above if tuple(above.shape) == shape else above.double().sum_to_size(shape) > 0


def _all_or_none(there: Tensor, some: Tensor) -> bool:
    """Whether the channels of each group are at the same places, apart from channels that are nowhere."""
    return bool(((there == some[:, None]) | ~there.any(2, keepdim=True)).all())


def _read(pattern: Pattern, live: Tensor) -> Tensor:
    """Return which neurons below are read by places above that matter.

    Args:
        pattern: The map.
        live: Which places above matter, (groups, places), or with one place for all.

    Returns:
        Shape (groups, ins, places).
    """
    _, source, place = pattern.triples.unbind(1)
    groups, _, places = pattern.below.shape
    if live.shape[1] == 1:
        found = live & torch.zeros(places, dtype=torch.bool, device="cpu").index_fill_(0, source, value=True)
    else:
        none = torch.zeros(groups, places, dtype=torch.uint8, device="cpu")
        found = none.scatter_reduce_(1, source.expand(groups, -1), live[:, place].byte(), "amax") > 0
    found = found[:1, :1] if bool(found.all()) else found
    return found.expand(groups, places)[:, None].expand(pattern.below.shape)


def _first(number: Tensor, count: int) -> Tensor:
    """Return the first place of each number below ``count``."""
    places = torch.arange(len(number), device="cpu")
    return torch.full((count,), len(number), device="cpu").scatter_reduce_(0, number, places, "amin")


def _alike(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs of columns that link all columns in which a row has the same number."""
    place = torch.arange(x.shape[1], device="cpu").expand(x.shape)
    if not bool((x[:, 1:] >= x[:, :-1]).all()):
        x, place = torch.sort(x, dim=1, stable=True)
    same = x[:, 1:] == x[:, :-1]
    return place[:, :-1][same], place[:, 1:][same]


def _linked(pattern: Pattern, real: Tensor, live: Tensor) -> Tensor:
    """Number the sets of places above that taps link.

    Args:
        pattern: The map.
        real: Places below where there is a neuron.
        live: Places above where there is one.

    Returns:
        Number of its set for each place above, −1 where nothing is read.
    """
    tap, source, place = pattern.triples.unbind(1)
    kept = real[source] & live[place]
    tap, place = tap[kept], place[kept]
    out = torch.full(live.shape, -1, device="cpu")
    if pattern.weight.shape[3] == 1:
        out[place] = 0
        return out
    count = pattern.weight.shape[3]
    of_tap = torch.arange(count, device="cpu")
    while True:
        of_place = torch.full(live.shape, count, device="cpu").scatter_reduce_(0, place, of_tap[tap], "amin")
        further = of_tap.scatter_reduce(0, tap, of_place[place], "amin")
        if torch.equal(further, of_tap):
            break
        of_tap = further
    there = of_place < count
    if bool(there.any()):
        out[there] = torch.unique(of_place[there], return_inverse=True)[1]
    return out


def _representatives(use: _Use) -> tuple[Tensor, Tensor]:
    """Return for each weight the labels of the ends of one of its edges; 0 for a weight without edges.

    Returns:
        Labels above, (groups, outs, 1 or ins, taps), and below, (groups, 1 or outs, ins, taps).
    """
    tap, source, place = use.pattern.triples.unbind(1)
    groups, outs, ins, taps = use.pattern.weight.shape
    real, live = slim(use.below) > NOTHING, slim(use.above) > NOTHING
    if not _all_or_none(real, real.any(1)) or not _all_or_none(live, live.any(1)):
        return _scattered(use)
    there = _wide(real.any(1), use.pattern.below)[:, source] & _wide(live.any(1), use.pattern.above)[:, place]
    number = torch.where(there, torch.arange(len(tap), device="cpu"), len(tap))
    first = torch.full((groups, taps), len(tap), device="cpu").scatter_reduce_(1, tap.expand(groups, -1), number, "amin")
    none = (first == len(tap))[:, None]
    first = first.clamp(max=max(len(tap) - 1, 0))
    if not len(tap):
        return torch.zeros(groups, outs, 1, taps, dtype=torch.long, device="cpu"), torch.zeros(
            groups, 1, ins, taps, dtype=torch.long, device="cpu"
        )
    above, below = use.above.expand(use.pattern.above.shape), use.below.expand(use.pattern.below.shape)
    top = above.gather(2, place[first][:, None].expand(groups, outs, taps)).masked_fill(none, NOTHING)
    bottom = below.gather(2, source[first][:, None].expand(groups, ins, taps)).masked_fill(none, NOTHING)
    return top[:, :, None], bottom[:, None]


def _scattered(use: _Use) -> tuple[Tensor, Tensor]:
    """The same when the channels are not all at the same places."""
    top = torch.zeros(use.pattern.weight.shape, dtype=torch.long, device="cpu")
    bottom = torch.zeros_like(top)
    above, below = use.above.expand(use.pattern.above.shape), use.below.expand(use.pattern.below.shape)
    for tap, source, place in use.pattern.triples.tolist():
        high, low = above[:, :, None, place], below[:, None, :, source]
        fresh = (top[..., tap] == NOTHING) & (high > NOTHING) & (low > NOTHING)
        top[..., tap] = torch.where(fresh, high, top[..., tap])
        bottom[..., tap] = torch.where(fresh, low, bottom[..., tap])
    return top, bottom


def _thin(classes: Tensor) -> Tensor:
    """Drop the taps when all have the same classes."""
    return classes[..., :1] if bool((classes == classes[..., :1]).all()) else classes


def described(origin: Origin) -> str:
    """Name an operator: its name and its module."""
    operator = origin.op.removeprefix("aten.").split(".")[0]
    return f"{operator} in '{origin.module}'" if origin.module else operator
