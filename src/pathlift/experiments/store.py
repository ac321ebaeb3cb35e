"""Results on disk: every file is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import fcntl
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pathlift.errors import InputError
from pathlift.output import write_outputs
from pathlift.storage.torch_file import load_plain


def write(path: Path, content: bytes) -> None:
    """Write a file through a second one that is then renamed.

    Args:
        path: Where; its folder is made.
        content: What.

    Raises:
        InputError: It cannot be written (a full disk, say); what stood there before is kept.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error.strerror}. Earlier results are kept.") from error
    write_outputs({path: lambda partial: partial.write_bytes(content)}, replace=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, all or nothing."""
    write(path, json.dumps(values, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        InputError: It is damaged.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged: {error}. Delete it to have it computed again.") from error
    if not isinstance(values, dict):
        raise InputError(f"'{path}' is damaged: it holds no JSON object. Delete it to have it computed again.")
    return values


def write_checkpoint(path: Path, values: Mapping[str, Any]) -> None:
    """Write tensors and numbers in nested dictionaries and lists, all or nothing."""
    buffer = io.BytesIO()
    torch.save(dict(values), buffer)
    write(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; no code in it is run.

    Args:
        path: The file.

    Returns:
        Its content, on the CPU.

    Raises:
        InputError: It is damaged.
    """
    try:
        values = load_plain(path)
    except Exception as error:  # a torn file: whatever reading it raises, it cannot be read
        reason = next(iter(str(error).splitlines()), "it ends too early")
        raise InputError(f"'{path}' is damaged: {reason}. Delete it to have it computed again.") from error
    if not isinstance(values, dict):
        raise InputError(f"'{path}' is damaged: it holds no checkpoint. Delete it to have it computed again.")
    return values


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time work on a folder; the lock goes with the process, however it ends.

    Args:
        folder: The folder, made if it is not there.

    Yields:
        Nothing.

    Raises:
        InputError: Another process works on it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"'{folder}' cannot be used: {error.strerror}.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"Another process is at work on '{folder}'.") from None
        yield
