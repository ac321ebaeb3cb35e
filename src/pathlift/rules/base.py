"""What a rule is: it turns one call of an operator into layers of neurons, or refuses it.

A rule is a function registered for ATen operator names. It receives a `Call` (arguments by their schema names, already
told apart into activations and expressions of parameters) and returns what `Call.layer` makes: edges with weights,
biases. Everything else (norms, metrics, scores, bounds) is derived from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol, TypeAlias

import torch
from torch import Tensor

from pathlift.edges import Edges, Identity, Move
from pathlift.edges.movement import Spatial
from pathlift.errors import Problem
from pathlift.graph.expressions import Constant, Expression, FunctionCall
from pathlift.graph.layers import Bias, Concat, Connection, Nonlinearity, WeightTensor, scalar_weight
from pathlift.rules.replay import Operator, replayed


@dataclass(frozen=True)
class Activation:
    """A tensor that depends on the input: the layer of that name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Static:
    """A tensor (or number) that depends on parameters and constants only.

    Attributes:
        expression: How it is computed.
        fake: The exporter's tensor without data: shape and dtype.
        moves: When each element is one element of a parameter or constant, up to a factor: the expression that only moves
            them there (a path's share does not see the factor). None otherwise.
        elementwise: Parameters each of whose elements makes the element at its own position.
    """

    expression: Expression
    fake: Tensor
    moves: Expression | None = None
    elementwise: frozenset[str] = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.fake.shape)


@dataclass(frozen=True)
class Forbidden:
    """A result that no supported operator may read, such as the indices of a maximum."""

    reason: str
    advice: str


@dataclass(frozen=True)
class Walled(Forbidden):
    """An activation with −inf in constant places: a maximum alone may read it, for which those places hold no neurons.

    Attributes:
        inside: The activation with zeros in those places, which no edge leads to.
        wall: Where −inf stands: boolean tensor of the same shape, on the CPU.
    """

    inside: Activation
    wall: Tensor


Value: TypeAlias = Any
"""An argument: an `Activation`, a `Static`, a `Forbidden`, a Python number, None, or a list of such."""


class Refusal(Exception):  # noqa: N818 - a signal to the lowering, never seen by the user
    """Raised inside a rule: this call lies outside the theory."""

    def __init__(self, reason: str, advice: str) -> None:
        """Keep both sentences.

        Args:
            reason: Why.
            advice: What to do.
        """
        super().__init__(reason)
        self.reason = reason
        self.advice = advice


