"""What ``seconds=`` means: a call ends when its time is up, with a valid answer or with an error that says so."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift import budget
from pathlift.budget import Clock
from pathlift.rescaling.relations import Relations


def test_a_clock_without_a_limit_never_ends() -> None:
    clock = Clock(None)
    clock.check("Nothing")
    assert not clock.over() and clock.left() == math.inf


def test_a_clock_that_has_run_down_raises_a_timeout_that_says_what_to_do() -> None:
    clock = Clock(0)
    assert clock.over() and clock.left() == 0
    with pytest.raises(
        pathlift.errors.OutOfTimeError, match=r"The search did not end within seconds=0.*None for no limit"
    ) as caught:
        clock.check("The search")
    assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, "3", True, 1j, [1.0]])
def test_seconds_are_a_finite_number_that_is_not_negative(seconds: object) -> None:
    with pytest.raises(pathlift.InputError, match="seconds must be a finite number"):
        Clock(seconds)  # type: ignore[arg-type]


# ---- symmetries, alignment, tightening


class Late(Clock):
    """A clock that runs down after so many looks at it, whatever the machine does."""

    def __init__(self, looks: int) -> None:
        super().__init__(1.0)
        self.looks = looks

    def over(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def left(self) -> float:
        return 0.5


@contextlib.contextmanager
def stopping_after(looks: int) -> Iterator[None]:
    """Run what is inside under a `Late` clock."""
    token = budget._RUNNING.set(Late(looks))
    try:
        yield
    finally:
        budget._RUNNING.reset(token)


def model_and_other() -> tuple[nn.Module, dict[str, Tensor], tuple[int, ...]]:
    """A small network, and noisy weights of another gauge."""
    generator = torch.Generator().manual_seed(3)
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3)]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    state = pathlift.symmetries(model, (2, 4, 4)).randomize(generator=generator, sigma=3.0)
    noisy = {name: weight * torch.exp(0.1 * torch.randn(weight.shape, generator=generator)) for name, weight in state.items()}
    noisy["5.bias"] = state["5.bias"]  # of the outputs: takes no part
    return model, noisy, (2, 4, 4)


def same_function(model: nn.Module, first: dict[str, Tensor], second: dict[str, Tensor], shape: tuple[int, ...]) -> bool:
    x = torch.ones(3, *shape, dtype=torch.float64) * torch.tensor([1.0, -2.0, 0.3]).reshape(3, 1, 1, 1)
    one, two = (pathlift.rescaling.with_state(model, state)(x) for state in (first, second))
    return torch.allclose(one, two, rtol=1e-9)


def test_the_time_of_a_call_is_that_of_the_calls_inside_it_unless_they_have_less() -> None:
    with budget.limited(1000) as outer:
        with budget.limited(None) as inner:
            assert inner is outer
        with budget.limited(5) as inner:
            assert budget.running() is inner is not outer
        assert budget.running() is outer
    assert budget.running().left() == math.inf


@pytest.mark.parametrize("looks", [0, 1, 4, 9])
def test_groups_that_are_half_known_are_no_answer_and_leave_nothing_behind(looks: int) -> None:
    model, _, shape = model_and_other()
    network = pathlift.capture(model, shape)
    with (
        stopping_after(looks),
        pytest.raises(pathlift.errors.OutOfTimeError, match="rescaling groups did not end within seconds"),
    ):
        pathlift.symmetries(network)
    assert len(pathlift.symmetries(network)) == len(pathlift.symmetries(model, shape))


@pytest.mark.parametrize(
    "call",
    [
        lambda model, other, shape: pathlift.symmetries(model, shape, seconds=0),
        lambda model, other, shape: pathlift.align(model, other, shape, seconds=0),
        lambda model, other, shape: pathlift.equivalent(model, other, shape, seconds=0),
        lambda model, other, shape: pathlift.rescaling.rescaling_distance(model, other, shape, seconds=0),
    ],
    ids=["symmetries", "align", "equivalent", "rescaling_distance"],
)
def test_no_time_at_all_is_said_when_there_is_nothing_to_return(call: Callable[..., object]) -> None:
    with pytest.raises(pathlift.errors.OutOfTimeError, match="Allow more seconds"):
        call(*model_and_other())
    assert budget.running().left() == math.inf


def test_an_alignment_that_was_stopped_has_the_function_of_what_was_aligned() -> None:
    model, other, shape = model_and_other()
    groups = pathlift.symmetries(model, shape)
    stopped, whole = pathlift.align(groups, other, seconds=0), pathlift.align(groups, other, seconds=1000)
    assert stopped.stopped and not whole.stopped
    assert same_function(model, stopped, other, shape) and same_function(model, whole, other, shape)


def test_equivalence_is_answered_when_what_was_found_in_time_proves_it() -> None:
    model, other, shape = model_and_other()
    groups = pathlift.symmetries(model, shape)
    assert pathlift.equivalent(groups, groups.rescale(torch.full((len(groups),), 4.0)), seconds=0)
    with pytest.raises(pathlift.errors.OutOfTimeError, match="comparison modulo rescaling"):
        pathlift.equivalent(groups, other, seconds=0)
    with pytest.raises(pathlift.errors.OutOfTimeError, match="balanced representatives"):
        pathlift.rescaling.rescaling_distance(groups, other, seconds=0)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("looks", [0, 3, 20])
@pytest.mark.parametrize("method", ["balance", "condition", "equalize"])
def test_a_representative_that_was_stopped_is_of_the_same_orbit_and_says_how_far_it_came(method: str, looks: int) -> None:
    model, _, shape = model_and_other()
    groups = pathlift.symmetries(model, shape)
    with stopping_after(looks):
        stopped = getattr(groups, method)()
    whole = getattr(groups, method)()
    assert stopped.stopped and not whole.stopped
    assert same_function(model, stopped, dict(model.state_dict()), shape)
    if method != "equalize":
        assert stopped.imbalance > whole.imbalance


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module, float, pathlift.metric.PathMetric]:
    """Two networks, their path-metric from all paths, and the bounds on it that nothing stopped."""
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double() for _ in range(2))
    truth = float((pathlift.path_lifting(model, (3,)).phi - pathlift.path_lifting(other, (3,)).phi).abs().sum())
    return model, other, truth, pathlift.path_metric(model, other, (3,), tighten=6)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("looks", [0, 1, 2, 3, 5, 9, 14])
def test_bounds_of_a_pair_that_were_stopped_anywhere_are_bounds(
    looks: int, pair: tuple[nn.Module, nn.Module, float, pathlift.metric.PathMetric], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other, truth, complete = pair
    monkeypatch.setattr("pathlift.metric.metric.limited", lambda seconds: stopping_after(looks))
    stopped = pathlift.path_metric(model, other, (3,), tighten=6)
    assert stopped.stopped and not complete.stopped
    assert stopped.lower <= truth <= stopped.upper
    assert complete.ratio <= stopped.ratio


def test_an_interrupt_in_the_middle_of_a_search_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, shape = model_and_other()
    network = pathlift.capture(model, shape)

    def interrupted(self: Relations) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Relations, "solve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pathlift.symmetries(network, seconds=100)
    assert budget.running().left() == math.inf
    assert str(pathlift.symmetries(network)) == str(pathlift.symmetries(model, shape))
