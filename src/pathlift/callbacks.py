"""What the callbacks of training libraries have in common: the network within a model, its path-norm as numbers, and what holds
on to optimisers from the beginning of a training to its end.

`pathlift.lightning` and `pathlift.hugging_face` say when; what is done is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pathlift.errors import InputError
from pathlift.graph.network import Network
from pathlift.norm import path_norm
from pathlift.pruning import MaskHandle, keep_masks
from pathlift.reading import Inputs
from pathlift.rescaling import RescaledState, Symmetries, symmetries
from pathlift.rescaling.training import rescale_after_steps, rescale_in_place

LOGGED = ("log10", "log10_input_part", "log10_bias_part")
"""What is logged of a path-norm."""


def within(model: nn.Module, path: str | None) -> nn.Module:
    """Return a module of a model.

    Args:
        model: The model.
        path: Of the module; None for the model itself.

    Returns:
        The module.

    Raises:
        InputError: There is no such module.
    """
    if path is None:
        return model
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise InputError(f"The model has no module '{path}': {error}.") from error


def logged(network: Network, prefix: str) -> dict[str, float]:
    """Return what is logged of the path-norm.

    Args:
        network: With the weights as they are now.
        prefix: Stands before each key.

    Returns:
        Key to number.
    """
    numbers = path_norm(network).scalars()
    return {f"{prefix}{key}": numbers[key] for key in LOGGED}


class Keeper:
    """Holds on to optimisers, until it is told to let them go."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle | MaskHandle] = []

    def end(self) -> None:
        """Let the optimisers go."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class GaugeKeeper(Keeper):
    """Rescales before training, and after every few steps."""

    @torch.no_grad()
    def begin(
        self,
        network: nn.Module,
        inputs: Inputs,
        gauge: Callable[[Symmetries], RescaledState],
        every: int | None,
        optimizers: Sequence[Optimizer],
    ) -> None:
        """Find the groups, rescale, and register with the optimisers.

        Args:
            network: Whose weights are rescaled.
            inputs: Its input shape.
            gauge: What to bring them to.
            every: Steps between two rescalings; None for none after the first.
            optimizers: Those that train it.

        Raises:
            PathliftError: The network lies outside the theory, or an optimiser trains none of its parameters.
        """
        self.end()
        groups = symmetries(network, inputs)
        rescale_in_place(groups, gauge(groups))
        if every is not None:
            self._handles = [rescale_after_steps(optimizer, groups, gauge, every=every) for optimizer in optimizers]


class MaskKeeper(Keeper):
    """Keeps pruned weights at 0."""

    def begin(self, model: nn.Module, masks: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
        """Register with every optimiser that trains one of the parameters.

        Args:
            model: The model.
            masks: Parameter name in it to mask, true where the weight stays.
            optimizers: All that train something.

        Raises:
            MismatchError: The masks are those of another model.
            InputError: A weight that is gone is not 0, or no optimiser trains any of these parameters.
        """
        self.end()
        named = dict(model.named_parameters(remove_duplicate=False))
        masked = {id(named[name]) for name in masks if name in named}
        trained = [
            optimizer
            for optimizer in optimizers
            if any(id(parameter) in masked for group in optimizer.param_groups for parameter in group["params"])
        ]
        self._handles = [keep_masks(optimizer, masks, model) for optimizer in trained or optimizers[:1]]
