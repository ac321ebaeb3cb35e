"""Second moments of few samples are shrunk towards what is known without them (mathematics §9)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import pathlift
from habit import LONGER
from pathlift.quantisation.layer import GROWTH
from pathlift.rescaling import with_state
from pathlift.rescaling.states import state_of
from pathlift.statistics.shrinkage import Products, shrunk
from test_quantisation import SHAPE, Residual

WAYS = ("alone", "sequential", "pruned")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def products_of(windows: Tensor) -> Products:
    products = Products()
    for part in windows.split(3, 1):
        products.add(part)
    return products


@pytest.mark.parametrize("positions", [1, 5])
def test_moments_and_how_far_they_vary_are_those_of_single_samples(positions: int) -> None:
    u = normal(2, 10, positions, 4)
    each = torch.einsum("gnpi,gnpj->ngij", u, u) / positions
    products = products_of(u)
    torch.testing.assert_close(products.mean, each.mean(0))
    torch.testing.assert_close(products.variance, each.var(0, correction=1) / len(each))


@pytest.mark.parametrize("count", [4, 16, 64, 512])
def test_it_comes_closer_than_what_was_measured_and_than_what_was_known(count: int) -> None:
    """In the mean over draws, and up to a little: λ itself is estimated."""
    columns, lost = 12, torch.zeros(3, dtype=torch.float64)
    for seed in range(30):
        mixing = torch.eye(columns, dtype=torch.float64) + 0.25 * normal(columns, columns, seed=seed)
        truth = mixing @ mixing.mT
        u = normal(1, count, 1, columns, seed=seed + 100) @ mixing.mT
        products = products_of(u)
        known = torch.eye(columns, dtype=torch.float64)[None]
        mixed, share = shrunk(products.mean, products.variance, known)
        assert 0.0 <= share <= 1.0 and torch.equal(mixed.diagonal(dim1=1, dim2=2), products.mean.diagonal(dim1=1, dim2=2))
        size = products.mean[0].diagonal().sqrt()
        found = [mixed[0], products.mean[0], known[0] * size[:, None] * size]
        lost += torch.stack([
            ((each - truth) / truth.diagonal().sqrt() / truth.diagonal().sqrt()[:, None]).square().sum() for each in found
        ])
    assert lost[0] < 1.01 * lost[1:].min()
    if count in (16, 64):
        assert lost[0] < 0.95 * lost[1:].min()


def test_of_one_sample_all_is_chance_and_of_what_is_always_the_same_nothing() -> None:
    u, known = normal(1, 1, 1, 6), torch.eye(6, dtype=torch.float64)[None]
    one = products_of(u)
    mixed, share = shrunk(one.mean, one.variance, known)
    assert share == 1.0 and torch.equal(mixed, torch.diag_embed(u[0, 0, 0].square())[None])
    same = products_of(u.expand(1, 8, 1, 6))
    mixed, share = shrunk(same.mean, same.variance, known)
    assert share < 1e-12 and torch.allclose(mixed, one.mean)


def test_it_goes_along_with_a_rescaling_bit_for_bit() -> None:
    u, factors = normal(2, 9, 4, 5), torch.exp2(torch.tensor([3.0, -2.0, 0.0, 40.0, -30.0], dtype=torch.float64))
    known = torch.full((2, 5, 5), 0.3, dtype=torch.float64)
    (first, share), (second, other) = (
        shrunk(products.mean, products.variance, known) for products in (products_of(u), products_of(u * factors))
    )
    assert torch.equal(share, other) and torch.equal(first * factors[:, None] * factors, second) and share.min() > 0


def calibrated(seed: int, make: type[nn.Module] | None = None) -> tuple[nn.Module, Tensor]:
    """A network whose batch norms know what they read, and inputs of one kind whose channels and pixels are correlated."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wide = [layer for _ in range(2) for layer in (nn.Linear(24, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU())]
        model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), *wide, nn.Linear(24, 5)) if make is None else make()
        shape = (12,) if make is None else SHAPE
        mixing = torch.randn(math.prod(shape), math.prod(shape))
        x = (torch.randn(2048, math.prod(shape)) @ mixing / math.prod(shape) ** 0.5).reshape(2048, *shape)
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                    layer.momentum = None
            model.train()(x)
    return model.eval(), x


