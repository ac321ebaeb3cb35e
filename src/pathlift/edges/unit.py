"""Edge maps whose own edges weigh 1: the same neurons, chosen ones, overlapping ones.

A weight, where there is one, multiplies the result elementwise: average pooling is a sum over windows times one constant
per output position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pathlift.edges.axis import Axis, Table, full_axes
from pathlift.edges.base import Compact, Edges, recordable
from pathlift.edges.chain import Chain
from pathlift.edges.pattern import Pattern, product_pattern
from pathlift.edges.weights import Weights


class UnitEdges(Edges):
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

    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        """See `Edges.gap`."""
        first, second = (torch.where(own == -math.inf, 0.0, own) for own in (self.antecedents(x), self.antecedents(y)))
        return (first * w - ratio * (second * z)).abs().sum(0)

    def antecedents(self, x: Tensor) -> Tensor:
        """See `Edges.antecedents`; right where each neuron above has one antecedent."""
        return self.gather(x).unsqueeze(0)

    def scatter(self, x: Tensor, g: Tensor) -> Tensor:
        """Apply the transpose of `gather`.

        Args:
            x: Values of the neurons below; only the shape counts.
            g: One number per neuron above.

        Returns:
            One number per neuron below.
        """
        with torch.inference_mode(False), torch.enable_grad():
            weight = recordable(x).requires_grad_()
            (out,) = torch.autograd.grad(self.gather(weight), [weight], g)
        return out

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Edges.adjoint`."""
        if share:
            return super().adjoint(x, w, g, below=below, share=share)
        return (self.scatter(x, g if w is None else g * w.full()) if below else None), None

    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        """See `Edges.compact`; the weight, where it has an extent, needs the result to be full."""
        found = self.compact_unit(axes, out)
        if isinstance(found, frozenset) or weight is None:
            return found
        clash = weighted_dims(found.axes, weight)
        if not clash:
            return found
        spread = Gather({dim: found.axes[dim].index for dim in clash})
        full = tuple(Axis.full(axis.size) if dim in clash else axis for dim, axis in enumerate(found.axes))
        return Compact(Chain(found.edges, spread, weighted=1), full)

    def compact_unit(self, axes: tuple[Axis, ...], out: tuple[int, ...]) -> Compact | frozenset[int]:
        """Return the same map between compact tensors, without a weight; see `Edges.compact`."""
        found = super().compact(axes, out, None)
        assert not isinstance(found, Compact) or found.weight is None
        return found


def weighted_dims(axes: Sequence[Axis], weight: Sequence[int]) -> frozenset[int]:
    """Return the compact dimensions along which a weight that broadcasts against the full tensor has an extent.

    Args:
        axes: Axes of the tensor.
        weight: Shape of the weight as it broadcasts, spelled out.

    Returns:
        Dimensions.
    """
    assert all(size >= 0 for size in weight), "a size of -1 has an extent that nobody can see"
    dims = range(len(axes) - len(weight), len(axes))
    return frozenset(
        dim for dim, size in zip(dims, weight, strict=True) if dim >= 0 and size > 1 and axes[dim].classes is not None
    )


class Gather(UnitEdges):
    """Each neuron above is the neuron of a given class below, dimension by dimension; the class after the last is none."""

    fresh = False

    def __init__(self, index: Mapping[int, Tensor]) -> None:
        """Describe the map.

        Args:
            index: Dimension to the classes that it reads.
        """
        self.tables = {dim: Table(classes) for dim, classes in index.items()}
        self.most = {dim: int(classes.max()) for dim, classes in index.items()}
        self._flat: dict[torch.Size, Table] = {}

    def gather(self, x: Tensor) -> Tensor:
        """Read the classes."""
        if (
            x.is_contiguous()
            and sorted(self.tables) == [x.dim() - 2, x.dim() - 1]
            and all(
                most < size for most, size in zip((self.most[x.dim() - 2], self.most[x.dim() - 1]), x.shape[-2:], strict=True)
            )
        ):
            rows, columns = (self.tables[dim] for dim in sorted(self.tables))
            if x.shape not in self._flat:
                self._flat[x.shape] = Table((rows.index[:, None] * x.shape[-1] + columns.index).reshape(1, -1))
            flat = x.reshape(-1, x.shape[-2] * x.shape[-1])
            found = flat.gather(1, self._flat[x.shape].on(x.device).expand(len(flat), -1))
            return found.view(*x.shape[:-2], len(rows.index), len(columns.index))
        for dim, table in self.tables.items():
            if self.most[dim] == x.shape[dim]:
                none = x.new_zeros([1 if place == dim else size for place, size in enumerate(x.shape)])
                x = torch.cat([x, none], dim)
            x = x.index_select(dim, table.on(x.device))
        return x

    def scatter(self, x: Tensor, g: Tensor) -> Tensor:
        """Add up what each class is read by."""
        for dim, table in reversed(self.tables.items()):
            shape = list(g.shape)
            shape[dim] = x.shape[dim] + 1
            g = g.new_zeros(shape).index_add_(dim, table.on(g.device), g).narrow(dim, 0, x.shape[dim])
        return g


class Identity(UnitEdges):
    """Each neuron above has the neuron at its own place as its only antecedent."""

    fresh = False

    def gather(self, x: Tensor) -> Tensor:
        """Return x itself."""
        return x

    def compact_unit(self, axes: tuple[Axis, ...], out: tuple[int, ...]) -> Compact:
        """See `UnitEdges.compact_unit`."""
        del out
        return Compact(self, axes)

    def scatter(self, x: Tensor, g: Tensor) -> Tensor:
        """Return g itself."""
        del x
        return g


class Scale(UnitEdges):
    """Elementwise product with a weight that broadcasts against x, reshaped to ``view`` first if one is given."""

    def __init__(self, view: tuple[int, ...] | None = None) -> None:
        """Describe the map.

        Args:
            view: Shape under which the weight broadcasts, spelled out; None to leave it as it is.
        """
        assert view is None or all(size >= 0 for size in view)
        self.view = view

    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        """See `Edges.pattern`: dimensions are matched from the last one backwards."""
        weight = tuple(weight) if self.view is None else self.view
        rank = max(len(below), len(weight))
        letters = (range(rank - len(below), rank), range(rank - len(weight), rank), range(rank))
        return product_pattern(below, weight, letters)

    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        """See `Edges.compact`."""
        assert weight is not None
        clash = weighted_dims(axes, weight if self.view is None else self.view)
        axes = (*full_axes(out[: len(out) - len(axes)]), *axes)
        wider = tuple(axis if axis.size == size else Axis.full(size) for axis, size in zip(axes, out, strict=True))
        return clash or Compact(self, wider)

    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.sum`."""
        assert w is not None
        weight = w.full()
        return x * (weight if self.view is None else weight.reshape(self.view))

    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """See `Edges.max`."""
        return self.sum(x, w)

    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        """See `Edges.gap`."""
        first, second = (own if self.view is None else own.reshape(self.view) for own in (w, z))
        return (x * first - ratio * (y * second)).abs()

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


class Overlap(UnitEdges):
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

    def antecedents(self, x: Tensor) -> Tensor:
        """See `Edges.antecedents`: not listed.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(type(self).__name__)

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest antecedent."""
        out = self.function(torch.zeros_like(x))
        place = torch.arange(1, out.numel() + 1, device=x.device, dtype=torch.float64).reshape(out.shape)
        index = self.transpose(place).long().reshape(-1)
        flat = torch.zeros(out.numel() + 1, dtype=x.dtype, device=x.device)
        return flat.scatter_reduce(0, index, x.reshape(-1), "amax")[1:].reshape(out.shape)
