"""Loops as numba compiles them for a parallel region (`pathlift.fused.team`): each thread of it does its part.

Imported when numba is there. A region calls a function of one pointer, at which lie the addresses of all arrays.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from pathlift.fused import loops
from pathlift.fused.team import Arguments, Loop, arithmetic, kept, parallel_region

LENGTH = 15
"""Numbers that a region is handed."""

SOURCE = zlib.crc32(Path(loops.__file__).read_bytes())
"""Part of each task, so that what is kept on disk is compiled again when a loop changes: numba looks at this file alone."""

Task = Callable[..., None]


def _known(name: str) -> Any:
    """Return a function of the OpenMP library, without arguments and giving an int."""
    address = ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(name, address)
    return types.ExternalFunction(name, types.int32())


_own_number, _number_of_threads = _known("omp_get_thread_num"), _known("omp_get_num_threads")


@intrinsic  # type: ignore[untyped-decorator]
def _at(_typing: Any, _address: Any) -> Any:
    """Take a number for an address."""

    def generated(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generated


@numba.njit  # type: ignore[untyped-decorator]
def unpacked(data: Any, kinds: Any) -> Any:
    """Return the arguments of a loop for one thread: see `Arguments.addresses`. Kinds: of w, v, tracks; `SOURCE`."""
    n, (w_type, v_type, kind, _) = carray(data, (LENGTH,)), kinds
    w, v = carray(_at(n[0]), (n[5], n[6]), w_type), carray(_at(n[1]), (n[5], n[6]), v_type)
    x, y, out = (
        carray(_at(n[2]), (n[7], n[8]), kind),
        carray(_at(n[3]), (n[9], n[10]), kind),
        carray(_at(n[4]), (n[11], n[12]), kind),
    )
    step = -(-n[14] // (4 * _number_of_threads())) * 4
    first = min(_own_number() * step, n[14])
    return w, v, x, y, n[13] != 0, out, first, min(first + step, n[14])


def _ready(loop: Loop) -> Any:
    return kept(numba.njit, loop, nogil=True, fastmath=arithmetic(loop))


_several, _compared, _sides, _back = map(_ready, (loops.several, loops.compared, loops.sides, loops.back))


# One function for each loop, which numba finds by its name: so it knows on disk what it compiled in another process.
def several(*kinds: Any) -> Task:
    """Return `loops.several` for a region."""
    return lambda data: _several(*unpacked(data, kinds))


def compared(*kinds: Any) -> Task:
    """Return `loops.compared` for a region."""
    return lambda data: _compared(*unpacked(data, kinds))


def sides(*kinds: Any) -> Task:
    """Return `loops.sides` for a region."""
    return lambda data: _sides(*unpacked(data, kinds))


def back(*kinds: Any) -> Task:
    """Return `loops.back` for a region."""
    return lambda data: _back(*unpacked(data, kinds))


_TASKS = {"several": several, "compared": compared, "sides": sides, "back": back}
_KINDS = {torch.float32: np.float32, torch.float64: np.float64}


@functools.cache
def of(name: str, *dtypes: torch.dtype) -> Callable[[Arguments, int, int], None]:
    """Return what runs a loop on PyTorch's threads.

    Args:
        name: The loop.
        dtypes: Of w, of v and of the tracks.

    Returns:
        A function of the arguments of the loop, the number of rows or columns and that of threads.
    """
    task = _TASKS[name](*(_KINDS[dtype] for dtype in dtypes), SOURCE)
    signature = types.void(types.CPointer(types.int64))
    compiled = kept(lambda own, **options: numba.cfunc(signature, **options)(own), task)

    def run(arguments: Arguments, count: int, threads: int) -> None:
        region, data = parallel_region(), arguments.addresses(count)
        assert region is not None
        region(compiled.address, data.ctypes.data, threads, 0)

    return run
