"""The choice of g for the moment sandwich: g = f·(max(|θ|, |θ'|) + c·|θ'−θ| + e), with c, e and f by layer (SPEC §4).

Both bounds are exact where g is proportional to |Φ'−Φ| path by path; the ratio of the bounds of four moments is
(M_0·M_4)^(1/2)/M_2. Before any pass is spent, c and e are chosen by a model of these sums: as if every path took one weight of
each layer, all weights alike. Then the characters that M_0, M_2 and M_4 are made of are products over the layers of means, and
sweeps over the layers find the candidates for which the model of the ratio is smallest.

Paths that start at a bias may differ far more, or less, than those that start at an input: f of a bias is the quotient of both
by the same model, so that |Φ'−Φ|/Φ(g) is alike. For weights of edges f is 1: it would change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.graph.layers import WeightTensor
from pathlift.metric.common_gauge import Frame
from pathlift.passes.programs import pivot

CANDIDATES = tuple(
    (c, e) for c in (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0) for e in (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
)
"""(c, e in units of the mean of |θ|)."""

SWEEPS = 4

GAIN = 1e-3
"""The least relative gain of a change."""

SAME = 1e-9
"""Differences of this size are those of a rescaling's rounding: there g is |θ| but for so much, as where nothing differs."""

TIE = 1e-6
"""Candidates that differ by less are equal: rounding must not choose between them."""

START = CANDIDATES.index((0.0, 0.1))

SIGNS = torch.tensor([1.0, -2.0, 1.0, 1.0, -4.0, 6.0, -4.0, 1.0], dtype=torch.float64, device="cpu")
"""Binomial coefficients of (Φ'−Φ)² and (Φ'−Φ)⁴."""


@dataclass(frozen=True)
class Mixture:
    """g by formula.

    Attributes:
        mixtures: c, e and f of each weight tensor whose weights are compared one by one.
        likeness: The cosine of Φ(θ) and Φ(θ') by the same model: the product over the layers of the cosines of their weights.
        lopsided: |‖Φ‖₁ − ‖Φ'‖₁| relative to the sum of their distances from the pivot, by the same model.
    """

    mixtures: Mapping[WeightTensor, tuple[float, float, float]]
    likeness: float
    lopsided: float

    @property
    def covered(self) -> float:
        """A number such that |Φ_p| and |Φ'_p| are at most so many times Φ_p(g), for every path."""
        return max(1.0, *(1 / f for _, _, f in self.mixtures.values())) if self.mixtures else 1.0

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """See `pathlift.passes.characters.ComparisonWeights`."""
        del weight
        return ()

    def __call__(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> Tensor:
        """Return g for weights θ and θ' of a weight tensor: 0 where both are 0, positive elsewhere."""
        del extras
        c, e, f = self.mixtures[weight]
        most = torch.maximum(a.abs(), b.abs())
        g = most + e
        if c:
            g = g + c * (b - a).abs()
        return torch.where(most > 0, g if f == 1.0 else f * g, 0.0)


def chosen(pair: Frame) -> Mixture:
    """Choose g for two networks.

    Args:
        pair: The networks in one gauge.

    Returns:
        g.
    """
    edges, biases = _layers(pair)
    means: dict[WeightTensor, float] = {}
    tables: dict[WeightTensor, Tensor] = {}
    likeness, other, common = 1.0, 1.0, 1.0  # ‖Φ'‖₁ and the path-norm of the pivot, in units of ‖Φ‖₁
    for weight in (*edges, *biases):
        a, b = pair.sample(weight)
        means[weight] = float(torch.maximum(a.abs(), b.abs()).mean()) or 1.0
        if float((b - a).abs().amax()) > SAME * means[weight]:
            tables[weight] = _table(a, b, means[weight])
            if weight not in biases:
                likeness *= float(torch.nan_to_num((a @ b) / (a.norm() * b.norm())))
                mine, theirs, shared = (float(own.sum()) for own in (a.abs(), b.abs(), pivot(a, b)))
                other, common = (0.0, 0.0) if mine == 0 else (other * theirs / mine, common * shared / mine)
    order = [weight for weight in edges if weight in tables]
    choice = _swept([tables[weight] for weight in order])
    mixtures = {weight: (*_of(place, means[weight]), 1.0) for weight, place in zip(order, choice, strict=True)}
    above = [torch.ones(9, dtype=torch.float64, device="cpu")]
    for weight, place in zip(reversed(order), reversed(choice), strict=True):
        above.append(_relative(above[-1] * tables[weight][place]))
    whole = _distance(above[-1])
    for weight, below in biases.items():
        rest = above[len(order) - sum(own in tables for own in edges[:below])]
        sums = tables.get(weight, torch.ones(1, 9, dtype=torch.float64, device="cpu")) * rest
        place = int(_looseness(sums).argmin())
        f = 2.0 ** round(math.log2(_distance(sums[place]) / whole)) if whole > 0 and _distance(sums[place]) > 0 else 1.0
        mixtures[weight] = (*(_of(place, means[weight]) if weight in tables else (0.0, SAME * means[weight])), f)
    still = {weight: (0.0, SAME * means[weight], 1.0) for weight in edges if weight not in tables}
    apart = 1 + other - 2 * common
    return Mixture(mixtures | still, likeness, abs(1 - other) / apart if apart > 0 else 1.0)


def _layers(pair: Frame) -> tuple[list[WeightTensor], dict[WeightTensor, int]]:
    """Return the weights of edges that are compared, from the inputs up, and the biases with how many of them lie below."""
    edges: dict[WeightTensor, None] = {}
    biases: dict[WeightTensor, int] = {}
    for layer in pair.network.layers:
        edges |= dict.fromkeys(connection.weight for connection in layer.connections if connection.weight in pair.changed)
        biases |= {bias.weight: len(edges) for bias in layer.biases if bias.weight in pair.changed}
    return list(edges), {weight: below for weight, below in biases.items() if weight not in edges}


def _of(place: int, mean: float) -> tuple[float, float]:
    """Return c and e of a candidate."""
    c, e = CANDIDATES[place]
    return c, e * mean


def _distance(sums: Tensor) -> float:
    """Return (M_2/M_0)^(1/2), how far paths are from each other in units of g."""
    return math.sqrt(max(float(SIGNS[:3] @ sums[1:4] / sums[0]), 0.0))


def _looseness(sums: Tensor) -> Tensor:
    """Return M_0·M_4/M_2² for rows of characters, inf where M_2 is 0."""
    second, fourth = (sums[:, 1:4] @ SIGNS[:3]).clamp(min=0.0), (sums[:, 4:] @ SIGNS[3:]).clamp(min=0.0)
    return torch.nan_to_num(sums[:, 0] * fourth / second**2, nan=torch.inf)


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
    one = torch.ones(9, dtype=torch.float64, device="cpu")
    for _ in range(SWEEPS if tables else 0):
        before = list(choice)
        above = [one]  # products over the layers that come later
        for table, own in zip(reversed(tables), reversed(choice), strict=True):
            above.append(_relative(above[-1] * table[own]))
        below = one
        for place, table in enumerate(tables):
            loose = _looseness(table * _relative(below * above[len(tables) - place - 1]))
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
