"""A capture is checked, not trusted: the graph, run on random inputs, must reproduce the model's own outputs.

Twice: at the model's own weights and in its own precision, on the first of two samples where the model takes two; and on the
second, at other weights, drawn so that every parameter and buffer shows in the outputs. What was a value and should be a
weight, a branch taken by a coincidence, a merged or cached weight, a sample that sees its neighbours: all of them differ in
one of the two. The model runs on copies of its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from pathlift.errors import InputError, Problem, UnsupportedModelError
from pathlift.graph.expressions import Expression, FunctionCall, StateTensor, evaluate
from pathlift.graph.network import Network
from pathlift.passes.forward import forward
from pathlift.precision import full_precision
from pathlift.reading.examples import Examples
from pathlift.reading.export import Exported
from pathlift.reading.freeze import Cloning, Copier
from pathlift.reading.hooks import HookKey, without
from pathlift.reading.live import plain_attributes
from pathlift.reading.lower import Lowered

SEED = 20250
"""Of the inputs and of the other weights."""

FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What a forward pass raises that does not fit its input."""

HALF = (torch.float16, torch.bfloat16)

PERIOD = 1 << 17
"""Random numbers are drawn for that many weights, and then again the same."""

ROUGH = 100.0
"""Roundings, in units of the model's own type, that a forward pass may make on its own; more is looked into."""

CASTS = ("to", "_to_copy", "type_as")

ADVICE = (
    "Let forward be a fixed sequence of operators on the registered parameters: no comparison of objects, no cached or merged "
    "weights, no values read into Python; or capture the part that is (until=)."
)


NEIGHBOURS = "What it returns for a sample depends on the other samples of the batch (the first dimension of its inputs)."

ROUNDED = (
    "What it returns for a sample alone is another thing than what it returns for it beside a second one (they differ by "
    "{:.2g}): it depends on the other samples, or on nothing but rounding, as a softmax of equal large numbers does."
)


def check(
    model: nn.Module,
    network: Network,
    exported: Exported,
    lowered: Lowered,
    examples: Examples,
    idle: frozenset[HookKey],
) -> frozenset[tuple[str, str]]:
    """Compare a graph with the model that it was read from.

    Args:
        model: The user's model; only read.
        network: What was read.
        exported: The exporter's graph.
        lowered: Where the reading ended, and what it took for parameters.
        examples: Inputs of batch size 1.
        idle: Hooks that only look on.

    Returns:
        Module paths and names of the plain attributes that a forward pass changes.

    Raises:
        InputError: The model cannot run, and its inputs are of another type than its weights.
        UnsupportedModelError: They differ by more than rounding explains; the first layer that differs is named.
    """
    comparison = _Check(model, network, exported, lowered, examples, idle)
    comparison.run()
    return frozenset(comparison.changed)


@dataclass(frozen=True)
class Trial:
    """Weights to run a model with, and what is compared.

    Attributes:
        state: Parameters and buffers by canonical name.
        dtype: Precision of floating-point tensors; None for their own.
        what: Words for messages.
        sample: Which sample of a batch is compared.
    """

    state: Mapping[str, Tensor]
    dtype: torch.dtype | None
    what: str
    sample: int

    @property
    def original(self) -> bool:
        """Whether these are the model's own weights."""
        return self.sample == 0

    def chosen(self, batch: Tensor) -> Tensor:
        """Return the sample that is compared, as a batch of one."""
        return batch[self.sample : self.sample + 1]


