"""Affine operators with parameters: convolutions, linear layers, matrix products (mathematics §1)."""

from __future__ import annotations

import string
from collections.abc import Sequence

from pathlift.edges import Contraction, Convolution, Dense, Reduce
from pathlift.graph.layers import Connection
from pathlift.rules.base import Activation, Call, Draft, Static, Value, rule, spatial_tuple
from pathlift.rules.replay import replayed

BILINEAR = (
    "it multiplies two activations (a bilinear form, as attention does).",
    "Path-liftings need a parameter or a constant on one side of every product.",
)


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
    stride, dilation = spatial_tuple(args["stride"], spatial), spatial_tuple(args["dilation"], spatial)
    pad_before: tuple[int, ...] = ()
    if args["padding"] == "same":
        total = [gap * (size - 1) for gap, size in zip(dilation, weight.shape[2:], strict=True)]
        padding = tuple(t // 2 for t in total)
        if any(t % 2 for t in total):
            pad_before = tuple(p for t in reversed(total) for p in (0, t % 2))
    elif args["padding"] == "valid":
        padding = (0,) * spatial
    else:
        padding = spatial_tuple(args["padding"], spatial)
    transposed = bool(args.get("transposed", call.name.startswith("conv_transpose")))
    edges = Convolution(
        stride,
        padding,
        dilation,
        transposed,
        spatial_tuple(args.get("output_padding", 0), spatial),
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


def active_factor(call: Call, factors: Sequence[Value]) -> int:
    """Return which factor of a product is an activation; a product of several is refused."""
    active = [number for number, factor in enumerate(factors) if isinstance(factor, Activation)]
    return active[0] if len(active) == 1 else call.refuse(*BILINEAR)


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
    active = active_factor(call, operands)
    source, others = operands[active], [number for number in range(len(operands)) if number != active]
    if not others:
        return _summed_and_permuted(call, source, letters[0], out)
    if len(others) > 1:
        call.refuse("it joins more than one parameter with the activation.", "Multiply the parameters first.")
    connection = Connection(
        source.name,
        Contraction(f"{letters[active]},{letters[others[0]]}->{out}"),
        call.weight(operands[others[0]], "weight"),
    )
    return call.layer(connection)


def _summed_and_permuted(call: Call, source: Activation, letters: str, out: str) -> Draft:
    """An einsum of the activation alone: the dimensions that its result keeps in their order, the others summed."""
    order = out + "".join(letter for letter in letters if letter not in out)
    dims = [letters.index(letter) for letter in order]
    permuted = call.moved(source, replayed("aten::permute", dims=dims), [source.shape[dim] for dim in dims], "view")
    if len(order) == len(out):
        return permuted
    summed = tuple(range(len(out), len(order)))
    return call.layer(Connection(call.builder.add(permuted).name, Reduce(summed, keepdim=False)))


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
