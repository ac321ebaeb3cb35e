"""Frozen batch norm (mathematics §1): a layer of identity neurons, and all that is known of its scale s and shift t.

y = (x − μ)·γ/√(σ²+ε) + β = s·x + t with s = γ/√(σ²+ε) and t = β − μ·s. What follows is written once, here:

- value: s in float64 to a few units; t to 2u·|t|, although β and μ·s may cancel (`BatchNormShift`).
- interval: of the formula as it stands; the value itself where γ, β, μ, σ² are known.
- peak: the model may compute (x − μ)·γ/√(σ²+ε) + β in any order, so intermediate factors are γ, 1/√(σ²+ε) or both.
- cancelled: β and μ·s are rounded before they cancel.
- summands: s scales as γ, t is the sum of β and of μ·s. If the activation of v is multiplied by λ_v and that of u, which it
  reads, by λ_u, then γ → γ·λ_v/λ_u, β → β·λ_v and the running mean μ → μ·λ_u, so that μ·s → μ·s·λ_v; σ² stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pathlift.edges import Scale
from pathlift.graph.expressions import Expression, Formula, FunctionCall, Normalisation, Summand
from pathlift.graph.interval import Interval, IntervalArithmetic, point
from pathlift.graph.layers import Connection
from pathlift.rules.affine import channels
from pathlift.rules.base import Call, Draft, Static, rule

FLOAT64 = torch.finfo(torch.float64)
"""``eps`` is twice the unit roundoff u, ``tiny`` what a result may be off by when it underflows."""


@dataclass(frozen=True)
class BatchNormScale(Formula):
    """s = γ/√(σ²+ε)."""

    elementwise: ClassVar[bool] = True

    def __call__(self, weight: Tensor | None, variance: Tensor, epsilon: float) -> Tensor:
        """Return s in float64."""
        scale = torch.rsqrt(variance.double() + epsilon)
        return scale if weight is None else weight.double() * scale

    def interval(self, arithmetic: IntervalArithmetic, weight: Interval | None, variance: Interval, epsilon: float) -> Interval:
        """Enclose s; in the model's arithmetic the point itself, whose rounding is that of its layer."""
        if arithmetic.arithmetic and all(arg is None or arg.exact for arg in (weight, variance)):
            return point(self(None if weight is None else weight.low, variance.low, epsilon))
        deviation = arithmetic.operator("sqrt", arithmetic.operator("add", variance, epsilon))
        inverse = arithmetic.operator("reciprocal", deviation)
        return inverse if weight is None else arithmetic.operator("mul", weight, inverse)

    def peak(self, weight: Interval | None, variance: Interval, epsilon: float) -> float:
        """Return max(1, |γ|)·max(1, 1/√(σ²+ε)), which no intermediate factor of a batch norm exceeds."""
        gamma = 1.0 if weight is None else float(weight.size.max())
        return max(1.0, gamma) * max(1.0, float((variance.low + epsilon).rsqrt().max()))

    def summands(self, weight: Expression | None, *_: Any) -> tuple[Summand, ...]:
        """Return γ: σ² and ε stay what they are."""
        return (Summand(() if weight is None else (weight,)),)


