"""The factors of a rescaling as a user gives them, one per group or by channels of modules, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.rescaling.families import Pinned

Factors: TypeAlias = Tensor | Sequence[float] | Mapping[str, Tensor | Sequence[float] | float]
"""One positive number per group; or module name to one per output channel, for as many modules as wanted."""


def by_group(factors: Tensor | Sequence[float], groups: int) -> Tensor:
    """Return factors that are given one per group.

    Args:
        factors: As given.
        groups: Number of groups.

    Returns:
        λ, float64, shape (groups,).

    Raises:
        InputError: There are too many or too few, or one is not positive and finite.
    """
    values = torch.as_tensor(factors, dtype=torch.float64, device="cpu").detach().cpu()
    if tuple(values.shape) != (groups,):
        raise InputError(f"factors must have shape ({groups},), one per group, found {tuple(values.shape)}.")
    _refuse_others_than_positive(values, "factors")
    return values


def by_module(
    factors: Mapping[str, Tensor | Sequence[float] | float],
    groups_of: Callable[[str], tuple[int | None, ...]],
    pinned: Sequence[Pinned],
    groups: int,
) -> Tensor:
    """Return factors that are given by channels of modules.

    Args:
        factors: Module to one factor per output channel, or to one for all.
        groups_of: Module to the group of each of its channels.
        pinned: Channels whose factor must be 1.
        groups: Number of groups.

    Returns:
        λ, float64, shape (groups,); 1 for groups that no module names.

    Raises:
        InputError: They contradict each other or a pinned channel, or one is not positive and finite.
    """
    by_group = torch.ones(groups, dtype=torch.float64, device="cpu")
    set_by: dict[int, str] = {}
    reasons = {(part.module, channel): part.reason for part in pinned for channel in part.channels}
    for module, given in factors.items():
        channels = groups_of(module)
        values = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach().cpu()
        if values.dim() > 1 or (values.dim() == 1 and len(values) != len(channels)):
            raise InputError(f"'{module}' has {len(channels)} channels, found factors of shape {tuple(values.shape)}.")
        _refuse_others_than_positive(values.reshape(-1), f"factors['{module}']")
        for channel, (group, value) in enumerate(zip(channels, values.expand(len(channels)).tolist(), strict=True)):
            where = f"channel {channel} of '{module}'"
            if group is None and value != 1.0:
                reason = reasons.get((module, channel), "its factor is not free: it follows from several groups")
                raise InputError(f"{where} is pinned ({reason}); its factor must be 1, found {value}.")
            if group is None:
                continue
            if group in set_by and float(by_group[group]) != value:
                before = f"{set_by[group]}: found {value} and {float(by_group[group])}"
                raise InputError(f"{where} shares its factor with {before}.")
            by_group[group], set_by[group] = value, where
    return by_group


def _refuse_others_than_positive(values: Tensor, what: str) -> None:
    bad = ~(torch.isfinite(values) & (values > 0))
    if bool(bad.any()):
        index = int(bad.nonzero()[0, 0])
        raise InputError(f"{what} must be positive and finite, found {float(values[index])} at {index}.")
