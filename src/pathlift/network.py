"""The typed, immutable graph that `capture` makes of a model and that every pass reads (SPEC §1).

A `Node` is a layer of neurons: the elements of one tensor. Its pre-activation is a sum over `terms` (edges from the
elements of an earlier node, with weights) plus `starts` (biases, where paths of the set H begin). A `Leaf` is a weight
tensor: a parameter, a constant, or something computed from them alone. Leaves hold an `Expression`, not a value, so the
same graph serves any other parameter vector θ' of the same architecture.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pathlift.arguments import public
from pathlift.edges import Edges
from pathlift.edges.axis import Axis, multiplicity, spread
from pathlift.errors import NumericalError

if TYPE_CHECKING:
    from pathlift.passes.recall import Memory


class LazyState(Mapping[str, Tensor]):
    """Parameters and buffers by canonical name that are too large to hold: each is read anew whenever it is asked for."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it.

        Args:
            name: Its name.

        Returns:
            The dtype.
        """


class Expression:
    """A tensor that depends on parameters and constants only."""


@dataclass(frozen=True, eq=False)
class StateTensor(Expression):
    """A parameter or buffer, by its canonical state-dict name."""

    name: str


@dataclass(frozen=True, eq=False)
class Constant(Expression):
    """A tensor or a Python number that is part of the graph itself."""

    value: Any


@dataclass(frozen=True, eq=False)
class Apply(Expression):
    """A function of other expressions, which may stand anywhere inside nested lists and tuples of arguments.

    Attributes:
        function: What is computed.
        args: Its arguments.
        kwargs: Its named arguments.
        dtype: The floating-point type in which the model itself computes it; None where the model does not.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None


def substitute(value: Any, replace: Callable[[Expression], Any]) -> Any:
    """Return ``value`` with each expression in its nested lists, tuples and dicts replaced.

    Args:
        value: Any nesting of containers.
        replace: What to put in the place of an expression.

    Returns:
        The same nesting.
    """
    if isinstance(value, Expression):
        return replace(value)
    if isinstance(value, (list, tuple)):
        return type(value)(substitute(item, replace) for item in value)
    if isinstance(value, dict):
        return {key: substitute(item, replace) for key, item in value.items()}
    return value


