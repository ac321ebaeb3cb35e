"""Laws that hold on any network, tested on real architectures: invariance, conservation, additivity, monotonicity."""

from __future__ import annotations

import copy
import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from agreement import randomised
from cases import NETWORKS, Residual
from pathlift.reference import Dag, Edge, Neuron, dag_of

torchvision = pytest.importorskip("torchvision")
SHAPE = (3, 64, 64)


def trained_like(name: str, seed: int = 0) -> nn.Module:
    """A torchvision model whose batch norms have statistics of their own."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def rescaled_resnet(model: nn.Module, choices: tuple[float, ...], seed: int = 0) -> nn.Module:
    """The rescaling of the paper's App. D: conv1 out ×λ, running mean and bias ×λ, conv2 in ÷λ in each basic block."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, torchvision.models.resnet.BasicBlock):
                picks = torch.randint(len(choices), (block.conv1.out_channels,), generator=generator)
                factors = torch.tensor(choices)[picks]
                block.conv1.weight.mul_(factors[:, None, None, None])
                block.bn1.running_mean.mul_(factors)
                block.bn1.bias.mul_(factors)
                block.conv2.weight.div_(factors[None, :, None, None])
    return model


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, pathlift.Network]:
    """A ResNet that no test changes, captured once."""
    model = trained_like("resnet18")
    return model, pathlift.capture(model, SHAPE)


@pytest.mark.hunt
def test_powers_of_two_change_no_bit_of_norm_and_scores(resnet: tuple[nn.Module, pathlift.Network]) -> None:
    model, network = resnet
    other = rescaled_resnet(model, (1.0, 128.0, 4096.0))
    rescaled = pathlift.capture(other, SHAPE)
    assert pathlift.path_norm(network).value == pathlift.path_norm(rescaled).value
    before, after = pathlift.path_magnitude(network), pathlift.path_magnitude(rescaled)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.log10_path_norm == after.log10_path_norm
    magnitude = torch.cat([p.abs().flatten() for p in model.parameters()])
    assert not torch.equal(magnitude, torch.cat([p.abs().flatten() for p in other.parameters()]))


@pytest.mark.hunt
def test_any_rescaling_leaves_norm_and_scores_to_rounding(resnet: tuple[nn.Module, pathlift.Network]) -> None:
    model, network = resnet
    other = pathlift.capture(rescaled_resnet(model, (1e-3, 0.7, 1.0, 3.3, 1e5), seed=5), SHAPE)
    assert pathlift.path_norm(other).log10 == pytest.approx(pathlift.path_norm(network).log10, abs=1e-5)
    before, after = pathlift.path_magnitude(network), pathlift.path_magnitude(other)
    for name in before:
        assert torch.allclose(before[name], after[name], rtol=2e-4, atol=0), name


@pytest.mark.hunt
@pytest.mark.parametrize("name", ["vgg11", "alexnet", "vgg11_bn"])
def test_every_cut_of_a_layered_network_carries_the_whole_path_norm(name: str) -> None:
    """Shares of a layer's weights, and of the biases of that layer and all later ones, add up to 1 − earlier starts."""
    scores = pathlift.path_magnitude(trained_like(name), SHAPE)
    assert all(float(score.min()) >= 0 and math.isfinite(float(score.sum())) for score in scores.values())
    layers = [key for key in scores if key.endswith("weight")]
    for index, layer in enumerate(layers):
        # A batch norm's bias starts after its weight; a convolution's or linear layer's bias likewise.
        later = sum(
            float(scores[k.replace("weight", "bias")].double().sum())
            for k in layers[index:]
            if k.replace("weight", "bias") in scores
        )
        assert float(scores[layer].double().sum()) + later == pytest.approx(1.0, abs=2e-5), layer


def test_scores_add_up_over_several_networks_with_skips(resnet: tuple[nn.Module, pathlift.Network]) -> None:
    """Through each channel of a residual network passes A(v)·G(v); the units of the last layer carry everything."""
    _, network = resnet
    units = pathlift.unit_path_magnitude(network)
    assert float(units["fc"].sum()) == pytest.approx(1.0, rel=1e-5)
    assert units["layer1.0.conv1"].shape == (64,)
    outputs = pathlift.path_norm(network).per_output
    assert torch.allclose(units["fc"].double(), outputs / outputs.sum(), rtol=1e-4)
    weight = pathlift.path_magnitude(network)["layer1.0.conv1.weight"]
    assert torch.allclose(weight.sum((1, 2, 3)), units["layer1.0.conv1"], rtol=1e-4)


