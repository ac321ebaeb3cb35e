"""`quantize` as a user calls it: grids, exact and enclosed costs, corrections, gauges, budgets, files (mathematics §9)."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pathlift
from habit import LONGER
from pathlift.errors import InputError, MismatchError, NumericalError, UnsupportedModelError
from pathlift.quantisation import (
    Bytes,
    activation_ranges,
    bits_needed,
    layer_sensitivities,
    load_quantized,
    rounded_to_nearest,
    save_onnx,
)
from pathlift.quantisation.allocation import allocated
from pathlift.quantisation.formats import format_of
from pathlift.quantisation.gauge import ExpectedError, representative
from pathlift.quantisation.matrices import matrices_of
from pathlift.quantisation.ranges import grid_of
from pathlift.quantisation.rounding import ROUNDINGS
from pathlift.reference.probe import Probe
from pathlift.rescaling import with_state
from pathlift.statistics.model import DOUBT
from pathlift.storage.models import load_model

SHAPE = (2, 6, 6)


class Residual(nn.Module):
    """A batch norm, a depthwise convolution, a skip connection, a transposed convolution with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.depthwise, self.mixed = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)
        self.up, self.last = nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        y = torch.relu(y + self.mixed(torch.relu(self.depthwise(y))))
        return self.last(torch.relu(self.up(y)).mean((2, 3)))


