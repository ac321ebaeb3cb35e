"""A program of ONNX as plain data: which nodes it runs, which of its numbers are weights, and what everything is called.

A tensor of floating-point numbers is a weight, also one that reaches its operator through a Transpose or a Cast, unless it
decides what is computed (a limit of Clip, the factors of Resize). Weights are parameters; statistics of batch normalisation and
single numbers are buffers. All other constants are plain numbers: arrays of NumPy's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.errors import InputError
from pathlift.storage.onnx.file import branches, constants, name_of, nodes_of, opset_of
from pathlift.storage.onnx.names import Path, node_paths, tensor_paths
from pathlift.storage.packages import package

Array = np.ndarray[Any, Any]

DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""Types of ``TensorProto`` by their numbers."""

STATISTICS = {"BatchNormalization": (3, 4)}
"""Inputs that are buffers where PyTorch trains a model."""

QUANTIZED = {"DequantizeLinear": (0,)}
"""Inputs that may be weights although they are whole numbers."""

HALVES = {21: "uint8", 22: "int8"}
"""Types of ``TensorProto`` of which two numbers share a byte, to those in which they are kept, a byte each."""

LIMITING = {"QuantizeLinear": (2,)}
"""Inputs whose type says where numbers are cut off: they are not kept in another."""

STATIC: Mapping[str, Sequence[int]] = {
    "Clip": (1, 2), "Col2Im": (1, 2), "CumSum": (1,), "Dropout": (1, 2), "Expand": (1,), "Pad": (1, 2, 3), "Reshape": (1,),
    "Resize": (1, 2, 3), "SequenceAt": (1,), "Slice": (1, 2, 3, 4), "Split": (1,), "SplitToSequence": (1,), "Squeeze": (1,),
    "Tile": (1,), "TopK": (1,), "Trilu": (1,), "Unsqueeze": (1,), "Upsample": (1,), "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
         "ReduceSum", "ReduceSumSquare"), (1,)),
}  # fmt: skip
"""Which inputs are numbers that decide what is computed."""

LIKE_ANOTHER: Mapping[str, Sequence[int]] = {"CastLike": (1,), "EyeLike": (0,)}
"""Inputs of which only the type or the sizes are read."""

VALUES = ("raw_data", "float_data", "int32_data", "int64_data", "double_data")
"""Where a ``TensorProto`` keeps its numbers."""


class NotReadError(Exception):
    """An operator, or a way to use it, that is not read; the text says why."""


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        path: Of its module.
        kind: Its operator.
        version: Of the standard.
        settings: Its attributes; ``keeps_batch`` is ours: the first size of a constant shape is the number of samples.
        inputs: Names of the values that it reads, ``""`` for those left out.
        outputs: Names of those that it makes, ``""`` for those that nothing reads.
        dead: Names of values that no later node reads.
        branches: The two programs of an ``If``, by the name of the attribute.
    """

    path: Path
    kind: str
    version: int
    settings: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...] = ()
    branches: Mapping[str, Program] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.settings.get(name, default)

    def reads(self) -> set[str]:
        """Return the names of all values that it reads, those that its branches read among them."""
        inner = (node.reads() for branch in self.branches.values() for node in branch.nodes)
        returned = (branch.outputs for branch in self.branches.values())
        return set(filter(None, self.inputs)).union(*inner, *returned)


@dataclass(frozen=True)
class Program:
    """A graph.

    Attributes:
        nodes: In the order of execution; only those that its outputs depend on.
        outputs: Names of the values that it returns.
        tensors: Weights: name to the path of a parameter or buffer.
        arrays: Constants that are no weights.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, Path]
    arrays: Mapping[str, Array]

    def all(self) -> Iterator[Program]:
        """Iterate over itself and all branches in it."""
        yield self
        for node in self.nodes:
            for branch in node.branches.values():
                yield from branch.all()

    def ending_at(self, outputs: Iterable[str]) -> Program:
        """Return the program that returns other values, without the nodes that they do not need."""
        outputs = tuple(outputs)
        live, nodes = set(outputs), []
        for node in reversed(self.nodes):
            made = tuple(name if name in live else "" for name in node.outputs)
            if any(made):
                read = node.reads()
                nodes.append(replace(node, outputs=made, dead=tuple(sorted(read - live))))
                live |= read
        tensors = {name: path for name, path in self.tensors.items() if name in live}
        arrays = {name: array for name, array in self.arrays.items() if name in live}
        return Program(tuple(reversed(nodes)), outputs, tensors, arrays)