def off(seed: int, count: int, ways: tuple[str, ...], make: type[nn.Module] | None = None) -> list[float]:
    """log of the errors of the outputs on other inputs, with a few samples, relative to those without: each way."""
    model, x = calibrated(seed, make)
    network, data, others = pathlift.capture(model, tuple(x.shape[1:])), x[:count], x[1024:]

    def error(way: str, **options: object) -> float:
        if way == "pruned":
            changed, _ = pathlift.prune(network, amount=0.5, update="compensate", **options)  # type: ignore[call-overload]
        else:
            changed, _ = pathlift.quantize(network, bits=3, moments=0, **options)  # type: ignore[call-overload]
        other = with_state(model, state_of(changed))
        return float((other(others) - model(others)).detach().square().mean().log()) / 2

    options = {"sequential": {"sequential": True}}
    return [error(way, data=data, **options.get(way, {})) - error(way) for way in ways]


def mean_off(seeds: range, count: int, ways: tuple[str, ...] = WAYS, make: type[nn.Module] | None = None) -> list[float]:
    return [sum(each) / len(seeds) for each in zip(*(off(seed, count, ways, make) for seed in seeds), strict=True)]


def test_a_handful_of_samples_does_little_harm_and_that_is_owed_to_shrinkage(monkeypatch: pytest.MonkeyPatch) -> None:
    found = off(0, 4, ("alone",))[0]
    monkeypatch.setattr(Products, "variance", property(lambda products: torch.zeros_like(products.mean)))
    measured = off(0, 4, ("alone",))[0]
    assert found < math.log(1.4) and found < measured - 0.1


@pytest.mark.hunt
@pytest.mark.parametrize("make", [None, Residual])
@pytest.mark.parametrize(("count", "most"), [(4, 1.8), (8, 1.5), (16, 1.25), (64, 1.0)])
def test_few_samples_do_little_harm_and_many_help(count: int, most: float, make: type[nn.Module] | None) -> None:
    found = mean_off(range(4 * LONGER), count, make=make)
    assert max(found) < math.log(most), found


def test_what_hardly_speaks_makes_no_row_coarser() -> None:
    """A weight that would have to grow thirtyfold to make up for little widens its row no further than `GROWTH` times."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 8)).requires_grad_(False)
    model[0].weight.copy_(torch.tensor([[1.0, 0.4, 0.0], [0.0, 1.0, 0.4], [1e-3, 0.0, 0.0]]))
    model[2].weight.copy_(normal(8, 3).float())
    model[2].weight[:, 2] = 1e-4
    x = normal(256, 3, seed=2).float()
    options = {"data": x, "sequential": True, "rounding": "nearest", "range": "minmax", "moments": 0}
    _, report = pathlift.quantize(model, (3,), {"0": 2, "2": 4}, **options)
    reach = report.scales["2.weight"].flatten() * 7 / model[2].weight.abs().amax(1)
    assert ((reach >= 0.5) & (reach <= GROWTH * 1.001)).all()


@pytest.mark.parametrize("sequential", [False, True])
def test_it_does_not_matter_in_what_batches_samples_come(sequential: bool) -> None:
    model, x = calibrated(0)
    ways = [x[:80], list(x[:80].split(7)), iter(x[:80].split(45))]
    made = [pathlift.quantize(model, tuple(x.shape[1:]), 3, data=data, sequential=sequential, moments=0) for data in ways]
    first = made[0][1]
    for _, report in made[1:]:
        assert all(torch.equal(report.integers[name], integers) for name, integers in first.integers.items())
        assert report.expected_error == pytest.approx(first.expected_error, rel=1e-9)
