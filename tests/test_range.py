"""Numbers of any size: what exact arithmetic gives, whatever a rescaling has made of the weights."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from pathlift.graph.compact import compacted
from pathlift.passes import wide
from pathlift.passes.backward import SMALLEST, Backward, up_to
from pathlift.passes.programs import NormProgram, ScoreProgram
from pathlift.passes.propagate import propagate
from pathlift.passes.rounding import rounding_factor
from pathlift.passes.scaled import FORWARD_WINDOWS, RangeError, Scaled, normalised, power
from pathlift.pruning.criteria import path_magnitude_scores, relative_path_magnitude, synflow
from pathlift.reference import ProbeError, dag_of

# ---- exact arithmetic on perceptrons


def perceptron(widths: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for first, second in itertools.pairwise(widths):
        layers += [nn.Linear(first, second, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def linear(model: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in model if isinstance(layer, nn.Linear)]


def spread(model: nn.Sequential, reach: int) -> nn.Sequential:
    """Multiply what comes in to each hidden neuron by a power of two up to 2^±reach, and divide what goes out, exactly."""
    generator = torch.Generator().manual_seed(reach)
    with torch.no_grad():
        for below, above in itertools.pairwise(linear(model)):
            exponent = torch.randint(-reach, reach + 1, (below.out_features,), generator=generator)
            exponent[:2] = torch.tensor([-reach, reach])
            factor = torch.tensor([2.0**own for own in exponent.tolist()], dtype=below.weight.dtype)
            below.weight.mul_(factor[:, None])
            below.bias.mul_(factor)
            above.weight.div_(factor)
    assert all(bool(torch.isfinite(own).all()) and bool((own != 0).all()) for own in model.parameters())
    return model


def exact(tensor: Tensor, q: int) -> list[list[Fraction]]:
    return [[abs(Fraction(value)) ** q for value in row] for row in tensor.detach().double().reshape(len(tensor), -1).tolist()]


def activations(model: nn.Sequential, q: int = 1, *, inputs: bool = True, biases: bool = True) -> list[list[Fraction]]:
    """Return A(v) = Σ_p |Φ_p|^q over the paths that end at v, for each layer of neurons."""
    found = [[Fraction(int(inputs))] * linear(model)[0].in_features]
    for layer in linear(model):
        weights, bias = exact(layer.weight, q), exact(layer.bias, q)
        added = [own[0] if biases else Fraction(0) for own in bias]
        found.append([
            sum((w * a for w, a in zip(row, found[-1], strict=True)), b) for row, b in zip(weights, added, strict=True)
        ])
    return found


def shares(model: nn.Sequential, q: int = 1) -> dict[str, list[list[Fraction]]]:
    """Return |θ_i|^q·A·G/Σ for each weight and bias, G(v) the same sum over the paths from v to an output."""
    above, found = activations(model, q), {}
    whole = sum(above[-1])
    back = [1 / Fraction(whole)] * len(above[-1])
    for place, layer in reversed(list(enumerate(linear(model)))):
        weights, bias = exact(layer.weight, q), exact(layer.bias, q)
        below = above[place]
        found[f"{2 * place}.weight"] = [
            [w * a * g for w, a in zip(row, below, strict=True)] for row, g in zip(weights, back, strict=True)
        ]
        found[f"{2 * place}.bias"] = [[b[0] * g] for b, g in zip(bias, back, strict=True)]
        back = [sum(weights[above_][under] * back[above_] for above_ in range(len(back))) for under in range(len(below))]
    return found


def log10(value: Fraction) -> float:
    """Return log₁₀ of a positive fraction of any size."""
    size = [number.bit_length() for number in (value.numerator, value.denominator)]
    shift = size[0] - size[1]
    return math.log10(value / Fraction(2) ** shift) + shift * math.log10(2)


def assert_shares(found: pathlift.magnitude.PathMagnitude, right: dict[str, list[list[Fraction]]], tolerance: float) -> None:
    assert set(found) == set(right)
    for name, rows in right.items():
        wanted = torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(found[name].double().reshape(wanted.shape), wanted, rtol=tolerance, atol=1e-300)


SPREAD = ((3, 4, 2, 0), (3, 4, 2, 300), (3, 4, 4, 2, 480), (3, 5, 5, 5, 5, 2, 480), (2, 4, 4, 2, 150))


def test_the_norm_of_a_spread_layer() -> None:
    layers = [nn.Linear(1, 3, bias=False), nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)]
    rows = ([[1.0], [1e-104], [1e-270]], [[0, 1.0, 0], [0, 0, 1e-5]], [[1.0, 1.0]])
    for layer, row in zip(layers, rows, strict=True):
        layer.weight = nn.Parameter(torch.tensor(row, dtype=torch.float64))
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    assert pathlift.path_norm(model, (1,)).value == pytest.approx(1e-104, rel=1e-14)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", SPREAD)
@pytest.mark.parametrize("q", [1, 2, 5])
def test_the_norm_is_exact_whatever_a_rescaling_does(case: tuple[int, ...], q: int) -> None:
    model = spread(perceptron(case[:-1], 0), case[-1])
    norm = pathlift.path_norm(model, (case[0],), q=q)
    outputs = activations(model, q)[-1]
    assert norm.log10 == pytest.approx(log10(sum(outputs)) / q, abs=1e-12)
    assert norm.log10_input_part == pytest.approx(log10(sum(activations(model, q, biases=False)[-1])) / q, abs=1e-12)
    assert norm.log10_bias_part == pytest.approx(log10(sum(activations(model, q, inputs=False)[-1])) / q, abs=1e-12)
    each = [float(value) for value in norm.per_output]
    assert [math.log10(value) + norm.log10_scale for value in each] == pytest.approx(
        [log10(output) / q for output in outputs], abs=1e-12
    )
    plain = pathlift.path_norm(perceptron(case[:-1], 0), (case[0],), q=math.inf)
    assert pathlift.path_norm(model, (case[0],), q=math.inf).log10 == pytest.approx(plain.log10, abs=1e-12)


@pytest.mark.one_in(4, first=2)
@pytest.mark.parametrize("case", SPREAD)
@pytest.mark.parametrize("q", [1, 2])
def test_shares_are_exact_whatever_a_rescaling_does(case: tuple[int, ...], q: int) -> None:
    model = spread(perceptron(case[:-1], 0), case[-1])
    magnitudes = pathlift.path_magnitude(model, (case[0],), q=q)
    assert magnitudes.log10_path_norm == pytest.approx(log10(sum(activations(model, q)[-1])), abs=1e-12)
    assert_shares(magnitudes, shares(model, q), 1e-12)
    if q == 1:
        units = pathlift.unit_path_magnitude(model, (case[0],))
        plain = pathlift.unit_path_magnitude(perceptron(case[:-1], 0), (case[0],))
        for name, own in plain.items():
            torch.testing.assert_close(units[name], own, rtol=1e-12, atol=0)


@pytest.mark.parametrize("small", [(1.0, 1.0), (1e-20, 1e-20), (1e-30, 1e-30), (1e-40, 1e-10), (1e10, 1e-30)])
@pytest.mark.parametrize("q", [1, 2])
def test_no_share_is_lost_in_float32(small: tuple[float, float], q: int) -> None:
    model = perceptron((3, 4, 4, 2), 0, torch.float32)
    with torch.no_grad():  # a neuron that is fed little and heard little, an output of another size
        model[0].weight[0] *= small[0]
        model[0].bias[0] *= small[0]
        model[2].weight[:, 0] *= small[1]
        model[4].weight[1] *= small[1]
        model[4].bias[1] *= small[1]
    right = shares(model, q)
    assert_shares(pathlift.path_magnitude(model, (3,), q=q), right, 1e-5)
    units = pathlift.unit_path_magnitude(model, (3,))
    for name, own in units.items() if q == 1 else ():
        each = [sum(row) + bias[0] for row, bias in zip(right[f"{name}.weight"], right[f"{name}.bias"], strict=True)]
        wanted = torch.tensor([float(value) for value in each], dtype=torch.float64)
        torch.testing.assert_close(own.double(), wanted, rtol=1e-5, atol=0)


def attempts(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Return the precisions of the passes for scores from now on, as they begin."""
    begun: list[torch.dtype] = []
    start = ScoreProgram.__init__
    monkeypatch.setattr(
        ScoreProgram, "__init__", lambda self, *args, **kwargs: (begun.append(args[2]), start(self, *args, **kwargs))[1]
    )
    return begun


