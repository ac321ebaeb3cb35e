"""What rounding adds to each layer: of the model's own forward pass in its own types, and of the computation here (§8).

In a type with unit roundoff u a sum of n products, in any order, is Σ w·x + e with |e| ≤ n·u·Σ|w·x|: no restriction on n·u is
needed (Jeannerod and Rump, 2013). What a product or a partial sum loses when it falls below the normal numbers is absolute
and comes on top (`underflow`). So what rounding adds to a layer is (a relative error)·(Σ|θ'|·|u'| + |b'|) + (an absolute one).

An example: a neuron 3·x − 3·y with x = y = 1 in float32 is 0, and its model may give any number up to n·u·(|3| + |3|), with
n = 2 products and `SPARE` = 8 roundings besides (2 + 8)·2⁻²⁴·6 = 3.6e-6: the magnitudes count, not the value.

Each number here is one of the terms that `tests/test_hunt.py` takes out, one at a time, to see that weights are found that
break the certificate without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pathlift.graph.layers import Layer
from pathlift.graph.network import Network
from pathlift.passes.enclosure.weights import BoxWeights
from pathlift.passes.rounding import DOUBLE, SPARE, Arithmetic, fan_in


class Roundoff:
    """Relative and absolute errors, layer by layer."""

    def __init__(self, network: Network, weights: BoxWeights, arithmetic: Arithmetic | None) -> None:
        """Choose the arithmetic.

        Args:
            network: The graph.
            weights: The weights.
            arithmetic: How the model's own forward pass rounds; None to cover the computation here alone.
        """
        self.network = network
        self.weights = weights
        self.arithmetic = arithmetic

    def here(self, layer: Layer) -> float:
        """Return the relative error of the computation here at one layer, in float64.

        Forwards a neuron is a sum of n products; backwards a functional is a sum over the neurons of the layer, and its
        coefficients are products that are rounded in turn: a·c·(1 + η) instead of a·c moves the bound by |η|·|a|·|c·u|, which
        is a part of |a|·(relative error)·(Σ|c|·|u| + |b|), the slack of the layer. Each of these sums has at most
        n + (neurons) + SPARE roundings; there are three of them forwards, two backwards and three for weights that move
        alike, and 16 leaves room.
        """
        roundings = fan_in(self.network)[layer.name] + math.prod(layer.shape) + SPARE
        return 16 * roundings * DOUBLE.unit

    def model_sum(self, layer: Layer) -> float:
        """Return the relative error of the model's own arithmetic at one affine layer: (n + SPARE)·u + 2f.

        f is what a factor of a product is rounded to where the hardware is allowed TF32 or bfloat16: (1 + f)² − 1 ≤ 2.02·f.
        The hundredth on top is for products of errors, as in (1 + n·u)·(1 + k·u) − 1 = (n + k)·u + n·k·u². Where n is large, k
        is 2 at most, a bias and the last rounding, and SPARE − 2 makes up for n·k·u²; where k is as large as 6, in a batch
        norm (σ² + ε, √, ÷, ·γ, −μ, +β), n is 2.
        """
        if self.arithmetic is None or self.arithmetic.exact(layer):
            return 0.0
        roundings = (fan_in(self.network)[layer.name] + SPARE) * self.arithmetic.of(layer).unit
        return (roundings + 2 * self.arithmetic.factors(layer)) * 1.01

    def model_bend(self, layer: Layer) -> float:
        """Return the relative error of the model's own arithmetic at one nonlinearity."""
        return 0.0 if self.arithmetic is None else SPARE * self.arithmetic.of(layer).unit * 1.01

    def underflow(self, layer: Layer, sizes: Mapping[str, Tensor]) -> Tensor | float:
        """Return what underflow can do to a sum, here and in the model: absolute, (samples, 1, …).

        With ℓ the largest error of a result that underflows and t the size below which an operand may be taken for 0, one
        product w·x is off by ℓ + t·(|w| + |x| + t): an operand that is flushed takes the other one's size with it. Adding up
        costs ℓ for each of the n summands once more.
        """
        formats = [DOUBLE]
        if self.arithmetic is not None and not self.arithmetic.exact(layer):
            formats.append(self.arithmetic.of(layer))
        total: Tensor | float = 0.0
        count = fan_in(self.network)[layer.name] + SPARE
        for connection in layer.connections:
            factor, activation = self.weights.largest(connection.weight), per_sample(sizes[connection.source], layer)
            for kind in formats:
                total = total + count * (kind.least + kind.flushed * (factor + activation + kind.flushed))
        return total + count * sum(kind.least for kind in formats)

    def underflow_of_bend(self, layer: Layer) -> float:
        """Return what underflow can do to a nonlinearity: an absolute ℓ for each of its operations, here and in the model."""
        model = 0.0 if self.arithmetic is None else self.arithmetic.of(layer).least
        return (fan_in(self.network)[layer.name] + SPARE) * (DOUBLE.least + model)

    def positions(self, layer: Layer, sizes: Mapping[str, Tensor]) -> Tensor | float:
        """Return what the model's own constants may be off by, where it computes them from positions (`Layer.blur`).

        The weights of the edges into one neuron are off by blur·u, all together, so its value is off by blur·u·max|u'| for
        each connection.
        """
        if self.arithmetic is None or layer.blur == 0.0:
            return 0.0
        unit = self.arithmetic.inner(layer).unit * layer.blur
        return sum(
            (per_sample(sizes[connection.source], layer) * unit for connection in layer.connections),
            torch.zeros((), dtype=torch.float64),
        )

    def out_of_range(self, layer: Layer, sizes: Mapping[str, Tensor], magnitude: Tensor) -> Tensor | bool:
        """Tell of which samples something may leave the range of its type: then nothing bounds what the model computes.

        Whatever the order, no partial sum exceeds Σ|θ'|·|u'| + |b'|, which has to fit the layer's type. Inside a kernel, in the
        inner type, there may be what makes up a term: a sum before its division (n·|u'|·max(1, |w|) for weights that are
        constants), and a batch norm's (x − μ)·γ/√(σ²+ε) + β in any order (`Box.peaks`).

        Args:
            layer: An affine layer.
            sizes: Largest magnitudes of the layers below.
            magnitude: Σ|θ'|·|u'| + |b'|.

        Returns:
            (samples,) bool, or one for all.
        """
        if self.arithmetic is None or self.arithmetic.exact(layer):
            return False
        inner: Tensor | float = 0.0
        for connection in layer.connections:
            weight = connection.weight
            activation = per_sample(sizes[connection.source], layer).reshape(-1)
            if weight is None or weight.score_name is None:
                inner = inner + activation * (fan_in(self.network)[layer.name] * max(1.0, self.weights.largest(weight)))
            if weight is not None and weight in self.weights.box.peaks:
                inner = inner + activation * self.weights.box.peaks[weight]
        for bias in layer.biases:
            inner = inner + self.weights.box.peaks.get(bias.weight, 0.0)
        largest = magnitude.reshape(len(magnitude), -1).amax(1)
        fits = (largest * 1.01 < self.arithmetic.of(layer).largest) & (
            largest + inner * 1.01 < self.arithmetic.inner(layer).largest
        )
        return ~fits


def per_sample(sizes: Tensor, layer: Layer) -> Tensor:
    """Return the largest entry of each sample as it broadcasts over a layer above, (samples, 1, …)."""
    return sizes.reshape(len(sizes), -1).amax(1).reshape(-1, *[1] * len(layer.shape))
