"""One table from the operators of ONNX to functions of PyTorch; what differs between versions of the standard is settled here.

A function gets the node (its attributes and its version) and the inputs: tensors, but arrays of NumPy's where
`program.STATIC` says so. Operators that slide along or stretch an image are in `windows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pathlift.storage.onnx.program import DTYPES, Array, Node, NotReadError
from pathlift.storage.onnx.windows import WINDOWS

Function = Callable[..., Any]


def _of(function: Function, **defaults: Any) -> Function:
    """Return a function that takes attributes of the node, in this order, behind the values."""
    return lambda node, *values: function(*values, *(node.get(name, default) for name, default in defaults.items()))


def _each(function: Function) -> Function:
    """Return a function of two values as one of any number of them."""
    return lambda _node, *values: reduce(function, values)


def _numbers(node: Node, name: str, given: Array | None) -> tuple[int, ...] | None:
    """Return what is an attribute in old versions of the standard and an input in new ones."""
    numbers = node.get(name) if given is None else given.ravel()
    return None if numbers is None else tuple(map(int, numbers))


def _from_start(index: Tensor, size: int) -> Tensor:
    """Return indices of which negative ones count from the end."""
    return torch.where(index < 0, index + size, index)


# ---- affine


def _gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    a, b = a.T if node.get("transA", 0) else a, b if node.get("transB", 0) else b.T
    c = c if c is None or beta == 1 else c * beta
    if alpha == 1 and c is not None and c.shape == b.shape[:1]:
        return F.linear(a, b, c)
    product = F.linear(a, b) if alpha == 1 else F.linear(a, b) * alpha
    return product if c is None else product + c


def _batch_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.get("training_mode", 0) or (node.version < 14 and len(node.outputs) > 1):
        raise NotReadError("it takes its statistics from the batch (training mode).")
    if not node.get("spatial", 1):
        raise NotReadError("it has statistics for every position (version 8 of the standard).")
    return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, node.get("epsilon", 1e-5))


def _quantized(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    limits = torch.iinfo(torch.uint8 if zero is None else zero.dtype)
    shift = 0 if zero is None else _along(node, x, zero).to(x.dtype)
    return torch.clamp(torch.round(x / _along(node, x, scale)) + shift, limits.min, limits.max).to(getattr(torch, limits.dtype))


def _dequantized(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    number = x.to(scale.dtype)
    return (number if zero is None else number - _along(node, x, zero).to(scale.dtype)) * _along(node, x, scale)


def _along(node: Node, x: Tensor, value: Tensor) -> Tensor:
    """Lay a number per channel, or per block of neighbours, along the axis of the channels."""
    if node.get("output_dtype", 0) or node.get("precision", 0):
        raise NotReadError("it quantises to a type of its own.")
    axis = node.get("axis", 1)
    if block := node.get("block_size", 0):
        return value.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.dim()
    if value.numel() > 1:
        shape[axis] = -1
    return value.reshape(shape if x.dim() else ())


# ---- activations


def _clip(node: Node, x: Tensor, low: Array | None = None, high: Array | None = None) -> Tensor:
    lowest = node.get("min") if low is None else low.item()
    highest = node.get("max") if high is None else high.item()
    return x if lowest is None and highest is None else torch.clamp(x, lowest, highest)


def _prelu(_node: Node, x: Tensor, slope: Tensor) -> Tensor:
    shape = (*(1,) * (x.dim() - slope.dim()), *slope.shape)
    if all(size == 1 for axis, size in enumerate(shape) if axis != 1):
        return F.prelu(x, slope.reshape(-1))
    return torch.relu(x) - slope * torch.relu(-x)  # what PReLU is taken for: two neurons, one for each sign


def _softmax(function: Function) -> Function:
    def computed(node: Node, x: Tensor) -> Tensor:
        axis = node.get("axis", -1 if node.version >= 13 else 1)
        if node.version >= 13 or axis in {-1, x.dim() - 1}:
            return function(x, axis)  # type: ignore[no-any-return]
        return function(_flat(x, axis), -1).reshape(x.shape)  # type: ignore[no-any-return]

    return computed


def _flat(x: Tensor, axis: int) -> Tensor:
    axis = axis % x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


# ---- normalisation by the activations themselves: outside the theory, mapped so that the reason is given


def _layer_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    shape = x.shape[node.get("axis", -1) :]
    shift = shift if shift is None else shift.expand(shape)
    return F.layer_norm(x, shape, scale.expand(shape), shift, node.get("epsilon", 1e-5))


def _group_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    groups = node.settings["num_groups"]
    if scale.shape[0] != x.shape[1]:  # one number per group, before version 21
        scale, shift = (value.repeat_interleave(x.shape[1] // groups) for value in (scale, shift))
    return F.group_norm(x, groups, scale, shift, node.get("epsilon", 1e-5))


def _local_response(x: Tensor, size: int, alpha: float, beta: float, bias: float) -> Tensor:
    if size % 2 == 0:
        raise NotReadError("it normalises over an even number of channels.")
    return F.local_response_norm(x, size, alpha, beta, bias)


def _lp_norm(x: Tensor, power: int, axis: int) -> Tensor:
    size = torch.linalg.vector_norm(x, power, axis, keepdim=True)
    return x / torch.where(size == 0, 1.0, size)


# ---- reductions


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor]) -> Function:
    def computed(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
        along = _numbers(node, "axes", axes)
        if not along and node.get("noop_with_empty_axes", 0):  # each number for itself: its modulus, square, …
            return function(x[..., None], [x.dim()], False)
        return function(x, list(along or range(x.dim())), bool(node.get("keepdims", 1)))

    return computed


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _selected(function: Function) -> Function:
    def computed(node: Node, x: Tensor) -> Tensor:
        if node.get("select_last_index", 0):
            raise NotReadError("it selects the last of equal values.")
        return function(x, node.get("axis", 0), bool(node.get("keepdims", 1)))  # type: ignore[no-any-return]

    return computed


def _top(node: Node, x: Tensor, count: Array) -> tuple[Tensor, ...]:
    axis = node.get("axis", -1)
    ordered = torch.sort(x, dim=axis, descending=bool(node.get("largest", 1)), stable=True)
    return tuple(part.narrow(axis, 0, int(count.item())) for part in ordered)


def _summed_up(node: Node, x: Tensor, axis: Array) -> Tensor:
    if node.get("exclusive", 0) or node.get("reverse", 0):
        raise NotReadError("it sums from the end, or leaves out the value itself.")
    return torch.cumsum(x, int(axis.item()), dtype=x.dtype)


# ---- movement


def _reshape(node: Node, x: Tensor, shape: Array) -> Tensor:
    sizes = [x.shape[axis] if size == 0 and not node.get("allowzero", 0) else int(size) for axis, size in enumerate(shape)]
    return x.reshape([x.shape[0], *sizes[1:]] if node.get("keeps_batch") else sizes)


def _squeeze(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
    along = _numbers(node, "axes", axes)
    if along is None:
        along = tuple(axis for axis, size in enumerate(x.shape) if size == 1)
    if any(x.shape[axis] != 1 for axis in along):
        raise ValueError(f"a size that is to be left out is not 1: {tuple(x.shape)}, axes {along}")
    return torch.squeeze(x, along) if along else x


def _unsqueeze(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
    along = _numbers(node, "axes", axes) or ()
    return reduce(torch.unsqueeze, sorted(axis % (x.dim() + len(along)) for axis in along), x)


def _split(node: Node, x: Tensor, sizes: Array | None = None) -> tuple[Tensor, ...]:
    axis, given = node.get("axis", 0), _numbers(node, "split", sizes)
    if given is None:
        parts = node.get("num_outputs", len(node.outputs))
        size = -(-x.shape[axis] // parts)
        given = (*[size] * (parts - 1), x.shape[axis] - size * (parts - 1))
    return torch.split(x, list(given), axis)


def _slice(node: Node, x: Tensor, *options: Array | None) -> Tensor:
    options = (*options, *[None] * (4 - len(options)))
    starts, ends, axes, steps = (
        _numbers(node, name, option) for name, option in zip(("starts", "ends", "axes", "steps"), options, strict=True)
    )
    starts, ends = starts or (), ends or ()
    for start, end, axis, step in zip(starts, ends, axes or range(len(starts)), steps or [1] * len(starts), strict=True):
        chosen = range(*slice(start, end, step).indices(x.shape[axis]))
        if chosen.step > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(chosen.start, max(chosen.start, chosen.stop), chosen.step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
    return x


def _pad(node: Node, x: Tensor, pads: Array | None = None, value: Array | None = None, axes: Array | None = None) -> Tensor:
    sizes = _numbers(node, "pads", pads) or ()
    along = _numbers(node, "axes", axes) or tuple(range(x.dim()))
    pairs = [(0, 0)] * x.dim()
    for axis, *pair in zip(along, sizes[: len(along)], sizes[len(along) :], strict=True):
        pairs[axis] = (pair[0], pair[1])
    if all(pair == (0, 0) for pair in pairs):
        return x
    while len(pairs) > max(1, x.dim() - 2) and pairs[0] == (0, 0):
        del pairs[0]
    flat = [size for pair in reversed(pairs) for size in pair]
    mode = node.get("mode", "constant")
    if mode == "constant":
        return F.pad(x, flat, mode, node.get("value", 0.0) if value is None or not value.size else value.item())
    if min(flat) < 0 or len(pairs) > min(3, x.dim() - 1):
        raise NotReadError(f"it pads {x.dim()} dimensions by reflected or repeated values, or by less than nothing.")
    return F.pad(x, flat, {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode])


def _gather(node: Node, x: Tensor, index: Array | Tensor) -> Tensor:
    axis = node.get("axis", 0) % x.dim()
    size, shape = x.shape[axis], [*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]]
    if isinstance(index, Tensor):
        return torch.index_select(x, axis, _from_start(index, size).reshape(-1)).reshape(shape)
    if index.size and not (-size <= index.min() and index.max() < size):
        raise IndexError(f"there is no index {index.max()} in {size}")
    if index.ndim == 0:
        return x.select(axis, int(index))
    chosen = torch.index_select(x, axis, torch.tensor((index.ravel() % size).tolist(), dtype=torch.int64, device=x.device))
    return chosen if index.ndim == 1 else chosen.reshape(shape)


def _gather_each(x: Tensor, index: Tensor, axis: int) -> Tensor:
    return torch.gather(x, axis, _from_start(index, x.shape[axis]))


def _gather_nd(x: Tensor, index: Tensor, batch_dims: int) -> Tensor:
    if batch_dims:
        raise NotReadError("it gathers per sample.")
    return x[tuple(index.unbind(-1))]


def _scatter_nd(x: Tensor, index: Tensor, values: Tensor, kind: str) -> Tensor:
    if kind not in {"none", "add"}:
        raise NotReadError(f"it combines values by {kind!r}.")
    return x.index_put(tuple(index.unbind(-1)), values, accumulate=kind == "add")


def _scatter_each(x: Tensor, index: Tensor, values: Tensor, axis: int, kind: str) -> Tensor:
    if kind not in {"none", "add"}:
        raise NotReadError(f"it combines values by {kind!r}.")
    index = _from_start(index, x.shape[axis])
    return torch.scatter(x, axis, index, values) if kind == "none" else torch.scatter_add(x, axis, index, values)


def _filled(node: Node, shape: Array) -> Tensor:
    value = torch.tensor(node.get("value", np.zeros(1, dtype=np.float32)).item())
    kind = node.settings["value"].dtype.name if "value" in node.settings else "float32"
    return value.to(getattr(torch, kind)).expand([int(size) for size in shape])


def _depth_to_space(x: Tensor, block: int, mode: str) -> Tensor:
    if mode == "CRD":
        return F.pixel_shuffle(x, block)
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(batch, channels // block**2, height * block, width * block)


def _space_to_depth(x: Tensor, block: int) -> Tensor:
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(batch, channels * block**2, height // block, width // block)


def _cast(x: Tensor, kind: int) -> Tensor:
    if kind not in DTYPES:
        raise NotReadError(f"it casts to a type that is not read ({kind}).")
    return x.to(DTYPES[kind])


def _dropout(_node: Node, x: Tensor, ratio: Array | None = None, training: Array | None = None) -> Tensor:
    if training is not None and training.item() and (ratio is None or ratio.item()):
        raise NotReadError("it drops values at random (training mode).")
    return x


def _scaled(x: Tensor, offset: Sequence[float], scale: Sequence[float]) -> Tensor:
    return (x - torch.tensor(offset, dtype=x.dtype, device=x.device)) * torch.tensor(scale, dtype=x.dtype, device=x.device)


def _triangle(node: Node, x: Tensor, diagonal: Array | None = None) -> Tensor:
    return (torch.triu if node.get("upper", 1) else torch.tril)(x, 0 if diagonal is None else int(diagonal.item()))


def _sequence(node: Node, x: Tensor, sizes: Array | None = None) -> tuple[list[Tensor]]:
    axis = node.get("axis", 0)
    if sizes is None:
        pieces = x.split(1, axis)
        return ([piece if node.get("keepdims", 1) else piece.squeeze(axis) for piece in pieces],)
    return (list(x.split([int(size) for size in sizes] if sizes.ndim else int(sizes.item()), axis)),)


def _col2im(node: Node, x: Tensor, image: Array, block: Array) -> Tensor:
    plane, pads = len(block), node.get("pads", (0,) * (2 * len(block)))
    if plane != 2 or pads[:plane] != pads[plane:]:
        raise NotReadError("it folds columns into an image of other than two dimensions, or with unequal borders.")
    dilation, stride = (node.get(name, (1, 1)) for name in ("dilations", "strides"))
    return F.fold(x, tuple(map(int, image)), tuple(map(int, block)), dilation, pads[:plane], stride)


def _eye(node: Node, x: Tensor) -> Tensor:
    kind, offset = node.get("dtype"), node.get("k", 0)
    ones = torch.ones(x.shape, dtype=x.dtype if kind is None else DTYPES[kind], device=x.device)
    return ones.tril(offset).triu(offset)


def _grid(x: Tensor, grid: Tensor, mode: str, padding: str, corners: int) -> Tensor:
    return F.grid_sample(x, grid, {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode), padding, bool(corners))


OPERATORS: dict[str, Function] = {
    # of the same name in PyTorch: affine, piecewise linear, any other function of one value
    **{name: _of(getattr(torch, name.lower())) for name in (
        "Add", "Sub", "Mul", "Neg", "MatMul", "Relu", "Abs", "Where", "Sigmoid", "Tanh", "Erf", "Exp", "Log", "Sqrt",
        "Reciprocal", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Floor", "Ceil",
        "Round", "Sign", "IsNaN")},
    **{name: _of(getattr(F, name.lower())) for name in ("HardSwish", "Softplus", "Softsign", "Mish")},
    **{name: _of(getattr(torch, f"logical_{name.lower()}")) for name in ("And", "Or", "Xor", "Not")},
    "Equal": _of(torch.eq), "Greater": _of(torch.gt), "GreaterOrEqual": _of(torch.ge), "Less": _of(torch.lt),
    "LessOrEqual": _of(torch.le), "Sum": _each(torch.add), "Max": _each(torch.maximum), "Min": _each(torch.minimum),
    "Mean": lambda _node, *values: reduce(torch.add, values) / len(values),
    "Div": lambda _node, x, y: x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc"),
    "Pow": lambda _node, x, power: torch.pow(x, power).to(x.dtype),
    "Mod": lambda node, x, y: (torch.fmod if node.get("fmod", 0) else torch.remainder)(x, y),
    # affine
    "Gemm": _gemm, "BatchNormalization": _batch_norm, "QuantizeLinear": _quantized, "DequantizeLinear": _dequantized,
    "Einsum": lambda node, *values: torch.einsum(node.settings["equation"], *values), **WINDOWS,
    # activations
    "Clip": _clip, "PRelu": _prelu, "LeakyRelu": _of(F.leaky_relu, alpha=0.01),
    "ThresholdedRelu": lambda node, x: F.threshold(x, node.get("alpha", 1.0), 0.0),
    "HardSigmoid": lambda node, x: torch.clamp(x * node.get("alpha", 0.2) + node.get("beta", 0.5), 0.0, 1.0),
    "Softmax": _softmax(torch.softmax), "LogSoftmax": _softmax(torch.log_softmax), "Elu": _of(F.elu, alpha=1.0),
    "Celu": _of(F.celu, alpha=1.0), "Gelu": lambda node, x: F.gelu(x, approximate=node.get("approximate", "none")),
    "Selu": lambda node, x: F.elu(x, node.get("alpha", 1.6732631921768188)) * node.get("gamma", 1.0507010221481323),
    # outside the theory
    "InstanceNormalization": lambda node, x, scale, shift: F.instance_norm(
        x, None, None, scale, shift, True, 0.0, node.get("epsilon", 1e-5)),
    "LayerNormalization": _layer_norm, "GroupNormalization": _group_norm, "LpNormalization": _of(_lp_norm, p=2, axis=-1),
    "LRN": _of(_local_response, size=0, alpha=1e-4, beta=0.75, bias=1.0),
    "GridSample": _of(_grid, mode="bilinear", padding_mode="zeros", align_corners=0),
    "ArgMax": _selected(torch.argmax), "ArgMin": _selected(torch.argmin), "TopK": _top, "CumSum": _summed_up,
    # reductions
    "ReduceMean": _reduced(torch.mean), "ReduceSum": _reduced(torch.sum), "ReduceMax": _reduced(torch.amax),
    "ReduceMin": _reduced(torch.amin), "ReduceProd": _reduced(_product), "ReduceLogSumExp": _reduced(torch.logsumexp),
    "ReduceL1": _reduced(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduced(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceSumSquare": _reduced(lambda x, axes, keep: x.square().sum(axes, keep)),
    "ReduceLogSum": _reduced(lambda x, axes, keep: x.sum(axes, keep).log()),
    # movement
    "Identity": lambda _node, x: x, "Dropout": _dropout, "Cast": _of(_cast, to=0), "Reshape": _reshape, "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze, "Split": _split, "Slice": _slice, "Pad": _pad, "Gather": _gather, "ConstantOfShape": _filled,
    "CastLike": lambda _node, x, like: x.to(like.dtype), "Flatten": _of(_flat, axis=1), "Trilu": _triangle,
    "EyeLike": _eye, "Col2Im": _col2im, "SplitToSequence": _sequence,
    "SequenceAt": lambda _node, pieces, index: pieces[int(index.item())],
    "Transpose": lambda node, x: x.permute(node.get("perm", tuple(reversed(range(x.dim()))))),
    "GatherElements": _of(_gather_each, axis=0), "GatherND": _of(_gather_nd, batch_dims=0),
    "ScatterND": _of(_scatter_nd, reduction="none"), "ScatterElements": _of(_scatter_each, axis=0, reduction="none"),
    "Concat": lambda node, *values: torch.cat(values, node.settings["axis"]),
    "Expand": lambda _node, x, shape: x.expand(np.broadcast_shapes(tuple(x.shape), tuple(map(int, shape)))),
    "Tile": lambda _node, x, times: x.repeat(list(map(int, times))),
    # around the networks of scikit-learn
    "Scaler": _of(_scaled, offset=(0.0,), scale=(1.0,)), "ZipMap": lambda _node, x: x,
    "Binarizer": lambda node, x: (x > node.get("threshold", 0.0)).to(x.dtype),
    "ArrayFeatureExtractor": lambda _node, x, index: torch.index_select(x, -1, index.reshape(-1)).reshape(1, -1),
    "DepthToSpace": _of(_depth_to_space, blocksize=1, mode="DCR"), "SpaceToDepth": _of(_space_to_depth, blocksize=1),
}  # fmt: skip
"""Name of an operator to what computes it."""