def test_the_last_bias_of_a_deep_network_is_no_reason_to_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(80) for layer in (nn.Linear(24, 24), nn.ReLU())], nn.Linear(24, 3))
    with torch.no_grad():
        for layer in linear(model):
            layer.weight.mul_(8.0)  # a path-norm of 1e60 and more, which the last biases have next to no share of
        for layer in linear(model)[:-1]:
            layer.bias.zero_()
    right = pathlift.path_magnitude(copy.deepcopy(model).double(), (24,))
    begun = attempts(monkeypatch)
    found = pathlift.path_magnitude(model, (24,))
    assert begun == [torch.float32]
    for name, share in right.items():
        torch.testing.assert_close(found[name].double(), share, rtol=1e-4, atol=0.0)
        assert found[name].dtype == (torch.float64 if name == "160.bias" else torch.float32)


def hardly_heard(model: nn.Sequential, power: float) -> None:
    """Channels that are fed little, as those of a batch norm in front of a long concatenation."""
    model[3].weight[:2] *= 1e-24**power
    model[3].bias[:2] *= 1e-24**power
    model[6].weight[:, :2] *= 1e-18**power


def hardly_weighed(model: nn.Sequential, power: float) -> None:
    """Weights so small that their shares are, beside others of the same tensors."""
    model[3].weight[::3] *= 1e-36**power
    model[6].weight[0, 1] *= 1e-30**power
    model[0].weight[1] *= 1e-30**power


