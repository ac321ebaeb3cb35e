"""Convolutions, pooling and resizing: operators of ONNX that slide along, or stretch, the positions of an image.

A padding that is not the same on both sides, or not one that PyTorch's operator takes, becomes an operator of its own. What a
resizing does along one axis is learnt from onnx's own evaluator, on a line of numbers: PyTorch's interpolation is taken where
it gives the same; else positions are selected where the nearest ones are, and two neighbours weighted by a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pathlift.errors import InputError
from pathlift.storage.onnx.host import LARGEST, evaluate
from pathlift.storage.onnx.program import Array, Node, NotReadError

Functions = Sequence[Callable[..., Tensor]]

CONV: Functions = (F.conv1d, F.conv2d, F.conv3d)
CONV_TRANSPOSE: Functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
MAX_POOL: Functions = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
AVERAGE_POOL: Functions = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


class _Window:
    """How a window slides along an input: its sizes, steps, dilations, and what is padded before and after each dimension."""

    def __init__(self, node: Node, x: Tensor, size: Sequence[int]) -> None:
        if not 3 <= x.dim() <= 5:
            raise NotReadError(f"it slides along {x.dim() - 2} dimensions; one to three are read.")
        self.count = x.dim() - 2
        self.size = tuple(size)
        self.stride = tuple(node.get("strides", (1,) * self.count))
        self.dilation = tuple(node.get("dilations", (1,) * self.count))
        self.span = tuple((size - 1) * apart + 1 for size, apart in zip(self.size, self.dilation, strict=True))
        self.auto = node.get("auto_pad", "NOTSET")
        flat = node.get("pads", (0,) * 2 * self.count) if self.auto == "NOTSET" else (0,) * 2 * self.count
        self.pads = list(zip(flat[: self.count], flat[self.count :], strict=True))
        if self.auto.startswith("SAME"):  # a window for every stride begun
            steps = zip(x.shape[2:], self.span, self.stride, strict=True)
            self.share([max((-(-size // stride) - 1) * stride + span - size, 0) for size, span, stride in steps])

    def share(self, totals: Sequence[int]) -> None:
        """Distribute paddings to both sides, the odd one at the end for ``SAME_UPPER``."""
        halves = [(total // 2, total - total // 2) for total in totals]
        self.pads = halves if self.auto == "SAME_UPPER" else [(more, less) for less, more in halves]

    @property
    def even(self) -> tuple[int, ...] | None:
        """The padding of both sides; None where they differ."""
        return tuple(one for one, _ in self.pads) if all(one == two >= 0 for one, two in self.pads) else None

    @property
    def pooled(self) -> tuple[int, ...] | None:
        """The padding of both sides, if it is one that PyTorch's pooling takes."""
        even = self.even
        return even if even is not None and all(2 * one <= two for one, two in zip(even, self.size, strict=True)) else None

    def padded(self, x: Tensor, value: float = 0.0, sign: int = 1) -> Tensor:
        """Return the input with its padding; without as much, for a negative sign."""
        flat = [sign * size for pair in reversed(self.pads) for size in pair]
        return F.pad(x, flat, "constant", value) if any(flat) else x

    def complete(self, x: Tensor) -> None:
        """Add to the padding at the end what the last window needs, when a window may lie partly outside."""
        for axis, (before, after) in enumerate(self.pads):
            rest = x.shape[2 + axis] + before + after - self.span[axis]
            count = -(-rest // self.stride[axis]) + 1
            if (count - 1) * self.stride[axis] >= x.shape[2 + axis] + before:
                count -= 1  # the last one would lie in the padding alone
            self.pads[axis] = (before, after + max((count - 1) * self.stride[axis] - rest, 0))


def _conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    window = _Window(node, x, weight.shape[2:])
    x, padding = (window.padded(x), 0) if window.even is None else (x, window.even)
    return CONV[window.count - 1](x, weight, bias, window.stride, padding, window.dilation, node.get("group", 1))


def _conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    window = _Window(node, x, weight.shape[2:])
    added = tuple(node.get("output_padding", (0,) * window.count))
    wanted = node.get("output_shape")
    if wanted is None and window.auto.startswith("SAME"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], window.stride, strict=True)]
    if wanted is not None:
        sizes = zip(x.shape[2:], window.stride, window.span, added, wanted[-window.count :], strict=True)
        window.share([(size - 1) * stride + span + more - want for size, stride, span, more, want in sizes])
    padding = 0 if window.even is None else window.even
    options = (window.stride, padding, added, node.get("group", 1), window.dilation)
    made = CONV_TRANSPOSE[window.count - 1](x, weight, bias, *options)
    return window.padded(made, sign=-1) if window.even is None else made


