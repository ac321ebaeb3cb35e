"""Locks in a process that was forked: a thread that held one is not there to release it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def in_child(afresh: Callable[[], None]) -> Callable[[], None]:
    """Call a function in every child of this process as soon as it is forked.

    Args:
        afresh: The function.

    Returns:
        The same function.
    """
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=afresh)
    return afresh


class LockPerProcess:
    """Holds a lock between the threads of a process, another one in each forked child; for a module, which stays.

    Attributes:
        lock: The lock. Taken by ``with``, it is released whenever Ctrl-C comes; methods around it could not promise that.
    """

    def __init__(self) -> None:
        self._begin()
        in_child(self._begin)

    def _begin(self) -> None:
        self.lock = threading.Lock()
