"""Boxes: an interval for every weight as the theory sees it, and the sets of networks that they come from (mathematics §5).

A set gives each parameter an interval. The box of a network is what these become for its weights: a batch norm's scale
s = γ/√(σ²+ε) and shift t = β − μ·s vary with γ and β.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pathlift.arguments import public
from pathlift.errors import InputError, NumericalError
from pathlift.graph.interval import Interval
from pathlift.graph.interval import point as point_interval
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.intervals import Ranges


class Grid(ABC):
    """The values that an element of a parameter may have, where these are points and no interval."""

    @abstractmethod
    def nearest(self, value: Tensor) -> Tensor:
        """Return the points nearest to values.

        Args:
            value: float64, (…, *shape of the parameter).

        Returns:
            The same shape.
        """


class Tolerance(ABC):
    """An interval around every parameter."""

    @abstractmethod
    def intervals(self, network: Network) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the smallest and the largest value that each element of each parameter may take.

        Args:
            network: The network around which the set lies.

        Returns:
            Canonical name to two float64 tensors of the parameter's shape, for all of `Network.parameters`.
        """

    @public
    def grid(self, network: Network) -> Mapping[str, Grid] | None:
        """Return the points of the set, where what it is meant for are points of a grid: for `attack`, which searches them too.

        Args:
            network: The network around which the set lies.

        Returns:
            Canonical name to grid, for every parameter that varies; None where the set is all that is meant, or where it
            holds no network on the grid.
        """
        del network
        return None


@dataclass(frozen=True, eq=False)
class Shift:
    """A batch norm's t = β − μ·s, which moves with s: s·z + t = s·(z − μ) + β.

    Attributes:
        mean: μ, float64.
        bias: β.
    """

    mean: Tensor
    bias: Interval


@dataclass(frozen=True, eq=False)
class Box:
    """Intervals of all weights as the theory sees them.

    Attributes:
        lower: Weight tensor to smallest values, float64.
        upper: Weight tensor to largest values; the same tensor where nothing varies.
        cancelled: Weight tensor that is a sum to the size of what may cancel in it (`Formula.cancelled`): of a batch norm's
            shift t = β − μ·s the largest |μ·s|.
        peaks: Weight tensor to what intermediate results of the model can reach beyond its own values (`Formula.peak`).
        shifts: The shifts t of batch norms that vary while μ does not.
    """

    lower: Mapping[WeightTensor, Tensor]
    upper: Mapping[WeightTensor, Tensor]
    cancelled: Mapping[WeightTensor, Tensor] = field(default_factory=dict)
    peaks: Mapping[WeightTensor, float] = field(default_factory=dict)
    shifts: Mapping[WeightTensor, Shift] = field(default_factory=dict)


@torch.no_grad()
def point(network: Network, state: Mapping[str, Tensor], *, arithmetic: bool = False) -> Box:
    """Return the box that holds one network.

    Args:
        network: The graph.
        state: Its parameters and buffers.
        arithmetic: Let weights that are computed from parameters be what the model computes in its own precision.

    Returns:
        The box.

    Raises:
        UnsupportedModelError: A weight is computed in a way that has no interval arithmetic.
        NumericalError: A parameter or buffer is NaN or infinite.
    """
    return _box(network, Ranges(state, state, arithmetic=arithmetic))


@torch.no_grad()
def box(network: Network, tolerance: Tolerance, *, arithmetic: bool = False) -> Box:
    """Carry the intervals of the parameters over to the weights of the theory.

    Args:
        network: The network around which the set lies.
        tolerance: The intervals.
        arithmetic: Let weights that are computed from parameters be what the model computes in its own precision.

    Returns:
        The box.

    Raises:
        UnsupportedModelError: A weight is computed in a way that has no interval arithmetic.
        NumericalError: A parameter or buffer is NaN or infinite.
    """
    low = dict(network.state)
    high = dict(low)
    for name, (least, most) in checked_intervals(network, tolerance).items():
        if torch.equal(least, most):
            low[name] = high[name] = low[name] if torch.equal(least, low[name].double()) else least
        else:  # rounded outwards, save where nothing may move
            low[name] = torch.where(least == most, least, torch.nextafter(least, least.new_tensor(-math.inf)))
            high[name] = torch.where(least == most, most, torch.nextafter(most, most.new_tensor(math.inf)))
    return _box(network, Ranges(low, high, arithmetic=arithmetic))


def checked_intervals(network: Network, tolerance: Tolerance) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the intervals of a tolerance, which may be a user's own.

    Args:
        network: The network around which the set lies.
        tolerance: The set.

    Returns:
        See `Tolerance.intervals`.

    Raises:
        InputError: They are no pair of tensors of the parameter's shape, or a smallest value exceeds the largest.
        NumericalError: One of them is NaN.
    """
    intervals = dict(tolerance.intervals(network))
    for name, pair in intervals.items():
        if name not in network.parameters:
            raise InputError(f"The tolerance has an interval for '{name}', which is no parameter of the network.")
        shape = network.state[name].shape
        fair = (
            isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(end, Tensor) and end.shape == shape for end in pair)
        )
        if not fair:
            raise InputError(f"The tolerance must give two tensors of shape {tuple(shape)} for '{name}', smallest and largest.")
        if any(bool(end.isnan().any()) for end in pair):
            raise NumericalError(f"The tolerance gives NaN for '{name}'.")
        if bool((pair[0] > pair[1]).any()):
            raise InputError(f"The tolerance gives '{name}' a smallest value above the largest.")
    return {name: (low.double(), high.double()) for name, (low, high) in intervals.items()}


def _box(network: Network, ranges: Ranges) -> Box:
    for names in sorted({weight.requires for weight in network.weights if weight.requires}, key=sorted):
        for name in sorted(names):
            if not all(bool(torch.isfinite(end[name]).all()) for end in (ranges.low, ranges.high)):
                raise NumericalError(f"'{name}' contains NaN or inf.")
    intervals = {weight: ranges.of(weight) for weight in network.weights if weight.scalar is None}
    shifts = {weight: shift for weight in intervals if (shift := _shift(ranges, weight, intervals[weight])) is not None}
    cancelled = {weight: weight.expression.cancelled(ranges) for weight in intervals}
    peaks = {weight: weight.expression.peak(ranges) for weight in intervals}
    return Box(
        {weight: interval.low for weight, interval in intervals.items()},
        {weight: interval.high for weight, interval in intervals.items()},
        {weight: size for weight, size in cancelled.items() if size is not None},
        {weight: peak for weight, peak in peaks.items() if peak is not None},
        shifts,
    )


def _shift(ranges: Ranges, weight: WeightTensor, interval: Interval) -> Shift | None:
    norm = weight.expression.normalisation()
    if norm is None or interval.exact:
        return None
    mean = ranges.enclosed(norm.mean)
    bias = point_interval(torch.zeros_like(mean.low)) if norm.bias is None else ranges.enclosed(norm.bias)
    return Shift(mean.low.double(), bias) if mean.exact else None
