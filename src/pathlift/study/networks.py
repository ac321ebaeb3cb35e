"""What one network answers: built, captured, asked, and written to a file of its own after every function."""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from pathlift.errors import PathliftError, PathliftWarning, UnsupportedModelError, one_line
from pathlift.experiments import store
from pathlift.graph.network import Network
from pathlift.reading import capture
from pathlift.results import plain
from pathlift.storage.models import default_shape, load_model
from pathlift.study.functions import Call
from pathlift.study.zoo import Subject

MEASURED, REFUSED, FAILED = "measured", "refused", "failed"
"""How a network ends: with numbers; outside the theory; neither built nor read, for the reason that is given."""


def record_of(subject: Subject, folder: Path) -> Path:
    """Return the file of what a network has answered.

    Args:
        subject: The network.
        folder: Of the study.

    Returns:
        The file.
    """
    return folder / "networks" / f"{subject.digest}.json"


def left(subject: Subject, folder: Path) -> list[Call]:
    """Return the functions that a network has not answered yet; it fails anew each time, since the reason may be gone.

    Args:
        subject: The network.
        folder: Of the study.

    Returns:
        The functions.

    Raises:
        InputError: The file of what it has answered is damaged.
    """
    file = record_of(subject, folder)
    if not file.is_file():
        return list(subject.calls)
    record = store.read_json(file)
    if record.get("outcome") == REFUSED:
        return []
    return [call for call in subject.calls if call.key not in record.get("answers", {})]


def measure(subject: Subject, folder: Path, threads: int | None = None, *, trust: bool = False) -> None:
    """Ask a network what it has not answered yet.

    Args:
        subject: The network.
        folder: Of the study.
        threads: CPU threads; None for what PyTorch takes by itself.
        trust: Load a ``.pt2`` file too.

    Raises:
        InputError: The file of its answers is damaged or cannot be written.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    calls, file = left(subject, folder), record_of(subject, folder)
    if not calls:
        return
    record = store.read_json(file) if file.is_file() else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PathliftWarning)  # what they say is in the numbers
        start = time.perf_counter()
        try:
            network = _captured(subject, trust=trust)
        except UnsupportedModelError as error:
            operators = Counter(problem.op.removeprefix("aten.").partition(".")[0] for problem in error.problems)
            listed = ", ".join(f"{name} ×{count}" for name, count in operators.most_common())
            store.write_json(file, {"outcome": REFUSED, "operators": listed, "reason": error.problems[0].reason})
            return
        except Exception as error:  # whatever a constructor raises: the others go on, and this one says why
            store.write_json(file, {"outcome": FAILED, "reason": _reason(error)})
            return
        about = {
            "parameters": sum(network.state[name].numel() for name in network.parameters),
            "depth": max(network.graph.depth[name] for name in network.outputs),
            "left_off": ", ".join(network.left_off),
            "seconds": time.perf_counter() - start,
        }
        record = {"outcome": MEASURED, **about, "answers": record.get("answers", {})}
        for call in calls:
            record["answers"][call.key] = _answer(call, network)
            store.write_json(file, record)
    del network
    gc.collect()  # the next may be as large


def _captured(subject: Subject, *, trust: bool) -> Network:
    """Build and read a network."""
    model = load_model(
        subject.model, subject.weights, arguments=subject.arguments, generator=subject.seed, trust=trust, key=subject.key
    )
    shape = default_shape(subject.model) if subject.shape is None else subject.shape
    return capture(model, shape, subject.until)


def _answer(call: Call, network: Network) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        numbers = call.numbers(network)
    except Exception as error:  # one function that refuses, or fails, must not keep the others from being asked
        return {"reason": _reason(error), "seconds": time.perf_counter() - start}
    return {"numbers": plain(numbers), "seconds": time.perf_counter() - start}


def _reason(error: Exception) -> str:
    """Say why, in one line; the type of an error tells of one that pathlift did not raise on purpose."""
    return " ".join(str(error).split()) if isinstance(error, PathliftError) else one_line(error)
