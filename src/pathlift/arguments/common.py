"""Arguments that belong to no room: time, randomness, devices, what is told on the way."""

from __future__ import annotations

from typing import TypeAlias, overload

import torch

from pathlift.arguments.kinds import device, function, generator, least_zero
from pathlift.arguments.registry import declare

done_of_all = function("a function of the number that is done and that of all", 2)

declare(__name__, {
    "device": device,
    "generator": generator,
    "progress": function("a function of the number that is done", 1),
    "seconds": least_zero,
})  # fmt: skip

Randomness: TypeAlias = torch.Generator | int
"""Where random numbers come from: a generator, or a seed to begin one with."""


@overload
def source_of(generator: Randomness) -> torch.Generator: ...


@overload
def source_of(generator: None) -> None: ...


def source_of(generator: Randomness | None) -> torch.Generator | None:
    """Return a source of randomness: a seed begins one on the CPU; None, which is PyTorch's own, stays."""
    return torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
