"""Weight ranges before quantisation with one step size per tensor: the usual pairs of layers against all rescaling groups.

    python benchmarks/equalization.py --data digits
    python benchmarks/equalization.py --data fashion-mnist

A small residual network is trained, its batch norms are folded (as data-free quantisation does), its weights are quantised
symmetrically per tensor, and its test accuracy is measured: as it is; with cross-layer equalisation of the usual pattern, two
layers with only a ReLU between them (Nagel et al. 2019, found by torch.fx); with `Symmetries.equalize`, which also sees skip
connections; and with `Symmetries.equalize` on the network whose batch norms are kept in floating point. All again after a
random rescaling of the folded network, as other tools and training runs leave behind.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

import pathlift
from pathlift.storage.data import load_data

BITS = (8, 6, 5, 4, 3)


class Block(nn.Module):
    """conv, batch norm, ReLU, conv, batch norm, and a skip connection."""

    def __init__(self, below: int, above: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(below, above, 3, stride, 1, bias=False), nn.BatchNorm2d(above)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(above, above, 3, 1, 1, bias=False), nn.BatchNorm2d(above)
        self.skip = nn.Identity()
        if stride > 1 or below != above:
            self.skip = nn.Sequential(nn.Conv2d(below, above, 1, stride, bias=False), nn.BatchNorm2d(above))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.skip(x))


def residual() -> nn.Sequential:
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def quantised(model: nn.Module, bits: int) -> nn.Module:
    """Round the weights of convolutions and linear layers to one symmetric grid per tensor."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = state[f"{name}.weight"]
            step = weight.abs().max() / (2 ** (bits - 1) - 1)
            state[f"{name}.weight"] = (weight / step).round() * step
    return pathlift.rescaling.with_state(model, state)


def paired(model: nn.Module) -> nn.Module:
    """Cross-layer equalisation of the usual pattern: conv or linear, ReLU, conv or linear, each read by the next alone."""
    traced = fx.symbolic_trace(model)
    modules = dict(traced.named_modules())
    layers = (nn.Conv2d, nn.Linear)
    pairs = []
    for layer in traced.graph.layers:
        below = modules.get(str(layer.target)) if layer.op == "call_module" else None
        if not isinstance(below, layers) or len(layer.users) != 1:
            continue
        (between,) = layer.users
        if not isinstance(modules.get(str(between.target)), nn.ReLU) or len(between.users) != 1:
            continue
        (after,) = between.users
        if after.op == "call_module" and isinstance(modules.get(str(after.target)), nn.Conv2d):
            pairs.append((str(layer.target), str(after.target)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(50):
        for low, high in pairs:
            into, out = state[f"{low}.weight"], state[f"{high}.weight"]
            factor = (out.abs().amax((0, 2, 3)) / into.abs().flatten(1).amax(1)).sqrt()
            into.mul_(factor.reshape(-1, *[1] * (into.dim() - 1)))
            out.div_(factor.reshape(1, -1, 1, 1))
            if f"{low}.bias" in state:
                state[f"{low}.bias"].mul_(factor)
    return pathlift.rescaling.with_state(model, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    shape = (1, 8, 8) if options.data == "digits" else (1, 28, 28)
    x, y = load_data(options.data, shape)
    assert y is not None
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cut = int(0.8 * len(x))
    train, test = order[:cut], order[cut:]
    model = trained(x[train], y[train], options.epochs)
    folded = fuse(model)
    generator = torch.Generator().manual_seed(0)

    def accuracy(one: nn.Module) -> float:
        with torch.no_grad():
            return float((one(x[test]).argmax(1) == y[test]).double().mean())

    def rescaled(one: nn.Module) -> nn.Module:
        return pathlift.rescaling.with_state(one, pathlift.symmetries(one, shape).randomize(generator=generator))

    def equalised(one: nn.Module) -> nn.Module:
        return pathlift.rescaling.with_state(one, pathlift.symmetries(one, shape).equalize())

    title = f"{options.data}: test accuracy, weights on one grid per tensor (float: {accuracy(model):.2%})"
    table = Table(title=title, box=None, padding=(0, 2))
    for header in ("network", "ranges", *(f"{bits} bits" for bits in BITS)):
        table.add_column(header, justify="left" if header in ("network", "ranges") else "right")
    for name, one, bare in (("as trained", folded, model), ("rescaled", rescaled(folded), rescaled(model))):
        rows = (
            ("as they are", one),
            ("pairs of layers", paired(one)),
            ("all groups", equalised(one)),
            ("all groups, batch norm kept", equalised(bare)),
        )
        for label, chosen in rows:
            table.add_row(name, label, *(f"{accuracy(quantised(chosen, bits)):.2%}" for bits in BITS))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