@dataclass(frozen=True)
class Declared:
    """An input, as the file declares it.

    Attributes:
        name: Its name.
        sizes: Its sizes, names in the place of those left open; None if there is no shape at all.
        dtype: Its type.
    """

    name: str
    sizes: tuple[int | str, ...] | None
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int | None, ...] | None:
        """Its sizes, None in the place of those left open."""
        return None if self.sizes is None else tuple(size if isinstance(size, int) else None for size in self.sizes)


def declared_inputs(graph: Any) -> list[Declared]:
    """Return the inputs that a program declares: all without a value of their own."""
    initialisers = {tensor.name for tensor in graph.initializer}
    inputs = []
    for value in graph.input:
        kind = value.type.tensor_type
        if value.name in initialisers:
            continue
        if not value.type.HasField("tensor_type") or kind.elem_type not in DTYPES:
            raise InputError(f"its input {value.name!r} is no tensor of numbers.")
        sizes = tuple(size.dim_value if size.dim_value > 0 else size.dim_param or "?" for size in kind.shape.dim)
        batch = next((index for index, size in enumerate(sizes) if isinstance(size, str) and "batch" in size.lower()), 0)
        if batch > 0:
            raise InputError(
                f"its input {value.name!r} has the samples of a batch along dimension {batch + 1} ({sizes[batch]!r}), not the "
                "first; export the model with the batch first."
            )
        inputs.append(Declared(value.name, sizes if kind.HasField("shape") else None, DTYPES[kind.elem_type]))
    return inputs


