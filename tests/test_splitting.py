"""Sets cut at kinks: a bound for each side holds on that side, more cuts never lower a bound, and all cuts make it exact."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import pathlift
from pathlift import Absolute, Relative
from pathlift.budget import Clock
from pathlift.certification import Tolerance
from pathlift.graph.network import Network
from pathlift.passes.enclosure import splitting
from test_certify import fitted
from test_together import CASES, Opposed, Worst, captured, enclosed


def rows(network: Network, *coefficients: tuple[float, ...]) -> dict[str, Tensor]:
    """Return functionals of the output, one for each tuple."""
    return {network.outputs[0]: torch.tensor(coefficients, dtype=torch.float64)[None, :, None]}


def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take few steps: any give a bound."""
    for number, steps in (("FIRST", 6), ("STEPS", 3)):
        monkeypatch.setattr(splitting, number, steps)


def lowest(model: nn.Sequential, x: Tensor, radius: float, a: Tensor) -> float:
    """Return min a·R(x') over a box: for each pattern of signs a linear program, in which all neurons are linear in x'."""
    hidden = [module for module in model if isinstance(module, nn.Linear)]
    count = sum(layer.out_features for layer in hidden[:-1])
    box = [(float(value) - radius, float(value) + radius) for value in x[0]]
    found = math.inf
    for signs in itertools.product((0.0, 1.0), repeat=count):
        slope, shift, left = (
            torch.eye(x.shape[1], dtype=torch.float64),
            torch.zeros(x.shape[1], dtype=torch.float64),
            list(signs),
        )
        sides, limits = [], []
        for layer in hidden:
            slope, shift = layer.weight @ slope, layer.weight @ shift + layer.bias
            if layer is hidden[-1]:
                break
            on, left = torch.tensor(left[: len(shift)], dtype=torch.float64), left[len(shift) :]
            sides.append((1 - 2 * on)[:, None] * slope)  # z ≥ 0 where it is on
            limits.append((2 * on - 1) * shift)
            slope, shift = on[:, None] * slope, on * shift
        answer = linprog((a @ slope).numpy(), torch.cat(sides).numpy(), torch.cat(limits).numpy(), bounds=box)
        if answer.status == 0:
            found = min(found, float(answer.fun) + float(a @ shift))
    return found


@pytest.mark.one_in(9, first=2)
@pytest.mark.parametrize("seed", range(9))
@torch.no_grad()
def test_cut_at_all_kinks_the_bound_is_the_smallest_value(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "PAYS", 1e9)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    x, radius, a = torch.randn(1, 2, dtype=torch.float64), 1.5, (1.0, -1.0)
    network = pathlift.capture(model, x)
    enclosure = enclosed(network, x, None, radius)
    exact = lowest(model, x, radius, torch.tensor(a, dtype=torch.float64))
    before = enclosure.lower(rows(network, a))
    needed = torch.full((1, 1), exact + 1e-6, dtype=torch.float64)  # just out of reach
    after = enclosure.split(0, rows(network, a), before - needed, needed, 1000) + needed
    assert float(after) <= exact
    assert exact - float(after) <= 0.02 * (exact - float(before)) + 1e-6


