"""Branch and bound: the set is cut in two at a kink, z ≤ 0 and z ≥ 0, again and again (mathematics §5).

On one side of its kink a ReLU is linear, so nothing is paid for it there. That z ≥ 0 helps once more: a·y − β·z ≤ a·y for all
β ≥ 0, and backwards z joins the functional before the worst is taken, so a bound of the left side may be the larger one
(β-CROWN, Wang et al., 2021). β is chosen by ascent with all else; any β gives a bound. What was known of the whole set holds
on both sides, so each inherits its bound, its slopes, its parabolas (`together`) and its β. The side with the lowest bound of
all functionals comes next; it is cut at the kink that seems to cost it most. A functional is at least as large as the smallest
bound of its sides, so more cuts never lower it.

z is what the network computes, rounded: one of z ≤ 0 and z ≥ 0 is true, whatever rounding does, and the slack of the layers is
paid as before.

An example: ReLU(z) − ReLU(z) of two neurons that read the same z in [−1, 1] is 0. Lines say t·z − (z + 1)/2 with any t in
[0, 1], at best −1/2 with t = 1/2. Cut at the kink of the second neuron: where z ≤ 0, t·z is 0 for t = 0; where z ≥ 0, t·z − z
is 0 for t = 1.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pathlift.budget import Clock
from pathlift.edges.unit import Identity
from pathlift.graph.interval import Interval
from pathlift.graph.layers import Slopes
from pathlift.passes.enclosure.kinks import last_kinks
from pathlift.passes.enclosure.lines import Free, Lines, kink_gap
from pathlift.passes.enclosure.parabolas import PUSH, Parabolas, Shapes
from pathlift.passes.enclosure.relaxation import Relaxation, Symbols
from pathlift.passes.enclosure.substitution import at_kinks, handed_down, lower_bound, lower_slope
from pathlift.passes.enclosure.tightening import RATE, first_tilt, stepped
from pathlift.passes.enclosure.together import symbols_below

FIRST = 60
"""Steps of the ascent for a whole set, before it is cut."""

PAYS = 2.0
"""What a cut may bring, at most, relative to what its kink costs, by experience: functionals that need more are not cut."""

LITTLE = 0.01
"""What steps without a cut have to bring, relative to what is missing, to be worth more of them."""

STEPS = 8
"""Steps for each side of a cut, which begin where those for both ended."""


@dataclass(frozen=True)
class Side:
    """A part of the set.

    Attributes:
        functional: Number of the functional that is bounded on it.
        signs: By the nonlinearity of the kinks, 1 where z ≥ 0, −1 where z ≤ 0 and 0 where it may be either, (1, *shape).
        tilts: Where the free slopes ended, by layer, (1, 1, *shape).
        shares: Where β ended, by the layer of z, relative to the coefficients at the kinks.
        end: Where the ascent over parabolas ended; None where there are none, or none yet.
        costs: What each kink costs, roughly, by its nonlinearity; None before the first ascent.
    """

    functional: int
    signs: Mapping[str, Tensor] = field(default_factory=dict)
    tilts: Mapping[str, Tensor] = field(default_factory=dict)
    shares: Mapping[str, Tensor] = field(default_factory=dict)
    end: Shapes | None = None
    costs: Mapping[str, Tensor] | None = None

    def cut(self, name: str, place: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the signs on both sides of a kink."""
        assert self.costs is not None
        signs = self.signs.get(name, torch.zeros_like(self.costs[name]))
        sides = [signs.flatten().index_fill(0, torch.tensor(place, device=signs.device), sign) for sign in (-1.0, 1.0)]
        left, right = ({**self.signs, name: side.reshape(signs.shape)} for side in sides)
        return left, right

    def hope(self, splits: int) -> float:
        """Return what so many cuts bring at most, roughly: a dearest kink for each doubling of the number of sides."""
        if not self.costs:
            return 0.0
        costs = torch.cat([cost.flatten() for cost in self.costs.values()])
        return PAYS * float(costs.topk(min(len(costs), math.ceil(math.log2(splits + 1)))).values.sum())

    def dearest(self) -> tuple[str, int] | None:
        """Return the layer and the place of the kink that costs most; None where none costs anything."""
        best, found = 0.0, None
        for name, cost in (self.costs or {}).items():
            most, place = cost.flatten().max(0)
            if float(most) > best:
                best, found = float(most), (name, int(place))
        return found


