"""Backwards through the relaxation: a lower bound of a linear functional Σ_v a(v)·v of any layer (mathematics §5).

The functional is handed down layer by layer until it reads only inputs, whose interval is known. At a layer with coefficients a

- affine, v = f(u; c) + b_c + (weights that move) + s, |s| ≤ slack: Σ a·v ≥ Σ (aᵀc)·u + Σ a·b_c − Σ|a|·slack − (what each shared
  weight can move, see `affine`). The coefficients of the layer below are aᵀc, signs kept: terms that cancel do so here.
- a nonlinearity between lines, lower_slope·z + lower ≤ v ≤ upper_slope·z + upper: where a ≥ 0 the line below bounds a·v from
  below, where a < 0 the line above does. So z gets a⁺·lower_slope + a⁻·upper_slope and the bound a⁺·lower + a⁻·upper.
- an input x' in [x − ε, x + ε]: Σ a·x − Σ|a|·ε.

With `Symbols` the bound stays a function of what moves, a number plus Σ factor·ε, so that something else that depends on the
same ε can be added before the worst is taken (`together`): an input brings a·radius, a shared weight r·(g − slope·R), a kink
whose line above is used half the distance of its two parallel lines.

An example: x in [−1, 1], v = ReLU(x), the functional v − x/2. Intervals give [0, 1] − [−1/2, 1/2] = [−1/2, 3/2]. Backwards, x/2
− v has a = −1 at v; the line above ReLU is x/2 + 1/2, so x/2 − v ≥ x/2 − x/2 − 1/2 = −1/2: v − x/2 ≤ 1/2, which is attained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from pathlift.edges.weights import Weights
from pathlift.graph.layers import Connection, Extremum, Layer
from pathlift.passes.enclosure.affine import may_be_shared
from pathlift.passes.enclosure.lines import Choice, Lines
from pathlift.passes.enclosure.relaxation import Form, Relaxation, Symbols, of_bias, of_connection
from pathlift.passes.forward import placed
from pathlift.passes.rounding import DOUBLE

ROUNDED = 2.0**-30
"""Relative error of sums of up to millions of numbers."""

ELEMENTS = 1 << 23
"""Coefficients that are worked on at a time (64 MiB)."""

HELD = 1 << 25
"""Numbers that are held for sums over generators (256 MiB)."""


def lower_bound(
    relaxation: Relaxation, functionals: Mapping[str, Tensor], *, tilts: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Bound linear functionals of layers from below, over the box and the ball.

    Args:
        relaxation: What is known of all layers up to the functionals.
        functionals: Layer name to coefficients, (samples, functionals, *shape).
        tilts: Where the free slopes lie between their ends, in [0, 1], (samples, functionals, *shape), by layer.

    Returns:
        Shape (samples, functionals).
    """
    bound, _ = handed_down(relaxation, functionals, None, tilts or {})
    return bound


