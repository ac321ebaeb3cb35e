"""Edge maps of matrix products: linear layers, products with a parameter or constant on one side, maps along one axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.edges.axis import Axis, Table, classify
from pathlift.edges.base import Compact, Edges
from pathlift.edges.pattern import Layout, Pattern, product_pattern
from pathlift.edges.product import product
from pathlift.edges.weights import Bundle, Entry, Weights, add_scaled
from pathlift.edges.window import along


class Dense(Edges):
    """out[…, o] = Σ_i x[…, i]·w[o, i]: a linear layer, worked off in cache-sized blocks of rows.

    No copy of the size of the weight is ever made, so a path-norm costs one read of the weights.
    """

    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        """See `Edges.pattern`."""
        rows, (outs, ins) = math.prod(below[:-1]), weight
        row = torch.arange(rows)
        return Pattern(
            Layout(tuple(below), (rows, ins), (1, 0), (1, ins, rows)),
            Layout((*below[:-1], outs), (rows, outs), (1, 0), (1, outs, rows)),
            Layout(tuple(weight), (outs, ins), (0, 1), (1, outs, ins, 1)),
            torch.stack([torch.zeros_like(row), row, row], 1),
        )

    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        """See `Edges.compact`."""
        del weight
        if axes[-1].classes is not None:
            return frozenset({len(axes) - 1})
        return Compact(self, (*axes[:-1], Axis.full(out[-1])))

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        if torch.is_grad_enabled():
            return F.linear(x, w.full())
        rows = x.reshape(-1, x.shape[-1])
        pieces = [product(rows, block.T) for _, block in w.rows()]
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        return out.reshape(*x.shape[:-1], w.shape[0])

    def sums(self, xs: Mapping[int, Tensor], bundle: Bundle, factors: Mapping[Entry, float]) -> dict[int, Tensor]:
        """See `Edges.sums`."""
        rows = {track: x.reshape(-1, x.shape[-1]) for track, x in xs.items()}
        pieces: list[dict[int, Tensor]] = []
        for _, block in bundle.rows():
            found: dict[int, Tensor] = {}
            for entry, weight in block.items():
                if entry in factors:
                    add_scaled(found, entry[0], torch.mm(rows[entry[1]], weight.T), factors[entry])
            pieces.append(found)
        shape = (*next(iter(xs.values())).shape[:-1], bundle.shape[0])
        return {track: torch.cat([piece[track] for piece in pieces], 1).reshape(shape) for track in pieces[0]}

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        assert w is not None
        flat = x.reshape(-1, x.shape[-1])
        columns = [
            torch.stack([(block * row).amax(1) for row in flat])  # (rows of x, rows of the block)
            for _, block in w.rows()
        ]
        return torch.cat(columns, 1).reshape(*x.shape[:-1], w.shape[0])

    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        """See `Edges.gap`."""
        flat, other, scale = (t.reshape(-1, t.shape[-1]) for t in (x, y, ratio))
        rows = [
            (w * one - factor[:, None] * (z * two)).abs().sum(1) for one, two, factor in zip(flat, other, scale, strict=True)
        ]
        return torch.stack(rows).reshape(ratio.shape)

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Edges.adjoint`."""
        assert w is not None
        rows, above = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        to_below = torch.zeros_like(rows) if below else None
        to_weight = x.new_empty(w.shape) if share else None
        for part, block in w.rows():
            columns = above[:, part]
            if to_below is not None:
                to_below += product(columns, block)
            if to_weight is not None and len(rows) == 1:
                torch.mul(block * rows, columns.T, out=to_weight[part])
            elif to_weight is not None:
                torch.mul(block, product(columns.T, rows), out=to_weight[part])
        return None if to_below is None else to_below.reshape(x.shape), to_weight


