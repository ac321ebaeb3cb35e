"""Characters of pairs of weights, χ(path) = ∏ χ(edge): those of the moments, and affinities (mathematics §4).

With r = (Φ' − Φ)/Φ(g) the moment M_k = Σ Φ(g)·r^k = Σ (Φ' − Φ)^k/Φ(g)^(k−1) is, by the binomial theorem,

    M_k = Σ_j C(k, j)·(−1)^(k−j)·Σ_p Φ_p^(k−j)·Φ'_p^j/Φ_p(g)^(k−1),

and each inner sum is one track with χ_j = a^(k−j)·b^j/g^(k−1). What cancels between them is what limits their use; where the
networks are near each other, `differences.DifferenceMomentProgram` sums M_k anew without that.

An example: one edge, a = 1, b = 3, g = 2, k = 2: χ = (1/2, 3/2, 9/2), M_2 = 1/2 − 2·3/2 + 9/2 = 2 = (3 − 1)²/2.

Where a weight is the same in both networks, g = |a| is best, and every character is |a|: a^k/|a|^(k−1) for even k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pathlift.edges.weights import Entry, Stream
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
        return {k: ((k // 2) ** 2, k + 1) for k in range(0, self.order + 1, 2)}  # 1 + 3 + 5 + … are squares

    @property
    def signed(self) -> frozenset[int]:
        """The characters that may be negative, or so much smaller than Φ(g) that their range is not looked at."""
        return frozenset(range(1, self.count))

    def of(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Compute the characters of a weight tensor, one after the other.

        Row k holds χ_j = g·x^(k−j)·y^j, j = 0…k, with x = a/g and y = b/g. Times xy the j-th of a row is the one after it in
        the next: so all of them are made from g, g·x², g·x⁴, … and g·y², g·y⁴, … by one multiplication each, in place.

        Args:
            weight: The weight.
            a: Values of θ.
            b: Values of θ'.
            extras: What g depends on besides (`ComparisonWeights`).

        Yields:
            The number of a character, and its values, for use before the next is asked for.
        """
        g = self.g(weight, a, b, *extras)
        if not self.order:
            yield 0, g
            return
        safe = g if nowhere(g, 0.0) else torch.where(g > 0, g, 1.0)
        x, y = a / safe, b / safe
        xy, room = x * y, Room(g)
        yield from self._along(0, 0, g, xy, room)
        for square, last in ((_times(x, x), False), (_times(y, y), True)):
            side = g
            for k in range(2, self.order + 1, 2):
                side = side * square if k == 2 else _times(side, square)
                yield from self._along(k, k if last else 0, side, xy, room)

    def _along(self, k: int, j: int, character: Tensor, xy: Tensor, room: Room) -> Iterator[tuple[int, Tensor]]:
        """Yield a character of row k and those that it becomes times xy, (xy)², …; it is not overwritten."""
        yield (k // 2) ** 2 + j, character
        for step, row in enumerate(range(k + 2, self.order + 1, 2), 1):
            character = room.product(character, xy) if step == 1 else _times(character, xy)
            yield (row // 2) ** 2 + j + step, character


@dataclass(frozen=True)
class Affinities:
    """The characters |Φ|^(1−l/n)·|Φ'|^(l/n), l = 0…n, and after them some of these times the sign of ΦΦ'.

    Attributes:
        order: n.
        signs: The l of the signed ones; none where no weight changes its sign, for they are the unsigned ones.
    """

    order: int
    signs: range

    @property
    def count(self) -> int:
        """Number of characters."""
        return self.order + 1 + len(self.signs)

    @property
    def signed(self) -> frozenset[int]:
        """The characters that may be negative, and those between the path-norms, which bound them."""
        return frozenset(range(self.count)) - {0, self.order}

    def of(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> Iterator[tuple[int, Tensor]]:
        """See `Moments.of`: |a|, times (|b|/|a|)^(1/n) as often as it takes, and |b|."""
        del weight, extras
        sizes = a.abs(), b.abs()
        first, second = (_root(size, self.order) for size in sizes)
        sign = torch.sign(a) * torch.sign(b) if self.signs else None  # 0 where one of both is: such paths are not shared
        room = Room(a)
        # the quotient of roots is in range whatever a and b are, but for square roots, whose ladder has one step
        ratio = second / (first if nowhere(first, 0.0) else torch.where(first > 0, first, 1.0))
        affinity = sizes[0]
        for number in range(self.order + 1):
            if number == self.order:
                affinity = sizes[1]
            elif number == 1:
                affinity = first * second if self.order == 2 else affinity * ratio
            elif number > 1:
                affinity = _times(affinity, ratio)
            yield number, affinity
            if sign is not None and number in self.signs:
                yield self.order + 1 + self.signs.index(number), room.product(affinity, sign)


def nowhere(values: Tensor, least: float) -> bool:
    """Whether no entry is at or below a number: a look that spares two copies on a processor; elsewhere it is not taken."""
    return values.device.type == "cpu" and values.numel() > 0 and bool(values.detach().amin() > least)


class Room:
    """Memory for one result after the other; new memory for each where gradients are recorded."""

    def __init__(self, like: Tensor) -> None:
        """Ask for memory.

        Args:
            like: A tensor of its shape and type.
        """
        self.memory = None if torch.is_grad_enabled() else torch.empty_like(like)

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """Return first·second in this memory."""
        return torch.mul(first, second, out=self.memory)


def _times(value: Tensor, factor: Tensor) -> Tensor:
    """Return value·factor, in the memory of the first where no gradients are recorded."""
    return value * factor if torch.is_grad_enabled() else value.mul_(factor)


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
        return {key: character.clone() for key, character in self.stream(weight, *values)}

    def stream(self, weight: WeightTensor, *values: Tensor) -> Stream:
        """See `ProductProgram.stream`."""
        if weight not in self.pair.changed:
            size = values[0].abs()
            yield from ((key, size) for key in self.diagonal)
            return
        start = 0
        for family in self.families:
            for number, character in family.of(weight, *values):
                yield self.diagonal[start + number], character
            start += family.count
