"""A weight tensor as the stack of matrices that it is: (groups, rows, columns), a row for each output channel (mathematics §1).

Whatever axis the operator keeps first (a transposed convolution has input channels there), the columns of a row are its input
channels times the taps of the kernel, and `pathlift.graph.axes` knows where they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.graph.axes import Piece, channel_axes
from pathlift.graph.network import Network
from pathlift.pruning.scope import prunable, refuse_derived
from pathlift.quantisation.grids import Grid


@dataclass(frozen=True, eq=False)
class Matrices:
    """How one parameter is laid out.

    Attributes:
        name: The parameter.
        piece: Where its elements stand.
    """

    name: str
    piece: Piece

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, rows, columns."""
        groups, rows, ins, taps = self.piece.layout.shape
        return groups, rows, ins * taps

    @property
    def taps(self) -> int:
        """Columns of one input channel."""
        return self.piece.layout.shape[3]

    def split(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as (groups, rows, columns)."""
        return self.piece.blocks(tensor).reshape(self.shape)

    def join(self, stack: Tensor) -> Tensor:
        """Return (groups, rows, columns) as a tensor of the parameter's shape."""
        return self.piece.layout.join(stack.expand(self.shape).reshape(self.piece.layout.shape)).contiguous()

    def cells(self, grid: Grid) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Return the cells of a grid as blocks of the parameter.

        Args:
            grid: A grid for the stack.

        Returns:
            The sides of a block; and the scales and the zero points, one for each block, in the order of the parameter's axes.
        """
        numbers = torch.arange(grid.scale.numel(), device=grid.scale.device).reshape(grid.scale.shape)
        places = self.join(grid.spread(numbers))
        sides = []
        for dim, size in enumerate(places.shape):
            here, next_one = places.narrow(dim, 0, size - 1), places.narrow(dim, 1, size - 1)
            others = [other for other in range(places.dim()) if other != dim]
            changes = (here != next_one).sum(others) > 0 if others else here != next_one
            sides.append(size // (int(changes.sum()) + 1))
        first = places[tuple(slice(None, None, side) for side in sides)]
        return tuple(sides), grid.scale.reshape(-1)[first], grid.zero.reshape(-1)[first]


def matrices_of(network: Network) -> Mapping[str, Matrices]:
    """Return how the weights of convolutions, linear layers and matrix products are laid out.

    Args:
        network: The network.

    Returns:
        Name to layout, in the model's order; at least one.

    Raises:
        InputError: There is no such weight, one is computed from others, or one has no rows of its own.
    """
    refuse_derived(network)
    names = prunable(network)
    if not names:
        raise InputError("There is nothing to quantise: the model has no convolution or linear layer with a plain weight.")
    laid_out = {}
    for name, axes in channel_axes(network, names).items():
        if axes.conflict or len(axes.pieces) > 1 or any(piece.indices is not None for piece in axes.pieces):
            why = axes.conflict or f"'{name}' is read in parts"
            raise InputError(f"{why}: a grid of each output channel has no meaning for it. Use a copy for each use.")
        if axes.pieces:
            laid_out[name] = Matrices(name, axes.pieces[0])
    if not laid_out:
        raise InputError("There is nothing to quantise: no path runs through any weight of the model.")
    return laid_out


def sizes_of(names: Sequence[str], matrices: Mapping[str, Matrices]) -> list[int]:
    """Return the number of weights of each tensor."""
    return [math.prod(matrices[name].shape) for name in names]
