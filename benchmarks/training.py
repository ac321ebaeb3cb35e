"""Does the gauge matter for training? Learning curves with and without rescaling, several seeds, learning rates tuned alike.

    python benchmarks/training.py --data digits --plot curves.png
    python benchmarks/training.py --data fashion-mnist

Methods: plain SGD; SGD from the path-conditioned representative of the same initialisation, and conditioned again every few
steps (Lebeurrier, Vayer, Gribonval 2026); SGD with balancing (ENorm, Stock et al. 2019); Path-SGD (Neyshabur et al. 2015). Each
starts from PyTorch's initialisation, and from the same network after a random rescaling (log-normal factors). For every method
and start the learning rate with the lowest final training loss on seed 0 is used for all seeds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import pathlift
from pathlift.rescaling import Symmetries
from pathlift.rescaling.training import path_sgd, rescale_after_steps, rescale_in_place
from pathlift.storage.data import load_data

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def perceptron(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for below, above in itertools.pairwise(widths):
        layers += [nn.Linear(below, above), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    layers: list[nn.Module] = []
    for below, above in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(below, above, 3, stride=2, padding=1), nn.BatchNorm2d(above), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


SETTINGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "digits": (lambda: perceptron((64, 256, 128, 64, 10)), (64,), 25),
    "fashion-mnist": (convolutional, (1, 28, 28), 4),
}
METHODS = ("SGD", "conditioned start", "conditioned every 20 steps", "balanced every 20 steps", "Path-SGD")
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
PATH_RATES = (1e-5, 1e-4, 1e-3, 1e-2)
BATCH = 64


def data_of(name: str, shape: tuple[int, ...]) -> Data:
    x, y = load_data(name, shape)
    assert y is not None
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    cut = int(0.8 * len(x))
    return x[:cut], y[:cut], x[cut:], y[cut:]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        found = float((model(x).argmax(1) == y).double().mean())
    model.train()
    return found


def train(setting: str, data: Data, method: str, sigma: float, rate: float, seed: int) -> tuple[list[float], float, float]:
    """Return the training accuracy after each epoch, the last training loss and the test accuracy."""
    make, shape, epochs = SETTINGS[setting]
    torch.manual_seed(seed)
    model = make()
    groups = pathlift.symmetries(model, shape)
    if sigma:
        rescale_in_place(groups, groups.randomize(generator=torch.Generator().manual_seed(seed), sigma=sigma))
    if method.startswith("conditioned"):
        rescale_in_place(groups, groups.condition())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    if method == "conditioned every 20 steps":
        rescale_after_steps(optimizer, groups, Symmetries.condition, every=20)
    if method == "balanced every 20 steps":
        rescale_in_place(groups, groups.balance())
        rescale_after_steps(optimizer, groups, Symmetries.balance, every=20)
    if method == "Path-SGD":
        path_sgd(optimizer, groups.network)
    x, y, x_test, y_test = data
    curve: list[float] = []
    last = float("nan")
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            if not bool(torch.isfinite(loss)):
                return [0.1] * epochs, float("inf"), 0.1
            loss.backward()
            optimizer.step()
            last = float(loss.detach())
        curve.append(accuracy(model, x, y))
    model.eval()
    with torch.no_grad():
        last = float(F.cross_entropy(model(x), y))
    return curve, last, accuracy(model, x_test, y_test)


def first_epoch(curve: list[float], goal: float) -> float:
    return next((float(epoch) for epoch, value in enumerate(curve, 1) if value >= goal), float("inf"))


def tuned(setting: str, data: Data, method: str, sigma: float) -> float:
    rates = PATH_RATES if method == "Path-SGD" else RATES
    losses = {}
    for rate in rates:
        try:
            losses[rate] = train(setting, data, method, sigma, rate, 0)[1]
        except pathlift.PathliftError:  # diverged to weights that are not finite
            losses[rate] = float("inf")
    return min(losses, key=lambda rate: losses[rate] if losses[rate] == losses[rate] else float("inf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(SETTINGS), default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--goal", type=float, default=None, help="Training accuracy to be reached.")
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    goal = options.goal or {"digits": 0.99, "fashion-mnist": 0.85}[options.data]
    data = data_of(options.data, SETTINGS[options.data][1])
    console = Console(width=140)
    table = Table(title=f"{options.data}, {options.seeds} seeds, constant learning rate", box=None, padding=(0, 2))
    for header in ("start", "method", "rate", f"epochs to {goal:.0%}", "train accuracy", "test accuracy"):
        table.add_column(header, justify="left" if header in ("start", "method") else "right")
    curves: dict[tuple[float, str], list[list[float]]] = {}
    cells = list(itertools.product((0.0, 1.0), METHODS))
    for sigma, method in track(cells, console=Console(stderr=True)):
        rate = tuned(options.data, data, method, sigma)
        runs = [train(options.data, data, method, sigma, rate, seed) for seed in range(1, options.seeds + 1)]
        curves[sigma, method] = [run[0] for run in runs]
        epochs = [first_epoch(run[0], goal) for run in runs]
        reached = [epoch for epoch in epochs if epoch != float("inf")]
        cell = f"{statistics.mean(reached):.1f}" if len(reached) == len(epochs) else f"{len(reached)} of {len(epochs)} runs"
        spread = [
            f"{statistics.mean(part):.2%} ± {statistics.stdev(part):.2%}"
            for part in ([run[0][-1] for run in runs], [run[2] for run in runs])
        ]
        table.add_row("rescaled" if sigma else "PyTorch's", method, f"{rate:g}", cell, *spread)
    console.print(table)
    if options.plot is not None:
        plot(curves, options.plot, options.data)


def plot(curves: dict[tuple[float, str], list[list[float]]], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for (sigma, method), runs in curves.items():
        values = torch.tensor(runs)
        epochs = range(1, values.shape[1] + 1)
        axis = axes[int(sigma > 0)]
        (line,) = axis.plot(epochs, values.mean(0), label=method)
        axis.fill_between(epochs, values.amin(0), values.amax(0), alpha=0.15, color=line.get_color())
    for axis, name in zip(axes, ("PyTorch's initialisation", "the same, rescaled at random"), strict=True):
        axis.set_title(f"{title}: {name}", fontsize=10)
        axis.set_xlabel("epoch")
    axes[0].set_ylabel("training accuracy (mean and range over seeds)")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
