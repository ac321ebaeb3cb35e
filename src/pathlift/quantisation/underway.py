"""A network on its way: which of its weights are rounded by now, and what took up the means of the changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pathlift.graph.network import Network
from pathlift.quantisation.correction import corrections
from pathlift.quantisation.formats import FloatingPoint, Format, WholeNumbers
from pathlift.quantisation.layer import Covariances, Rounded, Way, rounded
from pathlift.quantisation.matrices import Matrices
from pathlift.quantisation.tensors import QuantizedTensor
from pathlift.statistics import InputMoments

ROWS_OF = 1 << 19
"""Weights of so many rows as are looked at together."""


class Underway:
    """How far a network is rounded, and how it is.

    Attributes:
        network: The network as it was.
        formats: Weight to format.
        way: How to round.
        state: Parameters and buffers by now.
        tensors: Each tensor that is done.
        corrected: What took up the means of the changes.
    """

    def __init__(
        self,
        network: Network,
        matrices: Mapping[str, Matrices],
        formats: Mapping[str, Format],
        way: Way,
        source: torch.Generator | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Begin.

        Args:
            network: The network as it was.
            matrices: How weights are laid out.
            formats: Weight to format.
            way: How to round.
            source: Source of randomness, for stochastic rounding.
            progress: Called after each tensor with its number and that of all.
        """
        self.network, self.formats, self.way = network, formats, way
        self.state: dict[str, Tensor] = dict(network.state)
        self.tensors: dict[str, QuantizedTensor] = {}
        self.corrected: list[str] = []
        self._matrices, self._source, self._progress = matrices, source, progress

    def split(self, name: str) -> Tensor:
        """Return a weight as it was, (groups, rows, columns), float64."""
        return self._matrices[name].split(self.network.state[name].detach()).double()

    def round(self, moments: InputMoments, covariances: Covariances, fitted: Tensor | None = None) -> Rounded:
        """Round a tensor.

        Args:
            moments: What it is multiplied by, and what its errors do.
            covariances: What it is multiplied by.
            fitted: What is rounded in its place, (groups, rows, columns).

        Returns:
            What it became; what follows has taken up nothing so far.
        """
        name = moments.name
        weight, matrices = self.network.state[name], self._matrices[name]
        given = weight if fitted is None else matrices.join(fitted)
        within = None if fitted is None else weight
        outcome = rounded(given, matrices, self.formats[name], self.way, moments, covariances, self._source, within)
        self.tensors[name], self.state[name] = _tensor(matrices, outcome, weight)
        if self._progress is not None:
            self._progress(len(self.tensors), len(self.formats))
        return outcome

    def correct(self, outcome: Rounded) -> None:
        """Let what follows a rounded tensor take up the mean of the change, and how far it scales."""
        self.put(corrections(replace(self.network, state=self.state), outcome))

    def put(self, changed: Mapping[str, Tensor]) -> None:
        """Take biases, running means and running variances that make up for changes."""
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
    values, off, clipped = torch.empty_like(stack, memory_format=torch.contiguous_format), 0.0, 0
    step = max(1, ROWS_OF // (stack.shape[0] * stack.shape[2]))
    for start in range(0, stack.shape[1], step):
        rows = slice(start, start + step)
        cells, exact = grid.rows_of(rows), stack[:, rows].double()
        under = cells.below(exact)
        below[:, rows], above[:, rows] = under, cells.above(exact, under)
        became = cells.values(outcome.integers[:, rows])
        values[:, rows] = became
        off += float((became - exact).square().sum())
        clipped += int(cells.clipped(exact).sum())
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    whole, down, up, made = (matrices.join(part).reshape(weight.shape) for part in (integers, below, above, values))
    relative = math.sqrt(off) / size if size > 0 else 0.0
    tensor = QuantizedTensor(
        matrices.name, form, whole, scale, zero.to(torch.int8), block, (down, up), weight.dtype, outcome.cost, clipped,
        relative, math.nan, outcome.moments.depth,
    )  # fmt: skip
    return tensor, made
