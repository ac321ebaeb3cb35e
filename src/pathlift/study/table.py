"""One table of all networks, from the files that they left: a row for each, and as Parquet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pathlift.experiments import store
from pathlift.experiments.sweep import Backend
from pathlift.output import write_outputs
from pathlift.storage.packages import package
from pathlift.study.networks import left, measure, record_of
from pathlift.study.zoo import Subject

MARK = "study.json"
"""A folder of a study has this file."""

Row: TypeAlias = "dict[str, Any]"
"""Column to value; None where there is none."""


def run(
    subjects: Sequence[Subject],
    folder: Path,
    backend: Backend,
    *,
    threads: int | None = None,
    trust: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Ask all networks, or those of them that have not answered yet.

    Args:
        subjects: The networks.
        folder: Where the answers are kept.
        backend: What runs the pieces.
        threads: CPU threads of each piece; None for what PyTorch takes by itself.
        trust: Load ``.pt2`` files too.
        progress: Called after each network with how many are done, and of how many.

    Returns:
        A row for each network.

    Raises:
        InputError: The folder is in use, or a file in it cannot be read or written.
    """
    with store.only_one(folder), contextlib.closing(backend):
        store.write_json(folder / MARK, {"networks": {subject.digest: subject.name for subject in subjects}})
        jobs = [(subject, folder.resolve(), threads) for subject in subjects if left(subject, folder)]
        work = trusted if trust else measure
        before = len(subjects) - len(jobs)
        if progress is not None:
            progress(before, len(subjects))
        for done in backend.run(work, jobs):
            if progress is not None:
                progress(before + done, len(subjects))
        return [row_of(subject, store.read_json(record_of(subject, folder))) for subject in subjects]


def trusted(subject: Subject, folder: Path, threads: int | None) -> None:
    """Ask a network that may be a ``.pt2`` file, see `measure`."""
    measure(subject, folder, threads, trust=True)


def row_of(subject: Subject, record: dict[str, Any]) -> Row:
    """Return the row of one network.

    Args:
        subject: The network.
        record: What it answered.

    Returns:
        The row: columns of what is known about it begin with ``about/``, those of an answer with its function.
    """
    row: Row = {"model": subject.model, "weights": subject.weights, "seed": None if subject.weights else subject.seed}
    row |= {f"about/{name}": value for name, value in (subject.about or {}).items()}
    row |= {key: record.get(key) for key in ("outcome", "operators", "reason", "parameters", "depth", "left_off", "seconds")}
    for call in subject.calls:
        answer = record.get("answers", {}).get(call.key, {})
        row |= {f"{call.label}/{name}": float(value) for name, value in answer.get("numbers", {}).items()}
        row |= {f"{call.label}/{name}": answer[name] for name in ("reason", "seconds") if name in answer}
    return row


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Write the table, all or nothing.

    Args:
        rows: The rows; a column holds numbers, or else words.
        path: Where.

    Raises:
        InputError: pyarrow is not installed, or the file cannot be written.
    """
    pyarrow, parquet = package("pyarrow", "study"), package("pyarrow.parquet", "study")
    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in names}
    for name, values in columns.items():
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1:
            cast = float if kinds <= {int, float} else str
            columns[name] = [None if value is None else cast(value) for value in values]
    write_outputs({path: lambda target: parquet.write_table(pyarrow.table(columns), target)}, replace=True)
