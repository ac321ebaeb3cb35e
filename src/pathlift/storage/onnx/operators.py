"""One table from the operators of ONNX to functions of PyTorch; what differs between versions of the standard is settled here.

A function gets the node (its attributes and its version) and the inputs: tensors, but arrays of NumPy's where `STATIC` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Array = np.ndarray[Any, Any]


class NotReadError(Exception):
    """An operator, or a way to use it, that is not read; the text says why."""


class Node(Protocol):
    """What a function sees of its node."""

    version: int
    settings: dict[str, Any]
    wanted: tuple[bool, ...]
    keeps_batch: bool


Function = Callable[..., Any]


def _plain(function: Function) -> Function:
    """Return a function that does not look at the node."""
    return lambda _node, *values: function(*values)


def _each(function: Callable[[Any, Any], Any]) -> Function:
    """Return a function of two values as one of any number of them."""
    return lambda _node, *values: reduce(function, values)


def _divided(one: Tensor, two: Tensor) -> Tensor:
    return one / two if one.is_floating_point() else torch.div(one, two, rounding_mode="trunc")


def _option(node: Node, name: str, given: Array | None) -> tuple[int, ...] | None:
    """Return what is an attribute in old versions of the standard and an input in new ones."""
    if given is not None:
        return tuple(int(own) for own in given.ravel())
    found = node.settings.get(name)
    return None if found is None else tuple(found)


# ---- affine


def _gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    one, two = node.settings.get("alpha", 1.0), node.settings.get("beta", 1.0)
    a = a.T if node.settings.get("transA", 0) else a
    b = b if node.settings.get("transB", 0) else b.T
    c = c if c is None or two == 1 else c * two
    if c is not None and c.dim() == 1 and c.shape[0] == b.shape[0] and one == 1:
        return F.linear(a, b, c)
    product = F.linear(a, b) if one == 1 else F.linear(a, b) * one
    return product if c is None else product + c


def _batch_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.settings.get("training_mode", 0):
        raise NotReadError("it takes its statistics from the batch (training mode).")
    if not node.settings.get("spatial", 1):
        raise NotReadError("it has statistics for every position (version 8 of the standard).")
    return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, node.settings.get("epsilon", 1e-5))


def _quantized(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    _check_granularity(node)
    kind = torch.uint8 if zero is None else zero.dtype
    scale, shift = _along(node, x, scale), 0 if zero is None else _along(node, x, zero).to(x.dtype)
    limits = torch.iinfo(kind)
    return torch.clamp(torch.round(x / scale) + shift, limits.min, limits.max).to(kind)


def _dequantized(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    _check_granularity(node)
    number = x.to(scale.dtype)
    return (number if zero is None else number - _along(node, x, zero).to(scale.dtype)) * _along(node, x, scale)


def _check_granularity(node: Node) -> None:
    if node.settings.get("block_size", 0) or node.settings.get("output_dtype", 0) or node.settings.get("precision", 0):
        raise NotReadError("it quantises by blocks, or to a type of its own.")


def _along(node: Node, x: Tensor, value: Tensor) -> Tensor:
    """Lay a number per channel along the axis of the channels."""
    if value.numel() == 1:
        return value.reshape(())
    axis = node.settings.get("axis", 1) % x.dim()
    return value.reshape([-1 if place == axis else 1 for place in range(x.dim())])


# ---- activations


def _clip(node: Node, x: Tensor, low: Array | None = None, high: Array | None = None) -> Tensor:
    lowest = node.settings.get("min") if low is None else low.item()
    highest = node.settings.get("max") if high is None else high.item()
    if lowest is None and highest is None:
        return x
    return torch.clamp(x, lowest, highest)


def _prelu(_node: Node, x: Tensor, slope: Tensor) -> Tensor:
    shape = (*(1,) * (x.dim() - slope.dim()), *slope.shape)
    if all(size == 1 for place, size in enumerate(shape) if place != 1):
        return F.prelu(x, slope.reshape(-1))
    return torch.relu(x) - slope * torch.relu(-x)  # what PReLU is taken for: two neurons, one for each sign


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Function:
    def computed(node: Node, x: Tensor) -> Tensor:
        if node.version >= 13:
            return function(x, node.settings.get("axis", -1))
        axis = node.settings.get("axis", 1)
        if axis in {-1, x.dim() - 1}:
            return function(x, -1)
        return function(_flat(x, axis), -1).reshape(x.shape)

    return computed


def _flat(x: Tensor, axis: int) -> Tensor:
    axis = axis % x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    alpha, beta = node.settings.get("alpha", 0.2), node.settings.get("beta", 0.5)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


def _gelu(node: Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.settings.get("approximate", "none"))


def _selu(node: Node, x: Tensor) -> Tensor:
    alpha, gamma = node.settings.get("alpha", 1.67326319217681884765625), node.settings.get("gamma", 1.05070102214813232421875)
    return F.elu(x, alpha) * float(gamma)


# ---- normalisation by the activations themselves: outside the theory, mapped so that the reason is given


def _instance_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.instance_norm(x, None, None, scale, shift, True, 0.0, node.settings.get("epsilon", 1e-5))


def _layer_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    axis = node.settings.get("axis", -1)
    shape = x.shape[axis:]
    shift = shift if shift is None else shift.expand(shape)
    return F.layer_norm(x, shape, scale.expand(shape), shift, node.settings.get("epsilon", 1e-5))


def _group_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    groups = node.settings["num_groups"]
    if scale.shape[0] != x.shape[1]:  # one number per group, before version 21
        scale, shift = (own.repeat_interleave(x.shape[1] // groups) for own in (scale, shift))
    return F.group_norm(x, groups, scale, shift, node.settings.get("epsilon", 1e-5))


def _local_response(node: Node, x: Tensor) -> Tensor:
    alpha, beta, bias = (node.settings.get(key, own) for key, own in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    if node.settings["size"] % 2 == 0:
        raise NotReadError("it normalises over an even number of channels.")
    return F.local_response_norm(x, node.settings["size"], alpha, beta, bias)


def _lp_norm(node: Node, x: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(x, node.settings.get("p", 2), node.settings.get("axis", -1), keepdim=True)
    return x / torch.where(size == 0, 1.0, size)


# ---- reductions


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor]) -> Function:
    def computed(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
        along = _option(node, "axes", axes)
        if not along:
            if node.settings.get("noop_with_empty_axes", 0):
                return x
            along = tuple(range(x.dim()))
        return function(x, list(along), bool(node.settings.get("keepdims", 1)))

    return computed


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _selected(function: Callable[..., Tensor]) -> Function:
    def computed(node: Node, x: Tensor) -> Tensor:
        if node.settings.get("select_last_index", 0):
            raise NotReadError("it selects the last of equal values.")
        return function(x, node.settings.get("axis", 0), bool(node.settings.get("keepdims", 1)))

    return computed


def _top(node: Node, x: Tensor, count: Array) -> tuple[Tensor, Tensor]:
    axis = node.settings.get("axis", -1)
    values, places = torch.sort(x, dim=axis, descending=bool(node.settings.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, int(count.item())), places.narrow(axis, 0, int(count.item()))


def _summed_up(node: Node, x: Tensor, axis: Array) -> Tensor:
    if node.settings.get("exclusive", 0) or node.settings.get("reverse", 0):
        raise NotReadError("it sums from the end, or leaves out the value itself.")
    return torch.cumsum(x, int(axis.item()), dtype=x.dtype)


# ---- movement


def _reshape(node: Node, x: Tensor, shape: Array) -> Tensor:
    sizes = [int(size) for size in shape]
    if not node.settings.get("allowzero", 0):
        sizes = [x.shape[place] if size == 0 else size for place, size in enumerate(sizes)]
    if node.keeps_batch:
        sizes[0] = x.shape[0]
    return x.reshape(sizes)


def _squeeze(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
    along = _option(node, "axes", axes)
    if along is None:
        along = tuple(place for place, size in enumerate(x.shape) if size == 1)
    if any(x.shape[axis] != 1 for axis in along):
        raise ValueError(f"a size that is to be left out is not 1: {tuple(x.shape)}, axes {along}")
    return torch.squeeze(x, along) if along else x


def _unsqueeze(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
    along = _option(node, "axes", axes) or ()
    rank = x.dim() + len(along)
    for axis in sorted(axis % rank for axis in along):
        x = x.unsqueeze(axis)
    return x


def _transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(node.settings.get("perm", tuple(reversed(range(x.dim())))))


def _split(node: Node, x: Tensor, sizes: Array | None = None) -> tuple[Tensor, ...]:
    axis = node.settings.get("axis", 0)
    given = _option(node, "split", sizes)
    if given is None:
        parts = node.settings.get("num_outputs", len(node.wanted))
        size = -(-x.shape[axis] // parts)
        given = (*[size] * (parts - 1), x.shape[axis] - size * (parts - 1))
    return torch.split(x, list(given), axis)


def _slice(
    node: Node,
    x: Tensor,
    starts: Array | None = None,
    ends: Array | None = None,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Tensor:
    first, last = _option(node, "starts", starts) or (), _option(node, "ends", ends) or ()
    along = _option(node, "axes", axes) or tuple(range(len(first)))
    strides = _option(node, "steps", steps) or (1,) * len(first)
    for start, end, axis, step in zip(first, last, along, strides, strict=True):
        size = x.shape[axis]
        found = range(*slice(start, end, step).indices(size))
        if found.step > 0:
            places = [slice(None)] * (axis % x.dim()) + [slice(found.start, max(found.start, found.stop), found.step)]
            x = x[tuple(places)]
        else:
            x = x.index_select(axis, torch.tensor(list(found), dtype=torch.int64, device=x.device))
    return x


def _pad(node: Node, x: Tensor, pads: Array | None = None, value: Array | None = None, axes: Array | None = None) -> Tensor:
    sizes = _option(node, "pads", pads) or ()
    along = _option(node, "axes", axes) or tuple(range(x.dim()))
    both = {axis % x.dim(): (sizes[place], sizes[place + len(along)]) for place, axis in enumerate(along)}
    pairs = [both.get(axis, (0, 0)) for axis in range(x.dim())]
    while len(pairs) > 1 and pairs[0] == (0, 0):
        del pairs[0]
    flat = [size for pair in reversed(pairs) for size in pair]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        node.settings.get("mode", "constant")
    ]
    if mode != "constant":
        if min(flat) < 0 or len(pairs) > min(3, x.dim() - 1):
            raise NotReadError(f"it pads {x.dim()} dimensions by reflected or repeated values, or by less than nothing.")
        return F.pad(x, flat, mode) if any(flat) else x
    number = node.settings.get("value", 0.0) if value is None or not value.size else value.item()
    return F.pad(x, flat, "constant", number) if any(flat) else x


def _gather(node: Node, x: Tensor, places: Array | Tensor) -> Tensor:
    axis = node.settings.get("axis", 0) % x.dim()
    if isinstance(places, Tensor):
        places = torch.where(places < 0, places + x.shape[axis], places)
        return torch.index_select(x, axis, places.reshape(-1)).reshape([*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]])
    size = x.shape[axis]
    if places.size and not (-size <= places.min() and places.max() < size):
        raise IndexError(f"there is no place {places.max()} in {size}")
    if places.ndim == 0:
        return x.select(axis, int(places))
    chosen = torch.tensor((places.ravel() % size).tolist(), dtype=torch.int64, device=x.device)
    found = torch.index_select(x, axis, chosen)
    return found if places.ndim == 1 else found.reshape([*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]])


def _gather_each(node: Node, x: Tensor, places: Tensor) -> Tensor:
    axis = node.settings.get("axis", 0)
    return torch.gather(x, axis, torch.where(places < 0, places + x.shape[axis], places))


def _gather_nd(node: Node, x: Tensor, places: Tensor) -> Tensor:
    if node.settings.get("batch_dims", 0):
        raise NotReadError("it gathers per sample.")
    return x[tuple(places.unbind(-1))]


def _scatter_nd(node: Node, x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    kind = node.settings.get("reduction", "none")
    if kind not in {"none", "add"}:
        raise NotReadError(f"it combines values by {kind!r}.")
    return x.index_put(tuple(places.unbind(-1)), values, accumulate=kind == "add")


def _scatter_each(node: Node, x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    axis, kind = node.settings.get("axis", 0), node.settings.get("reduction", "none")
    places = torch.where(places < 0, places + x.shape[axis], places)
    if kind == "none":
        return torch.scatter(x, axis, places, values)
    if kind == "add":
        return torch.scatter_add(x, axis, places, values)
    raise NotReadError(f"it combines values by {kind!r}.")


def _expand(_node: Node, x: Tensor, shape: Array) -> Tensor:
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(int(size) for size in shape)))


def _filled(node: Node, shape: Array) -> Tensor:
    value = torch.tensor(np.asarray(node.settings.get("value", np.zeros(1, dtype=np.float32))).item())
    kind = node.settings["value"].dtype if "value" in node.settings else np.dtype("float32")
    return value.to(getattr(torch, kind.name)).expand([int(size) for size in shape])


def _depth_to_space(node: Node, x: Tensor) -> Tensor:
    block = node.settings["blocksize"]
    if node.settings.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(batch, channels // block**2, height * block, width * block)


def _space_to_depth(node: Node, x: Tensor) -> Tensor:
    block = node.settings["blocksize"]
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(batch, channels * block**2, height // block, width // block)


# ---- types


DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""Types of ``TensorProto`` by their numbers."""


