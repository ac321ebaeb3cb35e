"""Expressions: tensors that follow from parameters and constants alone, such as a batch norm's scale γ/√(σ²+ε).

The graph holds expressions, not values, so that it serves any parameter vector θ' of the same architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
class FunctionCall(Expression):
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
        assert isinstance(expression, FunctionCall)
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
    calls: tuple[FunctionCall, ...]
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
    chosen = [
        e for e in dict.fromkeys(expressions) if isinstance(e, FunctionCall) and e.function in ELEMENTWISE and not e.kwargs
    ]
    chosen = [e for e in chosen if any(isinstance(arg, Expression) for arg in e.args)]
    if not chosen:
        return ()
    inner = together([arg for e in chosen for arg in e.args if isinstance(arg, FunctionCall)])
    done = {call for joint in inner for call in joint.calls}
    groups: dict[Any, list[FunctionCall]] = {}
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