def evaluate(expression: Expression, state: Mapping[str, Tensor], memo: dict[Any, Any] | None = None) -> Any:
    """Compute an expression from the parameters and buffers in ``state``.

    Half-precision tensors are widened to float32 first: derived weights are computed in float32 or wider.

    Args:
        expression: What to compute.
        state: Parameters and buffers by canonical name.
        memo: Values of shared sub-expressions; filled as they are computed.

    Returns:
        The value, usually a tensor.
    """
    memo = {} if memo is None else memo
    if expression in memo:
        return memo[expression]
    if isinstance(expression, StateTensor):
        value: Any = widen(state[expression.name])
    elif isinstance(expression, Constant):
        value = expression.value
    else:
        assert isinstance(expression, Apply)
        args = substitute(expression.args, lambda e: evaluate(e, state, memo))
        kwargs = substitute(dict(expression.kwargs), lambda e: evaluate(e, state, memo))
        value = expression.function(*args, **kwargs)
    memo[expression] = value
    return value


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function of vectors of one length and numbers that works element by element: calls of it may be joined.

    Args:
        function: The function.

    Returns:
        The same function.
    """
    ELEMENTWISE.add(function)
    return function


ELEMENTWISE: set[Callable[..., Any]] = set()


@dataclass(frozen=True, eq=False)
class Together:
    """Calls of one elementwise function on many small vectors, joined into one: a network has hundreds of batch norms.

    Attributes:
        function: The function.
        calls: The expressions.
        columns: For each argument the expressions that it stands for, call by call, or the number that all calls share.
    """

    function: Callable[..., Any]
    calls: tuple[Apply, ...]
    columns: tuple[Any, ...]

    def run(self, state: Mapping[str, Tensor], memo: dict[Any, Any]) -> None:
        """Evaluate all calls.

        Args:
            state: Parameters and buffers by canonical name.
            memo: Values of expressions, filled; and of columns, laid end to end.
        """
        args = []
        for column in self.columns:
            if isinstance(column, tuple) and column not in memo:
                pieces = [evaluate(expression, state, memo) for expression in column]
                if any(piece.dim() != 1 or piece.dtype != pieces[0].dtype for piece in pieces):
                    return  # left to `evaluate`
                memo[column] = torch.cat(pieces)
            args.append(memo[column] if isinstance(column, tuple) else column)
        column = next(column for column in self.columns if isinstance(column, tuple))
        joined = memo[self.calls] = self.function(*args)
        memo.update(zip(self.calls, joined.split([len(evaluate(e, state, memo)) for e in column]), strict=True))


def together(expressions: Sequence[Expression]) -> tuple[Together, ...]:
    """Find calls of elementwise functions that can be joined.

    Args:
        expressions: Expressions; those that are no elementwise function are left alone.

    Returns:
        The joint calls, in an order in which they can be evaluated.
    """
    chosen = [e for e in dict.fromkeys(expressions) if isinstance(e, Apply) and e.function in ELEMENTWISE and not e.kwargs]
    chosen = [e for e in chosen if any(isinstance(arg, Expression) for arg in e.args)]
    if not chosen:
        return ()
    inner = together([arg for e in chosen for arg in e.args if isinstance(arg, Apply)])
    done = {call for joint in inner for call in joint.calls}
    groups: dict[Any, list[Apply]] = {}
    for expression in chosen:
        if expression not in done:
            kinds = tuple(Expression if isinstance(arg, Expression) else arg for arg in expression.args)
            groups.setdefault((expression.function, kinds), []).append(expression)
    return inner + tuple(
        Together(
            function,
            tuple(calls),
            tuple(tuple(e.args[place] for e in calls) if kind is Expression else kind for place, kind in enumerate(kinds)),
        )
        for (function, kinds), calls in groups.items()
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half-precision, and any other dtype as it is."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def widen(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32 and all others as they are."""
    return tensor.to(wide(tensor.dtype))


@dataclass(frozen=True, eq=False)
class Leaf:
    """One weight tensor of the theory: a parameter, a derived weight or a constant.

    Attributes:
        expression: How its value follows from the parameters.
        shape: Shape of the value.
        score_name: The name under which `path_magnitude` reports it, None for constants.
        pull_back: When the value only moves elements of parameters around (a transpose, a slice), up to factors: the
            movement, by whose transpose its scores go back to the parameters themselves.
        scalar: The value, when it is one number known at capture time.
        requires: Names of the state tensors that the value depends on.
    """

    expression: Expression
    shape: tuple[int, ...]
    score_name: str | None
    pull_back: Expression | None = None
    scalar: float | None = None
    requires: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """A name for messages."""
        return self.score_name or ", ".join(sorted(self.requires)) or "a constant of the graph"


def scalar_leaf(value: float) -> Leaf:
    """Return a constant leaf that holds one number."""
    return Leaf(Constant(value), (), None, scalar=float(value))


@dataclass(frozen=True, eq=False)
class Term:
    """Edges from the neurons of ``source`` with weights from ``weight`` (None: every edge weighs 1)."""

    source: str
    edges: Edges
    weight: Leaf | None = None


@dataclass(frozen=True, eq=False)
class Start:
    """Biases: ``weight``, reshaped to ``view``, broadcasts over the node's shape."""

    weight: Leaf
    view: tuple[int, ...]


Bound: TypeAlias = "Start | float | None"
"""One end of a clamp: biases, a number that is no path (0), or none."""


@dataclass(frozen=True)
class Slopes:
    """y = plus·max(z, 0) + minus·min(z, 0), z the pre-activation; no slope exceeds 1 in magnitude."""

    plus: float
    minus: float