def _cast(node: Node, x: Tensor) -> Tensor:
    if node.settings["to"] not in DTYPES:
        raise NotReadError(f"it casts to a type that is not read ({node.settings['to']}).")
    return x.to(DTYPES[node.settings["to"]])


def _dropout(_node: Node, x: Tensor, ratio: Array | None = None, training: Array | None = None) -> Tensor:
    if training is not None and training.item() and (ratio is None or ratio.item()):
        raise NotReadError("it drops values at random (training mode).")
    return x


def _mod(node: Node, one: Tensor, two: Tensor) -> Tensor:
    return torch.fmod(one, two) if node.settings.get("fmod", 0) else torch.remainder(one, two)


def _triangle(node: Node, x: Tensor, diagonal: Array | None = None) -> Tensor:
    return (torch.triu if node.settings.get("upper", 1) else torch.tril)(x, 0 if diagonal is None else int(diagonal.item()))


def _grid(node: Node, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(own := node.settings.get("mode", "bilinear"), own)
    corners = bool(node.settings.get("align_corners", 0))
    return F.grid_sample(x, grid, mode, node.settings.get("padding_mode", "zeros"), corners)


def _mean_of(_node: Node, *values: Tensor) -> Tensor:
    return reduce(torch.add, values) / len(values)


STATIC: Mapping[str, Sequence[int]] = {
    "Clip": (1, 2), "CumSum": (1,), "Dropout": (1, 2), "Expand": (1,), "Pad": (1, 2, 3),
    "Reshape": (1,), "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Tile": (1,), "TopK": (1,),
    "Trilu": (1,), "Unsqueeze": (1,), "Upsample": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2),
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
         "ReduceSum", "ReduceSumSquare"), (1,)),
}  # fmt: skip
"""Which inputs are numbers that decide what is computed."""

