"""Everything a network can compute over a box of weights and a ball of inputs: intervals, and linear bounds (mathematics §5).

In reading order:

- `weights`: the box as middles and radii; `roundoff`: what rounding adds, there and here,
- `affine`, `nonlinear`: forwards, the interval of every layer, and what a linear bound needs of it (`lines`),
- `relaxation`: what is known of the layers so far; `substitution`: backwards through it with a linear functional,
- `tightening`: narrower intervals and better slopes by optimisation; `local`: what one position of a layer sees,
- `forms`: neurons as linear functions of all that moves; `together`: what those before the kinks can do at once, by squares
  (`kinks`, `parabolas`; `eigenvalues`, `rests`: what these can be),
- `splitting`: the set cut in two at kinks, again and again.

Nothing compares magnitudes of different neurons, so a rescaling of network and box changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pathlift.budget import Clock
from pathlift.graph.interval import Interval
from pathlift.graph.layers import Layer
from pathlift.graph.network import Network
from pathlift.passes.box import Box
from pathlift.passes.enclosure.affine import affine_interval, may_be_shared
from pathlift.passes.enclosure.nonlinear import nonlinear_interval
from pathlift.passes.enclosure.pair import differences
from pathlift.passes.enclosure.relaxation import Relaxation
from pathlift.passes.enclosure.roundoff import Roundoff
from pathlift.passes.enclosure.splitting import split
from pathlift.passes.enclosure.substitution import ELEMENTS, lower_bound
from pathlift.passes.enclosure.tightening import ascended, narrowed
from pathlift.passes.enclosure.together import raised
from pathlift.passes.enclosure.weights import BoxWeights
from pathlift.passes.propagate import in_forward_order
from pathlift.passes.rounding import DOUBLE, Arithmetic


class Enclosure:
    """Intervals of all layers over a box of weights and a ball of inputs, and linear bounds from them.

    Attributes:
        network: The graph.
        batch: Number of samples.
        refine: Whether intervals were narrowed.
        intervals: Layer name to interval, (samples, *shape).
        lost: The samples of which nothing is said, because a value may leave the range of its type, (samples,) bool.
    """

    def __init__(
        self,
        network: Network,
        box: Box,
        feed: Mapping[str, Tensor],
        radius: float,
        arithmetic: Arithmetic | None,
        *,
        refine: bool,
        clock: Clock | None = None,
    ) -> None:
        """Compute the intervals of every layer.

        Args:
            network: The graph, not compact.
            box: The weights.
            feed: Input layer to x, float64, (samples, *shape).
            radius: Largest change of an input, in ℓ^∞.
            arithmetic: How the model's own forward pass rounds; None to enclose exact real arithmetic alone.
            refine: Narrow the intervals before nonlinearities of unknown sign by linear bounds of their own, and what lies
                beside the kinks as well where that helps further up.
            clock: Intervals stay as wide as they are when its time is up.
        """
        self.network = network
        self.refine = refine
        weights = BoxWeights(box, network.layers)
        self._relaxation = Relaxation(network, feed, weights, Roundoff(network, weights, arithmetic))
        self._radius = radius
        self._arithmetic = arithmetic
        self._clock = clock or Clock()
        self._readers = _nonlinear_readers(network) if refine else {}
        self._deep = _moved_above(network, weights) if refine else frozenset()
        self.batch = self._relaxation.batch
        self.lost = torch.zeros(self.batch, dtype=torch.bool, device=network.device)
        self.intervals = self._relaxation.intervals
        in_forward_order(network, self._step)

    def _step(self, layer: Layer, _: Mapping[str, Interval]) -> Interval:
        if layer.kind == "input":
            x = self._relaxation.feed[layer.name]
            reach = self._radius + 4 * DOUBLE.unit * (x.abs() + self._radius)
            interval = Interval(x - reach, x + reach)
        elif layer.nonlinearity is None:
            interval, out_of_range = affine_interval(self._relaxation, layer)
            self.lost |= out_of_range
            if layer.name in self._readers:
                self.intervals[layer.name] = interval
                readers, deep = self._readers[layer.name], layer.name in self._deep
                interval = narrowed(self._relaxation, layer, interval, readers, self._clock, everywhere=deep)
        else:
            interval = nonlinear_interval(self._relaxation, layer)
        limit = math.inf if self._arithmetic is None else self._arithmetic.of(layer).largest
        self.lost |= ~(interval.size.reshape(len(interval.low), -1).amax(1) < limit)  # NaN is lost, too
        self.intervals[layer.name] = interval
        return interval

    def lower(self, functionals: Mapping[str, Tensor]) -> Tensor:
        """Bound linear functionals of layers from below: see `substitution`.

        Args:
            functionals: Layer name to coefficients, (samples, functionals, *shape).

        Returns:
            Shape (samples, functionals).
        """
        return lower_bound(self._relaxation, functionals)

    def beyond(self, first: Enclosure, functionals: Mapping[str, Tensor]) -> Tensor:
        """Bound linear functionals of what this network gives beyond another, at the same input of the ball: see `pair`.

        Args:
            first: The other network's enclosure over the same ball.
            functionals: Layer name to coefficients, (samples, functionals, *shape).

        Returns:
            Lower bounds of a·(u − u_first), (samples, functionals); −inf where nothing is known.
        """
        bounds = lower_bound(differences(first._relaxation, self._relaxation), functionals)
        unknown = (self.lost | first.lost)[:, None] | bounds.isnan()
        return bounds.masked_fill(unknown, -math.inf)

    def tightened(self, functionals: Mapping[str, Tensor], *, steps: int) -> Tensor:
        """Bound linear functionals as `lower` does, and raise what is not positive by ascent: see `tightening`.

        Args:
            functionals: Layer name to coefficients, (samples, functionals, *shape).
            steps: Steps of gradient ascent.

        Returns:
            Shape (samples, functionals).
        """
        return ascended(self._relaxation, functionals, steps=steps, clock=self._clock)

    def raised(self, sample: int, functionals: Mapping[str, Tensor], bounds: Tensor, needed: Tensor) -> Tensor:
        """Raise bounds of linear functionals of one sample, the lowest first, until one stays too low: see `together`.

        Args:
            sample: Its number in the batch.
            functionals: Layer name to coefficients, (1, functionals, *shape).
            bounds: Lower bounds of how far the functionals lie above what they should exceed, (1, functionals).
            needed: What they should exceed, (1, functionals).

        Returns:
            Shape (1, functionals).
        """
        relaxation = self._relaxation.of_sample(sample)
        return raised(relaxation, functionals, bounds, constant=-needed, clock=self._clock)

    def split(self, sample: int, functionals: Mapping[str, Tensor], bounds: Tensor, needed: Tensor, splits: int) -> Tensor:
        """Raise bounds of linear functionals of one sample by cutting the set at kinks: see `splitting`.

        Args:
            sample: Its number in the batch.
            functionals: Layer name to coefficients, (1, functionals, *shape).
            bounds: Lower bounds of how far the functionals lie above what they should exceed, (1, functionals).
            needed: What they should exceed, (1, functionals).
            splits: Number of cuts.

        Returns:
            Shape (1, functionals).
        """
        relaxation = self._relaxation.of_sample(sample)
        return split(relaxation, functionals, bounds, constant=-needed, splits=splits, clock=self._clock)


def _nonlinear_readers(network: Network) -> dict[str, list[Layer]]:
    """Return the layers with a nonlinearity that read each layer whose interval a linear bound can narrow.

    Not so where a neuron reads inputs through one affine layer, and batch norms behind it: each input, each weight and each
    scale stands in it once, so interval arithmetic is exact but for products of two radii.
    """
    readers: dict[str, list[Layer]] = {}
    direct: set[str] = set()
    for layer in network.layers:
        sources = [connection.source for connection in layer.connections]
        if layer.nonlinearity is not None:
            for source in sources:
                if source not in direct:
                    readers.setdefault(source, []).append(layer)
        elif len(sources) == 1:
            below = network.layer[sources[0]]
            if below.kind == "input" or (below.name in direct and layer.normalisation() is not None):
                direct.add(layer.name)
    return readers


def _moved_above(network: Network, weights: BoxWeights) -> frozenset[str]:
    """Return the layers above which, before any weight of a dense layer, shared weights move.

    What such a weight can do depends on the intervals of all neurons that it reads. A weight on one edge is followed exactly
    where the sign of its neuron is known, however wide the interval is.
    """
    found: set[str] = set()
    for layer in reversed(network.layers):
        for connection in layer.connections:
            moves = weights.varies(connection.weight)
            if may_be_shared(connection, layer) if moves else layer.name in found:
                found.add(connection.source)
    return frozenset(found)


__all__ = ["ELEMENTS", "Enclosure", "Interval"]
