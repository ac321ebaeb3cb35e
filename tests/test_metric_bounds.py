"""Every bound on the path-metric encloses the exact value, found by listing all paths."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import assume
from torch import nn

import pathlift
from agreement import examples, perturbed, random_perceptron, randomised
from cases import NETWORKS, OPERATORS, Case
from habit import LONGER
from networks import networks, over
from pathlift.reference import Probe

UPPER = {"pivot", "telescoping", "Hellinger in three steps", "Lemma F.1", "Theorem F.2"}


def assert_enclosed(model: nn.Module, shape: tuple[int, ...], hows: tuple[str, ...] = ("pruned", "grown", "moved")) -> None:
    inputs = examples(shape)
    probe, network = Probe(model, *inputs), pathlift.capture(model, inputs)
    paths = probe.dag().paths(20_000)
    for how in hows:
        other = perturbed(model, how)
        if not all(bool(torch.isfinite(value).all()) for value in network.values(dict(other.state_dict())).values()):
            continue  # a division by a pruned parameter
        theirs = probe.dag(other.state_dict()).paths(40_000)
        exact = sum(abs(one.phi - two.phi) for one, two in zip(paths, theirs, strict=True))
        log = math.log10(exact) if exact > 0 else -math.inf
        bounds = pathlift.metric.path_metric_bounds(network, other.state_dict())
        applying = [bound for bound in bounds if not bound.reason]
        for bound in applying:
            if bound.side == "upper":
                assert bound.log10 >= log - 1e-9, (how, bound, log)
            else:
                assert bound.log10 <= log + 1e-9, (how, bound, log)
        uppers = [bound.log10 for bound in applying if bound.side == "upper"]
        assert uppers == sorted(uppers, reverse=True)
        missing = UPPER - {bound.name for bound in applying} - {"pivot"}
        assert not missing or all(
            "listed one by one" in b.reason or "output neurons" in b.reason for b in bounds if b.reason and b.name in missing
        )


@pytest.mark.one_in(64, first=5)
@pytest.mark.hunt_one_in(12, first=1)
@pytest.mark.parametrize("case", [*OPERATORS, *NETWORKS], ids=lambda case: case.name)
def test_bounds_on_the_metric_hold_for_every_operator(case: Case) -> None:
    assert_enclosed(randomised(case.make()), case.shape, ("moved",))


def _enclosed(model: nn.Module, shape: tuple[int, ...], weights: int) -> None:
    model = randomised(model, weights)
    assume(Probe(model, *examples(shape)).dag().count() < 3_000)
    assert_enclosed(model, shape)


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("part", range(7 * LONGER))
def test_bounds_on_the_metric_hold_on_random_networks(part: int) -> None:
    over(networks(), 500, part, _enclosed)


def by_name(model: nn.Module, other: nn.Module, shape: tuple[int, ...]) -> dict[str, pathlift.metric.MetricBound]:
    return {bound.name: bound for bound in pathlift.metric.path_metric_bounds(model, other, shape) if not bound.reason}


def test_the_order_of_the_paper_holds_and_two_bounds_move_under_rescaling() -> None:
    model = random_perceptron(4, 8, 8, 3)
    other = perturbed(model, "moved")
    before = by_name(model, other, (4,))
    assert before["Theorem F.2"].log10 <= before["Lemma 4.3"].log10, "(8) follows from Theorem F.2"
    for network in (model, other):
        with torch.no_grad():
            factors = torch.tensor([4096.0, 1.0] * 4)
            network[0].weight.mul_(factors[:, None]), network[0].bias.mul_(factors), network[2].weight.div_(factors)
    after = by_name(model, other, (4,))
    for name, bound in before.items():
        moved = abs(bound.log10 - after[name].log10) > 1e-9
        assert moved is not bound.invariant, name
    assert after["Lemma 4.4"].log10 > before["Lemma 4.4"].log10 + 3


def test_bounds_by_moments_stand_in_the_table_when_asked_for() -> None:
    torch.manual_seed(0)
    model = random_perceptron(4, 8, 8, 3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    bounds = pathlift.metric.path_metric_bounds(model, other, (4,), moments=8)
    applying = [bound for bound in bounds if not bound.reason]
    assert [b.log10 for b in applying] == sorted((b.log10 for b in applying), reverse=True), (
        "upper bounds fall, then lower ones"
    )
    best = {side: next(b for b in order if b.side == side) for side, order in (("upper", applying[::-1]), ("lower", applying))}
    assert {bound.name for bound in best.values()} <= {"8 moments", "8 affinities"}
    assert best["upper"].log10 - best["lower"].log10 < math.log10(1.3)


def test_a_rescaled_copy_is_at_distance_zero() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2))
    model = randomised(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(8), other[0].bias.mul_(8), other[4].weight.div_(8)
    metric = pathlift.path_metric(model, other, (1, 5, 5))
    assert metric.exact and metric.value == 0.0 and metric.method == "equal, aligned"
    assert all(bound.log10 < -12 for bound in by_name(model, other, (1, 5, 5)).values() if not bound.reason)


def test_bounds_for_perceptrons_refuse_others_by_name() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 2)))
    reasons = {
        b.name: b.reason for b in pathlift.metric.path_metric_bounds(model, perturbed(model, "moved"), (1, 3, 3)) if b.reason
    }
    assert set(reasons) == {"Lemma 4.3", "Lemma 4.4"}
    assert all("layered ReLU perceptrons" in reason for reason in reasons.values())
