"""From a small PyTorch model to an explicit `Dag`, by probing the operators themselves.

No operator's wiring is written down here. A model is exported, and its operators are gone through in order; each becomes
neurons of its own. Those of an affine operator are found by feeding it unit vectors (`affine`), the antecedents of a maximum
by raising one element at a time, the slopes of an activation by asking it at ±1 (`nonlinear`). Only the names of the
non-linear operators are listed: an operator of any other name is taken for affine, and must then reproduce its own values.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_leaves

from pathlift.reference import nonlinear
from pathlift.reference.affine import affine
from pathlift.reference.calls import NONE, Labelled, OperatorCall, ProbeError, added
from pathlift.reference.constants import computed
from pathlift.reference.dag import Bias, Dag, Label, Neuron
from pathlift.reference.recurrent import UNROLLED


def in_eval_mode(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model in eval mode; weights that a hook computes before each call are copied as they are.

    Args:
        model: The model; not changed.

    Returns:
        The copy.
    """
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    copied = copy.deepcopy(model, {id(value): value.detach().clone() for value in held})
    for module in copied.modules():
        module.training = False
    return copied


def dag_of(model: nn.Module, *examples: Tensor, copied: Callable[[nn.Module], nn.Module] = in_eval_mode) -> Dag:
    """Build the explicit graph of a small model.

    Args:
        model: The model; not changed.
        examples: Example inputs with batch size 1.
        copied: Makes a copy in eval mode.

    Returns:
        The graph, with float64 weights. Input neurons come first, in the order of the inputs' elements.

    Raises:
        ProbeError: An operator is not affine where it should be.
    """
    return Probe(model, *examples, copied=copied).dag()


class Probe:
    """A small model, exported once; `dag` writes it out for its own weights or any others."""

    def __init__(self, model: nn.Module, *examples: Tensor, copied: Callable[[nn.Module], nn.Module] = in_eval_mode) -> None:
        """Export a copy of the model in float64.

        Args:
            model: The model; not changed.
            examples: Example inputs with batch size 1.
            copied: Makes a copy in eval mode.
        """
        twin = copied(model).double()
        with torch.no_grad():
            program = torch.export.export(twin, tuple(example.double() for example in examples), strict=False)
            recurrent = any(node.target in UNROLLED for node in program.graph.nodes)
            if recurrent or any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions(dict(UNROLLED))
        self._program = program
        self._names = _first_names(twin)

    @torch.no_grad()
    def dag(self, state: Mapping[str, Tensor] | None = None) -> Dag:
        """Write the network out neuron by neuron.

        Args:
            state: Parameters and buffers to use in place of the model's own.

        Returns:
            The graph.
        """
        given = {name: tensor.double() for name, tensor in (state or {}).items() if tensor.dtype.is_floating_point}
        tensors = {**self._program.state_dict, **self._program.constants, **given}
        signature = self._program.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
        neurons: list[Neuron] = []
        values: dict[str, Any] = {}
        for node in self._program.graph.nodes:
            if node.op == "placeholder" and specs[node.name].kind == InputKind.USER_INPUT:
                values[node.name] = added(neurons, node.name, node.meta["val"].shape, lambda name, _: Neuron(name, "input"))
            elif node.op == "placeholder":
                spec = specs[node.name]
                values[node.name] = self._labelled(str(spec.target), tensors, parameter=spec.kind == InputKind.PARAMETER)
            elif node.op == "call_function" and node.meta.get("val") is not None:  # else an assertion of the exporter
                args = fx.node.map_arg(node.args, lambda argument: values[argument.name])
                kwargs = fx.node.map_arg(node.kwargs, lambda argument: values[argument.name])
                values[node.name] = _written_out(neurons, node, args, kwargs)
        returned = [spec.arg.name for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
        outputs = [number for name in returned for number in _output(neurons, values[name])]
        return Dag(tuple(neurons), tuple(outputs))

    def _labelled(self, target: str, tensors: Mapping[str, Any], *, parameter: bool) -> Labelled:
        value = tensors[target]
        return Labelled(value, [(self._names[target], i) for i in range(value.numel())] if parameter else None)


def _output(neurons: list[Neuron], value: Tensor | Labelled) -> list[int]:
    """Return the numbers of the neurons of an output; those of a constant are made, with its elements as their biases."""
    if isinstance(value, Labelled):
        entries: list[tuple[float, Label]] = value.entries()
        shape = torch.Size([len(entries)])
        value = added(neurons, "output", shape, lambda name, i: Neuron(name, "identity", biases=(Bias(*entries[i]),)))
    if bool((value == NONE).any()):
        raise ProbeError("the output contains −inf.")
    return [int(number) for number in value.reshape(-1)]


def _written_out(neurons: list[Neuron], node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Return the numbers of the neurons that a node computes, or its value where it reads no activation."""
    name = getattr(node.target, "__name__", "").split(".")[0]
    if node.target is operator.getitem:
        several, index = args
        return Labelled(several.value[index]) if isinstance(several, Labelled) else several[index]
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
        return computed(node, name, args, kwargs)
    assert callable(node.target)
    if name == "aminmax":
        return nonlinear.extrema(neurons, node.name, args[0], kwargs.get("dim"), kwargs.get("keepdim", False))
    if name == "hardsigmoid":
        return nonlinear.hardsigmoid(neurons, node.name, args[0])
    if name == "prelu":
        return nonlinear.prelu(neurons, node.name, args[0], args[1])
    if name == "div" and isinstance(args[1], Labelled):  # by a parameter θ: the weight is 1/θ
        inverse = Labelled(1.0 / torch.as_tensor(args[1].value, dtype=torch.float64), args[1].labels)
        return affine(neurons, node.name, OperatorCall(torch.ops.aten.mul.Tensor, (args[0], inverse), {}))
    call = OperatorCall(node.target, args, kwargs)
    if name in nonlinear.SLOPES:
        return nonlinear.slopes(neurons, node.name, call)
    if name in nonlinear.CLAMPS:
        return nonlinear.clamp(neurons, node.name, call)
    if name in nonlinear.LARGEST or name in nonlinear.SMALLEST:
        return nonlinear.extremum(neurons, node.name, call, smallest=name in nonlinear.SMALLEST)
    if name == "batch_norm":
        return nonlinear.batch_norm(neurons, node.name, call)
    if name == "_native_batch_norm_legit_no_training":
        return (nonlinear.batch_norm(neurons, node.name, call),)
    return affine(neurons, node.name, call)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return the name that each parameter goes by: a shared one by its first."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
