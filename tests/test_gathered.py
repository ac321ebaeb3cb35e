"""Convolutions between compact tensors: windows that slide over a small image give what gathered columns give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pathlift.edges import gathered
from pathlift.edges.axis import Axis, through_taps
from pathlift.edges.convolution import Convolution
from pathlift.edges.gathered import GatheredConvolution
from pathlift.edges.weights import Bundle, Weights

CASES = [
    # channels below, above, groups; for each dimension kernel, stride, padding, dilation; classes of positions; slides
    ((4, 6, 1), [(3, 1, 1, 1), (3, 1, 1, 1)], [[0, 1, 2, 2, 2, 2, 3], [0, 1, 1, 1, 1, 1, 2]], True),
    ((4, 6, 2), [(3, 2, 1, 1), (5, 1, 2, 1)], [[0, 1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0]], True),
    ((6, 6, 6), [(3, 1, 0, 1), (1, 1, 0, 1)], [[0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 1, 0, 2]], True),
    ((2, 3, 1), [(3, 1, 1, 1)], [[0, 1, 2, 3, 4]], True),
    ((2, 3, 1), [(3, 1, 1, 1)] * 3, [[0, 1, 1, 1, 2], [0, 0, 0, 0], [0, 1, 2]], True),
    ((3, 2, 1), [(7, 2, 3, 1), (7, 2, 3, 1)], [[0] * 20, [0] * 21], True),
    ((3, 2, 1), [(4, 1, 2, 1), (2, 1, 0, 1)], [[0, 1, 1, 1, 1, 1], [0, 1, 2, 3]], True),
    ((3, 2, 1), [(3, 1, 2, 2), (3, 1, 2, 2)], [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]], False),
]


@pytest.mark.parametrize(("channels", "windows", "classes", "slides"), CASES)
def test_windows_that_slide_give_what_columns_give(
    channels: tuple[int, int, int],
    windows: list[tuple[int, int, int, int]],
    classes: list[list[int]],
    slides: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    below, above, groups = channels
    kernel, stride, padding, dilation = (tuple(numbers) for numbers in zip(*windows, strict=True))
    axes = [Axis.full(1), Axis.full(below)]
    axes += [Axis(len(own), torch.tensor(own), max(own) + 1) for own in classes]
    weight = torch.randn(above, below // groups, *kernel)
    full = torch.rand(1, below, *(axis.count for axis in axes[2:]))
    positions = full
    for dim, own in enumerate(classes, 2):
        positions = positions.index_select(dim, torch.tensor(own))
    function = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    expected = function(positions, weight.abs(), None, stride, padding, dilation, groups)

    convolution = Convolution(stride, padding, dilation, False, (0,) * len(kernel), groups)
    read = [
        through_taps(axis, convolution.taps(dim, size, own))
        for dim, (axis, size, own) in enumerate(zip(axes[2:], expected.shape[2:], kernel, strict=True))
    ]
    edges = GatheredConvolution(
        [table for _, table in read], [axis.count for axis in axes[2:]], groups=groups, transposed=False
    )
    assert (edges._image is not None) == slides
    w = Weights((weight,), torch.abs, torch.float32)
    bundle = Bundle((weight,), [(0, 0), (1, 0)], lambda own: [((0, 0), own.abs()), ((1, 0), own.square())], torch.float32)
    factors = {(0, 0): 0.5, (1, 0): 2.0}
    results = []
    for most in (1 << 20, 0):
        monkeypatch.setattr(gathered, "SLIDING", most)
        out = edges.sum(full, w)
        torch.manual_seed(0)
        g = torch.rand(out.shape)
        back, only = edges.adjoint(full, w, g, below=True, share=True), edges.adjoint(full, w, g, below=False, share=True)
        assert only[0] is None and edges.adjoint(full, w, g, below=True, share=False)[1] is None
        results.append([out, *back, only[1], *edges.sums({0: full}, bundle, factors).values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
    expanded = results[0][0]
    for dim, (axis, _) in enumerate(read, 2):
        expanded = expanded.index_select(dim, axis.index)
    torch.testing.assert_close(expanded, expected, rtol=2e-6, atol=1e-7)
