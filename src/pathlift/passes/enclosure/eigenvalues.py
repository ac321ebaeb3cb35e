"""The largest eigenvalue of squares of linear functions on a cube: what Σ_v q(v)·(Σ_i G_vi·ε_i)² can be (mathematics §5).

With |ε_i| ≤ 1 and any S_i > 0 it is at most λ·Σ S_i, λ the largest eigenvalue of Q^½·G·S⁻¹·Gᵀ·Q^½.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathlift.passes.enclosure.relaxation import UP
from pathlift.passes.rounding import DOUBLE

SHARP = 30.0
"""How sharply the largest eigenvalue is told from the others where its slope is wanted."""


def largest(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalue, with the mean slope of the largest few, and their directions."""
    values, vectors = torch.linalg.eigh(matrix.detach())
    among = torch.softmax(SHARP * values / values[-1].clamp(min=DOUBLE.least), 0)
    estimate = (among * (vectors * (matrix @ vectors)).sum(0)).sum()
    return estimate + (values[-1] - estimate).detach(), (vectors * among) @ vectors.T


def scaling_of(rows: Tensor, among: Tensor | None = None, floor: float = 1e-9) -> Tensor:
    """Return numbers S_i > 0 for the symbols of some rows: the length of each generator in the directions that count.

    At the best S the slope of λ·Σ S_i by each S_i is 0: λ·S_i² = Σ S·(mean of the squares of the generator in the directions of
    the largest eigenvalues).

    Args:
        rows: Generators, (rows, symbols).
        among: The mean of v·vᵀ over those directions; None where all weigh alike.
        floor: The smallest S, relative to the mean.

    Returns:
        (symbols,), with the sum 1.
    """
    squares = (rows * (rows if among is None else among @ rows)).sum(0)
    length = squares.clamp(min=0.0).sqrt()
    length = length + floor * length.mean() + DOUBLE.least
    return length / length.sum()


def square(rows: Tensor, q: Tensor, scaling: Tensor) -> float:
    """Return an upper bound of λ·Σ S_i.

    Each entry of the matrix is a sum over the symbols, so all are off by at most (symbols + a few)·u times the geometric mean
    of two diagonal ones, which is no more than that part of the trace; the eigenvalues of what was computed are off by a small
    multiple of (neurons)·u times the largest.
    """
    weighted = q.sqrt()[:, None] * rows
    matrix = (weighted / scaling) @ weighted.T
    if not bool(matrix.isfinite().all()):
        return math.inf
    off = (rows.shape[1] + 64 * len(rows) + 16) * DOUBLE.unit * matrix.diagonal().sum()
    most = torch.linalg.eigvalsh(matrix)[-1].clamp(min=0.0)
    return float((most + off + DOUBLE.least) * scaling.sum()) * UP
