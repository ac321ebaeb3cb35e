"""A U-Net of the usual kind: pairs of 3×3 convolutions with batch norm, four poolings, transposed convolutions back up."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pair(below: int, above: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (below, above):
        layers += [nn.Conv2d(channels, above, 3, padding=1, bias=False), nn.BatchNorm2d(above), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, classes: int = 21, width: int = 32) -> None:
        super().__init__()
        widths = [width << level for level in range(5)]
        self.down = nn.ModuleList(pair(below, above) for below, above in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * own, own, 2, 2) for own in reversed(widths[:-1]))
        self.joined = nn.ModuleList(pair(2 * own, own) for own in reversed(widths[:-1]))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            kept.append(x)
        kept.pop()
        for up, block in zip(self.up, self.joined, strict=True):
            x = block(torch.cat([kept.pop(), up(x)], 1))
        return self.head(x)
