"""Convolutions between compact tensors: each class of positions reads its window once, then one matrix product.

A convolution is a matrix product of the weights (channels above, channels below · taps) with columns (channels below · taps,
positions): column p holds what position p reads. Where positions below are stored by classes, so are those above, and a
column is gathered once for each class of positions: `through_taps` says, along each dimension, which classes these read.

Example: one dimension, kernel 3, padding 1, 224 equal positions below, stored as one value x. There are three classes of
positions: the left end reads (none, x, x), the right end (x, x, none), all others (x, x, x). So there are 3 columns instead of
224, whatever the size of the image. With two dimensions there are 3 · 3 classes, the pairs of one along each.

The weights are read once, in blocks of rows that stay in a cache, and positions are worked off in chunks whose columns do.

Where the windows of neighbouring classes overlap, as those of a small image do, that image is laid out in the place of the
columns: in the example (none, x, x, x, none), over which the kernel slides. PyTorch's convolution gathers from it what it
needs while it is in a cache: in a fifth to a half of the time where channels are few, in three quarters where a layer has
256, and no sooner with 512.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pathlift import fused
from pathlift.edges.axis import Table
from pathlift.edges.base import Edges
from pathlift.edges.pattern import Pattern, convolution_pattern, tap_triples
from pathlift.edges.product import product, turned_product
from pathlift.edges.weights import Bundle, Entry, Weights, add_scaled, new_memory

SLIDING = 1 << 20 if torch.backends.mkldnn.is_available() else 0
"""Weights up to this size are left to PyTorch's convolution where windows slide, if it is that of oneDNN."""

FEW = 64
"""Positions up to which columns are turned round, to lie end to end, before they are multiplied in blocks of channels below."""

COLUMNS = 1 << 20
"""Positions are gathered in chunks of about this many elements, which stay in a cache."""


