"""From sums over paths to bounds: polynomials that lie on one side of a function everywhere (mathematics §4).

If p(s) ≥ f(s) for all s ≥ 0, then ∫p dμ ≥ ∫f dμ for every measure μ, and ∫p dμ is known from the moments of μ. The classical
moment problem says which p are best: those that touch f at the nodes of Gauss quadrature (upper end for √s), or at its nodes
for s·dμ and at 0 (lower end). Here the polynomials are written down for any nodes, in divided differences without
subtractions, so that a bound holds whatever the nodes are: where the moment matrix is singular, or its entries are only
known to lie in an interval, nodes may be poor, but never the bound wrong. Everything is vectorised over measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

MARGIN = 1e-9
"""What evaluating a polynomial may lose to rounding, relative to the sum of the magnitudes of its terms (outward)."""

Intervals = Sequence["tuple[Tensor, Tensor]"]
"""Moments of increasing order: lower and upper end of each."""


def _at_most(newton: Sequence[Tensor], nodes: Sequence[Tensor], moments: Intervals, sign: float = 1.0) -> Tensor:
    """Return an upper bound on the integral of ± the polynomial Σ_i newton_i·Π_{j<i}(s − nodes_j).

    Coefficients by powers of s may be small differences of large numbers; what they lose to rounding is a part of the sum of
    the magnitudes of what they are made of.
    """
    terms = [
        torch.maximum(sign * c * low, sign * c * high) for c, (low, high) in zip(_expanded(newton, nodes), moments, strict=True)
    ]
    parts = _expanded([c.abs() for c in newton], [-node.abs() for node in nodes])
    sizes = [c * high.abs() for c, (_, high) in zip(parts, moments, strict=True)]
    return sum(terms, torch.zeros_like(terms[0])) + MARGIN * sum(sizes, torch.zeros_like(terms[0]))


def _expanded(newton: Sequence[Tensor], roots: Sequence[Tensor]) -> list[Tensor]:
    """Return the coefficients by powers of Σ_i newton_i·Π_{j<i}(s − roots_j)."""
    coefficients = [newton[-1]]
    for value, root in zip(reversed(newton[:-1]), reversed(roots[: len(newton) - 1]), strict=True):
        shifted = [torch.zeros_like(value), *coefficients]
        lowered = [c * root for c in coefficients]
        coefficients = [up - down for up, down in zip(shifted, [*lowered, torch.zeros_like(value)], strict=True)]
        coefficients[0] = coefficients[0] + value
    return coefficients


def two_nodes(moments: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the nodes of Gauss quadrature for four moments; some positive numbers where there are no such nodes.

    Args:
        moments: μ_0 … μ_3.

    Returns:
        The smaller and the larger node.
    """
    m0, m1, m2, m3 = moments
    mean = m1 / m0
    a, b, c = m0 * m2 - m1 * m1, m1 * m2 - m0 * m3, m1 * m3 - m2 * m2
    root = torch.sqrt((b * b - 4 * a * c).clamp(min=0.0))
    large = (root - b) / (2 * a)
    small = 2 * c / (root - b)  # the product of the roots is c/a
    good = (small > 0) & (large > 0) & torch.isfinite(small) & torch.isfinite(large)
    small, large = torch.where(good, small, mean), torch.where(good, large, mean)
    return torch.minimum(small, large), torch.maximum(small, large)


def root_above(moments: Intervals) -> Tensor:
    """Bound ∫√s dμ from above.

    With one node t² the tangent t/2 + s/(2t) lies above √s; the best is √(μ_0·μ_1), Cauchy–Schwarz. With two nodes, the
    cubic that touches √s at both lies above it because (√s)'''' < 0.

    Args:
        moments: μ_0, μ_1 and, if known, μ_2, μ_3.

    Returns:
        The bound, one per measure.
    """
    first = torch.sqrt(moments[0][1]) * torch.sqrt(moments[1][1]) * (1.0 + MARGIN)
    if len(moments) < 4:
        return first
    middle = [(low + high) / 2 for low, high in moments[:4]]
    bounds = [first]
    for s, r in permutations(two_nodes(middle)):
        t, u = torch.sqrt(s), torch.sqrt(r)
        newton = [t, 0.5 / t, -0.5 / (t * (t + u) ** 2), 0.5 / (t * u * (t + u) ** 3)]
        bounds.append(_at_most(newton, [s, s, r], moments[:4]))
    return _least(bounds)


