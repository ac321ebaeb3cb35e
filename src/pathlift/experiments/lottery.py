"""Train, rescale, prune, rewind, finetune (appendix D), for every seed, criterion and level, in steps that can be repeated.

There are three kinds of work, each of which leaves one file when it is done and nothing otherwise: a dense training, the
masks of one seed, the training of one ticket. A ticket is a seed and a mask; criteria that choose the same mask share it,
so what an invariant criterion does on the rescaled network is not trained twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.errors import InputError, PathliftWarning
from pathlift.experiments import store
from pathlift.experiments.datasets import Data, load
from pathlift.experiments.networks import build
from pathlift.experiments.settings import Lottery
from pathlift.experiments.sweep import Backend
from pathlift.experiments.training import Run, tested
from pathlift.graph.network import Network
from pathlift.pruning import Batch, apply_masks, prune
from pathlift.pruning.batches import Data as Seen
from pathlift.pruning.catalogue import criterion_of
from pathlift.reading import capture
from pathlift.rescaling import symmetries, with_state

Progress = Callable[[str, int, int], None]
"""Called with what is done, how many are done, and of how many."""


Key = tuple[bool, str, float]
"""A choice of a mask: rescaled or not, criterion, level."""


@dataclass(frozen=True)
class Folder:
    """Where an experiment keeps its files.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def settings(self) -> Path:
        """The settings, JSON."""
        return self.path / "settings.json"

    def dense(self, seed: int) -> Path:
        """The folder of a dense training."""
        return self.path / f"seed{seed}" / "dense"

    def masks(self, seed: int) -> Path:
        """The folder of the masks of a seed, one file for each."""
        return self.path / f"seed{seed}" / "masks"

    def choices(self, seed: int) -> Path:
        """What every criterion chose, JSON."""
        return self.path / f"seed{seed}" / "masks.json"

    def ticket(self, seed: int, digest: str) -> Path:
        """The folder of the training of a ticket."""
        return self.path / f"seed{seed}" / "tickets" / digest


def begin(settings: Lottery, path: Path) -> Folder:
    """Open the folder of an experiment.

    Args:
        settings: What the experiment is.
        path: A folder, new or of an experiment with the same settings.

    Returns:
        The folder.

    Raises:
        InputError: It holds another experiment.
    """
    folder = Folder(path)
    if folder.settings.is_file():
        there = store.read_json(folder.settings)
        different = [key for key, value in settings.record().items() if there.get(key) != value]
        if different:
            key = different[0]
            raise InputError(
                f"'{path}' holds an experiment with {key} = {there.get(key)!r}, found {settings.record()[key]!r}. "
                "Choose another folder, or the same settings to go on."
            )
    else:
        store.write_json(folder.settings, settings.record())
    return folder


