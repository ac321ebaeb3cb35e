"""A limit on the time that a call may take: what ``seconds=`` means everywhere.

A long computation looks at its clock between steps or blocks. One that has something valid in hand when the time is up
returns it and says that it was stopped; one that has not raises `OutOfTimeError`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from contextvars import ContextVar

from pathlift.errors import InputError, OutOfTimeError


class Clock:
    """Seconds of wall time from the moment that it is made.

    Args:
        seconds: A finite number ≥ 0; None for no limit.

    Raises:
        InputError: ``seconds`` is anything else.

    Example:
        >>> Clock(None).over(), Clock(0).over()
        (False, True)
    """

    def __init__(self, seconds: float | None = None) -> None:
        good = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds < math.inf
        if seconds is not None and not good:
            raise InputError(f"seconds must be a finite number ≥ 0, or None for no limit, found {seconds!r}.")
        self.seconds = seconds
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left, 0 when the time is up and infinity where there is no limit."""
        return max(self._end - time.monotonic(), 0.0)

    def over(self) -> bool:
        """Tell whether the time is up."""
        return time.monotonic() >= self._end

    def check(self, what: str) -> None:
        """Go on only while there is time: for computations of which half is no answer.

        Args:
            what: What would be unfinished, the subject of the message.

        Raises:
            OutOfTimeError: The time is up.
        """
        if self.over():
            raise OutOfTimeError(
                f"{what} did not end within seconds={self.seconds:g}, and half of it is no answer. "
                "Allow more seconds, or None for no limit."
            )


_RUNNING: ContextVar[Clock] = ContextVar("clock")
NO_LIMIT = Clock(None)


def running() -> Clock:
    """Return the clock of the call that is under way, one without a limit when it has none."""
    return _RUNNING.get(NO_LIMIT)


@contextlib.contextmanager
def limited(seconds: float | None) -> Iterator[Clock]:
    """Give what runs inside so many seconds; whoever gave less before keeps the say.

    Args:
        seconds: A finite number ≥ 0; None for no further limit.

    Yields:
        The clock that `running` returns inside.

    Raises:
        InputError: ``seconds`` is anything else.
    """
    inner, outer = Clock(seconds), running()
    clock = inner if inner.left() < outer.left() else outer
    token = _RUNNING.set(clock)
    try:
        yield clock
    finally:
        _RUNNING.reset(token)
