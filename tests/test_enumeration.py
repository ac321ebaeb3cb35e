"""Every operator, and small networks of every kind, against the enumeration of all their paths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pathlift
from agreement import assert_agrees, examples, randomised
from cases import NETWORKS, OPERATORS, Case, SeveralInputs


@pytest.mark.one_in(32, first=9)
@pytest.mark.hunt_one_in(12)
@pytest.mark.parametrize("case", [*OPERATORS, *NETWORKS], ids=lambda case: case.name)
def test_every_quantity_agrees_with_the_paths(case: Case) -> None:
    torch.manual_seed(0)
    count = assert_agrees(randomised(case.make()), examples(case.shape))
    assert count > 0


def test_several_inputs_agree_with_the_paths() -> None:
    assert_agrees(randomised(SeveralInputs()), examples([(2,), (3,)]))


@pytest.mark.one_in(32, first=3)
@pytest.mark.hunt_one_in(12, first=1)
@pytest.mark.parametrize("case", [*OPERATORS, *NETWORKS], ids=lambda case: case.name)
def test_the_key_identity_holds(case: Case) -> None:
    """R_θ(x) = Σ_p Φ_p(θ)·a_p(θ,x)·x̄(p₀), equations (4), (4'); and the realisation is the model's own output."""
    model = randomised(case.make())
    (x,) = examples(case.shape)
    lifting = pathlift.path_lifting(model, x, x)
    with torch.no_grad():
        out = model(x)
    if isinstance(out, torch.Tensor):
        assert torch.allclose(lifting.realisation, out.reshape(-1), rtol=1e-9, atol=1e-12)
    assert lifting.activations is not None
    assert float(lifting.activations.abs().max()) <= 1
    assert torch.allclose(lifting.reconstruction(), lifting.realisation, rtol=1e-9, atol=1e-12)


def test_paths_are_counted_before_anything_is_listed() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    count = 64 * 256 * 256 * 10 + 256 * 256 * 10 + 256 * 10 + 10
    with pytest.raises(pathlift.InputError, match=f"{count:,} paths.* takes some 40.63 GiB"):
        pathlift.path_lifting(model, (64,))


def test_more_paths_than_numbers_are_counted_too() -> None:
    model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(8)))
    with pytest.raises(pathlift.InputError, match=r"about 1\.000e\+18 paths"):
        pathlift.path_lifting(model, (100,))


def test_a_layer_that_is_too_large_to_be_probed_is_refused_before() -> None:
    with pytest.raises(pathlift.InputError, match=r"400 outputs and 160,000 parameters.*191 GiB"):
        pathlift.path_lifting(nn.Linear(400, 400), (400,))


def test_a_limit_counts_the_paths_to_hidden_neurons() -> None:
    """2 inputs, 3 hidden neurons, 1 output, no biases: 2 + 3·2·2 + 6 paths, 6 of them to the output."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    assert len(pathlift.path_lifting(model, (2,), limit=20)) == 6
    with pytest.raises(pathlift.InputError, match="20 paths to all of its neurons"):
        pathlift.path_lifting(model, (2,), limit=6)
