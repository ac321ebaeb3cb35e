"""Work in a thread of its own: nothing of it leaks into the caller's, and Ctrl-C cannot stop it half-way.

A trace changes the state of the thread that it runs in (modes of dispatch, gradients, autocast), and leaves it so when it is
interrupted. A thread that ends with the trace has no such state to leave, and starts with none of the caller's regions of
autocast, inference mode or a default device.
"""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar, copy_context
from typing import TypeVar

import torch

from pathlift.errors import InputError
from pathlift.forks import LockPerProcess
from pathlift.precision import default_device

ONE_AT_A_TIME = LockPerProcess()
"""The exporter keeps the state of a trace in the process: no other model may be traced, nor run by us, meanwhile."""

_busy: ContextVar[bool] = ContextVar("_busy", default=False)

Result = TypeVar("Result")


def in_turn(work: Callable[[], Result], device: torch.device) -> Result:
    """Call a function in a thread of its own, one at a time in the process, and wait for it.

    Args:
        work: The function.
        device: Where it computes; stays the default device if it is the caller's.

    Returns:
        What it returns.

    Raises:
        InputError: It is called from within itself.
        KeyboardInterrupt: Ctrl-C came meanwhile; the function has come to its end first, unless Ctrl-C comes twice.
    """
    if _busy.get():
        raise InputError(
            "A model is captured already, and its forward pass asks for another capture. Capture outside of forward."
        )
    default = default_device()
    results: list[Result] = []
    failed: list[BaseException] = []
    begun: list[bool] = []
    end = threading.Lock()  # the waits of `threading` break when they are interrupted, that of a lock does not
    end.acquire()

    def run() -> None:
        begun.append(True)
        _busy.set(True)
        try:
            with torch.device(default) if default.type == device.type != "cpu" else nullcontext():
                results.append(work())
        except BaseException as error:
            failed.append(error)
        finally:
            end.release()

    with ONE_AT_A_TIME.lock:
        try:
            _thread.start_new_thread(copy_context().run, (run,))
            end.acquire()
        except KeyboardInterrupt:
            limit = time.monotonic() + 1
            while not (results or failed) and (begun or time.monotonic() < limit):
                time.sleep(0.001)
            raise
    if failed:
        raise failed[0]
    return results[0]
