"""The path-metric where it is known exactly: by Lemma 4.2 for ordered weights in ℓ¹, by three tracks in ℓ² (mathematics §4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pathlift import fused
from pathlift.edges.weights import BUNDLE_ELEMENTS, LAUNCHED_ELEMENTS
from pathlift.errors import MismatchError
from pathlift.graph.averaged import averaged
from pathlift.graph.expressions import widen
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.metric.outputs import multiplicities, per_output
from pathlift.passes.backward import sum_of_outputs
from pathlift.passes.programs import ORDERED, DifferenceProgram, NormProgram, NormsProgram, Values
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.rounding import SPARE, UNIT, rounding_factor
from pathlift.passes.scaled import Scaled
from pathlift.passes.squares import InnerProgram, SquaredDifferenceProgram
from pathlift.passes.tracks import Tracks


def checked_pair(network: Network, state: Mapping[str, Tensor]) -> tuple[Values, Values]:
    """Evaluate the weights of both networks.

    Args:
        network: The first network.
        state: Parameters and buffers of the second (`other_state`).

    Returns:
        Weight tensor to tensor, for each.

    Raises:
        MismatchError: The shapes of a derived weight differ.
    """
    values, others = network.values(), network.values(state)
    check_shapes(network, values, others)
    return values, others


def check_shapes(network: Network, values: Values, others: Values) -> None:
    """Refuse weights of different shapes.

    Args:
        network: The graph.
        values: Weight tensor to weights.
        others: Those of the second network.

    Raises:
        MismatchError: The shapes of a weight differ.
    """
    for weight in network.weights:
        if weight.scalar is None and values[weight].shape != others[weight].shape:
            raise MismatchError(
                f"'{weight.label}' has shape {tuple(values[weight].shape)} in the first network and "
                f"{tuple(others[weight].shape)} in the second."
            )


@torch.no_grad()
def _differs(first: Tensor, second: Tensor) -> tuple[bool, bool, bool]:
    """Return whether |θ| > |m| somewhere, |θ'| > |m| somewhere, and θ ≠ θ' somewhere; block by block.

    θ − θ' leads away from 0 to θ where |θ| > |m|, and towards 0 from θ' where |θ'| > |m|. What is known is not asked again.
    """
    matrices = [value.flatten(1) for value in (first, second) if value.dim() > 1]
    if matrices and fused.suits(matrices, [first.new_empty(0, dtype=torch.float64)]):
        return fused.sides(*matrices)
    above, below, different = False, False, False
    dtype = torch.promote_types(widen(first).dtype, widen(second).dtype)
    size = 2 * BUNDLE_ELEMENTS if first.device.type == "cpu" else LAUNCHED_ELEMENTS
    rooms: Tensor | None = None  # what is written stays in a cache
    for a, b in zip(first.reshape(-1).split(size), second.reshape(-1).split(size), strict=True):
        a, b = a.to(dtype), b.to(dtype)
        if torch.equal(a, b):
            continue
        different = True
        if rooms is None:
            rooms = torch.empty(2, min(size, first.numel()), dtype=dtype, device=first.device)
        step, signed = rooms[:, : len(a)]
        torch.sub(a, b, out=step)
        above = above or bool(torch.sign(a, out=signed).mul_(step).amax() > 0)
        below = below or bool(torch.sign(b, out=signed).mul_(step).amin() < 0)
        if above and below:
            break
    return above, below, different


def differing(network: Network, values: Values, other: Values) -> tuple[set[WeightTensor], set[WeightTensor]]:
    """Return the weight tensors with |θ| > |m| somewhere, and those with |θ'| > |m| somewhere, m the pivot.

    Args:
        network: The graph.
        values: θ.
        other: θ'.

    Returns:
        Two sets; all weight tensors where a weight is not a number, so that a pass finds and names it.
    """
    above: set[WeightTensor] = set()
    below: set[WeightTensor] = set()
    for weight in network.weights:
        if weight.scalar is None:
            larger, smaller, different = _differs(values[weight], other[weight])
            above |= {weight} if larger else set()
            below |= {weight} if smaller else set()
            if different and not (larger or smaller):
                return set(network.weights), set(network.weights)  # NaN compares with nothing
    return above, below


def unequal(values: Values, other: Values) -> set[WeightTensor]:
    """Return the weight tensors whose weights are not the same on both sides.

    Args:
        values: θ.
        other: θ'.

    Returns:
        The weight tensors.
    """
    return {weight for weight, value in values.items() if not torch.equal(widen(value).double(), widen(other[weight]).double())}


class Subtracted(NamedTuple):
    """‖Φ(θ)‖ − ‖Φ(θ')‖ of ordered networks (Lemma 4.2), neuron by neuron of the outputs and in all.

    Attributes:
        log2: log₂ of the difference at each output neuron of the compact graph.
        total: Their sum.
        error: What they are off by: a factor between exp(−error) and exp(error).
    """

    log2: Tensor
    total: Scaled
    error: float


SAMPLE = 1 << 14
"""Weights of a tensor that are looked at to guess how much of the norm is left."""

PROMISING = 0.75
"""Share of the path-norm that is left in θ' up to which norms are subtracted: what one track of a norm is off by comes out
multiplied by 7, less than twice the 4 tracks that `rounding_factor` allows for where the difference is a track."""


def subtracted(
    network: Network, larger: Values, smaller: Values, changed: set[WeightTensor], computed: float, most: float
) -> Subtracted | None:
    """Subtract the path-norms for |θ| ≥ |θ'| with equal signs (Lemma 4.2), where that loses no digit that counts.

    Two products a layer are needed, where `ordered_difference` needs three. With A and M the two path-norms at an output, each
    known up to a factor exp(±e), A − M is off by at most (exp(e) − 1)·(A + M). An example: M = A/4 makes that 5/3·e relative
    to A − M; M = 0.99·A makes it 199·e, which nobody wants.

    Args:
        network: The compact graph.
        larger: θ.
        smaller: θ'.
        changed: The leaves where they differ.
        computed: What path activations are off by because weights were computed (`weights_factor`).
        most: The largest error that is accepted.

    Returns:
        The difference; None where the norms seem too close, or are.
    """
    if _left(network, larger, smaller, changed) > PROMISING:
        return None
    thin = averaged(network)

    def attempt(dtype: torch.dtype) -> dict[str, Tracks]:
        return propagate(thin, NormsProgram(thin, larger, smaller, dtype))

    tracks = in_range(attempt, torch.float64, larger, smaller, memory=thin.memory("path_metric", "norms"))
    (norms, others), exponent = per_output(network, tracks, [0, 1])
    differences = norms - others
    worst = float(torch.where(differences > 0, (norms + others) / differences, math.inf).amax())
    unit = UNIT[torch.float64]
    relative = 1.001 * (rounding_factor(network, tracks=1) + computed + SPARE * unit) * worst
    if not relative < min(most, 1e-3):  # below it, what is second order is covered by the 1.001
        return None
    total = Scaled((differences * multiplicities(network)).sum(), exponent)
    error = relative / (1.0 - relative)
    return Subtracted(torch.log2(differences) + exponent, total, error) if error <= most else None


def _left(network: Network, larger: Values, smaller: Values, changed: set[WeightTensor]) -> float:
    """Guess the share of the path-norm that is left in θ': the product, over the layers, of what is left of their weights."""
    edges = {connection.weight for layer in network.layers for connection in layer.connections} & changed
    sums = [
        torch.linalg.vector_norm(widen(values[weight]).reshape(-1)[:SAMPLE], 1, dtype=torch.float64)
        for values in (smaller, larger)
        for weight in edges
        if weight is not None
    ]
    if not sums:
        return 1.0
    left, whole = torch.stack(sums).log().reshape(2, -1).sum(1).tolist()
    return math.exp(min(left - whole, 0.0)) if math.isfinite(whole) else 1.0


def ordered_difference(network: Network, larger: Values, smaller: Values, changed: set[WeightTensor]) -> dict[str, Tracks]:
    """Compute Φ(θ) − Φ(θ') in magnitude for |θ| ≥ |θ'| with equal signs (Lemma 4.2).

    In float64 whatever the model's precision: the rounding of a deep pass in float32 amounts to some percent.

    Args:
        network: The compact graph.
        larger: θ.
        smaller: θ'.
        changed: The leaves where they differ.

    Returns:
        Output layer to tracks; track 1 is the difference.
    """

    def attempt(dtype: torch.dtype) -> dict[str, Tracks]:
        return propagate(thin, DifferenceProgram(thin, larger, smaller, dtype, changed, through=ORDERED))

    thin = averaged(network)
    return in_range(attempt, torch.float64, larger, smaller, memory=thin.memory("path_metric"))


def norm_tracks(network: Network, values: Values, *, q: float = 1.0, keep: bool = False) -> dict[str, Tracks]:
    """Compute the path-norm's one track in float64, of the outputs or, to ``keep``, of every layer."""
    program = NormProgram(network, values, torch.float64, q=q)
    return in_range(lambda _: propagate(network, program, keep=keep), torch.float64, values)


def squared_difference(network: Network, values: Values, other: Values) -> tuple[Scaled | None, ...]:
    """Compute ‖Φ(θ) − Φ(θ')‖₂² for any pair.

    Args:
        network: The compact graph.
        values: θ.
        other: θ'.

    Returns:
        The square, what its rounding error is a multiple of, and ‖Φ(θ)‖₂².
    """
    changed, thin = unequal(values, other), averaged(network)

    def attempt(_: torch.dtype) -> tuple[Scaled | None, ...]:
        tracks = propagate(thin, SquaredDifferenceProgram(thin, values, other, changed))
        return tuple(sum_of_outputs(network, tracks, track) for track in (2, 4, 0))

    return in_range(attempt, torch.float64, values, other)


def inner_product(network: Network, values: Values, other: Values) -> tuple[Scaled | None, Scaled | None]:
    """Compute ⟨Φ(θ), Φ(θ')⟩ for any pair.

    Args:
        network: The compact graph.
        values: θ.
        other: θ'.

    Returns:
        The inner product, and the sum of the magnitudes of its summands, which its rounding error is a multiple of.
    """
    thin = averaged(network)

    def attempt(_: torch.dtype) -> tuple[Scaled | None, Scaled | None]:
        tracks = propagate(thin, InnerProgram(thin, values, other))
        return sum_of_outputs(network, tracks, 0), sum_of_outputs(network, tracks, 1)

    return in_range(attempt, torch.float64, values, other)
