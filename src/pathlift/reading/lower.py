"""From an exported graph of ATen operators to a `Network`, by the rules.

Nodes that depend on the input become layers of neurons through their operator's rule. Nodes that depend on parameters
and constants only become expressions (`pathlift.reading.statics`), evaluated once per parameter vector. All refusals of a
graph are collected.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from pathlift.edges import Identity
from pathlift.errors import Problem
from pathlift.graph.expressions import Constant, Expression, FunctionCall, StateTensor, evaluate
from pathlift.graph.layers import Connection, Layer, Origin, WeightTensor
from pathlift.graph.network import Graph, Network
from pathlift.reading.cut import Cut, cut_of
from pathlift.reading.examples import Examples
from pathlift.reading.export import Exported
from pathlift.reading.freeze import Copier
from pathlift.reading.live import LiveState
from pathlift.reading.memory import Memory, span
from pathlift.reading.nodes import IGNORED, REFUSED, base_name, module_path, operator_name, source_line
from pathlift.reading.statics import LIKE_ANOTHER, UNKNOWN_ADVICE, Statics, flatten
from pathlift.reading.units import with_named_units
from pathlift.rules import (
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

SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like", "new_empty"}


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
    examples: Examples,
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
    cut = cut_of(exported.program, until)
    return _Lowering(exported, copier, model, examples, cut).run()


def _saved(model: nn.Module) -> tuple[frozenset[str], dict[str, Any]]:
    """Return the names in a module's state-dict, and its metadata; `state_dict` itself may be overridden."""
    names: set[str] = set()
    versions: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        versions[path] = {"version": module._version}
        held = {**module._parameters, **module._buffers}
        kept = [key for key, tensor in held.items() if tensor is not None and key not in module._non_persistent_buffers_set]
        names.update(f"{path}.{key}" if path else key for key in kept)
    return frozenset(names), versions


