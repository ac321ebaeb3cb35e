"""Zeros that stay zero while the rest is trained: as if the weights that were pruned were not there."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.errors import InputError, MismatchError
from pathlift.pruning import apply_masks, keep_masks

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda given: torch.optim.SGD(given, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda given: torch.optim.Adam(given, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda given: torch.optim.AdamW(given, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda given: torch.optim.RMSprop(given, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda given: torch.optim.Adagrad(given, lr=0.05),
    "rprop": lambda given: torch.optim.Rprop(given, lr=0.01),
    "asgd": lambda given: torch.optim.ASGD(given, lr=0.05),
}


class Masked(nn.Module):
    """A weight times its mask: what is not there has no gradient and is read as 0."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def setting(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    pruned, report = pathlift.prune(model, (5,), 0.5, "magnitude")
    assert isinstance(pruned, nn.Module)
    return pruned, report.masks, torch.randn(6, 16, 5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor, *, closure: bool = False) -> None:
    for x in data:

        def loss(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            value = (model(x) - x[:, :3]).square().mean()
            value.backward()
            return value

        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_a_network_without_these_weights(name: str, closure: bool) -> None:
    model, masks, data = setting()
    reference = copy.deepcopy(model)
    for path, mask in masks.items():
        layer, _, tensor = path.rpartition(".")
        torch.nn.utils.parametrize.register_parametrization(reference.get_submodule(layer), tensor, Masked(mask))
    train(reference, OPTIMIZERS[name](reference.parameters()), data, closure=closure)
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = keep_masks(optimizer, masks, model)
    train(model, optimizer, data, closure=closure)
    for path, tensor in model.named_parameters():
        owner, _, own = path.rpartition(".")
        torch.testing.assert_close(tensor, getattr(reference.get_submodule(owner), own), rtol=1e-5, atol=1e-6)
        if path in masks:
            assert bool((tensor[~masks[path]] == 0).all()) and bool((tensor[masks[path]] != 0).all())
    handle.remove()


def test_without_it_the_zeros_move_and_after_it_too() -> None:
    model, masks, data = setting()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with keep_masks(optimizer, masks, model):
        train(model, optimizer, data)
        assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
        for name, mask in masks.items():  # nothing is left behind that would move them without a gradient
            assert bool((optimizer.state[model.get_parameter(name)]["momentum_buffer"][~mask] == 0).all())
    train(model, optimizer, data[:1])
    assert any(bool((model.get_parameter(name)[~mask] != 0).any()) for name, mask in masks.items())


def test_momentum_from_before_the_pruning_does_not_bring_weights_back() -> None:
    model, masks, data = setting()
    whole = copy.deepcopy(model)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer, data)
    model.load_state_dict(apply_masks(whole, masks).state_dict())
    keep_masks(optimizer, masks, model)
    train(model, optimizer, data)
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())


def test_an_optimiser_of_named_parameters_needs_no_model_and_groups_may_come_later() -> None:
    model, masks, data = setting()
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD([("0.weight", named["0.weight"]), ("0.bias", named["0.bias"])], lr=0.05, momentum=0.9)
    with pytest.raises(MismatchError, match=r"2\.weight"):
        keep_masks(optimizer, masks)
    keep_masks(optimizer, masks, model)
    optimizer.add_param_group({"params": [("2.weight", named["2.weight"])], "lr": 0.1})
    train(model, optimizer, data)
    assert all(bool((named[name][~mask] == 0).all()) for name, mask in masks.items())
    both = torch.optim.Adam(model.named_parameters(), lr=0.01)
    with keep_masks(both, masks):
        train(model, both, data)
    assert all(bool((named[name][~mask] == 0).all()) for name, mask in masks.items())


def test_a_scaler_may_skip_steps_and_gradients_may_be_infinite_where_nothing_is() -> None:
    model, masks, data = setting()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    keep_masks(optimizer, masks, model)
    for step, x in enumerate(data):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        before = copy.deepcopy(model.state_dict())
        if step == 2:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    gone = ~masks["0.weight"]
    model[0].weight.grad[gone] = torch.nan
    optimizer.step()
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    assert bool(optimizer.state[model[0].weight]["momentum_buffer"].isfinite().all())


def test_two_names_of_one_tensor_and_parameters_of_another_optimiser() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    pruned, report = pathlift.prune(model, (4,), 0.5, "magnitude")
    masks, weight = report.masks, pruned[2].weight
    assert pruned[0].weight is weight
    first = torch.optim.SGD([weight], lr=0.1)
    keep_masks(first, masks, pruned)
    with pytest.raises(InputError, match="trains none"):
        keep_masks(torch.optim.SGD([pruned[0].bias], lr=0.1), masks, pruned)
    pruned(torch.randn(5, 4)).square().mean().backward()
    first.step()
    assert bool((weight[~masks["0.weight"]] == 0).all())


def test_masks_that_do_not_fit_are_refused_and_nothing_is_touched() -> None:
    model, masks, _ = setting()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(InputError, match="named_parameters"):
        keep_masks(optimizer, masks)
    with pytest.raises(MismatchError, match="other"):
        keep_masks(optimizer, {"other": masks["0.weight"]}, model)
    with pytest.raises(MismatchError, match="shape"):
        keep_masks(optimizer, {"0.weight": masks["2.weight"]}, model)
    turned = {"0.weight": ~masks["0.weight"]}
    with pytest.raises(InputError, match="apply_masks"):
        keep_masks(optimizer, turned, model)
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks


def test_the_lightning_callback_keeps_masks_and_lets_go_at_the_end() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from pathlift.lightning import MaskCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.masks, self.data = setting()
            self.steps = 0

        def training_step(self, batch: list[Tensor]) -> Tensor:
            self.steps += 1
            return (self.net(batch[0]) - 1).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(module.data.reshape(-1, 5)), batch_size=16)
    masks = {f"net.{name}": mask for name, mask in module.masks.items()}
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[MaskCallback(masks)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    start = copy.deepcopy(module.net.state_dict())
    trainer.fit(module, data)
    assert module.steps == 12
    for name, mask in masks.items():
        weight = module.get_parameter(name)
        assert bool((weight[~mask] == 0).all())
        assert not torch.equal(weight, start[name.removeprefix("net.")])
    assert not any(own._optimizer_step_post_hooks or own._optimizer_step_pre_hooks for own in trainer.optimizers)
    with pytest.raises(MismatchError):
        lightning.Trainer(
            max_epochs=1, callbacks=[MaskCallback(module.masks)], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        ).fit(module, data)  # fmt: skip
