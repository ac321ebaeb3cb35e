"""What activations look like without data (mathematics §9): exact where it can be, close to what is drawn elsewhere."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from cases import NETWORKS, OPERATORS, Case, Fn
from pathlift.compensation.damping import factor_from_behind
from pathlift.statistics import activation_model, cholesky, covariances, input_moments
from pathlift.statistics.channels import channel_dims
from pathlift.statistics.covariances import COLOURS, PIXEL
from pathlift.statistics.input_moments import FLOOR, SINGLE, positive
from pathlift.statistics.kinks import Kink, hermite, largest_of_equal, respond
from pathlift.statistics.measure import RARE
from pathlift.statistics.model import DOUBT, Correlations

CASES = [case for case in NETWORKS + OPERATORS if "norm" not in case.name and case.name != "residual"]
FACTORS = (1, 128, 2**-5, 2, 4096)


def network_of(model: nn.Module, shape: tuple[int, ...]) -> pathlift.Network:
    return pathlift.capture(model.double().eval(), shape)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def kink_of(*parts: float) -> Kink:
    """A kink from slopes and breakpoints in turn, through (first breakpoint, value)."""
    slopes, points = [number(part) for part in parts[::2]], [number(part) for part in parts[1:-1:2]]
    return Kink(tuple(points), tuple(slopes), number(0.0), len(slopes) - 1)


KINKS = {
    "relu": kink_of(0.0, 0.0, 1.0),
    "leaky": kink_of(0.25, 0.0, 1.0),
    "absolute": kink_of(-1.0, 0.0, 1.0),
    "clamp": kink_of(0.0, -0.5, 1.0, 1.5, 0.0),
}


def by_quadrature(function: Callable[[Tensor], Tensor], mean: float, deviation: float) -> float:
    """E f(μ + σg) by a fine trapezoidal rule."""
    g = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    weight = torch.exp(-g * g / 2) * (24 / 400_000) / math.sqrt(2 * math.pi)
    return float((function(mean + deviation * g) * weight).sum())


@pytest.mark.parametrize("name", KINKS)
@pytest.mark.parametrize("mean", [-3.0, -0.2, 0.0, 1.4, 6.0])
def test_a_kink_of_a_gaussian_has_the_moments_of_its_integral(name: str, mean: float) -> None:
    kink, deviation = KINKS[name], 0.7
    response = respond(kink, number(mean), number(deviation**2))
    first = by_quadrature(kink, mean, deviation)
    assert float(response.mean) == pytest.approx(first, abs=1e-8)
    assert float(response.variance) == pytest.approx(by_quadrature(lambda z: (kink(z) - first) ** 2, mean, deviation), abs=1e-8)
    slope = by_quadrature(lambda z: ((kink(z + 1e-6) - kink(z - 1e-6)) / 2e-6) ** 2, mean, deviation)
    assert float(response.gain) == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("name", KINKS)
def test_hermite_coefficients_are_those_of_the_integral(name: str) -> None:
    kink, mean, deviation = KINKS[name], 0.3, 0.7
    polynomials = [lambda g: g, lambda g: g**2 - 1, lambda g: g**3 - 3 * g, lambda g: g**4 - 6 * g**2 + 3]
    for order, (found, he) in enumerate(zip(hermite(kink, number(mean), number(deviation**2), 4), polynomials, strict=True), 1):
        expected = by_quadrature(lambda z, he=he: kink(z) * he((z - mean) / deviation), mean, deviation)
        assert float(found) == pytest.approx(expected / math.sqrt(math.factorial(order)), abs=1e-8)


def test_many_deviations_away_from_a_kink_nothing_cancels() -> None:
    """ReLU of a pre-activation that is always positive leaves its variance as it is."""
    response = respond(KINKS["relu"], number(1e8), number(1.0))
    assert float(response.variance) == pytest.approx(1.0, rel=1e-9)
    assert float(response.mean) == 1e8


@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
def test_the_largest_of_equicorrelated_gaussians_is_that_of_samples(rho: float) -> None:
    generator = torch.Generator().manual_seed(0)
    common, own = torch.randn(200_000, 1, generator=generator), torch.randn(200_000, 9, generator=generator)
    z = 0.3 + 1.7 * (math.sqrt(rho) * common + math.sqrt(1 - rho) * own)
    for kink, largest in ((None, True), (None, False), (KINKS["relu"], True)):
        drawn = z.amax(1) if largest else z.amin(1)
        drawn = drawn if kink is None else kink(drawn.double())
        mean, variance = largest_of_equal(kink, number(0.3), number(1.7**2), number(rho), 9, largest=largest)
        assert float(mean) == pytest.approx(float(drawn.mean()), abs=0.02)
        assert float(variance) == pytest.approx(float(drawn.var()), rel=0.02)


FIRST_LAYERS = {
    "conv": nn.Conv2d(3, 4, 3, padding=1),
    "strided conv": nn.Conv2d(3, 4, (3, 2), stride=2, padding=(2, 1)),
    "dilated conv": nn.Conv2d(3, 4, 3, padding=2, dilation=2),
    "grouped conv": nn.Conv2d(3, 6, 3, groups=3),
    "same conv": nn.Conv2d(3, 4, (2, 4), padding="same"),
    "transposed conv": nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
    "grouped transposed conv": nn.ConvTranspose2d(3, 6, 3, stride=2, groups=3, dilation=2),
    "linear": nn.Linear(8, 5),
    "flat linear": nn.Sequential(nn.Flatten(), nn.Linear(192, 5)),
    "average pool": nn.AvgPool2d(3, 2, 1),
    "mean": Fn(lambda x: x.mean((2, 3))),
    "sum of channels": Fn(lambda x: x.sum(1)),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "padded": nn.ZeroPad2d(2),
    "itself taken away": Fn(lambda x: torch.add(x, x, alpha=-0.25)),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", FIRST_LAYERS)
def test_one_affine_layer_of_independent_inputs_is_exact(name: str) -> None:
    """Of independent inputs, mean and variance of each channel over inputs and positions are those of samples."""
    torch.manual_seed(0)
    layer = FIRST_LAYERS[name].double()
    network = network_of(layer, (3, 8, 8))
    shape = network.layers[0].shape
    mean, variance = (torch.rand(1, 3, 1, 1, dtype=torch.float64) + low for low in (-0.5, 0.5))
    model = activation_model(network, moments={network.layers[0].name: (mean, variance)}, correlation=0.0)
    x = mean + variance.sqrt() * torch.randn(4000, *shape[1:], dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
    found = model.steps[network.outputs[0]].moments
    channel = model.propagation.channels[network.outputs[0]]
    rest = [0, *(dim for dim in range(1, y.dim()) if dim != channel)]
    full = found.mean.expand(1, *y.shape[1:])
    between = (full - full.mean(rest, keepdim=True)).square().mean(rest)
    scale = float(y.var())
    torch.testing.assert_close(full.mean(rest), y.mean(rest), rtol=0, atol=0.06 * math.sqrt(scale))
    expected = y.var(rest)
    torch.testing.assert_close(
        found.variance.expand(1, *y.shape[1:]).mean(rest) + between, expected, rtol=0.09, atol=0.01 * scale
    )


@pytest.mark.parametrize("name", ["conv", "strided conv", "dilated conv", "same conv"])
def test_second_moments_of_the_first_layer_are_those_of_windows(name: str) -> None:
    """H is E u·uᵀ of all windows, zero padding included."""
    torch.manual_seed(0)
    layer = FIRST_LAYERS[name].double()
    assert isinstance(layer, nn.Conv2d)
    network = network_of(layer, (3, 8, 8))
    mean, variance = (torch.rand(1, 3, 1, 1, dtype=torch.float64) + low for low in (-0.5, 0.5))
    model = activation_model(network, moments={network.layers[0].name: (mean, variance)}, correlation=0.0)
    moments = input_moments(model, "weight")
    x = mean + variance.sqrt() * torch.randn(3000, 3, 8, 8, dtype=torch.float64)
    ones = torch.nn.functional.pad(x, (1, 2, 0, 1)) if name == "same conv" else x
    padding = (0, 0) if name == "same conv" else layer.padding
    windows = (
        F.unfold(ones, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2).reshape(-1, moments.shape[2])
    )
    torch.testing.assert_close(moments.mean[0], windows.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(moments.second[0], windows.T @ windows / len(windows), rtol=0, atol=0.03)
    torch.testing.assert_close(moments.diagonal[0], moments.second[0].diagonal())
    assert moments.following == "bias"
    assert torch.equal(moments.split(layer.weight.detach())[0], layer.weight.detach().reshape(4, -1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.one_in(24)
@pytest.mark.hunt_one_in(6)
def test_moments_and_sensitivities_follow_a_rescaling_bit_for_bit(case: Case) -> None:
    torch.manual_seed(0)
    network = network_of(case.make(), case.shape)
    state = pathlift.symmetries(network).randomize(FACTORS, 1)
    other = replace(network, state={name: state[name] for name in network.state})
    assert_follows(network, other, "taps", 0.0)
    for doubt in (0.0, DOUBT):
        assert_follows(network, other, "channels", doubt)


def assert_follows(network: pathlift.Network, other: pathlift.Network, correlations: Correlations, doubt: float) -> None:
    """m → λm, v → λ²v, g → g/λ² with λ a power of two for each neuron."""
    before, after = (activation_model(each, correlations=correlations, doubt=doubt) for each in (network, other))
    for name, step in before.steps.items():
        shape = network.layer[name].shape
        mean, variance = (x.expand(shape) for x in (step.moments.mean, step.moments.variance))
        new_mean, new_variance = (x.expand(shape) for x in (after.steps[name].moments.mean, after.steps[name].moments.variance))
        ratio = torch.where(mean != 0, new_mean / mean, 1.0)
        ratio = torch.where(variance > 0, (new_variance / variance).sqrt(), ratio)
        assert bool((torch.frexp(ratio)[0] == 0.5).all())
        assert torch.equal(mean * ratio, new_mean)
        assert torch.equal(variance * ratio**2, new_variance)
        if bool((variance > 0).all()):  # what is always 0 does not tell its factor
            assert torch.equal(before.sensitivity[name], after.sensitivity[name] * _at(ratio, after.sensitivity[name]) ** 2)


def _at(ratio: Tensor, like: Tensor) -> Tensor:
    """The factor of each class of neurons."""
    for dim, size in enumerate(like.shape):
        ratio = ratio.narrow(dim, 0, size) if size == 1 else ratio
    return ratio


# ---------------------------------------------------------------------------------------------------- correlated channels


@functools.cache
def images(count: int, side: int) -> Tensor:
    """Gaussian images with the correlations that the propagation starts from."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(side, dtype=torch.float64)
    pixels = torch.linalg.cholesky(PIXEL ** (steps[:, None] - steps).abs())
    colours = torch.linalg.cholesky(torch.tensor(COLOURS, dtype=torch.float64))
    white = torch.randn(count, 3, side, side, dtype=torch.float64, generator=generator)
    return torch.einsum("ab,nbhw,ph,qw->napq", colours, white, pixels, pixels)


def windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What each output position of a convolution reads, one row each."""
    options = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return F.unfold(x, *options).transpose(1, 2).reshape(-1, layer.weight[0].numel() * layer.groups)


def test_a_first_layer_of_correlated_inputs_is_exact() -> None:
    """H of the first layer, and all correlations behind it, are those of images with the correlations that it starts from."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(first, second).double()
    activations = activation_model(network_of(model, (3, 13, 13)), correlations="channels")
    x = images(3000, 13)
    with torch.no_grad():
        for layer, name, inputs in ((first, "0.weight", x), (second, "1.weight", first(x))):
            rows = windows(layer, inputs)
            expected = rows.T @ rows / len(rows)
            error = (input_moments(activations, name).second[0] - expected).norm() / expected.norm()
            assert float(error) < 0.03
        output = model(x)
    variance = activations.steps[activations.network.outputs[0]].moments.variance.reshape(-1)
    torch.testing.assert_close(variance, output.var((0, 2, 3)), rtol=0.1, atol=0)


DEEP = {
    "1x1 after relu": lambda: [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1)],
    "3x3 after relu": lambda: [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)],
    "behind a depthwise layer": lambda: [
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 6, 1),
    ],
    "behind groups": lambda: [
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 1),
    ],
    "behind average pooling": lambda: [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 6, 3)],
    "behind a mean over all positions": lambda: [
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6),
    ],
    "flattened": lambda: [nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6)],
    "behind bilinear interpolation": lambda: [
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 6, 3),
    ],
    "behind nearest interpolation": lambda: [
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 6, 3),
    ],
    "behind a permutation of channels": lambda: [
        nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.1), nn.ChannelShuffle(4), nn.Conv2d(8, 6, 1),
    ],
    "behind a concatenation": lambda: [
        nn.Conv2d(3, 8, 3, padding=1), Fn(lambda x: torch.cat([x, x.relu()], 1)), nn.Conv2d(16, 6, 1),
    ],
}  # fmt: skip


