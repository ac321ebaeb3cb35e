"""Nonlinearities, forwards: the interval of what they give, and a line below and a line above it (mathematics §5).

The lines hold on a slightly wider interval than that of z: it is widened by a relative 2⁻⁴⁰, so that slopes, which are
quotients of differences, may be rounded (2⁻⁵³) without a line cutting the function at an end. Constants of lines are taken at
the corners for the slope as it was rounded; what is left is a few roundings of |lower| + |upper| + |z|, which go into the
slack.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pathlift.graph.interval import Interval
from pathlift.graph.layers import Clamp, Extremum, Layer, LearnedSlope, Slopes
from pathlift.passes.enclosure.lines import Choice, Free, clamp_lines, slope_lines
from pathlift.passes.enclosure.relaxation import Relaxation
from pathlift.passes.forward import along, antecedents, clamped, ends, placed

WIDEN = 2.0**-40
"""Relative widening of the intervals between which lines are drawn."""

TINY = torch.finfo(torch.float64).tiny


def nonlinear_interval(relaxation: Relaxation, layer: Layer) -> Interval:
    """Return the interval of a layer with a nonlinearity, and write down its lines and its slack.

    Args:
        relaxation: What is known of the layers below.
        layer: The layer.

    Returns:
        The interval.
    """
    if isinstance(layer.nonlinearity, Extremum):
        return _extremum(relaxation, layer, layer.nonlinearity)
    source = relaxation.intervals[layer.connections[0].source]
    factor = gain(layer)
    spare = WIDEN * source.size * factor + TINY
    z = Interval(source.low * factor - spare, source.high * factor + spare)
    if isinstance(layer.nonlinearity, Clamp):
        return _clamp(relaxation, layer, z)
    return _slopes(relaxation, layer, z, plain=factor == 1.0)


def gain(layer: Layer) -> float:
    """Return the positive number that brings slopes of more than 1 to at most 1.

    Args:
        layer: A layer whose nonlinearity reads one layer.

    Returns:
        The number, 1 for most layers.
    """
    weight = layer.connections[0].weight
    return 1.0 if weight is None else float(weight.scalar or 0.0)


def _slopes(relaxation: Relaxation, layer: Layer, z: Interval, *, plain: bool) -> Interval:
    """Y = plus·z⁺ + minus·z⁻: its extremes are at 0 or at the ends."""
    roundoff = relaxation.roundoff
    plus, minus, varies = _both_slopes(relaxation, layer, z)
    lines = slope_lines(z, plus, minus)
    relaxation.lines[layer.name] = lines
    crossing = (z.low < 0) & (z.high > 0) & (plus >= minus)
    if bool(crossing.any()):
        relaxation.free[layer.name] = Free(crossing, minus.expand(crossing.shape), plus.expand(crossing.shape))
    exact = isinstance(layer.nonlinearity, Slopes) and {layer.nonlinearity.plus, layer.nonlinearity.minus} <= {0.0, 1.0, -1.0}
    rounding = 0.0 if exact and plain else roundoff.model_bend(layer) * z.size
    error = roundoff.here(layer) * (lines.lower.abs() + lines.upper.abs() + z.size)
    slack = relaxation.slack[layer.name] = varies + rounding + error + roundoff.underflow_of_bend(layer)
    return _between(z, lambda at: plus * at.clamp(min=0.0) + minus * at.clamp(max=0.0), slack)


def _between(z: Interval, function: Callable[[Tensor], Tensor], slack: Tensor) -> Interval:
    """Return the range of a function that has its extremes at 0 or the ends."""
    values = [function(z.low), function(z.high), function(torch.zeros_like(z.low).clamp(z.low, z.high))]
    low, high = torch.stack(values).amin(0), torch.stack(values).amax(0)
    return Interval(low - slack, high + slack)


def _both_slopes(relaxation: Relaxation, layer: Layer, z: Interval) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return both slopes, and what a learned one c + δ can add with z⁻ ≤ depth: |δ|·z⁻ ≤ r·depth, and ε·(|c| + r)·depth."""
    kind = layer.nonlinearity
    if isinstance(kind, Slopes):
        return z.low.new_tensor(kind.plus), z.low.new_tensor(kind.minus), 0.0
    assert isinstance(kind, LearnedSlope)
    connection = layer.connections[1]
    assert connection.weight is not None
    ones, depth = torch.ones_like(z.low), (-z.low).clamp(min=0.0)
    minus = along(connection, ones, relaxation.weights.middles(connection.weight))
    radii = relaxation.weights.radii(connection.weight)
    radius = torch.zeros_like(minus) if radii is None else along(connection, ones, radii)
    rounding = relaxation.roundoff.model_bend(layer) * (minus.abs() + radius)
    return z.low.new_ones(()), minus, (radius + rounding) * depth


