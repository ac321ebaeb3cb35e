"""Affine forms: every neuron as a centre, a linear function of common symbols, and a rest (mathematics §5).

    u' = centre + Σ_i generator_i·ε_i + e,   |ε_i| ≤ 1,  |e| ≤ rest,

for every network of the box and every input of the ball. A symbol is an input's change, a weight's change δ_i = r_i·ε_i, or
what a nonlinearity and all before it leave over at one neuron. Intervals say how far one neuron can move; forms also say
what the neurons of a layer can do together, which is far less than all of them at their worst: see `together`.

- An affine layer with θ' = c + δ: Σ (c + δ)·u' + b' = f(centre; c) + b_c + Σ_i f(generator_i; c)·ε_i + Σ δ·centre + δ_b + (what
  is left: Σ c·e + Σ δ·(u' − centre), and rounding). A weight that stands on several edges moves on all of them alike.
- A nonlinearity between two parallel lines, slope·z + lower ≤ u ≤ slope·z + upper on the interval of z: the middle line, and
  the distance from it as a symbol of the neuron's own.

An example: u₁ = w·x, u₂ = −w·x with w in [0.9, 1.1] and x = 1. Both intervals are as wide as 0.2, but u₁ + u₂ is 0: the
forms are 1 + 0.1·ε and −1 − 0.1·ε with the same ε.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pathlift.graph.layers import Connection, Layer, LearnedSlope, Slopes
from pathlift.passes.enclosure.affine import may_be_shared
from pathlift.passes.enclosure.lines import Lines
from pathlift.passes.enclosure.relaxation import Form, Relaxation, Symbols, of_bias, of_connection
from pathlift.passes.forward import along, carried, placed
from pathlift.passes.rounding import DOUBLE, SPARE, fan_in

GENERATORS = 1 << 25
"""Numbers in the generators of all layers of one sample, at most (256 MiB)."""

ELEMENTS = 1 << 23
"""Numbers that are worked on at a time where generators of weights are made (64 MiB)."""


STILL = 2.0**-40
"""An input moves if its radius is more than this part of its size: less is rounding."""


def forms(relaxation: Relaxation, top: Layer) -> dict[str, Form] | None:
    """Return the forms of all layers up to one.

    Args:
        relaxation: What is known of one sample.
        top: The last layer that is wanted.

    Returns:
        Forms by layer; None where they would take more than `GENERATORS`.
    """
    known: dict[str, Form] = {}
    taken = 0
    for layer in relaxation.network.layers:
        if taken + _symbols(relaxation, layer, known) * math.prod(layer.shape) > GENERATORS:
            return None
        if layer.kind == "input":
            form = _of_input(relaxation, layer)
        elif layer.nonlinearity is not None:
            form = _bent(relaxation, layer, known)
        else:
            form = _affine(relaxation, layer, known)
        known[layer.name] = form
        taken += sum(block.numel() for block in form.blocks.values())
        if layer.name == top.name:
            break
    return known


def _symbols(relaxation: Relaxation, layer: Layer, known: Mapping[str, Form]) -> int:
    """Return how many symbols a layer depends on, at most, or how many functionals find those of its weights."""
    sizes = {name: len(block) for edge in layer.connections for name, block in known[edge.source].blocks.items()}
    if layer.kind == "input" or layer.nonlinearity is not None:
        return sum(sizes.values()) + math.prod(layer.shape)
    weights = [edge.weight for edge in layer.connections] + [bias.weight for bias in layer.biases]
    moving = [relaxation.weights.radii(weight) for weight in weights if weight is not None]
    own = sum(radii.full().numel() for radii in moving if radii is not None)
    return max(sum(sizes.values()) + own, math.prod(layer.shape) if own else 0)


def _diagonal(width: Tensor) -> Tensor:
    """Return the generators of a symbol for each neuron whose width, (1, *shape), is not 0: (symbols, *shape)."""
    flat = width.flatten()
    neurons = flat.nonzero()[:, 0]
    block = flat.new_zeros(len(neurons), len(flat))
    block[torch.arange(len(neurons), device=flat.device), neurons] = flat[neurons]
    return block.reshape(-1, *width.shape[1:])


def _of_input(relaxation: Relaxation, layer: Layer) -> Form:
    """Return x + radius·ε, an ε for each input; the radius is that of the interval, which covers rounding.

    Inputs that hardly move, as where a ball has radius 0, have no symbol: it would make all above larger, and tell nothing.
    """
    x, interval = relaxation.feed[layer.name], relaxation.intervals[layer.name]
    radius = torch.maximum(interval.high - x, x - interval.low) * (1 + 4 * relaxation.roundoff.here(layer))
    moves = radius > STILL * interval.size
    return Form(
        x, {layer.name: _diagonal(torch.where(moves, radius, 0.0))}, torch.where(moves, 0.0, radius), torch.zeros_like(x)
    )


def _bent(relaxation: Relaxation, layer: Layer, known: Mapping[str, Form]) -> Form:
    here, slack = relaxation.roundoff.here(layer), relaxation.slack[layer.name].expand(1, *layer.shape)
    zero, lines = torch.zeros_like(slack), _followed(relaxation, layer)
    if lines is None:  # then all that is known is the interval
        interval = relaxation.intervals[layer.name]
        width = (interval.radius * (1 + 4 * here) + 4 * here * interval.size).expand(1, *layer.shape)
        return Form(interval.middle.expand(1, *layer.shape), {layer.name: _diagonal(width)}, zero, zero)
    below = known[layer.connections[0].source]
    convex = lines.upper > 0  # then the line above is the chord; elsewhere the one below is, or both are the same
    slope = torch.where(convex, lines.upper_slope, lines.lower_slope)
    lower, upper = torch.where(convex, 0.0, lines.lower), torch.where(convex, lines.upper, 0.0)
    size = slope.abs() * (below.centre.abs() + below.linear + below.rest) + upper - lower
    width = (upper - lower) / 2 + slope.abs() * below.rest + slack + here * size
    alive = (slope != 0) | (upper > lower)  # the others are 0 but for rounding
    blocks = {name: block * slope for name, block in below.blocks.items()}
    blocks[layer.name] = _diagonal(torch.where(alive, width, 0.0))
    return Form(slope * below.centre + (lower + upper) / 2, blocks, torch.where(alive, 0.0, width), zero)


def _followed(relaxation: Relaxation, layer: Layer) -> Lines | None:
    """Return the lines of a nonlinearity that forms follow; None where they start anew."""
    lines = relaxation.lines[layer.name]
    plain = layer.connections[0].weight is None and isinstance(layer.nonlinearity, (Slopes, LearnedSlope))
    return lines if plain and isinstance(lines, Lines) else None


def symbols(relaxation: Relaxation, known: Mapping[str, Form]) -> Symbols:
    """Return the symbols that a linear bound may keep, see `substitution`.

    A convex nonlinearity is slope·(z − e) + upper/2 + width·ε, with e what the symbols of z leave over: besides what is
    paid at ε = 1 for the line above, e is paid, and that both sides are rounded.

    Args:
        relaxation: What is known of one sample.
        known: The forms of its layers.

    Returns:
        The symbols.
    """
    widths, losses = {}, {}
    for name, form in known.items():
        layer = relaxation.network.layer[name]
        lines = None if layer.nonlinearity is None else _followed(relaxation, layer)
        if layer.kind == "input" or lines is not None:
            widths[name] = form.blocks[name].sum(0, keepdim=True)
        if lines is not None:
            below, here = known[layer.connections[0].source], relaxation.roundoff.here(layer)
            size = lines.upper_slope.abs() * (below.centre.abs() + below.linear + below.rest) + lines.upper
            losses[name] = (lines.upper_slope.abs() * below.rest) * (1 + 4 * here) + here * size
    return Symbols(widths, losses, known)


def _affine(relaxation: Relaxation, layer: Layer, known: Mapping[str, Form]) -> Form:
    weights, here = relaxation.weights, relaxation.roundoff.here(layer)
    below = {connection.source: known[connection.source] for connection in layer.connections}
    centres = {name: form.centre for name, form in below.items()}
    centre = carried(layer, centres, weights.middles, biases=weights.middles)
    blocks = {}
    for name in dict.fromkeys(name for form in below.values() for name in form.blocks):
        count = next(len(form.blocks[name]) for form in below.values() if name in form.blocks)
        if count:
            values = {
                source: form.blocks.get(name, form.centre.new_zeros((count, *form.centre.shape[1:])))
                for source, form in below.items()
            }
            blocks[name] = carried(layer, values, weights.middles)
    mean = weights.centres.get(layer.name, 0.0)
    blocks |= _of_weights(relaxation, layer, {name: value - mean for name, value in centres.items()})
    linear = {name: form.linear for name, form in below.items()}
    rest = {name: form.rest for name, form in below.items()}
    reach = {name: form.reach(relaxation.intervals[name]) for name, form in below.items()}
    sizes = {name: (value - mean).abs() + linear[name] + rest[name] for name, value in centres.items()}
    # The centre, each generator and both rests are computed with a relative error; what the model rounds is in the slack.
    magnitude = carried(layer, linear, weights.sizes) + carried(layer, rest, weights.sizes) if below else 0.0
    magnitude = magnitude + carried(layer, sizes, weights.radii, biases=weights.radii, only_weighted=True)
    tiny = DOUBLE.least * (fan_in(relaxation.network)[layer.name] + SPARE) * (2 + sum(map(len, blocks.values())))
    rounded = relaxation.slack[layer.name].expand(1, *layer.shape) + (here * magnitude + tiny)
    left = carried(layer, rest, weights.sizes) + carried(layer, reach, weights.radii, only_weighted=True) if below else 0.0
    up = 1 + 4 * here
    return Form(centre, blocks, (left + rounded) * up, rounded * up)


def _of_weights(relaxation: Relaxation, layer: Layer, centres: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the generators of the layer's own weights and biases."""
    blocks, offset = {}, 0
    for position, connection in enumerate(layer.connections):
        shape = layer.shape if layer.concat is None else layer.concat.shape(position, layer.shape)
        if relaxation.weights.varies(connection.weight):
            block = _of_edges(relaxation, layer, connection, centres[connection.source], shape)
            if layer.concat is not None:
                whole = block.new_zeros((len(block), *layer.shape))
                whole.narrow(1 + layer.concat.dim, offset, layer.concat.sizes[position]).copy_(block)
                block = whole
            blocks[of_connection(layer, position)] = block
        offset += 0 if layer.concat is None else layer.concat.sizes[position]
    for position, bias in enumerate(layer.biases):
        radii = relaxation.weights.radii(bias.weight)
        if radii is not None:
            each = placed(bias, radii)
            block = torch.diag(each.flatten()).reshape(-1, *[1] * (len(layer.shape) - each.dim()), *each.shape)
            blocks[of_bias(layer, position)] = block.expand(-1, *layer.shape)
    return blocks


def _of_edges(relaxation: Relaxation, layer: Layer, connection: Connection, centre: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the generators r_k·(Σ of u over the edges of k) of a weight, (symbols, *shape)."""
    assert connection.weight is not None
    weights = relaxation.weights
    if not may_be_shared(connection, layer):  # then all weights into a neuron together are one symbol
        return _diagonal(along(connection, centre.abs(), weights.radii(connection.weight)).expand(1, *shape))
    radius = weights.radius[connection.weight]
    assert radius is not None
    each = torch.eye(math.prod(shape), dtype=torch.float64, device=centre.device).reshape(1, -1, *shape)
    rows = max(1, ELEMENTS // max(centre.numel(), radius.numel()))  # each has a copy of what is below
    value = weights.middle[connection.weight]
    gathered = torch.cat([connection.edges.gathered(centre, value, part)[0] for part in each.split(rows, 1)]) * radius
    return gathered.reshape(len(gathered), -1).T.reshape(-1, *shape)
