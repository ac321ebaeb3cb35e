"""Edge maps of convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pathlift.edges.axis import Axis, through_taps
from pathlift.edges.base import Compact, Edges
from pathlift.edges.gathered import COLUMNS, GatheredConvolution
from pathlift.edges.pattern import Pattern, convolution_pattern, tap_triples
from pathlift.edges.weights import Weights, computed

SMALL_WEIGHT = 1 << 18
"""Where no positions are equal, weights up to this size are left to PyTorch's convolution: gathering takes 1.3 to 2.6 times as
long. With 2 million weights it takes as long, and needs no copy of them."""


@dataclass(frozen=True)
class Convolution(Edges):
    """The convolution of `torch.convolution`, zero padding included (padding holds no neurons).

    ``pad_before`` is an extra zero padding, in the order of `torch.nn.functional.pad`, for 'same' with even kernels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    pad_before: tuple[int, ...] = ()

    @override
    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        assert weight is not None
        crossed = frozenset(dim for dim in (0, 1) if axes[dim].classes is not None)
        if crossed:
            return crossed
        full = all(axis.classes is None for axis in axes)
        if axes[0].size != 1 or (full and math.prod(weight) <= SMALL_WEIGHT and math.prod(weight[2:]) > 1):
            return super().compact(axes, out, weight)  # nothing to gain: no equal positions, and a small weight
        read = [
            through_taps(axis, self.taps(dim, above, kernel))
            for dim, (axis, above, kernel) in enumerate(zip(axes[2:], out[2:], weight[2:], strict=True))
        ]
        edges = GatheredConvolution(
            [table for _, table in read],
            [axis.count for axis in axes[2:]],
            groups=self.groups,
            transposed=self.transposed,
        )
        return Compact(edges, (Axis.full(1), Axis.full(out[1]), *(axis for axis, _ in read)))

    @override
    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        above = self.sum(torch.empty(below, device="meta"), computed(torch.empty(weight, device="meta"))).shape[2:]
        tables = [self.taps(dim, *sizes) for dim, sizes in enumerate(zip(above, weight[2:], strict=True))]
        triples = tap_triples(tables, below[2:], below[0])
        return convolution_pattern(below, weight, above, self.groups, transposed=self.transposed, triples=triples)

    def taps(self, dim: int, outputs: int, kernel: int) -> Tensor:
        """Return the input position that each output position reads with each tap, shape (outputs, kernel); −1 for none."""
        stride, padding, dilation = self.stride[dim], self.padding[dim], self.dilation[dim]
        positions, taps = torch.arange(outputs)[:, None], torch.arange(kernel) * dilation
        if self.transposed:
            shifted = positions + padding - taps  # input position q writes to q·stride − padding + tap
            return torch.where(shifted % stride == 0, shifted // stride, -1)
        before = self.pad_before[::-1][1::2] if self.pad_before else (0,) * len(self.stride)
        return positions * stride - padding - before[dim] + taps

    @override
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        return torch.convolution(self._pad(x), w.brief(), None, *self._options)

    @override
    def each(self, xs: Sequence[Tensor], w: Weights) -> list[Tensor]:
        return list(self.sum(torch.cat(list(xs)), w).chunk(len(xs)))

    @override
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        windows, kernels, above = self._windows(x, w.full())
        step = max(1, COLUMNS * 2 // max(1, kernels.numel() // self.groups))
        pieces = [
            torch.stack(
                [(part[:, group, :, None] * kernels[group]).amax(-1) for group in range(self.groups)], 1
            )  # batch, group, position, channel
            for part in windows.split(step, 2)
        ]
        return torch.cat(pieces, 2).transpose(2, 3).reshape(len(x), -1, *above)

    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        """One group and one channel above at a time."""
        first, kernels, above = self._windows(x, w)
        second, others, _ = self._windows(y, z)
        scale = ratio.reshape(len(x), self.groups, -1, math.prod(above))
        out = torch.empty_like(scale)
        for group in range(self.groups):
            for channel in range(scale.shape[2]):
                other = scale[:, group, channel, :, None] * (second[:, group] * others[group, channel])
                out[:, group, channel] = (first[:, group] * kernels[group, channel] - other).abs().sum(-1)
        return out.reshape(ratio.shape)

    def _windows(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Return what each position above reads and with which weights.

        Returns:
            Windows (batch, group, position, antecedents), kernels (group, channel, antecedents), spatial shape above.
        """
        x = self._pad(x)
        stride, padding = self.stride, self.padding
        if self.transposed:
            x, weight, padding = self._untranspose(x, weight)
            stride = (1,) * len(stride)
        if min(padding, default=0) < 0 or any(padding):
            x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
        for axis, (size, step, gap) in enumerate(zip(weight.shape[2:], stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
        batch, channels, *rest = x.shape
        x = x.reshape(batch, self.groups, channels // self.groups, -1, weight[0, 0].numel()).transpose(2, 3)
        kernels = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        return x.reshape(batch, self.groups, x.shape[2], -1), kernels, rest[: len(stride)]

    @override
    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        assert w is not None
        weight, padded = w.brief(), self._pad(x)
        to_below, to_weight, _ = torch.ops.aten.convolution_backward(
            g.contiguous(), padded, weight, None, *self._options, [below, share, False]
        )
        if below and self.pad_before:
            to_below = F.pad(to_below, [-pad for pad in self.pad_before])
        return to_below if below else None, to_weight.mul_(weight) if share else None

    @override
    def gatherer(self, x: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
        """One product of matrices for each sample and group: (functionals · channels, positions) × (positions, antecedents)."""
        above, otherwise = self._plain(x.shape[1:], w.shape), super().gatherer(x, w)
        if above is None:
            return otherwise
        windows, _, _ = self._windows(x.squeeze(1), w)

        def gathered(g: Tensor) -> Tensor:
            if g.shape[2:] != (1, w.shape[0], *above):
                return otherwise(g)
            rows = g.reshape(*g.shape[:2], self.groups, -1, math.prod(above)).transpose(1, 2)
            out: Tensor = rows.flatten(2, 3) @ windows
            return out.reshape(len(x), *rows.shape[1:4], -1).transpose(1, 2).reshape(len(x), g.shape[1], *w.shape)

        return gathered

    @override
    def returned(self, below: Sequence[int], w: Tensor, g: Tensor) -> Tensor:
        """One product for each functional and group, (antecedents, channels) × (channels, positions), folded up."""
        above = self._plain(below, w.shape[2:])
        if above is None or g.shape[2:] != (1, w.shape[2], *above):
            return super().returned(below, w, g)
        kernels = w.reshape(-1, self.groups, w.shape[2] // self.groups, math.prod(w.shape[3:]))
        columns = kernels.transpose(2, 3) @ g.reshape(*kernels.shape[:3], math.prod(above))
        missing = 4 - len(below)  # in one dimension a second one of size 1
        size, kernel, dilation, padding, stride = (
            (blank,) * missing + tuple(own)
            for own, blank in ((below[2:], 1), (w.shape[4:], 1), (self.dilation, 1), (self.padding, 0), (self.stride, 1))
        )
        out = F.fold(columns.reshape(len(columns), -1, columns.shape[-1]), size, kernel, dilation, padding, stride)
        return out.reshape(*g.shape[:2], *below)

    def _plain(self, below: Sequence[int], weight: Sequence[int]) -> list[int] | None:
        """Return the spatial shape above where a convolution of one sample in one or two dimensions is unfolded; else None."""
        if self.transposed or self.pad_before or below[0] != 1 or len(below) not in (3, 4):
            return None
        return [
            (size + 2 * pad - gap * (kernel - 1) - 1) // step + 1
            for size, pad, gap, kernel, step in zip(
                below[2:], self.padding, self.dilation, weight[2:], self.stride, strict=True
            )
        ]

    @property
    def _options(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        return (
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.transposed,
            list(self.output_padding),
            self.groups,
        )

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pad_before) if self.pad_before else x

    def _untranspose(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Rewrite a transposed convolution as a convolution with stride 1 over an input with zeros in between."""
        spatial = x.shape[2:]
        sizes = [
            (size - 1) * step + 1 + more for size, step, more in zip(spatial, self.stride, self.output_padding, strict=True)
        ]
        stretched = x.new_zeros(*x.shape[:2], *sizes)
        index = [slice(None), slice(None)]
        index += [slice(0, (size - 1) * step + 1, step) for size, step in zip(spatial, self.stride, strict=True)]
        stretched[tuple(index)] = x
        count = weight.shape[0] // self.groups
        kernels = weight.reshape(self.groups, count, *weight.shape[1:]).transpose(1, 2)
        kernels = kernels.reshape(-1, count, *weight.shape[2:]).flip(list(range(2, weight.dim())))
        padding = tuple(
            gap * (size - 1) - pad for gap, size, pad in zip(self.dilation, weight.shape[2:], self.padding, strict=True)
        )
        return stretched, kernels, padding
