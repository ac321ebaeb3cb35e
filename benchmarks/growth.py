"""How the cost of a pass grows: with resolution (flat), depth (linear), parameters (linear), and checkpoints (linear).

`python benchmarks/growth.py --plot growth.png` prints a table and draws it. Each point is the fastest of some runs after the
capture; the exponent is the slope of a line through the logarithms (of the second half of the points, where the fixed cost
of a call no longer shows).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from speed import seconds
from torch import nn

import pathlift

Points = dict[int, dict[str, float]]


def timed(network: pathlift.Network, rounds: int) -> dict[str, float]:
    runs: dict[str, Callable[[], object]] = {
        "path-norm": lambda: pathlift.path_norm(network),
        "scores": lambda: pathlift.path_magnitude(network),
    }
    return {name: min(seconds(run) for _ in range(rounds + 1)) for name, run in runs.items()}


def perceptron(widths: list[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for below, above in itertools.pairwise(widths):
        layers += [nn.Linear(below, above), nn.ReLU()]
    return nn.Sequential(*layers)


def resolutions(rounds: int) -> Points:
    model = torchvision.models.resnet18(weights=None).eval()
    sizes = (64, 128, 256, 512, 1024, 2048, 4096)
    return {size: timed(pathlift.capture(model, (3, size, size)), rounds) for size in track(sizes, "resolution")}


def depths(rounds: int) -> Points:
    found: Points = {}
    for depth in track((10, 30, 100, 300, 1000, 3000, 10_000), "depth"):
        network = pathlift.capture(perceptron([32] * (depth + 1)), (32,))
        found[depth] = timed(network, rounds if depth <= 1000 else 2)
    return found


def parameters(rounds: int) -> Points:
    found: Points = {}
    for width in track((128, 256, 512, 1024, 2048, 4096, 8192), "parameters"):
        network = pathlift.capture(perceptron([width] * 4), (width,))
        found[sum(own.numel() for own in network.state.values())] = timed(network, rounds)
    return found


def checkpoints(rounds: int) -> Points:
    del rounds
    model = torchvision.models.resnet18(weights=None).eval()
    network = pathlift.capture(model, (3, 224, 224))
    state = model.state_dict()

    def many(count: int) -> None:
        for _ in pathlift.path_norms(network, (state for _ in range(count))):
            pass

    many(1)
    return {count: {"path-norms": seconds(lambda: many(count))} for count in (10, 30, 100, 300, 1000)}  # noqa: B023


def exponent(points: Points, what: str) -> float:
    """Return the slope of log time over log size, for the larger half of the sizes."""
    sizes = sorted(points)[len(points) // 2 :]
    logs = [math.log(points[size][what]) for size in sizes]
    return statistics.linear_regression([math.log(size) for size in sizes], logs).slope


SWEEPS: dict[str, Callable[[int], Points]] = {
    "resolution (ResNet-18, side of the image)": resolutions,
    "depth (layers of width 32)": depths,
    "parameters (three square layers)": parameters,
    "checkpoints (ResNet-18)": checkpoints,
}


def draw(found: dict[str, Points], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), layout="constrained")
    for axis, (title, points) in zip(axes, found.items(), strict=True):
        for what in next(iter(points.values())):
            times = [1000 * own[what] for own in points.values()]
            axis.loglog(list(points), times, "o-", label=f"{what}: exponent {exponent(points, what):.2f}")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("milliseconds")
        low, high = axis.get_ylim()
        axis.set_ylim(low / 2, max(high * 2, 20 * low))
        axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console = Console(width=150)
    found = {title: sweep(args.rounds) for title, sweep in SWEEPS.items()}
    for title, points in found.items():
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
        table.add_column("")
        for size in points:
            table.add_column(f"{size:,}", justify="right")
        table.add_column("exponent", justify="right")
        for what in next(iter(points.values())):
            table.add_row(what, *(f"{1000 * own[what]:.3g} ms" for own in points.values()), f"{exponent(points, what):.2f}")
        console.print(table)
    if args.plot is not None:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
