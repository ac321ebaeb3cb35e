"""A captured network tells what its model is now, results tell what it was, and both are values: they pickle and copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import pathlift
from pathlift import Network
from pathlift.training import path_sgd, rescale_after_steps


class Model(nn.Module):
    """A convolution, a batch norm, weights tied and not, a plain tensor attribute, a mask in a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.body = nn.Linear(12, 4)
        self.again = nn.Linear(4, 4, bias=False)
        self.twin = nn.Linear(4, 4, bias=False)
        self.twin.weight = self.again.weight
        self.head = nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 0.5]))
        self.scale = torch.tensor([0.5, 1.0, 2.0, 1.5])
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2.0)
            self.norm.running_mean.normal_()
            self.norm.weight.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).flatten(1)
        y = torch.relu(self.body(y)) * self.mask * self.scale
        return self.head(torch.relu(self.twin(torch.relu(self.again(y)))))


SHAPE = (2, 3, 3)


def batch() -> Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))


# ---- what may happen to a model


def step(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(batch()).square().sum().backward()
        optimizer.step()
    model.eval()


def written(model: Model) -> None:
    model.head.weight.data[0] = 0.0
    model.conv.weight.data.mul_(-3.0)


def assigned(model: Model) -> None:
    model.body.weight.data = model.body.weight.data * 2.0
    model.norm.running_var.data = model.norm.running_var.data * 3.0


def cast_there_and_back(model: Model) -> None:
    model.double().float()
    with torch.no_grad():
        model.head.bias.add_(1.0)


def cast(model: Model) -> None:
    model.double()
    with torch.no_grad():
        model.head.weight.mul_(1.5)


def halved(model: Model) -> None:
    model.half()
    model.scale.data = model.scale.data.half()


def loaded_by_assignment(model: Model) -> None:
    model.load_state_dict(Model(5).state_dict(), assign=True)


def child_replaced(model: Model) -> None:
    model.head = nn.Linear(4, 3)


def child_of_another_kind(model: Model) -> None:
    model.norm = nn.Identity()


def parameter_replaced(model: Model) -> None:
    model.head.weight = nn.Parameter(torch.randn(3, 4))


def buffer_replaced(model: Model) -> None:
    model.mask = torch.tensor([0.0, 1.0, 1.0, 1.0])


def buffer_written(model: Model) -> None:
    model.mask.copy_(torch.tensor([0.0, 1.0, 1.0, 1.0]))


def untied(model: Model) -> None:
    model.twin.weight = nn.Parameter(torch.randn(4, 4))


def untied_to_the_same_values(model: Model) -> None:
    model.twin.weight = nn.Parameter(model.twin.weight.detach().clone())
    with torch.no_grad():
        model.again.weight.mul_(2.0)


def tied(model: Model) -> None:
    model.again.weight.data = model.body.weight.data[:, :4]


def parametrised(model: Model) -> None:
    parametrizations.weight_norm(model.head)
    with torch.no_grad():
        model.head.parametrizations.weight.original0.mul_(2.0)


def masked(model: Model) -> None:
    prune.l1_unstructured(model.head, "weight", 0.5)


def attribute_written(model: Model) -> None:
    model.scale.mul_(2.0)


def attribute_replaced(model: Model) -> None:
    model.scale = torch.tensor([1.0, 0.0, 1.0, 1.0])


def averaged(model: Model) -> None:
    """An average of weights is swapped in, as its users do before they validate."""
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(Model(3))
    average.update_parameters(Model(4))
    for own, other in zip(model.parameters(), average.module.parameters(), strict=True):
        own.data, other.data = other.data, own.data


def zeroed(model: Model) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()


def shape_changed(model: Model) -> None:
    model.head.weight.data = torch.randn(5, 4)
    model.head.bias.data = torch.randn(5)


CHANGES: tuple[Callable[[Model], None], ...] = (
    step, written, assigned, cast_there_and_back, cast, halved, loaded_by_assignment, child_replaced, child_of_another_kind,
    parameter_replaced, buffer_replaced, buffer_written, untied, untied_to_the_same_values, tied, parametrised, masked,
    attribute_written, attribute_replaced, averaged, zeroed, shape_changed,
)  # fmt: skip


# ---- what is asked


def _flat(state: Mapping[str, Tensor]) -> list[Tensor]:
    return [state[name].double() for name in sorted(state)]


def other() -> Model:
    return Model(7).eval()


def prune_masks(network: Network) -> list[Tensor]:
    _, report = pathlift.prune(network, amount=0.3)
    return _flat(report.masks)


QUESTIONS: dict[str, Callable[[Network], list[Tensor | float | None]]] = {
    "path_norm": lambda n: [pathlift.path_norm(n).log10, pathlift.path_norm(n).per_output, pathlift.path_norm(n, q=2).log10],
    "log_path_norm": lambda n: [pathlift.log_path_norm(n).double()],
    "path_magnitude": lambda n: _flat(pathlift.path_magnitude(n)),
    "unit_path_magnitude": lambda n: _flat(pathlift.unit_path_magnitude(n)),
    "path_kernel": lambda n: [pathlift.path_kernel([n, n]).log10_gram],
    "path_norms": lambda n: [found.log10 for found in pathlift.path_norms(n, [n])],
    "lipschitz_bound": lambda n: [pathlift.lipschitz_bound(n, pathlift.Relative(0.1), batch()).as_subclass(Tensor)],
    "certify": lambda n: [pathlift.certify(n, batch(), pathlift.Relative(0.01)).margin],
    "attack": lambda n: [pathlift.attack(n, batch(), pathlift.Relative(0.01), steps=2).margin],
    "symmetries": lambda n: [float(len(pathlift.symmetries(n))), *_flat(pathlift.symmetries(n).normalize())],
    "balance": lambda n: _flat(pathlift.symmetries(n).balance()),
    "condition": lambda n: _flat(pathlift.symmetries(n).condition()),
    "sharpness": lambda n: [pathlift.sharpness(n, batch(), torch.tensor([0, 1, 2]), 0.1, steps=2).lemma],
    "generalisation": lambda n: [pathlift.generalisation_bound(n, 100).log10_theorem],
    "gradient_norms": lambda n: [pathlift.gradient_norms(n, batch())],
    "prune": prune_masks,
}


def answer(question: Callable[[Network], Any], network: Network) -> list[Any] | type[pathlift.PathliftError]:
    try:
        return question(network)
    except pathlift.PathliftError as error:
        return type(error)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_network_gives_the_numbers_of_its_model_or_says_that_it_cannot(change: Callable[[Model], None]) -> None:
    model = Model().eval()
    network = pathlift.capture(model, SHAPE)
    for question in QUESTIONS.values():
        question(network)  # whatever is remembered is remembered now
    change(model)
    anew = pathlift.capture(model, torch.zeros(1, *SHAPE, dtype=next(model.parameters()).dtype))
    for name, question in QUESTIONS.items():
        now, right = answer(question, network), answer(question, anew)
        if isinstance(now, list):
            assert isinstance(right, list), (name, now, right)
            assert len(now) == len(right), name
            for one, two in zip(now, right, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda text, at=name: f"{at}: {text}")
