"""What a batch norm says of u, which the weight before it multiplies, where mean and covariance are known roughly (§9).

A row w of the weight makes z = w·u + b, and the batch norm behind knows E z and Var z, as the training data had them: one
equation each for every row.

- Covariance: of all Gaussians with Var w·u = v the one nearest to N(·, C), by Kullback–Leibler divergence, has

      C ← C + (v − s)/s²·C w wᵀ C,      s = wᵀ C w.

  One row after another, and all of them `SWEEPS` times. v/s is taken within `MOST` and its inverse: more is not believed.
- Mean: m ← m + D Wᵀ (W D Wᵀ + ε·diag(v))⁻¹ (E z − b − W m), the mean given the equations, with errors of m that are
  independent, of variance D = τ·diag(C), and errors of E z of variance ε·v. Rows whose E z would be more than `FAR` deviations
  off say nothing: their batch norm is not that of this weight any more.

Both move along with a rescaling of the columns, and of the rows with their v.
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 2
"""How often all rows are gone through: what is known of C is not forgotten by then."""

BLOCK = 64
"""Rows that are taken together: within a block row by row, in its own space; a block changes all others at once."""

LARGE = 1024
"""Columns from which on a covariance is changed in its place."""

MOST = 64.0
"""By what factor a variance is changed at most."""

UNSURE = 0.1
"""τ above."""

NOISE = 0.001
"""ε above."""

FAR = 10.0
"""Deviations of a row, as its batch norm knows or as is propagated, that what it says of the mean is believed to be off by."""


def conditioned_covariance(covariance: Tensor, rows: Tensor, variance: Tensor) -> Tensor:
    """Return the covariance that agrees with the variances of the rows better.

    Args:
        covariance: C, shape (groups, columns, columns), float64 or float32; its memory is given up.
        rows: W, shape (groups, rows, columns), of the same type.
        variance: v, shape (groups, rows); rows of variance 0 say nothing.

    Returns:
        Shape of C.
    """
    count, columns = rows.shape[1:]
    blocks = [slice(first, first + BLOCK) for first in range(0, count, BLOCK)] * SWEEPS
    if count >= columns:
        for block in blocks:
            sent = rows[:, block] @ covariance
            change = _told((sent @ rows[:, block].mT).double(), variance[:, block]).to(sent.dtype)
            covariance = _plus(covariance, sent.mT @ change, sent)
        return (covariance + covariance.mT) / 2
    # with fewer rows than columns all is done in the space of the rows: C + Aᵀ M A with A = W C, and S = W C Wᵀ
    sent = rows @ covariance
    first = (sent @ rows.mT).double()
    spread, mixed = first, torch.zeros_like(first)
    for block in blocks:
        change = _told(spread[:, block, block], variance[:, block])
        lifted = first[:, block] @ mixed  # what the rows of the block make of C as it is now: (1 + S M) A
        lifted[:, :, block] += torch.eye(change.shape[1], dtype=change.dtype, device=change.device)
        mixed = mixed + lifted.mT @ change @ lifted
        spread = spread + spread[:, :, block] @ change @ spread[:, block]
    return _plus(covariance, sent.mT @ mixed.to(sent.dtype), sent)


def _plus(covariance: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return C + left·right: in the place of C where it is large."""
    if covariance.shape[1] <= LARGE:
        return covariance + left @ right
    for start in range(0, covariance.shape[1], LARGE):
        rows = slice(start, start + LARGE)
        covariance[:, rows].baddbmm_(left[:, rows], right)
    return covariance


def _told(first: Tensor, variance: Tensor) -> Tensor:
    """Take one row after another; return M of C + Aᵀ M A.

    Args:
        first: S = W C Wᵀ, shape (groups, rows, rows).
        variance: v, shape (groups, rows).

    Returns:
        Shape of S.
    """
    steps, found = torch.zeros_like(variance), torch.zeros_like(first)  # by what d_r changes S, and S d_r from r on
    each = zip(first.split(1, 1), variance.mT.tolist(), found.split(1, 1), steps.unbind(1), strict=True)
    for row, (start, wanted, column, step) in enumerate(each):
        earlier = found.narrow(1, 0, row)
        shares = (earlier.select(2, row) * steps.narrow(1, 0, row)).unsqueeze(1)
        torch.baddbmm(start, shares, earlier, out=column)
        now = column.select(2, row).flatten().tolist()  # numbers, as small operations would take most of the time
        step.copy_(first.new_tensor([_step(*pair) for pair in zip(now, wanted, strict=True)]))
    # M = Σ_r step_r·d_r·d_rᵀ with d_r = e_r + Σ_{q<r} d_q·step_q·(S d_q)_r
    one = torch.eye(first.shape[1], dtype=first.dtype, device=first.device).expand_as(first)
    directions: Tensor = torch.linalg.solve_triangular(-steps[:, :, None] * found, one, upper=True, unitriangular=True)
    return (directions * steps[:, None, :]) @ directions.mT


def _step(now: float, wanted: float) -> float:
    """Return (v/s − 1)/s with v/s within bounds; 0 where a row says nothing."""
    if not (now > 0 and wanted > 0):
        return 0.0
    return (min(max(wanted / now, 1.0 / MOST), MOST) - 1.0) / now


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
    believed = gap.abs() <= FAR * size * torch.maximum(variance, (rows.square() @ spread[:, :, None])[:, :, 0]).sqrt()
    unit, gap = torch.where(believed[:, :, None], unit, 0.0), torch.where(believed, gap, 0.0)
    likely = (UNSURE * spread).sqrt()
    sent = unit * likely[:, None, :]
    change: Tensor
    noise = NOISE * torch.eye(min(rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    if rows.shape[1] <= rows.shape[2]:
        change = sent.mT @ torch.linalg.solve(sent @ sent.mT + noise, gap[:, :, None])
    else:  # Aᵀ(A Aᵀ + ε)⁻¹ = (Aᵀ A + ε)⁻¹ Aᵀ
        change = torch.linalg.solve(sent.mT @ sent + noise, sent.mT @ gap[:, :, None])
    return mean + likely * change[:, :, 0]
