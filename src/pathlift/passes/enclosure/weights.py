"""The weights of a box as middle and radius: θ' = c + δ with |δ| ≤ r for every network of the box (mathematics §5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pathlift.edges.weights import Weights
from pathlift.graph.interval import Interval
from pathlift.graph.layers import Layer, WeightTensor
from pathlift.passes.box import Box
from pathlift.passes.forward import unchanged, value_of
from pathlift.passes.rounding import DOUBLE


class BoxWeights:
    """The middle c and the radius r of every weight tensor.

    Attributes:
        box: The box.
        middle: Weight tensor to c.
        radius: Weight tensor to r; None where nothing varies. Of a shift t = β − μ·s that of β alone.
        centres: Batch norms by the name of their layer to μ, placed: s moves z − μ.
    """

    def __init__(self, box: Box, layers: Iterable[Layer] = ()) -> None:
        """Take the middle of every interval.

        The middle m = low/2 + high/2 is rounded, so both ends lie within (high − low)/2 + u·|m| of it; the computed radius is
        itself rounded. Hence r = radius·(1 + 4u) + size·2u, which covers both with room.

        Args:
            box: The box.
            layers: Those of the network; a batch norm among them is s·(z − μ) + β, so its shift moves with its scale.
        """
        self.box = box
        self.middle: dict[WeightTensor, Tensor] = {}
        self.radius: dict[WeightTensor, Tensor | None] = {}
        self._largest: dict[WeightTensor, float] = {}
        for weight, low in box.lower.items():
            interval = Interval(low, box.upper[weight])
            radius = interval.radius * (1 + 4 * DOUBLE.unit) + interval.size * (2 * DOUBLE.unit)
            self.middle[weight] = interval.middle
            self.radius[weight] = None if interval.exact else radius
            self._largest[weight] = float(interval.size.max())
        self.centres = self._centres(tuple(layers))

    def _centres(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Return μ of the layers in which t stands beside its s; what is left of t there is β − μ·c_s.

        Its middle is computed with a few roundings of |β| + |μ·s| ≤ 2·|β| + |t|, which the radius of β takes up.
        """
        readers: dict[WeightTensor, list[Layer]] = {}
        for layer in layers:
            for bias in layer.biases:
                if bias.weight in self.box.shifts:
                    readers.setdefault(bias.weight, []).append(layer)
        centres: dict[str, Tensor] = {}
        for weight, reading in readers.items():
            if all(_normalises(layer) for layer in reading):
                shift = self.box.shifts[weight]
                size = Interval(self.box.lower[weight], self.box.upper[weight]).size
                off = 16 * DOUBLE.unit * (2 * shift.bias.size + size)
                scale = reading[0].connections[0].weight
                assert scale is not None
                self.middle[weight] = shift.bias.middle - shift.mean * self.middle[scale]
                self.radius[weight] = shift.bias.radius * (1 + 4 * DOUBLE.unit) + off
                centres |= {layer.name: shift.mean.reshape(layer.biases[0].view) for layer in reading}
        return centres

    def varies(self, weight: WeightTensor | None) -> bool:
        """Whether a weight may take more than one value."""
        return weight is not None and self.radius.get(weight) is not None

    def vary(self, layer: Layer) -> bool:
        """Whether any weight of a layer may take more than one value."""
        return any(map(self.varies, [*(edge.weight for edge in layer.connections), *(bias.weight for bias in layer.biases)]))

    def middles(self, weight: WeightTensor) -> Weights:
        """Return the weights c as they travel along edges."""
        return Weights((value_of(weight, self.middle),), unchanged, torch.float64)

    def sizes(self, weight: WeightTensor) -> Weights:
        """Return the weights |c| as they travel along edges."""
        return Weights((value_of(weight, self.middle),), torch.abs, torch.float64)

    def radii(self, weight: WeightTensor) -> Weights | None:
        """Return the weights r as they travel along edges; None where they are 0."""
        radius = self.radius.get(weight)
        return None if radius is None else Weights((radius,), unchanged, torch.float64)

    def largest(self, weight: WeightTensor | None) -> float:
        """Return the largest magnitude that an element of a weight tensor may have; 1 for edges without one."""
        if weight is None:
            return 1.0
        return abs(weight.scalar) if weight.scalar is not None else self._largest[weight]


def _normalises(layer: Layer) -> bool:
    """Whether a layer is s·z + t with the s that t = β − μ·s is made of."""
    norm, edge = layer.normalisation(), layer.connections[0].weight if len(layer.connections) == 1 else None
    return norm is not None and edge is not None and len(layer.biases) == 1 and edge.expression == norm.scale
