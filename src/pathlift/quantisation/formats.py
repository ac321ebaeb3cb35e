"""What a grid of weights is made of: the levels that integers stand for, before a scale (mathematics §9).

A format is an increasing map q ↦ level(q) from the integers ``low`` to ``high``. Of whole numbers it is q itself, less a zero
point; of a floating-point format its values in order, so that q + 1 is the next one. All else is written once for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from pathlift.errors import InputError, nearest

MOST_BITS = 8
"""The widest grid of whole numbers that files hold."""


class Format(ABC):
    """The levels of a grid.

    Attributes:
        low: The smallest integer.
        high: The largest integer.
        bits: What one weight takes.
        scaled: Whether a grid of this format has a scale; the range of the others is that of the weights themselves.
    """

    low: int
    high: int
    bits: int
    scaled: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """How the format is called."""

    @property
    @abstractmethod
    def affine(self) -> bool:
        """Whether a grid has a zero point."""

    @abstractmethod
    def levels(self, integers: Tensor, zero: Tensor) -> Tensor:
        """Return the level of each integer.

        Args:
            integers: From ``low`` to ``high``.
            zero: Zero points, broadcasting.

        Returns:
            Exact float64 numbers.
        """

    @abstractmethod
    def floor(self, levels: Tensor, zero: Tensor) -> Tensor:
        """Return the last integer whose level is no larger; not yet cut off at ``low`` and ``high``.

        Args:
            levels: Any numbers.
            zero: Zero points, broadcasting.

        Returns:
            Integers, int32.
        """

    @abstractmethod
    def top(self) -> float:
        """Return the largest level without a zero point."""

    @abstractmethod
    def last_step(self) -> float:
        """Return the distance of the largest level from the one before it."""


@dataclass(frozen=True)
class WholeNumbers(Format):
    """Whole numbers of some bits. Without a zero point as many above 0 as below, so that −w is rounded as w is.

    Attributes:
        bits: Number of bits, at least 2.
        affine: Whether there is a zero point.
    """

    bits: int
    affine: bool = False

    @property
    def low(self) -> int:  # type: ignore[override]
        """The smallest integer."""
        return -self.high - (1 if self.affine else 0)

    @property
    def high(self) -> int:  # type: ignore[override]
        """The largest integer."""
        return (1 << (self.bits - 1)) - 1

    @property
    def name(self) -> str:
        """``int4``, say."""
        return f"int{self.bits}"

    def levels(self, integers: Tensor, zero: Tensor) -> Tensor:
        """See `Format.levels`."""
        return (integers - zero).double()

    def floor(self, levels: Tensor, zero: Tensor) -> Tensor:
        """See `Format.floor`."""
        reach = 2.0**30  # far outside of any grid, and within int32
        return levels.floor().clamp(-reach, reach).to(torch.int32) + zero

    def top(self) -> float:
        """See `Format.top`."""
        return float(self.high)

    def last_step(self) -> float:
        """See `Format.last_step`."""
        return 1.0


@dataclass(frozen=True)
class FloatingPoint(Format):
    """The finite values of a floating-point type.

    Attributes:
        kind: The type: bfloat16, float8_e4m3fn or float8_e5m2.
    """

    kind: torch.dtype

    @property
    def scaled(self) -> bool:  # type: ignore[override]
        """Whether its range is too small to do without a scale."""
        return self.bits == 8

    @property
    def bits(self) -> int:  # type: ignore[override]
        """What one weight takes."""
        return self.kind.itemsize * 8

    @property
    def low(self) -> int:  # type: ignore[override]
        """The smallest integer."""
        return -self.high

    @property
    def high(self) -> int:  # type: ignore[override]
        """The largest integer: its values count from 0 upwards."""
        return len(_values(self.kind)) // 2

    @property
    def name(self) -> str:
        """``fp8_e4m3``, say."""
        return next(name for name, kind in FLOATS.items() if kind == self.kind)

    @property
    def affine(self) -> bool:
        """Whether there is a zero point: never."""
        return False

    def levels(self, integers: Tensor, zero: Tensor) -> Tensor:  # noqa: ARG002 - there is none
        """See `Format.levels`."""
        return _values(self.kind).to(integers.device)[integers.long() + self.high]

    def floor(self, levels: Tensor, zero: Tensor) -> Tensor:  # noqa: ARG002 - there is none
        """See `Format.floor`."""
        values = _values(self.kind).to(levels.device)
        return torch.searchsorted(values, levels.double().contiguous(), right=True, out_int32=True) - 1 - self.high

    def top(self) -> float:
        """See `Format.top`."""
        return float(torch.finfo(self.kind).max)

    def last_step(self) -> float:
        """See `Format.last_step`."""
        values = _values(self.kind)
        return float(values[-1] - values[-2])


FLOATS: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Floating-point formats by name."""


@lru_cache
def _values(kind: torch.dtype) -> Tensor:
    """Return the finite values of a type in order, 0 in the middle."""
    whole = {1: torch.uint8, 2: torch.int16}[kind.itemsize]
    codes = torch.arange(2 ** (8 * kind.itemsize - 1), device="cpu").to(whole)
    values = codes.view(kind).double()
    values = values[torch.isfinite(values)]
    return torch.cat([-values.flip(0), values[1:]])


def format_of(bits: int | str, *, affine: bool = False) -> Format:
    """Return the format of a number of bits, or of a name.

    Args:
        bits: 2 to 8, or a name in `FLOATS`.
        affine: Whether whole numbers get a zero point.

    Returns:
        The format.

    Raises:
        InputError: There is none such.
    """
    if isinstance(bits, str):
        if bits not in FLOATS:
            raise InputError(f"There is no format '{bits}'.{nearest(bits, FLOATS)} Grids of whole numbers go by their bits.")
        return FloatingPoint(FLOATS[bits])
    if not 2 <= bits <= MOST_BITS:
        raise InputError(f"A grid of whole numbers has 2 to {MOST_BITS} bits, found {bits}.")
    return WholeNumbers(bits, affine)
