"""Lightning callbacks that keep a model in a gauge, or pruned, while it is trained (extra ``lightning``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from pathlift.arguments import public
from pathlift.pruning import MaskHandle, keep_masks
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


class MaskCallback(Callback):
    """Keep pruned weights at 0 while the others are trained: `pathlift.pruning.keep_masks` for every optimiser."""

    @public
    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        """Take the masks.

        Args:
            masks: Parameter name in the LightningModule (``net.0.weight``) to mask, true where the weight stays.
        """
        self.masks = masks
        self._handles: list[MaskHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register with every optimiser that trains one of the parameters.

        Raises:
            MismatchError: The masks are those of another model.
            InputError: A weight that is gone is not 0, or no optimiser trains any of these parameters.
        """
        self._end()
        named = dict(pl_module.named_parameters(remove_duplicate=False))
        masked = {id(named[name]) for name in self.masks if name in named}
        trained = [
            optimizer
            for optimizer in trainer.optimizers
            if isinstance(optimizer, Optimizer)
            and any(id(parameter) in masked for group in optimizer.param_groups for parameter in group["params"])
        ]
        for optimizer in trained or trainer.optimizers[:1]:
            self._handles.append(keep_masks(optimizer, self.masks, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - as Lightning calls it
        """Let the optimisers go."""
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Let the optimisers go."""
        self._end()

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
