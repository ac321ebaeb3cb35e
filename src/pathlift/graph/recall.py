"""The largest and smallest entries of tensors on an accelerator, without waiting for it at every layer.

A pass chooses exponents by the extremes of each tensor (§8). To know them the host has to wait for the device. So a pass
remembers what it saw; the next one takes that for granted, leaves the measurements on the device, and looks at all of them at
once when it is over. Where the powers of two agree, every choice was the one that it would have made: the results are the
same bit by bit. Where they do not, the pass runs again and looks.

Why powers of two are enough: what a pass asks of an extreme is its exponent (`frexp`), its sign, and whether it is 0, and
nothing else depends on the number. By induction over the layers: if all choices up to here were right, this layer is what it
would be, so is its measurement, and where that agrees, so is the next choice.

An example: a layer had the extremes (0.3, 40) and has (0.26, 63) after a step of training. 40 and 63 lie in [2⁵, 2⁶), 0.3 and
0.26 in [2⁻², 2⁻¹), so the exponents stay and one look at the end confirms it. With 65 in the place of 63 the pass runs again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from pathlift.errors import NumericalError

Memory: TypeAlias = dict[torch.dtype, list[tuple[float, float]]]
"""What passes of one kind have seen, by precision."""

Result = TypeVar("Result")


class RangeError(Exception):
    """The magnitudes inside one layer differ by more than the range of the current precision."""


class _ForgottenError(Exception):
    """The pass asks for more than was seen."""


class _Look:
    """Looks at every tensor at once, and takes notes."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def __call__(self, low: Tensor, high: Tensor) -> tuple[float, float]:
        """Return both numbers."""
        least, most = torch.stack((low, high)).tolist()
        self.seen.append((least, most))
        return least, most


class _Recall(_Look):
    """Takes the notes of an earlier pass for granted."""

    def __init__(self, seen: list[tuple[float, float]]) -> None:
        super().__init__()
        self.seen = seen
        self.measured: list[Tensor] = []

    def __call__(self, low: Tensor, high: Tensor) -> tuple[float, float]:
        """Return what was seen, and measure."""
        if len(self.measured) == len(self.seen):
            raise _ForgottenError
        self.measured.append(torch.stack((low, high)))
        return self.seen[len(self.measured) - 1]

    def confirmed(self) -> bool:
        """Whether everything is as it was, up to factors below two; waits for the device once."""
        if len(self.measured) != len(self.seen):
            return False
        measured = torch.stack(self.measured).tolist() if self.measured else []
        return all(_binades(now) == _binades(then) for now, then in zip(measured, self.seen, strict=True))


def _binades(extremes: tuple[float, float] | list[float]) -> tuple[tuple[float, int], ...]:
    """Return sign and exponent of both extremes; what is not finite has none, and differs from what was."""
    return tuple((math.copysign(1.0, end) if end else 0.0, math.frexp(end)[1]) for end in extremes if math.isfinite(end))


_LOOKING: ContextVar[_Look | None] = ContextVar("looking", default=None)


def extremes(tensor: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest entry, or what stands for them in every choice of an exponent.

    Args:
        tensor: Any non-empty tensor.

    Returns:
        Both as Python numbers.
    """
    low, high = torch.aminmax(tensor.detach() if tensor.requires_grad else tensor)
    looking = _LOOKING.get()
    if looking is not None:
        return looking(low, high)
    return low.item(), high.item()


def minimum(tensor: Tensor) -> float:
    """Return the smallest entry, as `extremes` does: half of the time where nobody asks for the largest.

    Args:
        tensor: Any non-empty tensor.

    Returns:
        A Python number.
    """
    low = (tensor.detach() if tensor.requires_grad else tensor).amin()
    looking = _LOOKING.get()
    return low.item() if looking is None else looking(low, low)[0]


def remembering(run: Callable[[torch.dtype], Result], dtype: torch.dtype, memory: Memory | None) -> Result:
    """Run a pass with the memory of earlier ones.

    Args:
        run: The pass, a function of the precision, which may be run twice.
        dtype: The precision.
        memory: What earlier passes saw, brought up to date; None to look at every tensor.

    Returns:
        What the pass returns.

    Raises:
        RangeError: The precision does not suffice.
        NumericalError: An entry is NaN or infinite.
    """
    if memory is None:
        return run(dtype)
    if dtype in memory:
        recall = _Recall(memory[dtype])
        token = _LOOKING.set(recall)
        try:
            result = run(dtype)
            if recall.confirmed():
                return result
        except (_ForgottenError, RangeError, NumericalError):
            pass  # exponents that no longer fit can cause any of them: the second run decides
        finally:
            _LOOKING.reset(token)
    look = _Look()
    token = _LOOKING.set(look)
    try:
        result = run(dtype)
    finally:
        _LOOKING.reset(token)
    memory[dtype] = look.seen
    return result
