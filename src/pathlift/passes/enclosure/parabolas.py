"""Parabolas above kinks for one functional, and the ascent over their shapes; see `together` for why that is a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathlift.budget import Clock
from pathlift.graph.layers import Layer, Slopes
from pathlift.passes.enclosure.eigenvalues import largest, scaling_of, square
from pathlift.passes.enclosure.kinks import Kinks, has_parabolas, last_kinks, paid_by_chords
from pathlift.passes.enclosure.lines import Lines, kink_gap
from pathlift.passes.enclosure.nonlinear import TINY
from pathlift.passes.enclosure.relaxation import UP, Bend, Form, Relaxation, Symbols
from pathlift.passes.enclosure.rests import NEURONS, rest_of
from pathlift.passes.enclosure.substitution import handed_down, lower_slope
from pathlift.passes.enclosure.tightening import RATE as TURN
from pathlift.passes.enclosure.tightening import first_tilt, stepped
from pathlift.passes.rounding import DOUBLE

RATE = 0.2
"""Of that ascent, over logarithms and logits."""

SLOWER = 0.3
"""What the rates are multiplied by where an ascent goes on from the end of another, which is near the best already."""

LAST_TURN = 0.05
"""Of the slopes below the last kinks."""

EDGE = 0.12
"""How far from their ends these begin, which lie between 0 and 1."""

PUSH = 0.2
"""Rate of an ascent over multiples of `Parabolas.units`."""

SETTLED = 10, 0.01
"""A patient ascent ends when this many steps bring less than this part of what is missing."""

EVERY = 5
"""Steps after which the scaling S is renewed."""

MEMORY = 0.8
"""What is kept, step by step, of the directions of the largest eigenvalues, of which several take turns."""

PACE = 3.0
"""What the rest of the ascent may bring, relative to the second half of the steps so far, by experience."""

LEAST = 1e-6
"""The smallest t to start with: what the symbols leave over is to count against the squares, but may be nothing."""

CHORDS = -3.0, 0.0
"""The logit of the chord's part to start with, at the last kinks and at those below."""

FLOOR = 1e-3
"""The smallest S in an ascent, relative to the mean: a symbol that counts for nothing yet may do so in the next step."""

FAINT = 1e-12
"""Squares with a smaller part of the largest weight than this are left out of the ascent, and not of the bound."""


@dataclass(frozen=True)
class Shapes:
    """Where an ascent stands, or where it ended, for another one to go on from.

    Attributes:
        curve: log κ of the parabolas, by layer, (1, *shape); 0 where there is none.
        share: The logit of w, likewise.
        level: S₀, as the logarithm of its ratio to Σ|b|/2.
        spare: log t.
        tilts: Where the free slopes of the lines below lie, by layer, (1, 1, *shape).
        shares: Multiples of the units.
        scaling: S.
    """

    curve: Mapping[str, Tensor]
    share: Mapping[str, Tensor]
    level: Tensor
    spare: Tensor
    tilts: Mapping[str, Tensor]
    shares: Mapping[str, Tensor]
    scaling: Tensor

    def copied(self) -> Shapes:
        """Return the same, apart from any ascent."""

        def own(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: part.detach().clone() for name, part in parts.items()}

        ends = self.level.detach().clone(), self.spare.detach().clone()
        return Shapes(own(self.curve), own(self.share), *ends, own(self.tilts), own(self.shares), self.scaling)


@dataclass(frozen=True)
class _Pieces:
    """A bound, functional ≥ constant + Σ factors·ε − Σ q·(z − c)², with what it was made of.

    Attributes:
        bends: What stands above the kinks, by layer.
        arrived: The coefficients of these layers, (1, *shape).
        q: Weights of the squares, one for each row of `Parabolas.rows`.
        factors: (symbols,).
        constant: All the rest.
        level: S₀.
        spare: t.
        added: What the units add, times what it is multiplied by, at most.
    """

    bends: Mapping[str, Bend]
    arrived: Mapping[str, Tensor]
    q: Tensor
    factors: Tensor
    constant: Tensor
    level: Tensor
    spare: Tensor
    added: float


