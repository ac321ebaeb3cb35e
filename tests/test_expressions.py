"""Expressions answer for themselves: value, interval, peaks and cancellation, and the products that they are the sum of."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import pathlift
import rooms
from agreement import examples, randomised
from pathlift.graph.expressions import Expression, Formula, FunctionCall, StateTensor, Summand, evaluate
from pathlift.graph.interval import Interval, IntervalArithmetic
from pathlift.passes.box import box, point
from pathlift.rescaling.conditioning import kernel_diagonal, on_paths
from pathlift.rescaling.monomials import products

ABOVE_RULES = rooms.ROOMS[rooms.ROOMS.index("passes") :]
SHARED = {"pathlift.rules", "pathlift.rules.base", "pathlift.rules.replay"}
"""What a rule is, and what an operator is called: no rule of its own."""


@pytest.mark.hunt
def test_nobody_but_the_reader_asks_for_a_rule() -> None:
    asked = {
        f"{module} imports {other}"
        for module, imported in rooms.imports().items()
        if rooms.room(module) in ABOVE_RULES and rooms.room(module) != "reading"
        for other in imported
        if rooms.room(other) == "rules" and other not in SHARED
    }
    assert not asked


@dataclass(frozen=True)
class Offset(Formula):
    """a − m·b: a formula that no pass and no application has heard of."""

    def __call__(self, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        return a.double() - m.double() * b.double()

    def interval(self, arithmetic: IntervalArithmetic, a: Interval, b: Interval, m: Interval) -> Interval:
        return arithmetic.operator("sub", a, arithmetic.operator("mul", m, b))

    def peak(self, a: Interval, b: Interval, m: Interval) -> float:
        return float(a.size.max()) + float((m.size * b.size).max())

    def cancelled(self, _: Interval, b: Interval, m: Interval) -> Tensor:
        return m.size * b.size

    def summands(self, a: Expression, b: Expression, m: Expression) -> tuple[Summand, ...]:
        return Summand((a,)), Summand((b,), m)


def _network() -> tuple[pathlift.Network, pathlift.graph.layers.WeightTensor]:
    """A batch norm whose shift is another formula: of β, γ and μ."""
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))
    network = pathlift.capture(model, examples((3,)))
    (old,) = (bias.weight for layer in network.layers for bias in layer.biases if layer.unit_name == "1")
    names = [StateTensor("1.bias"), StateTensor("1.weight"), StateTensor("1.running_mean")]
    new = replace(old, expression=FunctionCall(Offset(), tuple(names)))
    layers = tuple(
        replace(layer, biases=tuple(replace(bias, weight=new) if bias.weight is old else bias for bias in layer.biases))
        for layer in network.layers
    )
    weights = tuple(new if weight is old else weight for weight in network.weights)
    return replace(network, graph=replace(network.graph, layers=layers, weights=weights)), new


def test_a_formula_that_nobody_knows_is_asked() -> None:
    network, weight = _network()
    beta, gamma, mean = (network.state[f"1.{name}"].double() for name in ("bias", "weight", "running_mean"))
    exact = point(network, network.state)
    assert bool((exact.lower[weight] <= beta - mean * gamma).all())
    assert bool((exact.upper[weight] >= beta - mean * gamma).all())
    torch.testing.assert_close(exact.cancelled[weight], (mean * gamma).abs())
    assert exact.peaks[weight] == float(beta.abs().max()) + float((mean * gamma).abs().max())
    wide = box(network, pathlift.Relative(0.1))
    assert bool((wide.upper[weight] - wide.lower[weight] >= 0.2 * beta.abs()).all())

    found = products(network, weight)
    assert found is not None
    assert [[(factor.name, factor.buffer) for factor in product] for product in found] == [
        [("1.bias", False)],
        [("1.running_mean", True), ("1.weight", False)],
    ]


def test_a_sum_sends_the_path_kernel_to_its_parameters() -> None:
    """(∂Φ/∂β)² is that of the shift itself; γ also counts where it scales, and by (μ·∂Φ/∂t)² through the shift."""
    network, _ = _network()
    diagonal = kernel_diagonal(network)
    without = dict(network.state) | {"1.running_mean": torch.zeros(4)}
    plain = kernel_diagonal(replace(network, state=without))
    beta, mean = plain["1.bias"], network.state["1.running_mean"].double()
    total, before = (pathlift.path_norm(replace(network, state=state), q=2).value ** 2 for state in (network.state, without))
    torch.testing.assert_close(diagonal["1.bias"] * total, beta * before)
    torch.testing.assert_close(diagonal["1.weight"] * total, (plain["1.weight"] + mean**2 * beta) * before)


def test_a_sum_lies_on_paths_by_its_parameters_alone() -> None:
    network, _ = _network()
    state = {name: tensor.clone() for name, tensor in network.state.items()}
    for name in ("0.weight", "0.bias"):
        state[name].zero_()
    state["1.bias"][1:] = 0.0
    there = on_paths(replace(network, state=state))
    assert there["3.weight"].any(0).tolist() == [True, False, False, False]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda formula: pickle.loads(pickle.dumps(formula))])
def test_copies_of_formulas_are_the_same_function(copied: object) -> None:
    network = pathlift.capture(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), (2,))
    calls = [weight.expression for weight in network.weights if isinstance(weight.expression, FunctionCall)]
    formulas = [call.function for call in calls if isinstance(call.function, Formula)]
    assert len(formulas) == 2
    assert formulas[0] != formulas[1]
    assert callable(copied)
    for call, formula in zip(calls, formulas, strict=True):
        assert copied(formula) == formula
        again = FunctionCall(copied(formula), call.args)
        assert torch.equal(evaluate(again, network.state), evaluate(call, network.state))
