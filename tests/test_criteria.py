"""Criteria: each score against its definition, and every yes and no of the table of criteria (paper, Table 2)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from agreement import randomised
from cases import perceptron
from pathlift import prune
from pathlift.experiments.networks import resnet
from pathlift.pruning import CRITERIA, Batch, criteria
from pathlift.pruning.scope import prunable
from pathlift.rescaling import with_state

pytestmark = pytest.mark.filterwarnings("ignore:No path runs through")
CHOICES = (1.0, 128.0, 4096.0)


def trained() -> tuple[nn.Module, Batch]:
    """A residual network with batch norm after a few steps of training, so that nothing in it is special."""
    torch.manual_seed(0)
    model = resnet(1, 4, width=4, blocks=(1, 1), stem_stride=1)
    x = torch.randn(64, 1, 6, 6)
    y = torch.randint(4, (64,))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), Batch(x, y)


MODEL, BATCH = trained()
NETWORK = pathlift.capture(MODEL, (1, 6, 6))
RESCALED = pathlift.capture(
    with_state(MODEL, pathlift.symmetries(NETWORK).randomize(CHOICES, torch.Generator().manual_seed(2))), (1, 6, 6)
)


def seen(name: str) -> Batch | Tensor | None:
    return {"nothing": None, "inputs": BATCH.x, "loss": BATCH}[CRITERIA[name].needs]


def pruned(network: pathlift.Network, name: str, amount: float) -> pathlift.pruning.PruneReport:
    return prune(network, amount=amount, criterion=name, data=seen(name), generator=torch.Generator().manual_seed(3))[1]


@pytest.mark.one_in(12)
@pytest.mark.hunt_one_in(6)
@pytest.mark.parametrize("name", CRITERIA)
def test_masks_are_identical_under_rescaling_exactly_for_the_invariant_criteria(name):
    """Bit for bit under {1, 128, 4096} (App. D). Magnitude, OBD by one vector and GraSP are moved."""
    same = [
        torch.equal(mask, other)
        for amount in (0.4, 0.8, 0.97)
        for mask, other in zip(
            pruned(NETWORK, name, amount).masks.values(), pruned(RESCALED, name, amount).masks.values(), strict=True
        )
    ]
    assert all(same) == CRITERIA[name].invariant


@pytest.mark.one_in(3, first=1)
@pytest.mark.parametrize("name", CRITERIA)
def test_needs_are_what_the_table_says(name):
    """Without what it needs a criterion refuses; what it does not need does not change its scores."""
    criterion = CRITERIA[name]
    if criterion.needs != "nothing":
        with pytest.raises(pathlift.InputError, match="looks at data"):
            criterion.scores(NETWORK)
    if criterion.needs == "loss":
        with pytest.raises(pathlift.InputError, match="looks at a loss"):
            criterion.scores(NETWORK, BATCH.x)
    other = Batch(BATCH.x.flip(3) * 2, BATCH.y.flip(0))
    data = {"nothing": other, "inputs": Batch(BATCH.x, BATCH.y.flip(0)), "loss": other}[criterion.needs]
    one = criterion.scores(NETWORK, BATCH, torch.Generator().manual_seed(0))
    two = criterion.scores(NETWORK, data, torch.Generator().manual_seed(0))
    assert all(torch.equal(one[key], two[key]) for key in one) == (criterion.needs != "loss")


@pytest.mark.one_in(3, first=2)
@pytest.mark.parametrize("name", CRITERIA)
def test_scores_bound_the_change_of_the_function_exactly_for_path_magnitudes(name):
    """Their sum times the path-norm bounds the drift; the sum of any other score is beaten by the drift of some network."""
    criterion = CRITERIA[name]
    if criterion.bounded:
        scores = criterion.scores(NETWORK, seen(name))
        on_data = criterion.needs == "inputs"
        x = BATCH.x
        norm = 10 ** pathlift.path_magnitude(NETWORK, x=x if on_data else None).log10_path_norm
        size = torch.ones(len(x)) if on_data else x.abs().flatten(1).amax(1).clamp(min=1)
        for amount in (0.2, 0.7):
            model, report = prune(MODEL, (1, 6, 6), amount, name, data=seen(name))
            with torch.no_grad():
                drift = (MODEL(x) - model(x)).abs().sum(1)
            total = sum(float(scores[key][~mask].sum()) for key, mask in report.masks.items())
            assert float((drift / size).mean()) <= total * norm * (1 + 1e-5)
        return
    model = perceptron(2, 2, 1)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1e-4 if name.startswith("output_error") else 1e4)  # a square is small where weights are
            layer.bias.zero_()
    batch = Batch(torch.ones(1, 2), torch.zeros(1, dtype=torch.long), lambda out, _: (out * 0).sum())
    network = pathlift.capture(model, (2,))
    data = {"nothing": None, "inputs": batch.x, "loss": batch}[criterion.needs]
    first = criterion.scores(network, data, torch.Generator().manual_seed(0))["0.weight"]
    assert float(first.abs().sum()) < 1e-3 * float(model(torch.ones(1, 2)))  # what pruning the first layer changes


# ---- each score against its definition


def small() -> tuple[nn.Module, pathlift.Network, Batch]:
    model = randomised(perceptron(3, 4, 3), 2)
    batch = Batch(torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]))
    return model, pathlift.capture(model, (3,)), batch


def hessian_of(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, list[tuple[str, torch.Size]]]:
    names = [(name, own.shape) for name, own in model.named_parameters()]
    flat = torch.cat([own.detach().reshape(-1) for own in model.parameters()])

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for _, shape in names])
        state = {name: part.view(shape) for part, (name, shape) in zip(parts, names, strict=True)}
        return batch.loss(torch.func.functional_call(model, state, (batch.x,)), batch.y)

    gradient = torch.func.grad(loss)(flat)
    return gradient, torch.autograd.functional.hessian(loss, flat), names


def test_loss_criteria_against_the_full_hessian():
    model, network, batch = small()
    gradient, hessian, names = hessian_of(model, batch)
    theta = torch.cat([own.detach().reshape(-1) for own in model.parameters()])

    def flat(scores: dict[str, Tensor]) -> Tensor:
        return torch.cat([scores[name].reshape(-1) for name, _ in names])

    generator = torch.Generator().manual_seed(7)
    signs = torch.cat([(torch.randint(2, shape, generator=generator) * 2 - 1).double().reshape(-1) for _, shape in names])
    obd = criteria.loss_sensitivity(network, batch, generator=torch.Generator().manual_seed(7))
    assert torch.allclose(flat(obd), theta**2 * signs * (hessian @ signs) / 2)
    halves = list(batch.split(3))
    averaged = criteria.loss_sensitivity(network, halves, vectors=60, generator=generator)
    matrices = [hessian_of(model, half)[1] for half in halves]
    exact = theta**2 * sum(own.diagonal() for own in matrices) / 4
    variance = sum((own.square().sum(1) - own.diagonal() ** 2) / (4 * 60) for own in matrices)  # of z ⊙ Hz, averaged
    assert bool(((flat(averaged) - exact).abs() <= 5 * theta**2 / 2 * variance.sqrt() + 1e-12).all())
    assert torch.allclose(flat(criteria.snip(network, batch)), (theta * gradient).abs())
    assert torch.allclose(flat(criteria.grasp(network, batch)), theta * (hessian @ gradient))
    squares = sum(hessian_of(model, single)[0] ** 2 for single in batch.split(1)) / len(batch)
    assert torch.allclose(flat(criteria.fisher(network, batch)), theta**2 * squares / 2)


def test_the_exact_diagonal_is_invariant_and_its_estimate_is_not():
    """Equation (16), and the end of appendix E."""
    model, network, batch = small()
    other = with_state(model, pathlift.symmetries(network).randomize(generator=torch.Generator().manual_seed(1)))

    def exact(own: nn.Module) -> Tensor:
        theta = torch.cat([p.detach().reshape(-1) for p in own.parameters()])
        return theta**2 * hessian_of(own, batch)[1].diagonal()

    assert torch.allclose(exact(model), exact(other))
    estimates = [
        criteria.loss_sensitivity(pathlift.capture(own, (3,)), batch, generator=torch.Generator().manual_seed(0))
        for own in (model, other)
    ]
    assert not torch.allclose(estimates[0]["0.weight"], estimates[1]["0.weight"], rtol=0.01)


def test_wanda_is_weight_times_the_norm_of_what_it_meets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    scores = criteria.wanda(pathlift.capture(model, (2, 3, 3)), x)
    patches = F.unfold(x, 2, padding=1)
    norms = patches.square().sum((0, 2)).sqrt().view(2, 2, 2)
    assert torch.allclose(scores["0.weight"], model[0].weight.detach().abs() * norms)
    assert torch.allclose(scores["3.weight"], model[3].weight.detach().abs() * model[:3](x).detach().square().sum(0).sqrt())


def test_synflow_is_path_magnitude_without_max_pooling_and_not_with_it():
    for pooling, same in ((nn.AvgPool2d(2), True), (nn.MaxPool2d(2), False)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), pooling, nn.Flatten(), nn.Linear(8, 2)).double()
        network = pathlift.capture(model, (1, 5, 5))
        flow, shares = criteria.synflow(network), pathlift.path_magnitude(network)
        assert all(torch.allclose(flow[name], shares[name]) for name in flow) == same


def test_relative_path_magnitude_is_magnitude_where_as_much_comes_in_as_goes_out():
    """For a perceptron without biases, √(P_i/√(R·C)) is proportional to |θ_i| in the gauge with A₂(v) = G₂(v)."""
    model = randomised(nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)), 4)
    squares = [layer.weight.detach() ** 2 for layer in (model[0], model[2])]
    coming, going = squares[0].sum(1), squares[1].sum(0)
    gauge = (going / coming) ** 0.25
    state = {"0.weight": model[0].weight * gauge[:, None], "2.weight": model[2].weight / gauge}
    scores = criteria.relative_path_magnitude(pathlift.capture(model, (3,)))
    # inputs and outputs have no factor to choose: their sides are compared row by row and column by column
    ratio = scores["0.weight"] / state["0.weight"].abs()
    assert torch.allclose(ratio / ratio[:1], torch.ones_like(ratio))
    ratio = scores["2.weight"] / state["2.weight"].abs()
    assert torch.allclose(ratio / ratio[:, :1], torch.ones_like(ratio))


def test_balanced_magnitude_is_the_magnitude_of_the_balanced_representative():
    state = pathlift.symmetries(NETWORK).balance()
    for scores in (criteria.balanced_magnitude(NETWORK), criteria.balanced_magnitude(RESCALED)):
        for name in prunable(NETWORK):
            assert torch.allclose(scores[name], state[name].abs(), rtol=1e-4)
    # a channel that is read by nothing has no scale: its weights count for nothing, however large
    state = {name: tensor.clone() for name, tensor in RESCALED.state.items()}
    state["3.conv2.weight"][:, 1] = 0
    dead = criteria.balanced_magnitude(replace(RESCALED, state=state))
    assert not bool(dead["3.conv1.weight"][1].any()) and bool(dead["3.conv1.weight"][0].all())


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["balanced_magnitude", "balanced_lamp", "relative_path_magnitude", "synflow"])
@pytest.mark.parametrize("place", [0, 4])
def test_a_network_without_any_path_can_be_pruned(name, place):
    """Nothing in it matters: every score is 0, and the first weights stay."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) if k % 2 == 0 else nn.ReLU() for k in range(5)))
    with torch.no_grad():
        model[place].weight.zero_()
    scores = CRITERIA[name].scores(pathlift.capture(model, (3,)))
    assert not any(bool(score.any()) for score in scores.values())
    _, report = prune(model, (3,), 0.5, name, selection="global")
    assert report.masks["0.weight"].all() and report.sparsity == pytest.approx(13 / 27)


def test_random_scores_are_those_of_the_generator():
    one, two, three = (criteria.random_scores(NETWORK, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], three[name]) for name in one)
    assert all(float(score.min()) >= 0 and float(score.max()) < 1 for score in one.values())


def test_several_batches_are_put_together_where_a_criterion_takes_one():
    halves = list(BATCH.split(40))
    one, two = CRITERIA["snip"].scores(NETWORK, BATCH), CRITERIA["snip"].scores(NETWORK, halves)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert math.isclose(sum(len(own) for own in halves), len(BATCH))
    for first, second in itertools.pairwise(CRITERIA["wanda"].scores(NETWORK, data) for data in (BATCH, halves)):
        assert all(torch.equal(first[name], second[name]) for name in first)