def silent(model: nn.Sequential, power: float) -> None:
    """Channels that nothing listens to, and some that say nothing: their weights have a share of 0 in truth."""
    del power
    model[3].weight[:3], model[3].bias[:3] = 0.0, 0.0
    model[6].weight[:, 4:6] = 0.0


def all_of_these(model: nn.Sequential, power: float) -> None:
    hardly_heard(model, power)
    model[6].weight[:, 4:6] = 0.0
    model[0].weight[5] *= 1e-30**power


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("change", [hardly_heard, hardly_weighed, silent, all_of_these])
def test_small_shares_are_no_reason_to_begin_anew(
    change: Callable[[nn.Sequential, float], None], q: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    first = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()
    model = nn.Sequential(*first, nn.AvgPool2d(2), nn.Conv2d(8, 3, 1)).eval()
    with torch.no_grad():
        change(model, 1.0 / q)
    right = pathlift.path_magnitude(copy.deepcopy(model).double(), (2, 6, 6), q=q)
    begun = attempts(monkeypatch)
    found = pathlift.path_magnitude(model, (2, 6, 6), q=q)
    assert begun == [torch.float32]
    assert found.log10_path_norm == pytest.approx(right.log10_path_norm, abs=1e-5)
    for name, share in right.items():
        torch.testing.assert_close(found[name].double(), share, rtol=1e-5, atol=0.0)
        lost = bool(((share > 0) & (share < SMALLEST)).any())
        assert found[name].dtype == (torch.float64 if lost else torch.float32), name
    assert change is silent or any(own.dtype == torch.float64 for own in found.values())


class Uneven(nn.Module):
    """A branch that outweighs the other by far."""

    def __init__(self, large: float, small: float, smaller: float) -> None:
        super().__init__()
        self.one, self.other, self.last, self.out = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)
        with torch.no_grad():
            self.one.weight.mul_(large)
            self.one.bias.mul_(large)
            self.other.weight.mul_(small)
            self.last.weight.mul_(smaller)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.one(x).relu() + self.last(self.other(x).relu()).relu())


@pytest.mark.parametrize("large", [1e20, 1e24, 1e28, 1e30, 1e36])
@pytest.mark.parametrize("smaller", [1e-5, 1e-10, 1e-15])
def test_no_share_is_lost_in_a_branch_that_hardly_counts(large: float, smaller: float) -> None:
    for small in (1e-5, 1e-15):
        torch.manual_seed(0)
        model = Uneven(large, small, smaller)
        right = pathlift.path_magnitude(copy.deepcopy(model).double(), (2,))
        for name, share in pathlift.path_magnitude(model, (2,)).items():
            torch.testing.assert_close(share.double(), right[name], rtol=1e-5, atol=0.0)


