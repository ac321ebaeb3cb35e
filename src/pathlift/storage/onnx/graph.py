"""From a program that has been looked at to a module: which of its numbers are weights, and what everything is called.

A tensor of floating-point numbers is a weight, also one that reaches its operator through a Transpose or a Cast, unless it
decides what is computed (a limit of Clip, the factors of Resize). Weights are parameters; statistics of batch normalisation and
single numbers are buffers. All other constants are plain numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from pathlift.errors import InputError
from pathlift.storage.onnx import windows as windows
from pathlift.storage.onnx.file import branches, named, nodes_of, opset_of, stored
from pathlift.storage.onnx.host import Array
from pathlift.storage.onnx.module import Declared, OnnxModule, Program, Step, holder, tensor_of
from pathlift.storage.onnx.names import node_paths, tensor_paths
from pathlift.storage.onnx.operators import DTYPES, STATIC
from pathlift.storage.packages import package

STATISTICS = {"BatchNormalization": (3, 4)}
"""Inputs that are buffers where PyTorch trains a model."""

QUANTIZED = {"DequantizeLinear": (0,)}
"""Inputs that may be weights although they are whole numbers."""

RESERVED = frozenset(dir(OnnxModule(Program((), (), {}, {}), (), {})))
"""Attributes that modules have anyway."""


@dataclass
class _Uses:
    """What the values of a program are used for, by name.

    Attributes:
        static: They decide what is computed.
        statistics: They are statistics of batch normalisation, and nothing else.
        quantized: They are whole numbers that stand for weights.
    """

    static: set[str] = field(default_factory=set)
    statistics: set[str] = field(default_factory=set)
    quantized: set[str] = field(default_factory=set)
    other: set[str] = field(default_factory=set)

    @staticmethod
    def of(nodes: Iterable[Any]) -> _Uses:
        """Look at all nodes, from the last to the first."""
        uses = _Uses()
        for node in reversed(list(nodes)):
            decides = not uses.static.isdisjoint(node.output)
            for place, name in enumerate(node.input):
                if place in STATIC.get(node.op_type, ()) or (decides and node.op_type not in {"Shape", "Size"}):
                    uses.static.add(name)
                elif place in STATISTICS.get(node.op_type, ()):
                    uses.statistics.add(name)
                else:
                    uses.other.add(name)
                if place in QUANTIZED.get(node.op_type, ()):
                    uses.quantized.add(name)
        uses.statistics -= uses.other
        return uses


def build(program: Any) -> OnnxModule:
    """Make the module that computes a program.

    Args:
        program: A ``ModelProto`` that has been looked at.

    Returns:
        The module.

    Raises:
        InputError: It holds numbers that are not read.
    """
    return _Building(program).module()


class _Building:
    """One module in the making."""

    def __init__(self, program: Any) -> None:
        self.onnx = package("onnx", "onnx")
        self.whole = program
        self.graph = program.graph
        self.version = opset_of(program)
        self.nodes = list(nodes_of(self.graph))
        self.uses = _Uses.of(self.nodes)
        self.tensors: dict[int, tuple[str, Tensor]] = {}  # by the id of the TensorProto, or of the Constant's node
        self.arrays: dict[int, Array] = {}
        self.named: set[str] = set()
        self.kept: list[Any] = []  # ids stay theirs while we look

    def module(self) -> OnnxModule:
        self._read_constants(self.graph)
        paths = tensor_paths(dict.fromkeys(name for name, _ in self.tensors.values()), RESERVED)
        steps = [node for node in self.nodes if node.op_type != "Constant"]
        places = node_paths(map(named, steps), paths, RESERVED)
        self.places = {id(node): place for node, place in zip(steps, places, strict=True)}
        self.paths = paths
        inputs = declared_inputs(self.graph)
        whole = self._program(self.graph)
        ended = whole.ending_at(whole.outputs)
        nodes = {named(node): tuple(name for name in node.output if name) for node in self.graph.node}
        module = OnnxModule(ended, inputs, nodes)
        self._add_weights(module, ended)
        self._add_nodes(module, ended)
        held = (*module.parameters(), *module.buffers())
        module.onnx_source = self._source()
        module.held = next((own.dtype for own in held if own.is_floating_point()), None)
        return module

    def _source(self) -> bytes:
        """Return the program without the values of the weights: a module holds those."""
        bare = self.onnx.ModelProto.FromString(self.whole.SerializeToString())
        weights = {name for name, _ in self.tensors.values()}
        for name, tensor in stored(bare.graph):
            if name in weights:
                for part in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
                    tensor.ClearField(part)
        content: bytes = bare.SerializeToString()
        return content

    # ---- constants

    def _read_constants(self, graph: Any) -> None:
        self.kept.extend(graph.initializer)
        for tensor in graph.initializer:
            self._constant(id(tensor), tensor.name, self.onnx.numpy_helper.to_array(tensor), tensor.data_type, named_so=True)
        for node in graph.node:
            if node.op_type == "Constant":
                array, kind = self._value(node)
                self._constant(id(node), node.output[0], array, kind, named_so=False)
            for branch in branches(node):
                self._read_constants(branch)

    def _value(self, node: Any) -> tuple[Array, int]:
        if len(node.attribute) != 1 or len(node.output) != 1:
            raise InputError(f"the constant {named(node)!r} has no value, or several.")
        own, kinds = node.attribute[0], self.onnx.TensorProto
        if own.name == "value":
            return self.onnx.numpy_helper.to_array(own.t), own.t.data_type
        if own.name in {"value_float", "value_floats"}:
            return np.array(own.f if own.name == "value_float" else own.floats, dtype=np.float32), kinds.FLOAT
        if own.name in {"value_int", "value_ints"}:
            return np.array(own.i if own.name == "value_int" else own.ints, dtype=np.int64), kinds.INT64
        raise InputError(f"the constant {named(node)!r} is text or a sparse tensor, which is not read.")

    def _constant(self, key: int, name: str, array: Array, kind: int, *, named_so: bool) -> None:
        floating = kind in DTYPES and DTYPES[kind].is_floating_point
        weight = (floating and name not in self.uses.static and (named_so or array.ndim > 0)) or name in self.uses.quantized
        if weight and kind in DTYPES:
            if name in self.named:
                raise InputError(f"two branches have weights of the name {name!r}, which are not told apart.")
            self.named.add(name)
            self.tensors[key] = name, tensor_of(array)
        else:
            self.arrays[key] = array

    # ---- the programs

    def _program(self, graph: Any) -> Program:
        constants = [(id(own), own.name) for own in graph.initializer]
        constants += [(id(node), node.output[0]) for node in graph.node if node.op_type == "Constant"]
        return Program(
            tuple(self._step(node) for node in graph.node if node.op_type != "Constant"),
            tuple(own.name for own in graph.output),
            {name: self.paths[name] for key, name in constants if key in self.tensors},
            {name: self.arrays[key] for key, name in constants if key in self.arrays},
        )

    def _step(self, node: Any) -> Step:
        inner = (
            {own.name: self._program(own.g) for own in node.attribute if own.HasField("g")} if node.op_type == "If" else None
        )
        if inner is not None and sorted(inner) != ["else_branch", "then_branch"]:
            raise InputError(f"the node {named(node)!r} has no two branches.")
        ended = None if inner is None else {key: own.ending_at(own.outputs) for key, own in inner.items()}
        return Step(self.places[id(node)], tuple(node.input), tuple(node.output), branches=ended)

    # ---- the tree of modules

    def _add_weights(self, module: OnnxModule, program: Program) -> None:
        values = {self.paths[name]: (name, tensor) for name, tensor in self.tensors.values()}
        for path in sorted({path for own in program.all() for path in own.tensors.values()}):
            name, tensor = values[path]
            place = holder(module, path[:-1])
            if tensor.dim() == 0 or name in self.uses.statistics:
                place.register_buffer(path[-1], tensor)
            else:
                place.register_parameter(path[-1], nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))

    def _add_nodes(self, module: OnnxModule, program: Program) -> None:
        nodes = {self.places[id(node)]: node for node in self.nodes if id(node) in self.places}
        for own in program.all():
            for step in own.steps:
                node = nodes[step.path]
                place = holder(module, step.path)
                place.kind, place.version = node.op_type, self.version
                place.settings = {
                    attribute.name: self._setting(attribute) for attribute in node.attribute if not attribute.HasField("g")
                }
                place.wanted = tuple(map(bool, step.outputs))

    def _setting(self, attribute: Any) -> Any:
        value = self.onnx.helper.get_attribute_value(attribute)
        if isinstance(value, self.onnx.TensorProto):
            return self.onnx.numpy_helper.to_array(value)
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, (int, float)):
            return value
        return tuple(value) if isinstance(value, Iterable) else value


def declared_inputs(graph: Any) -> list[Declared]:
    """Return the inputs that a program declares.

    Args:
        graph: Its ``GraphProto``.

    Returns:
        All inputs without a value of their own.

    Raises:
        InputError: One is no tensor of numbers.
    """
    held = {own.name for own in graph.initializer}
    found = []
    for value in graph.input:
        own = value.type.tensor_type
        if value.name in held:
            continue
        if not value.type.HasField("tensor_type") or own.elem_type not in DTYPES:
            raise InputError(f"its input {value.name!r} is no tensor of numbers.")
        sizes = tuple(size.dim_value if size.dim_value > 0 else size.dim_param or "?" for size in own.shape.dim)
        found.append(Declared(value.name, sizes if own.HasField("shape") else None, DTYPES[own.elem_type]))
    return found
