"""What ``seconds=`` means: a call ends when its time is up, with a valid answer or with an error that says so."""

from __future__ import annotations

import math

import pytest

import pathlift
from pathlift.budget import Clock


def test_a_clock_without_a_limit_never_ends() -> None:
    clock = Clock(None)
    clock.check("Nothing")
    assert not clock.over() and clock.left() == math.inf


def test_a_clock_that_has_run_down_raises_a_timeout_that_says_what_to_do() -> None:
    clock = Clock(0)
    assert clock.over() and clock.left() == 0
    with pytest.raises(pathlift.OutOfTimeError, match=r"The search did not end within seconds=0.*None for no limit") as caught:
        clock.check("The search")
    assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, "3", True, 1j, [1.0]])
def test_seconds_are_a_finite_number_that_is_not_negative(seconds: object) -> None:
    with pytest.raises(pathlift.InputError, match="seconds must be a finite number"):
        Clock(seconds)  # type: ignore[arg-type]
