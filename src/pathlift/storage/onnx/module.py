"""A program of ONNX as a PyTorch module that interprets it, node by node.

Every node is a child module of its name, every weight a parameter or buffer of its name. What only depends on sizes and
constants is computed beside PyTorch (`host`), from the sizes that the inputs have: a program with an open batch stays one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.errors import InputError, Problem, UnsupportedModelError, one_line
from pathlift.storage.onnx.host import evaluate, on_host
from pathlift.storage.onnx.names import Path, tensor_paths
from pathlift.storage.onnx.operators import OPERATORS
from pathlift.storage.onnx.program import STATIC, Array, Declared, Node, NotReadError, Program, array_cast, tensor_of

LARGEST = 1 << 31
"""A value has fewer elements than this."""

ADVICE = "Leave that part out: until= names a node or a value of the file before it."

NO_RULE = "none of what it computes is covered by the theory."

REASONS = {
    "If": "which of its branches is run depends on the values of activations.",
    "Loop": "it runs a part of the program again and again.",
    "Scan": "it runs a part of the program again and again.",
    **dict.fromkeys(("LSTM", "GRU"), "its gates multiply activations."),
    **dict.fromkeys(("ConstantOfShape", "Range", "NonZero"), "the size of its result depends on the values of activations."),
    "NonMaxSuppression": "it selects boxes by their scores.",
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"),
                    "it rounds activations to integers."),
    **dict.fromkeys(("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"),
                    "it draws random numbers."),
}  # fmt: skip
"""Why operators that are not in the table are not read."""


@torch.library.custom_op("pathlift::refused", mutates_args=())
def refused(values: Sequence[Tensor], operator: str, reason: str, advice: str) -> Tensor:
    """Stand in a traced graph for an operator of a file that is not read; never run."""
    del values
    raise UnsupportedModelError((Problem("", operator, "", reason, advice),))


@refused.register_fake
def _(values: Sequence[Tensor], operator: str, reason: str, advice: str) -> Tensor:
    del operator, reason, advice
    return torch.empty(1, device=values[0].device if values else None)


@dataclass(frozen=True)
class Unread:
    """The value of an operator that is not read, or of one behind it.

    Attributes:
        problem: Why.
        stand_in: What stands for it in a traced graph.
    """

    problem: Problem
    stand_in: Tensor | None


Value: TypeAlias = "Tensor | Array | list[Tensor] | Unread | None"
"""What an operator reads or makes: a list is a sequence, None stands where an optional input is left out."""


FEW_BITS = {"int2": np.int8, "int4": np.int8, "uint2": np.uint8, "uint4": np.uint8}
"""Types of whole numbers that PyTorch computes in wider ones."""


class Operator(nn.Module):
    """A node; without one, a module that only holds others.

    Attributes:
        node: Its operator, attributes and results.
    """

    def __init__(self, node: Node | None = None) -> None:
        """Describe the node."""
        super().__init__()
        self.node = node

    def extra_repr(self) -> str:
        """Return the operator and its attributes."""
        node = self.node
        return "" if node is None else ", ".join([node.kind, *(f"{name}={value}" for name, value in node.settings.items())])

    def forward(self, *values: Value) -> tuple[Value, ...]:
        """Compute the results.

        Args:
            *values: The inputs.

        Returns:
            The results, an `Unread` in the place of those that are not read.

        Raises:
            InputError: It cannot be computed from such inputs.
        """
        assert self.node is not None
        kind, count = self.node.kind, len(self.node.outputs)
        folded = on_host(kind, values) or kind in {"Shape", "Size"}
        try:
            if kind not in OPERATORS and not folded:
                return (_unread(kind, values, REASONS.get(kind, NO_RULE)),) * count
            unread = next((value for value in values if isinstance(value, Unread)), None)
            if unread is not None:
                return (unread,) * count
            if kind == "CastLike" and isinstance(values[0], np.ndarray) and isinstance(values[1], Tensor):
                return (array_cast(values[0], values[1].dtype),)  # a number stays one: a limit of Clip
            return tuple(self._folded(values) if folded else self._computed(values))
        except NotReadError as error:
            return (_unread(kind, values, str(error)),) * count
        except InputError as error:
            raise InputError(f"the operator {kind!r} cannot be computed: {error}") from error
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError, ArithmeticError) as error:
            raise InputError(f"the operator {kind!r} cannot be computed: {one_line(error)}") from error

    def _folded(self, values: Sequence[Any]) -> Sequence[Value]:
        """Return results that depend on sizes and constants only."""
        assert self.node is not None
        if not isinstance(values[0], Tensor):
            node = self.node
            return evaluate(node.kind, node.version, node.settings, values, len(node.outputs))
        sizes = list(values[0].shape)
        chosen = math.prod(sizes) if self.node.kind == "Size" else sizes[self.node.get("start", 0) : self.node.get("end")]
        return [np.array(chosen, dtype=np.int64)]

    def _computed(self, values: Sequence[Any]) -> Sequence[Value]:
        """Return results that depend on activations or weights: arrays become tensors, except where numbers are needed."""
        assert self.node is not None
        kind, static = self.node.kind, STATIC.get(self.node.kind, ())
        if any(isinstance(value, Tensor) for index, value in enumerate(values) if index in static):
            raise NotReadError("an input that must be made of constants and sizes, is computed or is a weight.")
        if any(value.dtype.kind not in "biufV" for value in values if isinstance(value, np.ndarray)):
            raise NotReadError("it reads text.")
        tensors = [value for value in values if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else None
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
        inputs = list(values)
        for index, value in enumerate(values):
            if isinstance(value, np.ndarray) and index not in static and (kind, index) != ("Gather", 1):
                few = FEW_BITS.get(value.dtype.name) if kind == "DequantizeLinear" else None
                tensor = tensor_of(value if few is None else value.astype(few))
                inputs[index] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        results = OPERATORS[kind](self.node, *inputs)
        results = results if isinstance(results, tuple) else (results,)
        if any(self.node.outputs[len(results) :]):
            raise NotReadError(f"its result {len(results) + 1} is not read, only the first.")
        for made in results:
            for result in made if isinstance(made, list) else [made]:
                if result.numel() >= LARGEST:
                    raise InputError(f"it would make a value of shape {tuple(result.shape)}.")
        return results


def _unread(kind: str, values: Sequence[Value], reason: str) -> Unread:
    problem = Problem("", f"onnx.{kind}", "", reason, ADVICE)
    tensors = [value for value in values if isinstance(value, Tensor)]
    return Unread(problem, refused(tensors, problem.op, reason, ADVICE) if torch.compiler.is_exporting() else None)


class OnnxModule(Operator):
    """A program of ONNX.

    Attributes:
        program: What it runs.
        inputs: What it takes.
        nodes: Names of nodes in the file to the values that they make.
        samples: The only number of samples that it runs with; None where it runs with any.
        held: Type of its first weight in the file.
        onnx_source: The program as the file has it, without the values of weights; empty for a part of it.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Declared],
        nodes: Mapping[str, tuple[str, ...]],
        tensors: Mapping[Path, Tensor | None],
    ) -> None:
        """Say what it runs; its weights are parameters, and tensors for buffers."""
        super().__init__()
        self.program = program
        self.inputs = tuple(inputs)
        self.nodes = dict(nodes)
        self.samples: int | None = None
        self.onnx_source = b""
        for path, tensor in tensors.items():
            holder = _module_at(self, path[:-1])
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(path[-1], tensor)
            else:
                holder.register_buffer(path[-1], tensor)
        for part in program.all():
            for node in part.nodes:
                _module_at(self, node.path).node = node
        floating = (tensor.dtype for tensor in tensors.values() if tensor is not None and tensor.is_floating_point())
        self.held: torch.dtype | None = next(floating, None)

    def extra_repr(self) -> str:
        """Return nothing: its children say all."""
        return ""

    def forward(self, *values: Any) -> Any:
        """Run the program.

        Args:
            *values: Its inputs, batch dimension first.

        Returns:
            Its output, or a tuple of them.

        Raises:
            InputError: There are too few or too many inputs, or they do not fit.
            UnsupportedModelError: Operators of the file are not read; all of them are named.
        """
        if len(values) != len(self.inputs):
            names = ", ".join(declared.name for declared in self.inputs)
            raise InputError(f"the file has {len(self.inputs)} inputs ({names}), found {len(values)}.")
        if self.samples is not None and any(value.shape[:1] != (self.samples,) for value in values):
            raise InputError(f"the file is made for {self.samples} samples at once, and cannot be run with another number.")
        for declared, value in zip(self.inputs, values, strict=True):
            if declared.sizes is not None and value.dim() != len(declared.sizes):
                sizes = ", ".join(map(str, declared.sizes))
                raise InputError(
                    f"the input {declared.name!r} of the file has the sizes ({sizes}), found {tuple(value.shape)}."
                )
        unread: dict[str, Unread] = {}
        given: dict[str, Value] = {declared.name: value for declared, value in zip(self.inputs, values, strict=True)}
        outputs = self._run(self.program, given, unread)
        if unread and not torch.compiler.is_exporting():
            raise UnsupportedModelError(tuple(replace(value.problem, module=path) for path, value in unread.items()))
        each: list[Value] = [part for value in outputs for part in (value if isinstance(value, list) else [value])]
        returned = [tensor_of(value) if isinstance(value, np.ndarray) else value for value in each]
        tensors = [value for value in returned if isinstance(value, Tensor)] + [value.stand_in for value in unread.values()]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def _run(self, program: Program, values: dict[str, Value], unread: dict[str, Unread]) -> list[Value]:
        tensors = {name: getattr(_module_at(self, path[:-1]), path[-1]) for name, path in program.tensors.items()}
        values = {**values, **program.arrays, **tensors}
        for node in program.nodes:
            inputs = [values[name] if name else None for name in node.inputs]
            name = ".".join(node.path)
            try:
                if node.branches and isinstance(inputs[0], np.ndarray):
                    chosen = node.branches["then_branch" if inputs[0].item() else "else_branch"]
                    results: Sequence[Value] = self._run(chosen, values, unread)
                else:
                    made = _module_at(self, node.path)(*inputs)
                    results = (made,) if isinstance(made, Tensor) else made
            except InputError as error:
                raise InputError(str(error) if str(error).startswith("node ") else f"node '{name}': {error}") from error
            for output, result in zip(node.outputs, results, strict=False):
                values[output] = result
                if isinstance(result, Unread) and not any(known is result for known in unread.values()):
                    unread[name] = result
            for name in node.dead:
                values.pop(name, None)
        return [values[name] for name in program.outputs]

    def input_dtype(self, index: int, dtype: torch.dtype) -> torch.dtype:
        """Return the type of an input: the file's; the weights', once they are of another, or where it says integers."""
        declared = self.inputs[index].dtype if index < len(self.inputs) else dtype
        return declared if (declared.is_floating_point and dtype in {self.held, declared}) or self.held is None else dtype

    def ending_at(self, until: str) -> OnnxModule | None:
        """Return the part that ends with a value or what a node makes, with the same parameters; None if neither is there."""
        made = {name for node in self.program.nodes for name in node.outputs if name}
        outputs = (until,) if until in made else tuple(name for name in self.nodes.get(until, ()) if name in made)
        if not outputs:
            return None
        program = self.program.ending_at(outputs)
        return self._running(program, {})

    def _running(self, program: Program, weights: Mapping[str, Tensor]) -> OnnxModule:
        """Return a module for another program of the same inputs, with the same parameters but for weights that are given."""
        tensors: dict[Path, Tensor | None] = {}
        for name, path in (pair for part in program.all() for pair in part.tensors.items()):
            value = weights.get(name)
            held = getattr(_module_at(self, path[:-1]), path[-1]) if value is None else None
            tensors[path] = held if value is None else nn.Parameter(value, requires_grad=value.is_floating_point())
        module = OnnxModule(program, self.inputs, self.nodes, tensors)
        module.samples, module.held = self.samples, self.held
        return module.train(self.training)

    @torch.no_grad()
    def with_weights(self, wanted: Collection[str]) -> OnnxModule:
        """Return the same program with weights under names at which it has values that follow from constants alone.

        So a file whose weights are whole numbers, scales and DequantizeLinear has those of the file that it was made from.

        Args:
            wanted: Names of parameters, as a state-dict has them.

        Returns:
            A program whose new weights are parameters; itself where no such name is among its values.
        """
        program = self.program
        constant = {*program.arrays, *program.tensors}
        for node in program.nodes:
            if not node.branches and constant.issuperset(filter(None, node.inputs)):
                constant.update(filter(None, node.outputs))
        paths = tensor_paths(filter(None, (name for node in program.nodes for name in node.outputs)), RESERVED)
        chosen = {name: path for name, path in paths.items() if name in constant and ".".join(path) in wanted}
        nodes = tuple(node for node in program.nodes if chosen.keys().isdisjoint(node.outputs))
        if not chosen or not {node.path for node in nodes}.isdisjoint(chosen.values()):
            return self
        values = self._run(program.ending_at(chosen), {}, {})
        weights = {name: value for name, value in zip(chosen, values, strict=True) if isinstance(value, Tensor)}
        if len(weights) < len(chosen):  # an operator that is not read
            return self
        whole = Program(nodes, program.outputs, {**program.tensors, **chosen}, program.arrays).ending_at(program.outputs)
        return self._running(whole, weights)


def _module_at(module: Operator, path: Path) -> Operator:
    """Return the module at a path, making those that are not there yet."""
    for part in path:
        if part not in module._modules:
            module.add_module(part, Operator())
        child = module._modules[part]
        assert isinstance(child, Operator)
        module = child
    return module


RESERVED = frozenset(dir(OnnxModule(Program((), (), {}, {}), (), {}, {})))
"""Attributes that modules have anyway."""