def split(
    relaxation: Relaxation, functionals: Mapping[str, Tensor], bounds: Tensor, *, constant: Tensor, splits: int, clock: Clock
) -> Tensor:
    """Raise lower bounds of functionals plus constants that are not positive by cutting the set at kinks.

    It ends when all are positive, or when the lowest can not become so.

    Args:
        relaxation: What is known of one sample.
        functionals: Layer name to coefficients, (1, functionals, *shape).
        bounds: Lower bounds, constants included, (1, functionals).
        constant: Added to each functional, (1, functionals).
        splits: Number of cuts, all functionals together.
        clock: Bounds stay as they are when its time is up.

    Returns:
        Lower bounds, (1, functionals), none of them lower.
    """
    search = _Search(relaxation, functionals, constant, clock)
    count = bounds.shape[1]
    done = [math.inf] * count  # the lowest bound of the sides that need no more
    heap: list[tuple[float, int, Side]] = []
    for functional, bound in enumerate(bounds[0].tolist()):
        if bound > 0:
            done[functional] = bound
        else:
            heap.append((bound, functional, Side(functional)))
    heapq.heapify(heap)
    number = count
    hopeless = False
    while heap and not hopeless and not clock.over():
        bound, _, side = heap[0]
        first, parts = side.costs is None, [side.signs]
        if not first:
            if splits == 0:
                break
            splits, kink = splits - 1, side.dearest()
            parts = parts if kink is None else list(side.cut(*kink))  # without kinks the ascent goes on
        heapq.heappop(heap)
        for signs in parts:
            lowest, part = search.bounded(side, signs)
            lowest = max(bound, lowest)
            if lowest > 0:
                done[side.functional] = min(done[side.functional], lowest)
                continue
            heapq.heappush(heap, (lowest, number, part))
            number += 1
            # Where one functional stays too low, the others are of no use.
            if first:
                hopeless = lowest + part.hope(splits) <= 0
            elif len(parts) == 1:
                hopeless = lowest - bound <= -LITTLE * bound
    for bound, _, side in heap:
        done[side.functional] = min(done[side.functional], bound)
    return torch.maximum(bounds, bounds.new_tensor([done]))


