"""How one tensor scales: by 2^(s(above) − s(below)), element by element, with s one number per class of neurons (§7).

Worked example: the weight W of a linear layer from neurons u_1, u_2 to v_1, v_2, v_3, each in a class of its own, numbered
1 to
5. Laid out as (groups, outs, ins, taps) = (1, 3, 2, 1) it has ``above`` = (3, 4, 5) of shape (1, 3, 1, 1) and ``below`` =
   (1, 2) of shape (1, 1, 2, 1): W_ij scales by 2^(s[above_i] − s[below_j]). Its bias has ``above`` = (3, 4, 5) and
   ``below`` = 0, the class of inputs and outputs, whose s is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.edges.pattern import Layout

NO_CLASS = torch.zeros(1, 1, 1, 1, dtype=torch.long, device="cpu")
"""Classes of an end that does not scale."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """How one parameter scales: by 2^(s(above) − s(below)), element by element.

    Attributes:
        above: Classes, broadcasting against ``layout.shape``.
        below: Classes, broadcasting against ``layout.shape``.
        layout: How the (moved) parameter is laid out.
        index: Elements of the flattened parameter that are laid out; None for all in order.
        divides: The network divides by the parameter.
    """

    above: Tensor
    below: Tensor
    layout: Layout
    index: Tensor | None = None
    divides: bool = False

    @property
    def moves(self) -> bool:
        """Whether any element scales at all."""
        return bool((self.above > 0).any()) or bool((self.below > 0).any())

    def split(self, tensor: Tensor) -> Tensor:
        """Lay out a tensor of the parameter's shape."""
        return self.layout.split(tensor if self.index is None else tensor.reshape(-1)[self.index.to(tensor.device)])

    def axes(self, shape: Sequence[int]) -> tuple[int | None, int | None]:
        """Return the axes of the parameter along which the classes above and below change.

        Args:
            shape: Shape of the parameter.

        Returns:
            Two axes; None for one that is no axis of the parameter.
        """
        if self.index is not None or math.prod(shape) != math.prod(self.layout.original):
            return None, None
        laid_out = [dim for dim, size in enumerate(self.layout.original) if size > 1]
        wide = [dim for dim, size in enumerate(shape) if size > 1]
        if [self.layout.original[dim] for dim in laid_out] != [shape[dim] for dim in wide]:
            return None, None
        axis = dict(zip(laid_out, wide, strict=True))
        first, second = (None if dim is None else axis.get(dim) for dim in self.layout.axes())
        return first, second

    def join(self, laid_out: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `split`.

        Args:
            laid_out: What is laid out; broadcasts against ``layout.shape``.
            shape: Shape of the parameter.

        Returns:
            Tensor of that shape, 0 where an element is not laid out.
        """
        flat = self.layout.join(laid_out.expand(self.layout.shape))
        if self.index is None:
            return flat.reshape(tuple(shape))
        out = flat.new_zeros(torch.Size(shape).numel())
        out[self.index.reshape(-1).to(out.device)] = flat.reshape(-1)
        return out.reshape(tuple(shape))

    def logs(self, scales: Tensor, shape: Sequence[int]) -> Tensor:
        """Return log₂ of the factor of each element.

        Args:
            scales: s by class.
            shape: Shape of the parameter.

        Returns:
            Tensor of that shape.
        """
        return self.join(scales[self.above] - scales[self.below], shape)
