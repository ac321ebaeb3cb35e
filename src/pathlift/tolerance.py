"""Sets of weights around a network: what a certificate quantifies over (SPEC §5).

A tolerance gives each parameter an interval. The box of a network is what these intervals become for the weights as the
theory sees them: a batch norm's scale s = γ/√(σ²+ε) and shift t = β − μ·s vary with γ and β.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pathlift.arguments import public, public_constructor
from pathlift.edges import Convolution, Dense
from pathlift.errors import InputError, MismatchError, NumericalError
from pathlift.intervals import Ranges
from pathlift.network import Apply, Expression, Leaf, Network, StateTensor, widen
from pathlift.passes.magnitude import path_magnitude
from pathlift.pruning.scope import prunable
from pathlift.rules.affine import batch_norm_scale, is_batch_norm_shift


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


def _around(network: Network, reach: Callable[[str, Tensor], Tensor | float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return θ − reach and θ + reach for every parameter."""
    found = {}
    for name, value in _values(network).items():
        own = reach(name, value)
        found[name] = (value - own, value + own)
    return found


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

    def _reach(self, network: Network, name: str, value: Tensor) -> Tensor:
        axis = _channel_axis(network, name, value) if self.per == "channel" else None
        others = [dim for dim in range(value.dim()) if dim != axis]
        largest = value.abs().amax(others, keepdim=True) if others else value.abs()
        reach: Tensor = largest * (self.step / (2 ** (self.bits - 1) - 1))
        return reach


def _channel_axis(network: Network, name: str, value: Tensor) -> int | None:
    """Return the axis of a parameter that counts output channels, None when it is not known."""
    if value.dim() == 1:
        return 0
    found: set[int | None] = set()
    for node in network.nodes:
        for term in node.terms:
            if term.weight is not None and name in term.weight.requires:
                plain = isinstance(term.weight.expression, StateTensor)
                if plain and isinstance(term.edges, Convolution):
                    found.add(1 if term.edges.transposed else 0)
                else:
                    found.add(0 if plain and isinstance(term.edges, Dense) else None)
    return found.pop() if len(found) == 1 else None


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
        found = {}
        for name, value in _values(network).items():
            kept = torch.where(low[name], 0.0, value) if name in low else value
            found[name] = (torch.minimum(value, kept), torch.maximum(value, kept))
        return found

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


@dataclass(frozen=True, eq=False)
class Box:
    """Intervals of all weights as the theory sees them.

    Attributes:
        lower: Leaf to smallest values, float64.
        upper: Leaf to largest values; the same tensor where nothing varies.
        cancelled: The leaf of a batch norm's shift t = β − μ·s to the largest |μ·s|, which rounds although it may cancel.
        peaks: The leaf of a batch norm's scale or shift to what its intermediate results can reach beyond its own values,
            whatever the order of (x − μ)·γ/√(σ²+ε) + β.
    """

    lower: Mapping[Leaf, Tensor]
    upper: Mapping[Leaf, Tensor]
    cancelled: Mapping[Leaf, Tensor] = field(default_factory=dict)
    peaks: Mapping[Leaf, float] = field(default_factory=dict)


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
    found = dict(tolerance.intervals(network))
    for name, pair in found.items():
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
    return {name: (low.double(), high.double()) for name, (low, high) in found.items()}


def _box(network: Network, ranges: Ranges) -> Box:
    for names in sorted({leaf.requires for leaf in network.leaves if leaf.requires}, key=sorted):
        for name in sorted(names):
            if not all(bool(torch.isfinite(end[name]).all()) for end in (ranges.low, ranges.high)):
                raise NumericalError(f"'{name}' contains NaN or inf.")
    found = {leaf: ranges.of(leaf) for leaf in network.leaves if leaf.scalar is None}
    cancelled, peaks = {}, {}
    for leaf in found:
        expression = leaf.expression
        if is_batch_norm_shift(expression):
            scale, bias, mean, *rest = expression.args
            sizes = ranges.interval(ranges.value(mean)).size
            cancelled[leaf] = sizes * ranges.interval(ranges.value(scale)).size
            shift = 0.0 if bias is None else float(ranges.interval(ranges.value(bias)).size.max())
            peaks[leaf] = float(sizes.max()) * _peak(ranges, *rest) + shift
        elif isinstance(expression, Apply) and expression.function is batch_norm_scale:
            peaks[leaf] = _peak(ranges, *expression.args)
    lower, upper = ({leaf: getattr(own, end) for leaf, own in found.items()} for end in ("low", "high"))
    return Box(lower, upper, cancelled, peaks)


def _peak(ranges: Ranges, weight: Expression | None, variance: Expression, epsilon: float) -> float:
    """Return max(1, |γ|)·max(1, 1/√(σ²+ε)), which no intermediate factor of a batch norm exceeds."""
    gamma = 1.0 if weight is None else float(ranges.interval(ranges.value(weight)).size.max())
    return max(1.0, gamma) * max(1.0, float((ranges.interval(ranges.value(variance)).low + epsilon).rsqrt().max()))