@dataclass(frozen=True)
class BatchNormShift(Formula):
    """t = β − μ·s, from s and from what s is made of."""

    elementwise: ClassVar[bool] = True

    def __call__(
        self, scale: Tensor, bias: Tensor | None, mean: Tensor, weight: Tensor | None, variance: Tensor, epsilon: float
    ) -> Tensor:
        """Return t in float64, accurate also where β and μ·s cancel.

        The error is at most 2u·|t| + 2⁻¹⁰⁰·(|β| + |μ·s|): s is carried as a sum of two float64 numbers, one Newton step
        beyond the square root, and so are its product with μ and the difference. Gradients are those of the plain formula.
        """
        beta = torch.zeros_like(scale) if bias is None else bias.double()
        plain = beta - mean.double() * scale
        with torch.no_grad():
            top, rest = _two_sum(variance.double(), torch.full_like(scale, epsilon))
            root = torch.rsqrt(top)
            square, more = _two_product(root, root)
            product, error = _two_product(top, square)
            missing = (1.0 - product) - (error + top * more + rest * square)  # 1 − (σ²+ε)·root²
            correction = root * missing / 2
            if weight is None:
                high, low = root, correction
            else:
                high, low = _two_product(weight.double(), root)
                low = low + weight.double() * correction
            offset, tail = _two_product(mean.double(), high)
            shift, lost = _two_sum(beta, -offset)
            shift = shift + (lost - tail - mean.double() * low)
            shift = torch.where(torch.isfinite(shift), shift, plain)
        return shift + (plain - plain.detach()) if torch.is_grad_enabled() else shift

    def interval(
        self,
        arithmetic: IntervalArithmetic,
        scale: Interval,
        bias: Interval | None,
        mean: Interval,
        weight: Interval | None,
        variance: Interval,
        epsilon: float,
    ) -> Interval:
        """Enclose t; in the model's arithmetic the point itself, as for s."""
        given = (bias, mean, weight, variance)
        if all(arg is None or arg.exact for arg in given):
            low_bias, low_mean, low_weight, low_variance = (None if arg is None else arg.low for arg in given)
            assert low_mean is not None
            assert low_variance is not None
            shift = self(scale.low, low_bias, low_mean, low_weight, low_variance, epsilon)
            if arithmetic.arithmetic:
                return point(shift)
            # the value is off by at most 2u·|t| + 2⁻¹⁰⁰·(|β| + |μ·s|); twice that is taken
            size = scale.size * mean.size + (0.0 if bias is None else bias.size)
            off = 2 * FLOAT64.eps * shift.abs() + 2.0**-99 * size + FLOAT64.tiny
            return Interval(shift - off, shift + off)
        product = arithmetic.operator("mul", mean, scale)
        return arithmetic.operator("sub", 0.0 if bias is None else bias, product)

    def peak(
        self,
        _: Interval,
        bias: Interval | None,
        mean: Interval,
        weight: Interval | None,
        variance: Interval,
        epsilon: float,
    ) -> float:
        """Return |μ| times what the factors of s reach, plus |β|."""
        offset = 0.0 if bias is None else float(bias.size.max())
        return float(mean.size.max()) * SCALE.peak(weight, variance, epsilon) + offset

    def cancelled(self, scale: Interval, _: Any, mean: Interval, *__: Any) -> Tensor:
        """Return the largest |μ·s|."""
        return mean.size * scale.size

    def normalisation(
        self,
        scale: Expression,
        bias: Expression | None,
        mean: Expression,
        weight: Expression | None,
        variance: Expression,
        epsilon: float,
    ) -> Normalisation:
        """Return μ, σ², γ, β, ε and s."""
        return Normalisation(mean, variance, weight, bias, epsilon, scale)

    def summands(self, scale: Expression, bias: Expression | None, mean: Expression, *_: Any) -> tuple[Summand, ...]:
        """Return β and μ·s."""
        product = Summand((scale,), mean)
        return (product,) if bias is None else (Summand((bias,)), product)


SCALE, SHIFT = BatchNormScale(), BatchNormShift()


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return a + b as rounded, and exactly what the rounding took."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return a·b as rounded, and exactly what the rounding took, by splitting the factors (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = (_halves(factor) for factor in (a, b))
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Split a number into two of 26 bits."""
    scaled = factor * 134217729.0  # 2²⁷ + 1
    high = scaled - (scaled - factor)
    return high, factor - high


@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm")
def batch_norm(call: Call) -> Draft | tuple[Draft, ...]:
    """Frozen batch norm: identity neurons with edge weight s = γ/√(σ²+ε) and bias t = β − μ·s."""
    mean, variance = call.static("running_mean"), call.static("running_var")
    if call.args.get("training", False) or mean is None or variance is None:
        call.refuse(
            "it normalises with the statistics of the batch, which is no path-lifting.",
            "Use batch norm with running statistics (track_running_stats=True) in eval mode.",
        )
    assert mean is not None
    assert variance is not None
    weight, bias, epsilon = call.static("weight"), call.static("bias"), float(call.args["eps"])
    gamma = None if weight is None else weight.expression
    beta = None if bias is None else bias.expression
    scale = Static(FunctionCall(SCALE, (gamma, variance.expression, epsilon)), variance.fake)
    parts = (scale.expression, beta, mean.expression, gamma, variance.expression, epsilon)
    shift = Static(FunctionCall(SHIFT, parts), mean.fake)
    source = call.source("input")
    view = channels(scale, len(source.shape))
    layer = call.layer(
        Connection(source.name, Scale(view), call.weight(scale, "weight" if weight is not None else None, weight)),
        biases=call.bias(shift, view, "bias" if bias is not None else None, bias),
        shape=source.shape,
        unit_dim=1,
    )
    return layer if call.name == "batch_norm" else (layer,)


@rule("instance_norm")
def instance_norm(call: Call) -> Draft:
    """With the statistics of training an instance norm is a batch norm; otherwise it uses those of the activations."""
    if call.args["use_input_stats"]:
        call.refuse(
            "it normalises with statistics of the activations themselves.",
            "Only batch norm and instance norm with running statistics in eval mode are covered.",
        )
    made = batch_norm(replace(call, name="batch_norm", args={**call.args, "training": False}))
    assert isinstance(made, Draft)
    return made
