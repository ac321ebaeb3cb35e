"""How much is worked on at a time decides how fast a number comes, never which; and the distance of two stars of edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import pathlift
from agreement import randomised
from pathlift.edges import convolution, gathered, weights
from pathlift.edges.base import Edges
from pathlift.edges.contraction import Dense
from pathlift.edges.convolution import Convolution
from pathlift.edges.weights import computed
from pathlift.passes import programs, rounded
from pathlift.passes.box import box
from pathlift.passes.enclosure import Enclosure, substitution, tightening
from pathlift.passes.forward import feed_of
from pathlift.passes.rounding import Arithmetic


def network(seed: int) -> nn.Module:
    return randomised(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(4, 4, 2, 2, groups=2),
            nn.ReLU(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.ReLU(), nn.Linear(75, 20), nn.ReLU(), nn.Linear(20, 3),
        ),
        seed,
    )  # fmt: skip


def numbers() -> dict[str, Tensor]:
    """Norms, a metric, bounds and shares of a network with all kinds of edges."""
    model, other = network(0), network(1)
    x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    captured = pathlift.capture(model, x[:1])
    layer = captured.layer[captured.outputs[0]]
    unit = torch.eye(3, dtype=torch.float64).reshape(3, *layer.shape).expand(3, 3, *layer.shape)
    weights_of_box = box(captured, pathlift.Absolute(0.01))
    enclosure = Enclosure(captured, weights_of_box, feed_of(captured, (x,)), 0.1, Arithmetic(captured), refine=True)
    found = {
        **{f"norm {q}": pathlift.path_norm(captured, q=q).per_output for q in (1.0, 2.0, math.inf)},
        **{kind: pathlift.lipschitz_bound(captured, other, x, kind=kind) for kind in ("per_input", "activation")},  # type: ignore[arg-type]
        "linear": enclosure.lower({layer.name: unit}),
    }
    metric = pathlift.path_metric(captured, other)
    found |= {"metric below": torch.tensor(metric.lower), "metric above": torch.tensor(metric.upper)}
    return found | {f"share {name}": share for name, share in pathlift.path_magnitude(captured).items()}


@pytest.mark.hunt
def test_blocks_of_any_size_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = numbers()
    for room, name in (
        (convolution, "COLUMNS"), (convolution, "SMALL_WEIGHT"), (gathered, "COLUMNS"), (weights, "BLOCK_ELEMENTS"),
        (weights, "PAIR_ELEMENTS"), (weights, "BUNDLE_ELEMENTS"), (programs, "SMALL_ELEMENTS"), (rounded, "CHUNK_ELEMENTS"),
        (substitution, "ELEMENTS"), (tightening, "ELEMENTS"),
    ):  # fmt: skip
        monkeypatch.setattr(room, name, 8)
    found = numbers()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]


STARS: dict[str, tuple[Edges, tuple[int, ...], tuple[int, ...]]] = {
    "dense": (Dense(), (3, 4), (5, 4)),
    "convolution": (Convolution((1, 2), (1, 0), (1, 1), False, (0, 0), 2), (1, 4, 5, 6), (6, 2, 2, 3)),
    "transposed": (Convolution((2,), (1,), (1,), True, (1,), 2), (1, 4, 5), (4, 3, 2)),
}


@pytest.mark.parametrize("name", STARS)
def test_the_distance_of_two_stars_is_0_for_equal_ones_and_adds_up_edge_by_edge(name: str) -> None:
    edges, below, weight = STARS[name]
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(below, generator=generator, dtype=torch.float64) for _ in range(2))
    w, z = (torch.rand(weight, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = edges.sum(x, computed(w)), edges.sum(y, computed(z))
    ratio = 0.1 + torch.rand(first.shape, generator=generator, dtype=torch.float64)
    one, none = torch.ones_like(first), torch.zeros_like
    torch.testing.assert_close(edges.gap(x, w, x, w, one), none(first), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(edges.gap(x, w, none(y), z, ratio), first)
    torch.testing.assert_close(edges.gap(none(x), w, y, z, ratio), ratio * second)
    far, near = edges.gap(x, w, y, 1e-3 * z, one), edges.gap(x, 1e-3 * w, y, z, one)  # no edge, or every edge, changes sign
    assert bool(((first - second * 1e-3).abs() <= far + 1e-12).all()) and bool((far <= first + second * 1e-3 + 1e-12).all())
    assert bool(((second - first * 1e-3).abs() <= near + 1e-12).all())


@pytest.mark.parametrize("name", STARS)
def test_the_largest_antecedent_is_found_block_by_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edges, below, weight = STARS[name]
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((2, *below[1:]), weight))
    expected = edges.max(x, computed(w))
    monkeypatch.setattr(convolution, "COLUMNS", 1)
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(edges.max(x, computed(w)), expected)
    for sample, largest in zip(x, expected, strict=True):
        alone = edges.max(sample.unsqueeze(0), computed(w))
        torch.testing.assert_close(alone.squeeze(0), largest)


@pytest.mark.parametrize(
    ("edges", "below", "weight", "moved"),
    [
        (Dense(), (3, 4), (5, 4), (0, 1)),
        (Convolution((1,), (0,), (1,), False, (0,), 1), (1, 4, 5), (6, 4, 2), (0, 1)),
        (Convolution((1,), (0,), (1,), False, (0,), 2), (1, 4, 5), (6, 2, 2), (0, 1)),
        (Convolution((1,), (0,), (1,), True, (0,), 1), (1, 4, 5), (4, 3, 2), (1, 0)),
    ],
)
def test_one_dimension_of_a_weight_moves_the_channels_above_and_one_those_below(
    edges: Edges, below: tuple[int, ...], weight: tuple[int, ...], moved: tuple[int, int]
) -> None:
    assert edges.pattern(below, weight).weight.axes() == moved