class _Lowering:
    """The state of one lowering; implements the `Builder` that rules see."""

    def __init__(
        self,
        exported: Exported,
        copier: Copier,
        model: nn.Module,
        examples: Examples,
        cut: Cut,
    ) -> None:
        self.program = exported.program
        self.model = model
        self.examples = examples
        self.cut = cut
        self.specs = {getattr(spec.arg, "name", ""): spec for spec in self.program.graph_signature.input_specs}
        self.constants = self.program.constants
        self.layers: list[Layer] = []
        self.weights: dict[tuple[Expression, str | None], WeightTensor] = {}
        self.problems: list[Problem] = []
        self.unread: set[fx.Node] = set()  # numbers and masks that a refused operator makes: what takes one has no value either
        self.refused: set[fx.Node] = set()
        self.operators = 0
        held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        named = [(name, tensor.detach()) for name, tensor in held]
        self.memory = Memory(named)
        self.state = self.memory.state
        self.aliases = self.memory.aliases
        self.names = [name for name, _ in named]
        self.held = {extent: tensor for tensor in copier.tensors.values() if (extent := span(tensor)) is not None}
        self.used: dict[int, Tensor] = {}
        self.identified: dict[str, Expression] = {}
        self.baked: set[str] = {self.aliases.get(name, name) for name in exported.baked}
        self.derived: dict[str, frozenset[str]] = {}
        self.saved, self.versions = _saved(model)
        self.origin = Origin("", "", "")
        self.parameters = tuple(name for name, tensor in held if isinstance(tensor, nn.Parameter) and name in self.state)
        self.parameter_set = frozenset(self.parameters)
        self.statics = Statics(self.parameter_set, examples.tensors[0].device)

    # ---- the walk over the graph

    def run(self) -> Lowered:
        graph = self.program.graph
        live = self._live(graph)
        for node in graph.nodes:
            if node in live:
                self._visit(node)
        outputs = self._outputs()
        devices = {tensor.device for tensor in self.state.values()} or {self.examples.tensors[0].device}
        if len(devices) > 1:
            reason = f"Its parameters live on several devices ({', '.join(sorted(str(device) for device in devices))})."
            self.problems.append(Problem("", "export", "", reason, "Move the model to one device."))
        layers = () if self.problems else with_named_units(self._reachable(outputs))
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
            examples=tuple((tuple(example.shape), example.dtype) for example in self.examples.tensors),
            form=self.examples.form,
            saved=self.saved,
            versions=self.versions,
            views=self.memory.views,
            baked={name: self.state[name].detach().clone() for name in sorted(self.baked)},
            left_off=tuple(base_name(node) for node in self.program.graph.nodes if node in self.cut.left_off),
        )
        return Lowered(Network(graph, live_state, device, live_state), (), self.operators, self.cut, self.identified)

    def _root(self, name: str) -> str:
        """Return the name that stands for the memory of a parameter or buffer."""
        (root,) = self.statics.requires(self.memory.expression(name))
        return root

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
            self.statics.values[node] = self._placeholder(node)
        elif node.op == "get_attr":
            self.statics.values[node] = self._attribute(node)
        elif node.op == "call_function":
            self.operators += 1
            self.origin = Origin(module_path(node), operator_name(node), source_line(node))
            self.statics.values[node] = self._guarded_call(node)

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
        elementwise = frozenset({expression.name}) if isinstance(expression, StateTensor) else frozenset()
        return self.statics.make(expression, fake, moves=expression, elementwise=elementwise)

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
        return self.statics.make(constant, fake, moves=constant)

    def _guarded_call(self, node: fx.Node) -> Any:
        fake = node.meta.get("val")
        if any(below in self.unread for below in node.all_input_nodes) or self._is_part_of_refused(node):
            if (
                not _sized(fake)
                or _is_mask(fake)
                or isinstance(fake, (list, tuple))
                or self.unread.issuperset(node.all_input_nodes)
            ):
                self.unread.add(node)
            return _placeholder_like(fake, node.name)
        try:
            return self._call(node)
        except Refusal as refusal:
            refused = problem(self.origin.module, self.origin.op, self.origin.where, refusal)
            if refused not in self.problems:
                self.problems.append(refused)
            self.refused.add(node)
            if _is_mask(fake) or not _sized(fake) or self._made_of_forbidden(node):
                self.unread.add(node)
            return _placeholder_like(fake, node.name)

    def _is_part_of_refused(self, node: fx.Node) -> bool:
        """Whether this is the indices, say, that a refused operator returns beside other things."""
        return node.target is operator.getitem and node.args[0] in self.refused and _is_mask(node.meta.get("val"))

    def _made_of_forbidden(self, node: fx.Node) -> bool:
        """Whether a call reads nothing but what no rule may read: a comparison, say, or its copy as numbers."""
        return all(isinstance(self.statics.values.get(below), Forbidden) for below in node.all_input_nodes)

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            container, index = self.statics.resolve(node.args[0]), node.args[1]
            if isinstance(container, Static):
                fake = node.meta["val"]
                expression = FunctionCall(operator.getitem, (container.expression, index))
                moves = None if container.moves is None else FunctionCall(operator.getitem, (container.moves, index))
                return self.statics.make(expression, fake, moves, self.statics.requires(container.expression))
            return container[index]
        if node in self.cut.left_off:
            return self._left_off(node)
        if node.target is REFUSED:
            raise Refusal(str(node.args[2]), str(node.args[3]))
        schema = getattr(node.target, "_schema", None)
        args = self.statics.arguments(node)
        name = base_name(node)
        if schema is None and not any(_contains(value, (Activation, Forbidden)) for value in args.values()):
            return self.statics.fold(node, name)  # arithmetic of numbers that were read from tensors
        if schema is None:
            raise Refusal(f"the exporter left '{name}', which is no operator of PyTorch's core.", UNKNOWN_ADVICE)
        if not any(_contains(value, (Activation, Forbidden)) for value in args.values()):
            return self.statics.fold(node, name)
        if name in IGNORED:
            return None
        if name in SHAPE_ONLY or (name in LIKE_ANOTHER and isinstance(self.statics.resolve(node.args[0]), Static)):
            return self.statics.from_shape(node, name)
        forbidden = next((v for v in flatten(args.values()) if isinstance(v, Forbidden)), None)
        if forbidden is not None and not (isinstance(forbidden, Walled) and name in READS_WALLS):
            raise Refusal(forbidden.reason, forbidden.advice)
        result = node.meta.get("val")
        if any(
            not isinstance(size, int) for tensor in flatten([result]) if isinstance(tensor, Tensor) for size in tensor.shape
        ):
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
            return tuple(self._keep(part, f"{node.name}_{number}") for number, part in enumerate(made))
        return self._keep(made, node.name)

    def _number(self, value: Any, schema: Any, key: str) -> Any:
        """Return an argument of a call; where only numbers may stand, one that was read from a buffer is part of the graph."""
        kind = next((str(argument.type) for argument in schema.arguments if argument.name == key), "")
        numeric = "Tensor" not in kind and any(word in kind for word in ("float", "int", "number", "bool"))
        if not isinstance(value, Static) or not numeric:
            return value
        if self.statics.requires(value.expression) & self.parameter_set:
            raise Refusal(f"its argument '{key}' is a number that was read from a parameter.", "Use the parameter itself.")
        baked = self.bake(value)
        return baked.item() if isinstance(baked, Tensor) else baked

    def _left_off(self, node: fx.Node) -> Any:
        """Return what an activation at the end of the model is a function of."""
        logits, result = self.statics.resolve(node.args[0]), node.meta.get("val")
        first = result[0] if isinstance(result, (tuple, list)) else result
        if isinstance(logits, Activation) and isinstance(first, Tensor) and first.dtype != logits.dtype:
            logits = self._append(Draft(logits.shape, first.dtype, (Connection(logits.name, Identity()),), ()), node.name)
        return (logits, None) if isinstance(node.meta.get("val"), (tuple, list)) else logits

    def _keep(self, made: Draft | Forbidden, name: str) -> Activation | Forbidden:
        return made if isinstance(made, Forbidden) else self._append(made, name)

    def _append(self, layer: Draft, name: str) -> Activation:
        if 0 in layer.shape:
            raise Refusal(f"its result of shape {layer.shape} has no elements.", "Leave out layers and slices of size 0.")
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
        self.baked.update(self.statics.requires(static.expression))
        return evaluate(static.expression, self.state)

    def _make_weight(self, static: Static, role: str | None, like: Static | None) -> WeightTensor:
        expression = static.expression
        requires = self.statics.requires(expression)
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
            if known is not None and (name not in static.elementwise or tuple(known.shape) != static.shape):
                name = f"{name}.derived"
        if self.derived.setdefault(name, scored) != scored:  # another weight goes by that name already
            name = f"{name} from {', '.join(sorted(scored))}"
        return name

    # ---- finishing

    def _outputs(self) -> list[str]:
        names: list[str] = []
        for spec in self.program.graph_signature.output_specs:
            if spec.kind == OutputKind.BUFFER_MUTATION:
                reason = f"Its forward pass overwrites '{spec.target}'."
                self.problems.append(Problem("", "export", "", reason, "Remove that side effect."))
        for node in self.cut.outputs:
            value = self.statics.values.get(node)
            if isinstance(value, Forbidden):
                self.problems.append(Problem("", "output", "", value.reason[:1].upper() + value.reason[1:], value.advice))
            elif isinstance(value, Static) and isinstance(value.fake, Tensor) and value.fake.dtype.is_floating_point:
                self.origin = Origin("", "output", "")
                leaf_layer = Call("output", {"value": value}, value.fake, self, None).as_activation(value)
                names.append(leaf_layer.name)
            elif isinstance(value, Activation):
                names.append(value.name)
        if not names and not self.problems:
            self.problems.append(
                Problem("", "output", "", "It returns no floating-point tensor.", "Return the tensor of interest.")
            )
        return names

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
        weights: dict[WeightTensor, None] = {}
        for layer in layers:
            for connection in layer.connections:
                if connection.weight is not None:
                    weights[connection.weight] = None
            for bias in layer.biases:
                weights[bias.weight] = None
        return tuple(weights)


def _contains(value: Any, kinds: tuple[type, ...]) -> bool:
    return any(isinstance(item, kinds) for item in flatten([value]))


def _is_mask(fake: Any) -> bool:
    """Whether a value is a tensor of whole numbers or truth values."""
    return isinstance(fake, Tensor) and not fake.dtype.is_floating_point


def _sized(fake: Any) -> bool:
    """Whether a value is a tensor, or several, of sizes that are known: a rule can go on with what stands in for it."""
    if isinstance(fake, (list, tuple)):
        return all(_sized(item) for item in fake)
    return isinstance(fake, Tensor) and all(isinstance(size, int) for size in fake.shape)


def _placeholder_like(fake: Any, name: str) -> Any:
    """Stand in for the result of a refused call, so that the walk can go on and find further problems."""
    if isinstance(fake, Tensor):
        return Activation(name, tuple(fake.shape), fake.dtype)
    if isinstance(fake, (list, tuple)):
        return tuple(_placeholder_like(item, f"{name}_{number}") for number, item in enumerate(fake))
    return None
