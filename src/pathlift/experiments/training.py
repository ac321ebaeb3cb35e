"""Training loops on Lightning Fabric: one CPU, one GPU or several with DDP, with a checkpoint after every epoch.

Everything random is a function of (seed, epoch), so a run that was killed goes on from its last epoch to the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathlift.experiments import store
from pathlift.experiments.datasets import Data
from pathlift.experiments.settings import Lottery
from pathlift.models import package

fabric = package("lightning.fabric", "experiments")
metrics = package("torchmetrics.classification", "experiments")


def rate(settings: Lottery, progress: float) -> float:
    """Return the learning rate at a time of training.

    Args:
        settings: The schedule.
        progress: Epochs since the beginning.

    Returns:
        The rate.
    """
    if progress < settings.warmup * settings.epochs:
        return settings.rate * progress / (settings.warmup * settings.epochs)
    if settings.milestones:
        return float(settings.rate * 0.1 ** sum(progress >= milestone for milestone in settings.milestones))
    start = settings.warmup * settings.epochs
    return float(settings.rate * 0.5 * (1 + math.cos(math.pi * (progress - start) / (settings.epochs - start))))


class Run:
    """One training of one network, from some epoch to the last."""

    def __init__(
        self, settings: Lottery, data: Data, seed: int, folder: Path, masks: Mapping[str, Tensor] | None = None
    ) -> None:
        """Describe it.

        Args:
            settings: The experiment.
            data: Its data.
            seed: Of the order of samples.
            folder: Where ``last.pt`` and ``rewind.pt`` are kept.
            masks: Parameter name to mask; these weights stay 0.
        """
        self.settings, self.data, self.seed, self.folder = settings, data, seed, folder
        self.masks = dict(masks or {})

    def launch(self, model: nn.Module, begin: int = 0) -> list[float]:
        """Train, or go on training, on the devices of the settings.

        Args:
            model: The network with the weights of epoch ``begin``; on one device it holds the trained weights afterwards.
            begin: Epoch.

        Returns:
            Test accuracy after each epoch from ``begin`` + 1 on.
        """
        settings = self.settings
        strategy = "auto" if settings.devices == 1 else "ddp" if torch.distributed.is_torchelastic_launched() else "ddp_spawn"
        own = fabric.Fabric(
            accelerator=settings.accelerator, devices=settings.devices, strategy=strategy, precision=settings.precision
        )
        history: list[float] = own.launch(_trained, self, model, begin)
        return history


def _trained(own: Any, run: Run, model: nn.Module, begin: int) -> list[float]:
    """Train on one rank; called by every process."""
    settings = run.settings
    torch.set_num_threads(settings.threads)
    own.barrier()  # what the first rank has written before is there now
    last = run.folder / "last.pt"
    history: list[float] = []
    epoch = begin
    memory = None
    if last.is_file():
        found = store.read_checkpoint(last)
        model.load_state_dict(found["model"])
        history, epoch, memory = found["history"], found["epoch"], found["optimizer"]
    if len(run.data.shape) == 3:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), settings.rate, momentum=settings.momentum, weight_decay=settings.decay)
    if memory is not None:
        optimizer.load_state_dict(memory)
    wrapped, optimizer = own.setup(model, optimizer)
    parameters = dict(model.named_parameters())
    masks = {name: mask.to(parameters[name].device) for name, mask in run.masks.items()}
    _mask(parameters, masks)
    while epoch < settings.epochs:
        if own.is_global_zero and not masks and epoch == settings.rewind:
            store.write_checkpoint(run.folder / "rewind.pt", {"model": _on_cpu(model)})
        _one_epoch(own, run, wrapped, optimizer, parameters, masks, epoch)
        epoch += 1
        history.append(accuracy(own, wrapped, run.data))
        if own.is_global_zero:
            memory = optimizer.state_dict()
            store.write_checkpoint(last, {"model": _on_cpu(model), "history": history, "epoch": epoch, "optimizer": memory})
        own.barrier()
    return history


def _one_epoch(
    own: Any,
    run: Run,
    wrapped: Any,
    optimizer: Any,
    parameters: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    epoch: int,
) -> None:
    settings = run.settings
    wrapped.train()
    steps = max(1, len(run.data.train) // settings.batch)  # type: ignore[arg-type]
    batches = run.data.epoch(run.seed, epoch, settings.batch, own.global_rank, own.world_size)
    for step, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(settings, epoch + step / steps)
        optimizer.zero_grad()
        own.backward(F.cross_entropy(wrapped(x.to(own.device)), y.to(own.device)))
        optimizer.step()
        _mask(parameters, masks)


@torch.no_grad()
def _mask(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        parameters[name].mul_(mask)


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def accuracy(own: Any, model: Any, data: Data) -> float:
    """Test a network, over all devices together.

    Args:
        own: The Fabric.
        model: The network, as Fabric set it up.
        data: Its test data are used.

    Returns:
        The share of test samples that it classifies right.
    """
    metric = metrics.MulticlassAccuracy(num_classes=data.classes, average="micro").to(own.device)
    model.eval()
    for x, y in data.tested(rank=own.global_rank, world=own.world_size):
        metric.update(model(x.to(own.device))[:, : data.classes], y.to(own.device))
    return float(metric.compute())


def tested(settings: Lottery, model: nn.Module, data: Data) -> float:
    """Test a network on one device.

    Args:
        settings: Name the device.
        model: The network.
        data: Its test data are used.

    Returns:
        Accuracy.
    """
    own = fabric.Fabric(accelerator=settings.accelerator, devices=1, precision=settings.precision)
    if len(data.shape) == 3:
        model = model.to(memory_format=torch.channels_last)
    return accuracy(own, own.setup(model), data)
