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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathlift.budget import Clock
from pathlift.edges.weights import Weights
from pathlift.graph.layers import Connection, Layer, Slopes
from pathlift.passes.enclosure.forms import Form, forms, symbols
from pathlift.passes.enclosure.lines import Lines, kink_gap
from pathlift.passes.enclosure.nonlinear import TINY
from pathlift.passes.enclosure.relaxation import Relaxation, Symbols
from pathlift.passes.enclosure.substitution import handed_down, transposed
from pathlift.passes.enclosure.tightening import RATE as TURN
from pathlift.passes.enclosure.tightening import first_tilt, stepped
from pathlift.passes.rounding import DOUBLE

STEPS = 30
"""Steps of the ascent over parabolas."""

RATE = 0.2
"""Of that ascent, over logarithms and logits."""

SLOWER = 0.3
"""What the rates are multiplied by where an ascent goes on from the end of another, which is near the best already."""

PUSH = 0.2
"""Rate of an ascent over multiples of `Parabolas.units`."""

SETTLED = 10, 0.01
"""A patient ascent ends when this many steps bring less than this part of what is missing."""

EVERY = 5
"""Steps after which the scaling S is renewed."""

MEMORY = 0.8
"""What is kept, step by step, of the directions of the largest eigenvalues, of which several take turns."""

NEURONS = 512
"""Neurons of one layer whose squares are bounded together, at most: an eigenvalue problem of this size."""

HOPE = 0.65
"""The part of what chords pay that parabolas can save, at most, by experience: functionals that need more are not tried."""

PACE = 1.5
"""What the rest of the ascent may bring, relative to the second half of the steps so far, by experience."""

LEAST = 1e-6
"""The smallest t to start with: what the symbols leave over is to count against the squares, but may be nothing."""

UP = 1 + 2.0**-30
"""Sums of numbers that are not negative are rounded by less, up to millions of them."""

SHARP = 30.0
"""How sharply the largest eigenvalue is told from the others where its slope is wanted."""


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
    if top is None:
        return bounds
    above, left = handed_down(relaxation, functionals, top.name, {})
    if set(left) != {top.name}:  # some of the functional goes past the kinks
        return bounds
    a, lines, where = left[top.name], relaxation.lines[top.name], relaxation.free[top.name].where
    assert isinstance(lines, Lines)
    paid = (a.clamp(max=0.0).abs() * torch.where(where, lines.upper, 0.0).unsqueeze(1)).flatten(2).sum(2)
    missing = bounds <= 0
    if not bool(missing.any()) or bool((missing & (bounds + HOPE * paid <= 0)).any()) or clock.over():
        return bounds  # one that stays too low is enough for the rest to be of no use
    known = forms(relaxation, relaxation.network.layer[top.connections[0].source])
    if known is None:
        return bounds
    bounds = bounds.clone()
    for row in bounds[0].argsort().tolist():
        if clock.over() or not bool(missing[0, row]):
            break
        parabolas = Parabolas(relaxation, known, top, a[0, row], float(above[0, row] + constant[0, row]))
        bounds[0, row] = max(float(bounds[0, row]), parabolas.raised(clock))
        if not bool(bounds[0, row] > 0):
            break
    return bounds


def last_kinks(relaxation: Relaxation) -> Layer | None:
    """Return the last layer with a nonlinearity, where it is a convex one with kinks of which some may be crossed.

    Args:
        relaxation: What is known of one sample.

    Returns:
        The layer; None where parabolas are of no use.
    """
    for layer in reversed(relaxation.network.layers):
        if layer.nonlinearity is not None:
            plain = isinstance(layer.nonlinearity, Slopes) and layer.connections[0].weight is None
            return layer if plain and layer.name in relaxation.free else None
    return None


