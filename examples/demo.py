"""`make demo`: a residual CNN on handwritten digits, rescaled as in the paper; what changes and what does not.

Trains for some seconds on scikit-learn's digits (they ship with the package), multiplies each hidden channel of its
residual blocks by a random factor from {1, 128, 4096} and divides the next layer's weights by it (paper, App. D), and
compares both networks: the function is the same, so a measure of the network should be, too.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pathlift

FIGURE = Path("out/demo.png")


class Block(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x + F(x))."""
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class DigitsNet(nn.Module):
    """A small residual CNN for 8×8 images."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(Block(channels), nn.MaxPool2d(2), Block(channels))
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 12) -> None:
    """Train with Adam."""
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    model.eval()


@torch.no_grad()
def rescaled(model: DigitsNet, choices: tuple[float, ...] = (1.0, 128.0, 4096.0)) -> DigitsNet:
    """Multiply each hidden channel of each block by a random factor and divide what reads it by the same."""
    twin = copy.deepcopy(model)
    for block in twin.modules():
        if isinstance(block, Block):
            factors = torch.tensor(choices)[torch.randint(len(choices), (block.conv1.out_channels,))]
            block.conv1.weight.mul_(factors[:, None, None, None])
            block.bn1.running_mean.mul_(factors)
            block.bn1.bias.mul_(factors)
            block.conv2.weight.div_(factors[None, :, None, None])
    return twin


def kept(scores: Tensor, other: Tensor, amount: float = 0.5) -> float:
    """Return the share of weights on which two rankings agree about what to prune."""
    count = int(amount * scores.numel())
    masks = []
    for ranking in (scores, other):
        mask = torch.zeros(ranking.numel(), dtype=torch.bool)
        mask[ranking.argsort(stable=True)[:count]] = True
        masks.append(mask)
    return float((masks[0] == masks[1]).float().mean())


def draw(magnitudes: tuple[Tensor, Tensor], shares: tuple[Tensor, Tensor]) -> None:
    """Draw both criteria before and after the rescaling."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), constrained_layout=True)
    panels = (("weight magnitude |θ|", magnitudes, "#c44e52"), ("path-magnitude (share of ‖Φ(θ)‖₁)", shares, "#4c72b0"))
    for axis, (title, (before, after), colour) in zip(axes, panels, strict=True):
        seen = (before > 0) & (after > 0)
        axis.loglog(before[seen], after[seen], ".", ms=2, alpha=0.4, color=colour)
        ends = [float(before[seen].min()), float(before[seen].max())]
        axis.loglog(ends, ends, color="black", lw=0.8, label="unchanged")
        axis.set(title=title, xlabel="before rescaling", ylabel="after rescaling by {1, 128, 4096}")
        axis.legend(loc="upper left", frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    """Run the demonstration."""
    torch.manual_seed(0)
    console = Console(width=100)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    fit, test = order[:1400], order[1400:]

    start = time.perf_counter()
    model = DigitsNet()
    train(model, x[fit], y[fit])
    seconds = time.perf_counter() - start
    twin = rescaled(model)

    networks = [pathlift.capture(m, (1, 8, 8)) for m in (model, twin)]
    norms = [pathlift.path_norm(n) for n in networks]
    scores = [pathlift.path_magnitude(n) for n in networks]
    with torch.no_grad():
        logits = [m(x[test]) for m in (model, twin)]
    accuracy = [float((out.argmax(1) == y[test]).float().mean()) for out in logits]

    names = [name for name in scores[0] if name.startswith("blocks") and "conv" in name]
    magnitudes = tuple(
        torch.cat([dict(m.named_parameters())[n].detach().abs().flatten() for n in names]) for m in (model, twin)
    )
    shares = tuple(torch.cat([s[n].flatten() for n in names]) for s in scores)

    table = Table(title=f"Digits, residual CNN, trained in {seconds:.0f} s; same function, other weights", title_justify="left")
    for header in ("", "trained", "rescaled", "changed?"):
        table.add_column(header, justify="left" if not header else "right")
    same = "[green]no[/]"
    changed = "[red]yes[/]"
    table.add_row("test accuracy", *(f"{a:.2%}" for a in accuracy), same if accuracy[0] == accuracy[1] else changed)
    drift = float((logits[0] - logits[1]).abs().max())
    table.add_row("largest change of an output", "", f"{drift:.1e}", same if drift < 1e-3 else changed)
    table.add_row("ℓ² norm of the weights", *(f"{float(m.norm()):.4g}" for m in magnitudes), changed)
    table.add_row("largest weight", *(f"{float(m.max()):.4g}" for m in magnitudes), changed)
    agree = kept(magnitudes[0], magnitudes[1])
    table.add_row("magnitude pruning at 50 %: same mask", "", f"{agree:.1%}", same if agree == 1 else changed)
    equal = norms[0].value == norms[1].value
    table.add_row("path-norm ‖Φ(θ)‖₁", *(f"{n.value:.6g}" for n in norms), f"{same}, to the bit" if equal else changed)
    identical = all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])
    table.add_row("path-magnitude of every weight", "", "", f"{same}, to the bit" if identical else changed)
    table.add_row("path-magnitude pruning at 50 %: same mask", "", f"{kept(*shares):.1%}", same if identical else changed)
    console.print(table)
    draw(magnitudes, shares)
    console.print(f"Figure: {FIGURE}")


if __name__ == "__main__":
    main()
