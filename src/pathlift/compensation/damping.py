"""Second moments that can be inverted: H + d·diag(H), relative to each entry, so that a rescaling of columns changes nothing.

Everything is computed with the columns scaled by powers of two to 1 ≤ H_jj < 4, which rounds nothing: columns of unlike scale
do no harm, and results for rescaled columns are the rescaled results, bit for bit where the factors are powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.errors import NumericalError

MOST = 16.0
"""Damping may be doubled up to this where rounding errors leave H without a Cholesky factor."""

LEAST = 1e-8
"""What no damping at all is doubled to."""


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
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > 0
    exponent = torch.frexp(torch.where(alive, diagonal, 1.0)).exponent
    scale = torch.exp2(torch.div(exponent - 1, 2, rounding_mode="floor").double())
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
    raise NumericalError("The second moment of what a layer is multiplied by is not positive semi-definite.")
