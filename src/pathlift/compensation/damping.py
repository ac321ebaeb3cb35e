"""Second moments that can be inverted: H + d·diag(H), relative to each entry, so that a rescaling of columns changes nothing.

Everything is computed with the columns scaled by powers of two to 1 ≤ H_jj < 4, which rounds nothing: columns of unlike scale
do no harm, and results for rescaled columns are the rescaled results, bit for bit where the factors are powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.errors import NumericalError
from pathlift.statistics.cholesky import cholesky_
from pathlift.statistics.input_moments import ROWS, SINGLE

MOST = 16.0
"""Damping may be doubled up to this where rounding errors leave H without a Cholesky factor."""

LEAST = 1e-8
"""What no damping at all is doubled to."""

INDEFINITE = "The second moment of what a layer is multiplied by is not positive semi-definite."


@dataclass(frozen=True, eq=False)
class Damped:
    """A damped second moment in scaled columns.

    Attributes:
        matrix: S⁻¹ (H + d·diag(H)) S⁻¹, with 1 on the diagonal of columns that are always 0; (groups, columns, columns).
        lower: Its Cholesky factor.
        scale: S, powers of two, (groups, columns).
        alive: Which columns are not always 0.
        damping: d, as it was needed.
    """

    matrix: Tensor
    lower: Tensor
    scale: Tensor
    alive: Tensor
    damping: float

    @property
    def more(self) -> float:
        """Twice the damping."""
        return max(2 * self.damping, LEAST)


def damped(moment: Tensor, damping: float) -> Damped:
    """Damp second moments.

    Args:
        moment: H, shape (groups, columns, columns), symmetric and positive semi-definite up to errors of a model.
        damping: d; more where H + d·diag(H) is not positive definite.

    Returns:
        What can be inverted.

    Raises:
        NumericalError: H is not positive semi-definite by far.
    """
    moment = moment.double()
    alive, scale = _scale_of(moment)
    matrix = (moment / scale[:, :, None]).div_(scale[:, None, :])
    if not bool(alive.all()):
        matrix = torch.where(alive[:, :, None] & alive[:, None, :], matrix, 0.0)
    size = matrix.diagonal(dim1=-2, dim2=-1).clone()
    while damping <= MOST:
        matrix.diagonal(dim1=-2, dim2=-1).copy_(torch.where(alive, size + damping * size, 1.0))
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed.any()):
            return Damped(matrix, lower, scale, alive, damping)
        damping = max(2 * damping, LEAST)
    raise NumericalError(INDEFINITE)


def factor_from_behind(moment: Tensor, damping: float, single: int = SINGLE) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of a damped second moment whose columns stand in reverse order, and their scale.

    Args:
        moment: See `damped`.
        damping: See `damped`.
        single: Number of columns up to which it is made in float64.

    Returns:
        The lower triangular factor, (groups, columns, columns), in scaled columns: in float32 for more than ``single`` columns,
        where nothing may be read above its diagonal; and the powers of two, (groups, columns), float64.

    Raises:
        NumericalError: See `damped`.
    """
    if moment.shape[2] <= single:
        factored = damped(moment.flip(1, 2), damping)
        return factored.lower, factored.scale
    alive, scale = (part.flip(1) for part in _scale_of(moment))
    lower = torch.empty_like(moment, dtype=torch.float32)
    for made, matrix, there, size in zip(lower, moment, alive, scale, strict=True):
        unit = torch.where(there, 1.0 / size, 0.0)
        amount = damping
        while True:
            for start in range(0, len(made), ROWS):
                rows = slice(start, min(start + ROWS, len(made)))
                behind = matrix[len(made) - rows.stop : len(made) - rows.start].flip(0, 1)
                made[rows] = behind.mul_(unit[rows, None]).mul_(unit)
            made.diagonal().copy_(torch.where(there, made.diagonal() * (1.0 + amount), 1.0))
            if cholesky_(made):
                break
            amount = max(2 * amount, LEAST)
            if amount > MOST:
                raise NumericalError(INDEFINITE)
    return lower, scale


def _scale_of(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return which columns are not always 0, and powers of two that scale them to 1 ≤ H_jj < 4."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > 0
    exponent = torch.frexp(torch.where(alive, diagonal, 1.0)).exponent
    return alive, torch.exp2(torch.div(exponent - 1, 2, rounding_mode="floor").double())
