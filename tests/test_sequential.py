"""`quantize(…, sequential=True)`: each layer is fitted to what it did before by what comes in now, and then rounded."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from habit import LONGER
from pathlift.compensation import sides
from pathlift.compensation.least_squares import DAMPING
from pathlift.errors import InputError
from pathlift.quantisation.layer import GROWTH
from pathlift.quantisation.rounding import ROUNDINGS
from pathlift.rescaling import with_state
from pathlift.statistics import measure
from test_quantisation import SHAPE, Residual, drawn, factors_of, same

COUNT = 64


def inputs(shape: tuple[int, ...], seed: int = 0, count: int = COUNT) -> Tensor:
    """Samples whose channels and positions are correlated, as those of photographs are."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=source)
    return x + x.mean(tuple(range(1, x.dim())), keepdim=True) * 8 + 0.3


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch, all_there_is: None) -> None:
    """These samples are all that there are, and what has all but gone counts as much as what is there."""
    monkeypatch.setattr(measure, "RARE", 0.0)
    monkeypatch.setattr(sides, "STILL", 0.0)


def fit(u: Tensor, now: Tensor, weight: Tensor, centred: bool) -> Tensor:
    """Brute force in float64: rows v with E|w·u − v·ũ|² + d Σ_j E ũ_j² (v_j − w_j)² least, of windows (count, columns).

    What is left when they are cut to `GROWTH` times the range of w, as rounding to nearest does.
    """
    u, now, weight = u.double(), now.double(), weight.double()
    if centred:
        u, now = u - u.mean(0), now - now.mean(0)
    pull = (DAMPING * now.square().sum(0)).sqrt().diag()
    made = torch.linalg.lstsq(torch.cat([now, pull]), torch.cat([u @ weight.mT, pull @ weight.mT])).solution.mT
    most = GROWTH * weight.abs().amax(1, keepdim=True)
    made = torch.clamp(made, -most, most)
    return torch.where(now.abs().sum(0) > 0, made, weight)  # what is always 0 says nothing of its weights


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize("bias", [True, False])
def test_a_second_layer_is_the_least_squares_fit_by_what_comes_in_now_rounded(bias):
    model = drawn(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=bias)))
    x = inputs((6,))
    quantized, report = pathlift.quantize(model, (6,), {"0": 2, "2": 8}, rounding="nearest", data=x, sequential=True, moments=0)
    wanted = fit(model[:2](x), quantized[:2](x), model[2].weight, centred=bias)
    step = report.scales["2.weight"].reshape(-1, 1)
    off = (quantized[2].weight - wanted).abs()
    assert (off <= step * 0.501).all() and (model[2].weight - wanted).abs().max() > 2 * step.max()
    if bias:
        assert torch.allclose(quantized(x).mean(0), model(x).mean(0), atol=1e-5)
    assert report.sequential and report.statistics == "data"


@pytest.mark.usefixtures("believed")
def test_a_convolution_is_fitted_by_all_its_windows():
    model = drawn(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)))
    x = inputs(SHAPE)
    bits = {"0": 2, "2": 8}
    quantized, report = pathlift.quantize(model, SHAPE, bits, rounding="nearest", data=x, sequential=True, moments=0)
    before, now = (F.unfold(part[:2](x), 3, padding=1, stride=2) for part in (model, quantized))
    step = report.scales["2.weight"].reshape(2, 2, 1)
    for group in range(2):
        u, v = (part.reshape(COUNT, 2, 18, -1)[:, group].transpose(1, 2).flatten(0, 1) for part in (before, now))
        wanted = fit(u, v, model[2].weight.reshape(2, 2, 18)[group], centred=True)
        assert ((quantized[2].weight.reshape(2, 2, 18)[group] - wanted).abs() <= step[group] * 0.501).all()


