"""A Lightning callback that keeps a model in a gauge while it is trained (extra ``lightning``)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Optimizer

from pathlift.arguments import public
from pathlift.reading import Inputs
from pathlift.rescaling import RescaledState, Symmetries, symmetries
from pathlift.rescaling.training import rescale_after_steps, rescale_in_place
from pathlift.storage.packages import MissingPackageError

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingPackageError("lightning", "lightning", error) from error


class RescaleCallback(Callback):
    """Rescale the weights before training and after every few optimiser steps; the function is never changed."""

    @public
    def __init__(
        self,
        inputs: Inputs,
        gauge: Callable[[Symmetries], RescaledState] = Symmetries.balance,
        *,
        every: int | None = None,
    ) -> None:
        """Choose a gauge.

        Args:
            inputs: Input shape without the batch dimension, as for `pathlift.capture`.
            gauge: ``Symmetries.balance``, ``Symmetries.condition``, ``Symmetries.normalize`` or another function of them.
            every: Steps between two rescalings; None to rescale once, before training.
        """
        self.inputs = inputs
        self.gauge = gauge
        self.every = every

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the groups, rescale, and register with every optimiser."""
        groups = symmetries(pl_module, self.inputs)
        rescale_in_place(groups, self.gauge(groups))
        if self.every is not None:
            for optimizer in trainer.optimizers:
                assert isinstance(optimizer, Optimizer)
                rescale_after_steps(optimizer, groups, self.gauge, every=self.every)
