"""Compensated rounding: for each row the integers that make Δᵀ H Δ small, Δ the change of the row (mathematics §9).

H is the second moment of what the row is multiplied by, or its covariance where the mean of the change is corrected
elsewhere. The columns are rounded one after another, and the error of each is made up for, as well as it can be, by those
that are still to come (optimal brain quantisation; with one order for all rows, GPTQ): with H = V D Vᵀ, V upper triangular
with 1 on its diagonal, Δᵀ H Δ = Σ_k D_k (Δ_k + Σ_{j<k} Δ_j V_jk)², and column k is rounded from w_k − Σ_{j<k} Δ_j V_jk.

Then every column is looked at again, `POLISH` times: it takes the integer that is best while all others stay as they are.

Blocks. What the columns before a block do to it is one product of matrices, likewise what `FEW` columns do to the rest of their
block; only these few hand on their errors one by one, in a handful of operations each. Rows with one scale are rounded in
steps of their own, w/s, where a grid of whole numbers is the whole numbers.

Types. float64; where H has more than `SINGLE` columns and is float32, so is all that is made of it, and its factor stands in
the place of its upper triangle meanwhile.

Order. Columns are rounded in the order in which they stand: input channels, and the taps of each.

Damping. H + d·diag(H): relative to each entry, so that a rescaling of the columns changes nothing. A column that is never
active (H_jj = 0) is rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.compensation.correction import quadratic
from pathlift.compensation.damping import factor_from_behind
from pathlift.quantisation.formats import WholeNumbers
from pathlift.quantisation.grids import Grid
from pathlift.statistics.cholesky import mirrored_
from pathlift.statistics.input_moments import SINGLE

DAMPING = 0.1
"""d above."""

POLISH = 2
"""How often all columns are looked at again."""

SHORT = 32
"""Rows of at most so many columns are rounded with several ranges."""

SHARES = tuple(0.04 * step for step in (*range(15, 25), *range(26, 31)))
"""These ranges, as multiples of the one to begin with."""

AT_ONCE = 1 << 22
"""Weights that are rounded together."""

BLOCK = 128
"""Columns whose errors are handed on to all later columns at once."""

FEW = 16
"""Columns whose errors are handed on to the rest of their block at once."""


def compensated(weight: Tensor, grid: Grid, moment: Tensor, damping: float = DAMPING, again: int = POLISH) -> Tensor:
    """Round row by row such that Δᵀ H Δ is small.

    Args:
        weight: Shape (groups, rows, columns).
        grid: The grid.
        moment: H, shape (groups, columns, columns), symmetric and positive semi-definite.
        damping: d.
        again: How often all columns are looked at again.

    Returns:
        Integers, shape (groups, rows, columns).

    Raises:
        NumericalError: H is not positive semi-definite.
    """
    factor = UnitFactor(moment, damping)
    once = _with_factor(weight, grid, factor)
    factor.give_back()
    return _again(weight, grid, once, moment, damping, again)


def _with_factor(weight: Tensor, grid: Grid, factor: UnitFactor) -> Tensor:
    """Return integers, one column after another."""
    return torch.cat([_one_after_another(_Rows(weight, grid, some, factor.kind), factor) for some in _several(weight)], 1)


def _again(weight: Tensor, grid: Grid, integers: Tensor, moment: Tensor, damping: float, times: int) -> Tensor:
    """Return integers that were looked at again."""
    if not times:
        return integers
    kind = kind_of(moment)
    pull = damping * moment.diagonal(dim1=1, dim2=2).to(kind)
    parts = [
        _polished(_Rows(weight, grid, some, kind), integers[:, some], moment.to(kind), pull, times) for some in _several(weight)
    ]
    return torch.cat(parts, 1)


def _several(weight: Tensor) -> list[slice]:
    """Return the rows that are rounded together."""
    step = max(1, AT_ONCE // (weight.shape[0] * weight.shape[2]))
    return [slice(start, start + step) for start in range(0, weight.shape[1], step)]


def kind_of(moment: Tensor) -> torch.dtype:
    """Return the type that rounding computes in: that of H where it has more than `SINGLE` columns."""
    return moment.dtype if moment.shape[2] > SINGLE else torch.float64


def compensated_in_range(weight: Tensor, grid: Grid, moment: Tensor, damping: float = DAMPING) -> tuple[Grid, Tensor]:
    """Round rows of few columns with grids of several ranges, and keep the best of each row.

    In a long row the errors of a step that fits less well average out, in a short one (a depthwise kernel) they do not.

    Args:
        weight: Shape (groups, rows, columns).
        grid: The grid to begin with, of rows with scales of their own.
        moment: H.
        damping: d.

    Returns:
        The grid with other scales, and integers.

    Raises:
        NumericalError: H is not positive semi-definite.
    """
    if weight.shape[2] > SHORT or grid.scale.shape[2] > 1:
        return grid, compensated(weight, grid, moment, damping)
    factor, best = UnitFactor(moment, damping), grid
    integers = _again(weight, grid, _with_factor(weight, grid, factor), moment, damping, POLISH)
    least = _cost(weight, grid, integers, moment, damping)
    for share in SHARES:
        tried = Grid(grid.format, (grid.scale.double() * share).float(), grid.zero, grid.columns)
        tried_integers = _again(weight, tried, _with_factor(weight, tried, factor), moment, damping, POLISH)
        cost = _cost(weight, tried, tried_integers, moment, damping)
        better = (cost < least)[:, :, None]
        best = Grid(grid.format, torch.where(better, tried.scale, best.scale), grid.zero, grid.columns)
        integers, least = torch.where(better, tried_integers, integers), torch.minimum(cost, least)
    return best, integers


def _cost(weight: Tensor, grid: Grid, integers: Tensor, moment: Tensor, damping: float) -> Tensor:
    """Return the damped Δᵀ H Δ of each row."""
    change = grid.values(integers) - weight.double()
    return quadratic(change, moment) + damping * (change**2 @ moment.double().diagonal(dim1=1, dim2=2)[:, :, None])[:, :, 0]


class _Rows:
    """Some rows, column by column, and how a column of them is rounded; in steps where rows have one scale and whole numbers.

    Attributes:
        exact: The weights, (groups, columns, rows).
    """

    def __init__(self, weight: Tensor, grid: Grid, rows: slice, kind: torch.dtype) -> None:
        """Take them.

        Args:
            weight: Shape (groups, rows, columns).
            grid: Their grid.
            rows: Which.
            kind: The type to compute in.
        """
        self.grid, self.kind, some = grid.rows_of(rows), kind, weight[:, rows].double()
        self.form = self.grid.format
        self.whole = isinstance(self.form, WholeNumbers)
        self.in_steps = self.whole and self.grid.scale.shape[2] == 1
        self.scale, zero = (self.grid.spread(cells).mT for cells in (self.grid.scale.double(), self.grid.zero))
        self.ends: list[tuple[Tensor | int, Tensor | int]] = [(self.form.low, self.form.high)]
        if self.form.affine:
            self.ends = [(self.form.low - cell, self.form.high - cell) for cell in zero.to(kind).unbind(1)]
        self.exact = (some / self.grid.scale.double() if self.in_steps else some).mT.to(kind).contiguous()
        self.zero = zero

    def __call__(self, column: int, wanted: Tensor, out: Tensor) -> None:
        """Give the values on the grid next to numbers, both of shape (groups, rows), up to ties."""
        if not self.whole:
            cell = self.grid.columns_of(slice(column, column + 1))
            out.copy_(cell.values(cell.nearest(wanted[:, :, None]))[:, :, 0])
            return
        low, high = self.ends[column if len(self.ends) > 1 else 0]
        if self.in_steps:
            torch.round(wanted, out=out).clamp_(low, high)  # type: ignore[arg-type]  # two tensors or two numbers
        else:
            scale = self.scale[:, column]
            out.copy_((wanted / scale).round_().clamp_(low, high).mul_(scale))  # type: ignore[arg-type]

    def integers(self, change: Tensor) -> Tensor:
        """Return the integers, (groups, rows, columns), from the differences of values and weights, (groups, columns, rows)."""
        values = self.exact.double() + change
        if not self.whole:
            return self.grid.nearest(values.mT)
        levels = values if self.in_steps else values / self.scale
        return (levels.round_().to(torch.int32) + self.zero).mT.contiguous()

    def change(self, integers: Tensor) -> Tensor:
        """Undo `integers`."""
        if self.in_steps:
            return (integers.mT - self.zero).to(self.kind) - self.exact
        return (self.grid.values(integers).mT - self.exact).to(self.kind)


def _one_after_another(rows: _Rows, factor: UnitFactor) -> Tensor:
    exact, change = rows.exact, torch.zeros_like(rows.exact)
    weights, errors = exact.unbind(1), change.unbind(1)
    for start in range(0, len(weights), BLOCK):
        block = slice(start, min(start + BLOCK, len(weights)))
        wanted = torch.baddbmm(exact[:, block], factor.part(slice(0, start), block).mT, change[:, :start], alpha=-1.0)
        shares = factor.part(block, block).mT.neg()
        aims = wanted.split(1, 1)
        for first in range(0, len(aims), FEW):
            few = slice(first, min(first + FEW, len(aims)))
            for number, share in enumerate(shares[:, few, few].split(1, 1)):
                column, aim = start + first + number, aims[first + number]
                if number:
                    aim = torch.baddbmm(aim, share.narrow(2, 0, number), change.narrow(1, column - number, number))
                rows(column, aim.squeeze(1), errors[column])
                errors[column].sub_(weights[column])
            wanted[:, few.stop :].baddbmm_(shares[:, few.stop :, few], change[:, start + first : start + few.stop])
    return rows.integers(change)


def _polished(rows: _Rows, integers: Tensor, moment: Tensor, pull: Tensor, times: int) -> Tensor:
    """Go through the columns again: each takes the integer that is best while the others stay.

    Args:
        rows: The rows.
        integers: What they are so far, (groups, rows, columns).
        moment: H, in the type of the rows.
        pull: d·H_jj, (groups, columns).
        times: How often.

    Returns:
        Integers.
    """
    exact, change = rows.exact, rows.change(integers)
    height = moment.diagonal(dim1=1, dim2=2) + pull
    unit = torch.where(height > 0, -1.0 / height, 0.0)[:, :, None]
    steps = torch.empty_like(exact[:, :FEW])
    for start in [*range(0, exact.shape[1], BLOCK)] * times:
        block = slice(start, min(start + BLOCK, exact.shape[1]))
        across = moment[:, block] * unit[:, block]
        now = exact[:, block] + change[:, block]
        best = torch.baddbmm(now, across, change).addcmul_(pull[:, block, None] * unit[:, block], change[:, block])
        became, shares = torch.empty_like(now), across[:, :, block]
        aims, values, before = best.split(1, 1), became.unbind(1), now.unbind(1)
        for first in range(0, len(values), FEW):
            few = slice(first, min(first + FEW, len(values)))
            for number, (share, step) in enumerate(zip(shares[:, few, few].split(1, 1), steps.unbind(1), strict=False)):
                here, aim = first + number, aims[first + number]
                if number:
                    aim = torch.baddbmm(aim, share.narrow(2, 0, number), steps.narrow(1, 0, number))
                rows(start + here, aim.squeeze(1), values[here])
                torch.sub(values[here], before[here], out=step)
            best[:, few.stop :].baddbmm_(shares[:, few.stop :, few], steps[:, : few.stop - first])
        torch.sub(became, exact[:, block], out=change[:, block])
    return rows.integers(change)


class UnitFactor:
    """V of the damped H = V D Vᵀ, upper triangular with 1 on its diagonal.

    Attributes:
        kind: The type that it is given in.
    """

    def __init__(self, moment: Tensor, damping: float) -> None:
        """Factor H.

        Args:
            moment: H, shape (groups, columns, columns). Of float32 and more than `SINGLE` columns it is the factor from now
                on, until it is given back.
            damping: d.

        Raises:
            NumericalError: H is not positive semi-definite.
        """
        self.kind = kind_of(moment)
        self.upper, scale, self.diagonal = factor_from_behind(moment, damping)
        self.scale, self.below = scale, self.upper.diagonal(dim1=1, dim2=2).double() * scale

    def part(self, rows: slice, columns: slice) -> Tensor:
        """Return some rows and columns; below the diagonal of V anything may stand."""
        part = self.upper[:, rows, columns].double() * self.scale[:, rows, None] / self.below[:, None, columns]
        return part.to(self.kind)

    def give_back(self) -> None:
        """Make H of the factor again where that stands in its place."""
        if self.diagonal is not None:
            for matrix, diagonal in zip(self.upper, self.diagonal, strict=True):
                mirrored_(matrix, diagonal)
        del self.upper
