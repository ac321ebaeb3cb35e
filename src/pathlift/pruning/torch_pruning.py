"""Path-magnitude as an importance for Torch-Pruning, which removes channels for good (extra ``torch-pruning``).

Torch-Pruning finds what must go together with a channel; the importance says what that costs. A path through a channel
leaves it through a weight that reads the channel, so the share of the path-norm that goes with a channel is at most the sum
of the path-magnitudes of all weights that read it, over all layers of its group: bound (13) for these weights. Where nothing
reads it, the weights and biases that make it count instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.edges.pattern import Layout
from pathlift.graph.axes import layouts
from pathlift.magnitude import path_magnitude
from pathlift.reading import Inputs, capture
from pathlift.storage.packages import MissingPackageError

try:
    from torch_pruning.dependency import Group
    from torch_pruning.pruner import function
    from torch_pruning.pruner.importance import Importance
except ImportError as error:
    raise MissingPackageError("torch_pruning", "torch-pruning", error) from error

READERS = (function.prune_conv_in_channels, function.prune_linear_in_channels)
WRITERS = (
    function.prune_conv_out_channels,
    function.prune_linear_out_channels,
    function.prune_depthwise_conv_out_channels,
)


class _Weight(NamedTuple):
    """Shares of a weight, and how it is laid out."""

    share: Tensor
    layout: Layout


class PathMagnitudeImportance(Importance):  # type: ignore[misc]
    """Importance of a group of channels: the share of the path-norm that can go with it. No data, no loss, no gauge.

    Example::

        importance = PathMagnitudeImportance(model, (3, 224, 224))
        pruner = tp.pruner.BasePruner(model, example, importance, pruning_ratio=0.5, global_pruning=True)
        pruner.step()
    """

    @public
    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        """Take the model that is going to be pruned.

        Args:
            model: The model that the pruner changes.
            inputs: As for `pathlift.capture`.
        """
        self.model = model
        self.inputs = inputs
        self._known: tuple[dict[str, Tensor], Mapping[nn.Module, tuple[_Weight | None, Tensor | None]]] | None = None

    def _shares(self) -> Mapping[nn.Module, tuple[_Weight | None, Tensor | None]]:
        """Path-magnitudes of weight and bias of every module, computed anew after any tensor of the model has changed."""
        state = self.model.state_dict()
        if self._known is None or not _same(self._known[0], state):
            network = capture(self.model, self.inputs)
            scores, layout_of = path_magnitude(network), layouts(network)

            def bias(name: str) -> Tensor | None:
                share = scores.get(network.aliases.get(name, name))
                return None if share is None else share.double().cpu()

            def weight(name: str) -> _Weight | None:
                share, layout = bias(name), layout_of.get(network.aliases.get(name, name))
                return None if share is None or layout is None else _Weight(share, layout)

            shares = {
                module: (weight(f"{path}.weight".lstrip(".")), bias(f"{path}.bias".lstrip(".")))
                for path, module in self.model.named_modules()
            }
            self._known = {name: tensor.detach().clone() for name, tensor in state.items()}, shares
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
        read = any(dep.handler in READERS for dep, _ in group)
        for item in group:
            layer, handler = item.dep.target.module, item.dep.handler
            weight, bias = shares.get(layer, (None, None))
            roots, channels = torch.as_tensor(item.root_idxs), torch.as_tensor(item.idxs)
            if weight is not None and handler in (READERS if read else WRITERS):
                total.index_add_(0, roots, _by_channel(weight.layout, weight.share, read=read)[channels])
            if bias is not None and not read:
                total.index_add_(0, roots, bias[channels])
        return total


def _same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def _by_channel(layout: Layout, share: Tensor, *, read: bool) -> Tensor:
    """Sum the shares of the weights that read each input channel, or that make each output channel."""
    return layout.split(share).sum((1, 3) if read else (2, 3)).reshape(-1)
