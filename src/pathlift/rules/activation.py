"""Activations with fixed slopes, PReLU and clamps (SPEC §1, "Activations beyond ReLU")."""

from __future__ import annotations

import math

from pathlift.edges import Identity, Scale
from pathlift.network import Constant, Start, Term, scalar_leaf
from pathlift.rules.base import Activation, Call, Layer, Static, rule


def _slopes(call: Call, source: Activation, *slopes: float) -> Layer:
    """X ↦ s₊x⁺ − s₋x⁻: the path activation is multiplied by max(1, |s|)."""
    gain = max(1.0, *(abs(slope) for slope in slopes))
    if not math.isfinite(gain):
        call.refuse("one of its slopes is not finite.", "Use finite slopes.")
    return call.layer(Term(source.name, Identity(), None if gain == 1.0 else scalar_leaf(gain)))


@rule("relu", "abs", "absolute")
def relu(call: Call) -> Layer:
    """ReLU and |x|: slopes of magnitude at most 1 leave path activations unchanged."""
    return _slopes(call, call.source("self"), 1.0)


@rule("leaky_relu")
def leaky_relu(call: Call) -> Layer:
    """Leaky ReLU."""
    return _slopes(call, call.source("self"), float(call.args["negative_slope"]))


@rule("rrelu")
def rrelu(call: Call) -> Layer:
    """Randomised leaky ReLU in eval mode: the mean slope."""
    if call.args["training"]:
        call.refuse("it draws random slopes (training mode).", "Use nn.RReLU, which is deterministic in eval mode.")
    return _slopes(call, call.source("self"), (float(call.args["lower"]) + float(call.args["upper"])) / 2)


@rule("prelu", "_prelu_kernel")
def prelu(call: Call) -> Layer:
    """PReLU: two neurons x⁺ and (−x)⁺ with outgoing edges 1 and −a, so A = (1+|a|)·A(u)."""
    source, weight = call.source("self"), call.static("weight")
    assert weight is not None
    view: tuple[int, ...] | None = None
    if call.name == "prelu":
        view = (1, -1) + (1,) * (len(source.shape) - 2) if len(source.shape) > 1 else (-1,)
    slope = call.weight(weight, "weight")
    return call.layer(Term(source.name, Identity()), Term(source.name, Scale(view), slope))


@rule("relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max")
def clamp(call: Call) -> Layer:
    """A clamp between lo and hi: one edge active between the two, and biases lo and hi active beyond: A = A(u)+|lo|+|hi|."""
    source = call.source("self")
    if call.name == "relu6":
        bounds: list[Static | None] = [call.number(0.0), call.number(6.0)]
    else:
        keys = ("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")
        bounds = [_bound(call, key) for key in keys]
    starts: tuple[Start, ...] = ()
    for bound in bounds:
        value = bound.expression.value if bound is not None and isinstance(bound.expression, Constant) else None
        if isinstance(value, float) and math.isnan(value):
            call.refuse("one of its bounds is NaN.", "Use numbers as bounds.")
        if bound is not None and not (isinstance(value, float) and math.isinf(value)):
            starts += call.bias(bound)
    return call.layer(Term(source.name, Identity()), starts=starts)


@rule("hardsigmoid")
def hardsigmoid(call: Call) -> Layer:
    """Hard sigmoid: clamp(x/6 + 1/2, 0, 1)."""
    source = call.source("self")
    line = call.layer(Term(source.name, Identity(), scalar_leaf(1 / 6)), starts=call.bias(call.number(0.5)))
    below = call.builder.add(line)
    return call.layer(Term(below.name, Identity()), starts=call.bias(call.number(1.0)))


def _bound(call: Call, key: str) -> Static | None:
    value = call.args.get(key)
    if isinstance(value, Activation):
        call.refuse(f"its bound '{key}' depends on the input.", "Use torch.maximum or torch.minimum for two activations.")
    return call.static(key)


@rule("threshold")
def threshold(call: Call) -> Layer:
    """Threshold at 0 with value 0 is ReLU."""
    if float(call.args["threshold"]) != 0.0 or float(call.args["value"]) != 0.0:
        call.refuse(
            f"threshold {call.args['threshold']} with value {call.args['value']} is not continuous and positively homogeneous.",
            "Only a threshold at 0 with value 0 (ReLU) is covered; use torch.clamp for others.",
        )
    return _slopes(call, call.source("self"), 1.0)
