"""Compensated rounding: for each row the integers that make Δᵀ H Δ small, Δ the change of the row (mathematics §9).

H is the second moment of what the row is multiplied by, or its covariance where the mean of the change is corrected
elsewhere. The columns are rounded one after another, and the error of each is made up for, as well as it can be, by those
that are still to come (optimal brain quantisation; with one order for all rows, GPTQ): with U the upper Cholesky factor of
H⁻¹, H⁻¹ = UᵀU, the error e = (w_j − q_j)/U_jj of column j takes e·U_jk from column k.

Then every column is looked at again, `POLISH` times: it takes the integer that is best while all others stay as they are.

Order. Columns are rounded in the order in which they stand: input channels, and the taps of each.

Damping. H + d·diag(H): relative to each entry, so that a rescaling of the columns changes nothing. A column that is never
active (H_jj = 0) is rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.compensation.correction import quadratic
from pathlift.compensation.damping import damped
from pathlift.quantisation.grids import Grid

DAMPING = 0.1
"""d above."""

POLISH = 2
"""How often all columns are looked at again."""

SHORT = 32
"""Rows of at most so many columns are rounded with several ranges."""

SHARES = tuple(0.04 * step for step in (*range(15, 25), *range(26, 31)))
"""These ranges, as multiples of the one to begin with."""

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
    integers = _one_after_another(weight, grid, moment, damping)
    return _polished(weight, grid, integers, moment, damping, again) if again else integers


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
    least, best = _cost(weight, grid, integers := compensated(weight, grid, moment, damping), moment, damping), grid
    if weight.shape[2] > SHORT or grid.scale.shape[2] > 1:
        return grid, integers
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


def _polished(weight: Tensor, grid: Grid, integers: Tensor, moment: Tensor, damping: float, times: int) -> Tensor:
    """Go through the columns again: each takes the integer that is best while the others stay."""
    moment = moment.double()
    grid = Grid(grid.format, grid.spread(grid.scale), grid.spread(grid.zero), grid.columns)
    diagonal = moment.diagonal(dim1=1, dim2=2)
    damped = moment + torch.diag_embed(damping * diagonal)
    values, integers = grid.values(integers), integers.clone()
    slope = (values - weight.double()) @ damped
    for start in [*range(0, weight.shape[2], BLOCK)] * times:
        block = slice(start, min(start + BLOCK, weight.shape[2]))
        before, within = values[:, :, block].clone(), damped[:, block, block]
        near = slope[:, :, block].clone()
        for column in range(block.stop - start):
            cell, height = grid.columns_of(slice(start + column, start + column + 1)), within[:, None, column, column, None]
            now = values[:, :, start + column, None]
            chosen = cell.roughly(now - torch.where(height > 0, near[:, :, column, None] / height, 0.0))
            step = cell.values(chosen) - now
            integers[:, :, start + column] = chosen[:, :, 0]
            values[:, :, start + column] += step[:, :, 0]
            near += step * within[:, None, column]
        slope += (values[:, :, block] - before) @ damped[:, block]
    return integers


def _one_after_another(weight: Tensor, grid: Grid, moment: Tensor, damping: float) -> Tensor:
    factor = inverse_factor(moment, damping)
    grid = Grid(grid.format, grid.spread(grid.scale), grid.spread(grid.zero), grid.columns)  # once for all columns
    left = weight.double().clone()
    integers = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
    columns = weight.shape[2]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros((*weight.shape[:2], end - start), dtype=torch.float64, device=weight.device)
        for column in range(start, end):
            cell, current = grid.columns_of(slice(column, column + 1)), left[:, :, column : column + 1]
            chosen = cell.roughly(current)
            integers[:, :, column : column + 1] = chosen
            error = (current - cell.values(chosen)) / factor[:, column, column, None, None]
            left[:, :, column:end] -= error * factor[:, None, column, column:end]
            errors[:, :, column - start] = error[:, :, 0]
        left[:, :, end:] -= errors @ factor[:, start:end, end:]
    return integers


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor U of the inverse of the damped H, H⁻¹ = UᵀU.

    Args:
        moment: H.
        damping: d.

    Returns:
        Shape of H.

    Raises:
        NumericalError: H is not positive semi-definite.
    """
    factored = damped(moment, damping)
    while True:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factored.lower), upper=True)
        if not bool(failed.any()):
            factor: Tensor = upper / factored.scale[:, None, :]
            return factor
        factored = damped(moment, factored.more)
