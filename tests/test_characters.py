"""The characters of moments and affinities are what they are called, and both ways of looking at signs enclose the truth."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import pathlift
from agreement import random_perceptron
from pathlift.graph.layers import WeightTensor
from pathlift.metric.affinities import Signs, affinity_bounds
from pathlift.metric.common_gauge import CommonGauge, in_common_gauge
from pathlift.passes.characters import Affinities, Moments
from pathlift.rescaling.alignment import gauge_fit

SIZES = (0.0, 3e-10, 0.7, 1.0, 2.5, 4e8)


def weights(sizes: tuple[float, ...]) -> tuple[WeightTensor, Tensor, Tensor]:
    network = pathlift.capture(nn.Linear(1, 1, bias=False), (1,))
    signs = itertools.product(sizes, sizes, (1.0, -1.0), (1.0, -1.0))
    first, second = torch.tensor([(s * a, t * b) for a, b, s, t in signs], dtype=torch.float64).T
    return network.weights[0], first, second


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("order", [2, 4, 6, 8])
def test_affinities_are_powers_of_both_weights(order: int, recorded: bool) -> None:
    weight, a, b = weights((*SIZES, 1e-300, 1e290))
    half = order // 2
    for signs in (range(0), range(half, half + 1), range(order + 1)):
        family = Affinities(order, signs)
        with torch.set_grad_enabled(recorded):
            found = {number: affinity.clone() for number, affinity in family.of(weight, a, b)}
        assert sorted(found) == list(range(family.count))
        for number in range(order + 1):
            expected = a.abs() ** (1 - number / order) * b.abs() ** (number / order)
            assert torch.allclose(found[number], expected, rtol=1e-12, atol=0.0)
        assert torch.equal(found[0], a.abs()) and torch.equal(found[order], b.abs())
        for place, number in enumerate(signs):
            assert torch.equal(found[order + 1 + place], found[number] * torch.sign(a) * torch.sign(b))


class _Largest:
    """g = max(|θ|, |θ'|)."""

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        del weight
        return ()

    def __call__(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> Tensor:
        del weight, extras
        return torch.maximum(a.abs(), b.abs())


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("order", [0, 2, 4, 6, 8])
def test_moments_are_made_of_powers_of_both_weights_over_g(order: int, recorded: bool) -> None:
    weight, a, b = weights(SIZES)
    family = Moments(order, _Largest())
    with torch.set_grad_enabled(recorded):
        found = {number: character.clone() for number, character in family.of(weight, a, b)}
    assert sorted(found) == list(range(family.count))
    g = torch.maximum(a.abs(), b.abs())
    x, y = (value / torch.where(g > 0, g, 1.0) for value in (a, b))
    for k, (start, size) in family.rows.items():
        assert size == k + 1
        for j in range(size):
            assert torch.allclose(found[start + j], g * x ** (k - j) * y**j, rtol=1e-13, atol=0.0), (k, j)


def common(model: nn.Module, other: nn.Module) -> CommonGauge:
    network = pathlift.capture(model, (4,))
    return in_common_gauge(network, gauge_fit(network, other.state_dict()))


@pytest.mark.one_in(3)
@torch.no_grad()
@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_paths_of_another_sign_are_enclosed_by_all_signs_and_by_one(size: float) -> None:
    model, other = random_perceptron(4, 5, 5, 2), random_perceptron(4, 5, 5, 2)
    with torch.no_grad():
        for theirs, ours in zip(other.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours + size * torch.randn_like(ours))
        next(other.parameters())[0].neg_()
    paths = [pathlift.path_lifting(own, (4,)).phi for own in (model, other)]
    exact = float((paths[0] - paths[1]).abs().sum())
    pair = common(model, other)
    assert pair.flips
    for signs in Signs:
        sides = affinity_bounds(pair, 8, signs)
        lower, upper = (float(torch.exp2(end).sum()) for end in (sides.lower, sides.upper))
        assert lower * (1 - 1e-9) <= exact <= upper * (1 + 1e-9)
        assert lower > 0