class Functional(nn.Module):
    """Three layers of one module; of one weight where ``parts`` says so."""

    def __init__(self, net: nn.Sequential, *, parts: bool) -> None:
        super().__init__()
        weights = [layer.weight.detach() for layer in net if isinstance(layer, nn.Linear)]
        self.rows = [len(weight) for weight in weights]
        self.whole = nn.Parameter(torch.cat(weights)) if parts else None
        self.first, self.second, self.third = (None if parts else nn.Parameter(weight.clone()) for weight in weights)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.first, self.second, self.third) if self.whole is None else self.whole.split(self.rows)
        for weight in weights[:-1]:
            x = F.relu(F.linear(x, weight))
        return F.linear(x, weights[-1])


@pytest.mark.parametrize("parts", [False, True])
def test_layers_that_one_module_makes_have_units_of_their_own(*, parts: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 5, bias=False)]
    net = nn.Sequential(*layers).double()
    model = Functional(net, parts=parts)
    expected, units = pathlift.unit_path_magnitude(net, (6,)), pathlift.unit_path_magnitude(model, (6,))
    assert tuple(units) == (("linear", "linear_1", "linear_2") if parts else ("first", "second", "third"))
    for one, other in zip(expected.values(), units.values(), strict=True):
        torch.testing.assert_close(one, other)
    if not parts:
        groups, found = pathlift.symmetries(net, (6,)), pathlift.symmetries(model, (6,))
        told = {"0": torch.arange(1.0, 7.0), "2": torch.full((6,), 2.0)}
        rescaled = groups.rescale(told)
        again = found.rescale({"first": told["0"], "second": told["2"]})
        for one, other in zip(("0.weight", "2.weight", "4.weight"), ("first", "second", "third"), strict=True):
            assert torch.equal(rescaled[one], again[other])


def test_the_path_norm_is_the_sum_over_outputs_and_of_its_parts(resnet: tuple[nn.Module, pathlift.Network]) -> None:
    norm = pathlift.path_norm(resnet[1])
    assert float(norm.per_output.sum()) == pytest.approx(norm.value, rel=1e-12)
    assert norm.input_part + norm.bias_part == pytest.approx(norm.value, rel=1e-5)
    assert 10**norm.log10 == pytest.approx(norm.value, rel=1e-9)


@pytest.mark.hunt
def test_orders_are_monotone(resnet: tuple[nn.Module, pathlift.Network]) -> None:
    values = [pathlift.path_norm(resnet[1], q=q).log10 for q in (1, 1.5, 2, 4, math.inf)]
    assert values == sorted(values, reverse=True)


