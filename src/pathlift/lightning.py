"""Lightning callbacks: log the path-norm, keep a gauge, prune on a schedule, keep masks (extra ``lightning``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from pathlift.arguments import declare, public
from pathlift.arguments.kinds import collection, count, number, text
from pathlift.callbacks import GaugeKeeper, Keeper, MaskKeeper, logged, within
from pathlift.errors import InputError
from pathlift.graph.network import Network
from pathlift.precision import overwrite
from pathlift.pruning import CRITERIA, prune
from pathlift.pruning.catalogue import RECOMMENDED
from pathlift.reading import Inputs, capture
from pathlift.rescaling import RescaledState, Symmetries
from pathlift.storage.packages import MissingPackageError

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingPackageError("lightning", "lightning", error) from error


declare(__name__, {
    "prefix": text("what stands before keys"),
    "PruneCallback.amounts": collection("shares in [0, 1)", number("a share in [0, 1)", lambda v: 0 <= v < 1)),
    "PruneCallback.criterion": text("the name of a criterion"),
    "first": count,
})  # fmt: skip


def _optimizers(trainer: Trainer) -> list[Optimizer]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Optimizer)]


class _Keeping(Callback):
    """Lets go of optimisers when a training ends, however it does."""

    _keeper: Keeper

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - as Lightning calls it
        """Let the optimisers go."""
        self._keeper.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Let the optimisers go."""
        self._keeper.end()


class PathNormLogger(Callback):
    """Log the path-norm while a model is trained: log₁₀ of it, of its input part and of its bias part."""

    @public
    def __init__(self, inputs: Inputs, *, every: int = 100, module: str | None = None, prefix: str = "path_norm/") -> None:
        """Say what is logged, and when.

        Args:
            inputs: Input shape without the batch dimension, as for `pathlift.capture`.
            every: Batches between two values; the first batch has one.
            module: Path of the network within the LightningModule (``net``); None for all of it.
            prefix: Stands before the keys ``log10``, ``log10_input_part`` and ``log10_bias_part``.
        """
        self.inputs, self.every, self.module, self.prefix = inputs, every, module, prefix
        self._network: Network | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - as Lightning calls it
        """Capture the network once; it shares its weights with the module.

        Raises:
            UnsupportedModelError: The module lies outside the theory.
            InputError: There is no such module.
        """
        self._network = capture(within(pl_module, self.module), self.inputs)

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002 - as Lightning calls it
        pl_module: LightningModule,
        outputs: object,  # noqa: ARG002
        batch: object,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Log."""
        if batch_idx % self.every == 0 and self._network is not None:
            pl_module.log_dict(logged(self._network, self.prefix))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - as Lightning calls it
        """Let the network go."""
        self._network = None


class PruneCallback(_Keeping):
    """Prune in rounds while a model is trained, and keep what is gone at 0.

    Attributes:
        masks: Parameter name in the LightningModule to mask, true where the weight stays; empty before the first round.
    """

    @public
    def __init__(
        self,
        inputs: Inputs,
        amounts: Sequence[float],
        *,
        criterion: str = RECOMMENDED,
        first: int = 0,
        every: int = 1,
        module: str | None = None,
    ) -> None:
        """Choose a schedule.

        Args:
            inputs: Input shape without the batch dimension, as for `pathlift.capture`.
            amounts: Share of the weights that is gone after each round, in (0, 1), rising: ``(0.3, 0.5, 0.7)``.
            criterion: A name of `pathlift.pruning.CRITERIA` that needs no data.
            first: Epoch before which the first round is.
            every: Epochs between two rounds.
            module: Path of the network within the LightningModule (``net``); None for all of it.

        Raises:
            InputError: The amounts do not rise, or the criterion is not known or needs data.
        """
        if list(amounts) != sorted(amounts):
            raise InputError(f"amounts must rise from round to round, found {tuple(amounts)}.")
        if criterion not in CRITERIA or CRITERIA[criterion].needs != "nothing":
            names = ", ".join(name for name, each in CRITERIA.items() if each.needs == "nothing")
            raise InputError(f"criterion must be one that needs no data, found '{criterion}'. There are: {names}.")
        self.inputs, self.amounts, self.criterion = inputs, tuple(amounts), criterion
        self.first, self.every, self.module = first, every, module
        self.masks: dict[str, Tensor] = {}
        self._keeper: MaskKeeper = MaskKeeper()

    @torch.no_grad()
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune when it is time.

        Raises:
            UnsupportedModelError: The module lies outside the theory.
            InputError: There is no such module, or no optimiser trains these parameters.
        """
        number, rest = divmod(trainer.current_epoch - self.first, self.every)
        if rest or not 0 <= number < len(self.amounts):
            return
        network = capture(within(pl_module, self.module), self.inputs)
        _, report = prune(network, amount=self.amounts[number], criterion=self.criterion)
        above = "" if self.module is None else f"{self.module}."
        masks = {f"{above}{name}": mask for name, mask in report.masks.items()}
        self.masks = {name: mask & self.masks[name] if name in self.masks else mask for name, mask in masks.items()}
        named = dict(pl_module.named_parameters(remove_duplicate=False))
        for name, mask in self.masks.items():
            overwrite(named[name], named[name] * mask)
        self._keeper.begin(pl_module, self.masks, _optimizers(trainer))


class RescaleCallback(_Keeping):
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
            module: Path of the network within the LightningModule (``net``); None for all of it.
        """
        self.inputs, self.gauge, self.every, self.module = inputs, gauge, every, module
        self._keeper: GaugeKeeper = GaugeKeeper()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the groups, rescale, and register with every optimiser."""
        network = within(pl_module, self.module)
        self._keeper.begin(network, self.inputs, self.gauge, self.every, _optimizers(trainer))


class MaskCallback(_Keeping):
    """Keep pruned weights at 0 while the others are trained: `pathlift.pruning.keep_masks` for every optimiser."""

    @public
    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        """Take the masks.

        Args:
            masks: Parameter name in the LightningModule (``net.0.weight``) to mask, true where the weight stays.
        """
        self.masks = masks
        self._keeper: MaskKeeper = MaskKeeper()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register with every optimiser that trains one of the parameters.

        Raises:
            MismatchError: The masks are those of another model.
            InputError: A weight that is gone is not 0, or no optimiser trains any of these parameters.
        """
        self._keeper.begin(pl_module, self.masks, _optimizers(trainer))
