"""A network on its way: which of its weights are rounded by now, and what took up the means of the changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pathlift.quantisation.formats import FloatingPoint, WholeNumbers
from pathlift.quantisation.layer import Rounded
from pathlift.quantisation.matrices import Matrices
from pathlift.quantisation.tensors import QuantizedTensor

ROWS_OF = 1 << 19
"""Weights of so many rows as are looked at together."""


@dataclass(eq=False)
class Underway:
    """How far a network is rounded.

    Attributes:
        state: Its parameters and buffers.
        tensors: Each tensor that is done.
        corrected: What took up the means of the changes.
    """

    state: dict[str, Tensor]
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    corrected: list[str] = field(default_factory=list)

    def take(self, matrices: Matrices, outcome: Rounded, weight: Tensor) -> None:
        """Take a tensor that was rounded.

        Args:
            matrices: How it is laid out.
            outcome: What it became.
            weight: What it was in the model.
        """
        self.tensors[matrices.name], self.state[matrices.name] = _tensor(matrices, outcome, weight)

    def correct(self, changed: Mapping[str, Tensor]) -> None:
        """Take biases, running means and running variances."""
        self.state.update(changed)
        self.corrected += [name for name in changed if name not in self.corrected]


def _tensor(matrices: Matrices, outcome: Rounded, weight: Tensor) -> tuple[QuantizedTensor, Tensor]:
    """Return what became of a tensor, its share of the path-norm left open, and its values."""
    grid, form = outcome.grid, outcome.grid.format
    block, scale, zero = matrices.cells(grid)
    stack = matrices.split(weight.detach())
    integers = outcome.integers
    if isinstance(form, FloatingPoint):
        integers = form.levels(integers, grid.zero).to(form.kind)
    kind = torch.int8 if isinstance(form, WholeNumbers) else torch.int16
    below, above = (torch.empty(stack.shape, dtype=kind, device=stack.device) for _ in range(2))
    values, off = torch.empty_like(stack, memory_format=torch.contiguous_format), 0.0
    step = max(1, ROWS_OF // (stack.shape[0] * stack.shape[2]))
    for start in range(0, stack.shape[1], step):
        rows = slice(start, start + step)
        cells, exact = grid.rows_of(rows), stack[:, rows].double()
        under = cells.below(exact)
        below[:, rows], above[:, rows] = under, cells.above(exact, under)
        became = cells.values(outcome.integers[:, rows])
        values[:, rows] = became
        off += float((became - exact).square().sum())
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    whole, down, up, made = (matrices.join(part).reshape(weight.shape) for part in (integers, below, above, values))
    relative = math.sqrt(off) / size if size > 0 else 0.0
    tensor = QuantizedTensor(
        matrices.name, form, whole, scale, zero.to(torch.int8), block, (down, up), weight.dtype, outcome.cost, relative,
        math.nan, outcome.moments.depth,
    )  # fmt: skip
    return tensor, made
