"""The Cholesky factor of a matrix of thousands of columns, in the place of its lower triangle, panel by panel."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 512
"""Columns of a panel."""


def cholesky_(matrix: Tensor) -> bool:
    """Put L of A = L·Lᵀ into the lower triangle of A; what stands above it is left as it is, but beside the diagonal.

    Args:
        matrix: A, of which the lower triangle is read, shape (columns, columns).

    Returns:
        Whether A is positive definite; else it holds nothing of use any more.
    """
    count = len(matrix)
    for start in range(0, count, PANEL):
        stop = min(start + PANEL, count)
        corner, failed = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        if bool(failed):
            return False
        matrix[start:stop, start:stop] = corner
        below = matrix[stop:, start:stop]
        if len(below):
            below.copy_(torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False))
        for first in range(stop, count, PANEL):
            last = min(first + PANEL, count)
            matrix[first:, first:last].addmm_(matrix[first:, start:stop], matrix[first:last, start:stop].mT, alpha=-1.0)
    return True
