"""Sums, differences and products with constants or parameters."""

from __future__ import annotations

import math
import operator
from dataclasses import replace

import torch

from pathlift.edges import Identity, Scale
from pathlift.graph.expressions import Constant, FunctionCall
from pathlift.graph.layers import Connection, scalar_weight
from pathlift.rules.affine import BILINEAR
from pathlift.rules.base import Activation, Call, Draft, Static, expansion, in_floating_point, rule

QUOTIENT = (
    "it divides by an activation, which is not positively homogeneous and piecewise linear.",
    "Divide by parameters or constants only.",
)


def _alpha(call: Call) -> float:
    return float(call.args.get("alpha", 1))


@rule("add")
def add(call: Call) -> Draft:
    """X + alpha·y."""
    return call.summed(("self", 1.0), ("other", _alpha(call)))


@rule("sub", "subtract")
def sub(call: Call) -> Draft:
    """X − alpha·y: edges of weight −alpha, whose paths count with |alpha|."""
    return call.summed(("self", 1.0), ("other", -_alpha(call)))


@rule("rsub")
def rsub(call: Call) -> Draft:
    """Y − alpha·x."""
    return call.summed(("self", -_alpha(call)), ("other", 1.0))


@rule("neg", "negative")
def neg(call: Call) -> Draft:
    """−x: an edge of weight −1."""
    return call.layer(Connection(call.source("self").name, Identity(), scalar_weight(-1.0)))


@rule("mul", "multiply")
def mul(call: Call) -> Draft:
    """x·w with a parameter or constant w of any shape that broadcasts."""
    first, second = call.args["self"], call.args["other"]
    if isinstance(first, Activation) and isinstance(second, Activation):
        call.refuse(*BILINEAR)
    key, other = ("self", "other") if isinstance(first, Activation) else ("other", "self")
    static = call.static(other)
    assert static is not None
    return _scaled(call, call.source(key), static)


@rule("div", "divide", "true_divide")
def div(call: Call) -> Draft:
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
        inverse = replace(static, expression=FunctionCall(torch.reciprocal, (static.expression,)))
    return _scaled(call, call.source("self"), inverse)


def _scaled(call: Call, source: Activation, static: Static) -> Draft:
    weight = call.weight(static)
    if weight.scalar is not None:
        return call.layer(Connection(source.name, Identity(), weight))
    return call.layer(Connection(source.name, Scale(), weight))


@rule("addcmul", "addcdiv")
def addcmul(call: Call) -> Draft:
    """X + value·a·b, or x + value·a/b, with at most one activation among a and b."""
    first, second = call.args["tensor1"], call.args["tensor2"]
    divides, value = call.name == "addcdiv", float(call.args.get("value", 1))
    if isinstance(second, Activation) and (divides or isinstance(first, Activation)):
        call.refuse(*(QUOTIENT if divides else BILINEAR))
    connections, biases = call.operand("self")
    if isinstance(first, Activation) or isinstance(second, Activation):
        source, weight = (first, second) if isinstance(first, Activation) else (second, first)
        wide = in_floating_point(weight)
        factor = FunctionCall(torch.reciprocal, (wide.expression,)) if divides else wide.expression
        scaled = replace(wide, expression=FunctionCall(operator.mul, (factor, value)))
        return call.layer(*connections, Connection(source.name, Scale(), call.weight(scaled)), biases=biases)
    factors = tuple(in_floating_point(factor).expression for factor in (first, second))
    product = FunctionCall(operator.truediv if divides else operator.mul, factors)
    fake = torch.empty(torch.broadcast_shapes(first.shape, second.shape), device="meta")
    return call.layer(*connections, biases=(*biases, *call.bias(Static(FunctionCall(operator.mul, (product, value)), fake))))


@rule("lerp")
def lerp(call: Call) -> Draft:
    """X + w·(y − x): edges of weight 1−w and w for a constant w; of weight 1, −w and w for a parameter."""
    weight = call.static("weight")
    assert weight is not None
    if isinstance(weight.expression, Constant) and not isinstance(weight.expression.value, torch.Tensor):
        number = float(weight.expression.value)
        return replace(call.summed(("self", 1.0 - number), ("end", number)), blur=4.0 * (1.0 + abs(number)))  # of w·(y − x)
    wide, parameter = in_floating_point(weight), call.weight(weight).score_name is not None
    x, y = (_broadcast(call, call.as_activation(call.args[key])).name for key in ("self", "end"))
    rest = FunctionCall(operator.sub, (0.0 if parameter else 1.0, wide.expression))
    layer = call.layer(
        *([Connection(x, Identity())] if parameter else []),
        Connection(x, Scale(), call.weight(replace(wide, expression=rest))),
        Connection(y, Scale(), call.weight(wide)),
    )
    return layer if parameter else replace(layer, blur=math.inf)  # what w·x rounds to is not bounded by (1 − w)·x


def _broadcast(call: Call, activation: Activation) -> Activation:
    """Return an activation in the shape of the result."""
    if activation.shape == call.shape:
        return activation
    return call.builder.add(call.layer(Connection(activation.name, expansion(call.shape))))
