"""The comparison weights g = f·(max(|θ|, |θ'|) + c·|θ'−θ| + e), and the choice of c, e and f for each layer (mathematics §4).

What is minimised. The simplest bounds of four moments are √(M_0·M_2) from above (Cauchy–Schwarz) and M_2^(3/2)·M_4^(−1/2) from
below (Hölder), so upper over lower is √(M_0·M_4)/M_2. It is at least 1, and 1 where Φ_p(g) is proportional to |Φ'_p − Φ_p|.

The model. Before any pass is spent, M_0, M_2 and M_4 are predicted as if every path took one weight of each layer, all weights
of a layer alike. A character is a product along a path, so its sum over the paths is (number of paths)·Π (mean over the layer's
weights), and the number of paths cancels in M_0·M_4/M_2². By the binomial theorem the three moments are made of nine
characters: g; θ^i·θ'^(2−i)/g; θ^i·θ'^(4−i)/g³. Nine means for each layer and candidate (c, e) are all that the choice reads.

Example. One layer with θ = (1, 1) and θ' = (1, 2). For g = max(|θ|, |θ'|) = (1, 2) the moments are 3, 1/2, 1/8, and upper over
lower is √(3/8)/(1/2) = 1.22. With c = 10, g = (1, 12) is nearer to |θ'−θ| = (0, 1): 13, 1/12, 1/1728, and 1.04. With more
layers a path differs where one of its weights does, and g must not be small on it beside other paths: c has a best size.

Biases. Paths from a bias may differ far more, or less, than paths from an input. A factor f on all of them makes their part of
M_0 and M_2 f·M_0 and M_2/f, and (Σ f_s·M_0s)·(Σ M_2s/f_s) over the starts s is at least (Σ √(M_0s·M_2s))², with equality
where f_s is proportional to √(M_2s/M_0s), which the model knows. For weights of edges f is 1: it would change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.graph.layers import WeightTensor
from pathlift.metric.common_gauge import CommonGauge
from pathlift.passes.characters import Affinities, ComparisonWeights, nowhere
from pathlift.passes.programs import pivot

CANDIDATES = tuple(
    (c, e) for c in (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0) for e in (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
)
"""(c, e in units of the mean of |θ|)."""

FIRST = CANDIDATES.index((0.0, 0.1))
"""The candidate that every layer starts with."""

SWEEPS = 4

GAIN = 1e-3
"""The least relative gain of a change."""

SAME = 1e-9
"""Differences of this size are those of a rescaling's rounding: there g is |θ| but for so much, as where nothing differs."""

TIE = 1e-6
"""Candidates that differ by less are equal: rounding must not choose between them."""

FINEST = 8
"""The order of the affinities that the model tells."""

LIKE = 0.05
"""Networks whose path-liftings have a cosine below this (by the model) are far from each other."""

SIGNS = torch.tensor([1.0, -2.0, 1.0, 1.0, -4.0, 6.0, -4.0, 1.0], dtype=torch.float64, device="cpu")
"""Binomial coefficients of (Φ'−Φ)² and (Φ'−Φ)⁴."""

UNIT = torch.ones(9, dtype=torch.float64, device="cpu")
"""The characters of no layer at all."""