@dataclass(frozen=True)
class Draft:
    """What a rule returns: one layer of neurons before it has a name."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    connections: tuple[Connection, ...]
    biases: tuple[Bias, ...]
    concat: Concat | None = None
    unit_dim: int | None = None
    nonlinearity: Nonlinearity | None = None
    blur: float = 0.0


class Builder(Protocol):
    """The part of the lowering that rules may use."""

    def weight(self, static: Static, name: str | None, like: Static | None = None) -> WeightTensor:
        """Return the weight tensor of a parameter expression; see `Call.weight`."""

    def add(self, layer: Draft) -> Activation:
        """Append a layer in between."""

    def bake(self, static: Static) -> Any:
        """Return the value that an expression has now, as a fixed part of the graph (indices)."""


@dataclass(frozen=True)
class Call:
    """One call of an operator: its arguments by schema name, with activations and parameter expressions told apart."""

    name: str
    args: dict[str, Value]
    result: Any
    builder: Builder
    target: Any

    # ---- reading arguments

    def refuse(self, reason: str, advice: str) -> NoReturn:
        """Leave the theory.

        Args:
            reason: Why this call lies outside.
            advice: What the user can do.

        Raises:
            Refusal: Always.
        """
        raise Refusal(reason, advice)

    def source(self, key: str) -> Activation:
        """Return the argument that must be an activation.

        Args:
            key: Schema name.

        Returns:
            The activation.
        """
        value = self.args[key]
        if isinstance(value, Activation):
            return value
        return self.refuse(
            f"its argument '{key}' does not depend on the input, while another does where only weights may stand.",
            "Feed the activation as the operator's input.",
        )

    def static(self, key: str) -> Static | None:
        """Return an argument that must not depend on the input, None when it is absent.

        Args:
            key: Schema name.

        Returns:
            The parameter expression.
        """
        value = self.args.get(key)
        if value is None or isinstance(value, Static):
            return value
        if isinstance(value, Activation):
            return self.refuse(
                f"its argument '{key}' depends on the input: the operator multiplies or divides two activations.",
                "Path-liftings need every product to have a parameter or a constant on one side.",
            )
        return self.number(value)

    def number(self, value: complex | bool) -> Static:
        """Return a Python number as a parameter expression.

        Args:
            value: The number.

        Returns:
            A constant.
        """
        assert not isinstance(value, complex)
        return Static(Constant(value), torch.empty((), device="meta"))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (only) result; a shape that follows from the values of a mask leaves the theory."""
        shape = tuple(self.result.shape)
        if all(type(size) is int for size in shape):
            return shape
        return self.refuse(
            "the shape of its result follows from the values of a tensor, such as the number of places in a mask.",
            "Use a list of indices in the place of the mask, with a fixed length.",
        )

    # ---- building layers

    def weight(self, static: Static, name: str | None = None, like: Static | None = None) -> WeightTensor:
        """Return the weight tensor for a parameter expression.

        Args:
            static: The expression.
            name: The role it plays in its module (``weight``, ``bias``); used to name derived weights.
            like: A derived weight stands for this argument and goes by its name, if it is a parameter.

        Returns:
            The weight tensor.
        """
        return self.builder.weight(in_floating_point(static), name, like)

    def bias(
        self,
        static: Static | None,
        view: Sequence[int] | None = None,
        name: str | None = None,
        like: Static | None = None,
    ) -> tuple[Bias, ...]:
        """Return the biases of a layer, none for None or the number 0.

        Args:
            static: The expression.
            view: Shape under which it broadcasts over the layer; its own shape when None.
            name: Its role in its module.
            like: See `weight`.

        Returns:
            Zero or one start.
        """
        if static is None:
            return ()
        weight = self.weight(static, name, like)
        if weight.scalar == 0.0:
            return ()
        return (Bias(weight, tuple(weight.shape if view is None else view)),)

    def layer(
        self,
        *connections: Connection,
        biases: tuple[Bias, ...] = (),
        shape: Sequence[int] | None = None,
        concat: Concat | None = None,
        unit_dim: int | None = None,
        nonlinearity: Nonlinearity | None = None,
    ) -> Draft:
        """Describe the result of the call.

        Args:
            connections: Incoming edges.
            biases: Biases.
            shape: Shape of the layer; that of the call's result when None.
            concat: See `Layer.concat`.
            unit_dim: See `Layer.unit_dim`.
            nonlinearity: See `Layer.nonlinearity`.

        Returns:
            The layer.
        """
        first = self.result[0] if isinstance(self.result, (list, tuple)) else self.result
        dtype = first.dtype if isinstance(first, Tensor) else torch.float32
        shape = self.shape if shape is None else tuple(shape)
        return Draft(tuple(shape), dtype, connections, biases, concat, unit_dim, nonlinearity)

    def moved(
        self,
        source: Activation,
        function: Callable[[Tensor], Tensor],
        shape: Sequence[int] | None = None,
        spatial: Spatial = None,
    ) -> Draft:
        """Return a layer that only moves the neurons of ``source``.

        Args:
            source: The neurons below.
            function: The movement.
            shape: Shape of the result.
            spatial: How the movement treats space.

        Returns:
            The layer.
        """
        return self.layer(Connection(source.name, Move(function, spatial)), shape=shape)

    def operand(self, key: str, coefficient: float = 1.0) -> tuple[tuple[Connection, ...], tuple[Bias, ...]]:
        """Read one summand of a broadcasting sum: edges for an activation, biases for a parameter or constant.

        Args:
            key: Schema name of the argument.
            coefficient: Factor of this summand.

        Returns:
            Connections and biases.

        Raises:
            Refusal: The argument may not be read.
        """
        value = self.args[key]
        if isinstance(value, Forbidden):
            raise Refusal(value.reason, value.advice)
        if isinstance(value, Activation):
            shape = self.shape
            edges: Edges = Identity() if value.shape == shape else expansion(shape)
            weight = None if coefficient == 1.0 else scalar_weight(coefficient)
            return (Connection(value.name, edges, weight),), ()
        static = self.static(key)
        if static is None:
            return (), ()
        if coefficient != 1.0:
            number = isinstance(static.expression, Constant) and not isinstance(static.expression.value, Tensor)
            if number and isinstance(static.expression, Constant):
                static = self.number(static.expression.value * coefficient)
            else:
                static = in_floating_point(static)
                static = replace(static, expression=FunctionCall(torch.mul, (static.expression, coefficient)))
        return (), self.bias(static)

    def summed(self, *summands: tuple[str, float], nonlinearity: Nonlinearity | None = None) -> Draft:
        """Return the broadcasting sum (or, for maxima, the joint antecedents) of several arguments.

        Args:
            summands: Schema name and coefficient of each.
            nonlinearity: See `Layer.nonlinearity`.

        Returns:
            The layer.
        """
        operands = [self.operand(key, coefficient) for key, coefficient in summands]
        connections = tuple(connection for edges, _ in operands for connection in edges)
        biases = tuple(start for _, starts in operands for start in starts)
        return self.layer(*connections, biases=biases, nonlinearity=nonlinearity)

    def as_activation(self, value: Value) -> Activation:
        """Return a value as a layer of neurons: constants become neurons with a bias and no edges.

        Args:
            value: An activation or a parameter expression.

        Returns:
            The activation.

        Raises:
            Refusal: The value may not be read.
        """
        if isinstance(value, Forbidden):
            raise Refusal(value.reason, value.advice)
        if isinstance(value, Activation):
            return value
        assert isinstance(value, Static)
        start = Bias(self.weight(value), tuple(value.shape))  # also of the number 0: a layer has something to be made of
        return self.builder.add(Draft(value.shape, value.fake.dtype, (), (start,)))


