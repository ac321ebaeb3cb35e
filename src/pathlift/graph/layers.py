"""Layers of neurons and the edges between them (mathematics §1).

A `Layer` is a layer of neurons: the elements of one tensor. Its pre-activation is a sum over `connections` (edges from the
elements of an earlier layer, with weights) plus `starts` (biases, where paths of the set H begin). A `WeightTensor` is a weight
tensor: a parameter, a constant, or something computed from them alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pathlift.edges import Edges
from pathlift.edges.axis import Axis, expand, multiplicity
from pathlift.graph.expressions import Constant, Expression, Normalisation


@dataclass(frozen=True, eq=False)
class WeightTensor:
    """One weight tensor of the theory: a parameter, a derived weight or a constant.

    Attributes:
        expression: How its value follows from the parameters.
        shape: Shape of the value.
        score_name: The name under which `path_magnitude` reports it, None for constants.
        movement: When the value only moves elements of parameters around (a transpose, a slice), up to factors: the
            movement, by whose transpose its scores go back to the parameters themselves.
        scalar: The value, when it is one number known at capture time.
        requires: Names of the state tensors that the value depends on.
    """

    expression: Expression
    shape: tuple[int, ...]
    score_name: str | None
    movement: Expression | None = None
    scalar: float | None = None
    requires: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """A name for messages."""
        return self.score_name or ", ".join(sorted(self.requires)) or "a constant of the graph"


def scalar_weight(value: float) -> WeightTensor:
    """Return a constant weight tensor that holds one number."""
    return WeightTensor(Constant(value), (), None, scalar=float(value))


@dataclass(frozen=True, eq=False)
class Connection:
    """Edges from the neurons of ``source`` with weights from ``weight`` (None: every edge weighs 1)."""

    source: str
    edges: Edges
    weight: WeightTensor | None = None


@dataclass(frozen=True, eq=False)
class Bias:
    """Biases: ``weight``, reshaped to ``view``, broadcasts over the layer's shape."""

    weight: WeightTensor
    view: tuple[int, ...]


Bound: TypeAlias = "Bias | float | None"
"""One end of a clamp: biases, a number that is no path (0), or none."""


@dataclass(frozen=True)
class Slopes:
    """y = plus·max(z, 0) + minus·min(z, 0), z the pre-activation; no slope exceeds 1 in magnitude."""

    plus: float
    minus: float


@dataclass(frozen=True)
class LearnedSlope:
    """PReLU: y = max(z, 0) + a·min(z, 0), where the layer's second connection carries a."""


@dataclass(frozen=True, eq=False)
class Clamp:
    """y = min(max(z, low), high), where z is what the layer's only connection brings."""

    low: Bound
    high: Bound


@dataclass(frozen=True)
class Extremum:
    """y is the largest (or smallest) of everything that the connections and biases bring, and of 0 when ``zero``."""

    largest: bool
    zero: bool = False


Nonlinearity: TypeAlias = "Slopes | LearnedSlope | Clamp | Extremum"
"""What a neuron does with its pre-activation; None for identity neurons. Path activations do not see it (mathematics §3)."""


@dataclass(frozen=True)
class Concat:
    """The terms of a layer are pieces laid side by side along ``dim``; ``sizes`` are their lengths there.

    In a compact graph one may go on from another, of which it adds more pieces to the end. A pass need not lay out the first
    piece again where that has ``room``, as long as the longest of those that go on from it; only one of them ``goes_on`` there.
    """

    dim: int
    sizes: tuple[int, ...]
    room: int = 0
    goes_on: bool = False

    def shape(self, piece: int, layer_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a piece.

        Args:
            piece: Which one.
            layer_shape: Shape of the layer.

        Returns:
            Its shape.
        """
        return (*layer_shape[: self.dim], self.sizes[piece], *layer_shape[self.dim + 1 :])


@dataclass(frozen=True)
class Origin:
    """Where a layer comes from, for messages: module path, operator, source line."""

    module: str
    op: str
    where: str


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of neurons.

    Attributes:
        name: Unique name.
        shape: Shape of the tensor of neurons, batch dimension (1) included.
        connections: Incoming edges.
        biases: Biases.
        concat: None when connections and biases add up; otherwise how the connections, one piece each, are laid side by side.
        origin: Module, operator and source line.
        nonlinearity: What the neurons do with their pre-activation; None for identity neurons.
        unit_dim: The dimension that counts channels or units when a scored weight of `unit_name` makes this layer.
        unit_name: What these units go by: the module, or the weight where a module has several.
        axes: In a compact network, what each entry of the tensor stands for (`pathlift.edges.axis`); None: itself.
        dtype: The floating-point type in which the model itself computes this layer.
        blur: How far the model's own weights of constant edges may be off, in units of roundoff: positions between pixels
            are computed in floating point. 0 where constants are numbers of the model.
    """

    name: str
    shape: tuple[int, ...]
    connections: tuple[Connection, ...]
    biases: tuple[Bias, ...]
    origin: Origin
    concat: Concat | None = None
    nonlinearity: Nonlinearity | None = None
    unit_dim: int | None = None
    unit_name: str | None = None
    axes: tuple[Axis, ...] | None = None
    dtype: torch.dtype = torch.float32
    blur: float = 0.0

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape with one entry per neuron."""
        return self.shape if self.axes is None else tuple(axis.size for axis in self.axes)

    def multiplicity(self, device: torch.device) -> Tensor | None:
        """Return how many neurons each entry stands for, None for one each; see `pathlift.edges.axis.multiplicity`."""
        return None if self.axes is None else multiplicity(self.axes, device)

    def expand(self, tensor: Tensor) -> Tensor:
        """Return a compact tensor of this layer with one entry per neuron."""
        return expand(self.axes, tensor)

    def normalisation(self) -> Normalisation | None:
        """Return what the layer stores of its input where it normalises it; None for any other layer."""
        return self.biases[0].weight.expression.normalisation() if self.biases else None

    @cached_property
    def moves(self) -> bool:
        """Whether the layer only moves values of layers below about, and makes no new ones."""
        if self.concat is not None:
            return True
        return (
            len(self.connections) == 1
            and not self.biases
            and self.connections[0].weight is None
            and not self.connections[0].edges.fresh
        )

    @property
    def kind(self) -> Literal["input", "hidden"]:
        """``input`` for the network's input neurons."""
        return "input" if self.origin.op == "input" else "hidden"
