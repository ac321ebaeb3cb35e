"""What the neurons before the last kinks can do together: a bound by squares (mathematics §5).

The chord above each |z| is dear where many signs are unknown: it pays for every neuron as if it were at the end of its own
interval, and all cannot be there at once, as the same weights move them. Here the last nonlinearity before a functional is
bounded from above by parabolas instead,

    |z| ≤ κ·z² + 1/(4κ)   for all z and κ > 0,

so a functional Σ a(v)·y(v) is at least a linear one less Σ_v q(v)·(z(v) − c(v))², with c the centres of `forms`:
z − c = G·ε + e, |ε_i| ≤ 1. The linear one goes backwards through all layers below and becomes a number less bᵀ·ε, with the
same symbols (`Symbols`). With Q = diag(q) and any numbers S_i > 0, S₀ > 0

    bᵀ·ε + ‖Q^½·G·ε‖² ≤ S₀ + (bᵀ·ε)²/(4·S₀) + ‖Q^½·G·ε‖² ≤ S₀ + λ·Σ_i S_i·ε_i² ≤ S₀ + λ·Σ_i S_i,

λ the largest eigenvalue of R·S⁻¹·Rᵀ with the rows R = (Q^½·G; bᵀ/(2·√S₀)): the dual of the semidefinite relaxation of the left
side's maximum over the cube (Nesterov, 1998). What is linear and what is square are seldom at their worst at once. e is paid by
‖Q^½·(G·ε + e)‖² ≤ (1 + t)·‖Q^½·G·ε‖² + (1 + 1/t)·‖Q^½·e‖² with t > 0, and ‖Q^½·e‖ is bounded layer by layer:
(Σ_u w(u)·e(u))² ≤ (Σ_u |w(u)|)·Σ_u |w(u)|·e(u)². κ, S, t and the lines below all kinks are chosen by ascent; whatever they
are, the bound holds.

An example: n neurons z_v = Σ_i H_vi·ε_i with H a Hadamard matrix of n rows. Each z_v may reach n, so chords bound Σ|z_v| by n²;
‖z‖² = n·‖ε‖² ≤ n², so Σ|z_v| ≤ √n·‖z‖ ≤ n^1.5: parabolas find that. Another: ε₂ − ε₁ + |ε₁ + ε₂| is 2 at most, and 4 if both
parts are taken at their worst. Squares find 2·√2, with κ = 1/√8, S₀ = 1/√2 and S₁ = S₂ = 1/√2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathlift.budget import Clock
from pathlift.edges.unit import Identity
from pathlift.graph.layers import Layer, Slopes
from pathlift.passes.enclosure.forms import forms, symbols
from pathlift.passes.enclosure.lines import Lines, kink_gap
from pathlift.passes.enclosure.nonlinear import TINY
from pathlift.passes.enclosure.relaxation import UP, Bend, Form, Relaxation, Symbols
from pathlift.passes.enclosure.rests import NEURONS, rest_of
from pathlift.passes.enclosure.squares import largest, scaling_of, square
from pathlift.passes.enclosure.substitution import handed_down, lower_slope
from pathlift.passes.enclosure.tightening import RATE as TURN
from pathlift.passes.enclosure.tightening import first_tilt, stepped
from pathlift.passes.rounding import DOUBLE

STEPS = 60
"""Steps of the ascent over parabolas."""

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

HOPE = 0.72
"""The part of what chords pay that parabolas can save, at most, by experience: functionals that need more are not tried."""

PACE = 1.5
"""What the rest of the ascent may bring, relative to the second half of the steps so far, by experience."""

LEAST = 1e-6
"""The smallest t to start with: what the symbols leave over is to count against the squares, but may be nothing."""

CHORDS = -3.0, 0.0
"""The logit of the chord's part to start with, at the last kinks and at those below."""

FAINT = 1e-12
"""Squares with a smaller part of the largest weight than this are left out of the ascent, and not of the bound."""


