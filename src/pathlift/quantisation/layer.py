"""One weight tensor: its grid, its integers, and what the change does to what follows (mathematics §9)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.compensation.correction import quadratic
from pathlift.quantisation import rounding as rounds
from pathlift.quantisation.compensated import compensated, compensated_in_range
from pathlift.quantisation.formats import Format
from pathlift.quantisation.grids import Grid
from pathlift.quantisation.matrices import Matrices
from pathlift.quantisation.ranges import grid_of
from pathlift.statistics.input_moments import InputMoments

WIDEST = 5000
"""Columns that are compensated together; wider rows are cut into blocks, which the correction of means still holds together."""


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
        integers: Shape (groups, rows, columns).
        change: θ' − θ, float64, of the same shape.
        moments: What it is multiplied by.
        corrected: Whether the mean of what the change does is taken up by what follows.
        squares: Δ_oᵀ C Δ_o of each row, C the covariance of what it is multiplied by, shape (groups, rows).
        variances: wᵀ C w of each row before and after, each (groups, rows), where running variances are estimated anew.
    """

    grid: Grid
    integers: Tensor
    change: Tensor
    moments: InputMoments
    corrected: bool
    squares: Tensor
    variances: tuple[Tensor, Tensor] | None

    @property
    def shift(self) -> Tensor:
        """E[Δ u] by row, shape (groups·rows,)."""
        return (self.change @ self.moments.mean[:, :, None]).reshape(-1)

    @property
    def cost(self) -> float:
        """The expected error Σ_o g(o)·Δ_oᵀ H Δ_o, without the part of the means where that is corrected."""
        squares = self.squares if self.corrected else self.squares + self.shift.reshape(self.squares.shape) ** 2
        return float((self.moments.sensitivity * squares).sum())


def blocks_of(columns: int) -> list[slice]:
    """Return the blocks of columns that are looked at together."""
    count = math.ceil(columns / WIDEST)
    return [slice(columns * part // count, columns * (part + 1) // count) for part in range(count)]


Covariances = list[tuple[slice, Tensor]]
"""Blocks of columns, and the covariance of what each is multiplied by."""


def covariances_of(moments: InputMoments) -> Covariances:
    """Return C of all columns, or of blocks of them where they are many.

    Args:
        moments: What a tensor is multiplied by.

    Returns:
        The blocks.
    """
    return [(block, moments.covariance(block)) for block in blocks_of(moments.shape[2])]


def rounded(
    weight: Tensor,
    matrices: Matrices,
    form: Format,
    way: Way,
    moments: InputMoments,
    covariances: Covariances,
    generator: torch.Generator | None = None,
) -> Rounded:
    """Round one tensor.

    Args:
        weight: The parameter.
        matrices: How it is laid out.
        form: The levels.
        way: How to round.
        moments: What it is multiplied by.
        covariances: The same, see `covariances_of`.
        generator: Source of randomness, for stochastic rounding.

    Returns:
        What it became.
    """
    stack = matrices.split(weight.detach()).double()
    diagonal = moments.diagonal if way.rule == "expected" else None
    grid = grid_of(stack, form, way.granularity, way.rule, diagonal, matrices.taps)
    corrected = way.correction != "none" and moments.following is not None
    if way.rounding == "compensated":
        shared = way.granularity == "tensor" or way.rule == "minmax" or not form.scaled
        pieces = []
        for block, covariance in covariances:
            if not corrected:
                covariance = covariance + moments.mean[:, block, None] * moments.mean[:, None, block]
            piece, cells = stack[:, :, block], grid.columns_of(block)
            if not shared and len(covariances) == 1:
                grid, best = compensated_in_range(piece, cells, covariance)
                pieces.append(best)
            else:
                pieces.append(compensated(piece, cells, covariance))
        integers = torch.cat(pieces, 2)
    else:
        integers = _integers(stack, grid, way.rounding, matrices.taps, generator)
    change = grid.values(integers) - stack

    def quadratics(rows: Tensor) -> Tensor:
        return torch.stack([quadratic(rows[:, :, block], covariance) for block, covariance in covariances]).sum(0)

    variances = (quadratics(stack), quadratics(stack + change)) if way.correction == "variance" else None
    return Rounded(grid, integers, change, moments, corrected, quadratics(change), variances)


def _integers(stack: Tensor, grid: Grid, rounding: str, taps: int, generator: torch.Generator | None) -> Tensor:
    if rounding == "stochastic":
        return rounds.stochastic(stack, grid, generator)
    if rounding == "balanced":
        return rounds.balanced(stack, grid, taps)
    return {"nearest": rounds.to_nearest, "towards_zero": rounds.towards_zero, "away": rounds.away}[rounding](stack, grid)
