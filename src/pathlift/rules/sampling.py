"""Sampling an image at constant positions: a constant linear map from pixels to positions, the same for every channel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pathlift.edges import Contraction
from pathlift.graph.expressions import Formula, FunctionCall
from pathlift.graph.interval import Interval, IntervalArithmetic, NoIntervalError
from pathlift.graph.layers import Connection
from pathlift.rules.base import Activation, Call, Draft, Static, rule
from pathlift.rules.replay import Operator, replayed

LARGEST = 1 << 26
"""Entries of the matrix from pixels to positions."""


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(call: Call) -> Draft:
    """Bilinear, bicubic or nearest sampling at positions that do not depend on the input."""
    source, grid = call.source("input"), call.args["grid"]
    if isinstance(grid, Activation):
        call.refuse(
            "it samples the input at positions that depend on the input.",
            "Use torch.nn.functional.interpolate, or a constant grid.",
        )
    assert isinstance(grid, Static)
    pixels, positions = math.prod(source.shape[2:]), math.prod(grid.shape[1:-1])
    if source.shape[0] != 1:
        call.refuse("it samples several images at once.", "Sample one image per sample.")
    if pixels * positions > LARGEST:
        call.refuse(
            f"its map from {pixels} pixels to {positions} positions is too large to write down.",
            "Use torch.nn.functional.interpolate.",
        )
    options = {key: value for key, value in call.args.items() if key not in ("input", "grid")}
    arguments = (grid.expression, source.shape[2:], Operator.of(call.target), tuple(options.items()))
    matrix = Static(FunctionCall(SAMPLING, arguments), torch.empty((pixels, positions), device="meta"))
    channels = source.shape[1]
    flat = call.moved(source, replayed("aten::reshape", shape=(1, channels, pixels)), (1, channels, pixels), "view")
    connection = Connection(call.builder.add(flat).name, Contraction("bci,io->bco"), call.weight(matrix))
    # Nearest pixels jump with a position's last digit; the weights of others move with it.
    blur = math.inf if int(call.args["interpolation_mode"]) == 1 else 6.0 * 7 * max(source.shape[2:])
    sampled = call.builder.add(replace(call.layer(connection, shape=(1, channels, positions)), blur=blur))
    return call.moved(sampled, replayed("aten::reshape", shape=call.shape), spatial="view")


@dataclass(frozen=True)
class Sampling(Formula):
    """The matrix (pixels, positions): what each pixel alone looks like when it is sampled."""

    def __call__(
        self, grid: Tensor, sizes: tuple[int, ...], operator: Operator, options: tuple[tuple[str, int], ...]
    ) -> Tensor:
        """Return the matrix.

        Args:
            grid: The positions.
            sizes: Of the image.
            operator: What samples.
            options: Its options.

        Returns:
            The matrix, float64.
        """
        count = math.prod(sizes)
        pixels = torch.eye(count, dtype=torch.float64, device=grid.device).reshape(1, count, *sizes)
        sampled: Tensor = operator(pixels, grid.double(), **dict(options))
        return sampled.reshape(count, -1)

    def interval(
        self, _: IntervalArithmetic, grid: Interval, sizes: tuple[int, ...], operator: Operator, options: Any
    ) -> Interval:
        """Enclose weights that move with the last digit of a position; `Layer.blur` has the model's."""
        if not grid.exact:
            raise NoIntervalError("sampling at positions that vary")
        matrix = self(grid.low, sizes, operator, options)
        off = torch.full_like(matrix, 32 * max(sizes) * torch.finfo(torch.float64).eps)
        return Interval(matrix - off, matrix + off)


SAMPLING = Sampling()
