"""All bounds on the path-metric ‖Φ(θ)−Φ(θ')‖₁ that the paper states or compares with, in one table (SPEC §4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.bounds import perceptron
from pathlift.bounds.outputs import Ball, three_step
from pathlift.bounds.spread import Spread, compact, spread_of
from pathlift.edges.base import Weights
from pathlift.errors import UnsupportedModelError
from pathlift.metric import path_metric
from pathlift.network import Network, Node, Start, Term
from pathlift.passes.norm import to_float
from pathlift.passes.programs import TELESCOPING, DifferenceProgram, Values
from pathlift.passes.propagate import in_range, propagate, walk
from pathlift.passes.pull_back import sum_of_outputs
from pathlift.passes.realise import WeightsOf, carried, placed, value_of, weighted
from pathlift.passes.rounding import rounding_factor
from pathlift.passes.scaled import Scaled
from pathlift.reading import Inputs, capture
from pathlift.reading.second import Other


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
        >>> [(b.name, b.side) for b in path_metric_bounds(model, pruned, (2,)) if abs(b.log10) < 1e-9][-2:]
        [('Lemma 4.2, exact', 'upper'), ('Lemma 4.2, exact', 'lower')]
    """
    network = capture(model, inputs)
    spread = spread_of(network, other)
    metric = path_metric(network, other)
    exact = "Lemma 4.2, exact" if metric.exact else ""
    closer = None if moments is None else path_metric(network, other, moments=moments)
    found = [
        MetricBound(exact or "norm difference", "(6), Lemma 4.2", "lower", metric.log10_lower, invariant=True),
        MetricBound(exact or "pivot", "pathlift", "upper", metric.log10_upper, invariant=True),
        _bound("telescoping", "pathlift", lambda: _telescoping(spread)),
        _bound("Hellinger in three steps", "pathlift", lambda: _log10(float(three_step(spread, _ones(network)).sum()))),
        _bound("Lemma F.1", "Lemma F.1", lambda: lemma_f1(spread)),
        _bound("Theorem F.2", "Theorem F.2", lambda: theorem_f2(spread)),
        _bound("Lemma 4.3", "(8), Lemma 4.3", lambda: _log10(lemma_4_3(spread))),
        _bound("Lemma 4.4", "(9), Lemma 4.4", lambda: _log10(perceptron.lemma_4_4(spread)), invariant=False),
    ]
    if closer is not None and not closer.exact:
        upper = MetricBound(closer.upper_by, "pathlift", "upper", closer.log10_upper, invariant=True)
        lower = MetricBound(closer.lower_by, "pathlift", "lower", closer.log10_lower, invariant=True)
        found += [upper, lower] if closer.upper_by != "pivot" else [lower]
    applying = [bound for bound in found if not bound.reason]
    uppers = sorted((bound for bound in applying if bound.side == "upper"), key=lambda bound: -bound.log10)
    lowers = sorted((bound for bound in applying if bound.side == "lower"), key=lambda bound: -bound.log10)
    return (*uppers, *lowers, *(bound for bound in found if bound.reason))


def _bound(name: str, reference: str, compute: Callable[[], float], *, invariant: bool = True) -> MetricBound:
    try:
        return MetricBound(name, reference, "upper", compute(), invariant)
    except UnsupportedModelError as error:
        return MetricBound(name, reference, "upper", math.nan, invariant, error.problems[0].reason)
    except _NotApplicableError as error:
        return MetricBound(name, reference, "upper", math.nan, invariant, str(error))


def _log10(value: float) -> float:
    return math.log10(value) if 0 < value < math.inf else (-math.inf if value == 0 else math.inf)


def _ones(network: Network) -> Ball:
    inputs = [node for node in network.nodes if node.kind == "input"]
    return Ball({n.name: torch.ones((1, *n.shape), dtype=torch.float64, device=network.device) for n in inputs}, 0.0)


def _telescoping(spread: Spread) -> float:
    thin = compact(spread)
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
        count = network.node[name].multiplicity(network.device)
        total += float((outputs[name] if count is None else outputs[name] * count).sum())
    return total * (1.0 + rounding_factor(network))


