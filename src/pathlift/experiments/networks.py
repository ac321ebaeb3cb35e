"""The networks of the experiments: a residual network of the paper's kind for small images, or any model by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathlift.errors import InputError
from pathlift.experiments.settings import Lottery
from pathlift.storage.models import load_model


class BasicBlock(nn.Module):
    """relu(F(x) + shortcut(x)) with two 3×3 convolutions, as in ResNet-18."""

    def __init__(self, below: int, above: int, stride: int) -> None:
        """Make one.

        Args:
            below: Channels of the input.
            above: Channels of the output.
            stride: Of the first convolution.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(below, above, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(above)
        self.conv2 = nn.Conv2d(above, above, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(above)
        self.downsample = (
            nn.Identity()
            if stride == 1 and below == above
            else nn.Sequential(nn.Conv2d(below, above, 1, stride, bias=False), nn.BatchNorm2d(above))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, (batch, above, height/stride, width/stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


def resnet(channels: int, classes: int, *, width: int, blocks: Sequence[int], stem_stride: int) -> nn.Sequential:
    """Make a residual network for small images.

    Args:
        channels: Of an image.
        classes: Number of outputs.
        width: Channels of the first stage; each further one has twice as many and half the resolution.
        blocks: Basic blocks of each stage.
        stem_stride: Stride of the first convolution.

    Returns:
        The network.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, stem_stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    below = width
    for stage, count in enumerate(blocks):
        above = width * 2**stage
        for index in range(count):
            layers.append(BasicBlock(below, above, 2 if stage and not index else 1))
            below = above
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(below, classes))


def build(settings: Lottery, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Make the network of an experiment with its initial weights.

    Args:
        settings: Names it.
        shape: Of an image.
        classes: Number of classes.
        seed: Of the initial weights.

    Returns:
        The network.

    Raises:
        InputError: The name is not known, or the network has fewer outputs than there are classes.
    """
    if settings.model != "resnet":
        model = load_model(settings.model, generator=seed)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if last and last[-1].out_features < classes:
            raise InputError(f"'{settings.model}' has {last[-1].out_features} outputs for {classes} classes.")
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return resnet(shape[0], classes, width=settings.width, blocks=settings.blocks, stem_stride=settings.stem_stride)
