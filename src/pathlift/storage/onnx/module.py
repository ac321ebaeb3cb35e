"""A program of ONNX as a PyTorch module that interprets it, node by node.

Every node is a child module of its name, every weight a parameter or buffer of its name. What only depends on sizes and
constants is computed beside PyTorch (`host`), from the sizes that the inputs have: a program with an open batch stays one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.errors import InputError, Problem, UnsupportedModelError, told
from pathlift.storage.onnx.host import Array, TooLargeError, evaluate, on_host
from pathlift.storage.onnx.names import Path
from pathlift.storage.onnx.operators import ARRAYS, OPERATORS, STATIC, NotReadError

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
    """Stand in a traced graph for an operator of a file that is not read; never run.

    Args:
        values: The tensors that it would have read.
        operator: What is refused.
        reason: Why.
        advice: What to do.

    Raises:
        UnsupportedModelError: Always.
    """
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


Value: TypeAlias = "Tensor | Array | Unread | None"
"""What an operator reads or makes; None where an optional input is left out."""


@dataclass(frozen=True)
class Step:
    """One node.

    Attributes:
        path: Of its module.
        inputs: Names of the values that it reads, ``""`` for those left out.
        outputs: Names of those that it makes, ``""`` for those that nothing reads.
        dead: Names of values that no later step reads.
        branches: The two programs of an ``If``, by the name of the attribute.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...] = ()
    branches: Mapping[str, Program] | None = None


@dataclass(frozen=True)
class Program:
    """A graph.

    Attributes:
        steps: Its nodes, in the order of execution; only those that its outputs depend on.
        outputs: Names of the values that it returns.
        tensors: Weights: name to the path of a parameter or buffer.
        arrays: Constants that are no weights.
    """

    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, Path]
    arrays: Mapping[str, Array]

    def all(self) -> Iterator[Program]:
        """Iterate over itself and all branches in it."""
        yield self
        for step in self.steps:
            for branch in (step.branches or {}).values():
                yield from branch.all()

    def reads(self) -> set[str]:
        """Return the names of all values that its steps read or that it returns."""
        inner = (branch.reads() for step in self.steps for branch in (step.branches or {}).values())
        return {name for step in self.steps for name in step.inputs if name}.union(self.outputs, *inner)

    def ending_at(self, outputs: Sequence[str]) -> Program:
        """Return the program that ends with other values.

        Args:
            outputs: Their names.

        Returns:
            The program, without the nodes that they do not need.
        """
        live, steps = set(outputs), []
        for step in reversed(self.steps):
            made = tuple(name if name in live else "" for name in step.outputs)
            if not any(made):
                continue
            read = {name for name in step.inputs if name}.union(*(own.reads() for own in (step.branches or {}).values()))
            steps.append(replace(step, outputs=made, dead=tuple(sorted(read - live))))
            live |= read
        return replace(
            self,
            steps=tuple(reversed(steps)),
            outputs=tuple(outputs),
            tensors={name: path for name, path in self.tensors.items() if name in live},
            arrays={name: own for name, own in self.arrays.items() if name in live},
        )


