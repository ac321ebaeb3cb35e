"""Lines below and above a nonlinearity on an interval [l, h], as CROWN draws them (Zhang et al., 2018; mathematics §5).

A piecewise linear function lies between lines of any slope once their constants are its smallest and largest distance from
them, which it takes at the ends and the corners. So slopes may be rounded as they like; only the constants have to be right.

An example: ReLU on [−1, 3]. Above the chord through both ends, 3/4·(z + 1); below z itself, as 3 ≥ 1 makes that the line with
the smaller area between (0 would hold as well). On [−3, 1] the line below is 0.

Slopes depend on the interval relative to its own width, so nothing changes when neurons are rescaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.graph.interval import Interval


@dataclass(frozen=True)
class Lines:
    """Lines below and above a nonlinearity: lower_slope·z + lower ≤ y ≤ upper_slope·z + upper, each (samples, *shape)."""

    lower_slope: Tensor
    lower: Tensor
    upper_slope: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Free:
    """Where the slope of the line below may be anything between two slopes, as below a ReLU whose sign is not known.

    Attributes:
        where: (samples, *shape) bool.
        least: Smallest slope.
        most: Largest slope.
    """

    where: Tensor
    least: Tensor
    most: Tensor


@dataclass(frozen=True)
class Choice:
    """Bounds of an extremum: the antecedent ``chosen`` below, slope·antecedent + upper above; for minima of −z.

    Attributes:
        chosen: Number of the antecedent, (samples, *shape).
        slope: Of the line above.
        upper: Constant of the line above.
    """

    chosen: Tensor
    slope: Tensor
    upper: Tensor


def slope_lines(z: Interval, plus: Tensor, minus: Tensor) -> Lines:
    """Lines around y = plus·z⁺ + minus·z⁻ on an interval: exact where the sign of z is known.

    Where it is not, y is convex if plus ≥ minus: the chord from (l, minus·l) to (h, plus·h) is above it, and below is a line
    through 0 with a slope between both, the one of the longer side. If plus < minus, above and below change places.

    Args:
        z: The interval.
        plus: The slope right of 0.
        minus: The slope left of 0.

    Returns:
        The lines.
    """
    low, high = z.low, z.high
    crossing = (low < 0) & (high > 0)
    width = torch.where(crossing, high - low, 1.0)
    known = torch.where(low >= 0, plus, minus)
    chord = torch.where(crossing, (plus * high - minus * low) / width, known)
    touch = torch.where(crossing, torch.where(high >= -low, plus, minus), known)
    # y − chord·z is (plus − chord)·h at h, (minus − chord)·l at l and 0 between: the same at both ends but for rounding.
    height = torch.where(crossing, torch.maximum((plus - chord) * high, (minus - chord) * low), 0.0)
    depth = torch.where(crossing, torch.minimum((plus - chord) * high, (minus - chord) * low), 0.0)
    convex = plus >= minus
    zero = torch.zeros_like(low)
    return Lines(
        torch.where(convex, touch, chord),
        torch.where(convex, zero, depth),
        torch.where(convex, chord, touch),
        torch.where(convex, height, zero),
    )


def clamp_lines(z: Interval, low: Tensor | None, high: Tensor | None) -> Lines:
    """Lines around y = min(max(z, low), high) on an interval."""
    left, right = z.low, z.high
    floor = torch.full_like(left, -math.inf) if low is None else low.to(left).expand(left.shape)
    roof = torch.full_like(left, math.inf) if high is None else high.to(left).expand(left.shape)
    floor = torch.minimum(floor, roof)  # torch.clamp gives the upper end where the ends are crossed
    y_left, y_right = left.clamp(floor, roof), right.clamp(floor, roof)
    under, over = left < floor, right > roof
    flat = y_left == y_right
    ones, zeros = torch.ones_like(left), torch.zeros_like(left)
    # Above: from (left, y_left) to the corner under the roof y is convex, so a chord is above it; beyond, y is flat and the
    # chord rises. Where nothing is below the floor y is concave: the identity or the roof, whichever part of the interval is
    # longer.
    corner = torch.minimum(right, roof)
    run = torch.where(corner > left, corner - left, 1.0)
    rise = torch.where(corner > left, (corner - y_left) / run, 0.0)
    concave = over & ~under
    upper_slope = torch.where(under, rise.clamp(0.0, 1.0), ones)
    upper_slope = torch.where(concave & (right - roof > roof - left), zeros, upper_slope)
    # Below: the same turned upside down, from the corner on the floor to (right, y_right).
    base = torch.maximum(left, floor)
    run = torch.where(right > base, right - base, 1.0)
    rise = torch.where(right > base, (y_right - base) / run, 0.0)
    lower_slope = torch.where(over, rise.clamp(0.0, 1.0), ones)
    lower_slope = torch.where(under & ~over & (floor - left > right - floor), zeros, lower_slope)
    upper_slope, lower_slope = torch.where(flat, zeros, upper_slope), torch.where(flat, zeros, lower_slope)
    # Constants: y is piecewise linear, so y − slope·z has its extremes at the ends and the corners.
    points = [left, right, floor.clamp(left, right), roof.clamp(left, right)]
    gaps_up = torch.stack([at.clamp(floor, roof) - upper_slope * at for at in points])
    gaps_low = torch.stack([at.clamp(floor, roof) - lower_slope * at for at in points])
    return Lines(lower_slope, gaps_low.amin(0), upper_slope, gaps_up.amax(0))


def kink_gap(low: Tensor, high: Tensor, slope: Tensor, least: Tensor | float, most: Tensor | float) -> Tensor:
    """Tell how far a line of a free slope lies below a convex kink on [low, high] ∋ 0, roughly: to rank kinks.

    It touches at 0 and is off by (slope − least)·|low| at one end and by (most − slope)·high at the other: the smaller one
    is the price whatever side z is on, an eighth of the larger one tells kinks apart where that is 0.

    Args:
        low: Lower end.
        high: Upper end.
        slope: Of the line.
        least: Slope left of 0.
        most: Slope right of 0.

    Returns:
        Of the shape of all of them.
    """
    ends = (slope - least) * -low, (most - slope) * high
    return torch.maximum(torch.minimum(*ends), torch.maximum(*ends) / 8)
