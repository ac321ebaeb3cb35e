"""How a view of a tensor acts on its compact form: reshapes, transposes, slices, expansions, all as PyTorch strides them.

The full tensor lies contiguous in memory: position (p_0, p_1, …) at Σ_d p_d·S_d, where S_d is the product of the sizes after
d. Entry (i_0, i_1, …) of a view reads memory at ``offset + Σ_e i_e·s_e``. Memory is a number written in the digits p_d, so
the view is followed digit by digit:

- ``offset`` has the digits ``start``: where the view begins along each dimension;
- a stride s_e that is a multiple step·S_d, with the largest S_d that is no larger than it, is a *walk*: i_e moves p_d by
  ``step``;
- then p_d = start_d + Σ_e i_e·step_e over the walks along d, as long as this is less than the size of d. When it is not, the
  digit overflows into the one before.

A compact dimension stays compact when its digit depends on one dimension of the view at most: no overflow out of it or into
it, and no second walk along it. All others, which the view mixes, have to be expanded first.

Example: the tensor has shape (2, 3, 4), so S = (12, 4, 1), and the last two dimensions are constant. The view of shape
(4, 2, 3) with strides (1, 12, 4) is a transpose: one walk of step 1 along each dimension, and its first and last dimensions
are constant. The view of shape (2, 12) with strides (12, 1) flattens: its second dimension walks along the last one, up to
position 11 of 4. It overflows into the one before, and both have to be expanded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.edges.axis import Axis, classify, compact_shape


@dataclass(frozen=True)
class Strided:
    """A view of a contiguous tensor, as `torch.as_strided` takes it."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class ViewPlan:
    """How a view acts on a compact tensor: first `read` is taken of it, then the view ``strided``.

    Attributes:
        expanded: Dimensions that have to be expanded first, because the view mixes them with others.
        read: Compact dimension to the classes that the view reads, one for each class of the result; left out where these
            are all classes in their order.
        strided: The view of what has been read.
        axes: Axes of the result.
    """

    expanded: frozenset[int]
    read: dict[int, Tensor]
    strided: Strided
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class _Walk:
    """A dimension of the view moves along dimension ``dim`` of the tensor, ``step`` positions at a time."""

    dim: int
    step: int


def plan_view(axes: Sequence[Axis], view: Strided) -> ViewPlan | None:
    """Carry a view of the full tensor over to the compact one (see the head of this module).

    Args:
        axes: Axes of the input.
        view: The view of the full, contiguous input.

    Returns:
        The plan; None when the view is not made of steps along single dimensions (a diagonal).
    """
    walks = _walks(axes, view)
    if walks is None:
        return None
    starts = [view.offset // stride % axis.size for axis, stride in zip(axes, _strides(axes), strict=True)]
    expanded = frozenset(dim for dim in _mixed(axes, view, walks, starts) if axes[dim].classes is not None)
    result = [Axis.full(size) if walk else Axis.constant(size) for size, walk in zip(view.sizes, walks, strict=True)]
    read: dict[int, Tensor] = {}
    for dim, axis in enumerate(axes):
        if axis.classes is None or dim in expanded:
            continue
        read[dim] = axis.classes[starts[dim]].reshape(1)  # where nothing walks along it
        for above, walk in enumerate(walks):
            if walk is not None and walk.dim == dim:  # the only one, or the dimension would be mixed
                classes = axis.classes[starts[dim] + walk.step * torch.arange(view.sizes[above])]
                result[above], first = classify(classes)
                read[dim] = classes[first]
    # What is read in this way has one entry per class of the result, so the view walks over all of them, one by one.
    sizes = [len(read[dim]) if dim in read else axis.size if dim in expanded else axis.count for dim, axis in enumerate(axes)]
    memory = _contiguous(sizes)
    strides = tuple(1 if walk is None else memory[walk.dim] * (1 if walk.dim in read else walk.step) for walk in walks)
    offset = sum(start * memory[dim] for dim, start in enumerate(starts) if dim not in read)
    changed = {dim: classes for dim, classes in read.items() if not torch.equal(classes, torch.arange(axes[dim].count))}
    return ViewPlan(expanded, changed, Strided(compact_shape(result), strides, offset), tuple(result))


def _walks(axes: Sequence[Axis], view: Strided) -> list[_Walk | None] | None:
    """Return the walk of each dimension of the view, None for one that stays where it is; None in all if one is no walk."""
    memory = _strides(axes)
    walks: list[_Walk | None] = []
    for size, stride in zip(view.sizes, view.strides, strict=True):
        if size <= 1 or stride == 0:
            walks.append(None)
            continue
        dim = next((dim for dim, axis in enumerate(axes) if axis.size > 1 and memory[dim] <= stride), None)
        if dim is None or stride % memory[dim]:
            return None
        walks.append(_Walk(dim, stride // memory[dim]))
    return walks


def _mixed(axes: Sequence[Axis], view: Strided, walks: Sequence[_Walk | None], starts: Sequence[int]) -> set[int]:
    """Return the dimensions whose position depends on several dimensions of the view.

    Digits are followed from the last one, as in an addition. The largest number that can come to stand at digit d is
    ``reach`` = start_d + carry + Σ_e step_e·(size_e − 1), and reach // size_d is carried into the digit before.
    """
    mixed: set[int] = set()
    carry = 0
    for dim in reversed(range(len(axes))):
        moves = [walk.step * (size - 1) for walk, size in zip(walks, view.sizes, strict=True) if walk and walk.dim == dim]
        reach = starts[dim] + carry + sum(moves)
        if carry or reach >= axes[dim].size or len(moves) > 1:
            mixed.add(dim)
        carry = reach // axes[dim].size
    return mixed


def _strides(axes: Sequence[Axis]) -> tuple[int, ...]:
    return _contiguous([axis.size for axis in axes])


def _contiguous(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return torch.empty(sizes, device="meta").stride()
