"""How a model takes its inputs: tensors one after the other, or within tuples, lists and dictionaries.

A network numbers its input tensors. What a user gives as ``inputs`` or ``x`` holds them in a form: ``(x, (mask, size))`` has
the form ``(0, (1, 2))`` and is called as ``model(x, (mask, size))``; ``{"image": x}`` has the form ``{"image": 0}`` and is
called as ``model(image=x)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from pathlift.errors import InputError

Samples: TypeAlias = "Tensor | Sequence[Samples] | Mapping[str, Samples]"
"""Batches of inputs as a model takes them: one tensor, or tensors in containers."""


def batches_of(data: Samples | Iterable[Samples]) -> Iterable[Samples]:
    """Return one batch, a tensor or tensors by name, or several as several.

    Args:
        data: A batch, or an iterable of batches.

    Returns:
        The batches.
    """
    return [data] if isinstance(data, (Tensor, Mapping)) else data


@dataclass(frozen=True)
class Form:
    """The containers in which a model takes its input tensors.

    Attributes:
        nested: A tuple of positional arguments, or a dictionary of keyword arguments, with a number in place of each tensor.
    """

    nested: tuple[Any, ...] | dict[str, Any]

    def filled(self, tensors: Sequence[Any]) -> Any:
        """Put tensors, or what stands for them, into the containers: a tuple of arguments, or a dictionary of keywords."""
        return mapped(self.nested, lambda number: tensors[number])

    def run(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Call a model with tensors, one per number."""
        given = self.filled(tensors)
        return model(**given) if isinstance(given, dict) else model(*given)

    def tensors(self, samples: Samples) -> tuple[Tensor, ...]:
        """Take tensors out of containers of this form.

        Args:
            samples: A tensor for a model with one positional input; else tensors in the containers that the model takes.

        Returns:
            One per number.

        Raises:
            InputError: The containers are others.
        """
        numbered: dict[int, Tensor] = {}
        given = (samples,) if isinstance(samples, Tensor) else samples
        if not _matched(self.nested, given, numbered):
            count = sum(1 for _ in leaves(given))
            if self == flat(len(self.nested)) and count != len(self.nested):
                among = " In a list of batches, each is a tuple: [(a, b)]." if count == 1 else ""
                raise InputError(f"The model has {len(self.nested)} inputs, found {count} tensors.{among}")
            raise InputError(f"The model takes its inputs as {self}, found {_written(given)}.")
        return tuple(tensor for _, tensor in sorted(numbered.items()))

    def fits(self, samples: Samples) -> bool:
        """Tell whether containers are of this form.

        Args:
            samples: See `tensors`.

        Returns:
            Whether `tensors` takes them.
        """
        return _matched(self.nested, (samples,) if isinstance(samples, Tensor) else samples, {})

    def beside(self, other: Form) -> list[tuple[int, int]]:
        """Pair the inputs of two forms: by their places in the containers, or in order where the containers are others.

        Args:
            other: The other form.

        Returns:
            Numbers here and there.
        """
        mine, theirs = dict(_places(self.nested)), dict(_places(other.nested))
        if mine.keys() == theirs.keys():
            return [(number, theirs[keys]) for keys, number in mine.items()]
        return list(zip(sorted(mine.values()), sorted(theirs.values()), strict=False))

    def __str__(self) -> str:
        """Write the containers with ``tensor`` in place of each."""
        return _written(self.nested)


def flat(count: int) -> Form:
    """Return the form of so many tensors one after the other."""
    return Form(tuple(range(count)))


def form_of(inputs: Any, is_leaf: Callable[[Any], bool] = lambda _: False) -> Form:
    """Return the form of what a user gives: leaves are numbered in order."""
    numbers = itertools.count()
    nested = mapped(inputs, lambda _: next(numbers), is_leaf)
    return Form(nested if isinstance(nested, (tuple, dict)) else (nested,) if isinstance(nested, int) else tuple(nested))


def leaves(nested: Any, is_leaf: Callable[[Any], bool] = lambda _: False) -> Iterator[Any]:
    """Yield what containers hold, in order."""
    if is_leaf(nested) or not isinstance(nested, (tuple, list, Mapping)):
        yield nested
    else:
        for item in nested.values() if isinstance(nested, Mapping) else nested:
            yield from leaves(item, is_leaf)


def mapped(nested: Any, function: Callable[[Any], Any], is_leaf: Callable[[Any], bool] = lambda _: False) -> Any:
    """Replace what containers hold, in order."""
    if is_leaf(nested) or not isinstance(nested, (tuple, list, Mapping)):
        return function(nested)
    if isinstance(nested, Mapping):
        return {name: mapped(item, function, is_leaf) for name, item in nested.items()}
    items = [mapped(item, function, is_leaf) for item in nested]
    return tuple(items) if isinstance(nested, tuple) else items


def _matched(nested: Any, given: Any, numbered: dict[int, Tensor]) -> bool:
    """Tell whether containers are alike, and note the tensor for each number."""
    if isinstance(nested, int):
        numbered[nested] = given
        return isinstance(given, Tensor)
    if isinstance(nested, dict):
        alike = isinstance(given, Mapping) and given.keys() == nested.keys()
        return alike and all(_matched(item, given[name], numbered) for name, item in nested.items())
    alike = isinstance(given, (tuple, list)) and len(given) == len(nested)
    return alike and all(_matched(item, inner, numbered) for item, inner in zip(nested, given, strict=True))


def _places(nested: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Yield where each number stands: the keys and indices that lead to it."""
    if isinstance(nested, int):
        yield keys, nested
    else:
        for key, item in nested.items() if isinstance(nested, dict) else enumerate(nested):
            yield from _places(item, (*keys, key))


def _written(nested: Any) -> str:
    """Write containers with ``tensor`` in place of each."""
    return str(mapped(nested, lambda _: "tensor")).replace("'tensor'", "tensor")
