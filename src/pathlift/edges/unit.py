"""Edge maps whose own edges weigh 1: moving elements, summing windows, summing over dimensions.

A weight, where there is one, multiplies the result elementwise: average pooling is a sum over windows times one constant
per output position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.edges.base import Edges, Weights


class _Unit(Edges):
    """A map of unit edges, optionally followed by an elementwise weight."""

    def gather(self, x: Tensor) -> Tensor:
        """Sum the antecedents of each neuron above."""
        raise NotImplementedError

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest antecedent of each neuron above."""
        return self.gather(x)

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        out = self.gather(x)
        return out if w is None else out * w.full()

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        out = self.gather_max(x)
        return out if w is None else out * w.full()


class Identity(_Unit):
    """Each neuron above has the neuron at its own place as its only antecedent."""

    fresh = False

    def gather(self, x: Tensor) -> Tensor:
        """Return x itself."""
        return x


class Scale(_Unit):
    """Elementwise product with a weight that broadcasts against x, reshaped to ``view`` first if one is given."""

    def __init__(self, view: tuple[int, ...] | None = None) -> None:
        """Describe the map.

        Args:
            view: Shape under which the weight broadcasts, None to leave it as it is.
        """
        self.view = view

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        weight = w.full()
        return x * (weight if self.view is None else weight.reshape(self.view))

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        return self.sum(x, w)

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Edges.adjoint`."""
        assert w is not None
        weight = w.full()
        placed = weight if self.view is None else weight.reshape(self.view)
        to_below = (g * placed).sum_to_size(x.shape) if below else None
        if not share:
            return to_below, None
        return to_below, (g * x).sum_to_size(placed.shape).reshape(weight.shape) * weight


class Move(_Unit):
    """Data movement: each neuron above is one neuron below, or nothing (zero padding).

    The same function serves real activations, path activations and index tensors.
    """

    fresh = False

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        """Describe the map.

        Args:
            function: The movement, a function of the tensor of neurons below.
        """
        self.function = function

    def gather(self, x: Tensor) -> Tensor:
        """Move the elements."""
        return self.function(x)


class Overlap(_Unit):
    """Unit edges where one neuron above may have several antecedents: the adjoint of a gather (`fold`)."""

    def __init__(self, function: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor]) -> None:
        """Describe the map.

        Args:
            function: The map itself, linear.
            gather: Its transpose: sends a tensor shaped like the result to one shaped like x.
        """
        self.function = function
        self.transpose = gather

    def gather(self, x: Tensor) -> Tensor:
        """Sum the antecedents."""
        return self.function(x)

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest antecedent."""
        out = self.function(torch.zeros_like(x))
        place = torch.arange(1, out.numel() + 1, device=x.device, dtype=torch.float64).reshape(out.shape)
        index = self.transpose(place).long().reshape(-1)
        flat = torch.zeros(out.numel() + 1, dtype=x.dtype, device=x.device)
        return flat.scatter_reduce(0, index, x.reshape(-1), "amax")[1:].reshape(out.shape)


@dataclass(frozen=True)
class Reduce(_Unit):
    """Sum over the dimensions ``dims`` of x."""

    dims: tuple[int, ...]
    keepdim: bool
    fresh = True

    def gather(self, x: Tensor) -> Tensor:
        """Sum over the dimensions."""
        return x.sum(self.dims, keepdim=self.keepdim)

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest over the dimensions."""
        return x.amax(self.dims, keepdim=self.keepdim)


@dataclass(frozen=True)
class Window(_Unit):
    """Sum over sliding windows of the last ``len(kernel)`` dimensions.

    Padding holds no neurons. ``extra`` is what ``ceil_mode`` adds on the right so that the last window fits.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    extra: tuple[int, ...]
    fresh = True

    def gather(self, x: Tensor) -> Tensor:
        """Sum over each window, one dimension after the other."""
        plain = len(self.kernel) == 2 and x.dim() == 4 and set(self.dilation) == {1} and not any(self.extra)
        if plain and all(2 * pad <= size for pad, size in zip(self.padding, self.kernel, strict=True)):
            return F.avg_pool2d(x, self.kernel, self.stride, self.padding, False, True, 1)
        return self._fold(x, torch.add)

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest of each window, one dimension after the other."""
        return self._fold(x, torch.maximum)

    def _fold(self, x: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        for axis in range(len(self.kernel)):
            dim = x.dim() - len(self.kernel) + axis
            x = self._fold_axis(x, dim, axis, combine)
        return x

    def _fold_axis(self, x: Tensor, dim: int, axis: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        kernel, stride, dilation = self.kernel[axis], self.stride[axis], self.dilation[axis]
        pad = [0, 0] * (x.dim() - dim)
        pad[-2:] = [self.padding[axis], self.padding[axis] + self.extra[axis]]
        x = F.pad(x, pad) if any(pad) else x
        count = (x.shape[dim] - dilation * (kernel - 1) - 1) // stride + 1
        out: Tensor | None = None
        for tap in range(kernel):
            index = [slice(None)] * x.dim()
            index[dim] = slice(tap * dilation, tap * dilation + (count - 1) * stride + 1, stride)
            out = x[tuple(index)] if out is None else combine(out, x[tuple(index)])
        assert out is not None
        return out.clone() if kernel == 1 else out
