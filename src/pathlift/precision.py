"""Products of float32 in full precision, whatever a training script has allowed.

PyTorch may round the factors of a float32 product to TF32 or bfloat16: on CUDA for convolutions by default, elsewhere when
`torch.set_float32_matmul_precision` or `torch.backends` say so. That is three digits, too few for a bound.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
        self.lock = threading.Lock()
        self.inside = 0
        self.before: list[tuple[Any, str, Any]] = []

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.before = [(place, name, getattr(place, name)) for place, name, _ in _switches()]
                for place, name, exact in _switches():
                    setattr(place, name, exact)

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for place, name, value in self.before:
                    setattr(place, name, value)


_GUARD = _Guard()


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 numbers in float32 inside; the switches are put back when the last thread leaves."""
    _GUARD.enter()
    try:
        yield
    finally:
        _GUARD.leave()
