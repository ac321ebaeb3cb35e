"""The paper's bounds on ‖Φ(θ)−Φ(θ')‖₁, one function each: Lemma 4.3 (8), Lemma 4.4 (9), Lemma F.1, Theorem F.2.

Each takes a comparison of two networks and returns log₁₀ of the bound, rounded up. Lemmas 4.3 and 4.4 are for layered
perceptrons. `pathlift.metric.paper_bounds` puts them into one table with the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.edges.weights import Weights
from pathlift.graph.layers import Bias, Connection, Layer
from pathlift.graph.network import Network
from pathlift.metric import perceptron
from pathlift.metric.comparison import Comparison, compact
from pathlift.metric.exact import norm_tracks
from pathlift.norm import to_float
from pathlift.passes.backward import sum_of_outputs
from pathlift.passes.forward import WeightsOf, carried, placed, value_of, weighted
from pathlift.passes.programs import Values, distance
from pathlift.passes.propagate import in_forward_order
from pathlift.passes.rounding import fan_in, rounding_factor
from pathlift.passes.scaled import Scaled, total


class NotApplicableError(Exception):
    """A bound whose statement does not cover the network."""


def log10_sum(first: float, second: float) -> float:
    """Return log₁₀ of a sum from log₁₀ of its summands."""
    top, rest = max(first, second), min(first, second)
    return top if math.isinf(top) or math.isinf(rest) else top + math.log10(1 + 10.0 ** (rest - top))


def log10_of(value: Scaled | None) -> float:
    """Return log₁₀ of a number of any size, −inf for 0."""
    return to_float(value)[1]


def log10_of_float(value: float) -> float:
    """Return log₁₀ of a bound, −inf for 0; inf for one that is no number."""
    return math.log10(value) if 0 < value < math.inf else (-math.inf if value == 0 else math.inf)


def _sum(network: Network, outputs: Mapping[str, Tensor]) -> float:
    total = 0.0
    for name in network.outputs:
        count = network.layer[name].multiplicity(network.device)
        total += float((outputs[name] if count is None else outputs[name] * count).sum())
    return total * (1.0 + rounding_factor(network))


def lemma_f1(comparison: Comparison) -> float:
    """Lemma F.1, any signs: D(v) = ‖W‖₁·max_u D(u) + |Δb| + ‖ΔW‖₁·max_u A'(u), W the incoming weights of v.

    Args:
        comparison: Two networks.

    Returns:
        log₁₀ of Σ_out D(out), the smaller of both orders; inf past float64's range.
    """
    thin = compact(comparison)
    assert thin.others is not None
    if not thin.changed:
        return -math.inf
    return log10_of_float(min(_f1(thin, thin.values, thin.others), _f1(thin, thin.others, thin.values)))


LEAST = 2.0**-1022
"""The smallest float that has all its digits."""


def _f1(comparison: Comparison, first: Values, second: Values) -> float:
    network = comparison.network
    sizes = weighted(first, dtype=torch.float64, transform=torch.abs)
    others = weighted(second, dtype=torch.float64, transform=torch.abs)
    gaps = weighted(first, second, dtype=torch.float64, transform=distance)
    ones = weighted(first, dtype=torch.float64, transform=torch.ones_like)

    def step(layer: Layer, below: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return D and A'."""
        if layer.kind == "input":
            bias = torch.ones(layer.shape, dtype=torch.float64, device=network.device)
            return torch.zeros_like(bias), bias
        least = LEAST * fan_in(network)[layer.name]  # what may have fallen below the range
        mass = _carried(layer, {name: size for name, (_, size) in below.items()}, others) + least
        changes = [_placed(bias, gaps(bias.weight)) for bias in layer.biases]
        if not layer.connections:
            return sum(changes, torch.zeros_like(mass)), mass
        norm = _over(
            layer,
            lambda connection: connection.edges.sum(torch.ones_like(below[connection.source][0]), _weight(connection, sizes)),
            torch.add,
        )
        change = _over(layer, lambda connection: _moved(connection, below[connection.source][0], gaps), torch.add)
        farthest = _over(layer, lambda connection: _largest(connection, below[connection.source][0], ones), torch.maximum)
        heaviest = _over(layer, lambda connection: _largest(connection, below[connection.source][1], ones), torch.maximum)
        return norm * farthest + change * heaviest + sum(changes, torch.zeros_like(mass)) + least, mass

    return _sum(network, {name: change for name, (change, _) in in_forward_order(network, step).items()})


def _weight(connection: Connection, weights_of: WeightsOf) -> Weights | None:
    return None if connection.weight is None else weights_of(connection.weight)


def _placed(bias: Bias, weights: Weights | None) -> Tensor:
    assert weights is not None
    return placed(bias, weights)


def _carried(layer: Layer, below: Mapping[str, Tensor], weights_of: WeightsOf) -> Tensor:
    return carried(layer, {name: x.unsqueeze(0) for name, x in below.items()}, weights_of, biases=weights_of)[0]


