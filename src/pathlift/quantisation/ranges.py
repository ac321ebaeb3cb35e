"""How far a grid reaches: to the largest weight, or less far where finer steps are worth the clipping (mathematics §9).

    minmax     all weights of a cell lie within
    mse        Σ (w − Q(w))² is least
    expected   Σ h·(w − Q(w))² is least, h the second moment of what the weight is multiplied by
    lp         Σ |w − Q(w)|^2.4 is least

The last three try shares of the full range, first coarsely and then around the best. A scale changes by the same power of two
as the weights of its cell, without rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.quantisation.formats import Format, WholeNumbers
from pathlift.quantisation.grids import Grid

RANGES = ("mse", "minmax", "expected", "lp")
"""The rules by name; the first is the default."""

POWER = 2.4
"""Of the errors, by the rule lp."""

COARSE = 0.04
"""Step of the first search, as a share of the full range; that of the second is a quarter of it."""

LEAST = 0.2
"""The smallest share of the full range that is tried."""

AT_ONCE = 1 << 17
"""Weights that are looked at together, but for a cell of more: they stay within a cache."""


def grid_of(
    weight: Tensor, form: Format, granularity: str | int, rule: str, diagonal: Tensor | None = None, taps: int = 1
) -> Grid:
    """Choose a grid.

    Args:
        weight: Shape (groups, rows, columns).
        form: The levels.
        granularity: ``tensor``, ``channel``, or a number of input channels for each scale: the largest divisor of their number
            that is no larger is taken.
        rule: See above.
        diagonal: h by column, shape (groups, columns); for the rule ``expected``.
        taps: Columns of one input channel.

    Returns:
        The grid.
    """
    weight = weight.double()
    groups, rows, columns = weight.shape
    cells = cells_of(columns, granularity, taps)
    shape = (groups, rows, cells, columns // cells)
    split = weight.reshape((1, 1, 1, weight.numel()) if granularity == "tensor" else shape)
    full = _full(split, form)
    if rule == "minmax" or not form.scaled:
        return Grid(form, *_fitted(full, form), columns)
    importance = None
    if rule == "expected" and diagonal is not None:
        importance = diagonal.double()[:, None, :].expand(weight.shape).reshape(split.shape).reshape(-1, split.shape[3])
    flat, ends = split.reshape(-1, split.shape[3]), torch.stack(full).reshape(2, -1)
    best = torch.empty_like(ends[0])
    step = max(1, AT_ONCE // split.shape[3])
    for start in range(0, len(flat), step):
        some = slice(start, start + step)
        best[some] = _best_share(flat[some], ends[:, some], form, rule, None if importance is None else importance[some])
    best = best.reshape(split.shape[:3])
    return Grid(form, *_fitted((full[0] * best, full[1] * best), form), columns)


def _best_share(cells: Tensor, ends: Tensor, form: Format, rule: str, importance: Tensor | None) -> Tensor:
    """Return for each cell, (cells, weights), by what share of its range the errors are least."""
    single = cells.float()

    def error(share: Tensor) -> Tensor:
        scale, zero = _fitted((ends[0] * share, ends[1] * share), form)
        if isinstance(form, WholeNumbers):  # in steps, which float32 holds whatever the scale
            off = single / scale[:, None]
            near = off.round()
            if form.affine:
                start = zero[:, None].float()
                near.clamp_(form.low - start, form.high - start)
            else:
                near.clamp_(form.low, form.high)
            off, power = off.sub_(near), POWER if rule == "lp" else 2.0
            off = off.square_() if power == 2.0 else off.abs_().pow_(power)
            return (off if importance is None else off * importance).sum(1).double() * scale.double() ** power
        grid = Grid(form, scale.reshape(-1, 1, 1), zero.reshape(-1, 1, 1), cells.shape[1])
        off = grid.values(grid.nearest(cells[:, None]))[:, 0].sub_(cells)
        off = off.abs_().pow_(POWER) if rule == "lp" else off.square_()
        return (off if importance is None else off.mul_(importance)).sum(1)

    best = torch.ones(len(cells), dtype=torch.float64, device=cells.device)
    least = error(best)
    count = round((1.0 - LEAST) / COARSE)
    for index in range(1, count):
        least, best = _better(least, best, error, torch.full_like(best, 1.0 - index * COARSE))
    middle = best
    for offset in (-0.75 * COARSE, -0.5 * COARSE, -0.25 * COARSE, 0.25 * COARSE, 0.5 * COARSE, 0.75 * COARSE):
        least, best = _better(least, best, error, (middle + offset).clamp(LEAST, 1.0))
    return best


def cells_of(columns: int, granularity: str | int, taps: int) -> int:
    """Return how many cells the columns of a row fall into; 1 unless they are grouped."""
    if isinstance(granularity, str):
        return 1
    channels = columns // taps
    size = max(size for size in range(1, min(granularity, channels) + 1) if channels % size == 0)
    return channels // size


def _better(least: Tensor, best: Tensor, error: Callable[[Tensor], Tensor], share: Tensor) -> tuple[Tensor, Tensor]:
    tried = error(share)
    return torch.minimum(least, tried), torch.where(tried < least, share, best)


def _full(split: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Return both ends of the range of each cell; 0 lies within."""
    if not form.affine:
        largest = split.abs().amax(3)
        return -largest, largest
    return split.amin(3).clamp(max=0.0), split.amax(3).clamp(min=0.0)


def _fitted(ends: tuple[Tensor, Tensor], form: Format) -> tuple[Tensor, Tensor]:
    """Return scales and zero points with which the grid reaches from end to end; cells of zeros get the scale 1.

    Raises:
        InputError: A scale is no normal number of float32.
    """
    low, high = ends
    zero = torch.zeros(low.shape, dtype=torch.int32, device=low.device)
    if not form.scaled:
        return torch.ones_like(low).float(), zero
    wide = (high - low) / (form.high - form.low) if form.affine else high / form.top()
    scale = wide.float()
    scale = torch.where(scale.double() < wide, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    if bool(((wide > 0) & (wide < torch.finfo(torch.float32).tiny)).any()) or not bool(torch.isfinite(scale).all()):
        raise InputError(
            "The weights of a channel are so small, or so large, that float32 does not hold the step of their grid. Rescale "
            "the network first: gauge='balanced'."
        )
    scale = torch.where(wide > 0, scale, torch.ones_like(scale))
    if form.affine:
        zero = (form.low - (low / scale.double()).round()).clamp(form.low, form.high).to(torch.int32)
    return scale, zero
