"""Tensors with an exponent beside them: the value is ``tensor · 2**exponent`` (mathematics §8).

Path activations grow like ∏‖|W_l|‖, far beyond any float. Tensors are kept within a window by exact powers of two, so no
digit is lost and a rescaling by powers of two changes no bit of a result. What could still be lost is a neuron whose path
activation is smaller than its layer's largest by more than the format's range; `too_small` finds it, and the pass starts
again in float64.

An example, in float32: a layer (3·2⁹⁵, 2⁹⁰) lies above its window, whose upper end is 2⁹⁰. It becomes (3/4, 2⁻⁷) with the
exponent 97. A layer (2³⁰, 2⁻⁹⁰) spans 120 bits, more than the 100 between `target` and `floor`, so it goes to the upper end of
the range: (2⁹⁵, 2⁻²⁵) with the exponent −65, where both have room below them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.edges.weights import Weights
from pathlift.errors import NumericalError
from pathlift.graph.recall import RangeError, extremes, minimum


@dataclass(frozen=True)
class MantissaWindow:
    """Where mantissas live, as powers of two.

    Attributes:
        low: The largest entry of a tensor is at least 2**low …
        high: … and at most 2**high,
        target: and is brought to 2**target when it is not.
        wide: Where the largest entry goes when the smallest is so far below that the range is needed.
        floor: Entries below 2**floor may lose digits when they are multiplied by weights; shares below it are not counted.
        sound: Entries above 2**sound have lost none when they were made. A summand that underflows is off by half the smallest
            subnormal number, 2⁻¹⁵⁰ in float32: of 2⁻¹¹⁰ that is 2⁻⁴⁰, so 2¹⁶ summands are off by a unit roundoff together. In
            float64 it is 2⁻¹⁰⁷⁵ of 2⁻⁹⁹⁰, for 2³² summands.
        least: Products of a path activation and what comes back for it below 2**least are dropped: no share holds them.
    """

    low: int
    high: int
    target: int
    wide: int
    floor: int
    sound: int
    least: int


WINDOWS = {
    torch.float32: MantissaWindow(low=-30, high=20, target=0, wide=96, floor=-100, sound=-110, least=-120),
    torch.float64: MantissaWindow(low=-200, high=200, target=0, wide=900, floor=-900, sound=-990, least=-1000),
}
"""A narrow window leaves room for the product of a path activation and what comes back for it (`pathlift.passes.backward`)."""

FORWARD_WINDOWS = {
    torch.float32: MantissaWindow(low=-60, high=90, target=0, wide=96, floor=-100, sound=-110, least=-120),
    torch.float64: MantissaWindow(low=-600, high=800, target=0, wide=900, floor=-900, sound=-990, least=-1000),
}
"""Without a way back, values may wander further before they are brought back."""


class Scaled(NamedTuple):
    """The value ``tensor · 2**exponent``, and what is known of its size without looking.

    Attributes:
        tensor: The mantissas.
        exponent: One for all of them.
        peak: No magnitude in the tensor exceeds 2**peak; None when nothing is known.
        trough: No entry of the tensor is below 2**trough; −inf when none is below 0, None when nothing is known.
        room: Memory that begins with the tensor, to be gone on in (`pathlift.graph.layers.Concat`).
    """

    tensor: Tensor
    exponent: float
    peak: float | None = None
    trough: float | None = None
    room: Tensor | None = None

    def at(self, exponent: float) -> Tensor:
        """Return the mantissa that goes with another exponent."""
        shift = self.exponent - exponent
        return self.tensor if shift == 0.0 else self.tensor * power(shift)

    def moved(self, exponent: float) -> Scaled:
        """Return the same value with another exponent."""
        shift = self.exponent - exponent
        if shift == 0.0:
            return self
        peak = None if self.peak is None else self.peak + shift
        return Scaled(self.tensor * power(shift), exponent, peak, told(self.trough, shift, self.tensor))

    def times(self, tensor: Tensor, weights: Weights | None) -> Scaled:
        """Return the value that a product of the entries, one weight to each, is; its size is known if those of both are.

        Args:
            tensor: The product.
            weights: The weights.

        Returns:
            The value, with the exponent of the weights.
        """
        exponent = self.exponent + (0.0 if weights is None else weights.exponent)
        extent = None if weights is None else weights.extent
        if extent is None or self.peak is None or self.trough is None or not 0.0 <= extent[0] <= extent[1] < math.inf:
            return Scaled(tensor, exponent)
        low, high = (math.frexp(end)[1] if end > 0.0 else -math.inf for end in extent)
        return Scaled(tensor, exponent, self.peak + high, told(self.trough, low - 1, tensor))

    def within(self, window: MantissaWindow) -> bool:
        """Whether what is known of the size says that the value lies in a window, with all digits in all entries."""
        if self.peak is None or self.trough is None:
            return False
        inside = window.low <= self.peak <= window.high and self.trough >= max(window.floor, window.sound)
        return inside and self.peak - self.trough <= window.target - window.floor

    def log2(self) -> Tensor:
        """Return log₂ of the value in float64, −inf for 0."""
        return torch.log2(self.tensor.double()) + self.exponent


def power(exponent: float) -> float:
    """Return 2**exponent, 0 or the largest float when it is out of range."""
    return 0.0 if exponent < -1074 else 2.0 ** min(exponent, 1023.0)


def total(parts: list[Scaled], *, fresh: bool, largest: bool = False) -> tuple[Scaled, bool]:
    """Add (or take the maximum of) values of broadcasting shapes, at the largest of their exponents.

    The sum is made in the memory of the first part where that may be: it is new (`propagate`), or became so when it was
    shifted. No other part is written to.

    Args:
        parts: At least one value; the first has the full shape.
        fresh: The first part's memory is free to be overwritten.
        largest: Take the maximum instead of the sum.

    Returns:
        The result, and whether aligning exponents shifted one of the parts.
    """
    exponent = max(part.exponent for part in parts)
    shifted = any(part.exponent != exponent for part in parts)
    out = parts[0].at(exponent)
    new = fresh or out is not parts[0].tensor
    for part in parts[1:]:
        free = new and not torch.is_grad_enabled() and _fits(part.tensor.shape, out.shape)
        if largest:
            other = part.at(exponent)
            out = torch.maximum(out, other, out=out) if free else torch.maximum(out, other)
        else:
            scale = power(part.exponent - exponent)
            out = out.add_(part.tensor, alpha=scale) if free else torch.add(out, part.tensor, alpha=scale)
        new = True
    highest, lowest = known(parts)  # of the largest part, and of that which is nowhere small: nothing is subtracted
    peak = None if highest is None else max(highest) - exponent + math.ceil(math.log2(len(parts)))
    return Scaled(out, exponent, peak, None if lowest is None else told(max(lowest), -exponent, out)), shifted


def known(parts: list[Scaled]) -> tuple[list[float] | None, list[float] | None]:
    """Return peaks and troughs of several values with their exponents in; None where one is not known."""
    peaks = [part.peak + part.exponent for part in parts if part.peak is not None]
    troughs = [part.trough + part.exponent for part in parts if part.trough is not None]
    return (peaks if len(peaks) == len(parts) else None), (troughs if len(troughs) == len(parts) else None)


def told(trough: float | None, shift: float, tensor: Tensor) -> float | None:
    """Return the trough after a shift, which means nothing below the normal numbers of a tensor: digits may be lost there."""
    if trough is None:
        return None
    return trough + shift if trough + shift >= math.log2(torch.finfo(tensor.dtype).tiny) else -math.inf


def _fits(small: torch.Size, large: torch.Size) -> bool:
    """Whether a tensor broadcasts into the memory of another."""
    if small == large:
        return True
    dims = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(size in (1, room) for size, room in dims)


def top(value: Scaled) -> float:
    """Return the exponent of the largest entry, or what is known to be above it."""
    if value.peak is not None:
        return value.peak + value.exponent
    low, high = extremes(value.tensor)
    return math.frexp(max(abs(low), abs(high)))[1] + value.exponent


def normalised(value: Scaled, window: MantissaWindow) -> tuple[Scaled | None, float]:
    """Bring a value into the window by an exact power of two.

    With 2**peak just above the largest magnitude, nothing is done where peak lies in the window and no entry lies below its
    floor. Otherwise the largest goes to 2**target; or to 2**wide, where the entries span more bits than there are between
    target and floor.

    Args:
        value: What an operator gave.
        window: The window of its precision.

    Returns:
        The value, None when it is zero everywhere, and its smallest entry (in the units of the returned mantissa).

    Raises:
        NumericalError: An entry is NaN or infinite.
    """
    low, high = extremes(value.tensor)
    size = max(abs(low), abs(high))
    trough = known_trough(low, value.tensor.dtype)
    if not math.isfinite(size):
        raise NumericalError("not finite")
    if size == 0.0:
        return None, 0.0
    peak = math.frexp(size)[1]
    span = peak - math.frexp(low)[1] if low > 0 else 0
    goal = window.wide if span > window.target - window.floor else window.target
    deep = low > 0 and math.frexp(low)[1] < window.floor
    if window.low <= peak <= window.high and goal == window.target and not deep:
        return value._replace(peak=peak, trough=trough), low
    if goal == window.wide and window.high < peak <= window.wide + 8:
        return value._replace(peak=peak, trough=trough), low
    # The power of two is to be a float of this type itself, also where all entries are below the normal range.
    shift = min(goal - peak, 127 if value.tensor.dtype == torch.float32 else 1000)
    low *= power(shift)
    trough = known_trough(low, value.tensor.dtype)
    return Scaled(value.tensor * power(shift), value.exponent - shift, peak + shift, trough), low


def known_trough(low: float, dtype: torch.dtype) -> float | None:
    """Return the trough of a tensor whose smallest entry is known (`Scaled`); numbers below the normal range are not told."""
    if low < 0.0:
        return None
    return math.frexp(low)[1] - 1 if low >= torch.finfo(dtype).tiny else -math.inf


def too_small(tensor: Tensor, floor: float) -> bool:
    """Whether a non-negative tensor has an entry between 0 and 2**floor, both excluded."""
    return tensor.numel() > 0 and least_above_zero(tensor) < power(floor)


def least_above_zero(tensor: Tensor) -> float:
    """Return the smallest positive entry of a non-negative tensor, infinity where there is none."""
    return minimum(F.threshold(tensor.detach(), 0.0, math.inf))  # a comparison takes several times as long


def raised(value: Scaled, window: MantissaWindow) -> Scaled | None:
    """Bring a non-negative value as high as its range allows, where entries have come near its lower end but lost no digit.

    Args:
        value: Mantissas within the window, some of them below its floor.
        window: The window of their precision.

    Returns:
        The value; None when the range does not hold all entries.
    """
    low, (_, high) = least_above_zero(value.tensor), extremes(value.tensor)
    shift = window.wide - math.frexp(high)[1]
    if math.frexp(low)[1] + shift < window.floor:
        return None
    return Scaled(value.tensor * power(shift), value.exponent - shift, window.wide, -math.inf)


__all__ = [
    "FORWARD_WINDOWS",
    "WINDOWS",
    "MantissaWindow",
    "RangeError",
    "Scaled",
    "known",
    "least_above_zero",
    "normalised",
    "power",
    "raised",
    "told",
    "too_small",
    "top",
    "total",
]