@dataclass(frozen=True)
class _Pieces:
    """A bound, functional ≥ constant + Σ factors·ε − Σ q·(z − c)², with what it was made of.

    Attributes:
        curve: (1 − w)·half·κ of each parabola.
        height: Constant of the line that goes with it.
        q: Weights of the squares.
        factors: (symbols,).
        level: S₀.
        spare: t.
        constant: All the rest.
        left: What the symbols leave over costs, by a rule of three.
        largest: λ of the squares with the row of the factors.
        directions: Mean of v·vᵀ over the eigenvectors that count.
        scaling: S.
        added: Size of what stands beside the lines at the neurons before the kinks, (neurons,).
        rows: The rows whose squares λ is about, without √S, (neurons + 1, symbols).
    """

    curve: Tensor
    height: Tensor
    q: Tensor
    factors: Tensor
    level: Tensor
    spare: Tensor
    constant: Tensor
    left: Tensor
    largest: Tensor
    directions: Tensor
    scaling: Tensor
    added: Tensor
    rows: Tensor


@dataclass(frozen=True)
class End:
    """Where an ascent ended, for another one to go on from.

    Attributes:
        curve: log κ of every neuron of the layer, flat; 0 where there is no parabola.
        share: The logit of w, likewise.
        lower: The logit of the slope of the line below, likewise.
        level: S₀, as the logarithm of its ratio to Σ|b|/2.
        spare: log t.
        scaling: S.
        tilts: Where the free slopes of the layers below lie.
        shares: Multiples of the units.
    """

    curve: Tensor
    share: Tensor
    lower: Tensor
    level: Tensor
    spare: Tensor
    scaling: Tensor
    tilts: Mapping[str, Tensor]
    shares: Mapping[str, Tensor]


