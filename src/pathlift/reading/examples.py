"""What the user may give as ``inputs``, turned into example tensors with batch size 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pathlift.arguments.kinds import one_input
from pathlift.graph.calling import Form, form_of, leaves
from pathlift.storage.onnx import OnnxModule

Shape: TypeAlias = Sequence[int]
Inputs: TypeAlias = "Tensor | Shape | Sequence[Inputs] | Mapping[str, Inputs]"
"""An input shape without the batch dimension, or an example tensor with it; or these as the model takes them: in a tuple of
positional inputs, in a dictionary of keyword inputs, nested like the model's own."""


@dataclass(frozen=True)
class Examples:
    """Example inputs of a model, of batch size 1.

    Attributes:
        tensors: One per input. Their values carry no meaning: only shape, dtype and device are used.
        form: The containers in which the model takes them.
    """

    tensors: tuple[Tensor, ...]
    form: Form

    def run(self, model: nn.Module) -> Any:
        """Call a model with the examples."""
        return self.form.run(model, self.tensors)


def examples_of(model: nn.Module, inputs: Inputs) -> Examples:
    """Make one example per input of the model, with batch size 1.

    Args:
        model: Gives the device and dtype of examples made from shapes.
        inputs: See `Inputs`.

    Returns:
        The examples.
    """
    tensors = tuple(
        _first_sample(item) if isinstance(item, Tensor) else _from_shape(model, item, number)
        for number, item in enumerate(leaves(inputs, one_input))
    )
    return Examples(tensors, form_of(inputs, one_input))


def _first_sample(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor[:1], requires_grad=False)


def _from_shape(model: nn.Module, shape: Sequence[Any], number: int) -> Tensor:
    like = next((p for p in (*model.parameters(), *model.buffers()) if p.dtype.is_floating_point), torch.empty(0))
    dtype = model.input_dtype(number, like.dtype) if isinstance(model, OnnxModule) else like.dtype
    return torch.zeros((1, *shape), dtype=dtype, device=like.device)
