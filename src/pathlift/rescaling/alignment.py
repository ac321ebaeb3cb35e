"""θ' in the gauge of θ, weight by weight of the graph, and what the rounding of it may have changed (mathematics §4, "Gauge").

A rescaling that is only computed is none: λ∘θ' as rounded is another network than θ'. So the logarithms of λ are taken from a
grid on which they add up exactly, each weight is multiplied once by a factor, and how often it was rounded is counted: not at
all where all factors are powers of two, at most `ROUNDINGS` times otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.programs import Values
from pathlift.passes.rounding import UNIT
from pathlift.rescaling.constraints import ScaleConstraints, scale_constraints
from pathlift.rescaling.fit import GaugeFit
from pathlift.rescaling.relations import Solution

ROUNDINGS = 8
"""Units by which a factor and a product with it may be off: two exponentials, their products, and room."""

GRID, COARSE = 50, 44
"""Bits of a logarithm in units of the largest; and where classes have the scales of several groups."""

WIDEST = 800.0
"""The largest log₂ of a factor that is applied."""

LEAST, MOST = 2.0**-1000, 2.0**1000
"""Where rescaled weights must stay: none may lose digits."""


@dataclass(frozen=True, eq=False)
class AlignedWeights:
    """λ∘θ'.

    Attributes:
        values: Weight tensor to weights; those that λ changes are float64.
        roundings: By how many units of float64 a weight may be off; 0 when λ∘θ' is exact.
    """

    values: Values
    roundings: int


def exact_scales(solution: Solution, free: Tensor, *, whole: bool = False) -> Tensor:
    """Return s = B·g for the g nearest to given ones with which s, and differences of two entries of it, are exact.

    Args:
        solution: B.
        free: g, log₂ factors by group.
        whole: Take whole numbers, so that all factors are powers of two.

    Returns:
        s by class; 0 everywhere when B has entries that are no fractions of small numbers.
    """
    entries = torch.unique(solution.entries).tolist()
    fractions = [Fraction(entry).limit_denominator(64) for entry in entries]
    if any(abs(float(fraction) - entry) > 1e-12 for fraction, entry in zip(fractions, entries, strict=True)):
        return torch.zeros(solution.count, dtype=torch.float64, device="cpu")
    multiple = math.lcm(*(fraction.denominator for fraction in fractions))
    sums = torch.zeros(solution.count, dtype=torch.float64, device="cpu")
    sums.index_add_(0, solution.rows, (solution.entries * free[solution.columns]).abs())
    reach = max(1.0, float(sums.max()), float(free.abs().max()) if len(free) else 0.0)
    step = 1.0 if whole else 2.0 ** (math.frexp(reach)[1] - (GRID if solution.plain else COARSE))
    taken = torch.round(free / (multiple * step)) * (multiple * step)
    return torch.round(solution.scales(taken) / step) * step


class RescaledWeights(Mapping[WeightTensor, Tensor]):
    """The weights λ∘θ of a graph, made when they are read; those that no λ changes are handed on as they are.

    Attributes:
        before: θ.
        scales: Exact log₂ factors by class (`exact_scales`), applied one after the other.
        exact: Whether all factors are powers of two.
    """

    def __init__(self, constraints: ScaleConstraints, values: Values, scales: Sequence[Tensor]) -> None:
        """Take weights and factors.

        Args:
            constraints: What the function of the graph asks of scales.
            values: Weight tensor to weights.
            scales: See above.
        """
        self.constraints = constraints
        self.before = values
        self.scales = tuple(logs for logs in scales if bool(logs.any()))
        self._factors: dict[WeightTensor, tuple[Tensor, Tensor]] = {}
        self.exact = all(bool((logs == logs.round()).all()) for logs in self.scales)

    def _logs(self, weight: WeightTensor) -> list[Tensor]:
        """Return the log₂ factors of a weight tensor that are not 0 everywhere, laid out: one for all taps of a kernel."""
        scaling = self.constraints.weights.get(weight)
        if scaling is None:
            return []
        differences = (scales[scaling.above] - scales[scaling.below] for scales in self.scales)
        return [logs for logs in differences if bool(logs.any())]

    def _steps(self, weight: WeightTensor) -> Iterator[Tensor]:
        """Yield the weights of a weight tensor after each rescaling of it, float64."""
        value = self.before[weight]
        for logs in self._logs(weight):
            factor = self.constraints.weights[weight].join(torch.exp2(logs), weight.shape)
            value = value.double() * factor.to(value.device)
            yield value

    def factors(self, weight: WeightTensor) -> tuple[Tensor, Tensor]:
        """Return what both ends of a weight that scales multiply it with, as views of its shape where they can.

        Args:
            weight: The weight tensor.

        Returns:
            Two float64 tensors of its shape.
        """
        if weight not in self._factors:
            scaling, device = self.constraints.weights[weight], self.before[weight].device
            above, below = (
                part[classes].to(device) for part, classes in zip(self._parts, (scaling.above, scaling.below), strict=True)
            )
            self._factors[weight] = scaling.join(above, weight.shape), scaling.join(below, weight.shape)
        return self._factors[weight]

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        """What the classes above and below multiply with."""
        ones = torch.ones(self.constraints.solution.count, dtype=torch.float64, device="cpu")
        up, down = ones, ones
        for scales in self.scales:
            up, down = up * torch.exp2(scales), down * torch.exp2(-scales)
        return up, down

    def __getitem__(self, weight: WeightTensor) -> Tensor:
        """Return the weights of a weight tensor, float64 where λ changes them."""
        value = self.before[weight]
        for rescaled_once_more in self._steps(weight):
            value = rescaled_once_more
        return value

    def __iter__(self) -> Iterator[WeightTensor]:
        """Iterate over weight tensors."""
        return iter(self.before)

    def __len__(self) -> int:
        """Return the number of weight tensors."""
        return len(self.before)

    def in_range(self) -> bool:
        """Whether no weight overflows or loses digits on the way, and no factor is beyond what a float holds."""
        if any(float(scales.abs().max()) > WIDEST for scales in self.scales):
            return False
        return all(self._surely_in_range(weight) or self._in_range(weight) for weight in self)

    def _surely_in_range(self, weight: WeightTensor) -> bool:
        """Whether no number of the type of a weight tensor could leave the range; float32 and narrower ones rarely can."""
        if self.before[weight].dtype == torch.float64 or not self.before[weight].is_floating_point():
            return False
        if self.before[weight].numel() == 0:
            return True
        limits, scaling = torch.finfo(self.before[weight].dtype), self.constraints.weights.get(weight)
        low, high = math.log2(limits.smallest_normal * limits.eps), math.log2(limits.max)
        for scales in self.scales if scaling is not None else ():
            assert scaling is not None
            above, below = scales[scaling.above], scales[scaling.below]  # the extremes of all differences, not one by one
            low, high = low + float(above.min() - below.max()), high + float(above.max() - below.min())
            if not (low >= math.log2(LEAST) and high <= math.log2(MOST)):
                return False
        return True

    def _in_range(self, weight: WeightTensor) -> bool:
        for value in self._steps(weight):
            sizes = torch.where(value == 0, 1.0, value.abs())
            if value.numel() and not (float(sizes.min()) >= LEAST and float(sizes.max()) <= MOST):
                return False
        return True


def rescaled(constraints: ScaleConstraints, values: Values, scales: Tensor) -> AlignedWeights | None:
    """Rescale the weights of a graph.

    Args:
        constraints: What its function asks of scales.
        values: Weight tensor to weights.
        scales: Exact log₂ factors by class.

    Returns:
        The weights, None when one of them would leave the range of float64.
    """
    weights = RescaledWeights(constraints, values, [scales])
    if not weights.in_range():
        return None
    return AlignedWeights(dict(weights), 0 if weights.exact else ROUNDINGS)


def depth_of(network: Network) -> int:
    """Return the largest number of weights on a path, the bias at its start included.

    Args:
        network: The graph.

    Returns:
        The number.
    """
    depth: dict[str, int] = {}
    for layer in network.layers:
        depth[layer.name] = 1 + max((depth[connection.source] for connection in layer.connections), default=0)
    return 1 + max(depth[name] for name in network.outputs)


def lifting_error(network: Network, roundings: int) -> float:
    """Return by what part of Σ|Φ'| rounded weights may have moved Φ'.

    A path is a product of at most ``depth`` weights, each off by a factor 1 + e with |e| ≤ r·u, r roundings. So Φ_p is off by a
    factor between (1 − r·u)^depth and (1 + r·u)^depth: by at most 1.01·r·depth·u for every depth that a network has.

    Args:
        network: The graph.
        roundings: Units of float64 by which each weight may be off.

    Returns:
        The part, 0 when nothing was rounded.
    """
    return 1.01 * roundings * depth_of(network) * UNIT[torch.float64]


# ---- θ' in the gauge of θ

WHOLE = 1e-6
"""A factor this near to a power of two, in log₂, is taken to be it."""

WORTH = 0.5
"""An alignment is made when it brings the mean |log₂ θ'/θ| below this part of what it was.

