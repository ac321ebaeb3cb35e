"""Sums, differences and products with constants or parameters."""

from __future__ import annotations

import math
import operator
from dataclasses import replace

import torch

from pathlift.edges import Identity, Scale
from pathlift.graph.expressions import Apply, Constant
from pathlift.graph.layers import Term, scalar_leaf
from pathlift.rules.affine import BILINEAR
from pathlift.rules.base import Activation, Call, Layer, Static, in_floating_point, rule

QUOTIENT = (
    "it divides by an activation, which is not positively homogeneous and piecewise linear.",
    "Divide by parameters or constants only.",
)


def _alpha(call: Call) -> float:
    return float(call.args.get("alpha", 1))


@rule("add")
def add(call: Call) -> Layer:
    """X + alpha·y."""
    return call.summed(("self", 1.0), ("other", _alpha(call)))


@rule("sub", "subtract")
def sub(call: Call) -> Layer:
    """X − alpha·y: edges of weight −alpha, whose paths count with |alpha|."""
    return call.summed(("self", 1.0), ("other", -_alpha(call)))


@rule("rsub")
def rsub(call: Call) -> Layer:
    """Y − alpha·x."""
    return call.summed(("self", -_alpha(call)), ("other", 1.0))


@rule("neg", "negative")
def neg(call: Call) -> Layer:
    """−x: an edge of weight −1."""
    return call.layer(Term(call.source("self").name, Identity(), scalar_leaf(-1.0)))


@rule("mul", "multiply")
def mul(call: Call) -> Layer:
    """x·w with a parameter or constant w of any shape that broadcasts."""
    first, second = call.args["self"], call.args["other"]
    if isinstance(first, Activation) and isinstance(second, Activation):
        call.refuse(*BILINEAR)
    key, other = ("self", "other") if isinstance(first, Activation) else ("other", "self")
    static = call.static(other)
    assert static is not None
    return _scaled(call, call.source(key), static)


@rule("div", "divide", "true_divide")
def div(call: Call) -> Layer:
    """X / w with a parameter or constant w."""
    if not isinstance(call.args["self"], Activation) or isinstance(call.args["other"], Activation):
        call.refuse(*QUOTIENT)
    if call.args.get("rounding_mode") is not None:
        call.refuse("it rounds the quotient.", "Use a plain division.")
    static = call.static("other")
    assert static is not None
    if isinstance(static.expression, Constant) and not isinstance(static.expression.value, torch.Tensor):
        if static.expression.value == 0:
            call.refuse("it divides by zero.", "Divide by a non-zero number.")
        inverse = call.number(1.0 / static.expression.value)
    else:
        static = in_floating_point(static)
        inverse = replace(static, expression=Apply(torch.reciprocal, (static.expression,)))
    return _scaled(call, call.source("self"), inverse)


def _scaled(call: Call, source: Activation, static: Static) -> Layer:
    leaf = call.weight(static)
    if leaf.scalar is not None:
        return call.layer(Term(source.name, Identity(), leaf))
    return call.layer(Term(source.name, Scale(), leaf))


@rule("addcmul", "addcdiv")
def addcmul(call: Call) -> Layer:
    """X + value·a·b, or x + value·a/b, with at most one activation among a and b."""
    first, second = call.args["tensor1"], call.args["tensor2"]
    divides, value = call.name == "addcdiv", float(call.args.get("value", 1))
    if isinstance(second, Activation) and (divides or isinstance(first, Activation)):
        call.refuse(*(QUOTIENT if divides else BILINEAR))
    terms, starts = call.operand("self")
    if isinstance(first, Activation) or isinstance(second, Activation):
        source, weight = (first, second) if isinstance(first, Activation) else (second, first)
        wide = in_floating_point(weight)
        own = Apply(torch.reciprocal, (wide.expression,)) if divides else wide.expression
        scaled = replace(wide, expression=Apply(operator.mul, (own, value)))
        return call.layer(*terms, Term(source.name, Scale(), call.weight(scaled)), starts=starts)
    factors = tuple(in_floating_point(factor).expression for factor in (first, second))
    own = Apply(operator.truediv if divides else operator.mul, factors)
    fake = torch.empty(torch.broadcast_shapes(first.shape, second.shape), device="meta")
    return call.layer(*terms, starts=(*starts, *call.bias(Static(Apply(operator.mul, (own, value)), fake))))


@rule("lerp")
def lerp(call: Call) -> Layer:
    """X + w·(y − x): edges of weight 1−w and w for a constant w; of weight 1, −w and w for a parameter."""
    weight = call.static("weight")
    assert weight is not None
    if isinstance(weight.expression, Constant) and not isinstance(weight.expression.value, torch.Tensor):
        number = float(weight.expression.value)
        return replace(call.summed(("self", 1.0 - number), ("end", number)), blur=4.0 * (1.0 + abs(number)))  # of w·(y − x)
    wide, parameter = in_floating_point(weight), call.weight(weight).score_name is not None
    x, y = (call.as_activation(call.args[key]).name for key in ("self", "end"))
    rest = Apply(operator.sub, (0.0 if parameter else 1.0, wide.expression))
    layer = call.layer(
        *([Term(x, Identity())] if parameter else []),
        Term(x, Scale(), call.weight(replace(wide, expression=rest))),
        Term(y, Scale(), call.weight(wide)),
    )
    return layer if parameter else replace(layer, blur=math.inf)  # what w·x rounds to is not bounded by (1 − w)·x
