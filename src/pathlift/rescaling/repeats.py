"""Labels of a layer that repeat themselves: views that are thin where one label holds for all.

A layer of 64 × 112 × 112 neurons mostly has 64 labels. It is kept as a view of shape (1, 64, 112, 112) over 64 numbers: along
dimensions along which it only repeats itself its stride is 0, as `Tensor.expand` makes it. Functions here look at strides
to leave repetitions out; a tensor that has been copied, whose strides say nothing, gives the same labels in more time.

Worked example: labels of shape (2, 3) with rows (5, 5, 5) and (6, 6, 6). As ``tensor([[5], [6]]).expand(2, 3)`` they have
strides (1, 0), and `thinned` gives the (2, 1) numbers back, which broadcast as before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.edges.pattern import Layout


def repeats(x: Tensor, dim: int) -> bool:
    """Whether a tensor is known to repeat itself along a dimension (or has one entry along it)."""
    return x.shape[dim] == 1 or x.stride(dim) == 0


def thinned(x: Tensor) -> Tensor:
    """Return the tensor with size 1 along dimensions along which it is known to repeat itself."""
    for dim in range(x.dim()):
        if x.shape[dim] > 1 and repeats(x, dim):
            x = x.narrow(dim, 0, 1)
    return x


def settled(x: Tensor) -> Tensor:
    """Return the tensor as a view that repeats it along the dimensions of space along which its values are constant."""
    shape = x.shape
    for dim in range(2, x.dim()):
        if not repeats(x, dim):
            first = x.narrow(dim, 0, 1)
            x = first if bool((x == first).all()) else x
    return x.expand(shape)


def one_place(x: Tensor) -> Tensor:
    """Return (groups, channels, places) with one place when all are known to be the same."""
    return x.narrow(2, 0, 1) if x.shape[2] > 1 and repeats(x, 2) else x


def all_places(x: Tensor, layout: Layout) -> Tensor:
    """Undo `one_place`, for a tensor with places last."""
    return x.expand(*x.shape[:-1], layout.shape[2])


def side_by_side(pieces: list[Tensor], dim: int) -> Tensor:
    """Concatenate, leaving out dimensions along which every piece is known to repeat itself.

    Args:
        pieces: The tensors.
        dim: Along which.

    Returns:
        A view of the shape of the concatenation.
    """
    thin = [other for other in range(pieces[0].dim()) if other != dim and all(repeats(piece, other) for piece in pieces)]
    shape = list(pieces[0].shape)
    shape[dim] = sum(piece.shape[dim] for piece in pieces)
    for other in thin:
        pieces = [piece.narrow(other, 0, 1) for piece in pieces]
    return torch.cat(pieces, dim).expand(shape)
