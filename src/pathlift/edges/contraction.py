"""Edge maps of matrix products: linear layers, products with a parameter or constant on one side, maps along one axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.edges.base import BLOCK_ELEMENTS, Edges, Weights


class Dense(Edges):
    """out[…, o] = Σ_i x[…, i]·w[o, i]: a linear layer, worked off in cache-sized blocks of rows.

    No copy of the size of the weight is ever made, so a path-norm costs one read of the weights.
    """

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        if w.values[0].numel() <= BLOCK_ELEMENTS or torch.is_grad_enabled():
            return F.linear(x, w.brief())
        out = x.new_empty((*x.shape[:-1], w.shape[0]))
        for part, block in w.rows():
            out[..., part] = F.linear(x, block)
        return out

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        assert w is not None
        flat = x.reshape(-1, x.shape[-1])
        columns = [
            torch.stack([(block * row).amax(1) for row in flat])  # (rows of x, rows of the block)
            for _, block in w.rows()
        ]
        return torch.cat(columns, 1).reshape(*x.shape[:-1], w.shape[0])

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Edges.adjoint`."""
        assert w is not None
        rows, above = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        to_below = torch.zeros_like(rows) if below else None
        to_weight = x.new_empty(w.shape) if share else None
        for part, block in w.rows():
            columns = above[:, part]
            if to_below is not None:
                to_below.addmm_(columns, block)
            if to_weight is not None and len(rows) == 1:
                torch.mul(block, rows, out=to_weight[part])
                to_weight[part].mul_(columns.T)
            elif to_weight is not None:
                torch.mul(block, columns.T @ rows, out=to_weight[part])
        return None if to_below is None else to_below.reshape(x.shape), to_weight


class Contraction(Edges):
    """An einsum of x with a weight: ``equation`` is ``"x-letters,w-letters->out-letters"``."""

    def __init__(self, equation: str) -> None:
        """Describe the map.

        Args:
            equation: Explicit einsum equation without ellipsis; the first operand is x.
        """
        self.equation = equation

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        return torch.einsum(self.equation, x, w.full())

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        assert w is not None
        operands, out = self.equation.split("->")
        first, second = operands.split(",")
        summed = "".join(dict.fromkeys(letter for letter in first + second if letter not in out))
        full = out + summed
        product = _spread(x, first, full) * _spread(w.full(), second, full)
        return product.amax(tuple(range(len(out), len(full)))) if summed else product


def _spread(tensor: Tensor, letters: str, full: str) -> Tensor:
    """Lay a tensor out over all letters of ``full``, with size 1 where it has none."""
    tensor = tensor.permute([letters.index(letter) for letter in full if letter in letters])
    for place, letter in enumerate(full):
        if letter not in letters:
            tensor = tensor.unsqueeze(place)
    return tensor


class AxisMap(Edges):
    """out = w·x along dimension ``dim`` of x, with a constant matrix w (out size × in size): interpolation, adaptive means."""

    def __init__(self, dim: int) -> None:
        """Describe the map.

        Args:
            dim: The dimension of x along which the matrix acts.
        """
        self.dim = dim

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        return F.linear(x.movedim(self.dim, -1), w.full()).movedim(-1, self.dim)

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        assert w is not None
        moved = x.movedim(self.dim, -1)
        rows = [(moved * row).amax(-1) for row in w.full()]
        return torch.stack(rows, -1).movedim(-1, self.dim)
