"""Gauges during training: the function stays, the optimiser's memory follows, Path-SGD does not see a rescaling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

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
    assert not any(own._optimizer_step_post_hooks for own in trainer.optimizers)


def trainer_of(lightning: Any, epochs: int, *callbacks: Any) -> Any:
    return lightning.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", log_every_n_steps=1,
    )  # fmt: skip


def wrapped(lightning: Any) -> tuple[Any, Any]:
    """A LightningModule that holds a network, and something that lies outside the theory beside it; and its data."""

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.beside = Residual(), torch.nn.GELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.beside(self.net(x))

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return (self(batch[0]) - 1).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(8, 1, 3, 3))
    return Module(), torch.utils.data.DataLoader(data, batch_size=4)


def test_a_callback_rescales_the_network_within_a_module() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from pathlift.lightning import RescaleCallback

    module, data = wrapped(lightning)
    trainer_of(lightning, 1, RescaleCallback((1, 3, 3), every=1, module="net")).fit(module, data)
    factors = pathlift.symmetries(module.net, (1, 3, 3)).balance().factors
    torch.testing.assert_close(factors, torch.ones_like(factors), rtol=1e-4, atol=0)
    with pytest.raises(pathlift.InputError, match="no module 'not'"):
        trainer_of(lightning, 1, RescaleCallback((1, 3, 3), module="not")).fit(module, data)


def test_a_callback_logs_the_path_norm_of_the_weights_as_they_are() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from pathlift.lightning import PathNormLogger

    module, data = wrapped(lightning)
    trainer = trainer_of(lightning, 1, PathNormLogger((1, 3, 3), every=1, module="net", prefix="norm/"))
    trainer.fit(module, data)
    norm = pathlift.path_norm(module.net, (1, 3, 3))
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert logged == pytest.approx({
        "norm/log10": norm.log10, "norm/log10_input_part": norm.log10_input_part, "norm/log10_bias_part": norm.log10_bias_part,
    }, rel=1e-5)  # fmt: skip


def test_a_callback_prunes_on_a_schedule_and_keeps_what_is_gone_at_0() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from pathlift.lightning import PruneCallback

    sparsities = []

    class Watch(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            gone = sum(int((pl_module.get_parameter(name) == 0).sum()) for name in pruning.masks)
            sparsities.append(gone / max(sum(mask.numel() for mask in pruning.masks.values()), 1))

    module, data = wrapped(lightning)
    pruning = PruneCallback((1, 3, 3), (0.3, 0.6), first=1, every=2, module="net", criterion="path_magnitude")
    trainer = trainer_of(lightning, 5, pruning, Watch())
    trainer.fit(module, data)
    assert set(pruning.masks) <= set(dict(module.named_parameters())) and all(name.startswith("net.") for name in pruning.masks)
    assert sparsities == pytest.approx([0.0, 0.3, 0.3, 0.6, 0.6], abs=0.02)
    assert all(bool((module.get_parameter(name)[~mask] == 0).all()) for name, mask in pruning.masks.items())
    assert not any(own._optimizer_step_post_hooks or own._optimizer_step_pre_hooks for own in trainer.optimizers)
    with pytest.raises(pathlift.InputError, match="must rise"):
        PruneCallback((1, 3, 3), (0.5, 0.3))
    with pytest.raises(pathlift.InputError, match="needs no data, found 'wanda'"):
        PruneCallback((1, 3, 3), (0.5,), criterion="wanda")


class Lossy(torch.nn.Module):
    """A network, and the loss that the Trainer of Hugging Face asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Residual()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.net(x)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


def test_the_callbacks_of_hugging_face_log_rescale_and_keep_masks(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pathlift.hugging_face import MaskCallback, PathNormCallback, RescaleCallback

    def trained(model: Lossy, *callbacks: Any) -> Any:
        rows = [{"x": torch.randn(1, 3, 3), "labels": torch.ones(1)} for _ in range(8)]
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=4, logging_steps=2, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows, callbacks=list(callbacks))
        trainer.train()
        return trainer

    torch.manual_seed(0)
    model = Lossy()
    trainer = trained(model, RescaleCallback((1, 3, 3), every=1, module="net"), PathNormCallback((1, 3, 3), module="net"))
    factors = pathlift.symmetries(model.net, (1, 3, 3)).balance().factors
    torch.testing.assert_close(factors, torch.ones_like(factors), rtol=1e-4, atol=0)
    logged = [entry for entry in trainer.state.log_history if "path_norm/log10" in entry]
    assert len(logged) >= 2 and logged[-1]["path_norm/log10"] == pytest.approx(pathlift.path_norm(model.net, (1, 3, 3)).log10)
    pruned, report = pathlift.prune(model.net, (1, 3, 3), 0.5, "magnitude")
    model.net.load_state_dict(pruned.state_dict())
    masks = {f"net.{name}": mask for name, mask in report.masks.items()}
    trainer = trained(model, MaskCallback(masks))
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_post_hooks and not inner._optimizer_step_pre_hooks
    with pytest.raises(pathlift.InputError, match="no module 'not'"):
        trained(Lossy(), RescaleCallback((1, 3, 3), module="not"))
