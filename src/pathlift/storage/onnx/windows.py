"""Convolutions, pooling and resizing: operators of ONNX that slide along, or stretch, the positions of an image.

A padding that is not the same on both sides, or not one that PyTorch's operator takes, becomes an operator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pathlift.storage.onnx.operators import OPERATORS, Array, Node, NotReadError

CONV: Sequence[Callable[..., Tensor]] = (F.conv1d, F.conv2d, F.conv3d)
CONV_TRANSPOSE: Sequence[Callable[..., Tensor]] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
MAX_POOL: Sequence[Callable[..., Tensor]] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)

Pair = tuple[int, int]


def _of(functions: Sequence[Callable[..., Tensor]], x: Tensor) -> Callable[..., Tensor]:
    """Return the function for the number of dimensions that positions have."""
    if not 3 <= x.dim() <= 5:
        raise NotReadError(f"it slides along {x.dim() - 2} dimensions; one to three are read.")
    return functions[x.dim() - 3]


class _Window:
    """How a window slides along an input.

    Attributes:
        size: Sizes of the window.
        stride: Its steps.
        dilation: Distances of its elements.
        pads: What is added before and after each dimension.
    """

    def __init__(self, node: Node, x: Tensor, size: Sequence[int]) -> None:
        """Read the attributes of a node."""
        count = x.dim() - 2
        self.size = tuple(size)
        self.stride = tuple(node.settings.get("strides", (1,) * count))
        self.dilation = tuple(node.settings.get("dilations", (1,) * count))
        self.span = tuple((one - 1) * two + 1 for one, two in zip(self.size, self.dilation, strict=True))
        auto = node.settings.get("auto_pad", "NOTSET")
        if auto == "NOTSET":
            flat = node.settings.get("pads", (0,) * 2 * count)
            self.pads: list[Pair] = list(zip(flat[:count], flat[count:], strict=True))
        elif auto == "VALID":
            self.pads = [(0, 0)] * count
        else:
            self.pads = [_same(*sizes, auto) for sizes in zip(x.shape[2:], self.span, self.stride, strict=True)]

    @property
    def even(self) -> tuple[int, ...] | None:
        """The padding of both sides; None where they differ."""
        return tuple(one for one, _ in self.pads) if all(one == two >= 0 for one, two in self.pads) else None

    def padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Return the input with its padding."""
        flat = [size for pair in reversed(self.pads) for size in pair]
        return F.pad(x, flat, "constant", value) if any(flat) else x

    def whole(self, x: Tensor) -> None:
        """Add to the padding at the end what the last window needs, when a window may lie partly outside."""
        for place, (before, after) in enumerate(self.pads):
            rest = x.shape[2 + place] + before + after - self.span[place]
            count = -(-rest // self.stride[place]) + 1
            if (count - 1) * self.stride[place] >= x.shape[2 + place] + before:
                count -= 1  # the last one would lie in the padding alone
            more = (count - 1) * self.stride[place] - rest
            self.pads[place] = (before, after + max(more, 0))


def _same(size: int, span: int, stride: int, auto: str) -> Pair:
    """Return the padding with which there is a window for every stride begun."""
    total = max((-(-size // stride) - 1) * stride + span - size, 0)
    less, more = total // 2, total - total // 2
    return (less, more) if auto == "SAME_UPPER" else (more, less)


def _conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    function = _of(CONV, x)
    window = _Window(node, x, weight.shape[2:])
    even = window.even
    x, padding = (window.padded(x), (0,) * len(window.size)) if even is None else (x, even)
    return function(x, weight, bias, window.stride, padding, window.dilation, node.settings.get("group", 1))


def _conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    function = _of(CONV_TRANSPOSE, x)
    count = x.dim() - 2
    window = _Window(node, x, weight.shape[2:])
    added = tuple(node.settings.get("output_padding", (0,) * count))
    whole = [
        (size - 1) * stride + span + more
        for size, stride, span, more in zip(x.shape[2:], window.stride, window.span, added, strict=True)
    ]
    wanted = node.settings.get("output_shape")
    auto = node.settings.get("auto_pad", "NOTSET")
    if wanted is not None or auto.startswith("SAME"):
        if wanted is None:
            wanted = [size * stride for size, stride in zip(x.shape[2:], window.stride, strict=True)]
        totals = [have - want for have, want in zip(whole, wanted[-count:], strict=True)]
        halves = [(total // 2, total - total // 2) for total in totals]
        window.pads = halves if auto == "SAME_UPPER" else [(more, less) for less, more in halves]
    even, group = window.even, node.settings.get("group", 1)
    if even is not None:
        return function(x, weight, bias, window.stride, even, added, group, window.dilation)
    window.pads = [(-one, -two) for one, two in window.pads]
    return window.padded(function(x, weight, bias, window.stride, (0,) * count, added, group, window.dilation))


def _max_pool(node: Node, x: Tensor) -> Tensor:
    function = _of(MAX_POOL, x)
    window = _Window(node, x, node.settings["kernel_shape"])
    if node.settings.get("ceil_mode", 0):
        window.whole(x)
    even = window.even
    if even is not None and all(2 * one <= two for one, two in zip(even, window.size, strict=True)):
        return function(x, window.size, window.stride, even, window.dilation)
    if node.settings.get("ceil_mode", 0) and all(one == two for one, two in _given(node, x)):
        own = [one for one, _ in _given(node, x)]
        if all(2 * one <= two for one, two in zip(own, window.size, strict=True)):
            return function(x, window.size, window.stride, own, window.dilation, True)
    return function(window.padded(x, -math.inf), window.size, window.stride, 0, window.dilation)


def _given(node: Node, x: Tensor) -> list[Pair]:
    """Return the padding that a node asks for, without what is added for the last window."""
    return _Window(node, x, node.settings["kernel_shape"]).pads


def _average_pool(node: Node, x: Tensor) -> Tensor:
    _of(CONV, x)
    window = _Window(node, x, node.settings["kernel_shape"])
    counted, given = bool(node.settings.get("count_include_pad", 0)), list(window.pads)
    if node.settings.get("ceil_mode", 0):
        window.whole(x)
    plain = all(pair == (0, 0) for pair in window.pads)
    if (plain or (counted and window.pads == given)) and set(window.dilation) == {1}:
        even = window.even
        x, padding = (window.padded(x), (0,) * len(window.size)) if even is None else (x, even)
        if all(2 * one <= two for one, two in zip(padding, window.size, strict=True)):
            return _pooled(x, window, padding)
        return _pooled(F.pad(x, [one for one in reversed(padding) for _ in range(2)]), window, (0,) * len(window.size))
    inside = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if counted:
        inside = F.pad(inside, [size for pair in reversed(given) for size in pair], "constant", 1.0)
        rest = [(two[0] - one[0], two[1] - one[1]) for one, two in zip(given, window.pads, strict=True)]
        inside = F.pad(inside, [size for pair in reversed(rest) for size in pair])
    else:
        inside = window.padded(inside)
    return _summed(window.padded(x), window) * _summed(inside, window).reciprocal()


def _pooled(x: Tensor, window: _Window, padding: Sequence[int]) -> Tensor:
    if x.dim() == 3:
        return F.avg_pool1d(x, window.size, window.stride, tuple(padding))
    return (F.avg_pool2d if x.dim() == 4 else F.avg_pool3d)(x, window.size, window.stride, tuple(padding))


def _summed(x: Tensor, window: _Window) -> Tensor:
    """Return the sum over every window."""
    if set(window.dilation) == {1}:
        return _pooled(x, window, (0,) * len(window.size)) * math.prod(window.size)
    ones = torch.ones((x.shape[1], 1, *window.size), dtype=x.dtype, device=x.device)
    return CONV[x.dim() - 3](x, ones, None, window.stride, 0, window.dilation, x.shape[1])


def _global(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda _node, x: function(x, tuple(range(2, x.dim())), keepdim=True)


# ---- resizing


def _resize(
    node: Node, x: Tensor, region: Array | None = None, scales: Array | None = None, sizes: Array | None = None
) -> Tensor:
    if node.version < 11:  # the second input is what is now the third
        region, scales = None, region
    axes = [axis % x.dim() for axis in node.settings.get("axes", range(x.dim()))]
    factors, wanted = [1.0] * x.dim(), list(x.shape)
    if sizes is not None and sizes.size:
        found = [int(size) / x.shape[axis] for axis, size in zip(axes, sizes, strict=True)]
        policy = node.settings.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            chosen = min(found) if policy == "not_larger" else max(found)
            found = [chosen] * len(axes)
        for axis, size, factor in zip(axes, sizes, found, strict=True):
            wanted[axis] = int(size) if policy == "stretch" else math.floor(factor * x.shape[axis] + 0.5)
            factors[axis] = factor if policy != "stretch" else wanted[axis] / x.shape[axis]
    elif scales is not None and scales.size:
        for axis, factor in zip(axes, scales, strict=True):
            factors[axis], wanted[axis] = float(factor), math.floor(x.shape[axis] * float(factor))
    else:
        factors = [float(factor) for factor in node.settings["scales"]]
        wanted = [math.floor(size * factor) for size, factor in zip(x.shape, factors, strict=True)]
    return _stretched(node, x, factors, wanted)


def _stretched(node: Node, x: Tensor, factors: Sequence[float], wanted: Sequence[int]) -> Tensor:
    mode = node.settings.get("mode", "nearest")
    how = node.settings.get("coordinate_transformation_mode", "half_pixel" if node.version >= 11 else "asymmetric")
    ratios = [new / size for new, size in zip(wanted, x.shape, strict=True)]
    exact = bool(np.array_equal(np.array(ratios, np.float32), np.array(factors, np.float32)))
    if how in {"align_corners", "half_pixel_symmetric"} and not exact:
        raise NotReadError("it resizes by a factor that is not the ratio of the sizes.")
    if node.settings.get("antialias", 0) or node.settings.get("exclude_outside", 0) or how == "tf_crop_and_resize":
        raise NotReadError("it resizes in a way that PyTorch has no operator for (antialiasing, cropping, excluded positions).")
    if mode == "nearest":
        return _nearest(node, x, factors, wanted, how)
    if all(factor == 1 for factor in factors):
        return x
    known = {"linear": ("linear", "bilinear", "trilinear"), "cubic": ("", "bicubic", "")}.get(mode, ("", "", ""))
    name = known[x.dim() - 3] if 3 <= x.dim() <= 5 else ""
    half = how == "half_pixel" or (how == "pytorch_half_pixel" and all(size > 1 for size in wanted[2:]))
    if not name or tuple(wanted[:2]) != tuple(x.shape[:2]) or not (half or how == "align_corners"):
        raise NotReadError(f"it resizes in a way that PyTorch has no operator for ({mode}, {how}).")
    if mode == "cubic" and node.settings.get("cubic_coeff_a", -0.75) != -0.75:
        raise NotReadError("it resizes by cubics other than PyTorch's.")
    if half and not exact:
        raise NotReadError("it resizes by a factor that is not the ratio of the sizes.")
    return F.interpolate(x, size=list(wanted[2:]), mode=name, align_corners=not half)


def _nearest(node: Node, x: Tensor, factors: Sequence[float], wanted: Sequence[int], how: str) -> Tensor:
    """Take the nearest positions; by PyTorch's own operator where it takes the same."""
    rounding = node.settings.get("nearest_mode", "round_prefer_floor" if node.version >= 11 else "floor")
    chosen = [_places(size, new, f, how, rounding) for size, new, f in zip(x.shape, wanted, factors, strict=True)]
    plain = [[place * size // new for place in range(new)] for size, new in zip(x.shape, wanted, strict=True)]
    if chosen == plain and 3 <= x.dim() <= 5 and tuple(wanted[:2]) == tuple(x.shape[:2]):
        return F.interpolate(x, size=list(wanted[2:]), mode="nearest")
    for axis, places in enumerate(chosen):
        if places != list(range(x.shape[axis])):
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x


ROUNDINGS: dict[str, Callable[[Any], Any]] = {
    "round_prefer_floor": lambda where: np.ceil(where - 0.5),
    "round_prefer_ceil": lambda where: np.floor(where + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _places(size: int, new: int, factor: float, how: str, rounding: str) -> list[int]:
    """Return the position that each new one is taken from."""
    if new == size and factor == 1:
        return list(range(size))
    place = np.arange(new, dtype=np.float64)
    if how == "half_pixel":
        where = (place + 0.5) / factor - 0.5
    elif how == "pytorch_half_pixel":
        where = (place + 0.5) / factor - 0.5 if new > 1 else place * 0
    elif how == "align_corners":
        where = place * (size - 1) / (new - 1) if new > 1 else place * 0
    elif how == "asymmetric":
        where = place / factor
    elif how == "half_pixel_symmetric":
        centre = size / 2 * (1 - new / (factor * size))
        where = centre + (place + 0.5) / factor - 0.5
    else:
        raise NotReadError(f"it resizes in a way that PyTorch has no operator for ({how}).")
    return [int(own) for own in np.clip(ROUNDINGS[rounding](where), 0, size - 1)]


OPERATORS.update({
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "Resize": _resize,
    "Upsample": _resize,
})
