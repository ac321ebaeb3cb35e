"""What pruning and quantisation would cost, and how far other networks are: the numbers that a report keeps of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pathlift.graph.calling import Samples
from pathlift.graph.network import Network
from pathlift.metric import Estimate, PathMetric, path_metric
from pathlift.passes.forward import feed_of, flat_outputs, forward
from pathlift.pruning import CRITERIA, Batch, prune
from pathlift.pruning.catalogue import RECOMMENDED
from pathlift.quantisation import rounded_to_nearest
from pathlift.reading.second import Other, other_state
from pathlift.results import Result

AT_ONCE = 32
"""Samples that run through the network together."""


@dataclass(frozen=True, repr=False)
class PruningCost(Result, line=("amount", "mass_kept", "log10_relative", "accuracy")):
    """What is lost when so many weights go.

    Attributes:
        amount: Share of the weights that go.
        criterion: By which.
        mass_kept: Share of the path-norm that is left.
        log10_relative: log₁₀ ‖Φ(θ) − Φ(θ')‖₁/‖Φ(θ)‖₁, exact.
        collapsed: Tensors through which no path runs any more.
        names: Tensors that were pruned.
        kept: Share of the weights of each that stay.
        accuracy: On the data, when there are some with classes.
    """

    amount: float
    criterion: str
    mass_kept: float
    log10_relative: float
    collapsed: tuple[str, ...]
    names: tuple[str, ...]
    kept: tuple[float, ...]
    accuracy: float | None = None


@dataclass(frozen=True, repr=False)
class QuantisationCost(Result, line=("bits", "bytes_after", "log10_upper", "accuracy")):
    """What is lost when weights have so few bits.

    Attributes:
        bits: Of a weight.
        rounding: How.
        bytes_before: Of all parameters and buffers.
        bytes_after: With weights packed to their bits.
        log10_lower: log₁₀ of a lower bound on ‖Φ(θ) − Φ(θ')‖₁/‖Φ(θ)‖₁.
        log10_upper: The same of an upper bound.
        names: Tensors that were rounded.
        errors: ‖Δ‖₂/‖θ‖₂ of each.
        accuracy: On the data, when there are some with classes.
    """

    bits: int
    rounding: str
    bytes_before: int
    bytes_after: int
    log10_lower: float
    log10_upper: float
    names: tuple[str, ...]
    errors: tuple[float, ...]
    accuracy: float | None = None


@dataclass(frozen=True, repr=False)
class Compared(
    Result,
    line=("name", "log10_lower", "log10_upper", "accuracy"),
    shows=("name", "log10_lower", "log10_upper", "exact", "method", "estimate", "log10_relative", "accuracy"),
):
    """How far another network of the same architecture is.

    Attributes:
        name: Of the other network.
        metric: ‖Φ(θ) − Φ(θ')‖₁; what is shown of it are its bounds and the estimate.
        log10_relative: log₁₀ of its upper bound over ‖Φ(θ)‖₁.
        accuracy: Of the other network on the data, when there are some with classes.
    """

    name: str
    metric: PathMetric
    log10_relative: float
    accuracy: float | None = None

    @property
    def log10_lower(self) -> float:
        """log₁₀ of the lower bound on the path-metric."""
        return self.metric.log10_lower

    @property
    def log10_upper(self) -> float:
        """log₁₀ of the upper bound."""
        return self.metric.log10_upper

    @property
    def exact(self) -> bool:
        """Whether both are the value, up to rounding."""
        return self.metric.exact

    @property
    def method(self) -> str:
        """How they were found."""
        return self.metric.method

    @property
    def estimate(self) -> Estimate | None:
        """The estimate from sampled paths; None where the metric is exact, or none was asked for."""
        return self.metric.sampled


def pruned_by(network: Network, amounts: Sequence[float], data: Batch | None) -> tuple[PruningCost, ...]:
    """Prune by the recommended criterion, each time from the start, with scores that are computed once.

    Args:
        network: The network.
        amounts: Shares of the weights that go.
        data: Samples with classes, to measure accuracy on.

    Returns:
        One for each amount.
    """
    criterion = CRITERIA[RECOMMENDED]
    scores = criterion.scores(network) if amounts else {}
    costs = []
    for amount in amounts:
        smaller, report = prune(network, amount=amount, criterion=scores, selection=criterion.selection)
        costs.append(
            PruningCost(
                amount,
                f"{criterion.name}, in one round",
                report.mass_kept,
                report.log10_cost - report.log10_path_norm if report.log10_path_norm > -math.inf else -math.inf,
                report.collapsed,
                tuple(tensor.name for tensor in report.tensors),
                tuple(tensor.kept / tensor.weights for tensor in report.tensors),
                accuracy(smaller, data),
            )
        )
    return tuple(costs)


def quantised_to(
    network: Network, several: Sequence[int], x: Samples | None, data: Batch | None
) -> tuple[QuantisationCost, ...]:
    """Round to the nearest number of grids that reach to the largest weight of each channel.

    Args:
        network: The network.
        several: Bits of a weight, one number after the other.
        x: Inputs to measure statistics on; None for those that the model holds.
        data: Samples with classes, to measure accuracy on.

    Returns:
        The cost of each.
    """
    costs = []
    for bits, (rounded, report) in zip(several, rounded_to_nearest(network, several, x), strict=True):
        metric, norm = report.path_metric, report.log10_path_norm
        costs.append(
            QuantisationCost(
                bits,
                report.rounding,
                report.bytes_before,
                report.bytes_after,
                metric.log10_lower - norm if norm > -math.inf else -math.inf,
                metric.log10_upper - norm if norm > -math.inf else -math.inf,
                tuple(tensor.name for tensor in report.tensors),
                tuple(tensor.relative_error for tensor in report.tensors),
                accuracy(rounded, data),
            )
        )
    return tuple(costs)


def compared_with(
    network: Network, name: str, other: Other, samples: int, log10_path_norm: float, data: Batch | None
) -> Compared:
    """Measure how far another network is.

    Args:
        network: The network.
        name: Of the other one.
        other: The other one.
        samples: Paths to sample for an estimate.
        log10_path_norm: log₁₀ ‖Φ(θ)‖₁.
        data: Samples with classes, to measure accuracy on.

    Returns:
        What was found.
    """
    metric = path_metric(network, other, estimate=samples, generator=0)
    relative = metric.log10_upper - log10_path_norm if log10_path_norm > -math.inf else math.inf
    second = accuracy(replace(network, state={**network.state, **other_state(network, other)}), data) if data else None
    return Compared(name, metric, relative, second)


@torch.no_grad()
def accuracy(network: Network, data: Batch | None) -> float | None:
    """Return the share of samples whose class is the largest output; None without classes."""
    if data is None:
        return None
    values = network.values()
    right = 0
    for part in data.split(AT_ONCE):
        outputs = flat_outputs(network, forward(network, values, feed_of(network, part.x), network.dtype), len(part))
        right += int((outputs.argmax(1).cpu() == part.y.cpu()).sum())
    return right / len(data)
