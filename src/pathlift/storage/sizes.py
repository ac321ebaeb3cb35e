"""How much a file of a stranger may ask for."""

from __future__ import annotations

from pathlift.errors import InputError

SPARE_BYTES = 1 << 26
"""A file may unfold to this much more than it has."""

HEADER_BYTES = 100_000_000
"""An index has at most this much, as has the header of a file of safetensors."""

MOST_TENSORS = 1 << 16
"""A file has at most so many tensors."""


def check_unfolding(size: int, unfolded: int) -> None:
    """Refuse a file that would take far more memory than it has bytes.

    Args:
        size: Its bytes.
        unfolded: What is to be read from it, in bytes.

    Raises:
        InputError: That is more than its bytes and `SPARE_BYTES`.
    """
    if unfolded > size + SPARE_BYTES:
        raise InputError(f"{size:,} bytes unfold to {unfolded:,}, which no file of weights does.")