def handed_down(
    relaxation: Relaxation,
    functionals: Mapping[str, Tensor],
    stop: str | None,
    tilts: Mapping[str, Tensor],
    symbols: Symbols | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Go backwards with linear functionals down to a layer.

    Args:
        relaxation: What is known of all layers up to the functionals.
        functionals: Layer name to coefficients, (samples, functionals, *shape).
        stop: The first layer, from above, that is not gone through; None for none.
        tilts: See `lower_bound`.
        symbols: What the bound may still depend on; None to take its smallest value.

    Returns:
        What was gathered on the way, (samples, functionals), and the coefficients of the layers that are left: both together,
        and with `symbols` Σ factor·ε besides, bound the functionals from below.
    """
    coefficients = dict(functionals)
    first = next(iter(coefficients.values()))
    bound = first.new_zeros(first.shape[:2])
    for layer in reversed(list(relaxation.layers.values())):
        if layer.name == stop:
            break
        a = coefficients.pop(layer.name, None)
        if a is None:
            continue
        if layer.name in relaxation.present:
            a = a * relaxation.present[layer.name]
        if layer.kind == "input":
            bound = bound + _at_inputs(relaxation, layer, a, symbols)
        elif layer.nonlinearity is None:
            bound = bound + _through_affine(relaxation, layer, a, coefficients, symbols)
        else:
            bound = bound + _through_lines(relaxation, layer, a, coefficients, tilts.get(layer.name), symbols)
    return bound, coefficients


def _at_inputs(relaxation: Relaxation, layer: Layer, a: Tensor, symbols: Symbols | None) -> Tensor:
    """Return Σ a·x − Σ|a|·radius, or with `symbols` the part of it that does not depend on them.

    A symbol is that of the whole ball, x + width·ε. Inputs without one, which hardly move, are paid here; and so is every input
    without `symbols`, about the middle of an interval that may end at a kink (`splitting`).
    """
    interval, rounding = relaxation.intervals[layer.name], relaxation.roundoff.here(layer)
    centre, size, paid = interval.middle, interval.size, interval.radius * (1 + rounding)
    if symbols is not None:
        x, width = relaxation.feed[layer.name], symbols.widths[layer.name]
        symbols.factors[layer.name] = _flat(a * width)
        moves = width > 0
        centre, size = torch.where(moves, x, centre), torch.where(moves, x.abs() + width, size)
        paid = torch.where(moves, 0.0, paid)
    return _dot(a, centre) - _dot(a.abs(), paid + rounding * size)


def _dot(a: Tensor, values: Tensor) -> Tensor:
    """Return Σ_v a(v)·values(v) of every functional, (samples, functionals)."""
    values = values.expand(len(a), *values.shape[1:]).reshape(len(a), -1)
    return torch.einsum("brn,bn->br", a.reshape(*a.shape[:2], -1), values)


def _flat(values: Tensor) -> Tensor:
    """Lay out what each functional has, a single number too, in a row: (samples, functionals, numbers)."""
    return values.reshape(*values.shape[:2], -1)


def _add(coefficients: dict[str, Tensor], name: str, more: Tensor) -> None:
    coefficients[name] = coefficients[name] + more if name in coefficients else more


def transposed(function: Callable[[Tensor], Tensor], blank: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return a linear function's value at ``blank``, and its transpose as a function of rows (rows, *shape of the result)."""
    out, pull, *_ = torch.func.vjp(function, blank)
    return out, torch.vmap(lambda row: pull(row)[0])


def _hand_down(
    relaxation: Relaxation, connection: Connection, weights: Weights | None, shape: tuple[int, ...], a: Tensor
) -> Tensor:
    """Return aᵀw, the coefficients of the layer below."""
    below = relaxation.layers[connection.source]
    blank = torch.zeros(below.shape, dtype=torch.float64, device=a.device)
    _, back = transposed(lambda x: connection.edges.sum(x, weights).expand(shape), blank)
    return cast("Tensor", back(a.flatten(0, 1)).unflatten(0, a.shape[:2]))


def _through_affine(
    relaxation: Relaxation, layer: Layer, a: Tensor, coefficients: dict[str, Tensor], symbols: Symbols | None
) -> Tensor:
    weights = relaxation.weights
    bound = -_dot(a.abs(), relaxation.slack[layer.name])
    constant = relaxation.constants.get(layer.name)
    if constant is not None:
        bound = bound + _dot(a, constant)
    for position, bias in enumerate(layer.biases if constant is None else ()):
        bound = bound + _dot(a, placed(bias, weights.middles(bias.weight)).expand(1, *layer.shape))
        radius = weights.radii(bias.weight)
        if radius is not None:
            factors = _shared_bias(a, placed(bias, radius), layer.shape)
            if symbols is None:
                bound = bound - factors.abs().sum(2)
            else:
                symbols.factors[of_bias(layer, position)] = factors
    offset = 0
    for position, connection in enumerate(layer.connections):
        piece, shape = a, layer.shape
        if layer.concat is not None:
            shape = layer.concat.shape(position, layer.shape)
            piece = a.narrow(2 + layer.concat.dim, offset, layer.concat.sizes[position])
            offset += layer.concat.sizes[position]
        middles = None if connection.weight is None else weights.middles(connection.weight)
        if not weights.varies(connection.weight):
            below, price = _hand_down(relaxation, connection, middles, shape, piece), None
        elif may_be_shared(connection, layer) and bool((_flat(piece != 0).sum(2) > 1).any()):
            name = of_connection(layer, position)
            below, price, factors = _moved_alike(relaxation, layer, connection, piece, symbols, name)
            if symbols is not None:
                symbols.factors[name] = factors
        else:
            below, price = _moved_apart(relaxation, layer, connection, shape, piece)
        _add(coefficients, connection.source, below)
        bound = bound if price is None else bound - price
    return bound


def _shared_bias(a: Tensor, radius: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return r_k·(Σ of a over the neurons that read bias k): what biases that move alike can do."""
    target = (1,) * (len(shape) - radius.dim()) + tuple(radius.shape)
    sums = a.sum_to_size(*a.shape[:2], *target)
    return _flat(sums * radius.reshape(target))


def _moved_apart(
    relaxation: Relaxation, layer: Layer, connection: Connection, shape: tuple[int, ...], a: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ|a|·r·|u' − μ| ≤ Σ_u (|a|ᵀr)(u)·(slope·(u' − μ) + rest) with the chord of each |u' − μ|: every edge moves on its own."""
    assert connection.weight is not None
    weights, interval = relaxation.weights, relaxation.intervals[connection.source]
    centre = weights.centres.get(layer.name, 0.0)
    slope, rest = chord(interval.middle - centre, interval.radius)
    rest = rest - slope * centre
    paid = _hand_down(relaxation, connection, weights.radii(connection.weight), shape, a.abs())
    below = _hand_down(relaxation, connection, weights.middles(connection.weight), shape, a)
    return below - paid * slope.unsqueeze(1), _dot(paid, rest)


def _moved_alike(
    relaxation: Relaxation, layer: Layer, connection: Connection, a: Tensor, symbols: Symbols | None, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Let weights that stand on several edges move by −slope·r, and pay what may be missing to −r·|G|; see `affine`.

    Or, together with what else depends on the symbols ε of these weights, with the McCormick envelope of ε·G itself on
    |G − g| ≤ R, of which that is the smallest value: ε·G ≥ −slope·G + (g − slope·R)·ε − (R − slope·g), whatever the slope in
    [−1, 1]. (Both lower planes, εG ≥ ∓G + (g ∓ R)·ε ± g − R, in the shares (1 ± slope)/2.) R is then what the neurons do
    together, Σ_i |Σ a·generator_i|, where that is less than what they do one by one.

    Args:
        relaxation: What is known of all layers.
        layer: The layer.
        connection: One of its connections.
        a: Coefficients of the neurons to which it leads.
        symbols: What the bound may still depend on; None to take its smallest value.
        name: Of the weights' own symbols.

    Returns:
        The coefficients below, the price, and r·(g − slope·R) of each weight, of none without ``symbols``.
    """
    assert connection.weight is not None
    value, radius = relaxation.weights.middle[connection.weight], relaxation.weights.radius[connection.weight]
    assert radius is not None
    edges, centre = connection.edges, relaxation.weights.centres.get(layer.name)
    interval = relaxation.intervals[connection.source]
    if symbols is None:
        middle, reach = relaxation.for_all(interval.middle), relaxation.for_all(interval.radius)
    else:
        form = symbols.known[connection.source]
        middle, reach = form.centre, form.reach(interval)
    if centre is not None:
        middle = middle - centre

    def of_part(x: Tensor, rho: Tensor, functionals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g, most = edges.gathered(x, value, functionals), edges.gathered(rho, value, functionals.abs())
        if symbols is not None:
            if name not in symbols.parts:
                with torch.no_grad():
                    together = _together(symbols, connection, value, functionals, name)
                    symbols.parts[name] = torch.where(most > 0, together / most, 1.0).clamp(max=1.0)
            most = most * symbols.parts[name]
        slope, rest = chord(g, most)
        factor = g.new_zeros(*g.shape[:2], 0)
        if symbols is not None:  # sums of as many terms as there are weights, of both signs, are rounded by less than that
            factor, rest = (g - slope * most) * radius, most - slope * g + ROUNDED * (g.abs() + most)
        price, moved = _flat(rest) @ radius.flatten(), slope * radius
        if centre is not None:
            price = price - _flat(moved * edges.gathered(centre.expand(x.shape), value, functionals)).sum(2)
        return edges.returned(x.shape[1:], value - moved, functionals), price, _flat(factor)

    rows = max(1, ELEMENTS // max(1, value.numel()))  # each has weights of its own
    if symbols is not None:  # what neurons do together is found for all functionals at once, or kept
        rows = max(rows, a.shape[1])
    step = max(1, rows // max(1, a.shape[1]))
    found = []
    for x, rho, functionals in zip(middle.split(step), reach.split(step), a.split(step), strict=True):
        parts = [of_part(x, rho, part) for part in functionals.split(rows, 1)]
        found.append([torch.cat(column, 1) for column in zip(*parts, strict=True)])
    below, price, factors = (torch.cat(column) for column in zip(*found, strict=True))
    return below, price, factors


def _together(symbols: Symbols, connection: Connection, value: Tensor, a: Tensor, name: str) -> Tensor:
    """Bound |Σ a·(u' − centre)| over the edges of each weight by Σ_i |Σ a·generator_i| + Σ |a|·rest: all neurons together."""
    form = symbols.known[connection.source]
    if name not in symbols.sums:
        room = HELD - sum(numbers for _, numbers in symbols.sums.values())
        symbols.sums[name] = _sizes_summed(connection, form, value, a.shape[2:], room)
    summed, _ = symbols.sums[name]
    return (summed(a) + connection.edges.gathered(form.rest, value, a.abs())) * (1 + ROUNDED)


def _sizes_summed(
    connection: Connection, form: Form, value: Tensor, shape: Sequence[int], room: int
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return a ↦ Σ_i |Σ a·generator_i| over the edges of each weight, a few generators at a time.

    Args:
        connection: Of a shared weight.
        form: Of the layer below.
        value: Of the weight's shape.
        shape: Of the layer above.
        room: What is laid out for each generator (windows, of a convolution) is held where it has no more numbers.

    Returns:
        The function, and how many numbers are held for it.
    """
    edges, channels = connection.edges, value.shape[0] if value.dim() else 1
    laid_out = max(form.centre.numel(), math.prod(shape) * value.numel() // channels**2)
    rows = max(1, ELEMENTS // max(laid_out, value.numel()))
    parts = [part for block in form.blocks.values() if len(block) for part in block.split(rows)]
    numbers = laid_out * sum(map(len, parts))
    if numbers <= room:
        held = [edges.gatherer(part, value) for part in parts]
        return lambda a: _added(a, value, (gathered(a) for gathered in held)), numbers
    return lambda a: _added(a, value, (edges.gatherer(part, value)(a) for part in parts)), 0


def _added(a: Tensor, value: Tensor, gathered: Iterable[Tensor]) -> Tensor:
    total = value.new_zeros(1, a.shape[1], *value.shape)
    for part in gathered:
        total += part.abs().sum(0, keepdim=True)
    return total


def chord(middle: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and rest of |G| ≤ slope·G + rest on [m − ρ, m + ρ]: |G| is convex, so its chord lies above it.

    Where 0 lies between, the chord goes from (m − ρ, ρ − m) to (m + ρ, ρ + m): slope m/ρ, rest ρ − m²/ρ. Elsewhere |G| is ±G.
    A slope that is off by a few units leaves the rest off by as many units of |m| + ρ.

    Args:
        middle: m.
        radius: ρ.

    Returns:
        Slope and rest.
    """
    slope = torch.div(middle.detach(), radius.detach().clamp(min=DOUBLE.least)).clamp_(-1.0, 1.0)
    return slope, torch.addcmul(radius, slope, middle, value=-1).clamp(min=0.0)


def _through_lines(
    relaxation: Relaxation,
    layer: Layer,
    a: Tensor,
    coefficients: dict[str, Tensor],
    tilt: Tensor | None,
    symbols: Symbols | None,
) -> Tensor:
    lines = relaxation.lines[layer.name]
    if isinstance(lines, Choice):
        return _through_extremum(relaxation, layer, lines, a, coefficients)
    positive, negative = a.clamp(min=0.0), a.clamp(max=0.0)
    slack = relaxation.for_all(relaxation.slack[layer.name])  # |a| = a⁺ − a⁻
    upper_slope, upper, kept = lines.upper_slope, lines.upper, torch.ones_like(lines.upper)
    bend = None
    if symbols is not None:
        symbols.arrived[layer.name], bend = a, symbols.bends.get(layer.name)
    if bend is not None:
        upper_slope, upper, kept = bend.part * upper_slope + bend.slope, bend.part * upper + bend.height, bend.part
    bound = _dot(positive, lines.lower - slack) + _dot(negative, upper + slack)
    if symbols is not None and layer.name in symbols.losses:  # upper/2 + width·ε − loss in place of upper, where that may help
        loss = symbols.losses[layer.name]
        kept = torch.where(8 * loss < lines.upper, kept, 0.0)
        symbols.factors[layer.name] = _flat(negative * (kept * symbols.widths[layer.name]).unsqueeze(1))
        bound = bound - _dot(negative, kept * (lines.upper / 2 - loss))
    z = positive * _lower_slope(relaxation, layer, lines, tilt) + negative * upper_slope.unsqueeze(1)
    connection = layer.connections[0]
    weights = None if connection.weight is None else relaxation.weights.middles(connection.weight)
    _add(coefficients, connection.source, _hand_down(relaxation, connection, weights, layer.shape, z))
    return bound


def _lower_slope(relaxation: Relaxation, layer: Layer, lines: Lines, tilt: Tensor | None) -> Tensor:
    """Return the slopes of the lines below, moved where they are free."""
    slope = lines.lower_slope.unsqueeze(1)
    if tilt is None:
        return slope
    free = relaxation.free[layer.name]
    least, most = free.least.unsqueeze(1), free.most.unsqueeze(1)
    return torch.where(free.where.unsqueeze(1), least + tilt * (most - least), slope)


def _through_extremum(
    relaxation: Relaxation, layer: Layer, lines: Choice, a: Tensor, coefficients: dict[str, Tensor]
) -> Tensor:
    """z_c ≤ y ≤ slope·z_c + upper for the chosen antecedent c: all coefficients go down to it; see `nonlinear`."""
    kind = layer.nonlinearity
    assert isinstance(kind, Extremum)
    sign = 1.0 if kind.largest else -1.0
    a = sign * a
    positive, negative = a.clamp(min=0.0), a.clamp(max=0.0)
    bound = _dot(negative, lines.upper) - _dot(a.abs(), relaxation.slack[layer.name])
    z = positive + negative * lines.slope.unsqueeze(1)
    number = 0  # of the antecedent, in the order in which `antecedents` lays them side by side
    for connection in layer.connections:
        below = relaxation.network.layer[connection.source]
        blank = torch.zeros(below.shape, dtype=torch.float64, device=a.device)
        out, back = transposed(connection.edges.antecedents, blank)
        count = len(out)
        taken = [(lines.chosen == number + offset).unsqueeze(1) for offset in range(count)]
        parts = torch.stack([(z * chosen).sum_to_size(*a.shape[:2], *out.shape[1:]) for chosen in taken], 2)
        _add(coefficients, connection.source, sign * back(parts.flatten(0, 1)).unflatten(0, a.shape[:2]))
        number += count
    for bias in layer.biases:
        middle, radius = relaxation.weights.middles(bias.weight), relaxation.weights.radii(bias.weight)
        part = z * (lines.chosen == number).unsqueeze(1)
        bound = bound + _dot(part, sign * placed(bias, middle).expand(1, *layer.shape))
        if radius is not None:
            bound = bound - _dot(part.abs(), placed(bias, radius).expand(1, *layer.shape))
        number += 1
    return bound


def at_kinks(relaxation: Relaxation, functionals: Mapping[str, Tensor], tilts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the coefficients that arrive at nonlinearities with free slopes: the bound's slope by the lines' constants.

    Args:
        relaxation: What is known of all layers up to the functionals.
        functionals: Layer name to coefficients, (samples, functionals, *shape).
        tilts: See `lower_bound`.

    Returns:
        By layer, (samples, *shape): the sum over the functionals; nothing where none arrive.
    """
    lines = {}
    for name in relaxation.free:
        drawn = relaxation.lines[name]
        assert isinstance(drawn, Lines)
        ends = [end.detach().clone().requires_grad_() for end in (drawn.lower, drawn.upper)]
        lines[name] = Lines(drawn.lower_slope, ends[0], drawn.upper_slope, ends[1])
    with torch.enable_grad():
        bound = lower_bound(replace(relaxation, lines={**relaxation.lines, **lines}), functionals, tilts=tilts)
        if bound.requires_grad:
            bound.sum().backward()
    return {
        name: line.lower.grad + line.upper.grad
        for name, line in lines.items()
        if line.lower.grad is not None and line.upper.grad is not None
    }


def lower_slope(relaxation: Relaxation, name: str, tilt: Tensor | None) -> Tensor:
    """Return the slopes of the lines below a nonlinearity, (samples, functionals or 1, *shape).

    Args:
        relaxation: What is known of the layer.
        name: Of the layer.
        tilt: Where the free ones lie between their ends; None for CROWN's.

    Returns:
        The slopes.
    """
    lines = relaxation.lines[name]
    assert isinstance(lines, Lines)
    return _lower_slope(relaxation, relaxation.layers[name], lines, tilt)
