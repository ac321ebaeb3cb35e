"""What the neurons before the last kinks can do together: a bound by squares (mathematics §5).

The chord above each |z| is dear where many signs are unknown: it pays for every neuron as if it were at the end of its own
interval, and all cannot be there at once, as the same weights move them. Here the last nonlinearity before a functional is
bounded from above by parabolas instead,

    |z| ≤ κ·z² + 1/(4κ)   for all z and κ > 0,

so a functional Σ a(v)·y(v) is at least a linear one less Σ_v q(v)·(z(v) − c(v))², with c the centres of `forms`. With
z − c = G·ε + e, |ε_i| ≤ 1, and Q = diag(q), for any numbers S_i > 0

    ‖Q^½·G·ε‖² ≤ λ·Σ_i S_i·ε_i² ≤ λ·Σ_i S_i,   λ the largest eigenvalue of Q^½·G·S⁻¹·Gᵀ·Q^½,

the dual of the semidefinite relaxation of max ‖Q^½·G·ε‖ over the cube (Nesterov, 1998). The rest ‖Q^½·e‖ is bounded layer by
layer: (Σ_u w(u)·e(u))² ≤ (Σ_u |w(u)|)·Σ_u |w(u)|·e(u)². κ, S and the line below the other kinks are chosen by ascent; whatever
they are, the bound holds.

An example: n neurons z_v = Σ_i H_vi·ε_i with H a Hadamard matrix of n rows. Each z_v may reach n, so chords bound Σ|z_v| by n²;
‖z‖² = n·‖ε‖² ≤ n², so Σ|z_v| ≤ √n·‖z‖ ≤ n^1.5: parabolas find that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pathlift.budget import Clock
from pathlift.edges.weights import Weights
from pathlift.graph.layers import Connection, Layer, Slopes
from pathlift.passes.enclosure.forms import Form, forms
from pathlift.passes.enclosure.lines import Lines
from pathlift.passes.enclosure.nonlinear import TINY
from pathlift.passes.enclosure.relaxation import Relaxation
from pathlift.passes.enclosure.substitution import handed_down, transposed
from pathlift.passes.enclosure.tightening import ascended
from pathlift.passes.rounding import DOUBLE

STEPS = 30
"""Steps of the ascent over parabolas."""

RATE = 0.2
"""Of that ascent, over logarithms and logits."""

EVERY = 5
"""Steps after which the scaling S is renewed."""

MEMORY = 0.8
"""What is kept, step by step, of the directions of the largest eigenvalues, of which several take turns."""

NEURONS = 512
"""Neurons of one layer whose squares are bounded together, at most: an eigenvalue problem of this size."""

HOPE = 0.6
"""The part of what chords pay that parabolas can save, at most, by experience: functionals that need more are not tried."""

UP = 1 + 2.0**-30
"""Sums of numbers that are not negative are rounded by less, up to millions of them."""

SHARP = 30.0
"""How sharply the largest eigenvalue is told from the others where its slope is wanted."""


def raised(
    relaxation: Relaxation, functionals: Mapping[str, Tensor], bounds: Tensor, *, constant: Tensor, steps: int, clock: Clock
) -> Tensor:
    """Raise lower bounds of functionals plus constants that are not positive, the lowest first, until one stays too low.

    Args:
        relaxation: What is known of one sample.
        functionals: Layer name to coefficients, (1, functionals, *shape).
        bounds: Lower bounds, constants included, (1, functionals).
        constant: Added to each functional, (1, functionals).
        steps: Steps of ascent over the slopes of all other layers.
        clock: Bounds stay as they are when its time is up.

    Returns:
        Lower bounds, (1, functionals), none of them lower.
    """
    top = _last_kinks(relaxation)
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
    source = relaxation.network.layer[top.connections[0].source]
    known = forms(relaxation, source)
    if known is None:
        return bounds
    bounds = bounds.clone()
    for row in bounds[0].argsort().tolist():
        if clock.over() or not bool(missing[0, row]):
            break
        here = slice(row, row + 1)
        parabolas = _with_parabolas(relaxation, known, top, a[0, row], clock)
        if parabolas is None:
            break
        chosen, price = parabolas
        added = above[:, here] + constant[:, here] - price
        bound = ascended(chosen, {top.name: a[:, here]}, steps=steps, clock=clock, constant=added)
        bounds[:, here] = torch.fmax(bounds[:, here], bound)
        if not bool(bounds[0, row] > 0):
            break
    return bounds


def _last_kinks(relaxation: Relaxation) -> Layer | None:
    """Return the last layer with a nonlinearity, where it is a convex one with kinks of which some may be crossed."""
    for layer in reversed(relaxation.network.layers):
        if layer.nonlinearity is not None:
            plain = isinstance(layer.nonlinearity, Slopes) and layer.connections[0].weight is None
            return layer if plain and layer.name in relaxation.free else None
    return None


def _with_parabolas(
    relaxation: Relaxation, known: Mapping[str, Form], top: Layer, a: Tensor, clock: Clock
) -> tuple[Relaxation, float] | None:
    """Choose parabolas above the last kinks for one functional.

    With y = plus·z⁺ + minus·z⁻ = mid·z + half·|z|, a part w of the chord and a part 1 − w of the parabola give

        y ≤ (w·chord + (1 − w)·(mid + 2·half·κ·c))·z + w·height + (1 − w)·half·(1/(4κ) − κ·c²) + (1 − w)·half·κ·(z − c)².

    Args:
        relaxation: What is known of one sample.
        known: Forms of all layers up to the one that the kinks read.
        top: The layer with the kinks.
        a: The functional, of this layer's shape.
        clock: The ascent ends when its time is up.

    Returns:
        The relaxation with the linear part of this for the line above, and what is to be paid for the rest; None where
        parabolas are of no use, or squares leave the range of float64.
    """
    lines, free = relaxation.lines[top.name], relaxation.free[top.name]
    assert isinstance(lines, Lines)
    assert isinstance(top.nonlinearity, Slopes)
    mid = (top.nonlinearity.plus + top.nonlinearity.minus) / 2
    half = (top.nonlinearity.plus - top.nonlinearity.minus) / 2
    source = top.connections[0].source
    form, flat = known[source], a.flatten()
    where = free.where[0].flatten()
    above, below = (where & (flat < 0)).nonzero()[:, 0], (where & (flat > 0)).nonzero()[:, 0]
    if not 0 < len(above) <= NEURONS or not any(map(len, form.blocks.values())):
        return None
    slopes = [part.expand(1, *top.shape).flatten() for part in (lines.lower_slope, lines.upper_slope)]
    heights = lines.upper.expand(1, *top.shape).flatten()
    chord, height = slopes[1][above], heights[above]
    fixed = torch.where(flat < 0, slopes[1], slopes[0])
    fixed[above], fixed[below] = 0.0, 0.0
    generators, centre = form.generators, form.centre.flatten()
    moved, c, size = (fixed * flat) @ generators.T, centre[above], flat[above].abs()
    upwards, downwards = generators[:, above].T.contiguous(), generators[:, below].T.contiguous()

    def parts(curve: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the line's slope and constant, and q."""
        bent = (1 - share) * half
        slope = share * chord + (1 - share) * mid + 2 * bent * curve * c
        return slope, share * height + bent * (0.25 / curve - curve * c * c), size * bent * curve

    widest = upwards.abs().amax(1, keepdim=True).clamp(min=TINY)
    spread = widest[:, 0] * (upwards / widest).pow(2).sum(1).sqrt().clamp(min=1.0)
    curve, share = (1 / (12 * spread)).log(), torch.full_like(spread, -3.0)
    tilt = torch.where(centre[below] > 0, 2.0, -2.0).to(centre)
    q = parts(curve.exp(), share.sigmoid())[2]
    scaling = _scaling(upwards, q.sqrt(), None)
    gram, among = (upwards / scaling) @ upwards.T, None
    if not bool(gram.isfinite().all() & q.isfinite().all()):
        return None
    rest = _rest(relaxation, known, source, _placed(q, above, form))
    factor = (1 + rest / math.sqrt(max(DOUBLE.least, _square(upwards, q, scaling)))) ** 2
    paid = float((size * height).sum())  # by chords: steps are the same however a functional is scaled
    if not math.isfinite(factor) or not 0 < paid < math.inf:
        return None
    with torch.enable_grad():
        parameters = [curve.requires_grad_(), share.requires_grad_(), tilt.requires_grad_()]
        ascent = torch.optim.Adam(parameters, lr=RATE)
        for step in range(1, STEPS + 1):
            if clock.over():
                break
            slope, constant, q = parts(curve.exp(), share.sigmoid())
            lower = top.nonlinearity.minus + tilt.sigmoid() * 2 * half
            linear = moved - (size * slope) @ upwards + (flat[below] * lower) @ downwards
            price = (size * (slope * c + constant)).sum() - (flat[below] * lower * centre[below]).sum() + linear.abs().sum()
            largest, directions = _largest(gram, q)
            among = directions if among is None else MEMORY * among + (1 - MEMORY) * directions
            ascent.zero_grad()
            ((price + factor * largest * scaling.sum()) / paid).backward()
            ascent.step()
            if step % EVERY == 0:
                scaling = (scaling * _scaling(upwards, q.detach().sqrt(), among)).sqrt()
                gram = (upwards / scaling) @ upwards.T
    slope, constant, q = (part.detach() for part in parts(curve.exp(), share.sigmoid()))
    square = _square(upwards, q, scaling)
    rest = _rest(relaxation, known, source, _placed(q, above, form))
    new = {"lower": slopes[0].clone(), "upper": slopes[1].clone(), "height": heights.clone()}
    new["lower"][below] = top.nonlinearity.minus + tilt.detach().sigmoid() * 2 * half
    new["upper"][above], new["height"][above] = slope, constant
    shaped = {name: part.reshape(1, *top.shape) for name, part in new.items()}
    chosen = Lines(shaped["lower"], lines.lower.expand(1, *top.shape), shaped["upper"], shaped["height"])
    # Slopes and constants are rounded, each by a few units of what they are added up from.
    reach = relaxation.intervals[source].size.flatten()[above]
    curve = curve.detach().exp()
    largest = (chord.abs() + abs(mid) + 2 * half * curve * c.abs()) * reach + height + half * (0.25 / curve + curve * c * c)
    rounding = relaxation.roundoff.here(top) * float((size * largest).sum())
    return replace(relaxation, lines={**relaxation.lines, top.name: chosen}), (math.sqrt(square) + rest) ** 2 * UP + rounding