class Dense(nn.Module):
    """Concatenations that go on from each other, batch norms, an addition; scales as a trained network has them, and zeros."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4 * n), nn.ReLU(), nn.Conv2d(4 * n, 4, 3, padding=1)) for n in range(1, 5)
        )
        self.last = nn.Linear(20, 3)
        with torch.no_grad():
            for layer in self.layers:
                layer[0].weight.copy_(torch.exp2(spread * torch.randn(layer[0].num_features)))
                layer[0].bias.normal_()
                layer[0].weight[1] = layer[0].bias[2] = layer[2].weight[3, 0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        found = [self.first(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)) + found[0])
        return self.last(torch.cat(found, 1).mean((2, 3)))


@pytest.mark.parametrize("spread", [0.0, 3.0, 8.0, 12.0])
def test_what_is_said_of_sizes_without_looking_is_true(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []

    def check(value: Scaled) -> None:
        low, high = float(value.tensor.min()), float(value.tensor.max())
        assert value.peak is None or high <= 2.0**value.peak
        assert value.trough is None or low >= (0.0 if value.trough == -math.inf else 2.0**value.trough)
        said.append((value.peak is not None) + (value.trough is not None and value.trough > -math.inf))

    torch.manual_seed(0)
    model = Dense(spread).eval()
    network = pathlift.capture(model, (2, 9, 8))
    compact = compacted(network)
    for kind in (NormProgram, ScoreProgram):
        for values in propagate(compact, kind(compact, compact.values(), torch.float32), keep=True).values():
            check(values[0])
    taken = Backward._taken
    monkeypatch.setattr(Backward, "_taken", lambda self, name: [value := taken(self, name), check(value)][0])
    found = pathlift.path_magnitude(network)
    assert said.count(2) > len(said) / 2
    wanted = pathlift.path_magnitude(copy.deepcopy(model).double(), (2, 9, 8))
    for name, share in found.items():
        torch.testing.assert_close(share.double(), wanted[name], rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-2000.0, -1074.0, -149.0, -140.0, -126.0, -20.0, 0.0, 127.0, 128.0, 2000.0])
def test_up_to_a_bound(dtype: torch.dtype, exponent: float) -> None:
    bound = power(exponent)
    kind = torch.finfo(dtype)
    tensor = torch.tensor([0.0, kind.tiny * kind.eps, kind.tiny, 2.0**-20, 1.0, 1.5, kind.max], dtype=dtype)
    near = torch.tensor([min(bound, kind.max)], dtype=torch.float64).to(dtype)
    tensor = torch.cat([tensor, near, torch.nextafter(near, torch.full_like(near, math.inf)).clamp(max=kind.max)])
    assert torch.equal(up_to(tensor, bound), torch.where(tensor.double() <= bound, tensor, 0.0))


@pytest.mark.parametrize("tiny", [1e-20, 3e-23, 1e-25, 1e-30])
@pytest.mark.parametrize("q", [1, 2, 3, 8])
def test_powers_of_a_tiny_bias_are_not_lost(tiny: float, q: int) -> None:
    model = perceptron((3, 3, 2), 0, torch.float32)
    with torch.no_grad():
        model[0].bias[0] = tiny
    assert_shares(pathlift.path_magnitude(model, (3,), q=q), shares(model, q), 1e-5)


@pytest.mark.one_in(4, first=1)
@pytest.mark.parametrize("case", SPREAD)
@pytest.mark.parametrize("criterion", [path_magnitude_scores, relative_path_magnitude, synflow])
def test_scores_are_those_of_the_rescaled_network(case: tuple[int, ...], criterion: Callable[..., dict[str, Tensor]]) -> None:
    first, second = perceptron(case[:-1], 0), spread(perceptron(case[:-1], 0), case[-1])
    one, two = (criterion(pathlift.capture(model, (case[0],))) for model in (first, second))
    for name, score in one.items():
        torch.testing.assert_close(two[name], score, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", SPREAD)
def test_the_price_of_pruning_is_that_of_the_rescaled_network(case: tuple[int, ...]) -> None:
    first, second = perceptron(case[:-1], 0), spread(perceptron(case[:-1], 0), case[-1])
    (_, one), (_, two) = (pathlift.prune(model, (case[0],), 0.5, "path_magnitude") for model in (first, second))
    assert all(torch.equal(two.masks[name], mask) for name, mask in one.masks.items())
    for name in ("log10_path_norm", "log10_path_norm_left", "log10_cost", "log10_bound"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), abs=1e-12), name


class Around(nn.Module):
    """Convolutions, a batch norm, a concatenation and an addition around a layer that can be rescaled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(4), nn.Conv2d(8, 3, 1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x).relu()
        second = self.norm(self.b(first)).relu()
        return self.c(torch.cat([first, second], 1)).sum((2, 3))