class Parabolas:
    """Parabolas above the last kinks for one functional, and the ascent over them.

    With y = plus·z⁺ + minus·z⁻ = mid·z + half·|z|, a part w of the chord and a part 1 − w of the parabola give

        y ≤ (w·chord + (1 − w)·(mid + 2·half·κ·c))·z + w·height + (1 − w)·half·(1/(4κ) − κ·c²) + (1 − w)·half·κ·(z − c)².
    """

    def __init__(
        self,
        relaxation: Relaxation,
        known: Mapping[str, Form],
        top: Layer,
        a: Tensor,
        constant: float,
        units: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put parabolas above all kinks, all of one shape relative to how far the neuron moves.

        Args:
            relaxation: What is known of one sample.
            known: Forms of all layers up to the one that the kinks read.
            top: The layer with the kinks.
            a: The functional, of this layer's shape.
            constant: Added to it.
            units: By layer, a functional that is known not to be positive, (1, *shape): any share of each of its entries may
                be added, see `splitting`. None for none.
        """
        self.units = units or {}
        self.end: End | None = None
        lines, where, flat = relaxation.lines[top.name], relaxation.free[top.name].where[0].flatten(), a.flatten()
        assert isinstance(lines, Lines)
        assert isinstance(top.nonlinearity, Slopes)
        self.relaxation, self.known, self.top, self.flat = relaxation, known, top, flat
        self.least, self.half = top.nonlinearity.minus, (top.nonlinearity.plus - top.nonlinearity.minus) / 2
        self.source = relaxation.network.layer[top.connections[0].source]
        self.form, self.symbols = known[self.source.name], symbols(relaxation, known)
        self.above, self.below = (where & (flat < 0)).nonzero()[:, 0], (where & (flat > 0)).nonzero()[:, 0]
        parts = (lines.lower_slope, lines.lower, lines.upper_slope, lines.upper, relaxation.slack[top.name])
        low_slope, low, high_slope, high, slack = (part.expand(1, *top.shape).flatten() for part in parts)
        self.fixed = torch.where(flat < 0, high_slope, low_slope)
        fixed = torch.where(flat < 0, high, low).index_fill(0, self.above, 0.0)
        self.constant = constant + float((flat * fixed).sum() - (flat.abs() * slack).sum())
        self.fixed_size = abs(constant) + float((flat.abs() * (fixed.abs() + slack)).sum())
        self.size, self.chord, self.height = flat[self.above].abs(), high_slope[self.above], high[self.above]
        self.paid = float((self.size * self.height).sum())
        self.centre, self.rows = self.form.centre.flatten()[self.above], self.form.generators[:, self.above].T.contiguous()
        self.scaling = self.gram = self.left = self.rows.new_zeros(0)

    def raised(self, clock: Clock, *, steps: int = STEPS, start: End | None = None, patient: bool = False) -> float:
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
        if not 0 < len(self.above) <= NEURONS or self.rows.shape[1] == 0 or not 0 < self.paid < math.inf:
            return -math.inf
        if start is None:
            spread = self.rows.abs().amax(1).clamp(min=TINY)
            spread = spread * (self.rows / spread[:, None]).pow(2).sum(1).sqrt().clamp(min=1.0)
            own = [(1 / (12 * spread)).log(), torch.full_like(spread, -3.0)]
            own += [torch.where(self.form.centre.flatten()[self.below] > 0, 2.0, -2.0).to(spread), spread.new_zeros(())]
            tilts = {name: first_tilt(self.relaxation, name, 1) for name in self.relaxation.free if name in self.known}
            shares = {name: torch.zeros_like(unit) for name, unit in self.units.items()}
        else:
            own = [start.curve[self.above], start.share[self.above], start.lower[self.below], start.level.clone()]
            tilts = {name: tilt.clone() for name, tilt in start.tilts.items()}
            shares = {name: start.shares.get(name, torch.zeros_like(unit)).clone() for name, unit in self.units.items()}
        if not self._scaled(own, tilts, start):
            return -math.inf
        rate = 1.0 if start is None else SLOWER
        with torch.enable_grad():
            groups = [{"params": [part.requires_grad_() for part in own], "lr": rate * RATE}]
            groups += [{"params": [tilt.requires_grad_()], "lr": rate * TURN} for tilt in tilts.values()]
            groups += [{"params": [share.requires_grad_()], "lr": PUSH} for share in shares.values()]
            ascent = torch.optim.Adam(groups, maximize=True)
            among, best, values, top = None, -math.inf, list[float](), None
            for step in range(1, steps + 1):
                pieces = self._pieces(own, tilts, shares)
                if pieces is None:
                    return best
                bound = pieces.constant - pieces.left - pieces.level - pieces.largest * self.scaling.sum()
                values.append(float(bound.detach()))
                if top is None or values[-1] >= max(values):
                    top, self.end = pieces, self._ended(own, tilts, shares)
                last = step == steps or clock.over() or (_settled(values) if patient else _too_slow(values))
                if values[-1] > 0 or last:
                    best = max(best, self._bound(top))
                    if best > 0 or last:
                        return best
                stepped(ascent, bound / self.paid, tilts, shares)
                among = pieces.directions if among is None else MEMORY * among + (1 - MEMORY) * pieces.directions
                if step % EVERY == 0 or (start is not None and step < EVERY):  # with a kink less S is soon another
                    self._rescale(pieces.rows, among)
        return best

    def costs(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Tell what each kink costs at the end of the ascent, roughly, as z may be on either side of it.

        A neuron that moves by s about c pays half·(κ·z² + 1/(4κ)) for half·|z|, and κ settles at 1/(2s).

        Returns:
            The costs of the kinks below the parabolas, (1, *shape), and the functional of the layers below.
        """
        assert self.end is not None
        own = [self.end.curve[self.above], self.end.share[self.above], self.end.lower[self.below]]
        slope, _, _, lower = self._shapes(own)
        moved = 0.5 / own[0].exp()
        found = torch.zeros_like(self.flat)
        found[self.above] = self.size * self.half * torch.maximum(moved - self.centre.abs(), moved / 8)
        interval = self.relaxation.intervals[self.source.name]
        low, high = interval.low.flatten()[self.below], interval.high.flatten()[self.below]
        gap = kink_gap(low, high, lower, self.least, self.least + 2 * self.half)
        found[self.below] = self.flat[self.below] * gap
        functional, _ = self._functional(slope, lower, self.end.shares)
        return found.reshape(1, *self.top.shape), functional

    def _functional(self, slope: Tensor, lower: Tensor, shares: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the linear functional of the layers below, (1, 1, *shape), and the size of what units add before the kinks."""
        line = self.fixed.index_put((self.above,), slope).index_put((self.below,), lower)
        functional = {self.source.name: (self.flat * line).reshape(1, 1, *self.source.shape)}
        added = torch.zeros_like(self.flat)
        for name, share in shares.items():
            more = (share * self.units[name]).unsqueeze(1)
            functional[name] = functional[name] + more if name in functional else more
            if name == self.source.name:
                added = more.detach().abs().flatten()
        return functional, added

    def _ended(self, own: list[Tensor], tilts: Mapping[str, Tensor], shares: Mapping[str, Tensor]) -> End:
        curve, share, lower, level, spare = (part.detach().clone() for part in own)
        blank = torch.zeros_like(self.flat)
        above, below = (self.above,), (self.below,)
        curve, share, lower = blank.index_put(above, curve), blank.index_put(above, share), blank.index_put(below, lower)
        kept = [{name: part.detach().clone() for name, part in parts.items()} for parts in (tilts, shares)]
        return End(curve, share, lower, level, spare, self.scaling, *kept)

    def _scaled(self, own: list[Tensor], tilts: Mapping[str, Tensor], start: End | None) -> bool:
        """Choose the first S and t, and see what the symbols leave over; False where that is no number."""
        q = self.size * self._shapes(own)[2]
        if start is not None:
            own.append(start.spare.clone())
            self.scaling = start.scaling
            self.gram = (self.rows / self.scaling) @ self.rows.T
            return self._left_over(q, self._rest(q))
        self._rescale(q.sqrt()[:, None] * self.rows, None)
        square = _square(self.rows, q, self.scaling)
        bent = float((self.size * (1 - own[1].sigmoid()) * self.half / (4 * own[0].exp())).sum())
        if not 0 < square < math.inf or not 0 < bent < math.inf:
            return False
        factor = bent / square  # of κ², so that what parabolas pay in their middle is what their squares pay
        own[0] += math.log(factor) / 2
        q, square = q * math.sqrt(factor), square * math.sqrt(factor)
        rest = self._rest(q)
        own.append(q.new_tensor(max(LEAST, rest / math.sqrt(max(DOUBLE.least, square)))).log())
        if not self._left_over(q, rest) or not math.isfinite(float(own[4])):
            return False
        pieces = self._pieces(own, tilts, {})
        if pieces is None:
            return False
        self._rescale(pieces.rows, None)  # with the row of the factors
        return True

    def _left_over(self, q: Tensor, rest: float) -> bool:
        """Share out what the symbols leave over among the neurons, by a rule of three; False where that is no number."""
        each = self.form.rest.flatten()[self.above] ** 2
        self.left = each * (rest * rest / max(DOUBLE.least, float((q * each).sum())))
        return math.isfinite(float(self.left.sum()))

    def _rest(self, q: Tensor) -> float:
        """Bound ‖Q^½·e‖, with e what the symbols leave over."""
        flat = torch.zeros_like(self.flat).index_put((self.above,), q)
        return _rest(self.relaxation, self.known, self.source.name, flat.reshape(self.source.shape))

    def _rescale(self, rows: Tensor, among: Tensor | None) -> None:
        scaling = _scaling(rows, among)
        self.scaling = scaling if among is None else (self.scaling * scaling).sqrt()
        self.gram = (self.rows / self.scaling) @ self.rows.T

    def _shapes(self, own: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return slope and constant of the lines above, (1 − w)·half·κ, and the slope of the lines below."""
        curve, share, lower = own[0].exp(), own[1].sigmoid(), self.least + own[2].sigmoid() * 2 * self.half
        bent, c = (1 - share) * self.half, self.centre
        slope = share * self.chord + (1 - share) * (self.least + self.half) + 2 * bent * curve * c
        height = share * self.height + bent * (0.25 / curve - curve * c * c)
        return slope, height, bent * curve, lower

    def _pieces(self, own: list[Tensor], tilts: Mapping[str, Tensor], shares: Mapping[str, Tensor]) -> _Pieces | None:
        """Return the bound for given parabolas and slopes; None where squares leave the range of float64."""
        slope, height, curve, lower = self._shapes(own)
        q, spare = self.size * curve, own[4].exp()
        functional, added = self._functional(slope, lower, shares)
        kept = replace(self.symbols, factors={})
        gathered, _ = handed_down(self.relaxation, functional, None, tilts, kept)
        factors, others = _factors(self.form, kept)
        level = (float(factors.detach().abs().sum()) / 2 + DOUBLE.least) * own[3].exp()
        root, last = ((1 + spare) * q).sqrt(), factors / (2 * level.sqrt())
        side = root * ((self.rows / self.scaling) @ last)
        square = torch.cat([root[:, None] * self.gram * root, side[:, None]], 1)
        matrix = torch.cat([square, torch.cat([side, ((last / self.scaling) @ last)[None]])[None]])
        if not bool(matrix.isfinite().all()):
            return None
        largest, directions = _largest(matrix)
        constant = self.constant + gathered[0, 0] - others * UP - (self.size * height).sum()
        left = (1 + 1 / spare) * (self.left * q).sum()
        rows = torch.cat([root[:, None] * self.rows, last[None]]).detach()
        return _Pieces(curve, height, q, factors, level, spare, constant, left, largest, directions, self.scaling, added, rows)

    def _bound(self, pieces: _Pieces) -> float:
        """Return the bound that these pieces give, rounding included.

        With e what the symbols leave over and any t > 0, ‖Q^½·(G·ε + e)‖² ≤ (1 + t)·‖Q^½·G·ε‖² + (1 + 1/t)·‖Q^½·e‖².
        """
        q, level, spare = pieces.q.detach(), float(pieces.level.detach()), float(pieces.spare.detach())
        left = self._rest(q) ** 2 * (1 + 1 / spare) * UP
        rows = torch.cat([self.rows, (pieces.factors.detach() / (2 * math.sqrt(level)))[None]])
        squares = _square(rows, torch.cat([q * (1 + spare), q.new_ones(1)]), pieces.scaling)
        # Slopes and constants of lines are rounded, each by a few units of what they are added up from.
        reach = self.relaxation.intervals[self.source.name].size.flatten()
        curve, c = pieces.curve.detach(), self.centre
        steep = self.chord.abs() + abs(self.least + self.half) + 2 * curve * c.abs()
        heights = self.height + pieces.height.detach().abs() + 2 * curve * c * c
        lines = (self.flat.abs() * reach).sum() * (abs(self.least) + 2 * self.half) + (pieces.added * reach).sum()
        lines = lines + (self.size * (steep * reach[self.above] + heights)).sum()
        summed = float(lines) + self.fixed_size + level + squares + left
        return float(pieces.constant.detach()) - level - squares - left - self.relaxation.roundoff.here(self.top) * summed


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


def _largest(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalue, with the mean slope of the largest few, and their directions."""
    values, vectors = torch.linalg.eigh(matrix.detach())
    among = torch.softmax(SHARP * values / values[-1].clamp(min=DOUBLE.least), 0)
    estimate = (among * (vectors * (matrix @ vectors)).sum(0)).sum()
    return estimate + (values[-1] - estimate).detach(), (vectors * among) @ vectors.T


def _scaling(rows: Tensor, among: Tensor | None) -> Tensor:
    """Return numbers S_i > 0 for the symbols of some rows: the length of each generator in the directions that count.

    At the best S the slope of λ·Σ S_i by each S_i is 0: λ·S_i² = Σ S·(mean of the squares of the generator in the directions of
    the largest eigenvalues).

    Args:
        rows: Generators, (rows, symbols).
        among: The mean of v·vᵀ over those directions; None where all weigh alike.

    Returns:
        (symbols,), with the sum 1.
    """
    square = (rows * (rows if among is None else among @ rows)).sum(0)
    length = square.clamp(min=0.0).sqrt()
    length = length + 1e-9 * length.max() + DOUBLE.least
    return length / length.sum()


def _square(rows: Tensor, q: Tensor, scaling: Tensor) -> float:
    """Return an upper bound of λ·Σ S_i.

    Each entry of the matrix is a sum over the symbols, so all are off by at most (symbols + a few)·u times the geometric mean
    of two diagonal ones, which is no more than that part of the trace; the eigenvalues of what was computed are off by a small
    multiple of (neurons)·u times the largest.
    """
    weighted = q.sqrt()[:, None] * rows
    matrix = (weighted / scaling) @ weighted.T
    if not bool(matrix.isfinite().all()):
        return math.inf
    off = (rows.shape[1] + 64 * len(rows) + 16) * DOUBLE.unit * matrix.diagonal().sum()
    largest = torch.linalg.eigvalsh(matrix)[-1].clamp(min=0.0)
    return float((largest + off + DOUBLE.least) * scaling.sum()) * UP


def _rest(relaxation: Relaxation, known: Mapping[str, Form], name: str, q: Tensor) -> float:
    """Bound √(Σ_v q(v)·e(v)²), with e what the symbols of a layer leave over.

    From the layer down, each is replaced by those that it reads: e(v) is a sum over connections c of t_c(v) = Σ_u |w|·e(u) and
    of a part of its own (rounding, products of what weights and what neurons below move). So with Σ_c α_c = 1

        √(others + Σ q·e²) ≤ √(others + Σ_c Σ_v q(v)/α_c(v)·t_c(v)²) + √(Σ q·own²).

    α_c is the share of t_c by what the rest of each neuron says, which may end this at any layer.

    Args:
        relaxation: What is known of one sample.
        known: Forms of the layers up to this one.
        name: The layer.
        q: Of the layer's shape.

    Returns:
        The smallest of these bounds.
    """
    best, own = math.inf, 0.0
    taken = {name: q}
    for layer in reversed(relaxation.network.layers):  # the last that is taken reads nothing more
        if layer.name not in taken:
            continue
        best = min(best, own + math.sqrt(sum(_length(part, known[left].rest) ** 2 for left, part in taken.items())))
        if layer.nonlinearity is not None or not layer.connections:
            continue
        weights, form = taken.pop(layer.name), known[layer.name]
        own += _length(weights, form.rounded)
        sizes = [None if edge.weight is None else relaxation.weights.sizes(edge.weight) for edge in layer.connections]
        pieces = _pieces(known, layer, weights, sizes)
        for connection, size, (piece, share) in zip(layer.connections, sizes, pieces, strict=True):
            below = _below(relaxation, connection, size, torch.where(share > 0, piece / share, 0.0))
            source = connection.source
            taken[source] = taken[source] + below if source in taken else below
            if relaxation.weights.varies(connection.weight):
                assert connection.weight is not None
                own += _moves(known[source], _below(relaxation, connection, relaxation.weights.radii(connection.weight), piece))
    return best * UP


def _pieces(known: Mapping[str, Form], layer: Layer, q: Tensor, sizes: Sequence[Weights | None]) -> list[tuple[Tensor, Tensor]]:
    """Return, for each connection, q of the neurons that it leads to, and which share of their rest it brings."""
    if layer.concat is not None or len(sizes) == 1:
        pieces = [q] if layer.concat is None else q.split(layer.concat.sizes, layer.concat.dim)
        return [(piece, torch.ones_like(piece)) for piece in pieces]
    brought = [
        edge.edges.sum(known[edge.source].rest[0], size).expand(layer.shape)
        for edge, size in zip(layer.connections, sizes, strict=True)
    ]
    total = torch.stack(brought).sum(0)
    return [(q, torch.where(total > 0, part / total, 0.0)) for part in brought]


def _below(relaxation: Relaxation, connection: Connection, weights: Weights | None, q: Tensor) -> Tensor:
    """Return p with Σ_v q(v)·(Σ_u w(u→v)·e(u))² ≤ Σ_u p(u)·e(u)² for all e, for weights that are not negative."""
    ones = torch.ones(relaxation.network.layer[connection.source].shape, dtype=torch.float64, device=q.device)
    sums, back = transposed(lambda x: connection.edges.sum(x, weights).expand(q.shape), ones)
    below: Tensor = back((q * sums).unsqueeze(0))[0]
    return below * UP


def _moves(form: Form, q: Tensor) -> float:
    """Bound √(Σ_u q(u)·(u' − centre)²)."""
    taken = (q.flatten() > 0).nonzero()[:, 0]
    rows, weights = form.generators[:, taken].T, q.flatten()[taken]
    if len(rows) > NEURONS or rows.numel() == 0:
        return _length(q, form.linear + form.rest)
    return math.sqrt(_square(rows, weights, _scaling(weights.sqrt()[:, None] * rows, None))) + _length(q, form.rest)


def _length(q: Tensor, values: Tensor) -> float:
    return math.sqrt(float((q * values * values).sum())) * UP
