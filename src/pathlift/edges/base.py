"""The interface of an edge map, and the weights that a pass sends along it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
"""Weights are transformed in blocks of this many elements where a map can work block by block (4 MiB in float32)."""


class Weights:
    """The tensor f(θ, θ', …)·2^(-exponent) for an elementwise f, computed when asked for, whole or in blocks of rows.

    The value that travels along an edge is ``full() * 2**exponent``. Nothing of the size of the parameters is kept.
    """

    def __init__(
        self,
        values: tuple[Tensor, ...],
        transform: Callable[..., Tensor],
        dtype: torch.dtype,
        *,
        shift: float = 0.0,
        degree: float = 1.0,
    ) -> None:
        """Describe the weights.

        Args:
            values: Tensors of one shape (θ, θ', …).
            transform: Elementwise and homogeneous function of them.
            dtype: Precision of the result.
            shift: The values are divided by 2**shift before ``transform`` sees them.
            degree: Degree of homogeneity of ``transform``.
        """
        self.values = values
        self.transform = transform
        self.dtype = dtype
        self.scale = 2.0**-shift
        self.exponent = shift * degree

    @property
    def shape(self) -> torch.Size:
        """Shape of the weights."""
        return self.values[0].shape

    def full(self) -> Tensor:
        """Return the whole tensor, in memory of its own."""
        return self._apply(self.values)

    def brief(self) -> Tensor:
        """Return the whole tensor for use at once: the next call of `brief` or `rows` may overwrite it."""
        return self._apply(self.values, brief=True)

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the first dimension and their weights, about `BLOCK_ELEMENTS` at a time, each for use at once."""
        count = self.shape[0]
        step = max(1, BLOCK_ELEMENTS // max(1, self.values[0][0].numel())) if count else 1
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            yield part, self._apply(tuple(value[part] for value in self.values), brief=True)

    def _apply(self, values: tuple[Tensor, ...], *, brief: bool = False) -> Tensor:
        if brief and self.transform is torch.abs and self.scale == 1.0 and not torch.is_grad_enabled():
            return magnitude(values[0], self.dtype)
        values = tuple(value.to(torch.promote_types(value.dtype, self.dtype)) for value in values)
        if self.scale != 1.0:
            values = tuple(value * self.scale for value in values)
        return self.transform(*values).to(self.dtype)


_SCRATCH = threading.local()


def magnitude(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return |value| in scratch memory of this thread; fresh memory would cost more than the arithmetic.

    Args:
        value: Any tensor.
        dtype: Precision of the result.

    Returns:
        The magnitudes, valid until the next call.
    """
    key = f"{value.device}_{dtype}"
    buffer: Tensor | None = getattr(_SCRATCH, key, None)
    if buffer is None or buffer.numel() < value.numel():
        buffer = torch.empty(max(value.numel(), BLOCK_ELEMENTS), dtype=dtype, device=value.device)
        setattr(_SCRATCH, key, buffer)
    out = buffer[: value.numel()].view(value.shape)
    if value.dtype == dtype:
        return torch.abs(value, out=out)
    return torch.abs(out.copy_(value), out=out)


class Support(Weights):
    """1 where a weight is not zero and 0 elsewhere: which edges are there at all."""

    def __init__(self, weights: Weights) -> None:
        """Wrap weights.

        Args:
            weights: The weights whose support this is.
        """
        super().__init__(weights.values, weights.transform, weights.dtype)
        self.scale = weights.scale
        self.exponent = 0.0

    def _apply(self, values: tuple[Tensor, ...], *, brief: bool = False) -> Tensor:
        if len(values) == 1:  # a power of a weight vanishes only with the weight, whatever underflows
            return (values[0] != 0).to(self.dtype)
        return (super()._apply(values, brief=brief) != 0).to(self.dtype)


class Edges(ABC):
    """A bilinear map (x, w) ↦ out. ``fresh``: `sum` returns new memory, never a view of x."""

    fresh: bool = True

    @abstractmethod
    def sum(self, x: Tensor, w: Weights | None) -> Tensor:
        """Return Σ_u x[u]·w[k(u→v)] for every neuron v above.

        Args:
            x: Values of the neurons below.
            w: The weights; None means that every edge weighs 1.

        Returns:
            Values of the neurons above.
        """

    @abstractmethod
    def max(self, x: Tensor, w: Weights | None) -> Tensor:
        """Return max_u x[u]·w[k(u→v)] for non-negative x and w (0 where there is no edge).

        Args:
            x: Values of the neurons below, non-negative.
            w: The weights, non-negative; None means that every edge weighs 1.

        Returns:
            Values of the neurons above.
        """

    def adjoint(
        self, x: Tensor, w: Weights | None, g: Tensor, *, below: bool, share: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Go back from the neurons above: to those below, and to the weights.

        Args:
            x: Values of the neurons below in the forward pass.
            w: The weights of the forward pass.
            g: One number per neuron above.
            below: Whether the first result is wanted.
            share: Whether the second result is wanted.

        Returns:
            Σ_v g[v]·w[k(u→v)] per neuron u below, and w[k]·Σ_{edges of k} x[u]·g[v] per weight k; None for what was not
            wanted.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            weight = None if w is None else w.full().detach().requires_grad_()
            fixed = None if w is None or weight is None else Weights((weight,), _same, w.dtype)
            out = self.sum(leaf, fixed)
            wanted = ([leaf] if below else []) + ([weight] if share and weight is not None else [])
            found = list(torch.autograd.grad(out, wanted, g))
        to_below = found.pop(0) if below else None
        to_weight = found.pop(0) * weight.detach() if share and weight is not None else None
        return to_below, to_weight


def _same(value: Tensor) -> Tensor:
    return value
