"""Path-magnitude inside Torch-Pruning: what an importance says is at least what goes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pathlift
from pathlift.experiments.networks import resnet

tp = pytest.importorskip("torch_pruning")
from pathlift.pruning.torch_pruning import PathMagnitudeImportance  # noqa: E402

X = torch.randn(1, 1, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet(1, 3, width=4, blocks=(1, 1), stem_stride=1).eval()


def flat() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3),
    ).eval()  # fmt: skip


@pytest.mark.one_in(2, first=1)
@pytest.mark.parametrize("make", [network, flat])
def test_removing_a_channel_costs_no_more_than_its_importance(make):
    model = make()
    whole = pathlift.path_norm(model, (1, 8, 8)).value
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    groups = list(tp.DependencyGraph().build_dependency(model, X).get_all_groups(ignored_layers=[last]))
    assert len(groups) > 2
    for number, group in enumerate(groups):
        scores = PathMagnitudeImportance(model, (1, 8, 8))(group)
        assert scores.shape == (len(group[0].idxs),)
        assert bool((scores >= 0).all()) and bool((scores > 0).any())
        for channel in (0, len(scores) - 1):
            twin = copy.deepcopy(model)
            last = [module for module in twin.modules() if isinstance(module, nn.Linear)][-1]
            other = list(tp.DependencyGraph().build_dependency(twin, X).get_all_groups(ignored_layers=[last]))[number]
            grouped = any(getattr(dep.target.module, "groups", 1) not in (1, 4) for dep, _ in other)
            if grouped:  # groups of channels can only go together
                continue
            root = other[0].dep.target.module
            graph = tp.DependencyGraph().build_dependency(twin, X)
            graph.get_pruning_group(root, other[0].dep.handler, idxs=[channel]).prune()
            lost = 1 - pathlift.path_norm(twin, (1, 8, 8)).value / whole
            assert -1e-6 <= lost <= float(scores[channel]) + 1e-6


@pytest.mark.hunt
def test_a_pruner_uses_it_and_scores_anew_after_each_step():
    model = network()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)]
    importance = PathMagnitudeImportance(model, (1, 8, 8))
    pruner = tp.pruner.BasePruner(model, X, importance, pruning_ratio=0.5, iterative_steps=2, ignored_layers=head)
    sizes = [sum(weight.numel() for weight in model.parameters())]
    for _ in range(2):
        pruner.step()
        sizes.append(sum(weight.numel() for weight in model.parameters()))
    assert sizes[0] > sizes[1] > sizes[2]
    assert model(X).shape == (1, 3)
    assert pathlift.path_norm(model, (1, 8, 8)).value > 0


@pytest.mark.hunt
def test_a_change_of_any_kind_is_seen():
    model = network()
    importance = PathMagnitudeImportance(model, (1, 8, 8))
    group = next(iter(tp.DependencyGraph().build_dependency(model, X).get_all_groups()))
    before = importance(group)
    assert torch.equal(importance(group), before)
    model[1].running_var.data.mul_(torch.tensor([1.0, 4.0, 9.0, 16.0]))  # a change that no version counter tells
    assert torch.equal(importance(group), PathMagnitudeImportance(model, (1, 8, 8))(group))
    assert not torch.equal(importance(group), before)


def test_channels_that_nothing_reads_count_by_what_makes_them():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    groups = list(tp.DependencyGraph().build_dependency(model, torch.ones(1, 3)).get_all_groups())
    last = next(group for group in groups if group[0].dep.target.module is model[2])
    shares = pathlift.path_magnitude(model, (3,))
    expected = shares["2.weight"].sum(1) + shares["2.bias"]
    assert torch.allclose(PathMagnitudeImportance(model, (3,))(last), expected.double(), rtol=1e-5)


@pytest.mark.hunt
def test_channels_chosen_are_the_same_after_a_rescaling():
    model = network()
    state = pathlift.symmetries(model, (1, 8, 8)).randomize((1.0, 128.0, 4096.0), torch.Generator().manual_seed(0))
    rescaled = pathlift.rescaling.with_state(model, state)
    found = []
    for own in (model, rescaled):
        groups = tp.DependencyGraph().build_dependency(own, X).get_all_groups()
        found.append([PathMagnitudeImportance(own, (1, 8, 8))(group) for group in groups])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
