"""Activations with fixed slopes, PReLU and clamps (mathematics §1, "Activations beyond ReLU")."""

from __future__ import annotations

import math

from pathlift.edges import Identity, Scale
from pathlift.graph.expressions import Constant
from pathlift.graph.layers import Bias, Bound, Clamp, Connection, LearnedSlope, Slopes, scalar_weight
from pathlift.rules.affine import channels
from pathlift.rules.base import Activation, Call, Draft, Static, rule


def _slopes(call: Call, source: Activation, minus: float) -> Draft:
    """Slope 1 above 0 and ``minus`` below: the path activation is multiplied by max(1, |minus|)."""
    gain = max(1.0, abs(minus))
    if not math.isfinite(gain):
        call.refuse("one of its slopes is not finite.", "Use finite slopes.")
    weight = None if gain == 1.0 else scalar_weight(gain)
    return call.layer(Connection(source.name, Identity(), weight), nonlinearity=Slopes(1.0 / gain, minus / gain))


@rule("relu", "abs", "absolute")
def relu(call: Call) -> Draft:
    """ReLU and |x|: slopes of magnitude at most 1 leave path activations unchanged."""
    return _slopes(call, call.source("self"), 0.0 if call.name == "relu" else -1.0)


@rule("leaky_relu")
def leaky_relu(call: Call) -> Draft:
    """Leaky ReLU."""
    return _slopes(call, call.source("self"), float(call.args["negative_slope"]))


@rule("rrelu")
def rrelu(call: Call) -> Draft:
    """Randomised leaky ReLU in eval mode: the mean slope."""
    if call.args["training"]:
        call.refuse("it draws random slopes (training mode).", "Use nn.RReLU, which is deterministic in eval mode.")
    return _slopes(call, call.source("self"), (float(call.args["lower"]) + float(call.args["upper"])) / 2)


@rule("prelu", "_prelu_kernel")
def prelu(call: Call) -> Draft:
    """PReLU: two neurons x⁺ and (−x)⁺ with outgoing edges 1 and −a, so A = (1+|a|)·A(u)."""
    source, weight = call.source("self"), call.static("weight")
    assert weight is not None
    view: tuple[int, ...] | None = None
    if call.name == "prelu":
        view = channels(weight, len(source.shape)) if len(source.shape) > 1 else weight.shape
    slope = call.weight(weight, "weight")
    return call.layer(
        Connection(source.name, Identity()), Connection(source.name, Scale(view), slope), nonlinearity=LearnedSlope()
    )


@rule("relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max")
def clamp(call: Call) -> Draft:
    """A clamp between lo and hi: one edge active between the two, and biases lo and hi active beyond: A = A(u)+|lo|+|hi|."""
    source = call.source("self")
    if call.name == "relu6":
        bounds: list[Static | None] = [call.number(0.0), call.number(6.0)]
    else:
        keys = ("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")
        bounds = [_bound(call, key) for key in keys]
    biases: tuple[Bias, ...] = ()
    ends: list[Bound] = []
    for bound in bounds:
        value = bound.expression.value if bound is not None and isinstance(bound.expression, Constant) else None
        if isinstance(value, float) and math.isnan(value):
            call.refuse("one of its bounds is NaN.", "Use numbers as bounds.")
        if bound is None or (isinstance(value, float) and math.isinf(value)):
            ends.append(None)
            continue
        start = call.bias(bound)
        biases += start
        ends.append(start[0] if start else 0.0)
    return call.layer(Connection(source.name, Identity()), biases=biases, nonlinearity=Clamp(*ends))


@rule("hardsigmoid")
def hardsigmoid(call: Call) -> Draft:
    """Hard sigmoid: clamp(x/6 + 1/2, 0, 1)."""
    source = call.source("self")
    line = call.layer(Connection(source.name, Identity(), scalar_weight(1 / 6)), biases=call.bias(call.number(0.5)))
    below = call.builder.add(line)
    top = call.bias(call.number(1.0))
    return call.layer(Connection(below.name, Identity()), biases=top, nonlinearity=Clamp(0.0, top[0]))


def _bound(call: Call, key: str) -> Static | None:
    value = call.args.get(key)
    if isinstance(value, Activation):
        call.refuse(f"its bound '{key}' depends on the input.", "Use torch.maximum or torch.minimum for two activations.")
    return call.static(key)


@rule("threshold")
def threshold(call: Call) -> Draft:
    """Threshold at 0 with value 0 is ReLU."""
    if float(call.args["threshold"]) != 0.0 or float(call.args["value"]) != 0.0:
        call.refuse(
            f"threshold {call.args['threshold']} with value {call.args['value']} is not continuous and positively homogeneous.",
            "Only a threshold at 0 with value 0 (ReLU) is covered; use torch.clamp for others.",
        )
    return _slopes(call, call.source("self"), 0.0)
