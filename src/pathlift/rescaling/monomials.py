"""How a weight scales when parameters do: each weight tensor of a network as products of elements of parameters.

A weight tensor is a sum of products of powers of parameters, element by element. Scaled parameters scale it when all products
scale alike. A weight tensor that is anything else (weight normalisation, a product of two parameters) does not take part: it,
and what it is computed from, is left as it is.

The shift of a batch norm, t = β − μ·γ/√(σ²+ε), is the sum of the products (β) and (μ, γ): t scales by 2^x when β does, and
when the scale of μ and that of γ add up to x. The running mean μ is no parameter, but has to move along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import TypeAlias

import torch
from torch import Tensor

from pathlift.graph.expressions import Expression, FunctionCall, StateTensor, Summand, evaluate
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network


@dataclass(frozen=True, eq=False)
class Factor:
    """Elements of one parameter, to a power.

    Attributes:
        name: The parameter, or a buffer that moves along with parameters.
        index: For each element of the weight tensor the element of the flattened parameter; None when they are the same.
        degree: The power.
        buffer: Whether it is such a buffer (`Summand.buffer`).
    """

    name: str
    index: Tensor | None
    degree: int
    buffer: bool = False


Product: TypeAlias = "tuple[Factor, ...]"

CONSTANT: tuple[Product, ...] = ((),)
"""The one product of what holds no parameter: it is empty."""


def products(network: Network, weight: WeightTensor) -> tuple[Product, ...] | None:
    """Write a weight tensor as a sum of products, constant factors left out.

    Args:
        network: The network.
        weight: One of its weight tensors.

    Returns:
        The products; an empty product for what holds no parameter; None when the weight tensor is nothing of the kind.
    """
    summands = weight.expression.summands()
    moves_along = summands is not None and any(summand.buffer is not None for summand in summands)
    if weight.scalar is not None or not (weight.requires & set(network.parameters) or moves_along):
        return CONSTANT
    if weight.movement is not None:
        return _moved(network, weight)
    return _read(network, weight.expression, tuple(weight.shape))


def _read(network: Network, expression: Expression, shape: tuple[int, ...]) -> tuple[Product, ...] | None:
    if isinstance(expression, StateTensor):
        return ((Factor(expression.name, None, 1),),) if expression.name in network.parameters else CONSTANT
    if not isinstance(expression, FunctionCall):
        return CONSTANT
    summands = expression.summands()
    if summands is not None:
        sums = [_multiplied(network, summand, shape) for summand in summands]
        known = [terms for terms in sums if terms is not None]
        return tuple(chain.from_iterable(known)) if len(known) == len(sums) else None
    if expression.function is torch.ops.aten.mul.Tensor:  # a parameter and a mask of its shape
        tensors = [part for part in expression.args if isinstance(part, Expression)]
        moving = [terms for part in tensors if (terms := _read(network, part, shape)) != CONSTANT]
        alike = all(not isinstance(part, StateTensor) or network.state[part.name].shape == shape for part in tensors)
        return moving[0] if len(moving) == 1 and alike else None
    return None


def _multiplied(network: Network, summand: Summand, shape: tuple[int, ...]) -> tuple[Product, ...] | None:
    """Multiply out a product of sums: one product for every choice of a product from each factor."""
    buffer: Product = ()
    if summand.buffer is not None:
        if not isinstance(summand.buffer, StateTensor):
            return None
        buffer = (Factor(summand.buffer.name, None, 1, buffer=True),)
    sums = [_read(network, factor, shape) for factor in summand.factors]
    known = [terms for terms in sums if terms is not None]
    if len(known) < len(sums):
        return None
    return tuple((*buffer, *chain.from_iterable(choice)) for choice in product(*known))


def _moved(network: Network, weight: WeightTensor) -> tuple[Product, ...] | None:
    """Find the elements of the one parameter that a weight tensor moves around, up to a constant factor."""
    names = [name for name in network.parameters if name in weight.requires]
    if len(names) != 1:
        return None
    (name,) = names
    shape = network.state[name].shape
    indices = torch.arange(math.prod(shape), dtype=torch.float64, device="cpu").reshape(shape)
    device = {
        other: torch.zeros(tensor.shape, device="cpu") for other, tensor in network.state.items() if other in weight.requires
    }
    moved = evaluate(weight.movement, {**device, name: indices}) if weight.movement is not None else None
    inverted = isinstance(weight.expression, FunctionCall) and weight.expression.function is torch.reciprocal
    assert isinstance(moved, Tensor)
    return ((Factor(name, moved.long(), -1 if inverted else 1),),)


def factors(terms: tuple[Product, ...]) -> Iterator[Factor]:
    """Yield all factors of all products."""
    return chain.from_iterable(terms)
