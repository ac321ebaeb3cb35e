"""Edge maps of matrix products: linear layers, products with a parameter or constant on one side, maps along one axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pathlift import fused
from pathlift.edges.axis import Axis, Table, classify
from pathlift.edges.base import Compact, Edges
from pathlift.edges.pattern import Layout, Pattern, product_pattern
from pathlift.edges.product import product
from pathlift.edges.weights import Bundle, Entry, Weights, add_scaled, new_memory
from pathlift.edges.window import along, read


class Dense(Edges):
    """out[…, o] = Σ_i x[…, i]·w[o, i]: a linear layer, worked off in cache-sized blocks of rows.

    No copy of the size of the weight is ever made, so a path-norm costs one read of the weights.
    """

    @override
    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        rows, (outs, ins) = math.prod(below[:-1]), weight
        row = torch.arange(rows)
        return Pattern(
            Layout(tuple(below), (rows, ins), (1, 0), (1, ins, rows)),
            Layout((*below[:-1], outs), (rows, outs), (1, 0), (1, outs, rows)),
            Layout(tuple(weight), (outs, ins), (0, 1), (1, outs, ins, 1)),
            torch.stack([torch.zeros_like(row), row, row], 1),
        )

    @override
    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        del weight
        if axes[-1].classes is not None:
            return frozenset({len(axes) - 1})
        return Compact(self, (*axes[:-1], Axis.full(out[-1])))

    @override
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        if torch.is_grad_enabled():
            return F.linear(x, w.full())
        rows, weight = x.reshape(-1, x.shape[-1]), w.magnitudes_of
        if len(rows) <= fused.FEW and weight is not None and fused.suits((weight,), (rows,)):
            out = fused.product(weight, rows)
        else:
            out = _joined_columns(({0: product(rows, block.T)} for _, block in w.rows()), w.shape[0])[0]
        return out.reshape(*x.shape[:-1], w.shape[0])

    @override
    def each(self, xs: Sequence[Tensor], w: Weights) -> list[Tensor]:
        return list(self.sum(torch.stack(list(xs)), w).unbind())

    @override
    def sums(self, xs: Mapping[int, Tensor], bundle: Bundle, factors: Mapping[Entry, float]) -> dict[int, Tensor]:
        rows = {track: x.reshape(-1, x.shape[-1]) for track, x in xs.items()}

        def above() -> Iterator[dict[int, Tensor]]:
            for products in _products(rows, bundle):
                totals: dict[int, Tensor] = {}
                for (to, source), factor in factors.items():
                    add_scaled(totals, to, products[to, source], factor)
                yield totals

        shape = (*next(iter(xs.values())).shape[:-1], bundle.shape[0])
        return {track: total.reshape(shape) for track, total in _joined_columns(above(), bundle.shape[0]).items()}

    @override
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        flat = x.reshape(-1, x.shape[-1])
        blocks = (torch.stack([(block * row).amax(1) for row in flat]) for _, block in w.rows())
        return _joined_columns(({0: block} for block in blocks), w.shape[0])[0].reshape(*x.shape[:-1], w.shape[0])

    @override
    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        flat, other, scale = (t.reshape(-1, t.shape[-1]) for t in (x, y, ratio))
        rows = [
            (w * row - factor[:, None] * (z * other_row)).abs().sum(1)
            for row, other_row, factor in zip(flat, other, scale, strict=True)
        ]
        return torch.stack(rows).reshape(ratio.shape)

    @override
    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        assert w is not None
        rows, above = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        to_weight = new_memory(x, w.shape) if share else None
        weight = w.magnitudes_of
        if to_weight is not None and len(rows) == 1 and weight is not None and fused.suits((weight,), (rows, above)):
            return fused.back(weight, rows[0], above[0], to_weight).reshape(x.shape), to_weight
        to_below = torch.zeros_like(rows) if below else None
        for part, block in w.rows():
            columns = above[:, part]
            if to_below is not None:
                to_below += product(columns, block)
            if to_weight is not None and len(rows) == 1:
                torch.mul(block * rows, columns.T, out=to_weight[part])
            elif to_weight is not None:
                torch.mul(block, product(columns.T, rows), out=to_weight[part])
        return None if to_below is None else to_below.reshape(x.shape), to_weight


def _joined_columns(blocks: Iterable[dict[int, Tensor]], width: int) -> dict[int, Tensor]:
    """Lay the columns of each block beside those of the block before.

    Into one piece of memory, at once: hundreds of small results, each kept from between two large pieces of scratch memory,
    would keep the allocator from giving the next block the memory of the one before.

    Returns:
        Track to (rows, ``width``).
    """
    results: dict[int, Tensor] = {}
    first = 0
    for block in blocks:
        last = first + next(iter(block.values())).shape[1]
        if last - first == width:
            return block
        if not results:
            results = {track: columns.new_empty(len(columns), width) for track, columns in block.items()}
        for track, columns in block.items():
            results[track][:, first:last] = columns
        first = last
    return results


def _products(rows: Mapping[int, Tensor], bundle: Bundle) -> Iterator[dict[Entry, Tensor]]:
    """Yield the product of each entry of a bundle with its track, for one block of neurons above after the other."""
    tracks = {track: x[0] for track, x in rows.items() if len(x) == 1}
    if bundle.recipe is not None and tracks and fused.suits(bundle.values, tuple(tracks.values())):
        yield {key: out[None] for key, out in fused.products(bundle.recipe, bundle.values, tracks).items()}
        return
    for _, block in bundle.rows():
        yield {key: torch.mm(rows[key[1]], weight.T) for key, weight in block if key[1] in rows}


class Contraction(Edges):
    """An einsum of x with a weight: ``equation`` is ``"x-letters,w-letters->out-letters"``."""

    def __init__(self, equation: str) -> None:
        """Describe the map.

        Args:
            equation: Explicit einsum equation without ellipsis; the first operand is x.
        """
        self.equation = equation

    @property
    def letters(self) -> tuple[str, str, str]:
        """The letters of x, of the weight and of the result."""
        operands, result = self.equation.split("->")
        of_x, of_weight = operands.split(",")
        return of_x, of_weight, result

    @override
    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        return product_pattern(below, weight, self.letters)

    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        """Keep dimensions along which the weight has no extent and that the result has."""
        assert weight is not None
        of_x, of_weight, result = self.letters
        extended = {letter for letter, size in zip(of_weight, weight, strict=True) if size > 1}
        mixed = frozenset(
            dim
            for dim, letter in enumerate(of_x)
            if axes[dim].classes is not None and (letter in extended or letter not in result)
        )
        below = dict(zip(of_x, axes, strict=True))
        kept = [
            below[letter] if letter in below and below[letter].size == size else Axis.full(size)
            for letter, size in zip(result, out, strict=True)
        ]
        return mixed or Compact(self, tuple(kept))

    @override
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        return torch.einsum(self.equation, x, w.full())

    @override
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        products, summed = self._products(x, w.full())
        return products.amax(summed) if summed else products

    def _products(self, x: Tensor, w: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return all products, and the dimensions over which the einsum sums them."""
        of_x, of_weight, result = self.letters
        summed = "".join(dict.fromkeys(letter for letter in of_x + of_weight if letter not in result))
        products = _aligned(x, of_x, result + summed) * _aligned(w, of_weight, result + summed)
        return products, tuple(range(len(result), products.dim()))

    @override
    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        (first, summed), (second, _) = self._products(x, w), self._products(y, z)
        difference = (first - ratio.reshape(*ratio.shape, *[1] * len(summed)) * second).abs()
        return difference.sum(summed) if summed else difference


