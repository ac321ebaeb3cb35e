"""Products with |W| that read W once: PyTorch has no such operation, and numba compiles one where it is installed.

A linear layer of one row is bound by memory. PyTorch writes |W| down before it multiplies, and W·x·g too; a compiled loop does
all on the way, at the speed of a product with W itself. `suits` is the one place that decides: it is True for plain tensors in
memory, large enough, outside of anything that records or transforms operations, if numba is there. All else goes PyTorch's way.

Rounding. `several` and `compared` sum in another order than PyTorch, with multiplications and additions joined
(`team.arithmetic`); bounds on rounding hold for any order (`pathlift.passes.rounding`), and a joined operation rounds once
instead of twice. Nothing is assumed to be finite. `back` multiplies in the order of PyTorch, for the guards of
`pathlift.passes.backward` are about it.

Threads are those that PyTorch has waiting (`pathlift.fused.team`), as many as it has; in a process that was forked, and where
PyTorch's are not those of GNU's OpenMP, Python's, started for one call: numba's own may not be entered by two threads at once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pathlift.fused import loops
from pathlift.fused.team import Arguments, Loop, arithmetic, kept, parallel_region

LEAST = 1 << 20
"""Weights from which on a loop is worth it: it saves 0.2 to 3 ms for each million, and a process that has no loops yet takes a
second to import numba and load them, or another one each to compile them, once."""

FEW = 64
"""Vectors up to which a loop is sooner done than PyTorch: they stay in a cache, beside four rows of weights."""

SHARE = 1 << 19
"""Multiplications that a thread is worth."""

WIDTHS = {(torch.float32, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float64)}
"""Types of weights and tracks."""


@functools.cache
def _numba() -> Any | None:
    """Import numba, if it is there to be used."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        numba: Any = importlib.import_module("numba")
    except Exception as error:  # whatever it raises when another package does not suit it
        warnings.warn(f"numba is installed but does not load, so that PyTorch computes alone: {error}", stacklevel=2)
        return None
    return None if numba.config.DISABLE_JIT else numba


@functools.cache
def _compiled(loop: Loop) -> Loop:
    """Return a loop as machine code: compiled for each type when it is first called, and kept on disk where that can be."""
    return kept(_numba().njit, loop, nogil=True, fastmath=arithmetic(loop))  # type: ignore[union-attr,no-any-return]


def _untransformed() -> bool:
    """Whether operations are just done: not traced, batched, counted or handed to somebody."""
    inside: Any = torch._C
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or inside._get_tracing_state() is not None
        or inside._len_torch_dispatch_stack()
        or inside._len_torch_function_stack()
        or inside._functorch.peek_interpreter_stack() is not None
    )


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in memory, end to end."""
    kind = type(tensor) in {Tensor, Parameter} and tensor.device.type == "cpu" and tensor.layout == torch.strided
    return kind and tensor.is_contiguous() and not tensor.is_neg()


def suits(weights: Sequence[Tensor], tracks: Sequence[Tensor]) -> bool:
    """Decide whether the loops of this module take these tensors.

    Args:
        weights: Of one shape, (rows, columns).
        tracks: Of one type.

    Returns:
        True when they do.
    """
    if weights[0].numel() < LEAST or not _untransformed():
        return False
    kinds = {(weight.dtype, track.dtype) for weight in weights for track in tracks}
    return kinds <= WIDTHS and all(map(_plain, (*weights, *tracks))) and _numba() is not None


class Recipe(Enum):
    """What two tracks x and y are multiplied with: entries (to, from) of a bundle of weights W and V (`Bundle.recipe`).

    Each has |W| at (0, 0). PIVOT has the pivot B of W and V at (1, 1) and |W| − B at (1, 0); TELESCOPING |V| at (1, 1) and
    |W − V| at (1, 0).
    """

    PIVOT = auto()
    TELESCOPING = auto()


def product(weight: Tensor, x: Tensor) -> Tensor:
    """Return |W|·x for several x.

    Args:
        weight: W, (rows, columns).
        x: (count, columns).

    Returns:
        (count, rows).
    """
    out = x.new_empty(len(x), len(weight))
    _run(loops.several, Arguments(weight, weight, x, x, False, out), len(weight))
    return out


def products(recipe: Recipe, weights: Sequence[Tensor], tracks: Mapping[int, Tensor]) -> dict[tuple[int, int], Tensor]:
    """Return the product of each entry of a recipe with its track.

    Args:
        recipe: Which entries.
        weights: W and V, (rows, columns).
        tracks: x under 0, y under 1, (columns,); either may be missing.

    Returns:
        Entry to product, (rows,); entries from a track that is missing may be left out.
    """
    weight = weights[0]
    known = next(iter(tracks.values()))
    x, y = (tracks.get(track, known) for track in (0, 1))
    keys = [(0, 0), (1, 1), (1, 0)]
    out = known.new_empty(len(keys), len(weight))
    _run(loops.compared, Arguments(weight, weights[-1], x[None], y[None], recipe is Recipe.PIVOT, out), len(weight))
    return {key: each for key, each in zip(keys, out, strict=True) if key[1] in tracks}


def sides(first: Tensor, second: Tensor) -> tuple[bool, bool, bool]:
    """Return whether |W| > |M| somewhere, |V| > |M| somewhere, M the pivot of both, and W ≠ V somewhere.

    Args:
        first: W, (rows, columns).
        second: V.

    Returns:
        The answers; NaN is greater than nothing, and differs from itself.
    """
    out = first.new_empty(3, len(first), dtype=torch.float64)
    _run(loops.sides, Arguments(first, second, out, out, False, out), len(first))
    above, below, different = (out.sum(1) > 0).tolist()
    return above, below, different


def back(weight: Tensor, x: Tensor, g: Tensor, shares: Tensor) -> Tensor:
    """Return |W|ᵀ·g, and write |W|·x·g into memory.

    Args:
        weight: W, (rows, columns).
        x: (columns,).
        g: (rows,).
        shares: Of the shape of W; overwritten.

    Returns:
        (columns,).
    """
    below = torch.zeros_like(x)
    _run(loops.back, Arguments(weight, shares, x[None], g[None], False, below[None]), len(x))
    return below


def _run(loop: Loop, arguments: Arguments, count: int) -> None:
    """Run a loop over ``count`` rows or columns, in parts whose length is a multiple of 4."""
    parts = max(1, min(torch.get_num_threads(), arguments.w.numel() * len(arguments.x) // SHARE))
    team = _team(loop, arguments) if parts > 1 else None
    if team is not None:
        team(arguments, count, parts)
        return
    compiled, arrays = _compiled(loop), arguments.arrays
    step = max(-(-count // (4 * parts)), 1) * 4
    ranges = [(first, min(first + step, count)) for first in range(0, count, step)]
    if len(ranges) <= 1:
        for part in ranges:
            compiled(*arrays, *part)
        return
    with ThreadPoolExecutor(len(ranges)) as threads:
        for done in [threads.submit(compiled, *arrays, *part) for part in ranges]:
            done.result()


def _team(loop: Loop, arguments: Arguments) -> Callable[[Arguments, int, int], None] | None:
    """Return what runs a loop on PyTorch's threads; None where they are not to be had."""
    if parallel_region() is None:
        return None
    from pathlift.fused import tasks  # imports numba

    return tasks.of(loop.__name__, *(tensor.dtype for tensor in (arguments.w, arguments.v, arguments.x)))
