"""Characters of pairs of weights, χ(path) = ∏ χ(edge): those of the moments, and affinities (mathematics §4).

With r = (Φ' − Φ)/Φ(g) the moment M_k = Σ Φ(g)·r^k = Σ (Φ' − Φ)^k/Φ(g)^(k−1) is, by the binomial theorem,

    M_k = Σ_j C(k, j)·(−1)^(k−j)·Σ_p Φ_p^(k−j)·Φ'_p^j/Φ_p(g)^(k−1),

and each inner sum is one track with χ_j = a^(k−j)·b^j/g^(k−1). What cancels between them is what limits their use; where the
networks are near each other, `differences.DifferenceMomentProgram` sums M_k anew without that.

An example: one edge, a = 1, b = 3, g = 2, k = 2: χ = (1/2, 3/2, 9/2), M_2 = 1/2 − 2·3/2 + 9/2 = 2 = (3 − 1)²/2.

Where a weight is the same in both networks, g = |a| is best, and every character is |a|: a^k/|a|^(k−1) for even k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pathlift.edges.weights import Entry
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.products import PairProgram, WeightPair


class ComparisonWeights(Protocol):
    """g: one number for each weight, positive where it is not 0 in both networks."""

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """Return what g depends on besides θ and θ', as tensors of the shape of the weight tensor."""

    def __call__(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> Tensor:
        """Return g from θ, θ' and the extras of a weight tensor, or from the same slice of all of them."""


@dataclass(frozen=True)
class Moments:
    """The characters Φ(g) and, for k = 2, 4, …, ``order``, Φ^(k−j)·Φ'^j/Φ(g)^(k−1), j = 0…k.

    Attributes:
        order: The largest k, even.
        g: The comparison weights.
    """

    order: int
    g: ComparisonWeights

    @property
    def count(self) -> int:
        """Number of characters."""
        return sum(size for _, size in self.rows.values())

    @property
    def rows(self) -> dict[int, tuple[int, int]]:
        """Where the characters of each k begin, and how many there are."""
        rows, start = {}, 0
        for k in range(0, self.order + 1, 2):
            rows[k] = (start, k + 1)
            start += k + 1
        return rows

    @property
    def signed(self) -> frozenset[int]:
        """The characters that may be negative, or so much smaller than Φ(g) that their range is not looked at."""
        return frozenset(range(1, self.count))

    def of(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> list[Tensor]:
        """Compute the characters of a weight tensor.

        Row k holds χ_j = g·(a/g)^(k−j)·(b/g)^j, j = 0…k. Row k + 2 is row k times (a/g)², and after it the last of row k times
        (a/g)(b/g) and times (b/g)².

        Args:
            weight: The weight.
            a: Values of θ.
            b: Values of θ'.
            extras: What g depends on besides (`ComparisonWeights`).

        Returns:
            One tensor per character.
        """
        g = self.g(weight, a, b, *extras)
        row = [g]
        characters = [g]
        if self.order:
            safe = torch.where(g > 0, g, 1.0)
            first, second = a / safe, b / safe
            squares = first * first, first * second, second * second
        for _ in range(2, self.order + 1, 2):
            row = [*(character * squares[0] for character in row), row[-1] * squares[1], row[-1] * squares[2]]
            characters += row
        return characters


@dataclass(frozen=True)
class Affinities:
    """The characters |Φ|^(1−l/n)·|Φ'|^(l/n), l = 0…n, and after them the same times the sign of ΦΦ'.

    Attributes:
        order: n.
        split: Whether the signed ones are there; where no weight changes its sign they are the unsigned ones.
    """

    order: int
    split: bool

    @property
    def count(self) -> int:
        """Number of characters."""
        return (self.order + 1) * (2 if self.split else 1)

    @property
    def signed(self) -> frozenset[int]:
        """The characters that may be negative, and those between the path-norms, which bound them."""
        return frozenset(range(self.count)) - {0, self.order}

    def of(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> list[Tensor]:
        """See `Moments.of`."""
        del weight, extras
        roots = [_root(value.abs(), self.order) for value in (a, b)]
        affinities = _powers(roots[0], roots[1], self.order)
        if self.split:
            sign = torch.sign(a) * torch.sign(b)
            affinities += [affinity * sign for affinity in affinities]
        return affinities


def _powers(a: Tensor, b: Tensor, order: int) -> list[Tensor]:
    """Return a^(order−j)·b^j for j = 0…order."""
    rising = [torch.ones_like(a)]
    for _ in range(order):
        rising.append(rising[-1] * b)
    power = rising[0]
    for j in range(order - 1, -1, -1):
        power = power * a
        rising[j] = rising[j] * power
    return rising


def _root(value: Tensor, order: int) -> Tensor:
    """Return value^(1/order); square roots are faster than powers."""
    while order % 2 == 0:
        value, order = value.sqrt(), order // 2
    return value if order == 1 else value.pow(1.0 / order)


class CharacterProgram(PairProgram):
    """Characters of pairs of weights, each summed over all paths by one track: T ← χ(θ, θ')·T, inputs and biases included."""

    def __init__(self, network: Network, pair: WeightPair, families: Sequence[Moments | Affinities]) -> None:
        """Take two networks; where a weight tensor is the same in both, g is taken to be |θ|, which is best.

        Args:
            network: The graph.
            pair: θ and θ'.
            families: The characters, side by side; of moments at most one.
        """
        super().__init__(network, pair)
        self.families = tuple(families)
        self.tracks = sum(family.count for family in families)
        self.started = frozenset(range(self.tracks))
        first = [sum(family.count for family in families[:number]) for number in range(len(families))]
        self.signed = frozenset(start + track for start, family in zip(first, families, strict=True) for track in family.signed)
        self.diagonal = [(track, track) for track in range(self.tracks)]

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """See `PairProgram.extras`."""
        return next((family.g.extras(weight) for family in self.families if isinstance(family, Moments)), ())

    def keys(self, weight: WeightTensor) -> Sequence[Entry]:
        """See `ProductProgram.keys`."""
        del weight
        return self.diagonal

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `ProductProgram.entries`."""
        if weight not in self.pair.changed:
            return dict.fromkeys(self.diagonal, values[0].abs())
        characters = [character for family in self.families for character in family.of(weight, *values)]
        return dict(zip(self.diagonal, characters, strict=True))
