"""The compact form of a network gives the numbers of the full one, at a size that does not grow with the image."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import strategies as st
from torch import Tensor, nn

import pathlift
from agreement import assert_same, full, moved, randomised
from axes import random_axis
from habit import LONGER
from networks import over
from pathlift.edges.axis import Axis, classify
from pathlift.edges.axis import expand as positions
from pathlift.edges.base import Compact
from pathlift.edges.movement import Move
from pathlift.edges.view import Strided, plan_view
from pathlift.graph.compact import compacted


class Asymmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 0, 2, 3))


@st.composite
def windowed(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, int, int]]:
    """Draw a stack of windowed operators on an image of odd or even size, with branches that meet again."""
    channels = 4
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.integers(0, 9))
        if kind <= 2:
            kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
            layers.append(
                nn.Conv2d(
                    channels,
                    channels,
                    kernel,
                    draw(st.integers(1, 3)),
                    padding=(draw(st.integers(0, 3)), draw(st.integers(0, 3))),
                    dilation=dilation,
                    groups=draw(st.sampled_from((1, 2, 4))),
                )
            )
        elif kind == 3:
            stride = draw(st.integers(1, 3))
            layers.append(
                nn.ConvTranspose2d(
                    channels,
                    channels,
                    draw(st.integers(stride, 4)),
                    stride,
                    groups=draw(st.sampled_from((1, 2))),
                    padding=draw(st.integers(0, 1)),
                )
            )
        elif kind == 4:
            layers.append(nn.MaxPool2d(3, draw(st.integers(1, 3)), draw(st.integers(0, 1)), ceil_mode=draw(st.booleans())))
        elif kind == 5:
            layers.append(
                nn.AvgPool2d(
                    (2, 3), draw(st.integers(1, 2)), 1, ceil_mode=draw(st.booleans()), count_include_pad=draw(st.booleans())
                )
            )
        elif kind == 6:
            layers.append(draw(st.sampled_from((Asymmetric(), nn.ReflectionPad2d((2, 1, 0, 1)), nn.ReplicationPad2d(2)))))
        elif kind == 7:
            mode = draw(st.sampled_from(("nearest", "bilinear", "bicubic")))
            layers.append(nn.Upsample(scale_factor=2, mode=mode))
        elif kind == 8:
            layers.append(nn.AdaptiveAvgPool2d(draw(st.integers(2, 9))))
        else:
            layers.append(nn.BatchNorm2d(channels))
        layers.append(nn.ReLU())
    tail = draw(st.sampled_from((nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.PixelShuffle(2), nn.Flatten())))
    lead = nn.Conv2d(2, channels, 1)
    size = draw(st.integers(9, 23)), draw(st.integers(9, 23))
    return nn.Sequential(lead, *layers, tail), (2, *size)


def _as_in_full(model: nn.Module, shape: tuple[int, ...], weights: int) -> None:
    try:
        network = pathlift.capture(randomised(model, weights), shape)
    except pathlift.InputError:  # the image became too small
        return
    upper, expected = assert_same(network, moved(network), 1e-11)
    assert math.isclose(upper, expected, rel_tol=1e-10)


@pytest.mark.one_in(30)
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("part", range(12 * LONGER))
def test_windowed_networks_agree_with_their_full_form(part: int) -> None:
    over(windowed(), 0, part, _as_in_full)


CLASSIFIERS = ("resnet18", "googlenet", "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_x_400mf")
ZOO = tuple(torchvision.models.list_models(torchvision.models)) if LONGER > 1 else CLASSIFIERS


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("name", ZOO)  # in a search: every classifier of torchvision that is supported
def test_classifiers_agree_with_their_full_form(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    shape = (3, 96, 80) if name == "inception_v3" else (3, 96, 64)
    if name not in CLASSIFIERS and (name.startswith(("vit", "maxvit")) or not pathlift.check_support(model, shape)):
        pytest.skip("outside the theory")
    network = pathlift.capture(model, shape)
    upper, expected = assert_same(network, moved(network), 2e-5)
    assert math.isclose(upper, expected, rel_tol=2e-4)


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4 * n), nn.ReLU(), nn.Conv2d(4 * n, 4, 3, 1, 1)) for n in (1, 2, 3, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


def test_a_dense_block_agrees_with_its_full_form_and_repeats_no_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.MaxPool2d(2), DenseBlock(), nn.Conv2d(20, 2, 1)).double()
    network = pathlift.capture(model, (3, 30, 41))
    assert not any("relu" in layer.name for layer in compacted(network).layers)
    joined = [layer for layer in compacted(network).layers if layer.concat is not None]
    assert [len(layer.connections) for layer in joined] == [2, 2, 2, 2]  # each goes on from the one before
    upper, expected = assert_same(network, moved(network), 1e-11)
    assert math.isclose(upper, expected, rel_tol=1e-10)


class Heirs(nn.Module):
    """Concatenations of which several go on from the same one, and all are read once more in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(nn.Conv2d(3, 2, 3, 1, 1) for _ in range(4))
        self.reads = nn.ModuleList(nn.Conv2d(width, 2, 1) for width in (4, 6, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = (piece(x).relu() for piece in self.pieces)
        first = torch.cat([a, b], 1)
        second, third = torch.cat([first, c], 1), torch.cat([first, d], 1)
        fourth = torch.cat([second, a], 1)
        joined = (first, second, third, fourth)
        read = sum(conv(each).relu() for conv, each in zip(self.reads, joined, strict=True))
        return torch.cat([read, *(each.mean((2, 3), keepdim=True).expand_as(each) for each in reversed(joined))], 1)


@pytest.mark.parametrize(
    "scales", [(1.0, 1.0, 1.0, 1.0), (1e25, 1.0, 1.0, 1e25), (1.0, 1.0, 1e25, 0.0), (0.0, 1.0, 1e-25, 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_of_several_goes_on_in_the_memory_of_a_concatenation(scales: tuple[float, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Heirs().to(dtype)
    with torch.no_grad():
        for piece, scale in zip(model.pieces, scales, strict=True):
            for own in piece.parameters():
                own *= scale
    network = pathlift.capture(model, (3, 9, 7))
    joined = [layer.concat for layer in compacted(network).layers if layer.concat is not None]
    assert [(concat.room, concat.goes_on) for concat in joined[:4]] == [(8, False), (8, True), (0, False), (0, True)]
    sizes = copy.deepcopy(model).double()
    with torch.no_grad():
        for own in sizes.parameters():
            own.abs_()
    expected = sizes(torch.ones(1, 3, 9, 7, dtype=torch.float64))
    expected.sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(pathlift.path_norm(network).per_output, expected[0].detach(), rtol=tolerance, atol=0.0)
    shares = pathlift.path_magnitude(network)
    for name, own in sizes.named_parameters():
        assert own.grad is not None
        wanted = own.detach() * own.grad / expected.sum().detach()
        torch.testing.assert_close(shares[name].double(), wanted, rtol=tolerance, atol=1e-30)


@pytest.mark.hunt
def test_segmentation_agrees_with_its_full_form() -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model("fcn_resnet50", weights=None, weights_backbone=None, num_classes=2)
    network = pathlift.capture(model, (3, 64, 80))
    found, expected = pathlift.path_norm(network), pathlift.path_norm(full(network))
    assert found.per_output.shape == (2, 64, 80)
    torch.testing.assert_close(found.per_output, expected.per_output, rtol=1e-5, atol=0.0)


def neurons(name: str, size: int) -> int:
    network = pathlift.capture(torchvision.models.get_model(name, weights=None), (3, size, size))
    return sum(math.prod(layer.shape) for layer in compacted(network).layers)


@pytest.mark.one_in(2, first=1)
@pytest.mark.parametrize(("name", "count"), [("vgg11", 236_651), ("resnet18", 906_219)])
def test_the_size_of_the_compact_network_is_what_it_was(name: str, count: int) -> None:
    """A regression guard without a clock: entries of path activations at 224²."""
    assert neurons(name, 224) == count


@pytest.mark.search
def test_the_size_of_the_compact_network_does_not_grow_with_the_image() -> None:
    assert neurons("vgg11", 2048) <= 1.02 * neurons("vgg11", 512)


def test_equal_keys_make_one_class_in_order_of_first_appearance() -> None:
    axis, first = classify(torch.tensor([7, 3, 3, 7, 5]), torch.tensor([0, 1, 1, 0, 0]))
    assert axis.index.tolist() == [0, 1, 1, 0, 2]
    assert first.tolist() == [0, 1, 4]
    assert axis.multiplicity.tolist() == [2, 2, 1]


def test_a_view_that_mixes_a_compact_dimension_expands_it() -> None:
    axes = (Axis.full(2), Axis.constant(3), Axis.constant(4))
    flattened = plan_view(axes, Strided((2, 12), (12, 1), 0))
    assert flattened is not None
    assert flattened.expanded == {1, 2}
    transposed = plan_view(axes, Strided((4, 2, 3), (1, 12, 4), 0))
    assert transposed is not None
    assert not transposed.expanded
    assert transposed.strided.sizes == (1, 2, 1)
    assert plan_view(axes, Strided((3,), (13,), 0)) is None  # a diagonal
    across = plan_view((Axis.constant(2), Axis.constant(2), Axis.constant(4)), Strided((8,), (1,), 4))
    assert across is not None
    assert across.expanded == {0, 1, 2}  # from (0, 1, 0) to (1, 0, 3): each digit overflows into the one before


def viewed(draw: torch.Generator, full: Tensor) -> Tensor:
    """A few slices, transposes and reshapes in a row, as long as they copy nothing."""

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=draw))

    for _ in range(3):
        dim, kind = number(full.dim()), number(4)
        if kind == 0:
            full = full.transpose(dim, number(full.dim()))
        elif kind == 1:
            start = number(full.shape[dim])
            full = full.narrow(dim, start, 1 + number(full.shape[dim] - start))
        elif kind == 2:
            full = full[(slice(None),) * dim + (slice(number(2) if full.shape[dim] > 1 else 0, None, 2),)]
        elif dim + 1 < full.dim() and full.is_contiguous():
            full = full.flatten(dim)
        elif full.is_contiguous():
            full = full.flatten()
    return full


def test_a_view_of_what_is_stored_is_the_view_of_all_positions() -> None:
    draw = torch.Generator().manual_seed(0)
    read = mixed = 0
    for _ in range(400):
        axes = tuple(random_axis(int(torch.randint(1, 5, (), generator=draw)), draw) for _ in range(4))
        stored = torch.rand([axis.count for axis in axes], generator=draw)
        memory = positions(axes, stored).contiguous()
        view = viewed(draw, memory)
        strided = Strided(tuple(view.shape), view.stride(), int(view.storage_offset()))
        plan = plan_view(axes, strided)
        if plan is None:  # a step of what was flattened, which is none along a single dimension
            continue
        for dim in plan.expanded:  # what the view mixes is stored in full, and then it is asked once more
            mixed += 1
            assert axes[dim].classes is not None
            stored = stored.index_select(dim, axes[dim].index)
        axes = tuple(Axis.full(axis.size) if dim in plan.expanded else axis for dim, axis in enumerate(axes))
        again = plan_view(axes, strided)
        assert again is not None and not again.expanded
        for dim, classes in again.read.items():
            read += 1
            stored = stored.index_select(dim, classes)
        found = stored.contiguous().as_strided(again.strided.sizes, again.strided.strides, again.strided.offset)
        assert torch.equal(positions(again.axes, found), view)
    assert read > 50 and mixed > 50


class Viewed(nn.Module):
    """A view of an image with borders, between two convolutions."""

    def __init__(self, view: Callable[[Tensor], Tensor], dims: int) -> None:
        super().__init__()
        self.first, self.view = nn.Conv2d(1, 2, 3, padding=1), view
        self.last = nn.Conv2d(2, 2, 1) if dims == 2 else nn.Conv1d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.view(self.first(x)))


VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "slice": (lambda x: x[:, :, 3:, :-4], 2),
    "steps": (lambda x: x[:, :, 1::2], 2),
    "turned slice": (lambda x: x[..., 2:7].transpose(2, 3), 2),
    "row": (lambda x: x[:, :, 0], 1),
    "diagonal": (lambda x: x.diagonal(dim1=2, dim2=3), 1),
    "flat": (lambda x: x.flatten(2)[..., 5:40], 1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_an_image_with_borders_agree_with_their_full_form(name: str) -> None:
    network = pathlift.capture(randomised(Viewed(*VIEWS[name])), (1, 9, 11))
    upper, expected = assert_same(network, moved(network), 1e-11)
    assert math.isclose(upper, expected, rel_tol=1e-10)


@pytest.mark.parametrize("name", VIEWS)
def test_what_is_declared_a_view_reads_its_classes_or_asks_for_full_axes(name: str) -> None:
    view, _ = VIEWS[name]
    bordered = classify(torch.tensor([0] + 7 * [1] + [2]))[0], classify(torch.tensor([0] + 9 * [1] + [2]))[0]
    axes = (Axis.full(1), Axis.full(2), *bordered)
    stored = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    full_form = view(positions(axes, stored))
    compact = Move(view, "view").compact(axes, tuple(full_form.shape), None)
    if name in {"diagonal", "flat"}:
        assert compact == {2, 3}
    else:
        assert isinstance(compact, Compact)
        assert torch.equal(positions(compact.axes, compact.edges.sum(stored, None)), full_form)
