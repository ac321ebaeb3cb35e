"""Which weight stands on which edge: the one description of a weighted map that rescaling symmetries need (mathematics §7).

Every weighted map is a stack of dense blocks. With the neurons below laid out as (groups, ins, positions below), those above
as (groups, outs, positions above) and the weights as (groups, outs, ins, taps), weight [g, o, i, t] stands on the edge from
[g, i, q] to [g, o, p] for each triple (t, q, p), and on no other.

Example: a convolution of 2 channels into 4, of kernel 2 along 3 positions, in 2 groups. It has 1 channel below and 2 above
in each group, so ins = 1, outs = 2, taps = 2, 3 positions below, 2 above. Position p above reads p + t below with tap t: the
triples (t, q, p) are (0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 2, 1), the same for every group, out and in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A tensor of shape ``original`` in another order: reshaped to ``sizes``, permuted by ``order``, reshaped to ``shape``.

    Each dimension of the original tensor is made of some consecutive ``sizes``, its digits, and each digit goes into one
    dimension of the result. The weight (4, 1, 2) of the example above has the digits ``sizes`` = (2, 2, 1, 2): groups, outs,
    ins, taps. They stand in the right order already; a transposed convolution has (groups, ins, outs, taps) instead, and
    ``order`` = (0, 2, 1, 3).
    """

    original: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def split(self, x: Tensor) -> Tensor:
        """Return the tensor in the new order."""
        return x.reshape(self.sizes).permute(self.order).reshape(self.shape)

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return x.reshape([self.sizes[dim] for dim in self.order]).permute(inverse).reshape(self.original)

    def axes(self) -> tuple[int | None, int | None]:
        """Return the dimension of the original tensor that moves the outs, and the one that moves the ins, of four dimensions.

        A channel above is a pair (group, out), one below a pair (group, in). The weight (groups·outs, ins, …) of a
        convolution moves the channels above by dimension 0 alone, those below by dimension 1 and, through the groups, by
        dimension 0 as well. That one tells the outs, so dimension 1 tells the ins.

        Returns:
            Two dimensions; None for one that no single dimension moves.
        """
        moved = [self._last(dim) for dim in range(len(self.original))]
        above = [dim for dim, (group, out, _, _) in enumerate(moved) if group or out]
        below = [dim for dim, (group, _, into, _) in enumerate(moved) if group or into]
        outs = above[0] if len(above) == 1 else None
        if len(below) == 2 and outs in below:
            below.remove(outs)
        return outs, below[0] if len(below) == 1 else None

    def kernel(self) -> tuple[int, ...]:
        """Return the sides of the block of taps, of four dimensions: those of the original tensor that move nothing else."""
        moved = [self._last(dim) for dim in range(len(self.original))]
        sides = [size for size, (*channels, tap) in zip(self.original, moved, strict=True) if tap and not any(channels)]
        return tuple(sides) if math.prod(sides) == self.shape[3] else (self.shape[3],)

    def _last(self, dim: int) -> tuple[int, ...]:
        """Return where `split` takes the last entry along a dimension of the original tensor, the first along all others.

        All digits of the dimension have their largest value there, so the coordinates that it moves are those that are not 0.
        """
        corner = [size - 1 if other == dim else 0 for other, size in enumerate(self.original)]
        digits = np.unravel_index(np.ravel_multi_index(corner, self.original), self.sizes)
        turned = np.ravel_multi_index([digits[dim] for dim in self.order], [self.sizes[dim] for dim in self.order])
        return tuple(map(int, np.unravel_index(turned, self.shape)))

    @staticmethod
    def plain(shape: Sequence[int]) -> Layout:
        """Return the layout (1, size, 1, 1) of a tensor whose elements stand for themselves."""
        size = math.prod(shape)
        return Layout(tuple(shape), (size,), (0,), (1, size, 1, 1))


@dataclass(frozen=True)
class Pattern:
    """See the head of this module.

    Attributes:
        below: The neurons below as (groups, ins, positions below).
        above: The neurons above as (groups, outs, positions above).
        weight: The weights as (groups, outs, ins, taps).
        triples: Shape (triples, 3): tap, position below, position above.
    """

    below: Layout
    above: Layout
    weight: Layout
    triples: Tensor


