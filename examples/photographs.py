"""Two photographs, cleaned by a network that is pruned: the mask of plain magnitude depends on the rescaling, ours does not.

    python examples/photographs.py --plot photographs.png

Trains a small convolutional network to remove noise from patches of scikit-learn's photograph of a flower, and looks at the
one of a temple, which it has never seen. Then its channels are rescaled at random by {1, 128, 4096}, which changes no pixel.
Both networks are pruned by a third, once by plain magnitude and once by relative path-magnitude.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import pathlift

mpl.use("Agg")
import matplotlib.pyplot as plt

SIDE = 160
NOISE = 0.15


def network() -> nn.Sequential:
    """Return a network that takes an image to a cleaner one."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 3, 3, padding=1))


def photographs() -> tuple[Tensor, Tensor]:
    """Return the flower and the temple, (3, height, width) each, between 0 and 1, at half their size."""
    temple, flower = (torch.tensor(image).permute(2, 0, 1).float()[:, ::2, ::2] / 255 for image in load_sample_images().images)
    return flower, temple[:, :SIDE, 60 : 60 + SIDE]


def trained(image: Tensor, steps: int) -> nn.Sequential:
    """Train on patches of a photograph with noise."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        tops = torch.randint(image.shape[1] - 32, (16,)).tolist()
        lefts = torch.randint(image.shape[2] - 32, (16,)).tolist()
        patches = torch.stack([image[:, top : top + 32, left : left + 32] for top, left in zip(tops, lefts, strict=True)])
        optimizer.zero_grad()
        (model(patches + NOISE * torch.randn_like(patches)) - patches).square().mean().backward()
        optimizer.step()
    return model


def sharpness(image: Tensor, truth: Tensor) -> float:
    """Return the peak signal-to-noise ratio in decibels: higher is better."""
    return float(-10 * (image - truth).square().mean().log10())


@torch.no_grad()
def main() -> None:
    """Train, rescale, prune, look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--plot", type=Path, default=Path("photographs.png"))
    options = parser.parse_args()
    torch.manual_seed(0)
    flower, temple = photographs()
    with torch.enable_grad():
        model = trained(flower, options.steps)
    twin = network()
    twin.load_state_dict(pathlift.symmetries(model, (3, SIDE, SIDE)).randomize([1.0, 128.0, 4096.0]))
    noisy = temple + NOISE * torch.randn_like(temple)
    pictures = {"with noise": noisy, "trained network": model(noisy[None])[0], "rescaled": twin(noisy[None])[0]}
    for criterion in ("magnitude", "relative_path_magnitude"):
        for title, net in (("", model), (", rescaled", twin)):
            pruned, _ = pathlift.prune(net, (3, SIDE, SIDE), 1 / 3, criterion)
            pictures[f"{criterion}{title}"] = pruned(noisy[None])[0]
    table = Table("picture", "PSNR, dB", title="A photograph that the network has never seen", title_justify="left")
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout="constrained")
    shown = {"photograph": temple, **pictures}
    for axis, (title, picture) in zip(axes.reshape(-1), shown.items(), strict=True):
        axis.imshow(picture.clamp(0, 1).permute(1, 2, 0))
        axis.set_title(title.replace("relative_", "relative\n"), fontsize=9)
        axis.axis("off")
        if title in pictures:
            table.add_row(title, f"{sharpness(picture, temple):.1f}")
    figure.savefig(options.plot, dpi=110)
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
