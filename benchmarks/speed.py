"""Path-norm against a forward pass, path-magnitude against forward+backward: ratios from one run (`make bench`).

All contestants of a network take turns within each round, so that a noisy machine hits them alike. Printed are the ratio
of the minima, and the median ratio with its quartiles. Capture is timed apart. Peak memory is what each contestant adds
to the process, measured in processes of their own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import pathlift

NETWORKS = ("resnet18", "vgg16", "alexnet", "densenet121")
SHAPE = (3, 224, 224)
LIMITS = {"path-norm / forward": 1.2, "scores / (forward+backward)": 1.5}


def build(name: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None).eval()


def contestants(name: str) -> dict[str, Callable[[], object]]:
    model = build(name)
    network = pathlift.capture(model, SHAPE)
    x = torch.randn(1, *SHAPE)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()

    return {
        "forward": forward,
        "path-norm": lambda: pathlift.path_norm(network),
        "forward+backward": both,
        "scores": lambda: pathlift.path_magnitude(network),
    }


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(seconds(run))
    return times


def capture_seconds(name: str) -> float:
    model = build(name)
    pathlift.capture(nn.Linear(2, 2), (2,))
    return seconds(lambda: pathlift.capture(model, SHAPE))


def _peak_kib() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0])


def _peak(args: tuple[str, str]) -> float:
    """Peak resident memory that a contestant adds, in MiB."""
    name, key = args
    run = contestants(name)[key]
    with torch.no_grad():  # touch the code first, with small networks
        build(name)(torch.zeros(1, 3, 64, 64))
        small = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(8 * 10 * 10, 8))
        pathlift.path_magnitude(small, (3, 64, 64))
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_kib()
    run()
    return (_peak_kib() - before) / 1024


def peaks(name: str) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    keys = ("forward", "path-norm", "forward+backward", "scores")
    with context.Pool(1, maxtasksperchild=1) as pool:
        return dict(zip(keys, pool.map(_peak, [(name, key) for key in keys], chunksize=1), strict=True))


def ratio(times: dict[str, list[float]], one: str, other: str) -> tuple[float, list[float]]:
    rounds = [a / b for a, b in zip(times[one], times[other], strict=True)]
    return min(times[one]) / min(times[other]), statistics.quantiles(rounds, n=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=150)
    table = Table(
        title=f"float32, batch 1, {args.threads} threads, {args.rounds} interleaved rounds, 224×224", title_justify="left"
    )
    for header in (
        "network",
        "path-norm / forward",
        "median [quartiles]",
        "scores / (fwd+bwd)",
        "median [quartiles]",
        "capture",
    ):
        table.add_column(header, justify="left" if header == "network" else "right", no_wrap=True)
    memory = Table(title="peak memory added, MiB", title_justify="left")
    for header in ("network", "forward", "path-norm", "forward+backward", "scores"):
        memory.add_column(header, justify="left" if header == "network" else "right")
    for name in args.networks:
        times = race(contestants(name), args.rounds)
        cells = [name]
        for one, other in (("path-norm", "forward"), ("scores", "forward+backward")):
            best, (low, median, high) = ratio(times, one, other)
            cells += [f"{best:.2f}", f"{median:.2f} [{low:.2f}, {high:.2f}]"]
        table.add_row(*cells, f"{capture_seconds(name):.2f} s")
        if not args.no_memory:
            memory.add_row(name, *(f"{value:.0f}" for value in peaks(name).values()))
    console.print(table)
    if not args.no_memory:
        console.print(memory)


if __name__ == "__main__":
    main()
