"""A generator of random small networks over all operators, for property-based tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import OPERATORS, Fn, _ops

Shape: TypeAlias = "tuple[int, ...]"
Draw: TypeAlias = "Callable[[st.SearchStrategy[object]], object]"
PER_PART = 10
"""Random networks per test."""


class Stage(nn.Module):
    """One step of a random network: a module, alone or joined with a skip around it."""

    def __init__(self, module: nn.Module, join: str) -> None:
        super().__init__()
        self.module = module
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        if self.join == "add":
            return x + y
        if self.join == "subtract":
            return x - y
        if self.join == "cat":
            return torch.cat([x, y], 1)
        if self.join == "maximum":
            return torch.maximum(y, x)
        return y


def _window(draw: Draw, sizes: Shape) -> tuple[Shape, Shape, Shape, Shape]:
    """Kernel, stride, padding, dilation that fit."""
    kernel, stride, padding, dilation = [], [], [], []
    for size in sizes:
        k = draw(st.integers(1, min(3, size)))
        p = draw(st.integers(0, k // 2))
        d = draw(st.integers(1, 2)) if 2 * (k - 1) + 1 <= size + 2 * p else 1
        kernel.append(k)
        stride.append(draw(st.integers(1, 2)))
        padding.append(p)
        dilation.append(d)
    return tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)


def _weighted(draw: Draw, shape: Shape) -> nn.Module:
    """A layer with weights."""
    channels, sizes = shape[0], shape[1:]
    spatial = len(sizes)
    kind = draw(st.sampled_from(["conv", "conv", "transposed", "linear", "norm", "conv padded"]))
    out = draw(st.integers(1, 2))
    bias = draw(st.booleans())
    if kind == "norm":
        return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[spatial - 1](channels, affine=draw(st.booleans()))
    if kind == "linear":
        return nn.Linear(sizes[-1], draw(st.integers(1, 3)), bias=bias)
    kernel, stride, padding, dilation = _window(draw, sizes)
    groups = channels if draw(st.booleans()) else 1
    if kind == "transposed":
        stride = tuple(draw(st.integers(1, 2)) for _ in sizes)
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
        return layer(channels, groups * out, tuple(min(k, 2) for k in kernel), stride, groups=groups, bias=bias)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    if kind == "conv padded":
        mode = draw(st.sampled_from(["reflect", "replicate", "circular", "zeros"]))
        if mode == "reflect" and any(p >= s for p, s in zip(padding, sizes, strict=True)):
            mode = "zeros"
        return layer(channels, groups * out, kernel, stride, padding, dilation, groups, bias, mode)
    return layer(channels, groups * out, kernel, stride, padding, dilation, groups, bias)


def _weightless(draw: Draw, shape: Shape) -> nn.Module:
    """An activation, a pooling or a movement."""
    sizes = shape[1:]
    spatial = len(sizes)
    kind = draw(st.integers(0, 14))
    kernel, stride, padding, dilation = _window(draw, sizes)
    ceil = draw(st.booleans())
    if kind == 0:
        layer = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[spatial - 1]
        return layer(kernel, stride, padding, dilation, ceil_mode=ceil)
    if kind == 1:
        layer = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[spatial - 1]
        return layer(kernel, stride, padding, ceil, draw(st.booleans()))
    if kind in {2, 3}:
        target = tuple(draw(st.integers(1, size)) for size in sizes)
        kinds = ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),)
        kinds += ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),)
        return kinds[kind - 2][spatial - 1](target)
    if kind == 4:
        low = draw(st.integers(-64, 0)) / 64
        return nn.Hardtanh(low, low + draw(st.floats(0.1, 2)))
    if kind == 5:
        return nn.PReLU(draw(st.sampled_from([1, shape[0]])))
    if kind == 6:
        return nn.LeakyReLU(draw(st.floats(-2, 2)))
    if kind == 7:
        factor = draw(st.floats(-2, 2).filter(lambda v: abs(v) > 1e-3))
        return Fn(lambda x: x * factor)
    if kind == 8:
        order = draw(st.permutations(range(spatial)))
        return Fn(lambda x: x.permute(0, 1, *(2 + axis for axis in order)))
    if kind == 9:
        dim = draw(st.integers(1, spatial + 1))
        return Fn(lambda x: x.roll(1, dim) - x.flip(dim))
    if kind == 10:
        pads = tuple(draw(st.integers(0, 1)) for _ in range(2 * spatial))
        value = draw(st.sampled_from([0.0, -0.5]))
        return Fn(lambda x: F.pad(x, pads, value=value))
    if kind == 11:
        return Fn(lambda x: torch.minimum(x, x.mean(1, keepdim=True)))
    if kind == 12:
        mode = {1: "linear", 2: draw(st.sampled_from(["bilinear", "bicubic"])), 3: "trilinear"}[spatial]
        target = tuple(draw(st.integers(1, size + 1)) for size in sizes)
        return nn.Upsample(size=target, mode=mode, align_corners=draw(st.booleans()))
    if kind == 13:
        dim = draw(st.integers(1, spatial + 1))
        return Fn(lambda x: x.amax(dim, keepdim=True) - 2 * x.mean(dim, keepdim=True))
    return nn.ReLU()


@st.composite
def networks(draw: Draw) -> tuple[nn.Module, Shape]:
    """Draw a network of two to six stages with skips, on one to three spatial dimensions."""
    spatial = draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 2)), *(draw(st.integers(2, {1: 5, 2: 3, 3: 2}[spatial])) for _ in range(spatial)))
    first, x = shape, torch.zeros(1, *shape, dtype=torch.float64)
    stages: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 6))):
        make = _weighted if draw(st.booleans()) else _weightless
        module = make(draw, tuple(x.shape[1:])).double().eval()
        with torch.no_grad():
            y = module(x)
        joins = ["no"]
        if y.shape == x.shape:
            joins += ["add", "subtract", "maximum"]
        if y.shape[2:] == x.shape[2:] and x.shape[1] + y.shape[1] <= 4:
            joins.append("cat")
        stages.append(Stage(module, draw(st.sampled_from(joins))))
        with torch.no_grad():
            x = stages[-1](x)
        if x[0].numel() > 40:
            break
    head = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), draw(st.integers(1, 2))))
    return nn.Sequential(*stages, head), first


@st.composite
def operator_pairs(draw: Draw) -> tuple[nn.Module, Shape]:
    """Draw two operators of the shared list, one after the other where the shapes allow it."""
    case = draw(st.sampled_from(OPERATORS))
    if "in place" in case.name:
        case = OPERATORS[0]
    table = _ops()
    op = table[case.name][0]().double().eval()
    with torch.no_grad():  # a pruned layer keeps its last weight, with its graph
        x = op(torch.zeros(1, *case.shape, dtype=torch.float64))
    fitting = [n for n, (_, s) in table.items() if s == tuple(x.shape[1:])]
    stages = [op]
    if fitting:
        stages.append(table[draw(st.sampled_from(fitting))][0]().double().eval())
        with torch.no_grad():
            x = stages[-1](x)
    lead = nn.Linear(case.shape[-1], case.shape[-1])
    return nn.Sequential(lead, *stages, nn.Flatten(0), nn.Linear(x.numel(), 1)), case.shape


def over(
    strategy: st.SearchStrategy[tuple[nn.Module, Shape]],
    start: int,
    part: int,
    check: Callable[[nn.Module, Shape, int], None],
    count: int = PER_PART,
) -> None:
    """Call ``check(model, shape, weights)`` on ``count`` random networks, the same ones for the same ``start`` and part.

    Part 0 has fewer: `make test` runs it, the hunt all others.
    """

    @seed(start + part)
    @settings(
        max_examples=count if part else max(2, 2 * count // 5),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        database=None,
    )
    @given(strategy, st.integers(0, 2**16))
    def run(network: tuple[nn.Module, Shape], weights: int) -> None:
        check(*network, weights)

    run()
