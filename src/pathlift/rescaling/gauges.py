"""Choices of a representative in an orbit of rescalings: normal, balanced, equalised, path-conditioned (mathematics §4, §7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathlift.budget import running
from pathlift.edges.pattern import Layout
from pathlift.graph.compact import compacted
from pathlift.graph.network import Network
from pathlift.passes.backward import sum_of_outputs
from pathlift.passes.programs import NormProgram
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.tracks import Tracks
from pathlift.rescaling.balance import Balance, Logarithmic, balanced, imbalances
from pathlift.rescaling.conditioning import kernel_diagonal, on_paths
from pathlift.rescaling.constraints import ScaleConstraints
from pathlift.rescaling.couplings import Coupling, coupling, sums
from pathlift.rescaling.fit import projected
from pathlift.rescaling.scaling import NO_CLASS, Scaling

EQUAL_ENOUGH = 1e-3
"""log₂ of the ratio of two ranges at which equalisation ends."""


@dataclass(frozen=True, eq=False)
class Gauge:
    """Log₂ factors by group, and how good they are: see `pathlift.rescaling.states.BalancedState`."""

    free: Tensor
    imbalance: float
    left: tuple[int, ...]
    steps: int
    stopped: bool


@torch.no_grad()
def normal(network: Network, constraints: ScaleConstraints) -> Tensor:
    """Return the factors that bring the largest path activation of each group to 1 (mathematics §4, N(θ)).

    Args:
        network: The network.
        constraints: What its function asks of scales.

    Returns:
        log₂ λ, shape (groups,).

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    largest, _ = _largest_activations(network, constraints, torch.float64)
    return -projected(constraints.solution, largest)


@torch.no_grad()
def even(network: Network, constraints: ScaleConstraints) -> Tensor:
    """Return the factors with which the largest path activation of a group is ‖Φ‖₁ to the power of its share of the depth.

    As `normal`, they depend on the orbit only; and no layer has to carry the whole scale of the network. A group whose largest
    path activation is a and whose neurons have d of D layers with weights below them gets the factor ‖Φ‖₁^(d/D)/a.

    Args:
        network: The network.
        constraints: What its function asks of scales.

    Returns:
        log₂ λ, shape (groups,).

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    largest, norm = _largest_activations(network, constraints, network.dtype)
    depth = compacted(network).graph.depth
    deepest = max(depth[name] for name in compacted(network).outputs) or 1
    share = torch.zeros(constraints.solution.count, dtype=torch.float64, device="cpu")
    for name, labels in constraints.labels.items():
        classes = constraints.solution.classes[labels].reshape(-1)
        share.scatter_reduce_(
            0, classes, torch.full(classes.shape, depth[name] / deepest, dtype=torch.float64, device="cpu"), "amax"
        )
    share[0] = 0.0
    return projected(constraints.solution, norm * share - largest)


def _largest_activations(network: Network, constraints: ScaleConstraints, first: torch.dtype) -> tuple[Tensor, float]:
    """Return log₂ of the largest path activation of each class, NaN where there is none, and log₂ ‖Φ‖₁ (0 for none)."""
    compact = compacted(network)
    values = compact.values()

    def attempt(dtype: torch.dtype) -> dict[str, Tracks]:
        return propagate(compact, NormProgram(compact, values, dtype), keep=True)

    tracks = in_range(attempt, first, values)
    largest = torch.full((constraints.solution.count,), -torch.inf, dtype=torch.float64, device="cpu")
    for name, labels in constraints.labels.items():
        activations = tracks[name][0]
        if activations is not None:
            classes = constraints.solution.classes[labels].expand(activations.tensor.shape)
            largest.scatter_reduce_(0, classes.reshape(-1), activations.log2().cpu().reshape(-1), "amax")
    largest[0] = 0.0
    norm = sum_of_outputs(compact, tracks)
    log2_norm = 0.0 if norm is None else math.log2(float(norm.tensor)) + norm.exponent
    return torch.where(largest.isinf(), torch.nan, largest), log2_norm


def balance(network: Network, constraints: ScaleConstraints, p: float) -> Gauge:
    """Minimise Σ|θ_i|^p over the orbit.

    Args:
        network: The network.
        constraints: What its function asks of scales.
        p: Positive power.

    Returns:
        The gauge.

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    couplings = _masses(network, constraints, p)
    held = _divided(constraints)
    optimum = balanced(couplings, constraints.solution.without(held), p)
    return _gauge(optimum, couplings, constraints, held)


def out_of_balance(network: Network, constraints: ScaleConstraints, logs: Tensor, p: float = 2.0) -> Tensor:
    """Return how far from balanced each group is after a rescaling; see `pathlift.rescaling.balance.imbalances`.

    Args:
        network: The network.
        constraints: What its function asks of scales.
        logs: log₂ λ of the rescaling, shape (groups,).
        p: Positive power.

    Returns:
        Shape (groups,).
    """
    solution = constraints.solution.without(_divided(constraints))
    return imbalances(_masses(network, constraints, p), solution, p, logs)


def _masses(network: Network, constraints: ScaleConstraints, p: float) -> list[Coupling]:
    """Return |θ|^p of the parameters on paths."""
    there = on_paths(network)
    return [
        coupling(scaling, _power(network.state[name].detach(), p) * there[name])
        for name, scaling in constraints.scalings.items()
        if name in network.parameters and name in there
    ]