class Contraction(Edges):
    """An einsum of x with a weight: ``equation`` is ``"x-letters,w-letters->out-letters"``."""

    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        """See `Edges.pattern`."""
        operands, result = self.equation.split("->")
        first, second = operands.split(",")
        return product_pattern(below, weight, (first, second, result))

    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        """See `Edges.compact`: dimensions along which the weight has no extent and that the result keeps stay as they are."""
        assert weight is not None
        operands, result = self.equation.split("->")
        first, second = operands.split(",")
        spread = {letter for letter, size in zip(second, weight, strict=True) if size > 1}
        mixed = frozenset(
            dim
            for dim, letter in enumerate(first)
            if axes[dim].classes is not None and (letter in spread or letter not in result)
        )
        below = dict(zip(first, axes, strict=True))
        kept = [
            below[letter] if letter in below and below[letter].size == size else Axis.full(size)
            for letter, size in zip(result, out, strict=True)
        ]
        return mixed or Compact(self, tuple(kept))

    def __init__(self, equation: str) -> None:
        """Describe the map.

        Args:
            equation: Explicit einsum equation without ellipsis; the first operand is x.
        """
        self.equation = equation

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        return torch.einsum(self.equation, x, w.full())

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        assert w is not None
        product, summed = self._products(x, w.full())
        return product.amax(summed) if summed else product

    def _products(self, x: Tensor, w: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return all products, and the dimensions over which the einsum sums them."""
        operands, out = self.equation.split("->")
        first, second = operands.split(",")
        full = out + "".join(dict.fromkeys(letter for letter in first + second if letter not in out))
        return _spread(x, first, full) * _spread(w, second, full), tuple(range(len(out), len(full)))

    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        """See `Edges.gap`."""
        (first, summed), (second, _) = self._products(x, w), self._products(y, z)
        difference = (first - ratio.reshape(*ratio.shape, *[1] * len(summed)) * second).abs()
        return difference.sum(summed) if summed else difference


def _spread(tensor: Tensor, letters: str, full: str) -> Tensor:
    """Lay a tensor out over all letters of ``full``, with size 1 where it has none."""
    tensor = tensor.permute([letters.index(letter) for letter in full if letter in letters])
    for place, letter in enumerate(full):
        if letter not in letters:
            tensor = tensor.unsqueeze(place)
    return tensor


class AxisMap(Edges):
    """out = w·x along dimension ``dim`` of x, with a constant matrix w (out size × in size): interpolation, adaptive means."""

    def __init__(self, dim: int, matrix: Tensor) -> None:
        """Describe the map.

        Args:
            dim: The dimension of x along which the matrix acts.
            matrix: The constant matrix, on the CPU: its entries that are not 0 are the edges.
        """
        self.dim = dim
        self.matrix = matrix

    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        """See `Edges.compact`: rows that give equal weights to equal classes are one row."""
        del out, weight
        there = self.matrix != 0
        width = max(int(there.sum(1).max()), 1)
        order = torch.argsort((~there).to(torch.int8), dim=1, stable=True)[:, :width]
        taps = torch.where(there.gather(1, order), order, -1)
        read = torch.where(taps >= 0, axes[self.dim].index[taps.clamp(min=0)], axes[self.dim].count)
        axis, first = classify(read, torch.where(taps >= 0, self.matrix.gather(1, order), 0.0))
        entries = Entries(Table(first), Table(torch.where(taps >= 0, order, 0)[first]), Table((taps >= 0)[first]))
        result = tuple(axis if dim == self.dim else own for dim, own in enumerate(axes))
        return Compact(WeightedTaps(self.dim, read[first], axes[self.dim].count), result, entries)

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        return along(x, w.full(), self.dim)

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        assert w is not None
        moved = x.movedim(self.dim, -1)
        rows = [(moved * row).amax(-1) for row in w.full()]
        return torch.stack(rows, -1).movedim(-1, self.dim)

    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        """See `Edges.gap`."""
        one, two, scale = (t.movedim(self.dim, -1) for t in (x, y, ratio))
        rows = [
            (one * first - scale[..., place, None] * (two * second)).abs().sum(-1)
            for place, (first, second) in enumerate(zip(w, z, strict=True))
        ]
        return torch.stack(rows, -1).movedim(-1, self.dim)

    def antecedents(self, x: Tensor) -> Tensor:
        """See `Edges.antecedents`."""
        rows = [row.nonzero()[:, 0] for row in self.matrix]
        width = max(len(row) for row in rows)
        none = x.shape[self.dim]
        table = torch.stack([F.pad(row, (0, width - len(row)), value=none) for row in rows]).to(x.device)
        padded = torch.cat([x, torch.full_like(x.narrow(self.dim, 0, 1), -math.inf)], self.dim)
        read: Tensor = padded.index_select(self.dim, table.T.reshape(-1)).unflatten(self.dim, (width, len(rows)))
        return read.movedim(self.dim, 0)


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of a matrix that are edges of a compact map: in the given rows, those of the given columns.

    Attributes:
        rows: Shape (outputs,).
        columns: Shape (outputs, taps).
        there: Shape (outputs, taps): False where an output has fewer edges.
    """

    rows: Table
    columns: Table
    there: Table

    def __call__(self, matrix: Tensor) -> Tensor:
        """Return the entries, shape (outputs, taps), 0 where there is no edge."""
        rows, columns, there = (table.on(matrix.device) for table in (self.rows, self.columns, self.there))
        found: Tensor = matrix[rows].gather(1, columns)
        return found * there


class WeightedTaps(Edges):
    """Along one dimension, out[o] = Σ_t x[table[o, t]]·w[o, t]: an interpolation whose constant matrix is sparse."""

    def __init__(self, dim: int, table: Tensor, count: int) -> None:
        """Describe the map.

        Args:
            dim: The dimension.
            table: Classes that each output reads, shape (outputs, taps); ``count`` for "no neuron".
            count: Number of classes below.
        """
        self.dim = dim
        self.table = Table(table)
        self.count = count

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        weight = w.full()
        matrix = weight.new_zeros(len(weight), self.count + 1).scatter_add(1, self.table.on(x.device), weight)
        return along(x, matrix.narrow(1, 0, self.count), self.dim)

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        assert w is not None
        padded = torch.cat([x, torch.zeros_like(x.narrow(self.dim, 0, 1))], self.dim)
        read = padded.index_select(self.dim, self.table.on(x.device).reshape(-1)).unflatten(self.dim, tuple(w.shape))
        weight = w.full()
        out: Tensor = (read * weight.reshape(*weight.shape, *[1] * (x.dim() - self.dim - 1))).amax(self.dim + 1)
        return out