def run(settings: Lottery, path: Path, backend: Backend, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run an experiment, or what of it is not done yet.

    Args:
        settings: What it is.
        path: Its folder.
        backend: What runs the pieces.
        progress: Told after every piece.

    Returns:
        One row per seed, criterion, level and rescaling.

    Raises:
        InputError: The folder holds another experiment or is in use, or a file cannot be read or written.
    """
    with store.only_one(path) if first_rank() else contextlib.nullcontext(), contextlib.closing(backend):
        folder = begin(settings, path)
        seeds = list(range(settings.seeds))
        _all(backend, train_dense, [(settings, folder, seed) for seed in seeds], "dense networks", progress)
        _all(backend, choose_masks, [(settings, folder, seed) for seed in seeds], "masks", progress)
        if settings.finetune:
            tickets = [(settings, folder, seed, digest) for seed in seeds for digest in _digests(folder, seed)]
            _all(backend, train_ticket, tickets, "tickets", progress)
        return list(rows(settings, folder))


def first_rank() -> bool:
    """Tell whether this process writes: it is the only one, or the first that torchrun has started."""
    return int(os.environ.get("RANK", "0")) == 0


def _all(backend: Backend, work: Callable[..., None], jobs: list[Any], what: str, progress: Progress | None) -> None:
    for done in backend.run(work, jobs):
        if progress is not None:
            progress(what, done, len(jobs))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # what the first rank has written is there for the others


def _network(settings: Lottery, data: Data, seed: int) -> nn.Module:
    return build(settings, data.shape, data.classes, seed)


def train_dense(settings: Lottery, folder: Folder, seed: int) -> None:
    """Train the dense network of a seed.

    Args:
        settings: The experiment.
        folder: Where its files are.
        seed: Which.
    """
    result = folder.dense(seed) / "result.json"
    if result.is_file():
        store.read_json(result)
        return
    data = load(settings)
    history = Run(settings, data, seed, folder.dense(seed)).launch(_network(settings, data, seed))
    if first_rank():
        store.write_json(result, {"seed": seed, "accuracy": history})


def choose_masks(settings: Lottery, folder: Folder, seed: int) -> None:
    """Score, select and test without training, for every criterion, level and rescaling of a seed.

    Args:
        settings: The experiment.
        folder: Where its files are.
        seed: Which.
    """
    done = _choices(folder, seed) if folder.choices(seed).is_file() else {}
    wanted = [
        (rescaled, name, level) for rescaled in _ways(settings) for name in settings.criteria for level in settings.levels
    ]
    if not first_rank() or all(key in done for key in wanted):
        return
    torch.set_num_threads(settings.threads)
    data = load(settings)
    model = _network(settings, data, seed)
    model.load_state_dict(store.read_checkpoint(folder.dense(seed) / "last.pt")["model"])
    model.eval()
    seen = Batch(*data.first(settings.samples, seed))
    for rescaled in _ways(settings):
        variant = _rescaled(settings, model, data, seed) if rescaled else model
        network = capture(variant, data.shape)
        for key in (key for key in wanted if key[0] == rescaled and key not in done):
            done[key] = _chosen(settings, folder, seed, key, network, variant, data, seen)
            store.write_json(folder.choices(seed), {"choices": list(done.values())})


def _ways(settings: Lottery) -> list[bool]:
    return [False, True] if settings.rescale else [False]


def _rescaled(settings: Lottery, model: nn.Module, data: Data, seed: int) -> nn.Module:
    return with_state(model, symmetries(model, data.shape).randomize(settings.choices, _generator(seed)))


def _choices(folder: Folder, seed: int) -> dict[Key, dict[str, Any]]:
    choices = store.read_json(folder.choices(seed))["choices"]
    return {(choice["rescaled"], choice["criterion"], choice["level"]): choice for choice in choices}


def _chosen(
    settings: Lottery, folder: Folder, seed: int, key: Key, network: Network, model: nn.Module, data: Data, seen: Batch
) -> dict[str, Any]:
    rescaled, name, level = key
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PathliftWarning)  # what collapsed is in the results
        _, report = prune(network, amount=level, criterion=name, data=_seen(name, seen), generator=_generator(seed))
    seconds = time.perf_counter() - start
    digest = _digest(report.masks)
    store.write_checkpoint(folder.masks(seed) / f"{digest}.pt", report.masks)
    return {
        "seed": seed,
        "criterion": name,
        "rescaled": rescaled,
        "level": level,
        "mask": digest,
        "sparsity": report.sparsity,
        "collapsed": list(report.collapsed),
        "mass_kept": report.mass_kept,
        "log10_cost": _finite(report.log10_cost),
        "log10_bound": _finite(report.log10_bound),
        "seconds": seconds,
        "one_shot": tested(settings, apply_masks(model, report.masks), data),
    }


def _finite(value: float) -> float | None:
    return value if value > float("-inf") else None


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _seen(name: str, batch: Batch) -> Seen | None:
    return None if criterion_of(name).needs == "nothing" else batch


def _digest(masks: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(name.encode())
        digest.update(mask.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _digests(folder: Folder, seed: int) -> list[str]:
    return list(dict.fromkeys(choice["mask"] for choice in _choices(folder, seed).values()))


def train_ticket(settings: Lottery, folder: Folder, seed: int, digest: str) -> None:
    """Rewind the dense network, mask it and train it to the end.

    Args:
        settings: The experiment.
        folder: Where its files are.
        seed: Which dense network.
        digest: Which mask.
    """
    ticket = folder.ticket(seed, digest)
    result = ticket / "result.json"
    if result.is_file():
        store.read_json(result)
        return
    data = load(settings)
    model = _network(settings, data, seed)
    model.load_state_dict(store.read_checkpoint(folder.dense(seed) / "rewind.pt")["model"])
    masks = store.read_checkpoint(folder.masks(seed) / f"{digest}.pt")
    history = Run(settings, data, seed, ticket, masks).launch(model, settings.rewind)
    if first_rank():
        store.write_json(result, {"seed": seed, "mask": digest, "accuracy": history})
        (ticket / "last.pt").unlink(missing_ok=True)


def rows(settings: Lottery, folder: Folder) -> Iterator[dict[str, Any]]:
    """Put the results together.

    Args:
        settings: The experiment.
        folder: Where its files are.

    Yields:
        A row per seed, criterion, level and rescaling, whose ``accuracy`` and ``history`` are those of its ticket, and one
        with criterion ``dense`` per seed.
    """
    for seed in range(settings.seeds):
        dense = store.read_json(folder.dense(seed) / "result.json")["accuracy"]
        yield {
            "seed": seed, "criterion": "dense", "rescaled": False, "level": 0.0, "accuracy": dense[-1], "history": dense
        }  # fmt: skip
        for choice in _choices(folder, seed).values():
            history = None
            if settings.finetune:
                history = store.read_json(folder.ticket(seed, choice["mask"]) / "result.json")["accuracy"]
            yield {**choice, "accuracy": None if history is None else history[-1], "history": history}
