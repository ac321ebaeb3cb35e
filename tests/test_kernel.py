"""The path kernel against the enumeration of paths, near-equal networks, and files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pathlift
from agreement import random_perceptron, randomised


def _states(model: nn.Module, count: int, size: float = 1.0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {n: t + size * torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in model.state_dict().items()}
        for _ in range(count)
    ]


def _phis(model: nn.Module, states: list[dict[str, Tensor]], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([pathlift.path_lifting(pathlift.rescaling.with_state(model, state), shape).phi for state in states])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
def test_the_kernel_is_that_of_the_enumerated_liftings(size: float) -> None:
    model = random_perceptron(3, 4, 4, 2)
    states = _states(model, 3, size)
    phi = _phis(model, states, (3,))
    kernel = pathlift.path_kernel(states, (3,), model=model)
    gram = phi @ phi.T
    assert torch.allclose(kernel.sign * 10**kernel.log10_gram, gram, rtol=1e-9)
    distance = torch.cdist(phi, phi, compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.allclose(kernel.distance, distance, rtol=1e-6, atol=0.0)
    norms = phi.norm(dim=1)
    assert torch.allclose(kernel.cosine, gram / norms[:, None] / norms, rtol=1e-12, atol=1e-15)
    assert torch.equal(kernel.cosine, kernel.cosine.T)
    assert torch.allclose(kernel.log10_norm, norms.log10())
    for i in range(3):
        for j in range(3):
            l2 = pathlift.path_metric(pathlift.rescaling.with_state(model, states[i]), states[j], (3,), q=2)
            assert l2.lower * (1 - 1e-6) <= float(kernel.distance[i, j]) <= l2.upper * (1 + 1e-6)


def test_rescaling_any_network_changes_nothing() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)))
    groups = pathlift.symmetries(model, (1, 3, 3))
    states = _states(model, 3, 0.1)
    for state in states:
        state["1.running_var"] = state["1.running_var"].abs()
    moved = [groups.at(s).randomize(generator=torch.Generator().manual_seed(k)) for k, s in enumerate(states)]
    one, two = (pathlift.path_kernel(own, (1, 3, 3), model=model) for own in (states, moved))
    assert torch.allclose(one.cosine, two.cosine, rtol=1e-9)
    assert torch.allclose(one.log10_distance, two.log10_distance, rtol=1e-9)
    assert torch.allclose(one.coordinates()[0], two.coordinates()[0], atol=1e-8)


def test_files_are_read_pair_by_pair_with_one_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_perceptron(3, 4, 2)
    states = _states(model, 3)
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    with torch.device("meta"):
        hollow = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    seen: list[tuple[int, int]] = []
    kernel = pathlift.path_kernel(paths, (3,), model=hollow, progress=lambda done, whole: seen.append((done, whole)))
    assert torch.equal(kernel.cosine, pathlift.path_kernel(states, (3,), model=model).cosine)
    assert seen == [(index, 6) for index in range(1, 7)]


def test_distances_in_the_plane_are_drawn_as_they_are() -> None:
    layer = nn.Linear(2, 1, bias=False)
    points = torch.tensor([[3.0, 0.0], [0.0, -2.0], [6.0, 1.0], [-1.0, 4.0]])
    kernel = pathlift.path_kernel([{"weight": point[None]} for point in points], (2,), model=layer)
    drawn, shown = kernel.coordinates()
    largest = torch.cdist(points, points).max()
    assert math.isclose(shown, 1.0, rel_tol=1e-9)
    assert torch.allclose(torch.cdist(drawn, drawn), (torch.cdist(points, points) / largest).double(), atol=1e-6)


def test_a_network_without_paths_has_no_cosine() -> None:
    layer = nn.Linear(2, 1, bias=False)
    kernel = pathlift.path_kernel([{"weight": torch.zeros(1, 2)}, {"weight": torch.ones(1, 2)}], (2,), model=layer)
    assert kernel.cosine.isnan().tolist() == [[True, True], [True, False]]
    assert kernel.sign.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert math.isclose(float(kernel.distance[0, 1]), math.sqrt(2))
    assert pathlift.path_kernel([{"weight": torch.zeros(1, 2)}] * 2, (2,), model=layer).coordinates()[1] == 1.0


def test_bad_input_is_refused() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with pytest.raises(pathlift.InputError, match="at least one"):
        pathlift.path_kernel([], (2,))
    with pytest.raises(pathlift.InputError, match="architecture"):
        pathlift.path_kernel([layer.state_dict()], (2,))
    with pytest.raises(pathlift.MismatchError):
        pathlift.path_kernel([layer, {"weight": torch.ones(1, 3)}], (2,))
    with pytest.raises(pathlift.NumericalError, match="weight"):
        pathlift.path_kernel([layer, {"weight": torch.full((1, 2), math.inf)}], (2,))
    with pytest.raises(pathlift.InputError, match="dimensions"):
        pathlift.path_kernel([layer], (2,)).coordinates(2)
