"""How far may an input move before its class can change? Proved from below, and by an attack from above.

Trains a perceptron on scikit-learn's digits twice, as it is and with a penalty on the logarithm of its path-norm, and gives
every test image the largest radius for which its class provably stays. Gradient attacks say for how many images it can be
changed: what is true lies between the line and the crosses. Writes a picture of both.

    python examples/certified_radius.py --plot out/certified_radius.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from pathlift.certification import CertifiedRadius, certified_radius
from pathlift.storage.data import handwritten_digits

mpl.use("Agg")
import matplotlib.pyplot as plt

RADII = tuple(0.01 * step for step in range(1, 13))
ATTACKED = RADII[1::2]
TRAINED, PIXELS = 1297, 64


def trained(x: Tensor, y: Tensor, penalty: float) -> nn.Sequential:
    """Train a perceptron with two hidden layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    network = pathlift.capture(model, (PIXELS,))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            (F.cross_entropy(model(x[batch]), y[batch]) + penalty * pathlift.log_path_norm(network, model)).backward()
            optimiser.step()
    return model.eval()


def stays_attacked(model: nn.Module, x: Tensor) -> list[float]:
    """Return the share of images whose class an attack does not change, for each radius."""
    return [1 - float(pathlift.attack(model, x, None, radius, steps=5).changed.double().mean()) for radius in ATTACKED]


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40, help="test images")
    parser.add_argument("--plot", type=Path, default=Path("out/certified_radius.png"))
    options = parser.parse_args()
    x, y = handwritten_digits()
    test = slice(TRAINED, TRAINED + options.samples)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True, layout="constrained")
    for ax, penalty in zip(axes, (0.0, 0.1), strict=True):
        model = trained(x[:TRAINED], y[:TRAINED], penalty)
        found: CertifiedRadius = certified_radius(model, x[test], radii=RADII)
        attacked = stays_attacked(model, x[test])
        right = float((found.predicted == y[test]).double().mean())
        name = f"penalty {penalty:g} on log path-norm"
        norm = pathlift.path_norm(model, (PIXELS,)).log10
        print(f"{name}: accuracy {right:.0%}, log10 path-norm {norm:.2f}, mean radius {found.radius.mean():.3f} of 1")
        found.plot(ax)
        ax.plot(ATTACKED, attacked, "x", color="#d97a0b", label="not changed by an attack")
        ax.set_xlim(0, RADII[-1])
        ax.set_title(f"{name}; accuracy {right:.0%}", fontsize=10)
        ax.legend(loc="upper right", fontsize=8)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=110)
    print(f"Figure: {options.plot}")


if __name__ == "__main__":
    main()
