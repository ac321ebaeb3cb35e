"""What a batch norm says of u, which the weight before it multiplies, where mean and covariance are known roughly (§9).

A row w of the weight makes z = w·u + b, and the batch norm behind knows E z and Var z, as the training data had them: one
equation each for every row.

- Covariance: of all Gaussians with Var w·u = v the one nearest to N(·, C), by Kullback–Leibler divergence, has

      C ← C + (v − s)/s²·C w wᵀ C,      s = wᵀ C w.

  One row after another, and all of them `SWEEPS` times. v/s is taken within `MOST` and its inverse: more is not believed.
- Mean: m ← m + D Wᵀ (W D Wᵀ + ε·diag(v))⁻¹ (E z − b − W m), the mean given the equations, with errors of m that are
  independent, of variance D = τ·diag(C), and errors of E z of variance ε·v.

Both move along with a rescaling of the columns, and of the rows with their v.
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 2
"""How often all rows are gone through: what is known of C is not forgotten by then."""

MOST = 64.0
"""By what factor a variance is changed at most."""

UNSURE = 0.1
"""τ above."""

NOISE = 0.001
"""ε above."""


def conditioned_covariance(covariance: Tensor, rows: Tensor, variance: Tensor) -> Tensor:
    """Return the covariance that agrees with the variances of the rows better.

    Args:
        covariance: C, shape (groups, columns, columns).
        rows: W, shape (groups, rows, columns).
        variance: v, shape (groups, rows); rows of variance 0 say nothing.

    Returns:
        Shape of C.
    """
    groups, count, columns = rows.shape
    narrow = count < columns
    # with fewer rows than columns all steps are taken in the space of the rows: C + Aᵀ M A, A = W C, and S = W C Wᵀ
    sent = rows @ covariance if narrow else rows
    first = sent @ rows.mT if narrow else covariance
    spread, mixed = first.clone(), torch.zeros(groups, count, count, dtype=covariance.dtype, device=covariance.device)
    for _ in range(SWEEPS):
        for row in range(count):
            if narrow:
                column, now = spread[:, :, row].clone(), spread[:, row, row].clone()
            else:
                column = (spread @ rows[:, row, :, None])[:, :, 0]
                now = (column * rows[:, row]).sum(1)
            told = (now > 0) & (variance[:, row] > 0)
            now = torch.where(told, now, 1.0)
            ratio = torch.where(told, variance[:, row] / now, 1.0).clamp(1.0 / MOST, MOST)
            step = ((ratio - 1.0) / now)[:, None, None]
            spread += step * column[:, :, None] * column[:, None, :]
            if narrow:
                direction = (mixed @ first[:, :, row, None])[:, :, 0]
                direction[:, row] += 1.0
                mixed += step * direction[:, :, None] * direction[:, None, :]
    return covariance + sent.mT @ mixed @ sent if narrow else (spread + spread.mT) / 2


def conditioned_mean(mean: Tensor, spread: Tensor, rows: Tensor, known: Tensor, variance: Tensor) -> Tensor:
    """Return the mean that agrees with the means of the rows better.

    Args:
        mean: m, shape (groups, columns).
        spread: Diagonal of C, likewise.
        rows: W, shape (groups, rows, columns).
        known: E z − b, shape (groups, rows).
        variance: v, likewise.

    Returns:
        Shape of m.
    """
    size = torch.where(variance > 0, variance.rsqrt(), 0.0)
    unit = rows * size[:, :, None]  # rows of unit variance
    gap = known * size - (unit @ mean[:, :, None])[:, :, 0]
    sent = unit * (UNSURE * spread)[:, None, :]
    noise = NOISE * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    weights: Tensor = torch.linalg.solve(sent @ unit.mT + noise, gap[:, :, None])
    return mean + (sent.mT @ weights)[:, :, 0]
