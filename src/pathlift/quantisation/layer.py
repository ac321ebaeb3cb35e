"""One weight tensor: its grid, its integers, and what the change does to what follows (mathematics §9)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.compensation.correction import quadratic
from pathlift.quantisation import rounding as rounds
from pathlift.quantisation.compensated import compensated, compensated_in_range
from pathlift.quantisation.formats import Format, WholeNumbers
from pathlift.quantisation.grids import Grid
from pathlift.quantisation.matrices import Matrices
from pathlift.quantisation.ranges import grid_of
from pathlift.statistics.input_moments import InputMoments

WIDEST = 5000
"""Columns that are compensated together; wider rows are cut into blocks, which the correction of means still holds together."""

GROWTH = 2.0
"""How much larger than before the weights are that a range is chosen for, at most: one that has grown a hundredfold, to make up
for something by a value that is hardly ever there, would make all others of its row coarser."""


@dataclass(frozen=True)
class Way:
    """How all tensors are rounded.

    Attributes:
        rounding: A name of `pathlift.quantisation.rounding.ROUNDINGS`.
        granularity: ``tensor``, ``channel``, or input channels for each scale.
        rule: A name of `pathlift.quantisation.ranges.RANGES`.
        correction: ``mean``, ``variance`` (both), or ``none``.
    """

    rounding: str
    granularity: str | int
    rule: str
    correction: str


@dataclass(frozen=True, eq=False)
class Rounded:
    """A tensor that was rounded.

    Attributes:
        grid: Its grid.
        integers: Shape (groups, rows, columns): int8, or int32 for floating-point formats.
        moments: What it is multiplied by.
        corrected: Whether the mean of what the change does is taken up by what follows.
        shift: E[Δ u] by row, Δ = θ' − θ, shape (groups·rows,).
        squares: Δ_oᵀ C Δ_o of each row, C the covariance of what it is multiplied by, shape (groups, rows).
        variances: wᵀ C w of each row before and after, each (groups, rows), where running variances are estimated anew.
    """

    grid: Grid
    integers: Tensor
    moments: InputMoments
    corrected: bool
    shift: Tensor
    squares: Tensor
    variances: tuple[Tensor, Tensor] | None

    @property
    def cost(self) -> float:
        """The expected error Σ_o g(o)·Δ_oᵀ H Δ_o, without the part of the means where that is corrected."""
        squares = self.squares if self.corrected else self.squares + self.shift.reshape(self.squares.shape) ** 2
        return float((self.moments.sensitivity * squares).sum())


def blocks_of(columns: int) -> list[slice]:
    """Return the blocks of columns that are looked at together."""
    count = math.ceil(columns / WIDEST)
    return [slice(columns * part // count, columns * (part + 1) // count) for part in range(count)]


class Covariances:
    """What a tensor is multiplied by: means, and C of all columns or of blocks of them where they are many, one in memory."""

    def __init__(self, moments: InputMoments) -> None:
        """Say whose they are.

        Args:
            moments: What a tensor is multiplied by.
        """
        self.moments = moments
        self.mean = moments.mean
        self.blocks = blocks_of(moments.shape[2])
        self._known: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of columns and their covariance, which is kept until another is asked for."""
        for number, block in enumerate(self.blocks):
            if self._known is None or self._known[0] != number:
                self._known = None
                self._known = (number, self.moments.covariance(block))
            yield block, self._known[1]

    @property
    def diagonal(self) -> Tensor:
        """E u², shape (groups, columns)."""
        return self.moments.diagonal

    @property
    def noise(self) -> Tensor | None:
        """What E u² is known up to, which is part of C, shape (groups, columns); None for nothing."""
        return self.moments.noise


def rounded(
    weight: Tensor,
    matrices: Matrices,
    form: Format,
    way: Way,
    moments: InputMoments,
    covariances: Covariances,
    generator: torch.Generator | None = None,
    within: Tensor | None = None,
) -> Rounded:
    """Round one tensor.

    Args:
        weight: The parameter.
        matrices: How it is laid out.
        form: The levels.
        way: How to round.
        moments: What it is multiplied by, and what its errors do.
        covariances: What it is multiplied by.
        generator: Source of randomness, for stochastic rounding.
        within: The parameter as it was, where another is rounded in its place: the range of no row is chosen for weights
            beyond `GROWTH` times its largest.

    Returns:
        What it became.
    """
    stack = matrices.split(weight.detach())
    diagonal = covariances.diagonal if way.rule == "expected" else None
    ranged = stack
    if within is not None:
        most = GROWTH * matrices.split(within.detach()).abs().amax(2, keepdim=True)
        ranged = torch.clamp(stack, -most, most)
    grid = grid_of(ranged, form, way.granularity, way.rule, diagonal, matrices.taps)
    corrected = way.correction != "none" and moments.following is not None
    kind = torch.int8 if isinstance(form, WholeNumbers) else torch.int32
    integers = torch.empty(stack.shape, dtype=kind, device=stack.device)
    together = way.rounding == "compensated"
    if not together:
        integers.copy_(_integers(stack.double(), grid, way.rounding, matrices.taps, generator))
    shared = way.granularity == "tensor" or way.rule == "minmax" or not form.scaled
    shift, sums, noise = [], [], covariances.noise
    for block, covariance in covariances:
        piece = stack[:, :, block].double()
        if together:
            mean = covariances.mean[:, block].to(covariance.dtype)
            second = covariance if corrected else torch.baddbmm(covariance, mean[:, :, None], mean[:, None, :])
            if not shared and len(covariances) == 1:
                grid, best = compensated_in_range(piece, grid.columns_of(block), second)
            else:
                best = compensated(piece, grid.columns_of(block), second)
            integers[:, :, block] = best
            del second, best
        change = grid.columns_of(block).values(integers[:, :, block]).sub_(piece)
        shift.append((change @ covariances.mean[:, block, None]).reshape(-1))
        rows = [change, piece, piece + change] if way.correction == "variance" else [change]
        sums.append(torch.stack([quadratic(each, covariance) for each in rows]))
        if noise is not None:  # chooses what is rounded how, but is no error
            sums[-1] -= torch.stack([(each.square() @ noise[:, block, None]).squeeze(2) for each in rows])
        del covariance, piece, change, rows
    squares, *variances = torch.stack(sums).sum(0).clamp(min=0.0)
    spread = (variances[0], variances[1]) if variances else None
    return Rounded(grid, integers, moments, corrected, torch.stack(shift).sum(0), squares, spread)


def _integers(stack: Tensor, grid: Grid, rounding: str, taps: int, generator: torch.Generator | None) -> Tensor:
    if rounding == "stochastic":
        return rounds.stochastic(stack, grid, generator)
    if rounding == "balanced":
        return rounds.balanced(stack, grid, taps)
    return {"nearest": rounds.to_nearest, "towards_zero": rounds.towards_zero, "away": rounds.away}[rounding](stack, grid)