Groups explain some of the difference of any two networks; only more than that speaks for a rescaling."""


def gauge_fit(network: Network, state: Mapping[str, Tensor]) -> GaugeFit:
    """Compare θ with θ', weight by weight.

    Args:
        network: The network with θ.
        state: θ' by canonical name.

    Returns:
        Both; medians and regressions are computed when they are asked for, and once.
    """
    constraints = scale_constraints(network)
    return GaugeFit(constraints.scalings, constraints.upwards, constraints.solution, network.state, state)


def aligned(network: Network, state: Mapping[str, Tensor], others: Values, fit: GaugeFit | None = None) -> AlignedWeights:
    """Bring the weights of θ' into the gauge of θ if the two differ in gauge; leave them as they are when they do not.

    Args:
        network: The network with θ.
        state: θ' by canonical name.
        others: θ' by weight tensor, of the network or of its compact form.
        fit: Both, where they were compared before.

    Returns:
        λ∘θ', and how often its weights were rounded on the way.
    """
    if all(value is network.state[name] for name, value in state.items()):
        return AlignedWeights(others, 0)
    fit = fit or gauge_fit(network, state)
    before, after = fit.disagreement
    if not after < WORTH * before:
        return AlignedWeights(others, 0)
    constraints = scale_constraints(network)
    scales = exact_scales(constraints.solution, nearest_factors(fit))
    return rescaled(constraints, others, scales) or AlignedWeights(others, 0)


def nearest_factors(fit: GaugeFit) -> Tensor:
    """Return log₂ λ that brings θ' nearest to θ; a power of two where it is one up to rounding, so that no digit changes."""
    free = -fit.factors
    return torch.where((free - free.round()).abs() < WHOLE, free.round(), free)