@pytest.mark.one_in(3)
@pytest.mark.parametrize("full", [covariances.FULL, 4], ids=["", "wide"])
@pytest.mark.parametrize("name", DEEP)
def test_correlations_behind_a_kink_are_close_to_those_of_images(name: str, full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of H off the diagonal are those of samples, nearly; what leaves cross-covariances out is further off."""
    monkeypatch.setattr(covariances, "FULL", full)
    torch.manual_seed(0)
    layers = DEEP[name]()
    model = nn.Sequential(*layers).double()
    activations = activation_model(network_of(model, (3, 16, 16)), correlations="channels")
    moments = input_moments(activations, f"{len(layers) - 1}.weight")
    with torch.no_grad():
        u = model[:-1](images(500, 16))
        rows = windows(layers[-1], u) if isinstance(layers[-1], nn.Conv2d) else u
    expected = rows.T @ rows / len(rows)
    off = ~torch.eye(len(expected), dtype=torch.bool)
    agreement = float(torch.corrcoef(torch.stack([moments.second[0][off], expected[off]]))[0, 1])
    assert agreement > (0.6 if "concatenation" in name else 0.9)


SEPARABLE = {
    "1x1": lambda: [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 5, 3)],
    "average pooling": lambda: [nn.Conv2d(3, 6, 1), nn.AvgPool2d(2), nn.Conv2d(6, 5, 3)],
    "a mean over all positions": lambda: [nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)],
    "a permutation": lambda: [nn.Conv2d(3, 6, 1), nn.ChannelShuffle(2), nn.Conv2d(6, 5, 3)],
    "batch norm": lambda: [nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)],
    "a depthwise layer": lambda: [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6, stride=2), nn.Conv2d(6, 5, 1)],
    "groups": lambda: [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(8, 5, 1)],
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_wide_layers_lose_nothing_where_space_and_channels_have_nothing_to_do_with_each_other(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = SEPARABLE[name]()
    network, last = network_of(nn.Sequential(*layers).double(), (3, 8, 8)), f"{len(layers) - 1}.weight"
    found = []
    for full in (covariances.FULL, 0):
        monkeypatch.setattr(covariances, "FULL", full)
        model = activation_model(network, correlations="channels")
        found.append(input_moments(model, last).second)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_wide_layer_behind_a_narrow_one_has_all_correlations_of_channels_with_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The narrow one carries all; what is left out of the wide one is read by no channel of a depthwise layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8)]
    network = network_of(nn.Sequential(*layers).double(), (3, 12, 12))
    found = []
    for full in (covariances.FULL, 4):
        monkeypatch.setattr(covariances, "FULL", full)
        model = activation_model(network, correlations="channels")
        found.append(input_moments(model, "5.weight").second)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("doubt", [0.0, DOUBT])
def test_correlations_follow_a_rescaling_bit_for_bit(doubt: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*DEEP["behind a depthwise layer"]()[:2], nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1))
    network = network_of(model.double(), (3, 9, 9))
    groups = pathlift.symmetries(network)
    factors = groups.randomize(FACTORS, 1)
    other = replace(network, state={name: factors[name] for name in network.state})
    before, after = (activation_model(each, correlations="channels", doubt=doubt) for each in (network, other))
    ratio = groups.weight_factors(factors.factors)
    for name in ("2.weight", "4.weight"):
        own, new = input_moments(before, name), input_moments(after, name)
        scale = own.split(ratio[name])  # λ above over λ below
        below = (scale[:, :1] / scale[:, :1, :1])[:, 0]
        assert torch.equal(own.second * (1 / below[:, :, None]) * (1 / below[:, None, :]), new.second * _unscaled(own, new))


def _unscaled(own: object, new: object) -> Tensor:
    """One over the factor of the first column of each group, squared."""
    first = own.second[:, :1, :1] / new.second[:, :1, :1]
    assert bool((torch.frexp(first)[0] == 0.5).all())
    return first


# ------------------------------------------------------------------------------------------------------------------ doubt


def test_each_weight_adds_the_error_of_independent_errors_of_all_that_it_multiplies() -> None:
    """Var += d·Σ w²·E u², alike at all positions, independent between channels; what the first layer reads has none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.Conv2d(3, 4, 2, bias=False)).double()
    network, told = network_of(model, (2, 6, 6)), torch.tensor([0.5, -1.0], dtype=torch.float64)
    moments = {network.layers[0].name: (told.reshape(1, 2, 1, 1), torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64))}
    plain, doubted = (activation_model(network, moments=moments, correlations="channels", doubt=d) for d in (0.0, 0.2))
    first, second = (tuple(input_moments(each, name) for each in (plain, doubted)) for name in ("0.weight", "1.weight"))
    assert torch.equal(first[0].second, first[1].second)
    error = 0.2 * torch.einsum("oihw,i->o", model[0].weight.detach().square(), 0.3 + told**2)
    own, other = (moments.blocks(centred=True)[0].reshape(3, 4, 3, 4) for moments in second)
    expected = own + torch.diag_embed(error).reshape(3, 1, 3, 1)
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)
    assert (first[1].depth, second[1].depth) == (0, 1)