def drawn(make, seed: int = 0) -> nn.Module:
    """A model in eval mode with random weights and statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for name, tensor in model.state_dict().items():
            if "running" in name:
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model.eval()


def capped() -> nn.Module:
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3))
    return nn.Sequential(*layers, nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(64, 2))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))


MODELS = {"residual": Residual, "relu6": capped, "perceptron": perceptron}


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("gauge", ["none", "optimal"])
def test_inputs_of_another_size_are_weights_of_another_size(gauge):
    model = drawn(perceptron)
    other, first = copy.deepcopy(model), next(iter(dict(model.named_parameters())))
    other.get_parameter(first).data *= 64
    told = {"input_mean": torch.tensor(0.5 * 64), "input_variance": 64.0**2}
    quantized, report = pathlift.quantize(model, SHAPE, 3, gauge=gauge, moments=0, **told)
    _, expected = pathlift.quantize(other, SHAPE, 3, gauge=gauge, moments=0, input_mean=0.5)
    assert all(torch.equal(report.integers[name], expected.integers[name]) for name in report.integers)
    assert not same(quantized, pathlift.quantize(model, SHAPE, 3, gauge=gauge, moments=0)[0])
    ranges, others = activation_ranges(model, SHAPE, **told), activation_ranges(other, SHAPE, input_mean=0.5)
    assert ranges.pop(first) == tuple(64 * end for end in others.pop(first)) and ranges == others
    with pytest.raises(InputError, match="input_mean must have shape"):
        pathlift.quantize(model, SHAPE, input_mean=torch.ones(77))


@pytest.mark.one_in(6)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_weights_of_a_copy_lie_on_the_grids_of_the_report(rounding):
    model = drawn(Residual)
    before = copy.deepcopy(model.state_dict())
    quantized, report = pathlift.quantize(model, SHAPE, 4, rounding=rounding, generator=0, moments=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state = quantized.state_dict()
    assert [tensor.name for tensor in report.tensors] == [f"{n}.weight" for n in ("first", "depthwise", "mixed", "up", "last")]
    for tensor in report.tensors:
        assert torch.equal(state[tensor.name], tensor.values)
        assert (tensor.integers.abs().max() <= 7 and tensor.scale.numel() == (4 if tensor.name != "up.weight" else 6)) or (
            tensor.name == "last.weight" and tensor.scale.numel() == 3
        )
    changed = {name for name in before if not torch.equal(state[name], before[name])}
    assert changed == {tensor.name for tensor in report.tensors} | set(report.corrected)


@pytest.mark.parametrize("options", [
    {"bits": 4}, {"bits": 3, "affine": True}, {"bits": "fp8_e5m2"}, {"bits": "bf16"},
    {"bits": 3, "granularity": "tensor", "range": "lp"}, {"bits": 4, "granularity": 2},
])  # fmt: skip
def test_a_report_counts_what_lies_beyond_its_grids_and_says_how_coarse_they_are(options):
    model = drawn(Residual)
    before = dict(model.named_parameters())
    _, report = pathlift.quantize(model, SHAPE, **options, rounding="nearest", moments=0)
    for tensor, row in zip(report.tensors, report.table(), strict=True):
        weight, (low, high) = before[tensor.name].double(), tensor.ends
        scale = pathlift.storage.quantized.dequantized(
            torch.ones_like(tensor.integers), tensor.scale, 0 * tensor.zero_point, tensor.block
        )
        if tensor.format.startswith("int"):
            step, most = scale.double(), float(tensor.scale.max())
        else:
            kind = {"fp8_e5m2": torch.float8_e5m2, "bf16": torch.bfloat16}[tensor.format]
            last = torch.finfo(kind).max * torch.finfo(kind).eps / 2 / (1 - torch.finfo(kind).eps / 2)  # largest: (2 − eps)·2^k
            step, most = scale.double() * last, float(tensor.scale.max()) * last
        beyond = (weight > high.double() + step / 2) | (weight < low.double() - step / 2)
        assert row["clipped"] == tensor.clipped == int(beyond.sum())
        assert row["step"] == tensor.step == pytest.approx(most, rel=1e-6)
    _, whole = pathlift.quantize(model, SHAPE, **{**options, "range": "minmax"}, moments=0)
    assert all(tensor.clipped == 0 for tensor in whole.tensors)
    wide = drawn(lambda: nn.Linear(200, 3))
    (tensor,) = pathlift.quantize(wide, (200,), 3, moments=0)[1].tensors
    assert 0 < tensor.clipped == int((wide.weight.double().abs() > 3.5 * tensor.scale.double()).sum())


def test_rounding_towards_zero_has_an_exact_path_metric_and_others_are_enclosed():
    model = drawn(Residual)
    quantized, report = pathlift.quantize(model, SHAPE, 4, rounding="towards_zero")
    metric = pathlift.path_metric(model, quantized, SHAPE)
    assert report.path_metric.exact and metric.exact and report.path_metric.value == metric.value
    assert not report.corrected
    _, enclosed = pathlift.quantize(model, SHAPE, 4, rounding="nearest", moments=2)
    assert not enclosed.path_metric.exact and enclosed.path_metric.lower <= enclosed.path_metric.upper


@pytest.mark.hunt
def test_the_path_share_of_a_tensor_is_the_path_metric_of_rounding_it_alone():
    model = drawn(Residual)
    norm = pathlift.path_norm(model, SHAPE).value
    for name in ("first", "mixed", "up"):
        _, report = pathlift.quantize(model, SHAPE, {name: 3}, rounding="towards_zero")
        assert report.tensors[0].path_share == pytest.approx(report.path_metric.value / norm, rel=1e-4)
    with torch.no_grad():
        model.mixed.weight[0, 0] = 0.0  # a weight that is 0 and becomes something else
    norm = pathlift.path_norm(model, SHAPE).value
    quantized, report = pathlift.quantize(model, SHAPE, {"mixed": 2}, rounding="compensated", correction="none")
    path = pathlift.path_metric(model, quantized, SHAPE)
    assert path.lower <= report.tensors[0].path_share * norm * (1 + 1e-4)
    assert report.tensors[0].path_share * norm * (1 - 1e-4) <= path.upper


@pytest.mark.hunt
def test_several_numbers_of_bits_in_one_go_are_each_as_alone():
    network = pathlift.capture(drawn(Residual), SHAPE)
    for (quantized, report), bits in zip(rounded_to_nearest(network, [8, 3]), (8, 3), strict=True):
        alone, expected = pathlift.quantize(network, bits=bits, rounding="nearest", range="minmax", moments=0)
        assert all(torch.equal(tensor, alone.state[name]) for name, tensor in quantized.state.items())
        assert report.expected_error == expected.expected_error and report.corrected == expected.corrected


def test_the_means_of_what_follows_a_rounded_layer_stay():
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(1))
    model = drawn(lambda: nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)))
    for correction, close in (("mean", True), ("none", False)):
        quantized, report = pathlift.quantize(model, (8,), 3, data=x, correction=correction, moments=0)
        off = (quantized[0](x) - model[0](x)).mean(0).abs().max()
        assert bool(off < 1e-6) is close and (report.corrected == ("0.bias", "2.bias")) is close
        assert report.statistics == "data"


def test_batch_norms_take_up_mean_and_variance():
    x = torch.randn(256, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    model = drawn(lambda: nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 5)))
    values = model[0](x).transpose(0, 1).flatten(1)
    model[1].running_mean.copy_(values.mean(1))
    model[1].running_var.copy_(values.var(1))
    quantized, report = pathlift.quantize(model, (2, 5, 5), {"0": 2}, data=x, correction="variance", moments=0)
    assert report.corrected == ("1.running_mean", "1.running_var")
    after = quantized[0](x).transpose(0, 1).flatten(1)
    assert torch.allclose(quantized[1].running_mean, after.mean(1), atol=1e-5)
    before = (values.var(1) / after.var(1)).log().abs()
    assert ((quantized[1].running_var / after.var(1)).log().abs() < 0.1 * before + 0.02).all()


def read_by_batch_norms(groups: pathlift.rescaling.Symmetries) -> Tensor:
    """The groups of what batch norms read: their running variances do not move along."""
    solution, scalings = groups.constraints.solution, groups.constraints.scalings.items()
    read = [torch.isin(solution.rows, scaling.above.reshape(-1)) for name, scaling in scalings if "running" in name]
    return torch.cat([solution.columns[rows] for rows in read]).unique() if read else torch.zeros(0, dtype=torch.long)


def factors_of(groups: pathlift.rescaling.Symmetries) -> list[float]:
    """Powers of two at random, 1 for the groups of what a batch norm reads."""
    drawn_powers = torch.randint(-7, 6, (len(groups),), generator=torch.Generator().manual_seed(1)).double()
    drawn_powers[read_by_batch_norms(groups)] = 0.0
    return torch.exp2(drawn_powers).tolist()


OPTIONS = (
    {},
    {"granularity": "tensor", "bits": 4},
    {"granularity": 2, "affine": True, "range": "expected", "bits": 3},
)


@pytest.mark.one_in(32)
@pytest.mark.hunt_one_in(3)
@pytest.mark.parametrize("options", OPTIONS, ids=["channel", "tensor", "group"])
@pytest.mark.parametrize("gauge", ["balanced", "equalised", "optimal"])
@pytest.mark.parametrize("name", MODELS)
def test_a_rescaled_network_is_quantised_to_the_same_bits(name, gauge, options):
    model = drawn(MODELS[name])
    groups = pathlift.symmetries(model, SHAPE)
    rescaled = with_state(model, groups.rescale(factors_of(groups)))
    assert not same(model, rescaled)
    first, report = pathlift.quantize(model, SHAPE, gauge=gauge, moments=0, **options)
    second, _ = pathlift.quantize(rescaled, SHAPE, gauge=gauge, moments=0, **options)
    assert same(first, second)
    assert report.gauge.name == gauge and report.path_metric.lower <= report.path_metric.upper


def rescaled_before_batch_norms(model: nn.Module, powers: tuple[int, ...]) -> nn.Module:
    """The function is the same, running means moved along, and running variances stayed."""
    groups = pathlift.symmetries(model, SHAPE)
    factors = torch.ones(len(groups), dtype=torch.float64)
    for number, group in enumerate(read_by_batch_norms(groups).tolist()):
        factors[group] = 2.0 ** powers[number % len(powers)]
    return with_state(model, groups.rescale(factors.tolist()))


@pytest.mark.hunt
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("name", ["residual", "relu6"])
def test_it_does_not_matter_who_rescaled_what_batch_norms_read(name):
    model, x = drawn(MODELS[name]), torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for powers in ((7, 12, -7), (12, -5, 6, 4)):
        rescaled = rescaled_before_batch_norms(model, powers)
        quantized, report = pathlift.quantize(rescaled, SHAPE, 4, moments=0, correction="variance")
        assert report.statistics == "batch norm up to scale"
        outcomes.append((report.integers, quantized(x)))
    (first, output), (second, again) = outcomes
    assert all(torch.equal(integers, second[name]) for name, integers in first.items())
    assert torch.equal(output, again)


@pytest.mark.hunt
def test_statistics_of_a_rescaled_network_are_nearly_those_of_the_network_itself():
    model = drawn(capped)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = None  # running statistics are those of all inputs
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        model(torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(0)))
    model.eval()
    rescaled = rescaled_before_batch_norms(model, (7, 12, -7))
    first, second = (pathlift.quantize(m, SHAPE, 8, moments=0)[1] for m in (model, rescaled))
    assert first.statistics == "batch norm" != second.statistics
    for one, other in zip(first.tensors, second.tensors, strict=True):
        assert other.expected_error == pytest.approx(one.expected_error, rel=0.5)


SMALL, LARGE = ("squeezenet1_1", "shufflenet_v2_x0_5"), ("resnet18", "mobilenet_v2", "vgg11_bn", "mnasnet0_5")
"""Models of torchvision; the large ones take minutes each and are for `make search`."""


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("name", SMALL if LONGER == 1 else (*SMALL, *LARGE))
@pytest.mark.parametrize("gauge", ["balanced", "optimal"])
def test_a_rescaled_model_of_torchvision_is_quantised_to_the_same_bits(name, gauge):
    torchvision = pytest.importorskip("torchvision")
    model = drawn(lambda: torchvision.models.get_model(name, num_classes=10))
    groups = pathlift.symmetries(model, (3, 64, 64))
    rescaled = with_state(model, groups.rescale(factors_of(groups)))
    first, second = (pathlift.quantize(m, (3, 64, 64), 4, gauge=gauge, moments=0)[0] for m in (model, rescaled))
    assert same(first, second)


def test_relu6_stays_and_pins_its_channels():
    model, x = drawn(capped), torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0)) * 4
    quantized, report = pathlift.quantize(model, SHAPE, 8, gauge="optimal", moments=0)
    assert isinstance(quantized[2], nn.ReLU6) and isinstance(quantized[6], nn.ReLU6)
    assert report.gauge.pinned >= 8
    assert torch.equal(representative_of(model)(x), model(x))  # powers of two round nothing
    assert (quantized(x) - model(x)).abs().max() < 0.05


def representative_of(model: nn.Module) -> nn.Module:
    network = pathlift.capture(model, SHAPE)
    return with_state(model, pathlift.rescaling.RescaledState(network, representative(network).state, torch.ones(0)))


def on_a_grid(cost, middle, reach, count):
    """The least cost on a square of the plane."""
    points = torch.linspace(-reach, reach, count, dtype=torch.float64)
    return min(cost(middle + torch.stack(pair)) for pair in itertools.product(points, points))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_optimal_gauge_is_the_best_of_a_fine_grid(granularity):
    model = drawn(lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)))
    with torch.no_grad():
        model[2].weight[:, 0] *= 30.0
    network = pathlift.capture(model, (3,))
    matrices, groups = matrices_of(network), pathlift.symmetries(network)
    formats = dict.fromkeys(matrices, format_of(4))
    problem = ExpectedError(network, groups.constraints, matrices, formats, granularity)
    free, imbalance = problem.minimum()
    best = min(on_a_grid(problem.value, torch.zeros(2), 8.0, 33), on_a_grid(problem.value, free, 0.5, 21))
    assert best - 0.01 - problem.slack <= problem.value(free) <= best + problem.slack + 1e-3
    assert imbalance < 1e-3 and problem.value(free) < problem.value(torch.zeros(2, dtype=torch.float64)) - 0.1
    middle = problem.value((free + 1.0) / 2)
    assert middle <= (problem.value(free) + problem.value(torch.ones(2, dtype=torch.float64))) / 2 + 1e-9  # convex


def test_the_cost_of_a_gauge_is_what_its_definition_says():
    model = drawn(perceptron)
    network = pathlift.capture(model, SHAPE)
    matrices, groups = matrices_of(network), pathlift.symmetries(network)
    formats = dict.fromkeys(matrices, format_of(4))
    problem = ExpectedError(network, groups.constraints, matrices, formats, "channel")
    factors = torch.exp2(torch.randn(len(groups), generator=torch.Generator().manual_seed(0), dtype=torch.float64).round())
    rescaled = replace(network, state={**network.state, **groups.rescale(factors.tolist())})
    model_of = pathlift.statistics.activation_model(rescaled, doubt=DOUBT)
    total = 0.0
    for name in matrices:
        moments, weight = pathlift.statistics.input_moments(model_of, name), rescaled.state[name].double()
        steps = grid_of(weight[None], format_of(4), "channel", "minmax").scale[0, :, 0].double()
        total += float((moments.sensitivity[0] * steps**2 / 12).sum() * moments.diagonal.sum())
    assert 2.0 ** problem.value(torch.log2(factors)) == pytest.approx(total, rel=1e-5)


def test_bits_are_allocated_as_by_trying_all():
    source = torch.Generator().manual_seed(0)
    for _ in range(60):
        count = int(torch.randint(1, 5, (), generator=source))
        weights = torch.randint(1, 9, (count,), generator=source).tolist()
        sizes = [[bits * weight for bits in range(2, 6)] for weight in weights]
        costs = [
            (torch.rand(4, generator=source, dtype=torch.float64) * 4.0 ** -torch.arange(4)).tolist() for _ in range(count)
        ]
        least, most = sum(map(min, sizes)), sum(map(max, sizes))
        budget = int(torch.randint(least, most + 3, (), generator=source))
        chosen = allocated(costs, sizes, budget)
        allowed = [
            c for c in itertools.product(range(4), repeat=count) if sum(s[k] for s, k in zip(sizes, c, strict=True)) <= budget
        ]
        best = min(sum(layer[k] for layer, k in zip(costs, c, strict=True)) for c in allowed)
        assert tuple(chosen) in allowed
        assert sum(layer[k] for layer, k in zip(costs, chosen, strict=True)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("gauge", ["optimal", "balanced", "equalised"])
def test_where_nothing_can_be_rescaled_a_gauge_changes_nothing(gauge):
    for model in (nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.ReLU6(), nn.Linear(4, 2))):
        first, second = (pathlift.quantize(model, (3,), 4, gauge=choice, moments=0)[0] for choice in (gauge, "none"))
        assert same(first, second)


@pytest.mark.parametrize(("correction", "off_by"), [("none", 1e-9), ("mean", 1e-2)])  # means at borders are those within
def test_the_sensitivity_of_a_layer_is_what_rounding_it_alone_does(correction, off_by):
    model = drawn(Residual).double()
    kept = copy.deepcopy(model.state_dict())
    x = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    options = {"data": x.split(9), "correction": correction}
    found = layer_sensitivities(model, SHAPE, {"up.weight": None, "*": 3}, **options)
    weights = [name for name, p in model.named_parameters() if p.dim() > 1]
    assert list(found) == [name for name in weights if name != "up.weight"]
    for name, change in found.items():
        alone = {name: 3, "*": None}
        quantized, _ = pathlift.quantize(model, SHAPE, alone, rounding="nearest", moments=0, **options)
        off = (exactly(quantized, x[:32]) - exactly(model, x[:32])).square().sum(1).mean().sqrt()
        assert change == pytest.approx(float(off), rel=off_by)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(InputError, match="data holds no batch"):
        layer_sensitivities(model, SHAPE, data=[])


class Cancelling(nn.Module):
    """Two branches: what rounding does to the first is subtracted again, and nobody expects it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.one, self.two = nn.Linear(8, 2, bias=False), nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            self.first.weight[4:] = self.first.weight[:4]
            self.one.weight[:, 4:] = -self.one.weight[:, :4]

    def forward(self, x: Tensor) -> Tensor:
        return self.one(torch.relu(self.first(x))) + self.two(torch.relu(self.second(x)))


