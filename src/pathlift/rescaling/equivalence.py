"""Comparing two parameter vectors modulo rescaling: equivalence, alignment, distance (mathematics §4 "Gauge", §7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.budget import Clock, limited
from pathlift.graph.network import Network
from pathlift.passes.propagate import blame
from pathlift.reading import Inputs
from pathlift.reading.second import Other, other_state
from pathlift.rescaling.alignment import gauge_fit, nearest_factors
from pathlift.rescaling.constraints import ScaleConstraints, scale_constraints
from pathlift.rescaling.groups import Symmetries, symmetries
from pathlift.rescaling.states import RescaledState
from pathlift.results import Result

ULPS, HALF_ULPS = 64, 4
"""Default tolerance of `equivalent`, in units of the last digit of the coarser of the two types; and of types of two bytes, of
which 64 units are half of a weight."""


@dataclass(frozen=True, eq=False, repr=False)
class Equivalence(Result):
    """Whether two networks are rescalings of each other; truthy when they are.

    Attributes:
        equivalent: Whether θ' = λ∘θ within the tolerance.
        factors: λ, float64, shape (groups,); None when they are not equivalent.
        mismatch: The first parameter that disagrees, where and by how much; "" when they are equivalent.
        tolerance: Largest relative difference of a weight that counts as rounding.
    """

    equivalent: bool
    factors: Tensor | None
    mismatch: str
    tolerance: float

    def __bool__(self) -> bool:
        """Return `equivalent`."""
        return self.equivalent


def _groups(model: nn.Module | Network | Symmetries, inputs: Inputs | None) -> Symmetries:
    return symmetries(model.network if isinstance(model, Symmetries) else model, inputs)


def _finite(network: Network, other: Other) -> dict[str, Tensor]:
    """Return θ' by canonical name; both networks must have finite weights, for NaN differs from nothing."""
    state = other_state(network, other)
    blame(network.values())
    blame(network.values(state))
    return state


@public
@torch.no_grad()
def equivalent(
    model: nn.Module | Network | Symmetries,
    other: Other,
    inputs: Inputs | None = None,
    *,
    tolerance: float | None = None,
    seconds: float | None = None,
) -> Equivalence:
    """Tell whether two networks are rescalings of each other, θ' = λ∘θ, and find λ.

    Exact zeros must be the same in both, signs too. Weights that take no part in the symmetry must be equal. It is a test
    of parameters: networks that compute the same function for another reason (permuted channels) are not equivalent.

    Args:
        model: A module, a captured `Network` or its `Symmetries`: θ.
        other: θ', see `path_metric`.
        inputs: As for `capture`; not needed for a Network.
        tolerance: Largest relative difference of a weight from λ∘θ that counts as rounding; 64 units of the last digit of
            its type by default, 4 of a type of two bytes.
        seconds: Time to spend, None for no limit.

    Returns:
        The answer, with the factors or the first parameter that disagrees.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        MismatchError: ``other`` has other parameters, shapes or another graph.
        InputError: ``inputs`` or ``tolerance`` is malformed.
        NumericalError: A weight is NaN or infinite.
        OutOfTimeError: The seconds are over before there is an answer.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> same = equivalent(model, symmetries(model, (2,)).rescale([2.0, 1.0, 0.5]), (2,))
        >>> bool(same), same.factors.tolist()
        (True, [2.0, 1.0, 0.5])
    """
    with limited(seconds) as clock:
        return _equivalent(_groups(model, inputs), other, tolerance, clock)


def _equivalent(groups: Symmetries, other: Other, tolerance: float | None, clock: Clock) -> Equivalence:
    network, constraints = groups.network, groups.constraints
    state = _finite(network, other)
    digits = {name: _digits(network.state[name], theirs, ULPS, HALF_ULPS) for name, theirs in state.items()}
    limits = digits if tolerance is None else dict.fromkeys(state, tolerance)
    widest = max((limit for name, limit in limits.items() if name in network.graph.saved), default=0.0)
    mismatch = _different_elsewhere(network, constraints, state, limits) or _different_support(network, constraints, state)
    if mismatch:
        return Equivalence(False, None, mismatch, widest)
    fit = gauge_fit(network, state)
    scales = constraints.solution.scales(fit.factors)
    for name in fit.upwards:
        deviations = fit.deviations(name, scales)
        if float(deviations.amax()) > limits[name]:
            if fit.stopped:
                clock.check("The comparison modulo rescaling")
            by_element = constraints.scalings[name].join(deviations, network.state[name].shape)
            index = tuple(int(axis) for axis in torch.unravel_index(by_element.argmax(), by_element.shape))
            what = f"'{name}'{list(index)} differs by {float(by_element[index]):.3g} of itself from the rescaling nearest to it"
            return Equivalence(False, None, what, widest)
    return Equivalence(True, torch.exp2(fit.factors), "", widest)


@public
@torch.no_grad()
def align(
    model: nn.Module | Network | Symmetries, other: Other, inputs: Inputs | None = None, *, seconds: float | None = None
) -> RescaledState:
    """Bring a second network into the gauge of the first: rescale θ' so that it is as near to θ as it gets.

    The factors solve a robust least-squares problem in log λ over the weights that are not zero in both. A copy of θ that
    was pruned and rescaled is matched exactly, and a weight that then agrees with that of θ to the rounding of the
    rescaling (8 units of the last digit, 1 of types of two bytes) is set to it.

    Args:
        model: A module, a captured `Network` or its `Symmetries`: θ.
        other: θ', see `path_metric`.
        inputs: As for `capture`; not needed for a Network.
        seconds: Time to spend, None for no limit; when it is up, the best factors so far are used and the state is
            ``stopped``.

    Returns:
        A state-dict with the function of θ', up to that rounding.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        MismatchError: ``other`` has other parameters, shapes or another graph.
        InputError: ``inputs`` is malformed.
        NumericalError: A weight is NaN or infinite.
        OutOfTimeError: The seconds are over before the rescaling groups are known.
    """
    with limited(seconds):
        groups = _groups(model, inputs)
        network = groups.network
        state = _finite(network, other)
        fit = gauge_fit(network, state)
        free = nearest_factors(fit)
    rescaled = _rescaled(network, state, free)
    return RescaledState(network, snapped(network, state, rescaled), torch.exp2(free), stopped=fit.stopped)


