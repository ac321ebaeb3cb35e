"""What a captured network remembers of the model: where its parameters are, never what they were.

The state of a network is read from the module whenever it is needed, so that a training step, `load_state_dict`, writes to
`.data` or a cast to another type show at once. A change that makes the graph another one (a child replaced, weights tied or
untied, another shape or device, a constant put in the place of another) is an error that says so.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.errors import MismatchError
from pathlift.graph.network import TypedState
from pathlift.reading.memory import span

AGAIN = "Capture the model again."


@dataclass(frozen=True)
class Slot:
    """One parameter or buffer of a module.

    Attributes:
        path: Path of the module.
        module: The module.
        key: Name of the tensor in it.
        shape: Shape at the time of capture.
    """

    path: str
    module: nn.Module
    key: str
    shape: torch.Size

    def read(self) -> Tensor | None:
        """Return the tensor as it is now."""
        held = self.module._parameters.get(self.key)
        return self.module._buffers.get(self.key) if held is None else held


@dataclass(frozen=True)
class PlainConstant:
    """A tensor that the model holds as a plain attribute and that is a constant of the graph."""

    path: str
    module: nn.Module
    key: str
    tensor: Tensor


class LiveState(TypedState):
    """The parameters and buffers of a module by name, as they are when they are asked for."""

    def __init__(self, root: nn.Module, names: Mapping[str, str], device: torch.device, used: tuple[Tensor, ...]) -> None:
        """Remember where the tensors are.

        Args:
            root: The user's model.
            names: Every name of a parameter or buffer to the one that stands for its memory.
            device: Where they live.
            used: Constants of the graph that the model may hold as plain attributes.
        """
        self.root = root
        self.device = device
        modules = dict(root.named_modules(remove_duplicate=False))
        self.modules = {path: module for path, module in modules.items() if path}
        self.slots: dict[str, Slot] = {}
        for name in names:
            path, _, key = name.rpartition(".")
            slot = Slot(path, modules[path], key, torch.Size())
            tensor = slot.read()
            assert tensor is not None
            self.slots[name] = Slot(path, modules[path], key, tensor.shape)
        self.owners = tuple(dict.fromkeys(owner for name, owner in names.items() if name == owner))
        self.shared = {name: owner for name, owner in names.items() if name != owner}
        spans = {span(tensor): tensor for tensor in used}
        self.held = tuple(
            PlainConstant(path, module, key, value)
            for path, module in modules.items()
            for key, value in vars(module).items()
            if isinstance(value, Tensor) and (extent := span(value)) is not None and extent in spans
        )
        self.inside = {name: _inside(self[name], self[owner]) for name, owner in self.shared.items()}
        self.passing: frozenset[tuple[str, str]] = frozenset()
        self.plain: dict[tuple[str, str], Any] = {}
        self.layout = self._layout()

    def remember(self, passing: frozenset[tuple[str, str]]) -> None:
        """Take the numbers and words that the modules hold now for those of the graph.

        Args:
            passing: Module paths and names of those that a forward pass changes.
        """
        self.passing = passing
        self.layout = self._layout()
        attributes = plain_attributes(self.root)
        self.plain = {attribute: value for attribute, value in attributes.items() if attribute not in passing}

    def _layout(self) -> list[tuple[object, ...]]:
        """Return the modules and their hooks, as they are now."""
        named = self.root.named_modules(remove_duplicate=False)
        return [(path, id(module), *module._forward_pre_hooks, None, *module._forward_hooks) for path, module in named]

    @property
    def moved(self) -> str | None:
        """What is another one than when it was remembered, in words."""
        if self._layout() != self.layout:
            return "A module or a forward hook was added or taken away"
        for (path, key), value in self.plain.items():
            module = self.modules[path] if path else self.root
            held = module.__dict__
            now = held[key] if key in held else getattr(type(module), key, None)
            if now is not value and not _same(_kept(now), value):
                return f"The attribute '{key}' of {f'module {path!r}' if path else 'the model'} has changed"
        return None

    def _at(self, name: str) -> Tensor:
        slot = self.slots[name]
        tensor = slot.read()
        if tensor is None:
            raise MismatchError(f"The model has no parameter or buffer '{name}' any more. {AGAIN}")
        if tensor.shape != slot.shape:
            raise MismatchError(
                f"'{name}' has shape {tuple(tensor.shape)} now and had {tuple(slot.shape)} when the model was captured. {AGAIN}"
            )
        if tensor.device != self.device:
            raise MismatchError(
                f"'{name}' is on {tensor.device} now and was on {self.device} when the model was captured. {AGAIN}"
            )
        return tensor.detach()

    def verify(self) -> None:
        """Make sure that the model still has the graph that was captured.

        Raises:
            MismatchError: A module was replaced, tensors were tied or untied, or a constant is another tensor.
        """
        for path, module in self.modules.items():
            parent, _, key = path.rpartition(".")
            holder = self.modules[parent] if parent else self.root
            if holder._modules.get(key) is not module:
                raise MismatchError(f"The module '{path}' was replaced or removed after the model was captured. {AGAIN}")
        for name, owner in self.shared.items():
            if _inside(self[name], self[owner]) != self.inside[name]:
                raise MismatchError(f"'{name}' shared its memory with '{owner}' when the model was captured. {AGAIN}")
        for held in self.held:
            if vars(held.module).get(held.key) is not held.tensor:
                raise MismatchError(f"The attribute '{held.key}' of module '{held.path}' is another tensor now. {AGAIN}")

    def dtype(self, name: str) -> torch.dtype:
        """See `TypedState.dtype`."""
        tensor = self.slots[name].read()
        return self._at(name).dtype if tensor is None else tensor.dtype

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor as it is now, without gradient."""
        return self._at(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names that stand for a memory of their own."""
        return iter(self.owners)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.owners)

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        """Pickle and copy as the tensors that there are now.

        Returns:
            A plain mapping.
        """
        return dict, ({name: self[name].clone() for name in self},)


def _inside(part: Tensor, holder: Tensor) -> tuple[object, ...]:
    """Say how one tensor lies in the memory of another."""
    part_span, holder_span = span(part), span(holder)
    if part_span is None or holder_span is None:
        return ()
    meets: bool = part_span.meets(holder_span)
    ends = (part_span.start - holder_span.start, part_span.stop - holder_span.stop) if meets else (0, 0)
    return (meets, *ends, part.stride(), holder.stride())


def plain_attributes(root: nn.Module) -> dict[tuple[str, str], Any]:
    """Return the numbers and words that the modules of a model hold and that the code of one of them names.

    Args:
        root: The model.

    Returns:
        Module path and name of the attribute, to its value.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    names = {name for module in modules.values() for name in _named_by(module.__class__)} - {"training"}
    attributes: dict[tuple[str, str], Any] = {}
    for path, module in modules.items():
        bases = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
        held = {key: value for cls in reversed(bases) for key, value in vars(cls).items()} | vars(module)
        for key in names & held.keys():
            if _is_plain(held[key]):
                attributes[path, key] = _kept(held[key])
    return attributes


@cache
def _named_by(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names that the methods of a module's class use, but for those that only set it up or show it."""
    names: set[str] = set()
    for base in cls.__mro__:
        if issubclass(base, nn.Module) and base is not nn.Module:
            for key, value in vars(base).items():
                function = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(function, types.FunctionType) and key not in {"__init__", "extra_repr", "reset_parameters"}:
                    names |= _names_of(function.__code__)
    return frozenset(names)


def _names_of(code: types.CodeType) -> set[str]:
    inner = (nested for nested in code.co_consts if isinstance(nested, types.CodeType))
    return set(code.co_names).union(*(_names_of(nested) for nested in inner))


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str, types.NoneType))


def _kept(value: Any) -> Any:
    """Return a value that stays as it is when the module's own list changes."""
    return tuple(map(_kept, value)) if isinstance(value, (list, tuple)) else value


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and (value == other or (value != value and other != other))