def test_what_batch_norms_know_is_not_doubted() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    network = network_of(model.eval(), (2, 6, 6))
    plain, doubted = (activation_model(network, correlations="channels", doubt=d) for d in (0.0, DOUBT))
    kept, more = (tuple(input_moments(each, name) for each in (plain, doubted)) for name in ("3.weight", "5.weight"))
    assert torch.equal(kept[0].second, kept[1].second) and torch.equal(kept[0].sensitivity > 0, kept[1].sensitivity > 0)
    assert bool((more[0].diagonal < more[1].diagonal).all())
    assert (kept[1].depth, more[1].depth) == (0, 1)


# ------------------------------------------------------------------------------------------------------------------- data


def test_measured_statistics_are_those_of_the_model_itself() -> None:
    """On batches of any size, mean, variance, activity and correlation of neighbours are those that hooks find."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).double().eval()  # fmt: skip
    x = torch.randn(11, 2, 4, 4, dtype=torch.float64) * 3 + 1
    found = pathlift.activation_statistics(model, (2, 4, 4), data=[x[:3], x[3:8], x[8:]])
    assert found.source == "data"
    values = x
    for layer, statistics in zip([nn.Identity(), *model], found.layers, strict=True):
        below, values = values, layer(values).detach()
        rest = [dim for dim in range(values.dim()) if dim != 1]
        torch.testing.assert_close(statistics.mean, values.mean(rest))
        torch.testing.assert_close(statistics.variance, values.var(rest, unbiased=False))
        if isinstance(layer, nn.ReLU6):
            torch.testing.assert_close(statistics.activity, ((below > 0) & (below < 6)).double().mean(rest))
    norm = found.layers[1]
    assert torch.equal(norm.expected_mean, norm.mean)
    assert found.shift == pytest.approx(float((norm.mean - model[1].running_mean).abs().median()))


@pytest.mark.parametrize("name", ["conv", "strided conv", "dilated conv", "grouped conv", "flat linear"])
@pytest.mark.usefixtures("all_there_is")
def test_measured_second_moments_are_those_of_windows(name: str) -> None:
    """But for what they are shrunk by, see tests/test_shrinkage.py."""
    torch.manual_seed(0)
    layer = FIRST_LAYERS[name].double()
    x = torch.randn(7, 3, 8, 8, dtype=torch.float64) + 0.5
    network = network_of(layer, (3, 8, 8))
    moments = input_moments(activation_model(network, [x[:3], x[3:]], correlations="channels"), network.parameters[0])
    rows = windows(layer, x) if isinstance(layer, nn.Conv2d) else x.flatten(1)
    rows = rows.reshape(len(rows), moments.shape[0], -1)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    expected = torch.einsum("ngc,ngd->gcd", rows, rows) / len(rows)
    if name != "flat linear":  # of few samples: not definite
        floor = torch.diag_embed((moments.second - expected).diagonal(dim1=1, dim2=2))
        torch.testing.assert_close(moments.second - floor, expected)
        assert floor[floor != 0].min() > 0.0 and floor.max() < 2.0 * RARE * moments.diagonal.max()
    torch.testing.assert_close(moments.diagonal, expected.diagonal(dim1=1, dim2=2))


def test_a_batch_norm_tells_moments_before_and_behind_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    norm = model[1]
    for tensor, low in ((norm.weight, -1.0), (norm.bias, -1.0), (norm.running_mean, -1.0), (norm.running_var, 0.1)):
        tensor.data.uniform_(low, 2.0)
    _, before, behind, relu = pathlift.activation_statistics(model, (2, 6, 6)).layers
    assert before.source == behind.source == "batch norm"
    assert torch.equal(before.mean, norm.running_mean)
    assert torch.equal(before.variance, norm.running_var)
    torch.testing.assert_close(behind.mean, norm.bias.detach())
    torch.testing.assert_close(behind.variance, norm.weight.detach() ** 2 * norm.running_var / (norm.running_var + norm.eps))
    torch.testing.assert_close(relu.activity, torch.special.ndtr(behind.mean / behind.variance.sqrt()))
    assert input_moments(activation_model(network_of(model, (2, 6, 6))), "0.weight").following == "0.bias"


# ------------------------------------------------------------------------------------------------------------ sensitivity


def test_sensitivity_with_all_kinks_open_is_the_squared_path_norm_backwards() -> None:
    """Where no kink is ever closed and taps are independent, g is the sum of all squared path weights to the outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    model[0].bias.data.fill_(1e6)
    model[2].bias.data.fill_(1e12)
    statistics = pathlift.activation_statistics(model, (3,))
    expected = torch.ones(2, dtype=torch.float64)
    for layer, weight in ((statistics.layers[3], model[4].weight), (statistics.layers[1], model[2].weight)):
        expected = (weight.detach() ** 2).T @ expected
        torch.testing.assert_close(layer.sensitivity, expected)


