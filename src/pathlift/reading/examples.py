"""What the user may give as ``inputs``, turned into example tensors with batch size 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pathlift.storage.onnx import OnnxModule

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

    """
    if isinstance(inputs, Tensor):
        return (_first_sample(inputs),)
    if all(isinstance(item, Tensor) for item in inputs):
        return tuple(_first_sample(item) for item in inputs if isinstance(item, Tensor))
    if all(isinstance(item, Sequence) for item in inputs):
        return tuple(_from_shape(model, item, place) for place, item in enumerate(inputs) if isinstance(item, Sequence))
    return (_from_shape(model, inputs, 0),)


def _first_sample(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor[:1], requires_grad=False)


def _from_shape(model: nn.Module, shape: Sequence[Any], place: int) -> Tensor:
    like = next((p for p in (*model.parameters(), *model.buffers()) if p.dtype.is_floating_point), torch.empty(0))
    dtype = model.input_dtype(place, like.dtype) if isinstance(model, OnnxModule) else like.dtype
    return torch.zeros((1, *shape), dtype=dtype, device=like.device)
