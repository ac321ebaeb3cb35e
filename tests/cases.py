"""The one list of small networks that the tests share: every operator, with its options, between layers with weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)


class Between(nn.Module):
    """weights → the operator under test → weights, so that errors in either direction show.

    The gain differs at every position: a map that mixes up positions cannot hide.
    """

    def __init__(self, op: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.lead = nn.Linear(shape[-1], shape[-1])
        self.gain = nn.Parameter(torch.ones(shape))
        self.op = op
        with torch.no_grad():
            out = op.double()(torch.zeros(1, *shape, dtype=torch.float64))
            sizes = out.reshape(1, -1).shape[1]
        self.tail = nn.Linear(sizes, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.op(self.lead(x) * self.gain).reshape(1, -1))


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU in between."""
    layers: list[nn.Module] = []
    for below, above in itertools.pairwise(widths):
        layers += [nn.Linear(below, above), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Case:
    """A network by name."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


PLANE = (2, 4, 3)
LINE = (2, 5)
CUBE = (1, 3, 2, 2)


def _between(op: Callable[[], nn.Module], shape: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: Between(op(), shape)


class WithParameters(nn.Module):
    """A function of the input and named parameters."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters())


def _ops() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Operator name to a maker and the shape it takes."""
    plane: dict[str, Callable[[], nn.Module]] = {
        "conv2d": lambda: nn.Conv2d(2, 2, 2),
        "conv2d without bias": lambda: nn.Conv2d(2, 2, 2, bias=False),
        "conv2d strided padded": lambda: nn.Conv2d(2, 2, 3, stride=2, padding=(1, 2)),
        "conv2d dilated": lambda: nn.Conv2d(2, 1, 2, dilation=(2, 1)),
        "conv2d depthwise": lambda: nn.Conv2d(2, 4, 2, groups=2),
        "conv2d same, even kernel": lambda: nn.Conv2d(2, 1, (2, 4), padding="same"),
        "conv2d valid": lambda: nn.Conv2d(2, 1, 2, padding="valid"),
        "conv2d reflect": lambda: nn.Conv2d(2, 1, 3, padding=1, padding_mode="reflect"),
        "conv2d replicate": lambda: nn.Conv2d(2, 1, 3, padding=1, padding_mode="replicate"),
        "conv2d circular": lambda: nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular"),
        "conv_transpose2d": lambda: nn.ConvTranspose2d(2, 2, 2, stride=2, padding=1, output_padding=1),
        "conv_transpose2d dilated groups": lambda: nn.ConvTranspose2d(2, 2, 2, groups=2, dilation=2),
        "batch_norm": lambda: nn.BatchNorm2d(2),
        "batch_norm without affine": lambda: nn.BatchNorm2d(2, affine=False),
        "conv and batch_norm": lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
        "relu": lambda: nn.ReLU(),
        "relu in place": lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True)),
        "leaky_relu": lambda: nn.LeakyReLU(0.3),
        "leaky_relu steep": lambda: nn.LeakyReLU(2.5),
        "leaky_relu negative": lambda: nn.LeakyReLU(-3.0),
        "prelu one": lambda: nn.PReLU(),
        "prelu per channel": lambda: nn.PReLU(2),
        "rrelu": lambda: nn.RReLU(),
        "relu6": lambda: nn.ReLU6(),
        "hardtanh": lambda: nn.Hardtanh(-0.5, 2.0),
        "clamp": lambda: Fn(lambda x: x.clamp(-0.25, 0.75)),
        "clamp below": lambda: Fn(lambda x: x.clamp(min=-0.5)),
        "clamp above": lambda: Fn(lambda x: x.clamp(max=1.5)),
        "clamp at zero": lambda: Fn(lambda x: x.clamp(min=0)),
        "threshold": lambda: nn.Threshold(0.0, 0.0),
        "abs": lambda: Fn(torch.abs),
        "maximum of two": lambda: Fn(lambda x: torch.maximum(x, x.flip(2))),
        "maximum with itself": lambda: Fn(lambda x: torch.maximum(x, x)),
        "maximum with a constant": lambda: Fn(lambda x: torch.maximum(x, torch.full((1,), 0.4, dtype=x.dtype))),
        "maximum with a parameter": lambda: WithParameters(torch.maximum, level=(2, 1, 1)),
        "minimum": lambda: Fn(lambda x: torch.minimum(x, -x)),
        "amax": lambda: Fn(lambda x: x.amax((2, 3), keepdim=True)),
        "amin": lambda: Fn(lambda x: x.amin(1)),
        "max along": lambda: Fn(lambda x: x.max(dim=2)[0]),
        "min along": lambda: Fn(lambda x: x.min(dim=1, keepdim=True).values),
        "max of all": lambda: Fn(lambda x: x.max()),
        "max_pool2d": lambda: nn.MaxPool2d(2),
        "max_pool2d padded": lambda: nn.MaxPool2d(3, stride=2, padding=1),
        "max_pool2d dilated": lambda: nn.MaxPool2d(2, stride=1, dilation=(2, 1)),
        "max_pool2d ceil": lambda: nn.MaxPool2d((3, 2), stride=2, ceil_mode=True),
        "max_pool2d after a border of minus infinity": lambda: Fn(
            lambda x: F.max_pool2d(F.pad(x, (0, 1, 1, 2), value=-torch.inf), 3, stride=(2, 1))
        ),
        "max_pool2d with indices": lambda: Fn(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
        "adaptive_max_pool2d": lambda: nn.AdaptiveMaxPool2d((3, 2)),
        "adaptive_max_pool2d global": lambda: nn.AdaptiveMaxPool2d(1),
        "avg_pool2d": lambda: nn.AvgPool2d(2),
        "avg_pool2d padded": lambda: nn.AvgPool2d(3, stride=2, padding=1),
        "avg_pool2d padded, pad not counted": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        "avg_pool2d ceil": lambda: nn.AvgPool2d((3, 2), 2, ceil_mode=True),
        "avg_pool2d ceil padded": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        "avg_pool2d ceil, pad not counted": lambda: nn.AvgPool2d(2, 2, 1, ceil_mode=True, count_include_pad=False),
        "avg_pool2d divisor": lambda: nn.AvgPool2d(2, 1, 1, divisor_override=3),
        "adaptive_avg_pool2d": lambda: nn.AdaptiveAvgPool2d((3, 2)),
        "adaptive_avg_pool2d divisible": lambda: nn.AdaptiveAvgPool2d((2, 3)),
        "adaptive_avg_pool2d global": lambda: nn.AdaptiveAvgPool2d(1),
        "mean": lambda: Fn(lambda x: x.mean((2, 3))),
        "mean negative dim": lambda: Fn(lambda x: x.mean(-1, keepdim=True)),
        "sum": lambda: Fn(lambda x: x.sum(1)),
        "add": lambda: Fn(lambda x: x + x.flip(3)),
        "add twice the same": lambda: Fn(lambda x: x + x),
        "add alpha": lambda: Fn(lambda x: torch.add(x, x.relu(), alpha=-2.5)),
        "add broadcast": lambda: Fn(lambda x: x + x.mean((2, 3), keepdim=True)),
        "add constant": lambda: Fn(lambda x: x + 1.5),
        "add parameter": lambda: WithParameters(lambda x, b: x + b, shift=(2, 1, 1)),
        "subtract": lambda: Fn(lambda x: x - x.relu()),
        "subtract itself": lambda: Fn(lambda x: x - x),
        "subtract parameter": lambda: WithParameters(lambda x, b: x - 2 * b, shift=(4, 3)),
        "rsub": lambda: Fn(lambda x: 2.0 - x),
        "neg": lambda: Fn(lambda x: -x),
        "mul constant": lambda: Fn(lambda x: x * -2.0),
        "mul tensor": lambda: Fn(lambda x: x * torch.tensor([[-1.0], [0.0], [2.0], [3.0]], dtype=x.dtype)),
        "mul parameter": lambda: WithParameters(lambda x, g: g * x, gain=(2, 1, 1)),
        "mul parameter broadcasts x": lambda: WithParameters(lambda x, g: x.mean(1, keepdim=True) * g, gain=(1, 3, 1, 1)),
        "parameter as gain and as shift": lambda: WithParameters(lambda x, g: x * g + g, gain=(2, 1, 1)),
        "weight and its transpose": lambda: WithParameters(lambda x, w: (x @ w).relu() @ w.t(), weight=(3, 2)),
        "convolution twice": lambda: _twice(nn.Conv2d(2, 2, 1)),
        "convolution twice without bias": lambda: _twice(nn.Conv2d(2, 2, 2, bias=False)),
        "batch_norm twice": lambda: _twice(nn.BatchNorm2d(2)),
        "div constant": lambda: Fn(lambda x: x / -4.0),
        "div parameter": lambda: WithParameters(lambda x, t: x / t, temperature=(2, 1, 1)),
        "cat": lambda: Fn(lambda x: torch.cat([x, x.relu(), x[:, :1]], 1)),
        "cat with constant": lambda: Fn(lambda x: torch.cat([x, torch.ones(1, 1, 4, 3, dtype=x.dtype)], 1)),
        "cat with parameter": lambda: WithParameters(lambda x, t: torch.cat([x, t], 2), token=(1, 2, 1, 3)),
        "stack": lambda: Fn(lambda x: torch.stack([x, -x], 2)),
        "split": lambda: Fn(lambda x: torch.split(x, [1, 3], 2)[1]),
        "chunk": lambda: Fn(lambda x: x.chunk(2, 1)[0] - 2 * x.chunk(2, 1)[1]),
        "unbind": lambda: Fn(lambda x: x.unbind(2)[1] + x.unbind(2)[3]),
        "slice": lambda: Fn(lambda x: x[:, :, 1::2, :-1]),
        "select": lambda: Fn(lambda x: x[:, 1]),
        "index": lambda: Fn(lambda x: x[:, [1, 0, 1]]),
        "index_select": lambda: Fn(lambda x: x.index_select(2, torch.tensor([3, 0, 0]))),
        "narrow": lambda: Fn(lambda x: x.narrow(2, 1, 2)),
        "permute": lambda: Fn(lambda x: x.permute(0, 3, 1, 2)),
        "transpose": lambda: Fn(lambda x: x.transpose(1, 3)),
        "moveaxis": lambda: Fn(lambda x: x.moveaxis(-1, 1)),
        "unsafe split": lambda: Fn(lambda x: torch.unsafe_split_with_sizes(x, [1, 3], 2)[1]),
        "flatten unflatten": lambda: Fn(lambda x: x.flatten(1).unflatten(1, (4, 6))),
        "squeeze unsqueeze": lambda: Fn(lambda x: x[:, :1].squeeze(1).unsqueeze(2)),
        "expand": lambda: Fn(lambda x: x[:, :1].expand(1, 3, 4, 3)),
        "repeat": lambda: Fn(lambda x: x.repeat(1, 2, 1, 1)),
        "repeat_interleave": lambda: Fn(lambda x: x.repeat_interleave(2, 3)),
        "roll": lambda: Fn(lambda x: x.roll((1, 2), (2, 3))),
        "flip": lambda: Fn(lambda x: x.flip(1)),
        "pad zero": lambda: Fn(lambda x: F.pad(x, (1, 0, 0, 2))),
        "pad crop": lambda: Fn(lambda x: F.pad(x, (-1, 1))),
        "pad constant": lambda: Fn(lambda x: F.pad(x, (1, 1), value=-0.7)),
        "pad reflect": lambda: Fn(lambda x: F.pad(x, (1, 1, 2, 0), mode="reflect")),
        "pad replicate": lambda: Fn(lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate")),
        "pad circular": lambda: Fn(lambda x: F.pad(x, (1, 1, 0, 2), mode="circular")),
        "pixel_shuffle": lambda: Fn(lambda x: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 2)),
        "pixel_unshuffle": lambda: Fn(lambda x: F.pixel_unshuffle(x[:, :, :, :2], 2)),
        "channel_shuffle": lambda: Fn(lambda x: F.channel_shuffle(x.repeat(1, 2, 1, 1), 2)),
        "im2col": lambda: nn.Unfold((2, 2), padding=1),
        "col2im": lambda: nn.Sequential(nn.Unfold(2), nn.Fold((4, 3), 2)),
        "tensor unfold": lambda: Fn(lambda x: x.unfold(2, 3, 1)),
        "upsample nearest": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
        "upsample nearest-exact": lambda: nn.Upsample(size=(5, 4), mode="nearest-exact"),
        "upsample bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
        "upsample bilinear aligned": lambda: nn.Upsample(size=(3, 5), mode="bilinear", align_corners=True),
        "upsample bicubic": lambda: nn.Upsample(size=(5, 4), mode="bicubic"),
        "upsample bicubic aligned": lambda: nn.Upsample(scale_factor=1.5, mode="bicubic", align_corners=True),
        "interpolate area": lambda: Fn(lambda x: F.interpolate(x, size=(3, 2), mode="area")),
        "interpolate antialias": lambda: Fn(lambda x: F.interpolate(x, size=(2, 2), mode="bilinear", antialias=True)),
        "dropout": lambda: nn.Dropout(0.5),
        "dropout2d": lambda: nn.Dropout2d(0.5),
        "identity": lambda: nn.Identity(),
        "cast": lambda: Fn(lambda x: x.to(torch.float64).contiguous().clone()),
        "where constant mask": lambda: Fn(lambda x: torch.where(torch.tensor([True, False, True]), x, -x)),
        "masked_fill": lambda: Fn(lambda x: x.masked_fill(torch.tensor([True, False, False]), 0.3)),
        "tril": lambda: Fn(torch.tril),
        "matmul right": lambda: WithParameters(lambda x, w: x @ w, weight=(3, 2)),
        "matmul left": lambda: WithParameters(lambda x, w: w @ x, weight=(2, 4)),
        "matmul batched parameter": lambda: WithParameters(lambda x, w: x @ w, weight=(2, 3, 2)),
        "matmul vector": lambda: WithParameters(lambda x, w: x @ w, weight=(3,)),
        "matmul constant": lambda: Fn(lambda x: x @ torch.arange(6, dtype=x.dtype).reshape(3, 2)),
        "matmul transposed parameter": lambda: WithParameters(lambda x, w: x @ w.t(), weight=(2, 3)),
        "bmm": lambda: WithParameters(lambda x, w: torch.bmm(x[0], w), weight=(2, 3, 2)),
        "einsum": lambda: WithParameters(lambda x, w: torch.einsum("bchw,cd->bdhw", x, w), weight=(2, 3)),
        "einsum ellipsis": lambda: WithParameters(lambda x, w: torch.einsum("...w,wv->...v", x, w), weight=(3, 2)),
        "einsum of one, permuted": lambda: Fn(lambda x: torch.einsum("bchw->bwch", x)),
        "einsum of one, summed": lambda: Fn(lambda x: torch.einsum("bchw->wb", x)),
        "slice assignment": lambda: Fn(_overwrite),
        "view in place": lambda: Fn(_in_place_on_a_view),
        "squeeze in place": lambda: Fn(lambda x: (x[:, :1] * 2.0).squeeze_(1).transpose_(1, 2)),
        "hstack": lambda: Fn(lambda x: torch.hstack([x, -x])),
        "vstack": lambda: Fn(lambda x: torch.vstack([x[0, 0], x[0, 1, 0]])),
        "dstack": lambda: Fn(lambda x: torch.dstack([x[0, 0], 2 * x[0, 1]])),
        "column_stack": lambda: Fn(lambda x: torch.column_stack([x[0, 0], x[0, 1, :, 0]])),
        "block_diag": lambda: Fn(lambda x: torch.block_diag(x[0, 0], x[0, 1, :2])),
        "broadcast_tensors": lambda: Fn(lambda x: torch.broadcast_tensors(x[:, :1], torch.ones(2, 1, 1, dtype=x.dtype))[0]),
        "meshgrid": lambda: Fn(lambda x: torch.meshgrid(x[0, 0, 0], x[0, 1, :2, 0], indexing="xy")[0]),
        "pad constant across channels": lambda: Fn(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=0.5)),
        "max_pool2d, minus infinity wider in front": lambda: Fn(
            lambda x: F.max_pool2d(F.pad(x, (2, 0), value=-torch.inf), 3, 1)
        ),
        "max_pool2d, minus infinity here and cut off there": lambda: Fn(
            lambda x: F.max_pool2d(F.pad(x, (2, -1, 0, 1), value=-torch.inf), (2, 3), 1, ceil_mode=True)
        ),
        "max_pool2d, minus infinity padded, sliced and moved": lambda: Fn(
            lambda x: F.max_pool2d(F.pad(F.pad(x, (1, 2), value=-torch.inf), (0, 0, 1, 0))[:, :, :, 1:].flip(3), 3, 2)
        ),
        "max_pool2d beside masked places": lambda: Fn(
            lambda x: F.max_pool2d(x.masked_fill(torch.eye(4, 3, dtype=torch.bool), -torch.inf), 2, 1)
        ),
        "amax over channels of minus infinity": lambda: Fn(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), value=-torch.inf).amax(1)),
        "max beside a constant choice": lambda: Fn(
            lambda x: torch.where(torch.tensor([True, False, True]), x, -torch.inf).max(3)[0]
        ),
        "aminmax": lambda: Fn(lambda x: torch.aminmax(x, dim=2)[1] - 2 * torch.aminmax(x, dim=2)[0]),
        "assignment at an index list": lambda: Fn(_overwrite_columns),
        "assignment behind a slice": lambda: Fn(_overwrite_behind_a_slice),
        "zeros written in place": lambda: Fn(_zeros_in_place),
        "assignment of one number that depends on the input": lambda: Fn(_overwrite_one),
        "index_put that adds up": lambda: Fn(
            lambda x: x.index_put((torch.tensor([0]), torch.tensor([1])), x[:1, 0], accumulate=True)
        ),
        "index_fill": lambda: Fn(lambda x: x.index_fill(2, torch.tensor([0, 2]), 1.5)),
        "index_copy": lambda: Fn(lambda x: x.index_copy(2, torch.tensor([3, 1]), x[:, :, :2])),
        "index_add": lambda: Fn(lambda x: x.index_add(2, torch.tensor([3, 1, 1]), x[:, :, :3], alpha=-2)),
        "scatter": lambda: Fn(lambda x: x.scatter(2, torch.tensor([3, 1]).reshape(1, 1, 2, 1), x)),
        "scatter a number": lambda: Fn(lambda x: x.scatter(2, torch.tensor([3, 1]).reshape(1, 1, 2, 1), 0.5)),
        "scatter_add": lambda: Fn(lambda x: x.scatter_add(2, torch.tensor([3, 1, 1]).reshape(1, 1, 3, 1), x)),
        "take": lambda: Fn(lambda x: x.take(torch.tensor([[3, 1, 1]]))),
        "lerp with a tensor": lambda: Fn(lambda x: torch.lerp(x, x.flip(2), torch.tensor([0.25, -0.5, 2.0], dtype=x.dtype))),
        "lerp with a parameter": lambda: WithParameters(lambda x, w: torch.lerp(x, x.flip(2), w), share=(3,)),
        "lerp from a constant": lambda: Fn(lambda x: torch.lerp(x.new_tensor([0.5, -1.0, 2.0]), x, x.new_tensor(0.3))),
        "lerp from a channel": lambda: WithParameters(lambda x, w: torch.lerp(x[:, :1], x, w), share=(3,)),
        "addcdiv": lambda: Fn(lambda x: torch.addcdiv(x, x.flip(2), torch.tensor([1, 3, -7]), value=0.5)),
        "mul mask": lambda: Fn(lambda x: x * torch.tensor([True, False, True])),
        "div integers": lambda: Fn(lambda x: x / torch.tensor([3, 7, -5])),
        "subtract integers times alpha": lambda: Fn(lambda x: torch.sub(x, torch.tensor([1, 2, 4]), alpha=0.3)),
        "cumsum": lambda: Fn(lambda x: x.cumsum(2)),
        "diff": lambda: Fn(lambda x: x.diff(n=2, dim=2)),
        "trace": lambda: Fn(lambda x: x[0, 0].trace()),
        "inner": lambda: WithParameters(torch.inner, weight=(2, 3)),
        "outer": lambda: WithParameters(lambda x, w: torch.outer(w, x[0, 0, 0]), weight=(2,)),
        "tensordot": lambda: WithParameters(lambda x, w: torch.tensordot(x, w, dims=([1, 3], [0, 1])), weight=(2, 3, 2)),
        "kron": lambda: Fn(lambda x: torch.kron(torch.tensor([[1.0, 2.0, -3.0]], dtype=x.dtype), x[0, 0])),
        "bilinear with a constant": lambda: WithParameters(
            lambda x, w, b: F.bilinear(x, torch.full((1, 2, 4, 2), 0.5, dtype=x.dtype), w, b), weight=(1, 3, 2), bias=(1,)
        ),
        "grid_sample": lambda: Fn(lambda x: F.grid_sample(x, _grid(x.dtype), align_corners=False)),
        "grid_sample nearest, at the border": lambda: Fn(
            lambda x: F.grid_sample(x, 1.5 * _grid(x.dtype), "nearest", "border", align_corners=True)
        ),
        "instance_norm with running statistics": lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
        "hardsigmoid": lambda: nn.Hardsigmoid(),
        "sliced parameter": lambda: WithParameters(lambda x, w: F.linear(x, w[:2], w[2, :2]), weight=(3, 3)),
        "lerp": lambda: Fn(lambda x: torch.lerp(x, x.flip(2), 0.25)),
        "addcmul": lambda: WithParameters(lambda x, w: torch.addcmul(x, x, w, value=-0.5), gain=(2, 1, 1)),
    }
    line: dict[str, Callable[[], nn.Module]] = {
        "conv1d": lambda: nn.Conv1d(2, 2, 2, stride=2, padding=1),
        "conv1d same": lambda: nn.Conv1d(2, 2, 4, padding="same"),
        "conv_transpose1d": lambda: nn.ConvTranspose1d(2, 2, 3, stride=2),
        "batch_norm1d": lambda: nn.BatchNorm1d(2),
        "max_pool1d": lambda: nn.MaxPool1d(3, 2, 1),
        "max_pool1d ceil dilated": lambda: nn.MaxPool1d(2, 2, dilation=2, ceil_mode=True),
        "adaptive_max_pool1d": lambda: nn.AdaptiveMaxPool1d(3),
        "avg_pool1d": lambda: nn.AvgPool1d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        "adaptive_avg_pool1d": lambda: nn.AdaptiveAvgPool1d(3),
        "upsample linear": lambda: nn.Upsample(scale_factor=2, mode="linear"),
        "upsample nearest1d": lambda: nn.Upsample(size=7, mode="nearest"),
        "pad reflect1d": lambda: nn.ReflectionPad1d((2, 1)),
        "linear": lambda: nn.Linear(5, 3),
        "linear without bias": lambda: nn.Linear(5, 3, bias=False),
        "flatten linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(10, 2)),
        "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(5, 2)),
        "pruned": lambda: _pruned(nn.Linear(5, 2)),
        "prelu alone": lambda: nn.Sequential(nn.Flatten(), nn.PReLU(10)),
        "max_pool1d, minus infinity in front": lambda: Fn(
            lambda x: F.max_pool1d(F.pad(x, (2, 0), value=-torch.inf), 3, return_indices=True)[0]
        ),
        "rnn": lambda: Recurrent(nn.RNN(5, 1, nonlinearity="relu")),
        "rnn of two layers without bias": lambda: Recurrent(nn.RNN(5, 1, 2, "relu", bias=False, batch_first=True, dropout=0.5)),
        "rnn in both directions": lambda: Recurrent(nn.RNN(5, 1, nonlinearity="relu", batch_first=True, bidirectional=True)),
        "rnn from a state": lambda: Recurrent(nn.RNN(5, 1, nonlinearity="relu", batch_first=True), state=True),
        "rnn cell": lambda: nn.Sequential(Fn(lambda x: x[:, 0]), nn.RNNCell(5, 2, nonlinearity="relu")),
    }
    cube: dict[str, Callable[[], nn.Module]] = {
        "conv3d": lambda: nn.Conv3d(1, 2, 2, padding=(0, 1, 0)),
        "conv_transpose3d": lambda: nn.ConvTranspose3d(1, 1, (1, 2, 1), stride=(2, 1, 1)),
        "batch_norm3d": lambda: nn.BatchNorm3d(1),
        "max_pool3d": lambda: nn.MaxPool3d((2, 2, 1), stride=1, padding=(1, 0, 0)),
        "adaptive_max_pool3d": lambda: nn.AdaptiveMaxPool3d((2, 1, 2)),
        "avg_pool3d": lambda: nn.AvgPool3d((2, 1, 2), stride=1, padding=(1, 0, 1), count_include_pad=False),
        "adaptive_avg_pool3d": lambda: nn.AdaptiveAvgPool3d((2, 2, 1)),
        "upsample trilinear": lambda: nn.Upsample(size=(2, 3, 2), mode="trilinear"),
        "max_pool3d, minus infinity across channels": lambda: Fn(
            lambda x: F.max_pool3d(F.pad(x, (1, 0, 0, 0, 0, 1), value=-torch.inf), 2, 1)
        ),
        "pad replicate3d": lambda: nn.ReplicationPad3d((1, 0, 0, 1, 0, 0)),
    }
    table = {name: (op, PLANE) for name, op in plane.items()}
    table.update({name: (op, LINE) for name, op in line.items()})
    table.update({name: (op, CUBE) for name, op in cube.items()})
    return table


def _overwrite(x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, :, 0] = x[:, :, 1] - x[:, :, 2]
    y[:, 1, 3] = 0.25
    return y


def _overwrite_columns(x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, :, [0, -1], [2, 1]] = x[:, :, [1, 1], [0, 0]]
    y[:, [1], 1] = 0.25
    return y


def _overwrite_behind_a_slice(x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, :, 1:][..., torch.tensor([True, False, True])] = x[:, :, :1, :1]
    y[:, :, ::2][:, [0, 0]] = 0.5
    y[..., ::2] *= 2.0
    y[:, 1] -= x[:, 0]
    return y


def _zeros_in_place(x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, 0, 1:].zero_()
    y[:, 1].view(-1)[:2].fill_(0.0)
    return y


def _overwrite_one(x: Tensor) -> Tensor:
    y = (x * 1.0).flatten(1)
    y[:, [0]] = x[:, -1, -1, -1:]
    return y


def _grid(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-0.9, 0.8, 12, dtype=dtype).reshape(1, 3, 2, 2)


class Recurrent(nn.Module):
    """All that a recurrent network returns, from zeros or from a state that depends on the input."""

    def __init__(self, network: nn.RNN, *, state: bool = False) -> None:
        super().__init__()
        self.network = network
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        steps = x if self.network.batch_first else x.transpose(0, 1)
        start = (x[:, :1, :1],) if self.state else ()
        return torch.cat([part.reshape(1, -1) for part in self.network(steps, *start)], 1)


def _in_place_on_a_view(x: Tensor) -> Tensor:
    y = x * 2.0
    y[:, :1].mul_(-3.0)
    return y


def _twice(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(module, nn.ReLU(), module)


def _pruned(module: nn.Linear) -> nn.Linear:
    prune.random_unstructured(module, "weight", 0.3)
    return module


OPERATORS = [Case(name, _between(op, shape), shape) for name, (op, shape) in _ops().items()]


class Residual(nn.Module):
    """A residual block with batch norm, and max-pooling: the shape of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(2)
        self.conv2 = nn.Conv2d(2, 2, 1)
        self.bn2 = nn.BatchNorm2d(2)
        self.down = nn.Conv2d(1, 2, 2)
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        y = torch.relu(y + self.down(x))
        return self.fc(F.max_pool2d(y, 2).flatten(1))


class Tied(nn.Module):
    """One module called twice, one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(torch.relu(self.first(x)))))


class Mirrored(nn.Module):
    """One parameter between different neurons, in two ways to write a product: an autoencoder with one matrix, say."""

    def __init__(
        self, first: Callable[[Tensor, Tensor], Tensor], second: Callable[[Tensor, Tensor], Tensor], outs: int
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outs, 3))
        self.lead, self.middle, self.tail = nn.Linear(3, 3), nn.Linear(outs, outs), nn.Linear(3, 2)
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(torch.relu(self.lead(x)), self.weight))
        return self.tail(torch.relu(self.second(torch.relu(self.middle(y)), self.weight)))


class SeveralOutputs(nn.Module):
    """Several outputs, one of them returned twice, one a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 2)
        self.head = nn.Linear(2, 2)
        self.level = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        h = torch.relu(self.trunk(x))
        return {"hidden": h, "heads": [self.head(h), h], "level": self.level}


class SeveralInputs(nn.Module):
    """Two inputs of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(self.a(x)) - torch.relu(self.b(y))


NETWORKS = [
    Case("residual", Residual, (1, 3, 3)),
    Case("tied", Tied, (3,)),
    Case("mirrored", lambda: Mirrored(F.linear, torch.matmul, 3), (3,)),
    Case("mirrored and narrow", lambda: Mirrored(F.linear, torch.matmul, 2), (3,)),
    Case("several outputs", SeveralOutputs, (3,)),
    Case("input returned", lambda: Fn(lambda x: x), (3,)),
    Case(
        "no bias at all",
        lambda: nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)),
        (3,),
    ),
]
