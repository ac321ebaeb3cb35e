"""The Cholesky factor of a matrix of thousands of columns, in the place of one of its triangles, panel by panel."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 512
"""Columns of a panel."""


def factored_from_behind_(matrix: Tensor) -> bool:
    """Put U of A = U·Uᵀ, U upper triangular, into the upper triangle of A; what stands below the diagonal is left as it is.

    The last columns are done first, as those of the factor L of the matrix whose rows and columns stand in reverse order.

    Args:
        matrix: A, of which the upper triangle is read, shape (columns, columns).

    Returns:
        Whether A is positive definite; else its upper triangle holds nothing of use any more.
    """
    for stop in range(len(matrix), 0, -PANEL):
        start = max(0, stop - PANEL)
        corner = matrix[start:stop, start:stop]
        lower, failed = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if bool(failed):
            return False
        factor = lower.flip(0, 1)
        corner.tril_(-1).add_(factor)
        above = matrix[:start, start:stop]
        above.copy_(torch.linalg.solve_triangular(factor.mT, above, upper=False, left=False))
        for last in range(start, 0, -PANEL):
            first = max(0, last - PANEL)
            matrix[:first, first:last].addmm_(above[:first], above[first:last].mT, alpha=-1.0)
            matrix[first:last, first:last] -= (above[first:last] @ above[first:last].mT).triu_()
    return True


def mirrored_(matrix: Tensor, diagonal: Tensor) -> None:
    """Make a matrix symmetric again, of what stands below its diagonal and of the diagonal.

    Args:
        matrix: Shape (columns, columns).
        diagonal: Shape (columns,).
    """
    for start in range(0, len(matrix), PANEL):
        stop = min(start + PANEL, len(matrix))
        corner = matrix[start:stop, start:stop].tril_(-1)
        corner += corner.mT.clone()
        matrix[:start, start:stop] = matrix[start:stop, :start].mT
    matrix.diagonal().copy_(diagonal)
