"""Regularise by the path-norm, balance as ENorm does, condition by the path kernel, step as Path-SGD does: a few lines each.

Trains a perceptron on scikit-learn's digits by plain SGD and in four ways that know about the rescaling symmetry, from the same
badly rescaled initialisation, and prints test accuracy, path-norm and ‖θ‖₂. The lines that differ are in `prepare`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pathlift
from pathlift.rescaling import Symmetries
from pathlift.rescaling.training import path_sgd, rescale_after_steps, rescale_in_place

mpl.use("Agg")
import matplotlib.pyplot as plt

WAYS = ("plain SGD", "ℓ¹ path-norm regulariser", "ℓ² path-norm regulariser", "balanced (ENorm)", "path-conditioned", "Path-SGD")
Penalty = Callable[[], Tensor]


def prepare(way: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Penalty:
    """Set up one way of training; return what is added to the loss."""
    groups = pathlift.symmetries(model, (64,))
    if way.endswith("regulariser"):
        order = 1 if "ℓ¹" in way else 2
        return lambda: 0.02 * pathlift.log_path_norm(groups.network, model, q=order)
    if way.startswith("balanced"):
        rescale_after_steps(optimizer, groups, Symmetries.balance, every=5)
    if way == "path-conditioned":
        rescale_in_place(groups, groups.condition())
    if way == "Path-SGD":
        path_sgd(optimizer, groups.network)
    return lambda: torch.zeros(())


def main() -> None:
    """Train in all ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--plot", type=Path, default=Path("train_in_a_gauge.png"))
    options = parser.parse_args()
    epochs = options.epochs
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    table = Table(title=f"digits, {epochs} epochs, from one badly rescaled initialisation", box=None, padding=(0, 2))
    for header in ("training", "test accuracy", "path-norm", "‖θ‖₂"):
        table.add_column(header, justify="left" if header == "training" else "right")
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for way in WAYS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        model.load_state_dict(pathlift.symmetries(model, (64,)).randomize(generator=torch.Generator().manual_seed(0)))
        optimizer = torch.optim.SGD(model.parameters(), lr=3e-3 if way == "Path-SGD" else 0.1)
        penalty = prepare(way, model, optimizer)
        losses = []
        for _ in range(epochs):
            for batch in train[torch.randperm(len(train))].split(32):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[batch]), y[batch]) + penalty()
                loss.backward()
                optimizer.step()
            losses.append(float(loss.detach()))
        axis.semilogy(range(1, epochs + 1), losses, label=way)
        with torch.no_grad():
            right = float((model(x[test]).argmax(1) == y[test]).double().mean())
            size = float(sum(parameter.square().sum() for parameter in model.parameters())) ** 0.5
        table.add_row(way, f"{right:.1%}", f"{pathlift.path_norm(model, (64,)).value:.4g}", f"{size:.3g}")
    axis.set(xlabel="epoch", ylabel="loss of the last batch, penalty included")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(options.plot, dpi=130)
    Console(width=90).print(table)


if __name__ == "__main__":
    main()
