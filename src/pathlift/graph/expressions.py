"""Expressions: tensors that follow from parameters and constants alone, such as a batch norm's scale γ/√(σ²+ε).

The graph holds expressions, not values, so that it serves any parameter vector θ' of the same architecture. An expression
answers for itself what is asked of it: its value (`evaluate`), its interval over a box of parameters, how far its
intermediate results reach, and of which products it is the sum. What a rule knows of a function beyond its values it declares
once, with the function, as a `Formula`; nobody else asks which function it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pathlift.graph.interval import Interval, IntervalArithmetic


class Expression:
    """A tensor that depends on parameters and constants only."""

    def peak(self, _: IntervalArithmetic) -> float | None:
        """Return what its intermediate results reach beyond its own values over a box; see `Formula.peak`."""
        return None

    def cancelled(self, _: IntervalArithmetic) -> Tensor | None:
        """Return what cancels in it over a box; see `Formula.cancelled`."""
        return None

    def summands(self) -> tuple[Summand, ...] | None:
        """Return the products that it is the sum of, None where none are declared; see `Formula.summands`."""
        return None

    def normalisation(self) -> Normalisation | None:
        """Return what it stores of the activations that it is added to; see `Formula.normalisation`."""
        return None


@dataclass(frozen=True, eq=False)
class Summand:
    """A product of expressions, up to a constant factor for each element.

    Attributes:
        factors: What is multiplied.
        buffer: A further factor, no parameter, which a rescaling has to change as well for the product to scale as it must:
            a running mean is the mean of an activation.
    """

    factors: tuple[Expression, ...]
    buffer: Expression | None = None


@dataclass(frozen=True, eq=False)
class Normalisation:
    """Stored statistics of an activation, and what is put in their place: (x − μ)·γ/√(σ²+ε) + β.

    Attributes:
        mean: μ, per channel.
        variance: σ².
        weight: γ, None for 1.
        bias: β, None for 0.
        epsilon: ε.
        scale: s = γ/√(σ²+ε).
    """

    mean: Expression
    variance: Expression
    weight: Expression | None
    bias: Expression | None
    epsilon: float
    scale: Expression


class Formula(ABC):
    """A function of which a rule knows more than its values.

    A formula without fields is its own name: `dataclass(frozen=True)` makes any two of a kind equal, copied and pickled
    ones too.

    Example:
        >>> @dataclass(frozen=True)
        ... class Difference(Formula):
        ...     def __call__(self, a, b):
        ...         return a - b
        ...
        ...     def interval(self, arithmetic, a, b):
        ...         return arithmetic.operator("sub", a, b)
        ...
        ...     def cancelled(self, a, b):
        ...         return torch.maximum(a.size, b.size)
        ...
        ...     def summands(self, a, b):
        ...         return Summand((a,)), Summand((b,))
        >>> weight = FunctionCall(Difference(), (StateTensor("a"), StateTensor("b")))
        >>> evaluate(weight, {"a": torch.tensor(3.0), "b": torch.tensor(1.0)})
        tensor(2.)
        >>> [summand.factors[0].name for summand in weight.summands()]
        ['a', 'b']
    """

    elementwise: ClassVar[bool] = False
    """Whether it works element by element on vectors of one length and numbers, so that calls of it may be joined."""

    @abstractmethod
    def __call__(self, *args: Any) -> Tensor:
        """Return the value.

        Args:
            args: Tensors, numbers and None.

        Returns:
            The value, float64 or as wide as its arguments.
        """

    @abstractmethod
    def interval(self, arithmetic: IntervalArithmetic, *args: Any) -> Interval:
        """Enclose the exact values and, where ``arithmetic`` says so, what the model gets.

        Args:
            arithmetic: The arithmetic of intervals.
            args: As for a call, with intervals in the place of real tensors.

        Returns:
            The interval.

        Raises:
            NoIntervalError: There is none over so wide a box.
        """

    def peak(self, *_: Any) -> float | None:
        """Return a bound of the model's intermediate results, which may leave the range of its type although values do not.

        Args:
            _: As for a call, with intervals in the place of expressions.

        Returns:
            The bound, None where intermediate results are no larger than the value.
        """
        return None

    def cancelled(self, *_: Any) -> Tensor | None:
        """Return the magnitude of summands that may cancel: the model rounds them all the same.

        Args:
            _: As for `peak`.

        Returns:
            A tensor of the shape of the value; None for what is no sum.
        """
        return None

    def normalisation(self, *_: Any) -> Normalisation | None:
        """Return the stored statistics of the activations that the value is added to.

        Args:
            _: Expressions of the arguments.

        Returns:
            The statistics; None for what stores none.
        """
        return None

    def summands(self, *_: Any) -> tuple[Summand, ...] | None:
        """Write the value as a sum of products, constants left out.

        Args:
            _: As for a call, with expressions in the place of tensors.

        Returns:
            The products; None when it is nothing of the kind.
        """
        return None


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

    def peak(self, arithmetic: IntervalArithmetic) -> float | None:
        """See `Formula.peak`."""
        return self.function.peak(*self._enclosed(arithmetic)) if isinstance(self.function, Formula) else None

    def cancelled(self, arithmetic: IntervalArithmetic) -> Tensor | None:
        """See `Formula.cancelled`."""
        return self.function.cancelled(*self._enclosed(arithmetic)) if isinstance(self.function, Formula) else None

    def summands(self) -> tuple[Summand, ...] | None:
        """See `Formula.summands`."""
        return self.function.summands(*self.args) if isinstance(self.function, Formula) else None

    def normalisation(self) -> Normalisation | None:
        """See `Formula.normalisation`."""
        return self.function.normalisation(*self.args) if isinstance(self.function, Formula) else None

    def _enclosed(self, arithmetic: IntervalArithmetic) -> list[Any]:
        return [arithmetic.enclosed(arg) if isinstance(arg, Expression) else arg for arg in self.args]


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
        args, sizes = list[Any](), list[int]()
        for column in self.columns:
            if isinstance(column, tuple) and column not in memo:
                pieces = [evaluate(expression, state, memo) for expression in column]
                if any(piece.dim() != 1 or piece.dtype != pieces[0].dtype for piece in pieces):
                    return  # left to `evaluate`
                memo[column] = torch.cat(pieces)
            args.append(memo[column] if isinstance(column, tuple) else column)
            if isinstance(column, tuple) and not sizes:
                sizes = [len(memo[expression]) for expression in column]
        joined = memo[self.calls] = self.function(*args)
        memo.update(zip(self.calls, joined.split(sizes), strict=True))


def together(expressions: Sequence[Expression]) -> tuple[Together, ...]:
    """Find calls of elementwise functions that can be joined.

    Args:
        expressions: Expressions; those that are no elementwise function are left alone.

    Returns:
        The joint calls, in an order in which they can be evaluated.
    """
    calls = [e for e in dict.fromkeys(expressions) if isinstance(e, FunctionCall) and not e.kwargs]
    chosen = [e for e in calls if isinstance(e.function, Formula) and e.function.elementwise]
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
            tuple(tuple(e.args[index] for e in calls) if kind is Expression else kind for index, kind in enumerate(kinds)),
        )
        for (function, kinds), calls in groups.items()
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half-precision, and any other dtype as it is."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def widen(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32 and all others as they are."""
    return tensor.to(wide(tensor.dtype))
