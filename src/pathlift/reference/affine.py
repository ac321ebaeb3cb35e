"""The edges and biases of an affine operator, from its values at unit vectors.

An affine operator that no two parameters of which multiply each other is, with x its activations and θ its parameters,

    f(x; θ) = c + Σ_i a_i·x_i + Σ_k θ_k·(b_k + Σ_i m_ki·x_i),

where c, a_i, b_k and m_ki are vectors with an entry for each output. Its values at 0 and at unit vectors e give all of them:

    c    = f(0; 0)                                      a bias without a label
    a_i  = f(e_i; 0) − c                                edges from x_i without a label
    b_k  = f(0; e_k) − c                                biases θ_k·b_k, labelled k
    m_ki = f(e_i; e_k) − f(0; e_k) − f(e_i; 0) + c      edges from x_i of weight θ_k·m_ki, labelled k

For a linear layer y = W·x + β all c and a are 0, b is 1 at β_o for output o, and m is 1 at (W_oi, x_i) for output o: edges
x_i → y_o of weight W_oi, and a bias β_o. For x + x/2 the edges are a = 1 (twice read, it is x_i twice) and a = 1/2.

Nothing of this form is assumed: on random activations of five sizes the edges and biases must give what the operator gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathlift.reference.calls import NONE, Labelled, OperatorCall, ProbeError, added
from pathlift.reference.dag import Bias, Edge, Neuron

HELD = 1 << 27
"""Operators are not written out that have more numbers than this at once (1 GiB): one for each input and output."""

MOST = 1 << 31
"""Or more than this, one after the other: one for each parameter, input and output."""

SCALES = (1.0, 1e-12, 1e-6, 1e4, 1e9)
"""How far from 0 an operator is asked whether it is affine, or homogeneous."""


class Wires:
    """The edges and biases of the outputs of an operator, as they are found."""

    def __init__(self, outputs: int) -> None:
        """Begin without any.

        Args:
            outputs: Number of outputs.
        """
        self.edges: list[list[Edge]] = [[] for _ in range(outputs)]
        self.biases: list[list[Bias]] = [[] for _ in range(outputs)]

    def values(self, values: Tensor) -> list[float]:
        """Return the outputs for given values of all neurons."""
        return [
            sum(float(values[edge.source]) * float(edge.weight) for edge in edges) + sum(float(bias.value) for bias in biases)
            for edges, biases in zip(self.edges, self.biases, strict=True)
        ]


def affine(neurons: list[Neuron], name: str, call: OperatorCall) -> Any:
    """Write an affine operator out in neurons.

    Args:
        neurons: The neurons so far.
        name: Of the new ones.
        call: The operator.

    Returns:
        The numbers of the new neurons, as the operator returns its results.

    Raises:
        ProbeError: It is not affine, or does more to a border of −∞ than to move it.
    """
    c = call.flat(call.zeros(), _no_parameters(call))
    _check_size(call, len(c))
    if bool(torch.isneginf(c).any()) or any(bool((ids == NONE).any()) for ids in call.activations):
        return _moved_border(neurons, name, call, c)
    wires = Wires(len(c))
    for out in torch.nonzero(c).reshape(-1).tolist():
        wires.biases[out].append(Bias(float(c[out])))
    a = [
        torch.stack([call.flat(_with(call.zeros(), part, e_i), _no_parameters(call)) - c for e_i in units(ids.shape)])
        for part, ids in enumerate(call.activations)
    ]
    for slopes, ids in zip(a, call.activations, strict=True):
        for i, out in torch.nonzero(slopes).tolist():
            wires.edges[out].append(Edge(int(ids.reshape(-1)[i]), float(slopes[i, out])))
    for parameter in call.parameters:
        _wire_parameter(wires, call, parameter, c, a)
    _check(wires, call, len(neurons))
    flat = torch.Size([len(c)])
    return call.like_results(
        added(neurons, name, flat, lambda n, o: Neuron(n, "identity", tuple(wires.edges[o]), tuple(wires.biases[o])))
    )


def _wire_parameter(wires: Wires, call: OperatorCall, parameter: Labelled, c: Tensor, a: list[Tensor]) -> None:
    """Find b_k and m_ki for all elements θ_k of one parameter, and all i, at once."""
    theta, shape = parameter.entries(), parameter.value.shape
    values = max(ids.numel() for ids in call.activations) * len(c)
    step = max(1, HELD // 8 // max(values, len(theta)))

    def f(activations: list[Tensor], value: Tensor) -> Tensor:
        return call.flat(activations, _no_parameters(call) | {parameter: value})

    for first in range(0, len(theta), step):
        part_of_theta = theta[first : first + step]
        units_of_theta = units(shape, first, len(part_of_theta))
        alone = torch.vmap(lambda e_k: f(call.zeros(), e_k))(units_of_theta)
        b = alone - c
        for k, out in torch.nonzero(b).tolist():
            number, label = part_of_theta[k]
            wires.biases[out].append(Bias(float(b[k, out]) * number, label))
        for part, ids in enumerate(call.activations):

            def at_both(e_k: Tensor, e_i: Tensor, part: int = part) -> Tensor:
                return f(_with(call.zeros(), part, e_i), e_k)

            at_all = torch.vmap(torch.vmap(at_both, in_dims=(None, 0)), in_dims=(0, None))(units_of_theta, units(ids.shape))
            m = at_all - alone[:, None] - a[part]
            for k, i, out in torch.nonzero(m).tolist():
                number, label = part_of_theta[k]
                wires.edges[out].append(Edge(int(ids.reshape(-1)[i]), float(m[k, i, out]) * number, label))


def _check_size(call: OperatorCall, outputs: int) -> None:
    """Refuse an operator that has too many parameters, inputs and outputs, before anything of that size is made."""
    inputs = max((ids.numel() for ids in call.activations), default=0)
    parameters = max((parameter.value.numel() for parameter in call.parameters), default=0)
    for numbers, most in ((inputs * max(inputs, outputs), HELD), (inputs * outputs * parameters, MOST)):
        if numbers > most:
            raise ProbeError(
                f"{call.target} has {inputs:,} inputs, {outputs:,} outputs and {parameters:,} parameters, which takes "
                f"{numbers:,} numbers ({8 * numbers / 2**30:,.0f} GiB), more than {most:,}."
            )


def _check(wires: Wires, call: OperatorCall, count: int) -> None:
    """Compare with the operator itself. A neuron that is read twice is one number, so each neuron has a value of its own."""
    for scale in SCALES:
        values = scale * torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        right = call.flat([values[ids] for ids in call.activations]).tolist()
        for mine, truth in zip(wires.values(values), right, strict=True):
            if not abs(mine - truth) <= 1e-9 * max(scale, abs(truth)) + 1e-14:
                raise ProbeError(f"{call.target} is not affine in its activations.")


def _moved_border(neurons: list[Neuron], name: str, call: OperatorCall, c: Tensor) -> Any:
    """Move neurons about, among which −∞ stands in some places: there is no neuron there, and only a maximum may read it.

    The numbers of the neurons are sent through the operator themselves, shifted by 2, so that what comes out tells which
    neuron stands where: n + 2 is neuron n, 1 is −∞, and 0 is a zero that the operator brings in, which becomes a neuron.
    The −∞ that it brings in are those of c. Padding neurons (4, 7) by −∞ on the left: 6, 9 go in, −∞, 6, 9 come out.
    A sum of two neurons would come out as another number: on random values, what comes out must be those that were found.

    Returns:
        The numbers of the neurons, as the operator returns its results.

    Raises:
        ProbeError: The operator does more than to move neurons.
    """
    shifted = call.flat([ids.double() + 2.0 for ids in call.activations])
    border = torch.isneginf(c) | (shifted == NONE + 2)
    moved = torch.where(border, NONE, shifted - 2.0)
    values = torch.randn(len(neurons), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = torch.cat([values, torch.tensor([0.0, -torch.inf], dtype=torch.float64)])  # the last ones: a zero (−2), −∞ (−1)
    are_numbers = bool((moved == moved.round()).all()) and moved.min() >= -2 and moved.max() < len(neurons)
    if not are_numbers or not torch.equal(call.flat([known[ids] for ids in call.activations]), known[moved.long()]):
        raise ProbeError(f"{call.target} reads a border of −inf, and does more than to move it.")
    numbers = moved.long()
    for index in torch.nonzero(numbers == -2).reshape(-1).tolist():
        numbers[index] = len(neurons)
        neurons.append(Neuron(f"{name}[{index}]", "identity"))
    return call.like_results(numbers)


def units(shape: torch.Size, first: int = 0, count: int | None = None) -> Tensor:
    """Return the unit vectors of a shape, or some of them, (count, *shape)."""
    count = shape.numel() if count is None else count
    rows = torch.zeros(count, shape.numel(), dtype=torch.float64)
    rows.diagonal(first).fill_(1.0)
    return rows.reshape(count, *shape)


def _no_parameters(call: OperatorCall) -> dict[Labelled, Tensor]:
    return {parameter: torch.zeros(parameter.value.shape, dtype=torch.float64) for parameter in call.parameters}


def _with(activations: list[Tensor], part: int, value: Tensor) -> list[Tensor]:
    return [*activations[:part], value, *activations[part + 1 :]]
