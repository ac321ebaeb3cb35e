"""From an exported graph of ATen operators to a `Network`, by the rules.

Nodes that depend on the input become layers of neurons through their operator's rule. Nodes that depend on parameters
and constants only become expressions, evaluated once per parameter vector. All refusals of a graph are collected.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from pathlift.errors import Problem
from pathlift.network import (
    Apply,
    Constant,
    Expression,
    Leaf,
    Network,
    Node,
    Origin,
    StateTensor,
    evaluate,
)
from pathlift.rules import MOVEMENTS, REASONS, RULES, Activation, Call, Forbidden, Layer, Refusal, Static, Walled, problem

SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like", "new_empty"}
SCALINGS = {"neg", "mul", "div"}
IGNORED = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
}
UNKNOWN_ADVICE = "If it is affine, piecewise linear or data movement, please report it: docs/support.md lists what is covered."


@dataclass(frozen=True)
class Lowered:
    """The outcome of lowering: a network, or the problems that prevent one."""

    network: Network | None
    problems: tuple[Problem, ...]
    operators: int


def lower(program: ExportedProgram, view: nn.Module, examples: tuple[Tensor, ...]) -> Lowered:
    """Apply every operator's rule.

    Args:
        program: What `export_graph` returned.
        view: The frozen model it was exported from; gives values and names of parameters.
        examples: The example inputs.

    Returns:
        A network, or all problems.
    """
    return _Lowering(program, view, examples).run()


class _Lowering:
    """The state of one lowering; implements the `Builder` that rules see."""

    def __init__(self, program: ExportedProgram, view: nn.Module, examples: tuple[Tensor, ...]) -> None:
        self.program = program
        self.examples = examples
        self.specs = {getattr(spec.arg, "name", ""): spec for spec in program.graph_signature.input_specs}
        self.constants = program.constants
        self.values: dict[fx.Node, Any] = {}
        self.nodes: list[Node] = []
        self.leaves: dict[tuple[Expression, str | None], Leaf] = {}
        self.problems: list[Problem] = []
        self.operators = 0
        self.state: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.baked: set[str] = set()
        self.derived: dict[str, frozenset[str]] = {}
        saved = view.state_dict()
        self.saved = frozenset(saved)
        self.versions: dict[str, Any] = dict(getattr(saved, "_metadata", {}))
        self.origin = Origin("", "", "")
        self.sources: dict[Expression, frozenset[str]] = {}
        by_identity: dict[int, str] = {}
        named = [*view.named_parameters(remove_duplicate=False), *view.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            first = by_identity.setdefault(id(tensor), name)
            if first == name:
                self.state[name] = tensor
            else:
                self.aliases[name] = first
        self.parameters = tuple(name for name, _ in view.named_parameters(remove_duplicate=False) if name in self.state)
        self.parameter_set = frozenset(self.parameters)

    # ---- the walk over the graph

    def run(self) -> Lowered:
        graph = self.program.graph
        live = self._live(graph)
        for node in graph.nodes:
            if node in live:
                self._visit(node)
        outputs = self._outputs(graph)
        devices = {tensor.device for tensor in self.state.values()} or {self.examples[0].device}
        if len(devices) > 1:
            reason = f"Its parameters live on several devices ({', '.join(sorted(str(device) for device in devices))})."
            self.problems.append(Problem("", "export", "", reason, "Move the model to one device."))
        if self.problems:
            return Lowered(None, tuple(self.problems), self.operators)
        nodes = self._reachable(outputs)
        leaves = self._used_leaves(nodes)
        floating = [tensor.dtype for tensor in self.state.values() if tensor.dtype.is_floating_point]
        floating = floating or [example.dtype for example in self.examples]
        network = Network(
            nodes=nodes,
            outputs=tuple(outputs),
            leaves=leaves,
            state=self.state,
            aliases=self.aliases,
            parameters=self.parameters,
            examples=tuple((tuple(example.shape), example.dtype) for example in self.examples),
            device=next(iter(devices)),
            dtype=torch.float64 if torch.float64 in floating else torch.float32,
            baked=frozenset(self.baked),
            saved=self.saved,
            versions=self.versions,
            fingerprint=_fingerprint(graph),
        )
        return Lowered(network, (), self.operators)

    def _live(self, graph: fx.Graph) -> set[fx.Node]:
        """Find what the user outputs depend on; inputs are always alive."""
        wanted = {
            spec.arg.name
            for spec in self.program.graph_signature.output_specs
            if spec.kind == OutputKind.USER_OUTPUT and hasattr(spec.arg, "name")
        }
        stack = [node for node in graph.nodes if node.name in wanted]
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
            self.nodes.append(Node(node.name, tuple(fake.shape), (), (), self.origin))
            return Activation(node.name, tuple(fake.shape), fake.dtype)
        assert spec.target is not None
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            name = self.aliases.get(spec.target, spec.target)
            own = StateTensor(name)
            return self._static(own, fake, moves=own, sources=frozenset({name}))
        own_constant = Constant(self.constants.get(spec.target))
        return self._static(own_constant, fake, moves=own_constant)

    def _attribute(self, node: fx.Node) -> Any:
        value: Any = self.program.graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor):
            own = Constant(value)
            return self._static(own, value, moves=own)
        return value

    def _guarded_call(self, node: fx.Node) -> Any:
        try:
            return self._call(node)
        except Refusal as refusal:
            found = problem(self.origin.module, self.origin.op, self.origin.where, refusal)
            if found not in self.problems:
                self.problems.append(found)
            return _placeholder_like(node.meta.get("val"), node.name)

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            container, place = self._resolve(node.args[0]), node.args[1]
            if isinstance(container, Static):
                fake = node.meta["val"]
                expression = Apply(operator.getitem, (container.expression, place))
                moves = None if container.moves is None else Apply(operator.getitem, (container.moves, place))
                return self._static(expression, fake, moves, self.sources[container.expression])
            return container[place]
        schema = getattr(node.target, "_schema", None)
        args = self._arguments(node)
        name = _base_name(node)
        if schema is None:
            raise Refusal(f"the exporter left '{name}', which is no operator of PyTorch's core.", UNKNOWN_ADVICE)
        if not any(_contains(value, (Activation, Forbidden)) for value in args.values()):
            return self._fold(node, name)
        if name in IGNORED:
            return None
        if name in SHAPE_ONLY:
            return self._from_shape(node)
        forbidden = next((v for v in _flatten(args.values()) if isinstance(v, Forbidden)), None)
        if forbidden is not None and not (isinstance(forbidden, Walled) and name.startswith("max_pool")):
            raise Refusal(forbidden.reason, forbidden.advice)
        result = node.meta.get("val")
        first = result[0] if isinstance(result, (list, tuple)) and result else result
        if name in REASONS or name not in RULES:
            raise Refusal(*REASONS.get(name, (f"the operator '{name}' has no rule.", UNKNOWN_ADVICE)))
        if isinstance(first, Tensor) and not first.dtype.is_floating_point:
            raise Refusal(
                f"it turns an activation into {first.dtype}, which is not continuous.",
                "Keep activations in a floating-point type.",
            )
        made = RULES[name](Call(name, args, result, self, node.target))
        if isinstance(made, tuple):
            return tuple(self._keep(part, f"{node.name}_{place}") for place, part in enumerate(made))
        return self._keep(made, node.name)

    def _keep(self, made: Layer | Forbidden, name: str) -> Activation | Forbidden:
        return made if isinstance(made, Forbidden) else self._append(made, name)

    def _append(self, layer: Layer, name: str) -> Activation:
        scored = [t.weight for t in layer.terms if t.weight is not None and t.weight.score_name is not None]
        unit = self.origin.module if layer.unit_dim is not None and scored else None
        self.nodes.append(
            Node(
                name,
                layer.shape,
                layer.terms,
                layer.starts,
                self.origin,
                concat=layer.concat,
                nonlinearity=layer.nonlinearity,
                unit_dim=layer.unit_dim,
                unit_name=unit,
            )
        )
        return Activation(name, layer.shape, layer.dtype)

    # ---- the Builder that rules use

    def add(self, layer: Layer) -> Activation:
        return self._append(layer, f"{self.origin.op}_{len(self.nodes)}_between")

    def leaf(self, static: Static, name: str | None, like: Static | None = None) -> Leaf:
        key = (static.expression, name)
        if key not in self.leaves:
            self.leaves[key] = self._make_leaf(static, name, like)
        return self.leaves[key]

    def bake(self, static: Static) -> Any:
        self.baked.update(self._requires(static.expression))
        return evaluate(static.expression, self.state)

    def _make_leaf(self, static: Static, role: str | None, like: Static | None) -> Leaf:
        expression = static.expression
        requires = self._requires(expression)
        scored = requires & self.parameter_set
        scalar: float | None = None
        if not requires and isinstance(expression, Constant):
            value = expression.value
            if not isinstance(value, Tensor) or (value.numel() == 1 and not value.is_meta and value.dim() == 0):
                scalar = float(value)
        if scalar is not None and not math.isfinite(scalar):
            raise Refusal(f"it uses the constant {scalar}.", "Use finite constants.")
        if not scored:
            return Leaf(expression, static.shape, None, scalar=scalar, requires=requires)
        if isinstance(expression, StateTensor):
            return Leaf(expression, static.shape, expression.name, requires=requires)
        if static.moves is not None:
            return Leaf(expression, static.shape, ", ".join(sorted(scored)), pull_back=static.moves, requires=requires)
        return Leaf(expression, static.shape, self._derived_name(static, scored, role, like), requires=requires)

    def _derived_name(self, static: Static, scored: frozenset[str], role: str | None, like: Static | None) -> str:
        """Name a derived weight after the module that owns it."""
        prefix = f"{self.origin.module}." if self.origin.module else ""
        if like is not None and isinstance(like.expression, StateTensor):
            name = like.expression.name
        elif role is not None:
            own = prefix + role
            name = self.aliases.get(own, own)
        elif len(scored) == 1:
            (name,) = scored
        else:
            name = prefix + "derived"
        if name in self.state and tuple(self.state[name].shape) != static.shape:
            name = f"{name}.derived"
        if self.derived.setdefault(name, scored) != scored:  # another weight goes by that name already
            name = f"{name} from {', '.join(sorted(scored))}"
        return name

    # ---- expressions

    def _static(
        self, expression: Expression, fake: Any, moves: Expression | None, sources: frozenset[str] = frozenset()
    ) -> Static:
        self.sources[expression] = sources
        return Static(expression, fake, moves)

    def _requires(self, expression: Expression) -> frozenset[str]:
        if expression in self.sources:
            return self.sources[expression]
        if isinstance(expression, StateTensor):
            found = frozenset({expression.name})
        elif isinstance(expression, Apply):
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
        statics = [value for value in _flatten(args.values()) if isinstance(value, Static)]
        expression = Apply(
            _function(node),
            tuple(_to_expression(self._resolve(value)) for value in node.args),
            {key: _to_expression(self._resolve(value)) for key, value in node.kwargs.items()},
        )
        sources: frozenset[str] = frozenset().union(*(self.sources[static.expression] for static in statics))
        return self._static(expression, result, self._moves(node, name, statics), sources)

    def _moves(self, node: fx.Node, name: str, statics: list[Static]) -> Expression | None:
        """See `Static.moves`."""
        if any(static.moves is None for static in statics) or not statics:
            return None
        if name in SCALINGS and len(statics) == 1 and isinstance(self._resolve(node.args[0]), Static):
            return statics[0].moves
        if name not in MOVEMENTS:
            return None
        return Apply(
            _function(node),
            tuple(_to_expression(self._resolve(value), moves=True) for value in node.args),
            {key: _to_expression(self._resolve(value), moves=True) for key, value in node.kwargs.items()},
        )

    def _from_shape(self, node: fx.Node) -> Static:
        """zeros_like and its kin look at the shape of an activation only."""
        resolved = [self._resolve(value) for value in node.args]
        args = tuple(
            Apply(torch.zeros, (value.shape,), {"dtype": value.dtype, "device": self.examples[0].device})
            if isinstance(value, Activation)
            else _to_expression(value)
            for value in resolved
        )
        expression = Apply(_function(node), args, dict(node.kwargs))
        return self._static(expression, node.meta["val"], None)

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

    def _outputs(self, graph: fx.Graph) -> list[str]:
        by_name = {node.name: node for node in graph.nodes}
        found: list[str] = []
        for spec in self.program.graph_signature.output_specs:
            if spec.kind == OutputKind.BUFFER_MUTATION:
                reason = f"its forward pass overwrites '{spec.target}'."
                self.problems.append(Problem("", "export", "", reason[:1].upper() + reason[1:], "Remove that side effect."))
            if spec.kind != OutputKind.USER_OUTPUT or not hasattr(spec.arg, "name"):
                continue
            value = self.values.get(by_name[spec.arg.name]) if spec.arg.name in by_name else None
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

    def _reachable(self, outputs: list[str]) -> tuple[Node, ...]:
        by_name = {node.name: node for node in self.nodes}
        live: set[str] = {node.name for node in self.nodes if node.kind == "input"}
        stack = list(outputs)
        while stack:
            name = stack.pop()
            if name not in live:
                live.add(name)
                stack.extend(term.source for term in by_name[name].terms)
        return tuple(node for node in self.nodes if node.name in live)

    @staticmethod
    def _used_leaves(nodes: tuple[Node, ...]) -> tuple[Leaf, ...]:
        found: dict[Leaf, None] = {}
        for node in nodes:
            for term in node.terms:
                if term.weight is not None:
                    found[term.weight] = None
            for start in node.starts:
                found[start.weight] = None
        return tuple(found)


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
    assert callable(node.target)
    return node.target


def _operator_name(node: fx.Node) -> str:
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
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return str(path).removeprefix("L['self']").removeprefix(".")


def _source_line(node: fx.Node) -> str:
    """Return the innermost line of the stack trace that is not PyTorch's own."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    files = [line for line in lines if line.startswith("File ")]
    own = [line for line in files if "/torch/" not in line.replace("\\", "/")]
    for line in reversed(own or files):
        parts = line.split('"')
        if len(parts) > 2:
            number = parts[2].split("line ")[-1].split(",")[0].strip()
            return f"{parts[1]}:{number}"
    return ""


def _fingerprint(graph: fx.Graph) -> str:
    """Hash the operators, their constants and their wiring."""
    digest = hashlib.sha256()
    for node in graph.nodes:
        digest.update(f"{node.name}|{node.target}|{node.args}|{node.kwargs}\n".encode())
    return digest.hexdigest()
