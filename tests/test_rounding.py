"""Bounds are rounded up by their error analysis: compared with exact rational arithmetic, where rounding is all there is."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
import torchvision
from torch import Tensor, nn

import pathlift
from cases import perceptron
from pathlift.passes import rounded, rounding
from pathlift.passes.box import box
from pathlift.passes.enclosure import Enclosure
from pathlift.passes.forward import feed_of, forward
from pathlift.passes.programs import NormProgram
from pathlift.passes.propagate import TooWideError
from pathlift.passes.rounded import plain
from pathlift.passes.rounding import FORMATS, SPARE, Arithmetic, chain, fan_in, rounding_factor, weights_factor
from pathlift.passes.scaled import Scaled

Vector = list[Fraction]


def seeded(*widths: int, dtype: torch.dtype, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return perceptron(*widths).to(dtype)


def exact(model: nn.Sequential, x: Tensor) -> Vector:
    """The network in rational arithmetic."""
    values = [Fraction(v) for v in x.tolist()]
    for layer in model:
        if isinstance(layer, nn.Linear):
            rows, biases = layer.weight.detach().double().tolist(), layer.bias.detach().double().tolist()
            values = [
                sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(b))
                for row, b in zip(rows, biases, strict=True)
            ]
        else:
            values = [max(v, Fraction(0)) for v in values]
    return values


def exact_track(model: nn.Sequential, other: nn.Sequential, x: Tensor) -> Vector:
    """Σ_p (|Φ_p(θ)−Φ_p(m)| + |Φ_p(θ')−Φ_p(m)|)·|x̄(p₀)| by the recursion, in rational arithmetic."""
    start = [abs(Fraction(v)) for v in x.tolist()]
    tracks = {key: (start, [Fraction(0)] * len(start)) for key in (0, 1)}
    for one, two in zip(model, other, strict=True):
        if not isinstance(one, nn.Linear):
            continue
        for key, (own, foreign) in enumerate(((one, two), (two, one))):
            a, d = tracks[key]
            rows = torch.cat([own.weight, own.bias[:, None]], 1).detach().double().tolist()
            others = torch.cat([foreign.weight, foreign.bias[:, None]], 1).detach().double().tolist()
            masses, gaps = [], []
            for row, their in zip(rows, others, strict=True):
                pivots = [
                    min(abs(Fraction(w)), abs(Fraction(v))) if w * v > 0 else Fraction(0)
                    for w, v in zip(row, their, strict=True)
                ]
                ups = [abs(Fraction(w)) for w in row]
                masses.append(sum((u * s for u, s in zip(ups, [*a, Fraction(1)], strict=True)), Fraction(0)))
                through = sum((p * s for p, s in zip(pivots, d, strict=False)), Fraction(0))
                gaps.append(
                    through + sum(((u - p) * s for u, p, s in zip(ups, pivots, [*a, Fraction(1)], strict=True)), Fraction(0))
                )
            tracks[key] = (masses, gaps)
    return [first + second for first, second in zip(tracks[0][1], tracks[1][1], strict=True)]


def nudged(model: nn.Sequential, how: str) -> nn.Sequential:
    """A copy that differs by rounding: one weight in its last digit, or every weight by a few digits."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        if how == "one digit":
            other[0].weight[0, 0] = torch.nextafter(other[0].weight[0, 0], torch.tensor(1e9, dtype=other[0].weight.dtype))
        else:
            generator = torch.Generator().manual_seed(5)
            for parameter in other.parameters():
                unit = torch.finfo(parameter.dtype).eps
                parameter.mul_(1 + unit * torch.randint(-4, 5, parameter.shape, generator=generator).to(parameter.dtype))
    return other


@pytest.mark.one_in(4)
@pytest.mark.parametrize("how", ["one digit", "all digits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_hold_in_exact_arithmetic_where_the_networks_differ_by_rounding(dtype: torch.dtype, how: str) -> None:
    for seed in range(5):
        model = seeded(4, 7, 6, 3, dtype=dtype, seed=seed)
        other = nudged(model, how)
        x = torch.randn(3, 4, dtype=dtype)
        network = pathlift.capture(model, x)
        for kind in ("per_input", "activation", "telescoping", "three_step", "enclosure", "auto"):
            bound = pathlift.lipschitz_bound(network, other.state_dict(), x, kind=kind)  # type: ignore[arg-type]
            for row, sample in zip(bound, x, strict=True):
                drift = [abs(a - b) for a, b in zip(exact(model, sample), exact(other, sample), strict=True)]
                assert all(Fraction(value) >= gap for value, gap in zip(row.tolist(), drift, strict=True)), kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_difference_track_is_rounded_up_by_no_more_than_its_stated_constant(dtype: torch.dtype) -> None:
    for seed in range(5):
        model, other = (seeded(4, 7, 6, 3, dtype=dtype, seed=seed + shift) for shift in (0, 50))
        x = torch.randn(2, 4, dtype=dtype)
        network = pathlift.capture(model, x)
        bound = pathlift.lipschitz_bound(network, other, x, kind="per_input")
        spare = 1 + Fraction(2 * rounding_factor(network, dtype))
        for row, sample in zip(bound, x, strict=True):
            for value, truth in zip(row.tolist(), exact_track(model, other, sample), strict=True):
                assert truth <= Fraction(value) <= truth * spare


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_enclosure_of_one_network_holds_its_exact_value_and_its_own_forward_pass(dtype: torch.dtype) -> None:
    for seed in range(5):
        model = seeded(6, 40, 40, 3, dtype=dtype, seed=seed)
        x = torch.randn(3, 6, dtype=dtype)
        network = pathlift.capture(model, x)
        for tolerance in (pathlift.Relative(0.0), pathlift.Relative(1e-15)):
            walls = Enclosure(network, box(network, tolerance), feed_of(network, (x,)), 0.0, Arithmetic(network), refine=False)
            unit = torch.eye(3, dtype=torch.float64).reshape(3, 1, 3).expand(3, 3, 1, 3)
            low, high = walls.lower({network.outputs[0]: unit}), -walls.lower({network.outputs[0]: -unit})
            own = model(x).detach().double()
            assert bool(((low < own) & (own < high)).all())
            for index, sample in enumerate(x):
                for out, value in enumerate(exact(model, sample)):
                    assert Fraction(float(low[index, out])) < value < Fraction(float(high[index, out]))


def test_the_chain_counts_the_summands_of_each_layer() -> None:
    network = pathlift.capture(seeded(4, 7, 6, 3, dtype=torch.float64), (4,))
    assert [fan_in(network)[layer.name] for layer in network.layers] == [0, 5, 1, 8, 1, 7]
    assert chain(network) == 5 + 1 + 8 + 1 + 7 + 6 * 8 + 3
    image = pathlift.capture(nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.MaxPool2d(3)), (3, 32, 32))
    assert [fan_in(image)[layer.name] for layer in image.layers] == [0, 76, 9]


@pytest.mark.search
def test_float32_bounds_are_above_the_float64_ones_on_a_large_network() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 64, 64)
    fine = copy.deepcopy(model).double()  # kept: its network reads the weights from it
    network, wide = pathlift.capture(model, x), pathlift.capture(fine, x.double())
    state = other.state_dict()
    wide_state = copy.deepcopy(other).double().state_dict()
    for kind in ("per_input", "theorem", "telescoping", "activation"):
        single = pathlift.lipschitz_bound(network, state, x, kind=kind)  # type: ignore[arg-type]
        double = pathlift.lipschitz_bound(wide, wide_state, x.double(), kind=kind)  # type: ignore[arg-type]
        slack = 1 + 1e-9
        assert bool((single * slack >= double).all()), kind
        assert bool((single <= 1.1 * double).all()), kind


@pytest.mark.hunt
def test_the_forward_pass_in_float32_is_within_its_stated_error() -> None:
    """The count of roundings, against float64: what a certificate adds for the model's own arithmetic is enough."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    x = torch.rand(1, 3, 64, 64)
    network = pathlift.capture(model, x)
    walls = Enclosure(
        network, box(network, pathlift.Relative(0.0)), feed_of(network, (x,)), 0.0, Arithmetic(network), refine=False
    )
    truth = forward(network, network.values(), feed_of(network, (x,)), torch.float64, keep=True)
    single = forward(network, network.values(), feed_of(network, (x,)), torch.float32, keep=True)
    for layer in network.layers:
        found = walls.intervals[layer.name]
        for value in (truth[layer.name], single[layer.name].double()):
            assert bool(((found.low <= value) & (value <= found.high)).all()), layer.name


def test_a_value_with_its_exponent_becomes_the_float_next_to_it() -> None:
    """Also where 2**exponent alone is no float; inf past the range, never 0 for what is positive."""
    for exponent in (-1500.0, -1074.0, -600.0, 0.0, 3.0, 600.0, 1000.0, 1500.0):
        for size in (2.0**-400, 0.75, 2.0**400):
            value = Fraction(size) * Fraction(2) ** int(exponent)
            found = float(plain(Scaled(torch.tensor(size, dtype=torch.float64), exponent)))
            if value > Fraction(torch.finfo(torch.float64).max):
                assert found == float("inf")
            else:
                assert found == max(float(value), torch.finfo(torch.float64).tiny)
    assert float(plain(Scaled(torch.zeros(()), 1500.0))) == 0.0


def test_a_type_holds_the_numbers_of_another() -> None:
    holds = {(one, two) for one in FORMATS for two in FORMATS if FORMATS[one].holds(FORMATS[two])}
    half, brain, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    assert holds == {(kind, kind) for kind in FORMATS} | {
        (double, single), (double, brain), (double, half), (single, brain), (single, half),
    }  # fmt: skip


def test_the_arithmetic_of_a_layer_is_what_it_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten(), nn.Linear(6, 2))
    network = pathlift.capture(model, (1, 3))
    convolution, flatten, linear = network.layers[1:]
    monkeypatch.setattr(rounding, "factor_units", lambda device: (0.25, 0.125))
    arithmetic = Arithmetic(network)
    assert [arithmetic.factors(layer) for layer in (convolution, flatten, linear)] == [0.25, 0.0, 0.125]
    assert [arithmetic.exact(layer) for layer in (convolution, flatten, linear)] == [False, True, False]
    assert {arithmetic.of(layer) for layer in network.layers} == {FORMATS[torch.float32]}
    model.bfloat16()
    assert {Arithmetic(network).of(layer) for layer in network.layers} == {FORMATS[torch.bfloat16]}


def test_a_weight_in_few_digits_costs_as_many_roundings_as_its_neuron_has_summands() -> None:
    network = pathlift.capture(seeded(4, 7, 6, dtype=torch.float64), (4,))
    first, second = (layer.connections[0].weight for layer in network.layers if layer.biases)
    assert first is not None and second is not None
    unit = 2.0**-24
    assert weights_factor(network, {}) == 0.0
    assert weights_factor(network, {first: torch.float32}) == 2 * (5 + SPARE) * unit
    assert weights_factor(network, {first: torch.float32, second: torch.float32}) == 2 * (5 + 8 + 2 * SPARE) * unit


@pytest.mark.parametrize("batch", [None, 3])
def test_beyond_all_ranges_a_bound_is_infinite(batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    network = pathlift.capture(seeded(4, 7, 2, dtype=torch.float32), (4,))
    feed = None if batch is None else {network.layers[0].name: torch.ones(batch, 1, 4, dtype=torch.float64)}

    def refuse(*_: object) -> Tensor:
        raise TooWideError("too wide")

    monkeypatch.setattr(rounded, "in_range", refuse)
    values = network.values()
    found = rounded.rounded_up(network, lambda dtype: NormProgram(network, values, dtype, feed=feed), 0, values)
    assert found.shape == ((2,) if batch is None else (3, 2))
    assert bool(found.isinf().all())


def test_bounds_of_an_input_of_zeros_are_those_of_the_biases() -> None:
    network = pathlift.capture(seeded(4, 7, 2, dtype=torch.float32), (4,))
    other = seeded(4, 7, 2, dtype=torch.float32, seed=1)
    zeros, tiny = torch.zeros(1, 4), torch.full((1, 4), 1e-30)
    for kind in ("per_input", "activation", "enclosure"):
        found, near = (pathlift.lipschitz_bound(network, other, x, kind=kind) for x in (zeros, tiny))  # type: ignore[arg-type]
        torch.testing.assert_close(found, near, rtol=1e-6, atol=0.0)
