"""Antecedents of one neuron share a factor: groups are the connected components of what an operator joins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from pathlift.rescaling.constraints import solved
from pathlift.rescaling.relations import Classes, components
from test_work import Work

weight_norm = nn.utils.parametrizations.weight_norm


class Op(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Product(nn.Module):
    """A layer whose weight is computed from two parameters."""

    def __init__(self, equation: str, one: tuple[int, ...], two: tuple[int, ...], layer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.equation, self.layer = equation, layer
        self.one, self.two = (nn.Parameter(torch.rand(shape)) for shape in (one, two))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, torch.einsum(self.equation, self.one, self.two))


def holes(*shape: int, keep: float = 0.3) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < keep).double()


MATRIX, KERNEL, ONES = holes(5, 6), holes(3, 2, 2, 2), holes(2, 1, 2, 2, keep=1)

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "windows with gaps": (lambda: nn.AvgPool2d(2, stride=3), (2, 7, 6)),
    "overlapping windows": (lambda: nn.AvgPool2d((1, 3), stride=1), (2, 4, 4)),
    "dilated maxima": (lambda: nn.MaxPool2d(2, stride=1, dilation=2), (1, 6, 5)),
    "padded maxima": (lambda: nn.MaxPool2d(3, stride=2, padding=1), (2, 5, 5)),
    "the mean of an image": (lambda: Op(lambda x: x.mean((2, 3))), (3, 4, 5)),
    "the mean of a row": (lambda: Op(lambda x: x.mean(3, keepdim=True)), (3, 4, 5)),
    "the sum of channels": (lambda: Op(lambda x: x.sum(1)), (3, 2, 2)),
    "adaptive means": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (1, 5, 7)),
    "interpolation": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 3)),
    "nearest neighbours": (lambda: nn.Upsample(scale_factor=2), (2, 3, 3)),
    "fold": (lambda: Op(lambda x: F.fold(x, (4, 4), 2, stride=1)), (4, 9)),
    "unfold and add": (lambda: Op(lambda x: F.unfold(x, 2, stride=2).sum(1)), (2, 5, 4)),
    "a mirror added": (lambda: Op(lambda x: x + x.flip(3)), (1, 3, 5)),
    "pixels moved into channels": (lambda: Op(lambda x: F.pixel_unshuffle(x, 2).sum(2)), (1, 4, 4)),
    "a constant matrix with zeros": (lambda: Op(lambda x: F.linear(x, MATRIX)), (2, 3, 6)),
    "a constant kernel with zeros": (lambda: Op(lambda x: F.conv2d(x, KERNEL, stride=2)), (2, 5, 6)),
    "a constant kernel of ones": (lambda: Op(lambda x: F.conv2d(x, ONES, stride=2, groups=2)), (2, 5, 6)),
    "a computed kernel": (lambda: weight_norm(nn.Conv2d(2, 3, 2, stride=3, bias=False)), (2, 6, 5)),
    "a computed kernel with padding": (lambda: weight_norm(nn.Conv2d(2, 3, 3, padding=1, dilation=2, bias=False)), (2, 5, 6)),
    "a computed kernel of groups": (lambda: weight_norm(nn.Conv2d(4, 4, 2, stride=2, groups=2, bias=False)), (4, 4, 4)),
    "a computed kernel, transposed": (lambda: weight_norm(nn.ConvTranspose2d(2, 3, 2, stride=2, bias=False), dim=1), (2, 3, 2)),
    "a computed kernel in one dimension": (lambda: weight_norm(nn.Conv1d(2, 2, 3, stride=4, bias=False)), (2, 11)),
    "a computed kernel in three dimensions": (lambda: weight_norm(nn.Conv3d(1, 2, 2, stride=2, bias=False)), (1, 4, 2, 4)),
    "a product of two matrices": (lambda: Product("or,ri->oi", (5, 2), (2, 4), F.linear), (2, 3, 4)),
    "a kernel by an einsum": (lambda: Product("or,rihw->oihw", (3, 2), (2, 2, 2, 2), F.conv2d), (2, 3, 3)),
}  # fmt: skip


class Scaled(nn.Module):
    """A factor per input neuron, an operator, and weights for each neuron that comes out."""

    def __init__(self, op: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.factor, self.op = nn.Parameter(torch.rand(shape) + 0.5), op
        self.head = nn.Linear(op.double()(torch.zeros(1, *shape).double()).numel(), 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(x * self.factor).flatten(1))


class Channels(Scaled):
    """The same with one factor per channel."""

    def __init__(self, op: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__(op, shape)
        self.factor = nn.Parameter(torch.rand(shape[0], *[1] * (len(shape) - 1)) + 0.5)


def joined(op: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Which neurons below each neuron above reads, from derivatives at random points: shape (above, below)."""
    there = torch.zeros(1)
    for _ in range(40):
        slope = torch.autograd.functional.jacobian(op, torch.rand(1, *shape, dtype=torch.float64))
        there = there + slope.abs().reshape(-1, torch.Size(shape).numel())
    return there > 0


