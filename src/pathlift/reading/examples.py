"""What the user may give as ``inputs``, turned into example tensors with batch size 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pathlift.arguments.kinds import one_input
from pathlift.errors import InputError
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

    def unlike(self, model: nn.Module) -> str:
        """Say which input is of another type than the weights of a model, and what to do; nothing where none is."""
        kinds = _dtypes(model)
        for number, tensor in enumerate(self.tensors):
            if kinds and tensor.dtype not in kinds:
                name = f"Input {number}" if len(self.tensors) > 1 else "The input"
                return (
                    f"{name} has dtype {_plainly(tensor.dtype)}, the weights have {' and '.join(map(_plainly, kinds))}. "
                    f"Convert the input with .to({kinds[0]}), or the model with .to({tensor.dtype})."
                )
        return ""


def examples_of(model: nn.Module, inputs: Inputs) -> Examples:
    """Make one example per input of the model, with batch size 1.

    Args:
        model: Gives the device and dtype of examples made from shapes.
        inputs: See `Inputs`.

    Returns:
        The examples.

    Raises:
        InputError: A tensor holds no floating-point numbers.
    """
    tensors = tuple(
        _first_sample(model, item) if isinstance(item, Tensor) else _from_shape(model, item, number)
        for number, item in enumerate(leaves(inputs, one_input))
    )
    return Examples(tensors, form_of(inputs, one_input))


def _dtypes(model: nn.Module) -> list[torch.dtype]:
    """Return the floating-point types of parameters and buffers, in their order."""
    return list(dict.fromkeys(p.dtype for p in (*model.parameters(), *model.buffers()) if p.dtype.is_floating_point))


def _plainly(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_sample(model: nn.Module, tensor: Tensor) -> Tensor:
    if not tensor.dtype.is_floating_point:
        kinds = _dtypes(model) or [torch.get_default_dtype()]
        raise InputError(
            f"inputs has dtype {_plainly(tensor.dtype)}; path-liftings need floating-point inputs, {_plainly(kinds[0])} for "
            f"the weights of this model. Convert the input with .to({kinds[0]})."
        )
    return torch.zeros_like(tensor[:1], requires_grad=False)


def _from_shape(model: nn.Module, shape: Sequence[Any], number: int) -> Tensor:
    like = next((p for p in (*model.parameters(), *model.buffers()) if p.dtype.is_floating_point), torch.empty(0))
    dtype = model.input_dtype(number, like.dtype) if isinstance(model, OnnxModule) else like.dtype
    return torch.zeros((1, *shape), dtype=dtype, device=like.device)
