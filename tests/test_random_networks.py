"""At least a thousand random networks over all operators against the enumeration of their paths."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from agreement import assert_agrees, examples, randomised
from networks import networks, operator_pairs
from pathlift.reference import Probe
from pathlift.reference.dag import TooManyPathsError

NETWORKS_PER_PART = 65
PARTS = 13
RELAXED = settings(
    max_examples=NETWORKS_PER_PART,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    database=None,
)


def _check(model: nn.Module, shape: tuple[int, ...], weights: int) -> None:
    model = randomised(model, weights)
    inputs = examples(shape)
    assume(Probe(model, *inputs).dag().count() < 4_000)
    try:
        assert_agrees(model, inputs, limit=20_000)
    except TooManyPathsError:
        assume(False)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks_agree_with_the_paths(part: int) -> None:
    @seed(part)
    @RELAXED
    @given(networks(), st.integers(0, 2**16))
    def check(network: tuple[nn.Module, tuple[int, ...]], weights: int) -> None:
        _check(*network, weights)

    check()


@pytest.mark.parametrize("part", range(3))
def test_pairs_of_operators_agree_with_the_paths(part: int) -> None:
    @seed(100 + part)
    @RELAXED
    @given(operator_pairs(), st.integers(0, 2**16))
    def check(network: tuple[nn.Module, tuple[int, ...]], weights: int) -> None:
        _check(*network, weights)

    check()