def test_with_data_a_budget_is_spent_where_outputs_move():
    model = drawn(Cancelling)
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    bits = {}
    for data in (None, x):
        _, report = pathlift.quantize(model, (6,), 8, budget=4.0, rounding="nearest", data=data, moments=0)
        bits[data is None] = {tensor.name: tensor.integers.abs().max().item() for tensor in report.tensors}
    assert report.bits <= 4.0
    assert bits[False]["first.weight"] <= 1 < bits[True]["first.weight"]
    assert bits[False]["second.weight"] > bits[True]["second.weight"]


@pytest.mark.hunt
def test_a_budget_is_kept_and_better_than_equal_bits():
    model = drawn(Residual)
    _, equal = pathlift.quantize(model, SHAPE, 4, rounding="nearest", moments=0)
    _, mixed = pathlift.quantize(model, SHAPE, 8, budget=4.0, rounding="nearest", moments=0)
    assert mixed.bits <= 4.0 and mixed.expected_error <= equal.expected_error
    _, small = pathlift.quantize(model, SHAPE, 8, budget=Bytes(equal.bytes_after), rounding="nearest", moments=0)
    assert small.bytes_after <= equal.bytes_after and small.expected_error <= equal.expected_error
    _, roomy = pathlift.quantize(model, SHAPE, 8, budget=1e30, rounding="nearest", moments=0)
    _, full = pathlift.quantize(model, SHAPE, 8, rounding="nearest", moments=0)
    assert roomy.expected_error <= full.expected_error  # fewer bits where they happen to be as good
    for budget, match in ((1.5, "cannot be met"), (Bytes(10), "cannot be met")):
        with pytest.raises(InputError, match=match):
            pathlift.quantize(model, SHAPE, 8, budget=budget)


