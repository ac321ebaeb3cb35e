"""From an exported graph of ATen operators to a `Network`, by the rules.

Nodes that depend on the input become layers of neurons through their operator's rule. Nodes that depend on parameters
and constants only become expressions, evaluated once per parameter vector. All refusals of a graph are collected.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from pathlift.edges import Identity
from pathlift.errors import InputError, Problem, nearest
from pathlift.graph.expressions import Constant, Expression, FunctionCall, StateTensor, evaluate
from pathlift.graph.layers import Connection, Layer, Origin, WeightTensor
from pathlift.graph.network import Graph, Network
from pathlift.reading.export import Exported
from pathlift.reading.freeze import Copier
from pathlift.reading.live import LiveState
from pathlift.reading.memory import Memory, span
from pathlift.rules import (
    MOVEMENTS,
    READS_WALLS,
    REASONS,
    RULES,
    Activation,
    Call,
    Draft,
    Forbidden,
    Refusal,
    Static,
    Walled,
    problem,
)
from pathlift.rules.replay import Operator
from pathlift.storage import onnx

SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like", "new_empty"}
LIKE_ANOTHER = {"type_as", "to", "expand_as", "view_as", "reshape_as"}
"""What brings a constant to the type or shape of an activation."""

SCALINGS = {"neg", "mul", "div"}
IGNORED = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
}
UNKNOWN_ADVICE = "If it is affine, piecewise linear or data movement, please report it: docs/support.md lists what is covered."


REFUSED = torch.ops.pathlift.refused.default
"""What stands in a graph for an operator of a file that is not read."""

INTERPRETER = str(Path(onnx.__file__).parent)
"""Where operators of ONNX files are run: no place to look for them."""

LAST = {
    "softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "tanh", "log_sigmoid", "logsigmoid",
    "log_sigmoid_forward",
}  # fmt: skip
"""Increasing functions of the logits, or of each, that a model may end with: they are left off."""

STAYING = {
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "alias", "detach",
    "to", "_to_copy", "type_as", "dropout",
}  # fmt: skip
"""What may still follow them."""


@dataclass(frozen=True)
class Cut:
    """Where the reading of a graph ends.

    Attributes:
        returned: What the model returns, all of it.
        outputs: The graph's nodes that are taken for the model's outputs.
        left_off: Nodes at the end that are left off: each stands for its argument.
    """

    returned: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    left_off: frozenset[fx.Node]


@dataclass(frozen=True)
class Lowered:
    """The outcome of lowering: a network, or the problems that prevent one.

    Attributes:
        network: The network.
        problems: What prevents one.
        operators: Number of operator calls that were looked at.
        cut: Where the reading ended.
        identified: Names of the exporter's inputs and attributes that are parameters or buffers, or parts of them.
    """

    network: Network | None
    problems: tuple[Problem, ...]
    operators: int
    cut: Cut
    identified: Mapping[str, Expression]


def lower(
    exported: Exported,
    copier: Copier,
    model: nn.Module,
    examples: tuple[Tensor, ...],
    until: str | None = None,
) -> Lowered:
    """Apply every operator's rule.

    Args:
        exported: What `export_graph` returned.
        copier: What made the frozen model that was exported.
        model: The user's model, where parameters are read from.
        examples: The example inputs.
        until: Name of a module, or of a value of the graph, behind which the reading ends.

    Returns:
        A network, or all problems.

    Raises:
        InputError: ``until`` names nothing.
        UnsupportedModelError: Parameters overlap in memory, and none holds the others.
    """
    cut = _cut(exported.program, until)
    return _Lowering(exported, copier, model, examples, cut).run()


def _cut(program: ExportedProgram, until: str | None) -> Cut:
    returned = program.graph.output_node().args[0]
    wanted = tuple(
        node
        for spec, node in zip(program.graph_signature.output_specs, returned, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT and isinstance(node, fx.Node)
    )
    if until is not None:
        return Cut(wanted, _results(program.graph, until), frozenset())
    return Cut(wanted, wanted, frozenset(last for node in wanted if (last := _last(node)) is not None))


def _results(graph: fx.Graph, until: str) -> tuple[fx.Node, ...]:
    """Return the values that a module hands to the rest of the graph, or the value of that name."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    inside = {node for node in calls if until in _module_paths(node)}
    if not inside:
        found = tuple(node for node in calls if node.name == until)
        if not found:
            known = dict.fromkeys([path for node in calls for path in _module_paths(node) if path] + [n.name for n in calls])
            raise InputError(
                f"until names no module that the forward pass calls and no value of it: '{until}'.{nearest(until, known)}"
            )
        return found
    handed = tuple(
        node
        for node in graph.nodes
        if node in inside and isinstance(node.meta.get("val"), Tensor) and any(user not in inside for user in node.users)
    )
    return handed or (next(node for node in reversed(graph.nodes) if node in inside),)


