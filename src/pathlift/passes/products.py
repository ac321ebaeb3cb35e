"""Programs of many tracks whose weights are functions of the same θ and θ': sums of products of powers over paths (SPEC §4).

A function of a weight pair that is a product along paths, such as θ^i·θ'^j·g^(1−i−j), sums over all paths by a track of its
own (a character). Differences Δ = θ' − θ are no products; the tracks of Φ^(k−j)·(Φ'−Φ)^j for j = 0…k are closed under edges,
and nothing cancels in them but what cancels in the sum over paths.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Protocol

import torch
from torch import Tensor

from pathlift.edges.base import Bundle, Entry, Weights
from pathlift.graph.layers import Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.programs import Values, _ParametrisedProgram, pivot
from pathlift.passes.propagate import Entries, Tracks


class ComparisonWeights(Protocol):
    """g: one number for each weight, positive where it is not 0 in both networks."""

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """Return what g depends on besides θ and θ', as tensors of the shape of the weight tensor."""

    def __call__(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> Tensor:
        """Return g from θ, θ' and the extras of a weight tensor, or from the same slice of all of them."""


class JointProgram(_ParametrisedProgram):
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

    def bundle(self, weight: WeightTensor) -> Bundle | None:
        """See `Program.bundle`."""
        if self.batch is not None or weight.scalar in (1.0, -1.0):
            return None
        known = self.weights(weight, torch.abs, self.degree)  # brings the values near 1

        def entries(*values: Tensor) -> Mapping[Entry, Tensor]:
            return self.entries(weight, *values)

        shift = known.exponent / self.degree
        return Bundle(known.values, self.keys(weight), entries, torch.float64, shift=shift, degree=self.degree)

    def edge(self, weight: WeightTensor) -> Entries:
        """See `Program.edge`."""
        if weight.scalar in (1.0, -1.0):
            return {(track, track): None for track in range(self.tracks)}
        return {key: self._one(weight, [key]) for key in self.keys(weight)}

    def start(self, weight: WeightTensor) -> Mapping[int, Weights]:
        """See `Program.start`: a bias is an edge from a neuron that is 1, as the inputs are."""
        found: dict[int, list[Entry]] = {}
        for to, source in self.keys(weight):
            if source in self.started:
                found.setdefault(to, []).append((to, source))
        return {to: self._one(weight, keys) for to, keys in found.items()}

    def _one(self, weight: WeightTensor, keys: Sequence[Entry]) -> Weights:
        def transform(*values: Tensor) -> Tensor:
            found = self.entries(weight, *values)
            first, *rest = (found[key] for key in keys)
            return sum(rest, first)

        return self.weights(weight, transform, self.degree)

    def inputs(self, layer: Layer) -> Tracks:
        """See `Program.inputs`."""
        return tuple(self.fed(layer) if track in self.started else None for track in range(self.tracks))


class SquaredDifferenceProgram(JointProgram):
    """S = ΣΦ², X = Σ(Φ'−Φ)Φ, E = Σ(Φ'−Φ)² by one recursion without cancellation (SPEC §4), and two bounds beside them.

    With Δ = θ'−θ: S ← θ²S, X ← θθ'X + θΔS, E ← θ'²E + 2θ'ΔX + Δ²S; a bias starts them at b², bΔb, Δb². The tracks 3
    and 4 follow X and E with the magnitude of every summand: rounding errors of E are bounded by a multiple of track 4.
    """

    tracks = 5
    signed = frozenset({1, 2})
    degree = 2.0
    started = frozenset({0})
    joined = ((0, 0), (1, 1), (1, 0), (2, 2), (2, 1), (2, 0), (3, 3), (3, 0), (4, 4), (4, 3), (4, 0))

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
            changed: The leaves where θ and θ' differ.
            feed: Input layer to what its paths are weighted with, non-negative, (samples, *shape); ones when None.
        """
        super().__init__(network, (values, other), feed)
        self.changed = changed

    def keys(self, weight: WeightTensor) -> Sequence[Entry]:
        """See `JointProgram.keys`."""
        return self.joined if weight in self.changed else [(track, track) for track in range(5)]

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `JointProgram.entries`."""
        a, b = values
        return self._products(weight, a, b, b - a)

    def _products(self, weight: WeightTensor, a: Tensor, b: Tensor, d: Tensor) -> Mapping[Entry, Tensor]:
        square = a * a
        if weight not in self.changed:
            return {(track, track): square for track in range(5)}
        along, step, last, twice, gap = a * b, a * d, b * b, 2 * b * d, d * d
        return {
            (0, 0): square,
            (1, 1): along,
            (1, 0): step,
            (2, 2): last,
            (2, 1): twice,
            (2, 0): gap,
            (3, 3): along.abs(),
            (3, 0): step.abs(),
            (4, 4): last,
            (4, 3): twice.abs(),
            (4, 0): gap,
        }


class InnerProgram(JointProgram):
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
        """See `JointProgram.keys`."""
        del weight
        return [(0, 0), (1, 1)]

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `JointProgram.entries`."""
        del weight
        product = values[0] * values[1]
        return {(0, 0): product, (1, 1): product.abs()}


class HellingerProgram(SquaredDifferenceProgram):
    """The same tracks for √|θ| and √|θ'|: E is the squared Hellinger distance H² = Σ(√|Φ'| − √|Φ|)² (SPEC §4)."""

    degree = 1.0

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `JointProgram.entries`."""
        a, b = values
        first, second = a.abs().sqrt(), b.abs().sqrt()
        total = first + second
        gap = (b.abs() - a.abs()) / torch.where(total > 0, total, 1.0)  # √|b| − √|a| would lose its digits
        return self._products(weight, first, second, gap)


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
        return sum(size for _, size in self.places.values())

    @property
    def places(self) -> dict[int, tuple[int, int]]:
        """Where the characters of each k begin, and how many there are."""
        found, start = {}, 0
        for k in range(0, self.order + 1, 2):
            found[k] = (start, k + 1)
            start += k + 1
        return found

    @property
    def signed(self) -> frozenset[int]:
        """The characters that may be negative, or so much smaller than Φ(g) that their range is not looked at."""
        return frozenset(range(1, self.count))

    def of(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> list[Tensor]:
        """Compute the characters of a weight tensor.

        Args:
            weight: The weight.
            a: Values of θ.
            b: Values of θ'.
            extras: See `ComparisonWeights`.

        Returns:
            One tensor per character.
        """
        g = self.g(weight, a, b, *extras)
        last = [g]
        found = [g]
        if self.order:
            safe = torch.where(g > 0, g, 1.0)
            first, second = a / safe, b / safe
            squares = first * first, first * second, second * second
        for _ in range(2, self.order + 1, 2):
            last = [*(own * squares[0] for own in last), last[-1] * squares[1], last[-1] * squares[2]]
            found += last
        return found


def _powers(a: Tensor, b: Tensor, order: int) -> list[Tensor]:
    """Return a^(order−j)·b^j for j = 0…order."""
    rising = [torch.ones_like(a)]
    for _ in range(order):
        rising.append(rising[-1] * b)
    power = rising[0]
    for place in range(order - 1, -1, -1):
        power = power * a
        rising[place] = rising[place] * power
    return rising


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
        found = _powers(roots[0], roots[1], self.order)
        if self.split:
            sign = torch.sign(a) * torch.sign(b)
            found += [own * sign for own in found]
        return found


def _root(value: Tensor, order: int) -> Tensor:
    """Return value^(1/order); square roots are faster than powers."""
    while order % 2 == 0:
        value, order = value.sqrt(), order // 2
    return value if order == 1 else value.pow(1.0 / order)


class Together(Protocol):
    """Two networks whose weights are compared one by one (`pathlift.metric.common_gauge`)."""

    @property
    def values(self) -> tuple[Values, Values]:
        """Weight tensor to weights, for each."""

    @property
    def changed(self) -> frozenset[WeightTensor]:
        """The leaves where they differ, and biases."""

    def parts(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """Return what the weights of a weight tensor are made of."""

    def joined(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return θ and θ' from parts, or from the same slice of all parts."""


class _PairProgram(JointProgram):
    """A program over two networks in one gauge, whose weights are near 1 as they are."""

    def __init__(self, network: Network, pair: Together) -> None:
        super().__init__(network, pair.values)
        self.pair = pair

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """Return what the entries depend on besides θ and θ', as tensors of the shape of the weight tensor."""
        del weight
        return ()

    def _sources(self, weight: WeightTensor) -> tuple[tuple[Tensor, ...], Callable[..., Mapping[Entry, Tensor]]]:
        """Return the tensors that the entries of a weight tensor are made of, and how; only constants are left as they are."""
        if weight.scalar is not None:
            known = self.weights(weight, torch.abs, self.degree)
            return known.values, lambda *values: self.entries(weight, *values)
        extras = self.extras(weight) if weight in self.pair.changed else ()
        parts = self.pair.parts(weight)

        def entries(*tensors: Tensor) -> Mapping[Entry, Tensor]:
            a, b = self.pair.joined(*tensors[: len(parts)])
            return self.entries(weight, a, b, *tensors[len(parts) :])

        return (*parts, *extras), entries

    def shift(self, values: tuple[Tensor, ...]) -> float:
        """No shift: g has a scale of its own."""
        del values
        return 0.0

    def bundle(self, weight: WeightTensor) -> Bundle | None:
        """See `Program.bundle`."""
        if weight.scalar in (1.0, -1.0):
            return None
        values, entries = self._sources(weight)
        return Bundle(values, self.keys(weight), entries, torch.float64)

    def _one(self, weight: WeightTensor, keys: Sequence[Entry]) -> Weights:
        values, entries = self._sources(weight)

        def transform(*tensors: Tensor) -> Tensor:
            found = entries(*tensors)
            first, *rest = (found[key] for key in keys)
            return sum(rest, first)

        return Weights(values, transform, torch.float64)


class CharacterProgram(_PairProgram):
    """Characters of pairs of weights, each summed over all paths by one track: T ← χ(θ, θ')·T, inputs and biases included."""

    def __init__(self, network: Network, pair: Together, families: Sequence[Moments | Affinities]) -> None:
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
        biases = [sum(family.count for family in families[:place]) for place in range(len(families))]
        self.signed = frozenset(bias + own for bias, family in zip(biases, families, strict=True) for own in family.signed)
        self.diagonal = [(track, track) for track in range(self.tracks)]

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """See `_PairProgram.extras`."""
        return next((own.g.extras(weight) for own in self.families if isinstance(own, Moments)), ())

    def keys(self, weight: WeightTensor) -> Sequence[Entry]:
        """See `JointProgram.keys`."""
        del weight
        return self.diagonal

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `JointProgram.entries`."""
        if weight not in self.pair.changed:
            return dict.fromkeys(self.diagonal, values[0].abs())
        found = [own for family in self.families for own in family.of(weight, *values)]
        return dict(zip(self.diagonal, found, strict=True))


class PivotProgram(_PairProgram):
    """Path activations A, A' and the difference tracks D = Φ(θ) − Φ(m), D' = Φ(θ') − Φ(m), m the pivot, side by side."""

    tracks = 4
    started = frozenset({0, 2})

    def keys(self, weight: WeightTensor) -> Sequence[Entry]:
        """See `JointProgram.keys`."""
        diagonal = [(track, track) for track in range(4)]
        return [*diagonal, (1, 0), (3, 2)] if weight in self.pair.changed else diagonal

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `JointProgram.entries`."""
        a, b = values
        first, second = a.abs(), b.abs()
        if weight not in self.pair.changed:
            return dict.fromkeys(self.keys(weight), first)
        m = pivot(a, b)
        return {(0, 0): first, (1, 1): m, (1, 0): first - m, (2, 2): second, (3, 3): m, (3, 2): second - m}


class DualProgram(_PairProgram):
    """⟨Φ(θ')−Φ(θ), Φ(s)⟩ for any numbers s: tracks ΣΦΦ(s) and Σ(Φ'−Φ)Φ(s), and both with the magnitude of every summand."""

    tracks = 4
    started = frozenset({0, 2})
    signed = frozenset(range(4))

    def __init__(self, network: Network, pair: Together, factors: Mapping[WeightTensor, Tensor]) -> None:
        """Take two networks and s.

        Args:
            network: The graph.
            pair: θ and θ'.
            factors: s of each weight, of its shape; the sign of θ for a weight tensor that is not there.
        """
        super().__init__(network, pair)
        self.factors = factors

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """See `_PairProgram.extras`."""
        return (self.factors[weight],) if weight in self.factors else ()

    def keys(self, weight: WeightTensor) -> Sequence[Entry]:
        """See `JointProgram.keys`."""
        diagonal = [(track, track) for track in range(4)]
        return [*diagonal, (1, 0), (3, 2)] if weight in self.pair.changed else diagonal

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `JointProgram.entries`."""
        a, b, *given = values
        if weight not in self.pair.changed:
            return dict.fromkeys(self.keys(weight), a.abs())
        s = given[0] if given else a.sign()
        first, along, step = a * s, b * s, (b - a) * s
        return {
            (0, 0): first,
            (1, 1): along,
            (1, 0): step,
            (2, 2): first.detach().abs(),
            (3, 3): along.detach().abs(),
            (3, 2): step.detach().abs(),
        }


class DifferenceMomentProgram(_PairProgram):
    """M_k = Σ_p (Φ'_p−Φ_p)^k/Φ_p(g)^(k−1) without cancellation, for networks that are near each other (SPEC §4).

    The tracks T_j = Σ_p Φ^(k−j)·(Φ'−Φ)^j/Φ(g)^(k−1), j = 0…k, obey T_j ← Σ_{i≤j} C(j,i)·θ'^i·Δ^(j−i)·θ^(k−j)·g^(1−k)·T_i.
    The tracks k+j, j = 1…k, follow T_j with the magnitude of every summand (T_0 is its own): the rounding error of
    M_k = T_k is bounded by a multiple of track 2k.
    """

    started = frozenset({0})

    def __init__(self, network: Network, pair: Together, order: int, g: ComparisonWeights) -> None:
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
        self.joined = [*lower, *((order + j, order + i if i else 0) for j, i in lower if j)]

    def keys(self, weight: WeightTensor) -> Sequence[Entry]:
        """See `JointProgram.keys`."""
        return self.joined if weight in self.pair.changed else [(track, track) for track in range(self.tracks)]

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """See `_PairProgram.extras`."""
        return self.g.extras(weight)

    def entries(self, weight: WeightTensor, *values: Tensor) -> Mapping[Entry, Tensor]:
        """See `JointProgram.entries`."""
        a, b, *extras = values
        if weight not in self.pair.changed:
            return dict.fromkeys(self.keys(weight), a.abs())
        g = self.g(weight, a, b, *extras)
        safe = torch.where(g > 0, g, 1.0)
        k = self.order
        first, second, gap = ([own**power for power in range(k + 1)] for own in (a / safe, b / safe, (b - a) / safe))
        found: dict[Entry, Tensor] = {}
        for j in range(k + 1):
            rest = g * first[k - j]
            for i in range(j + 1):
                found[j, i] = comb(j, i) * (rest * second[i]) * gap[j - i]
                if j:
                    found[k + j, k + i if i else 0] = found[j, i].abs()
        return found
