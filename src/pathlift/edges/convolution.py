"""Edge maps of convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.edges.axis import Axis, Table, through_taps
from pathlift.edges.base import Compact, Edges
from pathlift.edges.pattern import Pattern, convolution_pattern, tap_triples
from pathlift.edges.product import product, turned_product
from pathlift.edges.weights import Bundle, Entry, Weights, add_scaled

SMALL_WEIGHT = 1 << 18
"""Where no positions are equal, weights up to this size are left to PyTorch's convolution."""

FEW = 64
"""Places up to which columns are turned round before they are multiplied."""

COLUMNS = 1 << 20
"""Positions are gathered in chunks of about this many elements, which stay in a cache."""


@dataclass(frozen=True)
class Convolution(Edges):
    """The convolution of `torch.convolution`, zero padding included (padding holds no neurons).

    ``pad_before`` is an extra zero padding, in the order of `torch.nn.functional.pad`, for 'same' with even kernels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    pad_before: tuple[int, ...] = ()
    fresh = True

    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        """See `Edges.compact`."""
        assert weight is not None
        crossed = frozenset(dim for dim in (0, 1) if axes[dim].classes is not None)
        if crossed:
            return crossed
        full = all(axis.classes is None for axis in axes)
        if axes[0].size != 1 or (full and math.prod(weight) <= SMALL_WEIGHT and math.prod(weight[2:]) > 1):
            return super().compact(axes, out, weight)  # nothing to gain: no equal positions, and a small weight
        found = [
            through_taps(axes[2 + place], self._taps(place, out[2 + place], weight[2 + place])) for place in range(len(out) - 2)
        ]
        edges = GatheredConvolution(
            [table for _, table in found],
            [axis.count for axis in axes[2:]],
            groups=self.groups,
            transposed=self.transposed,
        )
        return Compact(edges, (Axis.full(1), Axis.full(out[1]), *(axis for axis, _ in found)))

    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        """See `Edges.pattern`."""
        places = tuple(self.sum(torch.empty(below, device="meta"), _meta(weight)).shape[2:])
        tables = [self._taps(place, count, weight[2 + place]) for place, count in enumerate(places)]
        triples = tap_triples(tables, below[2:], below[0])
        return convolution_pattern(below, weight, places, self.groups, transposed=self.transposed, triples=triples)

    def _taps(self, place: int, outputs: int, kernel: int) -> Tensor:
        """Return the input position that each output position reads with each tap, shape (outputs, kernel); −1 for none."""
        stride, padding, dilation = self.stride[place], self.padding[place], self.dilation[place]
        spots, taps = torch.arange(outputs)[:, None], torch.arange(kernel) * dilation
        if self.transposed:
            moved = spots + padding - taps
            return torch.where(moved % stride == 0, moved // stride, -1)
        before = self.pad_before[::-1][1::2] if self.pad_before else (0,) * len(self.stride)
        return spots * stride - padding - before[place] + taps

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        return torch.convolution(self._pad(x), w.brief(), None, *self._options)

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        assert w is not None
        windows, kernels, places = self._windows(x, w.full())
        step = max(1, COLUMNS * 2 // max(1, kernels.numel() // self.groups))
        pieces = [
            torch.stack(
                [(part[:, group, :, None] * kernels[group]).amax(-1) for group in range(self.groups)], 1
            )  # batch, group, place, channel
            for part in windows.split(step, 2)
        ]
        return torch.cat(pieces, 2).transpose(2, 3).reshape(len(x), -1, *places)

    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        """See `Edges.gap`; one group and one channel above at a time."""
        first, kernels, places = self._windows(x, w)
        second, others, _ = self._windows(y, z)
        scale = ratio.reshape(len(x), self.groups, -1, math.prod(places))
        out = torch.empty_like(scale)
        for group in range(self.groups):
            for channel in range(scale.shape[2]):
                other = scale[:, group, channel, :, None] * (second[:, group] * others[group, channel])
                out[:, group, channel] = (first[:, group] * kernels[group, channel] - other).abs().sum(-1)
        return out.reshape(ratio.shape)

    def _windows(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Return what each place reads and with which weights.

        Returns:
            Windows (batch, group, place, antecedents), kernels (group, channel, antecedents), sizes of the places.
        """
        x = self._pad(x)
        stride, padding = self.stride, self.padding
        if self.transposed:
            x, weight, padding = self._untranspose(x, weight)
            stride = (1,) * len(stride)
        if min(padding, default=0) < 0 or any(padding):
            x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
        for axis, (size, step, gap) in enumerate(zip(weight.shape[2:], stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
        batch, channels, *rest = x.shape
        places = rest[: len(stride)]
        x = x.reshape(batch, self.groups, channels // self.groups, -1, weight[0, 0].numel()).transpose(2, 3)
        kernels = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        return x.reshape(batch, self.groups, x.shape[2], -1), kernels, places

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Edges.adjoint`."""
        assert w is not None
        weight, padded = w.brief(), self._pad(x)
        to_below, to_weight, _ = torch.ops.aten.convolution_backward(
            g.contiguous(), padded, weight, None, *self._options, [below, share, False]
        )
        if below and self.pad_before:
            to_below = F.pad(to_below, [-pad for pad in self.pad_before])
        return to_below if below else None, to_weight.mul_(weight) if share else None

    @property
    def _options(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        return (
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.transposed,
            list(self.output_padding),
            self.groups,
        )

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pad_before) if self.pad_before else x

    def _untranspose(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Rewrite a transposed convolution as a convolution with stride 1 over an input with zeros in between."""
        spatial = x.shape[2:]
        sizes = [
            (size - 1) * step + 1 + more for size, step, more in zip(spatial, self.stride, self.output_padding, strict=True)
        ]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        places: tuple[slice, ...] = (slice(None), slice(None))
        places += tuple(slice(0, (size - 1) * step + 1, step) for size, step in zip(spatial, self.stride, strict=True))
        spread[places] = x
        count = weight.shape[0] // self.groups
        kernels = weight.reshape(self.groups, count, *weight.shape[1:]).transpose(1, 2)
        kernels = kernels.reshape(-1, count, *weight.shape[2:]).flip(list(range(2, weight.dim())))
        padding = tuple(
            gap * (size - 1) - pad for gap, size, pad in zip(self.dilation, weight.shape[2:], self.padding, strict=True)
        )
        return spread, kernels, padding


def _meta(shape: Sequence[int]) -> Weights:
    """Return weights without values, to ask for shapes."""
    nothing = torch.empty(shape, device="meta")
    return Weights((nothing,), torch.abs, nothing.dtype, ready=nothing)


class GatheredConvolution(Edges):
    """A convolution between compact tensors: gather what each class of positions reads, then one matrix product.

    The weights are read once, in cache-sized blocks of rows; positions are worked off in chunks.
    """

    def __init__(self, tables: list[Tensor], counts: list[int], *, groups: int, transposed: bool) -> None:
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
        self.places = tuple(len(table) for table in tables)
        self.taps = 1
        self.below = 1
        joined, none = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool)
        for table, count in zip(tables, counts, strict=True):
            # (taps so far, this tap) × (places so far, this place) → place in the flattened compact tensor
            own = table.T
            joined = joined[:, None, :, None] * count + own[None, :, None, :]
            none = none[:, None, :, None] | (own == count)[None, :, None, :]
            self.taps, self.below = self.taps * own.shape[0], self.below * count
            joined = joined.reshape(self.taps, -1)
            none = none.reshape(self.taps, -1)
        joined = torch.where(none, self.below, joined)
        self.padded = bool(none.any())
        self.count = joined.shape[1]
        self.plain = self.taps == 1 and torch.equal(joined[0], torch.arange(self.below))
        self._index = joined
        self._chunks: dict[int, list[tuple[slice, Table]]] = {}

    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        """See `Edges.pattern`."""
        triples = tap_triples([self._index.T], [self.below], 1)
        return convolution_pattern(below, weight, self.places, self.groups, transposed=self.transposed, triples=triples)

    def _positions(self, rows: int) -> list[tuple[slice, Table]]:
        """Split the places above into chunks whose columns, ``rows`` high, fit a cache; at least 64 places each."""
        if rows not in self._chunks:
            step = self.count if self.plain or torch.is_grad_enabled() else max(64, COLUMNS // max(rows, 1))
            self._chunks[rows] = [
                (slice(first, min(first + step, self.count)), Table(self._index[:, first : first + step].reshape(1, -1)))
                for first in range(0, self.count, step)
            ]
        return self._chunks[rows]

    def _spread(self, x: Tensor) -> Tensor:
        """Return x as (channels, positions), with a position that is always 0 at the end where one is needed."""
        flat = x.reshape(x.shape[1], self.below)
        return F.pad(flat, (0, 1)) if self.padded else flat

    def _columns(self, flat: Tensor, table: Table) -> Tensor:
        """Return what the places of a chunk read: shape (channels, taps, places)."""
        if self.plain:
            return flat.unsqueeze(1)
        index = table.on(flat.device)
        return flat.gather(1, index.expand(len(flat), -1)).view(len(flat), self.taps, -1)

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        flat = self._spread(x)
        above = w.shape[1] * self.groups if self.transposed else w.shape[0]
        chunks = self._positions(x.shape[1] * self.taps)
        pieces = [self._product(self._columns(flat, table), w) for _, table in chunks]
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return out.view(1, above, *self.places)

    def _product(self, columns: Tensor, w: Weights) -> Tensor:
        """Multiply the weights to the columns: (channels below, taps, places) → (channels above, places)."""
        per_group = w.shape[0] // self.groups
        parts: list[Tensor] = []
        for rows, block in w.rows(1 if self.groups == 1 else per_group):
            if self.groups > 1:
                _, matrix, read = self._grouped(block, columns, rows, per_group)
                parts.append(torch.matmul(matrix, read).flatten(0, -2))
            elif self.transposed:
                part = product(block.flatten(2).permute(1, 0, 2).flatten(1), columns[rows].flatten(0, 1))
                parts = [part if not parts else parts[0] + part]
            else:
                parts.append(product(block.flatten(1), columns.flatten(0, 1)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sums(self, xs: Mapping[int, Tensor], bundle: Bundle, factors: Mapping[Entry, float]) -> dict[int, Tensor]:
        """See `Edges.sums`."""
        flat = {track: self._spread(x) for track, x in xs.items()}
        below = next(iter(xs.values())).shape[1]
        above = bundle.shape[1] * self.groups if self.transposed else bundle.shape[0]
        pieces: list[dict[int, Tensor]] = []
        for _, table in self._positions(below * self.taps * max(1, len(xs) // 4)):
            columns = {track: self._columns(own, table) for track, own in flat.items()}
            pieces.append(self._products(columns, bundle, factors))
        return {
            track: (pieces[0][track] if len(pieces) == 1 else torch.cat([piece[track] for piece in pieces], 1)).view(
                1, above, *self.places
            )
            for track in pieces[0]
        }

    def _products(self, columns: Mapping[int, Tensor], bundle: Bundle, factors: Mapping[Entry, float]) -> dict[int, Tensor]:
        """Multiply several weights to the columns of several tracks; see `_product`."""
        plain = self.groups == 1 and not self.transposed
        if plain and bundle.blocks > 1:
            return self._accumulated({track: own.flatten(0, 1) for track, own in columns.items()}, bundle, factors)
        per_group = bundle.shape[0] // self.groups
        whole: dict[int, Tensor] = {}
        parts: dict[int, list[Tensor]] = {}
        for rows, block in bundle.rows(1 if self.groups == 1 else per_group):
            found: dict[int, Tensor] = {}
            for entry, weight in block.items():
                if entry not in factors:
                    continue
                own = columns[entry[1]]
                if self.groups > 1:
                    _, matrix, read = self._grouped(weight, own, rows, per_group)
                    add_scaled(found, entry[0], torch.matmul(matrix, read).flatten(0, -2), factors[entry])
                elif self.transposed:
                    part = torch.mm(weight.flatten(2).permute(1, 0, 2).flatten(1), own[rows].flatten(0, 1))
                    add_scaled(whole, entry[0], part, factors[entry])
                else:
                    add_scaled(found, entry[0], torch.mm(weight.flatten(1), own.flatten(0, 1)), factors[entry])
            for track, part in found.items():
                parts.setdefault(track, []).append(part)
        return whole or {track: own[0] if len(own) == 1 else torch.cat(own) for track, own in parts.items()}

    @staticmethod
    def _accumulated(columns: Mapping[int, Tensor], bundle: Bundle, factors: Mapping[Entry, float]) -> dict[int, Tensor]:
        """Do the same in blocks of antecedents: tall blocks make faster products, for few places if columns lie end to end."""
        turned = {track: own.T.contiguous().T if own.shape[1] <= FEW else own for track, own in columns.items()}
        found: dict[int, Tensor] = {}
        for part, block in bundle.antecedents():
            for entry, weight in block.items():
                if entry not in factors:
                    continue
                matrix = weight.flatten(1)
                width = matrix.shape[1] // weight.shape[1]
                own = turned[entry[1]][part.start * width : part.stop * width]
                if entry[0] in found:
                    found[entry[0]].addmm_(matrix, own, alpha=factors[entry])
                else:
                    add_scaled(found, entry[0], torch.mm(matrix, own), factors[entry])
        return found

    def _grouped(self, block: Tensor, columns: Tensor, rows: slice, per_group: int) -> tuple[slice, Tensor, Tensor]:
        """Return the groups in a block, their matrices (groups, above, below·taps), and the columns that they meet."""
        chosen = slice(rows.start // per_group, rows.stop // per_group)
        read = columns.view(self.groups, -1, columns.shape[-1])[chosen]
        matrix = block.view(len(read), per_group, *block.shape[1:]).flatten(3)
        matrix = matrix.transpose(1, 2) if self.transposed else matrix
        return chosen, matrix.flatten(2), read

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        assert w is not None
        flat = self._spread(x)
        weight = w.full()
        per_group = weight.shape[0] // self.groups
        columns = self._columns(flat, Table(self._index.reshape(1, -1)))
        _, matrix, read = self._grouped(weight, columns.contiguous(), slice(0, len(weight)), per_group)
        step = max(1, COLUMNS * 4 // max(1, matrix[0].numel()))
        pieces = [
            torch.stack([(matrix[group, :, :, None] * part[group, None]).amax(1) for group in range(self.groups)])
            for part in read.split(step, 2)
        ]
        return torch.cat(pieces, 2).reshape(1, -1, *self.places)

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Edges.adjoint`."""
        assert w is not None
        flat, above = self._spread(x), g.reshape(g.shape[1], self.count)
        to_flat = torch.zeros_like(flat) if below else None
        to_weight: Tensor | None = None
        for part, table in self._positions(x.shape[1] * self.taps):
            columns = self._columns(flat, table).contiguous()
            back, found = self._back(columns, w, above[:, part].contiguous(), below=below, share=share)
            if to_flat is not None and back is not None and self.plain:
                to_flat = back.view(to_flat.shape)
            elif to_flat is not None and back is not None:
                index = table.on(flat.device)
                to_flat.scatter_add_(1, index.expand(len(flat), -1), back.view(len(flat), -1))
            if found is not None:
                to_weight = found if to_weight is None else to_weight.add_(found)
        if to_flat is not None:
            to_flat = to_flat[:, : self.below].reshape(x.shape)
        return to_flat, to_weight

    def _back(self, columns: Tensor, w: Weights, g: Tensor, *, below: bool, share: bool) -> tuple[Tensor | None, Tensor | None]:
        """The adjoint for one chunk of places: to the columns, and to the weights."""
        to_weight = columns.new_empty(w.shape) if share else None
        if self.groups > 1:
            per_group = w.shape[0] // self.groups
            to_columns = torch.zeros_like(columns) if below else None
            for rows, block in w.rows(per_group):
                target = None if to_weight is None else to_weight[rows]
                self._back_grouped(block, rows, per_group, columns, g, to_columns, target)
            return to_columns, to_weight
        back: list[Tensor] = []
        for rows, block in w.rows():
            # (channels above, channels below · taps), or its transpose block by block
            matrix = block.flatten(2).transpose(0, 1).flatten(1) if self.transposed else block.flatten(1)
            read, rest = (columns[rows], g) if self.transposed else (columns, g[rows])
            if below:
                part = turned_product(matrix, rest)
                back = [*back, part] if self.transposed or not back else [back[0].add_(part)]
            if to_weight is not None:
                found = product(rest, read.flatten(0, 1).T)
                if self.transposed:
                    found = found.unflatten(1, (-1, self.taps)).transpose(0, 1)
                torch.mul(found.reshape(block.shape), block, out=to_weight[rows])
        joined = None if not back else back[0] if len(back) == 1 else torch.cat(back)
        return None if joined is None else joined.view(columns.shape), to_weight

    def _back_grouped(
        self,
        block: Tensor,
        rows: slice,
        per_group: int,
        columns: Tensor,
        g: Tensor,
        to_columns: Tensor | None,
        to_weight: Tensor | None,
    ) -> None:
        """The same for the groups of one block of weights; writes into what is wanted."""
        chosen, matrix, read = self._grouped(block, columns, rows, per_group)
        rest = g.view(self.groups, -1, g.shape[-1])[chosen]
        if to_columns is not None:
            to_columns.view(self.groups, -1, g.shape[-1])[chosen].baddbmm_(matrix.transpose(1, 2), rest)
        if to_weight is not None:
            found = torch.bmm(rest, read.transpose(1, 2))
            if self.transposed:
                found = found.unflatten(2, (-1, self.taps)).transpose(1, 2)
            torch.mul(found.reshape(block.shape), block, out=to_weight)