def _last(node: fx.Node) -> fx.Node | None:
    """Return the activation that an output ends with, if nothing else reads it."""
    while node.op == "call_function" and len([user for user in node.users if _base_name(user) not in IGNORED]) == 1:
        name = _base_name(node)
        if name in LAST:
            return node
        if name == "getitem" and isinstance(node.args[0], fx.Node) and _base_name(node.args[0]) in LAST:
            return node.args[0]
        if name not in STAYING or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return None


def _saved(model: nn.Module) -> tuple[frozenset[str], dict[str, Any]]:
    """Return the names in a module's state-dict, and its metadata; `state_dict` itself may be overridden."""
    names: set[str] = set()
    versions: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        versions[path] = {"version": module._version}
        held = {**module._parameters, **module._buffers}
        kept = [key for key, own in held.items() if own is not None and key not in module._non_persistent_buffers_set]
        names.update(f"{path}.{key}" if path else key for key in kept)
    return frozenset(names), versions


class _Lowering:
    """The state of one lowering; implements the `Builder` that rules see."""

    def __init__(
        self,
        exported: Exported,
        copier: Copier,
        model: nn.Module,
        examples: tuple[Tensor, ...],
        cut: Cut,
    ) -> None:
        self.program = exported.program
        self.model = model
        self.examples = examples
        self.cut = cut
        self.specs = {getattr(spec.arg, "name", ""): spec for spec in self.program.graph_signature.input_specs}
        self.constants = self.program.constants
        self.values: dict[fx.Node, Any] = {}
        self.layers: list[Layer] = []
        self.weights: dict[tuple[Expression, str | None], WeightTensor] = {}
        self.problems: list[Problem] = []
        self.unread: set[fx.Node] = set()  # numbers that a refused operator makes: what takes one has no value either
        self.operators = 0
        held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        named = [(name, tensor.detach()) for name, tensor in held]
        self.memory = Memory(named)
        self.state = self.memory.state
        self.aliases = self.memory.aliases
        self.names = [name for name, _ in named]
        self.held = {own: tensor for tensor in copier.tensors.values() if (own := span(tensor)) is not None}
        self.used: dict[int, Tensor] = {}
        self.identified: dict[str, Expression] = {}
        self.baked: set[str] = {self.aliases.get(name, name) for name in exported.baked}
        self.derived: dict[str, frozenset[str]] = {}
        self.saved, self.versions = _saved(model)
        self.origin = Origin("", "", "")
        self.sources: dict[Expression, frozenset[str]] = {}
        self.parameters = tuple(name for name, own in held if isinstance(own, nn.Parameter) and name in self.state)
        self.parameter_set = frozenset(self.parameters)

    # ---- the walk over the graph

    def run(self) -> Lowered:
        graph = self.program.graph
        live = self._live(graph)
        for node in graph.nodes:
            if node in live:
                self._visit(node)
        outputs = self._outputs()
        devices = {tensor.device for tensor in self.state.values()} or {self.examples[0].device}
        if len(devices) > 1:
            reason = f"Its parameters live on several devices ({', '.join(sorted(str(device) for device in devices))})."
            self.problems.append(Problem("", "export", "", reason, "Move the model to one device."))
        layers = () if self.problems else self._reachable(outputs)
        weights = self._used_weights(layers)
        self._check_reads(weights)
        if self.problems:
            return Lowered(None, tuple(self.problems), self.operators, self.cut, self.identified)
        device = next(iter(devices))
        names = {name: self._root(name) for name in self.names}
        live_state = LiveState(self.model, names, device, tuple(self.used.values()))
        graph = Graph(
            layers=layers,
            outputs=tuple(outputs),
            weights=weights,
            aliases=self.aliases,
            parameters=self.parameters,
            examples=tuple((tuple(example.shape), example.dtype) for example in self.examples),
            saved=self.saved,
            versions=self.versions,
            views=self.memory.views,
            baked={name: self.state[name].detach().clone() for name in sorted(self.baked)},
            left_off=tuple(_base_name(node) for node in self.program.graph.nodes if node in self.cut.left_off),
        )
        return Lowered(Network(graph, live_state, device), (), self.operators, self.cut, self.identified)

    def _root(self, name: str) -> str:
        """Return the name that stands for the memory of a parameter or buffer."""
        (own,) = self._requires(self.memory.expression(name))
        return own

    def _check_reads(self, weights: tuple[WeightTensor, ...]) -> None:
        """Refuse a model whose parameters the forward pass does not seem to read."""
        if self.parameters and not self.problems and not any(weight.requires & self.parameter_set for weight in weights):
            shown = ", ".join(f"'{name}'" for name in self.parameters[:3])
            reason = f"It has {len(self.parameters)} parameters ({shown}, …), and its forward pass reads none of them."
            advice = "Let forward compute with the registered parameters themselves, not with copies of their values."
            self.problems.append(Problem("", "export", "", reason, advice))

    def _live(self, graph: fx.Graph) -> set[fx.Node]:
        """Find what the outputs depend on; inputs are always alive."""
        stack = list(self.cut.outputs)
        live = {node for node in graph.nodes if node.op == "placeholder"}
        while stack:
            node = stack.pop()
            if node not in live or node.op == "placeholder":
                live.add(node)
                stack.extend(below for below in node.all_input_nodes if below not in live)
        return live

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.values[node] = self._placeholder(node)
        elif node.op == "get_attr":
            self.values[node] = self._attribute(node)
        elif node.op == "call_function":
            self.operators += 1
            self.origin = Origin(_module_path(node), _operator_name(node), _source_line(node))
            self.values[node] = self._guarded_call(node)

    def _placeholder(self, node: fx.Node) -> Any:
        spec = self.specs[node.name]
        fake = node.meta.get("val")
        if spec.kind == InputKind.USER_INPUT:
            assert isinstance(fake, Tensor)
            self.origin = Origin("", "input", "")
            self.layers.append(Layer(node.name, tuple(fake.shape), (), (), self.origin, dtype=fake.dtype))
            return Activation(node.name, tuple(fake.shape), fake.dtype)
        assert spec.target is not None
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            self.identified[spec.target] = self.memory.expression(spec.target)
            return self._tensor(self.identified[spec.target], fake)
        return self._constant(self.constants.get(spec.target), fake, spec.target)

    def _attribute(self, node: fx.Node) -> Any:
        value: Any = self.program.graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return self._constant(value, value, str(node.target)) if isinstance(value, Tensor) else value

    def _tensor(self, expression: Expression, fake: Any) -> Static:
        """Return a parameter or buffer, or a part of one."""
        places = frozenset({expression.name}) if isinstance(expression, StateTensor) else frozenset()
        return self._static(expression, fake, moves=expression, places=places)

    def _constant(self, value: Any, fake: Any, name: str) -> Static:
        """Return a constant of the graph: a parameter when it lies in a parameter's memory."""
        if isinstance(value, Tensor):
            try:
                known = self.memory.find(value)
            except LookupError as error:
                reason = f"It reads a tensor that shares a part of its memory with parameters or buffers ({error})."
                advice = "Let forward compute with the registered parameters themselves."
                self.problems.append(Problem("", "export", "", reason, advice))
                known = None
            if known is not None:
                self.identified[name] = known
                return self._tensor(known, fake)
            if span(value) in self.held:
                self.used[id(value)] = value
        constant = Constant(value)
        return self._static(constant, fake, moves=constant)

    def _guarded_call(self, node: fx.Node) -> Any:
        fake = node.meta.get("val")
        if any(below in self.unread for below in node.all_input_nodes):
            if not isinstance(fake, Tensor):
                self.unread.add(node)
            return _placeholder_like(fake, node.name)
        try:
            return self._call(node)
        except Refusal as refusal:
            found = problem(self.origin.module, self.origin.op, self.origin.where, refusal)
            if found not in self.problems:
                self.problems.append(found)
            if not isinstance(fake, (Tensor, list, tuple)):
                self.unread.add(node)
            return _placeholder_like(fake, node.name)

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            container, place = self._resolve(node.args[0]), node.args[1]
            if isinstance(container, Static):
                fake = node.meta["val"]
                expression = FunctionCall(operator.getitem, (container.expression, place))
                moves = None if container.moves is None else FunctionCall(operator.getitem, (container.moves, place))
                return self._static(expression, fake, moves, self._requires(container.expression))
            return container[place]
        if node in self.cut.left_off:
            return self._left_off(node)
        if node.target is REFUSED:
            raise Refusal(str(node.args[2]), str(node.args[3]))
        schema = getattr(node.target, "_schema", None)
        args = self._arguments(node)
        name = _base_name(node)
        if schema is None and not any(_contains(value, (Activation, Forbidden)) for value in args.values()):
            return self._fold(node, name)  # arithmetic of numbers that were read from tensors
        if schema is None:
            raise Refusal(f"the exporter left '{name}', which is no operator of PyTorch's core.", UNKNOWN_ADVICE)
        if not any(_contains(value, (Activation, Forbidden)) for value in args.values()):
            return self._fold(node, name)
        if name in IGNORED:
            return None
        if name in SHAPE_ONLY or (name in LIKE_ANOTHER and isinstance(self._resolve(node.args[0]), Static)):
            return self._from_shape(node, name)
        forbidden = next((v for v in _flatten(args.values()) if isinstance(v, Forbidden)), None)
        if forbidden is not None and not (isinstance(forbidden, Walled) and name in READS_WALLS):
            raise Refusal(forbidden.reason, forbidden.advice)
        result = node.meta.get("val")
        if any(not isinstance(size, int) for one in _flatten([result]) if isinstance(one, Tensor) for size in one.shape):
            raise Refusal(
                "the size of its result depends on the values of tensors.",
                "Use fixed sizes: a list of indices in place of a mask.",
            )
        first = result[0] if isinstance(result, (list, tuple)) and result else result
        if name in REASONS or name not in RULES:
            raise Refusal(*REASONS.get(name, (f"the operator '{name}' has no rule.", UNKNOWN_ADVICE)))
        if isinstance(first, Tensor) and not first.dtype.is_floating_point:
            raise Refusal(
                f"it turns an activation into {first.dtype}, which is not continuous.",
                "Keep activations in a floating-point type.",
            )
        args = {key: self._number(value, schema, key) for key, value in args.items()}
        made = RULES[name](Call(name, args, result, self, node.target))
        if isinstance(made, tuple):
            return tuple(self._keep(part, f"{node.name}_{place}") for place, part in enumerate(made))
        return self._keep(made, node.name)

    def _number(self, value: Any, schema: Any, key: str) -> Any:
        """Return an argument of a call; where only numbers may stand, one that was read from a buffer is part of the graph."""
        kind = next((str(own.type) for own in schema.arguments if own.name == key), "")
        numeric = "Tensor" not in kind and any(word in kind for word in ("float", "int", "number", "bool"))
        if not isinstance(value, Static) or not numeric:
            return value
        if self._requires(value.expression) & self.parameter_set:
            raise Refusal(f"its argument '{key}' is a number that was read from a parameter.", "Use the parameter itself.")
        found = self.bake(value)
        return found.item() if isinstance(found, Tensor) else found

    def _left_off(self, node: fx.Node) -> Any:
        """Return what an activation at the end of the model is a function of."""
        logits, result = self._resolve(node.args[0]), node.meta.get("val")
        first = result[0] if isinstance(result, (tuple, list)) else result
        if isinstance(logits, Activation) and isinstance(first, Tensor) and first.dtype != logits.dtype:
            logits = self._append(Draft(logits.shape, first.dtype, (Connection(logits.name, Identity()),), ()), node.name)
        return (logits, None) if isinstance(node.meta.get("val"), (tuple, list)) else logits

    def _keep(self, made: Draft | Forbidden, name: str) -> Activation | Forbidden:
        return made if isinstance(made, Forbidden) else self._append(made, name)

    def _append(self, layer: Draft, name: str) -> Activation:
        if 0 in layer.shape:
            raise Refusal(f"its result of shape {layer.shape} has no elements.", "Leave out layers and slices of size 0.")
        scored = [t.weight for t in layer.connections if t.weight is not None and t.weight.score_name is not None]
        unit = self.origin.module if layer.unit_dim is not None and scored else None
        self.layers.append(
            Layer(
                name,
                layer.shape,
                layer.connections,
                layer.biases,
                self.origin,
                concat=layer.concat,
                nonlinearity=layer.nonlinearity,
                unit_dim=layer.unit_dim,
                unit_name=unit,
                dtype=layer.dtype,
                blur=layer.blur,
            )
        )
        return Activation(name, layer.shape, layer.dtype)

    # ---- the Builder that rules use

    def add(self, layer: Draft) -> Activation:
        return self._append(layer, f"{self.origin.op}_{len(self.layers)}_between")

    def weight(self, static: Static, name: str | None, like: Static | None = None) -> WeightTensor:
        key = (static.expression, name)
        if key not in self.weights:
            self.weights[key] = self._make_weight(static, name, like)
        return self.weights[key]

    def bake(self, static: Static) -> Any:
        self.baked.update(self._requires(static.expression))
        return evaluate(static.expression, self.state)

    def _make_weight(self, static: Static, role: str | None, like: Static | None) -> WeightTensor:
        expression = static.expression
        requires = self._requires(expression)
        scored = requires & self.parameter_set
        scalar: float | None = None
        if not requires and isinstance(expression, Constant):
            value = expression.value
            if not isinstance(value, Tensor) or (value.dim() == 0 and not value.is_meta and id(value) not in self.used):
                scalar = float(value)
        if scalar is not None and not math.isfinite(scalar):
            raise Refusal(f"it uses the constant {scalar}.", "Use finite constants.")
        if not scored:
            return WeightTensor(expression, static.shape, None, scalar=scalar, requires=requires)
        if isinstance(expression, StateTensor):
            return WeightTensor(expression, static.shape, expression.name, requires=requires)
        if static.moves is not None:
            return WeightTensor(expression, static.shape, ", ".join(sorted(scored)), movement=static.moves, requires=requires)
        return WeightTensor(expression, static.shape, self._derived_name(static, scored, role, like), requires=requires)

    def _derived_name(self, static: Static, scored: frozenset[str], role: str | None, like: Static | None) -> str:
        """Name a derived weight after the module that owns it."""
        prefix = f"{self.origin.module}." if self.origin.module else ""
        if like is not None and isinstance(like.expression, StateTensor):
            name = like.expression.name
        else:
            if role is not None:
                name = self.aliases.get(prefix + role, prefix + role)
            elif len(scored) == 1:
                (name,) = scored
            else:
                name = prefix + "derived"
            known = self.state.get(name)
            if known is not None and (name not in static.places or tuple(known.shape) != static.shape):
                name = f"{name}.derived"
        if self.derived.setdefault(name, scored) != scored:  # another weight goes by that name already
            name = f"{name} from {', '.join(sorted(scored))}"
        return name

    # ---- expressions

    def _static(
        self,
        expression: Expression,
        fake: Any,
        moves: Expression | None,
        sources: frozenset[str] | None = None,
        places: frozenset[str] = frozenset(),
    ) -> Static:
        if sources is not None:
            self.sources[expression] = sources
        if isinstance(fake, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
            fake = torch.empty((), device="meta")
        return Static(expression, fake, moves, places)

    def _requires(self, expression: Expression) -> frozenset[str]:
        if expression in self.sources:
            return self.sources[expression]
        if isinstance(expression, StateTensor):
            found = frozenset({expression.name})
        elif isinstance(expression, FunctionCall):
            inner = _flatten([expression.args, *expression.kwargs.values()])
            found = frozenset().union(*(self._requires(e) for e in inner if isinstance(e, Expression)))
        else:
            found = frozenset()
        self.sources[expression] = found
        return found

    def _fold(self, node: fx.Node, name: str) -> Any:
        """Turn a call that does not depend on the input into an expression."""
        tags = getattr(node.target, "tags", ())
        args = self._arguments(node)
        if torch.Tag.nondeterministic_seeded in tags and args.get("train", True) is not False:
            raise Refusal("it draws random numbers.", "Make the model deterministic in eval mode.")
        result = node.meta.get("val")
        if isinstance(result, Tensor) and any(not isinstance(size, int) for size in result.shape):
            raise Refusal("a size depends on the values of a tensor.", "Use fixed sizes.")
        statics = [value for value in _flatten(args.values()) if isinstance(value, Static)]
        function = as_number if name == "item" and isinstance(result, (float, torch.SymFloat)) else _function(node)
        expression = FunctionCall(
            function,
            tuple(_to_expression(self._resolve(value)) for value in node.args),
            {key: _to_expression(self._resolve(value)) for key, value in node.kwargs.items()},
            result.dtype if isinstance(result, Tensor) and result.dtype.is_floating_point else None,
        )
        sources: frozenset[str] = frozenset().union(*(self._requires(static.expression) for static in statics))
        return self._static(
            expression, result, self._moves(node, name, statics, expression), sources, self._places(node, statics)
        )

    @staticmethod
    def _places(node: fx.Node, statics: list[Static]) -> frozenset[str]:
        """See `Static.places`."""
        result = node.meta.get("val")
        if not isinstance(result, Tensor) or torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return frozenset()
        return frozenset().union(*(static.places for static in statics if static.shape == tuple(result.shape)))

    def _moves(self, node: fx.Node, name: str, statics: list[Static], expression: Expression) -> Expression | None:
        """See `Static.moves`."""
        result = node.meta.get("val")
        if isinstance(result, Tensor) and not result.dtype.is_floating_point and self._requires_parameters(statics):
            return None  # rounded
        if not statics:
            return expression  # made of numbers
        if any(static.moves is None for static in statics):
            return None
        rounds = node.kwargs.get("rounding_mode") is not None
        if name in SCALINGS and not rounds and len(statics) == 1 and isinstance(self._resolve(node.args[0]), Static):
            return statics[0].moves
        if name not in MOVEMENTS and name != "embedding":
            return None
        return FunctionCall(
            _function(node),
            tuple(_to_expression(self._resolve(value), moves=True) for value in node.args),
            {key: _to_expression(self._resolve(value), moves=True) for key, value in node.kwargs.items()},
        )

    def _requires_parameters(self, statics: list[Static]) -> bool:
        return any(self._requires(static.expression) & self.parameter_set for static in statics)

    def _from_shape(self, node: fx.Node, name: str) -> Static:
        """Read a call that looks at the shape, type or device of an activation only: zeros in its place."""
        statics = [value for value in _flatten(self._arguments(node).values()) if isinstance(value, Static)]

        def written(*, moves: bool) -> FunctionCall:
            args, kwargs = (self._without_data(self._resolve(own), moves=moves) for own in (node.args, dict(node.kwargs)))
            return FunctionCall(_function(node), args, kwargs)

        moved = name in LIKE_ANOTHER and all(static.moves is not None for static in statics)
        rounded = not node.meta["val"].dtype.is_floating_point and self._requires_parameters(statics)
        return self._static(written(moves=False), node.meta["val"], written(moves=True) if moved and not rounded else None)

    def _without_data(self, value: Any, *, moves: bool) -> Any:
        """Return arguments as expressions, activations as zeros."""
        if isinstance(value, Activation):
            return FunctionCall(torch.zeros, (value.shape,), {"dtype": value.dtype, "device": self.examples[0].device})
        if isinstance(value, (list, tuple)):
            return type(value)(self._without_data(item, moves=moves) for item in value)
        if isinstance(value, dict):
            return {key: self._without_data(item, moves=moves) for key, item in value.items()}
        return _to_expression(value, moves=moves)

    def _resolve(self, value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: self.values[node])

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return {str(place): self._resolve(value) for place, value in enumerate(node.args)}
        args: dict[str, Any] = {}
        for place, argument in enumerate(schema.arguments):
            if place < len(node.args):
                args[argument.name] = self._resolve(node.args[place])
            elif argument.name in node.kwargs:
                args[argument.name] = self._resolve(node.kwargs[argument.name])
            elif argument.has_default_value():
                args[argument.name] = argument.default_value
        return args

    # ---- finishing

    def _outputs(self) -> list[str]:
        found: list[str] = []
        for spec in self.program.graph_signature.output_specs:
            if spec.kind == OutputKind.BUFFER_MUTATION:
                reason = f"Its forward pass overwrites '{spec.target}'."
                self.problems.append(Problem("", "export", "", reason, "Remove that side effect."))
        for node in self.cut.outputs:
            value = self.values.get(node)
            if isinstance(value, Forbidden):
                self.problems.append(Problem("", "output", "", value.reason[:1].upper() + value.reason[1:], value.advice))
            elif isinstance(value, Static) and isinstance(value.fake, Tensor) and value.fake.dtype.is_floating_point:
                self.origin = Origin("", "output", "")
                leaf_layer = Call("output", {"value": value}, value.fake, self, None).as_activation(value)
                found.append(leaf_layer.name)
            elif isinstance(value, Activation):
                found.append(value.name)
        if not found and not self.problems:
            self.problems.append(
                Problem("", "output", "", "It returns no floating-point tensor.", "Return the tensor of interest.")
            )
        return found

    def _reachable(self, outputs: list[str]) -> tuple[Layer, ...]:
        by_name = {layer.name: layer for layer in self.layers}
        live: set[str] = {layer.name for layer in self.layers if layer.kind == "input"}
        stack = list(outputs)
        while stack:
            name = stack.pop()
            if name not in live:
                live.add(name)
                stack.extend(connection.source for connection in by_name[name].connections)
        return tuple(layer for layer in self.layers if layer.name in live)

    @staticmethod
    def _used_weights(layers: tuple[Layer, ...]) -> tuple[WeightTensor, ...]:
        found: dict[WeightTensor, None] = {}
        for layer in layers:
            for connection in layer.connections:
                if connection.weight is not None:
                    found[connection.weight] = None
            for bias in layer.biases:
                found[bias.weight] = None
        return tuple(found)


def as_number(tensor: Tensor) -> Tensor:
    """Return the only element of a tensor, still as a tensor: what ``.item()`` gives to arithmetic that weights are made of."""
    return tensor.reshape(())


def _to_expression(value: Any, *, moves: bool = False) -> Any:
    if isinstance(value, Static):
        return value.moves if moves else value.expression
    if isinstance(value, (list, tuple)):
        return type(value)(_to_expression(item, moves=moves) for item in value)
    return value


def _flatten(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found.extend(_flatten(value))
        else:
            found.append(value)
    return found


def _contains(value: Any, kinds: tuple[type, ...]) -> bool:
    return any(isinstance(item, kinds) for item in _flatten([value]))


def _placeholder_like(fake: Any, name: str) -> Any:
    """Stand in for the result of a refused call, so that the walk can go on and find further problems."""
    if isinstance(fake, Tensor):
        return Activation(name, tuple(fake.shape), fake.dtype)
    if isinstance(fake, (list, tuple)):
        return tuple(_placeholder_like(item, f"{name}_{place}") for place, item in enumerate(fake))
    return None


def _function(node: fx.Node) -> Callable[..., Any]:
    """Return what a node calls, as a value that can be pickled and writes to none of its arguments."""
    assert callable(node.target)
    if getattr(node.target, "_schema", None) is None:
        return node.target
    try:
        return Operator.of(node.target)
    except LookupError as error:
        raise Refusal(f"{error}.", UNKNOWN_ADVICE) from error


def _operator_name(node: fx.Node) -> str:
    if node.target is REFUSED:
        return str(node.args[1])
    return (
        str(node.target)
        if getattr(node.target, "_schema", None) is not None
        else str(getattr(node.target, "__name__", node.target))
    )


def _base_name(node: fx.Node) -> str:
    """``relu_`` and ``aten.relu.default`` are both ``relu``."""
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    schema = getattr(node.target, "_schema", None)
    return name[:-1] if schema is not None and schema.is_mutable and name.endswith("_") else name


def _module_path(node: fx.Node) -> str:
    paths = _module_paths(node)
    return paths[-1] if paths else ""


def _module_paths(node: fx.Node) -> list[str]:
    """Return the paths of the modules that a call lies in, from the outermost on."""
    stack = node.meta.get("nn_module_stack") or {}
    return [str(path).removeprefix("L['self']").removeprefix(".") for path, _ in stack.values()]


def _source_line(node: fx.Node) -> str:
    """Return the innermost line of the stack trace that is neither PyTorch's own nor that of the reader of ONNX files."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    files = [line for line in lines if line.startswith("File ") and INTERPRETER not in line]
    own = [line for line in files if "/torch/" not in line.replace("\\", "/")]
    for line in reversed(own or files):
        parts = line.split('"')
        if len(parts) > 2:
            number = parts[2].split("line ")[-1].split(",")[0].strip()
            return f"{parts[1]}:{number}"
    return ""