def root_below(moments: Intervals) -> Tensor:
    """Bound ∫√s dμ from below.

    √s = s·s^(−1/2), and h with h(s) ≤ s^(−1/2) gives the bound ∫s·h(s) dμ. With one node h is the tangent; the best is
    μ_1^(3/2)·μ_2^(−1/2), Hölder. With two, h is the cubic that touches s^(−1/2) at both.

    Args:
        moments: μ_1, μ_2 and, if known, μ_3, μ_4.

    Returns:
        The bound, one per measure.
    """
    (low, _), (_, high) = moments[:2]
    first = torch.where(low > 0, low * torch.sqrt(low / high), 0.0) * (1.0 - MARGIN)
    if len(moments) < 4:
        return first
    middle = [(below + above) / 2 for below, above in moments[:4]]
    bounds = [-first]
    for s, r in permutations(two_nodes(middle)):
        t, u = torch.sqrt(s), torch.sqrt(r)
        newton = [
            1 / t,
            -0.5 / t**3,
            (u + 2 * t) / (2 * t**3 * u * (t + u) ** 2),
            -(t * t + 3 * t * u + u * u) / (2 * t**3 * u**3 * (t + u) ** 3),
        ]
        bounds.append(_at_most(newton, [s, s, r], moments[:4], -1.0))
    return (-_least(bounds)).clamp(min=0.0)


def _least(bounds: Sequence[Tensor]) -> Tensor:
    """Return the smallest of several bounds; what is not a number is no bound."""
    return torch.stack([torch.nan_to_num(bound, nan=torch.inf) for bound in bounds]).amin(0)


def overlap_above(order: int, moments: Intervals) -> Tensor:
    """Bound ∫h dν from above, h(y) = 2e^(−order·v/2) with y = 4 sinh²(v/2): twice what two path-liftings share.

    h is completely monotone in y. The polynomial of degree 2m that meets h at 0 and touches it at m nodes lies above it.

    Args:
        order: Of the affinities, even.
        moments: ν_0 … ν_{order/2}.

    Returns:
        The bound, one per measure.
    """
    bounds = [2.0 * moments[0][1] * (1.0 + MARGIN)]
    middle = [(low + high) / 2 for low, high in moments]
    zero = torch.zeros_like(middle[0])
    if len(moments) >= 3:
        y = _apart(middle[2] / middle[1], zero)
        bounds.append(_at_most(*_touching(order, [zero, y, y]), moments[:3]))
    if len(moments) >= 5:
        small, large = two_nodes(middle[1:5])
        small = _apart(small, zero)
        large = _apart(large, small)
        bounds.append(_at_most(*_touching(order, [zero, small, small, large, large]), moments[:5]))
    return _least(bounds)


def overlap_below(order: int, moments: Intervals) -> Tensor:
    """Bound ∫h dν from below; see `overlap_above`. Polynomials that touch h at every node lie below it.

    Args:
        order: Of the affinities, even.
        moments: ν_0 … ν_{order/2}.

    Returns:
        The bound, one per measure.
    """
    middle = [(low + high) / 2 for low, high in moments]
    zero = torch.zeros_like(middle[0])
    bounds = [zero]
    y = _apart(middle[1] / middle[0], zero)
    bounds.append(_at_most(*_touching(order, [y, y]), moments[:2], -1.0))
    if len(moments) >= 4:
        small, large = two_nodes(middle[:4])
        small = _apart(small, zero)
        large = _apart(large, small)
        bounds.append(_at_most(*_touching(order, [small, small, large, large]), moments[:4], -1.0))
    return -_least(bounds)


NEAREST = 1e-6
"""The least node other than 0, and …"""

RATIO = 1.25
"""… the least ratio of two nodes: divided differences of h are taken by subtraction."""


def _apart(node: Tensor, lower: Tensor) -> Tensor:
    """Move a node away from the one below it."""
    node = torch.nan_to_num(node, nan=1.0, posinf=1e30).clamp(NEAREST, 1e30)
    return torch.maximum(node, lower * RATIO)


def _touching(order: int, nodes: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Return the polynomial that meets h at the nodes, twice at those that stand twice, in Newton's form."""
    table = [_overlap(order, y) for y in nodes]
    newton = [table[0]]
    for width in range(1, len(nodes)):
        table = [
            _slope(order, nodes[i])
            if width == 1 and nodes[i] is nodes[i + 1]
            else (table[i + 1] - table[i]) / (nodes[i + width] - nodes[i])
            for i in range(len(table) - 1)
        ]
        newton.append(table[0])
    return newton, nodes


def _overlap(order: int, y: Tensor) -> Tensor:
    return 2.0 * torch.exp(-order * torch.asinh(torch.sqrt(y) / 2))


def _slope(order: int, y: Tensor) -> Tensor:
    """dh/dy: v' = 1/√(y(y+4))."""
    return -order / 2 * _overlap(order, y) / torch.sqrt(y * (y + 4))