class Operator(nn.Module):
    """A node: an operator with its attributes; without one, a module that only holds others.

    Attributes:
        kind: Name of the operator in the standard.
        version: Version of the standard.
        settings: The node's attributes.
        wanted: Which of its results are read.
        keeps_batch: Whether the first size of a constant shape is the number of samples.
    """

    def __init__(
        self, kind: str = "", version: int = 0, settings: Mapping[str, Any] | None = None, wanted: Sequence[bool] = ()
    ) -> None:
        """Describe the node."""
        super().__init__()
        self.kind = kind
        self.version = version
        self.settings = dict(settings or {})
        self.wanted = tuple(wanted)
        self.keeps_batch = False

    def extra_repr(self) -> str:
        """Return the operator and its attributes."""
        return ", ".join([self.kind, *(f"{key}={value}" for key, value in self.settings.items())])

    def forward(self, *values: Value) -> tuple[Value, ...]:
        """Compute the results.

        Args:
            *values: The inputs.

        Returns:
            The results, an `Unread` in the place of those that are not read.

        Raises:
            InputError: It cannot be computed from such inputs.
        """
        if self.kind not in OPERATORS and not self._on_host(values):
            return (self._unread(values, REASONS.get(self.kind, NO_RULE)),) * len(self.wanted)
        unread = next((own for own in values if isinstance(own, Unread)), None)
        if unread is not None:
            return (unread,) * len(self.wanted)
        try:
            return self._computed(values)
        except NotReadError as error:  # a way to use the operator
            return (self._unread(values, str(error)),) * len(self.wanted)
        except InputError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError, ArithmeticError) as error:
            raise InputError(f"the operator {self.kind!r} cannot be computed: {told(error)}") from error

    def _on_host(self, values: Sequence[Value]) -> bool:
        return self.kind in {"Shape", "Size"} or on_host(self.kind, values)

    def _computed(self, values: Sequence[Value]) -> tuple[Value, ...]:
        if self.kind in {"Shape", "Size"} and isinstance(values[0], Tensor):
            return (self._sizes(values[0]),)
        if self._on_host(values):
            try:
                return tuple(evaluate(self.kind, self.version, self.settings, values, len(self.wanted)))  # type: ignore[arg-type]
            except TooLargeError as error:
                raise InputError(f"the operator {self.kind!r} is not computed: {error}") from error
        found = OPERATORS[self.kind](self, *self._arguments(values))
        made = found if isinstance(found, tuple) else (found,)
        if any(self.wanted[len(made) :]):
            raise NotReadError(f"its result {len(made) + 1} is not read, only the first.")
        for own in made:
            if isinstance(own, Tensor) and own.numel() >= LARGEST:
                raise InputError(f"the operator {self.kind!r} would make a value of shape {tuple(own.shape)}.")
        return made

    def _sizes(self, value: Tensor) -> Array:
        sizes = list(value.shape)
        if self.kind == "Size":
            return np.array(math.prod(sizes), dtype=np.int64)
        return np.array(sizes[self.settings.get("start", 0) : self.settings.get("end")], dtype=np.int64)

    def _arguments(self, values: Sequence[Value]) -> list[Any]:
        """Return the inputs as an operator takes them: numbers where it needs numbers, tensors elsewhere."""
        known = [own for own in values if isinstance(own, Tensor)]
        floating = next((own for own in known if own.is_floating_point()), None)
        static, kept = STATIC.get(self.kind, ()), ARRAYS.get(self.kind, ())
        found: list[Any] = []
        for place, own in enumerate(values):
            if place in static and isinstance(own, Tensor):
                raise NotReadError(
                    f"its input {place + 1}, which must be made of constants and sizes, is computed or is a weight."
                )
            if place not in (*static, *kept) and isinstance(own, np.ndarray):
                tensor = tensor_of(own)
                like = floating if floating is not None and tensor.is_floating_point() else None
                device = known[0].device if known else None
                found.append(tensor.to(device=device, dtype=None if like is None else like.dtype))
            else:
                found.append(own)
        return found

    def _unread(self, values: Sequence[Value], reason: str) -> Unread:
        problem = Problem("", f"onnx.{self.kind}", "", reason, ADVICE)
        tensors = [own for own in values if isinstance(own, Tensor)]
        exporting = torch.compiler.is_exporting()
        return Unread(problem, refused(tensors, problem.op, reason, ADVICE) if exporting else None)


