"""A file that is to be read must be one."""

from __future__ import annotations

from pathlib import Path

from pathlift.failures import InputError


def check_present(path: Path) -> None:
    """Refuse what is no file.

    Args:
        path: What is to be read.

    Raises:
        InputError: It is a folder, or not there at all.
    """
    if path.is_dir():
        raise InputError(f"'{path}' is a folder. Give the name of a file.")
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
