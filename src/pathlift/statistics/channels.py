"""Which dimension of a layer counts channels: neurons that differ along it are different features, others are positions.

A weight tells it (`Layer.unit_dim`, or the letters of a product); elementwise operators and sums over positions keep it, and
data movement takes it to where the numbers of the channels arrive. Of an input, and of what has no channels so far, it is the
dimension over which the next weight sums, whatever data movement comes between (files that put channels last begin with one).
It is dimension 1 where no weight follows, and none where that weight sums over a dimension that data movement makes (a signal
without channels, of which an image with one is made).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pathlift.edges import AxisMap, Contraction, Convolution, Dense, Move, Reduce
from pathlift.graph.layers import Connection, Layer
from pathlift.graph.network import Network


def channel_dims(network: Network) -> Mapping[str, int | None]:
    """Return the dimension that counts channels for every layer, None where one sums over all channels."""
    return network.remembered(_channel_dims)


def _channel_dims(network: Network) -> dict[str, int | None]:
    dims: dict[str, int | None] = {}
    for layer in network.layers:
        dims[layer.name] = _of_layer(network, layer, dims)
    return dims


def _of_layer(network: Network, layer: Layer, dims: Mapping[str, int | None]) -> int | None:
    rank = len(layer.shape)
    if layer.unit_dim is not None:
        return layer.unit_dim
    if layer.connections:
        return _above(network, layer.connections[0], layer, dims[layer.connections[0].source])
    usual = _usual(rank)
    return next((dim for dim in dict.fromkeys([usual, *range(1, rank), None]) if _summed_over(network, layer, dim)), usual)


def _above(network: Network, connection: Connection, layer: Layer, dim: int | None) -> int | None:
    """Return the dimension of a layer to which that of the layer below goes."""
    dim, rank = _through(network, connection, layer, dim), len(layer.shape)
    return dim if dim is None or dim < rank else rank - 1


def _summed_over(network: Network, start: Layer, dim: int | None) -> bool:
    """Whether the first weight on the way up from a layer sums over this dimension, or one that is made, where it is None."""
    at = {start.name: dim}
    for layer in network.layers:
        for connection in layer.connections:
            if layer.name in at or connection.source not in at:
                continue
            below = at[connection.source]
            summed = _summed(connection, len(network.layer[connection.source].shape))
            if summed is not None:
                return below in summed
            at[layer.name] = _above(network, connection, layer, below)
    return False


def _summed(connection: Connection, rank: int) -> tuple[int, ...] | None:
    """Return the dimensions of x over which a weight sums; None where there is none that does, constants (resizing) apart."""
    edges = connection.edges
    if connection.weight is None or connection.weight.score_name is None:
        return None
    if isinstance(edges, Convolution):
        return (1,)
    if isinstance(edges, Dense):
        return (rank - 1,)
    if isinstance(edges, Contraction):
        of_x, of_weight, result = edges.letters
        return tuple(axis for axis, letter in enumerate(of_x) if letter in of_weight and letter not in result)
    return (edges.dim,) if isinstance(edges, AxisMap) else None


def _usual(rank: int) -> int | None:
    return min(1, rank - 1) if rank else None


def _through(network: Network, connection: Connection, layer: Layer, dim: int | None) -> int | None:
    edges, below, rank = connection.edges, network.layer[connection.source].shape, len(layer.shape)
    if isinstance(edges, Contraction):
        of_x, of_weight, result = edges.letters
        kept = -1 if dim is None else result.find(of_x[dim])
        made = [axis for axis, letter in enumerate(result) if letter in of_weight and letter not in of_x]
        if made:
            return made[-1]
        return None if kept < 0 else int(kept)
    if dim is None:
        return None if isinstance(edges, Reduce) else _usual(rank)
    if isinstance(edges, Reduce):
        if dim in edges.dims:
            return None
        return dim if edges.keepdim else dim - sum(other < dim for other in edges.dims)
    if isinstance(edges, Move):
        shape = [-1 if other == dim else 1 for other in range(len(below))]
        numbers = torch.arange(1, below[dim] + 1, dtype=torch.float64, device="cpu").reshape(shape).expand(below)
        return _arrived(edges.gather(numbers), dim)
    return dim if rank == len(below) else dim + rank - len(below)


def _arrived(numbers: torch.Tensor, before: int) -> int | None:
    """Return the dimension along which alone the numbers of channels differ; 0 is padding. A single number has none."""
    rank = numbers.dim()
    if not rank:
        return None
    for dim in dict.fromkeys([min(before, rank - 1), *range(1, rank)]):
        others = [other for other in range(rank) if other != dim]
        highest = numbers.amax(others, keepdim=True) if others else numbers
        if bool(((numbers == highest) | (numbers == 0)).all()):
            return int(dim)
    return _usual(rank)