def test_pruning_more_costs_more_and_the_sum_of_scores_bounds_the_joint_cost(
    resnet: tuple[nn.Module, pathlift.Network],
) -> None:
    """(13): ‖Φ(θ)−Φ(θ')‖₁ ≤ Σ_{i∈S} PathMag(θ, i), with equality for one weight."""
    model, network = resnet
    scores = pathlift.path_magnitude(network)
    name = "layer2.0.conv1.weight"
    flat = scores[name].flatten()
    costs = []
    for amount in (1, 10, 1000, flat.numel() // 2):
        chosen = flat.argsort()[-amount:]
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state[name].view(-1)[chosen] = 0
        metric = pathlift.path_metric(network, state)
        assert metric.exact
        assert metric.method == "lemma 4.2"
        bound = float(flat[chosen].double().sum()) * pathlift.path_norm(network).value
        assert metric.value <= bound * (1 + 1e-5)
        if amount == 1:
            assert metric.value == pytest.approx(bound, rel=1e-4)
        costs.append(metric.value)
    assert costs == sorted(costs)


@pytest.mark.parametrize("case", NETWORKS[:2], ids=lambda case: case.name)
def test_exact_values_are_a_metric(case: object) -> None:
    """Zero for equal networks, symmetric, and the triangle inequality is an equality along a monotone chain."""
    model = randomised(case.make())  # type: ignore[attr-defined]
    network = pathlift.capture(model, case.shape)  # type: ignore[attr-defined]

    def times(factor: float) -> dict[str, Tensor]:
        keep = ("running", "num")
        return {k: v if any(word in k for word in keep) else v * factor for k, v in model.state_dict().items()}

    half, third = times(0.5), times(0.25)
    assert pathlift.path_metric(network, model).value == 0
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        twin = copy.deepcopy(model)
        twin.load_state_dict(half)
        there, back = pathlift.path_metric(network, half), pathlift.path_metric(twin, model, case.shape)  # type: ignore[attr-defined]
        assert there.exact
        assert there.value == pytest.approx(back.value, rel=1e-12)
        far = pathlift.path_metric(network, third)
        rest = pathlift.path_metric(twin, third, case.shape)  # type: ignore[attr-defined]
        assert far.value == pytest.approx(there.value + rest.value, rel=1e-12)


def test_a_batch_norm_is_exact_only_when_its_effective_weights_are_ordered() -> None:
    """Halving γ halves s but changes t = β − μ·s; when |t| grows while |s| shrinks, nothing is claimed."""
    layer = nn.BatchNorm1d(1, eps=0.0).double().eval()
    with torch.no_grad():
        layer.weight.fill_(2.0), layer.bias.fill_(3.0), layer.running_mean.fill_(1.0)
    smaller = {**layer.state_dict(), "weight": torch.tensor([1.0], dtype=torch.float64)}
    metric = pathlift.path_metric(layer, smaller, (1,))
    assert not metric.exact  # s: 2 → 1, t: 1 → 2
    assert metric.lower <= 2.0 <= metric.upper
    assert metric.upper == pytest.approx(2.0)


def test_the_l2_metric_sees_the_tenth_digit_of_one_weight() -> None:
    model = randomised(Residual())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv1.weight.view(-1)[0] *= 1 + 1e-10
    mine, theirs = (dag_of(m, torch.zeros(1, 1, 3, 3)).paths() for m in (model, other))
    exact = sum((Fraction(a.phi) - Fraction(b.phi)) ** 2 for a, b in zip(mine, theirs, strict=True))
    metric = pathlift.path_metric(model, other, (1, 3, 3), q=2)
    assert metric.value == pytest.approx(math.sqrt(exact), rel=1e-5)


@pytest.mark.hunt
def test_the_l2_metric_of_a_rescaled_copy_is_what_rounding_made_of_it() -> None:
    model = trained_like("resnet18")
    assert pathlift.path_metric(model, rescaled_resnet(model, (1.0, 4.0)), SHAPE, q=2).upper == 0.0
    metric = pathlift.path_metric(model, rescaled_resnet(model, (1.0, 3.0)), SHAPE, q=2)
    assert metric.lower <= metric.upper < 1e-6 * pathlift.path_norm(model, SHAPE, q=2).value
    assert metric.lower > 0, "float32 has no third of a weight"


@pytest.mark.hunt
def test_a_thousand_layers_of_weight_three_in_float32() -> None:
    layers: list[nn.Module] = []
    for _ in range(1000):
        layer = nn.Linear(2, 2, bias=False)
        nn.init.constant_(layer.weight, 3.0)
        layers += [layer, nn.ReLU()]
    model = nn.Sequential(*layers)
    network = pathlift.capture(model, (2,))
    norm = pathlift.path_norm(network)
    assert norm.value == math.inf
    assert norm.log10 == pytest.approx(math.log10(4) + 999 * math.log10(6) + math.log10(3), rel=1e-9)
    assert norm.log10_scale > 700
    assert torch.isfinite(norm.per_output).all()
    assert float(norm.per_output.sum()) * 1.0 == pytest.approx(10 ** (norm.log10 - norm.log10_scale), rel=1e-4)
    scores = pathlift.path_magnitude(network)
    assert all(torch.allclose(score, torch.full((2, 2), 0.25)) for score in scores.values())
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned[1000].weight[0, 0] = 0
    metric = pathlift.path_metric(network, pruned.state_dict())
    truth = Decimal(6**999 * 3).log10()
    assert metric.exact
    assert Decimal(metric.log10_lower) <= truth <= Decimal(metric.log10_upper)
    assert metric.log10_upper - metric.log10_lower < 1e-10


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_extreme_weights_that_compensate_in_float32(factor: float) -> None:
    """Neurons rescaled by 1e±30, alternately: the function and the path-norm do not change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    other = copy.deepcopy(model)
    factors = torch.tensor([factor, 1, 1 / factor, 1, factor, 1 / factor])
    with torch.no_grad():
        other[0].weight.mul_(factors[:, None]), other[0].bias.mul_(factors), other[2].weight.div_(factors)
        turned = factors.flip(0)
        other[2].weight.mul_(turned[:, None]), other[2].bias.mul_(turned), other[4].weight.div_(turned)
    finite = all(bool(torch.isfinite(p).all()) for p in other.parameters())
    if not finite:
        with pytest.raises(pathlift.NumericalError):
            pathlift.path_norm(other, (4,))
        return
    assert pathlift.path_norm(other, (4,)).value == pytest.approx(pathlift.path_norm(model, (4,)).value, rel=1e-4)
    before, after = pathlift.path_magnitude(model, (4,)), pathlift.path_magnitude(other, (4,))
    for name in before:
        assert torch.allclose(before[name], after[name], rtol=1e-4, atol=1e-9), name


def test_scores_of_subnormal_weights_are_finite_and_right() -> None:
    """w = 1e-40 next to 1e38 in float32: share/w leaves float32's range, the share itself does not."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1e-40), model[1].weight.fill_(1e38)
    scores = pathlift.path_magnitude(model, (1,))
    assert all(score.item() == pytest.approx(1.0, rel=1e-4) for score in scores.values())


def test_weights_of_one_magnitude_far_from_one() -> None:
    for size in (1e-30, 1e30):
        model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(8)))
        for layer in model:
            nn.init.constant_(layer.weight, size)
        assert pathlift.path_norm(model, (3,)).log10 == pytest.approx(8 * math.log10(size) + 9 * math.log10(3), rel=1e-6)


