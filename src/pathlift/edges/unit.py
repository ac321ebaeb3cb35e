"""Edge maps whose own edges weigh 1: the same neurons, chosen ones, overlapping ones.

A weight, where there is one, multiplies the result elementwise: average pooling is a sum over windows times one constant
per output position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from pathlift.edges.axis import Axis, Table, full_axes
from pathlift.edges.base import Compact, Edges
from pathlift.edges.chain import Chain
from pathlift.edges.pattern import Pattern, product_pattern
from pathlift.edges.weights import Weights
from pathlift.precision import recordable


class UnitEdges(Edges):
    """A map of unit edges, optionally followed by an elementwise weight."""

    def gather(self, x: Tensor) -> Tensor:
        """Sum the antecedents of each neuron above."""
        raise NotImplementedError

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest antecedent of each neuron above."""
        return self.gather(x)

    @override
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        out = self.gather(x)
        return out if w is None else out * w.full()

    @override
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        out = self.gather_max(x)
        return out if w is None else out * w.full()

    @override
    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        first, second = (side.masked_fill(side == -math.inf, 0.0) for side in (self.antecedents(x), self.antecedents(y)))
        return (first * w - ratio * (second * z)).abs().sum(0)

    def antecedents(self, x: Tensor) -> Tensor:
        """The one antecedent of each neuron above; maps with several have their own."""
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
            values = recordable(x).detach().requires_grad_()
            (out,) = torch.autograd.grad(self.gather(values), [values], g)
        return out

    @override
    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if share:
            return super().adjoint(x, w, g, below=below, share=share)
        return (self.scatter(x, g if w is None else g * w.full()) if below else None), None

    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        """Expand the result along dimensions in which the weight has an extent."""
        unit = self.compact_unit(axes, out)
        if isinstance(unit, frozenset) or weight is None:
            return unit
        clash = weighted_dims(unit.axes, weight)
        if not clash:
            return unit
        expansion = Gather({dim: unit.axes[dim].index for dim in clash})
        full = tuple(Axis.full(axis.size) if dim in clash else axis for dim, axis in enumerate(unit.axes))
        return Compact(Chain(unit.edges, expansion, weighted=1), full)

    def compact_unit(self, axes: tuple[Axis, ...], out: tuple[int, ...]) -> Compact | frozenset[int]:
        """Return the same map between compact tensors, without a weight; see `Edges.compact`."""
        compact = super().compact(axes, out, None)
        assert not isinstance(compact, Compact) or compact.weight is None
        return compact


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
        image = [x.dim() - 2, x.dim() - 1]
        if x.is_contiguous() and sorted(self.tables) == image and all(self.most[dim] < x.shape[dim] for dim in image):
            return self._from_image(x)
        for dim, table in self.tables.items():
            if self.most[dim] == x.shape[dim]:
                x = torch.cat([x, torch.zeros_like(x.narrow(dim, 0, 1))], dim)
            x = x.index_select(dim, table.on(x.device))
        return x

    def _from_image(self, x: Tensor) -> Tensor:
        """Read rows and columns at once: 0.5 to 0.9 of the time of one `index_select` after the other, from 20² entries on."""
        rows, columns = (self.tables[dim].index for dim in sorted(self.tables))
        if x.shape not in self._flat:
            self._flat[x.shape] = Table((rows[:, None] * x.shape[-1] + columns).reshape(1, -1))
        flat = x.reshape(-1, x.shape[-2] * x.shape[-1])
        read = flat.gather(1, self._flat[x.shape].on(x.device).expand(len(flat), -1))
        return read.view(*x.shape[:-2], len(rows), len(columns))

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

    @override
    def compact_unit(self, axes: tuple[Axis, ...], out: tuple[int, ...]) -> Compact:
        del out
        return Compact(self, axes)

    def scatter(self, x: Tensor, g: Tensor) -> Tensor:
        """Return g itself."""
        del x
        return g


class Scale(UnitEdges):
    """Elementwise product with a weight that broadcasts against x, reshaped to ``view`` first if one is given."""

    single = True

    def __init__(self, view: tuple[int, ...] | None = None) -> None:
        """Describe the map.

        Args:
            view: Shape under which the weight broadcasts, spelled out; None to leave it as it is.
        """
        assert view is None or all(size >= 0 for size in view)
        self.view = view

    def _placed(self, weight: Tensor) -> Tensor:
        return weight if self.view is None else weight.reshape(self.view)

    def pattern(self, below: Sequence[int], weight: Sequence[int]) -> Pattern:
        """Match dimensions from the last one backwards, as broadcasting does."""
        weight = tuple(weight) if self.view is None else self.view
        rank = max(len(below), len(weight))
        letters = (range(rank - len(below), rank), range(rank - len(weight), rank), range(rank))
        return product_pattern(below, weight, letters)

    @override
    def compact(self, axes: tuple[Axis, ...], out: tuple[int, ...], weight: Sequence[int] | None) -> Compact | frozenset[int]:
        assert weight is not None
        clash = weighted_dims(axes, weight if self.view is None else self.view)
        axes = (*full_axes(out[: len(out) - len(axes)]), *axes)
        wider = tuple(axis if axis.size == size else Axis.full(size) for axis, size in zip(axes, out, strict=True))
        return clash or Compact(self, wider)

    @override
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        assert w is not None
        return x * self._placed(w.full())

    @override
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        return self.sum(x, w)

    @override
    def gap(self, x: Tensor, w: Tensor, y: Tensor, z: Tensor, ratio: Tensor) -> Tensor:
        first, second = self._placed(w), self._placed(z)
        return (x * first - ratio * (y * second)).abs()

    @override
    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        assert w is not None
        weight = w.full()
        placed = self._placed(weight)
        to_below = (g * placed).sum_to_size(x.shape) if below else None
        if not share:
            return to_below, None
        return to_below, (g * x).sum_to_size(placed.shape).reshape(weight.shape) * weight

    @override
    def gatherer(self, x: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
        """Sum the products over what each element of the weight is repeated to."""
        shape = w.shape if self.view is None else torch.Size(self.view)

        def gathered(g: Tensor) -> Tensor:
            rank = g.dim() - 2
            values = x.reshape(len(x), 1, *[1] * (rank - x.dim() + 1), *x.shape[1:])
            summed = (values * g).sum_to_size(len(x), g.shape[1], *[1] * (rank - len(shape)), *shape)
            return summed.reshape(len(x), g.shape[1], *w.shape)

        return gathered

    @override
    def returned(self, below: Sequence[int], w: Tensor, g: Tensor) -> Tensor:
        """Multiply, and sum over what each neuron below is repeated to."""
        shape = w.shape[2:] if self.view is None else torch.Size(self.view)
        lead, rank = g.shape[:2], g.dim() - 2
        weight = w.reshape(*lead, *[1] * (rank - len(shape)), *shape)
        return (weight * g).sum_to_size(*lead, *[1] * (rank - len(below)), *below).reshape(*lead, *below)


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
        """They are not listed.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(type(self).__name__)

    def gather_max(self, x: Tensor) -> Tensor:
        """Take the largest antecedent."""
        out = self.function(torch.zeros_like(x))
        number = torch.arange(1, out.numel() + 1, device=x.device, dtype=torch.float64).reshape(out.shape)
        index = self.transpose(number).long().reshape(-1)  # which neuron above each below goes to; 0 for none
        flat = torch.zeros(out.numel() + 1, dtype=x.dtype, device=x.device)
        return flat.scatter_reduce(0, index, x.reshape(-1), "amax")[1:].reshape(out.shape)
