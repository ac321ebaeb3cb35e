"""A program of ONNX back into a file: the same graph, names, metadata and version, with the weights that its module has now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.output import check_outputs, write_outputs
from pathlift.storage.onnx.file import constants
from pathlift.storage.onnx.module import OnnxModule
from pathlift.storage.onnx.trial import compare
from pathlift.storage.packages import package

LARGEST = (1 << 31) - 1
"""Bytes of a file that is one message."""


def save(model: OnnxModule, path: Path, *, replace: bool = False) -> None:
    """Write a model that was read from an ``.onnx`` file, all or nothing.

    The graph, its names, metadata and version are those of the file it was read from; weights in other files come into this
    one. Where onnxruntime is installed, what was written is run there, and must give what the model gives.

    Args:
        model: What `load_model` made of an ``.onnx`` file; its parameters may have other values by now.
        path: Where; the name ends in ``.onnx``.
        replace: Whether a file that exists may be replaced.

    Raises:
        InputError: The file cannot be written, is there already, or gives something else.
    """
    check_outputs({"The file": path}, suffixes=(".onnx",), replace=replace)
    content = program_with(model).SerializeToString()
    if len(content) > LARGEST:
        raise InputError(f"The model takes {len(content):,} bytes, more than one ONNX file holds.")

    def written(partial: Path) -> None:
        partial.write_bytes(content)
        compare(model, partial, always=False)

    write_outputs({path: written}, replace=replace)


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