class _Check:
    """One comparison."""

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        exported: Exported,
        lowered: Lowered,
        examples: Examples,
        idle: frozenset[HookKey],
    ) -> None:
        self.model = model
        self.idle = idle
        self.network = network
        self.exported = exported
        self.cut = lowered.cut
        self.identified = lowered.identified
        self.examples = examples
        self.changed: set[tuple[str, str]] = set()
        self.draws = torch.Generator().manual_seed(SEED)
        self.inputs = tuple(
            torch.randn((2, *example.shape[1:]), generator=self.draws, dtype=torch.float64) for example in examples.tensors
        )

    def run(self) -> None:
        state = dict(self.network.state)
        with torch.no_grad(), full_precision(), torch.random.fork_rng(devices=[]):
            self._compare(Trial(state, None, "at its own weights", 0))
            other = {
                name: tensor if name in self.network.graph.baked else self._drawn(name, tensor)
                for name, tensor in state.items()
            }
            half = any(tensor.dtype in HALF for tensor in state.values())
            compared = self._compare_in(torch.float32 if half else None, other)
            if not compared:  # signals died or left the range on the way
                self._compare_in(torch.float64, other)

    def _compare_in(self, dtype: torch.dtype | None, state: Mapping[str, Tensor]) -> bool:
        """Compare at other weights, in a precision in which the model may not run."""
        try:
            return self._compare(Trial(state, dtype, "at other weights", 1))
        except _NotInThisPrecision:
            return self._compare(Trial(state, None, "at other weights", 1))

    def _drawn(self, name: str, tensor: Tensor) -> Tensor:
        """Return other values for a parameter or buffer, of a size at which signals neither die nor explode.

        Signs stay where a function may need them: those of buffers and of vectors.
        """
        if not tensor.dtype.is_floating_point or tensor.numel() == 0:
            return tensor
        factors = 0.75 + 0.5 * torch.rand(min(tensor.numel(), PERIOD), generator=self.draws)
        if tensor.dim() >= 2 and name in self.network.parameters:
            signs = torch.randint(2, factors.shape, generator=self.draws) * 2 - 1
            return _tiled(factors * signs * math.sqrt(2 * tensor.shape[0] / tensor.numel()), tensor)
        values = torch.where(torch.isfinite(tensor), tensor, 1.0).double()
        if name in self.network.parameters:
            values = torch.where(values == 0, 0.1, values)
        rms = float(values.square().mean().sqrt())
        unit = 1.0 if rms == 0 or 0.05 <= rms <= 20 else 1 / rms
        return (values * unit * _tiled(factors, values)).to(tensor.dtype)

    # ---- one comparison

    def _compare(self, trial: Trial) -> bool:
        """Compare model and graph; return whether the outputs tell anything at all."""
        together = self._among_others(trial)
        outputs = self._own_outputs(self._alone(trial) if together is None else together, trial)
        run = _Graph(self.network, trial, self._cast(self.inputs, trial))
        for index, (name, output) in enumerate(zip(self.network.outputs, outputs, strict=True)):
            if _relative_difference(output, run.values(name)) <= ROUGH * self._unit(output.dtype, trial):
                continue
            off = _relative_difference(output, run.values(name, fine=True))
            if off > ROUGH * self._unit(output.dtype, trial) * max(1.0, run.amplification(name)):
                alone = outputs if together is None else self._own_outputs(self._alone(trial), trial)
                if _relative_difference(alone[index], run.values(name, fine=True)) < 0.5 * off:
                    raise UnsupportedModelError((Problem("", "check", "", NEIGHBOURS, "Keep the samples of a batch apart."),))
                raise self._differs(trial, run, index, off)
        return any(bool((torch.isfinite(output) & (output != 0)).any()) for output in outputs)

    def _unit(self, dtype: torch.dtype, trial: Trial) -> float:
        """Return the unit of rounding of the coarsest type that the model computes in."""
        return max(torch.finfo(kind).eps for kind in self._types(dtype, trial))

    def _types(self, dtype: torch.dtype, trial: Trial) -> set[torch.dtype]:
        """Return the types that the model computes in."""
        kinds = {dtype, torch.float64} if dtype.is_floating_point else {torch.float64}
        if trial.dtype is None:
            kinds |= {tensor.dtype for tensor in trial.state.values() if tensor.dtype.is_floating_point}
        for node in self.exported.program.graph.nodes:
            value = node.meta.get("val")
            cast = getattr(node.target, "__name__", "").split(".")[0] in CASTS
            if isinstance(value, Tensor) and value.dtype.is_floating_point and (trial.dtype is None or cast):
                kinds.add(value.dtype)
        return kinds

    def _cast(self, inputs: Sequence[Tensor], trial: Trial) -> tuple[Tensor, ...]:
        """Return inputs as the model takes them: of a type that all their numbers exist in."""
        return tuple(
            x.to(example.dtype).to(example.device, trial.dtype or example.dtype)
            for x, example in zip(inputs, self.examples.tensors, strict=True)
        )

    def _alone(self, trial: Trial) -> list[Tensor]:
        """Run the model itself, on copies, on one sample."""
        try:
            return self._eager(trial, 1)
        except FAILURES as error:
            if trial.dtype is not None:
                raise _NotInThisPrecision from error
            if unlike := self.examples.unlike(self.model):
                raise InputError(f"The model cannot run: {str(error).rstrip('.')}. {unlike}") from error
            reason = f"It can be traced, but not run {trial.what}: {error}"
            raise UnsupportedModelError((Problem("", "check", "", reason, ADVICE),)) from error

    def _among_others(self, trial: Trial) -> list[Tensor] | None:
        """Return what it gives for one of two samples; None when it cannot take two, or lays them out in another way."""
        try:
            outputs = self._eager(trial, 2)
        except FAILURES:
            return None
        shapes = self._shapes()
        alike = len(outputs) == len(shapes) and all(
            shape != () and tuple(output.shape) == (2 * shape[0], *shape[1:])
            for output, shape in zip(outputs, shapes, strict=True)
        )
        if not alike:
            return None
        return [output[trial.sample * shape[0] :][: shape[0]] for output, shape in zip(outputs, shapes, strict=True)]

    def _eager(self, trial: Trial, batch: int) -> list[Tensor]:
        inputs = self._cast(self.inputs, trial)
        twin = self._twin(trial)
        before = plain_attributes(twin)
        returned = self.examples.form.run(twin, [(trial.chosen(x) if batch == 1 else x).clone() for x in inputs])
        after = plain_attributes(twin)
        self.changed |= {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        return [leaf.detach() for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]

    def _shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of all tensors that the model returns."""
        return [tuple(node.meta["val"].shape) for node in self._returned()]

    def _returned(self) -> list[fx.Node]:
        return [node for node in self.cut.returned if isinstance(node.meta.get("val"), Tensor)]

    def _twin(self, trial: Trial) -> nn.Module:
        """Return a copy of the model with memory of its own that holds these weights."""
        copier = Copier(Cloning(), training=False)
        twin = without(copier.copy(self.model), self.idle)
        with torch.no_grad():
            named = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))
            for name, tensor in trial.state.items():
                if not trial.original:
                    named[name].copy_(tensor)
        return twin if trial.dtype is None else _in_precision(twin, trial.dtype)

    def _own_outputs(self, outputs: list[Tensor], trial: Trial) -> list[Tensor]:
        """Return the values that the network's outputs stand for."""
        kept = self._returned()
        chosen = [node for node in self.cut.outputs if isinstance(node.meta.get("val"), Tensor)]
        floating = [node for node in chosen if node.meta["val"].dtype.is_floating_point]
        if not self.cut.left_off and all(node in kept for node in floating):
            return [outputs[kept.index(node)] for node in floating]
        try:
            known = _Traced(self.exported, self.identified).values(trial, self._cast(self.inputs, trial))
        except FAILURES as error:
            if trial.dtype is None:
                raise
            raise _NotInThisPrecision from error
        for index, (node, output) in enumerate(zip(kept, outputs, strict=False)):
            off, rough = _relative_difference(output, known[node]), max(1e-3, ROUGH * self._unit(output.dtype, trial))
            if off > rough and _relative_difference(self._alone(trial)[index], known[node]) <= rough:
                advice = "Keep the samples of a batch apart, or capture what stands before the last activation (until=)."
                raise UnsupportedModelError((Problem("", "check", "", ROUNDED.format(off), advice),))
            if off > rough:
                reason = f"What was traced is not the model: they differ by {off:.2g} {trial.what}."
                raise UnsupportedModelError((Problem("", "check", "", reason, ADVICE),))
        if self.cut.left_off:
            logits = _Traced(self.exported, self.identified, self.cut.left_off)
            known = logits.values(trial, self._cast(self.inputs, trial))
        return [known[node] for node in floating]

    # ---- the first layer that differs

    def _differs(self, trial: Trial, run: _Graph, index: int, off: float) -> UnsupportedModelError:
        """Name the first module whose result differs."""
        twin = self._twin(trial)
        seen: dict[str, Tensor] = {}

        def note(path: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, result: Any) -> None:
                if isinstance(result, Tensor):
                    seen.setdefault(path, result.detach().clone())

            return hook

        for path, module in twin.named_modules():
            if path:
                module.register_forward_hook(note(path))
        twin(*(trial.chosen(x) for x in self._cast(self.inputs, trial)))
        graph = run.all()
        last = {layer.origin.module: layer for layer in self.network.layers if layer.origin.module}
        for path, values in seen.items():
            layer = last.get(path)
            if layer is None or tuple(values.shape) != layer.shape:
                continue
            if _relative_difference(values, graph[layer.name]) > max(1e-3, 0.01 * off):
                where, module, op = layer.origin.where, path, layer.origin.op
                break
        else:
            layer = self.network.layer[self.network.outputs[index]]
            where, module, op = layer.origin.where, layer.origin.module, layer.origin.op
        reason = (
            f"What can be read of it is not the model: on random inputs, {trial.what}, they differ by {off:.2g} relative, "
            "and this is the first layer that does."
        )
        return UnsupportedModelError((Problem(module, op, where, reason, ADVICE),))


class _Graph:
    """The graph, run on inputs with weights, in the precision of the passes and, when asked for, in both."""

    def __init__(self, network: Network, trial: Trial, inputs: Sequence[Tensor]) -> None:
        self.network = network
        self.state = trial.state
        names = [layer.name for layer in network.layers if layer.kind == "input"]
        self.feed = {name: trial.chosen(x).to(network.device).unsqueeze(1) for name, x in zip(names, inputs, strict=True)}
        self.dtype = torch.float64 if torch.float64 in (trial.dtype, network.dtype) else torch.float32
        self.known: dict[torch.dtype, Mapping[str, Tensor]] = {}

    def _run(self, dtype: torch.dtype, state: Mapping[str, Tensor] | None = None, *, keep: bool = False) -> dict[str, Tensor]:
        state = self.state if state is None else state
        if dtype == torch.float64:
            state = {name: tensor.double() if tensor.dtype.is_floating_point else tensor for name, tensor in state.items()}
        values = forward(self.network, self.network.values(state), self.feed, dtype, keep=keep)
        return {name: tensor[0] for name, tensor in values.items()}

    def values(self, name: str, *, fine: bool = False, coarse: bool = False) -> Tensor:
        """Return the values of a node."""
        dtype = torch.float64 if fine else torch.float32 if coarse else self.dtype
        if dtype not in self.known:
            self.known[dtype] = self._run(dtype)
        return self.known[dtype][name]

    def amplification(self, name: str) -> float:
        """Return by how much roundings grow on the way to a node, as float32 shows, or weights off by one of its units."""
        fine, coarse = self.values(name, fine=True), self.values(name, coarse=True)
        if bool((torch.isfinite(fine) & ~torch.isfinite(coarse)).any()):
            coarse = self._shaken[name]
        return _relative_difference(coarse, fine) / torch.finfo(torch.float32).eps

    @cached_property
    def _shaken(self) -> dict[str, Tensor]:
        """The values in float64 with weights that are off by a unit of float32, for what leaves the range of float32."""
        unit = torch.finfo(torch.float32).eps * torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        shaken = {
            name: tensor.double() * (1.0 + _tiled(unit, tensor.double())) if tensor.dtype.is_floating_point else tensor
            for name, tensor in self.state.items()
        }
        return self._run(torch.float64, shaken)

    def all(self) -> dict[str, Tensor]:
        """Return the values of all nodes in float64."""
        return self._run(torch.float64, keep=True)


def _tiled(pattern: Tensor, like: Tensor) -> Tensor:
    """Repeat a vector until it fills a tensor."""
    made = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    count = made.numel()
    pattern = pattern.to(made)
    filled = count - count % len(pattern)
    flat = made.reshape(-1)
    flat[:filled].view(-1, len(pattern)).copy_(pattern)
    flat[filled:].copy_(pattern[: count - filled])
    return made


class _NotInThisPrecision(Exception):  # noqa: N818 (a signal)
    """The model does not run in float64."""


class _Traced(fx.Interpreter):
    """Runs the exporter's own graph, with or without the activations at its end, and keeps the values on the way."""

    def __init__(
        self, exported: Exported, identified: Mapping[str, Expression], left_off: frozenset[fx.Node] = frozenset()
    ) -> None:
        super().__init__(exported.program.graph_module, garbage_collect_values=False)
        self.exported = exported
        self.identified = identified
        self.left_off = left_off

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of a node; of an activation that is left off, what it is a function of."""
        if n not in self.left_off:
            return super().run_node(n)
        logits = self.fetch_args_kwargs_from_env(n)[0][0]
        return (logits, None) if isinstance(n.meta.get("val"), (tuple, list)) else logits

    def values(self, trial: Trial, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
        """Return the value of every node."""
        self.trial = trial
        given = iter(inputs)
        specs = self.exported.program.graph_signature.input_specs
        self.run(
            *(
                trial.chosen(next(given)).clone() if spec.kind == InputKind.USER_INPUT else self._held(str(spec.target))
                for spec in specs
            )
        )
        return self.env

    def _held(self, name: str) -> Any:
        """Return a parameter, buffer or constant: with the other weights where it lies in their memory."""
        program, known = self.exported.program, self.identified.get(name)
        value = program.constants.get(name) if known is None else evaluate(known, self.trial.state)
        dtype = self.trial.dtype
        if known is not None and dtype is None and isinstance(value, Tensor):  # `evaluate` widens half precision
            return value.to(self.trial.state[_root(known)].dtype)
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype.is_floating_point and dtype is not None else value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return an attribute of the traced module."""
        return self._held(str(target)) if str(target) in self.identified else super().get_attr(target, args, kwargs)


def _root(expression: Expression) -> str:
    """Return the name of the tensor that an expression is a part of."""
    while isinstance(expression, FunctionCall):
        expression = expression.args[0]
    assert isinstance(expression, StateTensor)
    return expression.name


def _in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a model with all floating-point tensors in another type, also those in lists and attributes."""

    def convert(tensor: Tensor) -> Tensor:
        made = tensor.detach().to(dtype) if tensor.dtype.is_floating_point else tensor.detach()
        return (
            nn.Parameter(made, requires_grad=False)
            if isinstance(tensor, nn.Parameter) and made.dtype.is_floating_point
            else made
        )

    twin: nn.Module = Copier(convert).copy(model)
    return twin


def _relative_difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference, relative to the largest entry; entries that are not finite in one are left out."""
    first, second = first.detach().double().cpu(), second.detach().double().cpu()
    if first.shape != second.shape:
        return math.inf
    finite = torch.isfinite(first) & torch.isfinite(second)
    if not bool(finite.any()):
        return 0.0
    first, second = first[finite], second[finite]
    size = float(torch.maximum(first.abs(), second.abs()).max())
    return float((first - second).abs().max()) / size if size else 0.0
