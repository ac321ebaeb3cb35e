"""Affine layers, forwards: the interval of Σ θ'·u' + b' over the box, and the slack that a linear bound pays (mathematics §5).

Write θ' = c + δ with |δ| ≤ r, u' = m + e with |e| ≤ ρ (the interval below: middle and radius) and |u'| ≤ s. Then

    Σ θ'·u' = Σ c·m + Σ c·e + Σ δ·u',   so   |Σ θ'·u' − f(m; c)| ≤ f(ρ; |c|) + f(s; r),

and a bias b' = b_c + δ_b adds r_b. f(x; w) is the layer run with values x and weights w. That is the interval.

A batch norm is s·z + t with t = β − μ·s, so s·z + t = s·(z − μ) + β: where s moves, t moves with it, and Σ δ·u' above is
δ·(z − μ), not δ·z beside a t of its own. Nothing is lost by that, and δ·μ is not paid twice.

A linear bound keeps Σ c·u' as it is, as a functional of the layer below, and follows Σ δ·u' as well. An element δ_k moves alike
wherever its weight is used again: with k the elements of the weight and G_k(u') = Σ over the edges of k of a(v)·u'(u),

    Σ_v a(v) Σ_u δ·u' = Σ_k δ_k·G_k(u') ≥ −Σ_k r_k·|G_k(u')| ≥ −Σ_k r_k·(slope_k·G_k(u') + rest_k),

with a chord of |G| on g ± R, where g = G(m) and R = Σ over the edges of k of |a(v)|·ρ(u). Where 0 lies outside, slope_k is ±1
and rest_k is 0: the weight has moved to its worst end c_k ∓ r_k, and the functional goes on through that network, exactly.
Elsewhere slope_k = g/R and rest_k = R − g²/R. So what arrives below is a(c − slope·r), other weights for each functional; both
g and R are gradients by the weight. At the middle this pays r·max(|g|, R), where the largest value of |G| would be r·(|g| + R);
that difference, layer by layer, is most of what a certificate for a convolutional network loses otherwise. Where each weight
stands on one edge, G = a·u', and the chords of |u'| serve all functionals.

An example: a kernel of one weight 1 ± 0.1 over the inputs (1, 1), and the functional v₁ − v₂. Each neuron is in 1 ± 0.1, so
intervals give ±0.2. Shared, G = u₁ − u₂ = 0, and v₁ − v₂ = 0 is found. With inputs in [0, 2] and the functional v₁, G is u₁:
slope 1, rest 0, and v₁ ≥ 0.9·u₁ ≥ 0, where m − ρ − 0.1·(m + ρ) would be −0.2.
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