def _placed(q: Tensor, neurons: Tensor, form: Form) -> Tensor:
    """Return weights of all neurons of a layer, 0 but for some, of the layer's shape."""
    flat = torch.zeros(form.centre.numel(), dtype=torch.float64, device=q.device)
    return flat.index_put((neurons,), q.detach()).reshape(form.centre.shape[1:])


def _largest(gram: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalue of Q^½·C·Q^½, with the mean slope of the largest few, and their directions."""
    root = q.sqrt()
    values, vectors = torch.linalg.eigh(root.detach()[:, None] * gram * root.detach())
    among = torch.softmax(SHARP * values / values[-1].clamp(min=DOUBLE.least), 0)
    turned = root[:, None] * vectors
    estimate = (among * (turned * (gram @ turned)).sum(0)).sum()
    return estimate + (values[-1] - estimate).detach(), (vectors * among) @ vectors.T


def _scaling(rows: Tensor, root: Tensor, among: Tensor | None) -> Tensor:
    """Return numbers S_i > 0 for the symbols of √q·rows: the length of each generator in the directions that count.

    At the best S the slope of λ·Σ S_i by each S_i is 0: λ·S_i² = Σ S·(mean of the squares of the generator in the directions of
    the largest eigenvalues).

    Args:
        rows: Generators, (neurons, symbols).
        root: √q, (neurons,).
        among: The mean of v·vᵀ over those directions; None where all weigh alike.

    Returns:
        (symbols,), with the sum 1.
    """
    weighted = root[:, None] * rows
    square = (weighted * (weighted if among is None else among @ weighted)).sum(0)
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
    return math.sqrt(_square(rows, weights, _scaling(rows, weights.sqrt(), None))) + _length(q, form.rest)


def _length(q: Tensor, values: Tensor) -> float:
    return math.sqrt(float((q * values * values).sum())) * UP
