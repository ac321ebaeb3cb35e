"""What a person reads of the symmetries of a network: families of groups that scale the same tensors, and pinned channels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from pathlift.graph.network import Network
from pathlift.rescaling.constraints import VARYING, ScaleConstraints
from pathlift.rescaling.relations import FIXED, NOTHING, Solution
from pathlift.results import Result

TensorAxis: TypeAlias = "tuple[str, int | None]"
"""A tensor and one of its axes; None for no single axis."""


@dataclass(frozen=True, repr=False)
class Family(Result):
    """Groups that scale the same axes of the same tensors, each its own channel.

    Attributes:
        groups: Their numbers.
        multiplied: Tensor and axis whose entries are multiplied by λ; axis None for a power of λ, entry by entry.
        divided: Tensor and axis whose entries are divided by λ.
    """

    groups: tuple[int, ...]
    multiplied: tuple[TensorAxis, ...]
    divided: tuple[TensorAxis, ...]


@dataclass(frozen=True, repr=False)
class Pinned(Result):
    """Output channels of a module whose factor must be 1.

    Attributes:
        module: Path of the module.
        channels: Their numbers.
        reason: The operator, input or output that fixes them.
    """

    module: str
    channels: tuple[int, ...]
    reason: str


@dataclass
class _Touched:
    """The tensors and axes that one group scales, each once."""

    multiplied: list[TensorAxis] = field(default_factory=list)
    divided: list[TensorAxis] = field(default_factory=list)


def families_of(constraints: ScaleConstraints, network: Network) -> tuple[Family, ...]:
    """Put groups together that scale the same axes of the same tensors.

    The classes above a weight multiply it, those below divide it; a class scales as the groups in its row of s = B·g, with a
    negative entry the other way round, and with an entry other than ±1 by a power, which is no plain axis.

    Args:
        constraints: What the function of a network asks of scales.
        network: The network.

    Returns:
        The families, in the order of their first groups.
    """
    solution = constraints.solution
    entries: dict[int, list[tuple[int, float]]] = {}
    for row, group, entry in zip(solution.rows.tolist(), solution.columns.tolist(), solution.entries.tolist(), strict=True):
        entries.setdefault(row, []).append((group, entry))
    touched = [_Touched() for _ in range(solution.dimension)]
    for name in constraints.upwards:
        scaling = constraints.scalings[name]
        axis_above, axis_below = scaling.axes(network.state[name].shape)
        above, below = scaling.above, scaling.below
        if axis_above is not None and axis_above == axis_below:  # elements between neurons of one class stay: slopes of a PReLU
            above, below = (classes[above != below] for classes in torch.broadcast_tensors(above, below))
        for classes, axis, multiplies in ((above, axis_above, True), (below, axis_below, False)):
            for number in torch.unique(classes).tolist():
                for group, entry in entries.get(number, []):
                    upwards = multiplies == (entry > 0)
                    axes = touched[group].multiplied if upwards else touched[group].divided
                    tensor_axis = (name, axis if abs(entry) == 1.0 else None)
                    if tensor_axis not in axes:
                        axes.append(tensor_axis)
    families: dict[tuple[tuple[TensorAxis, ...], tuple[TensorAxis, ...]], list[int]] = {}
    for group, axes_of in enumerate(touched):
        families.setdefault((tuple(axes_of.multiplied), tuple(axes_of.divided)), []).append(group)
    return tuple(Family(tuple(groups), *axes) for axes, groups in families.items())


def pinned_by(constraints: ScaleConstraints) -> tuple[Pinned, ...]:
    """Find the channels whose scale is 0, and what fixes them.

    Args:
        constraints: What the function of a network asks of scales.

    Returns:
        Channels by module and reason.
    """
    relations = constraints.relations
    why = relations.why_fixed()
    pinned: list[Pinned] = []
    for module, labels in constraints.channels.items():
        classes = relations.find(labels.clamp(min=0))
        reasons: dict[str, list[int]] = {}
        channels = zip(classes.tolist(), labels.tolist(), why(labels), strict=True)
        for channel, (number, label, reason) in enumerate(channels):
            if label == NOTHING:
                reasons.setdefault("no output depends on it", []).append(channel)
            elif number == FIXED:
                reasons.setdefault(reason or "it only hands on the input", []).append(channel)
        pinned += [Pinned(module, tuple(several), reason) for reason, several in reasons.items()]
    return tuple(pinned)


def group_of(solution: Solution, label: int) -> int | None:
    """Return the one group whose factor is that of a neuron; None where it is 1 or a product of several.

    Args:
        solution: The solution of all relations.
        label: Of the neuron, or `VARYING`.

    Returns:
        Number of the group.
    """
    if label in (VARYING, NOTHING):
        return None
    number = int(solution.classes[label])
    (indices,) = torch.nonzero(solution.rows == number, as_tuple=True)
    single = number > 0 and len(indices) == 1 and float(solution.entries[indices[0]]) == 1.0
    return int(solution.columns[indices[0]]) if single else None


def axes_text(axes: tuple[TensorAxis, ...]) -> str:
    """Write tensors and axes as they are indexed, at most six of them."""
    shown = [name if axis is None else f"{name}[{', '.join([':'] * axis + ['i'])}]" for name, axis in axes[:6]]
    return ", ".join(shown) + (f" and {len(axes) - 6} more" if len(axes) > 6 else "")
