"""A path-metric can be improved: `tighten` and `estimate` go on from where a result stands, and hold no weights for it."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathlift
from agreement import random_perceptron
from pathlift.metric import bracket as brackets
from process import storages

SHAPE = (4,)


def noisy(model: nn.Module, size: float = 0.1, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    other = pathlift.rescaling.with_state(model, model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return other


def pair(size: float = 0.1) -> tuple[nn.Module, nn.Module, float]:
    model = random_perceptron(4, 6, 5, 2)
    other = noisy(model, size)
    value = float((pathlift.path_lifting(model, SHAPE).phi - pathlift.path_lifting(other, SHAPE).phi).abs().sum())
    return model, other, value


# Moment bounds without being asked


def test_a_pair_without_order_is_enclosed_by_moments_without_a_hint() -> None:
    model, other, value = pair()
    alone = pathlift.path_metric(model, other, SHAPE, moments=0)
    assert alone.method == "pivot" and alone.passes == 6
    metric = pathlift.path_metric(model, other, SHAPE)
    assert metric.lower <= value <= metric.upper
    assert metric.ratio < 1.4 < alone.ratio


@pytest.mark.one_in(2)
@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("how", ["8 bit", "4 bit", "noise", "two seeds", "a step"])
def test_no_more_moments_are_summed_than_a_ratio_of_1_4_needs(how: str, width: int) -> None:
    torch.manual_seed(width)
    layers = [layer for _ in range(5) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, 4))

    def changed(value: Tensor) -> Tensor:
        if how.endswith("bit"):
            step = value.abs().max() / (2 ** (int(how[0]) - 1) - 1)
            return torch.round(value / step) * step
        noise = torch.randn_like(value)
        return {"noise": value * (1 + 0.1 * noise), "two seeds": noise * value.std(), "a step": value + 1e-3 * noise}[how]

    state = {name: changed(value).detach() for name, value in model.named_parameters()}
    network = pathlift.capture(model, (width,))
    metric = pathlift.path_metric(network, state)
    assert metric.ratio <= 1.42
    most = pathlift.path_metric(network, state, moments=8)
    assert metric.passes <= most.passes + 16
    few = pathlift.path_metric(network, state, moments=4)
    if few.ratio <= 1.4:
        assert metric.passes <= few.passes + 10, "at most affinities that promised more than they kept"


def test_noise_on_every_weight_is_enclosed_within_1_4_by_nine_sums() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(32, 32), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(32, 4)).double()
    metric = pathlift.path_metric(model, noisy(model, 0.15), (32,))
    assert metric.ratio <= 1.4
    assert metric.passes == 9


# Going on


@pytest.mark.hunt
def test_tightening_goes_on_from_where_a_result_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, value = pair()
    network = pathlift.capture(model, SHAPE)
    first = pathlift.path_metric(network, other, moments=8)
    counted: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(brackets, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counted.append(name)
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("chosen", "moment_sums", "affinity_bounds", "pivot_bounds"):
            patch.setattr(brackets, name, counting(name))
        found = first.tighten(0)
        assert counted == []
        assert (found.lower, found.upper, found.passes) == (first.lower, first.upper, first.passes)
    second = first.tighten(10)
    third = second.tighten(10)
    for worse, better in ((first, second), (second, third)):
        assert worse.lower <= better.lower <= value <= better.upper <= worse.upper
        assert better.history[: len(worse.history)] == worse.history
        assert better.passes > worse.passes
    assert second.ratio < first.ratio
    numbers = [step.number for step in third.history]
    assert numbers == sorted(numbers) and numbers[-1] == 20
    seconds = [step.seconds for step in third.history]
    assert seconds == sorted(seconds)


@pytest.mark.hunt
def test_tightening_a_result_is_what_the_option_does() -> None:
    model, other, _ = pair()
    at_once = pathlift.path_metric(model, other, SHAPE, tighten=6)
    step_by_step = pathlift.path_metric(model, other, SHAPE, moments=8).tighten(6)
    assert (at_once.lower, at_once.upper) == (step_by_step.lower, step_by_step.upper)
    from_pivot = pathlift.path_metric(model, other, SHAPE, moments=0).tighten(6)
    assert math.isclose(from_pivot.upper, at_once.upper, rel_tol=1e-9)


@pytest.mark.hunt
def test_tightening_a_result_stops_at_a_ratio_and_at_a_time() -> None:
    model, other, value = pair()
    first = pathlift.path_metric(model, other, SHAPE)
    seen: list[pathlift.metric.Step] = []
    target = 1 + 0.8 * (first.ratio - 1)
    found = first.tighten(200, ratio=target, progress=seen.append)
    assert found.ratio <= target
    assert found.history == (*first.history, *seen)
    assert found.history[-1].number < 200
    again = found.tighten(200, ratio=target)
    assert again.passes == found.passes, "nothing is left to do"
    stopped = first.tighten(10_000, seconds=0.3)
    assert stopped.stopped and stopped.lower <= value <= stopped.upper
    assert not stopped.tighten(1).stopped


@pytest.mark.hunt
def test_an_estimate_is_that_of_the_option_and_keeps_the_bounds() -> None:
    model, other, value = pair()
    metric = pathlift.path_metric(model, other, SHAPE)
    assert metric.sampled is None
    sampled = metric.estimate(400, confidence=0.999, generator=3)
    assert sampled.sampled is not None and sampled.sampled.confidence == 0.999
    assert sampled.sampled.low <= value <= sampled.sampled.high
    assert (sampled.lower, sampled.upper, sampled.history) == (metric.lower, metric.upper, metric.history)
    assert (
        pathlift.path_metric(model, other, SHAPE, estimate=400, generator=3).sampled
        == metric.estimate(400, generator=3).sampled
    )
    drawn = torch.Generator().manual_seed(3)
    assert metric.estimate(400, generator=drawn).sampled == metric.estimate(400, generator=3).sampled
    assert metric.estimate(400, generator=drawn).sampled != metric.estimate(400, generator=3).sampled, "it draws on"
    assert sampled.tighten(2).sampled == sampled.sampled


def test_a_value_that_is_known_stays_as_it_is() -> None:
    model, _, _ = pair()
    pruned = {name: torch.where(value > 0, value, 0.0) for name, value in model.state_dict().items()}
    exact = pathlift.path_metric(model, pruned, SHAPE)
    assert exact.exact
    assert exact.tighten(5) is exact
    assert exact.estimate(10) is exact
    with pytest.raises(pathlift.InputError, match="q = 2"):
        pathlift.path_metric(model, pruned, SHAPE, q=2).tighten(5)
    with pytest.raises(pathlift.InputError, match="q = 2"):
        pathlift.path_metric(model, pruned, SHAPE, q=2).estimate(5)


# What a result holds


@pytest.mark.hunt
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("given", ["module", "state_dict", "network", "tensors"])
def test_a_result_can_be_improved_while_its_weights_are_there(given: str) -> None:
    model, other, value = pair()
    second: Any = other
    if given == "state_dict":
        second = other.state_dict()
    elif given == "network":
        second = pathlift.capture(other, SHAPE)
    elif given == "tensors":
        second = dict(other.named_parameters())
    metric = pathlift.path_metric(model, second, SHAPE)
    del second
    gc.collect()
    better = metric.tighten(1)
    assert better.lower <= value <= better.upper
    alive = [weakref.ref(parameter) for module in (model, other) for parameter in module.parameters()]
    del other
    gc.collect()
    with pytest.raises(pathlift.InputError, match=r"second network are gone.*tighten="):
        metric.tighten(1)
    with pytest.raises(pathlift.InputError, match="estimate="):
        metric.estimate(3)
    del model
    gc.collect()
    assert all(parameter() is None for parameter in alive)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("how", ["in place", "data", "swapped"])
def test_a_result_of_weights_that_have_changed_since_is_not_improved(which: str, how: str) -> None:
    model, other, _ = pair()
    metric = pathlift.path_metric(model, other, SHAPE)
    weight = (model if which == "first" else other)[0].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        if how == "in place":
            weight.mul_(1.5)
        elif how == "data":
            weight.data[0, 0] += 1e-9
        else:
            weight.data.copy_(kept.flip(0))
    with pytest.raises(pathlift.MismatchError, match=rf"{which} network have changed"):
        metric.tighten(1)
    weight.data.copy_(kept)
    assert metric.tighten(1).upper <= metric.upper


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_a_copy_shows_the_same_and_says_that_it_cannot_be_improved(copied: Callable[[Any], pathlift.metric.PathMetric]) -> None:
    model, other, _ = pair()
    metric = pathlift.path_metric(model, other, SHAPE)
    twin = copied(metric)
    assert repr(twin) == repr(metric) and twin.log10_upper_per_output.equal(metric.log10_upper_per_output)
    with pytest.raises(pathlift.InputError, match=r"copy.*tighten="):
        twin.tighten(1)
    metric.tighten(1)


def held(results: list[pathlift.metric.PathMetric]) -> int:
    """Bytes of the tensors that results keep alive."""
    return sum(own.untyped_storage().nbytes() for own in storages(results).values())


def test_results_in_a_list_hold_no_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 3))
    network = pathlift.capture(model, (200,))

    def result() -> pathlift.metric.PathMetric:
        state = {name: value + 0.01 * torch.randn_like(value) for name, value in model.state_dict().items()}
        return pathlift.path_metric(network, state, tighten=2)

    kept = [result()]
    before = held(kept)
    kept += [result() for _ in range(4)]
    assert held(kept) - before < 4 * 4096, "numbers for each output, and no weights"