def snapped(network: Network, state: Mapping[str, Tensor], rescaled: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take weights that agree with θ to the rounding of a rescaling to be the same, and return θ' in its own type.

    Args:
        network: The network with θ.
        state: θ' as it was given.
        rescaled: θ' in the gauge of θ.

    Returns:
        Canonical name to tensor.
    """
    snapped_state = dict(state)
    for name, tensor in rescaled.items():
        if tensor is not state[name]:
            mine = network.state[name].detach()
            near = (tensor.double() - mine.double()).abs() <= _digits(state[name], mine, SNAP, HALF_SNAP) * mine.double().abs()
            snapped_state[name] = torch.where(near, mine.to(state[name].dtype), tensor.to(state[name].dtype))
    return snapped_state


def _rescaled(network: Network, state: Mapping[str, Tensor], free: Tensor) -> dict[str, Tensor]:
    """Return λ∘θ', float64 where λ is not 1."""
    constraints = scale_constraints(network)
    scales = constraints.solution.scales(free)
    rescaled = dict(state)
    for name, scaling in constraints.scalings.items():
        factor = torch.exp2(scaling.logs(scales, state[name].shape)).to(state[name].device)
        if bool((factor != 1.0).any()):
            rescaled[name] = state[name].detach().double() * factor
    return rescaled


SNAP, HALF_SNAP = 8, 1
"""Units of the last digit by which a rescaled copy may differ from its original; and in types of two bytes."""


@public
@torch.no_grad()
def rescaling_distance(
    model: nn.Module | Network | Symmetries,
    other: Other,
    inputs: Inputs | None = None,
    *,
    p: float = 2.0,
    seconds: float | None = None,
) -> float:
    """Return the distance of two networks modulo rescaling: between their balanced representatives.

    ‖N(θ) − N(θ')‖_p, N(θ) the element of the orbit of θ with the smallest ℓ^p norm (`Symmetries.balance`). It is a metric on
    orbits: 0 exactly when one network is a rescaling of the other (dead weights and running means aside). The infimum of
    ‖θ − λ∘θ'‖_p over λ alone depends on the gauge of θ and is no such thing.

    Args:
        model: A module, a captured `Network` or its `Symmetries`: θ.
        other: θ', see `path_metric`.
        inputs: As for `capture`; not needed for a Network.
        p: Order, ≥ 1.
        seconds: Time to spend, None for no limit.

    Returns:
        The distance, over all trainable parameters.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        MismatchError: ``other`` has other parameters, shapes or another graph.
        InputError: ``inputs`` or ``p`` is malformed.
        NumericalError: A weight is NaN or infinite.
        OutOfTimeError: The seconds are over before both are balanced.
    """
    with limited(seconds) as clock:
        groups = _groups(model, inputs)
        second = groups.at(other_state(groups.network, other))
        first_balanced, second_balanced = groups.balance(p), second.balance(p)
        if first_balanced.stopped or second_balanced.stopped:
            clock.check("The search for balanced representatives")
    apart = [
        (first_balanced[name].double() - second_balanced[name].double()).abs()
        for name in groups.network.parameters
        if name in first_balanced
    ]
    largest = max((float(difference.max()) for difference in apart), default=0.0)
    if largest == 0.0:
        return 0.0
    return float(largest * sum(float((difference / largest).pow(p).sum()) for difference in apart) ** (1.0 / p))


def _digits(first: Tensor, second: Tensor, units: int, half_units: int) -> float:
    """Return so many units of the last digit of the coarser of two types."""
    kinds = [torch.finfo(tensor.dtype) for tensor in (first, second) if tensor.is_floating_point()]
    return max(((half_units if kind.bits == 16 else units) * kind.eps for kind in kinds), default=0.0)


def _different_elsewhere(
    network: Network, constraints: ScaleConstraints, state: Mapping[str, Tensor], limits: Mapping[str, float]
) -> str:
    """Compare what takes no part in the symmetry."""
    needed = {name for weight in network.weights for name in weight.requires}
    for name, tensor in network.state.items():
        if name in constraints.scalings or name not in needed:
            continue
        first, second = tensor.double(), state[name].double()
        if bool(((first - second).abs() > limits[name] * first.abs()).any()):
            return f"'{name}' takes no part in the rescaling symmetry and differs by {float((first - second).abs().max()):.3g}"
    return ""


def _different_support(network: Network, constraints: ScaleConstraints, state: Mapping[str, Tensor]) -> str:
    """Compare zeros and signs."""
    for name in constraints.upwards:
        first, second = network.state[name].detach().sign(), state[name].detach().to(network.device).sign()
        apart = first != second.to(first.dtype)
        if bool(apart.any()):
            index = tuple(apart.nonzero()[0].tolist())
            mine, theirs = float(network.state[name][index]), float(state[name][index])
            return (
                f"'{name}'{list(index)} is {mine:.6g} in the first network and {theirs:.6g} in the second: signs never change"
            )
    return ""
