"""Sums over all parameters of something times 2^(p·(s(above) − s(below))): what every choice of a gauge is made of.

Parameters are grouped by the classes of neurons that they join, so that a pass over a network costs one product with a
matrix per layer, whatever the size of its kernels and images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pathlift.rescaling.scaling import Scaling


@dataclass(frozen=True, eq=False)
class BlockCoupling:
    """A coupling of all classes above with all classes below, in groups.

    Attributes:
        above: Classes, shape (groups, outs).
        below: Classes, shape (groups, ins).
        mass: Shape (groups, outs, ins).
    """

    above: Tensor
    below: Tensor
    mass: Tensor

    def up(self, x: Tensor, out: Tensor) -> None:
        """Add Σ_below mass·x[below] to out[above]."""
        out.index_add_(0, self.above.reshape(-1), (self.mass @ x[self.below].unsqueeze(-1)).reshape(-1))

    def down(self, x: Tensor, out: Tensor) -> None:
        """Add Σ_above mass·x[above] to out[below]."""
        out.index_add_(0, self.below.reshape(-1), (x[self.above].unsqueeze(1) @ self.mass).reshape(-1))


@dataclass(frozen=True, eq=False)
class PairCoupling:
    """A coupling of classes pair by pair; all tensors of shape (pairs,)."""

    above: Tensor
    below: Tensor
    mass: Tensor

    def up(self, x: Tensor, out: Tensor) -> None:
        """See `BlockCoupling.up`."""
        out.index_add_(0, self.above, self.mass * x[self.below])

    def down(self, x: Tensor, out: Tensor) -> None:
        """See `BlockCoupling.down`."""
        out.index_add_(0, self.below, self.mass * x[self.above])


Coupling: TypeAlias = BlockCoupling | PairCoupling


def coupling(scaling: Scaling, mass: Tensor) -> Coupling:
    """Sum a mass per element of a parameter by the classes that the element joins.

    Args:
        scaling: How the parameter scales.
        mass: Of the parameter's shape.

    Returns:
        The coupling, float64 on the CPU.
    """
    above, below = scaling.above, scaling.below
    masses = scaling.split(mass)
    groups, outs, ins, _ = masses.shape
    separate = above.shape[2:] == (1, 1) and below.shape[1] == 1 and below.shape[3] == 1
    if separate and min(outs, ins) > 1:
        top, bottom = above.reshape(above.shape[:2]).expand(groups, outs), below[:, 0, :, 0].expand(groups, ins)
        summed = masses.sum(3, dtype=torch.float64).cpu()
        if groups == 1:
            classes, inverse = torch.unique(bottom[0], return_inverse=True)
            if len(classes) < ins:
                summed = torch.zeros(1, outs, len(classes), dtype=torch.float64, device="cpu").index_add_(2, inverse, summed)
                bottom = classes[None]
        return BlockCoupling(top, bottom, summed)
    if above.shape[3] == below.shape[3] == 1:
        masses = masses.sum(3, keepdim=True, dtype=torch.float64)
    flat = masses.double().cpu()
    return PairCoupling(above.expand(flat.shape).reshape(-1), below.expand(flat.shape).reshape(-1), flat.reshape(-1))


def sums(couplings: Iterable[Coupling], scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return what comes in to each class and what goes out of it, Σ mass·2^(s(above) − s(below)).

    Args:
        couplings: The couplings.
        scales: s by class.

    Returns:
        Two tensors by class.
    """
    coming, going = torch.zeros_like(scales), torch.zeros_like(scales)
    up, down = torch.exp2(scales), torch.exp2(-scales)
    for part in couplings:
        part.up(down, coming)
        part.down(up, going)
    return coming * up, going * down
