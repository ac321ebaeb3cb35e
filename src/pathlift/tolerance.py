"""Sets of weights around a network: what a certificate quantifies over (SPEC §5).

A tolerance gives each parameter an interval. The box of a network is what these intervals become for the weights as the
theory sees them: a batch norm's scale s = γ/√(σ²+ε) and shift t = β − μ·s vary with γ and β.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pathlift.edges import Convolution, Dense
from pathlift.errors import InputError, MismatchError, Problem, UnsupportedModelError
from pathlift.network import Apply, Expression, Leaf, Network, StateTensor, evaluate, widen
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


def _checked(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise InputError(f"{name} must be a finite number of at least 0, found {value!r}.")
    return float(value)


@dataclass(frozen=True)
class Relative(Tolerance):
    """|θ'_i − θ_i| ≤ r·|θ_i| for every parameter. The only tolerance here that no rescaling changes besides `Pruned`.

    Attributes:
        r: Relative change, at least 0.
    """

    r: float

    def __post_init__(self) -> None:
        """Check the argument."""
        _checked(self.r, "r")

    def intervals(self, network: Network) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Tolerance.intervals`."""
        return _around(network, lambda _, value: self.r * value.abs())


@dataclass(frozen=True)
class Absolute(Tolerance):
    """|θ'_i − θ_i| ≤ r for every parameter.

    Attributes:
        r: Absolute change, at least 0.
    """

    r: float

    def __post_init__(self) -> None:
        """Check the argument."""
        _checked(self.r, "r")

    def intervals(self, network: Network) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Tolerance.intervals`."""
        return _around(network, lambda *_: self.r)


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

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            InputError: One of them is out of range.
        """
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 64:
            raise InputError(f"bits must be a whole number from 2 to 64, found {self.bits!r}.")
        if self.per not in ("channel", "tensor"):
            raise InputError(f"per must be 'channel' or 'tensor', found {self.per!r}.")
        _checked(self.step, "step")

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

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            InputError: One of them is malformed.
        """
        if _checked(self.amount, "amount") > 1:
            raise InputError(f"amount must be a share from 0 to 1, found {self.amount!r}.")
        if not isinstance(self.criterion, Mapping) and self.criterion not in ("path_magnitude", "magnitude"):
            raise InputError(f"criterion must be 'path_magnitude', 'magnitude' or a mapping, found {self.criterion!r}.")

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
    """

    lower: Mapping[Leaf, Tensor]
    upper: Mapping[Leaf, Tensor]
    cancelled: Mapping[Leaf, Tensor]


def point(network: Network, state: Mapping[str, Tensor]) -> Box:
    """Return the box that holds one network.

    Args:
        network: The graph.
        state: Its parameters and buffers.

    Returns:
        The box.
    """
    return _Intervals(dict(state), dict(state), set()).box(network)


@torch.no_grad()
def box(network: Network, tolerance: Tolerance) -> Box:
    """Carry the intervals of the parameters over to the weights of the theory.

    Args:
        network: The network around which the set lies.
        tolerance: The intervals.

    Returns:
        The box.

    Raises:
        UnsupportedModelError: A weight is a nonlinear function of parameters that may vary (weight_norm, say).
    """
    low, high = dict(network.state), dict(network.state)
    for name, (least, most) in tolerance.intervals(network).items():
        low[name], high[name] = least, most
    varying = {name for name in network.parameters if not torch.equal(low[name], high[name])}
    return _Intervals(low, high, varying).box(network)


class _Intervals:
    """Intervals of expressions."""

    def __init__(self, low: dict[str, Tensor], high: dict[str, Tensor], varying: set[str]) -> None:
        self.low, self.high, self.varying = low, high, varying
        self.memo_low: dict[Expression, Tensor] = {}
        self.memo_high: dict[Expression, Tensor] = {}

    def box(self, network: Network) -> Box:
        lower: dict[Leaf, Tensor] = {}
        upper: dict[Leaf, Tensor] = {}
        cancelled: dict[Leaf, Tensor] = {}
        for leaf in network.leaves:
            if leaf.scalar is None:
                lower[leaf], upper[leaf] = self.of(leaf)
                if is_batch_norm_shift(leaf.expression):
                    cancelled[leaf] = torch.maximum(*(product.abs() for product in self._products(leaf.expression)))
        return Box(lower, upper, cancelled)

    def of(self, leaf: Leaf) -> tuple[Tensor, Tensor]:
        if not leaf.requires & self.varying:
            value = torch.as_tensor(evaluate(leaf.expression, self.low, self.memo_low)).double()
            return value, value
        if isinstance(leaf.expression, StateTensor) or leaf.pull_back is not None:  # each element follows one parameter
            one = torch.as_tensor(evaluate(leaf.expression, self.low, self.memo_low)).double()
            two = torch.as_tensor(evaluate(leaf.expression, self.high, self.memo_high)).double()
            return torch.minimum(one, two), torch.maximum(one, two)
        if isinstance(leaf.expression, Apply) and leaf.expression.function is batch_norm_scale:
            return self._scale(leaf.expression)
        if is_batch_norm_shift(leaf.expression):
            return self._shift(leaf.expression)
        names = ", ".join(sorted(leaf.requires & self.varying))
        raise UnsupportedModelError((
            Problem(
                leaf.label.rpartition(".")[0],
                "tolerance",
                "",
                f"'{leaf.label}' is computed from {names} by more than moving and scaling, so an interval of the parameters "
                "gives no interval of the weight.",
                "Make it a plain parameter first (torch.nn.utils.parametrize.remove_parametrizations, prune.remove).",
            ),
        ))

    def _end(self, expression: Expression | None, *, high: bool) -> Tensor | None:
        if expression is None:
            return None
        state, memo = (self.high, self.memo_high) if high else (self.low, self.memo_low)
        found: Tensor = evaluate(expression, state, memo)
        return found

    def _scale(self, expression: Apply) -> tuple[Tensor, Tensor]:
        gamma, variance, epsilon = expression.args
        spread = self._end(variance, high=False)
        return (
            batch_norm_scale(self._end(gamma, high=False), spread, epsilon),
            batch_norm_scale(self._end(gamma, high=True), spread, epsilon),
        )

    def _products(self, expression: Apply) -> tuple[Tensor, Tensor]:
        """Return μ·s for both ends of s."""
        scale, _, mean = expression.args
        center = self._end(mean, high=False)
        assert center is not None
        low, high = self._scale(scale)
        return center.double() * low, center.double() * high

    def _shift(self, expression: Apply) -> tuple[Tensor, Tensor]:
        _, beta, _ = expression.args
        products = self._products(expression)
        least, most = torch.minimum(*products), torch.maximum(*products)
        low, high = (self._end(beta, high=high) for high in (False, True))
        if low is None or high is None:
            return -most, -least
        return low.double() - most, high.double() - least
