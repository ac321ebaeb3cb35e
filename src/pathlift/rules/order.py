"""Order statistics: max-pooling, maximum, minimum, amax (k-max-pool neurons of mathematics §1).

All antecedents of such a neuron are paths, so its path activation is the sum over the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pathlift.edges import AxisMap, Reduce, Window
from pathlift.edges.unit import UnitEdges
from pathlift.edges.wall import Beside
from pathlift.graph.expressions import Constant, FunctionCall
from pathlift.graph.layers import Connection, Extremum
from pathlift.rules.base import Activation, Call, Draft, Forbidden, Refusal, Static, Walled, rule, spatial_tuple
from pathlift.rules.replay import replayed

INDICES = Forbidden("it reads the indices of a maximum, which depend on the data.", "Do not use the indices in the model.")


def window(call: Call, source: Activation, spatial: int, out: tuple[int, ...], border: Sequence[int] | None = None) -> Window:
    """Read the arguments of a sliding window; what `ceil_mode` adds on the right follows from the result's size.

    Args:
        call: The pooling call.
        source: Its input.
        spatial: Number of spatial dimensions.
        out: Shape of the result.
        border: Widths of a border of −inf in front, which the source comes without; behind, it follows from the result.

    Returns:
        The edges.
    """
    kernel = spatial_tuple(call.args["kernel_size"], spatial)
    stride = spatial_tuple(call.args.get("stride") or kernel, spatial)
    padding = spatial_tuple(call.args.get("padding", 0), spatial)
    dilation = spatial_tuple(call.args.get("dilation", 1), spatial)
    front = padding if border is None else tuple(pad + width for pad, width in zip(padding, border, strict=True))
    missing = tuple(
        (count - 1) * step + gap * (size - 1) + 1 - length - 2 * pad
        for count, step, gap, size, length, pad in zip(
            out[-spatial:], stride, dilation, kernel, source.shape[-spatial:], front, strict=True
        )
    )
    extra = tuple(max(0, width) for width in missing) if border is None else missing
    return Window(kernel, stride, front, dilation, extra)


def _pooled(call: Call, out: tuple[int, ...]) -> Draft:
    """Return the largest of each window; a border, of the operator's own or of −inf before it, holds no antecedents."""
    value, spatial = call.args["self"], int(call.name[8])
    if not isinstance(value, Walled):
        source = call.source("self")
        return _largest(call, source, window(call, source, spatial, out), None, out)
    inside = value.inside
    free = (~value.wall).nonzero()
    if not len(free):
        call.refuse("its input is −inf everywhere.", "Let each window reach into the input.")
    low, high = free.amin(0).tolist(), free.amax(0).tolist()
    spans = list(zip(low, high, inside.shape, strict=True))
    shape = tuple(last + 1 - first for first, last, _ in spans)
    rest = len(shape) - spatial
    if value.wall[tuple(slice(first, last + 1) for first, last, _ in spans)].any() or shape[:rest] != inside.shape[:rest]:
        return _largest(call, inside, window(call, inside, spatial, out), value.wall, out)
    cut = [width for first, last, size in reversed(spans[rest:]) for width in (-first, last + 1 - size)]
    crop = replayed("aten::constant_pad_nd", pad=tuple(cut))
    core = call.builder.add(call.moved(inside, crop, shape, tuple(range(-spatial, 0))))
    return _largest(call, core, window(call, core, spatial, out, low[rest:]), None, out)


def _largest(call: Call, source: Activation, pool: UnitEdges, wall: Tensor | None, out: Sequence[int]) -> Draft:
    """Return the largest antecedent of each neuron above, after a look that each has one."""
    lead = [1] * (len(source.shape) - len(pool.kernel)) if isinstance(pool, Window) else []
    there = torch.ones([*lead, *source.shape[len(lead) :]]) if wall is None else (~wall).float()
    if bool((pool.gather(there) == 0).any()):
        call.refuse(
            "a window lies wholly in the border, where it finds nothing but −inf.",
            "Choose padding, dilation and stride so that each window reaches into the input.",
        )
    edges = pool if wall is None else Beside(pool, wall)
    return call.layer(Connection(source.name, edges), shape=out, nonlinearity=_extremum(call))


@rule("max_pool1d", "max_pool2d", "max_pool3d", walls=True)
def max_pool(call: Call) -> Draft:
    """Max-pooling: the sum over the window; padding holds no antecedents."""
    return _pooled(call, call.shape)


@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", walls=True)
def max_pool_with_indices(call: Call) -> tuple[Draft | Forbidden, ...]:
    """Max-pooling that also returns indices, which nothing may read."""
    return _pooled(call, tuple(call.result[0].shape)), INDICES


