"""Propagation that carries correlations between channels along (`pathlift.statistics.covariances`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations

import torch
from torch import Tensor
from typing_extensions import override

from pathlift.edges import AxisMap, Move, Reduce
from pathlift.edges.wall import Beside
from pathlift.graph.layers import Connection, Extremum, Layer
from pathlift.graph.network import Network
from pathlift.statistics.covariances import (
    PIXEL,
    Lags,
    along_space,
    blurred,
    flattened,
    joined,
    moved_channels,
    of_input,
    side_by_side,
    signed,
    space_maps,
    through_kink,
    through_weight,
)
from pathlift.statistics.propagation import Propagation, Running
from pathlift.statistics.transfer import Along, Elementwise, Sums, Transfer, Weighted


class CorrelatedPropagation(Propagation):
    """One way forward with the correlations of all channels at small distances."""

    def __init__(
        self,
        network: Network,
        inputs: Mapping[str, tuple[Tensor, Tensor]],
        correlation: float,
        pixel: float = PIXEL,
        *,
        running: Running = "stored",
        doubt: float = 0.0,
    ) -> None:
        """Describe what is known.

        Args:
            network: The network.
            inputs: See `Propagation`.
            correlation: See `Propagation`, where no more is known.
            pixel: Correlation of neighbouring pixels of an input.
            running: See `Propagation`.
            doubt: See `Propagation`: these errors are alike at all positions, and independent between channels.
        """
        super().__init__(network, inputs, correlation, running=running, doubt=doubt)
        self.pixel = pixel
        self.lags: dict[str, Lags | None] = {}
        self.read: dict[tuple[str, str], Lags] = {}
        """Layer and source to what is needed of the correlations of what a weight multiplies."""
        self._branches: dict[str, list[tuple[Lags | None, Tensor]]] = {}
        self._last = {connection.source: layer.name for layer in network.layers for connection in layer.connections}

    # ---- which layers have any

    def _stationary(self, name: str) -> bool:
        """Whether a layer has the shape (1, channels, *space), with positions that are alike."""
        layer, classes = self.network.layer[name], self.classes[name].shape
        alone = all(size == 1 for dim, size in enumerate(classes) if dim != 1)
        return len(layer.shape) >= 2 and layer.shape[0] == 1 and self.channels[name] == 1 and alone

    def _vector(self, layer: Layer, tensor: Tensor) -> Tensor:
        shape = [layer.shape[1] if dim == 1 else 1 for dim in range(len(layer.shape))]
        return tensor.expand(shape).reshape(-1)

    # ---- one bundle of edges

    @override
    def _brought(self, layer: Layer, connection: Connection, transfer: Transfer) -> tuple[Tensor, Tensor]:
        mean, variance = super()._brought(layer, connection, transfer)
        lags = self._taken(layer, connection)
        if lags is not None and isinstance(transfer, Weighted):
            reach = [int(most) for most in _extents(transfer, len(lags.space))]
            self.read[layer.name, connection.source] = lags.kept(reach)
        if not self._stationary(layer.name):
            return mean, variance
        above = layer.shape
        if layer.concat is not None:
            above = layer.concat.shape(self._position(layer, connection), layer.shape)
        through = None if lags is None else self._through(lags, connection, transfer, above)
        del lags
        if through is not None and through[1] is not None:
            variance = through[1].reshape([-1 if dim == 1 else 1 for dim in range(len(above))])
        shape = [above[1] if dim == 1 else 1 for dim in range(len(above))]

        def by_channel(x: Tensor) -> Tensor:
            return x.mean([dim for dim in range(len(above)) if dim != 1], keepdim=True).expand(shape).reshape(-1)

        flat, lags_above = by_channel(variance), None if through is None else through[0]
        doubt = self.doubted(layer, connection, transfer)
        if doubt is not None:
            more = by_channel(doubt)
            lags_above = None if lags_above is None else blurred(lags_above, flat, more)
            flat = flat + more
        self._branches.setdefault(layer.name, []).append((lags_above, flat))
        return mean, variance

    def _taken(self, layer: Layer, connection: Connection) -> Lags | None:
        """Return the correlations below, which nobody else holds on to where a layer is the last to read them."""
        source = connection.source
        last = self._last[source] == layer.name and sum(other.source == source for other in layer.connections) == 1
        return self.lags.pop(source, None) if last else self.lags.get(source)

    @staticmethod
    def _position(layer: Layer, connection: Connection) -> int:
        return next(number for number, other in enumerate(layer.connections) if other is connection)

    def _through(
        self, lags: Lags, connection: Connection, transfer: Transfer, above: tuple[int, ...]
    ) -> tuple[Lags, Tensor | None] | None:
        """Return correlations above, and variances where these follow from them."""
        below, moments = self.network.layer[connection.source], self.steps[connection.source].moments
        variance = self._vector(below, moments.variance)
        if isinstance(transfer, Elementwise):
            same = signed(lags, transfer)
            return None if same is None or below.shape != above else (same, None)
        if isinstance(transfer, Weighted):
            weighted = through_weight(lags, connection, transfer, variance.sqrt(), above)
            if weighted is None:
                return None
            correlations, variances = weighted
            more = transfer.variance_of_means(moments.mean, moments.correlation)
            spread = 0.0 if more is None else more.mean([dim for dim in range(more.dim()) if dim != 1])
            return correlations, variances + spread
        if isinstance(connection.edges, Move) and isinstance(transfer, Sums) and transfer.weight is None:
            moved = self._moved(lags, connection.edges, below.shape, above)
            if moved is not None:
                return moved
        matrix = transfer.matrix if isinstance(transfer, Along) else None
        maps = space_maps(connection, below.shape, above, matrix)
        if maps is not None:
            made_lags, gain = along_space(lags, maps)
            weight = transfer.weight if isinstance(transfer, Sums) else None
            edges = connection.edges.pool if isinstance(connection.edges, Beside) else connection.edges
            if isinstance(edges, Reduce) and not edges.keepdim:
                made_lags = _without(made_lags, [dim - 2 for dim in edges.dims])
            alike = weight is None or weight.numel() == 1
            scale = 1.0 if weight is None or not alike else float(weight.reshape(())) ** 2
            return made_lags, variance * gain * scale if alike else None
        return None

    @staticmethod
    def _moved(lags: Lags, edges: Move, below: tuple[int, ...], above: tuple[int, ...]) -> tuple[Lags, None] | None:
        chosen = moved_channels(edges, below, above)
        if chosen is not None:
            index = chosen.to(next(iter(lags.at.values())).device)
            moved = {
                lag: correlation[index] if correlation.dim() == 1 else correlation[index][:, index]
                for lag, correlation in lags.at.items()
            }
            return Lags(moved, lags.space), None
        numbers = torch.arange(below[1] * max(1, torch.Size(below[2:]).numel()), dtype=torch.float64)
        if len(above) == 2 and torch.equal(edges.gather(numbers.reshape(below)).reshape(-1), numbers):
            flat = flattened(lags)
            return None if flat is None else (flat, None)
        return None

    # ---- layers

    @override
    def _done(self, layer: Layer) -> None:
        lags = self._of_layer(layer) if self._stationary(layer.name) else None
        self.lags[layer.name] = lags
        self._branches.pop(layer.name, None)
        if lags is not None and lags.space and any(size > 1 for size in lags.space):
            step = self.steps[layer.name]
            steps = [
                tuple(int(dim == other) for other in range(len(lags.space))) for dim, size in enumerate(lags.space) if size > 1
            ]
            near = torch.stack([lags.of_itself(lag) for lag in steps]).mean(0).double().clamp(0.0, 1.0)
            rho = near.reshape([-1 if dim == 1 else 1 for dim in range(len(layer.shape))])
            self.steps[layer.name] = replace(step, moments=replace(step.moments, correlation=rho))
        for connection in layer.connections:
            if self._last[connection.source] == layer.name:
                self.lags.pop(connection.source, None)

    def _input_in_other_order(self, layer: Layer) -> bool:
        """Whether a layer is an input whose channels stand elsewhere, with nothing but its dimensions permuted."""
        if len(layer.connections) != 1 or layer.biases or layer.nonlinearity is not None:
            return False
        (connection,) = layer.connections
        below = self.network.layer[connection.source]
        if below.kind != "input" or connection.weight is not None or not isinstance(connection.edges, Move):
            return False
        numbers = torch.arange(math.prod(below.shape), dtype=torch.float64, device="cpu").reshape(below.shape)
        moved = connection.edges.gather(numbers)
        orders = permutations(range(1, len(below.shape)))
        return any(torch.equal(numbers.permute(0, *order), moved) for order in orders)

    def _of_layer(self, layer: Layer) -> Lags | None:
        if layer.kind == "input" or self._input_in_other_order(layer):
            return of_input(layer, self.pixel, self.network.device)
        if isinstance(layer.nonlinearity, Extremum):
            return self._of_extremum(layer)
        if layer.normalisation() is not None:
            below = self._taken(layer, layer.connections[0])
            ((_, transfer),) = self.transfers(layer)
            return signed(below, transfer) if below is not None and isinstance(transfer, Elementwise) else None
        branches = self._branches.pop(layer.name, [])
        lags = self._summed(layer, branches)
        step = self.steps[layer.name]
        if step.moments.before is None and step.response is None:
            return lags
        if lags is None or step.moments.before is None:
            return None
        return through_kink(lags, *step.moments.before, step.moments.variance)

    def _summed(self, layer: Layer, branches: list[tuple[Lags | None, Tensor]]) -> Lags | None:
        if all(lags is None for lags, _ in branches):
            return None
        space, rho = tuple(layer.shape[2:]), float(self.rho)
        if layer.concat is not None:
            pieces = [(lags, len(variance)) for lags, variance in branches]
            return side_by_side(pieces, space, rho, self.network.device) if layer.concat.dim == 1 else None
        return branches[0][0] if len(branches) == 1 else joined(branches, layer.shape[1], space, rho)

    def _of_extremum(self, layer: Layer) -> Lags | None:
        """Take a maximum over a window for its mean."""
        connection = layer.connections[0]
        lags, below = self.lags.get(connection.source), self.network.layer[connection.source].shape
        kind = layer.nonlinearity
        assert isinstance(kind, Extremum)
        if lags is None or not self._pools_alike(layer, kind):
            return None
        maps = None if isinstance(connection.edges, AxisMap) else space_maps(connection, below, layer.shape, None)
        if maps is None:
            return None
        pooled = along_space(lags, maps)[0]
        edges = connection.edges
        return _without(pooled, [dim - 2 for dim in edges.dims]) if isinstance(edges, Reduce) and not edges.keepdim else pooled


def _without(lags: Lags, dims: list[int]) -> Lags:
    """Leave out dimensions of one position."""
    kept = [dim for dim in range(len(lags.space)) if dim not in dims]
    at = {
        tuple(lag[dim] for dim in kept): correlation
        for lag, correlation in lags.at.items()
        if all(lag[dim] == 0 for dim in dims)
    }
    return Lags(at, tuple(lags.space[dim] for dim in kept))


def _extents(transfer: Weighted, dims: int) -> list[int]:
    """Return how far apart the taps of a weight read, along each dimension."""
    lags = transfer.reads.lags
    return [0] * dims if lags is None else lags.abs().amax((0, 1)).tolist()