@pytest.mark.hunt
def test_patterns_and_both_ends_have_their_own_bits():
    model = drawn(Residual)
    _, report = pathlift.quantize(model, SHAPE, {"first": "bf16", "*.weight": 4, "last*": None}, ends=8, moments=0)
    assert [tensor.format for tensor in report.tensors] == ["int8", "int4", "int4", "int4", "int8"]
    _, report = pathlift.quantize(model, SHAPE, {"last*": None, "*": 4}, ends=8, moments=0)
    assert [tensor.format for tensor in report.tensors] == ["int8", "int4", "int4", "int4"]
    _, report = pathlift.quantize(model, SHAPE, {"mixed*": 3, "last": "fp8_e5m2"}, moments=0)
    assert {tensor.name: tensor.format for tensor in report.tensors} == {"mixed.weight": "int3", "last.weight": "fp8_e5m2"}


class Turned(nn.Module):
    """Multiplies by a parameter whose axes stand in some order."""

    def __init__(self, shape: tuple[int, ...], times: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.times, self.first, self.weight = times, nn.Linear(5, 6), nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return self.times(self.first(x).relu(), self.weight)


TURNED = {
    "t": ((4, 6), lambda x, w: x @ w.t()),
    "addmm": ((4, 6), lambda x, w: torch.addmm(x.new_ones(4), x, w.mT)),
    "linear": ((6, 4), lambda x, w: nn.functional.linear(x, w.permute(1, 0))),
    "three": ((4, 2, 3), lambda x, w: x @ w.permute(1, 2, 0).reshape(6, 4)),
    "conv": ((1, 6, 4), lambda x, w: nn.functional.conv1d(x.unsqueeze(2), w.permute(2, 1, 0)).flatten(1)),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", TURNED)
def test_a_weight_that_is_turned_before_its_use_is_quantised_like_any_other(how: str) -> None:
    shape, times = TURNED[how]
    plainly = (
        (lambda x, w: nn.functional.conv1d(x.unsqueeze(2), w[..., None]).flatten(1)) if how == "conv" else nn.functional.linear
    )
    model, plain = Turned(shape, times), Turned((4, 6), plainly)
    generator = torch.Generator().manual_seed(0)
    for parameter in (plain.first.weight, plain.first.bias, plain.weight):
        nn.init.normal_(parameter, generator=generator)
    model.first.load_state_dict(plain.first.state_dict())
    rows = plain.weight.detach()
    placed = {"t": rows, "addmm": rows, "linear": rows.t(), "three": rows.reshape(4, 2, 3), "conv": rows.t()[None]}[how]
    with torch.no_grad():
        model.weight.copy_(placed)
    (found, report), (wanted, _) = (pathlift.quantize(each, (5,), 3, moments=0) for each in (model, plain))
    x = torch.randn(7, 5, generator=generator)
    torch.testing.assert_close(found(x) - float(how == "addmm"), wanted(x))
    assert {tensor.name: tensor.scale.numel() for tensor in report.tensors} == {"weight": 4, "first.weight": 6}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4}, {"bits": 5, "affine": True, "granularity": 2}, {"bits": "fp8_e4m3"}, {"bits": "bf16"},
        {"bits": {"first": 2, "up": 8}, "granularity": "tensor"},
    ],
    ids=str,
)  # fmt: skip
def test_files_hold_what_the_module_has(tmp_path, options):
    quantized, report = pathlift.quantize(drawn(Residual), SHAPE, moments=0, **options)
    report.save(tmp_path / "q.safetensors")
    loaded = load_quantized(tmp_path / "q.safetensors")
    assert same(with_state(quantized, {n: t.to(quantized.state_dict()[n].dtype) for n, t in loaded.items()}), quantized)
    safetensors = pytest.importorskip("torchao.prototype.safetensors.safetensors_support", exc_type=ImportError)
    from safetensors import safe_open

    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        tensors, left = safetensors.unflatten_tensor_state_dict({k: file.get_tensor(k) for k in file.keys()}, file.metadata())  # noqa: SIM118
    assert not left
    for name, tensor in quantized.state_dict().items():
        read = tensors[name].dequantize() if hasattr(tensors[name], "qdata") else tensors[name]
        assert torch.equal(read.to(tensor.dtype), tensor)