def _aligned(tensor: Tensor, letters: str, full: str) -> Tensor:
    """Bring the dimensions of a tensor into the order of ``full``, with size 1 where it has none."""
    tensor = tensor.permute([letters.index(letter) for letter in full if letter in letters])
    for dim, letter in enumerate(full):
        if letter not in letters:
            tensor = tensor.unsqueeze(dim)
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
        """Make one row of those that give equal weights to equal classes."""
        del out, weight
        below = axes[self.dim]
        edges = self.matrix != 0
        taps = max(int(edges.sum(1).max()), 1)
        columns = torch.argsort((~edges).to(torch.int8), dim=1, stable=True)[:, :taps]  # those of the edges come first
        there = edges.gather(1, columns)
        columns = torch.where(there, columns, 0)
        classes = torch.where(there, below.index[columns], below.count)
        axis, first = classify(classes, torch.where(there, self.matrix.gather(1, columns), 0.0))
        entries = Entries(Table(first), Table(columns[first]), Table(there[first]))
        result = (*axes[: self.dim], axis, *axes[self.dim + 1 :])
        return Compact(WeightedTaps(self.dim, classes[first], below.count), result, entries)

    @override
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        return along(x, w.full(), self.dim)

    @override
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        moved = x.movedim(self.dim, -1)
        rows = [(moved * row).amax(-1) for row in w.full()]
        return torch.stack(rows, -1).movedim(-1, self.dim)

    @override
    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        x, y, ratio = (t.movedim(self.dim, -1) for t in (x, y, ratio))
        rows = [
            (x * row - ratio[..., number, None] * (y * other_row)).abs().sum(-1)
            for number, (row, other_row) in enumerate(zip(w, z, strict=True))
        ]
        return torch.stack(rows, -1).movedim(-1, self.dim)

    @override
    def antecedents(self, x: Tensor) -> Tensor:
        rows = [row.nonzero()[:, 0] for row in self.matrix]
        width = max(len(row) for row in rows)
        none = x.shape[self.dim]
        table = torch.stack([F.pad(row, (0, width - len(row)), value=none) for row in rows]).to(x.device)
        return read(x, table.T, self.dim, -math.inf).movedim(self.dim, 0)


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
        entries: Tensor = matrix[rows].gather(1, columns)
        return entries * there


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

    @override
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        weight = w.full()
        matrix = weight.new_zeros(len(weight), self.count + 1).scatter_add(1, self.table.on(x.device), weight)
        return along(x, matrix.narrow(1, 0, self.count), self.dim)

    @override
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        weight = w.full().reshape(*w.shape, *[1] * (x.dim() - self.dim - 1))
        return (read(x, self.table.on(x.device), self.dim) * weight).amax(self.dim + 1)
