"""Bounds on the path-metric by what both path-liftings share: Hellinger's affinity and those of higher order (§4)."""

from __future__ import annotations

from math import comb

import torch

from pathlift.metric.common_gauge import CommonGauge
from pathlift.metric.moments import OWN, Sides, characters
from pathlift.metric.quadrature import MARGIN, overlap_above, overlap_below
from pathlift.passes.characters import Affinities
from pathlift.passes.rounding import SPARE, rounding_factor


def affinity_bounds(pair: CommonGauge, order: int) -> Sides:
    """Bound the metric by affinities.

    With a = |Φ|, b = |Φ'| and σ the sign of ΦΦ', |Φ'−Φ| = a + b − (1+σ)·min(a, b), and min(a, b) = √(ab)·e^(−|ln(b/a)|/2). With
    n = ``order`` and y = (b/a)^(1/n) + (a/b)^(1/n) − 2, the moments Σ (1+σ)/2·√(ab)·y^j, j ≤ n/2, are sums of the affinities
    Σ a^(1−l/n)·b^(l/n), and 2·e^(−|ln(b/a)|/2) is a completely monotone function of y. Nothing depends on a gauge or on a g.

    Args:
        pair: The networks.
        order: n, even.

    Returns:
        The bounds per output neuron.
    """
    rounding = 1.01 * rounding_factor(pair.network, tracks=1, spare=SPARE + OWN * order)
    ((tensor, exponent),) = characters(pair, [Affinities(order, pair.flips)])
    sizes = tensor[: order + 1]
    shared = (sizes + tensor[order + 1 :]) / 2 if pair.flips else sizes
    norms = sizes[0] + sizes[order]
    half = order // 2
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
    least = torch.where(shared[half] > 0, (overlap_below(order, moments) * unit).clamp(min=0.0), 0.0)
    slack = (rounding + 4 * MARGIN) * norms
    upper = torch.log2((norms - least + slack).clamp(min=0.0)) + exponent
    lower = torch.log2((norms - common - slack).clamp(min=0.0)) + exponent
    most = torch.log2(norms + slack) + exponent
    return Sides(f"{order} affinities", lower, torch.minimum(upper, most), most)
