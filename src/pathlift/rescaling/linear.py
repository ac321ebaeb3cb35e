"""Conjugate gradients for the symmetric positive semidefinite systems of this folder: Laplacians of networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pathlift.budget import running

Operator: TypeAlias = Callable[[Tensor], Tensor]


def conjugate_gradients(operator: Operator, right: Tensor, diagonal: Tensor, accuracy: float, most: int = 500) -> Tensor:
    """Solve H·x = right, preconditioned by the diagonal of H; return what there is when the time of the call is up.

    Args:
        operator: x ↦ H·x.
        right: Right side, in the range of H.
        diagonal: The diagonal of H, positive.
        accuracy: Reduction of the residual, in the norm of the preconditioner, at which to stop.
        most: Largest number of steps.

    Returns:
        x; from a start at 0, so that it has no part in the null space of H.
    """
    x, residual = torch.zeros_like(right), right.clone()
    z = residual / diagonal
    direction, product = z.clone(), float(residual @ z)
    goal = product * accuracy**2
    for _ in range(most):
        if product <= goal or product == 0.0 or running().over():
            break
        image = operator(direction)
        curvature = float(direction @ image)
        if curvature <= 0.0:
            break
        length = product / curvature
        x = x + length * direction
        residual = residual - length * image
        z = residual / diagonal
        further = float(residual @ z)
        direction = z + further / product * direction
        product = further
    return x