ARRAYS: Mapping[str, Sequence[int]] = {"Gather": (1,)}
"""Which inputs stay arrays of NumPy's where they are constants, and may be tensors as well."""

OPERATORS: dict[str, Function] = {
    # affine
    "Add": _plain(torch.add), "Sub": _plain(torch.sub), "Mul": _plain(torch.mul), "Div": _plain(_divided),
    "Neg": _plain(torch.neg), "Sum": _each(torch.add), "Mean": _mean_of, "MatMul": _plain(torch.matmul), "Gemm": _gemm,
    "BatchNormalization": _batch_norm, "QuantizeLinear": _quantized, "DequantizeLinear": _dequantized,
    "Einsum": lambda node, *values: torch.einsum(node.settings["equation"], *values),
    # piecewise linear
    "Relu": _plain(torch.relu), "Clip": _clip, "PRelu": _prelu, "Abs": _plain(torch.abs),
    "LeakyRelu": lambda node, x: F.leaky_relu(x, node.settings.get("alpha", 0.01)),
    "ThresholdedRelu": lambda node, x: F.threshold(x, node.settings.get("alpha", 1.0), 0.0),
    "Max": _each(torch.maximum), "Min": _each(torch.minimum), "HardSigmoid": _hard_sigmoid,
    # other functions of one value
    "Sigmoid": _plain(torch.sigmoid), "Tanh": _plain(torch.tanh), "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax), "HardSwish": _plain(F.hardswish), "Gelu": _gelu,
    "Elu": lambda node, x: F.elu(x, node.settings.get("alpha", 1.0)), "Selu": _selu,
    "Celu": lambda node, x: F.celu(x, node.settings.get("alpha", 1.0)), "Softplus": _plain(F.softplus),
    "Softsign": _plain(F.softsign), "Mish": _plain(F.mish), "Erf": _plain(torch.erf), "Exp": _plain(torch.exp),
    "Log": _plain(torch.log), "Sqrt": _plain(torch.sqrt), "Reciprocal": _plain(torch.reciprocal), "Sin": _plain(torch.sin),
    "Cos": _plain(torch.cos), "Tan": _plain(torch.tan), "Asin": _plain(torch.asin), "Acos": _plain(torch.acos),
    "Atan": _plain(torch.atan), "Sinh": _plain(torch.sinh), "Cosh": _plain(torch.cosh), "Asinh": _plain(torch.asinh),
    "Acosh": _plain(torch.acosh), "Atanh": _plain(torch.atanh), "Floor": _plain(torch.floor), "Ceil": _plain(torch.ceil),
    "Round": _plain(torch.round), "Sign": _plain(torch.sign), "Pow": lambda _node, x, power: torch.pow(x, power).to(x.dtype),
    "Mod": _mod,
    # outside the theory
    "InstanceNormalization": _instance_norm, "LayerNormalization": _layer_norm, "GroupNormalization": _group_norm,
    "LRN": _local_response, "LpNormalization": _lp_norm, "GridSample": _grid, "ArgMax": _selected(torch.argmax),
    "ArgMin": _selected(torch.argmin), "TopK": _top, "CumSum": _summed_up,
    "Equal": _plain(torch.eq), "Greater": _plain(torch.gt), "GreaterOrEqual": _plain(torch.ge), "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le), "And": _plain(torch.logical_and), "Or": _plain(torch.logical_or),
    "Xor": _plain(torch.logical_xor), "Not": _plain(torch.logical_not), "IsNaN": _plain(torch.isnan),
    # reductions
    "ReduceMean": _reduced(torch.mean), "ReduceSum": _reduced(torch.sum), "ReduceMax": _reduced(torch.amax),
    "ReduceMin": _reduced(torch.amin), "ReduceProd": _reduced(_product),
    "ReduceL1": _reduced(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduced(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceSumSquare": _reduced(lambda x, axes, keep: x.square().sum(axes, keep)),
    "ReduceLogSum": _reduced(lambda x, axes, keep: x.sum(axes, keep).log()), "ReduceLogSumExp": _reduced(torch.logsumexp),
    # movement
    "Identity": _plain(lambda x: x), "Dropout": _dropout, "Cast": _cast, "CastLike": lambda _node, x, like: x.to(like.dtype),
    "Reshape": _reshape, "Flatten": lambda node, x: _flat(x, node.settings.get("axis", 1)), "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze, "Transpose": _transpose, "Split": _split, "Slice": _slice, "Pad": _pad, "Gather": _gather,
    "GatherElements": _gather_each, "GatherND": _gather_nd, "ScatterND": _scatter_nd, "ScatterElements": _scatter_each,
    "ConstantOfShape": _filled,
    "Concat": lambda node, *values: torch.cat(values, node.settings["axis"]), "Expand": _expand,
    "Tile": lambda _node, x, times: x.repeat([int(own) for own in times]), "Where": _plain(torch.where),
    "DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth, "Trilu": _triangle,
}  # fmt: skip
"""Name of an operator to what computes it."""
