"""Programs of many tracks whose weights are functions of the same θ and θ': sums of products of powers over paths (§4).

A function χ of a pair of weights such that χ(path) = ∏ χ(edge), as θ^i·θ'^j·g^(1−i−j), is a character: it sums over all paths
by a track of its own, T ← χ·T. By induction over the graph: if T(u) is Σ χ(p) over the paths p that end at u, then Σ_{u→v}
χ(u→v)·T(u) + χ(b(v)) is the sum over those that end at v. All is 1 at inputs, and a bias is an edge from a neuron that is 1.

Differences Φ'_p − Φ_p are no products. But with a, b the values of an edge in θ and θ' and d = b − a,

    Φ'_pe − Φ_pe = b·Φ'_p − a·Φ_p = b·(Φ'_p − Φ_p) + d·Φ_p,

so the sums of Φ^(k−j)·(Φ'−Φ)^j for j = 0…k are closed under edges, M is a triangle, and nothing cancels in them but what
cancels in d and in the sum over paths (`squares`, `differences`).

An example: two edges one after the other, θ = (2, 1), θ' = (3, 1). Φ = 2 and Φ' = 3. The tracks (Φ, Φ' − Φ) start with (1, 0),
are (2·1, 3·0 + 1·1) = (2, 1) behind the first edge and (2, 1) behind the second.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pathlift.edges.weights import Bundle, Entry, Stream, Weights, computed
from pathlift.graph.layers import Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.programs import Values, WeightedProgram
from pathlift.passes.tracks import Entries, Tracks


class ProductProgram(WeightedProgram):
    """A program that computes all its entries from the weights at once; always in float64.

    Attributes:
        degree: Degree of homogeneity of every entry.
        started: The tracks that are 1 at the inputs; the others are 0.
    """

    degree: float = 1.0
    started: frozenset[int]

    def __init__(self, network: Network, values: tuple[Values, ...], feed: Mapping[str, Tensor] | None = None) -> None:
        """Take the weights.

        Args:
            network: The graph.
            values: Weight tensor to weights, for each network.
            feed: Input layer to what its paths are weighted with, non-negative, (samples, *shape); ones when None.
        """
        super().__init__(network, values, torch.float64, feed)

    _joins = False

    @abstractmethod
    def keys(self, weight: WeightTensor) -> Sequence[Entry]:
        """Return the entries that are not 0 for a weight tensor.

        Args:
            weight: The weight.

        Returns:
            Pairs (to, from) of tracks.
        """

    @abstractmethod
    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """Compute them.

        Args:
            weight: The weight.
            values: Its values, or those of a part of it, float64.

        Returns:
            A tensor of the same shape by key.
        """

    def stream(self, weight: WeightTensor, *values: Tensor) -> Stream:
        """Compute them one after the other, each for use before the next; see `entries`."""
        return self.entries(weight, *values).items()

    def bundle(self, weight: WeightTensor) -> Bundle | None:
        """See `Program.bundle`.

        The values are divided by 2**shift to bring them near 1; entries of degree d then are smaller by 2**(d·shift), which is
        the exponent of what they bring.

        Args:
            weight: The weight.

        Returns:
            The entries; None for weights of 1, and with samples.
        """
        if self.batch is not None or weight.scalar in (1.0, -1.0):
            return None
        known = self.weights(weight, torch.abs, self.degree)  # brings the values near 1

        def stream(*values: Tensor) -> Stream:
            return self.stream(weight, *values)

        shift = known.exponent / self.degree
        return Bundle(known.values, self.keys(weight), stream, torch.float64, shift=shift, degree=self.degree)

    def edge(self, weight: WeightTensor) -> Entries:
        """See `Program.edge`."""
        if weight.scalar in (1.0, -1.0):
            return {(track, track): None for track in range(self.tracks)}
        return {key: self._sum_of(weight, [key]) for key in self.keys(weight)}

    def start(self, weight: WeightTensor) -> Mapping[int, Weights]:
        """See `Program.start`: a bias is an edge from a neuron that is 1, as the inputs are."""
        into: dict[int, list[Entry]] = {}
        for to, source in self.keys(weight):
            if source in self.started:
                into.setdefault(to, []).append((to, source))
        bundle = self.bundle(weight)
        if bundle is None:
            return {to: self._sum_of(weight, keys) for to, keys in into.items()}
        # all of them at once: a bias is small, and has as many as there are tracks
        entries = {key: entry.clone() for key, entry in bundle.full()}
        return {to: computed(_sum(entries, keys), bundle.exponent) for to, keys in into.items()}

    def _sum_of(self, weight: WeightTensor, keys: Sequence[Entry]) -> Weights:
        """Return the weights that are the sum of some entries."""
        return self.weights(weight, _added(lambda *values: self.entries(weight, *values), keys), self.degree)

    def inputs(self, layer: Layer) -> Tracks:
        """See `Program.inputs`."""
        return tuple(self.fed(layer) if track in self.started else None for track in range(self.tracks))


def _added(entries: Callable[..., Mapping[Entry, Tensor]], keys: Sequence[Entry]) -> Callable[..., Tensor]:
    """Return the function that is the sum of some entries."""
    return lambda *values: _sum(entries(*values), keys)


def _sum(entries: Mapping[Entry, Tensor], keys: Sequence[Entry]) -> Tensor:
    first, *rest = (entries[key] for key in keys)
    return sum(rest, first)


class WeightPair(Protocol):
    """Two networks whose weights are compared one by one (`pathlift.metric.common_gauge`)."""

    @property
    def values(self) -> tuple[Values, Values]:
        """Weight tensor to weights, for each."""

    @property
    def changed(self) -> frozenset[WeightTensor]:
        """The weight tensors where they differ, and biases."""

    def parts(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """Return what the weights of a weight tensor are made of."""

    def joined(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return θ and θ' from parts, or from the same slice of all parts."""


class PairProgram(ProductProgram):
    """A program over two networks in one gauge, whose weights are near 1 as they are."""

    def __init__(self, network: Network, pair: WeightPair) -> None:
        super().__init__(network, pair.values)
        self.pair = pair

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """Return what the entries depend on besides θ and θ', as tensors of the shape of the weight tensor."""
        del weight
        return ()

    def _sources(self, weight: WeightTensor) -> tuple[tuple[Tensor, ...], Callable[..., tuple[Tensor, ...]]]:
        """Return what θ, θ' and the extras of a weight tensor are made of, and how; only constants are left as they are."""
        if weight.scalar is not None:
            return self.weights(weight, torch.abs, self.degree).values, lambda *values: values
        extras = self.extras(weight) if weight in self.pair.changed else ()
        parts = self.pair.parts(weight)
        return (*parts, *extras), lambda *tensors: (*self.pair.joined(*tensors[: len(parts)]), *tensors[len(parts) :])

    def shift(self, values: tuple[Tensor, ...]) -> float:
        """No shift: g has a scale of its own."""
        del values
        return 0.0

    def bundle(self, weight: WeightTensor) -> Bundle | None:
        """See `Program.bundle`."""
        if weight.scalar in (1.0, -1.0):
            return None
        sources, joined = self._sources(weight)
        return Bundle(sources, self.keys(weight), lambda *parts: self.stream(weight, *joined(*parts)), torch.float64)

    def _sum_of(self, weight: WeightTensor, keys: Sequence[Entry]) -> Weights:
        sources, joined = self._sources(weight)
        return Weights(sources, _added(lambda *parts: self.entries(weight, *joined(*parts)), keys), torch.float64)