class Parabolas:
    """Parabolas above kinks for one functional, and the ascent over them.

    With y = plus·z⁺ + minus·z⁻ = mid·z + half·|z|, a part w of the chord and a part 1 − w of the parabola give

        y ≤ (w·chord + (1 − w)·(mid + 2·half·κ·c))·z + w·height + (1 − w)·half·(1/(4κ) − κ·c²) + (1 − w)·half·κ·(z − c)².
    """

    def __init__(
        self,
        relaxation: Relaxation,
        kept: Symbols,
        functional: Mapping[str, Tensor],
        constant: float,
        units: Mapping[str, Tensor] | None = None,
        start: Shapes | None = None,
    ) -> None:
        """Find the kinks that may have parabolas, from the last ones down, `NEURONS` at most, all of the same symbols.

        Args:
            relaxation: What is known of one sample.
            kept: The symbols, with the forms of all layers before the last kinks.
            functional: Layer name to coefficients, (1, 1, *shape), handed down to the last kinks.
            constant: Added to it.
            units: By layer, a functional that is known not to be positive, (1, *shape): any share of each of its entries may
                be added, see `splitting`. None for none.
            start: Where an ascent will go on from. With fewer kinks there may be room for a layer more: without shapes there,
                it is left out. None for a new ascent.
        """
        self.relaxation, self.symbols, self.functional, self.constant = relaxation, kept, functional, constant
        self.units = units or {}
        self.end: Shapes | None = None
        top = last_kinks(relaxation)
        assert top is not None
        self.top = top
        self.form = kept.known[top.connections[0].source]
        self.paid = float(paid_by_chords(relaxation, top, functional)[0, 0])
        self.kinks: dict[str, Kinks] = {}
        room = NEURONS
        for layer in reversed(relaxation.network.layers):
            if start is not None and layer.name not in start.curve:
                continue
            if layer is top or (layer.name in kept.known and has_parabolas(relaxation, layer)):
                if not kept.known[layer.connections[0].source].blocks.keys() <= self.form.blocks.keys():
                    continue  # below a nonlinearity at which forms start anew there are other symbols
                kinks = self._kinks(layer)
                room -= len(kinks.places)
                if room < 0:
                    break
                if len(kinks.places):
                    self.kinks[layer.name] = kinks
        generators = [self._generators(kinks) for kinks in self.kinks.values()]
        self.rows = torch.cat([self.form.centre.new_zeros(0, len(self.form.generators)), *generators])
        self.left = self.rows.new_zeros(len(self.rows))
        self._last: tuple[Tensor, Tensor] | None = None

    def _kinks(self, layer: Layer) -> Kinks:
        source, kind = layer.connections[0].source, layer.nonlinearity
        assert isinstance(kind, Slopes)
        form, inside = self.symbols.known[source], self.relaxation.free[layer.name].where
        if layer is self.top:  # nothing but the functional arrives there
            inside = inside & (self.functional[layer.name][:, 0] < 0)
        return Kinks(source, kind.minus, (kind.plus - kind.minus) / 2, inside, inside.flatten().nonzero()[:, 0], form.centre)

    def _generators(self, kinks: Kinks) -> Tensor:
        """Return the generators of what kinks read, one row each, with the symbols of the last form: (kinks, symbols)."""
        own, count = self.symbols.known[kinks.source], len(kinks.places)
        blocks = [
            own.blocks[name].flatten(1)[:, kinks.places] if name in own.blocks else block.new_zeros(len(block), count)
            for name, block in self.form.blocks.items()
        ]
        return torch.cat([own.centre.new_zeros(0, count), *blocks]).T.contiguous()

    def raised(self, clock: Clock, *, steps: int, start: Shapes | None = None, patient: bool = False) -> float:
        """Ascend until the bound is positive, or the steps or the time are up; ``end`` is where the best was found.

        Args:
            clock: The ascent ends when its time is up.
            steps: Number of steps.
            start: Where an ascent for the same functional ended, with fewer kinks known; None to begin anew.
            patient: Go on whatever the pace, until nothing changes any more.

        Returns:
            A lower bound of the functional and the constant; −inf where parabolas are of no use, or squares leave the range
            of float64.
        """
        if self.top.name not in self.kinks or self.rows.shape[1] == 0 or not 0 < self.paid < math.inf:
            return -math.inf
        parts = dict[str, Tensor]()
        shapes = self._first(parts) if start is None else self._gone_on(start, parts)
        if shapes is None:
            return -math.inf
        with torch.enable_grad():
            ascent = self._ascent(shapes, 1.0 if start is None else SLOWER)
            among, best, values = None, -math.inf, list[float]()
            for step in range(1, steps + 1):
                if step % EVERY == 0:
                    parts = {}
                pieces = self._pieces(shapes, parts)
                worst = self._worst(pieces, shapes.scaling)
                if worst is None:
                    return best
                bound, directions, rows = worst
                values.append(float(bound.detach()))
                if self.end is None or values[-1] >= max(values):
                    self.end = shapes.copied()
                last = step == steps or clock.over() or (_settled(values) if patient else _too_slow(values))
                if values[-1] > 0 or last:
                    best = max(best, self._bound(self.end))
                    if best > 0 or last:
                        return best
                stepped(ascent, bound / self.paid, shapes.tilts, shapes.shares)
                among = directions if among is None else MEMORY * among + (1 - MEMORY) * directions
                if step % EVERY == 0 or (start is not None and step < EVERY):  # with a kink less S is soon another
                    shapes = replace(shapes, scaling=(shapes.scaling * scaling_of(rows, among, FLOOR)).sqrt())
        return best

    def costs(self) -> dict[str, Tensor]:
        """Tell what each kink costs at the end of the ascent, roughly, as z may be on either side of it.

        A neuron that moves by s about c pays half·(κ·z² + 1/(4κ)) for half·|z|, and κ settles at 1/(2s).

        Returns:
            By layer, (1, *shape).
        """
        assert self.end is not None
        pieces, costs = self._pieces(self.end), {}
        for name, free in self.relaxation.free.items():
            a, lines = pieces.arrived.get(name), self.relaxation.lines[name]
            if a is None:
                continue
            assert isinstance(lines, Lines)
            z = self.relaxation.intervals[self.relaxation.network.layer[name].connections[0].source]
            slope = lower_slope(self.relaxation, name, self.end.tilts.get(name))[:, 0]
            gap = torch.where(a > 0, kink_gap(z.low, z.high, slope, free.least, free.most), lines.upper)
            if name in self.kinks:
                kinks, moved = self.kinks[name], 0.5 / self.end.curve[name].exp()
                bent = kinks.half * torch.maximum(moved - kinks.centre.abs(), moved / 8)
                gap = torch.where(kinks.inside & (a < 0), torch.minimum(gap, bent), gap)
            costs[name] = torch.where(free.where, a.abs() * gap, 0.0)
        return costs

    def _ascent(self, shapes: Shapes, rate: float) -> torch.optim.Optimizer:
        own = [*shapes.curve.values(), *shapes.share.values(), shapes.level, shapes.spare]
        groups = [{"params": [part.requires_grad_() for part in own], "lr": rate * RATE}]
        for name, tilt in shapes.tilts.items():
            groups.append({"params": [tilt.requires_grad_()], "lr": rate * (LAST_TURN if name == self.top.name else TURN)})
        groups += [{"params": [share.requires_grad_()], "lr": PUSH} for share in shapes.shares.values()]
        return torch.optim.Adam(groups, maximize=True)

    def _first(self, parts: dict[str, Tensor]) -> Shapes | None:
        """Return shapes to begin with, parabolas all of one form relative to how far the neuron moves; None for no number."""
        spread = self.rows.abs().amax(1).clamp(min=TINY)
        spread = spread * (self.rows / spread[:, None]).pow(2).sum(1).sqrt().clamp(min=1.0)
        rests = [self.symbols.known[kinks.source].rest.flatten()[kinks.places] for kinks in self.kinks.values()]
        spread = torch.maximum(spread, torch.cat(rests))
        curve = self._placed((1 / (12 * spread)).log())
        share = {name: torch.full_like(part, CHORDS[name != self.top.name]) for name, part in curve.items()}
        tilts = {name: first_tilt(self.relaxation, name, 1) for name in self.relaxation.free if name in self.symbols.known}
        tilts[self.top.name] = torch.where(self.form.centre > 0, 1 - EDGE, EDGE).unsqueeze(1)
        shares = {name: torch.zeros_like(unit) for name, unit in self.units.items()}
        zero = spread.new_zeros(())
        shapes = Shapes(curve, share, zero, zero, tilts, shares, torch.ones_like(self.rows[0]))
        pieces = self._pieces(shapes, parts)
        scaling = scaling_of(pieces.q.sqrt()[:, None] * self.rows)
        squares = square(self.rows, pieces.q, scaling)
        bent = sum(float((part * 0.25 / curve[name].exp() ** 2).sum()) for name, part in self._placed(pieces.q).items())
        if not 0 < squares < math.inf or not 0 < bent < math.inf:
            return None
        factor = math.sqrt(bent / squares)  # of κ, so that what parabolas pay in their middle is what their squares pay
        curve = {name: torch.where(self.kinks[name].inside, part + math.log(factor), 0.0) for name, part in curve.items()}
        shapes = replace(shapes, curve=curve, scaling=scaling)
        pieces = self._pieces(shapes, parts)
        left = self._left_over(pieces)
        spare = scaling.new_tensor(max(LEAST, math.sqrt(left / max(DOUBLE.least, squares * factor)))).log()
        shapes = replace(shapes, level=zero.clone(), spare=spare)
        worst = self._worst(self._pieces(shapes, parts), scaling)
        if worst is None or not math.isfinite(left) or not math.isfinite(float(spare)):
            return None
        return replace(shapes, scaling=scaling_of(worst[2], floor=FLOOR))  # with the row of the factors

    def _gone_on(self, start: Shapes, parts: dict[str, Tensor]) -> Shapes | None:
        shares = {name: start.shares.get(name, torch.zeros_like(unit)) for name, unit in self.units.items()}
        shapes = replace(start, shares=shares).copied()
        return shapes if math.isfinite(self._left_over(self._pieces(shapes, parts))) else None

    def _placed(self, values: Tensor) -> dict[str, Tensor]:
        """Put a number for each row where its kink is, by layer, (1, *shape); 0 elsewhere."""
        pieces = values.split([len(kinks.places) for kinks in self.kinks.values()])
        return {
            name: torch.zeros_like(kinks.centre).flatten().index_put((kinks.places,), piece).reshape(kinks.centre.shape)
            for (name, kinks), piece in zip(self.kinks.items(), pieces, strict=True)
        }

    def _left_over(self, pieces: _Pieces) -> float:
        """Share out what the symbols leave over among the neurons, by a rule of three, that of the last kinks.

        Returns:
            Σ q·e², at most.
        """
        last, known, factor = self.kinks[self.top.name].source, self.symbols.known, 1.0
        weights = pieces.arrived[self.top.name].abs() * pieces.bends[self.top.name].curve
        alone = float((weights * known[last].rest ** 2).sum())
        if alone > 0:
            factor = rest_of(self.relaxation, known, last, weights[0]) ** 2 / alone
        rests = [known[kinks.source].rest.flatten()[kinks.places] for kinks in self.kinks.values()]
        self.left = torch.cat(rests) ** 2 * factor
        return float((self.left * pieces.q).sum())

    def _bends(self, shapes: Shapes) -> dict[str, Bend]:
        return {name: kinks.bend(shapes.curve[name], shapes.share[name]) for name, kinks in self.kinks.items()}

    def _pieces(self, shapes: Shapes, parts: dict[str, Tensor] | None = None) -> _Pieces:
        """Go down to the inputs with given shapes.

        Args:
            shapes: Of parabolas and lines.
            parts: See `Symbols`: filled where it is empty, and otherwise the bound is a guess.

        Returns:
            A linear function of the symbols less squares.
        """
        bends, functional, added = self._bends(shapes), dict(self.functional), 0.0
        for name, share in shapes.shares.items():
            more = share * self.units[name]
            added += float((more.detach().abs() * self.relaxation.intervals[name].size).sum())
            functional[name] = functional[name] + more.unsqueeze(1) if name in functional else more.unsqueeze(1)
        kept = replace(self.symbols, bends=bends, factors={}, arrived={}, parts={} if parts is None else parts)
        gathered, _ = handed_down(self.relaxation, functional, None, shapes.tilts, kept)
        arrived = {name: a[:, 0] for name, a in kept.arrived.items()}
        arrived |= {name: torch.zeros_like(bend.curve) for name, bend in bends.items() if name not in arrived}
        weights = {name: arrived[name].clamp(max=0.0).abs() * bend.curve for name, bend in bends.items()}
        q = torch.cat([weights[name].flatten()[kinks.places] for name, kinks in self.kinks.items()])
        factors, others = _factors(self.form, kept)
        level = (float(factors.detach().abs().sum()) / 2 + DOUBLE.least) * shapes.level.exp()
        constant = self.constant + gathered[0, 0] - others * UP
        return _Pieces(bends, arrived, q, factors, constant, level, shapes.spare.exp(), added)

    def _worst(self, pieces: _Pieces, scaling: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the bound without rounding; None where squares leave the range of float64.

        Args:
            pieces: What it is made of.
            scaling: S.

        Returns:
            The bound, the mean of v·vᵀ over the eigenvectors that count, and the rows whose squares it is about.
        """
        q, level, spare = pieces.q, pieces.level, pieces.spare
        clear = q > FAINT * q.detach().max()
        root, last = (
            torch.where(clear, ((1 + spare) * torch.where(clear, q, 1.0)).sqrt(), 0.0),
            pieces.factors / (2 * level.sqrt()),
        )
        side = root * ((self.rows / scaling) @ last)
        whole = torch.cat([root[:, None] * self._gram(scaling) * root, side[:, None]], 1)
        matrix = torch.cat([whole, torch.cat([side, ((last / scaling) @ last)[None]])[None]])
        if not bool(matrix.isfinite().all()):
            return None
        most, directions = largest(matrix)
        bound = pieces.constant - (1 + 1 / spare) * (self.left * q).sum() - level - most * scaling.sum()
        return bound, directions, torch.cat([root[:, None] * self.rows, last[None]]).detach()

    def _gram(self, scaling: Tensor) -> Tensor:
        """Return G·S⁻¹·Gᵀ, (rows, rows)."""
        if self._last is None or self._last[0] is not scaling:
            self._last = scaling, (self.rows / scaling) @ self.rows.T
        return self._last[1]

    @torch.no_grad()
    def _bound(self, shapes: Shapes) -> float:
        """Return the bound that given shapes lead to, rounding included.

        With e what the symbols leave over and any t > 0, ‖Q^½·(G·ε + e)‖² ≤ (1 + t)·‖Q^½·G·ε‖² + (1 + 1/t)·‖Q^½·e‖².
        """
        pieces = self._pieces(shapes)
        level, spare = float(pieces.level), float(pieces.spare)
        weights = zip(self.kinks.values(), self._placed(pieces.q).values(), strict=True)
        rests = [rest_of(self.relaxation, self.symbols.known, kinks.source, part[0]) for kinks, part in weights]
        left = sum(rest**2 for rest in rests) * (1 + 1 / spare) * UP
        rows = torch.cat([self.rows, (pieces.factors / (2 * math.sqrt(level)))[None]])
        squares = square(rows, torch.cat([pieces.q * (1 + spare), pieces.q.new_ones(1)]), shapes.scaling)
        # Slopes and constants of lines are rounded, each by a few units of what they are added up from.
        summed = abs(self.constant) + level + squares + left + pieces.added
        for name, kinks in self.kinks.items():
            bend, lines, c = pieces.bends[name], self.relaxation.lines[name], kinks.centre
            assert isinstance(lines, Lines)
            steep = lines.upper_slope.abs() + abs(kinks.least + kinks.half) + 2 * bend.curve * c.abs()
            heights = lines.upper.abs() + bend.height.abs() + 2 * bend.curve * c * c
            reach = self.relaxation.intervals[kinks.source].size
            summed += float((pieces.arrived[name].abs() * (steep * reach + heights)).sum())
        return float(pieces.constant) - level - squares - left - self.relaxation.roundoff.here(self.top) * summed


def _too_slow(values: list[float]) -> bool:
    """Whether nothing gets above 0 if what is left brings no more than `PACE` times what the last half of the steps did."""
    best = max(values)
    return len(values) > 2 * EVERY and best + PACE * (best - values[len(values) // 2]) < 0


def _settled(values: list[float]) -> bool:
    """Whether the last steps brought next to nothing of what is missing."""
    steps, part = SETTLED
    return len(values) > 2 * steps and max(values[-steps:]) - max(values[:-steps]) < -part * max(values)


def _factors(form: Form, kept: Symbols) -> tuple[Tensor, Tensor]:
    """Return what each symbol of a form is multiplied by, (symbols,), 0 where a bound does not keep it, and what others move.

    Below a nonlinearity at which forms start anew, a bound depends on symbols that the form does not know.
    """
    parts, others = [form.centre.new_zeros(0)], form.centre.new_zeros(())
    for name, block in form.blocks.items():
        factors = kept.factors.get(name, block.new_zeros(1, 1, len(block)))[0, 0]
        parts.append(factors[kept.widths[name].flatten() != 0] if len(factors) != len(block) else factors)
    for name, unknown in kept.factors.items():
        others = others if name in form.blocks else others + unknown.abs().sum()
    return torch.cat(parts), others