@dataclass(frozen=True)
class ByLayer:
    """Comparison weights by formula, and what the model tells beside them.

    Attributes:
        formulas: c, e and f of each weight tensor whose weights are compared one by one.
    """

    formulas: Mapping[WeightTensor, tuple[float, float, float]]

    @property
    def covered(self) -> float:
        """A number such that |Φ_p| and |Φ'_p| are at most so many times Φ_p(g), for every path, as long as f is 1 on edges."""
        return max(1.0, *(1 / f for _, _, f in self.formulas.values())) if self.formulas else 1.0

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """See `pathlift.passes.characters.ComparisonWeights`."""
        del weight
        return ()

    def __call__(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> Tensor:
        """Return g for weights θ and θ' of a weight tensor: 0 where both are 0, positive elsewhere."""
        del extras
        c, e, f = self.formulas[weight]
        most = torch.maximum(a.abs(), b.abs())
        g = torch.add(most, (b - a).abs_(), alpha=c).add_(e) if c else most + e
        g = g if f == 1.0 else g.mul_(f)
        return g if nowhere(most, 0.0) else torch.where(most > 0, g, 0.0)


@dataclass(frozen=True)
class Likeness:
    """What both networks share, by the model.

    Attributes:
        cosine: Of Φ(θ) and Φ(θ'): the product over the layers of the cosines of their weights.
        lopsided: |‖Φ‖₁ − ‖Φ'‖₁| relative to the sum of their distances from the pivot.
        affinities: Σ|Φ|^(1−l/n)·|Φ'|^(l/n) for l = 0…n, n = `FINEST`, and the middle one with signs; in some unit.
    """

    cosine: float
    lopsided: float
    affinities: Tensor

    @property
    def near(self) -> bool:
        """Whether the path-liftings are alike: then moments are the better bounds, else affinities."""
        return self.cosine >= LIKE

    def of_order(self, order: int) -> Tensor:
        """Return the affinities of an order that divides `FINEST`, and the middle one with signs."""
        return torch.cat([self.affinities[: FINEST + 1 : FINEST // order], self.affinities[-1:]])


def likeness(pair: CommonGauge) -> Likeness:
    """Tell what two networks share, by the model.

    ⟨Φ, Φ'⟩, ‖Φ‖₁, ‖Φ'‖₁, ‖Φ(m)‖₁, m the pivot, and affinities are sums of characters too: products over the layers of θθ', |θ|,
    |θ'|, |m|, |θ|^s·|θ'|^(1−s). The distances from the pivot are ‖Φ‖₁ − ‖Φ(m)‖₁ and ‖Φ'‖₁ − ‖Φ(m)‖₁ by Lemma 4.2.

    Args:
        pair: The networks in one gauge.

    Returns:
        It.
    """
    cosine, other, common = 1.0, 1.0, 1.0  # ‖Φ'‖₁ and ‖Φ(m)‖₁ in units of ‖Φ‖₁
    family = Affinities(FINEST, range(FINEST // 2, FINEST // 2 + 1))
    affinities = torch.ones(family.count, dtype=torch.float64, device="cpu")
    for weight in _layers(pair)[0]:
        a, b = pair.sample(weight)
        if not _differ(a, b):
            continue
        cosine *= float(torch.nan_to_num((a @ b) / (a.norm() * b.norm())))
        sizes = [float(values.sum()) for values in (a.abs(), b.abs(), pivot(a, b))]
        other, common = (0.0, 0.0) if sizes[0] == 0 else (other * sizes[1] / sizes[0], common * sizes[2] / sizes[0])
        sums = {number: float(affinity.sum()) for number, affinity in family.of(weight, a, b)}
        affinities *= torch.tensor([sums[number] for number in range(family.count)], dtype=torch.float64, device="cpu")
        affinities /= float(affinities.max()) or 1.0
    apart = 1 + other - 2 * common
    return Likeness(cosine, abs(1 - other) / apart if apart > 0 else 1.0, affinities)


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether weights differ by more than rounding."""
    return float((b - a).abs().amax()) > SAME * (float(torch.maximum(a.abs(), b.abs()).mean()) or 1.0)


def chosen(pair: CommonGauge) -> ByLayer:
    """Choose g for two networks.

    Args:
        pair: The networks in one gauge.

    Returns:
        g.
    """
    edges, biases = _layers(pair)
    samples = {weight: pair.sample(weight) for weight in (*edges, *biases)}
    means = {weight: float(torch.maximum(a.abs(), b.abs()).mean()) or 1.0 for weight, (a, b) in samples.items()}
    tables = {weight: _table(a, b, means[weight]) for weight, (a, b) in samples.items() if _differ(a, b)}
    differing = [weight for weight in edges if weight in tables]
    choice = _swept([tables[weight] for weight in differing])
    formulas = {weight: (*_formula(number, means[weight]), 1.0) for weight, number in zip(differing, choice, strict=True)}
    above = [UNIT]  # the characters of the last 0, 1, 2, … differing layers
    for weight, number in zip(reversed(differing), reversed(choice), strict=True):
        above.append(_relative(above[-1] * tables[weight][number]))
    for weight, below in biases.items():
        layers_above = len(differing) - sum(edge in tables for edge in edges[:below])
        rows = tables.get(weight, UNIT[None]) * above[layers_above]
        number = int(_looseness(rows).argmin())
        f = _factor(_distance(rows[number]), _distance(above[-1]))
        formulas[weight] = (*(_formula(number, means[weight]) if weight in tables else (0.0, SAME * means[weight])), f)
    still = {weight: (0.0, SAME * means[weight], 1.0) for weight in edges if weight not in tables}
    return ByLayer(formulas | still)


def _layers(pair: CommonGauge) -> tuple[list[WeightTensor], dict[WeightTensor, int]]:
    """Return the weights of edges that are compared, from the inputs up, and the biases with how many of them lie below."""
    edges: dict[WeightTensor, None] = {}
    biases: dict[WeightTensor, int] = {}
    for layer in pair.network.layers:
        edges |= dict.fromkeys(connection.weight for connection in layer.connections if connection.weight in pair.changed)
        biases |= {bias.weight: len(edges) for bias in layer.biases if bias.weight in pair.changed}
    return list(edges), {weight: below for weight, below in biases.items() if weight not in edges}


def _formula(number: int, mean: float) -> tuple[float, float]:
    """Return c and e of a candidate."""
    c, e = CANDIDATES[number]
    return c, e * mean


def _factor(distance: float, from_inputs: float) -> float:
    """Return f of a bias: how far its paths are from each other, relative to those from the inputs.

    A power of two, so that g is multiplied without rounding; 1 where nothing differs.
    """
    return 2.0 ** round(math.log2(distance / from_inputs)) if distance > 0 and from_inputs > 0 else 1.0


# ---- the model of the moments


def _table(a: Tensor, b: Tensor, mean: float) -> Tensor:
    """Return the mean over the weights of each character of M_0, M_2 and M_4, for each candidate: (candidates, 9), CPU."""
    there = (a != 0) | (b != 0)
    a, b = a[there] / mean, b[there] / mean
    c, e = torch.tensor(CANDIDATES, dtype=a.dtype, device=a.device).T[:, :, None]
    g = torch.maximum(a.abs(), b.abs()) + c * (b - a).abs() + e
    products = [a**i * b ** (k - i) for k in (2, 4) for i in range(k + 1)]
    second, fourth = (1 / g) @ torch.stack(products[:3], 1), (1 / g**3) @ torch.stack(products[3:], 1)
    return torch.cat([g.sum(1, keepdim=True), second, fourth], 1).cpu() / max(len(a), 1)


def _relative(characters: Tensor) -> Tensor:
    """Divide by the first, and so M_0, M_2 and M_4 alike: looseness does not see it, and products of layers stay in range."""
    return characters / characters[0]


def _distance(characters: Tensor) -> float:
    """Return (M_2/M_0)^(1/2), how far paths are from each other in units of g."""
    return math.sqrt(max(float(SIGNS[:3] @ characters[1:4] / characters[0]), 0.0))


def _looseness(characters: Tensor) -> Tensor:
    """Return M_0·M_4/M_2² for rows of characters, inf where M_2 is 0.

    Example:
        >>> theta, other = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])  # that of the head of this file, e = 0.001
        >>> loose = _looseness(_table(theta.double(), other.double(), 1.0)).sqrt()
        >>> [round(float(loose[CANDIDATES.index((c, 0.001))]), 2) for c in (0.0, 10.0)]
        [1.22, 1.04]
    """
    second, fourth = (characters[:, 1:4] @ SIGNS[:3]).clamp(min=0.0), (characters[:, 4:] @ SIGNS[3:]).clamp(min=0.0)
    return torch.nan_to_num(characters[:, 0] * fourth / second**2, nan=torch.inf)


def _swept(tables: list[Tensor]) -> list[int]:
    """Return the candidate of each layer that makes the model of M_0·M_4/M_2² smallest, by coordinate descent.

    A sweep goes from the inputs up with the product of all layers below, as chosen in this sweep, and of all layers above, as
    chosen in the last one: each layer tries all its candidates at the cost of a row each. It ends where a sweep changes none.
    """
    choice = [FIRST] * len(tables)
    for _ in range(SWEEPS if tables else 0):
        before = list(choice)
        above = [UNIT]  # products over the last 0, 1, 2, … layers
        for table, number in zip(reversed(tables), reversed(choice), strict=True):
            above.append(_relative(above[-1] * table[number]))
        below = UNIT
        for layer, table in enumerate(tables):
            loose = _looseness(table * _relative(below * above[len(tables) - layer - 1]))
            best = int((loose <= loose.min() * (1 + TIE)).nonzero()[0])
            if float(loose[best]) < float(loose[choice[layer]]) * (1 - GAIN):
                choice[layer] = best
            below = _relative(below * table[choice[layer]])
        if choice == before:
            break
    return choice


__all__ = ["ByLayer", "ComparisonWeights", "Likeness", "chosen", "likeness"]
