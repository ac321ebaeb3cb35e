"""Moments of activations on data: one run of the captured graph over batches of inputs (mathematics §9)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.graph.calling import Samples
from pathlift.graph.layers import Extremum, Layer
from pathlift.passes.forward import Below, along, carried, feed_of, respond, weighted
from pathlift.passes.propagate import in_forward_order
from pathlift.statistics.kinks import Kink, Response
from pathlift.statistics.propagation import Propagation, Step


@dataclass
class _Sums:
    """Running moments of a layer over the samples and positions so far."""

    count: int = 0
    mean: Tensor | None = None
    spread: Tensor | None = None
    products: Tensor | None = None
    pairs: int = 0
    gain: Tensor | None = None
    activity: Tensor | None = None

    def add(self, x: Tensor, shape: tuple[int, ...], spatial: list[int]) -> None:
        """Join another batch, (samples, *layer.shape), by the formulas of Chan, Golub and LeVeque."""
        dims = [0, *(1 + dim for dim, size in enumerate(shape) if size < x.shape[1 + dim])]
        x = x.double()
        count = x.numel() // max(1, torch.Size(shape).numel())
        mean = x.mean(dims, keepdim=True)
        spread = (x - mean).square().sum(dims, keepdim=True).squeeze(0)
        mean = mean.squeeze(0)
        if self.mean is None or self.spread is None:
            self.mean, self.spread = mean, spread
        else:
            gap, total = mean - self.mean, self.count + count
            self.spread = self.spread + spread + gap**2 * (self.count * count / total)
            self.mean = self.mean + gap * (count / total)
        self.count += count
        for dim in spatial:
            self._add_pairs(x - mean, 1 + dim, dims)

    def _add_pairs(self, x: Tensor, dim: int, dims: list[int]) -> None:
        size = x.shape[dim]
        products = (x.narrow(dim, 0, size - 1) * x.narrow(dim, 1, size - 1)).mean(dims, keepdim=True).squeeze(0)
        self.products = products if self.products is None else self.products + products
        self.pairs += 1

    def correlation(self, default: Tensor) -> Tensor:
        """Return the mean correlation of neighbours."""
        if self.products is None or self.spread is None:
            return default
        variance = self.spread / self.count
        return torch.where(variance > 0, self.products / self.pairs / variance, 0.0).clamp(0.0, 1.0)

    def add_slopes(self, kink: Kink, z: Tensor, shape: tuple[int, ...]) -> None:
        """Count in which segment pre-activations lie."""
        dims = [0, *(1 + dim for dim, size in enumerate(shape) if size < z.shape[1 + dim])]
        segment = torch.stack([(z > point).long() for point in kink.breakpoints]).sum(0)
        shares = [(segment == number).double().sum(dims, keepdim=True).squeeze(0) for number in range(len(kink.slopes))]
        gain = torch.stack([slope**2 * share for slope, share in zip(kink.slopes, shares, strict=True)]).sum(0)
        self.gain = gain if self.gain is None else self.gain + gain
        self.activity = shares[kink.active] if self.activity is None else self.activity + shares[kink.active]


def measured(propagation: Propagation, batches: Iterable[Samples]) -> dict[str, Step]:
    """Return what every layer does to moments, with the moments that it has on data.

    Args:
        propagation: A propagation that has run.
        batches: Inputs with a batch dimension.

    Returns:
        Layer name to step.

    Raises:
        InputError: There is no batch, or one is malformed.
    """
    network = propagation.network
    sums = {layer.name: _Sums() for layer in network.layers}
    for batch in batches:
        _run(propagation, feed_of(network, batch), sums)
    if not any(found.count for found in sums.values()):
        raise InputError("data holds no batch: give at least one.")
    return {layer.name: _step(propagation, layer, sums[layer.name]) for layer in network.layers}


def _run(propagation: Propagation, feed: Below, sums: Mapping[str, _Sums]) -> None:
    network = propagation.network
    weights_of = weighted(propagation.values, dtype=network.dtype)

    def step(layer: Layer, below: Below) -> Tensor:
        shape = tuple(propagation.classes[layer.name].shape)
        if layer.kind == "input":
            value = feed[layer.name].to(network.dtype)
        elif layer.nonlinearity is None:
            value = carried(layer, below, weights_of, biases=weights_of)
        else:
            value = respond(layer, below, weights_of)
            if not isinstance(layer.nonlinearity, Extremum):
                first = layer.connections[0]
                weights = None if first.weight is None else weights_of(first.weight)
                z = along(first, below[first.source], weights)
                sums[layer.name].add_slopes(propagation.kink(layer), z, shape)
        sums[layer.name].add(value, shape, _spatial(propagation, layer))
        return value

    in_forward_order(network, step)


def _spatial(propagation: Propagation, layer: Layer) -> list[int]:
    """Return the dimensions along which neighbours are taps of one channel."""
    shape = propagation.classes[layer.name].shape
    return [dim for dim in range(1, len(shape)) if shape[dim] == 1 and layer.shape[dim] > 1]


def _step(propagation: Propagation, layer: Layer, found: _Sums) -> Step:
    step = propagation.steps[layer.name]
    assert found.mean is not None
    assert found.spread is not None
    variance = found.spread / found.count
    moments = replace(
        step.moments,
        mean=found.mean,
        variance=variance,
        correlation=found.correlation(step.moments.correlation),
        source="data",
    )
    response = step.response
    if found.gain is not None and found.activity is not None:
        response = Response(found.mean, variance, found.gain / found.count, found.activity / found.count)
    expected = None if step.expected is None else (found.mean, variance)
    return Step(moments, response, step.shares, expected)
