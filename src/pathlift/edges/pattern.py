"""Which weight stands on which edge: the one description of a weighted map that rescaling symmetries need (SPEC §7).

Every weighted map is a stack of dense blocks. With the neurons below laid out as (groups, ins, places below), those above
as (groups, outs, places above) and the weights as (groups, outs, ins, taps), weight [g, o, i, t] stands on the edge from
[g, i, q] to [g, o, p] for each triple (t, q, p), and on no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A tensor of shape ``whole`` in another order: reshaped to ``sizes``, permuted by ``order``, reshaped to ``shape``."""

    whole: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def split(self, x: Tensor) -> Tensor:
        """Return the tensor in the new order."""
        return x.reshape(self.sizes).permute(self.order).reshape(self.shape)

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return x.reshape([self.sizes[dim] for dim in self.order]).permute(inverse).reshape(self.whole)

    def axes(self) -> tuple[int | None, int | None]:
        """Return the dimension of the whole tensor that moves the outs, and the one that moves the ins, of four dimensions.

        None for one that no single dimension moves.
        """
        moved: tuple[list[int], list[int]] = ([], [])
        for dim in range(len(self.whole)):
            group, out, into, _ = self._end(dim)
            moved[0].extend([dim] if out or group else [])
            moved[1].extend([dim] if into or group else [])
        first, second = (found[0] if len(found) == 1 else None for found in moved)
        if second is None and len(moved[1]) == 2 and first in moved[1]:  # groups of channels: told by the outs already
            second = next(dim for dim in moved[1] if dim != first)
        return first, second

    def _end(self, dim: int) -> tuple[int, int, int, int]:
        """Return the place, in the new order of four dimensions, of the last entry along one dimension of the whole tensor."""
        flat = (self.whole[dim] - 1) * math.prod(self.whole[dim + 1 :])
        spots = [flat // math.prod(self.sizes[place + 1 :]) % self.sizes[place] for place in self.order]
        flat = sum(spot * math.prod(self.sizes[later] for later in self.order[place + 1 :]) for place, spot in enumerate(spots))
        _, outs, ins, taps = self.shape
        return flat // (outs * ins * taps), flat // (ins * taps) % outs, flat // taps % ins, flat % taps

    def kernel(self) -> tuple[int, ...]:
        """Return the sides of the block of taps, of four dimensions: those of the whole tensor that move nothing else."""
        ends = [self._end(dim) for dim in range(len(self.whole))]
        sides = [size for size, (*channels, tap) in zip(self.whole, ends, strict=True) if tap and not any(channels)]
        return tuple(sides) if math.prod(sides) == self.shape[3] else (self.shape[3],)

    @staticmethod
    def plain(shape: Sequence[int]) -> Layout:
        """Return the layout (1, size, 1, 1) of a tensor whose elements stand for themselves."""
        size = math.prod(shape)
        return Layout(tuple(shape), (size,), (0,), (1, size, 1, 1))


@dataclass(frozen=True)
class Pattern:
    """See the head of this module.

    Attributes:
        below: The neurons below as (groups, ins, places below).
        above: The neurons above as (groups, outs, places above).
        weight: The weights as (groups, outs, ins, taps).
        triples: Shape (triples, 3): tap, place below, place above.
    """

    below: Layout
    above: Layout
    weight: Layout
    triples: Tensor


def product_pattern(
    below: Sequence[int], weight: Sequence[int], letters: tuple[Sequence[object], Sequence[object], Sequence[object]]
) -> Pattern:
    """Return the pattern of an einsum, broadcasting included.

    Args:
        below: Shape of the neurons below.
        weight: Shape of the weight.
        letters: Names of the dimensions of the neurons below, of the weight and of the neurons above.

    Returns:
        The pattern. Dimensions that all three share are groups; those that only the weight has are taps; those that only
        the neurons below have are places that one neuron above reads with one weight.
    """
    first, second, out = letters
    size: dict[object, int] = {}
    for names, shape in ((first, below), (second, weight)):
        for letter, extent in zip(names, shape, strict=True):
            size[letter] = max(size.get(letter, 1), extent)
    wide_x = {letter for letter, extent in zip(first, below, strict=True) if extent == size[letter]}
    wide_w = {letter for letter, extent in zip(second, weight, strict=True) if extent == size[letter]}
    kept = set(out)
    both = [letter for letter in size if letter in wide_x and letter in wide_w]
    groups, ins = [c for c in both if c in kept], [c for c in both if c not in kept]
    outs, taps = _told_apart([letter for letter in size if letter in wide_w and letter not in wide_x], kept)
    places, merged = _told_apart([letter for letter in size if letter in wide_x and letter not in wide_w], kept)

    def layout(names: Sequence[object], whole: Sequence[int], wide: set[object], *blocks: list[object]) -> Layout:
        order = [letter for block in blocks for letter in block if letter in wide]
        narrow = [letter for letter in names if letter not in order]  # of size 1 here
        places_of = {letter: place for place, letter in enumerate(names)}
        shape = tuple(math.prod(size[letter] for letter in block) for block in blocks)
        sizes = tuple(size[letter] if letter in order else 1 for letter in names)
        return Layout(tuple(whole), sizes, tuple(places_of[letter] for letter in (*order, *narrow)), shape)

    count, apart = math.prod(size[c] for c in places), math.prod(size[c] for c in merged)
    tap_count = math.prod(size[c] for c in taps)
    tap, place = torch.arange(tap_count, device="cpu"), torch.arange(count * apart, device="cpu")
    triples = torch.stack([
        tap.repeat_interleave(len(place)),
        place.repeat(tap_count),
        torch.div(place, apart, rounding_mode="floor").repeat(tap_count),
    ])
    return Pattern(
        layout(first, below, wide_x, groups, ins, [*places, *merged]),
        layout(out, [size[letter] for letter in out], kept, groups, outs, places),
        layout(second, weight, wide_w, groups, outs, ins, taps),
        triples.T,
    )


def _told_apart(letters: list[object], kept: set[object]) -> tuple[list[object], list[object]]:
    return [c for c in letters if c in kept], [c for c in letters if c not in kept]


def tap_triples(tables: Sequence[Tensor], below: Sequence[int], batch: int = 1) -> Tensor:
    """Return the triples of a windowed map from one table per spatial dimension.

    Args:
        tables: For each dimension the position that each position above reads with each tap, shape (above, taps); an
            entry outside the positions below is "none".
        below: Number of positions below, for each dimension.
        batch: How many such maps lie side by side.

    Returns:
        Shape (triples, 3).
    """
    tap, source, place = (torch.zeros(1, dtype=torch.long, device="cpu") for _ in range(3))
    for table, size in zip(tables, below, strict=True):
        spot, own = torch.nonzero((table >= 0) & (table < size), as_tuple=True)
        read = table[spot, own]
        tap = (tap[:, None] * table.shape[1] + own).reshape(-1)
        source = (source[:, None] * size + read).reshape(-1)
        place = (place[:, None] * table.shape[0] + spot).reshape(-1)
    count_below, count_above = math.prod(below), math.prod(table.shape[0] for table in tables)
    sample = torch.arange(batch, device="cpu")[:, None]
    return torch.stack([
        tap.expand(batch, -1).reshape(-1),
        (sample * count_below + source).reshape(-1),
        (sample * count_above + place).reshape(-1),
    ]).T


def convolution_pattern(
    below: Sequence[int], weight: Sequence[int], places: Sequence[int], groups: int, *, transposed: bool, triples: Tensor
) -> Pattern:
    """Return the pattern of a convolution.

    Args:
        below: Shape of the neurons below, (batch, channels, …).
        weight: Shape of the weight.
        places: Number of positions above, for each spatial dimension.
        groups: Groups of channels.
        transposed: The weight has the channels below first, then those above in one group.
        triples: Which taps read which places (`tap_triples`).

    Returns:
        The pattern.
    """
    batch, channels, *spatial = below
    ins, taps = channels // groups, math.prod(weight[2:])
    outs = weight[1] if transposed else weight[0] // groups
    space, above = math.prod(spatial), math.prod(places)
    kernel = Layout(tuple(weight), (groups, ins, outs, taps), (0, 2, 1, 3), (groups, outs, ins, taps))
    plain = Layout(tuple(weight), (groups, outs, ins, taps), (0, 1, 2, 3), (groups, outs, ins, taps))
    return Pattern(
        Layout(tuple(below), (batch, groups, ins, space), (1, 2, 0, 3), (groups, ins, batch * space)),
        Layout((batch, groups * outs, *places), (batch, groups, outs, above), (1, 2, 0, 3), (groups, outs, batch * above)),
        kernel if transposed else plain,
        triples,
    )