def adaptive_windows(size_in: int, size_out: int) -> Tensor:
    """Return the 0/1 matrix (out, in) of adaptive pooling: window i covers ⌊i·n/m⌋ … ⌈(i+1)·n/m⌉−1.

    Args:
        size_in: n.
        size_out: m.

    Returns:
        float64 matrix.
    """
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for i in range(size_out):
        matrix[i, i * size_in // size_out : math.ceil((i + 1) * size_in / size_out)] = 1
    return matrix


def along_axes(
    call: Call,
    source: Activation,
    matrices: dict[int, Tensor],
    nonlinearity: Extremum | None = None,
    blur: float = 0.0,
) -> Draft:
    """Apply one constant matrix per dimension; each but the last makes a layer in between.

    The map along several axes is the product of the maps along each, with exactly one path in between for each pair of
    an input and an output, so the sums over paths are those of the operator itself.

    Args:
        call: The call.
        source: Its input.
        matrices: Dimension to constant matrix (out, in), on the CPU.
        nonlinearity: Take extrema along each dimension instead of sums.
        blur: See `Layer.blur`.

    Returns:
        The last layer.
    """
    assert matrices
    device = (call.result if isinstance(call.result, Tensor) else call.result[0]).device
    layer: Draft | None = None
    for dim, matrix in matrices.items():
        if layer is not None:
            source = call.builder.add(layer)
        shape = list(source.shape)
        shape[dim] = matrix.shape[0]
        connection = Connection(source.name, AxisMap(dim, matrix), call.weight(constant(matrix, device)))
        layer = replace(call.layer(connection, shape=shape, nonlinearity=nonlinearity), blur=blur)
    assert layer is not None
    return layer


def constant(matrix: Tensor, device: torch.device) -> Static:
    """Return a tensor as a constant of the graph.

    Args:
        matrix: The tensor, on the CPU.
        device: Where the network is.

    Returns:
        The constant.
    """
    return Static(FunctionCall(on_device, (Constant(matrix), device)), matrix)


def on_device(matrix: Tensor, device: torch.device) -> Tensor:
    """Return a constant where the network is; without values, when it has none.

    Args:
        matrix: The constant.
        device: The network's.

    Returns:
        The constant.
    """
    return matrix if device.type == "meta" else matrix.to(device)


@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(call: Call) -> tuple[Draft | Forbidden, ...]:
    """Adaptive max-pooling, divisible or not."""
    source, out = call.source("self"), tuple(call.result[0].shape)
    spatial = int(call.name[17])
    first = len(source.shape) - spatial
    matrices = {dim: adaptive_windows(source.shape[dim], out[dim]) for dim in range(first, len(source.shape))}
    return along_axes(call, source, matrices, Extremum(True)), INDICES


def reduced_dims(call: Call, source: Activation, key: str = "dim") -> tuple[int, ...]:
    """Return the dimensions that a reduction runs over: all of them when the argument is absent or empty.

    Args:
        call: The call.
        source: Its input.
        key: Schema name of the argument.

    Returns:
        Non-negative dimensions.
    """
    value = call.args.get(key)
    rank = len(source.shape)
    if value is None or (isinstance(value, (list, tuple)) and not value):
        dims = tuple(range(rank))
    else:
        dims = tuple(int(d) % rank for d in ([value] if isinstance(value, int) else value))
    if 0 in dims and source.shape[0] == 1 and rank > 1 and len(dims) < rank:
        call.refuse("it reduces over the batch dimension.", "Path-liftings describe one sample; do not mix samples of a batch.")
    return dims


@rule("amax", "amin", "max", "min", walls=True)
def largest(call: Call) -> Draft | Forbidden | tuple[Draft | Forbidden, ...]:
    """The largest or smallest along dimensions; torch.max and torch.min also in their other forms: of all, of two tensors."""
    value = call.args["self"]
    wall = value.wall if isinstance(value, Walled) else None
    if isinstance(value, Walled):
        if not _extremum(call).largest:
            raise Refusal(value.reason, value.advice)
        call = replace(call, args={**call.args, "self": value.inside})
    if "other" in call.args:
        if isinstance(value, Walled):
            raise Refusal(value.reason, value.advice)
        return maximum(call)
    source = call.source("self")
    reduce = Reduce(reduced_dims(call, source), bool(call.args.get("keepdim", False)))
    out = call.result[0] if isinstance(call.result, (list, tuple)) else call.result
    layer = _largest(call, source, reduce, wall, tuple(out.shape))
    return (layer, INDICES) if isinstance(call.result, (list, tuple)) else layer


@rule("aminmax")
def aminmax(call: Call) -> tuple[Draft, ...]:
    """The smallest and the largest along a dimension."""
    source = call.source("self")
    reduce = Reduce(reduced_dims(call, source), bool(call.args.get("keepdim", False)))
    kinds = (Extremum(largest=False), Extremum(largest=True))
    return tuple(call.layer(Connection(source.name, reduce), shape=call.result[0].shape, nonlinearity=kind) for kind in kinds)


def _extremum(call: Call) -> Extremum:
    """Tell maxima from minima by the operator's name; the number 0 among the antecedents starts no path."""
    zero = any(isinstance(value, Static) and not call.bias(value) for value in call.args.values())
    return Extremum("max" in call.name, zero)


@rule("maximum", "minimum", "fmax", "fmin")
def maximum(call: Call) -> Draft:
    """The larger or smaller of two tensors, one of which may be a parameter or constant (then it is a bias)."""
    return call.summed(("self", 1.0), ("other", 1.0), nonlinearity=_extremum(call))