def in_onnxruntime(path, x: Tensor) -> Tensor:
    """The outputs of a file, run as it stands."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(path, options)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.fixture
def sample() -> Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"bits": {"up": 3, "*": 8}, "affine": True, "granularity": 2}, {"bits": "fp8_e4m3"}], ids=str
)
def test_onnx_files_have_integers_and_give_the_same_outputs(tmp_path, options, sample):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = drawn(Residual)
    quantized, report = pathlift.quantize(model, SHAPE, moments=0, **options)
    path = tmp_path / "q.onnx"
    save_onnx(quantized, report, path, SHAPE)
    assert torch.allclose(in_onnxruntime(path, sample), quantized(sample), atol=1e-5, rtol=1e-5)
    program = onnx.load(path)
    stored = {item.name: item.data_type for item in program.graph.initializer}
    kinds = onnx.TensorProto
    for tensor in report.tensors:
        kind = kinds.FLOAT8E4M3FN if tensor.bits == 8 and "fp8" in tensor.format else kinds.INT8
        assert tensor.name not in stored and stored[f"{tensor.name}_quantized"] == (kinds.INT4 if tensor.bits <= 4 else kind)
    assert {node.op_type for node in program.graph.node} & {"QuantizeLinear", "QLinearConv", "ConvInteger"} == set()
    if "fp8" not in str(options):
        again = load_model(str(path))  # our own reader: the same network
        assert pathlift.path_norm(again, SHAPE).log10 == pytest.approx(pathlift.path_norm(quantized, SHAPE).log10, abs=1e-6)
        assert torch.allclose(again(sample), quantized(sample), atol=1e-5, rtol=1e-5)
        pathlift.save(again, tmp_path / "again.onnx")
        assert (tmp_path / "again.onnx").stat().st_size == pytest.approx(path.stat().st_size, rel=0.02)
    with pytest.raises(MismatchError, match="not what the report has"):
        save_onnx(model, report, tmp_path / "other.onnx", SHAPE)
    with pytest.raises(InputError, match="exists already"):
        save_onnx(quantized, report, path, SHAPE)


@pytest.mark.hunt
def test_a_network_from_an_onnx_file_goes_back_as_the_same_graph(tmp_path, sample):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pathlift.save(drawn(Residual), tmp_path / "float.onnx", SHAPE)
    network = pathlift.capture(load_model(str(tmp_path / "float.onnx")), SHAPE)
    quantized, report = pathlift.quantize(network, bits=4, moments=0)
    save_onnx(quantized, report, tmp_path / "q.onnx")
    before, after = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("float", "q"))
    assert [node.op_type for node in after.node if node.op_type != "DequantizeLinear"] == [n.op_type for n in before.node]
    assert sum(node.op_type == "DequantizeLinear" for node in after.node) == len(report.tensors) == 5
    again = pathlift.capture(load_model(str(tmp_path / "q.onnx")), SHAPE)
    assert pathlift.path_norm(again).log10 == pytest.approx(pathlift.path_norm(quantized).log10, abs=1e-6)
    written = tmp_path / "q.onnx"
    assert written.stat().st_size < (tmp_path / "float.onnx").stat().st_size
    assert in_onnxruntime(written, sample).shape == (3, 3)


@pytest.mark.hunt
@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4, "granularity": 2}, {"bits": 6, "granularity": "tensor"}], ids=str)
def test_a_quantised_file_is_compared_with_the_file_that_it_was_made_from(tmp_path, options):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pathlift.save(drawn(Residual), tmp_path / "float.onnx", SHAPE)
    model = load_model(str(tmp_path / "float.onnx"))
    quantized, report = pathlift.quantize(model, SHAPE, moments=2, **options)
    save_onnx(pathlift.capture(quantized, SHAPE), report, tmp_path / "q.onnx")
    other = load_model(str(tmp_path / "q.onnx"))
    metric, expected = pathlift.path_metric(model, other, SHAPE, moments=2), report.path_metric
    assert (metric.lower, metric.upper, metric.method) == (expected.lower, expected.upper, expected.method)
    assert pathlift.equivalent(quantized, other, SHAPE)
    with pytest.raises(MismatchError, match="give the second one first"):
        pathlift.path_metric(other, model, SHAPE)
    assert pathlift.path_metric(other, load_model(str(tmp_path / "q.onnx")), SHAPE).value == 0


class WithRoundedInputs(nn.Module):
    """Activations rounded in front of each convolution and linear layer, as QuantizeLinear and DequantizeLinear do."""

    def __init__(self, model: nn.Module, ranges: dict[str, tuple[float, float]]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for name, (low, high) in ranges.items():
            scale = torch.tensor((high - low) / 255, dtype=torch.float32)
            zero = (-low / scale).round().clamp(0, 255)

            def rounded(_, inputs, scale=scale, zero=zero):
                return (((inputs[0] / scale).round() + zero).clamp(0, 255) - zero) * scale

            self.model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(rounded)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.hunt
@pytest.mark.parametrize("measured", [True, False])
def test_activations_become_whole_numbers_where_they_have_a_range(tmp_path, measured, sample):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    quantized, report = pathlift.quantize(drawn(Residual), SHAPE, 8, moments=0)
    ranges = activation_ranges(quantized, SHAPE, data=sample if measured else None)
    assert list(ranges) == [tensor.name for tensor in report.tensors]
    assert all(
        low == 0.0 < high
        for name, (low, high) in ranges.items()
        if name != "first.weight" and (measured or name != "last.weight")
    )
    save_onnx(quantized, report, tmp_path / "q.onnx", SHAPE, activations=ranges)
    outputs, simulated = in_onnxruntime(tmp_path / "q.onnx", sample), WithRoundedInputs(quantized, ranges)(sample)
    assert (outputs - simulated).abs().max() < 0.02 * quantized(sample).abs().max()  # a tie may go the other way
    off = (outputs - quantized(sample)).abs().max()
    assert 0 < off < 0.1 * quantized(sample).abs().max()
    kinds = [node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node]
    assert kinds.count("QuantizeLinear") >= 4 and kinds.count("DequantizeLinear") == 5 + kinds.count("QuantizeLinear")
    if measured:
        assert ranges["first.weight"] == pytest.approx((float(sample.min()), float(sample.max())))
    with pytest.raises(InputError, match="which was not quantised"):
        save_onnx(quantized, report, tmp_path / "a.onnx", SHAPE, activations={"norm.weight": (0.0, 1.0)})
    with pytest.raises(InputError, match="the smaller first, with 0 between"):
        save_onnx(quantized, report, tmp_path / "a.onnx", SHAPE, activations={"first.weight": (1.0, 2.0)})


def rounded_at_random(report: pathlift.quantisation.QuantizeReport, source: torch.Generator) -> dict[str, Tensor]:
    """Each weight at one of the values of its grid beside it, or what it became."""
    drawn_weights = {}
    for tensor in report.tensors:
        choices = torch.stack([*tensor.neighbours, tensor.values])
        which = torch.randint(0, 3, tensor.shape, generator=source)
        drawn_weights[tensor.name] = choices.gather(0, which[None])[0]
    return drawn_weights


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", [{}, {"rounding": "nearest", "affine": True}, {"bits": "fp8_e5m2"}], ids=str)
def test_every_rounding_to_the_same_grids_is_bounded_and_certified(options):
    model, x = drawn(Residual), torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    quantized, report = pathlift.quantize(model, SHAPE, **{"bits": 8, "moments": 0} | options)
    source = torch.Generator().manual_seed(1)
    for first in (model, quantized):
        network = pathlift.capture(first, SHAPE)
        for low, high in report.tolerance.intervals(network).values():
            assert (low <= high).all()
        bound = pathlift.lipschitz_bound(network, report.tolerance, x)
        certificate = pathlift.certify(network, x, report.tolerance)
        assert "SameGrid(5 tensors)" in certificate.covers and len(certificate.covers) < 200
        for _ in range(5):
            other = with_state(first, {**first.state_dict(), **rounded_at_random(report, source)})
            assert ((other(x) - first(x)).abs() <= bound + 1e-6).all()
            agree = other(x).argmax(1) == first(x).argmax(1)
            assert bool((agree | ~certificate.certified).all())


def test_a_weight_lies_between_its_neighbours_on_the_grid():
    model = drawn(Residual)
    with torch.no_grad():
        model.mixed.weight[0, 0] = 0.0
    _, report = pathlift.quantize(model, SHAPE, 3, rounding="nearest", moments=0)
    for tensor in report.tensors:
        weight = model.get_parameter(tensor.name)
        (down, up), (low, high) = tensor.neighbours, tensor.ends
        assert torch.equal(weight.clamp(low, high), weight.clamp(down, up))
        assert ((tensor.values == down) | (tensor.values == up)).all()
        nearer = torch.minimum((weight - down).abs(), (weight - up).abs())
        assert torch.equal((weight - tensor.values).abs(), nearer)
    down, up = report.tensors[2].neighbours
    assert down[0, 0].item() == up[0, 0].item() == 0.0  # a weight on the grid cannot move


@pytest.mark.hunt
def test_the_roundings_to_a_grid_are_no_set_around_another_network():
    model = drawn(Residual)
    quantized, report = pathlift.quantize(model, SHAPE, 8, gauge="balanced", moments=0)
    assert pathlift.lipschitz_bound(quantized, report.tolerance, torch.ones(1, *SHAPE)).min() > 0
    groups = pathlift.symmetries(model, SHAPE)
    other = with_state(model, groups.rescale([64.0] * len(groups)))
    for wrong in (other, drawn(Residual, 1)):
        with pytest.raises(MismatchError, match="rounded"):
            pathlift.lipschitz_bound(wrong, report.tolerance, torch.ones(1, *SHAPE))


@pytest.mark.hunt
def test_no_rounding_of_a_random_network_breaks_a_guarantee():
    for seed in range(12 * LONGER):
        check_guarantees(seed)


def check_guarantees(seed: int) -> None:
    """A small random network, rounded in a random way: every number of the report that is called a guarantee holds."""
    source = torch.Generator().manual_seed(seed)

    def pick(choices):
        return choices[int(torch.randint(0, len(choices), (), generator=source))]

    make = pick([Residual, capped, perceptron])
    model = drawn(make, seed)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(torch.exp2(torch.randint(-3, 4, (), generator=source).float()))
    options = {
        "bits": pick([2, 3, 4, 6, 8, "fp8_e4m3", "fp8_e5m2"]), "rounding": pick([r for r in ROUNDINGS if r != "balanced"]),
        "granularity": pick(["channel", "tensor", 1, 2]), "affine": pick([False, True]), "range": pick(["mse", "minmax", "lp"]),
        "gauge": pick(["none", "none", "balanced"]), "correction": pick([None, "mean", "variance", "none"]),
    }  # fmt: skip
    quantized, report = pathlift.quantize(model, SHAPE, generator=seed, moments=pick([0, 2]), **options)
    case = (seed, make.__name__, options)
    x = torch.randn(3, *SHAPE, generator=source) * 2
    change = (exactly(quantized, x) - exactly(model, x)).abs().sum(1)
    metric = report.path_metric
    assert metric.lower <= metric.upper
    if metric.exact:  # no sign changed: Theorem 4.1
        assert (change <= x.flatten(1).abs().amax(1).clamp(min=1.0) * metric.upper * (1 + 1e-9)).all(), case
    if make is perceptron:
        probe = Probe(model, torch.zeros(1, *SHAPE))
        pairs = zip(probe.dag().paths(), probe.dag(quantized.state_dict()).paths(), strict=True)
        distance = sum(abs(path.phi - other.phi) for path, other in pairs)
        assert metric.lower <= distance * (1 + 1e-9) and distance <= metric.upper * (1 + 1e-9), case
    assert (change <= pathlift.lipschitz_bound(quantized, model, x).sum(1) * (1 + 1e-9)).all(), case
    certificate = pathlift.certify(quantized, x, report.tolerance)
    bound = pathlift.lipschitz_bound(quantized, report.tolerance, x)
    for _ in range(3):
        other = with_state(quantized, {**quantized.state_dict(), **rounded_at_random(report, source)})
        assert ((exactly(other, x) - exactly(quantized, x)).abs() <= bound * (1 + 1e-9)).all(), case
        agree = other(x).argmax(1) == certificate.predicted
        assert bool((agree | ~certificate.certified).all()), case


def exactly(model: nn.Module, x: Tensor) -> Tensor:
    """The function of a network, up to the rounding of float64."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())


