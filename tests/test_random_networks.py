"""Hundreds of random networks over all operators against the enumeration of their paths; tens of thousands in a search."""

from __future__ import annotations

import pytest
from hypothesis import assume
from torch import nn

from agreement import assert_agrees, examples, randomised
from habit import LONGER
from networks import networks, operator_pairs, over
from pathlift.reference import Probe
from pathlift.reference.dag import TooManyPathsError


def _check(model: nn.Module, shape: tuple[int, ...], weights: int) -> None:
    model = randomised(model, weights)
    inputs = examples(shape)
    assume(Probe(model, *inputs).dag().count() < 4_000)
    try:
        assert_agrees(model, inputs, limit=20_000)
    except TooManyPathsError:
        assume(False)


@pytest.mark.one_in(52)
@pytest.mark.hunt_one_in(8)
@pytest.mark.parametrize("part", range(21 * LONGER))
def test_random_networks_agree_with_the_paths(part: int) -> None:
    over(networks(), 0, part, _check)


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("part", range(10 * LONGER))
def test_pairs_of_operators_agree_with_the_paths(part: int) -> None:
    over(operator_pairs(), 10_000, part, _check)
