"""Which weights get how many bits: one number for all, patterns of names, another number at both ends of the network (§9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from pathlift.errors import InputError
from pathlift.quantisation.formats import Format, format_of

Bits: TypeAlias = "int | str | Mapping[str, int | str | None] | None"
"""2 to 8, a floating-point format (``bf16``, ``fp8_e4m3``, ``fp8_e5m2``), or patterns of tensor or module names to either,
the first that matches counting; None, and what no pattern matches, stays in floating point."""


def formats_of(names: Sequence[str], bits: Bits, ends: int | str | None, *, affine: bool) -> dict[str, Format]:
    """Return the format of each tensor that is to be rounded.

    Args:
        names: All tensors that can be, in the model's order.
        bits: See `Bits`.
        ends: Of the first and of the last tensor, where they are rounded at all; None: as ``bits`` says.
        affine: Whether whole numbers get a zero point.

    Returns:
        Name to format, in the model's order.

    Raises:
        InputError: A pattern matches nothing, or nothing is left to be rounded.
    """
    chosen: dict[str, int | str | None] = dict.fromkeys(names, None if isinstance(bits, Mapping) else bits)
    if isinstance(bits, Mapping):
        chosen = _by_pattern(names, bits)
    if ends is not None:
        chosen |= {name: ends for name in (names[0], names[-1]) if chosen[name] is not None}
    formats = {name: format_of(value, affine=affine) for name, value in chosen.items() if value is not None}
    if not formats:
        raise InputError("There is nothing to quantise: bits leaves all weights in floating point.")
    return formats


def _by_pattern(names: Sequence[str], patterns: Mapping[str, int | str | None]) -> dict[str, int | str | None]:
    chosen: dict[str, int | str | None] = {}
    for pattern, value in patterns.items():
        matched = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)]
        if not matched:
            more = " …" if len(names) > 5 else ""
            raise InputError(f"No weight that can be quantised matches '{pattern}'. There are: {', '.join(names[:5])}{more}")
        chosen |= {name: value for name in matched if name not in chosen}
    return {name: chosen.get(name) for name in names}
