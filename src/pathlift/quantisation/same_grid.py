"""The set of all roundings to the same grids: what certificates and bounds quantify over (mathematics §5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pathlift.arguments import public
from pathlift.errors import MismatchError
from pathlift.graph.network import Network
from pathlift.passes.box import Grid, Tolerance
from pathlift.quantisation.tensors import QuantizedTensor


@dataclass(frozen=True, eq=False)
class SameGrid(Tolerance):
    """Every rounding to the same grids: each weight is one of the two values that it lies between, or what it became.

    A weight that lies on its grid stays, and one beyond it goes to the end. All that was not rounded is as in the network
    that is asked about: the quantised one, with its corrections, or the model, unless the gauge moved its weights.

    Attributes:
        tensors: What became of each tensor.
    """

    tensors: tuple[QuantizedTensor, ...]

    def __repr__(self) -> str:
        """Return one line; weights are not written out."""
        return f"SameGrid({len(self.tensors)} tensors)"

    @public
    def intervals(self, network: Network) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Tolerance.intervals`.

        Args:
            network: The quantised network, or the model.

        Returns:
            Name to intervals.

        Raises:
            MismatchError: Its weights are neither.
        """
        intervals = {name: (value, value) for name in network.parameters for value in [network.state[name].detach().double()]}
        for tensor in self.tensors:
            if tensor.name not in intervals or network.state[tensor.name].shape != tensor.shape:
                raise MismatchError(f"The network has no parameter '{tensor.name}' of shape {tensor.shape}, which was rounded.")
            value = intervals[tensor.name][0]
            down, up, became = (end.to(value.device).double() for end in (*tensor.neighbours, tensor.values))
            low, high = (end.to(value.device).double() for end in tensor.ends)
            between = (value >= down) & (value <= up) | (value < down) & (down == low) | (value > up) & (up == high)
            if not bool((between | (value == became)).all()):
                raise MismatchError(
                    f"'{tensor.name}' of the network is neither what was rounded nor what became of it. Where weights were "
                    "rounded in another gauge, give the quantised network."
                )
            intervals[tensor.name] = (torch.minimum(down, became), torch.maximum(up, became))
        return intervals

    @public
    @override
    def grid(self, network: Network) -> dict[str, Choices]:
        """See `Tolerance.grid`: the two neighbours of each weight, and what it became."""
        device = network.device
        return {
            tensor.name: Choices(torch.stack([end.to(device).double() for end in (*tensor.neighbours, tensor.values)]))
            for tensor in self.tensors
        }


@dataclass(frozen=True, eq=False)
class Choices(Grid):
    """A few values for each element.

    Attributes:
        values: (choices, *shape of the parameter).
    """

    values: Tensor

    @override
    def nearest(self, value: Tensor) -> Tensor:
        best = self.values[0].expand(value.shape)
        for choice in self.values[1:]:
            best = torch.where((choice - value).abs() < (best - value).abs(), choice, best)
        return best
