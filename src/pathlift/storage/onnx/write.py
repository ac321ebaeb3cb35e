"""A program of ONNX with other weights: the same graph, names, metadata and version, as `pathlift.save` writes it."""

from __future__ import annotations

from typing import Any

from pathlift.errors import InputError
from pathlift.storage.onnx.file import constants
from pathlift.storage.onnx.module import OnnxModule
from pathlift.storage.onnx.program import DTYPES, array_of
from pathlift.storage.packages import package


def program_with(model: OnnxModule) -> Any:
    """Return the program of a model's file, a ``ModelProto``, with the weights that the model has now."""
    onnx = package("onnx", "onnx")
    program = onnx.ModelProto.FromString(model.onnx_source)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = {name: held[".".join(path)] for part in model.program.all() for name, path in part.tensors.items()}
    for name, tensor, _ in constants(program.graph):
        if name in weights:
            array = array_of(weights.pop(name).detach().cpu(), DTYPES[tensor.data_type])
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    if weights:
        raise InputError(f"The weight {next(iter(weights))!r} has no place of its own in the graph of the model's file.")
    return program