class _Search:
    """Bounds functionals of one sample on parts of the set."""

    def __init__(self, relaxation: Relaxation, functionals: Mapping[str, Tensor], constant: Tensor, clock: Clock) -> None:
        self.relaxation, self.functionals, self.constant, self.clock = relaxation, functionals, constant, clock
        self.kinks = _kinks(relaxation)
        self.coefficients: dict[int, dict[str, Tensor]] = {}
        self.top = last_kinks(relaxation)
        self.kept: Symbols | None = None
        if self.top is not None:
            self.above, self.left = handed_down(relaxation, functionals, self.top.name, {})
            if self.top.name in self.left:
                self.kept = symbols_below(relaxation, self.top)

    def bounded(self, side: Side, signs: Mapping[str, Tensor]) -> tuple[float, Side]:
        """Bound a functional on a part of the set.

        Args:
            side: The part in which it lies.
            signs: What is known of kinks on it.

        Returns:
            A lower bound, the constant included, and the part.
        """
        functional = side.functional
        relaxation = one_side(self.relaxation, signs)
        if functional not in self.coefficients:
            own = {name: a[:, functional : functional + 1] for name, a in self.functionals.items()}
            # Slopes in the middle, so that no coefficient is 0 because of a slope of 0 above it.
            middle = {name: torch.full_like(free.least, 0.5).unsqueeze(1) for name, free in self.relaxation.free.items()}
            self.coefficients[functional] = at_kinks(self.relaxation, own, middle)
        sizes = self.coefficients[functional]
        units = {self.kinks[name]: -sign * sizes[name].abs() for name, sign in signs.items()}
        part, steps = replace(side, signs=signs), FIRST if side.costs is None else STEPS
        if self.kept is not None and (side.end is not None or side.costs is None):
            found = self._by_parabolas(relaxation, part, units, steps)
            if found is not None:
                return found
        return self._by_chords(relaxation, part, units, steps)

    def _by_parabolas(
        self, relaxation: Relaxation, part: Side, units: Mapping[str, Tensor], steps: int
    ) -> tuple[float, Side] | None:
        assert self.kept is not None
        number = part.functional
        own, constant = {name: a[:, number : number + 1] for name, a in self.left.items()}, self.above + self.constant
        parabolas = Parabolas(relaxation, self.kept, own, float(constant[0, number]), units, part.end)
        bound = parabolas.raised(self.clock, steps=steps, start=part.end, patient=True)
        end = parabolas.end
        if end is None:
            return None
        costs = {name: cost for name, cost in parabolas.costs().items() if name in self.kinks}
        return bound, replace(part, end=end, tilts=end.tilts, shares=end.shares, costs=costs)

    def _by_chords(self, relaxation: Relaxation, part: Side, units: Mapping[str, Tensor], steps: int) -> tuple[float, Side]:
        number, best = part.functional, -math.inf
        own = {name: a[:, number : number + 1] for name, a in self.functionals.items()}
        tilts = {
            name: part.tilts[name].clone() if name in part.tilts else first_tilt(relaxation, name, 1)
            for name in relaxation.free
        }
        shares = {name: part.shares.get(name, torch.zeros_like(unit)).clone() for name, unit in units.items()}
        kept = tilts, shares

        def functional(shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
            pushed = {name: (share * units[name]).unsqueeze(1) for name, share in shares.items()}
            return own | {name: own[name] + more if name in own else more for name, more in pushed.items()}

        with torch.enable_grad():
            groups = [{"params": [tilt.requires_grad_()], "lr": RATE} for tilt in tilts.values()]
            groups += [{"params": [share.requires_grad_()], "lr": PUSH} for share in shares.values()]
            ascent = torch.optim.Adam(groups, maximize=True) if groups else None
            for step in range(steps + 1):
                bound = lower_bound(relaxation, functional(shares), tilts=tilts)[0, 0] + self.constant[0, number]
                value = float(bound.detach())
                if value > best:
                    best = value
                    kept = _copied(tilts), _copied(shares)
                if best > 0 or step == steps or self.clock.over() or ascent is None or not math.isfinite(value):
                    break
                stepped(ascent, bound, tilts, shares)
        tilts, shares = kept
        costs = self._costs(relaxation, functional(shares), tilts)
        return best, replace(part, end=None, tilts=tilts, shares=shares, costs=costs)

    def _costs(
        self, relaxation: Relaxation, functional: Mapping[str, Tensor], tilts: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Tell what kinks cost, roughly: where a line is used, how far it lies from the kink, times its coefficient."""
        costs = {}
        for name, a in at_kinks(relaxation, functional, tilts).items():
            free, lines = relaxation.free[name], relaxation.lines[name]
            if name not in self.kinks:
                continue
            assert isinstance(lines, Lines)
            interval = relaxation.intervals[self.kinks[name]]
            slope = lower_slope(relaxation, name, tilts.get(name))[:, 0]
            gap = torch.where(a > 0, kink_gap(interval.low, interval.high, slope, free.least, free.most), lines.upper)
            costs[name] = torch.where(free.where, a.abs() * gap, 0.0)
        return costs


def _copied(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.detach().clone() for name, part in parts.items()}


def _kinks(relaxation: Relaxation) -> dict[str, str]:
    """Return the nonlinearities whose kinks the set may be cut at, with the layer that each, and no other, reads."""
    found: dict[str, str] = {}
    readers: dict[str, int] = {}
    for layer in relaxation.network.layers:
        if layer.nonlinearity is not None:
            for connection in layer.connections:
                readers[connection.source] = readers.get(connection.source, 0) + 1
    for name in relaxation.free:
        layer = relaxation.network.layer[name]
        connection = layer.connections[0]
        same = isinstance(connection.edges, Identity) and relaxation.network.layer[connection.source].shape == layer.shape
        plain = isinstance(layer.nonlinearity, Slopes) and connection.weight is None
        if same and plain and readers[connection.source] == 1:
            found[name] = connection.source
    return found


def one_side(relaxation: Relaxation, signs: Mapping[str, Tensor]) -> Relaxation:
    """Return what is known where some kinks are on one side: their lines are exact, and intervals end at 0.

    Args:
        relaxation: What is known of the whole set, of one sample.
        signs: See `Side`.

    Returns:
        What is known on that part of the set.
    """
    intervals, lines, free = dict(relaxation.intervals), dict(relaxation.lines), dict(relaxation.free)
    for name, sign in signs.items():
        layer = relaxation.network.layer[name]
        source, kind, drawn, was = layer.connections[0].source, layer.nonlinearity, lines[name], free[name]
        assert isinstance(kind, Slopes)
        assert isinstance(drawn, Lines)
        right, left = sign > 0, sign < 0
        known, slope = right | left, torch.where(right, sign.new_tensor(kind.plus), sign.new_tensor(kind.minus))
        z, y, slack = intervals[source], intervals[name], relaxation.slack[name]
        z = Interval(torch.where(right, z.low.clamp(min=0.0), z.low), torch.where(left, z.high.clamp(max=0.0), z.high))
        intervals[source] = z
        ends = slope * z.low, slope * z.high
        low, high = torch.minimum(*ends) - slack, torch.maximum(*ends) + slack  # the slack covers a rounded slope, too
        intervals[name] = Interval(
            torch.where(known, torch.maximum(y.low, low), y.low), torch.where(known, torch.minimum(y.high, high), y.high)
        )
        lines[name] = Lines(
            torch.where(known, slope, drawn.lower_slope),
            torch.where(known, 0.0, drawn.lower),
            torch.where(known, slope, drawn.upper_slope),
            torch.where(known, 0.0, drawn.upper),
        )
        free[name] = Free(was.where & ~known, was.least, was.most)
    return replace(relaxation, intervals=intervals, lines=lines, free=free)
