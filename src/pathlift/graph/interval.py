"""Intervals, and what a formula may ask of the interval arithmetic that it is enclosed in (mathematics §5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """Smallest and largest values, float64 tensors of one shape; the same tensor where there is one value, known exactly."""

    low: Tensor
    high: Tensor

    @property
    def exact(self) -> bool:
        """Whether it holds one value only."""
        return self.low is self.high

    @property
    def middle(self) -> Tensor:
        """Half way between both."""
        return self.low if self.exact else self.low / 2 + self.high / 2

    @property
    def radius(self) -> Tensor:
        """Half their distance."""
        return self.high / 2 - self.low / 2

    @property
    def size(self) -> Tensor:
        """Largest magnitude."""
        return torch.maximum(self.low.abs(), self.high.abs())


def point(value: Tensor) -> Interval:
    """Return the interval that holds one value.

    Args:
        value: Any real tensor.

    Returns:
        The interval.
    """
    wide = value.detach().double()
    return Interval(wide, wide)


class NoIntervalError(Exception):
    """An operator without interval arithmetic; the message names it."""


class IntervalArithmetic(Protocol):
    """What a formula may ask: operators by name on intervals, each rounded outwards, and other expressions.

    Attributes:
        arithmetic: Whether intervals hold what the model gets in its own arithmetic as well.
    """

    arithmetic: bool

    def operator(self, name: str, *args: Any) -> Interval:
        """Return the interval of an operator of PyTorch.

        Args:
            name: Such as ``mul``.
            args: Intervals and numbers.

        Returns:
            Its interval.
        """

    def enclosed(self, expression: Any) -> Interval:
        """Return the interval of an expression over the box."""
