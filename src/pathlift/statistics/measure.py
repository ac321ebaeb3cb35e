"""Moments of activations on data: one run of the captured graph over batches of inputs (mathematics §9)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pathlift.edges import Convolution, Edges
from pathlift.edges.window import read
from pathlift.errors import InputError
from pathlift.graph.calling import Samples
from pathlift.graph.layers import Extremum, Layer
from pathlift.passes.forward import Below, along, carried, feed_of, respond, weighted
from pathlift.passes.propagate import in_forward_order
from pathlift.statistics.kinks import Kink, Response
from pathlift.statistics.propagation import Propagation, Step
from pathlift.statistics.shrinkage import Products
from pathlift.statistics.transfer import Weighted

ENTRIES = 1 << 22
"""Entries of windows that are held at once, about."""

SAMPLES = 32
"""Samples that go through a layer at once, however data come: what is found does not depend on that."""

RARE = 0.1
"""What E u² is known up to, as a share of what is usual for one sample: a value that was seen to vary in one sample or two of
many says little."""

ROUNDED = 8.0
"""Units in the last place by which values are taken to be off."""


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


@dataclass
class Seen:
    """First and second moments of what a weight multiplied, over samples and positions above.

    Attributes:
        centre: The mean of the first windows, which is subtracted from all: (groups, columns).
        mean: E u, once all samples were seen: (groups, columns).
        covariance: E u·uᵀ − E u·E uᵀ, (groups, columns, columns).
        variance: How far its entries vary with the choice of samples, of the same shape, see `shrinkage`.
        floor: What E u² is known up to, see `floor_of`: (groups, columns).
    """

    centre: Tensor
    mean: Tensor = field(init=False)
    covariance: Tensor = field(init=False)
    variance: Tensor = field(init=False)
    floor: Tensor = field(init=False)
    _products: Products | None = field(default_factory=Products)
    _sum: Tensor | float = 0.0

    @property
    def diagonal(self) -> Tensor:
        """E u², (groups, columns)."""
        return self.covariance.diagonal(dim1=1, dim2=2).clamp(min=0.0) + self.mean.square()

    def add(self, windows: Tensor) -> None:
        """Take more samples.

        Args:
            windows: Shape (groups, samples, positions, columns), float64.
        """
        assert self._products is not None
        windows = windows - self.centre[:, None, None]
        self._products.add(windows)
        self._sum = self._sum + windows.mean(2).sum(1)

    def finish(self, expected: Tensor, dtype: torch.dtype) -> None:
        """Turn sums into moments.

        Args:
            expected: E u² as it is propagated, (groups, columns).
            dtype: In which u was computed.
        """
        assert self._products is not None
        off = torch.as_tensor(self._sum / self._products.samples)
        self.mean, self.variance = self.centre + off, self._products.variance
        self.covariance = self._products.mean.sub_(off[:, :, None] * off[:, None, :])
        samples, self._products = self._products.samples, None
        self.floor = floor_of(self.diagonal, expected, samples, dtype)


def floor_of(squares: Tensor, expected: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
    """Return what E u² is known up to, where u was seen on a few inputs.

    A value that is all but constant varies by its rounding alone, one that is hardly ever there by the few samples in which it
    is: nothing may be fitted to that. A value that is 0 throughout is known to say nothing.

    Args:
        squares: E u² of each column as it was seen, (groups, columns).
        expected: The same as it is propagated, up to a factor.
        samples: How many there were.
        dtype: In which the values were computed.

    Returns:
        Shape (groups, columns), to be added to variances as those of independent noise.
    """
    ratio = torch.where(expected > 0, squares / expected, 0.0)
    found = ratio[ratio > 0].sort().values
    usual = expected * found[len(found) * 3 // 4] if len(found) else torch.zeros_like(expected)
    return torch.where(squares > 0, (ROUNDED * torch.finfo(dtype).eps) ** 2 * squares + RARE / samples * usual, 0.0)


def in_parts(feeds: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield samples `SAMPLES` at a time.

    Args:
        feeds: Batches of any sizes: input layer to values, shape (samples, …).

    Yields:
        The same samples in the same order; the last part may be smaller.
    """
    held: dict[str, Tensor] = {}
    for feed in feeds:
        held = {name: torch.cat([held[name], value]) if held else value for name, value in feed.items()}
        parts = {name: value.split(SAMPLES) for name, value in held.items()}
        count = len(next(iter(parts.values())))
        for number in range(count - 1):
            yield {name: part[number] for name, part in parts.items()}
        held = {name: part[-1] for name, part in parts.items()}
    if held:
        yield held


