"""A text that two objects share only when they are built alike: modules with the same program, edges with the same wiring.

Values are compared to the last bit, code by its instructions, what it closes over and the globals that it names, classes by
what they define, tensors of a model by which memory is whose (`Fingerprint.tensors`) and all others by their elements. What
cannot be looked into is alike to itself alone, for as long as it lives.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
import types
import uuid
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket

from pathlift.forks import LockPerProcess
from pathlift.reading.freeze import filled
from pathlift.reading.memory import contents

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
    "onnx_source",
})
"""Attributes of a module that have no part in what it computes in eval mode."""


ATOMS = (types.NoneType, bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device)
"""Types whose values say all about themselves when they are written out; not so their subclasses."""

LIBRARIES = frozenset({"torch", "numpy", *sys.stdlib_module_names})
"""Packages whose code is taken to be what it was."""

ASIDE = frozenset({
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slots__", "__abstractmethods__", "_abc_impl",
    "__parameters__", "__orig_bases__", "__init__", "__repr__", "extra_repr", "__firstlineno__", "__static_attributes__",
})  # fmt: skip
"""What a class defines that has no part in what its objects compute."""

PROCESS = uuid.uuid4().hex
"""Tokens mean nothing in another process."""

_count = itertools.count()
_one_at_a_time = LockPerProcess()
_tokens: dict[int, tuple[weakref.ref[Any], int]] = {}


def token(value: Any) -> str:
    """Return a text that stands for one object and never for another, as an id does that is taken up again.

    Args:
        value: Any object.

    Returns:
        The text; another one each time for an object that does not say when it is gone.
    """
    with _one_at_a_time.lock:
        known = _tokens.get(id(value))
        if known is None or known[0]() is not value:
            try:
                known = weakref.ref(value, functools.partial(_forget, id(value))), next(_count)
            except TypeError:
                return f"{PROCESS} {next(_count)}"
            _tokens[id(value)] = known
        return f"{PROCESS} {known[1]}"


def _forget(identity: int, gone: weakref.ref[Any]) -> None:
    if identity in _tokens and _tokens[identity][0] is gone:
        del _tokens[identity]


class Fingerprint:
    """Writes an object down, piece by piece, into a hash.

    Attributes:
        tensors: Tensors by id that are told by a name in place of their elements.
        code: Whether the code that an object may run is written down too, and all that it holds; otherwise attributes that
            begin with an underscore are taken for memories.
    """

    def __init__(self, tensors: Mapping[int, str] | None = None, *, code: bool = False) -> None:
        """Start with nothing.

        Args:
            tensors: See the class.
            code: See the class.
        """
        self.tensors = tensors or {}
        self.code = code
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
        if type(value) in ATOMS:
            self._put(type(value).__name__, repr(value))
        elif isinstance(value, (types.ModuleType, OpOverload, OpOverloadPacket)):
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
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            self._put("builtin", value.__module__, value.__qualname__)
            self.add(owner if not isinstance(owner, types.ModuleType) else None)
        elif isinstance(value, types.MethodType):
            self._put("method")
            self._several(value.__func__, value.__self__)
        elif isinstance(value, (staticmethod, classmethod)):
            self._put(type(value).__name__)
            self.add(value.__func__)
        elif isinstance(value, property):
            self._put("property")
            self.add(value.fget)
        elif isinstance(value, functools.cached_property):
            self._put("cached property")
            self.add(value.func)
        elif isinstance(value, functools.partial):
            self._put("partial")
            self._several(value.func, value.args, value.keywords, vars(value))
        elif isinstance(value, nn.Module):
            self._put("module")
            self.add(type(value))
            self._mapping({key: attribute for key, attribute in vars(value).items() if key not in PASSING})
        elif isinstance(value, (set, frozenset)):
            self._put(*sorted(Fingerprint(self.tensors, code=self.code).add(item).text() for item in value))
            self._class_and_attributes(value)
        elif type(value) in (dict, OrderedDict, types.MappingProxyType) or _keeps_to_dict(value):
            self._put("mapping")
            self._mapping(value)
            self._class_and_attributes(value)
        elif isinstance(value, (list, tuple, deque)):
            self._put("sequence", len(value))
            self._several(*value)
            self._class_and_attributes(value)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self._put("array", value.dtype.str, value.shape)
            self.digest.update(value.tobytes())
        elif isinstance(value, Enum):
            self._put("enum", value.name)
            self._several(type(value), value.value)
        elif isinstance(value, (int, float, complex, str, bytes)):
            self._put("number or text", _plainly(value))
            self._class_and_attributes(value)
        elif getattr(type(value), "__reduce_ex__", None) is getattr(object, "__reduce_ex__", None) and (
            hasattr(value, "__dict__") or _slot_names(value)
        ):
            self._put("object")
            self._class_and_attributes(value)
        else:
            self._put("unknown", token(value))

    def _several(self, *values: Any) -> None:
        for value in values:
            self.add(value)

    def _mapping(self, value: Mapping[Any, Any]) -> None:
        self._put(len(value))
        for key, item in list(value.items()):  # one that others write to meanwhile
            self.add(key).add(item)

    def _class_and_attributes(self, value: Any) -> None:
        """Write down the class of an object and what it holds; without its code, not what it only remembers."""
        self.add(type(value))
        attributes = getattr(value, "__dict__", None) or {}
        held = {
            key: item
            for key, item in attributes.items()
            if self.code or not (key.startswith("_") or isinstance(getattr(type(value), key, None), functools.cached_property))
        }
        self._mapping(held)
        for name in _slot_names(value):
            if self.code or not name.startswith("_"):
                self.add(name).add(getattr(value, name, None))

    def _class(self, value: type) -> None:
        self._put("class", value.__module__, value.__qualname__, token(value))
        if not self.code or value.__module__.partition(".")[0] in LIBRARIES:
            return
        for base in value.__mro__[1:]:
            self.add(base)
        for key, item in vars(value).items():
            if key not in ASIDE and not isinstance(item, (types.MemberDescriptorType, types.GetSetDescriptorType)):
                self.add(key).add(item)

    def _function(self, value: types.FunctionType) -> None:
        cells = [cell.cell_contents if filled(cell) else None for cell in value.__closure__ or ()]
        self._put("function", value.__module__, value.__qualname__)
        self._code(value.__code__)
        self._several(cells, value.__defaults__, value.__kwdefaults__)
        if not self.code or (value.__module__ or "").partition(".")[0] in LIBRARIES:
            return
        self._mapping(vars(value))
        names = _names(value.__code__)
        for name in sorted(names & value.__globals__.keys()):
            held = value.__globals__[name]
            self.add(name).add(held)
            if isinstance(held, types.ModuleType) and held.__name__.partition(".")[0] not in LIBRARIES:
                for inner in sorted(names & vars(held).keys()):
                    self.add(inner).add(vars(held)[inner])

    def _code(self, code: types.CodeType) -> None:
        self._put(code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, code.co_argcount, code.co_flags)
        self._put(code.co_kwonlyargcount, code.co_posonlyargcount)
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
        elif value.layout is not torch.strided or value.untyped_storage().device.type == "meta":  # a tracer's stand-in
            self._put("unknown", token(value))
        else:
            self.digest.update(contents(value))


def _plainly(value: Any) -> str:
    """Write a number or text of a subclass as that of the class."""
    kinds: tuple[Any, ...] = (int, float, complex, str, bytes)
    return next(f"{kind.__name__} {kind.__repr__(value)}" for kind in kinds if isinstance(value, kind))


def _keeps_to_dict(value: Any) -> bool:
    """Whether an object is of a subclass of dict that gives its items as dict does."""
    return isinstance(value, dict) and type(value).__iter__ is dict.__iter__ and not hasattr(type(value), "__missing__")


def _slot_names(value: Any) -> list[str]:
    """Return the names of attributes for which a class has places of its own."""
    kinds = type(value).__mro__
    return [key for kind in kinds for key, member in vars(kind).items() if isinstance(member, types.MemberDescriptorType)]


def _names(code: types.CodeType) -> set[str]:
    """Return every name that code may look up."""
    return set(code.co_names).union(*(_names(nested) for nested in code.co_consts if isinstance(nested, types.CodeType)))


def fingerprint(value: Any, tensors: Mapping[int, str] | None = None, *, code: bool = False) -> str:
    """Return a text that two objects share only when they are built alike.

    Args:
        value: Any object.
        tensors: Tensors by id that are told by a name in place of their elements.
        code: Whether the code that it may run is part of it.

    Returns:
        The text.
    """
    return Fingerprint(tensors, code=code).add(value).text()
