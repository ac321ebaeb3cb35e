"""Networks whose weights are small powers of two, so that what a command prints is the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def _set(model: nn.Module, scale: float = 1.0) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            count = parameter.numel()
            exponents = torch.arange(count) % 3
            signs = torch.where(torch.arange(count) % 5 == 3, -1.0, 1.0)
            parameter.copy_((scale * signs * 2.0**-exponents).reshape(parameter.shape))
    return model.eval()


class Encoder(nn.Module):
    """Layers with the long names that real networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.first_projection_of_the_encoder = nn.Linear(4, 8)
        self.second_projection_of_the_encoder = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second_projection_of_the_encoder(self.first_projection_of_the_encoder(x).relu()).relu()


class Net(nn.Module):
    """An encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_blocks = nn.Sequential(Encoder())
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder_blocks(x))


def net() -> nn.Module:
    """Return the network."""
    return _set(Net())


def unsupported() -> nn.Module:
    """Return a network that lies outside the theory, at two places."""
    return nn.Sequential(_set(Net()), nn.GELU(), nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2))


class Two(nn.Module):
    """A network of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.left(x) + self.right(y)).relu()


def two() -> nn.Module:
    """Return the network of two inputs."""
    return _set(Two())


def ending() -> nn.Module:
    """End the program: whoever builds this model before looking at the rest is found."""
    raise SystemExit(77)


def write(folder: Path) -> Mapping[str, Path]:
    """Write files of weights of `net`, and inputs.

    Args:
        folder: Where.

    Returns:
        Name to file.
    """
    from pathlift.storage.models import save_tensors

    state = net().state_dict()
    half = {name: tensor / 2 for name, tensor in state.items()}
    other = {
        name: tensor * 2.0 ** (1 - torch.arange(tensor.numel()) % 3).reshape(tensor.shape) for name, tensor in state.items()
    }
    same = dict(state)
    first, second = (f"encoder_blocks.0.{which}_projection_of_the_encoder.weight" for which in ("first", "second"))
    same[first], same[second] = state[first] * 4, state[second] / 4
    same[first.replace("weight", "bias")] = state[first.replace("weight", "bias")] * 4
    data = {"x": torch.arange(24.0).reshape(6, 4) / 8 - 1, "y": torch.arange(6) % 3}
    files = {"trained": state, "half": half, "another_training": other, "rescaled": same, "data": data}
    for name, tensors in files.items():
        save_tensors(tensors, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in files}
