"""The edge map of a maximum over neurons among which −inf stands in constant places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pathlift.edges.axis import Axis, full_axes
from pathlift.edges.base import Compact
from pathlift.edges.unit import UnitEdges


@dataclass(frozen=True, eq=False)
class Beside(UnitEdges):
    """The unit edges of a pooling map that do not start behind a wall.

    What stands behind the wall below is 0, so that sums of path activations do not see it; a maximum of real activations
    reads −inf there.

    Attributes:
        pool: The map without a wall.
        wall: Where −inf stands, boolean, of the shape of the neurons below.
    """

    pool: UnitEdges
    wall: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Sum the antecedents."""
        return self.pool.gather(x)

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest antecedent, of values that are not negative."""
        return self.pool.gather_max(x)

    @override
    def antecedents(self, x: Tensor) -> Tensor:
        return self.pool.antecedents(self._walled(x))

    @override
    def largest(self, x: Tensor) -> Tensor:
        return self.pool.largest(self._walled(x))

    def _walled(self, x: Tensor) -> Tensor:
        return torch.where(self.wall.to(x.device), x.new_full((), -math.inf), x)

    def compact_unit(self, axes: tuple[Axis, ...], out: tuple[int, ...]) -> Compact | frozenset[int]:
        """All dimensions have to be full: the wall has an extent along each."""
        compact = frozenset(dim for dim, axis in enumerate(axes) if axis.classes is not None)
        return compact or Compact(self, full_axes(out))

    def __eq__(self, other: object) -> bool:
        """Whether the maps are equal, and the walls stand in the same places."""
        return isinstance(other, Beside) and self.pool == other.pool and torch.equal(self.wall, other.wall)

    def __hash__(self) -> int:
        """Agree with equality."""
        return hash((self.pool, self.shape))

    @property
    def shape(self) -> Sequence[int]:
        """Shape of the neurons below."""
        return tuple(self.wall.shape)
