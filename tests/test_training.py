"""Gauges during training: the function stays, the optimiser's memory follows, Path-SGD does not see a rescaling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pathlift
from agreement import randomised
from cases import Residual, perceptron
from pathlift.rescaling import Symmetries
from pathlift.rescaling.training import path_sgd, rescale_after_steps, rescale_in_place

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss(model: nn.Module) -> torch.Tensor:
    return model(X).square().mean()


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True, eps=1e-30),
    lambda p: torch.optim.Adagrad(p, lr=0.01),
], ids=["sgd", "adam", "rmsprop", "adagrad"])  # fmt: skip
def test_memory_is_that_of_the_rescaled_gradients(make: object) -> None:
    """One step, then a rescaling: the memory is what the same step leaves behind in the rescaled network."""
    model = randomised(perceptron(3, 5, 4, 2))
    groups = pathlift.symmetries(model, (3,))
    state = groups.randomize(generator=torch.Generator().manual_seed(0))
    twin = pathlift.rescaling.with_state(model, state)
    first, second = make(model.parameters()), make(twin.parameters())
    for one, optimizer in ((model, first), (twin, second)):
        loss(one).backward()
        before = {name: parameter.detach().clone() for name, parameter in one.named_parameters()}
        optimizer.step()
        with torch.no_grad():  # memory only
            for name, parameter in one.named_parameters():
                parameter.copy_(before[name])
    rescale_in_place(groups, state, first)
    for (name, weight), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(weight, theirs)
        for key, value in first.state[weight].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, second.state[theirs][key], msg=f"{name} {key}")


def test_balancing_after_steps_changes_no_output_and_ends_when_removed() -> None:
    model = randomised(perceptron(3, 5, 4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    groups = pathlift.symmetries(model, (3,))
    handle = rescale_after_steps(optimizer, groups, Symmetries.balance, every=2)
    for step in range(1, 5):
        optimizer.zero_grad()
        loss(model).backward()
        plain = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, weight in zip(plain.parameters(), model.parameters(), strict=True):
                memory = optimizer.state[weight].get("momentum_buffer")
                parameter.sub_(1e-3 * (weight.grad if memory is None else 0.9 * memory + weight.grad))
        optimizer.step()
        torch.testing.assert_close(model(X), plain(X))
        out = model[2].weight.square().sum(1) + model[2].bias.square() - model[4].weight.square().sum(0)
        assert (float(out.abs().max()) < 1e-9) is (step % 2 == 0)
    handle.remove()
    optimizer.step()
    assert (
        float((model[2].weight.square().sum(1) + model[2].bias.square() - model[4].weight.square().sum(0)).abs().max()) > 1e-9
    )


def test_path_sgd_makes_the_same_step_in_every_gauge() -> None:
    model = randomised(perceptron(3, 5, 4, 2))
    twin = pathlift.rescaling.with_state(model, pathlift.symmetries(model, (3,)).randomize((1, 64, 2048)))
    results = []
    for one in (model, twin):
        optimizer = torch.optim.SGD(one.parameters(), lr=1e-3, momentum=0.9)
        path_sgd(optimizer, pathlift.capture(one, (3,)))
        for _ in range(5):
            optimizer.zero_grad()
            loss(one).backward()
            optimizer.step()
        results.append(one(X))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_bad_use_is_told() -> None:
    model = perceptron(3, 4, 2)
    groups = pathlift.symmetries(model, (3,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(pathlift.InputError, match="every must be"):
        rescale_after_steps(optimizer, groups, Symmetries.balance, every=0)
    stranger = torch.optim.SGD(perceptron(3, 4, 2).parameters(), lr=0.1)
    with pytest.raises(pathlift.InputError, match="trains none"):
        rescale_in_place(groups, groups.balance(), stranger)
    adadelta = torch.optim.Adadelta(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    adadelta.step()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(pathlift.InputError, match="not known to scale"):
        rescale_in_place(groups, groups.balance(), adadelta)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_the_lightning_callback_keeps_the_gauge() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from pathlift.lightning import RescaleCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Residual()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return self(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    torch.manual_seed(0)
    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 1, 3, 3)), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[RescaleCallback((1, 3, 3), every=1)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, data)
    state = pathlift.symmetries(module, (1, 3, 3)).balance()
    torch.testing.assert_close(state.factors, torch.ones_like(state.factors), rtol=1e-4, atol=0)
