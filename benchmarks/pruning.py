"""Table 3 of the paper: what scoring all weights costs, as ratios to one forward pass at batch 1, all in one run.

    python benchmarks/pruning.py                       # two batches: 1 and 8
    python benchmarks/pruning.py --batch 128           # the paper's, where the memory allows it
    python benchmarks/pruning.py --pathnorm pathnorm.py  # beside the authors' code, fetched apart

Contestants take turns within each round; a ratio is that of the minima. OBD is one Hessian-vector product in each batch, as in
appendix E. The first lines time the selection over as many scores as VGG-16 has, and all rounds
of the recommended criterion against one path-magnitude.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from authors import load
from rich.console import Console
from rich.table import Table
from speed import race, seconds
from torch import nn

import pathlift
from pathlift.pruning import criteria
from pathlift.pruning.catalogue import RECOMMENDED
from pathlift.pruning.selection import select_global, select_lamp

Contestant = Callable[[], object]
PAPER = {
    "alexnet": "1.7-133, 0.5, 13-60, 14",
    "vgg16": "2.3-198, 1.4, 31-675, 61",
    "resnet18": "3.6-142, 3.2, 51-155, 32",
}
"""Milliseconds on an A100: forward at batch 1-128, magnitude, OBD at batch 1-128, path-magnitude."""


def forward(model: nn.Module, x: torch.Tensor) -> Contestant:
    def run() -> object:
        with torch.no_grad():
            return model(x)

    return run


def backward(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Contestant:
    def run() -> object:
        return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    return run


def contestants(model: nn.Module, batch: int, theirs: object | None) -> dict[str, Contestant]:
    device = next(model.parameters()).device
    network = pathlift.capture(model, (3, 224, 224))
    x, y = torch.randn(batch, 3, 224, 224, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    one, many = pathlift.pruning.Batch(x[:1], y[:1]), pathlift.pruning.Batch(x, y)
    found: dict[str, Contestant] = {
        "forward, batch 1": forward(model, x[:1]),
        f"forward, batch {batch}": forward(model, x),
        "forward + backward, batch 1": backward(model, x[:1], y[:1]),
        "magnitude": lambda: criteria.magnitude(network),
        "OBD, batch 1": lambda: criteria.loss_sensitivity(network, one),
        f"OBD, batch {batch}": lambda: criteria.loss_sensitivity(network, many),
        "path-magnitude": lambda: pathlift.path_magnitude(network),
    }
    if theirs is not None:
        found["authors' path-norm"] = lambda: theirs.compute_path_norm(model, input_shape=(3, 224, 224))  # type: ignore[attr-defined]
    return found


def costs(args: argparse.Namespace, console: Console) -> None:
    theirs = load(args.pathnorm) if args.pathnorm else None
    for name in args.models:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval().to(args.device)
        times = race(contestants(model, args.batch, theirs), args.rounds)
        base = min(times["forward, batch 1"])
        title = f"{name}, {args.device}; forward at batch 1: {1000 * base:.0f} ms; paper (ms): {PAPER.get(name, '')}"
        table = Table("", "of a forward, ratio of minima", "median", title=title, box=None, padding=(0, 2))
        for what, own in times.items():
            ratios = [mine / forward for mine, forward in zip(own, times["forward, batch 1"], strict=True)]
            table.add_row(what, f"{min(own) / base:.2f}", f"{statistics.median(ratios):.2f}")
        console.print(table)


def selection(console: Console) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [own.shape for own in torchvision.models.vgg16(weights=None, init_weights=False).parameters() if own.dim() > 1]
    scores = {str(place): torch.rand(shape, generator=generator) for place, shape in enumerate(shapes)}
    size = sum(score.numel() for score in scores.values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = seconds(lambda: select_global(scores, 0.8))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    console.print(f"global selection over {size:,} scores: {taken:.1f} s, {more:.0f} MiB more (scores: {size / 2**18:.0f} MiB)")
    console.print(f"LAMP selection over the same: {seconds(lambda: select_lamp(scores, 0.8)):.1f} s")


def rounds(console: Console, device: str) -> None:
    """What the recommended criterion costs, in passes that score once."""
    torch.manual_seed(0)
    network = pathlift.capture(torchvision.models.resnet18(weights=None).eval().to(device), (3, 224, 224))
    pathlift.path_magnitude(network)
    single = seconds(lambda: pathlift.path_magnitude(network))
    for criterion in ("path_magnitude", RECOMMENDED):
        taken = seconds(lambda name=criterion: pathlift.prune(network, amount=0.5, criterion=name))
        console.print(f"prune resnet18 by {criterion}: {taken / single:.0f} times one path-magnitude")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["alexnet", "vgg16", "resnet18"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pathnorm", type=Path)
    args = parser.parse_args()
    console = Console(width=110)
    selection(console)
    rounds(console, args.device)
    costs(args, console)


if __name__ == "__main__":
    main()
