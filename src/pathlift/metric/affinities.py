"""Bounds on the path-metric by what both path-liftings share: Hellinger's affinity and those of higher order (§4)."""

from __future__ import annotations

from enum import Enum
from math import comb

import torch
from torch import Tensor

from pathlift.metric.common_gauge import CommonGauge
from pathlift.metric.moments import Sides, characters
from pathlift.metric.quadrature import MARGIN, overlap_above, overlap_below
from pathlift.passes.characters import Affinities
from pathlift.passes.rounding import SPARE, rounding_factor

OWN = 6
"""Roundings that an affinity of order n makes at each weight, over n: each of up to n quotients of roots is off by 4.5, and is
multiplied once."""


class Signs(Enum):
    """How closely the paths are looked at whose sign is another one in θ'.

    ALL: by all affinities, once more with signs. MIDDLE: by the middle one alone. These paths share nothing, so what they seem
    to share, 2·min(|Φ|, |Φ'|) ≤ 2·√|ΦΦ'|, is taken off. It is little where networks are near, and where they share little.
    """

    ALL = 0
    MIDDLE = 1


def family_of(pair: CommonGauge, order: int, signs: Signs) -> Affinities:
    """Return the affinities that are summed.

    Args:
        pair: The networks.
        order: n, even.
        signs: Which of them with signs, where there are any.

    Returns:
        They.
    """
    half = order // 2
    signed = range(order + 1) if signs is Signs.ALL else range(half, half + 1)
    return Affinities(order, signed if pair.flips else range(0))


def affinity_bounds(pair: CommonGauge, order: int, signs: Signs = Signs.ALL) -> Sides:
    """Bound the metric by affinities.

    With a = |Φ|, b = |Φ'| and σ the sign of ΦΦ', |Φ'−Φ| = a + b − (1+σ)·min(a, b), and min(a, b) = √(ab)·e^(−|ln(b/a)|/2). With
    n = ``order`` and y = (b/a)^(1/n) + (a/b)^(1/n) − 2, the moments Σ (1+σ)/2·√(ab)·y^j, j ≤ n/2, are sums of the affinities
    Σ a^(1−l/n)·b^(l/n), and 2·e^(−|ln(b/a)|/2) is a completely monotone function of y. Nothing depends on a gauge or on a g.

    Args:
        pair: The networks.
        order: n, even.
        signs: How closely paths of other signs are looked at.

    Returns:
        The bounds per output neuron.
    """
    family = family_of(pair, order, signs)
    ((tensor, exponent),) = characters(pair, [family])
    return sides_of(family, tensor, exponent, affinity_rounding(pair, order))


def affinity_rounding(pair: CommonGauge, order: int) -> float:
    """Return by what part of itself a sum of affinities may be off."""
    return 1.01 * rounding_factor(pair.network, tracks=1, spare=SPARE + OWN * order)


def sides_of(family: Affinities, tensor: Tensor, exponent: float, rounding: float) -> Sides:
    """Make bounds from sums of affinities; see `affinity_bounds`.

    Args:
        family: The affinities.
        tensor: Their sums, (affinities, output neurons).
        exponent: Of their unit.
        rounding: By what part of itself each may be off.

    Returns:
        The bounds per output neuron.
    """
    order, half = family.order, family.order // 2
    sizes, signed = tensor[: order + 1], tensor[order + 1 :]
    shared, unshared = sizes, torch.zeros_like(sizes[0])
    if len(signed) > 1:
        shared = (sizes + signed) / 2
    elif len(signed):
        unshared = (sizes[half] - signed[0] + 2 * rounding * sizes[half]).clamp(min=0.0)
    norms = sizes[0] + sizes[order]
    unit = torch.where(shared[half] > 0, shared[half], 1.0)
    moments = []
    for j in range(half + 1):
        signs = [comb(2 * j, i) * (-1.0) ** i for i in range(2 * j + 1)]
        middle = sum((sign * shared[half + i - j] for i, sign in enumerate(signs)), torch.zeros_like(unit))
        error = rounding * sum((abs(sign) * sizes[half + i - j] for i, sign in enumerate(signs)), torch.zeros_like(unit))
        low, high = (middle - error).clamp(min=0.0) / unit, (middle + error).clamp(min=0.0) / unit
        moments.append((low * (1 - MARGIN), high * (1 + MARGIN)))
    common = torch.minimum(overlap_above(order, moments) * unit, 2 * torch.minimum(sizes[0], sizes[order]))
    common = torch.where(moments[0][1] > 0, common, 0.0)
    least = torch.where(shared[half] > 0, (overlap_below(order, moments) * unit - unshared).clamp(min=0.0), 0.0)
    slack = (rounding + 4 * MARGIN) * norms
    upper = torch.log2((norms - least + slack).clamp(min=0.0)) + exponent
    lower = torch.log2((norms - common - slack).clamp(min=0.0)) + exponent
    most = torch.log2(norms + slack) + exponent
    return Sides(f"{order} affinities", lower, torch.minimum(upper, most), most)


def expected_ratio(pair: CommonGauge, order: int, by_model: Tensor) -> float:
    """Return upper over lower bound by affinities as a model expects it, before any pass is spent.

    Args:
        pair: The networks.
        order: n, even.
        by_model: Sums of the affinities of order n by the model, and of the middle one with signs, (n + 2).

    Returns:
        The ratio; inf where the lower bound would be 0.
    """
    family = family_of(pair, order, Signs.MIDDLE)
    sides = sides_of(family, by_model[: family.count, None], 0.0, affinity_rounding(pair, order))
    return float(torch.exp2(sides.upper - sides.lower))
