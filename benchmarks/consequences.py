"""What the bounds say about generalisation and sharpness on real networks (`python benchmarks/consequences.py`)."""

from __future__ import annotations

import torch
from certificates import perceptron, trained
from rich.console import Console
from rich.table import Table

import pathlift
from pathlift.storage.data import load_data

IMAGENET, BRIGHTEST = 1_281_167, 2.64
"""Training images of ImageNet-1k, and the largest magnitude of a normalised pixel."""


def generalisation(console: Console) -> None:
    import torchvision

    table = Table(title="log10 of the bound on the generalisation gap, ImageNet-1k, random weights", title_justify="left")
    for header in ("network", "D", "P", "K", "M", "log10 path-norm", "theorem", "sharpened", "says something?"):
        table.add_column(header, justify="left" if header == "network" else "right")
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None)
        b = pathlift.consequences.generalisation_bound(model, (3, 224, 224), samples=IMAGENET, input_bound=BRIGHTEST)
        counts = [str(value) for value in (b.depth, b.pools, b.kernel, b.pools_on_a_path)]
        numbers = [f"{value:.1f}" for value in (b.log10_path_norm, b.log10_theorem, b.log10_sharpened)]
        table.add_row(name, *counts, *numbers, "no, vacuous" if b.vacuous() else "yes")
    console.print(table)


def sharpness(console: Console) -> None:
    torch.manual_seed(0)
    x, y = load_data("digits", (64,))
    assert y is not None
    subject = trained("", perceptron(64, 16, 10), (x, y), 1297, 30, 500)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    labels = y[order[1297:]][: len(subject.x)]
    table = Table(title="worst-case adaptive sharpness, perceptron 64-16-10 on digits, cross-entropy", title_justify="left")
    for header in ("r", "measured", "per input", "Lemma 4.5"):
        table.add_column(header, justify="right")
    for r in (0.001, 0.01, 0.1):
        found = pathlift.consequences.sharpness(subject.model, subject.x, labels, r)
        table.add_row(str(r), *(f"{value:.3g}" for value in (found.measured, found.per_input, found.lemma)))
    console.print(table)


if __name__ == "__main__":
    generalisation(Console(width=120))
    sharpness(Console(width=120))
