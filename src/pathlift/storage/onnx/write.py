"""A program of ONNX with other weights: the same graph, names, metadata and version, as `pathlift.save` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pathlift.errors import InputError
from pathlift.storage.onnx.file import branches, constants, nodes_of
from pathlift.storage.onnx.module import OnnxModule
from pathlift.storage.onnx.program import DTYPES, Array, array_of
from pathlift.storage.packages import package


def smaller_source(source: bytes, arrays: Mapping[str, Array], groups: Mapping[str, int]) -> bytes:
    """Return the source of a program (`OnnxModule.onnx_source`) of which channels were cut.

    Args:
        source: The program without the values of its weights.
        arrays: Constants by name that have other values now.
        groups: Number of groups of convolutions, by the name of their result.

    Returns:
        The same without the shapes of values that it tells beside its inputs and outputs.

    Raises:
        InputError: A function of the program holds one of these.
    """
    onnx = package("onnx", "onnx")
    program = onnx.ModelProto.FromString(source)
    missing = {*arrays, *groups}
    for tensor in program.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
            missing.discard(tensor.name)
    for node in nodes_of(program.graph):
        name = next(iter(node.output), "")
        if node.op_type == "Constant" and name in arrays:
            node.attribute[0].CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(arrays[name], name)))
        for attribute in node.attribute:
            if name in groups and attribute.name == "group":
                attribute.i = groups[name]
        for branch in branches(node).values():
            del branch.value_info[:]
        missing.discard(name)
    if missing:
        raise InputError(f"{min(missing)!r} has another size now and lies in a function of the file, which others may call.")
    for part in (program.graph, *program.functions):
        del part.value_info[:]
    content: bytes = program.SerializeToString()
    return content


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
    sizes = {tensor.name: tensor.dims for tensor in program.graph.initializer}
    for value in program.graph.input:  # where initialisers are listed, too
        for declared, size in zip(value.type.tensor_type.shape.dim, sizes.get(value.name, ()), strict=False):
            declared.dim_value = size
    if weights:
        raise InputError(f"The weight {next(iter(weights))!r} has no place of its own in the graph of the model's file.")
    return program
