"""The choice of g for the moment sandwich: g = max(|θ|, |θ'|) + c·|θ'−θ| + e, with c and e by layer (SPEC §4).

The upper bound (M_0·M_2)^(1/2) is smallest where g is proportional to |Φ'−Φ| path by path. Before any pass is spent, c and e
are chosen by a model of the sums: as if every path took one weight of each layer, all weights alike. Then M_0 and the three
characters of M_2 are products over the layers of means, and a sweep over the layers finds the candidates of the smallest M_0·M_2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.network import Leaf
from pathlift.sandwich.frame import Frame

CANDIDATES = tuple((c, e) for c in (0.0, 0.3, 1.0, 3.0, 10.0) for e in (0.001, 0.01, 0.03, 0.1, 0.3, 1.0))
"""(c, e in units of the mean of |θ|)."""

SWEEPS = 4


@dataclass(frozen=True)
class Mixture:
    """g by formula.

    Attributes:
        terms: c and e of each leaf whose weights differ.
    """

    terms: Mapping[Leaf, tuple[float, float]]

    def __call__(self, leaf: Leaf, a: Tensor, b: Tensor) -> Tensor:
        """Return g for weights θ and θ' of a leaf: 0 where both are 0, positive elsewhere."""
        c, e = self.terms[leaf]
        return _mixture(a, b, c, e)


def _mixture(a: Tensor, b: Tensor, c: float, e: float) -> Tensor:
    most = torch.maximum(a.abs(), b.abs())
    g = most + e
    if c:
        g = g.add_((b - a).abs_(), alpha=c)
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
    means: dict[Leaf, float] = {}
    for leaf in pair.network.leaves:
        if leaf in pair.changed:
            a, b = pair.sample(leaf)
            means[leaf] = float(torch.maximum(a.abs(), b.abs()).mean()) or 1.0
            if leaf in edges:
                tables[leaf] = _table(a, b, means[leaf])
    choice = _swept(list(tables.values()))
    picked = dict(zip(tables, choice, strict=True))
    usual = max(set(choice), key=choice.count) if choice else CANDIDATES.index((0.0, 0.1))
    terms = {}
    for leaf, mean in means.items():
        c, e = CANDIDATES[picked.get(leaf, usual)]
        terms[leaf] = (c, e * mean)
    return Mixture(terms)


def _table(a: Tensor, b: Tensor, mean: float) -> Tensor:
    """Return the means of g, θ²/g, θθ'/g, θ'²/g for each candidate, relative to the mean magnitude: (candidates, 4), CPU."""
    there = (a != 0) | (b != 0)
    a, b = a[there] / mean, b[there] / mean
    rows = []
    for c, e in CANDIDATES:
        g = _mixture(a, b, c, e)
        rows.append(torch.stack([g.mean(), (a * a / g).mean(), (a * b / g).mean(), (b * b / g).mean()]))
    return torch.stack(rows).cpu()


def _swept(tables: list[Tensor]) -> list[int]:
    """Return the candidate of each layer that makes the model of M_0·M_2 smallest, by coordinate descent."""
    choice = [CANDIDATES.index((0.0, 0.1))] * len(tables)
    if not tables:
        return choice
    for _ in range(SWEEPS):
        before = list(choice)
        for place, table in enumerate(tables):
            rest = torch.ones(4, dtype=torch.float64)
            for other, own in enumerate(tables):
                if other != place:
                    rest = rest * own[choice[other]]
                    rest = rest / rest[0]  # M_0·M_2 changes by a factor that is the same for all candidates
            m0, m20, m11, m02 = (table * rest).T
            product = m0 * (m20 - 2 * m11 + m02)
            found = int(product.argmin())
            if float(product[found]) < float(product[choice[place]]):
                choice[place] = found
        if choice == before:
            break
    return choice
