"""Callbacks for the Trainer of Hugging Face: log the path-norm, keep a gauge, keep masks (extra ``transformers``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pathlift.arguments import declare, public
from pathlift.arguments.kinds import text
from pathlift.callbacks import GaugeKeeper, Keeper, MaskKeeper, logged, within
from pathlift.failures import MissingPackageError
from pathlift.reading import Inputs, capture
from pathlift.rescaling import RescaledState, Symmetries

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingPackageError("transformers", "transformers", error) from error

declare(__name__, {"PathNormCallback.prefix": text("what stands before keys")})


def _plain(optimizer: Optimizer) -> Optimizer:
    """Return the optimiser that takes the steps, out of the one that the Trainer puts around it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, Optimizer)
    return inner


class _Keeping(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Lets go of optimisers when a training ends."""

    _keeper: Keeper

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - as the Trainer calls it
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **others: Any,  # noqa: ARG002
    ) -> None:
        """Let the optimiser go."""
        self._keeper.end()


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
        numbers = logged(capture(within(model, self.module), self.inputs), self.prefix)
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry.update(numbers)


class RescaleCallback(_Keeping):  # type: ignore[misc, unused-ignore]
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
        self._keeper: GaugeKeeper = GaugeKeeper()

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
        network = within(model, self.module)
        self._keeper.begin(network, self.inputs, self.gauge, self.every, [_plain(optimizer)])


class MaskCallback(_Keeping):  # type: ignore[misc, unused-ignore]
    """Keep pruned weights at 0 while the others are trained: `pathlift.pruning.keep_masks`."""

    @public
    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        """Take the masks.

        Args:
            masks: Parameter name in the model to mask, true where the weight stays.
        """
        self.masks = masks
        self._keeper: MaskKeeper = MaskKeeper()

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
        self._keeper.begin(model, self.masks, [_plain(optimizer)])
