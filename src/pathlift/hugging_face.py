"""Callbacks for the Trainer of Hugging Face: log the path-norm, keep a gauge, keep masks (extra ``transformers``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pathlift.arguments import declare, public
from pathlift.arguments.kinds import text
from pathlift.errors import InputError
from pathlift.failures import MissingPackageError
from pathlift.norm import path_norm
from pathlift.pruning import MaskHandle, keep_masks
from pathlift.reading import Inputs, capture
from pathlift.rescaling import RescaledState, Symmetries, symmetries
from pathlift.rescaling.training import rescale_after_steps, rescale_in_place

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingPackageError("transformers", "transformers", error) from error

declare(__name__, {"PathNormCallback.prefix": text("what stands before keys")})


def _within(model: nn.Module, path: str | None) -> nn.Module:
    """Return the module of this path, or the whole model.

    Raises:
        InputError: There is no such module.
    """
    if path is None:
        return model
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise InputError(f"The model has no module '{path}': {error}.") from error


def _plain(optimizer: Optimizer) -> Optimizer:
    """Return the optimiser that takes the steps, out of the one that the Trainer puts around it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, Optimizer)
    return inner


class PathNormCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Add the path-norm to what the Trainer logs: log₁₀ of it, of its input part and of its bias part.

    Callbacks are called in their order, those that report to a service first: give this one to the Trainer before them, by
    ``trainer.callback_handler.callbacks.insert(0, callback)``. It is in ``trainer.state.log_history`` in any case.
    """

    @public
    def __init__(self, inputs: Inputs, *, module: str | None = None, prefix: str = "path_norm/") -> None:
        """Say of what.

        Args:
            inputs: Input shape without the batch dimension, as for `pathlift.capture`.
            module: Path of the network within the model, where the model itself returns a loss; None for all of it.
            prefix: Stands before the keys ``log10``, ``log10_input_part`` and ``log10_bias_part``.
        """
        self.inputs, self.module, self.prefix = inputs, module, prefix

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002 - as the Trainer calls it
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        *,
        model: nn.Module,
        **others: Any,  # noqa: ARG002
    ) -> None:
        """Add the numbers of the weights as they are now."""
        norm = path_norm(capture(_within(model, self.module), self.inputs)).scalars(self.prefix)
        keys = [f"{self.prefix}{key}" for key in ("log10", "log10_input_part", "log10_bias_part")]
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry.update({key: norm[key] for key in keys})


class RescaleCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Rescale the weights before training and after every few optimiser steps; the function is never changed."""

    @public
    def __init__(
        self,
        inputs: Inputs,
        gauge: Callable[[Symmetries], RescaledState] = Symmetries.balance,
        *,
        every: int | None = None,
        module: str | None = None,
    ) -> None:
        """Choose a gauge.

        Args:
            inputs: Input shape without the batch dimension, as for `pathlift.capture`.
            gauge: ``Symmetries.balance``, ``Symmetries.condition``, ``Symmetries.normalize`` or another function of them.
            every: Steps between two rescalings; None to rescale once, before training.
            module: Path of the network within the model, where the model itself returns a loss; None for all of it.
        """
        self.inputs, self.gauge, self.every, self.module = inputs, gauge, every, module
        self._handle: RemovableHandle | None = None

    @torch.no_grad()
    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - as the Trainer calls it
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **others: Any,  # noqa: ARG002
    ) -> None:
        """Find the groups, rescale, and register with the optimiser."""
        groups = symmetries(_within(model, self.module), self.inputs)
        rescale_in_place(groups, self.gauge(groups))
        if self.every is not None:
            self._handle = rescale_after_steps(_plain(optimizer), groups, self.gauge, every=self.every)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - as the Trainer calls it
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **others: Any,  # noqa: ARG002
    ) -> None:
        """Let the optimiser go."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class MaskCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keep pruned weights at 0 while the others are trained: `pathlift.pruning.keep_masks`."""

    @public
    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        """Take the masks.

        Args:
            masks: Parameter name in the model to mask, true where the weight stays.
        """
        self.masks = masks
        self._handle: MaskHandle | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - as the Trainer calls it
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **others: Any,  # noqa: ARG002
    ) -> None:
        """Register with the optimiser.

        Raises:
            MismatchError: The masks are those of another model.
            InputError: A weight that is gone is not 0, or the optimiser trains none of these parameters.
        """
        self._handle = keep_masks(_plain(optimizer), self.masks, model)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - as the Trainer calls it
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **others: Any,  # noqa: ARG002
    ) -> None:
        """Let the optimiser go."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
