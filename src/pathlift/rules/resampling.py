"""Interpolation: constant linear maps, one small matrix per axis, read off the operator itself."""

from __future__ import annotations

from typing import Any

import torch

from pathlift.rules.base import Activation, Call, Draft, rule
from pathlift.rules.order import along_axes


@rule(
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
def upsample(call: Call) -> Draft:
    """Linear, bilinear, trilinear and bicubic interpolation: |weights|, one edge per non-zero entry."""
    key = next(iter(call.args))
    source = call.source(key)
    matrices: dict[int, torch.Tensor] = {}
    for dim in range(2, len(source.shape)):
        matrices[dim] = _along(call, key, source, dim)
    # Three roundings of a position of up to the number of pixels; the weights of 2 or 4 pixels move by up to 2 or 7 as much.
    steepness = 7 if "cubic" in call.name else 2
    return along_axes(call, source, matrices, blur=6.0 * steepness * max(source.shape[2:]))


def _along(call: Call, key: str, source: Activation, dim: int) -> torch.Tensor:
    """Apply the operator to the identity laid along one axis, constant along the others.

    The other axes have size 2: with size 1 PyTorch's antialiased kernels take channels for rows and give wrong numbers.

    Returns:
        Matrix (out size, in size).
    """
    size, count, rank = source.shape[dim], call.shape[dim], len(source.shape)
    shape = [1, size] + [1] * (rank - 2)
    shape[dim] = size
    args: dict[str, Any] = dict(call.args)
    identity = torch.eye(size, dtype=torch.float64).reshape(shape)
    args[key] = identity.expand(1, size, *(size if axis == dim else 2 for axis in range(2, rank))).contiguous()
    if args.get("output_size") is not None:
        args["output_size"] = [count if axis == dim else 2 for axis in range(2, rank)]
    if args.get("scale_factors") is not None:
        args["scale_factors"] = [
            scale if axis == dim else 1.0 for axis, scale in zip(range(2, rank), args["scale_factors"], strict=True)
        ]
    names = {1: ("scales",), 2: ("scales_h", "scales_w"), 3: ("scales_d", "scales_h", "scales_w")}[rank - 2]
    for axis, name in zip(range(2, rank), names, strict=True):
        if axis != dim and name in args:
            args[name] = None
    out: torch.Tensor = call.target(**args)
    for axis in range(rank - 1, 1, -1):
        out = out if axis == dim else out.select(axis, 0)
    return out.reshape(size, count).T.contiguous()