def test_bits_needed_by_the_literature_is_the_smallest_number_that_its_bound_allows():
    model = drawn(lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)))
    model.requires_grad_(False)
    needed, norm = bits_needed(model, 0.05, (7,)), pathlift.path_norm(model, (7,)).value
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    biases = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.abs() for layer in layers]
    radius = max(1.0, *(float((n.weight.abs().sum(1) + b).max()) for n, b in zip(layers, biases, strict=True)))
    largest, width, depth = max(float(layer.weight.abs().max()) for layer in layers), 7, 3

    def bound(bits: int) -> float:
        return (width + 1) * width * depth**2 * radius ** (depth - 1) * largest / (2 ** (bits - 1) - 1)

    assert bound(needed.published) <= 0.05 * norm < bound(needed.published - 1)
    assert needed.bits < needed.published
    assert bits_needed(drawn(Residual), 0.05, SHAPE).published is None
    rescaled = with_state(model, pathlift.symmetries(model, (7,)).rescale([2.0**20] * 9))
    again = bits_needed(rescaled, 0.05, (7,))
    assert again.bits == needed.bits < again.published - 20


@pytest.mark.hunt
def test_bits_needed_is_the_smallest_number_within_the_tolerance():
    model = drawn(Residual)
    needed = bits_needed(model, 0.05, SHAPE)
    assert needed.bits is not None and list(needed.log10_relative) == list(range(2, needed.bits + 1))
    assert needed.log10_relative[needed.bits] <= -1.3010 < needed.log10_relative[needed.bits - 1]
    norm = pathlift.path_norm(model, SHAPE).value
    for bits in range(2, min(needed.bits, 8) + 1):
        _, report = pathlift.quantize(model, SHAPE, bits, rounding="towards_zero", range="minmax")
        assert report.path_metric.value / norm == pytest.approx(10 ** needed.log10_relative[bits], rel=1e-6)
    assert bits_needed(model, 1e-12, SHAPE).bits is None


