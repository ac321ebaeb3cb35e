"""Cost of the rescaling groups and of what is built on them, in forward passes of the model (224², batch 1) and seconds.

python benchmarks/symmetries.py                     # a few
python benchmarks/symmetries.py --all               # groups of every torchvision classifier that is supported
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import pathlift
from pathlift.graph.compact import compacted

FEW = ("resnet18", "resnet50", "mobilenet_v2")


def seconds(call: Callable[[], object], rounds: int = 1) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        try:
            call()
        except pathlift.InputError:  # a weight of the representative is outside float32
            return float("nan")
        best = min(best, time.perf_counter() - start)
    return best


def build(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **options).eval()


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="Groups only, of every supported torchvision classifier.")
    options = parser.parse_args()
    names = torchvision.models.list_models(module=torchvision.models) if options.all else FEW
    columns = ["groups", "balance", "condition", "equalize", "normalize", "equivalent", "align (10 % noise)"]
    table = Table(box=None, padding=(0, 2))
    for header in ("model", "dimension", "forward, ms", *columns[: 1 if options.all else None]):
        table.add_column(header, justify="left" if header == "model" else "right")
    for name in track(names, console=Console(stderr=True)):
        model = build(name)
        shape = (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
        try:
            network = pathlift.capture(model, shape)
        except pathlift.UnsupportedModelError:
            continue
        x = torch.randn(1, *shape)
        with torch.no_grad():
            forward = seconds(lambda model=model, x=x: model(x), 5)
        compacted(network)
        spent = [seconds(lambda network=network: pathlift.symmetries(network))]
        groups = pathlift.symmetries(network)
        if not options.all:
            other = groups.randomize(sigma=2.0)
            noisy = {k: v * (1 + 0.1 * torch.randn_like(v)) if v.is_floating_point() else v for k, v in other.items()}
            spent += [seconds(call) for call in (groups.balance, groups.condition, groups.equalize, groups.normalize)]
            spent += [seconds(lambda groups=groups, other=other: pathlift.equivalent(groups, other))]
            spent += [seconds(lambda groups=groups, noisy=noisy: pathlift.align(groups, noisy))]
        cells = ["out of range" if part != part else f"{part / forward:.1f} × ({part:.2f} s)" for part in spent]
        table.add_row(name, f"{len(groups):,}", f"{1000 * forward:.0f}", *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
