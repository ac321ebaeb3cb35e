"""What the user may give as ``inputs``, turned into example tensors with batch size 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pathlift.errors import InputError

Shape: TypeAlias = Sequence[int]
Inputs: TypeAlias = Tensor | Shape | Sequence[Tensor] | Sequence[Shape]
"""An input shape without the batch dimension, an example tensor with it, or a sequence of either for several inputs."""


def example_tensors(model: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
    """Make one example per input of the model, with batch size 1.

    Args:
        model: Gives the device and dtype of examples made from shapes.
        inputs: See `Inputs`.

    Returns:
        One tensor per input. Its values carry no meaning: only shape, dtype and device are used.

    Raises:
        InputError: A shape is empty, has a size below 1 or is no sequence of integers, or a batch is empty.
    """
    if isinstance(inputs, Tensor):
        return (_first_sample(inputs, 0),)
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Sequence):
        raise InputError(
            f"inputs must be a shape such as (3, 224, 224), an example tensor with a batch dimension, or a tuple of "
            f"either; found {type(inputs).__name__}."
        )
    if not inputs:
        raise InputError("inputs is empty; expected a shape such as (3, 224, 224) or an example tensor.")
    if all(isinstance(item, Tensor) for item in inputs):
        return tuple(_first_sample(item, place) for place, item in enumerate(inputs) if isinstance(item, Tensor))
    if all(isinstance(item, Sequence) for item in inputs):
        return tuple(_from_shape(model, item) for item in inputs if isinstance(item, Sequence))
    return (_from_shape(model, inputs),)


def _first_sample(tensor: Tensor, place: int) -> Tensor:
    if tensor.dim() == 0:
        raise InputError(f"Example input {place} has no batch dimension; expected shape (batch, …), found a scalar.")
    if tensor.numel() == 0:
        raise InputError(f"Example input {place} is empty: shape {tuple(tensor.shape)}. Every size must be at least 1.")
    if not tensor.dtype.is_floating_point:
        raise InputError(f"Example input {place} has dtype {tensor.dtype}; path-liftings need floating-point inputs.")
    return torch.zeros_like(tensor[:1], requires_grad=False)


def _from_shape(model: nn.Module, shape: Sequence[object]) -> Tensor:
    sizes: list[int] = []
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(
                f"Input shape {tuple(shape)} is not valid: every size must be an integer of at least 1, found {size!r}. "
                "Give the shape without the batch dimension."
            )
        sizes.append(size)
    like = next((p for p in (*model.parameters(), *model.buffers()) if p.dtype.is_floating_point), torch.empty(0))
    return torch.zeros((1, *sizes), dtype=like.dtype, device=like.device)
