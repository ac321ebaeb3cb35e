"""What a model does with its own numbers before and behind its layers: a certificate for it holds for the model itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from hunting import beside


class Model(nn.Module):
    """A function of parameters and inputs."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def assert_honest(model: nn.Module, x: Tensor, tolerance: object = None, other: nn.Module | None = None) -> None:
    certificate = pathlift.certify(model, x, tolerance)  # type: ignore[arg-type]
    with torch.no_grad():
        own = (model if other is None else other)(x).argmax(1)
    assert not bool((certificate.certified & (own != certificate.predicted)).any()), (certificate.margin, certificate.bound)


SATURATED = {
    "sigmoid": (nn.Sigmoid(), [20.0, 22.0]),
    "tanh": (nn.Tanh(), [20.0, 22.0]),
    "softmax": (nn.Softmax(1), [1e-9, 2e-9]),
    "log-softmax": (nn.LogSoftmax(1), [1e-9, 2e-9]),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", SATURATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_saturate_are_not_told_apart(name: str, dtype: torch.dtype) -> None:
    last, values = SATURATED[name]
    model = nn.Sequential(nn.Linear(2, 2), last).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)), model[0].bias.zero_()
    x = torch.tensor([values], dtype=dtype) * (1 if dtype == torch.float32 else torch.tensor([[2.0, 2.0]]))
    assert_honest(model, x)
    assert not bool(pathlift.certify(model, torch.tensor([values], dtype=dtype)).certified) or dtype == torch.float64
    assert bool(pathlift.certify(model, torch.tensor([[1.0, 2.0]], dtype=dtype)).certified)


def test_a_last_activation_in_another_type_is_rounded_to_it() -> None:
    model = Model(lambda own, x: F.softmax(F.linear(x, own.w), 1, dtype=torch.float16), w=torch.eye(2))
    assert_honest(model, torch.tensor([[1.0, 1.0002], [1.0, 1.001]]))
    assert bool(pathlift.certify(model, torch.tensor([[1.0, 2.0]])).certified)


MASKS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "greater": lambda w, c: w * (w > c),
    "at least": lambda w, c: w * (w >= c),
    "equal": lambda w, c: w * (w == c),
    "where": lambda w, c: torch.where(w > c, w, 0 * w),
    "filled": lambda w, c: w.masked_fill(w <= c, 0.0),
    "rounded": lambda w, c: torch.round(w + c, decimals=2),
}


@pytest.mark.one_in(18)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [0.1, 0.3, 0.7])
def test_numbers_are_rounded_to_the_type_that_they_meet(name: str, dtype: torch.dtype, number: float) -> None:
    def made(value: Tensor) -> nn.Module:
        weight = torch.stack([value, torch.zeros_like(value)])[:, None]
        bias = torch.tensor([0.0, number / 3]).to(dtype)
        return Model(lambda own, x: F.linear(x, MASKS[name](own.w, number), own.b), w=weight, b=bias)

    x, at = torch.ones(1, 1).to(dtype), torch.tensor(number).to(dtype)
    for steps in (0, 1):
        other = made(beside(at, steps))
        for own, tolerance in ((other, None), (made(torch.ones_like(at)), other)):
            try:
                assert_honest(own, x, tolerance, other)
            except pathlift.UnsupportedModelError as error:
                assert name == "rounded" or "not the model" in str(error)  # noqa: PT017


class Elsewhere(pathlift.certification.Tolerance):
    """A set that does not lie around the model."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def intervals(self, network: pathlift.Network) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: (self.low * network.state[name].double(), self.high * network.state[name].double())
            for name in network.parameters
        }


def test_a_set_of_ones_own_is_taken_as_it_is() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    x = torch.tensor([[3.0, 1.0]])
    assert not bool(pathlift.certify(model, x, Elsewhere(-1.0, -1.0)).certified)
    assert bool(pathlift.attack(model, x, Elsewhere(-1.0, -1.0)).changed)
    assert bool(pathlift.certify(model, x, Elsewhere(1.0, 1.5)).certified)
    with pytest.raises(pathlift.InputError, match="above the largest"):
        pathlift.certify(model, x, Elsewhere(1.5, 1.0))


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.Sigmoid(), nn.LogSoftmax(1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_an_activation_at_the_end_is_read(last: nn.Module, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), last).to(dtype)
    assert_honest(model, torch.tensor([[1.0, 2.0], [3.0, -1.0]]).to(dtype))


def test_a_tie_is_no_other_class() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    assert not bool(pathlift.attack(model, torch.ones(1, 2)).changed)
