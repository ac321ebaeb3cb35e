"""The choice of g for the moment sandwich: g = max(|θ|, |θ'|) + c·|θ'−θ| + e, with c and e by layer (SPEC §4).

Both bounds are exact where g is proportional to |Φ'−Φ| path by path; the ratio of the bounds of four moments is
(M_0·M_4)^(1/2)/M_2. Before any pass is spent, c and e are chosen by a model of these sums: as if every path took one weight of
each layer, all weights alike. Then the characters that M_0, M_2 and M_4 are made of are products over the layers of means, and
sweeps over the layers find the candidates for which the model of the ratio is smallest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.network import Leaf
from pathlift.passes.programs import pivot
from pathlift.sandwich.frame import Frame

CANDIDATES = tuple((c, e) for c in (0.0, 0.3, 1.0, 3.0, 10.0) for e in (0.001, 0.01, 0.03, 0.1, 0.3, 1.0))
"""(c, e in units of the mean of |θ|)."""

SWEEPS = 4

GAIN = 1e-3
"""The least relative gain of a change."""

SAME = 1e-9
"""Differences of this size are those of a rescaling's rounding: there g is |θ| but for so much, as where nothing differs."""

TIE = 1e-6
"""Candidates that differ by less are equal: rounding must not choose between them."""

START = CANDIDATES.index((0.0, 0.1))

SIGNS = torch.tensor([1.0, -2.0, 1.0, 1.0, -4.0, 6.0, -4.0, 1.0], dtype=torch.float64)
"""Binomial coefficients of (Φ'−Φ)² and (Φ'−Φ)⁴."""


@dataclass(frozen=True)
class Mixture:
    """g by formula.

    Attributes:
        terms: c and e of each leaf whose weights differ.
        likeness: The cosine of Φ(θ) and Φ(θ') by the same model: the product over the layers of the cosines of their weights.
        lopsided: |‖Φ‖₁ − ‖Φ'‖₁| relative to the sum of their distances from the pivot, by the same model.
    """

    terms: Mapping[Leaf, tuple[float, float]]
    likeness: float
    lopsided: float

    def extras(self, leaf: Leaf) -> tuple[Tensor, ...]:
        """See `pathlift.passes.joint.Reference`."""
        del leaf
        return ()

    def __call__(self, leaf: Leaf, a: Tensor, b: Tensor, *extras: Tensor) -> Tensor:
        """Return g for weights θ and θ' of a leaf: 0 where both are 0, positive elsewhere."""
        del extras
        c, e = self.terms[leaf]
        return _mixture(a, b, c, e)


def _mixture(a: Tensor, b: Tensor, c: float, e: float) -> Tensor:
    most = torch.maximum(a.abs(), b.abs())
    g = most + e
    if c:
        g = g + c * (b - a).abs()
    return torch.where(most > 0, g, 0.0)


def chosen(pair: Frame) -> Mixture:
    """Choose g for two networks.

    Args:
        pair: The networks in one gauge.

    Returns:
        g.
    """
    edges = {term.weight for node in pair.network.nodes for term in node.terms}
    tables: dict[Leaf, Tensor] = {}
    still: set[Leaf] = set()
    likeness, other, common = 1.0, 1.0, 1.0  # ‖Φ'‖₁ and the path-norm of the pivot, in units of ‖Φ‖₁
    means: dict[Leaf, float] = {}
    for leaf in pair.network.leaves:
        if leaf in pair.changed:
            a, b = pair.sample(leaf)
            means[leaf] = float(torch.maximum(a.abs(), b.abs()).mean()) or 1.0
            if float((b - a).abs().amax()) <= SAME * means[leaf]:
                still.add(leaf)
            elif leaf in edges:
                tables[leaf] = _table(a, b, means[leaf])
                likeness *= float(torch.nan_to_num((a @ b) / (a.norm() * b.norm())))
                mine, theirs, shared = (float(own.sum()) for own in (a.abs(), b.abs(), pivot(a, b)))
                other, common = (0.0, 0.0) if mine == 0 else (other * theirs / mine, common * shared / mine)
    choice = _swept(list(tables.values()))
    picked = dict(zip(tables, choice, strict=True))
    usual = max(set(choice), key=choice.count) if choice else START
    terms = {}
    for leaf, mean in means.items():
        c, e = CANDIDATES[picked.get(leaf, usual)]
        terms[leaf] = (0.0, SAME * mean) if leaf in still else (c, e * mean)
    apart = 1 + other - 2 * common
    return Mixture(terms, likeness, abs(1 - other) / apart if apart > 0 else 1.0)


def _table(a: Tensor, b: Tensor, mean: float) -> Tensor:
    """Return the mean over the weights of each character of M_0, M_2 and M_4, for each candidate: (candidates, 9), CPU."""
    there = (a != 0) | (b != 0)
    a, b = a[there] / mean, b[there] / mean
    c, e = torch.tensor(CANDIDATES, dtype=a.dtype, device=a.device).T[:, :, None]
    g = torch.maximum(a.abs(), b.abs()) + c * (b - a).abs() + e
    products = [a**i * b ** (k - i) for k in (2, 4) for i in range(k + 1)]
    second, fourth = (1 / g) @ torch.stack(products[:3], 1), (1 / g**3) @ torch.stack(products[3:], 1)
    return torch.cat([g.sum(1, keepdim=True), second, fourth], 1).cpu() / max(len(a), 1)


def _swept(tables: list[Tensor]) -> list[int]:
    """Return the candidate of each layer that makes the model of M_0·M_4/M_2² smallest, by coordinate descent."""
    choice = [START] * len(tables)
    one = torch.ones(9, dtype=torch.float64)
    for _ in range(SWEEPS if tables else 0):
        before = list(choice)
        above = [one]  # products over the layers that come later
        for table, own in zip(reversed(tables), reversed(choice), strict=True):
            above.append(_relative(above[-1] * table[own]))
        below = one
        for place, table in enumerate(tables):
            sums = (table * _relative(below * above[len(tables) - place - 1])).T
            second, fourth = (SIGNS[:3] @ sums[1:4]).clamp(min=0.0), (SIGNS[3:] @ sums[4:]).clamp(min=0.0)
            loose = torch.nan_to_num(sums[0] * fourth / second**2, nan=torch.inf)
            found = int((loose <= loose.min() * (1 + TIE)).nonzero()[0])
            if float(loose[found]) < float(loose[choice[place]]) * (1 - GAIN):
                choice[place] = found
            below = _relative(below * table[choice[place]])
        if choice == before:
            break
    return choice


def _relative(sums: Tensor) -> Tensor:
    """Divide by the first, and the characters of M_4 accordingly: g may be multiplied by any number."""
    return sums / sums[0]
