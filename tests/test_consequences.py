"""What follows from the bounds: in expectation, in the input, sharpness, generalisation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from agreement import examples, outputs, perturbed, random_perceptron, randomised, samples
from cases import NETWORKS, Case, Residual


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
def test_the_bound_in_expectation_is_the_mean_of_the_bounds_and_holds(case: Case) -> None:
    model = randomised(case.make())
    other, inputs = perturbed(model, "grown"), samples(case.shape)
    network = pathlift.capture(model, examples(case.shape))
    each = pathlift.lipschitz_bound(network, other.state_dict(), inputs, kind="per_input")
    mean = pathlift.lipschitz.expected_bound(network, other.state_dict(), [inputs])
    torch.testing.assert_close(mean, each.mean(0), rtol=1e-9, atol=0.0)
    with torch.no_grad():
        drift = (outputs(model, inputs) - outputs(other, inputs)).abs()
    for q in (1.0, 2.0, 4.0):
        bound = pathlift.lipschitz.expected_bound(network, other.state_dict(), [inputs], q=q)
        assert bool((drift.pow(q).mean(0).pow(1 / q) <= bound * (1 + 1e-12) + 1e-12).all())


def test_expectation_over_batches_is_that_over_all() -> None:
    model, x = random_perceptron(3, 8, 2), torch.randn(10, 3, dtype=torch.float64)
    bound = pathlift.lipschitz.expected_bound(model, pathlift.Relative(0.1), x)
    parts = pathlift.lipschitz.expected_bound(model, pathlift.Relative(0.1), x.split(3))
    torch.testing.assert_close(bound, parts)
    with pytest.raises(pathlift.InputError, match="at least one batch"):
        pathlift.lipschitz.expected_bound(model, pathlift.Relative(0.1), [])


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
def test_no_gradient_exceeds_the_lipschitz_constant(case: Case) -> None:
    model = randomised(case.make())
    network = pathlift.capture(model, examples(case.shape))
    constant = pathlift.lipschitz.input_lipschitz(network)
    norms = pathlift.lipschitz.gradient_norms(network, samples(case.shape))
    assert bool((norms <= constant.per_output * (1 + 1e-12)).all())
    assert constant.total == pytest.approx(pathlift.path_norm(network).input_part, rel=1e-9)


def test_gradient_norms_are_those_of_autograd() -> None:
    model, x = Residual().double().eval(), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    norms = pathlift.lipschitz.gradient_norms(model, x)
    for index, sample in enumerate(x):
        jacobian = torch.autograd.functional.jacobian(lambda s: model(s[None])[0], sample)
        torch.testing.assert_close(norms[index], jacobian.abs().flatten(1).sum(1), rtol=1e-9, atol=1e-12)


@pytest.mark.hunt
def test_the_box_maximum_is_attained_and_nothing_in_the_box_exceeds_it() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2)))
    network, r = pathlift.capture(model, (1, 3, 3)), 0.3
    top = pathlift.consequences.box_path_metric(network, r=r)
    corner = {name: value * (1 + r) for name, value in model.state_dict().items()}
    assert top == pytest.approx(pathlift.path_metric(network, corner).log10_upper, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    lifted = pathlift.path_lifting(model, (1, 3, 3)).phi
    for _ in range(20):
        state = {
            name: value * (1 + r * (2 * torch.rand(value.shape, generator=generator, dtype=value.dtype).round() - 1))
            for name, value in model.state_dict().items()
        }
        other = pathlift.path_lifting(_loaded(model, state), (1, 3, 3)).phi
        assert float((lifted - other).abs().sum()) <= 10**top * (1 + 1e-12)
    assert pathlift.consequences.box_path_metric(network, r=0.0) == -math.inf


def _loaded(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    return twin


@pytest.mark.one_in(4)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("r", [0.0, 0.01, 0.2, 1.0])
def test_measured_sharpness_stays_below_its_bounds(loss: str, r: float) -> None:
    for seed, make in enumerate((lambda: random_perceptron(3, 16, 16, 4), lambda: randomised(Residual()))):
        torch.manual_seed(seed)
        model = make()
        shape = (3,) if isinstance(model, nn.Sequential) else (1, 3, 3)
        x = torch.randn(8, *shape, dtype=torch.float64)
        out = model(x)
        y = torch.randint(out.shape[1], (8,)) if loss == "cross_entropy" else torch.randn_like(out)
        sharpness_bound = pathlift.consequences.sharpness(model, x, y, r, loss=loss)
        assert sharpness_bound.measured <= sharpness_bound.per_input * (1 + 1e-9) + 1e-12
        assert sharpness_bound.per_input <= sharpness_bound.lemma * (1 + 1e-9) + 1e-12
        assert (sharpness_bound.measured > 0) is (r > 0)


def test_measured_sharpness_is_an_increase_of_the_loss_of_the_model() -> None:
    """With one weight the maximum is at the end of the interval: known by hand."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(2.0)
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    sharpness_bound = pathlift.consequences.sharpness(model, x, y, 0.5, loss="mse")
    assert sharpness_bound.measured == pytest.approx(3.0**2 - 2.0**2)
    assert sharpness_bound.lemma == pytest.approx(2 * 2 * 1 + 1)