def test_a_small_change_of_a_layer_costs_what_sensitivity_and_moments_say() -> None:
    """E‖ΔR‖² ≈ Σ_o g(o)·Δ_oᵀHΔ_o: for a linear layer in front of open kinks it is exact for independent changes of rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    activations = activation_model(network_of(model, (6,)))
    moments = input_moments(activations, "0.weight")
    x = torch.randn(20_000, 6, dtype=torch.float64)
    costs = []
    for seed in range(20):
        change = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1e-4
        with torch.no_grad():
            before = model(x)
            model[0].weight += change
            costs.append(float((model(x) - before).square().sum(1).mean()))
            model[0].weight -= change
        predicted = torch.einsum(
            "gr,grc,gcd,grd->", moments.sensitivity, moments.split(change), moments.second, moments.split(change)
        )
        costs[-1] /= float(predicted)
    assert sum(costs) / len(costs) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(("name", "reason"), [("1.weight", "no rows"), ("0.bias", "bias"), ("nothing", "no parameter")])
def test_what_has_no_rows_and_columns_is_refused_by_name(name: str, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(pathlift.InputError, match=f"{name}.*{reason}|{reason}.*{name}"):
        input_moments(activation_model(network_of(model, (2, 6, 6))), name)


def test_eigenvalues_that_cannot_be_found_and_numbers_out_of_range_are_no_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)

    def fails(_: Tensor) -> None:
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    lifted = positive(matrix)
    assert float(torch.linalg.eigvalsh(lifted).min()) > 0
    with pytest.raises(pathlift.NumericalError, match="leave the range"):
        positive(matrix * torch.nan)


@pytest.mark.parametrize("single", [1024, 2])
def test_a_second_moment_is_positive_definite_whatever_the_scale_of_its_inputs(single: int) -> None:
    matrix = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, -0.9], [0.9, -0.9, 1.0]], dtype=torch.float64)
    lifted = positive(matrix[None].clone(), single)[0]
    assert int(torch.linalg.cholesky_ex(matrix).info) != 0
    for scale in (1.0, 2.0**-40, 2.0**40):
        factor = torch.tensor([1.0, scale, 1.0], dtype=torch.float64)
        found = positive((matrix * factor[:, None] * factor)[None], single)[0]
        assert int(torch.linalg.cholesky_ex(found).info) == 0
        assert torch.equal(found, lifted * factor[:, None] * factor)


# ---- memory


def most_held(call: Callable[[], object]) -> int:
    """Return how many bytes of tensors that a call makes are in memory at once."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(held), default=0)


