"""Sets of weights around a network: what a certificate quantifies over (mathematics §5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from pathlift.arguments import public, public_constructor
from pathlift.edges import Convolution, Dense
from pathlift.errors import MismatchError
from pathlift.graph.expressions import StateTensor, widen
from pathlift.graph.network import Network
from pathlift.magnitude import path_magnitude
from pathlift.passes.box import Grid, Tolerance
from pathlift.pruning.scope import prunable


def _around(network: Network, reach: Callable[[str, Tensor], Tensor | float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return θ − reach and θ + reach for every parameter."""
    intervals = {}
    for name, value in _values(network).items():
        change = reach(name, value)
        intervals[name] = (value - change, value + change)
    return intervals


def _values(network: Network) -> dict[str, Tensor]:
    return {name: network.state[name].detach().double() for name in network.parameters}


@public_constructor
@dataclass(frozen=True)
class Relative(Tolerance):
    """|θ'_i − θ_i| ≤ r·|θ_i| for every parameter. The only tolerance here that no rescaling changes besides `Pruned`.

    Attributes:
        r: Relative change, at least 0.
    """

    r: float

    @public
    def intervals(self, network: Network) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Tolerance.intervals`."""
        return _around(network, lambda _, value: self.r * value.abs())


@public_constructor
@dataclass(frozen=True)
class Absolute(Tolerance):
    """|θ'_i − θ_i| ≤ r for every parameter.

    Attributes:
        r: Absolute change, at least 0.
    """

    r: float

    @public
    def intervals(self, network: Network) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Tolerance.intervals`."""
        return _around(network, lambda *_: self.r)


@public_constructor
@dataclass(frozen=True)
class Rounding(Tolerance):
    """Anything within ``step`` steps of the symmetric grid of each output channel: every way of rounding to ``bits``.

    A channel's step is max|row|/(2^(bits−1)−1). A vector (bias, batch norm) counts as rows of one number. A weight whose
    output channel is not its first axis (or the second of a transposed convolution) gets the grid of the whole tensor,
    which is at least as coarse.

    Attributes:
        bits: Number of bits, at least 2.
        per: One grid per output channel, or per tensor.
        step: 0.5 for rounding to nearest, 1 for rounding up or down as one likes.
    """

    bits: int
    per: Literal["channel", "tensor"] = "channel"
    step: float = 0.5

    @public
    def intervals(self, network: Network) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Tolerance.intervals`."""
        return _around(network, lambda name, value: self._reach(network, name, value))

    @public
    @override
    def grid(self, network: Network) -> dict[str, Steps] | None:
        """Return the points of each parameter's grid that lie in the set; None where a parameter has none in it."""
        most = 2 ** (self.bits - 1) - 1
        grids = {}
        for name, (low, high) in self.intervals(network).items():
            value = network.state[name].detach().double()
            step = self._largest(network, name, value) / most
            step = torch.where(step > 0, step, 1.0)
            ends = (value / step - self.step).ceil(), (value / step + self.step).floor()
            beside = torch.arange(-1.0, 2.0, dtype=torch.float64, device=value.device)  # both are rounded
            numbers = torch.cat([end.unsqueeze(-1) + beside for end in ends], -1).clamp(-most, most)
            points = numbers * step.unsqueeze(-1)
            fits = (points >= low.unsqueeze(-1)) & (points <= high.unsqueeze(-1))
            if not bool(fits.any(-1).all()):
                return None
            least = torch.where(fits, numbers, math.inf).amin(-1)
            grids[name] = Steps(step, least, torch.where(fits, numbers, -math.inf).amax(-1))
        return grids

    def _reach(self, network: Network, name: str, value: Tensor) -> Tensor:
        reach: Tensor = self._largest(network, name, value) * (self.step / (2 ** (self.bits - 1) - 1))
        return reach

    def _largest(self, network: Network, name: str, value: Tensor) -> Tensor:
        """Return max|row|, as it broadcasts over the parameter."""
        axis = _channel_axis(network, name, value) if self.per == "channel" else None
        others = [dim for dim in range(value.dim()) if dim != axis]
        return value.abs().amax(others, keepdim=True) if others else value.abs()


@dataclass(frozen=True)
class Steps(Grid):
    """The points number·step of a grid that lie in an interval, element by element.

    Attributes:
        step: Broadcasts over the parameter.
        least: Smallest number, a whole one, of the parameter's shape.
        most: Largest number.
    """

    step: Tensor
    least: Tensor
    most: Tensor

    @override
    def nearest(self, value: Tensor) -> Tensor:
        return (value / self.step).round().clamp(self.least, self.most) * self.step


def _channel_axis(network: Network, name: str, value: Tensor) -> int | None:
    """Return the axis of a parameter that counts output channels, None when it is not known."""
    if value.dim() == 1:
        return 0
    axes: set[int | None] = set()
    for layer in network.layers:
        for connection in layer.connections:
            if connection.weight is not None and name in connection.weight.requires:
                plain = isinstance(connection.weight.expression, StateTensor)
                if plain and isinstance(connection.edges, Convolution):
                    axes.add(1 if connection.edges.transposed else 0)
                else:
                    axes.add(0 if plain and isinstance(connection.edges, Dense) else None)
    return axes.pop() if len(axes) == 1 else None


@public_constructor
@dataclass(frozen=True, eq=False)
class Pruned(Tolerance):
    """Every mask that a ranking allows: any of the lowest ``amount`` of all weights may be set to 0, or shrunk.

    Ranked together are all weights of convolutions and linear layers; weights that tie with the last one count as low.

    Attributes:
        amount: Share of weights, from 0 to 1.
        criterion: ``path_magnitude``, ``magnitude``, or scores by parameter name.
    """

    amount: float
    criterion: Literal["path_magnitude", "magnitude"] | Mapping[str, Tensor] = "path_magnitude"

    def __repr__(self) -> str:
        """Return one line; scores that were given are not written out."""
        scores = repr(self.criterion) if isinstance(self.criterion, str) else "given scores"
        return f"Pruned(amount={self.amount!r}, criterion={scores})"

    @public
    def intervals(self, network: Network) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Tolerance.intervals`."""
        low = self._rank(network)
        intervals = {}
        for name, value in _values(network).items():
            kept = torch.where(low[name], 0.0, value) if name in low else value
            intervals[name] = (torch.minimum(value, kept), torch.maximum(value, kept))
        return intervals

    def _rank(self, network: Network) -> dict[str, Tensor]:
        names = prunable(network)
        if isinstance(self.criterion, Mapping):
            scores: Mapping[str, Tensor] = self.criterion
            missing = [name for name in names if name not in scores or scores[name].shape != network.state[name].shape]
            if missing:
                raise MismatchError(f"The criterion has no scores of the right shape for: {', '.join(missing[:5])}.")
        elif self.criterion == "magnitude":
            scores = {name: widen(network.state[name]).abs() for name in names}
        else:
            scores = path_magnitude(network)
        flat = torch.cat([scores[name].detach().reshape(-1).double() for name in names]) if names else torch.zeros(0)
        count = int(self.amount * len(flat) + 1e-9)
        if count == 0:
            return {}
        limit = flat.kthvalue(count).values.to(network.device)
        return {name: scores[name].detach().double().to(network.device) <= limit for name in names}
