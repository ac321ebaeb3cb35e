"""Nodes that depend on parameters and constants only: how each is computed from them, as an expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pathlift.graph.expressions import Expression, FunctionCall, StateTensor
from pathlift.rules import MOVEMENTS, Activation, Refusal, Static
from pathlift.rules.replay import Operator

LIKE_ANOTHER = {"type_as", "to", "expand_as", "view_as", "reshape_as"}
"""What brings a constant to the type or shape of an activation."""

SCALINGS = {"neg", "mul", "div"}
UNKNOWN_ADVICE = "If it is affine, piecewise linear or data movement, please report it: docs/support.md lists what is covered."


class Statics:
    """The values of a graph's nodes so far, and the expressions of those that are static.

    Attributes:
        values: Node to what rules see of it.
    """

    def __init__(self, parameters: frozenset[str], device: torch.device) -> None:
        """Start with no value.

        Args:
            parameters: Names of the parameters.
            device: Where the model runs.
        """
        self.values: dict[fx.Node, Any] = {}
        self.parameters = parameters
        self.device = device
        self.sources: dict[Expression, frozenset[str]] = {}

    def resolve(self, value: Any) -> Any:
        """Return an argument of a call with values in the place of nodes."""
        return fx.node.map_arg(value, lambda node: self.values[node])

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Return the arguments of a call by name, defaults included."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return {str(index): self.resolve(value) for index, value in enumerate(node.args)}
        args: dict[str, Any] = {}
        for index, argument in enumerate(schema.arguments):
            if index < len(node.args):
                args[argument.name] = self.resolve(node.args[index])
            elif argument.name in node.kwargs:
                args[argument.name] = self.resolve(node.kwargs[argument.name])
            elif argument.has_default_value():
                args[argument.name] = argument.default_value
        return args

    def make(
        self,
        expression: Expression,
        fake: Any,
        moves: Expression | None,
        sources: frozenset[str] | None = None,
        elementwise: frozenset[str] = frozenset(),
    ) -> Static:
        """Return a static value; ``sources`` are the parameters and buffers that it needs, looked up when not given."""
        if sources is not None:
            self.sources[expression] = sources
        if isinstance(fake, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
            fake = torch.empty((), device="meta")
        return Static(expression, fake, moves, elementwise)

    def requires(self, expression: Expression) -> frozenset[str]:
        """Return the names of the parameters and buffers that an expression needs."""
        if expression in self.sources:
            return self.sources[expression]
        if isinstance(expression, StateTensor):
            names = frozenset({expression.name})
        elif isinstance(expression, FunctionCall):
            inner = flatten([expression.args, *expression.kwargs.values()])
            names = frozenset().union(*(self.requires(e) for e in inner if isinstance(e, Expression)))
        else:
            names = frozenset()
        self.sources[expression] = names
        return names

    def fold(self, node: fx.Node, name: str) -> Any:
        """Turn a call that does not depend on the input into an expression."""
        tags = getattr(node.target, "tags", ())
        args = self.arguments(node)
        if torch.Tag.nondeterministic_seeded in tags and args.get("train", True) is not False:
            raise Refusal("it draws random numbers.", "Make the model deterministic in eval mode.")
        result = node.meta.get("val")
        if isinstance(result, Tensor) and any(not isinstance(size, int) for size in result.shape):
            raise Refusal("a size depends on the values of a tensor.", "Use fixed sizes.")
        statics = [value for value in flatten(args.values()) if isinstance(value, Static)]
        function = as_number if name == "item" and isinstance(result, (float, torch.SymFloat)) else _function(node)
        expression = FunctionCall(
            function,
            tuple(_to_expression(self.resolve(value)) for value in node.args),
            {key: _to_expression(self.resolve(value)) for key, value in node.kwargs.items()},
            result.dtype if isinstance(result, Tensor) and result.dtype.is_floating_point else None,
        )
        sources: frozenset[str] = frozenset().union(*(self.requires(static.expression) for static in statics))
        return self.make(
            expression, result, self._moves(node, name, statics, expression), sources, self._elementwise(node, statics)
        )

    def from_shape(self, node: fx.Node, name: str) -> Static:
        """Read a call that looks at the shape, type or device of an activation only: zeros in its place."""
        statics = [value for value in flatten(self.arguments(node).values()) if isinstance(value, Static)]

        def written(*, moves: bool) -> FunctionCall:
            args, kwargs = (self._without_data(self.resolve(given), moves=moves) for given in (node.args, dict(node.kwargs)))
            return FunctionCall(_function(node), args, kwargs)

        moved = name in LIKE_ANOTHER and all(static.moves is not None for static in statics)
        rounded = not node.meta["val"].dtype.is_floating_point and self._requires_parameters(statics)
        return self.make(written(moves=False), node.meta["val"], written(moves=True) if moved and not rounded else None)

    @staticmethod
    def _elementwise(node: fx.Node, statics: list[Static]) -> frozenset[str]:
        """See `Static.elementwise`."""
        result = node.meta.get("val")
        if not isinstance(result, Tensor) or torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return frozenset()
        return frozenset().union(*(static.elementwise for static in statics if static.shape == tuple(result.shape)))

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
        if name in SCALINGS and not rounds and len(statics) == 1 and isinstance(self.resolve(node.args[0]), Static):
            return statics[0].moves
        if name not in MOVEMENTS and name != "embedding":
            return None
        return FunctionCall(
            _function(node),
            tuple(_to_expression(self.resolve(value), moves=True) for value in node.args),
            {key: _to_expression(self.resolve(value), moves=True) for key, value in node.kwargs.items()},
        )

    def _requires_parameters(self, statics: list[Static]) -> bool:
        return any(self.requires(static.expression) & self.parameters for static in statics)

    def _without_data(self, value: Any, *, moves: bool) -> Any:
        """Return arguments as expressions, activations as zeros."""
        if isinstance(value, Activation):
            return FunctionCall(torch.zeros, (value.shape,), {"dtype": value.dtype, "device": self.device})
        if isinstance(value, (list, tuple)):
            return type(value)(self._without_data(item, moves=moves) for item in value)
        if isinstance(value, dict):
            return {key: self._without_data(item, moves=moves) for key, item in value.items()}
        return _to_expression(value, moves=moves)


def as_number(tensor: Tensor) -> Tensor:
    """Return the only element of a tensor, still as a tensor: what ``.item()`` gives to arithmetic that weights are made of."""
    return tensor.reshape(())


def _to_expression(value: Any, *, moves: bool = False) -> Any:
    if isinstance(value, Static):
        return value.moves if moves else value.expression
    if isinstance(value, (list, tuple)):
        return type(value)(_to_expression(item, moves=moves) for item in value)
    return value


def flatten(values: Any) -> list[Any]:
    """Return the items of nested lists and tuples."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            flat.extend(flatten(value))
        else:
            flat.append(value)
    return flat


def _function(node: fx.Node) -> Callable[..., Any]:
    """Return what a node calls, as a value that can be pickled and writes to none of its arguments."""
    assert callable(node.target)
    if getattr(node.target, "_schema", None) is None:
        return node.target
    try:
        return Operator.of(node.target)
    except LookupError as error:
        raise Refusal(f"{error}.", UNKNOWN_ADVICE) from error
