"""What travels: tracks, and the program that says how (mathematics §3, §4).

A track is a number per neuron that obeys a linear recursion, T_i(v) = Σ_j Σ_{u→v} M_ij(θ(u→v))·T_j(u) + b(v). The
path-norm is one track with M = |θ|^q (mathematics §3); the difference of two networks is a second track beside it with
M = [[|θ|, 0], [|θ|−|θ'|, |θ'|]] (§4); the ℓ² metric has three. A `Program` says what M is; `propagate` moves the tracks
through any graph and keeps them in range; `backward` goes back for the scores.

An example: two edges of weight 2 and −3 from a neuron with A = 1 (the path-norm's track) give A = |2|·1 and |−3|·1 above.
Beside it travels D for θ' = (1, −3): D = |θ'|·D(u) + (|θ| − |θ'|)·A(u) = 1·0 + 1·1 and 3·0 + 0·1, the part of the norm that
only θ has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from pathlift.edges.base import Edges
from pathlift.edges.weights import Bundle, Support, Weights
from pathlift.graph.layers import Layer, WeightTensor
from pathlift.passes.scaled import FORWARD_WINDOWS, MantissaWindow, Scaled

Tracks: TypeAlias = "tuple[Scaled | None, ...]"
"""One value per track; None stands for zero everywhere."""

Entries: TypeAlias = "Mapping[tuple[int, int], Weights | None]"
"""The non-zero entries (i, j) of M for one weight tensor; None stands for 1."""


class Program(ABC):
    """What travels: number of tracks, their weights, and the values that biases start with.

    Attributes:
        tracks: Number of tracks.
        signed: The tracks that may have negative entries.
        largest: Take maxima instead of sums (q = ∞).
        dtype: Precision of the tracks.
        batch: Number of samples that travel together, along a dimension before those of the layers; None for one without.
        degree: Degree in which the tracks depend on the scale of the weights of one bundle of edges.
        ranges: Whether the tracks may have an exponent for each neuron (`pathlift.passes.wide`): non-negative ones.
    """

    tracks: int = 1
    signed: frozenset[int] = frozenset()
    largest: bool = False
    dtype: torch.dtype
    batch: int | None = None
    degree: float = 1.0
    ranges: bool = False

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the dimensions before those of the layers."""
        return () if self.batch is None else (self.batch,)

    @property
    def window(self) -> MantissaWindow:
        """Where the mantissas of the tracks are kept."""
        return FORWARD_WINDOWS[self.dtype]

    @abstractmethod
    def edge(self, weight: WeightTensor) -> Entries:
        """Return M for the edges that carry this weight.

        Args:
            weight: The weight.

        Returns:
            Its non-zero entries.
        """

    def bundle(self, weight: WeightTensor) -> Bundle | None:
        """Return all non-zero entries of M at once, for programs of many tracks.

        Args:
            weight: The weight.

        Returns:
            The entries; None to ask for them one by one (`edge`).
        """
        del weight
        return None

    @abstractmethod
    def start(self, weight: WeightTensor) -> Mapping[int, Weights]:
        """Return what a bias adds to each track.

        Args:
            weight: The bias.

        Returns:
            Track to values; tracks that are not named get nothing.
        """

    @abstractmethod
    def inputs(self, layer: Layer) -> Tracks:
        """Return the tracks of the input neurons.

        Args:
            layer: An input layer.

        Returns:
            The tracks.
        """


class SupportProgram(Program):
    """A program whose weights are replaced by 1 where they are not zero."""

    def __init__(self, program: Program) -> None:
        """Wrap a program.

        Args:
            program: The program.
        """
        self.program = program
        self.tracks = program.tracks
        self.largest = program.largest
        self.dtype = program.dtype
        self.batch = program.batch

    def inputs(self, layer: Layer) -> Tracks:
        """See `Program.inputs`."""
        return self.program.inputs(layer)

    def edge(self, weight: WeightTensor) -> Entries:
        """See `Program.edge`."""
        return {key: None if w is None else Support(w) for key, w in self.program.edge(weight).items()}

    def start(self, weight: WeightTensor) -> Mapping[int, Weights]:
        """See `Program.start`."""
        return {key: Support(w) for key, w in self.program.start(weight).items()}


def apply(edges: Edges, x: Tensor, w: Weights | None, program: Program) -> Tensor:
    """Return what arrives along a bundle of edges, sums or maxima as the program asks."""
    function = edges.max if program.largest else edges.sum
    return function(x, w) if program.batch is None else torch.vmap(lambda sample: function(sample, w))(x)


class Receivers(NamedTuple):
    """Who is told of what comes back from the outputs (`pathlift.passes.backward`).

    Attributes:
        share: Called with each use of a scored weight and the share of the path mass that goes through it there.
        unit: Called with each layer that has units and its neurons' shares of the path mass.
        bias: Called with each use of a scored bias and the derivative of the share by it: Σ G(v) over its neurons, float64.
        lost: Whether float32 has lost some shares of a weight: they are below its smallest normal number, and not 0 in truth.
    """

    share: Callable[[WeightTensor, Tensor], None] | None = None
    unit: Callable[[Layer, Tensor], None] | None = None
    bias: Callable[[WeightTensor, Tensor], None] | None = None
    lost: Callable[[WeightTensor, Tensor], bool] | None = None
