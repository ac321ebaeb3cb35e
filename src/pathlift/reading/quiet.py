"""Silence in one thread: what PyTorch's exporter warns of and logs there, while all other threads are heard.

Filters of warnings and the levels of loggers belong to the process. So nothing is replaced: a filter is added that looks at
the thread it is asked in, and is taken away again.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_here = threading.local()


def _silent(_: object) -> bool:
    return getattr(_here, "silent", False)


class _Warnings:
    """Stands for the pattern of a message in a filter of warnings: matches all that a silent thread says, and nothing else."""

    match = staticmethod(_silent)


class _Records(logging.Filter):
    """Lets a record of a log pass unless a silent thread made it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _silent(record)


WARNINGS: Any = ("ignore", _Warnings(), Warning, None, 0)
RECORDS = _Records()


@contextmanager
def quiet(package: str) -> Iterator[None]:
    """Silence the warnings of this thread, and what it logs by the loggers of a package; one thread at a time.

    Args:
        package: Name of the package.
    """
    names = list(logging.Logger.manager.loggerDict)
    loggers = [logging.getLogger(name) for name in names if name == package or name.startswith(f"{package}.")]
    filters: Any = warnings.filters
    filters.insert(0, WARNINGS)
    for logger in loggers:
        logger.addFilter(RECORDS)
    _here.silent = True
    try:
        yield
    finally:
        _here.silent = False
        for logger in loggers:
            logger.removeFilter(RECORDS)
        now: Any = warnings.filters  # another thread may have put its own in the place meanwhile
        for held in (filters, now):
            with suppress(ValueError):
                held.remove(WARNINGS)
