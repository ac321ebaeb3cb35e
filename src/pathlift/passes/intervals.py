"""Interval arithmetic for weights that are computed from parameters: what an expression can be over a box (mathematics §5).

Every operation is rounded outwards. With ``arithmetic`` the interval also holds what the model itself gets, which computes
the expression in its own floating-point types: each operation may then be off by a relative unit of roundoff, each sum of
n numbers by n of them in any order, and anything that underflows by the smallest number of the type. A quotient whose
divisor may be 0 is unbounded, and so is what may leave the range of its type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pathlift.errors import Problem, UnsupportedModelError
from pathlift.graph.expressions import Constant, Expression, Formula, FunctionCall, StateTensor, evaluate, substitute
from pathlift.graph.interval import Interval, NoIntervalError, point
from pathlift.graph.layers import WeightTensor
from pathlift.passes.rounding import DOUBLE, FORMATS, Format
from pathlift.rules import MOVEMENTS
from pathlift.rules.replay import Operator


def unrounded(expression: Expression, state: Mapping[str, Tensor]) -> bool:
    """Tell whether an expression is evaluated without a rounding, as movements, choices and products with a mask are.

    Args:
        expression: The expression.
        state: Parameters and buffers by canonical name.

    Returns:
        False also where that is not known.
    """
    if not isinstance(expression, FunctionCall):
        return True
    inner = [part for part in _flat([expression.args, expression.kwargs]) if isinstance(part, Expression)]
    if not all(unrounded(part, state) for part in inner):
        return False
    name = _name(expression.function)
    if name in ("mul", "multiply"):  # a product of two numbers of float32 is a number of float64
        first, second = (
            torch.as_tensor(factor).double() for factor in substitute(expression.args, partial(evaluate, state=state))
        )
        return torch.equal(evaluate(expression, state).double(), first * second)
    if name in CONVERSIONS:
        return torch.equal(evaluate(expression, state).double(), evaluate(inner[0], state).double())
    return name in MOVEMENTS or name in MOVES or name in EXACT


CONVERSIONS = ("to", "_to_copy", "type_as")


class Ranges:
    """The intervals of expressions over a box of parameters and buffers."""

    def __init__(self, low: Mapping[str, Tensor], high: Mapping[str, Tensor], *, arithmetic: bool) -> None:
        """Describe the box.

        Args:
            low: Smallest values by canonical name.
            high: Largest values; the same tensor where nothing varies.
            arithmetic: Hold what the model gets in its own arithmetic as well.
        """
        self.low, self.high, self.arithmetic = low, high, arithmetic
        self._memo: dict[Expression, Any] = {}
        self._dtype: torch.dtype | None = None

    @property
    def _format(self) -> Format | None:
        """The type in which the model computes the operator at hand, where that is asked for."""
        return None if self._dtype is None else FORMATS.get(self._dtype)

    def of(self, weight: WeightTensor) -> Interval:
        """Return the interval of a weight.

        Args:
            weight: The weight, which is no number of the graph.

        Returns:
            Its interval, of the shape of the weight.

        Raises:
            UnsupportedModelError: It is computed by an operator that has no interval here.
        """
        try:
            return self.enclosed(weight.expression)
        except NoIntervalError as unknown:
            names = ", ".join(sorted(weight.requires)) or "constants"
            reason = f"'{weight.label}' is computed from {names} by '{unknown}', for which pathlift has no interval arithmetic."
            advice = "Make it a plain parameter first (torch.nn.utils.parametrize.remove_parametrizations, prune.remove)."
            raise UnsupportedModelError((Problem(weight.label.rpartition(".")[0], "tolerance", "", reason, advice),)) from None

    def enclosed(self, expression: Expression) -> Interval:
        """Return the interval of an expression over the box.

        Args:
            expression: The expression.

        Returns:
            Its interval.

        Raises:
            NoIntervalError: It is computed by an operator that has no interval here.
        """
        return self.interval(self.value(expression))

    def value(self, expression: Expression) -> Any:
        """Return what an expression can be: an interval for real tensors, the value itself for indices, masks and sizes."""
        if expression not in self._memo:
            self._memo[expression] = self._computed(expression)
        return self._memo[expression]

    def _computed(self, expression: Expression) -> Any:
        if isinstance(expression, StateTensor):
            low = self.low[expression.name]
            high = low if self.high is self.low else self.high[expression.name]
            if not low.dtype.is_floating_point:
                return low
            return point(low) if low is high else Interval(low.detach().double(), high.detach().double())
        if isinstance(expression, Constant):
            value = expression.value
            return point(value) if isinstance(value, Tensor) and value.dtype.is_floating_point else value
        assert isinstance(expression, FunctionCall)
        if self._constant(expression):
            return self._held(evaluate(expression, {}))
        args = substitute(expression.args, self.value)
        kwargs = substitute(dict(expression.kwargs), self.value)
        given = [value for value in _flat([args, kwargs]) if isinstance(value, Interval)]
        name = _name(expression.function)
        if not given or (name in EXACT and all(value.exact for value in given)):
            # PyTorch rounds a number to the type of what it is compared with
            args, kwargs = (substitute(part, self._as_computed) for part in (expression.args, dict(expression.kwargs)))
            return self._held(expression.function(*args, **kwargs))
        converts = name in CONVERSIONS
        dtype = next((arg for arg in _flat([args, kwargs]) if isinstance(arg, torch.dtype)), expression.dtype)
        self._dtype = dtype if self.arithmetic or converts else None
        if converts:
            if dtype is not None and self._format is None:
                raise NoIntervalError(f"a conversion to {dtype}")
            value = self.interval(args[0])
            return value if self._format is DOUBLE else self.rounded(value)
        if name in MOVEMENTS or name in MOVES:
            return self._moved(expression.function, args, kwargs)
        if isinstance(expression.function, Formula):
            return expression.function.interval(self, *args, **kwargs)
        return self.operator(name, *args, **kwargs)

    def operator(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return the interval of an operator.

        Args:
            name: Such as ``mul``.
            args: As in its schema, with intervals in the place of real tensors.
            kwargs: Those that are named.

        Returns:
            Its interval, or several.

        Raises:
            NoIntervalError: It has none.
        """
        if name not in OPERATIONS:
            raise NoIntervalError(name)
        return OPERATIONS[name](self, *args, **kwargs)

    @staticmethod
    def _held(value: Any) -> Any:
        """Keep a value that was computed exactly, or from constants alone."""
        if isinstance(value, (list, tuple)):
            return type(value)(Ranges._held(item) for item in value)
        return point(value) if isinstance(value, Tensor) and value.dtype.is_floating_point else value

    def _as_computed(self, expression: Expression) -> Any:
        """Return a value that is known exactly in the type that the model has it in."""
        value = self.value(expression)
        if not isinstance(value, Interval):
            return value
        if isinstance(expression, StateTensor):
            return self.low[expression.name].detach()
        kind = expression.value.dtype if isinstance(expression, Constant) else getattr(expression, "dtype", None)
        return value.low if kind is None else value.low.to(kind)

    def _constant(self, expression: Any) -> bool:
        """Whether an expression reads no parameter and no buffer: PyTorch computes it as the model does."""
        if isinstance(expression, FunctionCall):
            return all(self._constant(arg) for arg in _flat([expression.args, expression.kwargs]))
        return not isinstance(expression, StateTensor)

    def _moved(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Move both ends alike; a conversion to another type rounds."""
        given = [value for value in _flat([args, kwargs]) if isinstance(value, Interval)]
        if all(value.exact for value in given):
            return self._held(function(*_points(args), **_points(kwargs)))
        low, high = (function(*_ends(args, end), **_ends(kwargs, end)) for end in ("low", "high"))
        if isinstance(low, Tensor):
            return Interval(low, high)
        return tuple(Interval(*pair) for pair in zip(low, high, strict=True))

    # ---- the pieces that operations are made of

    def interval(self, value: Any) -> Interval:
        """Return an argument as an interval; that of a number holds what it is rounded to in the type of the operator."""
        if isinstance(value, (int, float)):
            number = torch.tensor(value, dtype=torch.float64)
            rounded = number if self._format is None else number.to(self._dtype).double()
            return point(number) if bool(rounded == number) else Interval(*torch.stack([number, rounded]).sort().values)
        return value if isinstance(value, Interval) else point(torch.as_tensor(value))

    def rounded(
        self, value: Interval, *, count: float = 1.0, sizes: Tensor | None = None, positive: Tensor | None = None
    ) -> Interval:
        """Widen by what ``count`` roundings can do, here and in the model, to a sum whose summands add up to ``sizes``.

        Args:
            value: What float64 gave.
            count: Number of roundings.
            sizes: Of what they are relative errors; the value itself when None.
            positive: Where the exact value is not negative, which no rounding changes.

        Returns:
            The wider interval, unbounded where it may leave the range.
        """
        sizes = value.size if sizes is None else sizes
        off = sizes * (2 * count * DOUBLE.unit) + count * DOUBLE.least
        if self._format is not None:
            off = off * 2 + sizes * (count * self._format.unit * 1.01) + count * self._format.least
        low, high = value.low - off, value.high + off
        if positive is not None:
            low = torch.where(positive, low.clamp(min=0.0), low)
        lost = low.isnan() | high.isnan()
        if self._format is not None:
            lost = lost | ~(sizes + off < self._format.largest)
        return Interval(torch.where(lost, -math.inf, low), torch.where(lost, math.inf, high))


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, Operator):
        return function.name.partition("::")[2].partition(".")[0]  # never that of an operator in place: those are read as plain
    return str(getattr(function, "__name__", type(function).__name__))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, (list, tuple)) else [value]


def _ends(value: Any, end: str) -> Any:
    if isinstance(value, Interval):
        return getattr(value, end)
    if isinstance(value, (list, tuple)):
        return type(value)(_ends(item, end) for item in value)
    return {key: _ends(item, end) for key, item in value.items()} if isinstance(value, dict) else value


def _points(value: Any) -> Any:
    return _ends(value, "low")


MOVES = {"taken", "strided_part", "on_device", "getitem", "as_number", "item"}
"""Movements that are functions of this package or of Python."""

EXACT = {
    "_indicator", "_masked", "where", "eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "sign",
    "floor", "ceil", "round", "trunc", "zeros", "zeros_like", "ones_like", "full_like", "new_zeros", "isfinite", "argmax",
    "bool", "masked_fill", "heaviside", "copysign",
}  # fmt: skip
"""Operators that round nothing: of values that are known exactly they give a value that is."""


# ---- operations


def _monotone(function: Callable[[Tensor], Tensor], roundings: float = 4.0) -> Callable[..., Interval]:
    """An increasing function of one argument, which is accurate to a few roundings."""

    def operation(ranges: Ranges, x: Any, *_: Any) -> Interval:
        x = ranges.interval(x)
        return ranges.rounded(Interval(function(x.low), function(x.high)), count=roundings)

    return operation


def _add(ranges: Ranges, x: Any, y: Any, alpha: float = 1.0) -> Interval:
    x, y = ranges.interval(x), ranges.interval(y)
    y = y if alpha == 1.0 else _mul(ranges, y, alpha)
    positive = (x.low >= 0) & (y.low >= 0)
    return ranges.rounded(Interval(x.low + y.low, x.high + y.high), sizes=x.size + y.size, positive=positive)


def _sub(ranges: Ranges, x: Any, y: Any, alpha: float = 1.0) -> Interval:
    return _add(ranges, x, y, -alpha)


def _rsub(ranges: Ranges, x: Any, y: Any, alpha: float = 1.0) -> Interval:
    return _add(ranges, y, x, -alpha)


def _neg(ranges: Ranges, x: Any) -> Interval:
    x = ranges.interval(x)
    return Interval(-x.high, -x.low)


def _products(x: Interval, y: Interval) -> Interval:
    corners = torch.stack(torch.broadcast_tensors(x.low * y.low, x.low * y.high, x.high * y.low, x.high * y.high))
    return Interval(corners.amin(0), corners.amax(0))  # 0·inf is NaN, which `rounded` takes for unbounded


def _mul(ranges: Ranges, x: Any, y: Any) -> Interval:
    x, y = ranges.interval(x), ranges.interval(y)
    return ranges.rounded(_products(x, y), positive=(x.low >= 0) & (y.low >= 0))


def _reciprocal(ranges: Ranges, x: Any) -> Interval:
    x = ranges.interval(x)
    through = (x.low <= 0) & (x.high >= 0)
    low, high = torch.where(through, -math.inf, x.high.reciprocal()), torch.where(through, math.inf, x.low.reciprocal())
    return ranges.rounded(Interval(low, high), positive=x.low > 0)


def _div(ranges: Ranges, x: Any, y: Any, **options: Any) -> Interval:
    if options.get("rounding_mode") is not None:
        raise NoIntervalError("div with rounding")
    return _mul(ranges, x, _reciprocal(ranges, y))


def _abs(ranges: Ranges, x: Any) -> Interval:
    x = ranges.interval(x)
    inner = torch.where((x.low <= 0) & (x.high >= 0), 0.0, torch.minimum(x.low.abs(), x.high.abs()))
    return Interval(inner, x.size)


def _square(ranges: Ranges, x: Any) -> Interval:
    inner = _abs(ranges, x)
    return ranges.rounded(Interval(inner.low.square(), inner.high.square()), positive=inner.low >= 0)


def _pow(ranges: Ranges, x: Any, exponent: Any) -> Interval:
    if isinstance(exponent, Interval) or isinstance(x, (int, float)):
        raise NoIntervalError("pow with an exponent that is a parameter")
    if exponent == 2:
        return _square(ranges, x)
    if exponent == -1:
        return _reciprocal(ranges, x)
    if exponent == 0.5:
        return _sqrt(ranges, x)
    if exponent == -0.5:
        return _reciprocal(ranges, _sqrt(ranges, x))
    if isinstance(exponent, int) and exponent > 0 and exponent % 2 == 1:
        return _monotone(lambda base: base.pow(exponent), 4.0 * exponent)(ranges, x)
    inner = _abs(ranges, x)
    if isinstance(exponent, int) and exponent > 0:
        return ranges.rounded(Interval(inner.low.pow(exponent), inner.high.pow(exponent)), count=4.0 * exponent)
    raise NoIntervalError(f"pow to {exponent}")


def _sqrt(ranges: Ranges, x: Any) -> Interval:
    x = ranges.interval(x)  # not every processor rounds roots to nearest: 1.5 units in float32 with vectors of MKL
    return ranges.rounded(Interval(x.low.sqrt(), x.high.sqrt()), count=2.0, positive=x.low >= 0)  # NaN below 0: unbounded


def _rsqrt(ranges: Ranges, x: Any) -> Interval:
    return _reciprocal(ranges, _sqrt(ranges, x))


def _sum(ranges: Ranges, x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Interval:
    x = ranges.interval(x)
    dims = tuple(range(x.low.dim())) if dim is None or dim == [] else dim
    low, high, sizes = (part.sum(dims, keepdim=keepdim) if part.dim() else part for part in (x.low, x.high, x.size))
    count = max(1.0, x.low.numel() / max(1, low.numel()))
    positive = (x.low >= 0).all() if dims == () else (x.low >= 0).double().amin(dims, keepdim=keepdim) > 0
    return ranges.rounded(Interval(low, high), count=count, sizes=sizes, positive=positive)


def _mean(ranges: Ranges, x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Interval:
    total = _sum(ranges, x, dim, keepdim)
    return _div(ranges, total, ranges.interval(x).low.numel() / max(1, total.low.numel()))


def _norm(ranges: Ranges, x: Any, order: Any = 2, dim: Any = None, keepdim: bool = False, **named: Any) -> Interval:
    order = named.get("ord", order)
    if order == 1:
        return _sum(ranges, _abs(ranges, x), dim, keepdim)
    if order == math.inf:
        return _extreme(torch.amax)(ranges, _abs(ranges, x), dim if dim is not None else (), keepdim)
    if order not in (2, None):
        raise NoIntervalError(f"norm of order {order}")
    return _sqrt(ranges, _sum(ranges, _square(ranges, x), dim, keepdim))


def _plain_norm(ranges: Ranges, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Interval:
    return _norm(ranges, x, 2 if p in (None, "fro") else p, dim, keepdim)


def _norm_except(ranges: Ranges, v: Any, order: int = 2, dim: int = 0) -> Interval:
    if dim == -1:
        return _norm(ranges, v, order)
    rank = ranges.interval(v).low.dim()
    dims = [other for other in range(rank) if other != dim % rank]
    return _norm(ranges, v, order, dims, keepdim=True) if dims else _abs(ranges, v)


def _weight_norm(ranges: Ranges, v: Any, g: Any, dim: int = 0) -> Interval:
    return _mul(ranges, v, _div(ranges, g, _norm_except(ranges, v, 2, dim)))


def _weight_norm_interface(ranges: Ranges, v: Any, g: Any, dim: int = 0) -> tuple[Interval, Interval]:
    return _weight_norm(ranges, v, g, dim), _norm_except(ranges, v, 2, dim)


def _variance(ranges: Ranges, x: Any, dim: Any = None, unbiased: Any = None, keepdim: Any = False, **options: Any) -> Interval:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    correction = options.get("correction", 1 if unbiased in (None, True) else 0)
    centered = _sub(ranges, x, _mean(ranges, x, dim, True))
    total = _sum(ranges, _square(ranges, centered), dim, keepdim)
    count = ranges.interval(x).low.numel() / max(1, total.low.numel()) - (1 if correction is None else correction)
    return _div(ranges, total, count)


def _deviation(ranges: Ranges, *args: Any, **options: Any) -> Interval:
    return _sqrt(ranges, _variance(ranges, *args, **options))


def _both(function: Callable[..., Interval]) -> Callable[..., tuple[Interval, Interval]]:
    def operation(ranges: Ranges, x: Any, dim: Any = None, unbiased: Any = None, keepdim: Any = False, **options: Any) -> Any:
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        return function(ranges, x, dim, unbiased, keepdim, **options), _mean(ranges, x, dim, bool(keepdim))

    return operation


def _extreme(function: Callable[..., Tensor]) -> Callable[..., Interval]:
    def operation(ranges: Ranges, x: Any, dim: Any = (), keepdim: bool = False) -> Interval:
        x = ranges.interval(x)
        return Interval(function(x.low, dim, keepdim), function(x.high, dim, keepdim))

    return operation


def _pairwise(function: Callable[..., Tensor]) -> Callable[..., Interval]:
    def operation(ranges: Ranges, x: Any, y: Any = None, *rest: Any, **options: Any) -> Interval:
        if y is None:
            return _extreme(torch.amax if function is torch.maximum else torch.amin)(ranges, x)
        if rest or options or not isinstance(y, Interval):
            raise NoIntervalError("max along a dimension")
        x, y = ranges.interval(x), ranges.interval(y)
        return Interval(function(x.low, y.low), function(x.high, y.high))

    return operation


def _clamp(ranges: Ranges, x: Any, *ends: Any, **named: Any) -> Interval:
    x = ranges.interval(x)
    low, high = (named.get(name, ends[number] if number < len(ends) else None) for number, name in enumerate(("min", "max")))
    for end, function in ((low, torch.maximum), (high, torch.minimum)):
        if end is not None:
            bound = ranges.interval(end)
            x = Interval(function(x.low, bound.low.to(x.low)), function(x.high, bound.high.to(x.high)))
    return Interval(x.low, x.high)


def _bilinear(ranges: Ranges, multiply: Callable[[Tensor, Tensor], Tensor], x: Any, y: Any) -> Interval:
    """A sum of products: middles multiply, radii pay."""
    x, y = ranges.interval(x), ranges.interval(y)
    middle = multiply(x.middle, y.middle)
    sizes = multiply(x.size, y.size)
    count = multiply(torch.ones_like(x.low), torch.ones_like(y.low)).max().item() if sizes.numel() else 1.0
    off: Tensor | float = 0.0
    if not (x.exact and y.exact):
        rx, ry = (part.radius * (1 + 4 * DOUBLE.unit) + part.size * 2 * DOUBLE.unit for part in (x, y))
        off = (multiply(x.middle.abs(), ry) + multiply(rx, y.middle.abs() + ry)) * (1 + 4 * count * DOUBLE.unit)
    return ranges.rounded(Interval(middle - off, middle + off), count=2 * count, sizes=sizes)


def _product(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Interval]:
    return lambda ranges, x, y: _bilinear(ranges, function, x, y)


def _linear(ranges: Ranges, x: Any, weight: Any, bias: Any = None) -> Interval:
    product = _bilinear(ranges, torch.nn.functional.linear, x, weight)
    return product if bias is None else _add(ranges, product, bias)


def _addmm(ranges: Ranges, summand: Any, x: Any, y: Any, beta: float = 1.0, alpha: float = 1.0) -> Interval:
    product = _mul(ranges, _bilinear(ranges, torch.matmul, x, y), alpha)
    return _add(ranges, product, _mul(ranges, summand, beta))


def _einsum(ranges: Ranges, equation: str, operands: Sequence[Any], **_: Any) -> Interval:
    first, *rest = operands
    if not rest:
        raise NoIntervalError("einsum of one tensor")
    if len(rest) > 1:
        raise NoIntervalError("einsum of more than two tensors")
    return _bilinear(ranges, lambda x, y: torch.einsum(equation, x, y), first, rest[0])


def _where(ranges: Ranges, condition: Any, x: Any, y: Any) -> Interval:
    mask = _mask(condition)
    x, y = ranges.interval(x), ranges.interval(y)
    return Interval(torch.where(mask, x.low, y.low.to(x.low)), torch.where(mask, x.high, y.high.to(x.high)))


def _mask(condition: Any) -> Tensor:
    if isinstance(condition, Interval):
        if not condition.exact:
            raise NoIntervalError("a choice by a parameter")
        return condition.low.bool()
    return torch.as_tensor(condition).bool()


def _masked(ranges: Ranges, mask: Any, sign: bool, value: Any) -> Interval:
    return _where(ranges, _mask(mask) == sign, value, 0.0)


def _masked_fill(ranges: Ranges, x: Any, mask: Any, value: Any) -> Interval:
    return _where(ranges, mask, value, x)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": _add, "sub": _sub, "subtract": _sub, "rsub": _rsub, "neg": _neg, "negative": _neg, "mul": _mul, "multiply": _mul,
    "truediv": _div, "div": _div, "divide": _div, "true_divide": _div, "reciprocal": _reciprocal, "abs": _abs,
    "absolute": _abs, "square": _square, "pow": _pow, "sqrt": _sqrt, "rsqrt": _rsqrt, "sum": _sum, "mean": _mean,
    "linalg_vector_norm": _norm, "norm": _plain_norm, "frobenius_norm": _plain_norm, "norm_except_dim": _norm_except,
    "_weight_norm": _weight_norm, "_weight_norm_interface": _weight_norm_interface, "var": _variance, "std": _deviation,
    "var_mean": _both(_variance), "std_mean": _both(_deviation), "amax": _extreme(torch.amax), "amin": _extreme(torch.amin),
    "maximum": _pairwise(torch.maximum), "minimum": _pairwise(torch.minimum), "max": _pairwise(torch.maximum),
    "min": _pairwise(torch.minimum), "clamp": _clamp, "clip": _clamp, "clamp_min": _clamp,
    "clamp_max": lambda ranges, x, end: _clamp(ranges, x, None, end), "relu": _monotone(torch.relu, 0.0),
    "exp": _monotone(torch.exp), "log": _monotone(torch.log), "sigmoid": _monotone(torch.sigmoid),
    "tanh": _monotone(torch.tanh), "matmul": _product(torch.matmul), "mm": _product(torch.mm), "mv": _product(torch.mv),
    "bmm": _product(torch.bmm), "dot": _product(torch.dot), "vdot": _product(torch.dot), "outer": _product(torch.outer),
    "linear": _linear, "addmm": _addmm, "addmv": _addmm, "baddbmm": _addmm, "einsum": _einsum, "where": _where,
    "_masked": _masked, "masked_fill": _masked_fill,
}  # fmt: skip
"""What is known of operators, by name: arguments as in their schemas, intervals in the place of real tensors."""
