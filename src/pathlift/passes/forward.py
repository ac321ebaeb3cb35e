"""The network as it really runs: real activations u(θ, x) on the same graph, in any precision (SPEC §1).

Everything that bounds real activations (drift of a pair, intervals, linear relaxations) is made of the two functions
here: `carried`, the affine part of a layer with weights of the caller's choice, and `respond`, its nonlinearity. A value
of a node has the shape (samples, *node.shape).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pathlift.edges.base import Weights
from pathlift.errors import InputError
from pathlift.graph.layers import Bound, Clamp, Extremum, Leaf, LearnedSlope, Node, Slopes, Start, Term
from pathlift.graph.network import Network
from pathlift.passes.propagate import walk

Values: TypeAlias = "Mapping[Leaf, Tensor]"
Below: TypeAlias = "Mapping[str, Tensor]"
WeightsOf: TypeAlias = "Callable[[Leaf], Weights | None]"
"""The weights that travel along the edges of a leaf; None when they are 0 everywhere."""


def unchanged(value: Tensor) -> Tensor:
    """Return the value itself: the transform of plain, signed weights."""
    return value


def value_of(leaf: Leaf, values: Values) -> Tensor:
    """Return the tensor of a leaf, also of one that is a number of the graph."""
    return values[leaf] if leaf.scalar is None else torch.tensor(leaf.scalar, dtype=torch.float64)


def weighted(*values: Values, dtype: torch.dtype, transform: Callable[..., Tensor] = unchanged) -> WeightsOf:
    """Return the weights f(θ, θ', …) of every leaf.

    Args:
        values: Leaf to tensor, for each argument of ``transform``.
        dtype: Precision.
        transform: Elementwise function.

    Returns:
        A function of the leaf.
    """
    return lambda leaf: Weights(tuple(value_of(leaf, own) for own in values), transform, dtype)


def along(term: Term, x: Tensor, weights: Weights | None) -> Tensor:
    """Carry values along one bundle of edges, sample by sample."""
    if len(x) == 1:
        return term.edges.sum(x[0], weights).unsqueeze(0)
    return torch.vmap(lambda sample: term.edges.sum(sample, weights))(x)


def placed(start: Start, weights: Weights) -> Tensor:
    """Return a bias as it broadcasts over its node."""
    return weights.full().reshape(start.view)


def carried(
    node: Node, below: Below, weights_of: WeightsOf, *, biases: WeightsOf | None = None, only_weighted: bool = False
) -> Tensor:
    """Return Σ_u x[u]·w(u→v) + b(v) for every neuron of a node, w and b as given.

    Args:
        node: Any node but one that takes extrema.
        below: Values of the nodes below, (samples, *shape).
        weights_of: The weights along the edges.
        biases: The biases; None for none.
        only_weighted: Edges without a weight carry nothing: for what changes of the weights do.

    Returns:
        Shape (samples, *node.shape).
    """
    pieces = []
    for place, term in enumerate(node.terms):
        x = below[term.source]
        weights = None if term.weight is None else weights_of(term.weight)
        shape = node.shape if node.concat is None else node.concat.shape(place, node.shape)
        if weights is None and (only_weighted or term.weight is not None):
            pieces.append(x.new_zeros((len(x), *shape)))
        else:
            pieces.append(along(term, x, weights).expand(len(x), *shape))
    if node.concat is not None:
        batch = max(len(piece) for piece in pieces)  # a constant among the pieces has one sample
        return torch.cat([piece.expand(batch, *piece.shape[1:]) for piece in pieces], 1 + node.concat.dim)
    if biases is not None:
        for start in node.starts:
            own = biases(start.weight)
            if own is not None:
                pieces.append(placed(start, own).to(pieces[0].dtype if pieces else own.dtype))
    if not pieces:  # a constant, of which only the biases are left out
        own = weights_of(node.starts[0].weight)
        assert own is not None
        return torch.zeros_like(placed(node.starts[0], own)).expand(1, *node.shape)
    out = pieces[0]
    for piece in pieces[1:]:
        out = out + piece
    return out if node.terms else out.expand(1, *node.shape)


def antecedents(node: Node, below: Below, biases: Sequence[Tensor], kind: Extremum) -> Tensor:
    """Lay everything side by side of which a pooling node takes the extremum.

    Args:
        node: The node.
        below: Values of the nodes below.
        biases: What its starts bring, placed.
        kind: Largest or smallest.

    Returns:
        Shape (samples, antecedents, *node.shape), with the sign turned when the smallest is taken, so that the largest of
        this is ± the value of the neuron; −inf where a neuron has fewer.
    """
    sign = 1.0 if kind.largest else -1.0
    found = [torch.vmap(term.edges.antecedents)(sign * below[term.source]) for term in node.terms]
    batch = max(len(part) for part in found)
    found += [sign * bias.to(found[0].dtype).expand(1, 1, *node.shape) for bias in biases]
    found += [found[0].new_zeros(1, 1, *node.shape)] if kind.zero else []
    return torch.cat([part.expand(batch, part.shape[1], *node.shape) for part in found], 1)


def largest(node: Node, below: Below, biases: Sequence[Tensor], kind: Extremum) -> Tensor:
    """Return the largest of `antecedents`, without laying them out.

    Args:
        node: The node.
        below: Values of the nodes below.
        biases: What its starts bring, placed.
        kind: Largest or smallest.

    Returns:
        Shape (samples, *node.shape): ± the value of the neuron.
    """
    sign = 1.0 if kind.largest else -1.0
    found = [torch.vmap(term.edges.largest)(below[term.source] if kind.largest else -below[term.source]) for term in node.terms]
    out, *rest = [part.expand(len(part), *node.shape) for part in found]
    for part in [*rest, *(sign * bias.to(out.dtype) for bias in biases)]:
        out = torch.maximum(out, part)
    return out.clamp(min=0.0) if kind.zero else out


def ends(node: Node, biases: WeightsOf) -> tuple[Tensor | None, Tensor | None]:
    """Return both ends of a clamp, placed; None for an end that is not there."""
    assert isinstance(node.nonlinearity, Clamp)

    def one(end: Bound) -> Tensor | None:
        if isinstance(end, Start):
            weights = biases(end.weight)
            return torch.zeros((), dtype=torch.float64) if weights is None else placed(end, weights)
        return None if end is None else torch.tensor(end, dtype=torch.float64)

    return one(node.nonlinearity.low), one(node.nonlinearity.high)


def clamped(z: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """Return min(max(z, low), high)."""
    z = z if low is None else torch.maximum(z, low.to(z))
    return z if high is None else torch.minimum(z, high.to(z))


def respond(node: Node, below: Below, weights_of: WeightsOf) -> Tensor:
    """Return the values of a node with a nonlinearity.

    Args:
        node: The node.
        below: Values of the nodes below.
        weights_of: Plain weights: slopes, ends of clamps, biases among the antecedents of a maximum.

    Returns:
        Shape (samples, *node.shape).
    """
    kind = node.nonlinearity
    if isinstance(kind, Extremum):
        biases = [placed(start, own) for start in node.starts if (own := weights_of(start.weight)) is not None]
        out = largest(node, below, biases, kind)
        return out if kind.largest else -out
    if isinstance(kind, LearnedSlope):
        z = below[node.terms[0].source]
        return z.clamp(min=0.0) + along(node.terms[1], z.clamp(max=0.0), weights_of(_weight(node.terms[1])))
    z = carried(node, below, weights_of)
    if isinstance(kind, Slopes):
        if kind == Slopes(1.0, 0.0):
            return z.clamp(min=0.0)
        return kind.plus * z.clamp(min=0.0) + kind.minus * z.clamp(max=0.0)
    return clamped(z, *ends(node, weights_of))


def _weight(term: Term) -> Leaf:
    assert term.weight is not None
    return term.weight


def realise(network: Network, values: Values, feed: Below, dtype: torch.dtype, *, keep: bool = False) -> dict[str, Tensor]:
    """Run the network: real activations u(θ, x).

    Args:
        network: The graph, not compact.
        values: Leaf to tensor: θ. Gradients reach them where they require any.
        feed: Input node to x, shape (samples, *node.shape).
        dtype: Precision.
        keep: Return the values of all nodes; otherwise of the outputs.

    Returns:
        Node name to values, shape (samples, *node.shape).
    """
    weights_of = weighted(values, dtype=dtype)

    def step(node: Node, below: Mapping[str, Tensor]) -> Tensor:
        if node.kind == "input":
            return feed[node.name].to(dtype)
        if node.nonlinearity is not None:
            return respond(node, below, weights_of)
        return carried(node, below, weights_of, biases=weights_of)

    return walk(network, step, keep=keep)


def flat_outputs(network: Network, found: Mapping[str, Tensor], batch: int) -> Tensor:
    """Lay the outputs of each sample side by side.

    Args:
        network: The graph.
        found: Output node to values.
        batch: Number of samples.

    Returns:
        Shape (samples, outputs).
    """
    return torch.cat([found[name].expand(batch, *network.node[name].shape).reshape(batch, -1) for name in network.outputs], 1)


def feed_of(network: Network, samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Check a batch of inputs and give each input node its own.

    Args:
        network: The graph.
        samples: One tensor per input, shape (batch, …).

    Returns:
        Input node to float64 values, shape (batch, 1, …).

    Raises:
        InputError: A number of inputs, a shape or a value is wrong.
    """
    nodes = [node for node in network.nodes if node.kind == "input"]
    if len(samples) != len(nodes):
        raise InputError(f"The model has {len(nodes)} inputs, found {len(samples)} tensors.")
    feed: dict[str, Tensor] = {}
    for place, (node, sample) in enumerate(zip(nodes, samples, strict=True)):
        if tuple(sample.shape[1:]) != node.shape[1:]:
            raise InputError(
                f"Input {place} has shape {tuple(sample.shape)}; expected (batch, {', '.join(map(str, node.shape[1:]))})."
            )
        if len(sample) == 0 or len(sample) != len(samples[0]):
            raise InputError(f"Input {place} has {len(sample)} samples; every input needs the same number, at least 1.")
        value = sample.detach().to(network.device, torch.float64)
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"Input {place} contains NaN or inf.")
        feed[node.name] = value.unsqueeze(1)
    return feed