def _max_pool(node: Node, x: Tensor) -> Tensor:
    window, ceil = _Window(node, x, node.settings["kernel_shape"]), bool(node.get("ceil_mode", 0))
    pool = MAX_POOL[window.count - 1]
    if window.pooled is not None:
        return pool(x, window.size, window.stride, window.pooled, window.dilation, ceil)
    if ceil:
        window.complete(x)
    return pool(window.padded(x, -math.inf), window.size, window.stride, 0, window.dilation)


def _average_pool(node: Node, x: Tensor) -> Tensor:
    window, ceil = _Window(node, x, node.settings["kernel_shape"]), bool(node.get("ceil_mode", 0))
    counted = bool(node.get("count_include_pad", 0))
    if window.pooled is not None and set(window.dilation) == {1}:
        return AVERAGE_POOL[window.count - 1](x, window.size, window.stride, window.pooled, ceil, counted)
    inside = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    inside = window.padded(inside, 1.0) if counted else inside
    if ceil:
        window.complete(x)
    x, inside = window.padded(x), inside if counted else window.padded(inside)
    missing = [size - have for size, have in zip(x.shape[2:], inside.shape[2:], strict=True)]
    inside = F.pad(inside, [size for more in reversed(missing) for size in (0, more)])
    return _summed(x, window) * _summed(inside, window).reciprocal()


def _summed(x: Tensor, window: _Window) -> Tensor:
    """Return the sum over every window."""
    if set(window.dilation) == {1}:
        return AVERAGE_POOL[window.count - 1](x, window.size, window.stride) * math.prod(window.size)
    ones = torch.ones((x.shape[1], 1, *window.size), dtype=x.dtype, device=x.device)
    return CONV[window.count - 1](x, ones, None, window.stride, 0, window.dilation, x.shape[1])


# ---- resizing


LONGEST = 1 << 16
"""Nothing is resized to more positions along one axis."""

Options = tuple[tuple[str, Any], ...]

TOLERANCE = 1e-4
"""Numbers on a line that differ by less come from the same positions."""

PLAIN: Mapping[str, Sequence[str]] = {
    "nearest": ("nearest",) * 3, "linear": ("linear", "bilinear", "trilinear"), "cubic": ("", "bicubic", "")}  # fmt: skip
"""The mode of PyTorch's interpolation, by the number of dimensions that positions have."""


def _resize(
    node: Node, x: Tensor, region: Array | None = None, scales: Array | None = None, sizes: Array | None = None
) -> Tensor:
    if node.version < 11:  # the second input is what is now the third
        scales = np.array(node.settings["scales"], np.float32) if region is None else region
    old = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"} if node.version < 11 else {}
    settings = {"mode": "nearest", **old, **node.settings}
    settings = {name: value for name, value in settings.items() if name not in {"axes", "keep_aspect_ratio_policy", "scales"}}
    if settings.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise NotReadError("it crops what it resizes.")
    axes = [axis % x.dim() for axis in node.get("axes", range(x.dim()))]
    by, numbers = "scales", np.array([]) if scales is None else scales
    if sizes is not None and sizes.size:
        policy = node.get("keep_aspect_ratio_policy", "stretch")
        by, numbers = "sizes", _kept_ratio(policy, [x.shape[axis] for axis in axes], sizes)
    options, given = tuple(settings.items()), dict(zip(axes, numbers, strict=True))

    def along(axis: int, kind: str) -> Array:
        size = x.shape[axis]
        return _resized(size, by, given[axis].item(), options, kind) if axis in given else _line(kind, size)

    return _stretched(x, settings["mode"], along)


