"""Edge maps of convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.edges.base import BLOCK_ELEMENTS, Edges, Weights


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
    fresh = True

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        return torch.convolution(self._pad(x), w.brief(), None, *self._options)

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        assert w is not None
        x, weight = self._pad(x), w.full()
        stride, padding = self.stride, self.padding
        if self.transposed:
            x, weight, padding = self._untranspose(x, weight)
            stride = (1,) * len(stride)
        if min(padding, default=0) < 0 or any(padding):
            x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
        for axis, (size, step, gap) in enumerate(zip(weight.shape[2:], stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
        batch, channels, *rest = x.shape
        places = rest[: len(stride)]
        count = channels // self.groups
        x = x.reshape(batch, self.groups, count, -1, weight[0, 0].numel()).transpose(2, 3)
        windows = x.reshape(batch, self.groups, x.shape[2], -1)  # batch, group, place, antecedents
        kernels = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        step = max(1, 8 * BLOCK_ELEMENTS // max(1, kernels.numel() // self.groups))
        pieces = [
            torch.stack(
                [(part[:, group, :, None] * kernels[group]).amax(-1) for group in range(self.groups)], 1
            )  # batch, group, place, channel
            for part in windows.split(step, 2)
        ]
        return torch.cat(pieces, 2).transpose(2, 3).reshape(batch, weight.shape[0], *places)

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Edges.adjoint`."""
        assert w is not None
        weight, padded = w.brief(), self._pad(x)
        to_below, to_weight, _ = torch.ops.aten.convolution_backward(
            g.contiguous(), padded, weight, None, *self._options, [below, share, False]
        )
        if below and self.pad_before:
            to_below = F.pad(to_below, [-pad for pad in self.pad_before])
        return to_below if below else None, to_weight.mul_(weight) if share else None

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
        spread = x.new_zeros(*x.shape[:2], *sizes)
        places: tuple[slice, ...] = (slice(None), slice(None))
        places += tuple(slice(0, (size - 1) * step + 1, step) for size, step in zip(spatial, self.stride, strict=True))
        spread[places] = x
        count = weight.shape[0] // self.groups
        kernels = weight.reshape(self.groups, count, *weight.shape[1:]).transpose(1, 2)
        kernels = kernels.reshape(-1, count, *weight.shape[2:]).flip(list(range(2, weight.dim())))
        padding = tuple(
            gap * (size - 1) - pad for gap, size, pad in zip(self.dilation, weight.shape[2:], self.padding, strict=True)
        )
        return spread, kernels, padding
