"""Bounds on the path-metric where the truth is known by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    bounds = {b.name: b for b in pathlift.metric.path_metric_bounds(chain([0.5], 0.5), chain([1.5], 1.5), (1,))}
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


@pytest.mark.hunt
def test_an_exact_metric_of_millions_of_outputs_has_ends() -> None:
    model = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), nn.Upsample((2100, 2100)))
    model[0].weight.data.fill_(0.75)
    pruned = copy.deepcopy(model)
    pruned[0].weight.data[0, 0] = 0
    metric = pathlift.path_metric(model, pruned, (2, 1, 1))
    assert metric.lower <= metric.value == 0.75 * 2100**2 <= metric.upper < metric.value * (1 + 1e-6)


class Scaled(nn.Module):
    """A layer whose weight is a parameter times one third: rounded in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(nn.functional.linear(x, self.weight * 0.3))


@pytest.mark.parametrize("layer", [lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), Scaled])
def test_the_rounding_of_computed_weights_that_both_networks_share_is_enclosed(layer: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), *(layer() for _ in range(6)), nn.Linear(5, 2))
    pruned = pathlift.rescaling.with_state(model, model.state_dict())
    pruned[-1].weight.data[0, :3] = 0
    metric = pathlift.path_metric(model, pruned, (3,))
    wide = pathlift.path_metric(
        *(pathlift.rescaling.with_state(own, own.state_dict()).double() for own in (model, pruned)), (3,)
    )
    assert metric.exact
    assert metric.lower <= wide.lower
    assert wide.upper <= metric.upper < metric.lower * (1 + 1e-4)


def test_a_mask_rounds_no_weight() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, part in zip(models, (0.0, 0.5), strict=True):
        nn.utils.prune.random_unstructured(model[0], "weight", part)
    metric = pathlift.path_metric(*models, (3,))
    assert metric.exact
    assert metric.value > 0
    assert metric.ratio < 1 + 1e-12
