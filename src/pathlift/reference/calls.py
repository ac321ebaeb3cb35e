"""An operator's call as a plain function: activations in, numbers out, parameters and constants replaceable.

Activations are tensors of *numbers of neurons*: the neuron that each element is. What does not depend on the input is
`Labelled`: its value, and for each element which parameter it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pathlift.reference.dag import Label, Neuron

NONE = -1
"""In place of the number of a neuron: there is none, the element is −∞ (the border of a maximum)."""


class ProbeError(Exception):
    """An operator does not do what it was taken for."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """What does not depend on the input.

    Attributes:
        value: A number, a tensor, a list of either.
        labels: For each element of a tensor, in order, the parameter that it is; None: these are constants.
    """

    value: Any
    labels: list[Label] | None = None

    def entries(self) -> list[tuple[float, Label]]:
        """Return the elements of a tensor, each with its label."""
        numbers = torch.as_tensor(self.value, dtype=torch.float64).reshape(-1).tolist()
        return list(zip(numbers, self.labels or [None] * len(numbers), strict=True))


class OperatorCall:
    """One call of an operator.

    Attributes:
        target: The operator.
        args: Its arguments: tensors of numbers of neurons, `Labelled`, and settings.
        kwargs: Those with a name.
        activations: The numbers of neurons among the arguments.
        parameters: What is labelled among them.
        constants: All floating-point tensors that do not depend on the input, parameters and others.
        shapes: Of what the operator returns.
    """

    def __init__(self, target: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Call the operator once, on zeros.

        Args:
            target: The operator.
            args: Its arguments.
            kwargs: Those with a name.
        """
        self.target, self.args, self.kwargs = target, args, kwargs
        leaves = tree_leaves((args, kwargs))
        labelled = [leaf for leaf in leaves if isinstance(leaf, Labelled)]
        self.activations: list[Tensor] = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.parameters = [item for item in labelled if item.labels]
        self.constants = [i for i in labelled if isinstance(i.value, Tensor) and i.value.dtype.is_floating_point]
        returned = self._returned(self.zeros(), {})
        self._returns_tuple = isinstance(returned, (tuple, list))
        self.shapes = [tensor.shape for tensor in (returned if self._returns_tuple else [returned])]

    def zeros(self) -> list[Tensor]:
        """Return activations that are 0."""
        return self.filled(0.0)

    def filled(self, number: float) -> list[Tensor]:
        """Return activations that are all the same number."""
        return [torch.full(ids.shape, number, dtype=torch.float64) for ids in self.activations]

    def results(self, activations: list[Tensor], replaced: Mapping[Labelled, Tensor] | None = None) -> list[Tensor]:
        """Call the operator.

        Args:
            activations: In place of the numbers of neurons, one tensor for each of `activations`.
            replaced: Values in place of some that do not depend on the input.

        Returns:
            What it returns.
        """
        returned = self._returned(activations, replaced or {})
        return list(returned) if self._returns_tuple else [returned]

    def flat(self, activations: list[Tensor], replaced: Mapping[Labelled, Tensor] | None = None) -> Tensor:
        """Return all that `results` returns in one row of float64."""
        return torch.cat([result.reshape(-1).double() for result in self.results(activations, replaced)])

    def like_results(self, flat: Tensor) -> Any:
        """Return one row as the operator returns it: a tensor, or a tuple of them."""
        pieces = flat.split([shape.numel() for shape in self.shapes])
        shaped = tuple(piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=True))
        return shaped if self._returns_tuple else shaped[0]

    def argument(self, name: str) -> Any:
        """Return an argument by its name in the operator's schema, None when it is not given."""
        names = [argument.name for argument in self.target._schema.arguments]  # type: ignore[attr-defined]
        position = names.index(name) if name in names else len(self.args)
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def _returned(self, activations: list[Tensor], replaced: Mapping[Labelled, Tensor]) -> Any:
        given = iter(activations)

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return next(given)
            return replaced.get(leaf, leaf.value) if isinstance(leaf, Labelled) else leaf

        args = tree_map(value, self.args)  # in the order of `activations`
        return self.target(*args, **tree_map(value, self.kwargs))


def added(neurons: list[Neuron], name: str, shape: torch.Size, neuron: Callable[[str, int], Neuron]) -> Tensor:
    """Append one neuron for each element of a tensor.

    Args:
        neurons: The neurons so far.
        name: Of the tensor.
        shape: Of the tensor.
        neuron: Makes a neuron from its name and the flat index of its element.

    Returns:
        Their numbers, of the shape.
    """
    first = len(neurons)
    neurons.extend([neuron(f"{name}[{index}]", index) for index in range(shape.numel())])
    return torch.arange(first, len(neurons)).reshape(shape)


def neurons_of(what: object, ids: Tensor) -> list[int]:
    """Return the numbers of the neurons that an operator reads one by one; it is no maximum, and must not read −∞.

    Args:
        what: The operator.
        ids: The numbers of neurons.

    Returns:
        The numbers in order.

    Raises:
        ProbeError: It reads −∞.
    """
    if bool((ids == NONE).any()):
        raise ProbeError(f"{what} reads a border of −inf.")
    numbers: list[int] = ids.reshape(-1).tolist()
    return numbers
