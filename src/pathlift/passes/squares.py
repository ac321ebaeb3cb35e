"""Quadratic sums over paths: inner products, the squared ℓ² and Hellinger distance of two path-liftings (mathematics §4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pathlift.edges.weights import Entry
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.products import ProductProgram
from pathlift.passes.programs import Values


class SquaredDifferenceProgram(ProductProgram):
    """S = ΣΦ², X = Σ(Φ'−Φ)Φ, E = Σ(Φ'−Φ)² by one recursion without cancellation (mathematics §4), and two bounds beside them.

    Along an edge Φ becomes aΦ and δ = Φ'−Φ becomes bδ + dΦ, with d = b − a. Multiplied out,

        Φ² → a²·Φ²,   δΦ → ab·δΦ + ad·Φ²,   δ² → b²·δ² + 2bd·δΦ + d²·Φ²,

    so S ← a²S, X ← abX + adS, E ← b²E + 2bdX + d²S. A bias is an edge from S = 1, X = E = 0: a², ad, d².

    The tracks 3 and 4 follow X and E with the magnitude of every summand. A sum of products, each with a relative error ρ, is
    off by ρ·Σ|summands| at most, so the rounding error of E is at most (roundings on the longest chain)·u times track 4.
    """

    tracks = 5
    signed = frozenset({1, 2})
    degree = 2.0
    started = frozenset({0})
    triangle = ((0, 0), (1, 1), (1, 0), (2, 2), (2, 1), (2, 0), (3, 3), (3, 0), (4, 4), (4, 3), (4, 0))

    def __init__(
        self,
        network: Network,
        values: Values,
        other: Values,
        changed: set[WeightTensor],
        *,
        feed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take two networks.

        Args:
            network: The graph.
            values: θ.
            other: θ'.
            changed: The weight tensors where θ and θ' differ.
            feed: Input layer to what its paths are weighted with, non-negative, (samples, *shape); ones when None.
        """
        super().__init__(network, (values, other), feed)
        self.changed = changed

    def keys(self, weight: WeightTensor) -> Sequence[Entry]:
        """See `ProductProgram.keys`."""
        return self.triangle if weight in self.changed else [(track, track) for track in range(5)]

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `ProductProgram.entries`."""
        a, b = values
        return self._products(weight, a, b, b - a)

    def _products(self, weight: WeightTensor, a: Tensor, b: Tensor, d: Tensor) -> Mapping[Entry, Tensor]:
        square = a * a
        if weight not in self.changed:
            return {(track, track): square for track in range(5)}
        ab, ad, b_squared, twice_bd, d_squared = a * b, a * d, b * b, 2 * b * d, d * d
        return {
            (0, 0): square,
            (1, 1): ab,
            (1, 0): ad,
            (2, 2): b_squared,
            (2, 1): twice_bd,
            (2, 0): d_squared,
            (3, 3): ab.abs(),
            (3, 0): ad.abs(),
            (4, 4): b_squared,
            (4, 3): twice_bd.abs(),
            (4, 0): d_squared,
        }


class InnerProgram(ProductProgram):
    """⟨Φ(θ), Φ(θ')⟩: the path program of the products θθ', and beside it the sum of the magnitudes of all terms."""

    tracks = 2
    signed = frozenset({0, 1})
    degree = 2.0
    started = frozenset({0, 1})

    def __init__(self, network: Network, values: Values, other: Values) -> None:
        """Take two networks.

        Args:
            network: The graph.
            values: θ.
            other: θ'.
        """
        super().__init__(network, (values, other))

    def keys(self, weight: WeightTensor) -> Sequence[Entry]:
        """See `ProductProgram.keys`."""
        del weight
        return [(0, 0), (1, 1)]

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `ProductProgram.entries`."""
        del weight
        product = values[0] * values[1]
        return {(0, 0): product, (1, 1): product.abs()}


class HellingerProgram(SquaredDifferenceProgram):
    """The same tracks for √|θ| and √|θ'|: E is the squared Hellinger distance H² = Σ(√|Φ'| − √|Φ|)² (mathematics §4).

    √|b| − √|a| = (|b| − |a|)/(√|b| + √|a|), which loses no digits where both are near each other.
    """

    degree = 1.0

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `ProductProgram.entries`."""
        a, b = values
        first, second = a.abs().sqrt(), b.abs().sqrt()
        total = first + second
        gap = (b.abs() - a.abs()) / torch.where(total > 0, total, 1.0)
        return self._products(weight, first, second, gap)
