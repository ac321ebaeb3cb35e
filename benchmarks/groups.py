"""Cost of the rescaling groups beside those of the plain network: weights that are computed, positional parameters, volumes.

`python benchmarks/groups.py` prints for each network the CPU time of `symmetries` over that of the same network without the
wrap (or the parameter), and how much memory each takes beyond the network and its path-norm. Every case runs in a process of
its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pathlift

Wrap = Callable[[nn.Module], nn.Module]
Case = Callable[[], tuple[nn.Module, tuple[int, ...]]]


class Standardised(nn.Conv2d):
    """A convolution whose kernels have mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class LowRank(nn.Module):
    """A linear layer with a product of two matrices added to its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.up, self.down = nn.Parameter(torch.rand(layer.out_features, 4)), nn.Parameter(torch.rand(4, layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight + self.up @ self.down, self.layer.bias)


def standardised(layer: nn.Conv2d) -> nn.Module:
    return Standardised(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)


def convolutions(wrap: Wrap, channels: int) -> nn.Module:
    inner = [one for _ in range(3) for one in (wrap(nn.Conv2d(channels, channels, 3, padding=1)), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(channels, 8, 1))


def perceptron(wrap: Wrap, width: int) -> nn.Module:
    inner = [one for _ in range(2) for one in (wrap(nn.Linear(width, width)), nn.ReLU())]
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), *inner, nn.Linear(width, 8))


class Positional(nn.Module):
    """Convolutions behind a parameter of the image's size that is added or multiplies, or behind none."""

    def __init__(self, sides: tuple[int, ...], join: str) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sides) - 1]
        self.parameter, self.join = nn.Parameter(torch.rand(3, *sides)) if join else None, join
        self.first = conv(3, 3, 3, padding=1)
        body = [one for wide in (3, 8, 8) for one in (conv(wide, 8, 3, padding=1, bias=False), nn.ReLU())]
        self.body, self.head = nn.Sequential(*body), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.parameter is not None:
            x = x + self.parameter if self.join == "added" else x * self.parameter
        return self.head(self.body(x).flatten(2).mean(2))


class Volume(nn.Module):
    """A 3-D U-Net of two levels, the way up by transposed convolutions or by repeated voxels."""

    def __init__(self, learned: bool) -> None:
        super().__init__()

        def block(below: int, above: int, stride: int = 1) -> nn.Module:
            convs = [nn.Conv3d(below, above, 3, stride, 1, bias=False), nn.Conv3d(above, above, 3, 1, 1, bias=False)]
            return nn.Sequential(*[one for conv in convs for one in (conv, nn.BatchNorm3d(above), nn.LeakyReLU(0.01))])

        def up(below: int, above: int) -> nn.Module:
            if learned:
                return nn.ConvTranspose3d(below, above, 2, 2, bias=False)
            return nn.Sequential(nn.Conv3d(below, above, 1, bias=False), nn.Upsample(scale_factor=2))

        self.a, self.b, self.c = block(1, 8), block(8, 16, 2), block(16, 32, 2)
        self.up_b, self.up_a, self.back_b, self.back_a = up(32, 16), up(16, 8), block(32, 16), block(16, 8)
        self.head = nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        b = self.back_b(torch.cat((self.up_b(self.c(b)), b), 1))
        return self.head(self.back_a(torch.cat((self.up_a(b), a), 1)))


def same(layer: nn.Module) -> nn.Module:
    return layer


WRAPS: dict[str, Wrap] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
CASES: dict[str, tuple[Case, Case]] = {
    **{
        f"{name}, {channels} channels": (
            lambda wrap=wrap, channels=channels: (convolutions(wrap, channels), (3, 16, 16)),
            lambda channels=channels: (convolutions(same, channels), (3, 16, 16)),
        )
        for channels in (128, 512)
        for name, wrap in {**WRAPS, "standardised": standardised}.items()
    },
    **{
        f"{name}, 2048 units": (
            lambda wrap=wrap: (perceptron(wrap, 2048), (16,)),
            lambda: (perceptron(same, 2048), (16,)),
        )
        for name, wrap in {"weight norm": parametrizations.weight_norm, "low rank": LowRank}.items()
    },
    **{
        f"{join}, {'×'.join(map(str, sides))}": (
            lambda join=join, sides=sides: (Positional(sides, join), (3, *sides)),
            lambda sides=sides: (Positional(sides, ""), (3, *sides)),
        )
        for join in ("added", "multiplied")
        for sides in ((1024,), (32, 32), (64, 64), (128, 128), (256, 256), (16, 16, 16))
    },
    "transposed, 32×32×32": (lambda: (Volume(True), (1, 32, 32, 32)), lambda: (Volume(False), (1, 32, 32, 32))),
}


def measured(name: str, place: int) -> None:
    """Print seconds of CPU and MiB of one case."""
    torch.manual_seed(0)
    model, shape = CASES[name][place]()
    network = pathlift.capture(model.eval(), shape)
    pathlift.path_norm(network)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    pathlift.symmetries(network)
    used, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(used, (peak - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Cases with this in their names.")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "PLACE"), help="Measure one case here; for the processes.")
    options = parser.parse_args()
    if options.one:
        measured(options.one[0], int(options.one[1]))
        return
    table = Table(box=None, padding=(0, 2))
    for header in ("network", "plain, ms", "times plain", "plain, MiB", "MiB"):
        table.add_column(header, justify="left" if header == "network" else "right")
    for name in track([name for name in CASES if options.only in name], console=Console(stderr=True)):
        call = [sys.executable, __file__, "--one", name]
        runs = [subprocess.run([*call, place], capture_output=True, check=True, text=True).stdout.split() for place in "01"]
        (used, memory), (plain, least) = ((float(number) for number in run) for run in runs)
        table.add_row(name, f"{1e3 * plain:.0f}", f"{used / plain:.1f}", f"{least:.0f}", f"{memory:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