def _kept_ratio(policy: str, old: Sequence[int], new: Array) -> Array:
    """Return new sizes that have one ratio to the old, where that is asked for."""
    if policy == "stretch":
        return new
    ratio = (min if policy == "not_larger" else max)(int(two) / one for one, two in zip(old, new, strict=True))
    if any(abs(ratio * size - round(ratio * size)) > 1e-9 * size for size in old):
        raise NotReadError("it resizes by a factor that is not the ratio of the sizes.")
    return np.array([round(ratio * size) for size in old])


def _stretched(x: Tensor, mode: str, along: Callable[[int, str], Array]) -> Tensor:
    """Return what has the values `along` its axes where the input has those of `_line`."""
    lines = [along(axis, mode) for axis in range(x.dim())]
    new = [len(line) for line in lines]
    same = [np.array_equal(line, _line(mode, size)) for line, size in zip(lines, x.shape, strict=True)]
    if all(same):
        return x
    name = PLAIN[mode][x.dim() - 3] if 3 <= x.dim() <= 5 and all(same[:2]) else ""
    for how in ("half_pixel", "align_corners") if mode != "nearest" else ("asymmetric",):
        options = (("mode", mode), ("coordinate_transformation_mode", how), ("nearest_mode", "floor"))
        plain = [_resized(size, "sizes", count, options, mode) for size, count in zip(x.shape, new, strict=True)]
        if name and all(np.allclose(one, two, 0, TOLERANCE) for one, two in zip(lines, plain, strict=True)):
            corners = None if mode == "nearest" else how == "align_corners"
            return F.interpolate(x, size=new[2:], mode=name, align_corners=corners)
    for axis, line in enumerate(lines):
        if same[axis]:
            continue
        if mode == "nearest":
            x = x.index_select(axis, torch.tensor(line.astype(int).tolist(), dtype=torch.int64, device=x.device))
        else:
            shares = _shares(along(axis, "nearest"), line, x.shape[axis]).tolist()
            x = (x.movedim(axis, -1) @ torch.tensor(shares, dtype=x.dtype, device=x.device)).movedim(-1, axis)
    return x


def _shares(positions: Array, line: Array, size: int) -> Array:
    """Return the share of every position of an axis in those of a result, which stand at such `positions` of it."""
    if size * len(line) <= LARGEST:
        shares: Array = np.maximum(1 - np.abs(positions - np.arange(size)[:, None]), 0)
        if np.allclose(_line("linear", size) @ shares, line, 0, TOLERANCE):
            return shares
    raise NotReadError("it resizes in a way that PyTorch has no operator for, and by more than two neighbours.")


def _line(kind: str, size: int) -> Array:
    """Return numbers that show where each one of a result comes from: its index, or numbers without any pattern."""
    return np.arange(size, dtype=np.float64) if kind == "nearest" else np.random.default_rng(size).normal(size=size)


@lru_cache(4096)
def _resized(size: int, by: str, number: float, options: Options, kind: str) -> Array:
    """Return what onnx's own evaluator makes of a line of numbers."""
    count = math.floor(number if by == "sizes" else size * number)
    if count == size and (by == "sizes" or number == 1):
        return _line(kind, size)
    if not 0 < count <= LONGEST:
        raise InputError(f"it resizes {size} positions to {count:,}.")
    given = np.array([number], np.int64 if by == "sizes" else np.float32)
    arrays = [_line(kind, size), None, *([None, given] if by == "sizes" else [given])]
    (line,) = evaluate("Resize", 19, dict(options), arrays, 1)
    return line


WINDOWS: dict[str, Callable[..., Any]] = {
    "Conv": _conv, "ConvTranspose": _conv_transpose, "MaxPool": _max_pool, "AveragePool": _average_pool,
    "GlobalAveragePool": lambda _node, x: torch.mean(x, tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda _node, x: torch.amax(x, tuple(range(2, x.dim())), keepdim=True),
    "Resize": _resize, "Upsample": _resize,
}  # fmt: skip
"""Name of an operator to what computes it."""
