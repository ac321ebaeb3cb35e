"""Random networks that move neurons about between all their layers, with sizes that differ: no two axes can be mixed up unseen.

Each stage has two faces: the model's own, and that of the path program (mathematics §3) in plain PyTorch, where weights are
positive and every nonlinearity is what path activations see of it. The sum of the program's outputs on ones is the
path-norm, and its gradient gives the shares: a second opinion at the price of one forward and backward pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Shape: TypeAlias = "tuple[int, ...]"
Draw: TypeAlias = "Callable[[st.SearchStrategy[object]], object]"
Function: TypeAlias = "Callable[[Tensor], Tensor]"
Product: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
SIZES = (1, 2, 3, 4, 5, 6, 7)

_programs: list[bool] = []


@contextmanager
def as_path_program() -> Iterator[None]:
    """Stages show the face of the path program."""
    _programs.append(True)
    try:
        yield
    finally:
        _programs.pop()


class Stage(nn.Module):
    """A function with its face in the path program, its own one where that is None."""

    def __init__(self, function: Function, program: Function | None = None, name: str = "") -> None:
        super().__init__()
        self.function = function
        self.program = program
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return (self.program if _programs and self.program is not None else self.function)(x)

    def extra_repr(self) -> str:
        return self.name


class Weighted(nn.Module):
    """The same for a function of the input and one parameter."""

    def __init__(self, shape: Shape, function: Product, name: str, program: Product | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.function = function
        self.program = program
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return (self.program if _programs and self.program is not None else self.function)(x, self.weight)

    def extra_repr(self) -> str:
        return self.name


class Normalised(nn.Module):
    """A batch norm; the gradient of PyTorch's own is wrong for some tensors that are not contiguous (2.14)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if not _programs:
            return self.norm(x)
        norm, view = self.norm, (1, -1, *[1] * (x.dim() - 2))
        scale, shift = torch.rsqrt(norm.running_var + norm.eps), -norm.running_mean
        if norm.affine:
            scale = scale * norm.weight
        shift = shift * scale + norm.bias if norm.affine else shift * scale
        return x * scale.view(view) + shift.view(view)


def _dim(draw: Draw, shape: Shape) -> int:
    """A dimension of the batched tensor, batch left out, counted from either end."""
    dim = draw(st.integers(1, len(shape)))
    return dim if draw(st.booleans()) else dim - len(shape) - 1


def _size(shape: Shape, dim: int) -> int:
    return ((1, *shape))[dim]


def _factors(draw: Draw, size: int) -> Shape:
    """Two factors of a number."""
    first = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
    return first, size // first


def _permutation(draw: Draw, shape: Shape) -> Stage:
    order = draw(st.permutations(range(1, len(shape) + 1)))
    return Stage(lambda x: x.permute(0, *order), name=f"permute{order}")


def _transposition(draw: Draw, shape: Shape) -> Stage:
    one, two = _dim(draw, shape), _dim(draw, shape)
    kind = draw(st.sampled_from(["transpose", "movedim", "swapaxes"]))
    return Stage(lambda x: getattr(x, kind)(one, two), name=f"{kind}({one}, {two})")


def _splitting(draw: Draw, shape: Shape) -> Stage:
    dim = _dim(draw, shape)
    parts = _factors(draw, _size(shape, dim))
    return Stage(lambda x: x.unflatten(dim, parts), name=f"unflatten({dim}, {parts})")


def _merging(draw: Draw, shape: Shape) -> Stage:
    first = draw(st.integers(1, len(shape)))
    last = draw(st.integers(first, len(shape)))
    return Stage(lambda x: x.flatten(first, last), name=f"flatten({first}, {last})")


def _reshaping(draw: Draw, shape: Shape) -> Stage:
    """Across all borders: any factorisation of the number of neurons."""
    size, parts = math.prod(shape), []
    for _ in range(draw(st.integers(0, 3))):
        part, size = _factors(draw, size)
        parts.append(part)
    target = (*parts, size)
    if draw(st.booleans()):
        return Stage(lambda x: x.reshape(-1, *target), name=f"reshape{target}")
    return Stage(lambda x: x.contiguous().view(1, *target), name=f"view{target}")


