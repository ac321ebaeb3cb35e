"""What a pass brings to the outputs, laid side by side and rounded up by its error analysis (mathematics §8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pathlift.graph.network import Network
from pathlift.passes.programs import Values
from pathlift.passes.propagate import TooWideError, in_range, propagate
from pathlift.passes.rounding import rounding_factor
from pathlift.passes.scaled import Scaled, power
from pathlift.passes.tracks import Program


def plain(value: Scaled) -> Tensor:
    """Return non-negative values as float64: inf past its range, never 0 for what is positive."""
    half = float(math.floor(value.exponent / 2))
    number = value.tensor.double() * power(half) * power(value.exponent - half)
    return torch.where(value.tensor > 0, number.clamp(min=torch.finfo(torch.float64).tiny), number)


def flat(network: Network, outputs: Sequence[Scaled | None], batch: int | None) -> Tensor:
    """Lay the outputs side by side, one entry per neuron.

    Args:
        network: The graph.
        outputs: One value per output layer, None for 0.
        batch: Number of samples; None when the values have no such dimension.

    Returns:
        (samples, outputs) or (outputs,), float64.
    """
    lead = () if batch is None else (batch,)
    pieces = []
    for name, value in zip(network.outputs, outputs, strict=True):
        layer = network.layer[name]
        if value is None:
            pieces.append(torch.zeros((*lead, math.prod(layer.full_shape)), dtype=torch.float64, device=network.device))
        else:
            tensor = plain(value)
            pieces.append((layer.expand(tensor) if batch is None else tensor).reshape(*lead, -1))
    return torch.cat(pieces, -1)


def rounded_up(network: Network, make: Callable[[torch.dtype], Program], track: int, *values: Values) -> Tensor:
    """Run a program and round one track up, in the model's own precision where its range suffices.

    Args:
        network: The graph.
        make: The program for a precision.
        track: Which track.
        values: The weights it uses, to name one that is not finite.

    Returns:
        (samples, outputs) or (outputs,), float64.
    """

    def attempt(dtype: torch.dtype) -> Tensor:
        program = make(dtype)
        tracks = propagate(network, program)
        bound = flat(network, [tracks[name][track] for name in network.outputs], program.batch)
        return bound * (1.0 + rounding_factor(network, program.dtype))

    try:
        return in_range(attempt, network.dtype, *values)
    except TooWideError:  # an infinite bound holds
        batch = make(torch.float64).batch
        lead = () if batch is None else (batch,)
        return torch.full((*lead, output_count(network)), math.inf, dtype=torch.float64, device=network.device)


CHUNK_ELEMENTS = 1 << 23
"""Samples travel together as long as the widest layer has at most so many values: larger tensors cost page faults."""


def in_chunks(network: Network, feed: Mapping[str, Tensor], compute: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
    """Compute something sample by sample, a few at a time.

    Args:
        network: The graph.
        feed: Input layer to values, (samples, *shape).
        compute: The computation for some of the samples, (samples, …).

    Returns:
        The results for all samples.
    """
    step = max(1, CHUNK_ELEMENTS // max(math.prod(layer.shape) for layer in network.layers))
    pieces = zip(*(value.split(step) for value in feed.values()), strict=True)
    return torch.cat([compute(dict(zip(feed, piece, strict=True))) for piece in pieces])


def never_nan(bound: Tensor) -> Tensor:
    """A bound that left the range of its precision is infinite."""
    return torch.where(bound.isnan(), math.inf, bound)


def output_count(network: Network) -> int:
    """Return the number of output neurons."""
    return sum(math.prod(network.layer[name].full_shape) for name in network.outputs)
