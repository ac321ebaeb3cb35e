"""A program of ONNX with other weights: the same graph, names, metadata and version, as `pathlift.save` writes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.storage.onnx.file import constants
from pathlift.storage.onnx.module import OnnxModule
from pathlift.storage.packages import package


def program_with(model: OnnxModule) -> Any:
    """Return the program of a model's file, a ``ModelProto``, with the weights that the model has now."""
    onnx = package("onnx", "onnx")
    program = onnx.ModelProto.FromString(model.onnx_source)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = {name: held[".".join(path)] for part in model.program.all() for name, path in part.tensors.items()}
    for name, tensor, _ in constants(program.graph):
        if name in weights:
            _fill(onnx, tensor, weights.pop(name).detach().cpu().contiguous())
    if weights:
        raise InputError(f"The weight {next(iter(weights))!r} has no place of its own in the graph of the model's file.")
    return program


def _fill(onnx: Any, tensor: Any, values: Tensor) -> None:
    """Put values into a stored tensor, in the type that it has."""
    name, kind = tensor.name, tensor.data_type
    array = onnx.numpy_helper.to_array(onnx.TensorProto(data_type=kind, dims=[0]))
    if values.dtype == torch.bfloat16:
        array = values.view(torch.int16).numpy().view(array.dtype)
    else:
        array = values.numpy().astype(array.dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