def _largest(connection: Connection, x: Tensor, ones: WeightsOf) -> Tensor:
    """Return the largest antecedent of each neuron, whatever the weights."""
    return connection.edges.max(x, _weight(connection, ones))


def _moved(connection: Connection, like: Tensor, gaps: WeightsOf) -> Tensor:
    """Return ‖ΔW‖₁ of one bundle of edges; constants do not move."""
    if connection.weight is None or connection.weight.scalar is not None:
        return connection.edges.sum(torch.zeros_like(like), _weight(connection, gaps))
    return connection.edges.sum(torch.ones_like(like), gaps(connection.weight))


def _over(layer: Layer, piece: Callable[[Connection], Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine what the connections of a layer bring, or lay it side by side."""
    if layer.concat is not None:
        return torch.cat(
            [
                piece(connection).expand(layer.concat.shape(number, layer.shape))
                for number, connection in enumerate(layer.connections)
            ],
            layer.concat.dim,
        )
    out, *rest = [piece(connection).expand(layer.shape) for connection in layer.connections]
    for more in rest:
        out = combine(out, more)
    return out


def theorem_f2(comparison: Comparison) -> float:
    """Theorem F.2 for the normalised parameters N(θ)(u→v) = θ(u→v)·A(u)/A(v), bias b(v)/A(v) (outputs keep their scale).

    Σ_out (‖ΔN(out)‖₁ + |Δb|) + min(‖Φ(θ)‖₁, ‖Φ(θ')‖₁)·max over paths of Σ over hidden neurons of (‖ΔN‖₁ + |Δb̃|). Shared
    weights become per-position here, so edges are compared one by one: a cost like a forward pass's multiplications.

    Args:
        comparison: Two networks.

    Returns:
        log₁₀ of the bound; inf past float64's range.

    Raises:
        NotApplicableError: An output neuron is read by others, or an operator does not list its edges.
    """
    network = comparison.network
    assert comparison.others is not None
    read = {connection.source for layer in network.layers for connection in layer.connections}
    if read & set(network.outputs):
        raise NotApplicableError("It is stated for networks whose output neurons are read by no other neuron.")
    if not comparison.changed:
        return -math.inf
    sides = (comparison.values, comparison.others)
    masses = [norm_tracks(network, values, keep=True) for values in sides]
    signed = [weighted(values, dtype=torch.float64) for values in sides]
    ones = weighted(comparison.values, dtype=torch.float64, transform=torch.ones_like)
    blur = 2 * rounding_factor(network)
    tops, ends = [0.0], []

    def step(layer: Layer, below: Mapping[str, Tensor]) -> Tensor:
        """Return the largest sum of changes on a path that ends here."""
        above = [_Mass.of(layer, tracks[layer.name][0]) for tracks in masses]
        if layer.kind == "input":
            return torch.zeros(layer.shape, dtype=torch.float64, device=network.device)
        is_output = layer.name in network.outputs
        path = torch.zeros(layer.shape, dtype=torch.float64, device=network.device)
        if layer.connections:
            path = _over(layer, lambda connection: _largest(connection, below[connection.source], ones), torch.maximum).expand(
                layer.shape
            )
        # in units of the exponent of A(v) for outputs, of 1 for normalised neurons
        scales = [mass.tensor if not is_output else torch.ones_like(mass.tensor) for mass in above]
        scales = [torch.where(scale > 0, scale, 1.0) for scale in scales]
        if is_output:
            scales[1] = scales[1] * _shifted(above[0].exponent - above[1].exponent)
        change = _normalised_change(
            layer,
            [
                {t.source: _Mass.of(network.layer[t.source], tracks[t.source][0]) for t in layer.connections}
                for tracks in masses
            ],
            above,
            signed,
            scales,
        )
        if is_output:
            slack = above[0].tensor + above[1].tensor * _shifted(above[1].exponent - above[0].exponent)
            count = layer.multiplicity(network.device)
            per_neuron = change + blur * slack + LEAST * fan_in(network)[layer.name]
            ends.append(Scaled((per_neuron if count is None else per_neuron * count).sum(), above[0].exponent))
            tops.append(float(path.max()))
            return path
        return path + change + blur

    try:
        in_forward_order(network, step)
    except NotImplementedError as error:
        raise NotApplicableError(f"The edges of an operator ({error}) are not listed one by one.") from error
    least = min(log10_of(sum_of_outputs(network, tracks)) for tracks in masses)
    at_outputs = log10_of(total(ends, fresh=False)[0])
    return log10_sum(at_outputs, least + log10_of_float(max(tops))) + math.log10(1.0 + 4 * blur)


@dataclass(frozen=True)
class _Mass:
    """Path activations of a layer in units of 2**exponent."""

    tensor: Tensor
    exponent: float

    @staticmethod
    def of(layer: Layer, value: Scaled | None) -> _Mass:
        if value is None:
            return _Mass(torch.zeros(layer.shape, dtype=torch.float64), 0.0)
        return _Mass(value.tensor.double().expand(layer.shape), value.exponent)


def _shifted(exponent: float) -> float:
    if abs(exponent) > 1000:
        raise NotApplicableError(
            "The path activations of both networks, or of two layers, differ by more than the range of float64."
        )
    return float(2.0**exponent)


def _normalised_change(
    layer: Layer,
    below: Sequence[Mapping[str, _Mass]],
    above: Sequence[_Mass],
    signed: Sequence[WeightsOf],
    scales: list[Tensor],
) -> Tensor:
    """Return ‖ΔN(v)‖₁ + |Δb̃(v)| for each neuron of a layer, edge by edge."""
    ratio, offset = scales[0] / scales[1], 0

    def piece(connection: Connection) -> Tensor:
        nonlocal offset
        part = ratio
        if layer.concat is not None:
            size = layer.concat.sizes[layer.connections.index(connection)]
            part, offset = ratio.narrow(layer.concat.dim, offset, size), offset + size
        weights = [
            torch.ones((), dtype=torch.float64, device="cpu") if connection.weight is None else _full(connection, w)
            for w in signed
        ]
        x, y = (
            masses[connection.source].tensor * _shifted(masses[connection.source].exponent - mass.exponent)
            for masses, mass in zip(below, above, strict=True)
        )
        return connection.edges.gap(x, weights[0], y, weights[1], part)

    out = _over(layer, piece, torch.add) if layer.connections else torch.zeros_like(ratio)
    for bias in layer.biases:
        first, second = (
            _placed(bias, weights(bias.weight)) * _shifted(-mass.exponent) for weights, mass in zip(signed, above, strict=True)
        )
        out = out + (first - ratio * second).abs()
    return out / scales[0]


def _full(connection: Connection, weights_of: WeightsOf) -> Tensor:
    weights = _weight(connection, weights_of)
    assert weights is not None
    return weights.full()


def lemma_4_3(comparison: Comparison) -> float:
    """Equation (8), layered perceptrons: (W² + min(‖Φ(θ)‖₁, ‖Φ(θ')‖₁)·L·W)·‖N(θ)−N(θ')‖_∞, W counting the bias.

    Args:
        comparison: Two networks.

    Returns:
        log₁₀ of the bound.

    Raises:
        NotApplicableError: The path activations of two layers differ by more than the range of float64.
    """
    sizes = perceptron.layered(comparison)
    layers = perceptron.layers_of(comparison.network)
    assert isinstance(layers, list)
    assert comparison.others is not None
    network = comparison.network
    if not comparison.changed:
        return -math.inf
    sides = (comparison.values, comparison.others)
    masses = [norm_tracks(network, side, keep=True) for side in sides]
    blur, distance = 2 * rounding_factor(network), -math.inf
    for layer in layers:
        source, last = network.layer[layer.connections[0].source], layer is layers[-1]
        above = [_Mass.of(layer, tracks[layer.name][0]) for tracks in masses]
        below = [_Mass.of(source, tracks[source.name][0]) for tracks in masses]
        rows = []
        for side, low, high in zip(sides, below, above, strict=True):
            weights = [layer.connections[0].weight, *(bias.weight for bias in layer.biases)]
            weight, *biases = [value_of(weight, side).double() for weight in weights if weight is not None]
            parts = [weight * low.tensor.reshape(-1) * _shifted(low.exponent - high.exponent)]
            scaled = torch.cat([*parts, *(bias.reshape(-1, 1) * _shifted(-high.exponent) for bias in biases)], 1)
            unit = high.tensor.reshape(-1)
            rows.append(scaled if last else scaled / torch.where(unit > 0, unit, 1.0)[:, None])
        exponent = above[0].exponent if last else 0.0
        second = rows[1] * _shifted(above[1].exponent - above[0].exponent) if last else rows[1]
        gaps = (rows[0] - second).abs() + blur * (rows[0].abs() + second.abs()) + LEAST
        distance = max(distance, log10_of(Scaled(gaps.amax(), exponent)))
    width = sizes.width + 1
    least = min(log10_of(sum_of_outputs(network, tracks)) for tracks in masses)
    return log10_sum(math.log10(width**2), least + math.log10(sizes.depth * width)) + distance + math.log10(1.0 + 4 * blur)


def lemma_4_4(comparison: Comparison) -> float:
    """Equation (9), layered perceptrons: ‖Φ(θ)−Φ(θ')‖₁ ≤ L·W²·R^{L−1}·‖θ−θ'‖_∞; with biases one W becomes W + 1.

    D ≤ R·D + (W·A + 1)·‖θ−θ'‖_∞ for a neuron whose antecedents have D and A ≤ R^l (A ≥ 1 counted as 1), for W outputs.

    Args:
        comparison: The comparison.

    Returns:
        log₁₀ of the bound.
    """
    sizes = perceptron.layered(comparison)
    return log10_of_float(sizes.depth * sizes.width * sizes.antecedents * sizes.factor * (1.0 + 8 * 2.0**-53))
