"""Averages and sums: constant linear maps with one edge per element that counts (mathematics §1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathlift.edges import Reduce, Window
from pathlift.graph.layers import Connection, scalar_weight
from pathlift.rules.base import Call, Draft, rule
from pathlift.rules.order import adaptive_windows, along_axes, constant, reduced_dims, window


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(call: Call) -> Draft:
    """Average pooling: the sum over the window times 1/divisor, which may differ at the borders."""
    source, spatial = call.source("self"), int(call.name[8])
    edges = window(call, source, spatial, call.shape)
    divisor = call.args.get("divisor_override")
    clipped = any(edges.extra) or (any(edges.padding) and not call.args["count_include_pad"])
    if divisor or not clipped:
        weight = scalar_weight(1.0 / (divisor or math.prod(edges.kernel)))
        return call.layer(Connection(source.name, edges, weight))
    table = inverse_divisors(edges, source.shape[-spatial:], call.shape[-spatial:], bool(call.args["count_include_pad"]))
    return call.layer(Connection(source.name, edges, call.weight(constant(table, call.result.device))))


def inverse_divisors(edges: Window, sizes: tuple[int, ...], counts: tuple[int, ...], include_pad: bool) -> Tensor:
    """Return 1/divisor for each output position of an average pool.

    Args:
        edges: The sliding window.
        sizes: Spatial sizes of the input.
        counts: Spatial sizes of the output.
        include_pad: Whether padding counts (what `ceil_mode` adds never does).

    Returns:
        float64 tensor of shape ``counts``.
    """
    divisors = torch.ones(counts, dtype=torch.float64)
    for axis, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        first = torch.arange(count) * edges.stride[axis] - edges.padding[axis]
        last = torch.clamp(first + edges.kernel[axis], max=size + edges.padding[axis])
        if not include_pad:
            first, last = first.clamp(min=0), last.clamp(max=size)
        shape = [1] * len(sizes)
        shape[axis] = count
        divisors = divisors * (last - first).reshape(shape)
    return 1.0 / divisors


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d")
def adaptive_avg_pool(call: Call) -> Draft:
    """Adaptive average pooling, divisible or not."""
    source = call.source("self")
    spatial = int(call.name[-2])
    first = len(source.shape) - spatial
    dims = range(first, len(source.shape))
    if all(source.shape[dim] % call.shape[dim] == 0 for dim in dims):
        kernel = tuple(source.shape[dim] // call.shape[dim] for dim in dims)
        none = (0,) * spatial
        weight = scalar_weight(1.0 / math.prod(kernel))
        if all(call.shape[dim] == 1 for dim in dims):
            return call.layer(Connection(source.name, Reduce(tuple(dims), True), weight))
        return call.layer(Connection(source.name, Window(kernel, kernel, none, (1,) * spatial, none), weight))
    matrices = {}
    for dim in dims:
        matrix = adaptive_windows(source.shape[dim], call.shape[dim])
        matrices[dim] = matrix / matrix.sum(1, keepdim=True)
    return along_axes(call, source, matrices)


@rule("mean", "sum", "nansum")
def mean(call: Call) -> Draft:
    """Mean and sum over any dimensions."""
    source = call.source("self")
    dims = reduced_dims(call, source)
    reduce = Reduce(dims, bool(call.args.get("keepdim", False)))
    if call.name != "mean":
        return call.layer(Connection(source.name, reduce))
    count = math.prod(source.shape[dim] for dim in dims)
    return call.layer(Connection(source.name, reduce, scalar_weight(1.0 / count)))
