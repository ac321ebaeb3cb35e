"""A program of ONNX with other weights: the same graph, names, metadata and version, as `pathlift.save` writes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pathlift.errors import InputError
from pathlift.storage.onnx.file import branches, constants, nodes_of
from pathlift.storage.onnx.module import OnnxModule
from pathlift.storage.onnx.program import array_stored
from pathlift.storage.packages import package


def smaller_source(source: bytes, flattenings: Collection[str], groups: Mapping[str, int]) -> bytes:
    """Return the source of a program (`OnnxModule.onnx_source`) of which channels were cut.

    Args:
        source: The program without the values of its weights.
        flattenings: What is made by a Reshape that becomes a Flatten.
        groups: Number of groups of convolutions, by the name of their result.

    Returns:
        The same without the shapes of values that it tells beside its inputs and outputs.

    Raises:
        InputError: A function of the program holds one of these nodes.
    """
    onnx = package("onnx", "onnx")
    program = onnx.ModelProto.FromString(source)
    missing = {*flattenings, *groups}
    for node in nodes_of(program.graph):
        name = next(iter(node.output), "")
        missing.discard(name)
        if name in flattenings:
            del node.attribute[:], node.input[1:]
            node.op_type = "Flatten"
            node.attribute.append(onnx.helper.make_attribute("axis", 1))
        for attribute in node.attribute:
            if name in groups and attribute.name == "group":
                attribute.i = groups[name]
        for branch in branches(node).values():
            del branch.value_info[:]
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
            array = array_stored(weights.pop(name).detach().cpu(), tensor.data_type)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    sizes = {tensor.name: tensor.dims for tensor in program.graph.initializer}
    for value in program.graph.input:  # where initialisers are listed, too
        for declared, size in zip(value.type.tensor_type.shape.dim, sizes.get(value.name, ()), strict=False):
            declared.dim_value = size
    if weights:
        raise InputError(f"The weight {next(iter(weights))!r} has no place of its own in the graph of the model's file.")
    return program
