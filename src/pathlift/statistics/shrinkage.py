"""Second moments of few samples, shrunk towards what is known without them, as far as they are chance (mathematics §9).

With S_n the mean of u·uᵀ over the positions of sample n of N, about a mean that is close, S = Σ_n S_n/N varies from one choice
of samples to another by

    V_ij = (Σ_n S_n,ij²/N − S_ij²) / (N − 1).

Samples count, not positions: those of one image are much alike. Of all matrices (1−λ)·S + λ·T, T with the diagonal of S and the
correlations that are known without data, the one that is expected to be closest to the truth, beside the diagonal and in units
in which that is 1, has

    λ = Σ_{i≠j} V_ij/(S_ii S_jj) / Σ_{i≠j} (S_ij − T_ij)²/(S_ii S_jj),

within 0 and 1: near 1 where samples are few, near 0 where they are many, or T is plainly wrong. S_ii itself is known up to
√V_ii. All of it goes along with a rescaling.

References:
    Ledoit, Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", J. Multivariate Analysis 2004;
    Schäfer, Strimmer, "A shrinkage approach to large-scale covariance matrix estimation", SAGMB 2005.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENTRIES = 1 << 22
"""Entries of the second moments of single samples that are held at once, about."""


class Products:
    """The second moment of windows, and how far it varies with the choice of samples.

    Attributes:
        samples: N so far.
    """

    def __init__(self) -> None:
        """Begin without samples."""
        self.samples = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, windows: Tensor) -> None:
        """Take more samples.

        Args:
            windows: Float64, shape (groups, samples, positions, columns).
        """
        groups, samples, positions, columns = windows.shape
        self.samples += samples
        if positions == 1:
            alone = windows[:, :, 0]
            self._sum = self._sum + alone.mT @ alone
            self._squares = self._squares + alone.square().mT @ alone.square()
            return
        if isinstance(self._sum, float) or isinstance(self._squares, float):
            self._sum, self._squares = (windows.new_zeros(groups, columns, columns) for _ in range(2))
        for few in windows.split(max(1, ENTRIES // (groups * columns**2)), 1):
            for each in (few.mT @ few).div_(positions).unbind(1):
                self._sum += each
                self._squares.addcmul_(each, each)

    @property
    def mean(self) -> Tensor:
        """S, shape (groups, columns, columns)."""
        assert isinstance(self._sum, Tensor)
        return self._sum / self.samples

    @property
    def variance(self) -> Tensor:
        """V, of the shape of S: of one sample S² itself, as nothing tells how far another would be off."""
        assert isinstance(self._squares, Tensor)
        squares = self.mean.square()
        if self.samples == 1:
            return squares
        return (self._squares / self.samples).sub_(squares).clamp_(min=0.0).div_(self.samples - 1)


def shrunk(covariance: Tensor, variance: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return (1−λ)·S + λ·T, and λ.

    Args:
        covariance: S, shape (groups, columns, columns).
        variance: V, of the same shape.
        known: The correlations of T, of the same shape, with a diagonal of 1 or, where nothing is known, 0.

    Returns:
        The matrices, with the diagonal of S, and λ of each group, (groups, 1, 1).
    """
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    size = diagonal.clamp(min=0.0).sqrt()
    unit = torch.where(size > 0, 1.0 / size, 0.0)
    target = known * size[:, :, None] * size[:, None, :]
    off = (target - covariance).mul_(unit[:, :, None]).mul_(unit[:, None, :])
    chance = (variance * unit.square()[:, :, None]).mul_(unit.square()[:, None, :])
    distance, scatter = (beside(part) for part in (off.square_(), chance))
    share = torch.where(scatter < distance, scatter / distance, 1.0)[:, None, None]
    mixed = torch.lerp(covariance, target, share)
    mixed.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return mixed, share


def beside(matrices: Tensor) -> Tensor:
    """Return the sum of what stands beside the diagonal of each matrix."""
    return matrices.sum((1, 2)) - matrices.diagonal(dim1=1, dim2=2).sum(1)
