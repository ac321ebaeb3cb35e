"""Where the elements of a moved weight come from, and the transpose of moving: scores go back to the parameters.

A weight may be parameters that are viewed, sliced, cast, detached, expanded or laid side by side. Numbers that name the
elements are sent through the movement itself, so that nothing depends on what PyTorch's own derivatives see of it.

An element with the digit z arrives as ±(z + 3/2) if +(z + 3/2) and −(z + 3/2) were sent: a constant of the graph is the same
both times, and 0 is never an origin. What is scaled or rounded on its way is no half, or lies outside [3/2, base + 1/2], and
the weight is then no movement.

An example: W of shape (2, 2), the weight Wᵀ. Its elements 0, 1, 2, 3 are sent as 1.5, 2.5, 3.5, 4.5 and arrive as 1.5, 3.5,
2.5, 4.5: the origins are 0, 2, 1, 3, and scores (s₀, s₁, s₂, s₃) of the weight go back as (s₀, s₂, s₁, s₃).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pathlift.graph.expressions import evaluate
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network

EXACT = 1 << 22
"""Halves up to here are float32 numbers."""


@dataclass(frozen=True, eq=False)
class Origins:
    """The elements of parameters of which a weight is made.

    Attributes:
        shapes: Shape of each parameter; their flattened elements are numbered one parameter after the other.
        index: For each element of the weight the number of its origin; −1 for a constant. Of the weight's shape.
    """

    shapes: Mapping[str, torch.Size]
    index: Tensor

    def back(self, share: Tensor) -> dict[str, Tensor]:
        """Send one number per element of the weight back to the parameters: the transpose of moving.

        Args:
            share: Of the weight's size.

        Returns:
            Parameter name to sums, of the parameter's shape.
        """
        sizes = [shape.numel() for shape in self.shapes.values()]
        index, flat = self.index.reshape(-1), share.reshape(-1)
        if bool((index < 0).any()):
            index, flat = index[index >= 0], flat[index >= 0]
        sums = share.new_zeros(sum(sizes)).index_add_(0, index, flat)
        return {name: part.view(self.shapes[name]) for name, part in zip(self.shapes, sums.split(sizes), strict=True)}

    def places(self) -> dict[str, Tensor]:
        """Return for each parameter the places of the weight's elements in it, −1 for those that come from elsewhere."""
        numbers, first = {}, 0
        for name, shape in self.shapes.items():
            inside = (self.index >= first) & (self.index < first + shape.numel())
            numbers[name] = torch.where(inside, self.index - first, -1)
            first += shape.numel()
        return numbers


def moved_from(network: Network, weight: WeightTensor) -> list[str]:
    """Return the names of the parameters that a weight tensor moves, in the model's order."""
    return [name for name in network.parameters if name in weight.requires]


def origins(network: Network, weight: WeightTensor) -> Origins | None:
    """Find where each element of a moved weight comes from.

    Args:
        network: The network.
        weight: A weight with `WeightTensor.movement`.

    Returns:
        The origins; None when the weight is no movement after all: a cast to integers rounds.
    """
    shapes = {name: network.state[name].shape for name in moved_from(network, weight)}
    total = sum(shape.numel() for shape in shapes.values())
    for base in (max(total, 2), 64, 2):  # small numbers pass through any narrow type on the way
        index = _numbered(network, weight, shapes, total, base)
        if index is not None:
            return Origins(shapes, index)
    return None


def _numbered(network: Network, weight: WeightTensor, shapes: Mapping[str, torch.Size], total: int, base: int) -> Tensor | None:
    """Send the digits of the elements' numbers to some base through the movement; None when they do not arrive whole."""
    dtype = torch.float32 if base < EXACT else torch.float64
    numbers = torch.arange(total, device=network.device)
    index, unit = torch.full(weight.shape, -1, device=network.device), 1
    while unit < total or unit == 1:
        digits = (torch.div(numbers, unit, rounding_mode="floor") % base).to(dtype) + 1.5
        plus, minus = (_evaluated(network, weight, shapes, sign * digits).double() for sign in (1, -1))
        moved = (plus == -minus) & (plus != 0)
        halves = moved & (torch.remainder(2 * plus, 2) == 1) & (plus >= 1.5) & (plus <= base + 0.5)
        if not torch.equal(moved, halves) or bool((~moved & (plus != minus)).any()):
            return None
        arrived = (plus - 1.5).long() * unit
        index = torch.where(moved, arrived if unit == 1 else index + arrived, index)
        unit *= base
    return index


def _evaluated(network: Network, weight: WeightTensor, shapes: Mapping[str, torch.Size], flat: Tensor) -> Tensor:
    parts = flat.split([shape.numel() for shape in shapes.values()])
    state = {name: network.state[name] for name in weight.requires if name not in shapes}
    state |= {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    assert weight.movement is not None
    with torch.no_grad():
        moved: Tensor = evaluate(weight.movement, state)
    return moved.expand(weight.shape) if moved.shape != weight.shape else moved


def moved_back(network: Network, weight: WeightTensor, share: Tensor) -> dict[str, Tensor]:
    """Send the shares of a moved weight back to the parameters; a plain view is written through.

    Args:
        network: The network.
        weight: A weight that `is_moved`.
        share: One number per element.

    Returns:
        Parameter name to sums, of the parameter's shape.
    """
    view = _view(network, weight, share.dtype)
    if view is None:
        sources = origins(network, weight)
        assert sources is not None
        return sources.back(share)
    sums = {name: torch.zeros(network.state[name].shape, dtype=share.dtype, device=share.device) for name in view[0]}
    strided = sums[view[1]].as_strided(view[2].shape, view[2].stride(), view[2].storage_offset())
    strided.copy_(share.reshape(view[2].shape))
    return sums


def _view(network: Network, weight: WeightTensor, dtype: torch.dtype) -> tuple[list[str], str, Tensor] | None:
    """Return the parameter of which a weight is a view without repetitions, and the view; None when it is none."""
    names = moved_from(network, weight)
    state = {name: network.state[name] for name in weight.requires if name not in names}
    blank = {name: torch.empty(network.state[name].shape, dtype=dtype, device=network.device) for name in names}
    assert weight.movement is not None
    with torch.no_grad():
        moved: Tensor = evaluate(weight.movement, {**state, **blank})
    for name, parameter in blank.items():
        if moved.dtype == dtype and moved.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
            return (names, name, moved) if _apart(moved) and parameter.numel() else None
    return None


def _apart(view: Tensor) -> bool:
    """Whether no two elements of a view surely share their memory."""
    reach = 0
    for step, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1 and step <= reach:
            return False
        reach += step * (size - 1)
    return True


_MOVED: WeakKeyDictionary[WeightTensor, bool] = WeakKeyDictionary()


def is_moved(network: Network, weight: WeightTensor) -> bool:
    """Whether each element of a weight is one element of a parameter or a constant, up to a factor.

    Args:
        network: The network.
        weight: One of its weight tensors.

    Returns:
        False for a parameter itself, a derived weight, and one that is rounded to integers on its way.
    """
    if weight.movement is None:
        return False
    if weight not in _MOVED:
        _MOVED[weight] = _view(network, weight, torch.float32) is not None or origins(network, weight) is not None
    return _MOVED[weight]
