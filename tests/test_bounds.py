"""No bound is ever below what it bounds, on random networks over all operators; its hypotheses are checked."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import assume
from torch import nn

import pathlift
from agreement import examples, outputs, perturbed, random_perceptron, randomised
from agreement import samples as batch
from cases import NETWORKS, OPERATORS, Case
from habit import LONGER
from networks import networks, over
from pathlift.passes.deviation import Deviation, Side
from test_enclosure import corner

CHANGES = ("pruned", "grown", "moved", "flipped", "unrelated")


def changed(model: nn.Module, how: str) -> nn.Module:
    if how == "unrelated":
        return randomised(copy.deepcopy(model), 99)
    if how != "flipped":
        return perturbed(model, how)
    flipped = copy.deepcopy(model)
    with torch.no_grad():
        for index, parameter in enumerate(flipped.parameters()):
            parameter.mul_(-1 if index % 2 else 0.9)
    return flipped


ANY_PAIR = ("auto", "pivot", "per_input", "telescoping", "three_step", "activation", "enclosure")


def assert_sound(model: nn.Module, shape: tuple[int, ...], hows: tuple[str, ...] = CHANGES) -> None:
    inputs = batch(shape)
    network = pathlift.capture(model, examples(shape))
    with torch.no_grad():
        own = outputs(model, inputs)
        for how in hows:
            other = changed(model, how)
            theirs, state = outputs(other, inputs), other.state_dict()
            if not bool(torch.isfinite(theirs).all()):  # a division by a pruned parameter
                with pytest.raises(pathlift.NumericalError):
                    pathlift.lipschitz_bound(network, state, inputs)
                continue
            drift = (own - theirs).abs()
            found = {kind: pathlift.lipschitz_bound(network, state, inputs, kind=kind) for kind in ANY_PAIR}
            for kind, bound in found.items():
                assert bound.shape == drift.shape
                rounding = 1e-12 * (own.abs() + theirs.abs() + bound)  # of the two forward passes
                assert bool((drift <= bound + rounding).all()), (how, kind)
            for kind in ("per_input", "telescoping", "three_step", "activation"):
                assert bool((found["auto"] <= found[kind]).all()), "auto is never above a bound that applies"
            assert bool((found["per_input"] <= found["pivot"] * (1 + 1e-9)).all()), "|x| is at most its largest element"
            if how in ("pruned", "grown"):
                try:
                    theorem = pathlift.lipschitz_bound(network, state, inputs, kind="theorem")
                except pathlift.MismatchError:  # t = β − μ·s of a batch norm may change its sign though no parameter does
                    assert any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
                    continue
                assert bool((theorem == found["pivot"]).all()), "where Theorem 4.1 applies, the pivot bound is it"


@pytest.mark.one_in(64, first=13)
@pytest.mark.hunt_one_in(12)
@pytest.mark.parametrize("case", [*OPERATORS, *NETWORKS], ids=lambda case: case.name)
def test_bounds_hold_for_every_operator(case: Case) -> None:
    """Two changes for each operator, others for its neighbours; random networks have all operators and all changes."""
    number = [*OPERATORS, *NETWORKS].index(case)
    assert_sound(randomised(case.make()), case.shape, (CHANGES[number % 5], CHANGES[(number + 2) % 5]))


def _sound(model: nn.Module, shape: tuple[int, ...], weights: int) -> None:
    model = randomised(model, weights)
    with torch.no_grad():
        assume(bool(torch.isfinite(outputs(model, batch(shape))).all()))
    assert_sound(model, shape, (CHANGES[weights % len(CHANGES)],))


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("part", range(8 * LONGER))
def test_bounds_hold_on_random_networks(part: int) -> None:
    over(networks(), 200, part, _sound)


def test_theorem_is_attained() -> None:
    """Non-negative weights and a constant positive input: every path is active, so (5) is an equality."""
    model, other = random_perceptron(3, 4, 2), random_perceptron(3, 4, 2)
    with torch.no_grad():
        for weight, their in zip(model.parameters(), other.parameters(), strict=True):
            weight.abs_()
            their.copy_(weight / 2)
    x = torch.full((1, 3), 2.0, dtype=torch.float64)
    drift = (model(x) - other(x)).abs().detach()
    bound = pathlift.lipschitz_bound(model, other, x, kind="theorem")
    torch.testing.assert_close(bound, drift, rtol=1e-11, atol=0.0)
    metric = pathlift.path_metric(model, other, x)
    assert float(drift.sum()) <= 2.0 * metric.value * (1 + 1e-12)


def test_theorem_splits_inputs_and_biases() -> None:
    model = nn.Linear(1, 1).double()
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.weight.fill_(3.0), model.bias.fill_(5.0)
        other.weight.fill_(1.0), other.bias.fill_(4.0)
    x = torch.tensor([[0.5], [-10.0]], dtype=torch.float64)
    bound = pathlift.lipschitz_bound(model, other, x, kind="theorem")
    assert bound.reshape(-1).tolist() == pytest.approx([0.5 * 2 + 1, 10 * 2 + 1], rel=1e-12)


def test_no_multiple_of_the_path_metric_survives_a_sign_change_but_the_pivot_bound_does() -> None:
    """Fig. 6 of the paper in its smallest form: two signs change along the only path, so Φ is equal and the function is not."""
    model, other = random_perceptron(1, 1, 1), random_perceptron(1, 1, 1)
    with torch.no_grad():
        for network, sign in ((model, 1.0), (other, -1.0)):
            network[0].weight.fill_(sign), network[0].bias.zero_()
            network[2].weight.fill_(sign), network[2].bias.zero_()
    x = torch.ones(1, 1, dtype=torch.float64)
    distance = pathlift.path_metric(model, other, x, q=2)
    assert distance.lower == 0.0
    assert distance.upper < 1e-6
    drift = float((model(x) - other(x)).abs())
    assert drift == 1.0
    assert drift <= float(pathlift.lipschitz_bound(model, other, x))


def test_prior_is_as_bad_as_one_likes_after_a_rescaling_and_ours_does_not_move() -> None:
    model = random_perceptron(4, 8, 8, 3)
    other = perturbed(model, "pruned")
    x = torch.randn(5, 4, dtype=torch.float64)
    ours = pathlift.lipschitz_bound(model, other, x, kind="per_input")
    prior = pathlift.lipschitz_bound(model, other, x, kind="prior")
    assert bool((ours <= prior).all())
    for network in (model, other):
        with torch.no_grad():
            network[0].weight.mul_(4096), network[0].bias.mul_(4096), network[2].weight.div_(4096)
    torch.testing.assert_close(pathlift.lipschitz_bound(model, other, x, kind="per_input"), ours, rtol=0.0, atol=0.0)
    assert bool((pathlift.lipschitz_bound(model, other, x, kind="prior") > 1e3 * prior).all())
    assert bool((pathlift.lipschitz_bound(model, other, x) <= ours).all())


def test_equal_networks_have_bound_zero() -> None:
    model = random_perceptron(3, 4, 2)
    assert not pathlift.lipschitz_bound(model, copy.deepcopy(model), torch.ones(2, 3, dtype=torch.float64)).any()


def test_zero_inputs_leave_the_biases() -> None:
    model = random_perceptron(3, 4, 2)
    other = perturbed(model, "grown")
    x = torch.zeros(1, 3, dtype=torch.float64)
    drift = (model(x) - other(x)).abs().detach()
    bound = pathlift.lipschitz_bound(model, other, x)
    assert bool((drift <= bound).all())
    assert bool(torch.isfinite(bound).all())


def test_bad_input_is_one_clear_error() -> None:
    model = random_perceptron(3, 4, 2)
    other, x = perturbed(model, "moved"), torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(pathlift.InputError, match="kind must be one of"):
        pathlift.lipschitz_bound(model, other, x, kind="tightest")  # type: ignore[arg-type]
    with pytest.raises(pathlift.InputError, match="NaN or inf"):
        pathlift.lipschitz_bound(model, other, x * float("nan"))
    network = pathlift.capture(model, x)
    with pytest.raises(pathlift.InputError, match=r"expected \(batch, 3\)"):
        pathlift.lipschitz_bound(network, other, torch.ones(2, 4))
    with pytest.raises(pathlift.InputError, match="1 inputs, found 2"):
        pathlift.lipschitz_bound(network, other, (x, x))
    with pytest.raises(pathlift.InputError, match="x is empty"):
        pathlift.lipschitz_bound(network, other, x[:0])
    with pytest.raises(pathlift.MismatchError, match="changes its sign"):
        pathlift.lipschitz_bound(model, randomised(copy.deepcopy(model), 5), x, kind="theorem")
    with pytest.raises(pathlift.MismatchError):
        pathlift.lipschitz_bound(model, random_perceptron(3, 5, 2), x)
    image = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Flatten())
    with pytest.raises(pathlift.UnsupportedModelError, match="perceptrons"):
        pathlift.lipschitz_bound(image, copy.deepcopy(image), torch.ones(1, 1, 2, 2), kind="prior")


@pytest.mark.parametrize("kind", ["per_input", "theorem", "prior", "auto"])
def test_a_weight_that_is_not_finite_is_named_for_every_kind(kind: str) -> None:
    for value in (float("nan"), float("inf")):
        model = random_perceptron(3, 4, 2)
        with torch.no_grad():
            model[2].weight[0, 0] = value
        with pytest.raises(pathlift.NumericalError, match=r"2\.weight"):
            pathlift.lipschitz_bound(model, copy.deepcopy(model), torch.ones(1, 3, dtype=torch.float64), kind=kind)


@pytest.mark.hunt
@pytest.mark.parametrize("kind", ["per_input", "theorem", "prior", "auto"])
def test_bounds_past_the_range_of_float64_are_infinite_and_never_too_small(kind: str) -> None:
    model = random_perceptron(*[2] * 60)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e8)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(0.5)
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    bound = pathlift.lipschitz_bound(model, other, x, kind=kind)
    assert bool(torch.isinf(bound[0]).all())
    assert not bool(bound.isnan().any())
    if kind != "prior":
        assert not bool(bound[1].any()), "the networks agree at 0"
    with torch.no_grad():
        for parameter in [*model.parameters(), *other.parameters()]:
            parameter.mul_(1e-16)
    tiny = pathlift.lipschitz_bound(model, other, x[:1], kind=kind)
    assert bool((tiny > 0).all())


SETS = (pathlift.Relative(0.1), pathlift.Relative(1.5), pathlift.Absolute(0.1), pathlift.Rounding(3), pathlift.Pruned(0.4))


@pytest.mark.hunt
@pytest.mark.hunt_one_in(12)
@pytest.mark.parametrize("case", [*OPERATORS[::3], *NETWORKS], ids=lambda case: case.name)
def test_bounds_hold_for_every_network_of_a_set(case: Case) -> None:
    model = randomised(case.make())
    inputs = batch(case.shape)
    network = pathlift.capture(model, examples(case.shape))
    generator = torch.Generator().manual_seed(0)
    for tolerance, radius in itertools.product(SETS, (0.0, 0.1)):
        try:
            kinds = ("auto", "pivot", "per_input", "telescoping", "activation", "enclosure")
            found = {k: pathlift.lipschitz_bound(network, tolerance, inputs, kind=k, radius=radius) for k in kinds}
        except pathlift.UnsupportedModelError:  # an interval of the parameters of a weight_norm gives none of the weight
            assert any(weight.movement is None and "derived" not in weight.label for weight in network.weights)
            continue
        with torch.no_grad():
            own = outputs(model, inputs)
            for _ in range(3):
                other = corner(model, network, tolerance, generator)
                shifts = [2 * torch.rand(x.shape, generator=generator, dtype=x.dtype).round() - 1 for x in inputs]
                theirs = outputs(other, tuple(x + radius * shift for x, shift in zip(inputs, shifts, strict=True)))
                for kind, bound in found.items():
                    rounding = 1e-12 * (own.abs() + theirs.abs() + bound)
                    assert bool(((own - theirs).abs() <= bound + rounding).all()), (tolerance, radius, kind)


def test_a_bound_says_which_kind_gave_it() -> None:
    model = random_perceptron(3, 8, 2)
    other, x = perturbed(model, "pruned"), torch.randn(5, 3, dtype=torch.float64)
    bound = pathlift.lipschitz_bound(model, other, x)
    assert set(bound.kinds) == {"per_input", "telescoping", "activation", "three_step", "prior", "corollary_g1"}
    assert bound.winner in bound.kinds
    for index, kind in enumerate(bound.kinds):
        mine = bound.which == index
        computed = pathlift.lipschitz_bound(model, other, x, kind=kind)
        assert torch.equal(bound[mine], computed[mine])
    assert type(bound * 2) is torch.Tensor


def test_a_set_with_a_radius_refuses_what_is_about_one_input() -> None:
    model, x = random_perceptron(3, 8, 2), torch.ones(1, 3, dtype=torch.float64)
    with pytest.raises(pathlift.InputError, match="no radius"):
        pathlift.lipschitz_bound(model, pathlift.Relative(0.1), x, kind="prior", radius=0.1)
    with pytest.raises(pathlift.InputError, match="two networks"):
        pathlift.lipschitz_bound(model, pathlift.Relative(0.1), x, kind="three_step")
    with pytest.raises(pathlift.MismatchError, match="changes its sign"):
        pathlift.lipschitz_bound(model, pathlift.Relative(1.1), x, kind="theorem")
    with pytest.raises(pathlift.InputError, match="radius must be"):
        pathlift.lipschitz_bound(model, pathlift.Relative(0.1), x, radius=-1.0)


def test_the_activation_bound_takes_the_smaller_of_both_directions() -> None:
    """Edges (2, 1) and (3, −1) at x = 1: 1·1 + 2·2 = 5 one way, 1·1 + 3·2 = 7 the other, and 5 apart in truth."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    network = pathlift.capture(model, (1,))
    one, two = ({weight: torch.full((1, 1), value).double() for weight, value in zip(network.values(), values, strict=True)}
                for values in ((2.0, 1.0), (3.0, -1.0)))  # fmt: skip
    feed = {network.layers[0].name: torch.ones(1, 1, 1, dtype=torch.float64)}
    ways = Side(one, two), Side(two, one)
    for sides, bound in ((ways[:1], 5.0), (ways[1:], 7.0), (ways, 5.0), (ways[::-1], 5.0)):
        deviation = Deviation(network, sides, (one, two), set(one), feed, 0.0, torch.float64)
        (found,) = deviation.bounds().values()
        assert float(found) == pytest.approx(bound)
