"""Matrix products, by whichever of PyTorch's two libraries multiplies faster.

On x86 processors PyTorch hands `torch.mm` to MKL and convolutions to oneDNN. Both round as float32 does. oneDNN's product is
reached through the operator that `torch.compile` uses for linear layers. It wants both matrices to lie along what is summed:
then it takes 0.45 to 1 of MKL's time (AMD EPYC with AVX-512; on Intel's processors both take the same, to 7 per cent).
Otherwise it turns one of them round, and starts more slowly: twice the time of a small product, 0.8 to 1 of a large one's.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE, ALONG = 1 << 24, 1 << 21
"""Multiplications for each thread from which on a product is worth the start of oneDNN; and of all threads together where both
matrices lie along what is summed, as it wants them."""

LONG = 1 << 19
"""The same for a product of a matrix and a vector, which only reads the matrix."""


def _has_onednn() -> bool:
    """Whether this build of PyTorch has oneDNN's product."""
    try:
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._linear_pointwise)
    except AttributeError:
        return False


ONEDNN = _has_onednn()

DEEP, NARROW = 256, 64
"""Inner size from which on, and columns up to which oneDNN wins although its result has to be turned round."""


def _can(first: Tensor) -> bool:
    """Whether oneDNN can do a product with a matrix."""
    if not ONEDNN or first.dtype != torch.float32 or first.device.type != "cpu" or torch.is_grad_enabled():
        return False
    # under vmap it would be called for one sample after the other, with a warning for the user
    return torch._C._functorch.peek_interpreter_stack() is None


def _gains(first: Tensor, second: Tensor) -> bool:
    """Whether a product is one that oneDNN can do, and does faster."""
    if not _can(first):
        return False
    least = LONG if len(first) == 1 else ALONG if second.T.is_contiguous() else LARGE * torch.get_num_threads()
    return first.numel() * second.shape[1] >= least


def turned_product(first: Tensor, second: Tensor) -> Tensor:
    """Multiply the transpose of a matrix to another one.

    Args:
        first: Shape (inner, rows).
        second: Shape (inner, columns).

    Returns:
        Shape (rows, columns), contiguous.
    """
    if len(first) >= DEEP and second.shape[1] < NARROW and _can(first) and first.numel() * second.shape[1] >= ALONG:
        return _by_onednn(second.T, first).T.contiguous()
    return torch.mm(first.T, second)


def product(first: Tensor, second: Tensor) -> Tensor:
    """Multiply two matrices.

    Args:
        first: Shape (rows, inner).
        second: Shape (inner, columns).

    Returns:
        Their product, shape (rows, columns). Differentiable where gradients are recorded.
    """
    if not _gains(first, second):
        return torch.mm(first, second)
    return _by_onednn(first, second)


def _by_onednn(first: Tensor, second: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(first, second.T, None, "none", [], "")
    return result
