"""Numbers per output neuron whose logarithms are known: bounds of any size, and their sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pathlift.graph.network import Network
from pathlift.passes.tracks import Tracks


def per_output(network: Network, tracks: Mapping[str, Tracks], which: Sequence[int]) -> tuple[Tensor, float]:
    """Lay tracks of the outputs side by side in one unit.

    Args:
        network: The compact graph.
        tracks: Output layer to tracks.
        which: The tracks.

    Returns:
        Shape (tracks, output neurons of the compact graph), float64, and the exponent of their unit, a power of two. What
        is smaller than the largest by 2**-1000 may come out as 0.
    """
    known = [sums for name in network.outputs for track in which if (sums := tracks[name][track]) is not None]
    exponent = max((sums.exponent for sums in known), default=0.0)
    rows = []
    for track in which:
        pieces = []
        for name in network.outputs:
            sums = tracks[name][track]
            size = math.prod(network.layer[name].shape)
            if sums is None:
                pieces.append(torch.zeros(size, dtype=torch.float64, device=network.device))
            else:
                pieces.append(sums.at(exponent).double().reshape(-1))
        rows.append(torch.cat(pieces))
    return torch.stack(rows), exponent


def multiplicities(network: Network) -> Tensor:
    """Return how many output neurons each entry of `per_output` stands for, float64."""
    pieces = []
    for name in network.outputs:
        layer = network.layer[name]
        count = layer.multiplicity(network.device)
        ones = torch.ones(layer.shape, dtype=torch.float64, device=network.device)
        pieces.append((ones if count is None else ones * count).reshape(-1))
    return torch.cat(pieces)


def log2_sum(values: Tensor, count: Tensor) -> float:
    """Return log₂ Σ count·2^value, −inf for 0."""
    top = float(values.max()) if values.numel() else -math.inf
    if not math.isfinite(top):
        return top
    return math.log2(float((count * torch.exp2(values - top)).sum())) + top


def times(number: float, unit: float) -> tuple[float, float]:
    """Return number·10**unit, inf past float64's range, and log₁₀ of it."""
    log10 = math.log10(number) + unit if number > 0 else -math.inf
    return (10.0**log10 if log10 < 308 else math.inf), log10


def expanded(network: Network, values: Tensor) -> Tensor:
    """Return one entry per output neuron: of the output's shape, or flat over all when there are several outputs.

    Args:
        network: The compact graph.
        values: One entry per output neuron of the compact graph.

    Returns:
        The values.
    """
    pieces, start = [], 0
    for name in network.outputs:
        layer = network.layer[name]
        size = math.prod(layer.shape)
        pieces.append(layer.expand(values[start : start + size].reshape(layer.shape)))
        start += size
    if len(pieces) == 1:
        return pieces[0][0] if pieces[0].dim() else pieces[0]
    return torch.cat([piece.reshape(-1) for piece in pieces])
