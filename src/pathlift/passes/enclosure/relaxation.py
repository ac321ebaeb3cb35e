"""The linear relaxation of a network over a box and a ball: what is known of each layer, from the inputs up to where we are.

Of the neurons v of a layer it holds

- an interval with v(θ', x') inside, for every network of the box and every input of the ball,
- the slack e of an affine layer: v = f(u'; c) + b_c + (what shared weights move) + s with |s| ≤ e (`affine`),
- the lines of a nonlinearity: lower_slope·z + lower − e ≤ v ≤ upper_slope·z + upper + e on the interval of z (`nonlinear`).

`substitution` goes back through it with a linear functional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pathlift.graph.interval import Interval
from pathlift.graph.layers import Layer
from pathlift.graph.network import Network
from pathlift.passes.enclosure.lines import Choice, Free, Lines
from pathlift.passes.enclosure.roundoff import Roundoff
from pathlift.passes.enclosure.weights import BoxWeights
from pathlift.passes.rounding import DOUBLE

UP = 1 + 2.0**-30
"""Sums of numbers that are not negative are rounded by less, up to millions of them."""


def of_connection(layer: Layer, position: int) -> str:
    """Return the name of the symbols of the weights of a connection."""
    return f"{layer.name}, connection {position}"


def of_bias(layer: Layer, position: int) -> str:
    """Return the name of the symbols of a bias."""
    return f"{layer.name}, bias {position}"


@dataclass(frozen=True)
class Form:
    """The neurons of one layer, for one sample.

    Attributes:
        centre: (1, *shape).
        blocks: Generators, (symbols, *shape), by the name of their symbols.
        rest: What is beyond the symbols, at most, (1, *shape).
        rounded: The part of it that neither comes from below nor from products of two changes, (1, *shape).
    """

    centre: Tensor
    blocks: Mapping[str, Tensor]
    rest: Tensor
    rounded: Tensor

    @cached_property
    def linear(self) -> Tensor:
        """How far the symbols alone move each neuron, at most, (1, *shape)."""
        return sum((block.abs().sum(0, keepdim=True) for block in self.blocks.values()), torch.zeros_like(self.centre))

    def reach(self, interval: Interval) -> Tensor:
        """Return how far the neurons lie from the centre, at most, by the form and by an interval, (1, *shape)."""
        by_interval = torch.maximum(interval.high - self.centre, self.centre - interval.low)
        return torch.minimum(self.linear + self.rest, by_interval.clamp(min=0.0)) * UP + DOUBLE.least

    @property
    def generators(self) -> Tensor:
        """All generators, one row each, (symbols, neurons)."""
        return torch.cat([self.centre.new_zeros(0, self.centre.numel()), *(block.flatten(1) for block in self.blocks.values())])


@dataclass(frozen=True)
class Bend:
    """A parabola that takes a part of the place of the line above: y ≤ part·(that line) + slope·z + height + curve·(z − c)².

    Each is (1, *shape); the part is 1, and the others are 0, where there is no parabola.
    """

    part: Tensor
    slope: Tensor
    height: Tensor
    curve: Tensor


@dataclass(frozen=True)
class Symbols:
    """Where a bound is to be a linear function of the symbols ε of `forms`, |ε_i| ≤ 1, and not its smallest value.

    Attributes:
        widths: Of the layers whose neurons have a symbol each, how far it moves them, (1, *shape): inputs, nonlinearities.
        losses: Of nonlinearities, what using the symbol costs besides, at most, (1, *shape).
        bends: Parabolas above nonlinearities, whose squares are left to be paid.
        known: The forms, by layer: what shared weights can move is bounded by them.
        factors: Filled on the way down: what each symbol is multiplied by, (samples, functionals, symbols), by their name;
            for the layers above one number for each neuron, also those without a symbol.
        arrived: Filled likewise: the coefficients of nonlinearities, (samples, functionals, *shape).
        parts: Filled likewise, by the name of shared weights' symbols: what the neurons that they read do together, relative to
            what they do one by one, (1, functionals, *shape of the weight). What is there already is taken as it is: where
            it was found for other coefficients, the bound is a guess.
        sums: Filled likewise, and kept: of shared weights, from the coefficients above to Σ_i |Σ a·generator_i| over the edges
            of each, with how many numbers are held for it.
    """

    widths: Mapping[str, Tensor]
    losses: Mapping[str, Tensor]
    known: Mapping[str, Form]
    bends: Mapping[str, Bend] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    arrived: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, tuple[Callable[[Tensor], Tensor], int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Relaxation:
    """What is known of the layers so far; filled in forward order.

    Attributes:
        network: The graph, not compact.
        feed: Input layer to x, float64, (samples, *shape).
        weights: The weights of the box.
        roundoff: What rounding adds.
        intervals: By layer, (samples, *shape); those of a constant may have one sample.
        slack: What is to be paid per unit of coefficient at a layer.
        lines: By layer with a nonlinearity.
        free: Where the slope of a lower line may be chosen.
        constants: Of layers of differences (`pair`), what takes the place of their biases.
        part: Of a relaxation of a part of the network (`local`), its layers by name, the inputs first.
        present: Of such a part, 1 where a layer has neurons, and 0 elsewhere.
    """

    network: Network
    feed: Mapping[str, Tensor]
    weights: BoxWeights
    roundoff: Roundoff
    intervals: dict[str, Interval] = field(default_factory=dict)
    slack: dict[str, Tensor] = field(default_factory=dict)
    lines: dict[str, Lines | Choice] = field(default_factory=dict)
    free: dict[str, Free] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    part: Mapping[str, Layer] | None = None
    present: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers by name, the inputs first."""
        return self.network.layer if self.part is None else self.part

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(next(iter(self.feed.values())))

    def for_all(self, tensor: Tensor) -> Tensor:
        """Give a value that is the same for all samples one entry for each."""
        return tensor if len(tensor) == self.batch else tensor.expand(self.batch, *tensor.shape[1:])

    def of_sample(self, sample: int) -> Relaxation:
        """Return what is known of one sample.

        Args:
            sample: Its number in the batch.

        Returns:
            The relaxation of a batch of one.
        """
        here = slice(sample, sample + 1)

        def own(tensor: Tensor) -> Tensor:
            return tensor if len(tensor) == 1 else tensor[here]

        def bent(lines: Lines | Choice) -> Lines | Choice:
            if isinstance(lines, Choice):
                return Choice(*map(own, (lines.chosen, lines.slope, lines.upper)))
            return Lines(*map(own, (lines.lower_slope, lines.lower, lines.upper_slope, lines.upper)))

        return replace(
            self,
            feed={name: x[here] for name, x in self.feed.items()},
            intervals={name: Interval(own(it.low), own(it.high)) for name, it in self.intervals.items()},
            slack={name: own(slack) for name, slack in self.slack.items()},
            lines={name: bent(lines) for name, lines in self.lines.items()},
            free={name: Free(*map(own, (free.where, free.least, free.most))) for name, free in self.free.items()},
            constants={name: own(constant) for name, constant in self.constants.items()},
        )
