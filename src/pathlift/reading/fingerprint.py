"""A text that two objects share only when they are built alike: modules with the same program, edges with the same wiring.

Values are compared to the last bit, code by its instructions and what it closes over, tensors of a model by which memory is
whose (`Fingerprint.tensors`) and all others by their elements. What cannot be looked into is alike to itself alone.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket

PASSING = frozenset({
    "training",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_non_persistent_buffers_set",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_compiled_call_impl",
    "call_super_init",
})
"""Attributes of a module that have no part in what it computes in eval mode."""


PLAIN = object.__reduce_ex__


class Fingerprint:
    """Writes an object down, piece by piece, into a hash.

    Attributes:
        tensors: Tensors by id that are told by a name in place of their elements.
    """

    def __init__(self, tensors: Mapping[int, str] | None = None) -> None:
        """Start with nothing.

        Args:
            tensors: See the class.
        """
        self.tensors = tensors or {}
        self.digest = hashlib.sha256()
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # ids stay theirs while we look

    def text(self) -> str:
        """Return what has been written so far."""
        return self.digest.hexdigest()

    def add(self, value: Any) -> Fingerprint:
        """Write an object down.

        Args:
            value: Any object.

        Returns:
            Itself.
        """
        if isinstance(value, (types.NoneType, bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum)):
            self._put(type(value).__name__, repr(value))
        elif isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType, OpOverload, OpOverloadPacket)):
            self._put("named", getattr(value, "__module__", ""), getattr(value, "__qualname__", ""), str(value))
        elif id(value) in self.seen:
            self._put("again", self.seen[id(value)])
        else:
            self.seen[id(value)] = len(self.seen)
            self.kept.append(value)
            self._look_into(value)
        return self

    def _put(self, *words: object) -> None:
        self.digest.update(("\x1f".join(map(str, words)) + "\x1e").encode())

    def _look_into(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, types.FunctionType):
            cells = [cell.cell_contents if _filled(cell) else None for cell in value.__closure__ or ()]
            self._put("function", value.__module__, value.__qualname__)
            self._code(value.__code__)
            self._several(cells, value.__defaults__, value.__kwdefaults__)
        elif isinstance(value, types.MethodType):
            self._put("method")
            self._several(value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            self._put("partial")
            self._several(value.func, value.args, value.keywords)
        elif isinstance(value, nn.Module):
            self._put("module", type(value).__module__, type(value).__qualname__, id(type(value)))
            self._mapping({key: own for key, own in vars(value).items() if key not in PASSING})
        elif isinstance(value, (set, frozenset)):
            self._put(type(value).__name__, *sorted(Fingerprint(self.tensors).add(item).text() for item in value))
        elif isinstance(value, Mapping):
            self._put(type(value).__qualname__)
            self._mapping(value)
            self._attributes(value)
        elif isinstance(value, (list, tuple)):
            self._put(type(value).__qualname__, len(value))
            self._several(*value)
            self._attributes(value)
        elif hasattr(value, "__dict__") and getattr(type(value), "__reduce_ex__", None) is getattr(
            object, "__reduce_ex__", None
        ):
            self._put("object", type(value).__module__, type(value).__qualname__, id(type(value)))
            self._attributes(value)
        else:
            self._put("unknown", id(value))

    def _several(self, *values: Any) -> None:
        for value in values:
            self.add(value)

    def _mapping(self, value: Mapping[Any, Any]) -> None:
        self._put(len(value))
        for key, item in value.items():
            self.add(key).add(item)

    def _attributes(self, value: Any) -> None:
        """Write down what an object holds, but for what it only remembers."""
        own = getattr(value, "__dict__", None) or {}
        held = {
            key: item
            for key, item in own.items()
            if not key.startswith("_") and not isinstance(getattr(type(value), key, None), functools.cached_property)
        }
        self._mapping(held)
        slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if not name.startswith("_")]
        for name in slots:
            self.add(name).add(getattr(value, name, None))

    def _code(self, code: types.CodeType) -> None:
        self._put(code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, code.co_argcount)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self._put(type(constant).__name__, repr(constant))

    def _tensor(self, value: Tensor) -> None:
        if id(value) in self.tensors:
            self._put("of the model", self.tensors[id(value)], tuple(value.shape), value.dtype)
            return
        self._put("tensor", tuple(value.shape), value.dtype)
        if value.is_meta:
            self._put("no values")
        elif value.layout is not torch.strided:
            self._put("unknown", id(value))
        else:
            flat = value.detach().cpu().contiguous().reshape(-1)
            self.digest.update(bytes(flat.view(torch.uint8).untyped_storage()) if flat.numel() else b"")


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (an empty cell raises)
    except ValueError:
        return False
    return True


def fingerprint(value: Any, tensors: Mapping[int, str] | None = None) -> str:
    """Return a text that two objects share only when they are built alike.

    Args:
        value: Any object.
        tensors: Tensors by id that are told by a name in place of their elements.

    Returns:
        The text.
    """
    return Fingerprint(tensors).add(value).text()
