"""`synthetic_inputs`: inputs for which the batch norms of a model read what they store."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from pathlift.errors import InputError, NumericalError, UnsupportedModelError
from pathlift.statistics.model import moments_of_inputs
from pathlift.statistics.synthetic import TOGETHER, _Search

SHAPE = (3, 12, 12)


class Small(nn.Module):
    """Two batch norms, one of them behind a sum of branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.side, self.other = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, eps=1e-2)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.other(self.second(y) + self.side(y))).mean((2, 3)))


def trained(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose batch norms have seen inputs: blotches, brighter on the left."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small()
        for norm in (model.norm, model.other):
            norm.momentum = None
        x = F.interpolate(torch.randn(256, 3, 3, 3), (12, 12), mode="bilinear") * 2 + torch.linspace(1, -1, 12)
        model(x)
    return model.eval().to(dtype).requires_grad_(False)


def read(model: nn.Module, x: Tensor) -> list[tuple[nn.BatchNorm2d, Tensor]]:
    """What each batch norm of a model reads."""
    seen: list[tuple[nn.BatchNorm2d, Tensor]] = []
    model = copy.deepcopy(model)
    for norm in (model.norm, model.other):
        norm.register_forward_pre_hook(lambda norm, given: seen.append((norm, given[0])))
    model(x)
    return seen


def gap(model: nn.Module, x: Tensor) -> Tensor:
    """How far that is from what is stored, by the definition."""
    total = []
    for norm, z in read(model, x):
        known = norm.running_var + norm.eps
        spread = ((z.var((0, 2, 3), correction=0) + norm.eps) / known).sqrt()
        total.append(((z.mean((0, 2, 3)) - norm.running_mean) ** 2 / known + (spread - 1) ** 2).mean())
    return torch.stack(total).mean()


def test_the_gap_is_what_its_definition_says_and_so_is_its_gradient():
    model, x = trained(torch.float64), torch.randn(5, *SHAPE, dtype=torch.float64, requires_grad=True)
    network = pathlift.capture(model, SHAPE)
    found = _Search(network, moments_of_inputs(network, 0.0, 1.0))._gap([x.unsqueeze(1)])
    wanted = gap(model, x)
    assert torch.allclose(found, wanted, rtol=1e-10)
    assert torch.allclose(*(torch.autograd.grad(value, x)[0] for value in (found, wanted)), rtol=1e-8)


def test_batch_norms_read_what_they_store():
    model = trained()
    noise, made = (synthesised(model, 48, steps=steps) for steps in (0, 60))
    far, near = (max(gap(model, batch) for batch in x.split(TOGETHER)) for x in (noise, made))
    assert near < 0.05 * far
    before, after = (pathlift.activation_statistics(model, SHAPE, x) for x in (noise, made))
    assert after.shift < 0.3 * before.shift and after.spread < 0.3 * before.spread


def synthesised(model: nn.Module, count: int, **options: object) -> Tensor:
    return torch.cat(pathlift.synthetic_inputs(model, SHAPE, count, generator=0, **options))


def test_noise_to_begin_with_is_smooth_in_the_colours_of_photographs_and_as_it_is_told():
    noise = synthesised(trained(), 64, steps=0)
    assert noise.mean().abs() < 0.3 and abs(noise.std() - 1) < 0.05
    flat = noise.transpose(0, 1).flatten(1)
    assert torch.corrcoef(flat)[0, 1] > 0.9 and torch.corrcoef(flat)[0, 2] > 0.8
    next_to = torch.corrcoef(torch.stack([noise[..., :-1].flatten(), noise[..., 1:].flatten()]))[0, 1]
    assert next_to > 0.5
    told = synthesised(trained(), 64, steps=0, input_mean=torch.tensor([5.0, 0.0, 0.0]), input_variance=4.0)
    assert torch.allclose(told, noise * 2 + torch.tensor([5.0, 0.0, 0.0]).reshape(3, 1, 1), atol=1e-5)


def test_the_same_seed_makes_the_same_inputs_and_the_model_is_left_alone():
    model = trained()
    kept, counted = copy.deepcopy(model.state_dict()), []
    batches = [
        pathlift.synthetic_inputs(model, SHAPE, 20, steps=3, generator=seed, progress=lambda *done: counted.append(done))
        for seed in (1, 1, 2)
    ]
    assert counted == [(step, 6) for step in range(1, 7)] * 3
    assert [len(batch) for batch in batches[0]] == [10, 10]
    assert all(torch.equal(a, b) for a, b in zip(*batches[:2], strict=True)) and not torch.equal(batches[0][0], batches[2][0])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not batches[0][0].requires_grad
    pathlift.quantize(model, SHAPE, 3, data=batches[0], sequential=True, moments=0)
    pathlift.prune(model, SHAPE, 0.5, data=batches[0], update="compensate")


class Two(nn.Module):
    """Two inputs by name, a vector and a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 5), nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5)

    def forward(self, vector: Tensor, signal: Tensor) -> Tensor:
        return torch.relu(self.norm(self.a(vector) + self.b(signal).mean(2)))


@pytest.mark.parametrize("named", [False, True])
def test_inputs_come_in_the_containers_that_the_model_takes(named):
    model, shapes = Two().eval(), ((4,), (2, 9))
    network = pathlift.capture(model, dict(zip(("vector", "signal"), shapes, strict=True)) if named else shapes)
    (batch,) = pathlift.synthetic_inputs(network, count=3, steps=2, generator=0)
    tensors = [batch["vector"], batch["signal"]] if named else list(batch)
    assert [tuple(tensor.shape) for tensor in tensors] == [(3, 4), (3, 2, 9)]
    assert pathlift.activation_statistics(network, data=[batch]).source == "data"


def test_half_precision_makes_float32():
    batches = pathlift.synthetic_inputs(trained(torch.bfloat16), SHAPE, 2, steps=1, generator=0)
    assert batches[0].dtype == torch.float32
    assert pathlift.synthetic_inputs(trained(torch.float64), SHAPE, 2, steps=1, generator=0)[0].dtype == torch.float64


def test_what_makes_no_inputs_is_refused():
    with pytest.raises(InputError, match="no batch norm"):
        pathlift.synthetic_inputs(nn.Linear(3, 2), (3,))
    broken = trained()
    broken.second.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"second\.weight"):
        pathlift.synthetic_inputs(broken, SHAPE)
    with pytest.raises(UnsupportedModelError, match="gelu"):
        pathlift.synthetic_inputs(nn.Sequential(nn.Linear(3, 2), nn.GELU()), (3,))
    for name, value in (("count", 0), ("steps", -1), ("generator", "x")):
        with pytest.raises(InputError, match=f"{name} must be"):
            pathlift.synthetic_inputs(trained(), SHAPE, **{name: value})
    wild = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    with torch.no_grad():
        wild[0].weight *= 1e30
    with pytest.raises(NumericalError, match="leaves the range of its type"):
        pathlift.synthetic_inputs(wild, (3,), 2, steps=2, generator=0)


def test_inference_mode_is_no_hindrance():
    wanted = synthesised(trained(), 2, steps=2)
    with torch.inference_mode():
        model = copy.deepcopy(trained())
        assert next(model.parameters()).is_inference()
        assert torch.equal(synthesised(model, 2, steps=2), wanted)
    assert torch.equal(synthesised(model, 2, steps=2), wanted)
