"""Tracks of differences of two path-liftings beside each other: through the pivot, against signs, and their moments (§4).

All rest on Φ'_pe − Φ_pe = b·(Φ'_p − Φ_p) + d·Φ_p with d = b − a (`products`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb

import torch
from torch import Tensor

from pathlift.edges.weights import Entry
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.characters import ComparisonWeights
from pathlift.passes.products import PairProgram, WeightPair
from pathlift.passes.programs import pivot

TWICE: list[Entry] = [(0, 0), (1, 1), (2, 2), (3, 3), (1, 0), (3, 2)]
"""Two pairs of tracks, of which the second reads the first."""


class _TwoPairsProgram(PairProgram):
    """The common part of programs of two pairs of tracks, `TWICE`: the second of a pair starts at 0 and reads the first."""

    tracks = 4
    started = frozenset({0, 2})

    def keys(self, weight: WeightTensor) -> Sequence[Entry]:
        """See `ProductProgram.keys`."""
        return TWICE if weight in self.pair.changed else TWICE[:4]


class PivotProgram(_TwoPairsProgram):
    """Path activations A, A' and the difference tracks D = Φ(θ) − Φ(m), D' = Φ(θ') − Φ(m), m the pivot, side by side.

    |θ|·A − |m|·Φ(m) = |m|·(A − Φ(m)) + (|θ| − |m|)·A, so D ← |m|·D + (|θ| − |m|)·A: nothing is subtracted but weights.
    """

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `ProductProgram.entries`."""
        a, b = values
        first, second = a.abs(), b.abs()
        if weight not in self.pair.changed:
            return dict.fromkeys(self.keys(weight), first)
        m = pivot(a, b)
        return {(0, 0): first, (1, 1): m, (1, 0): first - m, (2, 2): second, (3, 3): m, (3, 2): second - m}


class DualProgram(_TwoPairsProgram):
    """⟨Φ(θ')−Φ(θ), Φ(s)⟩ for any numbers s: tracks ΣΦΦ(s) and Σ(Φ'−Φ)Φ(s), and both with the magnitude of every summand.

    With |s| ≤ 1 also |Φ_p(s)| ≤ 1, so the second is at most ‖Φ(θ')−Φ(θ)‖₁: a lower bound. Along an edge Φ'−Φ becomes
    b(Φ'−Φ) + dΦ and Φ(s) becomes s·Φ(s), so T ← as·T and D ← bs·D + ds·T.
    """

    signed = frozenset(range(4))

    def __init__(self, network: Network, pair: WeightPair, factors: Mapping[WeightTensor, Tensor]) -> None:
        """Take two networks and s.

        Args:
            network: The graph.
            pair: θ and θ'.
            factors: s of each weight, of its shape; the sign of θ for a weight tensor that is not there.
        """
        super().__init__(network, pair)
        self.factors = factors

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """See `PairProgram.extras`."""
        return (self.factors[weight],) if weight in self.factors else ()

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `ProductProgram.entries`."""
        a, b, *given = values
        if weight not in self.pair.changed:
            return dict.fromkeys(self.keys(weight), a.abs())
        s = given[0] if given else a.sign()
        a_s, b_s, d_s = a * s, b * s, (b - a) * s
        return {
            (0, 0): a_s,
            (1, 1): b_s,
            (1, 0): d_s,
            (2, 2): a_s.detach().abs(),
            (3, 3): b_s.detach().abs(),
            (3, 2): d_s.detach().abs(),
        }


class DifferenceMomentProgram(PairProgram):
    """M_k = Σ_p (Φ'_p−Φ_p)^k/Φ_p(g)^(k−1) without cancellation, for networks that are near each other (mathematics §4).

    T_j = Σ_p Φ^(k−j)·δ^j/Φ(g)^(k−1) with δ = Φ'−Φ, j = 0…k. Along an edge Φ becomes aΦ, Φ(g) becomes g·Φ(g) and δ becomes bδ +
    dΦ, whose j-th power is Σ_{i≤j} C(j,i)·(bδ)^i·(dΦ)^(j−i). Collecting powers of Φ and δ,

        T_j ← Σ_{i≤j} C(j,i)·b^i·d^(j−i)·a^(k−j)·g^(1−k)·T_i = Σ_{i≤j} C(j,i)·g·(b/g)^i·(d/g)^(j−i)·(a/g)^(k−j)·T_i.

    An example: one edge, a = 1, b = 3, g = 2, k = 2: T_0 = 1/2, T_1 = 1·2/2 = 1, T_2 = 2²/2 = 2 = M_2.

    The tracks k+j, j = 1…k, follow T_j with the magnitude of every summand (T_0 is its own): the rounding error of
    M_k = T_k is bounded by a multiple of track 2k.
    """

    started = frozenset({0})

    def __init__(self, network: Network, pair: WeightPair, order: int, g: ComparisonWeights) -> None:
        """Take two networks; where a weight tensor is the same in both, g is taken to be |θ|.

        Args:
            network: The graph.
            pair: θ and θ'.
            order: k, even.
            g: The comparison weights.
        """
        super().__init__(network, pair)
        self.order = order
        self.g = g
        self.tracks = 2 * order + 1
        self.signed = frozenset(range(1, order + 1))
        lower = [(j, i) for j in range(order + 1) for i in range(j + 1)]
        self.triangle = [*lower, *((order + j, order + i if i else 0) for j, i in lower if j)]

    def keys(self, weight: WeightTensor) -> Sequence[Entry]:
        """See `ProductProgram.keys`."""
        return self.triangle if weight in self.pair.changed else [(track, track) for track in range(self.tracks)]

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """See `PairProgram.extras`."""
        return self.g.extras(weight)

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `ProductProgram.entries`."""
        a, b, *extras = values
        if weight not in self.pair.changed:
            return dict.fromkeys(self.keys(weight), a.abs())
        g = self.g(weight, a, b, *extras)
        safe = torch.where(g > 0, g, 1.0)
        k = self.order
        first, second, gap = ([ratio**power for power in range(k + 1)] for ratio in (a / safe, b / safe, (b - a) / safe))
        entries: dict[Entry, Tensor] = {}
        for j in range(k + 1):
            rest = g * first[k - j]
            for i in range(j + 1):
                entries[j, i] = comb(j, i) * (rest * second[i]) * gap[j - i]
                if j:
                    entries[k + j, k + i if i else 0] = entries[j, i].abs()
        return entries