def _slicing(draw: Draw, shape: Shape) -> Stage:
    slices: list[slice] = [slice(None)]
    for size in shape:
        start, step = draw(st.integers(0, size - 1)), draw(st.integers(1, 3))
        stop = draw(st.sampled_from([None, size, -1 if start < size - 1 else None]))
        slices.append(slice(start, stop, step) if draw(st.booleans()) else slice(None))
    chosen = tuple(slices)
    return Stage(lambda x: x[chosen], name=f"slice{chosen}")


def _selection(draw: Draw, shape: Shape) -> Stage:
    dim = _dim(draw, shape)
    size = _size(shape, dim)
    if len(shape) == 1:
        return Stage(lambda x: x.narrow(dim, size // 2, size - size // 2), name=f"narrow({dim})")
    index = draw(st.integers(-size, size - 1))
    return Stage(lambda x: x.select(dim, index), name=f"select({dim}, {index})")


def _piece(draw: Draw, shape: Shape) -> Stage:
    dim = _dim(draw, shape)
    size = _size(shape, dim)
    kind = draw(st.sampled_from(["chunk", "split", "tensor_split", "unbind"]))
    if kind == "unbind":
        index = draw(st.integers(-size, size - 1))
        return Stage(lambda x: x.unbind(dim)[index].unsqueeze(dim), name=f"unbind({dim})[{index}]")
    parts = draw(st.integers(1, size))
    return Stage(lambda x: getattr(x, kind)(parts, dim)[-1], name=f"{kind}({parts}, {dim})[-1]")


def _pieces(draw: Draw, shape: Shape) -> Stage:
    """Pieces laid side by side in another order, along their own or another dimension."""
    dim = _dim(draw, shape)
    parts = draw(st.integers(1, _size(shape, dim)))
    return Stage(lambda x: torch.cat(x.chunk(parts, dim)[::-1], dim), name=f"pieces({parts}, {dim})")


def _shuffle(draw: Draw, shape: Shape) -> Stage:
    dim = draw(st.integers(1, len(shape)))
    parts = _factors(draw, shape[dim - 1])
    if dim == 1 and len(shape) == 3 and draw(st.booleans()):
        return Stage(lambda x: F.channel_shuffle(x, parts[0]), name=f"channel_shuffle({parts[0]})")
    return Stage(
        lambda x: x.unflatten(dim, parts).transpose(dim, dim + 1).flatten(dim, dim + 1), name=f"shuffle({dim}, {parts})"
    )


def _pixels(draw: Draw, shape: Shape) -> Stage:
    if len(shape) == 3 and shape[0] % 4 == 0:
        return Stage(lambda x: F.pixel_shuffle(x, 2), name="pixel_shuffle")
    if len(shape) == 3 and shape[1] % 2 == 0 and shape[2] % 2 == 0:
        return Stage(lambda x: F.pixel_unshuffle(x, 2), name="pixel_unshuffle")
    return _permutation(draw, shape)


def _memory(draw: Draw, shape: Shape) -> Stage:
    """The same tensor, laid out otherwise."""
    if len(shape) == 3:
        if draw(st.booleans()):
            return Stage(lambda x: x.contiguous(memory_format=torch.channels_last), name="channels_last")
        return Stage(lambda x: x.to(memory_format=torch.channels_last).permute(0, 2, 3, 1), name="channels_last permuted")
    return Stage(lambda x: x.transpose(1, -1).contiguous().transpose(1, -1), name="laid backwards")


def _narrowest(draw: Draw, shape: Shape) -> Stage:
    """Dimensions of size 1 come and go."""
    kind = draw(st.sampled_from(["unsqueeze", "squeeze", "expand", "repeat", "tile"]))
    dim = draw(st.integers(1, len(shape) + 1))
    if kind == "squeeze":
        return Stage(lambda x: x.squeeze(tuple(range(2, x.dim()))), name="squeeze")
    if kind == "unsqueeze":
        return Stage(lambda x: x.unsqueeze(dim), name=f"unsqueeze({dim})")
    if kind == "expand":
        sizes = (*(1, *shape)[:dim], 2, *(1, *shape)[dim:])
        return Stage(lambda x: x.unsqueeze(dim).expand(sizes), name=f"expand({dim})")
    counts = tuple(2 if axis == dim else 1 for axis in range(len(shape) + 1))
    return Stage(lambda x: getattr(x, "repeat" if kind == "repeat" else "tile")(counts), name=f"{kind}{counts}")


def _turning(draw: Draw, shape: Shape) -> Stage:
    dims = tuple(sorted({_dim(draw, shape) % (len(shape) + 1) for _ in range(2)}))
    kind = draw(st.sampled_from(["flip", "roll", "roll flat", "rot90", "repeat_interleave"]))
    if kind == "flip":
        return Stage(lambda x: x.flip(dims), name=f"flip{dims}")
    if kind == "roll":
        return Stage(lambda x: x.roll(tuple(1 + dim for dim in dims), dims), name=f"roll{dims}")
    if kind == "roll flat":
        return Stage(lambda x: torch.stack([sample.roll(1) for sample in x]), name="roll")  # each sample by itself
    if kind == "rot90" and len(dims) == 2:
        return Stage(lambda x: x.rot90(1, dims), name=f"rot90{dims}")
    return Stage(lambda x: x.repeat_interleave(2, dims[0]), name=f"repeat_interleave({dims[0]})")


def _indexing(draw: Draw, shape: Shape) -> Stage:
    dim = draw(st.integers(1, len(shape)))
    size = shape[dim - 1]
    index = torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size + 1)))
    kind = draw(st.sampled_from(["index_select", "index", "gather", "assignment", "masked_fill", "where"]))
    name = f"{kind}({dim}, {index.tolist()})"
    if kind == "index_select":
        return Stage(lambda x: x.index_select(dim, index), name=name)
    if kind == "index":
        chosen = (slice(None),) * dim + (index,)
        return Stage(lambda x: x[chosen], name=name)
    if kind == "gather":
        in_line = index.reshape([-1 if axis == dim else 1 for axis in range(len(shape) + 1)])
        wide = in_line.expand([len(index) if axis == dim else size for axis, size in enumerate((1, *shape))]).contiguous()
        return Stage(lambda x: x.gather(dim, wide), name=name)
    mask = torch.zeros(size, dtype=torch.bool).index_fill(0, index, True)
    mask = mask.reshape([-1 if axis == dim else 1 for axis in range(len(shape) + 1)])
    if kind == "masked_fill":
        return Stage(lambda x: x.masked_fill(mask, 0.5), name=name)
    if kind == "where":
        return Stage(lambda x: torch.where(mask, x, x.flip(dim)), name=name)
    step = (slice(None),) * dim + (slice(0, None, 2),)

    def assigned(x: Tensor) -> Tensor:
        y = x.clone()
        y[step] = x.flip(dim)[step]
        return y

    return Stage(assigned, name=name)