@pytest.mark.hunt
def test_layers_of_every_kind_may_be_spread() -> None:
    plain, model = Around(), Around()
    power = [0, 400, -400, 150]
    with torch.no_grad():
        factor = torch.tensor([2.0**own for own in power], dtype=torch.float64)
        model.a.weight.mul_(factor[:, None, None, None])
        model.a.bias.mul_(factor)
        model.b.weight.div_(factor[:, None, None])
        model.c.weight[:, :4].div_(factor[:, None, None])
        model.norm.weight.mul_(factor.flip(0))
        model.norm.bias.mul_(factor.flip(0))
        model.c.weight[:, 4:].div_(factor.flip(0)[:, None, None])
    for q in (1.0, 2.0, 2.5):
        one, two = (pathlift.path_norm(own, (2, 5, 5), q=q) for own in (plain, model))
        assert two.log10 == pytest.approx(one.log10, abs=1e-12)
        torch.testing.assert_close(two.per_output, one.per_output, rtol=1e-12, atol=0)
    for first, second in (
        [pathlift.path_magnitude(own, (2, 5, 5), q=2) for own in (plain, model)],
        [pathlift.path_magnitude(own, (2, 5, 5), x=torch.ones(2, 2, 5, 5, dtype=torch.float64)) for own in (plain, model)],
        [pathlift.unit_path_magnitude(own, (2, 5, 5)) for own in (plain, model)],
    ):
        for name, own in first.items():
            torch.testing.assert_close(second[name], own, rtol=1e-11, atol=0)


def test_a_weight_that_is_not_finite_is_still_named() -> None:
    model = spread(perceptron((3, 4, 2), 0), 480)
    with torch.no_grad():
        model[2].bias[0] = math.nan
    with pytest.raises(pathlift.NumericalError, match=r"2\.bias"):
        pathlift.path_norm(model, (3,))


AFFINE_SOMEWHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "square": lambda x: x * x,
    "two of one": lambda x: (x + 1) * (x - 1),
    "soft shrink": lambda x: F.softshrink(x, 1e5),
    "hard shrink": lambda x: F.hardshrink(x, 1e8),
    "soft shrink near 0": lambda x: F.softshrink(x, 1e-5),
    "threshold": lambda x: F.threshold(x, 1e5, 0.0),
    "threshold near 0": lambda x: F.threshold(x, 1e-7, 0.0),
    "hard swish": F.hardswish,
    "hard swish of a hard swish": lambda x: F.hardswish(F.hardswish(x)),
    "soft sign": lambda x: F.softsign(1e-7 * x),
    "round": lambda x: torch.round(x * 2.0**40) / 2.0**40 + torch.round(x / 2.0**10),
    "remainder": lambda x: torch.remainder(x, 1e6),
    "sine": torch.sin,
}


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", AFFINE_SOMEWHERE)
def test_what_is_affine_somewhere_is_not_taken_for_affine(name: str) -> None:
    with pytest.raises(ProbeError, match="is not"):
        dag_of(Applied(AFFINE_SOMEWHERE[name]), torch.zeros(1, 2))


def test_what_reads_a_neuron_twice_is_affine_all_the_same() -> None:
    dag = dag_of(Applied(lambda x: torch.cat([x + x, 3 * x - x], 1)), torch.zeros(1, 2))
    states = dag.states([5.0, -7.0])
    assert [states[out].value for out in dag.outputs] == [10, -14, 10, -14]


def test_a_layer_is_cut_into_bands_and_put_together_again() -> None:
    """The example of `pathlift.passes.wide`: 2⁴⁰⁰·1 + 1·1 + 2⁻⁶⁰⁰·2⁹⁰⁰, to the last bit."""
    layer = torch.tensor([2.0**400, 1.0, 2.0**-600], dtype=torch.float64)
    assert [exponent for _, exponent in wide.bands(wide.Wide.of(layer))] == [401.0, 1.0, -599.0]
    parts = [wide.Wide.of(value, shift) for value, shift in ((layer[0], 0.0), (layer[1], 0.0), (layer[2], 900.0))]
    total = parts[0].plus(parts[1]).plus(parts[2])
    assert float(total.at(0)) == 2.0**400
    assert float(parts[2].plus(parts[1]).at(0)) == 2.0**300


@pytest.mark.parametrize(
    ("entries", "mantissas", "exponent"),
    [((3 * 2.0**95, 2.0**90), (0.75, 2.0**-7), 97.0), ((2.0**30, 2.0**-90), (2.0**95, 2.0**-25), -65.0)],
)
def test_what_leaves_its_window_is_brought_back(
    entries: tuple[float, ...], mantissas: tuple[float, ...], exponent: float
) -> None:
    """The examples of `pathlift.passes.scaled`: too large, and too far apart; no bit changes."""
    found, smallest = normalised(Scaled(torch.tensor(entries), 0.0), FORWARD_WINDOWS[torch.float32])
    assert found is not None
    assert found.tensor.tolist() == list(mantissas)
    assert (found.exponent, smallest) == (exponent, min(mantissas))