def test_a_batch_norm_sees_the_means_that_it_saw_before():
    model = drawn(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3)))
    x, seen = inputs(SHAPE), {}
    for correction, moved in (("mean", {"running_mean"}), ("variance", {"running_mean", "running_var"}), ("none", set())):
        options = {"data": x, "sequential": True, "correction": correction, "moments": 0}
        quantized, report = pathlift.quantize(model, SHAPE, 2, **options)
        before, now = (part[:3](x).transpose(0, 1).flatten(1) for part in (model, quantized))
        shift = quantized[3].running_mean - model[3].running_mean
        assert torch.allclose(shift, (now - before).mean(1) * bool(moved), atol=1e-5)
        ratio = quantized[3].running_var / model[3].running_var
        wanted = now.var(1) / before.var(1) if "running_var" in moved else torch.ones(3)
        assert torch.allclose(ratio, wanted, rtol=1e-3)
        assert {name.removeprefix("3.") for name in report.corrected if name.startswith("3.")} == moved
        seen[correction] = quantized(x)
    assert not torch.equal(seen["mean"], seen["none"])


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.hunt), pytest.param(2, marks=pytest.mark.hunt)])
def test_outputs_move_less_than_where_each_layer_is_rounded_alone(seed):
    model = drawn(Residual, seed)
    x, others = inputs(SHAPE, seed, 512), inputs(SHAPE, seed + 100, 512)
    off = []
    for options in ({}, {"sequential": True}):
        quantized, _ = pathlift.quantize(model, SHAPE, 2, data=x, moments=0, **options)
        off.append((quantized(others) - model(others)).square().mean().item())
    assert off[1] < 0.95 * off[0]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_way_of_rounding_and_a_budget_can_be_sequential(rounding):
    model, x = drawn(Residual), inputs(SHAPE)
    kept, counted = copy.deepcopy(model.state_dict()), []
    options = {"data": x.split(20), "sequential": True, "rounding": rounding, "budget": 3.0, "moments": 0}
    _, report = pathlift.quantize(
        model, SHAPE, 4, generator=0, progress=lambda done, count: counted.append((done, count)), **options
    )
    assert report.bits <= 3.0 and counted == [(number, 5) for number in range(1, 6)]
    assert [tensor.name for tensor in report.tensors] == [name for name, p in model.named_parameters() if p.dim() > 1]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("gauge", ["balanced", pytest.param("optimal", marks=pytest.mark.hunt)])
@pytest.mark.parametrize("correction", ["mean", pytest.param("none", marks=pytest.mark.hunt)])
def test_a_rescaled_network_is_quantised_to_the_same_bits(gauge, correction):
    model, x = drawn(Residual), inputs(SHAPE)
    groups = pathlift.symmetries(model, SHAPE)
    rescaled = with_state(model, groups.rescale(factors_of(groups)))
    options = {"gauge": gauge, "data": x, "sequential": True, "correction": correction, "moments": 0}
    first, second = (pathlift.quantize(m, SHAPE, 3, **options)[0] for m in (model, rescaled))
    assert not same(model, rescaled) and same(first, second)


