"""Rescaling symmetries: no group missed, none invented, and what is built on them (SPEC §7)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from agreement import examples, randomised
from cases import NETWORKS, OPERATORS, Case
from networks import networks, operator_pairs
from pathlift.reference import Probe
from pathlift.reference.dag import TooManyPathsError
from symmetric import assert_symmetric, counted, dimension_by_paths

RELAXED = settings(
    max_examples=65,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    database=None,
)
PINNED = {"weight_norm", "pruned"}
"""Operators whose symmetries the paths count otherwise: derived weights are left alone, a mask's zeros are not looked at."""


def generator(start: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(start)


@pytest.mark.parametrize("case", [*OPERATORS, *NETWORKS], ids=lambda case: case.name)
def test_every_operator_ties_what_its_paths_tie(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = randomised(case.make()), examples(case.shape)
    groups = assert_symmetric(model, inputs, generator())
    if case.name not in PINNED and counted(model):
        assert len(groups) == dimension_by_paths(model, inputs)


def _check(model: nn.Module, shape: tuple[int, ...], weights: int) -> None:
    model, inputs = randomised(model, weights), examples(shape)
    assume(Probe(model, *inputs).dag().count() < 2_000)
    groups = assert_symmetric(model, inputs, generator(weights))
    assume(counted(model))
    try:
        assert len(groups) == dimension_by_paths(model, inputs, 4_000)
    except TooManyPathsError:
        assume(False)


@pytest.mark.parametrize("part", range(13))
def test_random_networks(part: int) -> None:
    @seed(200 + part)
    @RELAXED
    @given(networks(), st.integers(0, 2**16))
    def check(network: tuple[nn.Module, tuple[int, ...]], weights: int) -> None:
        _check(*network, weights)

    check()


@pytest.mark.parametrize("part", range(3))
def test_pairs_of_operators(part: int) -> None:
    @seed(300 + part)
    @RELAXED
    @given(operator_pairs(), st.integers(0, 2**16))
    def check(network: tuple[nn.Module, tuple[int, ...]], weights: int) -> None:
        model, shape = network
        model, inputs = randomised(model, weights), examples(shape)
        assert_symmetric(model, inputs, generator(weights))

    check()
