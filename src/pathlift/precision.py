"""Products of float32 in full precision, whatever a training script has allowed.

PyTorch may round the factors of a float32 product to TF32 or bfloat16: on CUDA for convolutions by default, elsewhere when
`torch.set_float32_matmul_precision` or `torch.backends` say so. That is three digits, too few for a bound.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def _switches() -> list[tuple[Any, str, Any]]:
    """Return every switch that lets a float32 product be rounded: where it is, its name, and the value that does not."""
    backends: Any = torch.backends
    if hasattr(backends.mkldnn, "matmul"):  # since torch 2.9
        places = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
        return [(place, "fp32_precision", "ieee") for place in places]
    return [(backends.cudnn, "allow_tf32", False), (_Matmul(), "precision", "highest")]


class _Matmul:
    """The one switch for matrix products of earlier versions, on any device."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


class _Guard:
    """How many passes are under way, and how the switches were before the first of them."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside = 0
        self.closed = False
        self.before: list[tuple[Any, str, Any]] = []

    def enter(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.closed)
            self.inside += 1
            if self.inside == 1:
                self.before = [(place, name, getattr(place, name)) for place, name, _ in _switches()]
                for place, name, exact in _switches():
                    setattr(place, name, exact)

    def leave(self) -> None:
        with self.changed:
            self.inside -= 1
            if self.inside == 0:
                for place, name, value in self.before:
                    setattr(place, name, value)
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.inside == 0 and not self.closed)
            self.closed = True

    def open(self) -> None:
        with self.changed:
            self.closed = False
            self.changed.notify_all()


_GUARD = _Guard()


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 numbers in float32 inside; the switches are put back when the last thread leaves."""
    _GUARD.enter()
    try:
        with without_autocast():
            yield
    finally:
        _GUARD.leave()


@contextmanager
def switches_as_they_were() -> Iterator[None]:
    """Wait until no pass is under way, and let none begin: PyTorch's tracer cannot stand the switches as passes need them."""
    _GUARD.close()
    try:
        yield
    finally:
        _GUARD.open()


def without_autocast() -> ExitStack:
    """Return a region in which PyTorch casts nothing by itself, whatever region the call stands in."""
    stack = ExitStack()
    for kind in ("cpu", "cuda", "mps", "xpu"):
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
