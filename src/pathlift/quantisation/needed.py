"""How many bits the weights need for a given error, guaranteed by the path-metric (mathematics §4, §5).

Rounding towards zero to b bits keeps |θ'| ≤ |θ| and all signs, so that ‖Φ(θ) − Φ(θ')‖₁ is known exactly (Lemma 4.2) and all
outputs together change by at most max(‖x‖_∞, 1) times it (Theorem 4.1). One bit more halves the step, but not every single
error, so that every number of bits is looked at, from few to many.

Beside it, for layered perceptrons, what the bound of the literature asks for (Gonon, Brisebarre, Gribonval, Riccietti, 2023):
for ‖x‖_∞ ≤ 1 all outputs together change by at most (W + 1)·W·L²·R^{L−1}·‖θ−θ'‖_∞ (equation (2)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from typing_extensions import override

import pathlift.drawing as drawing
from pathlift.arguments import public
from pathlift.graph.compact import compacted
from pathlift.graph.layers import Layer
from pathlift.graph.network import Network
from pathlift.metric.comparison import compared_with
from pathlift.metric.metric import path_metric
from pathlift.metric.perceptron import layered, layers_of
from pathlift.norm import path_norm
from pathlift.passes.propagate import blame
from pathlift.precision import without_autocast
from pathlift.quantisation.formats import WholeNumbers
from pathlift.quantisation.matrices import matrices_of
from pathlift.quantisation.ranges import grid_of
from pathlift.quantisation.rounding import towards_zero
from pathlift.reading import Inputs, capture
from pathlift.results import Result

WIDEST = 24
"""Bits of the widest grid that is tried: float32 has no more digits."""


@dataclass(frozen=True, repr=False)
class BitsNeeded(Result, line=("bits", "tolerance"), rows=("log10_relative",)):
    """How many bits the weights need.

    Attributes:
        bits: The smallest number whose error is within the tolerance; None when even the widest grid has a larger one.
        tolerance: The largest ‖Φ(θ) − Φ(θ')‖₁/‖Φ(θ)‖₁ that was allowed.
        log10_path_norm: log₁₀ ‖Φ(θ)‖₁.
        log10_relative: Number of bits to log₁₀ of ‖Φ(θ) − Φ(θ')‖₁/‖Φ(θ)‖₁, an upper bound that is exact up to rounding, for all
            that were tried.
        published: How many bits the bound of the literature asks for, for the same change of the outputs on ‖x‖_∞ ≤ 1; None
            where it does not apply.
    """

    bits: int | None
    tolerance: float
    log10_path_norm: float
    log10_relative: Mapping[int, float]
    published: int | None

    @override
    def _draw(self, ax: drawing.Picture) -> None:
        tried = dict(sorted(self.log10_relative.items()))
        ax.plot(list(tried), [10**value for value in tried.values()], "o-", color=drawing.BLUE, label="path-metric / path-norm")
        ax.axhline(self.tolerance, color=drawing.ORANGE, linestyle="--", label=f"tolerance {self.tolerance:g}")
        ax.set(xlabel="bits of a weight", ylabel="relative change of the path-lifting", yscale="log")
        ax.set_xticks(list(tried))
        drawing.legend_above(ax, 2)


@public
@torch.no_grad()
def bits_needed(model: nn.Module | Network, tolerance: float, inputs: Inputs | None = None) -> BitsNeeded:
    """Return how many bits suffice for a path-metric of at most ``tolerance`` times the path-norm.

    Weights of convolutions and linear layers are rounded towards zero to symmetric grids, one for each output channel, that
    reach to its largest weight.

    Args:
        model: A module, or a captured `Network`.
        tolerance: Positive: 0.01 allows ‖Φ(θ) − Φ(θ')‖₁ ≤ 0.01·‖Φ(θ)‖₁.
        inputs: As for `capture`; not needed for a Network.

    Returns:
        The number of bits, and the error of each that was tried.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: An argument is malformed, or a weight has no grid.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.4]]))
        >>> needed = bits_needed(layer, 0.1, (2,))  # 1 and 0 with 2 bits, 1 and 1/3 with 3
        >>> needed.bits, round(10 ** needed.log10_relative[3] * 1.4, 4)
        (3, 0.0667)
    """
    with without_autocast():
        network = capture(model, inputs)
        blame(compacted(network).values())
        matrices = matrices_of(network)
        norm = path_norm(network).log10
        published = _published(network, list(matrices), math.log2(tolerance) + norm / math.log10(2.0))
        relative: dict[int, float] = {}
        for bits in range(2, WIDEST + 1):
            state = dict(network.state)
            for name, laid_out in matrices.items():
                weight = state[name].detach()
                stack = laid_out.split(weight).double()
                grid = grid_of(stack, WholeNumbers(bits), "channel", "minmax")
                state[name] = laid_out.join(grid.values(towards_zero(stack, grid))).to(weight.dtype).reshape(weight.shape)
            metric = path_metric(network, state)
            assert metric.exact
            relative[bits] = metric.log10_upper - norm if metric.upper > 0 else float("-inf")
            if 10 ** relative[bits] <= tolerance:
                return BitsNeeded(bits, tolerance, norm, relative, published)
        return BitsNeeded(None, tolerance, norm, relative, published)


def _published(network: Network, names: Sequence[str], log2_allowed: float) -> int | None:
    """Return the smallest number of bits whose step, the most that a weight moves, keeps (2) within what is allowed."""
    if isinstance(layers_of(network), Layer) or not math.isfinite(log2_allowed):
        return None
    net = layered(compared_with(network, network.state))
    largest = max(float(network.state[name].detach().abs().max()) for name in names)
    if largest == 0.0:
        return 2
    factor = math.log2((net.width + 1) * net.width * net.depth**2) + (net.depth - 1) * math.log2(net.radius)
    steps = factor + math.log2(largest) - log2_allowed  # log₂ of how many reach to the largest weight, at least
    return max(2, 1 + math.ceil(math.log2(2.0**steps + 1.0) if steps < 50 else steps))