def _bordering(draw: Draw, shape: Shape) -> Stage:
    count = draw(st.integers(1, len(shape)))
    pads = tuple(draw(st.integers(-1 if shape[-1 - side // 2] > 2 else 0, 1)) for side in range(2 * count))
    value = draw(st.sampled_from([0.0, 0.5]))
    mode = draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
    if mode != "constant" and 2 <= len(shape) <= 4 and all(size > 1 for size in shape[1:]):
        ones = (1,) * (2 * (len(shape) - 1))
        return Stage(lambda x: F.pad(x, ones, mode=mode), name=f"pad {mode}")
    return Stage(lambda x: F.pad(x, pads, value=value), name=f"pad{pads} with {value}")


def _windows(draw: Draw, shape: Shape) -> Stage:
    dim = draw(st.integers(1, len(shape)))
    size = draw(st.integers(1, shape[dim - 1]))
    if len(shape) == 3 and draw(st.booleans()):
        kernel = (min(2, shape[1]), min(3, shape[2]))
        return Stage(lambda x: F.unfold(x, kernel, stride=2), name=f"im2col{kernel}")
    return Stage(lambda x: x.unfold(dim, size, 2), name=f"unfold({dim}, {size})")


def _joining(draw: Draw, shape: Shape) -> Stage:
    """Several movements of one tensor meet again."""
    dim = draw(st.integers(1, len(shape)))
    kind = draw(st.sampled_from(["cat", "stack", "add", "subtract", "broadcast", "maximum"]))
    if kind == "cat":
        return Stage(lambda x: torch.cat([x, x.narrow(dim, 0, 1)], dim), name=f"cat({dim})")
    if kind == "stack":
        return Stage(lambda x: torch.stack([x, 2 * x.flip(dim)], dim), name=f"stack({dim})")
    if kind == "add":
        return Stage(lambda x: x + x.roll(1, dim), name=f"add a roll({dim})")
    if kind == "subtract":
        return Stage(lambda x: x - x.flip(dim), lambda x: x + x.flip(dim), name=f"subtract a flip({dim})")
    if kind == "broadcast":
        return Stage(lambda x: x + 0.5 * x.mean(dim, keepdim=True), name=f"add a mean({dim})")
    return Stage(lambda x: torch.maximum(x, x.flip(dim)), lambda x: x + x.flip(dim), name=f"maximum with a flip({dim})")


MOVES = (
    _permutation, _transposition, _splitting, _merging, _reshaping, _slicing, _selection, _piece, _pieces, _shuffle, _pixels,
    _memory, _narrowest, _turning, _indexing, _bordering, _windows, _joining,
)  # fmt: skip


def _affine(draw: Draw, shape: Shape) -> nn.Module:
    """A scale and an offset, each along any dimensions."""
    sizes = tuple(size if draw(st.booleans()) else 1 for size in shape)
    if draw(st.booleans()):
        sizes = sizes[draw(st.integers(0, len(sizes) - 1)) :]
    if draw(st.booleans()):
        return Weighted(sizes, torch.mul, f"scale{sizes}")
    return Weighted(sizes, torch.add, f"offset{sizes}")


def _product(draw: Draw, shape: Shape) -> nn.Module:
    """A matrix along any dimension, written in several ways."""
    letters = "abcdefg"[: len(shape)]
    dim, out = draw(st.integers(0, len(shape) - 1)), draw(st.sampled_from(SIZES[1:5]))
    kind = draw(st.sampled_from(["linear", "einsum", "left", "batched", "moved"]))
    if kind == "einsum":
        other = letters.replace(letters[dim], "z")
        equation = f"n{letters},z{letters[dim]}->n{other}"
        return Weighted((out, shape[dim]), lambda x, w: torch.einsum(equation, x, w), equation)
    if kind == "left" and len(shape) >= 2:
        return Weighted((out, shape[-2]), lambda x, w: w @ x, f"left product, {out}")
    if kind == "batched" and len(shape) >= 2:
        batch = shape[-3] if len(shape) >= 3 and shape[-3] > 1 else 2
        if len(shape) >= 3:
            return Weighted((batch, shape[-1], out), torch.matmul, f"batched product, {out}")
        return Weighted(
            (batch, shape[-1], out), lambda x, w: torch.matmul(x.unsqueeze(1), w), f"broadcast product, {batch} times {out}"
        )
    if kind == "moved":
        return Weighted((out, shape[dim]), lambda x, w: F.linear(x.movedim(dim + 1, -1), w), f"linear along {dim + 1}")
    return nn.Linear(shape[-1], out, bias=draw(st.booleans()))


def _normalisation(draw: Draw, shape: Shape) -> nn.Module:
    layer = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}.get(len(shape))
    return _affine(draw, shape) if layer is None else Normalised(layer(shape[0], affine=draw(st.booleans())))


def _slope(draw: Draw, shape: Shape) -> nn.Module:
    def view(w: Tensor, x: Tensor) -> Tensor:
        return w.view(1, -1, *[1] * (x.dim() - 2))

    count = shape[0] if draw(st.booleans()) else 1
    return Weighted((count,), F.prelu, f"prelu({count})", program=lambda x, w: x * (1 + view(w.abs(), x)))


def _convolution(draw: Draw, shape: Shape) -> nn.Module:
    rank = len(shape) - 1
    if rank not in (1, 2, 3):
        return _affine(draw, shape)
    channels, out = shape[0], draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([d for d in range(1, channels + 1) if channels % d == 0]))
    bias = draw(st.booleans())
    kernel = tuple(draw(st.integers(1, min(3, size))) for size in shape[1:])
    stride = tuple(draw(st.integers(1, 2)) for _ in kernel)
    if draw(st.integers(0, 3)) == 0:
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        small = tuple(min(size, 2) for size in kernel)
        return layer(channels, groups * out, small, stride, groups=groups, bias=bias)
    padding = tuple(draw(st.integers(0, size - 1)) for size in kernel)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    return layer(channels, groups * out, kernel, stride, padding, 1, groups, bias)


def _pooling(draw: Draw, shape: Shape) -> nn.Module:
    rank, dim = len(shape) - 1, _dim(draw, shape)
    kind = draw(st.sampled_from(["mean", "amax", "average", "largest", "adaptive", "interpolation", "nearest"]))
    if kind == "mean" or rank not in (1, 2, 3):
        return Stage(lambda x: x.mean(dim, keepdim=True), name=f"mean({dim})")
    if kind == "amax":
        return Stage(lambda x: x.amax(dim, keepdim=True), lambda x: x.sum(dim, keepdim=True), name=f"amax({dim})")
    if kind == "adaptive":
        target = tuple(draw(st.integers(1, size)) for size in shape[1:])
        adaptive = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[rank - 1]
        return Stage(lambda x: adaptive(x, target), name=f"adaptive{target}")
    if kind in ("interpolation", "nearest"):
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[rank] if kind == "interpolation" else "nearest"
        target = tuple(draw(st.integers(1, size + 1)) for size in shape[1:])
        return Stage(lambda x: F.interpolate(x, target, mode=mode), name=f"{mode}{target}")
    kernel = tuple(draw(st.integers(1, min(2, size))) for size in shape[1:])
    average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    if kind == "average":
        return Stage(lambda x: average(x, kernel, 2, ceil_mode=True), name=f"average{kernel}")
    largest = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    return Stage(lambda x: largest(x, kernel, 1), lambda x: average(x, kernel, 1) * math.prod(kernel), name=f"largest{kernel}")


def _kink(draw: Draw, shape: Shape) -> nn.Module:
    del shape
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return Stage(lambda x: x.clamp(-0.5, 2.0), lambda x: x + 2.5, name="clamp")
    if kind == 1:
        return Stage(torch.abs, name="abs")
    if kind == 2:
        return nn.LeakyReLU(0.25)
    return nn.ReLU()


LAYERS = (_affine, _affine, _product, _normalisation, _slope, _convolution, _convolution, _pooling, _kink)


@cache
def _shapes(rank: int, most: int) -> list[Shape]:
    """Shapes whose sizes all differ."""
    return [shape for shape in itertools.permutations(SIZES, rank) if math.prod(shape) <= most]


@st.composite
def moving_networks(draw: Draw, *, stages: tuple[int, int], most: int) -> tuple[nn.Module, Shape]:
    """Draw a network in which layers and movements alternate.

    Args:
        draw: Given by hypothesis.
        stages: Least and largest number of pairs of a movement and a layer.
        most: Largest number of neurons of a layer.
    """
    shape = draw(st.sampled_from(_shapes(draw(st.integers(1, 4)), most)))
    first, x = shape, torch.rand(1, *shape, dtype=torch.float64)
    modules: list[nn.Module] = []
    for number in range(2 * draw(st.integers(*stages))):
        makers: Sequence[Callable[..., nn.Module]] = MOVES if number % 2 == 0 else LAYERS
        module = draw(st.sampled_from(makers))(draw, tuple(x.shape[1:])).double().eval()
        with torch.no_grad():
            y = module(x)
        if 0 < y.numel() <= most and 2 <= y.dim() <= 6 and len(y) == 1:
            modules.append(module)
            x = y
    if draw(st.booleans()):
        modules.append(nn.Sequential(nn.Flatten(), nn.Linear(x.numel(), draw(st.integers(1, 3)))).double())
    return nn.Sequential(*modules), first
