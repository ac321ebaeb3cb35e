"""Bounds on the path-metric where the truth is known by hand."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

import pathlift


def chain(weights: list[float], bias: float | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for value in weights:
        layer = nn.Linear(1, 1, bias=bias is not None).double()
        layer.weight.data.fill_(value)
        if bias is not None:
            layer.bias.data.fill_(bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_lemma_4_4_counts_the_bias() -> None:
    bounds = {b.name: b for b in pathlift.path_metric_bounds(chain([0.5], 0.5), chain([1.5], 1.5), (1,))}
    assert bounds["Lemma 4.4"].log10 >= torch.tensor(2.0).log10(), "one weight and one bias move by 1 each"


@pytest.mark.parametrize("kind", ["auto", "per_input", "pivot", "telescoping", "activation"])
def test_a_copy_rescaled_by_an_inexact_factor_is_another_function(kind: str) -> None:
    model = chain([0.3, -1.1])
    other = copy.deepcopy(model)
    other[0].weight.data.mul_(1.7), other[2].weight.data.div_(1.7)
    one, two = (Fraction(net[0].weight.item()) * Fraction(net[2].weight.item()) for net in (model, other))
    bound = pathlift.lipschitz_bound(model, other, torch.full((1, 1), 1e6, dtype=torch.float64), kind=kind)
    assert Fraction(bound.item()) >= abs(one - two) * 10**6
    assert bound.item() < 1e-7


def test_tightening_leaves_a_balance_of_gains_and_losses() -> None:
    model, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[1.0, 1.0]])), other.weight.data.copy_(torch.tensor([[2.0, 0.0]]))
    metric = pathlift.path_metric(model, other, (2,), tighten=3)
    assert metric.lower <= 2 <= metric.upper < 2.001