def raised(
    relaxation: Relaxation, functionals: Mapping[str, Tensor], bounds: Tensor, *, constant: Tensor, clock: Clock
) -> Tensor:
    """Raise lower bounds of functionals plus constants that are not positive, the lowest first, until one stays too low.

    Args:
        relaxation: What is known of one sample.
        functionals: Layer name to coefficients, (1, functionals, *shape).
        bounds: Lower bounds, constants included, (1, functionals).
        constant: Added to each functional, (1, functionals).
        clock: Bounds stay as they are when its time is up.

    Returns:
        Lower bounds, (1, functionals), none of them lower.
    """
    top = last_kinks(relaxation)
    missing = bounds <= 0
    if top is None or not bool(missing.any()) or clock.over():
        return bounds
    above, left = handed_down(relaxation, functionals, top.name, {})
    if top.name not in left or bool((missing & (bounds + HOPE * paid_by_chords(relaxation, top, left) <= 0)).any()):
        return bounds  # one that stays too low is enough for the rest to be of no use
    known = forms(relaxation, relaxation.network.layer[top.connections[0].source])
    if known is None:
        return bounds
    bounds, kept = bounds.clone(), symbols(relaxation, known)
    for row in bounds[0].argsort().tolist():
        if clock.over() or not bool(missing[0, row]):
            break
        own = {name: a[:, row : row + 1] for name, a in left.items()}
        parabolas = Parabolas(relaxation, kept, own, float(above[0, row] + constant[0, row]))
        bounds[0, row] = max(float(bounds[0, row]), parabolas.raised(clock))
        if not bool(bounds[0, row] > 0):
            break
    return bounds


def paid_by_chords(relaxation: Relaxation, top: Layer, functionals: Mapping[str, Tensor]) -> Tensor:
    """Return what the chords above the last kinks cost functionals that were handed down to them, (1, functionals)."""
    lines, where = relaxation.lines[top.name], relaxation.free[top.name].where
    assert isinstance(lines, Lines)
    heights = torch.where(where, lines.upper, 0.0).unsqueeze(1)
    return (functionals[top.name].clamp(max=0.0).abs() * heights).flatten(2).sum(2)


def last_kinks(relaxation: Relaxation) -> Layer | None:
    """Return the last layer with a nonlinearity, where it is a convex one with kinks of which some may be crossed.

    Args:
        relaxation: What is known of one sample.

    Returns:
        The layer; None where parabolas are of no use.
    """
    for layer in reversed(relaxation.network.layers):
        if layer.nonlinearity is not None:
            return layer if _has_parabolas(relaxation, layer) else None
    return None


def _has_parabolas(relaxation: Relaxation, layer: Layer) -> bool:
    """Whether a layer is a convex nonlinearity of one layer with kinks of which some may be crossed."""
    if not isinstance(layer.nonlinearity, Slopes) or layer.name not in relaxation.free:
        return False
    connection = layer.connections[0]
    same = isinstance(connection.edges, Identity) and relaxation.network.layer[connection.source].shape == layer.shape
    return same and connection.weight is None


