"""Certified radii: the largest of those that `certify` proves, sample by sample, and the share of samples over them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

import pathlift
from cases import perceptron
from pathlift import Relative, Rounding
from pathlift.certification import CertifiedRadius, Tolerance, certified_radius
from test_certify import fitted

RADII = (0.002, 0.01, 0.03, 0.05, 0.1, 0.2, 0.4, 1.0)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor]:
    model, x = fitted(perceptron(5, 24, 24, 3), (5,))
    return model, x[:12]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("tolerance", [None, Relative(0.01), Rounding(6)])
def test_a_radius_is_the_largest_that_certify_proves(trained: tuple[nn.Module, Tensor], tolerance: Tolerance | None) -> None:
    model, x = trained
    found = certified_radius(model, x, tolerance, RADII)
    assert found.radii.tolist() == [0.0, *RADII]
    one_by_one = torch.stack([pathlift.certify(model, x, tolerance, radius).certified for radius in (0.0, *RADII)])
    assert torch.equal(found.certified, one_by_one[0])
    assert torch.equal(found.radius, (one_by_one * found.radii[:, None]).amax(0))
    assert torch.equal(found.share, one_by_one.double().mean(1))
    assert 0.0 < float(found.share[6]) < float(found.share[1])  # some of each, or this would show nothing
    assert torch.equal(found.predicted, model(x).argmax(1)) and not bool(found.stopped.any())


def test_the_radius_of_a_linear_model_is_its_margin_over_the_norm_of_the_difference_of_rows() -> None:
    """|(w_c − w_j)·(x' − x)| ≤ r·‖w_c − w_j‖₁ with equality for some x'."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 2).double(), torch.randn(20, 6, dtype=torch.float64)
    with torch.no_grad():
        exact = (model(x)[:, 0] - model(x)[:, 1]).abs() / (model.weight[0] - model.weight[1]).abs().sum()
    step = 1.05 * float(exact.max()) / 500
    found = certified_radius(model, x, radii=[step * number for number in range(501)])
    assert bool((found.radius <= exact).all()) and bool((exact < found.radius + step + 1e-9).all())


@pytest.mark.hunt
def test_no_attack_within_the_radius_changes_the_class(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    found = certified_radius(model, x)
    assert bool((found.radius > 0).all())
    for one, radius in zip(x, found.radius.tolist(), strict=True):
        assert not bool(pathlift.attack(model, one[None], None, radius, steps=10))


def test_radii_that_are_not_given_follow_the_size_of_the_inputs(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    radii = certified_radius(model, x[:2]).radii
    largest = float(x[:2].abs().max())
    assert radii[0] == 0 and radii[-1] == largest and math.isclose(float(radii[1]), 1e-5 * largest)
    assert bool((radii.diff() > 0).all())


@pytest.mark.hunt
def test_batches_with_labels_are_answered_as_one_batch(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    together = certified_radius(model, x, Relative(0.001), RADII)
    parts = [(part, torch.zeros(len(part))) for part in x.split(5)]
    apart = certified_radius(model, parts, Relative(0.001), list(reversed(RADII)))
    assert torch.equal(together.radius, apart.radius) and together.covers == apart.covers
    assert "up to the radius of the sample" in together.covers and "Relative(r=0.001)" in together.covers


@pytest.mark.hunt
def test_one_other_network_keeps_the_class_beside_the_model(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    near = {name: weight * 1.01 for name, weight in model.state_dict().items()}
    both = certified_radius(model, x, near, RADII)
    assert bool((both.radius <= certified_radius(model, x, None, RADII).radius).all()) and bool((both.radius > 0).any())
    assert float(both.radius.max()) == max(r for r in RADII if bool(pathlift.certify(model, x, near, r).certified.any()))


def test_where_nothing_is_certified_the_radius_is_zero(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    found = certified_radius(model, x[:3], Relative(10.0), RADII)
    assert found.radius.tolist() == [0.0] * 3 and not bool(found.certified.any()) and not bool(found.share.any())
    assert not certified_radius(model, x[:1], Relative(10.0), RADII)


def test_when_the_time_is_up_nothing_unproved_is_said(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    found = certified_radius(model, x, Relative(0.01), RADII, seconds=0)
    assert not bool(found.certified.any()) and bool(found.stopped.all())


def test_progress_counts_each_sample_once(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    told: list[float] = []
    certified_radius(model, x.split(7), None, RADII, progress=told.append)
    assert math.isclose(sum(told), len(x)) and len(told) > 2 and min(told) >= 0


def picture(found: CertifiedRadius) -> tuple[list[float], list[float], str]:
    """Return what is drawn, and the kind of the horizontal axis."""
    ax = found.plot(pytest.importorskip("matplotlib.figure").Figure().add_subplot())
    x, y = ax.get_lines()[0].get_data()
    return list(x), list(y), ax.get_xscale()


def test_a_picture_has_the_share_over_the_radius(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    found = certified_radius(model, x, None, torch.linspace(0.0, 1.0, 11))
    across, up, scale = picture(found)
    assert scale == "linear" and across[0] == 0.0 and up == found.share[: len(up)].tolist()
    radii = torch.tensor([0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1])
    spread = dataclasses.replace(found, radius=radii[[1, 2, 3, 4] * 3], radii=radii)
    across, up, scale = picture(spread)
    assert (
        scale == "log" and across == radii[1:].tolist() and up == spread.share[1:].tolist() == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    )


@pytest.mark.parametrize("tolerance", [Relative(10.0), None])
def test_a_picture_of_none_or_of_one_radius_is_drawn(trained: tuple[nn.Module, Tensor], tolerance: Tolerance | None) -> None:
    model, x = trained
    across, up, _ = picture(certified_radius(model, x, tolerance, [0.0]))
    assert across == [0.0] and up == [0.0 if tolerance else 1.0]


def test_radii_that_are_none_are_refused(trained: tuple[nn.Module, Tensor]) -> None:
    model, x = trained
    for radii in ([], [-0.1], [math.inf], 0.1, "0.1"):
        with pytest.raises(pathlift.InputError, match="radii"):
            certified_radius(model, x, radii=radii)  # type: ignore[arg-type]
    with pytest.raises(pathlift.InputError, match="x is empty"):
        certified_radius(model, [], radii=RADII)
