"""Nothing that a network of the set computes lies outside its enclosure, on every operator and on random networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from torch import Tensor, nn

import pathlift
from agreement import examples, outputs, randomised, samples
from cases import NETWORKS, OPERATORS, Case
from habit import LONGER
from networks import networks, over
from pathlift import Absolute, Pruned, Relative, Rounding
from pathlift.certification import Tolerance
from pathlift.edges.base import Edges
from pathlift.edges.convolution import Convolution
from pathlift.edges.unit import Scale
from pathlift.edges.weights import computed
from pathlift.graph.interval import Interval
from pathlift.passes.box import Box, box, point
from pathlift.passes.enclosure import Enclosure
from pathlift.passes.enclosure.lines import clamp_lines, slope_lines
from pathlift.passes.enclosure.local import windows_below
from pathlift.passes.enclosure.substitution import chord, lower_bound
from pathlift.passes.enclosure.tightening import _all_at_once, _by_position
from pathlift.passes.enclosure.weights import BoxWeights
from pathlift.passes.forward import feed_of
from pathlift.passes.rounding import Arithmetic
from pathlift.reading.second import other_state

TOLERANCES: tuple[Tolerance, ...] = (Relative(0.05), Absolute(0.02), Rounding(4), Pruned(0.3), Pruned(0.5, "magnitude"))


def corner(model: nn.Module, network: pathlift.Network, tolerance: Tolerance, generator: torch.Generator) -> nn.Module:
    """A network of the set, each weight at one end of its interval or anywhere between."""
    other = copy.deepcopy(model)
    state = other.state_dict()
    inside = torch.rand((), generator=generator) < 0.3
    for name, (low, high) in tolerance.intervals(network).items():
        share = torch.rand(low.shape, generator=generator, dtype=torch.float64)
        share = share if inside else share.round()
        state[name] = torch.minimum(torch.maximum(low + share * (high - low), low), high)
    other.load_state_dict(state)
    return other


def ends(enclosure: Enclosure, first: Enclosure | None = None) -> tuple[Tensor, Tensor]:
    """Linear bounds of every output, or of what it is beyond another network's."""
    lower = enclosure.lower if first is None else partial(enclosure.beyond, first)
    lows, highs = [], []
    for name in enclosure.network.outputs:
        layer = enclosure.network.layer[name]
        unit = torch.eye(torch.Size(layer.shape).numel(), dtype=torch.float64).reshape(-1, *layer.shape)
        unit = unit.expand(enclosure.batch, *unit.shape)
        lows.append(lower({name: unit}))
        highs.append(-lower({name: -unit}))
    return torch.cat(lows, 1), torch.cat(highs, 1)


def assert_encloses(
    model: nn.Module, network: pathlift.Network, batch: tuple[Tensor, ...], tolerance: Tolerance, radius: float
) -> None:
    try:
        weights: Box = box(network, tolerance)
    except pathlift.UnsupportedModelError:
        assert any("parametri" in name or "orig" in name or "temperature" in name for name in network.parameters)
        return
    generator = torch.Generator().manual_seed(0)
    bounds = []
    feed, arithmetic = feed_of(network, batch), Arithmetic(network)
    for refine in (False, True):
        enclosure = Enclosure(network, weights, feed, radius, arithmetic, refine=refine)
        if bool(enclosure.lost.any()):  # nothing is said: the model's own arithmetic has no bound here
            assert any(math.isinf(layer.blur) for layer in network.layers)
            return
        intervals = [torch.cat([getattr(enclosure.intervals[n], s).reshape(len(batch[0]), -1) for n in network.outputs], 1)
                     for s in ("low", "high")]  # fmt: skip
        bounds += [("interval", *intervals), ("linear", *ends(enclosure))]
    for _ in range(3):
        other = corner(model, network, tolerance, generator)
        moved = tuple(x + radius * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype).round() - 1) for x in batch)
        with torch.no_grad():
            found = outputs(other, moved)
        for kind, low, high in bounds:
            assert bool((low <= found).all()), (kind, tolerance, float((low - found).max()))
            assert bool((found <= high).all()), (kind, tolerance, float((found - high).max()))
    pair = [point(network, state, arithmetic=True) for state in (network.state, other_state(network, other))]
    first, second = (Enclosure(network, alone, feed, radius, arithmetic, refine=False) for alone in pair)
    low, high = ends(second, first)
    with torch.no_grad():
        found = found.double() - outputs(model, moved).double()
    assert bool((low <= found).all()), ("difference", tolerance, float((low - found).max()))
    assert bool((found <= high).all()), ("difference", tolerance, float((found - high).max()))


