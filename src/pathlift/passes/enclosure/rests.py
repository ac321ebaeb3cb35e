"""What the symbols of affine forms leave over, in a weighted norm: √(Σ_v q(v)·e(v)²), layer by layer (mathematics §5).

(Σ_u w(u)·e(u))² ≤ (Σ_u |w(u)|)·Σ_u |w(u)|·e(u)²: with weights of the layer above that is far less than each e at its worst.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pathlift.edges.weights import Weights
from pathlift.graph.layers import Connection, Layer
from pathlift.passes.enclosure.eigenvalues import scaling_of, square
from pathlift.passes.enclosure.relaxation import UP, Form, Relaxation
from pathlift.passes.enclosure.substitution import transposed

NEURONS = 640
"""Neurons whose squares are bounded together, at most: an eigenvalue problem of this size."""


def rest_of(relaxation: Relaxation, known: Mapping[str, Form], name: str, q: Tensor) -> float:
    """Bound √(Σ_v q(v)·e(v)²), with e what the symbols of a layer leave over.

    From the layer down, each is replaced by those that it reads: e(v) is a sum over connections c of t_c(v) = Σ_u |w|·e(u) and
    of a part of its own (rounding, products of what weights and what neurons below move). So with Σ_c α_c = 1

        √(others + Σ q·e²) ≤ √(others + Σ_c Σ_v q(v)/α_c(v)·t_c(v)²) + √(Σ q·own²).

    α_c is the share of t_c by what the rest of each neuron says, which may end this at any layer.

    Args:
        relaxation: What is known of one sample.
        known: Forms of the layers up to this one.
        name: The layer.
        q: Of the layer's shape.

    Returns:
        The smallest of these bounds.
    """
    best, own = math.inf, 0.0
    taken = {name: q}
    for layer in reversed(relaxation.network.layers):  # the last that is taken reads nothing more
        if layer.name not in taken:
            continue
        best = min(best, own + math.sqrt(sum(_length(part, known[left].rest) ** 2 for left, part in taken.items())))
        if layer.nonlinearity is not None or not layer.connections:
            continue
        weights, form = taken.pop(layer.name), known[layer.name]
        own += _length(weights, form.rounded)
        sizes = [None if edge.weight is None else relaxation.weights.sizes(edge.weight) for edge in layer.connections]
        pieces = _pieces(known, layer, weights, sizes)
        for connection, size, (piece, share) in zip(layer.connections, sizes, pieces, strict=True):
            below = _below(relaxation, connection, size, torch.where(share > 0, piece / share, 0.0))
            source = connection.source
            taken[source] = taken[source] + below if source in taken else below
            if relaxation.weights.varies(connection.weight):
                assert connection.weight is not None
                own += _moves(known[source], _below(relaxation, connection, relaxation.weights.radii(connection.weight), piece))
    return best * UP


def _pieces(known: Mapping[str, Form], layer: Layer, q: Tensor, sizes: Sequence[Weights | None]) -> list[tuple[Tensor, Tensor]]:
    """Return, for each connection, q of the neurons that it leads to, and which share of their rest it brings."""
    if layer.concat is not None or len(sizes) == 1:
        pieces = [q] if layer.concat is None else q.split(layer.concat.sizes, layer.concat.dim)
        return [(piece, torch.ones_like(piece)) for piece in pieces]
    brought = [
        edge.edges.sum(known[edge.source].rest[0], size).expand(layer.shape)
        for edge, size in zip(layer.connections, sizes, strict=True)
    ]
    total = torch.stack(brought).sum(0)
    return [(q, torch.where(total > 0, part / total, 0.0)) for part in brought]


def _below(relaxation: Relaxation, connection: Connection, weights: Weights | None, q: Tensor) -> Tensor:
    """Return p with Σ_v q(v)·(Σ_u w(u→v)·e(u))² ≤ Σ_u p(u)·e(u)² for all e, for weights that are not negative."""
    ones = torch.ones(relaxation.network.layer[connection.source].shape, dtype=torch.float64, device=q.device)
    sums, back = transposed(lambda x: connection.edges.sum(x, weights).expand(q.shape), ones)
    below: Tensor = back((q * sums).unsqueeze(0))[0]
    return below * UP


def _moves(form: Form, q: Tensor) -> float:
    """Bound √(Σ_u q(u)·(u' − centre)²)."""
    taken = (q.flatten() > 0).nonzero()[:, 0]
    rows, weights = form.generators[:, taken].T, q.flatten()[taken]
    if len(rows) > NEURONS or rows.numel() == 0:
        return _length(q, form.linear + form.rest)
    return math.sqrt(square(rows, weights, scaling_of(weights.sqrt()[:, None] * rows))) + _length(q, form.rest)


def _length(q: Tensor, values: Tensor) -> float:
    return math.sqrt(float((q * values * values).sum())) * UP
