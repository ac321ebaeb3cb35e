"""Operators beside the shared cases: recurrent networks by hand, edges as values, what is refused and why."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from agreement import examples, randomised
from cases import OPERATORS, Case, Fn
from pathlift.rules import Operator
from pathlift.rules.replay import replayed

WALL = -math.inf


class Head(nn.Module):
    """A recurrent network with ReLU and a linear head on its last state."""

    def __init__(self, **options: bool | int) -> None:
        super().__init__()
        self.r = nn.RNN(4, 3, nonlinearity="relu", batch_first=True, **options)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.r(x)[0][:, -1])


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().abs() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layers", [1, 2])
def test_a_recurrent_network_is_its_unrolled_layers_with_magnitudes(layers: int) -> None:
    """A(h_t) = |U| A(x_t) + |b| + |V| A(h_{t−1}) + |c|, from 0."""
    model = randomised(Head(num_layers=layers))
    w = magnitudes(model)
    steps = [torch.ones(4, dtype=torch.float64)] * 5
    for layer in range(layers):
        h, states = torch.zeros(3, dtype=torch.float64), []
        for x in steps:
            u, v, b, c = (w[f"r.{key}_l{layer}"] for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            h = u @ x + b + v @ h + c
            states.append(h)
        steps = states
    expected = float((w["head.weight"] @ steps[-1] + w["head.bias"]).sum())
    assert pathlift.path_norm(model, (5, 4)).value == pytest.approx(expected, rel=1e-12)
    assert set(pathlift.path_magnitude(model, (5, 4))) == set(w)


def test_a_weight_of_a_recurrent_network_has_the_share_of_all_its_steps() -> None:
    """Pruning one recurrent weight costs at most its share, and all weights of the input share what the input brings."""
    model = randomised(Head(bias=False))
    scores = pathlift.path_magnitude(model, (5, 4))
    norm = pathlift.path_norm(model, (5, 4))
    u = scores["r.weight_ih_l0"].sum()  # every path from the input takes one of them, and only one
    assert float(u) == pytest.approx(norm.input_part / norm.value, rel=1e-12)


class FromState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(2, 1, nonlinearity="relu", bias=False)
        self.start = nn.Parameter(torch.tensor([[2.0]]))
        with torch.no_grad():
            self.cell.weight_ih[:] = torch.tensor([[1.0, -3.0]])
            self.cell.weight_hh[:] = -5.0

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x, self.start)


def test_a_learned_state_starts_paths() -> None:
    norm = pathlift.path_norm(FromState(), (2,))
    assert (norm.input_part, norm.bias_part) == (4.0, 10.0)
    scores = pathlift.path_magnitude(FromState(), (2,))
    assert float(scores["start"].sum()) == pytest.approx(10 / 14)
    assert float(scores["cell.weight_hh"].sum()) == pytest.approx(10 / 14)


@pytest.mark.one_in(16, first=6)
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case.name)
def test_edges_are_values(case: Case) -> None:
    """They pickle and copy, and what comes back sends the same numbers along."""
    network = pathlift.capture(randomised(case.make()), examples(case.shape))
    shapes = {layer.name: layer.shape for layer in network.layers}
    for layer in network.layers:
        for connection in layer.connections:
            if connection.weight is None:
                below = torch.rand(shapes[connection.source], dtype=torch.float64)
                expected = connection.edges.sum(below, None)
                assert torch.equal(pickle.loads(pickle.dumps(connection.edges)).sum(below, None), expected)
                assert torch.equal(copy.deepcopy(connection.edges).sum(below, None), expected)


def test_operators_are_equal_by_name_and_calls_by_what_they_call() -> None:
    add = Operator.of(torch.ops.aten.add.Tensor)
    assert pickle.loads(pickle.dumps(add)) == add == Operator("aten::add.Tensor")
    assert hash(add) == hash(Operator("aten::add.Tensor"))
    assert add(torch.tensor(1), torch.tensor(2)) == 3
    assert add != Operator("aten::add.Scalar")
    first, second, other = (replayed("aten::index_select", dim=0, index=torch.tensor(own)) for own in ([1, 0], [1, 0], [0, 0]))
    assert first == second == copy.deepcopy(first) == pickle.loads(pickle.dumps(first))
    assert hash(first) == hash(second)
    assert first != other
    assert replayed("aten::constant_pad_nd", pad=(0, 1)) != replayed("aten::constant_pad_nd", pad=(False, 1))


@pytest.mark.parametrize(
    ("inplace", "plain"),
    [("squeeze_.dim", "squeeze.dim"), ("transpose_.default", "transpose.int"), ("fill_.Scalar", "fill.Scalar")],
)
def test_an_operator_in_place_is_read_as_the_one_that_returns_its_result(inplace: str, plain: str) -> None:
    base, overload = inplace.split(".")
    target = getattr(getattr(torch.ops.aten, base), overload)
    assert Operator.of(target) == Operator(f"aten::{plain}")


def test_an_operator_that_only_writes_has_no_other_form() -> None:
    with pytest.raises(LookupError, match="writes to one of its arguments"):
        Operator.of(torch.ops.aten.fill_diagonal_.default)


def _twice_at_one_place(x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, [0, 0]] = x[:, [0, 1]]
    return y


def _mirrored_where(x: Tensor) -> Tensor:
    y, mask = x * 1.0, torch.tensor([True, False])
    y[:, mask] = x.flip(2)[:, mask]
    return y


def _pooled(*pad: int, kernel: int = 2) -> Callable[[Tensor], Tensor]:
    return lambda x: F.max_pool2d(F.pad(x, pad, value=WALL), kernel, 1)


PLANE = (2, 3, 3)
REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "a window wholly in a border of −inf": (lambda: Fn(_pooled(2, 0)), PLANE, "wholly in the border"),
    "a window behind the neurons": (lambda: Fn(_pooled(0, 0, 0, 2)), PLANE, "wholly in the border"),
    "a window wholly in its own padding": (lambda: nn.MaxPool1d(2, padding=1, dilation=2), (1, 1), "wholly in the border"),
    "a channel of −inf": (lambda: Fn(_pooled(0, 0, 0, 0, 1, 0)), PLANE, "wholly in the border"),
    "nothing but −inf": (lambda: Fn(lambda x: x.masked_fill(torch.ones(3).bool(), WALL).amax(3)), PLANE, "wholly"),
    "a sum over −inf": (lambda: Fn(lambda x: F.pad(x, (1, 0), value=WALL).sum(3)), PLANE, "−inf"),
    "ReLU of −inf": (lambda: Fn(lambda x: F.max_pool2d(F.relu(F.pad(x, (1, 0), value=WALL)), 2)), PLANE, "−inf"),
    "a minimum with −inf": (lambda: Fn(lambda x: F.pad(x, (1, 0), value=WALL).amin(3)), PLANE, "−inf"),
    "an average with −inf": (lambda: Fn(lambda x: F.avg_pool2d(F.pad(x, (1, 0), value=WALL), 2)), PLANE, "−inf"),
    "an output of −inf": (lambda: Fn(lambda x: F.pad(x, (1, 0), value=WALL)), PLANE, "−inf"),
    "a border of +inf": (lambda: Fn(lambda x: F.max_pool2d(F.pad(x, (1, 0), value=math.inf), 2)), PLANE, "pads with inf"),
    "two values at one place": (lambda: Fn(_twice_at_one_place), PLANE, "several values to one place"),
    "scatter to one place twice": (
        lambda: Fn(lambda x: x.scatter(2, torch.zeros(1, 2, 2, 1, dtype=torch.long), x)), PLANE, "several values"),
    "scatter that multiplies": (
        lambda: Fn(lambda x: x.scatter(2, torch.zeros(1, 2, 1, 1, dtype=torch.long), 2.0, reduce="multiply")), PLANE, "sum"),
    "scatter that takes the largest": (
        lambda: Fn(lambda x: x.scatter_reduce(2, torch.zeros(1, 2, 1, 3, dtype=torch.long), x, "amax")), PLANE, "sum"),
    "a mask filled in order": (
        lambda: Fn(lambda x: x.masked_scatter(torch.tensor([True, False, True]), x.flip(2))), PLANE, "in their order"),
    "reading by strides": (lambda: Fn(lambda x: x.as_strided((2, 2), (1, 2))), PLANE, "strides"),
    "sampling where the input says": (
        lambda: Fn(lambda x: F.grid_sample(x, x.permute(0, 2, 3, 1), align_corners=False)), PLANE, "depend on the input"),
    "differences with another tensor": (lambda: Fn(lambda x: x.diff(append=x)), PLANE, "torch.cat"),
    "a bilinear form": (lambda: Fn(lambda x: torch.inner(x, x)), PLANE, "two activations"),
    "a quotient": (lambda: Fn(lambda x: torch.addcdiv(x, x, x)), PLANE, "divides by an activation"),
    "instance norm with its own statistics": (lambda: nn.InstanceNorm2d(2), PLANE, "statistics"),
    "a place for each True of a mask": (lambda: Fn(lambda x: x[:, torch.tensor([True, False])]), PLANE, "list of indices"),
    "places for each True of a mask, used further": (lambda: Fn(_mirrored_where), PLANE, "1 problem.*\n.*list of indices"),
    "an average over places for each True of a mask": (
        lambda: Fn(lambda x: x[:, torch.tensor([True, False])].mean((1, 2))), PLANE, "1 problem.*\n.*list of indices"),
    "a recurrent network with tanh": (lambda: _First(nn.RNN(3, 2, batch_first=True)), (3, 3), "tanh"),
    "LSTM": (lambda: _First(nn.LSTM(3, 2, batch_first=True)), (3, 3), "gates"),
    "GRU": (lambda: _First(nn.GRU(3, 2, batch_first=True)), (3, 3), "gates"),
    "a recurrent network over the batch": (lambda: _First(nn.RNN(3, 2, nonlinearity="relu")), (3, 3), "batch dimension"),
}  # fmt: skip


class _First(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", REFUSED)
def test_what_lies_outside_is_refused_with_its_own_reason(name: str) -> None:
    make, shape, words = REFUSED[name]
    with pytest.raises(pathlift.UnsupportedModelError, match=words):
        pathlift.path_norm(make(), shape)


LIKE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "type_as": lambda x, c: x + c.type_as(x),
    "to": lambda x, c: x + c.to(x),
    "expand_as": lambda x, c: x + c.expand_as(x),
    "view_as": lambda x, c: x + c.view_as(x),
    "reshape_as": lambda x, c: x + c.reshape_as(x),
    "new_tensor": lambda x, c: x + x.new_tensor([0.0, 1.0, 2.0, 3.0]),
}


class Shifted(nn.Module):
    def __init__(self, name: str, *, learned: bool) -> None:
        super().__init__()
        self.name = name
        level = torch.arange(4.0)
        self.level = nn.Parameter(level) if learned else level

    def forward(self, x: Tensor) -> Tensor:
        return LIKE[self.name](x, self.level)


@pytest.mark.parametrize("name", LIKE)
def test_a_constant_like_the_input_is_a_bias(name: str) -> None:
    norm = pathlift.path_norm(Shifted(name, learned=False), (4,))
    assert (norm.input_part, norm.bias_part) == (4.0, 6.0)


@pytest.mark.parametrize("name", [name for name in LIKE if name != "new_tensor"])
def test_a_parameter_like_the_input_stays_that_parameter(name: str) -> None:
    model, other = Shifted(name, learned=True), Shifted(name, learned=True)
    with torch.no_grad():
        other.level.mul_(2.0)
    assert pathlift.path_magnitude(model, (4,))["level"].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    metric = pathlift.path_metric(model, other, (4,))
    assert metric.exact
    assert metric.value == pytest.approx(6.0)