def tensor_of(array: Array) -> Tensor:
    """Return an array as a tensor of the same type, with memory of its own."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError as error:
        raise InputError(f"it holds numbers of type {array.dtype.name!r}, which are not read.") from error


def array_of(tensor: Tensor, dtype: torch.dtype) -> Array:
    """Return a tensor of the CPU as an array of another type, one of `DTYPES`."""
    return array_stored(tensor, next(number for number, known in DTYPES.items() if known == dtype))


def array_stored(tensor: Tensor, number: int) -> Array:
    """Return a tensor of the CPU as an array of a type of ``TensorProto``."""
    values = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # NumPy has no such type, onnx has
    array: Array = values.numpy().astype(package("onnx.helper", "onnx").tensor_dtype_to_np_dtype(number))
    return array


def array_cast(array: Array, dtype: torch.dtype) -> Array:
    """Return an array as one of another type, one of `DTYPES`."""
    number = next(number for number, known in DTYPES.items() if known == dtype)
    cast: Array = array.astype(package("onnx.helper", "onnx").tensor_dtype_to_np_dtype(number))
    return cast


def read_program(proto: Any, reserved: Collection[str]) -> tuple[Program, dict[Path, Tensor]]:
    """Read a program that has been looked at, and its weights by their paths: parameters, and tensors for buffers."""
    onnx = package("onnx", "onnx")
    version = opset_of(proto)
    nodes = list(nodes_of(proto.graph))
    roles = _roles(nodes)

    def to_array(tensor: Any, name: str) -> Array:
        array: Array = onnx.numpy_helper.to_array(tensor)
        apart = tensor.data_type in HALVES and "limit" not in roles.get(name, ())
        return array.astype(HALVES[tensor.data_type]) if apart else array

    held = list(constants(proto.graph))
    protos = {name: tensor for name, tensor, named in held if _is_weight(roles, name, tensor, named)}
    twice = next((name for name, count in Counter(name for name, *_ in held).items() if count > 1 and name in protos), None)
    if twice is not None:
        raise InputError(f"two branches have weights of the name {twice!r}, which are not told apart.")
    paths = tensor_paths(protos, reserved)
    of_nodes = iter(node_paths(map(name_of, filter(_is_step, nodes)), paths.values(), reserved))

    def read(graph: Any) -> Program:
        arrays = {name: to_array(tensor, name) for name, tensor, _ in constants(graph, inner=False) if name not in protos}
        tensors = {name: paths[name] for name, *_ in constants(graph, inner=False) if name in protos}
        steps = tuple(step(node, next(of_nodes)) for node in graph.node if _is_step(node))
        program = Program(steps, tuple(value.name for value in graph.output), tensors, arrays)
        return program.ending_at(program.outputs)

    def step(node: Any, path: Path) -> Node:
        inner = {name: read(branch) for name, branch in branches(node).items()}
        return Node(path, node.op_type, version, _settings(onnx, node), tuple(node.input), tuple(node.output), (), inner)

    program = read(proto.graph)
    weights = {}
    for name, path in (pair for part in program.all() for pair in part.tensors.items()):
        tensor = tensor_of(to_array(protos[name], name))
        buffer = tensor.dim() == 0 or roles.get(name) == {"statistic"}
        weights[path] = tensor if buffer else nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    return program, {path: weights[path] for path in sorted(weights)}


def source_of(proto: Any, weights: Collection[str]) -> bytes:
    """Return a program without the values of weights, whose names are given."""
    bare = type(proto).FromString(proto.SerializeToString())
    for name, tensor, _ in constants(bare.graph):
        for part in VALUES if name in weights else ():
            tensor.ClearField(part)
    content: bytes = bare.SerializeToString()
    return content


def _roles(nodes: Sequence[Any]) -> dict[str, set[str]]:
    """Return what every value is used for: it decides what is computed, is a statistic, quantised, or anything else."""
    roles: dict[str, set[str]] = {}
    for node in reversed(nodes):
        decides = any("static" in roles.get(name, ()) for name in node.output) and node.op_type not in {"Shape", "Size"}
        for index, name in enumerate(node.input):
            role = roles.setdefault(name, set())
            if index in QUANTIZED.get(node.op_type, ()):
                role.add("quantised")
            if index in LIMITING.get(node.op_type, ()):
                role.add("limit")
            if index in STATIC.get(node.op_type, ()) or (decides and index not in LIKE_ANOTHER.get(node.op_type, ())):
                role.add("static")
            else:
                role.add("statistic" if index in STATISTICS.get(node.op_type, ()) else "other")
    return roles


def _is_step(node: Any) -> bool:
    return bool(node.op_type != "Constant")


def _is_weight(roles: Mapping[str, set[str]], name: str, tensor: Any, named: bool) -> bool:
    """Whether a constant is a weight; single numbers are only where they are initialisers."""
    role, dtype = roles.get(name, set()), DTYPES.get(tensor.data_type)
    if tensor.data_type in HALVES and "limit" not in role:
        dtype = torch.int8
    if dtype is None or (dtype.is_floating_point and ("static" in role or not (named or tensor.dims))):
        return False
    return dtype.is_floating_point or "quantised" in role


def _settings(onnx: Any, node: Any) -> dict[str, Any]:
    """Return the attributes of a node as plain values."""
    settings = {}
    for attribute in node.attribute:
        if not (attribute.HasField("g") or attribute.graphs or attribute.tensors):
            value = onnx.helper.get_attribute_value(attribute)
            if isinstance(value, onnx.TensorProto):
                value = onnx.numpy_helper.to_array(value)
            elif isinstance(value, bytes):
                value = value.decode()
            settings[attribute.name] = value if isinstance(value, (int, float, str, np.ndarray)) else tuple(value)
    return settings
