"""Layer by layer: its share of the paths, zeros, dead channels, scores, and how far its channels are from balanced."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.graph.expressions import StateTensor
from pathlift.graph.layers import Layer
from pathlift.graph.network import Network
from pathlift.magnitude import PathMagnitude, spread
from pathlift.results import Result

DECADES = 60
"""Scores below 10^−this are in the first column of a histogram."""

PER_DECADE = 4
"""Columns of a histogram for each power of ten."""


@dataclass(frozen=True, repr=False)
class LayerShare(Result, line=("module", "operator", "weights", "share", "sparsity")):
    """What a report says of the weights of one module.

    Attributes:
        module: Path of the module; ``""`` for the model itself. Where one module makes several layers, what their units go by
            (`pathlift.unit_path_magnitude`), which in an ONNX file is the name of a node.
        operator: The operator that reads its weights.
        weights: Their number, biases among them.
        share: Share of the path-norm that runs through its weights; of a weight that is used several times, summed over uses.
        starts: Share of the path-norm whose paths start at its biases.
        before: Share of the path-norm whose paths start at the inputs or at biases of earlier modules; None where paths start
            at constants as well, whose place is not known.
        sparsity: Share of its weights that are 0, biases left out.
        channels: Its output channels; None where it has none of its own.
        dead: Channels through which no path runs; None likewise.
        zero_scales: Scales of a normalisation that are 0; None for any other module.
        imbalance: How far the worst of its channels is from balanced, 0 to 1: |in − out|/(in + out) of the sums of squared
            weights into it and out of it; None where no channel can be rescaled.
        imbalance_balanced: The same for the balanced representative.
        score_low: Score that 5 % of its weights do not reach, of those that are not 0.
        score_median: Their median.
        score_high: Score that 5 % of them exceed.
    """

    module: str
    operator: str
    weights: int
    share: float
    starts: float
    before: float | None
    sparsity: float
    channels: int | None
    dead: int | None
    zero_scales: int | None
    imbalance: float | None
    imbalance_balanced: float | None
    score_low: float
    score_median: float
    score_high: float


@dataclass(frozen=True, repr=False)
class Scores(Result):
    """A histogram of the path-magnitudes of all weights.

    Attributes:
        log10_edges: log₁₀ of the edges of its columns.
        counts: Weights in each.
        zeros: Weights with the score 0: no path runs through them.
    """

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]
    zeros: int


def layers_of(
    network: Network,
    shares: PathMagnitude,
    units: PathMagnitude,
    imbalances: Mapping[str, tuple[float, float]],
    from_inputs: float,
    *,
    constants: bool,
) -> tuple[LayerShare, ...]:
    """Describe every module that has weights on the graph, from the inputs to the outputs.

    Args:
        network: The network.
        shares: Its path-magnitude.
        units: The same of its channels.
        imbalances: Module to its imbalance as it is, and balanced.
        from_inputs: Share of the path-norm whose paths start at inputs.
        constants: Whether paths start at constants, too.

    Returns:
        One for each module.
    """
    modules = _modules(network)
    operators = _operators(network, modules)
    tensors: dict[str, list[str]] = {module: [] for module in operators}
    for name in shares:
        tensors.setdefault(modules.get(name, name.rpartition(".")[0]), []).append(name)
    starting = _biases(network)
    scales = _scales(network, modules)
    described: list[LayerShare] = []
    before = from_inputs
    for module in (module for module, names in tensors.items() if names):
        weights = [shares[name] for name in tensors[module] if name not in starting]
        biases = [shares[name] for name in tensors[module] if name in starting]
        starts = math.fsum(_sum(share) for share in biases)
        held = {name: network.state[name] for name in tensors[module] if name in network.state}
        count = sum(value.numel() for value in held.values())
        plain = [value for name, value in held.items() if name not in starting]
        zeros = sum(int((value == 0).sum()) for value in plain)
        sparsity = zeros / sum(value.numel() for value in plain) if plain else 0.0
        channels = units.get(module)
        low, middle, high = spread(torch.cat([share.reshape(-1) for share in weights or biases]))
        worst, worst_balanced = imbalances.get(module, (None, None))
        described.append(
            LayerShare(
                module,
                operators.get(module, ""),
                count,
                math.fsum(_sum(share) for share in weights),
                starts,
                None if constants else before,
                sparsity,
                None if channels is None else channels.numel(),
                None if channels is None else int((channels == 0).sum()),
                int((network.state[scales[module]] == 0).sum()) if module in scales else None,
                worst,
                worst_balanced,
                low,
                middle,
                high,
            )
        )
        before += starts
    return tuple(described)


def from_biases(network: Network, shares: PathMagnitude) -> float:
    """Return the share of the path-norm whose paths start at biases that are parameters.

    Args:
        network: The network.
        shares: Its path-magnitude.

    Returns:
        The share.
    """
    starting = _biases(network)
    return math.fsum(_sum(share) for name, share in shares.items() if name in starting)


def _biases(network: Network) -> set[str | None]:
    return {bias.weight.score_name for layer in network.layers for bias in layer.biases}


def _sum(share: Tensor) -> float:
    return float(share.sum(dtype=torch.float64))


def _weights_at(network: Network) -> Iterator[tuple[Layer, str]]:
    """Yield each layer with the names of the scored weights of its edges and its biases."""
    for layer in network.layers:
        for weight in (*(connection.weight for connection in layer.connections), *(bias.weight for bias in layer.biases)):
            if weight is not None and weight.score_name is not None:
                yield layer, weight.score_name


def _modules(network: Network) -> dict[str, str]:
    """Return what each scored weight is a part of: the units that it makes or shifts, or the module that holds it."""
    modules: dict[str, str] = {}
    for layer, name in _weights_at(network):
        units = layer.unit_name if layer.unit_name is not None else (name.rpartition(".")[0] or layer.origin.module)
        modules.setdefault(name, units)
    return modules


def _operators(network: Network, modules: Mapping[str, str]) -> dict[str, str]:
    """Return the operator of each module, in the order of the graph."""
    operators: dict[str, str] = {}
    for layer, name in _weights_at(network):
        operators.setdefault(modules[name], layer.origin.op.removeprefix("aten.").partition(".")[0].strip("_"))
    return operators


def _scales(network: Network, modules: Mapping[str, str]) -> dict[str, str]:
    """Return the name of the scale of each module that normalises."""
    normalising = [found for layer in network.layers if (found := layer.normalisation()) is not None]
    names = [found.weight.name for found in normalising if isinstance(found.weight, StateTensor)]
    return {modules.get(name, name.rpartition(".")[0]): name for name in names}


def histogram(shares: PathMagnitude) -> Scores:
    """Count the scores of all weights by size.

    Args:
        shares: The scores.

    Returns:
        The histogram, cut to where there are any.
    """
    columns = DECADES * PER_DECADE
    counts = torch.zeros(columns, dtype=torch.int64, device="cpu")
    zeros = 0
    for tensor in shares.values():
        there = tensor[tensor > 0]
        zeros += tensor.numel() - there.numel()
        column = ((torch.log10(there.double()) + DECADES) * PER_DECADE).long().clamp(0, columns - 1)
        counts += torch.bincount(column.reshape(-1).cpu(), minlength=columns)
    filled = torch.nonzero(counts)[:, 0].tolist()
    first, last = (filled[0], filled[-1] + 1) if filled else (columns - 1, columns)
    edges = tuple(column / PER_DECADE - DECADES for column in range(first, last + 1))
    return Scores(edges, tuple(counts[first:last].tolist()), zeros)
