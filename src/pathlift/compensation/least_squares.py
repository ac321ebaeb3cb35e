"""The weights that stay, such that a row changes its output the least: optimal brain surgery for any mask (mathematics §9).

For each row w with a mask, the minimum of (w − v)ᵀ (H + d·diag(H)) (w − v) over all v that are 0 where the mask says so. With
A = H + d·diag(H) and the pruned columns p, the kept ones k, either of

    v_k = A_kk⁻¹ (A w)_k,        v = w − (A⁻¹)_·p ((A⁻¹)_pp)⁻¹ w_p

is the exact minimum; the one with the smaller matrix is taken. Rows with one mask share its factor. Where what comes in has
changed as well, u → ũ, the row becomes the fit of w·u by v·ũ: H = E ũũᵀ, and A w is E ũuᵀ w + d·diag(H) w.

References:
    Hassibi, Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS 1992; Frantar, Singh,
    Alistarh, "Optimal brain compression", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pathlift.compensation.damping import Damped, damped
from pathlift.errors import NumericalError

DAMPING = 0.05
"""d above."""

ENTRIES = 1 << 23
"""Entries of the matrices that are factored together."""


def least_squares(
    weight: Tensor, keep: Tensor, moment: Tensor, cross: Tensor | None = None, damping: float = DAMPING
) -> Tensor:
    """Return the rows that come closest to those of a weight, with zeros where a mask says so.

    Args:
        weight: Shape (groups, rows, columns).
        keep: Bool, of the same shape: which stay.
        moment: H, shape (groups, columns, columns).
        cross: E ũuᵀ of the same shape, the inputs of now by those of before; None where they are the same.
        damping: d.

    Returns:
        float64, of the shape of the weight. Rows of which nothing goes, of inputs that are the same, are as they were.

    Raises:
        NumericalError: H is not positive semi-definite.
    """
    keep = keep.bool()
    if cross is None and bool(keep.all()):
        return weight.double()
    factored = damped(moment, damping)
    scaled = weight.double() * factored.scale[:, None, :]
    dense = scaled if cross is None else _dense(scaled, factored, cross)
    made = torch.where(keep, _fitted(dense, keep, factored), 0.0) / factored.scale[:, None, :]
    # columns that are always 0 say nothing of their weights
    return torch.where(factored.alive[:, None, :], made, torch.where(keep, weight.double(), 0.0))


def _dense(weight: Tensor, factored: Damped, cross: Tensor) -> Tensor:
    """Return the rows that fit best where nothing is pruned: A⁻¹ (E ũuᵀ w + d·diag(H) w), in scaled columns."""
    scale, alive = factored.scale, factored.alive
    unit = torch.where(alive[:, :, None], cross.double() / scale[:, :, None] / scale[:, None, :], 0.0)
    pull = factored.matrix.diagonal(dim1=1, dim2=2) * (factored.damping / (1.0 + factored.damping))
    wanted = unit @ weight.mT + torch.where(alive, pull, 1.0)[:, :, None] * weight.mT
    return torch.cholesky_solve(wanted, factored.lower).mT


def _fitted(dense: Tensor, keep: Tensor, factored: Damped) -> Tensor:
    """Return the best rows with zeros by the masks, in scaled columns; entries that are masked are not set to 0 yet."""
    groups, rows, columns = keep.shape
    inverse = torch.cholesky_inverse(factored.lower)
    forced = (dense @ factored.matrix).flatten(0, 1)
    flat, change, made = dense.flatten(0, 1), torch.zeros_like(forced), torch.zeros_like(forced)
    masks = _Masks(keep)
    for few in (True, False):
        source, matrix = (flat, inverse) if few else (forced, factored.matrix)
        for chosen in masks.batches(few=few):
            place, there = masks.columns(chosen)
            both = there[:, :, None] & there[:, None, :]
            part = matrix[masks.group[chosen][:, None, None], place[:, :, None], place[:, None, :]]
            lower, failed = torch.linalg.cholesky_ex(torch.where(both, part, 0.0) + torch.diag_embed((~there).double()))
            if bool(failed.any()):
                raise NumericalError("The second moment of what a layer is multiplied by loses too many digits when inverted.")
            members, inside = masks.members(chosen)
            index = place[:, None, :].expand(-1, members.shape[1], -1)
            wanted = torch.where(there[:, None, :], source[members].gather(2, index), 0.0)
            solved = torch.cholesky_solve(wanted.mT, lower).mT
            filled = torch.zeros(*members.shape, columns, dtype=dense.dtype, device=dense.device).scatter(2, index, solved)
            (change if few else made)[members[inside]] = filled[inside]
    full = keep.flatten(0, 1)
    by_change = (dense - change.reshape(groups, rows, columns) @ inverse).flatten(0, 1)
    return torch.where((full.sum(1, keepdim=True) * 2 > columns), by_change, made).reshape(dense.shape)


class _Masks:
    """The different masks among the rows, and which rows have them."""

    def __init__(self, keep: Tensor) -> None:
        """Take them.

        Args:
            keep: Shape (groups, rows, columns).
        """
        groups, rows, columns = keep.shape
        group = torch.arange(groups, device=keep.device).repeat_interleave(rows)
        keys = torch.cat([group[:, None], keep.flatten(0, 1).long()], 1)
        unique, which, self.counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        self.group, kept = unique[:, 0], unique[:, 1:].bool()
        self.few = kept.sum(1) * 2 > columns
        self.chosen = torch.where(self.few[:, None], ~kept, kept)
        self.size = self.chosen.sum(1)
        self.rows = which.argsort(stable=True)
        self.first = self.counts.cumsum(0) - self.counts

    def batches(self, *, few: bool) -> Iterator[Tensor]:
        """Yield numbers of masks of like size of which few columns go, or few stay; none of which all go or stay."""
        numbers = ((self.few == few) & (self.size > 0)).nonzero()[:, 0]
        numbers = numbers[self.size[numbers].argsort(descending=True, stable=True)]
        while len(numbers):
            count = max(1, ENTRIES // int(self.size[numbers[0]]) ** 2)
            yield numbers[:count]
            numbers = numbers[count:]

    def columns(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns of masks, as many for each, and which of them count."""
        most = int(self.size[masks[0]])
        place = self.chosen[masks].int().argsort(dim=1, descending=True, stable=True)[:, :most]
        return place, self.chosen[masks].gather(1, place)

    def members(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows that have masks, as many for each, and which of them count."""
        counts = self.counts[masks][:, None]
        steps = torch.arange(int(counts.max()), device=counts.device)
        place = self.first[masks][:, None] + torch.minimum(steps, counts - 1)
        return self.rows[place], steps < counts
