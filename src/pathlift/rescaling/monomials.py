"""How a weight scales when parameters do: each weight tensor of a network as products of elements of parameters.

A weight tensor is a sum of products of powers of parameters, element by element (a bias of batch norm is β − μ·s). Scaled
parameters scale it when all products scale alike. A weight tensor that is anything else (weight normalisation, a product of two
parameters) does not take part: it, and what it is computed from, is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pathlift.graph.expressions import Constant, Expression, FunctionCall, StateTensor, evaluate
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.rules.affine import batch_norm_scale, is_batch_norm_shift


@dataclass(frozen=True, eq=False)
class Factor:
    """Elements of one parameter, to a power.

    Attributes:
        name: The parameter, or the running mean of a batch norm.
        index: For each element of the weight tensor the element of the flattened parameter; None when they are the same.
        degree: The power.
    """

    name: str
    index: Tensor | None
    degree: int


Product: TypeAlias = "tuple[Factor, ...]"


def products(network: Network, weight: WeightTensor) -> tuple[Product, ...] | None:
    """Write a weight tensor as a sum of products, constant factors left out.

    Args:
        network: The network.
        weight: One of its weight tensors.

    Returns:
        The products; an empty product for what holds no parameter; None when the weight tensor is nothing of the kind.
    """
    if weight.scalar is not None or not (weight.requires & set(network.parameters) or is_batch_norm_shift(weight.expression)):
        return ((),)
    if weight.movement is not None:
        return _moved(network, weight)
    return _read(network, weight.expression, tuple(weight.shape))


def _read(network: Network, expression: object, shape: tuple[int, ...]) -> tuple[Product, ...] | None:
    if expression is None or not isinstance(expression, Expression) or isinstance(expression, Constant):
        return ((),)
    if isinstance(expression, StateTensor):
        return ((Factor(expression.name, None, 1),),) if expression.name in network.parameters else ((),)
    assert isinstance(expression, FunctionCall)
    if expression.function is batch_norm_scale:
        return _read(network, expression.args[0], shape)
    if is_batch_norm_shift(expression):
        scale, bias, mean, *_ = expression.args
        factors, shift = _read(network, scale, shape), _read(network, bias, shape)
        if factors is None or shift is None or not isinstance(mean, StateTensor):
            return None
        moved = tuple((Factor(mean.name, None, 1), *product) for product in factors)
        return moved if bias is None else (*shift, *moved)
    if expression.function is torch.ops.aten.mul.Tensor:  # a parameter and a mask of its shape
        parts = [_read(network, part, shape) for part in expression.args]
        moving = [part for part in parts if part != ((),)]
        alike = all(not isinstance(part, StateTensor) or network.state[part.name].shape == shape for part in expression.args)
        return moving[0] if len(moving) == 1 and alike else None
    return None


def _moved(network: Network, weight: WeightTensor) -> tuple[Product, ...] | None:
    """Find the elements of the one parameter that a weight tensor moves around, up to a constant factor."""
    names = [name for name in network.parameters if name in weight.requires]
    if len(names) != 1:
        return None
    (name,) = names
    shape = network.state[name].shape
    places = torch.arange(math.prod(shape), dtype=torch.float64, device="cpu").reshape(shape)
    device = {
        other: torch.zeros(tensor.shape, device="cpu") for other, tensor in network.state.items() if other in weight.requires
    }
    moved = evaluate(weight.movement, {**device, name: places}) if weight.movement is not None else None
    inverted = isinstance(weight.expression, FunctionCall) and weight.expression.function is torch.reciprocal
    assert isinstance(moved, Tensor)
    return ((Factor(name, moved.long(), -1 if inverted else 1),),)


def factors(found: tuple[Product, ...]) -> Iterator[Factor]:
    """Yield all factors of all products."""
    for product in found:
        yield from product
