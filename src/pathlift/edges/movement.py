"""Edge maps of data movement, and how they act on compact tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from pathlift.edges.axis import Axis, through_taps
from pathlift.edges.base import Compact
from pathlift.edges.chain import Chain
from pathlift.edges.unit import Gather, UnitEdges
from pathlift.edges.view import Strided, plan_view

Spatial: TypeAlias = "Literal['view'] | tuple[int, ...] | None"
"""How a movement treats space: it only views the tensor; it acts along these dimensions, each by itself, and leaves all
others alone; or None: it may mix anything."""


class Move(UnitEdges):
    """Data movement: each neuron above is one neuron below, or nothing (zero padding).

    The same function serves real activations, path activations and index tensors.
    """

    fresh = False

    def __init__(self, function: Callable[[Tensor], Tensor], spatial: Spatial = None) -> None:
        """Describe the map.

        Args:
            function: The movement, a function of the tensor of neurons below.
            spatial: How it treats space.
        """
        self.function = function
        self.spatial = spatial

    def gather(self, x: Tensor) -> Tensor:
        """Move the elements."""
        return self.function(x)

    @override
    def compact_unit(self, axes: tuple[Axis, ...], out: tuple[int, ...]) -> Compact | frozenset[int]:
        if all(axis.classes is None for axis in axes) or self.spatial is None:
            return super().compact_unit(axes, out)
        return self._compact_view(axes, out) if self.spatial == "view" else self._compact_axes(axes, self.spatial)

    def _compact_view(self, axes: tuple[Axis, ...], out: tuple[int, ...]) -> Compact | frozenset[int]:
        full = torch.empty([axis.size for axis in axes], device="meta")
        view = self.function(full)
        if view._base is not full:
            return super().compact_unit(axes, out)
        plan = plan_view(axes, Strided(tuple(view.shape), view.stride(), int(view.storage_offset())))
        if plan is None:
            return super().compact_unit(axes, out)
        if plan.expanded:
            return plan.expanded
        links = (*([Gather(plan.read)] if plan.read else []), StridedView(plan.strided))
        return Compact(Chain(*links, weighted=len(links) - 1), plan.axes)

    def _compact_axes(self, axes: tuple[Axis, ...], dims: Sequence[int]) -> Compact:
        """Send the positions along each dimension through the movement, the untouched dimensions having size 1."""
        touched = {dim % len(axes) for dim in dims}
        sizes = [axis.size if dim in touched else 1 for dim, axis in enumerate(axes)]
        result, index = list(axes), {}
        for dim in touched:
            numbers = torch.arange(1, axes[dim].size + 1, dtype=torch.float64)
            below = numbers.reshape([-1 if other == dim else 1 for other in range(len(axes))]).expand(sizes)
            above = self.function(below).long() - 1  # which position each reads; −1 for padding
            # Other dimensions may hold padding at their borders: the largest entry is the position itself.
            read = above.amax([other for other in range(len(axes)) if other != dim])
            result[dim], table = through_taps(axes[dim], read[:, None])
            index[dim] = table[:, 0]
        return Compact(Gather(index), tuple(result))


class StridedView(UnitEdges):
    """A view of the compact tensor."""

    fresh = False

    def __init__(self, view: Strided) -> None:
        """Describe the map.

        Args:
            view: The view.
        """
        self.view = view

    def gather(self, x: Tensor) -> Tensor:
        """Take the view; a copy that `contiguous` makes begins at 0, wherever x begins in its memory."""
        memory = x.contiguous()
        return memory.as_strided(self.view.sizes, self.view.strides, memory.storage_offset() + self.view.offset)
