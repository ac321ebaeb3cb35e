"""Compensated rounding: for each row the integers that make Δᵀ H Δ small, Δ the change of the row (mathematics §9).

H is the second moment of what the row is multiplied by, or its covariance where the mean of the change is corrected
elsewhere. The columns are rounded one after another, and the error of each is made up for, as well as it can be, by those
that are still to come (optimal brain quantisation; with one order for all rows, GPTQ): with U the upper Cholesky factor of
H⁻¹, H⁻¹ = UᵀU, the error e = (w_j − q_j)/U_jj of column j takes e·U_jk from column k.

Order. Columns are rounded in the order in which they stand: input channels, and the taps of each.

Damping. H + d·diag(H): relative to each entry, so that a rescaling of the columns changes nothing. A column that is never
active (H_jj = 0) is rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.compensation.damping import damped
from pathlift.quantisation.grids import Grid

DAMPING = 0.1
"""d above."""

BLOCK = 64
"""Columns whose errors are handed on to all later columns at once."""


def compensated(weight: Tensor, grid: Grid, moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Round row by row such that Δᵀ H Δ is small.

    Args:
        weight: Shape (groups, rows, columns).
        grid: The grid.
        moment: H, shape (groups, columns, columns), symmetric and positive semi-definite.
        damping: d.

    Returns:
        Integers, shape (groups, rows, columns).

    Raises:
        NumericalError: H is not positive semi-definite.
    """
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
            chosen = cell.nearest(current)
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


def quadratic(change: Tensor, moment: Tensor) -> Tensor:
    """Return Δᵀ H Δ of each row.

    Args:
        change: Δ, shape (groups, rows, columns).
        moment: H, shape (groups, columns, columns).

    Returns:
        Shape (groups, rows).
    """
    change = change.double()
    return ((change @ moment.double()) * change).sum(2)
