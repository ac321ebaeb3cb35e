"""No axis is taken for another: random networks that move neurons about between all their layers, and each edge map alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from torch import Tensor, nn
from torch.func import functional_call

import pathlift
from agreement import assert_agrees, assert_same, examples, moved, outputs, perturbed, randomised
from axes import all_kinds, assert_terms_respect_axes, kinds
from cases import OPERATORS
from habit import LONGER
from moving import Function, Shape, Stage, as_path_program, moving_networks
from networks import over
from pathlift.edges.window import Averages
from pathlift.graph.compact import compacted
from pathlift.reference import Probe
from pathlift.reference.dag import TooManyPathsError


def prepared(model: nn.Module, seed: int) -> nn.Module:
    """Weights drawn anew. Batch norms have t = β − μ·s with terms of one sign, so that the path program may add them."""
    model = randomised(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.abs_().neg_()
                if module.affine:
                    module.running_mean.zero_()
    return model


def program(model: nn.Module, state: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """Run the path program in plain PyTorch: |θ|, ones, and no nonlinearities."""
    own = {
        name: tensor if name.endswith(("running_mean", "running_var", "tracked")) else tensor.abs()
        for name, tensor in state.items()
    }
    with as_path_program():
        return functional_call(model, own, tuple(torch.ones_like(x) for x in inputs))


def assert_is_program(network: pathlift.Network, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Compare norm, shares, units, gradient and the cost of pruning with the path program's value and gradient."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        state[name].requires_grad_()
    out = program(model, state, inputs)
    whole, norm = out.sum(), pathlift.path_norm(network)
    size = float(whole.detach())
    torch.testing.assert_close(norm.per_output.double(), out.detach().reshape(norm.per_output.shape), rtol=1e-9, atol=1e-300)
    if whole == 0 or not names:
        return
    slopes = torch.autograd.grad(whole, [state[name] for name in names], allow_unused=True)
    shares = pathlift.path_magnitude(network)
    for name, slope in zip(names, slopes, strict=True):
        expected = torch.zeros_like(state[name]) if slope is None else (slope * state[name]).detach() / whole.detach()
        torch.testing.assert_close(shares[name], expected, rtol=1e-8, atol=1e-14)
    pruned = {name: tensor.detach() for name, tensor in perturbed(model, "pruned").state_dict().items()}
    metric = pathlift.path_metric(network, pruned)
    cost = float((out - program(model, pruned, inputs)).sum().detach())
    assert metric.exact
    assert math.isclose(metric.value, cost, rel_tol=1e-8, abs_tol=1e-9 * size), (metric, cost)
    for parameter in model.parameters():
        parameter.grad = None
    loss = pathlift.log_path_norm(network, model)
    loss.backward()
    assert math.isclose(loss.item(), math.log(size), rel_tol=1e-9, abs_tol=1e-9)
    for name, parameter in model.named_parameters():
        slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad * parameter
        torch.testing.assert_close(slope.detach(), shares[name], rtol=1e-8, atol=1e-14)


def assert_units_add_up(network: pathlift.Network, model: nn.Module) -> None:
    """What goes through a unit goes through its weights or starts at its bias."""
    shares, units = pathlift.path_magnitude(network), pathlift.unit_path_magnitude(network)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for name, module in model.named_modules():
        if name in units and isinstance(module, kinds):
            expected = shares[f"{name}.weight"].flatten(1).sum(1)
            expected = expected if module.bias is None else expected + shares[f"{name}.bias"]
            torch.testing.assert_close(units[name].double(), expected.double(), rtol=1e-8, atol=1e-14)


def assert_bounds_hold(network: pathlift.Network, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """A bound is not below the change of the output, and rescaling changes none."""
    x = 3 * inputs[0]
    for how in ("pruned", "moved"):
        other = perturbed(model, how)
        change = (outputs(model, (x,)) - outputs(other, (x,))).abs()
        for kind in ("per_input", "pivot"):
            bound = pathlift.lipschitz_bound(network, other, x, kind=kind).detach()
            bound = bound.reshape(len(bound), -1) if bound.dim() > 1 else bound.reshape(-1, 1)
            assert bool((bound.double() >= change * (1 - 1e-9) - 1e-12).all()), (how, kind)
    groups = pathlift.symmetries(network)
    state = groups.randomize((1, 128, 4096), torch.Generator().manual_seed(0))
    twin = pathlift.rescaling.with_state(model, state)
    before = outputs(model, (x,))
    torch.testing.assert_close(outputs(twin, (x,)), before, rtol=1e-9, atol=1e-9 * float(before.abs().max()))
    assert math.isclose(pathlift.path_metric(network, state).upper, 0.0, abs_tol=1e-9 * pathlift.path_norm(network).value)


def test_a_convolution_sees_each_band_of_a_normalisation_that_stood_across_space() -> None:
    """Bands are moved to the channels, scaled each by its own number, and moved back: Σ |w| over what each position reads."""
    for layer in (nn.BatchNorm2d(6), nn.PReLU(6)):
        convolution = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        turn = Stage(lambda x: x.transpose(1, 3))
        model = randomised(nn.Sequential(turn, layer, turn, convolution))
        if isinstance(layer, nn.PReLU):
            bands = 1 + layer.weight.abs()
        else:
            scale = layer.weight / torch.sqrt(layer.running_var + layer.eps)
            bands = scale.abs() + (layer.bias - layer.running_mean * scale).abs()
        expected = F.conv2d(bands.expand(1, 1, 8, 6), convolution.weight.abs(), padding=1)[0].detach()
        torch.testing.assert_close(pathlift.path_norm(model, (1, 8, 6)).per_output, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y[:, :2],
        lambda y: y.chunk(2, 1)[0],
        lambda y: y.unsqueeze(2).squeeze(2)[:, :2],
        lambda y: y.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)[:, ::2],
    ],
)
def test_a_view_of_a_strided_slice_begins_where_the_slice_does(view: Function) -> None:
    """Channels weigh 1, 10, 100, …: every second one from the second on, and then the first two of these, are 10 + 1000."""
    model = nn.Sequential(nn.Conv2d(1, 8, 1, bias=False), Stage(lambda y: view(y[:, 1::2])), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(10.0 ** torch.arange(8).view(8, 1, 1, 1)), model[2].weight.fill_(1.0)
    expected = model(torch.ones(1, 1, 2, 3))[0].detach()
    assert torch.equal(pathlift.path_norm(model, (1, 2, 3)).per_output.float(), expected)
    shares = pathlift.path_magnitude(model, (1, 2, 3))["0.weight"].flatten() * expected[0, 0, 0]
    torch.testing.assert_close(shares, torch.tensor([0.0, 10, 0, 1000, 0, 0, 0, 0]))


def test_what_is_kept_with_a_network_does_not_depend_on_the_state_of_the_process() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(60, 2)))
    plain, network = pathlift.capture(model, (2, 10, 8)), pathlift.capture(model, (2, 10, 8))
    with torch.inference_mode():
        shares = pathlift.path_magnitude(network)
    for name, share in pathlift.path_magnitude(plain).items():
        torch.testing.assert_close(shares[name].clone(), share)
    sizes = [[layer.shape for layer in compacted(one).layers] for one in (network, plain)]
    assert sizes[0] == sizes[1]
    coarse = pathlift.capture(model, (2, 10, 8))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert pathlift.path_norm(coarse).value == pathlift.path_norm(plain).value
    finally:
        torch.set_default_dtype(torch.float32)


def _against_the_program(model: nn.Module, shape: Shape, weights: int) -> None:
    model, inputs = prepared(model, weights), examples(shape)
    network = pathlift.capture(model, inputs)
    assert_terms_respect_axes(network, weights)
    assert_is_program(network, model, inputs)
    assert_same(network, moved(network), 1e-10)
    assert_units_add_up(network, model)
    assert_bounds_hold(network, model, inputs)


def _against_the_paths(model: nn.Module, shape: Shape, weights: int) -> None:
    model, inputs = randomised(model, weights), examples(shape)
    assume(Probe(model, *inputs).dag().count() < 4_000)
    try:
        assert_agrees(model, inputs, limit=20_000)
    except TooManyPathsError:
        assume(False)


@pytest.mark.one_in(48)
@pytest.mark.hunt_one_in(8)
@pytest.mark.parametrize("part", range(21 * LONGER))
def test_moving_networks_agree_with_the_path_program_in_plain_pytorch(part: int) -> None:
    over(moving_networks(stages=(2, 6), most=150), 0, part, _against_the_program, 5)


@pytest.mark.one_in(48)
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("part", range(21 * LONGER))
def test_moving_networks_agree_with_the_paths(part: int) -> None:
    over(moving_networks(stages=(1, 3), most=36), 1_000, part, _against_the_paths, 4)


MAPS = (
    "conv2d strided padded", "batch_norm", "maximum of two", "max_pool2d after a border of minus infinity", "avg_pool2d padded",
    "avg_pool2d padded, pad not counted", "mean", "permute", "slice", "col2im", "upsample bilinear", "einsum", "linear",
)  # fmt: skip
"""Operators that have every kind of edge map among them."""


class Walled(nn.Module):
    """A maximum over neurons among which −inf stands."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x.masked_fill(torch.eye(4, 3, dtype=torch.bool), -math.inf), 2, 1)


@pytest.mark.hunt
def test_every_kind_of_edge_map_respects_all_axes() -> None:
    """A new kind of map needs a line here: its compact form has to be the map itself, whatever is stored once below it."""
    operators = [(case.make().op, case.shape) for case in OPERATORS if case.name in MAPS]
    assert len(operators) == len(MAPS)
    found = set()
    for index, (operator, shape) in enumerate([*operators, (Walled(), (2, 4, 3))]):
        network = pathlift.capture(randomised(operator, index), examples(shape))
        assert_terms_respect_axes(network, index, draws=20)
        found |= kinds(network) | kinds(compacted(network))
    assert found | {Averages} == all_kinds()  # these are made of compact networks alone: tests/test_averaged.py