def test_a_report_is_a_line_a_table_a_dictionary_and_crosses_processes():
    quantized, report = pathlift.quantize(drawn(Residual), SHAPE, 4, moments=0)
    assert repr(report).startswith("QuantizeReport(") and "\n" not in repr(report)
    assert "<table>" in report._repr_html_() and "first.weight" in report._repr_html_()
    assert json.dumps(report.to_dict(), default=str) and len(report.table()) == len(report.tensors) == 5
    again = pickle.loads(pickle.dumps(report))
    assert again.table() == report.table() and torch.equal(again.integers["up.weight"], report.integers["up.weight"])
    assert sum(row["share_of_expected_error"] for row in report.table()) == pytest.approx(1.0)
    stored = sum(t.nbytes for t in quantized.state_dict().values())
    assert report.bytes_before == stored and report.bytes_after < stored / 2
    assert (
        report.statistics == "batch norm"
        and report.batch_norms == sum(type(m) is nn.BatchNorm2d for m in quantized.modules()) > 0
    )


def test_without_data_and_batch_norms_moments_are_propagated():
    _, report = pathlift.quantize(drawn(perceptron), SHAPE, 4, moments=0)
    assert report.statistics == "propagation" and report.expected_error > 0


@pytest.mark.usefixtures("all_there_is")
@pytest.mark.parametrize("bias", [False, True])
def test_the_change_of_outputs_is_told_in_their_units_and_expected_of_one_layer_as_it_is(*, bias):
    layer = drawn(lambda: nn.Linear(6, 3, bias=bias)).double()
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    quantized, report = pathlift.quantize(layer, (6,), 4, data=iter([x[:9], x[9:]]), correction="none")
    change, outputs = (quantized(x) - layer(x)).detach(), layer(x).detach()
    expected = change.square().mean().sqrt() / outputs.square().mean().sqrt()
    assert report.expected_output_change == pytest.approx(float(expected), rel=1e-9)
    assert report.output_change == pytest.approx(float(change[:9].square().mean().sqrt()), rel=1e-9)
    assert report.output_size == pytest.approx(float(outputs[:9].square().mean().sqrt()), rel=1e-9)


