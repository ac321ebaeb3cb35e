"""What often lies where a file was to be downloaded: a pointer of Git LFS, or the page of a web site."""

from __future__ import annotations

from pathlib import Path

from pathlift.errors import InputError

POINTER = b"version https://git-lfs"
"""How a pointer of Git LFS begins."""

PAGES = (b"<!doctype html", b"<html")
"""How a page begins, in small letters."""


def check_downloaded(path: Path) -> None:
    """Refuse a file that stands in the place of another.

    Args:
        path: A file that is there.

    Raises:
        InputError: It is a pointer of Git LFS or a page of a web site, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(64).lstrip().lower()
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}.") from error
    if beginning.startswith(POINTER):
        raise InputError(f"'{path}' is a pointer of Git LFS, the file itself was not downloaded. Fetch it: git lfs pull.")
    if beginning.startswith(PAGES):
        raise InputError(f"'{path}' is a web page and not the file that was to be downloaded. Download the file itself.")
