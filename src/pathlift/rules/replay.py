"""Calls of ATen operators as values: they pickle, copy and compare, which PyTorch's own overloads and closures do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

BATCHED_TWINS = {
    "aten::moveaxis.int": "aten::movedim.int",
    "aten::moveaxis.intlist": "aten::movedim.intlist",
    "aten::unsafe_split_with_sizes": "aten::split_with_sizes",
    "aten::native_channel_shuffle": "aten::channel_shuffle",
    "aten::select_copy.int": "aten::select.int",
    "aten::slice_copy.Tensor": "aten::slice.Tensor",
    "aten::_reshape_copy": "aten::reshape",
}
"""Operators that `torch.vmap` cannot carry, or only sample by sample with a warning, and what gives the same numbers."""


@dataclass(frozen=True)
class Operator:
    """An operator of PyTorch by name, such as ``aten::add.Tensor``: called like the overload itself, equal by name."""

    name: str

    @classmethod
    def of(cls, target: Any) -> Operator:
        """Return an overload by name; of one that works in place, its twin that returns its result; one that takes batches.

        Args:
            target: An overload, as the layers of an exported graph name it.

        Returns:
            The operator.

        Raises:
            LookupError: It works in place, and there is none that does not.
        """
        name = str(target.name())
        if not target._schema.is_mutable:
            return cls(BATCHED_TWINS.get(name, name))
        base, _, overload = name.partition(".")
        family = getattr(getattr(torch.ops, target.namespace), base.partition("::")[2].removesuffix("_"), None)
        for candidate in sorted(family.overloads() if family else (), key=lambda name: name != (overload or "default")):
            twin = getattr(family, candidate)
            if not twin._schema.is_mutable and _arguments(twin) == _arguments(target):
                return cls(str(twin.name()))
        raise LookupError(f"'{name}' writes to one of its arguments, and no operator does the same without")

    @property
    def overload(self) -> Any:
        """The overload that the name stands for."""
        return _overload(self.name)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the operator.

        Args:
            args: As the operator's schema says.
            kwargs: As the operator's schema says.

        Returns:
            What the operator returns.
        """
        return _overload(self.name)(*args, **kwargs)


def _arguments(target: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in target._schema.arguments]


@cache
def _overload(name: str) -> Any:
    path, _, overload = name.partition(".")
    namespace, _, base = path.partition("::")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    except AttributeError as error:
        raise LookupError(f"there is no operator '{name}' in this PyTorch") from error


@dataclass(frozen=True, eq=False)
class Replay:
    """An operator as a function of one of its tensors: ``x ↦ operator(…, key=x, …)``.

    Attributes:
        operator: What is called.
        key: Name of the argument that x takes.
        fixed: The other arguments.
        zeros: Arguments that are zeros of the given shape, of the type of x.
        piece: Which of several results is returned; None when there is one.
    """

    operator: Operator
    key: str
    fixed: Mapping[str, Any]
    zeros: Mapping[str, tuple[int, ...]]
    piece: int | None = None

    def __call__(self, x: Tensor) -> Any:
        """Call the operator.

        Args:
            x: The free argument.

        Returns:
            Its result, or the piece asked for.
        """
        zeros = {name: x.new_zeros(shape) for name, shape in self.zeros.items()}
        out = self.operator(**{self.key: x}, **self.fixed, **zeros)
        return out if self.piece is None else out[self.piece]

    def __eq__(self, other: object) -> bool:
        """Whether the same operator is called with the same arguments; tensors are equal by type, shape and content."""
        return isinstance(other, Replay) and _described(self._parts) == _described(other._parts)

    def __hash__(self) -> int:
        """Agree with equality."""
        return hash((self.operator, self.key, self.piece, tuple(self.fixed)))

    @property
    def _parts(self) -> tuple[Any, ...]:
        return (self.operator, self.key, self.fixed, self.zeros, self.piece)


def replayed(name: str, key: str = "self", *, zeros: Mapping[str, tuple[int, ...]] | None = None, **fixed: Any) -> Replay:
    """Return a call of an operator as a function of one of its arguments.

    Args:
        name: Such as ``aten::reshape``.
        key: The free argument.
        zeros: See `Replay`.
        fixed: The other arguments.

    Returns:
        The function.
    """
    return Replay(Operator(name), key, fixed, zeros or {})


def _described(value: Any) -> Any:
    """Return something that is equal exactly for equal arguments; NaN is itself, and 0 is not False."""
    if isinstance(value, Tensor):
        return (value.dtype, tuple(value.shape), value.device, value.detach().cpu().contiguous().view(-1).tolist().__repr__())
    if isinstance(value, (list, tuple)):
        return tuple(_described(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _described(item) for key, item in value.items()}
    return (type(value).__name__, repr(value))