@dataclass(frozen=True)
class LearnedSlope:
    """PReLU: y = max(z, 0) + a·min(z, 0), where the node's second term carries a."""


@dataclass(frozen=True, eq=False)
class Clamp:
    """y = min(max(z, low), high), where z is what the node's only term brings."""

    low: Bound
    high: Bound


@dataclass(frozen=True)
class Extremum:
    """y is the largest (or smallest) of everything that the terms and starts bring, and of 0 when ``zero``."""

    largest: bool
    zero: bool = False


Nonlinearity: TypeAlias = "Slopes | LearnedSlope | Clamp | Extremum"
"""What a neuron does with its pre-activation; None for identity neurons. Path activations do not see it (SPEC §3)."""


@dataclass(frozen=True)
class Concat:
    """The terms of a node are pieces laid side by side along ``dim``; ``sizes`` are their lengths there."""

    dim: int
    sizes: tuple[int, ...]

    def shape(self, piece: int, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a piece.

        Args:
            piece: Which one.
            whole: Shape of the node.

        Returns:
            Its shape.
        """
        return (*whole[: self.dim], self.sizes[piece], *whole[self.dim + 1 :])


@dataclass(frozen=True)
class Origin:
    """Where a node comes from, for messages: module path, operator, source line."""

    module: str
    op: str
    where: str


@dataclass(frozen=True, eq=False)
class Node:
    """A layer of neurons.

    Attributes:
        name: Unique name.
        shape: Shape of the tensor of neurons, batch dimension (1) included.
        terms: Incoming edges.
        starts: Biases.
        concat: None when terms and starts add up; otherwise how the terms, one piece each, are laid side by side.
        origin: Module, operator and source line.
        nonlinearity: What the neurons do with their pre-activation; None for identity neurons.
        unit_dim: The dimension that counts channels or units when a scored weight of `unit_name` makes this node.
        unit_name: The module whose units these neurons are.
        axes: In a compact network, what each entry of the tensor stands for (`pathlift.edges.axis`); None: itself.
        dtype: The floating-point type in which the model itself computes this layer.
        blur: How far the model's own weights of constant edges may be off, in units of roundoff: positions between pixels
            are computed in floating point. 0 where constants are numbers of the model.
    """

    name: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    starts: tuple[Start, ...]
    origin: Origin
    concat: Concat | None = None
    nonlinearity: Nonlinearity | None = None
    unit_dim: int | None = None
    unit_name: str | None = None
    axes: tuple[Axis, ...] | None = None
    dtype: torch.dtype = torch.float32
    blur: float = 0.0

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape with one entry per neuron."""
        return self.shape if self.axes is None else tuple(axis.size for axis in self.axes)

    def multiplicity(self, device: torch.device) -> Tensor | None:
        """Return how many neurons each entry stands for, None for one each; see `pathlift.edges.axis.multiplicity`."""
        return None if self.axes is None else multiplicity(self.axes, device)

    def spread(self, tensor: Tensor) -> Tensor:
        """Return a compact tensor of this node with one entry per neuron."""
        return spread(self.axes, tensor)

    @cached_property
    def moves(self) -> bool:
        """Whether the layer only moves values of layers below about, and makes no new ones."""
        if self.concat is not None:
            return True
        return len(self.terms) == 1 and not self.starts and self.terms[0].weight is None and not self.terms[0].edges.fresh

    @property
    def kind(self) -> Literal["input", "hidden"]:
        """``input`` for the network's input neurons."""
        return "input" if self.origin.op == "input" else "hidden"


@dataclass(frozen=True, eq=False)
class Network:
    """A captured model: immutable graph, and the parameters it was captured with.

    The tensors in ``state`` share their storage with the model's own: after a training step the same Network gives the
    numbers of the new weights. Every public function of pathlift accepts a Network in place of ``(model, inputs)``.

    Attributes:
        nodes: Layers of neurons in topological order, inputs first.
        outputs: Names of the output nodes in the order in which the model returns them.
        leaves: Every weight tensor that a node uses.
        state: Parameters and buffers by canonical state-dict name.
        aliases: Further state-dict names of shared tensors, to the canonical one.
        parameters: Canonical names of trainable parameters, in the model's order.
        examples: Shapes (with batch 1) and dtypes of the inputs, to capture other models alike.
        device: Where the parameters live and the passes run.
        saved: The names in the model's state-dict; other buffers are not persistent.
        versions: The ``_metadata`` of the model's state-dict, which some modules ask for when they load one.
        views: Further state-dict names of tensors that lie in the memory of another: how they follow from it.
        baked: Buffers whose values are part of the graph (constant indices), and those values.
        left_off: Activations at the end of the model that are no part of the network (a softmax), with their modules.
        checked: Whether the graph was compared with the model on random inputs; not so on the meta device.
        program: A text that two modules share only when their forward pass is the same function of their parameters.
        until: Where the reading ended, when it was told to.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    state: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    parameters: tuple[str, ...]
    examples: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    device: torch.device
    saved: frozenset[str]
    versions: Mapping[str, Any]
    views: Mapping[str, Expression] = field(default_factory=dict)
    baked: Mapping[str, Tensor] = field(default_factory=dict)
    left_off: tuple[str, ...] = ()
    checked: bool = False
    program: str = ""
    until: str | None = None

    def __repr__(self) -> str:
        """Return a one-line summary."""
        sizes = f"{len(self.nodes)} nodes, {len(self.leaves)} weight tensors, {len(self.parameters)} parameters"
        left_off = f", without the last {' and '.join(self.left_off)}" if self.left_off else ""
        unchecked = "" if self.checked else ", not compared with the model: it has no values"
        return f"Network({sizes}{left_off}{unchecked})"

    @property
    def dtype(self) -> torch.dtype:
        """float64 when a parameter is float64, else float32: the precision the passes start with."""
        kinds = [self._kind(name) for name in self.state] or [dtype for _, dtype in self.examples]
        return torch.float64 if torch.float64 in kinds else torch.float32

    @property
    def names(self) -> list[str]:
        """Every name that the model has for a parameter or buffer."""
        return [*self.state, *self.aliases, *self.views]

    @public
    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters and buffers under every name that the model has for them.

        Args:
            state: By canonical name, complete.

        Returns:
            The same, with aliases and with views of them.
        """
        aliases = {alias: state[name] for alias, name in self.aliases.items()}
        return {**state, **aliases, **{name: evaluate(own, state) for name, own in self.views.items()}}

    @cached_property
    def compact(self) -> Network:
        """The same network for inputs that are constant over space, such as ones: see `pathlift.compact`."""
        from pathlift.compact import compacted  # built on this module

        return compacted(self)

    @cached_property
    def fan_in(self) -> Mapping[str, int]:
        """Number of summands of a neuron by node name, at most: see `pathlift.passes.rounding`."""
        from pathlift.passes.rounding import fan_in  # built on this module

        compact = any(node.axes is not None for node in self.nodes) or self.compact is self
        if compact:
            return fan_in(self)
        return {node.name: 1 for node in self.nodes} | dict(self.compact.fan_in)  # layers that repeat one have one summand

    @cached_property
    def _together(self) -> tuple[Together, ...]:
        return together([leaf.expression for leaf in self.leaves])

    @cached_property
    def node(self) -> Mapping[str, Node]:
        """The nodes by name."""
        return {node.name: node for node in self.nodes}

    def holding(self, state: Mapping[str, Tensor], device: torch.device) -> Network:
        """Return the same graph with other weights; what was worked out for the graph alone is kept.

        Args:
            state: Parameters and buffers by canonical name, complete, of the same shapes.
            device: Where they live.

        Returns:
            The network.
        """
        held = replace(self, state=state, device=device)
        compact = held if self.compact is self else replace(self.compact, state=state, device=device)
        for copy, own in ((held, self), (compact, self.compact)):
            copy.__dict__.update({name: getattr(own, name) for name in ("_together", "_memories", "node")})
        held.__dict__["compact"] = compact
        return held

    def memory(self, *key: object) -> Memory | None:
        """Return what earlier passes of a kind saw, so that the next need not wait for an accelerator at every layer.

        Args:
            key: What tells the kind apart from others of this network.

        Returns:
            The memory, changed by `pathlift.passes.recall`; None on the CPU, where nothing is gained.
        """
        return None if self.device.type == "cpu" else self._memories.setdefault(key, {})

    @cached_property
    def _memories(self) -> dict[tuple[object, ...], Memory]:
        return {}

    @property
    def host(self) -> torch.device:
        """Where other weights for this graph are put: its own device, or the CPU when that is the meta device."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    @public
    def kind_of(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter or buffer without reading it."""
        return self._kind(name)

    def _kind(self, name: str) -> torch.dtype:
        return self.state.dtype(name) if isinstance(self.state, LazyState) else self.state[name].dtype

    @public
    def values(self, state: Mapping[str, Tensor] | None = None) -> Mapping[Leaf, Tensor]:
        """Evaluate every leaf.

        Args:
            state: Parameters and buffers by canonical name; the network's own when None.

        Returns:
            Leaf to tensor. Plain parameters are not copied. Of a state that is not held in memory, each is evaluated when it
            is asked for.

        Raises:
            NumericalError: A tensor has no data (a model on the meta device).
        """
        state = self.state if state is None else state
        if isinstance(state, LazyState):
            return _Reading(self, state)
        memo: dict[Any, Any] = {}
        values: dict[Leaf, Tensor] = {}
        for joint in self._together:
            joint.run(state, memo)
        for leaf in self.leaves:
            if leaf.scalar is None:
                if isinstance(leaf.expression, StateTensor):
                    values[leaf] = state[leaf.expression.name]
                else:
                    values[leaf] = torch.as_tensor(evaluate(leaf.expression, state, memo))
                _refuse_hollow(leaf, values[leaf])
        return values


def _refuse_hollow(leaf: Leaf, value: Tensor) -> None:
    if value.is_meta:
        raise NumericalError(
            f"'{leaf.label}' is on the meta device and has no values. Load the weights first (model.to_empty(device=...) and "
            "load_state_dict), or read them from disk as they are needed (pathlift.stream)."
        )


class _Reading(Mapping[Leaf, Tensor]):
    """The values of leaves whose weights are read from disk: small ones are kept, the others evaluated when asked for."""

    def __init__(self, network: Network, state: LazyState) -> None:
        self.leaves = {leaf: None for leaf in network.leaves if leaf.scalar is None}
        self.state = state
        self.held: WeakValueDictionary[Leaf, Tensor] = WeakValueDictionary()
        self.memo: dict[Any, Any] = {}
        for joint in network._together:
            joint.run(state, self.memo)

    def __getitem__(self, leaf: Leaf) -> Tensor:
        """Evaluate a leaf, unless somebody still holds what it was."""
        value = self.held.get(leaf)
        if value is not None:
            return value
        if isinstance(leaf.expression, StateTensor):
            value = self.state[leaf.expression.name]
        elif leaf.expression in self.memo:
            value = self.memo[leaf.expression]
        else:
            value = torch.as_tensor(evaluate(leaf.expression, self.state, dict(self.memo)))
        _refuse_hollow(leaf, value)
        self.held[leaf] = value
        return value

    def __iter__(self) -> Iterator[Leaf]:
        """Iterate over leaves."""
        return iter(self.leaves)

    def __len__(self) -> int:
        """Return the number of leaves."""
        return len(self.leaves)
