"""What a compact axis is: positions that all hold the same value are stored once.

Fed with ones, path activations are constant over the interior of an image. So an axis of a tensor of path activations may
be stored by classes: ``full = compact[classes]``. A windowed operator has two equal output positions when the tuples of
the classes of their antecedents are equal, with "no neuron there" (padding) as a class of its own.

Example: a convolution of kernel 3 and padding 1 along 5 equal positions. Its outputs read (none, 0, 0), three times (0, 0, 0),
and (0, 0, none), so their classes are 0, 1, 1, 1, 2. Of 224 positions three are stored as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a compact tensor.

    Attributes:
        size: Number of positions.
        classes: Class of each position, numbered in order of first appearance; None when each position is its own class.
        count: Number of classes.
    """

    size: int
    classes: Tensor | None
    count: int

    @staticmethod
    def full(size: int) -> Axis:
        """Return an axis whose positions are all different."""
        return Axis(size, None, size)

    @staticmethod
    def constant(size: int) -> Axis:
        """Return an axis whose positions are all equal."""
        return Axis(size, torch.zeros(size, dtype=torch.long), 1) if size > 1 else Axis.full(size)

    @property
    def index(self) -> Tensor:
        """Class of each position."""
        return torch.arange(self.size) if self.classes is None else self.classes

    @property
    def first(self) -> Tensor:
        """First position of each class."""
        if self.classes is None:
            return torch.arange(self.size)
        return torch.full((self.count,), self.size).scatter_reduce(0, self.classes, torch.arange(self.size), "amin")

    @property
    def multiplicity(self) -> Tensor:
        """How many positions each class has, int64."""
        return torch.bincount(self.index, minlength=self.count)


def full_axes(shape: Sequence[int]) -> tuple[Axis, ...]:
    """Return axes that collapse nothing."""
    return tuple(Axis.full(size) for size in shape)


def compact_shape(axes: Sequence[Axis]) -> tuple[int, ...]:
    """Return the shape of the compact tensor."""
    return tuple(axis.count for axis in axes)


def multiplicity(axes: Sequence[Axis], device: torch.device) -> Tensor | None:
    """Count the positions that each entry of a compact tensor stands for.

    Args:
        axes: Its axes.
        device: Where the result is needed.

    Returns:
        float64 tensor that broadcasts against the compact one; None when each stands for itself.
    """
    out: Tensor | None = None
    for dim, axis in enumerate(axes):
        if axis.classes is not None:
            shape = [1] * len(axes)
            shape[dim] = axis.count
            along = axis.multiplicity.to(device, torch.float64).reshape(shape)
            out = along if out is None else out * along
    return out


def expand(axes: Sequence[Axis] | None, tensor: Tensor) -> Tensor:
    """Return a compact tensor with one entry per position.

    Args:
        axes: Its axes; None for one that is not compact.
        tensor: The tensor.

    Returns:
        Shape (axis.size for each axis).
    """
    for dim, axis in enumerate(axes or ()):
        if axis.classes is not None:
            tensor = tensor.index_select(dim, axis.classes.to(tensor.device))
    return tensor


def classify(*keys: Tensor) -> tuple[Axis, Tensor]:
    """Put positions into one class when they agree in all keys.

    Args:
        keys: Each of shape (positions,) or (positions, k).

    Returns:
        The axis, and the first position of each class.
    """
    size = len(keys[0])
    rows = torch.cat([key.reshape(size, -1).double() for key in keys], 1)
    sorted_class = torch.unique(rows, dim=0, return_inverse=True)[1]  # numbered by the keys' values
    count = int(sorted_class.max()) + 1 if size else 0
    if count == size:
        return Axis.full(size), torch.arange(size)
    appearance = torch.argsort(Axis(size, sorted_class, count).first)
    rank = torch.empty_like(appearance)
    rank[appearance] = torch.arange(count)
    axis = Axis(size, rank[sorted_class], count)
    return axis, axis.first


def refinement(axes: Sequence[Axis]) -> Axis:
    """Return the coarsest axis whose classes lie within those of all given ones."""
    first = axes[0]
    if all(axis is first for axis in axes):
        return first
    return next((axis for axis in axes if axis.classes is None), None) or classify(*(axis.index for axis in axes))[0]


def choice(axis: Axis, finer: Axis) -> Tensor | None:
    """Return which class of an axis each class of a finer one reads; None when they are the same."""
    if axis is finer or axis.count == finer.count:
        return None
    return axis.index[finer.first]


def through_taps(axis: Axis, taps: Tensor) -> tuple[Axis, Tensor]:
    """Follow an axis through an operator whose output position o reads the input positions ``taps[o]``.

    Args:
        axis: The input's axis.
        taps: Input positions, shape (outputs, taps); anything outside [0, size) is no neuron.

    Returns:
        The output's axis, and the classes that each of its classes reads, shape (classes, taps), with the number of input
        classes for "no neuron".

    Example:
        The convolution at the head of this module:

        >>> axis, read = through_taps(Axis.constant(5), torch.arange(5)[:, None] + torch.tensor([-1, 0, 1]))
        >>> axis.index.tolist(), read.tolist()
        ([0, 1, 1, 1, 2], [[1, 0, 0], [0, 0, 0], [0, 0, 1]])
    """
    inside = (taps >= 0) & (taps < axis.size)
    read = torch.where(inside, axis.index[taps.clamp(0, axis.size - 1)], axis.count)
    out, first = classify(read)
    return out, read[first]


class Table:
    """An index tensor that moves to a device once."""

    def __init__(self, index: Tensor) -> None:
        """Keep an index.

        Args:
            index: On the CPU.
        """
        self.index = index
        self._placed: dict[torch.device, Tensor] = {index.device: index}

    def __reduce__(self) -> tuple[type[Table], tuple[Tensor]]:
        """Leave copies on devices behind when pickled or copied."""
        return Table, (self.index,)

    def on(self, device: torch.device) -> Tensor:
        """Return the index on a device."""
        if device not in self._placed:
            self._placed[device] = self.index.to(device)
        return self._placed[device]
