"""Training runs drawn in path space and in weight space, plain and after every checkpoint was rescaled at random.

    python examples/trajectory.py --plot trajectory.png

Trains a small convolutional network on scikit-learn's digits from several seeds, keeps checkpoints, and embeds them in the
plane by classical multidimensional scaling: by the ℓ² distance of their path-liftings (`path_kernel`) and by that of their
weights. Then each checkpoint is rescaled at random, which changes no function. The path picture does not move; the weight
picture does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import pathlift
from pathlift.kernel import embedded
from pathlift.storage.data import handwritten_digits

mpl.use("Agg")
import matplotlib.pyplot as plt

State = dict[str, Tensor]


def network() -> nn.Sequential:
    """Return a small convolutional network for 8×8 digits."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def trained(seed: int, checkpoints: int, x: Tensor, y: Tensor) -> list[State]:
    """Train from a seed.

    Args:
        seed: Of the initial weights and of the order of the batches.
        checkpoints: How many states to keep, the initial one included.
        x: Images (samples, 1, 8, 8).
        y: Classes.

    Returns:
        The states.
    """
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    kept = [{name: tensor.clone() for name, tensor in model.state_dict().items()}]
    for _ in range(checkpoints - 1):
        for batch in torch.randperm(len(x)).split(64)[:8]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return kept


def rescaled(states: list[State]) -> list[State]:
    """Rescale every state at random: each computes the same function as before."""
    groups = pathlift.symmetries(network(), (1, 8, 8))
    return [
        dict(groups.at(state).randomize(generator=torch.Generator().manual_seed(place))) for place, state in enumerate(states)
    ]


def in_path_space(states: list[State]) -> Tensor:
    """Return points in the plane by the distances of the path-liftings, (states, 2)."""
    return pathlift.path_kernel(states, (1, 8, 8), model=network()).coordinates()[0]


def in_weight_space(states: list[State]) -> Tensor:
    """Return points in the plane by the distances of the weights, (states, 2)."""
    flat = torch.stack([torch.cat([tensor.double().reshape(-1) for tensor in state.values()]) for state in states])
    return embedded(torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").log10(), 2)[0]


def draw(points: dict[str, Tensor], seeds: int, path: Path) -> None:
    """Draw the four pictures, one line per seed from the ring (start) to the dot (end)."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 8), layout="constrained")
    for axis, (title, own) in zip(axes.reshape(-1), points.items(), strict=True):
        for line, color in zip(own.chunk(seeds), plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
            axis.plot(line[:, 0], line[:, 1], "-", color=color, linewidth=1)
            axis.plot(line[:1, 0], line[:1, 1], "o", color=color, fillstyle="none")
            axis.plot(line[-1:, 0], line[-1:, 1], "o", color=color)
        axis.set_title(title)
        axis.set_aspect("equal", adjustable="datalim")
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train, rescale, embed, draw; print how far the points moved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--plot", type=Path, default=Path("trajectory.png"))
    options = parser.parse_args()
    x, y = handwritten_digits()
    x = x.reshape(-1, 1, 8, 8)
    states = [state for seed in range(options.seeds) for state in trained(seed, options.checkpoints, x, y)]
    moved = rescaled(states)
    points = {
        "path space": in_path_space(states),
        "weight space": in_weight_space(states),
        "path space, every checkpoint rescaled": in_path_space(moved),
        "weight space, every checkpoint rescaled": in_weight_space(moved),
    }
    draw(points, options.seeds, options.plot)
    console = Console()
    for space in ("path", "weight"):
        before, after = points[f"{space} space"], points[f"{space} space, every checkpoint rescaled"]
        shift = float((before - after).norm(dim=1).max() / (before.amax(0) - before.amin(0)).max())
        console.print(f"{space} space: rescaling moves a point by at most {shift:.1e} of the picture", highlight=False)
    console.print(f"Drawn to {options.plot}", highlight=False)


if __name__ == "__main__":
    main()