class GatheredConvolution(Edges):
    """A convolution between compact tensors; see the head of this module."""

    def __init__(self, tables: Sequence[Tensor], counts: Sequence[int], *, groups: int, transposed: bool) -> None:
        """Describe the map.

        Args:
            tables: For each spatial dimension the classes that each output class reads, one per tap of the kernel, shape
                (outputs, taps); the number of classes below stands for "no neuron".
            counts: Number of classes below, for each spatial dimension.
            groups: Groups of channels.
            transposed: The weight has the channels below first, then those above in one group.
        """
        self.groups = groups
        self.transposed = transposed
        self.tables, self.counts = tuple(tables), tuple(counts)
        self.spatial = tuple(len(table) for table in tables)
        self.below = math.prod(counts)
        self._index = joined_taps(tables, counts)
        self.taps, self.count = self._index.shape
        self.padded = bool((self._index == self.below).any())
        self.plain = self.taps == 1 and torch.equal(self._index[0], torch.arange(self.below))
        self._whole = Table(self._index.reshape(1, -1))
        self._chunks: dict[int, list[tuple[slice, Table]]] = {}
        self._image = None if transposed or self.plain else _Image.of(self.tables, self.counts)

    @override
    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        triples = tap_triples([self._index.T], [self.below], 1)
        return convolution_pattern(below, weight, self.spatial, self.groups, transposed=self.transposed, triples=triples)

    # ---- columns: what positions read

    def _positions(self, rows: int) -> list[tuple[slice, Table]]:
        """Split the positions above into chunks whose columns, ``rows`` high, fit a cache; at least 64 positions each."""
        if rows not in self._chunks:
            step = self.count if self.plain or torch.is_grad_enabled() else max(64, COLUMNS // max(rows, 1))
            self._chunks[rows] = [
                (slice(first, min(first + step, self.count)), Table(self._index[:, first : first + step].reshape(1, -1)))
                for first in range(0, self.count, step)
            ]
        return self._chunks[rows]

    def _flat(self, x: Tensor) -> Tensor:
        """Return x as (channels, positions), with a position that is always 0 at the end where one is needed."""
        flat = x.reshape(x.shape[1], self.below)
        return F.pad(flat, (0, 1)) if self.padded else flat

    def _columns(self, flat: Tensor, table: Table) -> Tensor:
        """Return what the positions of a chunk read: shape (channels, taps, positions)."""
        if self.plain:
            return flat.unsqueeze(1)
        index = table.on(flat.device)
        return flat.gather(1, index.expand(len(flat), -1)).view(len(flat), self.taps, -1)

    # ---- the matrix of weights, and the columns that a block of its rows meets

    def _per_group(self, weight: Sequence[int]) -> int:
        """Return how many rows of the weight belong to a group: channels above, or below if ``transposed``."""
        return weight[0] // self.groups

    def _multiple(self, weight: Sequence[int]) -> int:
        """Return what the length of a block of rows is a multiple of: a group is not cut, unless it is the only one."""
        return 1 if self.groups == 1 else self._per_group(weight)

    def _matrix(self, block: Tensor, columns: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return a block as a matrix (above, below·taps), and the columns that it meets; for one group.

        Rows are channels above, and the block gives all that comes to these. With ``transposed`` they are channels below, and
        it gives to all channels above the part that comes from these: parts that are to be added.
        """
        if self.transposed:
            return block.flatten(2).transpose(0, 1).flatten(1), columns[rows].flatten(0, 1)
        return block.flatten(1), columns.flatten(0, 1)

    def _matrices(self, block: Tensor, columns: Tensor, rows: slice, per_group: int) -> tuple[slice, Tensor, Tensor]:
        """Return the groups in a block, their matrices (groups, above, below·taps), and the columns that they meet."""
        chosen = slice(rows.start // per_group, rows.stop // per_group)
        read = columns.view(self.groups, -1, columns.shape[-1])[chosen]
        matrix = block.view(len(read), per_group, *block.shape[1:]).flatten(3)
        matrix = matrix.transpose(1, 2) if self.transposed else matrix
        return chosen, matrix.flatten(2), read

    @property
    def _adds(self) -> bool:
        """Whether blocks of rows give parts of a sum, rather than some channels above each."""
        return self.transposed and self.groups == 1

    def _slides(self, x: Tensor, weight: Sequence[int]) -> bool:
        """Whether the windows of values and weights are left to PyTorch's convolution."""
        fits = x.dtype == torch.float32 and x.device.type == "cpu" and math.prod(weight) <= SLIDING
        return fits and self._image is not None

    # ---- up: sums and largest

    @override
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        return self.each([x], w)[0]

    @override
    def each(self, xs: Sequence[Tensor], w: Weights) -> list[Tensor]:
        """Lay the columns of all side by side."""
        if self._image is not None and self._slides(xs[0], w.shape):
            return self._image.sums(xs, w.brief(), self.groups)
        flat = [self._flat(x) for x in xs]
        weight = w.magnitudes_of
        if weight is not None and self._suits_loops(weight, flat):
            return self._by_loops(weight, flat)
        pieces: list[Tensor] = []
        for _, table in self._positions(len(xs) * xs[0].shape[1] * self.taps):
            columns = _side_by_side([self._columns(each, table) for each in flat], 2)
            parts: list[Tensor] = []
            for rows, block in w.rows(self._multiple(w.shape)):
                part = self._part(block, columns, rows, self._per_group(w.shape), product)
                parts = [parts[0] + part] if self._adds and parts else [*parts, part]
            pieces.append(_side_by_side(parts, 0))
        if len(xs) == 1:
            return [_side_by_side(pieces, 1).view(1, -1, *self.spatial)]
        above = _side_by_side([piece.unflatten(1, (len(xs), -1)) for piece in pieces], 2)
        return [each.reshape(1, -1, *self.spatial) for each in above.unbind(1)]

    def _suits_loops(self, weight: Tensor, flat: Sequence[Tensor]) -> bool:
        """Whether there are few enough positions for the loops of `pathlift.fused`, and weights enough."""
        few = self.groups == 1 and not self.transposed and len(flat) * self.count <= fused.FEW
        return few and fused.suits((weight,), flat)

    def _by_loops(self, weight: Tensor, flat: Sequence[Tensor]) -> list[Tensor]:
        columns = [self._columns(each, self._whole) for each in flat]
        rows = torch.cat([each.flatten(0, 1).T for each in columns]).contiguous()
        above = fused.product(weight.flatten(1), rows).unflatten(0, (len(flat), self.count))
        return [each.T.reshape(1, -1, *self.spatial) for each in above]

    @override
    def sums(self, xs: Mapping[int, Tensor], bundle: Bundle, factors: Mapping[Entry, float]) -> dict[int, Tensor]:
        if self._slides(next(iter(xs.values())), bundle.shape):
            return super().sums(xs, bundle, factors)
        flat = {track: self._flat(x) for track, x in xs.items()}
        below = next(iter(xs.values())).shape[1]
        tall = self.groups == 1 and not self.transposed and bundle.blocks > 1
        pieces: dict[int, list[Tensor]] = {}
        for _, table in self._positions(below * self.taps * max(1, len(xs) // 4)):
            columns = {track: self._columns(values, table) for track, values in flat.items()}
            above = (self._by_antecedents if tall else self._by_rows)(columns, bundle, factors)
            for track, piece in above.items():
                pieces.setdefault(track, []).append(piece)
        return {track: _side_by_side(piece, 1).view(1, -1, *self.spatial) for track, piece in pieces.items()}

    def _part(
        self, block: Tensor, columns: Tensor, rows: slice, per_group: int, multiply: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Return what a block of weights gives to a chunk of positions: (channels above, positions)."""
        if self.groups == 1:
            return multiply(*self._matrix(block, columns, rows))
        _, matrices, read = self._matrices(block, columns, rows, per_group)
        return torch.matmul(matrices, read).flatten(0, -2)

    def _by_rows(self, columns: Mapping[int, Tensor], bundle: Bundle, factors: Mapping[Entry, float]) -> dict[int, Tensor]:
        """Multiply several weights to the columns of several tracks, in blocks of rows."""
        added: dict[int, Tensor] = {}
        parts: dict[int, list[Tensor]] = {}
        for rows, block in bundle.rows(self._multiple(bundle.shape)):
            above = added if self._adds else {}
            for (to, source), weight in block:
                if (to, source) in factors:
                    part = self._part(weight, columns[source], rows, self._per_group(bundle.shape), torch.mm)
                    add_scaled(above, to, part, factors[to, source])
            if not self._adds:
                for track, part in above.items():
                    parts.setdefault(track, []).append(part)
        return added or {track: _side_by_side(several, 0) for track, several in parts.items()}

    def _by_antecedents(
        self, columns: Mapping[int, Tensor], bundle: Bundle, factors: Mapping[Entry, float]
    ) -> dict[int, Tensor]:
        """Do the same in blocks of channels below: 0.85 of the time where there are more than a few positions."""
        flat = {track: values.flatten(0, 1) for track, values in columns.items()}
        turned = {track: values.T.contiguous().T if values.shape[1] <= FEW else values for track, values in flat.items()}
        above: dict[int, Tensor] = {}
        for channels, block in bundle.antecedents():
            for (to, source), weight in block:
                if (to, source) not in factors:
                    continue
                read = turned[source][channels.start * self.taps : channels.stop * self.taps]
                if to in above:
                    above[to].addmm_(weight.flatten(1), read, alpha=factors[to, source])
                else:
                    add_scaled(above, to, torch.mm(weight.flatten(1), read), factors[to, source])
        return above

    @override
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        weight = w.full()
        columns = self._columns(self._flat(x), self._whole).contiguous()
        _, matrices, read = self._matrices(weight, columns, slice(0, len(weight)), self._per_group(weight.shape))
        step = max(1, COLUMNS * 4 // max(1, matrices[0].numel()))
        pieces = [
            torch.stack([(matrices[group, :, :, None] * part[group, None]).amax(1) for group in range(self.groups)])
            for part in read.split(step, 2)
        ]
        return torch.cat(pieces, 2).reshape(1, -1, *self.spatial)

    # ---- back

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Multiply back to the columns, and add each entry of these to where it was gathered."""
        assert w is not None
        if self._image is not None and self._slides(x, w.shape):
            return self._image.adjoint(x, w.brief(), g, self.groups, below=below, share=share)
        flat, above = self._flat(x), g.reshape(g.shape[1], self.count)
        to_flat = torch.zeros_like(flat) if below and not self.plain else None
        to_weight: Tensor | None = None
        go_back = self._back if self.groups == 1 else self._back_by_groups
        for positions, table in self._positions(x.shape[1] * self.taps):
            columns = self._columns(flat, table).contiguous()
            to_columns, shares = go_back(columns, w, above[:, positions].contiguous(), below=below, share=share)
            if self.plain:
                to_flat = to_columns
            elif to_flat is not None and to_columns is not None:
                index = table.on(flat.device)
                to_flat.scatter_add_(1, index.expand(len(flat), -1), to_columns.view(len(flat), -1))
            if shares is not None:
                to_weight = shares if to_weight is None else to_weight.add_(shares)
        if to_flat is not None:
            to_flat = to_flat.view(x.shape[1], -1)[:, : self.below].reshape(x.shape)
        return to_flat, to_weight

    def _back(self, columns: Tensor, w: Weights, g: Tensor, *, below: bool, share: bool) -> tuple[Tensor | None, Tensor | None]:
        """The adjoint for one chunk of positions: to the columns, and to the weights."""
        # On the way back channels above are what is summed. So it is rows of channels above that give parts to be added, and
        # with ``transposed`` each block gives some channels below.
        to_weight = new_memory(columns, w.shape) if share else None
        to_columns: list[Tensor] = []
        for rows, block in w.rows():
            matrix, read = self._matrix(block, columns, rows)
            from_above = g if self.transposed else g[rows]
            if below:
                part = turned_product(matrix, from_above)
                to_columns = [*to_columns, part] if self.transposed or not to_columns else [to_columns[0].add_(part)]
            if to_weight is not None:
                torch.mul(self._as_weight(product(from_above, read.T), block), block, out=to_weight[rows])
        return (_side_by_side(to_columns, 0).view(columns.shape) if below else None), to_weight

    def _back_by_groups(
        self, columns: Tensor, w: Weights, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The same for several groups: a block of rows has all that goes between the channels of its groups."""
        per_group = self._per_group(w.shape)
        to_weight = new_memory(columns, w.shape) if share else None
        to_columns = columns.new_zeros(self.groups, len(columns) // self.groups * self.taps, g.shape[-1]) if below else None
        for rows, block in w.rows(per_group):
            chosen, matrices, read = self._matrices(block, columns, rows, per_group)
            from_above = g.view(self.groups, -1, g.shape[-1])[chosen]
            if to_columns is not None:
                to_columns[chosen].baddbmm_(matrices.transpose(1, 2), from_above)
            if to_weight is not None:
                slopes = torch.bmm(from_above, read.transpose(1, 2))
                torch.mul(self._as_weight(slopes, block), block, out=to_weight[rows])
        return (None if to_columns is None else to_columns.view(columns.shape)), to_weight

    def _as_weight(self, matrix: Tensor, block: Tensor) -> Tensor:
        """Undo what `_matrix` and `_matrices` do to a block of weights."""
        if self.transposed:
            matrix = matrix.unflatten(-1, (-1, self.taps)).transpose(-3, -2)
        return matrix.reshape(block.shape)


class _Image:
    """A small image of classes of positions over which a kernel slides, and what `GatheredConvolution` makes of it."""

    def __init__(self, index: Sequence[Tensor], counts: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
        """Describe it.

        Args:
            index: For each dimension the classes, from one end of the image to the other.
            counts: Number of classes, for each dimension.
            stride: From one window to the next, for each dimension.
            padding: Positions beyond both ends that are no neurons.
        """
        self.stride, self.padding = list(stride), list(padding)
        self.same = all(torch.equal(classes, torch.arange(count)) for classes, count in zip(index, counts, strict=True))
        table = joined_taps([classes[None] for classes in index], counts).reshape(1, -1)
        self.size = [len(classes) for classes in index]
        self.below = math.prod(counts)
        self.table, self.padded = Table(table), bool((table == self.below).any())

    @staticmethod
    def of(tables: Sequence[Tensor], counts: Sequence[int]) -> _Image | None:
        """Lay out the image; None where windows do not slide over one."""
        lines = [_line(table.tolist()) for table in tables]
        index, padding, strides = [], [], []
        for line, count in zip(lines, counts, strict=True):
            if line is None:
                return None
            classes, stride = line
            ends = [next((at for at, own in enumerate(way) if own != count), 0) for way in (classes, classes[::-1])]
            padding.append(min(ends))
            index.append(torch.tensor(classes[padding[-1] : len(classes) - padding[-1]]))
            strides.append(stride)
        return _Image(index, counts, strides, padding)

    def _laid_out(self, x: Tensor) -> Tensor:
        if self.same:
            return x
        flat = x.reshape(x.shape[1], self.below)
        flat = F.pad(flat, (0, 1)) if self.padded else flat  # a position that is always 0 where one is needed
        return flat.gather(1, self.table.on(x.device).expand(len(flat), -1)).view(1, -1, *self.size)

    def sums(self, xs: Sequence[Tensor], weight: Tensor, groups: int) -> list[Tensor]:
        """See `Edges.each`."""
        images = _side_by_side([self._laid_out(x) for x in xs], 0)
        return list(torch.convolution(images, weight, None, *self._options(groups)).split(1))

    def adjoint(
        self, x: Tensor, weight: Tensor, g: Tensor, groups: int, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Edges.adjoint`."""
        to_image, to_weight, _ = torch.ops.aten.convolution_backward(
            g.contiguous(), self._laid_out(x), weight, None, *self._options(groups), [below, share, False]
        )
        if below and not self.same:
            count, index = x.shape[1], self.table.on(x.device)
            flat = x.new_zeros(count, self.below + self.padded)
            flat.scatter_add_(1, index.expand(count, -1), to_image.view(count, -1))
            to_image = flat[:, : self.below]
        return to_image.reshape(x.shape) if below else None, to_weight.mul_(weight) if share else None

    def _options(self, groups: int) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        ones = [1] * len(self.size)
        return self.stride, self.padding, ones, False, [0] * len(self.size), groups


EMPTY, TAKEN = -1, -2


def _line(table: list[list[int]]) -> tuple[list[int], int] | None:
    """Return a line over which overlapping windows slide, and the stride from one to the next; None where there is none.

    Args:
        table: What each window reads, one class per tap.

    Example:
        >>> _line([[3, 0, 1], [0, 1, 1], [1, 1, 2], [1, 2, 3]])
        ([3, 0, 1, 1, 2, 3], 1)
        >>> _line([[0, 1, 2], [2, 3, 4]]), _line([[0, 2, 4], [1, 3, 5]])
        (([0, 1, 2, 3, 4], 2), None)
    """
    taps = len(table[0])
    for stride in range(1, max(taps, 2)):
        line = [EMPTY] * (stride * (len(table) - 1) + taps)
        for number, classes in enumerate(table):
            for tap, own in enumerate(classes):
                before = line[number * stride + tap]
                line[number * stride + tap] = own if before in {EMPTY, own} else TAKEN
        if TAKEN not in line:
            return line, stride
    return None


def joined_taps(tables: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Return what each position reads with each tap of a kernel of several dimensions, from what it reads along each.

    Taps, positions and entries of the flattened compact tensor are numbers of which each dimension gives one digit.

    Args:
        tables: For each dimension the classes that each output class reads, shape (outputs, taps); the number of classes
            below stands for "no neuron".
        counts: Number of classes below, for each dimension.

    Returns:
        Entries of the flattened compact tensor, shape (taps, positions); their number stands for "no neuron".

    Example:
        Two columns of the last dimension, each read by one position; two rows, of which the only position reads the second and
        nothing:

        >>> joined_taps([torch.tensor([[1, 2]]), torch.tensor([[0], [1]])], [2, 2]).tolist()
        [[2, 3], [4, 4]]
    """
    index, there = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    for table, count in zip(tables, counts, strict=True):
        digit = table.T  # (taps, positions) of this dimension
        shape = (len(index) * len(digit), -1)
        index = (index[:, None, :, None] * count + digit[None, :, None, :]).reshape(shape)
        there = (there[:, None, :, None] & (digit < count)[None, :, None, :]).reshape(shape)
    return torch.where(there, index, math.prod(counts))


def _side_by_side(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """Join pieces; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)
