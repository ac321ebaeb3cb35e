"""What an experiment is: one flat record, kept beside its results, so that a folder can only be continued as it was begun."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pathlift.errors import InputError, nearest
from pathlift.pruning.catalogue import criterion_of


@dataclass(frozen=True)
class Lottery:
    """Settings of the lottery-ticket experiment of appendix D.

    Attributes:
        data: ``digits``, ``fashion-mnist``, ``cifar10`` or ``imagenet``.
        root: Where the data lie, for those that need it.
        model: ``resnet`` (basic blocks, batch norm, for small images) or a name as on the command line.
        width: Channels of the first stage of ``resnet``; each further stage has twice as many.
        blocks: Basic blocks of each stage of ``resnet``.
        stem_stride: Stride of the first convolution of ``resnet``.
        seeds: Number of independent runs, seeds 0, 1, …
        criteria: Names of criteria.
        levels: Shares of the weights that go.
        choices: Factors of the random rescaling.
        rescale: Whether each criterion is also tried on the rescaled network.
        finetune: Whether the pruned networks are rewound and trained, or only tested as they are.
        epochs: Length of training.
        rewind: Epoch whose weights the pruned network starts from.
        batch: Samples per step.
        rate: Largest learning rate.
        warmup: Share of training over which the rate rises.
        milestones: Epochs at which the rate falls to a tenth; none for a cosine to 0.
        momentum: Of SGD.
        decay: Weight decay.
        samples: Training samples that criteria may look at.
        limit: Use only the first samples of the training and test data; None for all.
        threads: CPU threads per run; results are equal only for equal numbers.
        accelerator: Lightning's name of the device: ``cpu``, ``cuda``, ``auto``.
        devices: Devices that train one network together (DDP).
        precision: Lightning's name of the precision of training.
    """

    data: str
    root: str | None = None
    model: str = "resnet"
    width: int = 16
    blocks: tuple[int, ...] = (1, 1, 1)
    stem_stride: int = 1
    seeds: int = 3
    criteria: tuple[str, ...] = ("magnitude", "lamp", "path_magnitude", "relative_path_magnitude")
    levels: tuple[float, ...] = (0.4, 0.6, 0.8, 0.9, 0.95, 0.98)
    choices: tuple[float, ...] = (1.0, 128.0, 4096.0)
    rescale: bool = True
    finetune: bool = True
    epochs: int = 10
    rewind: int = 1
    batch: int = 128
    rate: float = 0.1
    warmup: float = 0.1
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    decay: float = 5e-4
    samples: int = 256
    limit: int | None = None
    threads: int = 1
    accelerator: str = "cpu"
    devices: int = 1
    precision: str = "32-true"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            InputError: One of them is malformed.
        """
        if self.data not in PRESETS:
            raise InputError(f"There is no data set '{self.data}'.{nearest(self.data, PRESETS)}")
        for name in ("seeds", "epochs", "batch", "width", "stem_stride", "threads", "devices", "samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1 sample, found {self.limit}.")
        if not 0 < self.rate < math.inf:
            raise InputError(f"rate must be a positive number, found {self.rate:g}.")
        if not 0 <= self.rewind < self.epochs:
            raise InputError(f"rewind must be an epoch before the last of {self.epochs}, found {self.rewind}.")
        if self.batch % self.devices:
            raise InputError(f"A batch of {self.batch} cannot be shared by {self.devices} devices.")
        if not self.criteria or not self.levels:
            raise InputError("Give at least one criterion and one level.")
        for level in self.levels:
            if not 0 <= level < 1:
                raise InputError(f"levels must be shares in [0, 1), found {level:g}.")
        for name in self.criteria:
            criterion_of(name)

    def record(self) -> dict[str, Any]:
        """Return the settings as JSON takes them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "digits": {"width": 8, "epochs": 12, "rewind": 2, "batch": 64},
    "fashion-mnist": {"stem_stride": 2, "epochs": 4, "rewind": 1, "rate": 0.2, "warmup": 0.15},
    "cifar10": {"blocks": (2, 2, 2), "epochs": 30, "rewind": 2},
    "imagenet": {
        "model": "torchvision:resnet18",
        "epochs": 90,
        "rewind": 5,
        "batch": 1024,
        "warmup": 0.0,
        "milestones": (30, 60, 80),
        "decay": 1e-4,
        "levels": (0.1, 0.2, 0.4, 0.6, 0.8),
        "accelerator": "auto",
        "seeds": 1,
    },
}
"""What suits each data set; ``imagenet`` is the protocol of the paper."""


def lottery(data: str, **changes: Any) -> Lottery:
    """Return the settings for a data set, with changes.

    Args:
        data: Its name.
        changes: Attributes of `Lottery`; those that are None are left as they are.

    Returns:
        The settings.

    Raises:
        InputError: One of them is malformed.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    return Lottery(**{"data": data, **PRESETS.get(data, {}), **given})
