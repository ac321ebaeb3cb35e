"""All bounds on the path-metric ‖Φ(θ)−Φ(θ')‖₁ that the paper states or compares with, in one table (SPEC §4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.edges.base import Weights
from pathlift.errors import UnsupportedModelError
from pathlift.graph.layers import Bias, Connection, Layer
from pathlift.graph.network import Network
from pathlift.metric import perceptron
from pathlift.metric.comparison import Comparison, compact, compared_with
from pathlift.metric.metric import path_metric
from pathlift.metric.pivot import three_step
from pathlift.norm import to_float
from pathlift.passes.backward import sum_of_outputs
from pathlift.passes.forward import WeightsOf, carried, placed, value_of, weighted
from pathlift.passes.programs import TELESCOPING, DifferenceProgram, NormProgram, Values
from pathlift.passes.propagate import Tracks, in_range, propagate, walk
from pathlift.passes.rounding import fan_in, rounding_factor
from pathlift.passes.scaled import Scaled, total
from pathlift.reading import Inputs, capture
from pathlift.reading.second import Other
from pathlift.rescaling.alignment import moved


@dataclass(frozen=True)
class MetricBound:
    """One bound on the path-metric.

    Attributes:
        name: Short name.
        reference: Where it is stated.
        side: Whether it bounds from below or from above.
        log10: log₁₀ of the bound, −inf for 0, inf past float64's range, NaN where it does not apply.
        invariant: Whether no rescaling of both networks alike changes it.
        reason: Why it does not apply, "" when it does.
    """

    name: str
    reference: str
    side: Literal["lower", "upper"]
    log10: float
    invariant: bool
    reason: str = ""


@public
@torch.no_grad()
def path_metric_bounds(
    model: nn.Module | Network, other: Other, inputs: Inputs | None = None, *, moments: int | None = None
) -> tuple[MetricBound, ...]:
    """Compute every bound on ‖Φ(θ)−Φ(θ')‖₁, loosest upper bound first, lower bounds last.

    Lemma 4.4 (9) and Lemma 4.3 (8) are for layered perceptrons; all others hold for any network. Where Lemma 4.2 applies,
    the exact value stands in the table as both a lower and an upper bound.

    Args:
        model: A module, or a captured `Network`: θ.
        other: θ', as for `path_metric`.
        inputs: As for `capture`; not needed for a Network.
        moments: 2, 4, 6 or 8: the bounds of `path_metric` with so many moments are listed too; they cost more than all others.

    Returns:
        The bounds; those that do not apply come last of all, with the reason.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        MismatchError: ``other`` has other parameters.
        InputError: ``inputs`` or ``moments`` is malformed.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> from torch import nn
        >>> model, pruned = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> _ = pruned.weight.data.copy_(torch.tensor([[3.0, 0.0]]))
        >>> sorted((b.name, b.side) for b in path_metric_bounds(model, pruned, (2,)) if "exact" in b.name)
        [('Lemma 4.2, exact', 'lower'), ('Lemma 4.2, exact', 'upper')]
    """
    network = capture(model, inputs)
    comparison = compared_with(network, other)
    metric = path_metric(network, other, moments=0)
    exact = "Lemma 4.2, exact" if metric.exact else ""
    closer = None if moments is None else path_metric(network, other, moments=moments)
    extra = _rounding_of_gauge(comparison)

    def bound(name: str, reference: str, compute: Callable[[], float], *, invariant: bool = True) -> MetricBound:
        return _bound(name, reference, compute, extra, invariant)

    found = [
        MetricBound(exact or "norm difference", "(6), Lemma 4.2", "lower", metric.log10_lower, invariant=True),
        MetricBound(exact or "pivot", "pathlift", "upper", metric.log10_upper, invariant=True),
        bound("telescoping", "pathlift", lambda: _telescoping(comparison)),
        bound("Hellinger in three steps", "pathlift", lambda: _log10(float(three_step(comparison, _ones(network)).sum()))),
        bound("Lemma F.1", "Lemma F.1", lambda: lemma_f1(comparison), invariant=False),
        bound("Theorem F.2", "Theorem F.2", lambda: theorem_f2(comparison)),
        bound("Lemma 4.3", "(8), Lemma 4.3", lambda: lemma_4_3(comparison)),
        bound("Lemma 4.4", "(9), Lemma 4.4", lambda: _log10(perceptron.lemma_4_4(comparison)), invariant=False),
    ]
    if closer is not None and not closer.exact:
        upper = MetricBound(closer.upper_by, "pathlift", "upper", closer.log10_upper, invariant=True)
        lower = MetricBound(closer.lower_by, "pathlift", "lower", closer.log10_lower, invariant=True)
        found += [upper, lower] if closer.upper_by != "pivot" else [lower]
    applying = [bound for bound in found if not bound.reason]
    uppers = sorted((bound for bound in applying if bound.side == "upper"), key=lambda bound: -bound.log10)
    lowers = sorted((bound for bound in applying if bound.side == "lower"), key=lambda bound: -bound.log10)
    return (*uppers, *lowers, *(bound for bound in found if bound.reason))


def _bound(name: str, reference: str, compute: Callable[[], float], extra: float, invariant: bool) -> MetricBound:
    try:
        found = _added(compute(), extra)
    except UnsupportedModelError as error:
        return MetricBound(name, reference, "upper", math.nan, invariant, error.problems[0].reason)
    except _NotApplicableError as error:
        return MetricBound(name, reference, "upper", math.nan, invariant, str(error))
    return MetricBound(name, reference, "upper", found + (BLUR * (1 + abs(found)) if math.isfinite(found) else 0.0), invariant)


BLUR = 2.0**-44
"""What logarithms may lose to rounding, relative to 1 and to themselves."""


def _added(first: float, second: float) -> float:
    """Return log₁₀ of a sum from log₁₀ of its summands."""
    top, rest = max(first, second), min(first, second)
    return top if math.isinf(top) or math.isinf(rest) else top + math.log10(1 + 10.0 ** (rest - top))


def _rounding_of_gauge(comparison: Comparison) -> float:
    """Return log₁₀ of what the weights of θ' may have lost on their way into the gauge of θ; see `rounding_of_gauge`."""
    part = moved(comparison.network, comparison.roundings)
    if not part:
        return -math.inf
    thin = compact(comparison)
    assert thin.others is not None
    found = _norm(thin.network, thin.others)
    return _log10_of(sum_of_outputs(thin.network, found)) + math.log10(part)


def _norm(network: Network, values: Values, *, keep: bool = False) -> dict[str, Tracks]:
    return in_range(lambda _: propagate(network, NormProgram(network, values, torch.float64), keep=keep), torch.float64, values)


def _log10_of(value: Scaled | None) -> float:
    return to_float(value)[1]


def _log10(value: float) -> float:
    return math.log10(value) if 0 < value < math.inf else (-math.inf if value == 0 else math.inf)


def _ones(network: Network) -> dict[str, Tensor]:
    inputs = [layer for layer in network.layers if layer.kind == "input"]
    return {n.name: torch.ones((1, *n.shape), dtype=torch.float64, device=network.device) for n in inputs}


def _telescoping(comparison: Comparison) -> float:
    thin = compact(comparison)
    assert thin.others is not None
    orders = [(thin.values, thin.others), (thin.others, thin.values)]

    def one(first: Values, second: Values) -> float:
        def attempt(_: torch.dtype) -> Scaled | None:
            program = DifferenceProgram(thin.network, first, second, torch.float64, thin.changed, through=TELESCOPING)
            return sum_of_outputs(thin.network, propagate(thin.network, program), 1)

        return to_float(in_range(attempt, torch.float64, first, second))[1]

    return min(one(*order) for order in orders) + math.log10(1.0 + rounding_factor(thin.network))


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
    return _log10(min(_f1(thin, thin.values, thin.others), _f1(thin, thin.others, thin.values)))


LEAST = 2.0**-1022
"""The smallest float that has all its digits."""


def _f1(comparison: Comparison, first: Values, second: Values) -> float:
    network = comparison.network
    sizes = weighted(first, dtype=torch.float64, transform=torch.abs)
    others = weighted(second, dtype=torch.float64, transform=torch.abs)
    gaps = weighted(first, second, dtype=torch.float64, transform=_distance)
    ones = weighted(first, dtype=torch.float64, transform=torch.ones_like)

    def step(layer: Layer, below: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return D and A'."""
        if layer.kind == "input":
            bias = torch.ones(layer.shape, dtype=torch.float64, device=network.device)
            return torch.zeros_like(bias), bias
        least = LEAST * fan_in(network)[layer.name]  # what may have fallen below the range
        mass = _carried(layer, {name: own[1] for name, own in below.items()}, others) + least
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

    found = walk(network, step)
    return _sum(network, {name: own[0] for name, own in found.items()})


def _distance(first: Tensor, second: Tensor) -> Tensor:
    return (first.double() - second.double()).abs()


def _weight(connection: Connection, weights_of: WeightsOf) -> Weights | None:
    return None if connection.weight is None else weights_of(connection.weight)


def _placed(bias: Bias, weights: Weights | None) -> Tensor:
    assert weights is not None
    return placed(bias, weights)


def _carried(layer: Layer, below: Mapping[str, Tensor], weights_of: WeightsOf) -> Tensor:
    return carried(layer, {name: own.unsqueeze(0) for name, own in below.items()}, weights_of, biases=weights_of)[0]


def _largest(connection: Connection, x: Tensor, ones: WeightsOf) -> Tensor:
    """Return the largest antecedent of each neuron, whatever the weights."""
    return connection.edges.max(x, _weight(connection, ones))


def _moved(connection: Connection, like: Tensor, gaps: WeightsOf) -> Tensor:
    """Return ‖ΔW‖₁ of one bundle of edges; constants do not move."""
    if connection.weight is None or connection.weight.scalar is not None:
        return connection.edges.sum(torch.zeros_like(like), _weight(connection, gaps))
    return connection.edges.sum(torch.ones_like(like), gaps(connection.weight))


def _over(layer: Layer, piece: Callable[[Connection], Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine what the terms of a layer bring, or lay it side by side."""
    if layer.concat is not None:
        return torch.cat(
            [
                piece(connection).expand(layer.concat.shape(place, layer.shape))
                for place, connection in enumerate(layer.connections)
            ],
            layer.concat.dim,
        )
    out, *rest = [piece(connection).expand(layer.shape) for connection in layer.connections]
    for more in rest:
        out = combine(out, more)
    return out


class _NotApplicableError(Exception):
    """A bound whose statement does not cover the network."""


def theorem_f2(comparison: Comparison) -> float:
    """Theorem F.2 for the normalised parameters N(θ)(u→v) = θ(u→v)·A(u)/A(v), bias b(v)/A(v) (outputs keep their scale).

    Σ_out (‖ΔN(out)‖₁ + |Δb|) + min(‖Φ(θ)‖₁, ‖Φ(θ')‖₁)·max over paths of Σ over hidden neurons of (‖ΔN‖₁ + |Δb̃|). Shared
    weights become per-position here, so edges are compared one by one: a cost like a forward pass's multiplications.

    Args:
        comparison: Two networks.

    Returns:
        log₁₀ of the bound; inf past float64's range.

    Raises:
        _NotApplicableError: An output neuron is read by others, or an operator does not list its edges.
    """
    network = comparison.network
    assert comparison.others is not None
    read = {connection.source for layer in network.layers for connection in layer.connections}
    if read & set(network.outputs):
        raise _NotApplicableError("It is stated for networks whose output neurons are read by no other neuron.")
    if not comparison.changed:
        return -math.inf
    sides = (comparison.values, comparison.others)
    masses = [_norm(network, own, keep=True) for own in sides]
    signed = [weighted(own, dtype=torch.float64) for own in sides]
    ones = weighted(comparison.values, dtype=torch.float64, transform=torch.ones_like)
    blur = 2 * rounding_factor(network)
    tops, ends = [0.0], []

    def step(layer: Layer, below: Mapping[str, Tensor]) -> Tensor:
        """Return the largest sum of changes on a path that ends here."""
        own = [_Mass.of(layer, found[layer.name][0]) for found in masses]
        if layer.kind == "input":
            return torch.zeros(layer.shape, dtype=torch.float64, device=network.device)
        is_output = layer.name in network.outputs
        path = torch.zeros(layer.shape, dtype=torch.float64, device=network.device)
        if layer.connections:
            path = _over(layer, lambda connection: _largest(connection, below[connection.source], ones), torch.maximum).expand(
                layer.shape
            )
        # in units of the exponent of A(v) for outputs, of 1 for normalised neurons
        scales = [mass.tensor if not is_output else torch.ones_like(mass.tensor) for mass in own]
        scales = [torch.where(scale > 0, scale, 1.0) for scale in scales]
        if is_output:
            scales[1] = scales[1] * _shifted(own[0].exponent - own[1].exponent)
        change = _normalised_change(
            layer,
            [{t.source: _Mass.of(network.layer[t.source], found[t.source][0]) for t in layer.connections} for found in masses],
            own,
            signed,
            scales,
        )
        if is_output:
            slack = own[0].tensor + own[1].tensor * _shifted(own[1].exponent - own[0].exponent)
            count = layer.multiplicity(network.device)
            whole = change + blur * slack + LEAST * fan_in(network)[layer.name]
            ends.append(Scaled((whole if count is None else whole * count).sum(), own[0].exponent))
            tops.append(float(path.max()))
            return path
        return path + change + blur

    try:
        walk(network, step)
    except NotImplementedError as error:
        raise _NotApplicableError(f"The edges of an operator ({error}) are not listed one by one.") from error
    least = min(_log10_of(sum_of_outputs(network, found)) for found in masses)
    found = _log10_of(total(ends, fresh=False)[0])
    return _added(found, least + _log10(max(tops))) + math.log10(1.0 + 4 * blur)


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
        raise _NotApplicableError(
            "The path activations of both networks, or of two layers, differ by more than the range of float64."
        )
    return float(2.0**exponent)


def _normalised_change(
    layer: Layer,
    below: Sequence[Mapping[str, _Mass]],
    own: Sequence[_Mass],
    signed: Sequence[WeightsOf],
    scales: list[Tensor],
) -> Tensor:
    """Return ‖ΔN(v)‖₁ + |Δb̃(v)| for each neuron of a layer, edge by edge."""
    ratio, offset = scales[0] / scales[1], 0

    def one(connection: Connection) -> Tensor:
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
            for masses, mass in zip(below, own, strict=True)
        )
        return connection.edges.gap(x, weights[0], y, weights[1], part)

    out = _over(layer, one, torch.add) if layer.connections else torch.zeros_like(ratio)
    for bias in layer.biases:
        first, second = (
            _placed(bias, weights(bias.weight)) * _shifted(-mass.exponent) for weights, mass in zip(signed, own, strict=True)
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
        _NotApplicableError: The path activations of two layers differ by more than the range of float64.
    """
    own = perceptron.layered(comparison)
    layers = perceptron.layers_of(comparison.network)
    assert isinstance(layers, list)
    assert comparison.others is not None
    network = comparison.network
    if not comparison.changed:
        return -math.inf
    sides = (comparison.values, comparison.others)
    masses = [_norm(network, side, keep=True) for side in sides]
    blur, distance = 2 * rounding_factor(network), -math.inf
    for place, layer in enumerate(layers):
        above = [_Mass.of(layer, found[layer.name][0]) for found in masses]
        below = [
            _Mass.of(network.layer[layer.connections[0].source], found[layer.connections[0].source][0]) for found in masses
        ]
        last = place == len(layers) - 1
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
        distance = max(distance, _log10_of(Scaled(gaps.amax(), exponent)))
    width = own.width + 1
    least = min(_log10_of(sum_of_outputs(network, found)) for found in masses)
    return _added(math.log10(width**2), least + math.log10(own.depth * width)) + distance + math.log10(1.0 + 4 * blur)
