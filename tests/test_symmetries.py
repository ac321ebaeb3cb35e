"""Rescaling symmetries: no group missed, none invented, and what is built on them (mathematics §7)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from hypothesis import assume
from torch import Tensor, nn
from torch.nn import functional as F

import pathlift
from agreement import examples, outputs, perturbed, randomised
from cases import NETWORKS, OPERATORS, Case, Fn, Mirrored, Residual, Tied, perceptron
from habit import LONGER
from networks import networks, operator_pairs, over
from pathlift.reading.second import other_state
from pathlift.reference import Probe
from pathlift.reference.dag import TooManyPathsError
from pathlift.rescaling.alignment import gauge_fit
from symmetric import assert_comparisons_invariant, assert_symmetric, counted, dimension_by_paths

T = TypeVar("T")

PINNED = {"weight_norm", "pruned"}
"""Operators whose symmetries the paths count otherwise: derived weights are left alone, a mask's zeros are not looked at."""


def generator(start: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(start)


@pytest.mark.one_in(64, first=7)
@pytest.mark.hunt_one_in(12)
@pytest.mark.parametrize("case", [*OPERATORS, *NETWORKS], ids=lambda case: case.name)
def test_every_operator_ties_what_its_paths_tie(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = randomised(case.make()), examples(case.shape)
    groups = assert_symmetric(model, inputs, generator())
    assert_comparisons_invariant(model, groups, inputs, generator())
    if case.name not in PINNED and counted(model):
        assert len(groups) == dimension_by_paths(model, inputs)


def _check(model: nn.Module, shape: tuple[int, ...], weights: int) -> None:
    model, inputs = randomised(model, weights), examples(shape)
    assume(Probe(model, *inputs).dag().count() < 2_000)
    groups = assert_symmetric(model, inputs, generator(weights))
    if weights % 3 == 0:  # they cost as much as all the rest
        assert_comparisons_invariant(model, groups, inputs, generator(weights))
    assume(counted(model))
    try:
        assert len(groups) == dimension_by_paths(model, inputs, 4_000)
    except TooManyPathsError:
        assume(False)


@pytest.mark.hunt
@pytest.mark.hunt_one_in(8)
@pytest.mark.parametrize("part", range(12 * LONGER))
def test_random_networks(part: int) -> None:
    over(networks(), 20_000, part, _check)


def _check_invariance(model: nn.Module, shape: tuple[int, ...], weights: int) -> None:
    assert_symmetric(randomised(model, weights), examples(shape), generator(weights))


@pytest.mark.one_in(18)
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("part", range(8 * LONGER))
def test_pairs_of_operators(part: int) -> None:
    over(operator_pairs(), 30_000, part, _check_invariance)


def rescaled(model: nn.Module, inputs: tuple[Tensor, ...], start: int = 5, sigma: float = 2.0) -> nn.Module:
    """Another network of the same orbit."""
    return pathlift.rescaling.with_state(
        model, pathlift.symmetries(model, inputs).randomize(generator=generator(start), sigma=sigma)
    )


def weight_norm(state: dict[str, Tensor], model: nn.Module, p: float) -> float:
    return float(sum(state[name].abs().pow(p).sum() for name, _ in model.named_parameters()))


SMALL = [case for case in [*OPERATORS, *NETWORKS] if case.name in {
    "conv2d", "conv2d depthwise", "conv_transpose2d dilated groups", "conv and batch_norm", "prelu per channel", "relu6", "cat",
    "channel_shuffle", "mul parameter", "conv2d without bias", "matmul right", "sliced parameter", "weight_norm",
    "batch_norm without affine", "flatten linear", "residual", "tied", "several outputs",
}]  # fmt: skip


@pytest.mark.one_in(20)
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_balanced_representative_is_the_smallest_and_the_same_from_everywhere(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = randomised(case.make()), examples(case.shape)
    groups = pathlift.symmetries(model, inputs)
    for p in (1.0, 2.0, 3.0):
        best = groups.balance(p)
        assert best.imbalance < 1e-11
        size = weight_norm(best, model, p)
        assert size <= weight_norm(model.state_dict(), model, p) * (1 + 1e-12)
        at_best = pathlift.symmetries(pathlift.rescaling.with_state(model, best), inputs)
        for start in range(5):  # no rescaling of it is smaller, near or far
            near = at_best.randomize(generator=generator(start), sigma=10.0**-start)
            assert weight_norm(near, model, p) >= size * (1 - 1e-12)
        again = pathlift.symmetries(rescaled(model, inputs), inputs).balance(p)
        for name, value in best.items():
            torch.testing.assert_close(again[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.one_in(28)
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["normalize", "condition", "balance"])
def test_representatives_do_not_depend_on_where_they_start(case: Case, kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = randomised(case.make()), examples(case.shape)
    first = getattr(pathlift.symmetries(model, inputs), kind)()
    second = getattr(pathlift.symmetries(rescaled(model, inputs), inputs), kind)()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-7, atol=1e-9)
    x = tuple(3 * part for part in inputs)
    torch.testing.assert_close(outputs(pathlift.rescaling.with_state(model, first), x), outputs(model, x), rtol=1e-9, atol=1e-9)


def test_the_normal_form_of_a_perceptron_has_rows_of_norm_one() -> None:
    model = randomised(perceptron(3, 5, 4, 2))
    state = pathlift.symmetries(model, (3,)).normalize()
    for layer in ("0", "2"):
        rows = state[f"{layer}.weight"].abs().sum(1) + state[f"{layer}.bias"].abs()
        torch.testing.assert_close(rows, torch.ones_like(rows))
    last = state["4.weight"].abs().sum() + state["4.bias"].abs().sum()
    assert math.isclose(float(last), pathlift.path_norm(model, (3,)).value, rel_tol=1e-12)


def test_no_path_activation_of_a_normal_convolutional_network_exceeds_one() -> None:
    model = randomised(Residual())
    normal = pathlift.rescaling.with_state(model, pathlift.symmetries(model, (1, 3, 3)).normalize())
    parts = [normal.conv1, normal.bn1, nn.ReLU(), normal.conv2]
    for length in (1, 3, 4):
        largest = pathlift.path_norm(nn.Sequential(*parts[:length]), (1, 3, 3)).per_output.flatten(1).amax(1)
        torch.testing.assert_close(largest, torch.ones_like(largest))


def test_a_dead_channel_keeps_its_scale_and_is_named() -> None:
    model = random_dead()
    groups = pathlift.symmetries(model, (3,))
    live = groups.balance()
    assert live.left == groups.channel_groups("0")[1:3]
    assert torch.equal(live["0.weight"][1:3], model[0].weight[1:3])
    assert groups.condition().left == groups.channel_groups("0")[1:2]  # what a bias that is 0 would do counts there
    model[0].weight.data[1] = 7.0  # what a dead channel holds does not matter to the others
    assert torch.allclose(pathlift.symmetries(model, (3,)).balance()["0.weight"][[0, 3]], live["0.weight"][[0, 3]])


def random_dead() -> nn.Sequential:
    """Channel 1 has no outgoing, channel 2 no incoming weights."""
    model = randomised(perceptron(3, 4, 2))
    with torch.no_grad():
        model[2].weight[:, 1] = 0
        model[0].weight[2] = 0
        model[0].bias[2] = 0
    return model


def test_groups_that_scale_a_divisor_keep_their_scale() -> None:
    (case,) = (case for case in OPERATORS if case.name == "div parameter")
    model, inputs = randomised(case.make()), examples(case.shape)
    groups = pathlift.symmetries(model, inputs)
    state = groups.balance()
    assert state.left
    assert torch.equal(state["op.temperature"], model.op.temperature)
    assert all(state.factors[group] == 1.0 for group in state.left)


def test_conditioning_minimises_the_divergence_of_the_path_kernel() -> None:
    """d(α·diag G, I) = Σ α·G_ii − log(α·G_ii) − 1, least over α, against path enumeration of G on random rescalings."""
    model = randomised(perceptron(2, 3, 3, 2))
    inputs = examples((2,))

    def divergence(state: dict[str, Tensor]) -> float:
        other = pathlift.rescaling.with_state(model, state)
        paths = Probe(other, *inputs).dag().paths(10_000)
        own = dict(other.named_parameters())
        diagonal: dict[tuple[str, int], float] = {}
        for path in paths:
            for name, index in path.labels:
                slope = float(path.phi) / float(own[name].reshape(-1)[index])
                diagonal[name, index] = diagonal.get((name, index), 0.0) + slope**2
        values = torch.tensor(list(diagonal.values()), dtype=torch.float64)
        return float(len(values) * torch.log(values.mean()) - torch.log(values).sum())

    groups = pathlift.symmetries(model, inputs)
    best = groups.condition()
    assert best.imbalance < 1e-10
    least = divergence(best)
    assert least <= divergence(model.state_dict())
    at_best = pathlift.symmetries(pathlift.rescaling.with_state(model, best), inputs)
    for start in range(6):
        assert divergence(at_best.randomize(generator=generator(start), sigma=10.0 ** (-start / 2))) >= least - 1e-9


def test_equalised_channels_have_equal_ranges() -> None:
    model = randomised(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    )
    other = rescaled(model, examples((2, 4, 4)))
    state = pathlift.symmetries(other, (2, 4, 4)).equalize()
    into = state["0.weight"].abs().amax((1, 2, 3))
    out = state["2.weight"].abs().amax((0, 2, 3))
    torch.testing.assert_close(into, out, rtol=2e-3, atol=0)
    torch.testing.assert_close(
        state["2.weight"].abs().amax((1, 2, 3)), state["5.weight"].abs().reshape(2, 4, 4).amax((0, 2)), rtol=2e-3, atol=0
    )


@pytest.mark.hunt
def test_pruned_and_rescaled_copies_are_recognised() -> None:
    model = randomised(Residual())
    inputs = examples((1, 3, 3))
    pruned = pathlift.rescaling.with_state(model, model.state_dict())
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.mul_(torch.rand(parameter.shape, generator=generator(1)) > 0.3)
    truth = pathlift.path_metric(model, pruned, inputs)
    assert truth.exact
    for sigma in (0.3, 3.0):
        other = rescaled(pruned, inputs, sigma=sigma)
        aligned = pathlift.align(model, other, inputs)
        assert all(torch.equal(aligned[name], value) for name, value in pruned.named_parameters())
        metric = pathlift.path_metric(model, other, inputs)
        assert metric.ratio < 1 + 1e-9
        assert math.isclose(metric.lower, truth.value, rel_tol=1e-9)
        bound = pathlift.lipschitz_bound(model, other, 3 * inputs[0])
        torch.testing.assert_close(
            Tensor(bound), Tensor(pathlift.lipschitz_bound(model, pruned, 3 * inputs[0])), rtol=1e-6, atol=1e-12
        )
    assert pathlift.path_metric(model, rescaled(model, inputs), inputs).upper < 1e-12 * pathlift.path_norm(model, inputs).value


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_one_changed_weight_is_found(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = randomised(case.make()), examples(case.shape)
    groups = pathlift.symmetries(model, inputs)
    state = groups.randomize(generator=generator())
    assert pathlift.equivalent(groups, state)
    assert pathlift.rescaling.rescaling_distance(groups, state) < 1e-9 * weight_norm(model.state_dict(), model, 2)
    free = len(groups)
    for name, _ in model.named_parameters():
        if name not in state or state[name].numel() < 2 or free == 0:
            continue
        for size in (1e-1, 1e-6, 1e-11):
            changed = {**state, name: state[name].clone()}
            changed[name].reshape(-1)[0] *= 1 + size
            if pathlift.equivalent(groups, changed):  # then the change is itself a rescaling: a group of one weight
                found = pathlift.equivalent(groups, changed).factors
                assert found is not None
                remade = groups.rescale(found)
                assert all(torch.allclose(remade[key], value, rtol=1e-12, atol=0) for key, value in changed.items())


def test_a_change_is_found_in_a_wide_layer_down_to_the_tolerance() -> None:
    model = randomised(perceptron(30, 40, 40, 5)).float()
    groups = pathlift.symmetries(model, (30,))
    state = groups.randomize(generator=generator())
    for size, found in ((3e-5, False), (1e-7, True)):
        changed = {**state, "2.weight": state["2.weight"].clone()}
        changed["2.weight"][3, 4] *= 1 + size
        answer = pathlift.equivalent(groups, changed)
        assert bool(answer) is found
        assert found or answer.mismatch.startswith("'2.weight'[3, 4] differs by 3")
    other = {**state, "2.weight": state["2.weight"].clone()}
    other["2.weight"][3, 4] *= -1
    assert "signs never change" in pathlift.equivalent(groups, other).mismatch
    other["2.weight"][3, 4] = 0
    assert "signs never change" in pathlift.equivalent(groups, other).mismatch


def test_shared_weights_tie_in_every_way() -> None:
    model = randomised(Tied())
    assert len(pathlift.symmetries(model, (3,))) == 0  # one weight, used from the input to the output
    shared = nn.Linear(3, 3, bias=False)
    free = randomised(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(3, 1)))
    groups = pathlift.symmetries(free, (3,))
    # s₂ − s₁ and s₃ − s₂ agree for every pair of channels: s₁, and one step that all channels take alike
    assert len(groups) == dimension_by_paths(free, examples((3,))) == 4


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "on the right": torch.matmul,
    "on the left": lambda x, w: (w @ x.unsqueeze(-1)).squeeze(-1),
    "einsum over rows": lambda x, w: torch.einsum("bi,io->bo", x, w),
    "convolution": lambda x, w: F.conv1d(x.unsqueeze(-1), w.unsqueeze(-1)).squeeze(-1),
    "kernels": lambda x, w: F.conv1d(x.unsqueeze(1), w.unsqueeze(1), padding=1).amax(1),
    "scaled rows": lambda x, w: (x.unsqueeze(-1) * w).sum(1),
    "scaled columns": lambda x, w: (x.unsqueeze(1) * w).sum(2),
    "one channel": lambda x, w: (x[:, :1].unsqueeze(1) * w).sum(1),
    "bias": lambda x, w: (x.unsqueeze(1) + w).amax(1),
}
"""Ways to use one matrix: what counts the neurons above in one of them counts those below in another."""


@pytest.mark.one_in(9, first=1)
@pytest.mark.hunt_one_in(3)
@pytest.mark.parametrize(("first", "second"), itertools.product(PRODUCTS, repeat=2))
def test_one_parameter_in_two_products_scales_as_both_ask(first: str, second: str) -> None:
    torch.manual_seed(0)
    model, inputs = randomised(Mirrored(PRODUCTS[first], PRODUCTS[second], 3)), examples((3,))
    groups = assert_symmetric(model, inputs, generator())
    assert_comparisons_invariant(model, groups, inputs, generator())
    assert len(groups) == dimension_by_paths(model, inputs)


BAD = [
    ([1.0, 2.0], "shape"),
    ([1.0, 2.0, 3.0, 0.0], "positive and finite, found 0.0 at 3"),
    ([1.0, 2.0, -3.0, 1.0], "positive and finite, found -3.0 at 2"),
    ([1.0, float("nan"), 3.0, 1.0], r"factors\[1\] must be a number, found nan"),
    ([1.0, float("inf"), 3.0, 1.0], "positive and finite, found inf at 1"),
    ({"2": 2.0}, "channel 0 of '2' is pinned (the output)"),
    ({"nowhere": 2.0}, "No module 'nowhere'"),
    ({"0": [1.0, 2.0]}, "'0' has 4 channels"),
    ([1e300, 1.0, 1.0, 1.0], "outside the range of float32"),
]


@pytest.mark.parametrize(("factors", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_factors_change_nothing(factors: object, message: str) -> None:
    model = perceptron(3, 4, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = pathlift.symmetries(model, (3,))
    with pytest.raises(pathlift.InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        groups.rescale(factors)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_other_bad_input() -> None:
    groups = pathlift.symmetries(perceptron(3, 4, 2), (3,))
    for call in (
        lambda: groups.randomize([]),
        lambda: groups.randomize([1.0, -1.0]),
        lambda: groups.randomize(sigma=-1.0),
        lambda: groups.balance(0.0),
        lambda: pathlift.equivalent(groups, groups.network.state, tolerance=-1.0),
        lambda: pathlift.rescaling.rescaling_distance(groups, groups.network.state, p=0.5),
    ):
        with pytest.raises(pathlift.InputError):
            call()
    broken = perceptron(3, 4, 2)
    broken[0].weight.data[0, 0] = float("nan")
    for kind in ("balance", "normalize", "condition", "equalize", "randomize"):
        with pytest.raises(pathlift.NumericalError, match=r"0\.weight"):
            getattr(pathlift.symmetries(broken, (3,)), kind)()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["0.weight", "2.bias"])  # in the symmetry, and outside it
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_neither_equivalent_nor_aligned(name: str, value: float) -> None:
    model = perceptron(3, 4, 2)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state[name].view(-1)[0] = value
    for call in (pathlift.equivalent, pathlift.align, pathlift.rescaling.rescaling_distance):
        for pair in ((model, state), (pathlift.rescaling.with_state(model, state), model)):
            with pytest.raises(pathlift.NumericalError, match=name.replace(".", r"\.")):
                call(*pair, (3,))


def test_factors_by_module() -> None:
    model = randomised(Residual())
    groups = pathlift.symmetries(model, (1, 3, 3))
    state = groups.rescale({"conv1": [2.0, 4.0], "bn1": 0.5})
    torch.testing.assert_close(state["bn1.running_mean"], model.bn1.running_mean * torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(state["bn1.weight"], model.bn1.weight * torch.tensor([0.25, 0.125]))
    torch.testing.assert_close(state["bn1.bias"], model.bn1.bias * 0.5)
    assert torch.equal(state["bn1.running_var"], model.bn1.running_var)
    torch.testing.assert_close(state["conv2.weight"], model.conv2.weight * 2)
    with pytest.raises(pathlift.InputError, match="shares its factor"):
        groups.rescale({"bn2": 2.0, "down": 4.0})


def test_the_table_names_axes_and_reasons() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    text = str(pathlift.symmetries(model, (3, 8, 8)))
    assert "10 rescaling groups" in text
    assert "5 × λ   multiplies 2.weight[i], 2.bias[i], 3.running_mean[i]" in text
    assert "divides    5.weight[:, i]" in text
    assert "4 pinned 0: a constant that relu6 in '1' clamps at" in text or "4 pinned 0: a constant that hardtanh in '1'" in text
    assert "2 pinned 5: the output" in text


class Sloped(nn.Module):
    """A learned slope, and a depthwise layer within a residual sum: weights between neurons of one group."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.slope, self.last = nn.PReLU(3), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        x = self.first(x)
        return self.last(self.slope(x + self.depthwise(x))).flatten(1)


def test_a_family_names_what_its_factors_change_and_nothing_else() -> None:
    groups = pathlift.symmetries(Sloped(), (1, 4, 4))
    state = groups.rescale([2.0] * len(groups))
    changed = {name for name, tensor in groups.network.state.items() if not torch.equal(state.get(name, tensor), tensor)}
    (family,) = groups.families
    assert {name for name, _ in (*family.multiplied, *family.divided)} == changed
    assert changed == {"first.weight", "first.bias", "depthwise.bias", "last.weight"}


def test_channels_that_no_output_reads_are_in_no_group() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Fn(lambda x: x[:, :2]), nn.Linear(2, 1))
    groups = pathlift.symmetries(model, (3,))
    assert len(groups) == 2
    assert any(held.reason == "no output depends on it" and held.channels == (2, 3) for held in groups.pinned)


def test_the_gauge_of_two_networks_does_not_depend_on_the_order_of_a_mapping() -> None:
    """Medians go from tensor to tensor: which one tells of a sum first is up to the graph."""
    torch.manual_seed(0)
    model, inputs = randomised(Residual()), examples((1, 3, 3))
    network = pathlift.capture(model, inputs)
    state = other_state(network, rescaled(perturbed(model, "moved"), inputs).state_dict())
    fit = gauge_fit(network, state)

    def turned(mapping: Mapping[str, T]) -> dict[str, T]:
        return dict(reversed(list(mapping.items())))

    again = replace(fit, scalings=turned(fit.scalings), state=turned(fit.state), other=turned(fit.other))
    assert list(again.scalings) != list(fit.scalings)
    assert torch.equal(fit.rough, again.rough)
    assert torch.equal(fit.factors, again.factors)
    assert fit.disagreement == again.disagreement