@pytest.mark.parametrize("shift", [-300.0, 0.0, 300.0])
def test_what_is_left_out_counts_with_the_exponents_of_both_factors(shift: float) -> None:
    """2^−110 · 2^9 is left out, as 2^−101 is below the floor of float32; 2^−110 · 2^11 is not."""
    network = pathlift.capture(nn.Linear(1, 2), (1,))
    back = Backward(network, NormProgram(network, network.values(), torch.float32))
    small = Scaled(torch.tensor([2.0**-110, 1.0]), shift)
    back._refuse_small(small, -105.0, Scaled(torch.tensor([2.0**9, 1.0]), -shift))
    with pytest.raises(RangeError):
        back._refuse_small(small, -105.0, Scaled(torch.tensor([2.0**11, 1.0]), -shift))


# ---- ordered networks


def cut(model: nn.Sequential, how: str) -> nn.Sequential:
    """Return a copy with smaller weights: of all layers, of the last, in front of one output, or of all but one."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in linear(copied) if how in {"half", "smaller"} else ():
            layer.bias.mul_(0.25)
            kept = torch.rand_like(layer.weight)
            layer.weight.mul_(kept > 0.5 if how == "half" else 0.125 + kept / 4)
        last = linear(copied)[-1]
        if how == "one":
            last.weight[0, 0] *= 0.5
        elif how == "an output":
            last.weight[0] *= 2.0**-20
            last.bias[0] = 0.0
        elif how == "an output apart":  # so much of all others that the guess is wrong
            last.weight[1:] *= 2.0**-20
            last.bias[1:] = 0.0
    return copied


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("how", "passes"), [("half", 2), ("smaller", 2), ("one", 3), ("an output", 3), ("an output apart", 3)])
def test_norms_are_subtracted_only_where_no_digit_is_lost(how: str, passes: int, dtype: torch.dtype, size: float) -> None:
    model = perceptron((3, 6, 5, 4), 2, dtype)
    with torch.no_grad():
        model[2].weight.mul_(size)
    other = cut(model, how)
    found = pathlift.path_metric(model, other, (3,))
    assert (found.exact, found.passes) == (True, passes)
    assert found.upper / found.lower < 1.0 + 5 * rounding_factor(compacted(pathlift.capture(model, (3,)))) + 1e-12
    each = [one - two for one, two in zip(activations(model, 1)[-1], activations(other, 1)[-1], strict=True)]
    assert Fraction(found.lower) <= sum(each) <= Fraction(found.upper)
    ends = found.log10_lower_per_output.tolist(), found.log10_upper_per_output.tolist()
    for right, low, high in zip(each, *ends, strict=True):
        wanted = log10(right) if right else -math.inf
        assert low - 1e-13 <= wanted <= high + 1e-13
        assert high == low or high - low <= 1e-11


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("a", "big"), [(1e-30, 3.33e13), (1e-30, 6.7e14), (1e-20, 3.33e24), (1e-15, 1e30), (1e-15, 1e28)])
def test_a_large_weight_does_not_bring_back_what_a_product_before_it_has_lost(a: float, big: float, apart: bool) -> None:
    """a·g is a number of one digit where A is 1e-15 and G is 1e-30: the share, with a weight of 1e15, is not small."""
    model = FarChannels(apart)
    for parameter, value in zip(model.parameters(), ((1.0, 1.3 * a), (1.0, 0.7 / a), (big,)), strict=True):
        parameter.data.copy_(torch.tensor(value).reshape(parameter.shape))
    shares = pathlift.path_magnitude(model, (1, 1, 1))
    exact = pathlift.path_magnitude(copy.deepcopy(model).double(), (1, 1, 1))
    for name, share in shares.items():
        torch.testing.assert_close(share.double(), exact[name], rtol=1e-5, atol=0.0)
    wanted = torch.tensor([1.0, 0.91], dtype=torch.float64) / (big + 1.91)
    torch.testing.assert_close(shares["after.weight"].double().flatten(), wanted, rtol=1e-5, atol=0.0)


class FarChannels(nn.Module):
    """Two channels of unlike size, in one layer or side by side, and a branch beside them."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        self.before, self.after = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)
        self.beside = nn.Conv2d(1, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made = self.before(x).relu()
        if self.apart:
            made = torch.cat(made.split(1, 1), 1)
        out: Tensor = (self.after(made).relu() + self.beside(x).relu()).flatten(1)
        return out