@pytest.mark.one_in(6, first=3)
@pytest.mark.parametrize(("name", "tolerance", "radius"), CASES, ids=str)
@torch.no_grad()
def test_a_bound_for_one_side_of_some_kinks_holds_for_all_that_is_there(
    name: str, tolerance: Tolerance | None, radius: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs are those of a network and an input of the set; others of the set with the same signs are never below."""
    short(monkeypatch)
    network, x = captured(name)
    enclosure, worst = enclosed(network, x, tolerance, radius), Worst(network, x, tolerance, radius)
    relaxation, a = enclosure._relaxation.of_sample(0), (1.0, -1.0, 0.5)
    search = splitting._Search(relaxation, rows(network, a), torch.zeros(1, 1, dtype=torch.float64), Clock())
    assert search.kinks
    drawn = []
    for _ in range(40):
        weights = {key: low + torch.rand_like(low).round() * (high - low) for key, (low, high) in worst.ends.items()}
        inputs = {key: value + radius * (2 * torch.rand_like(value).round() - 1) for key, value in worst.feed.items()}
        drawn.append(worst.values(weights, inputs))
    met = higher = 0
    whole, root = search.bounded(splitting.Side(0), {})
    for known in (1, 2, 3):
        signs: dict[str, Tensor] = {}
        for kink, source in search.kinks.items():
            crossing = relaxation.free[kink].where.flatten().nonzero()[:, 0]
            chosen = crossing[torch.randperm(len(crossing))[:known]]
            sides = torch.where(drawn[0][source].flatten() >= 0, 1.0, -1.0)
            signs[kink] = torch.zeros_like(sides).index_put((chosen,), sides[chosen]).reshape(1, *network.layer[kink].shape)
        bound, part = search.bounded(root, signs)
        again, _ = search.bounded(part, signs)
        higher += max(bound, again) > whole
        for u in drawn:
            if all(bool((sign * u[search.kinks[kink]] >= 0).all()) for kink, sign in signs.items()):
                met += 1
                assert max(bound, again) <= float((torch.tensor(a, dtype=torch.float64) * u[network.outputs[0]]).sum())
    assert met >= 3
    assert higher


@pytest.mark.one_in(6, first=4)
@pytest.mark.parametrize(("name", "tolerance", "radius"), CASES, ids=str)
@torch.no_grad()
def test_more_cuts_never_lower_a_bound_and_no_functional_falls_below_it(
    name: str, tolerance: Tolerance | None, radius: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    short(monkeypatch)
    monkeypatch.setattr(splitting, "PAYS", 1e9)
    network, x = captured(name)
    enclosure, search = enclosed(network, x, tolerance, radius), Worst(network, x, tolerance, radius)
    a = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    before = enclosure.lower(rows(network, tuple(a.tolist())))
    needed, bounds = before + 100.0, [float(before)]
    for splits in (0, 1, 4):
        after = enclosure.split(0, rows(network, tuple(a.tolist())), before - needed, needed, splits) + needed
        assert float(after) >= bounds[-1] - 1e-12
        bounds.append(float(after))
    four_cuts_do_nothing = name == "branches" and tolerance is not None
    assert four_cuts_do_nothing or bounds[-1] > bounds[1]
    assert bounds[-1] <= search.smallest(lambda u: (a * u[network.outputs[0]]).sum(), 3, 4)


def test_where_squares_do_not_see_a_corner_cuts_do() -> None:
    """On [−1, 1]² the margin is lead − 2 at least, and squares find lead − 2·√2; see `Opposed`."""
    x = torch.zeros(1, 2)
    for lead, splits, verdict in ((2.2, 0, "undecided"), (2.2, 8, "certified"), (1.9, 8, "attacked"), (2.95, 8, "certified")):
        certificate = pathlift.certify(Opposed(lead), x, radius=1.0, splits=splits)
        assert certificate.verdict == [verdict]
        assert (certificate.found is not None) == (splits > 0)
        if certificate.found is not None:
            assert float(certificate.margin - certificate.bound) <= float(certificate.found) <= lead
            assert bool(certificate.found < 0) == (verdict == "attacked")


@pytest.mark.one_in(3, first=2)
@pytest.mark.parametrize("kind", ["set", "ball", "pair"])
def test_cuts_certify_more_and_nothing_that_an_attack_changes(kind: str) -> None:
    model, x = fitted(nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)), (5,))
    x = x[[0, 1, 3, 8, 12]]
    other = pathlift.quantize(model, x[:1], 4)[0] if kind == "pair" else None
    tolerance, radius = {"set": (Relative(0.02), 0.45), "ball": (None, 0.5), "pair": (other, 0.5)}[kind]
    none, many = (pathlift.certify(model, x, tolerance, radius, splits=splits) for splits in (0, 4))
    assert none.found is None
    assert many.found is not None
    assert bool((many.bound <= none.bound).all())
    assert bool((many.certified | ~none.certified).all())
    assert bool((many.bound < none.bound).any())
    assert bool((many.margin - many.bound <= many.found).all())
    hunted = [pathlift.attack(model, x, each, radius, restarts=1) for each in ({tolerance, None} if other else {tolerance})]
    assert not any(bool((found.changed & many.certified).any()) for found in hunted)
    assert {"certified", "attacked"} <= set(many.verdict)


def test_when_the_time_is_up_the_bounds_so_far_hold_and_it_is_said() -> None:
    certificate = pathlift.certify(Opposed(2.2), torch.zeros(1, 2), radius=1.0, splits=8, seconds=0)
    assert certificate.verdict == ["undecided"]
    assert certificate.stopped.tolist() == [True]


@pytest.mark.hunt
@pytest.mark.hunt_one_in(6)
@pytest.mark.parametrize("seed", range(24))
@torch.no_grad()
def test_no_network_that_a_search_finds_breaks_a_bound_of_all_sides(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random networks and sets; what is missing may be reached after a few cuts, or never."""
    monkeypatch.setattr(splitting, "PAYS", 1e9)
    torch.manual_seed(seed)
    network, x = captured(("strided", "branches", "perceptron")[seed % 3])
    share = 10.0 ** (-1 - 2 * float(torch.rand(())))
    sets = [(Relative(share), 0.0), (None, 3 * share), (Absolute(share / 4), share / 2), (Relative(share / 4), share)]
    tolerance, radius = sets[seed // 3 % 4]
    enclosure, search = enclosed(network, x, tolerance, radius), Worst(network, x, tolerance, radius)
    a = torch.randn(2, 3, dtype=torch.float64)
    functionals = rows(network, *map(tuple, a.tolist()))
    before = enclosure.lower(functionals)
    for shift in (1e-3, 1.0):
        needed = before + shift * before.abs()
        after = enclosure.split(0, functionals, before - needed, needed, 12) + needed
        for number, row in enumerate(a):
            found = search.smallest(lambda u, row=row: (row * u[network.outputs[0]]).sum(), 4, 8)
            assert float(before[0, number]) - 1e-12 <= float(after[0, number]) <= found + 1e-12
