"""Grids that weights are rounded to: levels of a format times a scale, one for the tensor, each channel or group (§9).

A weight tensor is a stack of matrices, (groups, rows, columns): a row makes one output channel, its columns are input channels
times taps (`pathlift.quantisation.matrices`). A value of the grid is float32(level·scale), which is what readers of such files
compute as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.quantisation.formats import Format


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid for each element of a stack of matrices.

    Attributes:
        format: The levels.
        scale: Float32, of shape (groups or 1, rows or 1, cells): the columns fall into cells of equal size.
        zero: Zero points, int32, of the same shape.
        columns: Number of columns.
    """

    format: Format
    scale: Tensor
    zero: Tensor
    columns: int

    def spread(self, cells: Tensor) -> Tensor:
        """Return what each column has from what each cell has."""
        if cells.shape[2] in {1, self.columns}:
            return cells
        return cells.repeat_interleave(self.columns // cells.shape[2], dim=2)

    def columns_of(self, columns: slice) -> Grid:
        """Return the grid of some columns alone."""
        count = columns.stop - columns.start
        if self.scale.shape[2] == 1:
            return Grid(self.format, self.scale, self.zero, count)
        scale, zero = (self.spread(cells)[:, :, columns] for cells in (self.scale, self.zero))
        return Grid(self.format, scale, zero, count)

    def rows_of(self, rows: slice) -> Grid:
        """Return the grid of some rows alone."""
        scale, zero = (cells if cells.shape[1] == 1 else cells[:, rows] for cells in (self.scale, self.zero))
        return Grid(self.format, scale, zero, self.columns)

    def values(self, integers: Tensor) -> Tensor:
        """Return the values that integers stand for.

        Args:
            integers: Shape (groups, rows, columns), from ``format.low`` to ``format.high``.

        Returns:
            Float64 numbers that float32 holds.
        """
        levels = self.format.levels(integers, self.spread(self.zero))
        return (levels * self.spread(self.scale).double()).float().double()

    def below(self, weight: Tensor) -> Tensor:
        """Return the integers of the largest values that do not exceed the weights; the smallest ones where there is none."""
        weight = weight.double()
        low, high = self.format.low, self.format.high
        start = self.format.floor(weight / self.spread(self.scale).double(), self.spread(self.zero)).clamp(low, high)
        start = torch.where(self.values(start) > weight, start - 1, start).clamp(min=low)  # the values are rounded
        following = (start + 1).clamp(max=high)
        return torch.where(self.values(following) <= weight, following, start)

    def above(self, weight: Tensor, below: Tensor) -> Tensor:
        """Return the integers of the smallest values that are no less than the weights; the largest where there is none."""
        return torch.where(self.values(below) >= weight, below, (below + 1).clamp(max=self.format.high))

    def clipped(self, weight: Tensor) -> Tensor:
        """Tell which weights lie beyond the ends by more than half of the last step."""
        ends = (self.values(torch.tensor(end, device=weight.device)) for end in (self.format.low, self.format.high))
        low, high = ends
        half = 0.5 * self.format.last_step() * self.spread(self.scale).double()
        return (weight.double() < low - half) | (weight.double() > high + half)

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the integers of the nearest values; of two that are as near, the even integer."""
        below = self.below(weight)
        above = self.above(weight, below)
        down, up = (weight - self.values(below)).abs(), (self.values(above) - weight).abs()
        even = torch.where(below % 2 == 0, below, above)
        return torch.where(down < up, below, torch.where(up < down, above, even))
