"""Rounding of weights to a grid, one by one or with an eye on their sums (mathematics §9).

nearest        the nearest value
towards_zero   |θ'| ≤ |θ| and no sign changes: the path-metric of the rounding is exact (Lemma 4.2)
away           away from zero, likewise exact, where the grid reaches as far as the weights
stochastic     up or down by chance, right on average
balanced       SQuant (Guo et al., 2022): to nearest, then the errors of each kernel are made to add up to half a step at
               most by rounding some entries the other way, then those of each output channel, one entry of a kernel each
compensated    `pathlift.quantisation.compensated`
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.quantisation.formats import WholeNumbers
from pathlift.quantisation.grids import Grid

ROUNDINGS = ("compensated", "nearest", "towards_zero", "away", "stochastic", "balanced")
"""The ways by name; the first is the default."""

ORDERED = frozenset({"towards_zero", "away"})
"""Those whose path-metric is known exactly as long as nothing else changes."""


def to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Round to the nearest value."""
    return grid.nearest(weight)


def towards_zero(weight: Tensor, grid: Grid) -> Tensor:
    """Round to the nearest value that is no larger in magnitude; one beyond the grid goes to its end."""
    below = grid.below(weight)
    return torch.where(weight >= 0, below, grid.above(weight, below))


def away(weight: Tensor, grid: Grid) -> Tensor:
    """Round to the nearest value that is no smaller in magnitude; one beyond the grid goes to its end."""
    below = grid.below(weight)
    return torch.where(weight > 0, grid.above(weight, below), below)


def stochastic(weight: Tensor, grid: Grid, generator: torch.Generator | None) -> Tensor:
    """Round to one of both neighbours, with chances that make the mean the weight itself.

    Args:
        weight: Shape (groups, rows, columns).
        grid: The grid.
        generator: Source of randomness, on the CPU; PyTorch's own when None.

    Returns:
        Integers.
    """
    below = grid.below(weight)
    above = grid.above(weight, below)
    down, up = grid.values(below), grid.values(above)
    chance = torch.where(up > down, (weight - down) / (up - down).clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64, device="cpu").to(weight.device)
    return torch.where(drawn < chance, above, below)


def balanced(weight: Tensor, grid: Grid, taps: int) -> Tensor:
    """Round to nearest, then flip entries until errors add up to half a step at most, by kernel and by output channel.

    Args:
        weight: Shape (groups, rows, columns).
        grid: The grid, of whole numbers and with one cell in a row.
        taps: Columns of one kernel.

    Returns:
        Integers.

    Raises:
        InputError: The grid is another.
    """
    if grid.scale.shape[2] > 1 or not isinstance(grid.format, WholeNumbers):
        raise InputError("Balanced rounding counts in steps: it needs whole numbers of one step in each channel.")
    integers = grid.nearest(weight)
    groups, rows, columns = weight.shape
    kernels = (groups, rows, columns // taps, taps)
    ideal = weight / grid.scale.double() + grid.zero
    integers = _flipped(integers.reshape(kernels), ideal.reshape(kernels), grid)
    errors = integers - ideal.reshape(kernels)
    total = errors.sum((2, 3))
    # one candidate of each kernel: the entry that lies furthest on the side of the channel's error
    signed = torch.where(
        _can_move(integers, total[..., None, None].sign(), grid), errors * total.sign()[..., None, None], -torch.inf
    )
    entry = signed.argmax(3, keepdim=True)
    chosen = integers.gather(3, entry)[..., 0], ideal.reshape(kernels).gather(3, entry)[..., 0]
    moved = _flipped(*chosen, grid, total)
    return integers.scatter(3, entry, moved[..., None]).reshape(weight.shape)


def _can_move(integers: Tensor, sign: Tensor, grid: Grid) -> Tensor:
    """Whether an entry can go one step against a sign and stay on the grid."""
    moved = integers - sign
    return (moved >= grid.format.low) & (moved <= grid.format.high)


def _flipped(integers: Tensor, ideal: Tensor, grid: Grid, total: Tensor | None = None) -> Tensor:
    """Move as many entries along the last axis one step against the sum of errors as it has steps, those furthest off first."""
    errors = integers - ideal
    total = errors.sum(-1) if total is None else total
    sign = total.sign()[..., None]
    free = (errors * sign > 0) & _can_move(integers, sign, grid)
    order = torch.where(free, errors * sign, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(-1, order, torch.arange(order.shape[-1], device=order.device).expand(order.shape))
    count = (total.abs() - 0.5).ceil().clamp(min=0)[..., None]
    return torch.where(free & (rank < count), integers - sign.to(integers.dtype), integers)
