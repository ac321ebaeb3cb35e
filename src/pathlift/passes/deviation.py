"""The activation bound: how far real activations can move apart, for given inputs and any pair or set of weights (§5).

With u(θ, x) the real activations, an affine layer takes the difference of two networks apart as

    u'(v) − u(v) = Σ θ'·(u' − u) + Σ (θ' − θ)·u + Δb,   so   D(v) = f(D; |θ'|) + f(|u(θ, x)|; |θ−θ'|) + |Δb|

bounds it at every neuron if D does below; a ReLU and its kin are 1-Lipschitz and a maximum moves by no more than what it is
taken of. For a pair the same holds with both exchanged, and the smaller of the two is taken neuron by neuron, at every layer.
Unchanged by every rescaling.

u is computed in floating point, as ũ. With e(v) ≥ |ũ − u| below and a relative error ε of a sum (n + SPARE roundings), ũ(v) is
off by

    f(e; |θ|) + ε·f(|ũ|; |θ|) + ε·|b| = f(e + ε·|ũ|; |θ|) + ε·|b|,

a recursion for e that takes the largest |ũ| of all samples. Where |u| is needed, |ũ| + e takes its place.

An example: two edges one after the other, θ = (2, 1), θ' = (3, −1), x = 1. D = 0·3 + 1·1 = 1 behind the first, 1·1 + 2·2 = 5
behind the second, and 1·1 + 3·2 = 7 the other way round; the outputs are 2 and −3, 5 apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pathlift.edges.weights import Weights
from pathlift.graph.layers import Clamp, Extremum, Layer, LearnedSlope, Slopes, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.forward import (
    Below,
    WeightsOf,
    along,
    carried,
    ends,
    largest,
    placed,
    respond,
    weighted,
)
from pathlift.passes.programs import Values, distance
from pathlift.passes.propagate import in_forward_order
from pathlift.passes.rounding import SPARE, UNIT, fan_in, rounding_factor


@dataclass(frozen=True)
class Side:
    """One direction of the bound.

    Attributes:
        values: The weights whose real activations are used.
        most: The largest magnitudes of the weights on the other side.
    """

    values: Values
    most: Values


@dataclass(frozen=True)
class Activations:
    """What is known of the activations of a layer.

    Attributes:
        real: Real activations, for each side, (samples, *shape).
        error: Bound on their rounding error, for each side, (1, *shape), over all samples.
        deviation: Bound on the difference of exact activations, (samples, *shape).
    """

    real: tuple[Tensor, ...]
    error: tuple[Tensor, ...]
    deviation: Tensor


@dataclass(frozen=True)
class Deviation:
    """One computation of the bound.

    Attributes:
        network: The graph, not compact.
        sides: One or two directions.
        gap: |θ − θ'| at most, by weight tensor; or θ and θ'.
        changed: The weight tensors whose gap is not 0.
        feed: Input layer to x, (samples, *shape).
        radius: ‖x' − x‖_∞ at most.
        dtype: Precision.
    """

    network: Network
    sides: tuple[Side, ...]
    gap: tuple[Values, ...]
    changed: set[WeightTensor]
    feed: Below
    radius: float
    dtype: torch.dtype

    def bounds(self) -> dict[str, Tensor]:
        """Bound |u(θ, x) − u(θ', x')| at the outputs.

        Returns:
            Output layer to bounds, (samples, *shape).
        """
        rounded_up = 1.0 + rounding_factor(self.network, self.dtype)  # of the deviation itself, a sum of non-negative terms
        return {name: state.deviation * rounded_up for name, state in in_forward_order(self.network, self._step).items()}

    @cached_property
    def _plain(self) -> list[WeightsOf]:
        return [weighted(side.values, dtype=self.dtype) for side in self.sides]

    @cached_property
    def _sizes(self) -> list[WeightsOf]:
        return [weighted(side.values, dtype=self.dtype, transform=torch.abs) for side in self.sides]

    @cached_property
    def _most(self) -> list[WeightsOf]:
        return [weighted(side.most, dtype=self.dtype, transform=torch.abs) for side in self.sides]

    def _gaps(self, weight: WeightTensor) -> Weights | None:
        transform = torch.abs if len(self.gap) == 1 else distance
        return weighted(*self.gap, dtype=self.dtype, transform=transform)(weight) if weight in self.changed else None

    def _unit(self, layer: Layer) -> float:
        return (fan_in(self.network)[layer.name] + SPARE) * UNIT[self.dtype] * 1.01

    def _step(self, layer: Layer, below: Mapping[str, Activations]) -> Activations:
        sides = range(len(self.sides))
        if layer.kind == "input":
            x = self.feed[layer.name].to(self.dtype)
            error = (UNIT[self.dtype] * x.abs()).amax(0, keepdim=True)
            reach = torch.full_like(x, self.radius * (1 + UNIT[self.dtype]), dtype=torch.float64)
            return Activations((x,) * len(sides), (error,) * len(sides), reach.to(self.dtype))  # inf past it
        real = tuple({name: state.real[side] for name, state in below.items()} for side in sides)
        errors = tuple({name: state.error[side] for name, state in below.items()} for side in sides)
        deviations = {name: state.deviation for name, state in below.items()}
        if layer.nonlinearity is None:
            return self._affine(layer, real, errors, deviations)
        values = tuple(respond(layer, real[side], self._plain[side]) for side in sides)
        exact = isinstance(layer.nonlinearity, Extremum) or layer.nonlinearity == Slopes(1.0, 0.0)
        rounding = tuple(
            self._bent(layer, real[side], errors[side], self._sizes[side], None)
            + (0.0 if exact else self._unit(layer) * _largest(values[side]))
            for side in sides
        )
        if isinstance(layer.nonlinearity, LearnedSlope):  # what a slope multiplies is exact to its error only
            source = layer.connections[0].source
            real = tuple({source: below[source] - errors[side][source]} for side, below in enumerate(real))
        bounds = [self._bent(layer, real[side], deviations, self._most[side], self._gaps) for side in sides]
        return Activations(values, rounding, _smallest(bounds))

    def _affine(self, layer: Layer, real: tuple[Below, ...], errors: tuple[Below, ...], deviations: Below) -> Activations:
        unit = self._unit(layer)
        least = fan_in(self.network)[layer.name] * torch.finfo(self.dtype).tiny  # what may have fallen below the range
        varies = any(
            connection.weight is not None and self._gaps(connection.weight) is not None for connection in layer.connections
        )
        values, roundings, bounds = [], [], []
        for side, below in enumerate(real):
            values.append(carried(layer, below, self._plain[side], biases=self._plain[side]))
            roundings.append(self._rounding(layer, below, errors[side], side) * (1 + unit))
            bound = carried(layer, deviations, self._most[side])
            if varies:
                sizes = {name: x.abs().add_(errors[side][name]) for name, x in below.items()}
                bound = bound + carried(layer, sizes, self._gaps, only_weighted=True)
            for bias in layer.biases:
                change = self._gaps(bias.weight)
                bound = bound if change is None else bound + placed(bias, change)
            bounds.append(bound + least)
        return Activations(tuple(values), tuple(roundings), _smallest(bounds))

    def _rounding(self, layer: Layer, real: Below, errors: Below, side: int) -> Tensor:
        """Return what the real activations of an affine layer may be off by: f(e + ε·|ũ|; |θ|) + ε·|b|."""
        unit = self._unit(layer)
        noisy = {name: errors[name] + unit * _largest(x) for name, x in real.items()}
        rounding = carried(layer, noisy, self._sizes[side])
        for bias in layer.biases:
            size = self._sizes[side](bias.weight)
            assert size is not None
            rounding = rounding + unit * placed(bias, size)
        return rounding

    def _bent(self, layer: Layer, real: Below, moved: Below, weights_of: WeightsOf, gaps: WeightsOf | None) -> Tensor:
        """How far a nonlinearity moves when what it reads moves by ``moved`` and its parameters by ``gaps``."""
        kind = layer.nonlinearity
        if isinstance(kind, Extremum):
            changes = [
                placed(bias, gap) for bias in layer.biases if gaps is not None and (gap := gaps(bias.weight)) is not None
            ]
            return largest(layer, moved, changes, Extremum(largest=True))
        source = layer.connections[0].source
        if isinstance(kind, LearnedSlope):
            slope = layer.connections[1]
            assert slope.weight is not None
            steep = along(slope, moved[source], weights_of(slope.weight))
            out = torch.maximum(moved[source].expand(steep.shape), steep)
            change = None if gaps is None else gaps(slope.weight)
            return out if change is None else out + along(slope, real[source].clamp(max=0.0).abs(), change)
        out = carried(layer, moved, weights_of)
        if isinstance(kind, Slopes):  # none exceeds 1
            return out
        assert isinstance(kind, Clamp)
        for end in ends(layer, gaps) if gaps is not None else ():
            out = out if end is None else torch.maximum(out, end.to(out))
        return out


def _largest(x: Tensor) -> Tensor:
    """Return the largest magnitude over all samples, (1, *shape)."""
    return torch.maximum(x.amax(0, keepdim=True), -x.amin(0, keepdim=True))  # 7 times faster than aminmax along a dimension


def _smallest(bounds: list[Tensor]) -> Tensor:
    return bounds[0] if len(bounds) == 1 else torch.minimum(bounds[0], bounds[1])
