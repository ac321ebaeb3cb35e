"""Training loops on Lightning Fabric: one CPU, one GPU or several with DDP, with a checkpoint after every epoch.

Everything random is a function of (seed, epoch), so a run that was killed goes on from its last epoch to the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathlift.experiments import store
from pathlift.experiments.datasets import Data
from pathlift.experiments.settings import Lottery
from pathlift.storage.packages import package

lightning_fabric = package("lightning.fabric", "experiments")
strategies = package("lightning.fabric.strategies", "experiments")
metrics = package("torchmetrics.classification", "experiments")

PATIENCE = timedelta(days=7)
"""How long devices wait for the first one, which tests all masks alone."""


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


def memory_format(settings: Lottery) -> torch.memory_format:
    """Return the layout of images: channels last, which is faster, where PyTorch can be trusted with it.

    On CPUs its backward pass crashes on strided 1×1 convolutions of fewer than 12 channels in that layout (seen in 2.14).

    Args:
        settings: The experiment.

    Returns:
        The layout.
    """
    wide = settings.model == "resnet" and settings.width >= 16
    return torch.channels_last if wide or _device(settings).type == "cuda" else torch.contiguous_format


def _device(settings: Lottery) -> torch.device:
    return torch.device("cuda" if settings.accelerator != "cpu" and torch.cuda.is_available() else "cpu")


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
        started = torch.distributed.is_torchelastic_launched()
        strategy = (
            "auto"
            if settings.devices == 1
            else strategies.DDPStrategy(start_method="popen" if started else "spawn", timeout=PATIENCE)
        )
        fabric = lightning_fabric.Fabric(
            accelerator=settings.accelerator, devices=settings.devices, strategy=strategy, precision=settings.precision
        )
        history: list[float] = fabric.launch(_trained, self, model, begin)
        return history


def _trained(fabric: Any, run: Run, model: nn.Module, begin: int) -> list[float]:
    """Train on one rank; called by every process."""
    settings = run.settings
    torch.set_num_threads(settings.threads)
    fabric.barrier()  # what the first rank has written before is there now
    last = run.folder / "last.pt"
    history: list[float] = []
    epoch = begin
    memory = None
    if last.is_file():
        checkpoint = store.read_checkpoint(last)
        model.load_state_dict(checkpoint["model"])
        history, epoch, memory = checkpoint["history"], checkpoint["epoch"], checkpoint["optimizer"]
    model.to(memory_format=memory_format(settings))
    optimizer = torch.optim.SGD(model.parameters(), settings.rate, momentum=settings.momentum, weight_decay=settings.decay)
    if memory is not None:
        optimizer.load_state_dict(memory)
    wrapped, optimizer = fabric.setup(model, optimizer)
    parameters = dict(model.named_parameters())
    masks = {name: mask.to(parameters[name].device) for name, mask in run.masks.items()}
    _mask(parameters, masks)
    while epoch < settings.epochs:
        if fabric.is_global_zero and not masks and epoch == settings.rewind:
            store.write_checkpoint(run.folder / "rewind.pt", {"model": _on_cpu(model)})
        _one_epoch(fabric, run, wrapped, optimizer, parameters, masks, epoch)
        epoch += 1
        history.append(accuracy(wrapped, run.data, fabric.device, fabric.global_rank, fabric.world_size))
        if fabric.is_global_zero:
            memory = optimizer.state_dict()
            store.write_checkpoint(last, {"model": _on_cpu(model), "history": history, "epoch": epoch, "optimizer": memory})
        fabric.barrier()
    return history


def _one_epoch(
    fabric: Any,
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
    batches = run.data.epoch(run.seed, epoch, settings.batch, fabric.global_rank, fabric.world_size)
    for step, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(settings, epoch + step / steps)
        optimizer.zero_grad()
        fabric.backward(F.cross_entropy(wrapped(x.to(fabric.device)), y.to(fabric.device)))
        optimizer.step()
        _mask(parameters, masks)


@torch.no_grad()
def _mask(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        parameters[name].mul_(mask)


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, device: torch.device, rank: int = 0, world: int = 1) -> float:
    """Test a network; with several devices each tests its share, and all get the answer.

    Args:
        model: The network, on its device.
        data: Its test data are used.
        device: Where.
        rank: Which device.
        world: How many there are.

    Returns:
        The share of test samples that it classifies right.
    """
    metric = metrics.MulticlassAccuracy(num_classes=data.classes, average="micro", sync_on_compute=world > 1).to(device)
    model.eval()
    for x, y in data.tested(rank=rank, world=world):
        metric.update(model(x.to(device))[:, : data.classes], y.to(device))
    return float(metric.compute())


def tested(settings: Lottery, model: nn.Module, data: Data) -> float:
    """Test a network on one device, on this rank alone.

    Args:
        settings: Name the device.
        model: The network.
        data: Its test data are used.

    Returns:
        Accuracy.
    """
    device = _device(settings)
    model = model.to(device).to(memory_format=memory_format(settings))
    return accuracy(model, data, device)
