"""The moment bounds: Σ_p |Φ'_p−Φ_p| between two functions of M_k = Σ_p (Φ'_p−Φ_p)^k/Φ_p(g)^(k−1), k even (mathematics §4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from pathlift.graph.averaged import averaged
from pathlift.graph.layers import WeightTensor
from pathlift.metric.common_gauge import CommonGauge
from pathlift.metric.outputs import per_output
from pathlift.metric.quadrature import MARGIN, root_above, root_below
from pathlift.passes.characters import Affinities, CharacterProgram, ComparisonWeights, Moments
from pathlift.passes.differences import DifferenceMomentProgram
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.rounding import SPARE, rounding_factor

BLURRED = 0.1
"""Part of a moment from which on its rounding error makes it be summed anew without cancellation."""

FAINT = -320.0
"""log₂ of what moments lose that fall below the range of float64, relative to M_0: |Φ/Φ(g)|⁸ is 10^−400 for 10^−50."""

OWN = 4
"""Roundings that a character of order k makes at each weight, over k: quotients, roots, powers."""


@dataclass(frozen=True)
class Sum:
    """Numbers per output neuron of the compact graph, known to lie between ``low`` and ``high``, in units of 2**exponent."""

    low: Tensor
    high: Tensor
    exponent: float

    @property
    def log2(self) -> tuple[Tensor, Tensor]:
        """log₂ of both ends."""
        return torch.log2(self.low) + self.exponent, torch.log2(self.high) + self.exponent

    @property
    def blurred(self) -> bool:
        """Whether rounding spoils the sum over the outputs."""
        return bool((self.high - self.low).sum() > 2 * BLURRED * self.high.sum())


@dataclass(frozen=True)
class Sides:
    """A bound from below and one from above.

    Attributes:
        name: Which bound.
        lower: log₂ per output neuron of the compact graph, −inf for 0.
        upper: The same; inf for no bound.
        mass: log₂ of a number that Σ|Φ| + Σ|Φ'| does not exceed, per output neuron, where one is known.
    """

    name: str
    lower: Tensor
    upper: Tensor
    mass: Tensor | None = None


def characters(pair: CommonGauge, families: Sequence[Moments | Affinities]) -> list[tuple[Tensor, float]]:
    """Sum characters over all paths in one pass.

    Args:
        pair: The networks.
        families: The characters.

    Returns:
        For each family a tensor (characters, output neurons) and the exponent of its unit.
    """
    network = averaged(pair.network)

    def attempt(_: torch.dtype) -> list[tuple[Tensor, float]]:
        tracks = propagate(network, CharacterProgram(network, pair, families))
        sums, start = [], 0
        for family in families:
            sums.append(per_output(network, tracks, range(start, start + family.count)))
            start += family.count
        return sums

    return in_range(attempt, torch.float64, *pair.values)


@dataclass(frozen=True)
class _Further(Moments):
    """The characters of the moments above some that are known, and Φ(g), whose range the others follow.

    Attributes:
        above: The largest k that is known.
    """

    above: int

    @property
    def rows(self) -> dict[int, tuple[int, int]]:
        """See `Moments.rows`."""
        rows, start = {0: (0, 1)}, 1
        for k in range(self.above + 2, self.order + 1, 2):
            rows[k] = (start, k + 1)
            start += k + 1
        return rows

    def of(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> Iterator[tuple[int, Tensor]]:
        """See `Moments.of`."""
        known = (self.above // 2 + 1) ** 2  # characters up to M_k: 1 + 3 + 5 + …
        for number, character in super().of(weight, a, b, *extras):
            if number == 0 or number >= known:
                yield max(number - known + 1, 0), character


def moment_sums(pair: CommonGauge, highest: int, g: ComparisonWeights, *, above: int = -1) -> tuple[dict[int, Sum], int]:
    """Compute M_0, M_2, … with their rounding errors.

    M_k = Σ_j C(k,j)·(−1)^j·Σ Φ^j·Φ'^(k−j)/Φ(g)^(k−1), which cancels for networks near each other: see `near_moment`. A
    character of odd powers is at most the geometric mean of its neighbours in magnitude (Cauchy–Schwarz), which bounds its
    rounding error.

    Args:
        pair: The networks.
        highest: The largest k, even.
        g: The comparison weights.
        above: The largest k that is known already, −1 for none: only moments above it are computed.

    Returns:
        The sums by k, and how many sums over all paths they took.
    """
    if above >= highest:
        return {}, 0
    family = Moments(highest, g) if above < 0 else _Further(highest, g, above)
    ((sums, exponent),) = characters(pair, [family])
    return {k: moment for k, moment in summed(family, sums, exponent, pair).items() if k > above}, family.count


def summed(family: Moments, sums: Tensor, exponent: float, pair: CommonGauge) -> dict[int, Sum]:
    """Make moments from characters; see `moment_sums`.

    Args:
        family: The moments.
        sums: Of the characters, (characters, output neurons).
        exponent: Of their unit.
        pair: The networks.

    Returns:
        The moments by k.
    """
    moments: dict[int, Sum] = {}
    rounding = rounding_factor(pair.network, tracks=1, spare=SPARE + OWN * family.order)
    for order, (start, size) in family.rows.items():
        tensor = sums[start : start + size]
        if order == 0:
            moments[0] = Sum(tensor[0] * (1 - rounding), tensor[0] * (1 + rounding), exponent)
            continue
        sizes = tensor.abs()
        sizes[1::2] = torch.sqrt(sizes[:-1:2] * sizes[2::2])
        signs = torch.tensor(
            [comb(order, j) * (-1.0) ** j for j in range(order + 1)], dtype=torch.float64, device=tensor.device
        )
        middle = (signs[:, None] * tensor).sum(0)
        error = 1.01 * rounding * (signs.abs()[:, None] * sizes).sum(0)
        moments[order] = Sum((middle - error).clamp(min=0.0), (middle + error).clamp(min=0.0), exponent)
    return moments


def near_moment(pair: CommonGauge, order: int, g: ComparisonWeights) -> tuple[Sum, int]:
    """Compute M_k by the recursion in which only Φ' − Φ itself cancels, which takes far more products.

    Args:
        pair: The networks.
        order: k, even, at least 2.
        g: The comparison weights.

    Returns:
        The sum, and how many sums over all paths it took.
    """
    network = averaged(pair.network)

    def attempt(_: torch.dtype) -> tuple[Tensor, float]:
        program = DifferenceMomentProgram(network, pair, order, g)
        return per_output(network, propagate(network, program), [order, 2 * order])

    tensor, exponent = in_range(attempt, torch.float64, *pair.values)
    error = 1.01 * rounding_factor(network, tracks=order + 1, spare=SPARE + OWN * order) * tensor[1]
    return Sum((tensor[0] - error).clamp(min=0.0), (tensor[0] + error).clamp(min=0.0), exponent), (order + 1) ** 2 + order


def moment_bounds(sums: dict[int, Sum], *, covered: float | None = None) -> Sides:
    """Turn moments into bounds.

    Args:
        sums: M_0, M_2, … M_k.
        covered: |Φ_p| and |Φ'_p| are at most so many times Φ_p(g), for every path; None when it is not known.

    Returns:
        The bounds per output neuron.
    """
    orders = sorted(sums)  # M_{2j} is the moment ∫s^j dμ of the measure of mass Φ_p(g) at s = (ΔΦ_p/Φ_p(g))²
    unit = torch.log2((sums[0].low + sums[0].high) / 2) + sums[0].exponent
    faint = unit + FAINT
    step = torch.logaddexp2(torch.log2((sums[2].low + sums[2].high) / 2) + sums[2].exponent, faint) - unit
    known = []
    for power, order in enumerate(orders):
        low, high = sums[order].log2
        if order:
            low, high = torch.where(low > faint + 1, low - 1e-10, -math.inf), torch.logaddexp2(high, faint)
        shift = unit + power * step  # s in units of 2**step, so that no power of it leaves the range
        known.append((torch.exp2(low - shift) * (1 - MARGIN), torch.exp2(high - shift) * (1 + MARGIN)))
    nothing = sums[0].high == 0
    root = unit + step / 2
    upper = torch.log2(root_above(known[: 2 * (len(known) // 2)])) + root
    lower = torch.full_like(upper, -math.inf)
    if len(known) > 2:
        lower = torch.log2(root_below(known[1 : 1 + 2 * ((len(known) - 1) // 2)])) + root
    upper = torch.where(nothing, -math.inf, torch.nan_to_num(upper, nan=math.inf, neginf=-math.inf, posinf=math.inf))
    lower = torch.where(nothing, -math.inf, torch.nan_to_num(lower, nan=-math.inf, neginf=-math.inf, posinf=-math.inf))
    mass = None if covered is None else sums[0].log2[1] + math.log2(2 * covered)
    return Sides(f"{orders[-1]} moments", lower, upper, mass)
