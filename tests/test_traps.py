"""Traps: small networks whose right number was worked out by hand, and models that must be refused.

Weights are chosen so that each wrong reading (a dropped sign, a joined edge, a skipped bias) gives another number.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import pathlift
from cases import Fn


def fixed(module: nn.Module, *values: object) -> nn.Module:
    """Set the parameters of a module, in order."""
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(torch.as_tensor(value, dtype=parameter.dtype).reshape(parameter.shape))
    return module


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Module:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    return fixed(layer, weight, bias) if bias is not None else fixed(layer, weight)


class Parametric(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *values: object) -> None:
        super().__init__()
        self.function = function
        self.values = nn.ParameterList([nn.Parameter(torch.as_tensor(v, dtype=torch.float32)) for v in values])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.values)


def batch_norm(weight: float, bias: float, mean: float, variance: float) -> nn.Module:
    layer = fixed(nn.BatchNorm1d(1, eps=0.0), [weight], [bias])
    assert isinstance(layer, nn.BatchNorm1d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.fill_(mean)
    layer.running_var.fill_(variance)
    return layer


# name: (model, input shape, path-norm by hand)
NUMBERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "x + x has two edges, not one of weight 2 (same for q = 1)": (lambda: Fn(lambda x: x + x), (1,), 2.0),
    "x − x is two paths that do not cancel": (lambda: Fn(lambda x: x - x), (1,), 2.0),
    "−x counts like x": (lambda: Fn(lambda x: -x), (3,), 3.0),
    "x·(−2) counts 2": (lambda: Fn(lambda x: x * -2), (1,), 2.0),
    "x·0 counts 0": (lambda: Fn(lambda x: x * 0), (1,), 0.0),
    "a learned scale of −3 counts 3": (lambda: Parametric(lambda x, a: x * a, -3.0), (2,), 6.0),
    "a constant added is a bias": (lambda: Fn(lambda x: x + 5), (1,), 6.0),
    "a negative constant added counts its magnitude": (lambda: Fn(lambda x: x + -5), (1,), 6.0),
    "3 − x is a bias of 3 and an edge of −1": (lambda: Fn(lambda x: 3 - x), (1,), 4.0),
    "a broadcast bias counts once per neuron": (lambda: Fn(lambda x: x + 1), (4,), 8.0),
    "x / (−4)": (lambda: Fn(lambda x: x / -4), (1,), 0.25),
    "alpha of add": (lambda: Fn(lambda x: torch.add(x, x, alpha=-3)), (1,), 4.0),
    "ReLU keeps the path activation": (lambda: nn.Sequential(linear([[-2.0]]), nn.ReLU()), (1,), 2.0),
    "ReLU does not cut a negative bias": (lambda: nn.Sequential(linear([[1.0]], [-7.0]), nn.ReLU()), (1,), 8.0),
    "leaky ReLU with |slope| ≤ 1 counts 1": (lambda: nn.LeakyReLU(-0.5), (1,), 1.0),
    "leaky ReLU steeper than 1 counts its slope": (lambda: nn.LeakyReLU(3.0), (1,), 3.0),
    "|x| counts 1": (lambda: Fn(torch.abs), (1,), 1.0),
    "PReLU counts 1 + |a|": (lambda: fixed(nn.PReLU(), [-0.25]), (1,), 1.25),
    "ReLU6 is an edge and a bias of 6": (lambda: nn.ReLU6(), (2,), 14.0),
    "Hardtanh has two biases": (lambda: nn.Hardtanh(-2, 3), (1,), 6.0),
    "hard sigmoid is x/6 + 1/2, clamped at 1": (lambda: nn.Hardsigmoid(), (1,), 1 / 6 + 0.5 + 1),
    "clamp with one bound": (lambda: Fn(lambda x: x.clamp(min=-1.5)), (1,), 2.5),
    "clamp(min=0) is ReLU": (lambda: Fn(lambda x: x.clamp(min=0)), (1,), 1.0),
    "max-pooling sums its window": (lambda: nn.MaxPool1d(3), (1, 3), 3.0),
    "max-pooling's padding holds no paths": (lambda: nn.MaxPool1d(3, stride=1, padding=1), (1, 3), 7.0),
    "max-pooling with ceil_mode has a short window": (lambda: nn.MaxPool1d(2, ceil_mode=True), (1, 3), 3.0),
    "overlapping adaptive windows": (lambda: nn.AdaptiveMaxPool1d(2), (1, 3), 4.0),
    "maximum(x, x) has two antecedents": (lambda: Fn(lambda x: torch.maximum(x, x)), (1,), 2.0),
    "maximum with a constant is a bias": (lambda: Fn(lambda x: torch.maximum(x, torch.tensor([-4.0]))), (1,), 5.0),
    "minimum counts like maximum": (lambda: Fn(lambda x: torch.minimum(x, 2 * x)), (1,), 3.0),
    "amax": (lambda: Fn(lambda x: x.amax(1)), (5,), 5.0),
    "average pooling divides": (lambda: nn.AvgPool1d(2), (1, 4), 2.0),
    "average pooling counts its padding": (lambda: nn.AvgPool1d(2, padding=1), (1, 2), 1.0),
    "average pooling without its padding": (lambda: nn.AvgPool1d(2, padding=1, count_include_pad=False), (1, 2), 2.0),
    "divisor_override": (lambda: nn.AvgPool2d(2, divisor_override=1), (1, 2, 2), 4.0),
    "mean over all": (lambda: Fn(lambda x: x.mean(1)), (4,), 1.0),
    "a frozen batch norm's shift is β − μ·s": (lambda: batch_norm(2.0, 1.0, 3.0, 4.0), (1,), 1.0 + abs(1 - 3.0)),
    "batch norm with γ = 0 leaves only its bias": (lambda: batch_norm(0.0, -1.5, 3.0, 4.0), (1,), 1.5),
    "a shift of 0 although β and μ are not": (lambda: batch_norm(2.0, 3.0, 3.0, 4.0), (1,), 1.0),
    "a tensor used twice is two edges per path": (
        lambda: _twice(linear([[-3.0]])), (1,), 9.0),
    "cat(x, x)": (lambda: Fn(lambda x: torch.cat([x, x], 1)), (2,), 4.0),
    "reflect padding repeats neurons": (lambda: nn.ReflectionPad1d(1), (1, 3), 5.0),
    "constant padding is a bias": (lambda: Fn(lambda x: F.pad(x, (1, 1), value=-2.0)), (3,), 7.0),
    "dropout is off": (lambda: nn.Dropout(0.9), (2,), 2.0),
    "bicubic weights count with their magnitude": (
        # halving 4 pixels: taps −0.09375, 0.59375, 0.59375, −0.09375; at the border the first two fall on one pixel
        lambda: nn.Upsample((1, 2), mode="bicubic"), (1, 1, 4), 2 * (0.5 + 0.59375 + 0.09375)),
    "transposed convolution": (lambda: fixed(nn.ConvTranspose1d(1, 1, 2, stride=2, bias=False), [1.0, -2.0]), (1, 2), 6.0),
    "zero padding of a convolution": (lambda: fixed(nn.Conv1d(1, 1, 3, padding=1, bias=False), [1.0, -1.0, 1.0]), (1, 2), 4.0),
    "a pruned weight is no path": (lambda: _pruned(linear([[5.0, -2.0]])), (2,), 5.0),
    "weight_norm uses g·v/‖v‖": (lambda: _weight_norm(), (2,), 5.0 * (0.6 + 0.8)),
    "a bias that a later zero cuts off": (
        lambda: nn.Sequential(linear([[1.0]], [9.0]), linear([[0.0]], [2.0])), (1,), 2.0),
    "an output that is also hidden": (lambda: _Both(), (1,), 2.0 + 6.0),
    "a branch that reaches no output": (lambda: _Dead(), (1,), 2.0),
}  # fmt: skip


def _twice(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU(), layer)


def _pruned(layer: nn.Module) -> nn.Module:
    prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0.0]]))
    return layer


def _weight_norm() -> nn.Module:
    return parametrizations.weight_norm(linear([[3.0, -4.0]]))


class _Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear([[2.0]]), linear([[3.0]])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.a(x))
        return h, self.b(h)


class _Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.unused = linear([[2.0]]), linear([[100.0]])

    def forward(self, x: Tensor) -> Tensor:
        torch.softmax(self.unused(x), 1)
        return self.a(x)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", NUMBERS)
def test_the_number_is_the_one_worked_out_by_hand(name: str) -> None:
    make, shape, expected = NUMBERS[name]
    assert pathlift.path_norm(make(), shape).value == pytest.approx(expected, rel=1e-6, abs=0)


def test_a_relu_that_overwrites_the_input_is_read_like_any_other() -> None:
    assert pathlift.path_norm(nn.Sequential(nn.ReLU(inplace=True), linear([[2.0, -3.0]])), (2,)).value == 5.0


def test_a_high_order_does_not_lose_a_neuron_with_small_weights() -> None:
    """0.01^200 falls below float64 next to 1^200, and 100^200 brings it back."""
    model = nn.Sequential(linear([[1.0], [0.001]]), nn.ReLU(), linear([[0.0, 1000.0]])).double()
    try:
        value = pathlift.path_norm(model, (1,), q=200).value
    except pathlift.NumericalError:
        return
    assert value == pytest.approx(1.0, rel=1e-6)


def test_subnormal_constants_keep_their_value() -> None:
    tiny = 5e-324
    norm = pathlift.path_norm(Fn(lambda x: x * tiny * 2.0**1000).double(), torch.zeros(1, 1, dtype=torch.float64))
    assert norm.log10 == pytest.approx(math.log10(tiny) + 1000 * math.log10(2))
    clamp = pathlift.path_norm(nn.Hardtanh(-tiny, 1.0), torch.zeros(1, 1, dtype=torch.float64))
    assert clamp.value == 2.0


def test_a_flipped_sign_is_never_exact_and_costs_both_paths() -> None:
    metric = pathlift.path_metric(linear([[3.0]]), linear([[-2.0]]), (1,), moments=0)
    assert not metric.exact
    assert metric.lower == pytest.approx(1.0)  # (6): | 3 − 2 |
    assert metric.upper == pytest.approx(5.0)  # the truth: | 3 − (−2) |
    assert pathlift.path_metric(linear([[3.0]]), linear([[-2.0]]), (1,)).lower == pytest.approx(5.0)  # by its moments
    assert not pathlift.path_metric(linear([[3.0]]), linear([[-3.0]]), (1,)).exact
    l2 = pathlift.path_metric(linear([[3.0]]), linear([[-2.0]]), (1,), q=2)
    assert l2.exact and l2.value == pytest.approx(5.0)


def test_two_parallel_edges_stay_apart_in_l2() -> None:
    """(1² + 1²)^½ for x + x, and for x − x, where one joined edge would give 2 and 0."""
    for function in (lambda x: x + x, lambda x: x - x):
        assert pathlift.path_norm(Fn(function), (1,), q=2).value == pytest.approx(math.sqrt(2))


def test_the_largest_path_is_not_the_largest_sum() -> None:
    model = nn.Sequential(linear([[1.0], [1.0], [1.5]]), nn.ReLU(), linear([[1.0, 1.0, 1.0]]))
    assert pathlift.path_norm(model, (1,), q=math.inf).value == pytest.approx(1.5)


def test_one_pruned_weight_of_a_deep_network_costs_its_right_tiny_value() -> None:
    """Subtracting two norms of 1e40 would lose it; 2^-40·3^60 is exact in floating point."""
    layers = [linear([[3.0, 0.0], [0.0, 3.0]]) for _ in range(80)]
    model, pruned = nn.Sequential(*layers), nn.Sequential(*[linear([[3.0, 0.0], [0.0, 3.0]]) for _ in range(80)])
    with torch.no_grad():
        model[40].weight[0, 1] = 2.0**-60
    metric = pathlift.path_metric(model, pruned, (2,))
    assert metric.exact
    assert metric.value == pytest.approx(2.0**-60 * 3.0**79, rel=1e-5)


def test_two_derived_weights_of_one_module_are_scored_apart() -> None:
    model = Parametric(lambda x, a, b: F.linear(F.linear(x, a.sigmoid()), b.exp()), [[0.0, 0.0]], [[0.0], [0.0]])
    scores = pathlift.path_magnitude(model, (2,))
    assert len(scores) == 2
    assert [score.shape for score in scores.values()] == [(1, 2), (2, 1)]
    assert all(float(score.sum()) == pytest.approx(1) for score in scores.values())


def test_a_functional_batch_norm_is_scored_under_its_parameters_names() -> None:
    def function(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.batch_norm(x, torch.ones(2), torch.ones(2), gamma, beta, eps=0.0)

    scores = pathlift.path_magnitude(Parametric(function, [2.0, 1.0], [2.0, 4.0]), (2,))
    assert scores["values.0"].tolist() == pytest.approx([2 / 6, 1 / 6])
    assert scores["values.1"].tolist() == pytest.approx([0, 3 / 6])


def test_a_buffer_that_is_not_saved_need_not_be_in_a_state_dict() -> None:
    layer = _Scaled()
    half = {key: value / 2 for key, value in layer.state_dict().items()}
    assert pathlift.path_metric(layer, half, (2,)).exact


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("factor", torch.tensor([2.0, 3.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.factor)


class _DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class _Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "a product of activations": (lambda: Fn(lambda x: x * x.relu()), (2,), "mul"),
    "a square": (lambda: Fn(lambda x: x * x), (2,), "mul"),
    "a power": (lambda: Fn(lambda x: x**2), (2,), "pow"),
    "a quotient of activations": (lambda: Fn(lambda x: x / x.abs()), (2,), "div"),
    "a constant over an activation": (lambda: Fn(lambda x: 1 / x), (2,), "reciprocal"),
    "softmax": (lambda: nn.Sequential(nn.Softmax(1), nn.Linear(2, 2)), (2,), "softmax"),
    "exp": (lambda: Fn(torch.exp), (2,), "exp"),
    "GELU": (lambda: nn.GELU(), (2,), "gelu"),
    "SiLU": (lambda: nn.SiLU(), (2,), "silu"),
    "a sigmoid gate": (lambda: Fn(lambda x: torch.sigmoid(x) * x), (2,), "sigmoid"),
    "layer norm": (lambda: nn.LayerNorm(2), (2,), "layer_norm"),
    "group norm": (lambda: nn.GroupNorm(1, 2), (2, 3), "group_norm"),
    "instance norm": (lambda: nn.InstanceNorm1d(2), (2, 3), "instance_norm"),
    "attention": (lambda: _Attention(), (3, 4), "attention"),
    "batch statistics": (lambda: _Statistics(), (2, 3), "batch_norm"),
    "sorting": (lambda: Fn(lambda x: x.sort(1)[0]), (3,), "sort"),
    "the indices of a maximum": (lambda: Fn(lambda x: x.max(1)[1] * 1.0), (3,), ""),
    "a data-dependent where": (lambda: Fn(lambda x: torch.where(x > 0, x, -x)), (2,), ""),
    "data-dependent control flow": (lambda: _DataDependent(), (2,), "export"),
    "LP-pooling": (lambda: nn.LPPool1d(2, 2), (1, 4), ""),
    "a bilinear matmul": (lambda: Fn(lambda x: x @ x.transpose(1, 2)), (2, 3), "matmul"),
    "a bilinear einsum": (lambda: Fn(lambda x: torch.einsum("bi,bj->bij", x, x)), (2,), "einsum"),
    "a threshold that jumps": (lambda: nn.Threshold(1.0, 0.0), (2,), "threshold"),
    "dropout that stays on": (lambda: Fn(lambda x: F.dropout(x, training=True)), (2,), "dropout"),
    "noise": (lambda: Fn(lambda x: x + torch.randn(2)), (2,), "randn"),
    "rounding": (lambda: Fn(torch.round), (2,), "round"),
    "a cast to integers": (lambda: Fn(lambda x: x.to(torch.int32).float()), (2,), "to"),
    "tanh": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), (2,), "tanh"),
    "an infinite constant": (lambda: Fn(lambda x: x * math.inf), (2,), "mul"),
    "LSTM": (lambda: _Lstm(), (3, 2), ""),
    "grid sampling": (lambda: Fn(_sampled), (2, 3, 3), "grid"),
}  # fmt: skip


def _sampled(x: Tensor) -> Tensor:
    return F.grid_sample(x, x.permute(0, 2, 3, 1)[..., :2], align_corners=False)


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_outside_the_theory_is_refused_with_place_and_advice(name: str) -> None:
    make, shape, op = REFUSED[name]
    model = make()
    with pytest.raises(pathlift.UnsupportedModelError) as error:
        pathlift.path_norm(model, shape)
    assert any(op in problem.op for problem in error.value.problems)
    report = pathlift.check_support(model, shape)
    assert not report.supported
    for problem in report.problems:
        assert problem.reason.endswith((".", "…")) or problem.op == "export"
        assert problem.advice.endswith(".")
        assert problem.op == "export" or ":" in problem.where, "the source line is named"


def test_check_support_lists_all_problems_with_their_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)), nn.Softmax(1), nn.ReLU())
    report = pathlift.check_support(model, (2,))
    assert [(p.module, p.op.split(".")[1]) for p in report.problems] == [
        ("1", "gelu"),
        ("2.0", "layer_norm"),
        ("3", "softmax"),
    ]


@pytest.mark.parametrize("spread", [20, 45, 55, 60, 62])
def test_small_activations_that_much_comes_back_to_keep_their_shares(spread: int) -> None:
    """Three paths through neurons whose activations differ by 2^(2·spread), one of them with a share of 2^-30."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight[:] = 2.0 ** torch.tensor([[-spread], [0], [spread]])
        model[2].weight[:] = 2.0 ** torch.tensor([[spread - 30, 0, -spread]])
    scores = pathlift.path_magnitude(model, (1,))
    expected = torch.tensor([2.0**-30, 1.0, 1.0]) / (2 + 2.0**-30)
    torch.testing.assert_close(scores["0.weight"][:, 0].float(), expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(scores["2.weight"][0].float(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("far", [122, 124, 126])
@pytest.mark.parametrize("large", ["weight", "bias"])
def test_little_that_comes_back_to_a_large_weight_keeps_its_share(far: int, large: str) -> None:
    """A path through 2^110 and 2^-far beside one through ones: its share is small, and no more than that."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model[0].weight[:] = 1.0
        model[2].weight[:] = torch.eye(2)
        if large == "weight":
            model[2].weight[0, 0] = 2.0**110
        else:
            model[2].bias[0] = 2.0**110
        model[4].weight[:] = torch.tensor([[2.0**-far, 1.0]])
    scores, wide = pathlift.path_magnitude(model, (1,)), pathlift.path_magnitude(copy.deepcopy(model).double(), (1,))
    for name, share in wide.items():
        torch.testing.assert_close(scores[name].double(), share, rtol=1e-5, atol=1e-30)
    units, exact = pathlift.unit_path_magnitude(model, (1,)), pathlift.unit_path_magnitude(copy.deepcopy(model).double(), (1,))
    for name, share in exact.items():
        torch.testing.assert_close(units[name].double(), share, rtol=1e-5, atol=1e-30)
