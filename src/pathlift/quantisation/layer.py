"""One weight tensor: its grid, its integers, and what the change does to what follows (mathematics §9)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.quantisation import rounding as rounds
from pathlift.quantisation.compensated import compensated
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
    """

    grid: Grid
    integers: Tensor
    change: Tensor
    moments: InputMoments
    corrected: bool

    @property
    def shift(self) -> Tensor:
        """E[Δ u] by row, shape (groups·rows,)."""
        return (self.change @ self.moments.mean[:, :, None]).reshape(-1)

    @property
    def cost(self) -> float:
        """The expected error Σ_o g(o)·Δ_oᵀ H Δ_o, without the part of the means where that is corrected."""
        squares = energy(self.change, self.moments)
        if self.corrected:
            squares = (squares - self.shift.reshape(squares.shape) ** 2).clamp(min=0.0)
        return float((self.moments.sensitivity * squares).sum())


def energy(rows: Tensor, moments: InputMoments) -> Tensor:
    """Return wᵀ H w for each row, shape (groups, rows)."""
    parts = []
    for group in range(rows.shape[0]):
        total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        for block in blocks_of(rows.shape[2]):
            piece = rows[group, :, block]
            total += ((piece @ moments.second_of(group, block)) * piece).sum(1)
        parts.append(total)
    return torch.stack(parts)


def blocks_of(columns: int) -> list[slice]:
    """Return the blocks of columns that are looked at together."""
    count = math.ceil(columns / WIDEST)
    return [slice(columns * part // count, columns * (part + 1) // count) for part in range(count)]


def rounded(
    weight: Tensor,
    matrices: Matrices,
    form: Format,
    way: Way,
    moments: InputMoments,
    generator: torch.Generator | None = None,
) -> Rounded:
    """Round one tensor.

    Args:
        weight: The parameter.
        matrices: How it is laid out.
        form: The levels.
        way: How to round.
        moments: What it is multiplied by.
        generator: Source of randomness, for stochastic rounding.

    Returns:
        What it became.
    """
    stack = matrices.split(weight.detach()).double()
    diagonal = moments.diagonal if way.rule == "expected" else None
    grid = grid_of(stack, form, way.granularity, way.rule, diagonal, matrices.taps)
    corrected = way.correction != "none" and moments.following is not None
    integers = _integers(stack, grid, way.rounding, moments, matrices.taps, generator, centred=corrected)
    return Rounded(grid, integers, grid.values(integers) - stack, moments, corrected)


def _integers(
    stack: Tensor,
    grid: Grid,
    rounding: str,
    moments: InputMoments,
    taps: int,
    generator: torch.Generator | None,
    *,
    centred: bool,
) -> Tensor:
    if rounding == "compensated":
        pieces = []
        for block in blocks_of(stack.shape[2]):
            second = torch.stack([moments.second_of(group, block) for group in range(stack.shape[0])])
            if centred:  # what the means shift is taken up elsewhere
                second -= moments.mean[:, block, None] * moments.mean[:, None, block]
            pieces.append(compensated(stack[:, :, block], grid.columns_of(block), second))
        return torch.cat(pieces, 2)
    if rounding == "stochastic":
        return rounds.stochastic(stack, grid, generator)
    if rounding == "balanced":
        return rounds.balanced(stack, grid, taps)
    return {"nearest": rounds.to_nearest, "towards_zero": rounds.towards_zero, "away": rounds.away}[rounding](stack, grid)
