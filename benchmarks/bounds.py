"""Bounds on the outputs against a forward pass on the same batch: ratios from one run (`python benchmarks/bounds.py`).

The pair is a network and its copy pruned by 20 %; contestants take turns within each round. Capture is not counted.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from speed import build, seconds

import pathlift
from pathlift import Relative

CONTESTANTS = ("theorem", "per_input", "activation, one order", "activation, both orders")


def contestants(name: str, batch: int, size: int) -> dict[str, Callable[[], object]]:
    model = build(name)
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) > 0.2)
    x = torch.randn(batch, 3, size, size)
    network, state = pathlift.capture(model, (3, size, size)), other.state_dict()

    def forward() -> None:
        with torch.no_grad():
            model(x)

    return {
        "forward": forward,
        "theorem": lambda: pathlift.lipschitz_bound(network, state, x, kind="theorem"),
        "per_input": lambda: pathlift.lipschitz_bound(network, state, x, kind="per_input"),
        "activation, one order": lambda: pathlift.lipschitz_bound(network, Relative(0.01), x, kind="activation"),
        "activation, both orders": lambda: pathlift.lipschitz_bound(network, state, x, kind="activation"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=("resnet18", "vgg16"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    table = Table(
        title=f"seconds of a bound / forward, batch {args.batch}, {args.size}², {args.rounds} rounds, median in brackets"
    )
    for header in ("network", *CONTESTANTS):
        table.add_column(header, justify="left" if header == "network" else "right")
    for name in args.networks:
        runs = contestants(name, args.batch, args.size)
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(args.rounds):
            for key, run in runs.items():
                times[key].append(seconds(run))
        cells = []
        for key in CONTESTANTS:
            ratios = [a / b for a, b in zip(times[key], times["forward"], strict=True)]
            cells.append(f"{min(times[key]) / min(times['forward']):.1f} [{statistics.median(ratios):.1f}]")
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