def tensor_of(array: Array) -> Tensor:
    """Return an array as a tensor with memory of its own.

    Args:
        array: Numbers or truth values.

    Returns:
        A tensor of the same type.

    Raises:
        InputError: PyTorch has no such type.
    """
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError as error:
        raise InputError(f"it holds numbers of type {array.dtype.name!r}, which are not read.") from error


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

    def __init__(self, program: Program, inputs: Sequence[Declared], nodes: Mapping[str, tuple[str, ...]]) -> None:
        """Say what it runs; its children are added by whoever makes it."""
        super().__init__()
        self.program = program
        self.inputs = tuple(inputs)
        self.nodes = dict(nodes)
        self.samples: int | None = None
        self.held: torch.dtype | None = None
        self.onnx_source = b""

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
            names = ", ".join(own.name for own in self.inputs)
            raise InputError(f"the file has {len(self.inputs)} inputs ({names}), found {len(values)}.")
        if self.samples is not None and any(value.shape[:1] != (self.samples,) for value in values):
            raise InputError(f"the file is made for {self.samples} samples at once, and cannot be run with another number.")
        unread: dict[str, Unread] = {}
        given: dict[str, Value] = {own.name: value for own, value in zip(self.inputs, values, strict=True)}
        returned = [self._returned(own) for own in self._run(self.program, given, unread)]
        if unread and not torch.compiler.is_exporting():
            problems = (replace(own.problem, module=path) for path, own in unread.items())
            raise UnsupportedModelError(tuple(problems))
        made = [own for own in returned if own is not None] + [own.stand_in for own in unread.values()]
        return made[0] if len(made) == 1 else tuple(made)

    def _run(self, program: Program, values: dict[str, Value], unread: dict[str, Unread]) -> list[Value]:
        values = {**values, **program.arrays, **{name: self._held(path) for name, path in program.tensors.items()}}
        for step in program.steps:
            inputs = [values[name] if name else None for name in step.inputs]
            module: Any = self
            for part in step.path:
                module = getattr(module, part)
            try:
                if step.branches is not None and isinstance(inputs[0], np.ndarray):
                    chosen = step.branches["then_branch" if inputs[0].item() else "else_branch"]
                    made: Sequence[Value] = self._run(chosen, values, unread)
                else:
                    made = module(*inputs)
            except InputError as error:
                name = ".".join(step.path)
                raise InputError(str(error) if str(error).startswith("node ") else f"node '{name}': {error}") from error
            for name, own in zip(step.outputs, made, strict=False):
                values[name] = own
                if isinstance(own, Unread) and not any(one is own for one in unread.values()):
                    unread[".".join(step.path)] = own
            for name in step.dead:
                values.pop(name, None)
        return [values[name] for name in program.outputs]

    def _held(self, path: Path) -> Tensor:
        found: Any = self
        for part in path:
            found = getattr(found, part)
        assert isinstance(found, Tensor)
        return found

    @staticmethod
    def _returned(value: Value) -> Tensor | None:
        if isinstance(value, np.ndarray):
            return tensor_of(value)
        return value if isinstance(value, Tensor) else None

    def input_dtype(self, place: int, own: torch.dtype) -> torch.dtype:
        """Return the type that an input has.

        Args:
            place: Which input.
            own: Type of the first weight now.

        Returns:
            That of the file; that of the weights once they have another one than in the file, or where the file says integers.
        """
        declared = self.inputs[place].dtype if place < len(self.inputs) else own
        return declared if (declared.is_floating_point and own in {self.held, declared}) or self.held is None else own

    def ending_at(self, until: str) -> OnnxModule | None:
        """Return the part of the program that ends with a value, or with what a node makes.

        Args:
            until: Name of a value or a node in the file.

        Returns:
            A module with the same parameters; None if the file has neither.
        """
        made = {name for step in self.program.steps for name in step.outputs if name}
        outputs = (until,) if until in made else tuple(name for name in self.nodes.get(until, ()) if name in made)
        if not outputs:
            return None
        part = OnnxModule(self.program.ending_at(outputs), self.inputs, self.nodes)
        part.samples, part.held = self.samples, self.held
        for own in part.program.all():
            for path in own.tensors.values():
                old, new = holder(self, path[:-1]), holder(part, path[:-1])
                kept = new._parameters if path[-1] in old._parameters else new._buffers
                kept[path[-1]] = getattr(old, path[-1])
            for step in own.steps:
                old, new = holder(self, step.path), holder(part, step.path)
                new.kind, new.version, new.settings, new.keeps_batch = old.kind, old.version, old.settings, old.keeps_batch
                new.wanted = tuple(map(bool, step.outputs))
        return part.train(self.training)


def holder(module: Operator, path: Path) -> Operator:
    """Return the module at a path, making those that are not there yet.

    Args:
        module: Where the path begins.
        path: The path.

    Returns:
        The module.
    """
    for part in path:
        if part not in module._modules:
            module.add_module(part, Operator())
        found = module._modules[part]
        assert isinstance(found, Operator)
        module = found
    return module