def conditioned(network: Network, constraints: ScaleConstraints) -> Gauge:
    """Minimise the log-det divergence between diag(∂Φᵀ∂Φ) and the identity over the orbit.

    Args:
        network: The network.
        constraints: What its function asks of scales.

    Returns:
        The gauge.

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    solution = constraints.solution
    masses: list[Coupling] = []
    counts: list[Coupling] = []
    for name, diagonal in kernel_diagonal(network).items():
        if name not in network.parameters:
            continue
        scaling = constraints.scalings.get(name, STILL)
        layout = replace(scaling, layout=Layout.plain(diagonal.shape)) if scaling is STILL else scaling
        masses.append(coupling(layout, diagonal))
        counts.append(coupling(layout, (diagonal > 0).double()))
    coming, going = sums(counts, torch.zeros(solution.count, dtype=torch.float64, device="cpu"))
    number = float(coming.sum())
    objective = Logarithmic(number, -solution.pulled_back(coming - going)) if number else None  # no paths: nothing to choose
    optimum = balanced(masses, solution, -2.0, objective)
    return _gauge(optimum, masses, constraints, torch.zeros(solution.dimension, dtype=torch.bool, device="cpu"))


STILL = Scaling(NO_CLASS, NO_CLASS, Layout.plain(()))
"""How a parameter scales that does not."""


def _power(tensor: Tensor, p: float) -> Tensor:
    wide = tensor.abs().double()
    return wide.square_() if p == 2.0 else wide.pow_(p)


def _divided(constraints: ScaleConstraints) -> Tensor:
    """Tell which groups scale a parameter that the network divides by: it can shrink with what it divides, without end."""
    solution = constraints.solution
    touched = torch.zeros(solution.count, dtype=torch.bool, device="cpu")
    for scaling in constraints.scalings.values():
        if scaling.divides:
            touched[scaling.above.reshape(-1)] = True
            touched[scaling.below.reshape(-1)] = True
    held = torch.zeros(solution.dimension, dtype=torch.bool, device="cpu")
    held[solution.columns[touched[solution.rows]]] = True
    return held


def _gauge(optimum: Balance, couplings: Sequence[Coupling], constraints: ScaleConstraints, held: Tensor) -> Gauge:
    """Name the groups that were left: those that are held, and those without a mass."""
    coming, going = sums(couplings, torch.zeros(constraints.solution.count, dtype=torch.float64, device="cpu"))
    left = torch.nonzero(held | (constraints.solution.pulled_back_magnitude(coming + going) == 0))[:, 0]
    return Gauge(optimum.free, optimum.imbalance, tuple(left.tolist()), optimum.steps, optimum.stopped)


def equalized(network: Network, constraints: ScaleConstraints) -> tuple[Tensor, bool]:
    """Return the factors that give every channel equal ranges of incoming and outgoing weights.

    Only weights of two or more dimensions have a range: biases and batch norms stay in floating point. A channel without
    outgoing weights gets the range of the largest channel of its tensor. Equal ranges can be had in several ways; starting
    from the balanced representative makes the answer the same for all networks of an orbit.

    Args:
        network: The network.
        constraints: What its function asks of scales.

    Returns:
        log₂ λ, shape (groups,), and whether the time of the call was up before the ranges were equal.

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    solution = constraints.solution
    free = balance(network, constraints, 2.0).free
    ends: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, scaling in constraints.scalings.items():
        tensor = network.state[name].detach()
        if name in network.parameters and tensor.dim() > 1:
            sizes = torch.log2(scaling.split(tensor.abs()).double().cpu())
            if scaling.above.shape[3] == scaling.below.shape[3] == 1:
                sizes = sizes.amax(3, keepdim=True)
            ends.append((scaling.above, scaling.below, sizes))
    for _ in range(200):
        if running().over():
            return free, True
        scales = solution.scales(free)
        coming, going = (torch.full((solution.count,), -torch.inf, dtype=torch.float64, device="cpu") for _ in range(2))
        widest = coming.clone()
        for above, below, sizes in ends:
            ranges = sizes + scales[above] - scales[below]
            _raise_to(coming, above, ranges)
            _raise_to(going, below, ranges)
            _raise_to(widest, above, ranges.amax().expand(ranges.shape))
        # a scale that is raised by d raises what comes in by d and lowers what goes out by d: equal after (going − coming)/2
        step = torch.where(going.isinf(), widest - coming, (going - coming) / 2)
        step = torch.where(coming.isinf(), 0.0, step)
        step[0] = 0.0
        if float(step.abs().max()) < EQUAL_ENOUGH:
            break
        free = free + projected(solution, step) / 2  # half of it: the other end of a weight moves as well
    return free, False


def _raise_to(largest: Tensor, classes: Tensor, values: Tensor) -> None:
    """Raise entries of ``largest`` to the largest value of their class."""
    dims = [dim for dim in range(4) if classes.shape[dim] == 1]
    values = values.amax(dims, keepdim=True) if dims else values
    largest.scatter_reduce_(0, classes.reshape(-1), values.reshape(-1), "amax")
