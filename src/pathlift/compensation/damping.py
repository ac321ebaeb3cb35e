"""Second moments that can be inverted: H + d·diag(H), relative to each entry, so that a rescaling of columns changes nothing.

Everything is computed with the columns scaled by powers of two to 1 ≤ H_jj < 4, which rounds nothing: columns of unlike scale
do no harm, and results for rescaled columns are the rescaled results, bit for bit where the factors are powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.errors import NumericalError
from pathlift.statistics.cholesky import factored_from_behind_, mirrored_
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


def factor_from_behind(moment: Tensor, damping: float, single: int = SINGLE) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return U of the damped second moment H = U·Uᵀ, upper triangular: what is left of a column when all later ones are known.

    Args:
        moment: See `damped`. In float32 and of more than ``single`` columns it becomes the factor: what stands below its
            diagonal stays, and tells it again (`pathlift.statistics.cholesky.mirrored_`).
        damping: See `damped`.
        single: Number of columns up to which it is made in float64.

    Returns:
        U, (groups, columns, columns), in scaled columns: in float32 for more than ``single`` columns, where nothing may be read
        below its diagonal; the powers of two, (groups, columns), float64; and, where U stands in the place of H, the diagonal
        of H.

    Raises:
        NumericalError: See `damped`.
    """
    if moment.shape[2] <= single:
        factored = damped(moment.flip(1, 2), damping)
        return factored.lower.flip(1, 2), factored.scale.flip(1), None
    alive, scale = _scale_of(moment)
    diagonal = None
    if moment.dtype == torch.float32:
        upper, diagonal, scale = moment, moment.diagonal(dim1=1, dim2=2).clone(), torch.ones_like(scale)
    else:
        upper = torch.empty_like(moment, dtype=torch.float32)
        for made, matrix, size in zip(upper, moment, scale, strict=True):
            for start in range(0, len(made), ROWS):
                rows = slice(start, start + ROWS)
                made[rows] = (matrix[rows] / size[rows, None]).div_(size)
    for matrix, there in zip(upper, alive, strict=True):
        _factor(matrix, there, damping)
    return upper, scale, diagonal


def _factor(matrix: Tensor, alive: Tensor, damping: float) -> None:
    """Put the factor of a damped matrix in the place of its upper triangle."""
    if not bool(alive.all()):
        matrix[~alive] = 0.0
        matrix[:, ~alive] = 0.0
    diagonal = matrix.diagonal().clone()
    while True:
        mirrored_(matrix, torch.where(alive, diagonal * (1.0 + damping), 1.0))
        if factored_from_behind_(matrix):
            return
        damping = max(2 * damping, LEAST)
        if damping > MOST:
            raise NumericalError(INDEFINITE)


def _scale_of(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return which columns are not always 0, and powers of two that scale them to 1 ≤ H_jj < 4."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > 0
    exponent = torch.frexp(torch.where(alive, diagonal, 1.0)).exponent
    return alive, torch.exp2(torch.div(exponent - 1, 2, rounding_mode="floor").double())
