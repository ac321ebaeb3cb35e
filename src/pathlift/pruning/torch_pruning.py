"""Path-magnitude as an importance for Torch-Pruning, which removes channels for good (extra ``torch-pruning``).

Torch-Pruning finds what must go together with a channel; the importance says what that costs. A path through a channel
leaves it through a weight that reads the channel, so the share of the path-norm that goes with a channel is at most the sum
of the path-magnitudes of all weights that read it, over all layers of its group: bound (13) for these weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pathlift.capture import Inputs
from pathlift.errors import InputError
from pathlift.passes.magnitude import path_magnitude

try:
    from torch_pruning.dependency import Group
    from torch_pruning.pruner import function
    from torch_pruning.pruner.importance import Importance
except ImportError as error:
    raise InputError("The package 'torch-pruning' is not installed. Run: pip install 'pathlift[torch-pruning]'") from error

READERS = (function.prune_conv_in_channels, function.prune_linear_in_channels)
WRITERS = (
    function.prune_conv_out_channels,
    function.prune_linear_out_channels,
    function.prune_depthwise_conv_out_channels,
)


class PathMagnitudeImportance(Importance):  # type: ignore[misc]
    """Importance of a group of channels: the share of the path-norm that can go with it. No data, no loss, no gauge.

    Example::

        importance = PathMagnitudeImportance(model, (3, 224, 224))
        pruner = tp.pruner.BasePruner(model, example, importance, pruning_ratio=0.5, global_pruning=True)
        pruner.step()
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        """Take the model that is going to be pruned.

        Args:
            model: The model that the pruner changes.
            inputs: As for `pathlift.capture`.
        """
        self.model = model
        self.inputs = inputs
        self._known: tuple[object, Mapping[nn.Module, Tensor]] | None = None

    def _shares(self) -> Mapping[nn.Module, Tensor]:
        """Path-magnitude of every weight, computed anew after the model has changed."""
        state = tuple((id(own), own._version, own.shape) for own in self.model.parameters())
        if self._known is None or self._known[0] != state:
            scores = path_magnitude(self.model, self.inputs)
            modules = dict(self.model.named_modules())
            found = {modules[name.rpartition(".")[0]]: score for name, score in scores.items() if name.endswith("weight")}
            self._known = state, found
        return self._known[1]

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor:
        """Score the channels of a group.

        Args:
            group: What Torch-Pruning would remove together.

        Returns:
            A share of the path-norm for each channel of the group's root, float64.

        Raises:
            UnsupportedModelError: The model lies outside the theory.
        """
        shares = self._shares()
        total = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        wanted = READERS if any(dep.handler in READERS for dep, _ in group) else WRITERS
        for item in group:
            layer, handler = item.dep.target.module, item.dep.handler
            if handler in wanted and layer in shares:
                weight = shares[layer].double().cpu()
                channels = _read(layer, weight) if handler in READERS else _written(layer, weight)
                total.index_add_(0, torch.as_tensor(item.root_idxs), channels[torch.as_tensor(item.idxs)])
        return total


def _read(layer: nn.Module, share: Tensor) -> Tensor:
    """Sum the shares of the weights that read each input channel."""
    groups = int(getattr(layer, "groups", 1))
    if getattr(layer, "transposed", False):
        return share.flatten(1).sum(1)
    return share.reshape(groups, len(share) // groups, share.shape[1], -1).sum((1, 3)).reshape(-1)


def _written(layer: nn.Module, share: Tensor) -> Tensor:
    """Sum the shares of the weights that make each output channel."""
    if getattr(layer, "transposed", False):
        groups = int(getattr(layer, "groups", 1))
        return share.reshape(groups, len(share) // groups, share.shape[1], -1).sum((1, 3)).reshape(-1)
    return share.flatten(1).sum(1)
