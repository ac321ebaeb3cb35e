"""What a bound compares: a network with one other, or with a whole set of networks and inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pathlift.graph.compact import compacted
from pathlift.graph.expressions import Constant, StateTensor, widen
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.metric.exact import checked_pair, differing, unequal
from pathlift.passes.box import Box, Tolerance, box
from pathlift.passes.intervals import Ranges
from pathlift.passes.programs import ORDERED, PIVOT, Through, Values
from pathlift.passes.propagate import blame
from pathlift.reading.second import Other, other_state
from pathlift.rescaling.alignment import aligned


@dataclass(frozen=True)
class Comparison:
    """θ, and what it is compared with.

    Attributes:
        network: The graph, not compact.
        values: θ.
        others: θ', None for a set.
        box: The set, None for one other network.
        computed: For each side (of a set θ), how far the weights that are computed from parameters (a batch norm's) may be
            from what they are in exact arithmetic, where the two networks differ in them.
        roundings: θ' was brought into the gauge of θ; by how many units of float64 each of its weights may be off since then.
    """

    network: Network
    values: Values
    others: Values | None
    box: Box | None
    roundings: int = 0
    computed: tuple[Comparison, ...] = ()

    @cached_property
    def halves(self) -> tuple[tuple[Values, Values, set[WeightTensor]], ...]:
        """Triples (upper, lower, weights that differ), |upper| ≥ |lower| and equal signs, whose path-metrics add up to a bound.

        For a pair these are (θ, m) and (θ', m) with m the pivot. For a set, m is the smallest pivot and the largest
        magnitudes M stand for θ'. When no sign can change one half is enough: (M, θ) where the set reaches at least as
        far outwards as inwards, since |∏(1+e)−1| ≤ ∏(1+|e|)−1, and (θ, m) where it reaches inwards only.
        """
        if self.others is not None:
            above, below = differing(self.network, self.values, self.others)
            halves = ((self.values, self.others, above), (self.others, self.values, below))
            return tuple(half for half in halves if half[2])
        signed, most, least = self._signed(), self.most, self.least
        outwards = inwards = True
        for weight in most:
            size = signed[weight].abs()
            out, into = most[weight].abs() - size, size - least[weight].abs()
            kept = self._keeps_signs(weight)
            outwards &= kept and bool((out >= into * (1 - 2.0**-50)).all())
            inwards &= kept and not bool(out.any())
        if inwards:
            pairs = [(signed, least)]
        elif outwards:
            pairs = [(most, signed)]
        else:
            pairs = [(signed, least), (most, least)]
        return tuple((first, second, unequal(first, second)) for first, second in pairs)

    def _ends(self, weight: WeightTensor) -> tuple[Tensor, Tensor]:
        assert self.box is not None
        return self.box.lower[weight], self.box.upper[weight]

    def _keeps_signs(self, weight: WeightTensor) -> bool:
        low, high = self._ends(weight)
        return not bool(((low < 0) & (high > 0)).any())

    def _signed(self) -> Values:
        """θ in float64; the numbers of the graph have no tensor."""
        return {weight: widen(value).double() for weight, value in self.values.items()}

    @property
    def through(self) -> Through:
        """How the halves compare: the lower one is the pivot itself for sets, and for pairs when there is one half."""
        return ORDERED if self.box is not None or len(self.halves) < 2 else PIVOT

    @cached_property
    def most(self) -> Values:
        """The largest magnitude of every weight on the other side, with the sign of θ."""
        if self.others is not None:
            return self.others
        assert self.box is not None
        largest = {}
        for weight, value in self.values.items():
            size = torch.maximum(self.box.lower[weight].abs(), self.box.upper[weight].abs())
            largest[weight] = torch.where(value < 0, -size, size)
        return largest

    @cached_property
    def least(self) -> Values:
        """The smallest pivot that a weight can have with θ, with the sign of θ."""
        assert self.box is not None
        pivots = {}
        for weight, value in self.values.items():
            low, high = self.box.lower[weight], self.box.upper[weight]
            size = torch.minimum(torch.minimum(low.abs(), high.abs()), value.double().abs())
            same = (torch.sign(low) == torch.sign(high)) & (torch.sign(low) == torch.sign(value))
            pivots[weight] = torch.where(same, torch.where(value < 0, -size, size), 0.0)
        return pivots

    @cached_property
    def gap(self) -> tuple[Values, ...]:
        """|θ − θ'| at most; for a pair θ and θ' themselves."""
        if self.others is not None:
            return (self.values, self.others)
        assert self.box is not None
        return (
            {
                weight: torch.maximum(self.box.upper[weight] - value.double(), value.double() - self.box.lower[weight]).clamp(
                    min=0.0
                )
                for weight, value in self.values.items()
            },
        )

    @cached_property
    def changed(self) -> set[WeightTensor]:
        """The weight tensors that are not the same on both sides."""
        if self.others is not None:
            return unequal(self.values, self.others)
        return {weight for weight, value in self.gap[0].items() if bool(value.any())}

    @property
    def unbounded(self) -> bool:
        """Whether a weight of the set may be of any size: that of a weight_norm whose direction may be 0."""
        ends = () if self.box is None else (*self.box.lower.values(), *self.box.upper.values())
        return not all(bool(torch.isfinite(end).all()) for end in ends)

    def flipped(self) -> tuple[WeightTensor, Tensor] | None:
        """Return the first weight that can change its sign, and where; None when θθ' ≥ 0 throughout."""
        for weight, value in self.values.items():
            low, high = (self.others[weight],) * 2 if self.others is not None else self._ends(weight)
            signs = [torch.sign(values) for values in (value, low, high)]
            where = (signs[0] * signs[1] < 0) | (signs[0] * signs[2] < 0) | (signs[1] * signs[2] < 0)
            if bool(where.any()):
                return weight, where
        return None


def compared_with(network: Network, other: Other | Tolerance) -> Comparison:
    """Read what a network is compared with.

    Args:
        network: The graph with θ.
        other: θ', or a set of networks.

    Returns:
        Both sides, checked, and θ' in the gauge of θ: bounds compare weights one by one.
    """
    if isinstance(other, Tolerance):
        values = network.values()
        blame(values)
        within = box(network, other)
        vary = [weight for weight in values if within.lower[weight] is not within.upper[weight]]
        return Comparison(network, values, None, within, computed=_computed_weights(network, vary, ((network.state, values),)))
    state = other_state(network, other)
    values, others = checked_pair(network, state)
    blame(values)
    blame(others)
    differ = {name for name in network.state if not torch.equal(network.state[name], state[name])}
    changed = [weight for weight in values if weight.requires & differ]
    computed = _computed_weights(network, changed, ((network.state, values), (state, others)))
    matched = aligned(network, state, others)
    return Comparison(network, values, matched.values, None, matched.roundings, computed)


def _computed_weights(
    network: Network, changed: Sequence[WeightTensor], sides: Sequence[tuple[Mapping[str, Tensor], Values]]
) -> tuple[Comparison, ...]:
    """Enclose the weights that are computed from parameters, where they are not the same on both sides.

    Args:
        network: The graph.
        changed: The weights that differ, or vary over a set.
        sides: For each side its parameters and buffers, and its weights as evaluated; a set encloses its own.

    Returns:
        A comparison of each side, as evaluated, with all that it may be in exact arithmetic; none where nothing is computed.
    """
    weights = [weight for weight in changed if not isinstance(weight.expression, (StateTensor, Constant))]
    comparisons = []
    for parameters, evaluated in sides:
        ranges = Ranges(parameters, parameters, arithmetic=False)
        intervals = {weight: ranges.of(weight) for weight in weights}
        lower, upper = (
            {
                weight: function(getattr(intervals[weight], end), value.double()) if weight in intervals else value.double()
                for weight, value in evaluated.items()
            }
            for end, function in (("low", torch.minimum), ("high", torch.maximum))
        )
        comparisons.append(Comparison(network, evaluated, None, Box(lower, upper)))
    return tuple(comparisons) if weights else ()


def compact(comparison: Comparison) -> Comparison:
    """Return the same comparison on the compact network, for passes fed with ones.

    Args:
        comparison: The comparison.

    Returns:
        Its compact form; weight tensors whose weights the compact network rearranges are constants, the same on both sides.
    """
    network = compacted(comparison.network)
    rearranged = network.values()

    def completed(values: Values, rest: Values = rearranged) -> Values:
        return {weight: values.get(weight, value) for weight, value in rest.items()}

    values = completed(comparison.values)
    others = None if comparison.others is None else completed(comparison.others)
    box = comparison.box
    if box is not None:
        wide = {weight: value.double() for weight, value in rearranged.items()}
        box = Box(completed(box.lower, wide), completed(box.upper, wide), box.cancelled)
    return Comparison(network, values, others, box, comparison.roundings, comparison.computed)
