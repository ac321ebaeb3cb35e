"""Order statistics: max-pooling, maximum, minimum, amax (k-max-pool neurons of SPEC §1).

All antecedents of such a neuron are paths, so its path activation is the sum over the window.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pathlift.edges import AxisMap, Reduce, Window
from pathlift.network import Apply, Constant, Extremum, Term
from pathlift.rules.base import Activation, Call, Forbidden, Layer, Static, Walled, rule

INDICES = Forbidden("it reads the indices of a maximum, which depend on the data.", "Do not use the indices in the model.")


def spatial_tuple(value: Any, count: int) -> tuple[int, ...]:
    """Return a pooling argument with one number per spatial dimension.

    Args:
        value: An integer or a list of one or ``count`` integers.
        count: Number of spatial dimensions.

    Returns:
        The numbers.
    """
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


def window(call: Call, source: Activation, spatial: int, out: tuple[int, ...]) -> Window:
    """Read the arguments of a sliding window; what `ceil_mode` adds on the right follows from the result's size.

    Args:
        call: The pooling call.
        source: Its input.
        spatial: Number of spatial dimensions.
        out: Shape of the result.

    Returns:
        The edges.
    """
    kernel = spatial_tuple(call.args["kernel_size"], spatial)
    stride = spatial_tuple(call.args.get("stride") or kernel, spatial)
    padding = spatial_tuple(call.args.get("padding", 0), spatial)
    dilation = spatial_tuple(call.args.get("dilation", 1), spatial)
    wall = call.args["self"]
    if isinstance(wall, Walled):
        before, after = ((*[0] * (spatial - len(own)), *reversed(own[:spatial])) for own in (wall.before, wall.after))
        if len(wall.before) > spatial or any(padding) or any(low > high for low, high in zip(before, after, strict=True)):
            call.refuse("its input has a border of −inf that is wider before than behind.", "Let max-pooling pad by itself.")
        padding = before
    extra = tuple(
        max(0, (count - 1) * step + gap * (size - 1) + 1 - length - 2 * pad)
        for count, step, gap, size, length, pad in zip(
            out[-spatial:], stride, dilation, kernel, source.shape[-spatial:], padding, strict=True
        )
    )
    return Window(kernel, stride, padding, dilation, extra)


def unwalled(call: Call) -> Activation:
    """Return the input of a max-pooling call, without a border of −inf."""
    value = call.args["self"]
    return value.source if isinstance(value, Walled) else call.source("self")


@rule("max_pool1d", "max_pool2d", "max_pool3d")
def max_pool(call: Call) -> Layer:
    """Max-pooling: the sum over the window; padding holds no antecedents."""
    source = unwalled(call)
    return call.layer(Term(source.name, window(call, source, int(call.name[8]), call.shape)), nonlinearity=Extremum(True))


@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool_with_indices(call: Call) -> tuple[Layer | Forbidden, ...]:
    """Max-pooling that also returns indices, which nothing may read."""
    source, out = unwalled(call), tuple(call.result[0].shape)
    edges = window(call, source, int(call.name[8]), out)
    return call.layer(Term(source.name, edges), shape=out, nonlinearity=Extremum(True)), INDICES


def adaptive_windows(size_in: int, size_out: int) -> Tensor:
    """Return the 0/1 matrix (out, in) of adaptive pooling: window i covers ⌊i·n/m⌋ … ⌈(i+1)·n/m⌉−1.

    Args:
        size_in: n.
        size_out: m.

    Returns:
        float64 matrix.
    """
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for place in range(size_out):
        matrix[place, place * size_in // size_out : math.ceil((place + 1) * size_in / size_out)] = 1
    return matrix


def along_axes(call: Call, source: Activation, matrices: dict[int, Tensor], nonlinearity: Extremum | None = None) -> Layer:
    """Apply one constant matrix per dimension; each but the last makes a layer in between.

    The map along several axes is the product of the maps along each, with exactly one path in between for each pair of
    an input and an output, so the sums over paths are those of the operator itself.

    Args:
        call: The call.
        source: Its input.
        matrices: Dimension to constant matrix (out, in), on the CPU.
        nonlinearity: Take extrema along each dimension instead of sums.

    Returns:
        The last layer.
    """
    assert matrices
    device = (call.result if isinstance(call.result, Tensor) else call.result[0]).device
    layer: Layer | None = None
    for dim, matrix in matrices.items():
        if layer is not None:
            source = call.builder.add(layer)
        shape = list(source.shape)
        shape[dim] = matrix.shape[0]
        term = Term(source.name, AxisMap(dim, matrix), call.weight(_constant(matrix, device)))
        layer = call.layer(term, shape=shape, nonlinearity=nonlinearity)
    assert layer is not None
    return layer


def _constant(matrix: Tensor, device: torch.device) -> Static:
    return Static(Apply(_on_device, (Constant(matrix), device)), matrix)


def _on_device(matrix: Tensor, device: torch.device) -> Tensor:
    return matrix if device.type == "meta" else matrix.to(device)


@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(call: Call) -> tuple[Layer | Forbidden, ...]:
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


@rule("amax", "amin")
def amax(call: Call) -> Layer:
    """The largest or smallest over dimensions."""
    source = call.source("self")
    reduce = Reduce(reduced_dims(call, source), bool(call.args["keepdim"]))
    return call.layer(Term(source.name, reduce), nonlinearity=_extremum(call))


def _extremum(call: Call) -> Extremum:
    """Tell maxima from minima by the operator's name; the number 0 among the antecedents starts no path."""
    zero = any(isinstance(value, Static) and not call.bias(value) for value in call.args.values())
    return Extremum("max" in call.name, zero)


@rule("max", "min")
def maximum_of_all(call: Call) -> Layer | Forbidden | tuple[Layer | Forbidden, ...]:
    """torch.max and torch.min in their three forms: of all elements, along one dimension, of two tensors."""
    if "other" in call.args:
        return maximum(call)
    source = call.source("self")
    if "dim" not in call.args:
        return call.layer(Term(source.name, Reduce(tuple(range(len(source.shape))), False)), nonlinearity=_extremum(call))
    reduce = Reduce(reduced_dims(call, source), bool(call.args["keepdim"]))
    return call.layer(Term(source.name, reduce), shape=call.result[0].shape, nonlinearity=_extremum(call)), INDICES


@rule("maximum", "minimum", "fmax", "fmin")
def maximum(call: Call) -> Layer:
    """The larger or smaller of two tensors, one of which may be a parameter or constant (then it is a bias)."""
    return call.summed(("self", 1.0), ("other", 1.0), nonlinearity=_extremum(call))