def test_a_report_of_a_network_whose_outputs_are_0_has_no_relative_change():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data[:] = torch.tensor([[0.7, -0.28]])
    dead = nn.Sequential(layer, nn.ReLU(), nn.Linear(1, 1, bias=False))
    dead[2].weight.data[:] = 0
    _, report = pathlift.quantize(dead, (2,), 4, data=torch.ones(3, 2))
    assert report.expected_output_change == 0 and report.output_change == 0 and report.output_size == 0


@pytest.mark.hunt
def test_what_is_propagated_is_doubted_the_more_the_deeper(monkeypatch):
    """Six layers, no batch norm, and inputs whose variance is 25 times what was said: kinks look nearly dead and are not."""
    model = deep()
    network = pathlift.capture(model, (20,))
    x = torch.randn(800, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def moved() -> float:
        quantized, report = pathlift.quantize(network, bits=8, moments=0, input_variance=0.04)
        assert [tensor.propagated for tensor in report.tensors] == list(range(7))
        assert [row["propagated"] for row in report.table()] == list(range(7))
        return float((with_state(model, quantized.state)(x) - model(x)).detach().square().mean())

    doubted = moved()
    monkeypatch.setattr("pathlift.quantisation.api.DOUBT", 0.0)
    assert doubted < moved() / 2


def deep() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = (*[20] * 7, 4)
        model = nn.Sequential(*(part for outs in widths[1:] for part in (nn.Linear(20, outs), nn.ReLU())))[:-1].double()
        for layer in model[::2]:
            layer.weight.data = torch.randn(layer.weight.shape).double() * (2.5 / 20) ** 0.5
            layer.bias.data = torch.randn(layer.bias.shape).double()
    return model.eval()


@pytest.mark.hunt
def test_a_network_gives_a_network():
    network = pathlift.capture(drawn(Residual), SHAPE)
    quantized, report = pathlift.quantize(network, bits=6, moments=0)
    assert isinstance(quantized, pathlift.Network)
    module, _ = pathlift.quantize(drawn(Residual), SHAPE, 6, moments=0)
    assert all(torch.equal(quantized.state[name], value) for name, value in module.state_dict().items())
    assert report.tensors[0].bits == 6


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 1}, "bits must be 2 to 8, or one of bf16, fp8_e4m3, fp8_e5m2, found 1"),
        ({"bits": 9}, "bits must be 2 to 8, .*, found 9"),
        ({"bits": True}, "bits must be 2 to 8, .*, found True"),
        ({"bits": 4.0}, "bits must be 2 to 8, .*, found 4.0"),
        ({"bits": "int4"}, "bits must be 2 to 8, or one of bf16"),
        ({"bits": {"first": 99}}, "must be 2 to 8, .*, found 99"),
        ({"bits": {}}, "nothing to quantise"),
        ({"bits": None}, "bits must be"),
        ({"ends": 1}, "ends must be 2 to 8"),
        ({"affine": 1}, "affine must be True or False"),
        ({"granularity": "row"}, "granularity must be one of channel, tensor"),
        ({"granularity": True}, "granularity must be a positive whole number"),
        ({"correction": "all"}, "correction must be one of mean"),
        ({"budget": True}, "budget must be a positive"),
        ({"budget": 1.9}, r"the narrowest grids take 2 bits a weight, and it allows 1\.9"),
        ({"budget": Bytes(100)}, "bytes with all the rest, and it allows 100"),
        ({"data": torch.zeros(3, 2, 5, 6)}, r"shape \(3, 2, 5, 6\)"),
        ({"data": torch.full((3, 2, 6, 6), torch.nan)}, "NaN"),
        ({"data": []}, "data holds no batch"),
        ({"data": "digits"}, "data must be"),
        ({"moments": 3}, "moments must be"),
        ({"bits": {"nothing*": 4}}, "matches 'nothing\\*'. There are: first.weight"),
        ({"bits": {"*": None}}, "nothing to quantise"),
        ({"rounding": "up"}, "rounding must be one of compensated"),
        ({"granularity": 0}, "granularity must be a positive whole number"),
        ({"gauge": "best"}, "gauge must be one of none"),
        ({"range": "max"}, "range must be one of mse"),
        ({"budget": -1}, "budget must be a positive"),
        ({"data": torch.zeros(0, 2, 6, 6)}, "data"),
        ({"rounding": "balanced", "bits": "fp8_e4m3"}, "Balanced rounding counts in steps"),
    ],
)
def test_bad_options_are_one_sentence(options, match):
    with pytest.raises(InputError, match=match) as caught:
        pathlift.quantize(drawn(Residual), SHAPE, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_bad_models_are_refused():
    model = drawn(Residual)
    with torch.no_grad():
        model.mixed.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"mixed\.weight"):
        pathlift.quantize(model, SHAPE)
    with pytest.raises(UnsupportedModelError, match="gelu"):
        pathlift.quantize(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)), (2,))
    with pytest.raises(InputError, match="nothing to quantise"):
        pathlift.quantize(nn.Sequential(nn.ReLU()), (2,))
    tied = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(InputError, match="neither masked nor rounded"):
        pathlift.quantize(tied, (2,))
