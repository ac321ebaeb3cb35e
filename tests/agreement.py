"""What every network is checked for: agreement of the fast passes with the enumeration of all paths."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pathlift
from axes import assert_terms_respect_axes
from cases import perceptron
from pathlift.lifting import path_count
from pathlift.reference import Path, Probe

RTOL = 1e-9
"""Models are compared in float64; what is left is rounding."""


def parallel(model: nn.Module) -> nn.Module:
    """A `DataParallel` that leaves its parameters where they are, on a machine with accelerators as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[nn.DataParallel.__module__], "_get_available_device_type", lambda: None)
        return nn.DataParallel(model)


def close(value: float, expected: float, rtol: float = RTOL) -> bool:
    """Whether two non-negative numbers agree to rounding."""
    return math.isclose(value, expected, rel_tol=rtol, abs_tol=1e-300)


def examples(shape: Sequence[int] | Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Random inputs of one or several shapes without batch dimension, in float64."""
    generator = torch.Generator().manual_seed(1)
    shapes = [shape] if isinstance(shape[0], int) else shape
    return tuple(torch.randn(1, *s, generator=generator, dtype=torch.float64) for s in shapes)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and batch-norm statistic anew, with signs, some zeros and no two alike."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Outputs sample by sample (a model may bake its batch size in), flat."""
    rows = []
    for sample_number in range(len(inputs[0])):
        out = model(*(sample[sample_number : sample_number + 1] for sample in inputs))
        rows.append(torch.cat([part.reshape(-1) for part in tree_leaves(out)]))
    return torch.stack(rows).detach()


def samples(shape: tuple[int, ...], scale: float = 2.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(scale * torch.randn(4, *one.shape[1:], generator=generator, dtype=torch.float64) for one in examples(shape))


def random_perceptron(*widths: int) -> nn.Module:
    """A perceptron with weights as `randomised` draws them."""
    return randomised(perceptron(*widths))


def perturbed(model: nn.Module, how: str, seed: int = 3) -> nn.Module:
    """A second network: some weights pruned, all weights grown, or all drawn anew around the old ones."""
    other = pathlift.rescaling.with_state(model, model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            if how == "pruned":
                parameter.mul_(noise > 0.4)
            elif how == "grown":
                parameter.mul_(1 + noise)
            else:
                parameter.add_(2 * (noise - 0.5))
    return other


def assert_agrees(model: nn.Module, inputs: tuple[Tensor, ...], *, pairs: bool = True, limit: int = 30_000) -> int:
    """Check norm, parts, orders, shares, units and metrics of a float64 model against its paths; return their number."""
    probe = Probe(model, *inputs)
    dag = probe.dag()
    paths = dag.paths(limit)
    network = pathlift.capture(model, inputs)
    assert_terms_respect_axes(network, 0)
    cut_off_at_zero = [p for p in paths if p.bias is not None and dag.neurons[p.start].kind == "clamp" and p.phi == 0]
    assert path_count(network)[0] == len(paths) - len(cut_off_at_zero)
    norm = pathlift.path_norm(network)
    total = sum(abs(path.phi) for path in paths)
    assert close(norm.value, total), (norm.value, total)
    assert close(10**norm.log10, total, 1e-8) or total == 0
    _check_outputs(norm, paths, dag.outputs)
    for part, chosen in ((norm.input_part, True), (norm.bias_part, False)):
        expected = sum(abs(path.phi) for path in paths if (path.bias is None) is chosen)
        assert close(part, expected), (chosen, part, expected)
    for q in (2.0, 3.5):
        expected = sum(abs(path.phi) ** q for path in paths) ** (1 / q)
        assert close(pathlift.path_norm(network, q=q).value, expected), q
    assert close(pathlift.path_norm(network, q=math.inf).value, max((abs(path.phi) for path in paths), default=0.0))
    _check_shares(pathlift.path_magnitude(network), paths, total, model)
    if pairs:
        for how in ("pruned", "grown", "moved"):
            _check_metric(network, perturbed(model, how), probe, paths, how)
    return len(paths)


def _check_outputs(norm: pathlift.norm.PathNorm, paths: list[Path], outputs: tuple[int, ...]) -> None:
    norms = norm.per_output.reshape(-1).tolist()
    expected: dict[int, float] = defaultdict(float)
    for path in paths:
        expected[path.end] += abs(path.phi)
    assert len(norms) == len(outputs)
    for output, v in enumerate(outputs):
        assert close(norms[output], expected[v] / outputs.count(v)), output


def _check_shares(scores: pathlift.magnitude.PathMagnitude, paths: list[Path], total: float, model: nn.Module) -> None:
    expected: dict[tuple[str, int], float] = defaultdict(float)
    for path in paths:
        for label in path.labels:
            expected[label] += abs(path.phi)
    for name, score in scores.items():
        flat = score.reshape(-1).tolist()
        for index, share in enumerate(flat):
            mass = expected.pop((name, index), 0.0)
            assert math.isclose(share * total, mass, rel_tol=1e-8, abs_tol=1e-12 * total), (name, index, share)
    assert not any(expected.values()), [label for label, mass in expected.items() if mass][:3]
    parameters = dict(model.named_parameters())
    assert all(scores[name].shape == parameters[name].shape for name in scores if name in parameters)


def _check_metric(network: pathlift.Network, other: nn.Module, probe: Probe, paths: list[Path], how: str) -> None:
    if how == "pruned" and any("temperature" in name for name, _ in other.named_parameters()):
        with pytest.raises(pathlift.NumericalError):  # a division by a pruned parameter
            pathlift.path_metric(network, other)
        return
    theirs = probe.dag(other.state_dict()).paths(2 * len(paths) + 10_000)
    assert len(theirs) == len(paths)
    exact = sum(abs(p.phi - o.phi) for p, o in zip(paths, theirs, strict=True))
    squared = sum((p.phi - o.phi) ** 2 for p, o in zip(paths, theirs, strict=True)) ** 0.5
    metric = pathlift.path_metric(network, other if how == "moved" else other.state_dict(), moments=0)
    slack = 1e-9 * (1e-290 + exact)
    assert metric.lower <= exact + slack and exact <= metric.upper + slack, (how, metric, exact)
    gaps: dict[int, float] = defaultdict(float)
    for p, o in zip(paths, theirs, strict=True):
        gaps[p.end] += abs(p.phi) - abs(o.phi)
    norms = sum(abs(gap) for gap in gaps.values())
    assert abs(metric.lower - norms) <= 1e-6 * (metric.upper + 1e-300), "the lower bound is (6), output by output"
    if metric.exact:
        assert close(metric.value, exact), (how, metric, exact)
    l2 = pathlift.path_metric(network, other.state_dict(), q=2)
    assert l2.lower * (1 - 1e-12) <= squared <= l2.upper * (1 + 1e-12) + 1e-300, (l2, squared)
    assert math.isclose(l2.value, squared, rel_tol=1e-7, abs_tol=1e-12), (l2, squared)


def full(network: pathlift.Network) -> pathlift.Network:
    """The same network, whose passes run on every position."""
    copied = replace(network)
    copied.__dict__["compact"] = copied
    return copied


def assert_same(network: pathlift.Network, other: dict[str, Tensor], rtol: float) -> tuple[float, float]:
    """Check that the compact form of a network gives the numbers of the full one.

    Return the upper bounds of both on the path-metric: the common gauge is fitted to one equation for each neuron stored,
    so they need not be the same where the fit is not exact.
    """
    plain = full(network)
    for q in (1.0, 2.0, math.inf):
        norm, expected = pathlift.path_norm(network, q=q), pathlift.path_norm(plain, q=q)
        assert math.isclose(norm.log10, expected.log10, rel_tol=1e-7, abs_tol=1e-7)
        assert norm.per_output.shape == expected.per_output.shape
        torch.testing.assert_close(norm.per_output, expected.per_output, rtol=rtol, atol=0.0)
    scores, wanted = pathlift.path_magnitude(network), pathlift.path_magnitude(plain)
    units, wanted_units = pathlift.unit_path_magnitude(network), pathlift.unit_path_magnitude(plain)
    assert list(scores) == list(wanted)
    for name in scores:
        torch.testing.assert_close(scores[name], wanted[name], rtol=20 * rtol, atol=1e-20)
    for name in units:
        torch.testing.assert_close(units[name], wanted_units[name], rtol=20 * rtol, atol=1e-20)
    square, expected_square = pathlift.path_metric(network, other, q=2), pathlift.path_metric(plain, other, q=2)
    assert math.isclose(square.value, expected_square.value, rel_tol=10 * rtol)
    metric, reference = (pathlift.path_metric(one, other, moments=0) for one in (network, plain))
    assert math.isclose(metric.lower, reference.lower, rel_tol=10 * rtol, abs_tol=10 * rtol * metric.upper)
    return metric.upper, reference.upper


def moved(network: pathlift.Network) -> dict[str, Tensor]:
    """A second state: weights drawn around the old ones."""
    torch.manual_seed(1)
    return {
        name: tensor * (1 + 0.1 * torch.randn_like(tensor)) if tensor.is_floating_point() else tensor
        for name, tensor in network.state.items()
    }