def lemma_f1(spread: Spread) -> float:
    """Lemma F.1, any signs: D(v) = ‖W‖₁·max_u D(u) + |Δb| + ‖ΔW‖₁·max_u A'(u), W the incoming weights of v.

    Args:
        spread: Two networks.

    Returns:
        log₁₀ of Σ_out D(out), the smaller of both orders; inf past float64's range.
    """
    thin = compact(spread)
    assert thin.others is not None
    return _log10(min(_f1(thin, thin.values, thin.others), _f1(thin, thin.others, thin.values)))


def _f1(spread: Spread, first: Values, second: Values) -> float:
    network = spread.network
    sizes = weighted(first, dtype=torch.float64, transform=torch.abs)
    others = weighted(second, dtype=torch.float64, transform=torch.abs)
    gaps = weighted(first, second, dtype=torch.float64, transform=_distance)
    ones = weighted(first, dtype=torch.float64, transform=torch.ones_like)

    def step(node: Node, below: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return D and A'."""
        if node.kind == "input":
            start = torch.ones(node.shape, dtype=torch.float64, device=network.device)
            return torch.zeros_like(start), start
        mass = _carried(node, {name: own[1] for name, own in below.items()}, others)
        changes = [_placed(start, gaps(start.weight)) for start in node.starts]
        if not node.terms:
            return sum(changes, torch.zeros_like(mass)), mass
        norm = _over(node, lambda term: term.edges.sum(torch.ones_like(below[term.source][0]), _weight(term, sizes)), torch.add)
        change = _over(node, lambda term: _moved(term, below[term.source][0], gaps), torch.add)
        farthest = _over(node, lambda term: _largest(term, below[term.source][0], ones), torch.maximum)
        heaviest = _over(node, lambda term: _largest(term, below[term.source][1], ones), torch.maximum)
        return norm * farthest + change * heaviest + sum(changes, torch.zeros_like(mass)), mass

    found = walk(network, step)
    return _sum(network, {name: own[0] for name, own in found.items()})


def _distance(first: Tensor, second: Tensor) -> Tensor:
    return (first.double() - second.double()).abs()


def _weight(term: Term, weights_of: WeightsOf) -> Weights | None:
    return None if term.weight is None else weights_of(term.weight)


def _placed(start: Start, weights: Weights | None) -> Tensor:
    assert weights is not None
    return placed(start, weights)


def _carried(node: Node, below: Mapping[str, Tensor], weights_of: WeightsOf) -> Tensor:
    return carried(node, {name: own.unsqueeze(0) for name, own in below.items()}, weights_of, biases=weights_of)[0]


def _largest(term: Term, x: Tensor, ones: WeightsOf) -> Tensor:
    """Return the largest antecedent of each neuron, whatever the weights."""
    return term.edges.max(x, _weight(term, ones))


def _moved(term: Term, like: Tensor, gaps: WeightsOf) -> Tensor:
    """Return ‖ΔW‖₁ of one bundle of edges; constants do not move."""
    if term.weight is None or term.weight.scalar is not None:
        return term.edges.sum(torch.zeros_like(like), _weight(term, gaps))
    return term.edges.sum(torch.ones_like(like), gaps(term.weight))


def _over(node: Node, piece: Callable[[Term], Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine what the terms of a node bring, or lay it side by side."""
    if node.concat is not None:
        return torch.cat(
            [piece(term).expand(node.concat.shape(place, node.shape)) for place, term in enumerate(node.terms)], node.concat.dim
        )
    out, *rest = [piece(term).expand(node.shape) for term in node.terms]
    for more in rest:
        out = combine(out, more)
    return out


class _NotApplicableError(Exception):
    """A bound whose statement does not cover the network."""


def theorem_f2(spread: Spread) -> float:
    """Theorem F.2 for the normalised parameters N(θ)(u→v) = θ(u→v)·A(u)/A(v), bias b(v)/A(v) (outputs keep their scale).

    Σ_out (‖ΔN(out)‖₁ + |Δb|) + min(‖Φ(θ)‖₁, ‖Φ(θ')‖₁)·max over paths of Σ over hidden neurons of (‖ΔN‖₁ + |Δb̃|). Shared
    weights become per-position here, so edges are compared one by one: a cost like a forward pass's multiplications.

    Args:
        spread: Two networks.

    Returns:
        log₁₀ of the bound; inf past float64's range.

    Raises:
        _NotApplicableError: An output neuron is read by others, or an operator does not list its edges.
    """
    network = spread.network
    assert spread.others is not None
    read = {term.source for node in network.nodes for term in node.terms}
    if read & set(network.outputs):
        raise _NotApplicableError("It is stated for networks whose output neurons are read by no other neuron.")
    sides = [weighted(own, dtype=torch.float64, transform=torch.abs) for own in (spread.values, spread.others)]
    signed = [weighted(own, dtype=torch.float64) for own in (spread.values, spread.others)]
    ones = weighted(spread.values, dtype=torch.float64, transform=torch.ones_like)

    def step(node: Node, below: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, A', and the largest sum of changes on a path that ends here (for outputs: their own change)."""
        if node.kind == "input":
            start = torch.ones(node.shape, dtype=torch.float64, device=network.device)
            return start, start, torch.zeros_like(start)
        masses = [_carried(node, {name: own[which] for name, own in below.items()}, sides[which]) for which in (0, 1)]
        is_output = node.name in network.outputs
        scales = [torch.where((own > 0) & (not is_output), own, 1.0) for own in masses]
        change = _normalised_change(node, below, signed, scales)
        path = torch.zeros_like(change)
        if node.terms:
            path = _over(node, lambda term: _largest(term, below[term.source][2], ones), torch.maximum).expand(node.shape)
        if is_output:
            tops.append(float(path.max()))
            return masses[0], masses[1], change
        return masses[0], masses[1], path + change

    tops: list[float] = []
    try:
        found = walk(network, step)
    except NotImplementedError as error:
        raise _NotApplicableError(f"The edges of an operator ({error}) are not listed one by one.") from error
    norms = [_sum(network, {name: own[which] for name, own in found.items()}) for which in (0, 1)]
    return _log10(_sum(network, {name: own[2] for name, own in found.items()}) + min(norms) * max(tops, default=0.0))


def _normalised_change(
    node: Node, below: Mapping[str, tuple[Tensor, Tensor, Tensor]], signed: list[WeightsOf], scales: list[Tensor]
) -> Tensor:
    """Return ‖ΔN(v)‖₁ + |Δb̃(v)| for each neuron of a node, edge by edge."""
    ratio, offset = scales[0] / scales[1], 0

    def one(term: Term) -> Tensor:
        nonlocal offset
        own = ratio
        if node.concat is not None:
            size = node.concat.sizes[node.terms.index(term)]
            own, offset = ratio.narrow(node.concat.dim, offset, size), offset + size
        weights = [torch.ones((), dtype=torch.float64, device="cpu") if term.weight is None else _full(term, w) for w in signed]
        x, y, _ = below[term.source]
        return term.edges.gap(x, weights[0], y, weights[1], own)

    out = _over(node, one, torch.add) if node.terms else torch.zeros_like(ratio)
    for start in node.starts:
        first, second = (_placed(start, own(start.weight)) for own in signed)
        out = out + (first - ratio * second).abs()
    return out / scales[0]


def _full(term: Term, weights_of: WeightsOf) -> Tensor:
    weights = _weight(term, weights_of)
    assert weights is not None
    return weights.full()


def lemma_4_3(spread: Spread) -> float:
    """Equation (8), layered perceptrons: (W² + min(‖Φ(θ)‖₁, ‖Φ(θ')‖₁)·L·W)·‖N(θ)−N(θ')‖_∞, W counting the bias.

    Args:
        spread: Two networks.

    Returns:
        The bound.
    """
    own = perceptron.layered(spread)
    layers = perceptron.layers_of(spread.network)
    assert isinstance(layers, list)
    assert spread.others is not None
    forms, norms = [], []
    for values in (spread.values, spread.others):
        mass = torch.ones(spread.network.nodes[0].shape[-1], dtype=torch.float64, device=spread.network.device)
        rows = []
        for place, node in enumerate(layers):
            leaves = [node.terms[0].weight, *(start.weight for start in node.starts)]
            weight, *biases = [value_of(leaf, values).double() for leaf in leaves if leaf is not None]
            scaled = torch.cat([weight * mass, *(bias.reshape(-1, 1) for bias in biases)], 1)
            mass = scaled.abs().sum(1)
            last = place == len(layers) - 1
            rows.append(scaled if last else scaled / torch.where(mass > 0, mass, 1.0)[:, None])
        forms.append(rows)
        norms.append(float(mass.sum()))
    distance = max(float((first - second).abs().max()) for first, second in zip(*forms, strict=True))
    width = own.width + 1
    return (width**2 + min(norms) * own.depth * width) * distance
