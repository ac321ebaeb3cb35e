"""The neurons of the nonlinear operators. Only their names are listed; what they do is asked of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathlift.reference.affine import SCALES, affine
from pathlift.reference.calls import NONE, Labelled, OperatorCall, ProbeError, added, neurons_of
from pathlift.reference.dag import Bias, Edge, Neuron

SLOPES = {"relu", "leaky_relu", "rrelu", "abs", "threshold"}
CLAMPS = {"relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max"}
LARGEST = {"max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices"}
LARGEST |= {"max_pool3d_with_indices", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"}
LARGEST |= {"amax", "max", "maximum", "fmax"}
SMALLEST = {"amin", "min", "minimum", "fmin"}


def slopes(neurons: list[Neuron], name: str, call: OperatorCall) -> Tensor:
    """Write a positively homogeneous function σ of each element: σ(z) = s₊·z for z > 0 and s₋·z for z ≤ 0.

    Hence s₊ = σ(1) and s₋ = −σ(−1). A neuron's slopes are activations and at most 1 in magnitude; what is larger is a weight
    on the edge, σ(z) = g·(s₊/g, s₋/g)(z) with g = max(1, |s₊|, |s₋|). ReLU: (1, 0), leaky ReLU: (1, 0.01), |z|: (1, −1),
    a leaky ReLU of slope 3: edge 3, slopes (1/3, 1).

    Args:
        neurons: The neurons so far.
        name: Of the new ones.
        call: The operator.

    Returns:
        The numbers of the new neurons.

    Raises:
        ProbeError: σ is not of this form at five sizes of z, or reads −∞.
    """
    ids = _only(call)
    below = neurons_of(call.target, ids)
    positive, negative = _at(call, 1.0), 0.0 - _at(call, -1.0)
    for z in (2.0, *SCALES):
        if max(abs(_at(call, z) - z * positive), abs(_at(call, -z) + z * negative)) > 1e-12 * z:
            raise ProbeError(f"{call.target} is not positively homogeneous.")
    gain = max(1.0, abs(positive), abs(negative))
    both = (positive / gain, negative / gain)
    return added(neurons, name, ids.shape, lambda n, i: Neuron(n, "slopes", (Edge(below[i], gain),), slopes=both))


def _only(call: OperatorCall) -> Tensor:
    """Return the one tensor of activations that a call reads."""
    if len(call.activations) != 1:
        raise ProbeError(f"{call.target} reads {len(call.activations)} tensors that depend on the input, where one is known.")
    return call.activations[0]


def _at(call: OperatorCall, number: float) -> float:
    """Return what a function of each element makes of a number."""
    made = call.flat(call.filled(number))
    if not bool((made == made[0]).all()):
        raise ProbeError(f"{call.target} is not the same function of every element.")
    return float(made[0])


def prelu(neurons: list[Neuron], name: str, ids: Tensor, weight: Labelled) -> Tensor:
    """Write PReLU, z⁺ − a·(−z)⁺, as three neurons: z⁺, (−z)⁺ and their sum with edges 1 and −a.

    Args:
        neurons: The neurons so far.
        name: Of the new ones.
        ids: The neurons z.
        weight: a, one number or one for each channel (the second axis).

    Returns:
        The numbers of the new neurons.
    """
    axes = [-1 if axis == min(1, ids.dim() - 1) else 1 for axis in range(ids.dim())]
    channel = torch.arange(weight.value.numel()).reshape(axes).expand(ids.shape).reshape(-1).tolist()
    entries, below = weight.entries(), neurons_of("prelu", ids)
    above = added(neurons, f"{name}+", ids.shape, lambda n, i: Neuron(n, "slopes", (Edge(below[i], 1.0),)))
    under = added(neurons, f"{name}-", ids.shape, lambda n, i: Neuron(n, "slopes", (Edge(below[i], -1.0),)))

    def total(n: str, i: int) -> Neuron:
        slope, label = entries[channel[i]]
        edges = (Edge(int(above.reshape(-1)[i]), 1.0), Edge(int(under.reshape(-1)[i]), -slope, label))
        return Neuron(n, "identity", edges)

    return added(neurons, name, ids.shape, total)


def clamp(neurons: list[Neuron], name: str, call: OperatorCall) -> Tensor:
    """Write min(max(z, low), high): neurons whose biases are the bounds that there are.

    Args:
        neurons: The neurons so far.
        name: Of the new ones.
        call: The operator.

    Returns:
        The numbers of the new neurons.
    """
    ids = _only(call)
    below = neurons_of(call.target, ids)
    operator = getattr(call.target, "__name__", "").split(".")[0]
    low = _first(call.argument("min"), call.argument("min_val"))
    high = _first(call.argument("max"), call.argument("max_val"))
    if operator == "hardtanh":
        low, high = _first(low, -1.0), _first(high, 1.0)
    elif operator == "relu6":
        low, high = 0.0, 6.0
    lows, highs = _bounds(low, ids.shape), _bounds(high, ids.shape)

    def neuron(n: str, i: int) -> Neuron:
        biases = [bias for bias in (lows[i], highs[i]) if bias is not None]
        first = None if lows[i] is None else 0
        last = None if highs[i] is None else len(biases) - 1
        return Neuron(n, "clamp", (Edge(below[i], 1.0),), tuple(biases), low=first, high=last)

    return added(neurons, name, ids.shape, neuron)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _bounds(bound: Any, shape: torch.Size) -> list[Bias | None]:
    """Return a bound of a clamp for each element; None where there is none."""
    given = bound if isinstance(bound, Labelled) else Labelled(bound)
    if given.value is None:
        return [None] * shape.numel()
    entries = given.entries()
    numbers = torch.arange(len(entries)).reshape(torch.as_tensor(given.value).shape).expand(shape).reshape(-1).tolist()
    return [None if abs(entries[number][0]) == float("inf") else Bias(*entries[number]) for number in numbers]


def extremum(neurons: list[Neuron], name: str, call: OperatorCall, *, smallest: bool) -> Any:
    """Write maxima or minima of some of the elements, constants among them; a minimum of n is the n-th largest.

    Which elements an output reads is asked of the operator: with one element at 1 and all others at −1, exactly the maxima
    that read it are 1 (for minima, with −1 and 1 exchanged). A maximum over windows of 2 of (x₀, x₁, x₂): raising x₁ raises
    both outputs, x₀ the first, x₂ the second. The border of −∞ that pooling itself pads with is never above −1.

    Args:
        neurons: The neurons so far.
        name: Of the new ones.
        call: The operator.
        smallest: Whether they are minima.

    Returns:
        The numbers of the new neurons, as the operator returns its results.
    """
    high = -1.0 if smallest else 1.0
    low_constants = {item: torch.full(item.value.shape, -high, dtype=torch.float64) for item in call.constants}

    def readers(activations: list[Tensor], constants: dict[Labelled, Tensor]) -> list[int]:
        return torch.nonzero(call.results(activations, constants)[0].reshape(-1) == high).reshape(-1).tolist()

    edges: list[list[Edge]] = [[] for _ in range(call.shapes[0].numel())]
    biases: list[list[Bias]] = [[] for _ in range(call.shapes[0].numel())]
    for part, ids in enumerate(call.activations):
        for index, source in enumerate(ids.reshape(-1).tolist()):
            raised = call.filled(-high)
            raised[part].view(-1)[index] = high
            for out in readers(raised, low_constants) if source != NONE else ():
                edges[out].append(Edge(source, 1.0))
    for item, low in low_constants.items():
        for index, (number, label) in enumerate(item.entries()):
            raised_constant = low.clone()
            raised_constant.view(-1)[index] = high
            for out in readers(call.filled(-high), low_constants | {item: raised_constant}):
                biases[out].append(Bias(number, label))

    def neuron(n: str, out: int) -> Neuron:
        count = len(edges[out]) + len(biases[out])
        return Neuron(n, "pool", tuple(edges[out]), tuple(biases[out]), k=count if smallest else 1)

    numbers = added(neurons, name, call.shapes[0], neuron)
    return numbers if len(call.shapes) == 1 else (numbers, None)  # the indices of the maxima are no neurons


def extrema(neurons: list[Neuron], name: str, ids: Tensor, dim: int | None, keepdim: bool) -> tuple[Any, Any]:
    """Write ``aminmax``: the minimum and the maximum.

    Args:
        neurons: The neurons so far.
        name: Of the new ones.
        ids: The neurons that are read.
        dim: Along which axis; None for all.
        keepdim: Whether the axis stays.

    Returns:
        The numbers of the new neurons: the minima, the maxima.
    """
    axes = [] if dim is None else [dim]
    lowest = OperatorCall(torch.ops.aten.amin.default, (ids, axes, keepdim), {})
    highest = OperatorCall(torch.ops.aten.amax.default, (ids, axes, keepdim), {})
    return extremum(neurons, name, lowest, smallest=True), extremum(neurons, name, highest, smallest=False)


def hardsigmoid(neurons: list[Neuron], name: str, ids: Tensor) -> Tensor:
    """Write min(max(z/6 + 1/2, 0), 1): an affine neuron, then a clamp.

    Args:
        neurons: The neurons so far.
        name: Of the new ones.
        ids: The neurons z.

    Returns:
        The numbers of the new neurons.
    """
    line = affine(neurons, name, OperatorCall(lambda z: z / 6 + 0.5, (ids,), {}))
    return clamp(neurons, name, OperatorCall(torch.ops.aten.clamp.default, (line, 0.0, 1.0), {}))


def batch_norm(neurons: list[Neuron], name: str, call: OperatorCall) -> Tensor:
    """Write s·x + t with the running statistics, as the theory sees it: s is labelled as the weight γ, t as the bias β.

    s = f(1) − f(0) and t = f(0), where f is the operator: s = γ/√(σ²+ε), t = β − μ·s.

    Args:
        neurons: The neurons so far.
        name: Of the new ones.
        call: The operator.

    Returns:
        The numbers of the new neurons.
    """
    ids = _only(call)
    below = neurons_of(call.target, ids)
    t = call.flat(call.filled(0.0)).tolist()
    s = (call.flat(call.filled(1.0)) - call.flat(call.filled(0.0))).tolist()
    axes = [1, -1] + [1] * (ids.dim() - 2)
    channel = torch.arange(ids.shape[1]).reshape(axes).expand(ids.shape).reshape(-1).tolist()
    gamma, beta = (item.labels if isinstance(item, Labelled) else None for item in call.args[1:3])

    def neuron(n: str, i: int) -> Neuron:
        edge = Edge(below[i], s[i], gamma[channel[i]] if gamma else None)
        return Neuron(n, "identity", (edge,), (Bias(t[i], beta[channel[i]] if beta else None),))

    return added(neurons, name, ids.shape, neuron)
