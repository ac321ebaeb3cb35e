"""Everything a network can compute over a box of weights and a ball of inputs: intervals, and linear bounds (mathematics §5).

Forwards go intervals: with c the middle of the box and r its radius, Σ θ'·u' lies in f(mid; c) ± (f(rad; |c|) + f(|u'|; r)).
Backwards goes a linear functional of a layer, with signs kept: an affine layer hands on its coefficients through c and
pays what the weights' radius can do, a nonlinearity is replaced by lines above and below it on its interval (as CROWN
does for inputs alone); a ReLU whose sign is known is passed exactly. A weight that a convolution uses at many positions
moves them all together, so what it can do is r·|Σ of its positions|, not the sum of magnitudes.

Rounding of the model's own forward pass, in its own types, and of the computation here is part of the radius: a sum of n
products computed in floating point is exact for weights that are off by a relative n·u, but for what underflows, which is
absolute (`pathlift.passes.rounding`). A sample whose values may leave the range of a type is lost: nothing is said of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pathlift.budget import Clock
from pathlift.edges.contraction import Dense
from pathlift.edges.weights import Weights
from pathlift.graph.interval import Interval
from pathlift.graph.layers import Clamp, Connection, Extremum, Layer, LearnedSlope, Slopes, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.box import Box
from pathlift.passes.forward import (
    along,
    antecedents,
    carried,
    clamped,
    ends,
    placed,
    unchanged,
    weighted,
)
from pathlift.passes.linear import Choice, Free, Lines, clamp_lines, slope_lines
from pathlift.passes.propagate import in_forward_order
from pathlift.passes.rounding import DOUBLE, SPARE, Arithmetic, fan_in

ELEMENTS = 1 << 23
"""Coefficients that are worked on at a time (64 MiB)."""

WIDEN = 2.0**-40
"""Relative widening of the intervals between which lines are drawn: room for the rounding of their slopes."""


class Enclosure:
    """Intervals of all layers over a box of weights and a ball of inputs, and linear bounds from them."""

    def __init__(
        self,
        network: Network,
        box: Box,
        feed: Mapping[str, Tensor],
        radius: float,
        arithmetic: Arithmetic | None,
        *,
        refine: bool,
        clock: Clock | None = None,
    ) -> None:
        """Compute the intervals of every layer.

        Args:
            network: The graph, not compact.
            box: The weights.
            feed: Input layer to x, float64, (samples, *shape).
            radius: Largest change of an input, in ℓ^∞.
            arithmetic: How the model's own forward pass rounds; None to enclose exact real arithmetic alone.
            refine: Narrow the intervals before nonlinearities of unknown sign by linear bounds of their own.
            clock: Intervals stay as wide as they are when its time is up.
        """
        self.network = network
        self.box = box
        self.feed = feed
        self.radius = radius
        self.arithmetic = arithmetic
        self.refine = refine
        self.clock = clock or Clock()
        self.batch = len(next(iter(feed.values())))
        self.lost = torch.zeros(self.batch, dtype=torch.bool, device=network.device)
        self.center: dict[WeightTensor, Tensor] = {}
        self.reach: dict[WeightTensor, Tensor | None] = {}
        self.largest: dict[WeightTensor, float] = {}
        for weight, low in box.lower.items():
            interval = Interval(low, box.upper[weight])
            reach = interval.radius * (1 + 4 * DOUBLE.unit) + interval.size * (2 * DOUBLE.unit)
            self.center[weight] = interval.middle
            self.reach[weight] = None if interval.exact else reach
            self.largest[weight] = float(interval.size.max())
        self.plain = weighted(self.center, dtype=torch.float64)
        self.sizes = weighted(self.center, dtype=torch.float64, transform=torch.abs)
        self.slack: dict[str, Tensor] = {}
        self.shared_slack: dict[str, Tensor] = {}
        self.lines: dict[str, Lines | Choice] = {}
        self.free: dict[str, Free] = {}
        self.intervals: dict[str, Interval] = {}
        self.place = {layer.name: place for place, layer in enumerate(network.layers)}
        self._readers = self._nonlinear_readers()
        in_forward_order(network, self._step)

    # ---- weights

    def _reaches(self, weight: WeightTensor) -> Weights | None:
        """The radius of a weight, None where it is 0."""
        reach = self.reach.get(weight)
        return None if reach is None else Weights((reach,), unchanged, torch.float64)

    def _own_unit(self, layer: Layer) -> float:
        """Relative error of this computation at one layer: sums forwards and backwards."""
        connections = fan_in(self.network)[layer.name] + math.prod(layer.shape) + SPARE
        return 8 * connections * DOUBLE.unit

    def _model_unit(self, layer: Layer) -> float:
        """Relative error of the model's own arithmetic at one affine layer."""
        if self.arithmetic is None or self.arithmetic.exact(layer):
            return 0.0
        roundings = (fan_in(self.network)[layer.name] + SPARE) * self.arithmetic.of(layer).unit
        return (roundings + 2 * self.arithmetic.factors(layer)) * 1.01

    def _bend_unit(self, layer: Layer) -> float:
        """Relative error of the model's own arithmetic at one nonlinearity."""
        return 0.0 if self.arithmetic is None else SPARE * self.arithmetic.of(layer).unit * 1.01

    def _underflow(self, layer: Layer, sizes: Mapping[str, Tensor]) -> Tensor | float:
        """What underflow can do to a sum, here and in the model: absolute, (samples, 1, …)."""
        formats = [DOUBLE]
        if self.arithmetic is not None and not self.arithmetic.exact(layer):
            formats.append(self.arithmetic.of(layer))
        total: Tensor | float = 0.0
        count = fan_in(self.network)[layer.name] + SPARE
        for connection in layer.connections:
            weight, top = self._largest(connection.weight), _per_sample(sizes[connection.source], layer)
            for own in formats:
                total = total + count * (own.least + own.flushed * (weight + top + own.flushed))
        return total + count * sum(own.least for own in formats)

    def _least(self, layer: Layer) -> float:
        """What underflow can do to a nonlinearity."""
        model = 0.0 if self.arithmetic is None else self.arithmetic.of(layer).least
        return (fan_in(self.network)[layer.name] + SPARE) * (DOUBLE.least + model)

    def _largest(self, weight: WeightTensor | None) -> float:
        """The largest magnitude of a weight."""
        if weight is None:
            return 1.0
        return abs(weight.scalar) if weight.scalar is not None else self.largest[weight]

    def _blur(self, layer: Layer, sizes: Mapping[str, Tensor]) -> Tensor | float:
        """What the model's own constants may be off by, where it computes them from positions."""
        if self.arithmetic is None or layer.blur == 0.0:
            return 0.0
        unit = self.arithmetic.inner(layer).unit * layer.blur
        return sum(
            (_per_sample(sizes[connection.source], layer) * unit for connection in layer.connections),
            torch.zeros((), dtype=torch.float64),
        )

    def _watch_range(self, layer: Layer, sizes: Mapping[str, Tensor], magnitude: Tensor) -> None:
        """Give up on samples of which something may leave the range of its type: a sum in any order, or what makes it up."""
        if self.arithmetic is None or self.arithmetic.exact(layer):
            return
        inner: Tensor | float = 0.0
        for connection in layer.connections:
            weight = connection.weight
            top = _per_sample(sizes[connection.source], layer).reshape(-1)
            if weight is None or weight.score_name is None:
                inner = inner + top * (fan_in(self.network)[layer.name] * max(1.0, self._largest(weight)))
            if weight is not None and weight in self.box.peaks:
                inner = inner + top * self.box.peaks[weight]
        for bias in layer.biases:
            inner = inner + self.box.peaks.get(bias.weight, 0.0)
        whole = magnitude.reshape(len(magnitude), -1).amax(1).expand(self.batch)
        fine = (whole * 1.01 < self.arithmetic.of(layer).largest) & (
            whole + inner * 1.01 < self.arithmetic.inner(layer).largest
        )
        self.lost |= ~fine

    # ---- forwards

    def _step(self, layer: Layer, _: Mapping[str, Interval]) -> Interval:
        if layer.kind == "input":
            x = self.feed[layer.name]
            reach = self.radius + 4 * DOUBLE.unit * (x.abs() + self.radius)
            found = Interval(x - reach, x + reach)
        elif layer.nonlinearity is None:
            found = self._affine(layer)
            if self.refine and layer.name in self._readers:
                found = self._narrowed(layer, found)
        else:
            found = self._bent(layer)
        limit = math.inf if self.arithmetic is None else self.arithmetic.of(layer).largest
        self.lost |= ~(found.size.reshape(len(found.low), -1).amax(1) < limit)  # NaN is lost, too
        self.intervals[layer.name] = found
        return found

    def _affine(self, layer: Layer) -> Interval:
        below = {connection.source: self.intervals[connection.source] for connection in layer.connections}
        middles = {name: own.middle for name, own in below.items()}
        radii = {name: own.radius for name, own in below.items()}
        sizes = {name: own.size for name, own in below.items()}
        middle = self._all(carried(layer, middles, self.plain, biases=self.plain))
        magnitude = carried(layer, sizes, self.sizes, biases=self.sizes) + self._cancelled(layer)
        moved, shared, moves = self._moved(layer, sizes, radii, middle)
        self._watch_range(layer, sizes, magnitude + moved)
        rounding = (self._model_unit(layer) + self._own_unit(layer)) * (magnitude + moved)
        rounding = rounding + (self._underflow(layer, sizes) + self._blur(layer, sizes))
        more = 1.0 + 4 * self._own_unit(layer)
        self.slack[layer.name] = self._all((moved + rounding) * more)
        self.shared_slack[layer.name] = self._all((shared + rounding) * more) if moves else self.slack[layer.name]
        reach = (carried(layer, radii, self.sizes) if layer.connections else 0.0) + self.slack[layer.name]
        return Interval(middle - reach * more, middle + reach * more)

    def _moved(
        self, layer: Layer, sizes: dict[str, Tensor], radii: dict[str, Tensor], like: Tensor
    ) -> tuple[Tensor, Tensor, bool]:
        """What the radius of the weights can do: in full; without what is accounted for jointly; whether that differs."""
        varying = [
            connection
            for connection in layer.connections
            if connection.weight is not None and self.reach.get(connection.weight) is not None
        ]
        if not varying and all(self.reach.get(bias.weight) is None for bias in layer.biases):
            zero = like.new_zeros(())
            return zero, zero, False
        joint = {id(connection) for connection in varying if self._reused(connection, layer)}
        if not layer.connections:
            return carried(layer, {}, self._reaches, biases=self._reaches), like.new_zeros(()), True
        full = carried(layer, sizes, self._reaches, biases=self._reaches, only_weighted=True)
        full_price = {connection.source for connection in varying if id(connection) not in joint}
        mixed = {
            connection.source: (sizes if connection.source in full_price else radii)[connection.source]
            for connection in layer.connections
        }
        return full, carried(layer, mixed, self._reaches, only_weighted=True), True

    @staticmethod
    def _reused(connection: Connection, layer: Layer) -> bool:
        """Whether one weight may stand on several edges."""
        return not (isinstance(connection.edges, Dense) and math.prod(layer.shape[:-1]) == 1)

    def _cancelled(self, layer: Layer) -> Tensor | float:
        """What cancelled in the shift t = β − μ·s of a batch norm: |β| + |μ·s| ≤ |t| + 2·|μ·s|."""
        total: Tensor | float = 0.0
        for bias in layer.biases:
            if bias.weight in self.box.cancelled:
                total = total + 2 * self.box.cancelled[bias.weight].reshape(bias.view)
        return total

    def _all(self, tensor: Tensor) -> Tensor:
        """Give a value that is the same for all samples one entry for each."""
        return tensor if len(tensor) == self.batch else tensor.expand(self.batch, *tensor.shape[1:])

    def _bent(self, layer: Layer) -> Interval:
        if isinstance(layer.nonlinearity, Extremum):
            return self._extremum(layer, layer.nonlinearity)
        source = self.intervals[layer.connections[0].source]
        gain = self._gain(layer)
        spare = WIDEN * source.size * gain + torch.finfo(torch.float64).tiny
        z = Interval(source.low * gain - spare, source.high * gain + spare)
        if isinstance(layer.nonlinearity, Clamp):
            return self._clamp(layer, z)
        plus, minus, vary = self._slopes(layer, z)
        lines = slope_lines(z, plus, minus)
        self.lines[layer.name] = lines
        crossing = (z.low < 0) & (z.high > 0) & (plus >= minus)
        if bool(crossing.any()):
            self.free[layer.name] = Free(crossing, minus.expand(crossing.shape), plus.expand(crossing.shape))
        exact = isinstance(layer.nonlinearity, Slopes) and {layer.nonlinearity.plus, layer.nonlinearity.minus} <= {
            0.0,
            1.0,
            -1.0,
        }
        steep = torch.maximum(plus.abs(), minus.abs()).clamp(min=1.0)
        rounding = 0.0 if exact and gain == 1.0 else self._bend_unit(layer) * z.size * steep
        error = self._own_unit(layer) * (lines.lower.abs() + lines.upper.abs() + z.size)
        self.slack[layer.name] = self.shared_slack[layer.name] = vary + rounding + error + self._least(layer)
        return self._between(layer, z, lambda at: plus * at.clamp(min=0.0) + minus * at.clamp(max=0.0))

    def _between(self, layer: Layer, z: Interval, function: Callable[[Tensor], Tensor]) -> Interval:
        """Return the range of a function that is monotone on both sides of 0 and has its extremes at 0 or the ends."""
        values = [function(z.low), function(z.high), function(torch.zeros_like(z.low).clamp(z.low, z.high))]
        low, high = torch.stack(values).amin(0), torch.stack(values).amax(0)
        slack = self.slack[layer.name]
        return Interval(low - slack, high + slack)

    def _gain(self, layer: Layer) -> float:
        weight = layer.connections[0].weight
        return 1.0 if weight is None else float(weight.scalar or 0.0)

    def _slopes(self, layer: Layer, z: Interval) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return both slopes, and what a slope that varies can add."""
        kind = layer.nonlinearity
        if isinstance(kind, Slopes):
            return z.low.new_tensor(kind.plus), z.low.new_tensor(kind.minus), 0.0
        assert isinstance(kind, LearnedSlope)
        connection = layer.connections[1]
        assert connection.weight is not None
        ones = torch.ones_like(z.low)
        minus = along(connection, ones, self.plain(connection.weight))
        reach = self._reaches(connection.weight)
        depth = (-z.low).clamp(min=0.0)
        rounding = self._bend_unit(layer) * minus.abs() * depth
        return z.low.new_ones(()), minus, rounding + (0.0 if reach is None else along(connection, depth, reach))

    def _clamp(self, layer: Layer, z: Interval) -> Interval:
        low, high = ends(layer, self.plain)
        zero = z.low.new_zeros(())
        vary = zero
        for end in ends(layer, self._reaches):
            vary = vary if end is None else torch.maximum(vary, end.to(z.low))
        lines = clamp_lines(z, low, high)
        self.lines[layer.name] = lines
        rounded = zero
        for end in (low, high):
            rounded = rounded if end is None else torch.maximum(rounded, end.abs().to(z.low))
        error = self._own_unit(layer) * (lines.lower.abs() + lines.upper.abs() + z.size) + self._bend_unit(layer) * rounded
        self.slack[layer.name] = self.shared_slack[layer.name] = vary + error + self._least(layer)
        slack = self.slack[layer.name]
        return Interval(clamped(z.low, low, high) - slack, clamped(z.high, low, high) + slack)

    def _extremum(self, layer: Layer, kind: Extremum) -> Interval:
        turned = {True: ("low", "high"), False: ("high", "low")}[kind.largest]

        def side(which: str, sign: float) -> Tensor:
            below = {connection.source: getattr(self.intervals[connection.source], which) for connection in layer.connections}
            biases = []
            for bias in layer.biases:
                own, reach = self.plain(bias.weight), self._reaches(bias.weight)
                assert own is not None
                middle = placed(bias, own)
                biases.append(middle if reach is None else middle + sign * placed(bias, reach))
            return self._all(antecedents(layer, below, biases, kind))

        signs = {"low": -1.0, "high": 1.0}
        least, most = side(turned[0], signs[turned[0]]), side(turned[1], signs[turned[1]])
        bottom, chosen = least.max(1)
        own_top = most.gather(1, chosen.unsqueeze(1)).squeeze(1)
        rest = most.scatter(1, chosen.unsqueeze(1), -math.inf).amax(1)
        open_ = rest > bottom
        width = (own_top - bottom).clamp(min=torch.finfo(torch.float64).tiny)
        slope = torch.where(open_, ((own_top - rest).clamp(min=0.0) / width).clamp(max=1.0), 1.0)
        upper = torch.where(open_, torch.maximum(rest - slope * bottom, own_top - slope * own_top), 0.0)
        upper = upper + torch.where(open_, WIDEN * (rest.abs() + own_top.abs() + bottom.abs()), 0.0)
        self.lines[layer.name] = Choice(chosen, slope, upper)
        self.slack[layer.name] = self.shared_slack[layer.name] = self._own_unit(layer) * upper.abs() + self._least(layer)
        top, least = torch.maximum(own_top, rest) + self._least(layer), bottom - self._least(layer)
        return Interval(least, top) if kind.largest else Interval(-top, -least)

    # ---- narrower intervals

    def _nonlinear_readers(self) -> dict[str, list[Layer]]:
        found: dict[str, list[Layer]] = {}
        for layer in self.network.layers:
            if layer.nonlinearity is not None:
                for connection in layer.connections:
                    found.setdefault(connection.source, []).append(layer)
        return found

    def _wanted(self, layer: Layer, found: Interval) -> Tensor:
        """Tell for which neurons a narrower interval helps: those at a kink of what reads them."""
        wanted = torch.zeros_like(found.low, dtype=torch.bool)
        for reader in self._readers[layer.name]:
            kind = reader.nonlinearity
            if isinstance(kind, Clamp):
                for end in ends(reader, self.plain):
                    if end is not None:
                        wanted |= (found.low < end.to(found.low)) & (found.high > end.to(found.low))
            elif isinstance(kind, Extremum):
                if len(reader.connections) == 1:
                    wanted |= _undecided(reader, found, kind)
            else:
                wanted |= (found.low < 0) & (found.high > 0)
        return wanted

    def _narrowed(self, layer: Layer, found: Interval) -> Interval:
        self.intervals[layer.name] = found
        flat = self._wanted(layer, found).flatten(1)
        most = int(flat.sum(1).max())
        if most == 0:
            return found
        order = torch.argsort(flat.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]
        low, high = found.low.flatten(1).clone(), found.high.flatten(1).clone()
        samples = max(1, ELEMENTS // (2 * self._widest(layer)))
        rows = max(1, samples // self.batch)
        for first in range(0, most, rows):
            if self.clock.over():
                break
            places = order[:, first : first + rows]
            unit = torch.zeros((self.batch, places.shape[1], flat.shape[1]), dtype=torch.float64, device=low.device)
            unit.scatter_(2, places.unsqueeze(2), 1.0)
            unit = unit.unflatten(2, layer.shape)
            ends_ = self.lower({layer.name: torch.cat([unit, -unit], 1)}, joint=True).split(places.shape[1], 1)
            low.scatter_(1, places, torch.maximum(low.gather(1, places), ends_[0]))
            high.scatter_(1, places, torch.minimum(high.gather(1, places), -ends_[1]))
        return Interval(low.reshape(found.low.shape), torch.maximum(low, high).reshape(found.high.shape))

    def _widest(self, layer: Layer) -> int:
        return max(math.prod(below.shape) for below in self.network.layers[: self.place[layer.name] + 1])

    # ---- backwards

    def tightened(self, functionals: Mapping[str, Tensor], *, steps: int) -> Tensor:
        """Bound linear functionals from below as `lower` does, and raise what is not positive by ascent over the free slopes.

        Every iterate is a sound bound; the best is kept. The ascent ends when its clock is over.

        Args:
            functionals: Layer name to coefficients, (samples, functionals, *shape).
            steps: Steps of gradient ascent.

        Returns:
            Shape (samples, functionals).
        """
        best = self.lower(functionals, joint=True)
        if not self.free or bool((best > 0).all()):
            return best
        rows = next(iter(functionals.values())).shape[1]
        tilts = {}
        for name, free in self.free.items():
            lines = self.lines[name]
            assert isinstance(lines, Lines)
            start = ((lines.lower_slope - free.least) / (free.most - free.least).clamp(min=1e-300)).clamp(0.0, 1.0)
            tilts[name] = start.unsqueeze(1).repeat(1, rows, *[1] * (start.dim() - 1))
        with torch.enable_grad():
            weights = {name: tilt.requires_grad_() for name, tilt in tilts.items()}
            ascent = torch.optim.Adam(weights.values(), lr=0.25, maximize=True)
            for _ in range(steps):
                if self.clock.over():
                    return best
                ascent.zero_grad()
                found = self.lower(functionals, joint=True, tilts=weights)
                best = torch.maximum(best, found.detach())
                found.sum().backward()
                ascent.step()
                with torch.no_grad():
                    for tilt in weights.values():
                        tilt.clamp_(0.0, 1.0)
        return torch.maximum(best, self.lower(functionals, joint=True, tilts={n: tilt.detach() for n, tilt in weights.items()}))

    def lower(
        self, functionals: Mapping[str, Tensor], *, joint: bool = False, tilts: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Bound linear functionals of layers from below.

        Args:
            functionals: Layer name to coefficients, (samples, functionals, *shape).
            joint: Let a weight that is used many times move once; costs one gradient of the weights per functional.
            tilts: Where the free slopes lie between their ends, in [0, 1], (samples, functionals, *shape), by layer.

        Returns:
            Shape (samples, functionals).
        """
        coefficients = dict(functionals)
        first = next(iter(coefficients.values()))
        bound = first.new_zeros(first.shape[:2])
        last = max(self.place[name] for name in coefficients)
        for layer in reversed(self.network.layers[: last + 1]):
            a = coefficients.pop(layer.name, None)
            if a is None:
                continue
            if layer.kind == "input":
                bound = bound + self._dot(a, self.feed[layer.name])
                own = self.intervals[layer.name]
                bound = bound - self._dot(a.abs(), own.radius * (1 + self._own_unit(layer)) + self._own_unit(layer) * own.size)
                continue
            if layer.nonlinearity is None:
                bound = bound + self._through_affine(layer, a, coefficients, joint=joint)
            else:
                bound = bound + self._through_bend(layer, a, coefficients, (tilts or {}).get(layer.name))
        return bound

    @staticmethod
    def _dot(a: Tensor, values: Tensor) -> Tensor:
        values = values.expand(len(a), *values.shape[1:]).reshape(len(a), -1)
        return torch.einsum("brn,bn->br", a.reshape(*a.shape[:2], -1), values)

    def _hand_down(self, connection: Connection, shape: tuple[int, ...], a: Tensor, coefficients: dict[str, Tensor]) -> None:
        """Add a·w to the coefficients of the layer below."""
        weights = None if connection.weight is None else self.plain(connection.weight)
        below = self.network.layer[connection.source]
        blank = torch.zeros(below.shape, dtype=torch.float64, device=a.device)
        _, back = _transposed(lambda x: connection.edges.sum(x, weights).expand(shape), blank)
        _add(coefficients, connection.source, back(a.flatten(0, 1)).unflatten(0, a.shape[:2]))

    def _through_affine(self, layer: Layer, a: Tensor, coefficients: dict[str, Tensor], *, joint: bool) -> Tensor:
        slack = self.shared_slack if joint else self.slack
        bound = -self._dot(a.abs(), slack[layer.name])
        for bias in layer.biases:
            weights = self.plain(bias.weight)
            assert weights is not None
            spread = placed(bias, weights).expand(1, *layer.shape)
            bound = bound + self._dot(a, spread)
            reach = self._reaches(bias.weight)
            if joint and reach is not None:
                bound = bound - self._joint_bias(a, placed(bias, reach), layer.shape)
        offset = 0
        for place, connection in enumerate(layer.connections):
            piece, shape = a, layer.shape
            if layer.concat is not None:
                shape = layer.concat.shape(place, layer.shape)
                piece = a.narrow(2 + layer.concat.dim, offset, layer.concat.sizes[place])
                offset += layer.concat.sizes[place]
            self._hand_down(connection, shape, piece, coefficients)
            if (
                joint
                and connection.weight is not None
                and self.reach.get(connection.weight) is not None
                and self._reused(connection, layer)
            ):
                bound = bound - self._joint_weight(connection, shape, piece)
        return bound

    @staticmethod
    def _joint_bias(a: Tensor, reach: Tensor, shape: tuple[int, ...]) -> Tensor:
        """R·|Σ of the positions that a bias stands at|."""
        target = (1,) * (len(shape) - reach.dim()) + tuple(reach.shape)
        sums = a.sum_to_size(*a.shape[:2], *target)
        return (sums.abs() * reach.reshape(target)).flatten(2).sum(2)

    def _joint_weight(self, connection: Connection, shape: tuple[int, ...], a: Tensor) -> Tensor:
        """Σ_k r_k·|Σ over the edges of weight k of middle(u)·a(v)|."""
        weight = connection.weight
        assert weight is not None
        center, reach = self.center[weight], self.reach[weight]
        assert reach is not None
        middle = self.intervals[connection.source].middle

        def one(x: Tensor, g: Tensor) -> Tensor:
            _, back = _transposed(
                lambda w: connection.edges.sum(x, Weights((w,), unchanged, torch.float64)).expand(shape), center
            )
            return (back(g).abs() * reach).flatten(1).sum(1)

        step = max(1, ELEMENTS // max(1, a.shape[1] * center.numel()))
        more = 1 + 8 * DOUBLE.unit * (center.numel() + math.prod(shape))
        return more * torch.cat([torch.vmap(one)(x, g) for x, g in zip(middle.split(step), a.split(step), strict=True)])

    def _through_bend(self, layer: Layer, a: Tensor, coefficients: dict[str, Tensor], tilt: Tensor | None) -> Tensor:
        lines = self.lines[layer.name]
        if isinstance(lines, Choice):
            return self._through_extremum(layer, lines, a, coefficients)
        positive, negative = a.clamp(min=0.0), a.clamp(max=0.0)
        bound = self._dot(positive, lines.lower) + self._dot(negative, lines.upper)
        bound = bound - self._dot(a.abs(), self._all(self.slack[layer.name]))
        below = lines.lower_slope.unsqueeze(1)
        if tilt is not None:
            free = self.free[layer.name]
            least, most = free.least.unsqueeze(1), free.most.unsqueeze(1)
            below = torch.where(free.where.unsqueeze(1), least + tilt * (most - least), below)
        z = positive * below + negative * lines.upper_slope.unsqueeze(1)
        self._hand_down(layer.connections[0], layer.shape, z, coefficients)
        return bound

    def _through_extremum(self, layer: Layer, lines: Choice, a: Tensor, coefficients: dict[str, Tensor]) -> Tensor:
        kind = layer.nonlinearity
        assert isinstance(kind, Extremum)
        sign = 1.0 if kind.largest else -1.0
        a = sign * a
        positive, negative = a.clamp(min=0.0), a.clamp(max=0.0)
        bound = self._dot(negative, lines.upper) - self._dot(a.abs(), self.slack[layer.name])
        z = positive + negative * lines.slope.unsqueeze(1)
        place = 0
        for connection in layer.connections:
            below = self.network.layer[connection.source]
            blank = torch.zeros(below.shape, dtype=torch.float64, device=a.device)
            out, back = _transposed(connection.edges.antecedents, blank)
            count = len(out)
            mine = [(lines.chosen == place + number).unsqueeze(1) for number in range(count)]
            laid = torch.stack([(z * own).sum_to_size(*a.shape[:2], *out.shape[1:]) for own in mine], 2)
            _add(coefficients, connection.source, sign * back(laid.flatten(0, 1)).unflatten(0, a.shape[:2]))
            place += count
        for bias in layer.biases:
            weights, reach = self.plain(bias.weight), self._reaches(bias.weight)
            assert weights is not None
            own = z * (lines.chosen == place).unsqueeze(1)
            bound = bound + self._dot(own, sign * placed(bias, weights).expand(1, *layer.shape))
            if reach is not None:
                bound = bound - self._dot(own.abs(), placed(bias, reach).expand(1, *layer.shape))
            place += 1
        return bound


def _per_sample(sizes: Tensor, layer: Layer) -> Tensor:
    """Return the largest entry of each sample as it broadcasts over a layer above, (samples, 1, …)."""
    return sizes.reshape(len(sizes), -1).amax(1).reshape(-1, *[1] * len(layer.shape))


def _undecided(reader: Layer, found: Interval, kind: Extremum) -> Tensor:
    """Tell which neurons may be the extremum of a window without surely being it."""
    connection = reader.connections[0]
    least, most = (found.low, found.high) if kind.largest else (-found.high, -found.low)
    tops = torch.vmap(connection.edges.antecedents)(most)
    bottom = torch.vmap(connection.edges.antecedents)(least).amax(1, keepdim=True)
    candidates = (tops >= bottom).to(torch.float64)
    several = candidates.sum(1, keepdim=True) > 1
    _, back = _transposed(connection.edges.antecedents, torch.zeros_like(found.low[0]))
    return back(candidates * several) > 0


def _transposed(function: Callable[[Tensor], Tensor], blank: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return a linear function's value at ``blank``, and its transpose as a function of rows (rows, *shape of the result)."""
    out, pull, *_ = torch.func.vjp(function, blank)
    return out, torch.vmap(lambda row: pull(row)[0])


def _add(coefficients: dict[str, Tensor], name: str, found: Tensor) -> None:
    coefficients[name] = coefficients[name] + found if name in coefficients else found


__all__ = ["ELEMENTS", "Enclosure", "Interval"]