def measured(
    propagation: Propagation, batches: Iterable[Samples], *, windows: bool
) -> tuple[dict[str, Step], dict[tuple[str, str], Seen]]:
    """Return what every layer does to moments, with the moments that it has on data.

    Args:
        propagation: A propagation that has run.
        batches: Inputs with a batch dimension.
        windows: Measure all second moments of what weights multiply, too.

    Returns:
        Layer name to step; layer and source to the moments of what the weight between them multiplied.

    Raises:
        InputError: There is no batch, or one is malformed.
    """
    network = propagation.network
    sums = {layer.name: _Sums() for layer in network.layers}
    seen: dict[tuple[str, str], Seen] = {}
    for feed in in_parts(feed_of(network, batch) for batch in batches):
        _run(propagation, feed, sums, seen if windows else None)
    if not any(layer_sums.count for layer_sums in sums.values()):
        raise InputError("data holds no batch: give at least one.")
    transfers = {
        (layer.name, connection.source): transfer
        for layer in network.layers
        if seen and not isinstance(layer.nonlinearity, Extremum)
        for connection, transfer in propagation.transfers(layer)
        if isinstance(transfer, Weighted)
    }
    for (above, source), known in seen.items():
        known.finish(propagation.steps[source].squares(transfers[above, source]), network.dtype)
    return {layer.name: _step(propagation, layer, sums[layer.name]) for layer in network.layers}, seen


def _look(propagation: Propagation, layer: Layer, below: Below, seen: dict[tuple[str, str], Seen]) -> None:
    """Add up what the weights of a layer multiply, sample by sample."""
    if isinstance(layer.nonlinearity, Extremum):
        return
    for connection, transfer in propagation.transfers(layer):
        if not isinstance(transfer, Weighted):
            continue
        if not tells_windows_apart(connection.edges, transfer):
            continue
        for columns in windows_of(connection.edges, transfer, below[connection.source], layer.shape):
            key = (layer.name, connection.source)
            if key not in seen:
                seen[key] = Seen(columns.mean((1, 2)))
            seen[key].add(columns)


def tells_windows_apart(edges: Edges, transfer: Weighted) -> bool:
    """Tell whether each neuron above reads at most one neuron with each entry of a weight: it multiplies windows."""
    _, _, _, taps = transfer.pattern.weight.shape
    return isinstance(edges, Convolution) or (taps == 1 and transfer.reads.merged <= 1)


def windows_of(edges: Edges, transfer: Weighted, x: Tensor, above: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield what a weight multiplies at each position above, some samples at a time.

    Args:
        edges: Its edges, which `tells_windows_apart`.
        transfer: How moments go along them.
        x: Values of the neurons below, (samples, *their shape).
        above: Shape of the neurons above.

    Yields:
        The windows in float64, shape (groups, samples, positions, columns), zeros where they read no neuron.
    """
    _, outs, ins, taps = transfer.pattern.weight.shape
    step = max(1, ENTRIES * outs // (ins * taps * math.prod(above)))
    for some in x.split(step):
        windows = torch.vmap(lambda sample: _columns(edges, transfer, sample, above))(some)
        yield windows.transpose(0, 1)


def _columns(edges: Edges, transfer: Weighted, x: Tensor, above: tuple[int, ...]) -> Tensor:
    """Return the windows of one sample, (groups, positions, columns)."""
    groups, _, ins, taps = transfer.pattern.weight.shape
    x = x.double()
    if not isinstance(edges, Convolution):
        return transfer.pattern.below.split(x).mT
    kernel = transfer.weight.shape[2:]
    for dim, (size, outputs) in enumerate(zip(kernel, above[2:], strict=True)):
        table, axis = edges.taps(dim, outputs, size).to(x.device), 2 + 2 * dim
        inside = (table >= 0) & (table < x.shape[axis])
        x = read(x, torch.where(inside, table, x.shape[axis]), axis)
    axes = [2 + 2 * dim for dim in range(len(kernel))]
    x = x.permute(0, *axes, 1, *(axis + 1 for axis in axes))
    return x.reshape(-1, groups, ins * taps).transpose(0, 1)


def _run(propagation: Propagation, feed: Below, sums: Mapping[str, _Sums], seen: dict[tuple[str, str], Seen] | None) -> None:
    network = propagation.network
    weights_of = weighted(propagation.values, dtype=network.dtype)

    def step(layer: Layer, below: Below) -> Tensor:
        shape = tuple(propagation.classes[layer.name].shape)
        if seen is not None:
            _look(propagation, layer, below, seen)
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


def _step(propagation: Propagation, layer: Layer, sums: _Sums) -> Step:
    step = propagation.steps[layer.name]
    assert sums.mean is not None
    assert sums.spread is not None
    variance = sums.spread / sums.count
    moments = replace(
        step.moments,
        mean=sums.mean,
        variance=variance,
        correlation=sums.correlation(step.moments.correlation),
        source="data",
    )
    response = step.response
    if sums.gain is not None and sums.activity is not None:
        response = Response(sums.mean, variance, sums.gain / sums.count, sums.activity / sums.count)
    expected = None if step.expected is None else (sums.mean, variance)
    return Step(moments, response, step.shares, expected)
