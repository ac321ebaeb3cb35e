"""The network as it really runs: real activations u(θ, x) on the same graph, in any precision (mathematics §1).

Everything that bounds real activations (`deviation`, `enclosure`) is made of the two functions
here: `carried`, the affine part of a layer with weights of the caller's choice, and `respond`, its nonlinearity. A value
of a layer has the shape (samples, *layer.shape).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pathlift.edges.weights import Weights
from pathlift.errors import InputError
from pathlift.graph.calling import Samples
from pathlift.graph.layers import Bias, Bound, Clamp, Connection, Extremum, Layer, LearnedSlope, Slopes, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.programs import Values
from pathlift.passes.propagate import in_forward_order

Below: TypeAlias = "Mapping[str, Tensor]"
WeightsOf: TypeAlias = "Callable[[WeightTensor], Weights | None]"
"""The weights that travel along the edges of a weight tensor; None when they are 0 everywhere."""


def unchanged(value: Tensor) -> Tensor:
    """Return the value itself: the transform of plain, signed weights."""
    return value


def value_of(weight: WeightTensor, values: Values) -> Tensor:
    """Return the tensor of a weight tensor, also of one that is a number of the graph."""
    return values[weight] if weight.scalar is None else torch.tensor(weight.scalar, dtype=torch.float64)


def weighted(*values: Values, dtype: torch.dtype, transform: Callable[..., Tensor] = unchanged) -> WeightsOf:
    """Return the weights f(θ, θ', …) of every weight tensor.

    Args:
        values: Weight tensor to tensor, for each argument of ``transform``.
        dtype: Precision.
        transform: Elementwise function.

    Returns:
        A function of the weight tensor.
    """
    return lambda weight: Weights(tuple(value_of(weight, each) for each in values), transform, dtype)


def along(connection: Connection, x: Tensor, weights: Weights | None) -> Tensor:
    """Carry values along one bundle of edges, sample by sample."""
    if len(x) == 1:
        return connection.edges.sum(x[0], weights).unsqueeze(0)
    return torch.vmap(lambda sample: connection.edges.sum(sample, weights))(x)


def placed(bias: Bias, weights: Weights) -> Tensor:
    """Return a bias as it broadcasts over its layer."""
    return weights.full().reshape(bias.view)


def carried(
    layer: Layer, below: Below, weights_of: WeightsOf, *, biases: WeightsOf | None = None, only_weighted: bool = False
) -> Tensor:
    """Return Σ_u x[u]·w(u→v) + b(v) for every neuron of a layer, w and b as given.

    Args:
        layer: Any layer but one that takes extrema.
        below: Values of the layers below, (samples, *shape).
        weights_of: The weights along the edges.
        biases: The biases; None for none.
        only_weighted: Edges without a weight carry nothing: for what changes of the weights do.

    Returns:
        Shape (samples, *layer.shape).
    """
    pieces = []
    for position, connection in enumerate(layer.connections):
        x = below[connection.source]
        weights = None if connection.weight is None else weights_of(connection.weight)
        shape = layer.shape if layer.concat is None else layer.concat.shape(position, layer.shape)
        if weights is None and (only_weighted or connection.weight is not None):
            pieces.append(x.new_zeros((len(x), *shape)))
        else:
            pieces.append(along(connection, x, weights).expand(len(x), *shape))
    if layer.concat is not None:
        batch = max(len(piece) for piece in pieces)  # a constant among the pieces has one sample
        return torch.cat([piece.expand(batch, *piece.shape[1:]) for piece in pieces], 1 + layer.concat.dim)
    if biases is not None:
        for bias in layer.biases:
            added = biases(bias.weight)
            if added is not None:
                pieces.append(placed(bias, added).to(pieces[0].dtype if pieces else added.dtype))
    if not pieces:  # a constant, of which only the biases are left out
        left_out = weights_of(layer.biases[0].weight)
        assert left_out is not None
        return torch.zeros_like(placed(layer.biases[0], left_out)).expand(1, *layer.shape)
    out = pieces[0]
    for piece in pieces[1:]:
        out = out + piece
    return out if layer.connections else out.expand(1, *layer.shape)


def antecedents(layer: Layer, below: Below, biases: Sequence[Tensor], kind: Extremum) -> Tensor:
    """Lay everything side by side of which a pooling layer takes the extremum.

    Args:
        layer: The layer.
        below: Values of the layers below.
        biases: What its biases bring, placed.
        kind: Largest or smallest.

    Returns:
        Shape (samples, antecedents, *layer.shape), with the sign turned when the smallest is taken, so that the largest of
        this is ± the value of the neuron; −inf where a neuron has fewer.
    """
    sign = 1.0 if kind.largest else -1.0
    parts = [torch.vmap(connection.edges.antecedents)(sign * below[connection.source]) for connection in layer.connections]
    batch = max(len(part) for part in parts)
    parts += [sign * bias.to(parts[0].dtype).expand(1, 1, *layer.shape) for bias in biases]
    parts += [parts[0].new_zeros(1, 1, *layer.shape)] if kind.zero else []
    return torch.cat([part.expand(batch, part.shape[1], *layer.shape) for part in parts], 1)


def largest(layer: Layer, below: Below, biases: Sequence[Tensor], kind: Extremum) -> Tensor:
    """Return the largest of `antecedents`, without laying them out.

    Args:
        layer: The layer.
        below: Values of the layers below.
        biases: What its biases bring, placed.
        kind: Largest or smallest.

    Returns:
        Shape (samples, *layer.shape): ± the value of the neuron.
    """
    sign = 1.0 if kind.largest else -1.0
    parts = [
        torch.vmap(connection.edges.largest)(below[connection.source] if kind.largest else -below[connection.source])
        for connection in layer.connections
    ]
    out, *rest = [part.expand(len(part), *layer.shape) for part in parts]
    for part in [*rest, *(sign * bias.to(out.dtype) for bias in biases)]:
        out = torch.maximum(out, part)
    return out.clamp(min=0.0) if kind.zero else out


def ends(layer: Layer, biases: WeightsOf) -> tuple[Tensor | None, Tensor | None]:
    """Return both ends of a clamp, placed; None for an end that is not there."""
    assert isinstance(layer.nonlinearity, Clamp)

    def value(end: Bound) -> Tensor | None:
        if isinstance(end, Bias):
            weights = biases(end.weight)
            return torch.zeros((), dtype=torch.float64) if weights is None else placed(end, weights)
        return None if end is None else torch.tensor(end, dtype=torch.float64)

    return value(layer.nonlinearity.low), value(layer.nonlinearity.high)


def clamped(z: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """Return min(max(z, low), high)."""
    z = z if low is None else torch.maximum(z, low.to(z))
    return z if high is None else torch.minimum(z, high.to(z))


def respond(layer: Layer, below: Below, weights_of: WeightsOf) -> Tensor:
    """Return the values of a layer with a nonlinearity.

    Args:
        layer: The layer.
        below: Values of the layers below.
        weights_of: Plain weights: slopes, ends of clamps, biases among the antecedents of a maximum.

    Returns:
        Shape (samples, *layer.shape).
    """
    kind = layer.nonlinearity
    if isinstance(kind, Extremum):
        biases = [placed(bias, weights) for bias in layer.biases if (weights := weights_of(bias.weight)) is not None]
        out = largest(layer, below, biases, kind)
        return out if kind.largest else -out
    if isinstance(kind, LearnedSlope):
        z, slope = below[layer.connections[0].source], layer.connections[1]
        assert slope.weight is not None
        return z.clamp(min=0.0) + along(slope, z.clamp(max=0.0), weights_of(slope.weight))
    z = carried(layer, below, weights_of)
    if isinstance(kind, Slopes):
        if kind == Slopes(1.0, 0.0):
            return z.clamp(min=0.0)
        return kind.plus * z.clamp(min=0.0) + kind.minus * z.clamp(max=0.0)
    return clamped(z, *ends(layer, weights_of))


def forward(network: Network, values: Values, feed: Below, dtype: torch.dtype, *, keep: bool = False) -> dict[str, Tensor]:
    """Run the network: real activations u(θ, x).

    Args:
        network: The graph, not compact.
        values: Weight tensor to tensor: θ. Gradients reach them where they require any.
        feed: Input layer to x, shape (samples, *layer.shape).
        dtype: Precision.
        keep: Return the values of all layers; otherwise of the outputs.

    Returns:
        Layer name to values, shape (samples, *layer.shape).
    """
    weights_of = weighted(values, dtype=dtype)

    def step(layer: Layer, below: Mapping[str, Tensor]) -> Tensor:
        if layer.kind == "input":
            return feed[layer.name].to(dtype)
        if layer.nonlinearity is not None:
            return respond(layer, below, weights_of)
        return carried(layer, below, weights_of, biases=weights_of)

    return in_forward_order(network, step, keep=keep)


def flat_outputs(network: Network, values: Mapping[str, Tensor], batch: int) -> Tensor:
    """Lay the outputs of each sample side by side.

    Args:
        network: The graph.
        values: Output layer to values.
        batch: Number of samples.

    Returns:
        Shape (samples, outputs).
    """
    return torch.cat([values[name].expand(batch, *network.layer[name].shape).reshape(batch, -1) for name in network.outputs], 1)


def feed_of(network: Network, x: Samples) -> dict[str, Tensor]:
    """Check a batch of inputs and give each input layer its own.

    Args:
        network: The graph.
        x: One tensor per input, shape (batch, …), in the containers in which the model takes them.

    Returns:
        Input layer to float64 values, shape (batch, 1, …).

    Raises:
        InputError: A number of inputs, a shape or a value is wrong.
    """
    layers = [layer for layer in network.layers if layer.kind == "input"]
    samples = network.graph.form.tensors(x)
    feed: dict[str, Tensor] = {}
    for number, (layer, sample) in enumerate(zip(layers, samples, strict=True)):
        if tuple(sample.shape[1:]) != layer.shape[1:]:
            raise InputError(
                f"Input {number} has shape {tuple(sample.shape)}; expected (batch, {', '.join(map(str, layer.shape[1:]))})."
            )
        if len(sample) == 0 or len(sample) != len(samples[0]):
            raise InputError(f"Input {number} has {len(sample)} samples; every input needs the same number, at least 1.")
        value = sample.detach().to(network.device, torch.float64)
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"Input {number} contains NaN or inf.")
        feed[layer.name] = value.unsqueeze(1)
    return feed