def expansion(shape: Sequence[int]) -> Move:
    """Return the edges of a broadcast to a shape."""
    return Move(replayed("aten::expand", size=tuple(shape)), "view")


def spatial_tuple(value: Any, count: int) -> tuple[int, ...]:
    """Return an argument of a convolution or a pooling with one number per spatial dimension.

    Args:
        value: An integer or a list of one or ``count`` integers.
        count: Number of spatial dimensions.

    Returns:
        The numbers.
    """
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


def in_floating_point(static: Static) -> Static:
    """Return an expression whose arithmetic is that of real numbers: masks and integers become float64."""
    if not isinstance(static.fake, Tensor) or static.fake.dtype.is_floating_point:
        return static
    wide = FunctionCall(Operator("aten::to.dtype"), (static.expression, torch.float64))
    return replace(static, expression=wide, fake=static.fake.to(torch.float64))


Rule: TypeAlias = Callable[[Call], "Draft | Forbidden | tuple[Draft | Forbidden, ...]"]
RULES: dict[str, Rule] = {}
REASONS: dict[str, tuple[str, str]] = {}
MOVEMENTS: set[str] = set()
READS_WALLS: set[str] = set()
"""Operators whose rules know what to do with a `Walled` argument."""


def rule(*names: str, walls: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operators.

    Args:
        names: Operator names without namespace and overload, such as ``conv2d``.
        walls: The rule reads `Walled` arguments; for others such an argument is refused.

    Returns:
        The decorator.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        READS_WALLS.update(names if walls else ())
        return function

    return register


def outside(reason: str, advice: str, names: str) -> None:
    """Register operators that are known to lie outside the theory, with their own sentence.

    Args:
        reason: Why.
        advice: What to do instead.
        names: Operator names, separated by spaces.
    """
    for name in names.split():
        assert name not in RULES and name not in REASONS, name
        REASONS[name] = (reason, advice)


def problem(module: str, op: str, where: str, refusal: Refusal) -> Problem:
    """Turn a rule's refusal into the user's problem.

    Args:
        module: Module path.
        op: Operator.
        where: Source line.
        refusal: What the rule raised.

    Returns:
        The problem.
    """
    reason = refusal.reason[:1].upper() + refusal.reason[1:]
    return Problem(module, op, where, reason, refusal.advice)