class Bottleneck(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(channels, 16, 1, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, channels, 1, bias=False),
            nn.BatchNorm1d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


@pytest.mark.parametrize(("full", "distances", "scratch"), [(covariances.FULL, 3, 0), (16, 2, 2)])
def test_correlations_are_in_memory_for_two_layers_at_a_time_whatever_the_depth(
    full: int, distances: int, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers, and of each earlier one what the weight that reads it needs: one distance of three; wide ones carry two."""
    monkeypatch.setattr(covariances, "FULL", full)
    channels = 256
    for depth in (1, 3):
        net = nn.Sequential(nn.Conv1d(3, channels, 1), *[Bottleneck(channels) for _ in range(depth)]).eval()
        network = pathlift.capture(net, (3, 9))
        held = most_held(lambda network=network: activation_model(network, correlations="channels"))  # type: ignore[misc]
        assert held < (scratch + (2.75 + 0.08 * depth) * distances + 1.02 * depth) * channels**2 * 4


def test_a_wide_second_moment_is_in_memory_once_and_is_judged_and_factored_in_its_place() -> None:
    net = nn.Sequential(nn.Conv2d(3, 232, 1, bias=False), nn.ReLU(), nn.Conv2d(232, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    moments = input_moments(activation_model(pathlift.capture(net, (3, 4, 4)), correlations="channels"), "2.weight")
    columns = moments.shape[2]
    assert columns > SINGLE
    assert most_held(moments.covariance) < 1.4 * 4 * columns**2
    covariance = moments.covariance()
    assert covariance.dtype == torch.float32
    assert most_held(lambda: factor_from_behind(covariance, 0.1)) < 0.4 * 4 * columns**2


def test_covariances_that_float32_does_not_hold_stay_in_float64() -> None:
    net = nn.Sequential(nn.Conv1d(3, 600, 1, bias=False), nn.ReLU(), nn.Conv1d(600, 4, 4, bias=False)).eval()
    small = copy.deepcopy(net)
    assert isinstance(small[0], nn.Conv1d)
    small[0].weight.data *= 2.0**-50
    near, exact = (
        input_moments(activation_model(pathlift.capture(model, (3, 6)), correlations="channels"), "2.weight").covariance()
        for model in (net, small)
    )
    assert (near.dtype, exact.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(near.double(), exact * 2.0**100, rtol=1e-5, atol=1e-6)


def test_a_wide_matrix_is_judged_and_factored_as_a_narrow_one_is() -> None:
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 60, generator=source, dtype=torch.float64)
    scale = torch.exp2(torch.randint(-40, 40, (60,), generator=source).double())
    matrix = ((rows.T @ rows) * scale[:, None] * scale)[None]
    lifted = positive(matrix.clone(), single=8)
    unit = scale * (rows.square().sum(0)).sqrt()
    assert torch.equal(lifted.diagonal(dim1=1, dim2=2), matrix.diagonal(dim1=1, dim2=2))
    assert float(torch.linalg.eigvalsh(lifted[0] / unit[:, None] / unit).min()) > 0.9 * FLOOR
    kept = lifted.clone()
    assert torch.equal(positive(lifted, single=8), kept) and torch.equal(positive(kept), kept)
    exact, size, _ = factor_from_behind(kept, 0.1)
    near, same, none = factor_from_behind(kept, 0.1, single=8)
    assert near.dtype == torch.float32 and torch.equal(size, same) and none is None
    torch.testing.assert_close(near.double().triu(), exact, rtol=1e-4, atol=1e-5)
    single = (kept / unit[:, None] / unit).float()
    for given in (single, single * scale.float()[:, None] * scale.float()):
        held = given.clone()
        there, size, diagonal = factor_from_behind(held, 0.1, single=8)
        assert there is held and bool((size == 1.0).all()) and torch.equal(there[0].tril(-1), given[0].tril(-1))
        factor = there[0].double().triu()
        damped = given[0].double() + 0.1 * torch.diag(given[0].double().diagonal())
        size = damped.diagonal().sqrt()
        made, wanted = (product / size[:, None] / size for product in (factor @ factor.T, damped))
        torch.testing.assert_close(made, wanted, rtol=0.0, atol=1e-5)
        assert diagonal is not None
        cholesky.mirrored_(there[0], diagonal[0])
        assert torch.equal(there[0].tril(), given[0].tril()) and torch.equal(there[0], there[0].T)
    indefinite = torch.tensor([[[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64) * 1e9
    indefinite[0, 0, 1] = indefinite[0, 1, 0] = 1e12
    for single in (2048, 2):
        with pytest.raises(pathlift.NumericalError, match="not positive semi-definite"):
            factor_from_behind(indefinite, 0.1, single=single)


@pytest.mark.parametrize("columns", [5, 16, 37])
def test_a_factor_in_place_is_the_factor(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "PANEL", 8)
    rows = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
    matrix = rows.T @ rows
    made = matrix.clone()
    assert cholesky.factored_from_behind_(made)
    torch.testing.assert_close(made.triu(), torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1))
    assert torch.equal(made.tril(-1), matrix.tril(-1))
    cholesky.mirrored_(made, matrix.diagonal())
    assert torch.equal(made.tril(), matrix.tril()) and torch.equal(made, made.T)
    matrix[0, 0] = -1.0
    assert not cholesky.factored_from_behind_(matrix)


class Permuted(nn.Module):
    """A network whose inputs have their dimensions in another order."""

    def __init__(self, net: nn.Module, order: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.order = net, order

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.permute(self.order))
        return out


def of_images() -> nn.Module:
    convolutions = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def of_sounds() -> nn.Module:
    return nn.Sequential(nn.Conv1d(5, 6, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 4, 3), nn.Flatten())


@pytest.mark.parametrize(
    "resized", [nn.Upsample(scale_factor=2, mode="bilinear"), nn.AdaptiveAvgPool2d(4), nn.Upsample(scale_factor=2)]
)
def test_what_resizes_an_image_says_nothing_of_its_channels(resized: nn.Module) -> None:
    model = nn.Sequential(resized, nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    network = network_of(model, (3, 8, 8))
    assert channel_dims(network)["input"] == 1
    assert input_moments(activation_model(network), "1.weight").shape == (1, 4, 27)


def test_an_assignment_of_one_number_leaves_the_channels_where_they_are() -> None:
    def assigned(x: Tensor) -> Tensor:
        y = x * 1.0
        y[:, [0]] = x[:, -1:]
        return y

    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), Fn(assigned), nn.Linear(5, 2))
    pruned, report = pathlift.prune(model, (5,), 0.5, selection="channels")
    network = network_of(model, (5,))
    assert [channel_dims(network)[layer.name] for layer in network.layers if not layer.shape] == [None]
    assert report.cost == pytest.approx(pathlift.path_metric(model, pruned, (5,)).value)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kernel", [(1, 7), (7, 1), (2, 5), (5, 2)], ids=str)
def test_kernels_reach_further_along_one_dimension_than_along_the_other(kernel: tuple[int, int]) -> None:
    torch.manual_seed(0)
    first, strip, square = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, kernel), nn.Conv2d(3, 4, max(kernel))
    height, width = kernel
    with torch.no_grad():  # the same taps among zeros
        square.weight.zero_()
        square.weight[:, :, :height, :width] = strip.weight
    networks = (network_of(nn.Sequential(first, nn.ReLU(), own, nn.Flatten()), (3, 12, 12)) for own in (strip, square))
    found, dense = (input_moments(activation_model(each, correlations="channels"), "2.weight") for each in networks)
    taps = (square.weight[0] != 0).flatten()
    own, whole = (
        moments._uses[0].second(slice(None), slice(None)) for moments in (found, dense)
    )  # before eigenvalues are lifted
    assert torch.allclose(own, whole[:, taps][:, :, taps], rtol=1e-5, atol=1e-7)
    assert bool(found.covariance().isfinite().all())


class OfSignals(nn.Module):
    """Makes images, or sounds, of one channel from signals that have none, as networks for audio do."""

    def __init__(self, image: bool) -> None:
        super().__init__()
        kind, side = (nn.Conv2d, (5, 1)) if image else (nn.Conv1d, 5)
        self.image, self.first, self.last = image, kind(1, 4, side), kind(4, 3, side)

    def forward(self, x: Tensor) -> Tensor:
        """Add the channel and a second dimension, and pad as these networks do."""
        x = x[:, None, :, None] if self.image else x.unsqueeze(1)
        border = (0, 0, 2, 2) if self.image else (2, 2)
        for layer in (self.first, self.last):
            x = nn.functional.relu(layer(nn.functional.pad(x, border)))
        return x.flatten(1)


@pytest.mark.parametrize("image", [True, False])
def test_a_signal_without_channels_is_the_one_channel_of_what_is_made_of_it(image: bool) -> None:
    torch.manual_seed(0)
    signals = OfSignals(image)
    layers = (nn.ZeroPad2d((0, 0, 2, 2)) if image else nn.ConstantPad1d(2, 0.0)), signals.first, nn.ReLU()
    plain = nn.Sequential(*layers, layers[0], signals.last, nn.ReLU(), nn.Flatten())
    found, expected = (
        activation_model(network_of(model, shape))
        for model, shape in ((signals, (16,)), (plain, (1, 16, 1) if image else (1, 16)))
    )
    for ours, theirs in (("first", "1"), ("last", "4")):
        moments, wanted = input_moments(found, f"{ours}.weight"), input_moments(expected, f"{theirs}.weight")
        assert torch.equal(moments.mean, wanted.mean) and torch.equal(moments.covariance(), wanted.covariance())
    _, report = pathlift.prune(signals, (16,), 0.5, update="compensate")
    assert report.updated is not None and not report.updated.left


LAST = {"images": (of_images, (3, 9, 8), (0, 3, 1, 2)), "sounds": (of_sounds, (5, 16), (0, 2, 1))}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize("told", [False, True])
def test_a_network_that_reads_channels_last_has_the_moments_of_the_network_behind_its_transpose(name: str, told: bool) -> None:
    make, shape, order = LAST[name]
    net = make().double()
    mean = torch.arange(shape[0], dtype=torch.float64) if told else 0.0
    expected, result = (
        pathlift.quantize(model, of, 4, input_mean=mean)
        for model, of in ((net, shape), (Permuted(net, order), (*shape[1:], shape[0])))
    )
    for one, other in zip(expected[0].state_dict().values(), result[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)