class Twice(nn.Module):
    """One weight at two places, and one batch norm behind two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.shared(torch.relu(self.shared(x))))
        return self.norm(self.one(y)) + torch.relu(self.norm(self.two(y)))


@pytest.mark.usefixtures("believed")
def test_a_weight_at_two_places_is_rounded_by_both_and_a_shared_batch_norm_stays():
    model, x = drawn(Twice), inputs((4,))
    options = {"bits": {"shared.weight": 3, "*": 8}, "rounding": "nearest", "data": x, "moments": 0}
    _, alone = pathlift.quantize(model, (4,), **options)
    quantized, report = pathlift.quantize(model, (4,), sequential=True, **options)
    assert torch.equal(report.integers["shared.weight"], alone.integers["shared.weight"])
    assert torch.equal(quantized.norm.running_mean, model.norm.running_mean) and report.corrected == ("shared.bias",)
    before, now = (torch.relu(m.shared(torch.relu(m.shared(x)))) for m in (model, quantized))
    for name in ("one", "two"):  # nothing takes up their means
        wanted = fit(before, now, getattr(model, name).weight, centred=False)
        off = (getattr(quantized, name).weight - wanted).abs()
        assert (off <= report.scales[f"{name}.weight"] * 0.501).all()


def test_without_data_there_is_nothing_to_be_sequential_about():
    with pytest.raises(InputError, match="sequential has no effect without data: give data, or leave it out"):
        pathlift.quantize(drawn(Residual), SHAPE, 4, sequential=True)
    with pytest.raises(InputError, match="data holds no batch"):
        pathlift.quantize(drawn(Residual), SHAPE, 4, data=[], sequential=True)
    with pytest.raises(InputError, match="sequential must be"):
        pathlift.quantize(drawn(Residual), SHAPE, 4, data=inputs(SHAPE), sequential="yes")


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("seed", range(8 * LONGER))
def test_guarantees_hold_for_sequential_rounding_too(seed):
    model, x = drawn(Residual, seed), inputs(SHAPE, seed)
    quantized, report = pathlift.quantize(model, SHAPE, 2 + seed % 4, data=x, sequential=True, moments=2)
    change = (copy.deepcopy(quantized).double()(x.double()) - copy.deepcopy(model).double()(x.double())).abs()
    assert (change <= pathlift.lipschitz_bound(quantized, model, x) * (1 + 1e-9)).all()
    certificate = pathlift.certify(quantized, x[:8], report.tolerance)
    assert bool((quantized(x[:8]).argmax(1) == certificate.predicted).all())
    assert report.path_metric.lower <= report.path_metric.upper


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e-9, 1e-7])
def test_nothing_is_fitted_to_the_rounding_of_what_hardly_varies(size, dtype):
    def perceptron() -> nn.Module:
        layers = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(64, 64)).to(dtype)

    model = drawn(perceptron)
    x = torch.ones(64, 64) + size * inputs((64,))
    others = [pathlift.quantize(model, (64,), 4, data=x, sequential=sequential, moments=0)[0] for sequential in (True, False)]
    others.append(pathlift.prune(model, (64,), 0.3, data=x, update="compensate")[0])
    for name, weight in model.named_parameters():
        for other in others:
            if weight.dim() > 1:
                assert (other.state_dict()[name] - weight).norm() < 0.6 * weight.norm(), name


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sequential", [True, False])
def test_what_is_there_in_one_sample_moves_no_weight(size, bits, sequential):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 16)).requires_grad_(False)
    model[0].weight.copy_(torch.tensor([[1.0, 0.47], [0.0, 1.0]]))
    model[2].weight.copy_(torch.stack([torch.linspace(0.0, 1.0, 16), torch.ones(16)], 1))
    source = torch.Generator().manual_seed(0)
    x = torch.stack([torch.randn(32, generator=source), torch.full((32,), -1.0)], 1)
    x[7] = torch.tensor([1.0, size])
    quantized, _ = pathlift.quantize(model, (2,), bits, data=x, sequential=sequential, moments=0)
    assert (quantized[2].weight - model[2].weight).abs().max() < 0.45  # ranges may be smaller


@pytest.mark.parametrize("size", [0.1, 1e-2, 1e-3])
def test_what_has_all_but_gone_moves_no_weight(size):
    source = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 64, generator=source)
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1)).requires_grad_(False)
    model[0].weight.copy_(torch.tensor([[1.0, -0.72]]))
    model[2].weight.fill_(1.0)
    x = torch.stack([a, a * (1.0 - size * b)], 1)  # 0.28·a becomes size·a·b
    bits = {"0": 2, "2": 8}
    quantized, _ = pathlift.quantize(model, (2,), bits, rounding="nearest", range="minmax", data=x, sequential=True, moments=0)
    assert torch.equal(quantized[0].weight, torch.tensor([[1.0, -1.0]])) and 0.9 < quantized[2].weight.item() < 3.0
    model[0].weight.copy_(torch.tensor([[1.0, 0.5]]))
    pruned, _ = pathlift.prune(model, (2,), 0.34, data=torch.stack([size * a, a], 1), update="compensate")
    assert pruned[0].weight[0, 1] == 0.0 and 0.9 < pruned[2].weight.item() < 5.0


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_what_hardly_moves_makes_up_for_nothing(rounding):
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))

    model = drawn(net)
    model[2].weight.data[0] *= 1e-3
    model[2].bias.data[0] = 0.75
    x, others = (torch.randn(count, 8, generator=torch.Generator().manual_seed(count)) for count in (32, 512))
    off = {}
    for together in (True, False):
        quantized, _ = pathlift.quantize(model, (8,), 4, rounding=rounding, data=x, sequential=together, moments=0)
        off[together] = (quantized(others) - model(others)).square().mean().sqrt()
        assert quantized[4].weight.abs().amax() < 2.0 * model[4].weight.abs().amax()
    assert off[True] < 1.5 * off[False]


@pytest.mark.parametrize("amount", [0.5, 0.6])
def test_what_is_there_in_one_sample_makes_up_for_nothing(amount):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 1)).requires_grad_(False)
    model[0].weight.copy_(torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    model[2].weight.fill_(1.0)
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)).abs()
    x[:, 1] = -1.0
    x[3, 1], x[:8, 2], x[8:, 2] = 1e-5, -1.0, 1.0
    pruned, _ = pathlift.prune(model, (3,), amount, data=x, update="compensate")
    assert (pruned[2].weight.abs() < 4.0).all()