def _clamp(relaxation: Relaxation, layer: Layer, z: Interval) -> Interval:
    """Y = min(max(z, low), high) is monotone in z, and moves by no more than the ends that move and are rounded."""
    roundoff = relaxation.roundoff
    low, high = ends(layer, relaxation.weights.middles)
    varies = rounded = z.low.new_zeros(())
    for end in ends(layer, relaxation.weights.radii):
        varies = varies if end is None else torch.maximum(varies, end.to(z.low))
    lines = clamp_lines(z, low, high)
    relaxation.lines[layer.name] = lines
    for end in (low, high):
        rounded = rounded if end is None else torch.maximum(rounded, end.abs().to(z.low))
    error = roundoff.here(layer) * (lines.lower.abs() + lines.upper.abs() + z.size) + roundoff.model_bend(layer) * rounded
    slack = relaxation.slack[layer.name] = varies + error + roundoff.underflow_of_bend(layer)
    return Interval(clamped(z.low, low, high) - slack, clamped(z.high, low, high) + slack)


def _extremum(relaxation: Relaxation, layer: Layer, kind: Extremum) -> Interval:
    """Y = max_i z_i with z_i in [l_i, h_i]; a minimum is the maximum of −z_i, turned back at the end.

    Below: y ≥ z_c for the antecedent c with the largest l_i, whatever the others do. Above, with H the largest h_i of the
    others: H ≤ l_c makes y = z_c, exactly. Otherwise y ≤ max(z_c, H), which is convex in z_c, so the chord over [l_c, h_c] lies
    above it: from (l_c, H) to (h_c, max(h_c, H)).

    An example: z₁ in [1, 3], z₂ in [0, 2]. c = 1, y ≥ z₁, and above the chord from (1, 2) to (3, 3): y ≤ z₁/2 + 3/2.

    Args:
        relaxation: What is known of the layers below.
        layer: The layer.
        kind: Largest or smallest.

    Returns:
        The interval.
    """
    first, second = ("low", "high") if kind.largest else ("high", "low")
    bounds = [_antecedent_ends(relaxation, layer, kind, end) for end in (first, second)]
    least, most = bounds
    bottom, chosen = least.max(1)
    chosen_top = most.gather(1, chosen.unsqueeze(1)).squeeze(1)
    others_top = most.scatter(1, chosen.unsqueeze(1), -math.inf).amax(1)
    contested = others_top > bottom
    width = (chosen_top - bottom).clamp(min=TINY)
    slope = torch.where(contested, ((chosen_top - others_top).clamp(min=0.0) / width).clamp(max=1.0), 1.0)
    upper = torch.where(contested, torch.maximum(others_top - slope * bottom, chosen_top - slope * chosen_top), 0.0)
    upper = upper + torch.where(contested, WIDEN * (others_top.abs() + chosen_top.abs() + bottom.abs()), 0.0)
    relaxation.lines[layer.name] = Choice(chosen, slope, upper)
    underflow = relaxation.roundoff.underflow_of_bend(layer)
    relaxation.slack[layer.name] = relaxation.roundoff.here(layer) * upper.abs() + underflow
    top, bottom = torch.maximum(chosen_top, others_top) + underflow, bottom - underflow
    return Interval(bottom, top) if kind.largest else Interval(-top, -bottom)


def _antecedent_ends(relaxation: Relaxation, layer: Layer, kind: Extremum, end: str) -> Tensor:
    """Return one end of the interval of every antecedent, (samples, antecedents, *shape), with the sign turned for minima."""
    below = {connection.source: getattr(relaxation.intervals[connection.source], end) for connection in layer.connections}
    biases = []
    for bias in layer.biases:
        middle, radius = relaxation.weights.middles(bias.weight), relaxation.weights.radii(bias.weight)
        value = placed(bias, middle)
        outwards = -1.0 if end == "low" else 1.0
        biases.append(value if radius is None else value + outwards * placed(bias, radius))
    return relaxation.for_all(antecedents(layer, below, biases, kind))
