"""Affine operators with parameters: convolutions, linear layers, matrix products, frozen batch norm (SPEC §1)."""

from __future__ import annotations

import string
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pathlift.edges import Contraction, Convolution, Dense, Scale
from pathlift.graph.expressions import Expression, FunctionCall, elementwise
from pathlift.graph.layers import Connection
from pathlift.rules.base import Activation, Call, Draft, Static, rule

BILINEAR = (
    "it multiplies two activations (a bilinear form, as attention does).",
    "Path-liftings need a parameter or a constant on one side of every product.",
)


def _tuple(value: Any, count: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


def channels(weight: Static, rank: int) -> tuple[int, ...]:
    """Return the shape under which one number per channel, dimension 1, broadcasts.

    Args:
        weight: A vector.
        rank: Number of dimensions of the neurons.

    Returns:
        Shape (1, channels, 1, …).
    """
    return (1, *weight.shape) + (1,) * (rank - 2)


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def convolution(call: Call) -> Draft:
    """A convolution: edges share the kernel's weights, zero padding holds no neurons."""
    args = call.args
    weight = call.static("weight")
    assert weight is not None
    source = call.source("input")
    spatial = len(weight.shape) - 2
    stride, dilation = _tuple(args["stride"], spatial), _tuple(args["dilation"], spatial)
    pad_before: tuple[int, ...] = ()
    if args["padding"] == "same":
        total = [gap * (size - 1) for gap, size in zip(dilation, weight.shape[2:], strict=True)]
        padding = tuple(t // 2 for t in total)
        if any(t % 2 for t in total):
            pad_before = tuple(p for t in reversed(total) for p in (0, t % 2))
    elif args["padding"] == "valid":
        padding = (0,) * spatial
    else:
        padding = _tuple(args["padding"], spatial)
    transposed = bool(args.get("transposed", call.name.startswith("conv_transpose")))
    edges = Convolution(
        stride,
        padding,
        dilation,
        transposed,
        _tuple(args.get("output_padding", 0), spatial),
        int(args["groups"]),
        pad_before,
    )
    offset = call.static("bias")
    bias = call.bias(offset, None if offset is None else channels(offset, len(source.shape)), "bias")
    if len(source.shape) == spatial + 1:  # an unbatched input: (channels, …)
        call.refuse("its input has no batch dimension.", "Give the convolution an input of shape (batch, channels, …).")
    return call.layer(Connection(source.name, edges, call.weight(weight, "weight")), biases=bias, unit_dim=1)


@rule("linear")
def linear(call: Call) -> Draft:
    """A linear layer."""
    weight = call.static("weight")
    assert weight is not None
    if len(weight.shape) == 1:
        return _contraction(call, call.source("input"), weight, swapped=False)
    bias = call.bias(call.static("bias"), name="bias")
    connection = Connection(call.source("input").name, Dense(), call.weight(weight, "weight"))
    return call.layer(connection, biases=bias, unit_dim=len(call.shape) - 1)


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(call: Call) -> Draft:
    """A matrix product with a parameter or constant on one side."""
    first, second = (call.args[key] for key in list(call.args)[:2])
    if isinstance(first, Activation) and isinstance(second, Static):
        return _contraction(call, first, second, swapped=False)
    if isinstance(first, Static) and isinstance(second, Activation):
        return _contraction(call, second, first, swapped=True)
    return call.refuse(*BILINEAR)


@rule("addmm", "baddbmm", "addmv")
def addmm(call: Call) -> Draft:
    """beta·input + alpha·(a @ b)."""
    keys = [key for key in call.args if key not in ("self", "input", "beta", "alpha", "out_dtype")]
    inner = Call(call.name, {key: call.args[key] for key in keys[:2]}, call.result, call.builder, call.target)
    product = matmul(inner)
    assert isinstance(product, Draft)
    alpha, beta = float(call.args.get("alpha", 1)), float(call.args.get("beta", 1))
    if alpha != 1.0:
        call.refuse(f"it scales the product by alpha = {alpha}.", "Write the scaling as a separate multiplication.")
    connections, biases = call.operand("self", beta)
    return call.layer(*product.connections, *connections, biases=(*product.biases, *biases))


def _contraction(call: Call, source: Activation, static: Static, *, swapped: bool) -> Draft:
    """Write a matmul of any ranks as an explicit einsum, with broadcast batch dimensions spelled out."""
    ranks = (len(static.shape), len(source.shape)) if swapped else (len(source.shape), len(static.shape))
    batch = string.ascii_lowercase[: max(max(ranks) - 2, 0)]
    left = (batch[len(batch) - (ranks[0] - 2) :] if ranks[0] > 2 else "") + ("YZ" if ranks[0] > 1 else "Z")
    right = (batch[len(batch) - (ranks[1] - 2) :] if ranks[1] > 2 else "") + ("ZX" if ranks[1] > 1 else "Z")
    out = batch + ("Y" if ranks[0] > 1 else "") + ("X" if ranks[1] > 1 else "")
    x, w = (right, left) if swapped else (left, right)
    return call.layer(Connection(source.name, Contraction(f"{x},{w}->{out}"), call.weight(static, "weight")))


@rule("einsum")
def einsum(call: Call) -> Draft:
    """An einsum of one activation with at most one parameter or constant."""
    equation, operands = str(call.args["equation"]).replace(" ", ""), list(call.args["tensors"])
    if "..." in equation:
        equation = _spell_ellipsis(equation, [len(operand.shape) for operand in operands])
    inputs, _, out = equation.partition("->")
    letters = inputs.split(",")
    if "->" not in equation:
        joined = inputs.replace(",", "")
        out = "".join(sorted(letter for letter in set(joined) if joined.count(letter) == 1))
    if any(len(set(part)) < len(part) for part in letters):
        call.refuse(f"the equation '{equation}' takes a diagonal.", "Use torch.diagonal for that step.")
    active = [place for place, operand in enumerate(operands) if isinstance(operand, Activation)]
    if len(active) != 1:
        call.refuse(*BILINEAR)
    source = operands[active[0]]
    assert isinstance(source, Activation)
    others = [place for place in range(len(operands)) if place != active[0]]
    if not others:
        ones = call.number(1.0)
        return call.layer(Connection(source.name, Contraction(f"{letters[0]},->{out}"), call.weight(ones)))
    if len(others) > 1:
        call.refuse("it joins more than one parameter with the activation.", "Multiply the parameters first.")
    connection = Connection(
        source.name,
        Contraction(f"{letters[active[0]]},{letters[others[0]]}->{out}"),
        call.weight(operands[others[0]], "weight"),
    )
    return call.layer(connection)


def _spell_ellipsis(equation: str, ranks: list[int]) -> str:
    inputs, arrow, out = equation.partition("->")
    parts = inputs.split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    named = [len(part.replace("...", "")) for part in parts]
    widest = max(rank - count for part, rank, count in zip(parts, ranks, named, strict=True) if "..." in part)
    batch = "".join(free[:widest])
    parts = [
        part.replace("...", batch[len(batch) - (rank - count) :] if rank > count else "")
        for part, rank, count in zip(parts, ranks, named, strict=True)
    ]
    if not arrow:
        joined = inputs.replace(",", "").replace("...", "")
        out = batch + "".join(sorted(letter for letter in set(joined) if joined.count(letter) == 1))
    return ",".join(parts) + "->" + out.replace("...", batch)


@elementwise
def batch_norm_scale(weight: Tensor | None, variance: Tensor, epsilon: float) -> Tensor:
    """Return s = γ/√(σ²+ε) in float64."""
    scale = torch.rsqrt(variance.double() + epsilon)
    return scale if weight is None else weight.double() * scale


@elementwise
def batch_norm_shift(
    scale: Tensor, bias: Tensor | None, mean: Tensor, weight: Tensor | None, variance: Tensor, epsilon: float
) -> Tensor:
    """Return t = β − μ·γ/√(σ²+ε) in float64, accurate also where β and μ·s cancel.

    The error is at most 2u·|t| + 2⁻¹⁰⁰·(|β| + |μ·s|): s is carried as a sum of two float64 numbers, one Newton step beyond
    the square root, and so are its product with μ and the difference. Gradients are those of the plain formula.
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
        shift, tail = _two_product(mean.double(), high)
        found, lost = _two_sum(beta, -shift)
        found = found + (lost - tail - mean.double() * low)
        found = torch.where(torch.isfinite(found), found, plain)
    return found + (plain - plain.detach()) if torch.is_grad_enabled() else found


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


def is_batch_norm_shift(expression: Expression) -> TypeGuard[FunctionCall]:
    """Whether an expression is the shift of a batch norm, which is a sum, unlike every other weight."""
    return isinstance(expression, FunctionCall) and expression.function is batch_norm_shift


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
    scale = Static(FunctionCall(batch_norm_scale, (gamma, variance.expression, epsilon)), variance.fake)
    parts = (scale.expression, beta, mean.expression, gamma, variance.expression, epsilon)
    shift = Static(FunctionCall(batch_norm_shift, parts), mean.fake)
    source = call.source("input")
    view = channels(scale, len(source.shape))
    layer = call.layer(
        Connection(source.name, Scale(view), call.weight(scale, "weight" if weight is not None else None, weight)),
        biases=call.bias(shift, view, "bias" if bias is not None else None, bias),
        shape=source.shape,
        unit_dim=1,
    )
    return layer if call.name == "batch_norm" else (layer,)