@pytest.mark.one_in(64, first=15)
@pytest.mark.hunt_one_in(12, first=1)
@pytest.mark.parametrize("case", [*OPERATORS, *NETWORKS], ids=lambda case: case.name)
def test_every_operator_stays_inside(case: Case) -> None:
    model = randomised(case.make())
    network, batch = pathlift.capture(model, examples(case.shape)), samples(case.shape)
    for number, tolerance in enumerate(TOLERANCES):
        assert_encloses(model, network, batch, tolerance, 0.05 * (number % 2))


def _inside(model: nn.Module, shape: tuple[int, ...], weights: int) -> None:
    model, batch = randomised(model, weights), samples(shape)
    with torch.no_grad():
        assume(bool(torch.isfinite(outputs(model, batch)).all()))
    kind, moved = divmod(weights, 2)
    network = pathlift.capture(model, examples(shape))
    assert_encloses(model, network, batch, TOLERANCES[kind % len(TOLERANCES)], 0.05 * moved)


@pytest.mark.one_in(18)
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("part", range(12 * LONGER))
def test_random_networks_stay_inside(part: int) -> None:
    over(networks(), 400, part, _inside)


def test_the_linear_bound_of_a_set_with_one_network_and_one_input_is_the_network() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)))
    network = pathlift.capture(model, (1, 5, 5))
    batch = samples((1, 5, 5))
    enclosure = Enclosure(network, box(network, Relative(0.0)), feed_of(network, batch), 0.0, Arithmetic(network), refine=False)
    low, high = ends(enclosure)
    torch.testing.assert_close(low, high, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(low, outputs(model, batch), rtol=0.0, atol=1e-9)


class Halved(nn.Module):
    """ReLU(x) − x/2: what the interval of each term says apart is not what both say together."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() - x / 2


class Twice(nn.Module):
    """w·x₁ − w·x₂: one weight on two edges."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Conv1d(1, 1, 1, bias=False)
        self.difference = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.scale.weight.fill_(1.0)
            self.difference.weight.copy_(torch.tensor([[1.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.difference(self.scale(x).flatten(1))


def enclosed(model: nn.Module, x: Tensor, weights: Mapping[str, float], radius: float) -> tuple[list[float], list[float]]:
    """The interval and the linear bounds of the only output, where some parameters vary by a relative amount."""
    network = pathlift.capture(model.double(), x)

    class Varied(Tolerance):
        def intervals(self, network: pathlift.Network) -> dict[str, tuple[Tensor, Tensor]]:
            values = {name: network.state[name] for name in network.parameters}
            return {name: (value * (1 - weights[name]), value * (1 + weights[name])) for name, value in values.items()}

    enclosure = Enclosure(network, box(network, Varied()), feed_of(network, (x,)), radius, None, refine=False)
    interval = enclosure.intervals[network.outputs[0]]
    low, high = ends(enclosure)
    return [float(interval.low), float(interval.high)], [float(low), float(high)]


def test_terms_that_cancel_do_so_on_the_way_back() -> None:
    """ReLU(x) − x/2 on [−1, 1]: [−1/2, 3/2] term by term, at most 1/2 in truth, which the line above ReLU gives."""
    interval, bounds = enclosed(Halved(), torch.zeros(1, 1, dtype=torch.float64), {}, 1.0)
    assert interval == pytest.approx([-0.5, 1.5])
    assert bounds == pytest.approx([-0.5, 0.5])


def test_a_weight_that_is_used_twice_moves_once() -> None:
    """w·1 − w·1 with w in 1 ± 0.1: ±0.2 edge by edge, 0 in truth."""
    varied = {"scale.weight": 0.1, "difference.weight": 0.0}
    interval, bounds = enclosed(Twice(), torch.ones(1, 1, 2, dtype=torch.float64), varied, 0.0)
    assert interval == pytest.approx([-0.2, 0.2])
    assert bounds == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("kind", ["prelu", "linear"])
@pytest.mark.parametrize(("value", "radius"), [(0.0, 100.0), (0.5, 99.5), (100.0, 1.0)])
def test_a_product_is_rounded_relative_to_the_largest_weight_of_the_set(kind: str, value: float, radius: float) -> None:
    model = nn.PReLU(1) if kind == "prelu" else nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    x = -torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    network = pathlift.capture(model, x[:1])
    weights = box(network, Absolute(radius))
    enclosure = Enclosure(network, weights, feed_of(network, (x,)), 0.0, Arithmetic(network), refine=False)
    interval = enclosure.intervals[network.outputs[0]]
    for end in (value - radius, value + radius):
        nn.init.constant_(model.weight, end)
        found = outputs(model, (x,)).reshape(interval.low.shape)
        assert bool(((interval.low <= found) & (found <= interval.high)).all())


def of_function(function: Callable[[Tensor], Tensor], x: Tensor, radius: float, *, refine: bool = False) -> Enclosure:
    """The enclosure of a function without parameters over a ball."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    network = pathlift.capture(Model(), x[:1])
    return Enclosure(network, box(network, Relative(0.0)), feed_of(network, (x,)), radius, Arithmetic(network), refine=refine)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_an_extremum_holds_0_where_a_processor_may_take_small_numbers_for_it(sign: float) -> None:
    enclosure = of_function(lambda x: F.max_pool1d(x, 2), torch.full((1, 1, 2), sign * 1e-40), 0.0)
    interval = enclosure.intervals[enclosure.network.outputs[0]]
    for low, high in ((interval.low, interval.high), ends(enclosure)):
        assert float(low) <= min(0.0, sign * 1e-40) and max(0.0, sign * 1e-40) <= float(high)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_lines_around_an_extremum_hold_on_the_whole_box(sign: float) -> None:
    """±(max(±x₁, ±x₂) − (±x₁)) = ±max(0, ±(x₂ − x₁)), whose extremes over a box are known."""
    generator = torch.Generator().manual_seed(0)
    x, radius = torch.randn(200, 1, 2, generator=generator, dtype=torch.float64), 0.7
    enclosure = of_function(lambda x: sign * F.max_pool1d(sign * x, 2) - x[..., :1], x, radius)
    low, high = ends(enclosure)
    gap = sign * (x[:, :, 1] - x[:, :, 0])
    extremes = sign * torch.stack([(gap - 2 * radius).clamp(min=0.0), (gap + 2 * radius).clamp(min=0.0)])
    assert bool((low <= extremes.amin(0)).all() and (extremes.amax(0) <= high).all())
    first = gap < 0  # where x₁ is the antecedent that lines go through, their corners are attained
    outer, truth = (high, extremes.amax(0)) if sign > 0 else (low, extremes.amin(0))
    torch.testing.assert_close(outer[first], truth[first], rtol=0.0, atol=1e-9)


def test_a_clamp_with_one_end_has_the_lines_of_a_relu() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(100, generator=generator, dtype=torch.float64)
    high = low + 2 * torch.rand(100, generator=generator, dtype=torch.float64)
    one, none = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for end in (0.0, 0.75, -2.0):
        z, at = Interval(low + end, high + end), torch.tensor(end)
        for clamp, relu in (
            (clamp_lines(z, at, None), slope_lines(Interval(low, high), one, none)),
            (clamp_lines(z, None, at), slope_lines(Interval(low, high), none, one)),
        ):
            for slope, constant in (("lower_slope", "lower"), ("upper_slope", "upper")):
                steep = getattr(relu, slope)
                torch.testing.assert_close(getattr(clamp, slope), steep, rtol=0.0, atol=1e-12)
                moved = getattr(relu, constant) + end - steep * end
                torch.testing.assert_close(getattr(clamp, constant), moved, rtol=0.0, atol=1e-12)


def test_slopes_are_chosen_among_those_that_hold() -> None:
    """ReLU(z) − c·z over z in [−1, 1] is at least min(c, 1 − c), 0 for c = 1/4 … 1 and then less: no slope of more than 1."""
    x = torch.zeros(1, 1, dtype=torch.float64)
    for c in (-1.0, 0.25, 0.5, 1.0, 2.0):
        enclosure = of_function(lambda x, c=c: x.relu() - c * x, x, 1.0)  # type: ignore[misc]
        found = enclosure.tightened({enclosure.network.outputs[0]: torch.ones(1, 1, 1, 1, dtype=torch.float64)}, steps=30)
        truth = min(0.0, c, 1 - c)
        assert truth - 0.02 <= float(found) <= truth


def test_a_chord_lies_above_the_magnitude_and_meets_it_at_both_ends() -> None:
    middle = torch.tensor([0.0, 1.0, -1.0, 3.0, -3.0, 0.0, 2.0, 1e-300, -5.0], dtype=torch.float64)
    radius = torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0, 1e300, 5.0], dtype=torch.float64)
    slope, rest = chord(middle, radius)
    for share in torch.linspace(-1, 1, 21, dtype=torch.float64):
        value = middle + share * radius
        above = slope * value + rest - value.abs()
        assert bool((above >= -4 * 2.0**-53 * (middle.abs() + radius)).all())
        if share.abs() == 1:
            assert bool((above <= 4 * 2.0**-53 * (middle.abs() + radius)).all())
    assert rest.tolist()[3:7] == [0.0, 0.0, 0.0, 0.0]


def test_refined_intervals_are_narrower() -> None:
    """x + (−x + ReLU(x)) in [−1, 1]: what cancels is seen on the way back alone, before the second ReLU."""
    x = torch.zeros(1, 1, dtype=torch.float64)
    coarse, fine = (of_function(lambda x: (x.relu() - x / 2).relu(), x, 1.0, refine=refine) for refine in (False, True))
    first, second = (float(each.intervals[each.network.outputs[0]].high) for each in (coarse, fine))
    assert first == pytest.approx(1.5)
    assert second == pytest.approx(0.5)


def test_without_rounding_of_the_model_a_slope_costs_nothing() -> None:
    interval, bounds = enclosed(nn.LeakyReLU(0.25), torch.zeros(1, 1, dtype=torch.float64), {}, 1.0)
    assert interval == pytest.approx([-0.25, 1.0])
    assert bounds == pytest.approx([-1.0, 1.0])


def test_middle_and_radius_of_weights_and_inputs_cover_both_ends_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(3000, 1, generator=generator, dtype=torch.float64)
    share = torch.rand(3000, 1, generator=generator, dtype=torch.float64)
    high = low + torch.cat([share[:1000] * 1e-6, share[1000:] * low[1000:].abs() * 2.5])
    network = pathlift.capture(nn.Linear(1, 3000, bias=False).double(), (1,))
    (weight,) = network.values()
    weights = BoxWeights(Box({weight: low}, {weight: high}))
    middle, radius = weights.middle[weight], weights.radius[weight]
    assert radius is not None
    for least, most, c, r in zip(low, high, middle, radius, strict=True):
        assert Fraction(float(c)) - Fraction(float(r)) <= Fraction(float(least))
        assert Fraction(float(most)) <= Fraction(float(c)) + Fraction(float(r))
    x = 1000 * torch.randn(300, 1, generator=generator, dtype=torch.float64)
    enclosure = of_function(lambda x: x.relu(), x, 0.1)
    interval = enclosure.intervals[enclosure.network.layers[0].name]
    for value, least, most in zip(x.flatten(), interval.low.flatten(), interval.high.flatten(), strict=True):
        assert Fraction(float(least)) <= Fraction(float(value)) - Fraction(0.1)
        assert Fraction(float(value)) + Fraction(0.1) <= Fraction(float(most))


def own_and_enclosed(model: nn.Module, x: Tensor) -> tuple[Tensor, Interval, Tensor]:
    """What a model gives, the interval of it, and where nothing is said."""
    network = pathlift.capture(model, x[:1])
    walls = Enclosure(network, box(network, Relative(0.0), arithmetic=True), feed_of(network, (x,)), 0.0, Arithmetic(network),
                      refine=False)  # fmt: skip
    interval = walls.intervals[network.outputs[0]]
    return outputs(model, (x,)).reshape(interval.low.shape), interval, walls.lost


def test_what_cancels_in_a_batch_norm_is_rounded_at_its_size() -> None:
    """β − μ·s is nearly 0 where β is s·μ rounded, and (x − μ)·s + β at x near 0 is rounded at the size of both."""
    generator = torch.Generator().manual_seed(0)
    model = nn.BatchNorm1d(500).eval()
    model.running_mean = 100 * torch.randn(500, generator=generator)
    model.running_var = torch.rand(500, generator=generator) + 0.1
    nn.init.uniform_(model.weight, 0.1, 2.0, generator)
    with torch.no_grad():
        model.bias.copy_(model.running_mean * model.weight / (model.running_var + model.eps).sqrt())
    own, interval, _ = own_and_enclosed(model, 1e-6 * torch.randn(1, 500, generator=generator))
    assert bool(((interval.low <= own) & (own <= interval.high)).all())


def test_nothing_is_said_where_a_batch_norm_overflows_on_its_way() -> None:
    """(x − μ)·γ/σ with γ = 1e10 and σ = 1e18: 1e22 at x = 1e30, but 1e40 if the product comes first."""
    model = nn.BatchNorm1d(1).eval()
    model.running_var = torch.full((1,), 1e36)
    nn.init.constant_(model.weight, 1e10)
    *_, lost = own_and_enclosed(model, torch.tensor([[1.0], [1e30]]))
    assert lost.tolist() == [False, True]


def test_positions_between_pixels_are_rounded() -> None:
    x = torch.rand(2, 1, 200, generator=torch.Generator().manual_seed(0))
    own, interval, lost = own_and_enclosed(nn.Upsample(333, mode="linear"), x)
    assert not bool(lost.any())
    assert bool(((interval.low <= own) & (own <= interval.high)).all())


class Floor(nn.Module):
    """max(x, p): a parameter among the antecedents."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.p)


@pytest.mark.parametrize(("x", "low", "high"), [(-5.0, -1.0, 1.0), (0.5, 0.5, 1.0), (5.0, 5.0, 5.0)])
def test_a_parameter_in_an_extremum_moves_by_its_radius(x: float, low: float, high: float) -> None:
    network = pathlift.capture(Floor().double(), (1,))
    feed = feed_of(network, (torch.full((1, 1), x, dtype=torch.float64),))
    enclosure = Enclosure(network, box(network, Absolute(1.0)), feed, 0.0, None, refine=False)
    interval = enclosure.intervals[network.outputs[0]]
    assert [float(interval.low), float(interval.high)] == pytest.approx([low, high])
    assert [float(end) for end in ends(enclosure)] == pytest.approx([low, high])


def maps() -> list[tuple[str, Edges, tuple[int, ...], tuple[int, ...]]]:
    """Edge maps with the shapes of the neurons below and of the weight."""
    found: list[tuple[str, Edges, tuple[int, ...], tuple[int, ...]]] = []
    for dims, groups, stride, pad, dilation in (
        (2, 1, 2, 1, 1),
        (2, 2, 1, 0, 2),
        (1, 2, 2, 1, 1),
        (1, 1, 3, 2, 2),
        (3, 1, 1, 1, 1),
    ):
        for transposed in (False, True):
            weight = (4, 6 // groups) if transposed else (6, 4 // groups)
            edges = Convolution((stride,) * dims, (pad,) * dims, (dilation,) * dims, transposed, (0,) * dims, groups)
            found.append((f"{edges}", edges, (1, 4, *(7, 6, 4)[:dims]), (*weight, *(3, 2, 2)[:dims])))
    padded = Convolution((1, 1), (0, 0), (1, 1), False, (0, 0), 1, (1, 0, 1, 0))
    several = Convolution((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    found += [("padded before", padded, (1, 4, 5, 5), (6, 4, 2, 2)), ("three images", several, (3, 4, 5, 5), (6, 4, 2, 2))]
    for view, below, shape in (((3, 1, 1), (1, 3, 2, 2), (3,)), (None, (1, 3, 2, 2), (3, 1, 1)), (None, (3,), (2, 3)),
                               (None, (2, 1, 2), (3, 1))):  # fmt: skip
        found.append((f"scale {view} {below} {shape}", Scale(view), below, shape))
    return found


@pytest.mark.parametrize(("edges", "below", "shape"), [pytest.param(*own[1:], id=own[0]) for own in maps()])
@pytest.mark.parametrize("repeated", [1, 2])
def test_many_functionals_go_back_as_the_derivatives_say(
    edges: Edges, below: tuple[int, ...], shape: tuple[int, ...], repeated: int
) -> None:
    """`gathered` is the derivative of a functional by the weight, `returned` that by x, each functional by itself."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x, weights = draw(2, *below), draw(2, 3, *shape)
    out = edges.sum(x[0], computed(weights[0, 0]))
    above = (out.shape[0] * repeated, *out.shape[1:]) if out.shape[0] == 1 else tuple(out.shape)
    g = draw(2, 3, *above)
    gathered, returned = edges.gathered(x, weights[0, 0], g), edges.returned(below, weights, g)
    for sample in range(2):
        for row in range(3):
            values, weight = (own.clone().requires_grad_() for own in (x[sample], weights[sample, row]))
            total = (edges.sum(values, computed(weight)).expand(above) * g[sample, row]).sum()
            by_x, by_weight = torch.autograd.grad(total, (values, weight))
            torch.testing.assert_close(gathered[sample, row], by_weight)
            torch.testing.assert_close(returned[sample, row], by_x)


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*copy.deepcopy(layers), nn.Flatten(), nn.LazyLinear(3))


CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "strides": (
        chain(
            *(nn.Conv2d(1, 3, 3, 2, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()),
            *(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 2, 3, 1, 1), nn.BatchNorm2d(2), nn.LeakyReLU(0.1)),
        ),
        (1, 20, 20),
    ),
    "linear chain": (
        chain(
            *(nn.Conv2d(2, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3)),
            *(nn.Conv2d(3, 2, (1, 3), 1, (0, 1)), nn.ReLU6(), nn.Conv2d(2, 3, 1, 1, 1), nn.Hardtanh(-0.3, 0.4)),
        ),
        (2, 7, 7),
    ),
    "one dimension": (
        chain(
            *(nn.Conv1d(2, 4, 5, 2, 3, dilation=2, groups=2), nn.ReLU()),
            *(nn.Conv1d(4, 4, 3, 1, 1), nn.ReLU(), nn.Conv1d(4, 2, 3), nn.ReLU()),
        ),
        (2, 29),
    ),
}
"""Chains of convolutions whose positions see little of what is below."""


@pytest.mark.one_in(3)
@pytest.mark.parametrize("radius", [0.0, 0.02])
@pytest.mark.parametrize("name", CHAINS)
def test_what_a_position_sees_gives_the_bounds_of_the_whole_network(name: str, radius: float) -> None:
    """Windows leave out zeros and nothing else, also at borders, where neurons are missing."""
    make, shape = CHAINS[name]
    model = make()
    model(torch.zeros(2, *shape))  # the last layer takes its size
    model = randomised(model)
    network, batch = pathlift.capture(model, examples(shape)), samples(shape)
    feed = feed_of(network, batch)
    enclosure = Enclosure(network, box(network, Relative(0.03)), feed, radius, Arithmetic(network), refine=False)
    relaxation, cut = enclosure._relaxation, 0
    for layer in network.layers:
        windows = windows_below(relaxation, layer) if layer.nonlinearity is None and layer.connections else None
        if windows is None:
            continue
        cut += 1
        every = torch.ones((enclosure.batch, torch.Size(layer.shape).numel()), dtype=torch.bool)
        bounds = []
        for pieces in (_all_at_once(relaxation, layer, every), _by_position(relaxation, windows, every)):
            low = torch.full(every.shape, math.nan, dtype=torch.float64)
            for part, rows, neurons, unit in pieces:
                low[rows, neurons] = lower_bound(part, {layer.name: unit})
            bounds.append(low)
        torch.testing.assert_close(bounds[1], bounds[0], rtol=1e-10, atol=1e-10)
    assert cut >= 2
