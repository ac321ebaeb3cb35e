"""Two-sided bounds on the path-metric of any pair against the enumeration of paths, and the laws that they obey."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume
from torch import Tensor, nn

import pathlift
from agreement import close, examples, random_perceptron, randomised
from habit import LONGER
from networks import networks, operator_pairs, over
from pathlift.metric.quadrature import overlap_above, overlap_below, root_above, root_below
from pathlift.reference import Probe
from pathlift.reference.dag import TooManyPathsError

SLACK = 1e-9
Change = Callable[[Tensor, torch.Generator], Tensor]


def _rounded(bits: int) -> Change:
    def change(value: Tensor, generator: torch.Generator) -> Tensor:
        del generator
        step = value.abs().max() / (2 ** (bits - 1) - 1)
        return torch.round(value / step) * step if step > 0 else value

    return change


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


CHANGES: dict[str, Change] = {
    "noise": lambda value, g: value * (1 + 0.1 * _random(value, g)),
    "8 bit": _rounded(8),
    "4 bit": _rounded(4),
    "signs": lambda value, g: torch.where(_random(value, g) < -1.3, -value, value),
    "unrelated": lambda value, g: _random(value, g) * value.abs().mean(),
}


def changed(model: nn.Module, how: str, seed: int = 0) -> dict[str, Tensor]:
    """The parameters of another network."""
    generator = torch.Generator().manual_seed(seed + 77)
    other = pathlift.rescaling.with_state(model, model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(CHANGES[how](parameter, generator))
    return other.state_dict()


def exact(model: nn.Module, state: dict[str, Tensor], shape: tuple[int, ...]) -> float:
    one, two = (pathlift.path_lifting(m, shape).phi for m in (model, pathlift.rescaling.with_state(model, state)))
    return float((one - two).abs().sum())


def encloses(found: pathlift.metric.PathMetric, value: float) -> bool:
    return found.lower <= value * (1 + SLACK) + 1e-290 and value <= found.upper * (1 + SLACK) + 1e-290


# Polynomials against known measures


@pytest.mark.parametrize("atoms", [1, 2, 3, 7, 200])
@pytest.mark.parametrize("spread", [1e-6, 0.5, 4.0])
def test_quadrature_encloses_the_integral_of_any_measure(atoms: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(atoms)
    s = torch.exp(spread * torch.randn(50, atoms, generator=generator, dtype=torch.float64))
    s[:10, 0] = 0.0
    mass = torch.rand(50, atoms, generator=generator, dtype=torch.float64)
    moments = [(mass * s**j).sum(1) for j in range(5)]
    known = [(m * (1 - 1e-12), m * (1 + 1e-12)) for m in moments]
    truth = (mass * s.sqrt()).sum(1)
    for count in (2, 4):
        assert bool((root_above(known[:count]) >= truth * (1 - 1e-12)).all())
        assert bool((root_below(known[1 : 1 + count]) <= truth * (1 + 1e-12)).all())
    if atoms == 1:  # tight where the measure has so few atoms
        inner = slice(10, None)
        assert torch.allclose(root_above(known[:4])[inner], truth[inner], rtol=1e-6)
        assert torch.allclose(root_below(known[1:5])[inner], truth[inner], rtol=1e-6)


@pytest.mark.parametrize("width", [1e-12, 1e-3, 0.3])
def test_quadrature_holds_for_every_measure_within_the_intervals(width: float) -> None:
    generator = torch.Generator().manual_seed(0)
    s = torch.exp(torch.randn(100, 20, generator=generator, dtype=torch.float64))
    moments = [(s**j).sum(1) for j in range(5)]
    shift = 1 + width * (2 * torch.rand(5, 100, generator=generator, dtype=torch.float64) - 1)
    known = [(m * own * (1 - width), m * own * (1 + width)) for m, own in zip(moments, shift, strict=True)]
    truth = s.sqrt().sum(1)
    for index, (low, high) in enumerate(known):
        known[index] = (torch.minimum(low, moments[index]), torch.maximum(high, moments[index]))
    assert bool((root_above(known[:4]) >= truth).all())
    assert bool((root_below(known[1:]) <= truth).all())


@pytest.mark.parametrize("order", [2, 4, 6, 8])
@pytest.mark.parametrize("spread", [1e-3, 0.3, 2.0, 9.0])
def test_overlaps_are_enclosed(order: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(order)
    u = spread * torch.randn(60, 40, generator=generator, dtype=torch.float64)
    y = 4 * torch.sinh(u / (2 * order)) ** 2
    moments = [(y**j).sum(1) for j in range(order // 2 + 1)]
    known = [(m * (1 - 1e-12), m * (1 + 1e-12)) for m in moments]
    truth = (2 * torch.exp(-u.abs() / 2)).sum(1)
    assert bool((overlap_above(order, known) >= truth * (1 - 1e-9)).all())
    assert bool((overlap_below(order, known) <= truth * (1 + 1e-9)).all())


# Random networks over all operators


def _enclosed(model: nn.Module, shape: tuple[int, ...], weights: int, found: dict[str, list[tuple[float, float]]]) -> None:
    model = randomised(model, weights)
    inputs = examples(shape)
    assume(Probe(model, *inputs).dag().count() < 3_000)
    try:
        phi = pathlift.path_lifting(model, inputs).phi
    except (TooManyPathsError, pathlift.InputError):
        assume(False)
    how = list(CHANGES)[weights % len(CHANGES)]
    state = changed(model, how, weights)
    other = pathlift.path_lifting(pathlift.rescaling.with_state(model, state), inputs).phi
    value = float((phi - other).abs().sum())
    network = pathlift.capture(model, inputs)
    for moments in (0, None, 4, 8):
        metric = pathlift.path_metric(network, state, moments=moments)
        assert encloses(metric, value), (how, moments, metric, value)
        if moments and not metric.exact and value > 0:
            found[f"{moments}"].append((metric.lower / value, metric.upper / value))
    estimate = pathlift.path_metric(network, state, estimate=400).sampled
    if estimate is not None:
        half = max(estimate.high - estimate.value, 1e-9 * value)
        found["estimate"].append((abs(estimate.value - value), 2 * half))


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("part", range(8 * LONGER))
def test_any_pair_of_random_networks_is_enclosed(part: int) -> None:
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    over(networks(), 500, part, lambda m, s, w: _enclosed(m, s, w, found))
    for moments, least, most in (("4", 0.75, 1.4), ("8", 0.87, 1.12)):
        assert least <= statistics.median(low for low, _ in found[moments]), moments
        assert statistics.median(high for _, high in found[moments]) <= most, moments
    within = [error <= twice for error, twice in found["estimate"]]
    assert sum(within) >= 0.95 * len(within)  # a rare path that makes all the difference may be missed


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("part", range(4 * LONGER))
def test_pairs_of_operators_are_enclosed(part: int) -> None:
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    over(operator_pairs(), 600, part, lambda m, s, w: _enclosed(m, s, w, found))


@pytest.mark.hunt
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("how", CHANGES)
def test_tightened_bounds_are_within_ten_per_cent(how: str) -> None:
    lows, highs = [], []
    for seed in range(3):
        model = randomised(random_perceptron(4, 5, 4, 2), seed)
        state, shape = changed(model, how, seed), (4,)
        value = exact(model, state, shape)
        metric = pathlift.path_metric(model, state, shape, tighten=20)
        assert encloses(metric, value)
        lows.append(metric.lower / value)
        highs.append(metric.upper / value)
        uppers = [step.log10_upper for step in metric.history]
        lowers = [step.log10_lower for step in metric.history]
        assert uppers == sorted(uppers, reverse=True)
        assert lowers == sorted(lowers)
    assert statistics.median(lows) >= 0.9
    assert statistics.median(highs) <= 1.1


# What a user may rely on


def test_per_output_bounds_enclose_each_output() -> None:
    model = random_perceptron(3, 4, 4, 5)
    state = changed(model, "noise")
    one, two = (pathlift.path_lifting(m, (3,)) for m in (model, pathlift.rescaling.with_state(model, state)))
    value = torch.zeros(5, dtype=torch.float64).index_add(0, one.output, (one.phi - two.phi).abs())
    metric = pathlift.path_metric(model, state, (3,), moments=8)
    assert metric.log10_lower_per_output.shape == (5,)
    assert bool((10**metric.log10_lower_per_output <= value * (1 + SLACK)).all())
    assert bool((10**metric.log10_upper_per_output >= value * (1 - SLACK)).all())
    assert close(float((10**metric.log10_upper_per_output).sum()), metric.upper)
    pruned = {name: torch.where(tensor > 0, tensor, 0.0) for name, tensor in model.state_dict().items()}
    ordered = pathlift.path_metric(model, pruned, (3,))
    assert ordered.exact
    assert 1.0 < ordered.ratio < 1 + 1e-9
    assert close(float((10**ordered.log10_upper_per_output).sum()), ordered.value)
    with pytest.raises(AttributeError, match="q = 1"):
        _ = pathlift.path_metric(model, state, (3,), q=2).log10_lower_per_output


@pytest.mark.hunt
def test_nearly_equal_networks_are_enclosed_as_tightly() -> None:
    model = random_perceptron(4, 5, 5, 2)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-2, 1e-5, 1e-9):
        state = {name: tensor * (1 + size * _random(tensor, generator)) for name, tensor in model.state_dict().items()}
        value = exact(model, state, (4,))
        metric = pathlift.path_metric(model, state, (4,), moments=8)
        assert encloses(metric, value)
        assert metric.ratio < 1.5, (size, metric)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_biases_that_differ_far_more_than_weights_do_not_loosen_the_bounds(size: float) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(32, 32), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    state = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(size if weight.dim() == 1 else 1.0)
            state[name] = weight * (1 + (0.5 if weight.dim() == 1 else 1e-3) * torch.randn(weight.shape))
    assert pathlift.path_metric(model, state, (32,), moments=4).ratio < 1.7
    assert pathlift.path_metric(model, state, (32,), moments=8).ratio < 1.35


@pytest.mark.hunt
@pytest.mark.hunt_one_in(2, first=1)
@pytest.mark.parametrize("depth", [40, 400])
def test_hundreds_of_layers_in_float32_have_finite_bounds(depth: int) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(4, 2))
    state = {name: tensor * (1 + 0.01 * torch.randn_like(tensor)) for name, tensor in model.state_dict().items()}
    metric = pathlift.path_metric(model, state, (4,), moments=8, estimate=200)
    assert math.isfinite(metric.log10_lower)
    assert metric.ratio < 2.0
    assert metric.sampled is not None
    assert metric.log10_lower - 0.1 <= metric.sampled.log10_value <= metric.log10_upper + 0.1


@pytest.mark.hunt
def test_tightening_stops_at_a_ratio_and_at_a_time() -> None:
    model = random_perceptron(4, 5, 4, 2)
    state = changed(model, "8 bit")
    first = pathlift.path_metric(model, state, (4,), moments=8)
    target = 1 + 0.7 * (first.ratio - 1)
    seen: list[pathlift.metric.Step] = []
    metric = pathlift.path_metric(model, state, (4,), tighten=200, ratio=target, progress=seen.append)
    assert metric.ratio <= target
    assert metric.history == tuple(seen)
    assert metric.history[-1].number < 200
    untightened = pathlift.path_metric(model, state, (4,), ratio=1.0001)
    target = 1 + 0.85 * (untightened.ratio - 1)
    metric = pathlift.path_metric(model, state, (4,), tighten=200, ratio=target)
    assert metric.ratio <= target
    assert 0 < metric.history[-1].number < 200, "all bounds that need no steps are not enough"
    assert pathlift.path_metric(model, state, (4,), tighten=10_000, seconds=0.5).history[-1].number < 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"moments": 3}, "0, 2, 4, 6 or 8"),
        ({"moments": 0, "tighten": 1}, "leave one of them out"),
        ({"tighten": -1}, "tighten"),
        ({"estimate": 1}, "at least 2"),
        ({"estimate": 2.5}, "estimate"),
        ({"ratio": 0.5}, "ratio"),
        ({"seconds": 0.0}, "seconds"),
        ({"estimate": 4, "generator": 0.5}, "generator"),
        ({"q": 3}, "q must be"),
        ({"q": 2, "moments": 8}, "q = 1"),
    ],
)
def test_options_are_checked(options: dict[str, float], words: str) -> None:
    model = random_perceptron(2, 3, 1)
    with pytest.raises(pathlift.InputError, match=words):
        pathlift.path_metric(model, changed(model, "noise"), (2,), **options)


# Laws

ROUNDING = 1e-3
"""A high moment is used when its rounding error is up to a tenth of it, and that error is another one in another gauge."""


@pytest.mark.one_in(24)
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("moments", [0, None, 4, 8])
def test_rescaling_either_side_changes_nothing(how: str, moments: int | None) -> None:
    model = random_perceptron(4, 5, 4, 2)
    state = changed(model, how)
    groups = pathlift.symmetries(model, (4,))
    first = pathlift.path_metric(model, state, (4,), moments=moments, estimate=20)
    for choices in ((0.25, 1.0, 8.0), None):
        moved = groups.at(state).randomize(choices, generator=torch.Generator().manual_seed(1))
        second = pathlift.path_metric(model, moved, (4,), moments=moments, estimate=20)
        own = pathlift.rescaling.with_state(model, groups.randomize(choices, generator=torch.Generator().manual_seed(2)))
        third = pathlift.path_metric(own, moved, (4,), moments=moments, estimate=20)
        for found in (second, third):
            assert found.lower <= first.upper
            assert first.lower <= found.upper
            assert math.isclose(found.upper, first.upper, rel_tol=ROUNDING), how
            assert math.isclose(found.lower, first.lower, rel_tol=ROUNDING), how
            assert found.sampled is not None
            assert first.sampled is not None
            assert math.isclose(found.sampled.value, first.sampled.value, rel_tol=1e-5)


def test_a_difference_near_rounding_is_not_lost_in_the_gauge() -> None:
    model = random_perceptron(4, 5, 4, 2)
    with torch.no_grad():
        model[2].weight[0, 0] = 1e-12
    other = pathlift.rescaling.with_state(model, model.state_dict())
    with torch.no_grad():
        other[2].weight[0, 0] *= -1
    share = float(pathlift.path_magnitude(model, (4,))["2.weight"][0, 0])
    exact = 2 * share * pathlift.path_norm(model, (4,)).value
    assert pathlift.path_metric(model, other, (4,)).upper == pytest.approx(exact, rel=1e-6)


def test_a_pruned_and_rescaled_copy_is_exact_up_to_the_rounding_of_its_weights() -> None:
    model = random_perceptron(4, 6, 5, 2).float()
    generator = torch.Generator().manual_seed(0)
    pruned = {n: t * (torch.rand(t.shape, generator=generator) > 0.3) for n, t in model.state_dict().items()}
    value = pathlift.path_metric(model, pruned, (4,))
    groups = pathlift.symmetries(model, (4,)).at(pruned)
    metric = pathlift.path_metric(model, groups.randomize((0.25, 1.0, 8.0), generator), (4,), moments=8)
    assert value.exact
    assert metric.exact
    assert "aligned" in metric.method
    assert metric.value == value.value
    rounded = pathlift.path_metric(model, groups.randomize(generator=generator), (4,))
    assert not rounded.exact, "a copy with weights of float32 is another network"
    assert rounded.ratio < 1 + 1e-4
    assert math.isclose(rounded.lower, value.value, rel_tol=1e-4)


@pytest.mark.hunt
def test_exact_values_are_symmetric_and_obey_the_triangle_inequality() -> None:
    model = random_perceptron(3, 5, 4, 2)
    small, tiny = ({name: tensor * size for name, tensor in model.state_dict().items()} for size in (0.8, 0.3))
    states = [model.state_dict(), small, tiny]
    for q in (1, 2):
        d = [
            [pathlift.path_metric(pathlift.rescaling.with_state(model, a), b, (3,), q=q).value for b in states] for a in states
        ]
        for i in range(3):
            assert d[i][i] <= 1e-12
            for j in range(3):
                assert math.isclose(d[i][j], d[j][i], rel_tol=1e-9, abs_tol=1e-12)
                assert all(d[i][j] <= (d[i][k] + d[k][j]) * (1 + 1e-9) for k in range(3))


def test_zero_exactly_when_the_liftings_agree() -> None:
    model = random_perceptron(3, 4, 2)
    moved = pathlift.symmetries(model, (3,)).rescale([2.0, 0.5, 4.0, 1.0])
    assert pathlift.path_metric(model, moved, (3,), moments=8).upper == 0.0
    nearly = dict(model.state_dict())
    nearly["0.weight"] = nearly["0.weight"].clone()
    nearly["0.weight"][0, 0] *= -1
    assert pathlift.path_metric(model, nearly, (3,), moments=8).lower > 0.0


def test_nothing_is_computed_for_weights_that_are_not_numbers() -> None:
    model = random_perceptron(3, 4, 2)
    bad = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bad["0.weight"][1, 1] = math.nan
    for options in ({}, {"moments": 8}, {"estimate": 10}, {"q": 2}):
        with pytest.raises(pathlift.NumericalError, match=r"0\.weight"):
            pathlift.path_metric(model, bad, (3,), **options)


# Estimates


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("how", CHANGES)
def test_the_interval_covers_the_truth_at_its_rate(how: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
    )
    model = randomised(nn.Sequential(model, nn.Linear(3, 2)))
    state, shape = changed(model, how), (1, 4, 4)
    value = exact(model, state, shape)
    network = pathlift.capture(model, shape)
    first = pathlift.path_metric(network, state, moments=0)
    hits, total, rounds = 0, 0.0, 60
    for seed in range(rounds):
        own = first.estimate(200, confidence=0.8, generator=seed).sampled
        assert own is not None
        hits += own.low <= value <= own.high
        total += own.value / rounds
    deviation = math.sqrt(0.8 * 0.2 / rounds)
    assert abs(hits / rounds - 0.8) <= 3.5 * deviation, hits
    assert math.isclose(total, value, rel_tol=0.06)


def test_an_estimate_is_reproducible() -> None:
    model = random_perceptron(3, 4, 2)
    state = changed(model, "unrelated")
    one, two, three = (pathlift.path_metric(model, state, (3,), estimate=30, generator=seed).sampled for seed in (1, 1, 2))
    assert one == two
    assert one != three
