"""Choices of a representative in an orbit of rescalings: normal, balanced, equalised, path-conditioned (SPEC §4, §7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.network import Network
from pathlift.passes.programs import NormProgram
from pathlift.passes.propagate import Tracks, blame, in_range, propagate
from pathlift.symmetry.balance import Logarithmic, balanced
from pathlift.symmetry.couplings import connected, coupling, sums
from pathlift.symmetry.fit import projected
from pathlift.symmetry.kernel import kernel_diagonal
from pathlift.symmetry.tying import Tied

EQUAL_ENOUGH = 1e-3
"""log₂ of the ratio of two ranges at which equalisation ends."""


@dataclass(frozen=True, eq=False)
class Gauge:
    """Log₂ factors by group, and how good they are: see `pathlift.symmetry.groups.BalancedState`."""

    free: Tensor
    imbalance: float
    left: tuple[int, ...]
    steps: int


@torch.no_grad()
def normal(network: Network, tied: Tied) -> Tensor:
    """Return the factors that bring the largest path activation of each group to 1 (SPEC §4, N(θ)).

    Args:
        network: The network.
        tied: Its symmetries.

    Returns:
        log₂ λ, shape (groups,).

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    compact = network.compact
    values = compact.values()

    def attempt(_: torch.dtype) -> dict[str, Tracks]:
        return propagate(compact, NormProgram(compact, values, torch.float64), keep=True)

    tracks = in_range(attempt, torch.float64, values)
    largest = torch.full((tied.solution.count,), -torch.inf, dtype=torch.float64)
    for name, labels in tied.labels.items():
        found = tracks[name][0]
        if found is not None:
            classes = tied.solution.classes[labels].expand(found.tensor.shape)
            largest.scatter_reduce_(0, classes.reshape(-1), found.log2().cpu().reshape(-1), "amax")
    largest[0] = 0.0
    return -projected(tied.solution, torch.where(largest.isinf(), torch.nan, largest))


def balance(network: Network, tied: Tied, p: float) -> Gauge:
    """Minimise Σ|θ_i|^p over the orbit.

    Args:
        network: The network.
        tied: Its symmetries.
        p: Positive power.

    Returns:
        The gauge.

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    state = network.state
    blame(network.values())
    chosen = [name for name in tied.scalings if name in network.parameters]
    masses = {name: _power(state[name].detach(), p) for name in chosen}
    return _minimised(tied, masses, p)


def conditioned(network: Network, tied: Tied) -> Gauge:
    """Minimise the log-det divergence between diag(∂Φᵀ∂Φ) and the identity over the orbit.

    Args:
        network: The network.
        tied: Its symmetries.

    Returns:
        The gauge.

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    diagonal = {name: value for name, value in kernel_diagonal(network).items() if name in tied.scalings}
    return _minimised(tied, diagonal, -2.0, logarithmic=True)


def _power(tensor: Tensor, p: float) -> Tensor:
    wide = tensor.abs().double()
    return wide.square_() if p == 2.0 else wide.pow_(p)


def _minimised(tied: Tied, masses: Mapping[str, Tensor], power: float, *, logarithmic: bool = False) -> Gauge:
    """Minimise Σ mass·2^(power·r), or n·log of it plus the sum of the log₂ factors of all n weights with a mass."""
    solution = tied.solution
    couplings = [coupling(tied.scalings[name], mass) for name, mass in masses.items()]
    live = connected(couplings, solution.count)
    kept = [part.without(~live) for part in couplings]
    objective: Logarithmic | None = None
    if logarithmic:
        counts = [coupling(tied.scalings[name], (mass > 0).double()).without(~live) for name, mass in masses.items()]
        coming, going = sums(counts, torch.zeros(solution.count, dtype=torch.float64))
        objective = Logarithmic(float(coming.sum()), -solution.pulled_back(coming - going))
    found = balanced(kept, solution, power, objective)
    dead = torch.unique(solution.columns[~live[solution.rows]])
    return Gauge(found.free, found.imbalance, tuple(dead.tolist()), found.steps)


def equalized(network: Network, tied: Tied) -> Tensor:
    """Return the factors that give every channel equal ranges of incoming and outgoing weights.

    Only weights of two or more dimensions have a range: biases and batch norms stay in floating point. A channel without
    outgoing (incoming) weights gets the range of the largest channel of its tensor.

    Args:
        network: The network.
        tied: Its symmetries.

    Returns:
        log₂ λ, shape (groups,).

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    blame(network.values())
    solution = tied.solution
    ends: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, scaling in tied.scalings.items():
        tensor = network.state[name].detach()
        if name in network.parameters and tensor.dim() > 1:
            sizes = torch.log2(scaling.split(tensor.abs()).double().cpu())
            if scaling.above.shape[3] == scaling.below.shape[3] == 1:
                sizes = sizes.amax(3, keepdim=True)
            ends.append((scaling.above, scaling.below, sizes))
    free = torch.zeros(solution.dimension, dtype=torch.float64)
    single = torch.bincount(solution.columns, minlength=solution.dimension) == 1
    for _ in range(200):
        scales = solution.scales(free)
        coming, going = (torch.full((solution.count,), -torch.inf, dtype=torch.float64) for _ in range(2))
        widest = coming.clone()
        for above, below, sizes in ends:
            ranges = sizes + scales[above] - scales[below]
            _largest(coming, above, ranges)
            _largest(going, below, ranges)
            _largest(widest, above, ranges.amax().expand(ranges.shape))
        step = torch.where(going.isinf(), widest - coming, (going - coming) / 2)
        step = torch.where(coming.isinf(), 0.0, step)
        step[0] = 0.0
        if float(step.abs().max()) < EQUAL_ENOUGH:
            break
        free = free + torch.where(single, solution.pulled_back(step), 0.0) / 2
    return free


def _largest(found: Tensor, classes: Tensor, values: Tensor) -> None:
    """Raise entries of ``found`` to the largest value of their class."""
    dims = [dim for dim in range(4) if classes.shape[dim] == 1]
    values = values.amax(dims, keepdim=True) if dims else values
    found.scatter_reduce_(0, classes.reshape(-1), values.reshape(-1), "amax")
