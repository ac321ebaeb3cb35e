"""Data of the experiments: what ships with packages, CIFAR-10 and ImageNet through torchvision. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pathlift.errors import InputError
from pathlift.experiments.settings import Lottery
from pathlift.storage.data import fashion_mnist, handwritten_digits
from pathlift.storage.packages import package

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Data:
    """Training and test data.

    Attributes:
        train: Pairs of image and class.
        test: The same.
        shape: Of an image.
        classes: Number of classes.
        workers: Processes that read images.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    shape: tuple[int, ...]
    classes: int
    workers: int = 0

    def epoch(self, seed: int, epoch: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the training data in an order that depends on seed and epoch only; the last, short batch is left out.

        Args:
            seed: Of the run.
            epoch: Which.
            batch: Samples per step, over all devices.
            rank: Which device.
            world: How many there are; each gets its share of every batch.

        Yields:
            Images and classes.
        """
        count = len(self.train)  # type: ignore[arg-type]
        batch = min(batch, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        batches = [part[rank::world].tolist() for part in order[: count - count % batch].split(batch)]
        yield from self._loaded(self.train, batches, seed=1_000_003 * seed + epoch)

    def tested(self, batch: int = 512, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the test data, each sample once over all devices."""
        indices = torch.arange(len(self.test))[rank::world]  # type: ignore[arg-type]
        yield from self._loaded(self.test, [part.tolist() for part in indices.split(batch)])

    def first(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return some training samples.

        Args:
            count: How many at most.
            seed: Of the run.

        Returns:
            Images and classes.
        """
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))[:count]  # type: ignore[arg-type]
        x, y = next(self._loaded(self.train, [order.tolist()], seed=seed))
        return x, y

    def _loaded(self, data: Dataset[Any], batches: list[list[int]], seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)  # of the workers' random crops
        if isinstance(data, TensorDataset):
            loader: DataLoader[Any] = DataLoader(data, batch_size=None, sampler=batches, generator=generator)
        else:
            loader = DataLoader(data, batch_sampler=batches, num_workers=self.workers, generator=generator)
        yield from loader


def load(settings: Lottery) -> Data:
    """Read the data of an experiment.

    Args:
        settings: Names them.

    Returns:
        The data.

    Raises:
        InputError: A package or file is missing.
    """
    data = _READERS[settings.data](settings)
    if settings.limit is None:
        return data
    return Data(
        _limited(data.train, settings.limit), _limited(data.test, settings.limit), data.shape, data.classes, data.workers
    )


def _limited(data: Dataset[Any], limit: int) -> Dataset[Any]:
    if isinstance(data, TensorDataset):
        return TensorDataset(*(tensor[:limit] for tensor in data.tensors))
    return Subset(data, range(min(limit, len(data))))  # type: ignore[arg-type]


def _digits(_: Lottery) -> Data:
    x, y = handwritten_digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x.reshape(-1, 1, 8, 8)[order], y[order]
    return Data(TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:]), (1, 8, 8), 10)


def _fashion_mnist(_: Lottery) -> Data:
    parts = []
    for part in ("train", "t10k"):
        x, y = fashion_mnist(part)
        parts.append(TensorDataset((x.reshape(-1, 1, 28, 28) - 0.286) / 0.353, y))
    return Data(parts[0], parts[1], (1, 28, 28), 10)


def _cifar10(settings: Lottery) -> Data:
    datasets = package("torchvision.datasets", "experiments")
    root = _root(settings)
    parts = []
    for train in (True, False):
        try:
            read = datasets.CIFAR10(root, train=train, download=False)
        except RuntimeError as error:
            raise InputError(f"CIFAR-10 is not in '{root}': {error}") from error
        x = torch.tensor(read.data).permute(0, 3, 1, 2).float() / 255
        mean, deviation = torch.tensor([0.491, 0.482, 0.447]), torch.tensor([0.247, 0.243, 0.262])
        parts.append(TensorDataset((x - mean[:, None, None]) / deviation[:, None, None], torch.tensor(read.targets)))
    return Data(parts[0], parts[1], (3, 32, 32), 10)


def _imagenet(settings: Lottery) -> Data:
    """Read ``train`` and ``val`` of a folder with one folder per class, cropped as usual."""
    datasets, transforms = package("torchvision.datasets", "experiments"), package("torchvision.transforms", "experiments")
    root = _root(settings)
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    crops = {
        "train": [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()],
        "val": [transforms.Resize(256), transforms.CenterCrop(224)],
    }
    try:
        train, test = (datasets.ImageFolder(root / part, transforms.Compose([*crops[part], *last])) for part in crops)
    except (FileNotFoundError, RuntimeError) as error:
        raise InputError(f"'{root}' has no folders train/CLASS and val/CLASS with images: {error}") from error
    if train.classes != test.classes:
        raise InputError(f"'{root}' has {len(train.classes)} classes in train and {len(test.classes)} in val, not the same.")
    return Data(train, test, (3, 224, 224), len(train.classes), workers=max(2, settings.threads))


def _root(settings: Lottery) -> Path:
    if settings.root is None:
        raise InputError(f"'{settings.data}' does not ship with a package: say where it lies with --root.")
    return Path(settings.root)


_READERS = {"digits": _digits, "fashion-mnist": _fashion_mnist, "cifar10": _cifar10, "imagenet": _imagenet}
