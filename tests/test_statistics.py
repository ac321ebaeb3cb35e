"""What activations look like without data (mathematics §9): exact where it can be, close to what is drawn elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from cases import NETWORKS, OPERATORS, Case, Fn
from pathlift.statistics import activation_model, input_moments
from pathlift.statistics.kinks import Kink, hermite, largest_of_equal, respond

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
@pytest.mark.one_in(4)
def test_moments_and_sensitivities_follow_a_rescaling_bit_for_bit(case: Case) -> None:
    """m → λm, v → λ²v, g → g/λ² with λ a power of two for each neuron."""
    torch.manual_seed(0)
    network = network_of(case.make(), case.shape)
    state = pathlift.symmetries(network).randomize(FACTORS, 1)
    other = replace(network, state={name: state[name] for name in network.state})
    before, after = activation_model(network), activation_model(other)
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
