"""Two networks in one gauge that depends on neither's: bounds compare weights one by one, Φ does not (mathematics §4, "Gauge").

θ' is brought into the gauge of θ by medians of log-ratios, which follow a rescaling of either side exactly. Then both are
rescaled alike, so that the path activations of θ grow evenly with depth: what is computed for (θ, λ∘θ') or (λ∘θ, θ') is
what is computed for (θ, θ'), up to rounding. Networks that differ by little more than that are rescaled by powers of two, which
round nothing; their bounds may then move by a few percent with a rescaling by other factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.edges.weights import PAIR_ELEMENTS
from pathlift.graph.compact import compacted
from pathlift.graph.expressions import StateTensor, widen
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.rescaling.alignment import ROUNDINGS, RescaledWeights, exact_scales
from pathlift.rescaling.constraints import scale_constraints
from pathlift.rescaling.fit import GaugeFit
from pathlift.rescaling.gauges import even

STILL = 1e-9
"""log₂ factors up to this are taken to be 0, so that weights that are equal stay equal."""

SAMPLE = 1 << 11
"""Weights of a tensor that are looked at to choose g."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""The multiples of this number spread most evenly over the unit circle."""


@dataclass(frozen=True, eq=False)
class CommonGauge:
    """Two networks in one gauge; their weights are made when they are read, and never all at once.

    Attributes:
        network: The compact graph.
        values: Weight tensor to weights in the common gauge, for each.
        changed: The weight tensors where they differ, and all biases: what is compared weight by weight.
        flips: Whether the sign of a weight differs.
    """

    network: Network
    values: tuple[RescaledWeights, RescaledWeights]
    changed: frozenset[WeightTensor]
    flips: bool

    @property
    def roundings(self) -> int:
        """By how many units of float64 a weight may be off since both networks were rescaled."""
        return 0 if all(side.exact for side in self.values) else ROUNDINGS

    def parts(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """Return what the weights of a weight tensor are made of, without copies of plain parameters; see `joined`."""
        if not self._plain(weight):
            return tuple(side[weight].double() for side in self.values)
        raw = [widen(side.before[weight].detach()) for side in self.values]
        return (*raw, *(factor for side in self.values for factor in side.factors(weight)))

    def _plain(self, weight: WeightTensor) -> bool:
        scaling = self.values[0].constraints.weights.get(weight)
        return isinstance(weight.expression, StateTensor) and scaling is not None and scaling.layout.shape[0] == 1

    @staticmethod
    def joined(*parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return θ and θ' in the common gauge from parts, or from the same slice of all parts."""
        if len(parts) == 2:
            return parts[0], parts[1]
        first, second, up, down, other_up, other_down = parts
        return first * (_thin(up) * _thin(down)), second * (_thin(other_up) * _thin(other_down))

    def sample(self, weight: WeightTensor) -> tuple[Tensor, Tensor]:
        """Return some of the weights of a weight tensor, float64: evenly spread, and over the rows and columns too."""
        parts = self.parts(weight)
        count = parts[0].numel()
        index = torch.arange(min(count, SAMPLE), device=parts[0].device)
        if count > SAMPLE:
            index = ((index.double() * GOLDEN).frac() * count).long()
        where = torch.unravel_index(index, parts[0].shape)
        return self.joined(*(part[where].double() for part in parts))


def _thin(tensor: Tensor) -> Tensor:
    """Return a tensor with size 1 along the dimensions in which it is known not to change."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def in_common_gauge(network: Network, compared: GaugeFit) -> CommonGauge:
    """Bring two networks into one gauge.

    Args:
        network: The network as captured, with θ.
        compared: θ and θ'.

    Returns:
        Both.

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    compact, constraints = compacted(network), scale_constraints(network)
    apart = exact_scales(constraints.solution, torch.where(compared.rough.abs() < STILL, 0.0, compared.rough))
    free = even(network, constraints)
    raw = compact.values(), compact.values(compared.other)

    def both(*alike: Tensor) -> tuple[RescaledWeights, RescaledWeights] | None:
        sides = RescaledWeights(constraints, raw[0], alike), RescaledWeights(constraints, raw[1], [*alike, -apart])
        return sides if all(side.in_range() for side in sides) else None

    values = both(exact_scales(constraints.solution, free, whole=True))
    if values is not None and _distinct(CommonGauge(compact, values, frozenset(), False)):
        values = both(exact_scales(constraints.solution, free)) or values
    # in the gauge of θ where the common one is out of reach
    values = values or both() or (RescaledWeights(constraints, raw[0], []), RescaledWeights(constraints, raw[1], []))
    plain = CommonGauge(compact, values, frozenset(), False)
    changed, flips = {bias.weight for layer in compact.layers for bias in layer.biases if bias.weight.scalar is None}, False
    for weight in compact.weights:
        if weight.scalar is None:
            different, flipped = _difference(plain, weight)
            changed |= {weight} if different else set()
            flips = flips or flipped
    return CommonGauge(compact, values, frozenset(changed), flips)


DISTINCT = 1e-6
"""Networks in which the weights of a layer differ by this part of their sum are much further apart than what rounding does to
them. So their common gauge need not be one of powers of two, and is the same whatever gauge they came in."""


def _distinct(plain: CommonGauge) -> bool:
    """Whether two networks in one gauge are so different that rounding their weights changes little."""
    for weight in plain.network.weights:
        if weight.scalar is None:
            first, second = plain.sample(weight)
            if float((first - second).abs().sum()) > DISTINCT * float(first.abs().sum() + second.abs().sum()):
                return True
    return False


def _difference(plain: CommonGauge, weight: WeightTensor) -> tuple[bool, bool]:
    """Return whether the weights of a weight tensor differ, and whether a sign does; factors are positive."""
    first, second, *factors = plain.parts(weight)
    up, down, other_up, other_down = factors or [torch.ones((), device="cpu")] * 4
    different = not (torch.equal(_thin(up), _thin(other_up)) and torch.equal(_thin(down), _thin(other_down)))
    pairs = zip(first.reshape(-1).split(PAIR_ELEMENTS), second.reshape(-1).split(PAIR_ELEMENTS), strict=True)
    for a, b in pairs:
        if a.dtype == b.dtype and torch.equal(a, b):
            continue
        different = True
        least = float((a * b).amin())
        if least < 0 or (not least > 0 and bool((a.sign() * b.sign()).amin() < 0)):  # products that are 0 may have underflowed
            return True, True
    return different, False