@pytest.mark.search
def test_resnet152_agrees_with_float64_and_one_pruned_weight_has_its_value() -> None:
    model = trained_like("resnet152")
    network = pathlift.capture(model, SHAPE)
    norm, wide = pathlift.path_norm(network), pathlift.path_norm(copy.deepcopy(model).double(), SHAPE)
    assert norm.log10 > 100
    assert norm.log10 == pytest.approx(wide.log10, abs=4e-5)
    scores = pathlift.path_magnitude(network)
    name = "layer3.20.conv2.weight"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    index = int(scores[name].flatten().argsort()[5])
    state[name].view(-1)[index] = 0
    metric = pathlift.path_metric(network, state)
    share = math.log10(float(scores[name].flatten()[index]))
    assert metric.exact
    assert metric.log10_upper == pytest.approx(norm.log10 + share, abs=1e-4)
    assert metric.log10_lower == pytest.approx(metric.log10_upper, abs=1e-9)


@pytest.mark.hunt
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_metric_of_a_pruned_resnet_is_enclosed_to_nine_digits_whatever_the_precision(dtype: torch.dtype) -> None:
    model = trained_like("resnet18").to(dtype)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in pruned.parameters():
            if parameter.dim() > 1:
                parameter[parameter.abs() < parameter.abs().mean()] = 0
    metric, wide = (pathlift.path_metric(*pair, SHAPE) for pair in ((model, pruned), doubled(model, pruned)))
    assert metric.exact
    assert metric.lower <= wide.upper
    assert wide.lower <= metric.upper
    assert metric.ratio < 1 + 1e-9


def doubled(*models: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(copy.deepcopy(model).double() for model in models)


def test_half_precision_is_computed_in_float32() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        back = copy.deepcopy(half).float()
        assert pathlift.path_norm(half, (1, 6, 6)).value == pytest.approx(pathlift.path_norm(back, (1, 6, 6)).value, rel=1e-6)
        assert pathlift.path_magnitude(half, (1, 6, 6))["0.weight"].dtype == torch.float32


def test_the_differentiable_path_norm_has_the_scores_as_its_gradient() -> None:
    """∂ ln‖Φ‖₁/∂θ_i·θ_i is the share of θ_i."""
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    network = pathlift.capture(model, (3,))
    loss = pathlift.log_path_norm(network, model)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(pathlift.path_norm(network).value), rel=1e-9)
    for name, share in pathlift.path_magnitude(network).items():
        parameter = dict(model.named_parameters())[name]
        assert torch.allclose(parameter.grad * parameter, share, rtol=1e-9)


def test_training_with_the_regulariser_sees_the_current_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2))
    network = pathlift.capture(model, (1, 4, 4))
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    values = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = pathlift.log_path_norm(network, model)
        loss.backward()
        optimiser.step()
        values.append(pathlift.path_norm(network).value)
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(pathlift.path_norm(copy.deepcopy(model), (1, 4, 4)).value, rel=1e-6)


def test_the_reference_is_exact_in_rationals() -> None:
    """x ↦ 1/3·relu(2/7·x + 1/5) − 1/11·x, k-max-pooling included, in exact fractions."""
    third, bias = Fraction(1, 3), Fraction(1, 5)
    from pathlift.reference import Bias

    neurons = (
        Neuron("x", "input"),
        Neuron("h", "slopes", (Edge(0, Fraction(2, 7)),), (Bias(bias),)),
        Neuron("m", "pool", (Edge(1, third), Edge(0, Fraction(-1, 11)), Edge(0, Fraction(1, 13))), k=2),
    )
    dag = Dag(neurons, (2,))
    paths = dag.paths()
    assert sum(abs(p.phi) for p in paths) == third * Fraction(2, 7) + third * bias + Fraction(1, 11) + Fraction(1, 13)
    for x in (Fraction(-3), Fraction(1, 2), Fraction(9)):
        states = dag.states([x])
        found = sum(p.phi * dag.activation(p, states) * (x if p.bias is None else 1) for p in paths)
        assert found == states[2].value == sorted([third * max(0, Fraction(2, 7) * x + bias), -x / 11, x / 13])[1]