def product_pattern(
    below: Sequence[int], weight: Sequence[int], letters: tuple[Sequence[object], Sequence[object], Sequence[object]]
) -> Pattern:
    """Return the pattern of an einsum, broadcasting included.

    An edge stands for each value of all letters, and each letter has one part in the pattern, told by where it occurs. A
    dimension of size 1 that is broadcast counts as none.

        ================  ===========  ======================================================================
        neurons, weight   in the sum   part
        ================  ===========  ======================================================================
        both              no           groups
        both              yes          ins
        weight alone      no           outs
        weight alone      yes          taps: several weights on edges between the same two neurons
        neurons alone     no           positions, above and below
        neurons alone     yes          merged positions: neurons below that one above reads with the same weight
        ================  ===========  ======================================================================

    Args:
        below: Shape of the neurons below.
        weight: Shape of the weight.
        letters: Names of the dimensions of the neurons below, of the weight and of the neurons above.

    Returns:
        The pattern.

    Example:
        A linear layer, ``"bi,oi->bo"``, on 2 rows of 3 neurons: i is summed, o is the weight's, b are positions. Weight [o, i]
        joins [i, b] to [o, b]:

        >>> pattern = product_pattern((2, 3), (4, 3), ("bi", "oi", "bo"))
        >>> pattern.below.shape, pattern.above.shape, pattern.weight.shape, pattern.triples.tolist()
        ((1, 3, 2), (1, 4, 2), (1, 4, 3, 1), [[0, 0, 0], [0, 1, 1]])
    """
    names_below, names_weight, names_above = letters
    size: dict[object, int] = {}
    for names, shape in ((names_below, below), (names_weight, weight)):
        for letter, extent in zip(names, shape, strict=True):
            size[letter] = max(size.get(letter, 1), extent)
    of_neurons = {letter for letter, extent in zip(names_below, below, strict=True) if extent == size[letter]}
    of_weight = {letter for letter, extent in zip(names_weight, weight, strict=True) if extent == size[letter]}
    kept = set(names_above)
    groups, ins = _partition([letter for letter in size if letter in of_neurons & of_weight], kept)
    outs, taps = _partition([letter for letter in size if letter in of_weight - of_neurons], kept)
    positions, merged = _partition([letter for letter in size if letter in of_neurons - of_weight], kept)

    def count(part: Iterable[object]) -> int:
        return math.prod(size[letter] for letter in part)

    def layout(names: Sequence[object], shape: Sequence[int], extents: set[object], *parts: list[object]) -> Layout:
        """Bring the dimensions of a tensor, those of size 1 at the end, into the order of the parts."""
        order = [letter for part in parts for letter in part if letter in extents]
        order += [letter for letter in names if letter not in order]
        sizes = tuple(size[letter] if letter in extents else 1 for letter in names)
        return Layout(tuple(shape), sizes, tuple(list(names).index(letter) for letter in order), tuple(map(count, parts)))

    tap, position = torch.meshgrid(
        torch.arange(count(taps), device="cpu"), torch.arange(count(positions + merged), device="cpu"), indexing="ij"
    )
    return Pattern(
        layout(names_below, below, of_neurons, groups, ins, positions + merged),
        layout(names_above, [size[letter] for letter in names_above], kept, groups, outs, positions),
        layout(names_weight, weight, of_weight, groups, outs, ins, taps),
        torch.stack([tap.flatten(), position.flatten(), position.flatten() // count(merged)]).T,
    )


def _partition(letters: list[object], kept: set[object]) -> tuple[list[object], list[object]]:
    """Return the letters that the result of an einsum keeps, and those that it sums."""
    return [letter for letter in letters if letter in kept], [letter for letter in letters if letter not in kept]


def tap_triples(tables: Sequence[Tensor], below: Sequence[int], batch: int = 1) -> Tensor:
    """Return the triples of a windowed map from one table per spatial dimension.

    Along several dimensions the edges are all combinations of one edge along each: taps, positions below and those above are
    numbers of which each dimension gives one digit, the last dimension the last.

    Args:
        tables: For each dimension the position that each position above reads with each tap, shape (above, taps); an
            entry outside the positions below is "none".
        below: Number of positions below, for each dimension.
        batch: How many such maps lie side by side.

    Returns:
        Shape (triples, 3).

    Example:
        Kernel 2 along 3 positions, see the head of this module:

        >>> tap_triples([torch.tensor([[0, 1], [1, 2]])], [3]).tolist()
        [[0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 2, 1]]
    """
    tap, source, position = (torch.zeros(1, dtype=torch.long, device="cpu") for _ in range(3))
    for table, size in zip(tables, below, strict=True):
        reader, reading = torch.nonzero((table >= 0) & (table < size), as_tuple=True)  # positions above, and their taps
        tap = (tap[:, None] * table.shape[1] + reading).reshape(-1)
        source = (source[:, None] * size + table[reader, reading]).reshape(-1)
        position = (position[:, None] * table.shape[0] + reader).reshape(-1)
    count_below, count_above = math.prod(below), math.prod(table.shape[0] for table in tables)
    sample = torch.arange(batch, device="cpu")[:, None]
    return torch.stack([
        tap.expand(batch, -1).reshape(-1),
        (sample * count_below + source).reshape(-1),
        (sample * count_above + position).reshape(-1),
    ]).T


def convolution_pattern(
    below: Sequence[int], weight: Sequence[int], above: Sequence[int], groups: int, *, transposed: bool, triples: Tensor
) -> Pattern:
    """Return the pattern of a convolution.

    Args:
        below: Shape of the neurons below, (batch, channels, …).
        weight: Shape of the weight.
        above: Number of positions above, for each spatial dimension.
        groups: Groups of channels.
        transposed: The weight has the channels below first, then those above in one group.
        triples: Which taps read which positions (`tap_triples`).

    Returns:
        The pattern.
    """
    batch, channels, *spatial = below
    ins, taps = channels // groups, math.prod(weight[2:])
    outs = weight[1] if transposed else weight[0] // groups
    space_below, space_above = math.prod(spatial), math.prod(above)
    kernel = Layout(tuple(weight), (groups, ins, outs, taps), (0, 2, 1, 3), (groups, outs, ins, taps))
    plain = Layout(tuple(weight), (groups, outs, ins, taps), (0, 1, 2, 3), (groups, outs, ins, taps))
    return Pattern(
        Layout(tuple(below), (batch, groups, ins, space_below), (1, 2, 0, 3), (groups, ins, batch * space_below)),
        Layout(
            (batch, groups * outs, *above),
            (batch, groups, outs, space_above),
            (1, 2, 0, 3),
            (groups, outs, batch * space_above),
        ),
        kernel if transposed else plain,
        triples,
    )
