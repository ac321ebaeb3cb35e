"""Compensated rounding: for each row the integers that make Δᵀ H Δ small, Δ the change of the row (mathematics §9).

H is the second moment of what the row is multiplied by, or its covariance where the mean of the change is corrected
elsewhere. The columns are rounded one after another, and the error of each is made up for, as well as it can be, by those
that are still to come (optimal brain quantisation; with one order for all rows, GPTQ): with H = V D Vᵀ, V upper triangular
with 1 on its diagonal, Δᵀ H Δ = Σ_k D_k (Δ_k + Σ_{j<k} Δ_j V_jk)², and column k is rounded from w_k − Σ_{j<k} Δ_j V_jk.

Then every column is looked at again, `POLISH` times: it takes the integer that is best while all others stay as they are.

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

BLOCK = 64
"""Columns whose errors are handed on to all later columns at once."""


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
    step = max(1, AT_ONCE // (weight.shape[0] * weight.shape[2]))
    several = [slice(start, start + step) for start in range(0, weight.shape[1], step)]
    factor = UnitFactor(moment, damping)
    parts = [_one_after_another(weight[:, rows], grid.rows_of(rows), factor) for rows in several]
    del factor
    if again:
        parts = [
            _polished(weight[:, rows], grid.rows_of(rows), part, moment, damping, again)
            for rows, part in zip(several, parts, strict=True)
        ]
    return torch.cat(parts, 1)


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
    integers, best = compensated(weight, grid, moment, damping), grid
    if weight.shape[2] > SHORT or grid.scale.shape[2] > 1:
        return grid, integers
    least = _cost(weight, grid, integers, moment, damping)
    for share in SHARES:
        tried = Grid(grid.format, (grid.scale.double() * share).float(), grid.zero, grid.columns)
        tried_integers = compensated(weight, tried, moment, damping)
        cost = _cost(weight, tried, tried_integers, moment, damping)
        better = (cost < least)[:, :, None]
        best = Grid(grid.format, torch.where(better, tried.scale, best.scale), grid.zero, grid.columns)
        integers, least = torch.where(better, tried_integers, integers), torch.minimum(cost, least)
    return best, integers


def _cost(weight: Tensor, grid: Grid, integers: Tensor, moment: Tensor, damping: float) -> Tensor:
    """Return the damped Δᵀ H Δ of each row."""
    change = grid.values(integers) - weight.double()
    return quadratic(change, moment) + damping * (change**2 @ moment.double().diagonal(dim1=1, dim2=2)[:, :, None])[:, :, 0]


class _Columns:
    """Rounds all rows of one column as `Grid.nearest` and `Grid.values` do, up to ties, with what is the same done once."""

    def __init__(self, grid: Grid) -> None:
        self.grid = Grid(grid.format, grid.spread(grid.scale), grid.spread(grid.zero), grid.columns)
        self.scale, self.zero = (cells.double().mT.contiguous() for cells in (self.grid.scale, self.grid.zero))

    def __call__(self, column: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return integers and values for numbers of shape (groups, rows)."""
        form = self.grid.format
        if not isinstance(form, WholeNumbers):
            cell = self.grid.columns_of(slice(column, column + 1))
            chosen = cell.nearest(wanted[:, :, None])
            return chosen[:, :, 0], cell.values(chosen)[:, :, 0]
        cell_number = column if self.scale.shape[1] > 1 else 0
        scale, zero = self.scale[:, cell_number], self.zero[:, cell_number]
        integers = (wanted / scale).round_()
        if not form.affine:
            integers.clamp_(form.low, form.high)
            return integers, (integers * scale).float().double()
        integers.add_(zero).clamp_(form.low, form.high)
        return integers, ((integers - zero) * scale).float().double()


def _polished(weight: Tensor, grid: Grid, integers: Tensor, moment: Tensor, damping: float, times: int) -> Tensor:
    """Go through the columns again: each takes the integer that is best while the others stay."""
    moment, rounded = moment.double(), _Columns(grid)
    change = (grid.values(integers) - weight.double()).mT.contiguous()  # a row in memory for each column
    wanted, integers = weight.double().mT.contiguous(), integers.mT.contiguous()
    pull = damping * moment.diagonal(dim1=1, dim2=2)[:, :, None]
    height = moment.diagonal(dim1=1, dim2=2)[:, :, None] + pull
    unit = torch.where(height > 0, 1.0 / height, 0.0)
    slope = (moment @ change).addcmul_(pull, change)
    starts = range(0, weight.shape[2], BLOCK)
    for number_of_block, start in enumerate([*starts] * times):
        block = slice(start, min(start + BLOCK, weight.shape[2]))
        before, near, within = change[:, block], slope[:, block].clone(), moment[:, block, block].unbind(2)
        now = wanted[:, block] + before
        chosen, steps = [], []
        each = zip(range(block.start, block.stop), now.unbind(1), near.unbind(1), unit[:, block].unbind(1), strict=True)
        for number, (column, is_now, pulled, share) in enumerate(each, 1):
            integer, value = rounded(column, is_now - pulled * share)
            chosen.append(integer)
            steps.append(value - is_now)
            near[:, number:].addcmul_(within[number - 1][:, number:, None], steps[-1][:, None])
        integers[:, block] = torch.stack(chosen, 1)
        became = before + torch.stack(steps, 1)
        moved = became - before
        change[:, block] = became
        later = slice(0 if number_of_block < len(starts) * (times - 1) else block.stop, None)  # that are looked at again
        slope[:, later].baddbmm_(moment[:, later, block], moved)
        if later.start == 0:
            slope[:, block].addcmul_(pull[:, block], moved)
    return integers.mT.contiguous()


def _one_after_another(weight: Tensor, grid: Grid, factor: UnitFactor) -> Tensor:
    rounded = _Columns(grid)
    weight = weight.double().mT.contiguous()  # a row in memory for each column
    change, integers = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.int32)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        wanted = weight[:, start:end] - factor.part(slice(0, start), slice(start, end)).mT @ change[:, :start]
        within = factor.part(slice(start, end), slice(start, end)).unbind(1)
        exact, chosen, changes = weight[:, start:end].unbind(1), [], []
        for number, aim in enumerate(wanted.unbind(1)):
            integer, value = rounded(start + number, aim)
            chosen.append(integer)
            changes.append(value - exact[number])
            wanted[:, number + 1 :] -= within[number][:, number + 1 :, None] * changes[-1][:, None]
        integers[:, start:end], change[:, start:end] = torch.stack(chosen, 1), torch.stack(changes, 1)
    return integers.mT.contiguous()


class UnitFactor:
    """V of the damped H = V D Vᵀ, upper triangular with 1 on its diagonal."""

    def __init__(self, moment: Tensor, damping: float) -> None:
        """Factor H.

        Args:
            moment: H, shape (groups, columns, columns).
            damping: d.

        Raises:
            NumericalError: H is not positive semi-definite.
        """
        self.lower, scale = factor_from_behind(moment, damping)  # lower triangular from behind is upper triangular
        self.scale, self.below = scale, self.lower.diagonal(dim1=1, dim2=2).double() * scale

    def part(self, rows: slice, columns: slice) -> Tensor:
        """Return some rows and columns in float64; below the diagonal of V anything may stand."""
        count = self.scale.shape[1]
        behind, across = (slice(count - part.stop, count - part.start) for part in (rows, columns))
        part = self.lower[:, behind, across].double() * self.scale[:, behind, None] / self.below[:, None, across]
        return part.flip(1, 2)
