"""Every operator, and small networks of every kind, against the enumeration of all their paths."""

from __future__ import annotations

import pytest
import torch

import pathlift
from agreement import assert_agrees, examples, randomised
from cases import NETWORKS, OPERATORS, Case, SeveralInputs


@pytest.mark.one_in(16, first=9)
@pytest.mark.parametrize("case", [*OPERATORS, *NETWORKS], ids=lambda case: case.name)
def test_every_quantity_agrees_with_the_paths(case: Case) -> None:
    torch.manual_seed(0)
    count = assert_agrees(randomised(case.make()), examples(case.shape))
    assert count > 0


def test_several_inputs_agree_with_the_paths() -> None:
    assert_agrees(randomised(SeveralInputs()), examples([(2,), (3,)]))


@pytest.mark.one_in(16, first=3)
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
