"""The threads that PyTorch has waiting, and what a loop is given.

After an operation PyTorch's threads keep their cores busy for some milliseconds, to be there for the next one. Threads of
Python's would share those cores with them, and take 0.1 ms to start: two layers of 38 and 17 million weights take 10 ms with
them, as `torch.mv` does, and 7 in a parallel region of PyTorch's own OpenMP library, which starts in 6 µs. ``GOMP_parallel``
enters such a region in every program that gcc compiled; it is there once PyTorch is loaded.

A forked process has no such threads and would wait for them for ever, in PyTorch's operations as well.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

Loop: TypeAlias = Callable[..., None]


class Arguments(NamedTuple):
    """What a loop is given: see `pathlift.fused.loops`."""

    w: Tensor
    v: Tensor
    x: Tensor
    y: Tensor
    pivot: bool
    out: Tensor

    @property
    def arrays(self) -> list[Any]:
        """The same as NumPy's arrays."""
        return [value.detach().numpy() if isinstance(value, Tensor) else value for value in self]

    def addresses(self, count: int) -> Any:
        """Lay out what a parallel region is handed, int64: see `tasks.unpacked`."""
        tensors = [self.w, self.v, self.x, self.y, self.out]
        sizes = [*self.w.shape, *self.x.shape, *self.y.shape, *self.out.shape]
        return np.array([*(tensor.data_ptr() for tensor in tensors), *sizes, self.pivot, count], np.int64)


def arithmetic(loop: Loop) -> set[str]:
    """Return what a compiler may do to the arithmetic of a loop: `back` multiplies in the order of PyTorch."""
    return {"contract"} if loop.__name__ == "back" else {"reassoc", "contract", "nsz"}


def kept(compile_: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Compile, and keep what comes of it on disk where a folder can be written to."""
    try:
        return compile_(*args, cache=True, **options)
    except RuntimeError:  # no folder can be written to
        return compile_(*args, **options)


_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def parallel_region() -> Callable[[int, int, int, int], None] | None:
    """Return ``GOMP_parallel``: (address of a function of a pointer, the pointer, number of threads, 0); None without it."""
    return None if _forked else _entry()


@functools.cache
def _entry() -> Callable[[int, int, int, int], None] | None:
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another OpenMP, or another system
        return None
    entry.argtypes, entry.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return entry