def count_of_components(reads: Tensor) -> int:
    """Merge what rows have in common, one row after the other."""
    sets: list[set[int]] = []
    for row in reads:
        own = set(row.nonzero()[:, 0].tolist())
        apart = [other for other in sets if not other & own]
        sets = [*apart, own.union(*[other for other in sets if other & own])] if own else sets
    return len(sets)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CASES)
def test_groups_of_factors_are_the_components_that_an_operator_joins(name: str) -> None:
    torch.manual_seed(0)
    made, shape = CASES[name]
    model = Scaled(made(), shape).double()
    assert len(pathlift.symmetries(model, shape)) == count_of_components(joined(model.op, shape))


@pytest.mark.one_in(4, first=2)
@pytest.mark.parametrize("name", CASES)
def test_groups_of_channels_are_the_components_that_an_operator_joins(name: str) -> None:
    torch.manual_seed(0)
    made, shape = CASES[name]
    model = Channels(made(), shape).double()
    reads = joined(model.op, shape).reshape(-1, *shape).flatten(2).any(2)
    assert len(pathlift.symmetries(model, shape)) == count_of_components(reads)


@pytest.mark.parametrize("seed", range(5))
def test_components_are_those_that_a_search_finds_in_the_order_of_their_first_nodes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(60, (2, 35), generator=generator)
    reads = torch.zeros(60 + 35, 60)
    reads[torch.arange(35), first] = reads[torch.arange(35), second] = 1
    reads[35:] = torch.eye(60)
    found = components(60, first, second)
    assert int(found.max()) + 1 == count_of_components(reads)
    assert torch.equal(found[first], found[second])
    assert torch.unique_consecutive(torch.cummax(found, 0).values).tolist() == list(range(int(found.max()) + 1))


def test_a_chain_of_ties_in_the_worst_order_is_followed_to_its_end() -> None:
    classes = Classes()
    classes.grow(5000)
    for label in range(5000, 4000, -1):
        classes.join(torch.tensor([label]), torch.tensor([label - 1]))
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0)) + 1000
    classes.join(order, order + 1)
    assert classes.find(torch.tensor([5000, 4001, 1000, 3999])).tolist() == [1000] * 4
    assert int(classes.find(torch.tensor([5001]))) == 5001


# ---- work, without a clock


def spent(model: nn.Module, shape: tuple[int, ...]) -> Work:
    network = pathlift.capture(model.eval(), shape)
    pathlift.symmetries(network)  # the compact form is made once
    with Work() as counted:
        network.graph.known.pop(solved, None)
        pathlift.symmetries(network)
    return counted


def layers(wrap: Callable[[nn.Module], nn.Module], channels: int) -> nn.Module:
    inner = [layer for _ in range(2) for layer in (wrap(nn.Conv2d(channels, channels, 3, padding=1)), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(channels, 2, 1))


@pytest.mark.parametrize("wrap", [weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.orthogonal])
def test_rounds_behind_computed_weights_do_not_grow_with_channels(wrap: Callable[[nn.Module], nn.Module]) -> None:
    small, large = spent(layers(wrap, 8), (3, 8, 8)), spent(layers(wrap, 32), (3, 8, 8))
    assert large.operations <= 1.1 * small.operations + 20
    assert large.bytes <= 16 * small.bytes


class Pixels(nn.Module):
    """A parameter of the image's size before convolutions."""

    def __init__(self, shape: tuple[int, ...], multiplies: bool, wide: int = 4) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 2]
        self.parameter, self.multiplies = nn.Parameter(torch.rand(shape)), multiplies
        self.first = conv(shape[0], shape[0], 3, padding=1)
        self.body = nn.Sequential(
            conv(shape[0], wide, 3, padding=1, bias=False), nn.ReLU(), conv(wide, wide, 3, padding=2, dilation=2, bias=False)
        )
        self.head = nn.Linear(wide, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x * self.parameter if self.multiplies else x + self.parameter
        return self.head(self.body(x).relu().flatten(2).mean(2))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("multiplies", [False, True], ids=["added", "multiplied"])
@pytest.mark.parametrize(
    "shapes", [((2, 64), (2, 256)), ((2, 8, 8), (2, 16, 16)), ((2, 4, 4, 4), (2, 4, 8, 8))], ids=["1-D", "2-D", "3-D"]
)
def test_work_behind_a_parameter_of_the_images_size_is_linear_in_pixels(
    shapes: tuple[tuple[int, ...], ...], multiplies: bool
) -> None:
    small, large = (spent(Pixels(shape, multiplies), shape) for shape in shapes)
    assert large.operations <= 1.5 * small.operations
    assert large.bytes <= 8 * small.bytes


@pytest.mark.hunt
def test_layers_of_a_long_residual_chain_cost_the_same_each() -> None:
    class Chain(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.first, self.head = nn.Conv1d(2, 4, 1), nn.Linear(4, 2)
            self.blocks = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = x + block(x).relu()
            return self.head(x.mean(2))

    short, long = spent(Chain(5), (2, 6)), spent(Chain(20), (2, 6))
    assert long.bytes <= 4.5 * short.bytes
