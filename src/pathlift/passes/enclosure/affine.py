"""Affine layers, forwards: the interval of Σ θ'·u' + b' over the box, and the slack that a linear bound pays (mathematics §5).

Write θ' = c + δ with |δ| ≤ r, u' = m + e with |e| ≤ ρ (the interval below: middle and radius) and |u'| ≤ s. Then

    Σ θ'·u' = Σ c·m + Σ c·e + Σ δ·u',   so   |Σ θ'·u' − f(m; c)| ≤ f(ρ; |c|) + f(s; r),

and a bias b' = b_c + δ_b adds r_b. f(x; w) is the layer run with values x and weights w. That is the interval.

A linear bound keeps Σ c·u' as it is, as a functional of the layer below, and pays for Σ δ·u' = Σ δ·m + Σ δ·e. The second part
costs |a|·f(ρ; r) for a coefficient a. The first moves alike wherever a weight is used again: with k the elements of the weight

    |Σ_v a(v) Σ_u δ·m| = |Σ_k δ_k·(Σ over the edges of k of a(v)·m(u))| ≤ Σ_k r_k·|Σ over the edges of k of a(v)·m(u)|,

which `substitution` computes as one gradient by the weight. It is never more than |a|·f(|m|; r), and |m| + ρ = s, so both parts
together are never more than the |a|·f(s; r) that intervals pay. So slack holds f(ρ; r) where weights may be shared. Where each
weight stands on one edge there is no difference, and slack holds f(s; r), which saves the gradient.

An example: a kernel of one weight 1 ± 0.1 over the inputs (1, 1), and the functional v₁ − v₂. Each neuron is in 1 ± 0.1, so
intervals give ±0.2. Shared, the weight pays 0.1·|1 − 1| = 0, and v₁ − v₂ = 0 is found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from pathlift.edges.contraction import Dense
from pathlift.graph.interval import Interval
from pathlift.graph.layers import Connection, Layer
from pathlift.passes.enclosure.relaxation import Relaxation
from pathlift.passes.forward import carried


def affine_interval(relaxation: Relaxation, layer: Layer) -> tuple[Interval, Tensor | bool]:
    """Return the interval of an affine layer, and write down its slack.

    Args:
        relaxation: What is known of the layers below.
        layer: The layer.

    Returns:
        The interval, and of which samples something may leave the range of its type.
    """
    weights, roundoff = relaxation.weights, relaxation.roundoff
    below = {connection.source: relaxation.intervals[connection.source] for connection in layer.connections}
    middles = {name: interval.middle for name, interval in below.items()}
    radii = {name: interval.radius for name, interval in below.items()}
    sizes = {name: interval.size for name, interval in below.items()}
    middle = relaxation.for_all(carried(layer, middles, weights.middles, biases=weights.middles))
    magnitude = carried(layer, sizes, weights.sizes, biases=weights.sizes) + _cancelled(relaxation, layer)
    moved = _moved(relaxation, layer, below, middle)
    out_of_range = roundoff.out_of_range(layer, sizes, magnitude + moved)
    # Σ|θ'|·|u'| + |b'| ≤ magnitude + moved: what relative errors are relative to.
    rounding = (roundoff.model_sum(layer) + roundoff.here(layer)) * (magnitude + moved)
    rounding = rounding + (roundoff.underflow(layer, sizes) + roundoff.positions(layer, sizes))
    rounded_up = 1.0 + 4 * roundoff.here(layer)  # the sums of non-negative numbers from here on are rounded themselves
    relaxation.slack[layer.name] = relaxation.for_all(rounding * rounded_up)
    radius = carried(layer, radii, weights.sizes) if layer.connections else 0.0
    radius = radius + relaxation.for_all((moved + rounding) * rounded_up)
    return Interval(middle - radius * rounded_up, middle + radius * rounded_up), out_of_range


def _moved(relaxation: Relaxation, layer: Layer, below: Mapping[str, Interval], like: Tensor) -> Tensor:
    """Return what the radius of the weights can do: f(|u' − μ|; r) + r_b."""
    weights = relaxation.weights
    if not weights.vary(layer):
        return like.new_zeros(())
    centre = weights.centres.get(layer.name, 0.0)
    moving = {name: Interval(interval.low - centre, interval.high - centre).size for name, interval in below.items()}
    return carried(layer, moving, weights.radii, biases=weights.radii, only_weighted=True)


def may_be_shared(connection: Connection, layer: Layer) -> bool:
    """Whether one element of the weight may stand on several edges; not so in a dense layer with one position."""
    return not (isinstance(connection.edges, Dense) and math.prod(layer.shape[:-1]) == 1)


def _cancelled(relaxation: Relaxation, layer: Layer) -> Tensor | float:
    """Return what cancelled in biases t = β − μ·s that are made of a batch norm: |β| + |μ·s| ≤ |t| + 2·|μ·s|."""
    cancelled = relaxation.weights.box.cancelled
    total: Tensor | float = 0.0
    for bias in layer.biases:
        if bias.weight in cancelled:
            total = total + 2 * cancelled[bias.weight].reshape(bias.view)
    return total