@dataclass(frozen=True)
class Kinks:
    """The kinks of one layer that may have parabolas.

    Attributes:
        source: The layer that the nonlinearity reads.
        least: The slope left of 0.
        half: Half of what the slope rises by.
        inside: Which kinks, (1, *shape) bool.
        places: The same, numbers in the flat layer, (kinks,).
        centre: Of the form of what is read, (1, *shape).
    """

    source: str
    least: float
    half: float
    inside: Tensor
    places: Tensor
    centre: Tensor

    def bend(self, curve: Tensor, share: Tensor) -> Bend:
        """Return parabolas y ≤ mid·z + half·(κ·z² + 1/(4κ)) that take the part 1 − w of the place of the chord.

        Args:
            curve: log κ, (1, *shape).
            share: The logit of w, (1, *shape).

        Returns:
            What stands above the nonlinearity.
        """
        part, kappa, c = torch.where(self.inside, share.sigmoid(), 1.0), curve.exp(), self.centre
        bent = (1 - part) * self.half
        slope = (1 - part) * (self.least + self.half) + 2 * bent * kappa * c
        return Bend(part, slope, bent * (0.25 / kappa - kappa * c * c), bent * kappa)


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
    ) -> None:
        """Find the kinks that may have parabolas, from the last ones down, `NEURONS` at most.

        Args:
            relaxation: What is known of one sample.
            kept: The symbols, with the forms of all layers up to the one that the last kinks read.
            functional: Layer name to coefficients, (1, 1, *shape), handed down to the last kinks.
            constant: Added to it.
            units: By layer, a functional that is known not to be positive, (1, *shape): any share of each of its entries may
                be added, see `splitting`. None for none.
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
            if layer is top or (layer.name in kept.known and _has_parabolas(relaxation, layer)):
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

    def raised(self, clock: Clock, *, steps: int = STEPS, start: Shapes | None = None, patient: bool = False) -> float:
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
        shapes = self._first() if start is None else self._gone_on(start)
        if shapes is None:
            return -math.inf
        with torch.enable_grad():
            ascent = self._ascent(shapes, 1.0 if start is None else SLOWER)
            among, best, values, parts = None, -math.inf, list[float](), dict[str, Tensor]()
            for step in range(1, steps + 1):
                if step % EVERY == 1:
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
                    shapes = replace(shapes, scaling=(shapes.scaling * scaling_of(rows, among)).sqrt())
        return best

    def costs(self) -> dict[str, Tensor]:
        """Tell what each kink costs at the end of the ascent, roughly, as z may be on either side of it, by layer, (1, *shape).

        A neuron that moves by s about c pays half·(κ·z² + 1/(4κ)) for half·|z|, and κ settles at 1/(2s).
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

    def _first(self) -> Shapes | None:
        """Return shapes to begin with, parabolas all of one form relative to how far the neuron moves; None for no number."""
        spread = self.rows.abs().amax(1).clamp(min=TINY)
        spread = spread * (self.rows / spread[:, None]).pow(2).sum(1).sqrt().clamp(min=1.0)
        curve = self._placed((1 / (12 * spread)).log())
        share = {name: torch.full_like(part, CHORDS[name != self.top.name]) for name, part in curve.items()}
        tilts = {name: first_tilt(self.relaxation, name, 1) for name in self.relaxation.free if name in self.symbols.known}
        tilts[self.top.name] = torch.where(self.form.centre > 0, 1 - EDGE, EDGE).unsqueeze(1)
        shares = {name: torch.zeros_like(unit) for name, unit in self.units.items()}
        zero = spread.new_zeros(())
        shapes = Shapes(curve, share, zero, zero, tilts, shares, torch.ones_like(self.rows[0]))
        pieces = self._pieces(shapes)
        scaling = scaling_of(pieces.q.sqrt()[:, None] * self.rows, None)
        squares = square(self.rows, pieces.q, scaling)
        bent = sum(float((part * 0.25 / curve[name].exp() ** 2).sum()) for name, part in self._placed(pieces.q).items())
        if not 0 < squares < math.inf or not 0 < bent < math.inf:
            return None
        factor = math.sqrt(bent / squares)  # of κ, so that what parabolas pay in their middle is what their squares pay
        curve = {name: torch.where(self.kinks[name].inside, part + math.log(factor), 0.0) for name, part in curve.items()}
        shapes = replace(shapes, curve=curve, scaling=scaling)
        pieces = self._pieces(shapes)
        left = self._left_over(pieces)
        spare = scaling.new_tensor(max(LEAST, math.sqrt(left / max(DOUBLE.least, squares * factor)))).log()
        shapes = replace(shapes, level=zero.clone(), spare=spare)
        worst = self._worst(self._pieces(shapes), scaling)
        if worst is None or not math.isfinite(left) or not math.isfinite(float(spare)):
            return None
        return replace(shapes, scaling=scaling_of(worst[2], None))  # with the row of the factors

    def _gone_on(self, start: Shapes) -> Shapes | None:
        shares = {name: start.shares.get(name, torch.zeros_like(unit)) for name, unit in self.units.items()}
        shapes = replace(start, shares=shares).copied()
        return shapes if math.isfinite(self._left_over(self._pieces(shapes))) else None

    def _placed(self, values: Tensor) -> dict[str, Tensor]:
        """Put a number for each row where its kink is, by layer, (1, *shape); 0 elsewhere."""
        pieces = values.split([len(kinks.places) for kinks in self.kinks.values()])
        return {
            name: torch.zeros_like(kinks.centre).flatten().index_put((kinks.places,), piece).reshape(kinks.centre.shape)
            for (name, kinks), piece in zip(self.kinks.items(), pieces, strict=True)
        }

    def _left_over(self, pieces: _Pieces) -> float:
        """Share out what the symbols leave over among the neurons, by a rule of three; return Σ q·e², at most.

        The signs of coefficients change on the way up, and q with them; the rule is that of their sizes.
        """
        found = []
        for name, kinks in self.kinks.items():
            weights, rest = pieces.arrived[name].abs() * pieces.bends[name].curve, self.symbols.known[kinks.source].rest
            whole = rest_of(self.relaxation, self.symbols.known, kinks.source, weights[0])
            factor = whole**2 / max(DOUBLE.least, float((weights * rest * rest).sum()))
            found.append((rest.flatten()[kinks.places] ** 2) * factor)
        self.left = torch.cat(found)
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
        root, last = torch.where(clear, ((1 + spare) * torch.where(clear, q, 1.0)).sqrt(), 0.0), pieces.factors / (2 * level.sqrt())
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
