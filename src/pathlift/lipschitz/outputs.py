"""Bounds on |R_θ(x) − R_θ'(x')|, sample by sample and output by output: one function per bound (mathematics §5).

Each takes a comparison (θ with another network, or with a set) and the inputs, and returns (samples, outputs), rounded up.
Those through path-metrics are made of the difference tracks of mathematics §4, fed with |x| or with ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.errors import InputError, MismatchError
from pathlift.metric import pivot as pivot_sums
from pathlift.metric.comparison import Comparison, compact
from pathlift.passes.box import Box
from pathlift.passes.deviation import Deviation, Side
from pathlift.passes.enclosure import Enclosure
from pathlift.passes.forward import flat_outputs
from pathlift.passes.programs import TELESCOPING, DifferenceProgram, NormProgram, Values
from pathlift.passes.rounded import in_chunks, never_nan, output_count, rounded_up
from pathlift.passes.tracks import Program


@dataclass(frozen=True)
class Ball:
    """A batch of inputs, each with everything around it.

    Attributes:
        feed: Input layer to x, float64, (samples, *shape).
        radius: ‖x' − x‖_∞ at most.
    """

    feed: Mapping[str, Tensor]
    radius: float

    @property
    def sizes(self) -> dict[str, Tensor]:
        """|x| by input layer."""
        return {name: x.abs() for name, x in self.feed.items()}

    @property
    def largest(self) -> Tensor:
        """‖x‖_∞ of each sample, (samples, 1)."""
        return torch.stack([x.abs().flatten(1).amax(1) for x in self.feed.values()]).amax(0)[:, None]

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(next(iter(self.feed.values())))


def _around(comparison: Comparison, radius: float) -> Tensor | float:
    """How far R_θ' moves when its input moves by ``radius``: radius·‖Φ^I(θ')‖₁ per output, over the set."""
    if radius == 0.0:
        return 0.0
    thin = compact(comparison)
    most = thin.most
    norms = rounded_up(thin.network, lambda dtype: NormProgram(thin.network, most, dtype, from_biases=False), 0, most)
    return radius * norms * (1.0 + 4 * 2.0**-53)


def pivot(comparison: Comparison, ball: Ball) -> Tensor:
    """‖x‖_∞·‖Φ^I(θ)−Φ^I(θ')‖₁ + ‖Φ^H(θ)−Φ^H(θ')‖₁ per output, through the pivot: (15) carried over to any pair.

    Linear in ‖x‖_∞, so two passes fed with ones on the compact network serve the whole batch.

    Args:
        comparison: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    thin = compact(comparison)
    from_inputs = pivot_sums.difference(thin, None, from_biases=False)
    from_biases = pivot_sums.difference(thin, None, from_inputs=False)
    there = (ball.largest > 0) & (from_inputs > 0)  # 0·inf is 0 here, and no product of positive numbers is 0
    scaled = torch.where(there, (ball.largest * from_inputs).clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return (scaled + from_biases) * (1.0 + 4 * 2.0**-53) + _around(comparison, ball.radius)


def theorem_4_1(comparison: Comparison, ball: Ball) -> Tensor:
    """Theorem 4.1 (5), in the form of Theorem B.1 (15), from which it follows: needs weights whose signs agree.

    Args:
        comparison: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).

    Raises:
        MismatchError: A weight changes its sign.
    """
    flipped = comparison.flipped()
    if flipped is not None:
        weight, where = flipped
        index = tuple(int(coordinate) for coordinate in torch.nonzero(where)[0])
        raise MismatchError(
            f"Theorem 4.1 needs weights whose signs agree; '{weight.label}' changes its sign in {int(where.sum())} of "
            f"{where.numel()} places, first at {index}. Use kind='pivot' or kind='per_input', which hold for any pair."
        )
    return pivot(comparison, ball)


def per_input(comparison: Comparison, ball: Ball) -> Tensor:
    """Σ_p |ΔΦ_p|·|x̄(p₀)| through the pivot: the difference track fed with |x|; any pair.

    Args:
        comparison: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    bound = in_chunks(comparison.network, ball.sizes, lambda feed: pivot_sums.difference(comparison, feed))
    return bound + _around(comparison, ball.radius)


def telescoping(comparison: Comparison, ball: Ball) -> Tensor:
    """D = f(D; |θ'|) + f(A; |θ−θ'|) fed with |x|, in both orders for a pair, the smaller entry by entry; any pair.

    Args:
        comparison: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    if comparison.others is not None:
        orders = [(comparison.values, comparison.others), (comparison.others, comparison.values)]
    else:
        orders = [
            (
                comparison.values,
                {weight: _signed_sum(value, comparison.gap[0][weight]) for weight, value in comparison.values.items()},
            )
        ]
    bounds = []
    for first, second in orders:

        def make(dtype: torch.dtype, first: Values = first, second: Values = second) -> Program:
            return DifferenceProgram(
                comparison.network, first, second, dtype, comparison.changed, feed=ball.sizes, through=TELESCOPING
            )

        bounds.append(rounded_up(comparison.network, make, 1, first, second))
    return torch.stack(bounds).amin(0) + _around(comparison, ball.radius)


def _signed_sum(value: Tensor, gap: Tensor) -> Tensor:
    """Θ moved outwards by all it may move: |θ| + Δ, with the sign of θ."""
    return torch.where(value < 0, value.double() - gap, value.double() + gap)


def three_step(comparison: Comparison, ball: Ball) -> Tensor:
    """Both outer steps of θ → θ·1[θθ'>0] → θ'·1[θθ'>0] → θ' exact, the middle one by Hellinger, fed with |x|; any pair.

    Args:
        comparison: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).

    Raises:
        InputError: ``comparison`` is a set.
    """
    if comparison.others is None:
        raise InputError("kind='three_step' compares two networks, not a set. Use kind='per_input' or kind='activation'.")
    return pivot_sums.three_step(comparison, ball.sizes) + _around(comparison, ball.radius)


def activation(comparison: Comparison, ball: Ball) -> Tensor:
    """D = f(D; |θ'|) + f(|u(θ, x)|; |θ−θ'|) with the real activations, both orders joined neuron by neuron; any pair.

    Args:
        comparison: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    network = comparison.network
    if not comparison.changed and ball.radius == 0.0:
        return torch.zeros((), dtype=torch.float64, device=network.device).expand(ball.batch, output_count(network)).clone()
    sides: tuple[Side, ...] = (Side(comparison.values, comparison.most),)
    if comparison.others is not None and ball.radius == 0.0:
        sides = (Side(comparison.values, comparison.others), Side(comparison.others, comparison.values))

    def bounded(feed: Mapping[str, Tensor]) -> Tensor:
        for dtype in dict.fromkeys((network.dtype, torch.float64)):
            deviations = Deviation(network, sides, comparison.gap, comparison.changed, feed, ball.radius, dtype).bounds()
            bound = flat_outputs(network, deviations, len(next(iter(feed.values())))).double()
            if bool(torch.isfinite(bound).all()):
                break
        return never_nan(bound)

    return in_chunks(network, ball.feed, bounded)


def enclosure(comparison: Comparison, ball: Ball) -> Tensor:
    """The distance of R_θ(x) to the farther end of its linear enclosure over the set (`pathlift.passes.enclosure`).

    Args:
        comparison: The comparison; a pair stands for the box between both networks.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    network, weights = comparison.network, comparison.box
    if weights is None:
        assert comparison.others is not None
        ends = [(value.double(), comparison.others[weight].double()) for weight, value in comparison.values.items()]
        same = [bool(torch.equal(*pair)) for pair in ends]
        lower = {
            weight: a if eq else torch.minimum(a, b) for weight, (a, b), eq in zip(comparison.values, ends, same, strict=True)
        }
        upper = {
            weight: a if eq else torch.maximum(a, b) for weight, (a, b), eq in zip(comparison.values, ends, same, strict=True)
        }
        weights = Box(lower, upper)
    alone = {weight: value.double() for weight, value in comparison.values.items()}
    center = Enclosure(network, Box(alone, alone), ball.feed, 0.0, None, refine=False)
    least, most = (
        flat_outputs(network, {name: getattr(center.intervals[name], end) for name in network.outputs}, ball.batch)
        for end in ("low", "high")
    )
    walls = Enclosure(network, weights, ball.feed, ball.radius, None, refine=False)
    pieces = []
    for name in network.outputs:
        layer = network.layer[name]
        unit = torch.eye(math.prod(layer.shape), dtype=torch.float64, device=network.device).reshape(-1, *layer.shape)
        unit = unit.expand(ball.batch, *unit.shape)
        pieces.append((walls.lower({name: unit}), -walls.lower({name: -unit})))
    low, high = torch.cat([piece[0] for piece in pieces], 1), torch.cat([piece[1] for piece in pieces], 1)
    distance = torch.maximum(most - low, high - least) * (1.0 + 4 * 2.0**-53)
    return never_nan(torch.where((center.lost | walls.lost)[:, None], math.inf, distance))
