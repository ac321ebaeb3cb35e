"""Two networks at one and the same input: linear bounds of their differences Δ = u(θ', x') − u(θ, x') (mathematics §5).

Both networks read the same x', so Δ = 0 at the inputs. Layer by layer, with u in the enclosure of the first network,

- affine: Δ(v) = Σ c'·Δ(u) + e with e = Σ (c' − c)·u + b' − b, which has a middle and a radius;
- a nonlinearity with slopes between ``least`` and ``most``: where both networks are known to be on one side of the kink, Δ is
  multiplied by the slope there, exactly; elsewhere it ends between least·Δ and most·Δ. Of the smallest and the largest of these
  two, one is concave and the other convex in Δ, so chords lie below and above.
- an extremum moves by no more than what it is taken of; anything else by what the two enclosures allow.

What comes out is a `Relaxation` of a network that computes Δ: `substitution` goes back through it as through any other. What
rounding does to either network is in the slack of its own relaxation, and both slacks are paid here.

An example: f(x) = ReLU(x), f'(x) = ReLU(1.1·x) for x in [1, 2]: Δ = 1.1·0 + 0.1·x in [0.1, 0.2], as both are known to be
positive. Enclosures alone give [1.1, 2.2] − [1, 2] = [−0.9, 1.2].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pathlift.edges.weights import Weights
from pathlift.graph.interval import Interval
from pathlift.graph.layers import Bias, Clamp, Extremum, Layer, Slopes, WeightTensor
from pathlift.passes.enclosure.lines import Lines, slope_lines
from pathlift.passes.enclosure.nonlinear import TINY, WIDEN, gain
from pathlift.passes.enclosure.relaxation import Relaxation
from pathlift.passes.enclosure.weights import BoxWeights
from pathlift.passes.forward import WeightsOf, carried, largest, unchanged
from pathlift.passes.propagate import in_forward_order
from pathlift.passes.rounding import DOUBLE


def differences(first: Relaxation, second: Relaxation) -> Relaxation:
    """Relax what a second network computes beyond the first, at the same inputs.

    Args:
        first: What is known of the first network, over a ball of inputs.
        second: What is known of the second, over the same ball.

    Returns:
        The relaxation of the differences.
    """
    feed = {name: torch.zeros_like(x) for name, x in first.feed.items()}
    relaxation = Relaxation(first.network, feed, BoxWeights(second.weights.box), second.roundoff)
    pair = _Pair(first, second, relaxation)
    in_forward_order(first.network, pair.step)
    return relaxation


class _Pair:
    """One forward pass of differences."""

    def __init__(self, first: Relaxation, second: Relaxation, differences: Relaxation) -> None:
        self.first, self.second, self.differences = first, second, differences
        self.before = BoxWeights(first.weights.box)

    def step(self, layer: Layer, _: Mapping[str, Interval]) -> Interval:
        if layer.kind == "input":
            zero = self.differences.feed[layer.name]
            interval = Interval(zero, zero)
        elif layer.nonlinearity is None:
            interval = self._affine(layer)
        else:
            interval = self._bent(layer)
        low, high = self.difference(layer)
        least = torch.maximum(self.differences.for_all(interval.low), low)
        interval = Interval(least, torch.maximum(least, torch.minimum(self.differences.for_all(interval.high), high)))
        self.differences.intervals[layer.name] = interval
        return interval

    def difference(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return what the intervals of both networks say of their difference."""
        before, after = (relaxation.intervals[layer.name] for relaxation in (self.first, self.second))
        spare = 4 * DOUBLE.unit * (before.size + after.size)
        low, high = after.low - before.high - spare, after.high - before.low + spare
        return self.differences.for_all(low), self.differences.for_all(high)

    def slack(self, layer: Layer) -> Tensor:
        """Return what rounding does to both networks."""
        return self.first.slack[layer.name] + self.second.slack[layer.name]

    def _affine(self, layer: Layer) -> Interval:
        known, weights, here = self.differences.intervals, self.differences.weights, self.differences.roundoff.here(layer)
        if not layer.connections:
            after, before = (carried(layer, {}, box.middles, biases=box.middles) for box in (weights, self.before))
            moving = carried(layer, {}, self._radii, biases=self._radii) if self._moves(layer) else 0.0
            self.differences.constants[layer.name] = self.differences.for_all(after - before)
            radius = self.differences.for_all(moving + self.slack(layer) + here * (after.abs() + before.abs()))
            self.differences.slack[layer.name] = radius
            return Interval(after - before - radius, after - before + radius)
        sources = [connection.source for connection in layer.connections]
        real = {name: self.first.intervals[name] for name in sources}
        sizes = {name: interval.size for name, interval in real.items()}
        changes = {name: known[name].size for name in sources}
        both = {name: self.differences.for_all(sizes[name]) + changes[name] for name in sources}
        middles = {name: interval.middle for name, interval in real.items()}
        radii = {name: interval.radius for name, interval in real.items()}
        drift = carried(layer, middles, self._gaps(unchanged), biases=self._gaps(unchanged), only_weighted=True)
        spread = carried(layer, radii, self._gaps(torch.abs), only_weighted=True)
        if self._moves(layer):
            spread = spread + carried(layer, sizes, self._radii, biases=self._radii, only_weighted=True)
        magnitude = carried(layer, both, weights.sizes) + carried(
            layer, sizes, self._gaps(torch.abs), biases=self._gaps(torch.abs), only_weighted=True
        )
        rounding = here * magnitude + self.differences.roundoff.underflow(layer, both)
        rounded_up = 1.0 + 4 * here
        slack = self.differences.for_all((spread + rounding + self.slack(layer)) * rounded_up)
        self.differences.slack[layer.name] = slack
        self.differences.constants[layer.name] = self.differences.for_all(drift)
        middle = carried(layer, {name: known[name].middle for name in sources}, weights.middles) + drift
        radius = carried(layer, {name: known[name].radius for name in sources}, weights.sizes) + slack
        if any(weights.varies(connection.weight) for connection in layer.connections):
            radius = radius + carried(layer, changes, weights.radii, only_weighted=True)
        return Interval(middle - radius * rounded_up, middle + radius * rounded_up)

    def _moves(self, layer: Layer) -> bool:
        return any(box.vary(layer) for box in (self.before, self.differences.weights))

    def _gaps(self, transform: Callable[[Tensor], Tensor]) -> WeightsOf:
        """Return the weights f(c' − c), f the transform."""

        def gap(weight: WeightTensor) -> Weights | None:
            if weight.scalar is not None:
                return None
            change = self.differences.weights.middle[weight] - self.before.middle[weight]
            return Weights((change,), transform, torch.float64)

        return gap

    def _radii(self, weight: WeightTensor) -> Weights | None:
        """Weights that are computed from parameters are known to the model's own rounding: r + r'."""
        radii = [radius for box in (self.before, self.differences.weights) if (radius := box.radius.get(weight)) is not None]
        return Weights((torch.stack(radii).sum(0),), unchanged, torch.float64) if radii else None

    def _bent(self, layer: Layer) -> Interval:
        kind, source = layer.nonlinearity, layer.connections[0].source
        low, high = self.difference(layer)
        if isinstance(kind, Slopes):
            factor = gain(layer)
            sides = [self._scaled(relaxation.intervals[source], factor) for relaxation in (self.first, self.second)]
            right = (sides[0].low >= 0) & (sides[1].low >= 0)
            left = (sides[0].high <= 0) & (sides[1].high <= 0)
            return self._between(layer, right, left, kind.plus, kind.minus)
        if isinstance(kind, Clamp) and not any(isinstance(end, Bias) for end in (kind.low, kind.high)):
            never = torch.zeros_like(low, dtype=torch.bool)
            return self._between(layer, never, never, 1.0, 0.0)
        if isinstance(kind, Extremum) and not layer.biases:
            known = {connection.source: self.differences.intervals[connection.source] for connection in layer.connections}
            most = Extremum(largest=True, zero=kind.zero)
            rise = largest(layer, {name: interval.high for name, interval in known.items()}, (), most)
            fall = largest(layer, {name: -interval.low for name, interval in known.items()}, (), most)
            low, high = torch.maximum(low, -fall - self.slack(layer)), torch.minimum(high, rise + self.slack(layer))
        flat = torch.zeros_like(low)
        self.differences.lines[layer.name] = Lines(flat, low, flat, high)
        self.differences.slack[layer.name] = self.differences.roundoff.here(layer) * (low.abs() + high.abs())
        return Interval(low, high)

    def _scaled(self, interval: Interval, factor: float) -> Interval:
        spare = WIDEN * interval.size * factor + TINY
        return Interval(interval.low * factor - spare, interval.high * factor + spare)

    def _between(self, layer: Layer, right: Tensor, left: Tensor, plus: float, minus: float) -> Interval:
        """Plus·Δ on the right, minus·Δ on the left, and between both where that is not known."""
        change = self._scaled(self.differences.intervals[layer.connections[0].source], gain(layer))
        most, least = (change.low.new_tensor(slope) for slope in (max(plus, minus), min(plus, minus)))
        above = slope_lines(change, most, least)
        below = slope_lines(Interval(-change.high, -change.low), most, least)
        known, zero = right | left, torch.zeros_like(change.low)
        slope = torch.where(right, change.low.new_tensor(plus), change.low.new_tensor(minus))
        lower_slope, upper_slope = (torch.where(known, slope, line.upper_slope) for line in (below, above))
        lower, upper = torch.where(known, zero, -below.upper), torch.where(known, zero, above.upper)
        ends = torch.stack([
            torch.where(known, slope, factor) * end for factor in (most, least) for end in (change.low, change.high)
        ])
        low, high = self.difference(layer)
        low, high = torch.maximum(low, ends.amin(0)), torch.minimum(high, ends.amax(0))
        gap = (upper_slope - lower_slope) * change.middle + upper - lower
        flat = high - low < gap  # between two numbers that are closer than the chords
        lines = Lines(
            torch.where(flat, zero, lower_slope),
            torch.where(flat, low, lower),
            torch.where(flat, zero, upper_slope),
            torch.where(flat, high, upper),
        )
        roundoff = self.differences.roundoff
        rounding = roundoff.here(layer) * (lines.lower.abs() + lines.upper.abs() + change.size)
        slack = self.differences.for_all(self.slack(layer) + rounding + roundoff.underflow_of_bend(layer))
        self.differences.lines[layer.name], self.differences.slack[layer.name] = lines, slack
        return Interval(low - slack, high + slack)