def test_sharpness_does_not_move_under_rescaling() -> None:
    model, x = random_perceptron(3, 8, 2), torch.randn(4, 3, dtype=torch.float64)
    y = model(x).argmax(1)
    before = pathlift.consequences.sharpness(model, x, y, 0.1)
    with torch.no_grad():
        model[0].weight.mul_(4096), model[0].bias.mul_(4096), model[2].weight.div_(4096)
    after = pathlift.consequences.sharpness(model, x, y, 0.1)
    assert before == after


def test_bad_arguments_of_sharpness() -> None:
    model, x = random_perceptron(3, 8, 2), torch.randn(4, 3, dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.long)
    for r, target, options, message in (
        (-0.1, y, {}, "r must be"),
        (0.1, y, {"loss": "hinge"}, "loss must be"),
        (0.1, y + 5, {}, "expected classes"),
        (0.1, y[:2], {}, "expected classes"),
        (0.1, y, {"loss": "mse"}, "expected finite values"),
    ):
        with pytest.raises(pathlift.InputError, match=message):
            pathlift.consequences.sharpness(model, x, target, r, **options)


class Pools(nn.Module):
    """Two kinds of pooling: maxima over 4, minima over 2 (k = 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.fc(torch.minimum(y, y.flip(2)).flatten(1))


def test_the_constants_of_the_generalisation_bound_are_read_off_the_graph() -> None:
    bound = pathlift.consequences.generalisation_bound(Pools(), (1, 4, 4), samples=100, input_bound=2.0, loss_lipschitz=3.0)
    assert (bound.depth, bound.pools, bound.kernel, bound.pools_on_a_path) == (4, 2, 4, 2)
    norm, n = 10**bound.log10_path_norm, 100
    inside = 4 * math.log(7 * 4) + math.log(7 / 3 * 17 * 3)
    assert 10**bound.log10_theorem == pytest.approx(4 * 2 * 3 / math.sqrt(n) * norm * math.sqrt(inside))
    inside = 4 * math.log(3) + 2 * math.log(4) + math.log(17 * 3)
    assert 10**bound.log10_sharpened == pytest.approx(4 * 2 * 3 / math.sqrt(n) * norm * math.sqrt(inside))
    assert bound.log10_sharpened < bound.log10_theorem
    assert math.isnan(bound.log10_covering)


def test_generalisation_bounds_shrink_with_data_and_say_when_they_are_vacuous() -> None:
    model = random_perceptron(4, 8, 2)
    few, many = (pathlift.consequences.generalisation_bound(model, (4,), samples=n) for n in (10, 10**9))
    for name in ("log10_theorem", "log10_sharpened", "log10_covering"):
        assert getattr(many, name) < getattr(few, name) - 3
    assert few.vacuous()
    assert not many.vacuous(loss_range=10.0)
    assert many.log10_covering > many.log10_theorem, "the route through covers is looser (paper, §4.1)"
    with pytest.raises(pathlift.UnsupportedModelError, match="proved for ReLU"):
        pathlift.consequences.generalisation_bound(nn.Sequential(nn.Linear(4, 2), nn.ReLU6()), (4,), samples=10)
    with pytest.raises(pathlift.InputError, match="samples must be"):
        pathlift.consequences.generalisation_bound(model, (4,), samples=0)
