"""Copies of the user's model that run in its place: nothing of the user's is called or written to.

A `Copier` makes new module objects, containers, functions with their closures and plain objects around the same tensors, or
around tensors of their own. What cannot be copied (a lock, an open file) is shared, as long as it is no module. No method of
the user's is called on the way: `eval()` may be overridden (low-rank layers merge, averaged weights swap), so flags are set.
"""

from __future__ import annotations

import collections
import copy
import copyreg
import dis
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.errors import Problem, UnsupportedModelError
from pathlift.reading.examples import Examples
from pathlift.reading.wrappers import Transparent, inner

ATOMS = (
    types.NoneType, bool, int, float, complex, str, bytes, type, range, slice, types.ModuleType, types.BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, torch.Generator, torch.layout, torch.memory_format, Enum,
)  # fmt: skip
"""What is never copied."""

CONTAINERS = (list, dict, set, frozenset, collections.OrderedDict, collections.deque, collections.defaultdict)
"""What is rebuilt item by item, without a look at what else it holds."""


ENGINES = ("lightning", "lightning_fabric", "pytorch_lightning", "accelerate", "deepspeed")
"""Packages whose objects on a module drive its training: shared, not copied."""

PROTOCOL = (*sys.stdlib_module_names, "torch", "numpy")
"""Packages whose objects are copied as they say themselves; of all others neither `__deepcopy__` nor `__reduce__` is called."""

COMPARISONS = ("IS_OP", "CONTAINS_OP", "COMPARE_OP")

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Copier:
    """Copies objects and all that they hold, each once.

    Attributes:
        memo: Copies by the id of the original.
        tensors: The tensors that were met, by id.
    """

    def __init__(self, tensor: Callable[[Tensor], Tensor], *, training: bool | None = None, transparent: bool = True) -> None:
        """Say how tensors are copied.

        Args:
            tensor: Makes the copy of a tensor.
            training: Mode of all modules; None leaves them as they are.
            transparent: Put plain modules of the same names in the place of wrappers that compile, scatter or synchronise.
        """
        self.tensor = tensor
        self.training = training
        self.transparent = transparent
        self.memo: dict[int, Any] = {}
        self.tensors: dict[int, Tensor] = {}
        self._kept: list[Any] = []  # ids stay theirs while we look
        self._owned: dict[int, Tensor] = {}

    def copy(self, value: Any) -> Any:
        """Return a copy of any object.

        Args:
            value: The object.

        Returns:
            The copy; the object itself where it cannot change or cannot be copied.
        """
        if isinstance(value, ATOMS):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        self._kept.append(value)
        made = self._copied(value)
        return self.memo.setdefault(id(value), made)

    def _copied(self, value: Any) -> Any:
        if type(value) in weakref.ProxyTypes:
            return weakref.proxy(self.copy(value.__repr__.__self__))
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
            return self.tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.copy(value.__func__), self.copy(value.__self__))
        if "_torchdynamo_orig_callable" in getattr(value, "__dict__", ()) and self.transparent:
            return self.copy(value._torchdynamo_orig_callable)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if type(value) is functools.partial:
            return functools.partial(self.copy(value.func), *map(self.copy, value.args), **self._items(value.keywords))
        if type(value) is tuple:
            items = tuple(map(self.copy, value))
            return value if all(copied is item for copied, item in zip(items, value, strict=True)) else items
        if type(value) is weakref.ref:
            target = value()
            return value if target is None else weakref.ref(self.copy(target))
        if type(value) in CONTAINERS:
            return self._container(value)
        if isinstance(value, np.ndarray):
            return self._array(value)
        return self._object(value)

    def _array(self, value: np.ndarray[Any, Any]) -> Any:
        """Copy an array of NumPy's; one that views a parameter or buffer views its copy afterwards, and is read-only."""
        if value.dtype.hasobject:
            made = value.copy()
            self.memo[id(value)] = made
            for index in np.ndindex(value.shape):
                made[index] = self.copy(value[index])
            return made
        start = value.__array_interface__["data"][0]
        for storage in self._owned.values():
            if storage.data_ptr() <= start < storage.data_ptr() + storage.numel():
                held = self.tensor(storage).numpy()
                view = np.ndarray(value.shape, value.dtype, held, start - storage.data_ptr(), value.strides)
                view.flags.writeable = False
                return view
        return value.copy()

    def _remember_memory(self, module: nn.Module) -> None:
        """Remember the memory of a module's parameters and buffers, byte by byte."""
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.device.type == "cpu" and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._owned:
                    self._owned[storage._cdata] = torch.empty(0, dtype=torch.uint8).set_(storage)

    def _items(self, items: Any) -> dict[Any, Any]:
        return {self.copy(key): self.copy(item) for key, item in items.items()}

    def _container(self, value: Any) -> Any:
        if isinstance(value, frozenset):
            return frozenset(map(self.copy, value))
        made = copy.copy(value)
        made.clear()
        self.memo[id(value)] = made
        if isinstance(value, dict):
            made.update(self._items(value))
        elif isinstance(value, set):
            made.update(map(self.copy, value))
        else:
            made.extend(map(self.copy, value))
        return made

    def _function(self, value: types.FunctionType) -> Any:
        """Copy a function that closes over something that is copied; its globals stay what they are."""
        cells = value.__closure__ or ()
        held = [cell.cell_contents for cell in cells if filled(cell)]
        state = (*held, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *value.__dict__.values())
        if not any(_holds_state(item) for item in state):
            return value
        fresh = tuple(types.CellType() for _ in cells)
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, fresh)
        self.memo[id(value)] = made
        for cell, new in zip(cells, fresh, strict=True):
            if filled(cell):
                new.cell_contents = self.copy(cell.cell_contents)
        made.__defaults__ = self.copy(value.__defaults__)
        made.__kwdefaults__ = None if value.__kwdefaults__ is None else self._items(value.__kwdefaults__)
        made.__dict__.update(self._items(value.__dict__))
        made.__qualname__, made.__module__ = value.__qualname__, value.__module__
        return made

    def _module(self, value: nn.Module) -> nn.Module:
        held = dict(vars(value))
        self._remember_memory(value)
        wrapped = inner(value) if self.transparent else None
        if wrapped is None:
            made: nn.Module = object.__new__(type(value))
        else:
            made = object.__new__(Transparent)
            held = {key: item for key, item in held.items() if key in vars(nn.Module())}
        self.memo[id(value)] = made
        if self.transparent and held.get("_compiled_call_impl") is not None:
            held["_compiled_call_impl"] = None
        vars(made).update({key: self._hooks(item) if key in HOOKS else self.copy(item) for key, item in held.items()})
        for name in _slots(type(value)):
            if hasattr(value, name):
                object.__setattr__(made, name, self.copy(getattr(value, name)))
        if self.training is not None:
            vars(made)["training"] = self.training
        return made

    def _hooks(self, hooks: dict[int, Any]) -> dict[int, Any]:
        """Copy hooks, with the containers among the global names that they use: they record into copies."""
        made = copy.copy(hooks)
        for number, hook in hooks.items():
            made[number] = twin = self.copy(hook)
            if isinstance(twin, types.FunctionType):  # what a decorator wraps has other global names than its wrapper
                names = [name for name in twin.__code__.co_names if isinstance(twin.__globals__.get(name), CONTAINERS)]
                scope = {**twin.__globals__, **{name: self.copy(twin.__globals__[name]) for name in names}}
                made[number] = types.FunctionType(twin.__code__, scope, twin.__name__, twin.__defaults__, twin.__closure__)
                made[number].__kwdefaults__ = twin.__kwdefaults__
        return made

    def _object(self, value: Any) -> Any:
        """Copy an object as `copy.deepcopy` does, or share it when that cannot be done."""
        cls = type(value)
        if hasattr(cls, "__del__") or cls.__module__.partition(".")[0] in ENGINES or _is_sentinel(value):
            return value
        if not _special(cls):
            try:
                made = object.__new__(cls)
            except TypeError:
                pass  # it has a constructor in C
            else:
                self.memo[id(value)] = made
                if self._filled(made, value):
                    return made
                del self.memo[id(value)]
        try:
            return self._rebuilt(value)
        except Exception:
            return value

    def _filled(self, made: Any, value: Any) -> bool:
        """Copy the attributes of an object; False for one that has an attribute of its class in the place of a slot."""
        try:
            for name in _slots(type(value)):
                if hasattr(value, name):
                    object.__setattr__(made, name, self.copy(getattr(value, name)))
        except AttributeError:
            return False
        if hasattr(value, "__dict__"):
            vars(made).update(self._items(vars(value)))
        return True

    def _rebuilt(self, value: Any) -> Any:
        """Copy an object by its own `__deepcopy__` or `__reduce_ex__`."""
        if hasattr(value, "__deepcopy__"):
            return copy.deepcopy(value, self.memo)
        reducer = copyreg.dispatch_table.get(type(value))
        how = reducer(value) if reducer is not None else value.__reduce_ex__(4)
        if isinstance(how, str):
            return value
        function, args, *rest = how
        state, items, pairs = (*rest, None, None, None)[:3]
        made = function(*map(self.copy, args))
        self.memo[id(value)] = made
        if state is not None:
            state = self.copy(state)
            if hasattr(made, "__setstate__"):
                made.__setstate__(state)
            else:
                plain, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
                vars(made).update(plain or {})
                for name, attribute in (slots or {}).items():
                    object.__setattr__(made, name, attribute)
        for item in items or ():
            made.append(self.copy(item))
        for key, item in pairs or ():
            made[self.copy(key)] = self.copy(item)
        return made


def filled(cell: types.CellType) -> bool:
    """Whether the cell of a closure holds something yet.

    Args:
        cell: The cell.

    Returns:
        Whether it does.
    """
    try:
        cell.cell_contents  # noqa: B018 (an empty cell raises)
    except ValueError:
        return False
    return True


def _holds_state(value: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Whether an object is, or holds, anything but atoms and functions without state."""
    if isinstance(value, ATOMS) or id(value) in seen:
        return False
    inside = seen | {id(value)}  # a function may close over itself
    if type(value) is tuple:
        return any(_holds_state(item, inside) for item in value)
    if isinstance(value, types.FunctionType):
        return any(_holds_state(cell.cell_contents, inside) for cell in value.__closure__ or () if filled(cell))
    return True


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in {"__dict__", "__weakref__"}:
                yield f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name


def _is_sentinel(value: Any) -> bool:
    """Whether an object holds nothing and is known by a global name: all that it says is that it is itself."""
    if type(value) is object:
        return True
    if getattr(value, "__dict__", True) or any(True for _ in _slots(type(value))):
        return False
    scope = vars(sys.modules.get(type(value).__module__, types))
    return any(item is value for item in scope.values())


def _special(cls: type) -> bool:
    """Whether a class has its own say in how it is copied, and is listened to."""
    if cls.__module__.partition(".")[0] not in PROTOCOL:
        return False
    methods = ("__reduce_ex__", "__reduce__", "__getstate__")
    return (
        hasattr(cls, "__deepcopy__")
        or hasattr(cls, "__setstate__")
        or cls in copyreg.dispatch_table
        or any(getattr(cls, name, None) is not getattr(object, name, None) for name in methods)
    )


def check_modules(model: nn.Module) -> None:
    """Refuse modules that no copy can be made of.

    Args:
        model: The user's model.

    Raises:
        UnsupportedModelError: A module is TorchScript, or has lazy parameters.
    """
    for name, module in model.named_modules():
        subject = f"The module '{name}'" if name else "It"
        if isinstance(module, torch.jit.ScriptModule):
            advice = "Give the original nn.Module, as it was before torch.jit.script or torch.jit.trace."
            raise UnsupportedModelError(
                _problem(name, f"{subject} is a TorchScript module, which has no graph to export.", advice)
            )
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
                reason = f"{subject} has a lazy parameter without a shape."
                raise UnsupportedModelError(_problem(name, reason, "Run the model once so that it gets its shape."))


def frozen_view(model: nn.Module) -> tuple[nn.Module, Copier]:
    """Copy the module tree without copying a tensor, in eval mode.

    Args:
        model: The user's model; not changed.

    Returns:
        A model with the same parameters and buffers (same memory, no gradients) in eval mode, and the copier that made it.

    Raises:
        UnsupportedModelError: A method compares with a global object that is a part of the model.
    """
    copier = Copier(_alias, training=False)
    view: nn.Module = copier.copy(model)
    _check_globals(model, copier)
    for module in view.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return view, copier


def _check_globals(model: nn.Module, copier: Copier) -> None:
    """Refuse methods that compare with a global object of which the model holds a copy by now: no comparison would be true."""
    for cls in dict.fromkeys(cls for module in model.modules() for cls in type(module).__mro__):
        functions = [member for member in vars(cls).values() if isinstance(member, types.FunctionType)]
        if cls.__module__.partition(".")[0] == "torch":
            continue
        for function in functions:
            scope = function.__globals__
            names = {
                name for name in function.__code__.co_names if copier.memo.get(id(item := scope.get(name)), item) is not item
            }
            steps = list(dis.get_instructions(function)) if names else []
            read = names.intersection(step.argval for step in steps if step.opname in {"LOAD_GLOBAL", "LOAD_NAME"})
            if read and any(step.opname in COMPARISONS for step in steps):
                reason = f"{function.__qualname__} compares with the global object '{min(read)}', which is a part of the model."
                advice = "Let it look at an attribute instead (isinstance, a flag, a name)."
                raise UnsupportedModelError(_problem("", reason, advice))


def _alias(tensor: Tensor) -> Tensor:
    alias = tensor.detach()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(alias, requires_grad=False)
    return alias


class Cloning:
    """Makes tensors with memory of their own; what shared memory before shares it afterwards."""

    def __init__(self) -> None:
        """Start with nothing cloned."""
        self.storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.places: list[tuple[int, int, torch.UntypedStorage]] = []
        """Begin and end of each storage that is cloned and lies on the CPU, and its clone; asked once for every further one."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Clone a tensor.

        Args:
            tensor: A tensor.

        Returns:
            A leaf of the same type, dtype and strides.
        """
        plain = tensor.detach()
        if plain.layout is not torch.strided:
            made = plain.clone()
        else:
            storage, offset = self._cloned(plain.untyped_storage())
            made = torch.empty(0, dtype=plain.dtype, device=plain.device)
            made.set_(storage, plain.storage_offset() + offset // plain.itemsize, plain.size(), plain.stride())
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        elif tensor.is_leaf and tensor.requires_grad:
            made.requires_grad_()
        return made

    def _cloned(self, storage: torch.UntypedStorage) -> tuple[torch.UntypedStorage, int]:
        """Return the clone of a storage, or of one that it is a part of, and the byte at which it begins there."""
        if storage._cdata in self.storages:
            return self.storages[storage._cdata][1], 0
        begin, size = (storage.data_ptr(), storage.nbytes()) if storage.device.type == "cpu" else (0, 0)
        if size:
            for low, high, made in self.places:
                if low <= begin and begin + size <= high:
                    return made, begin - low
        made = storage.clone()
        self.storages[storage._cdata] = storage, made
        if size:
            self.places.append((begin, begin + size, made))
        return made, 0


def cloned(model: nn.Module) -> nn.Module:
    """Copy a model as it stands, with memory of its own.

    Args:
        model: Any module; not changed. Wrappers that compile or synchronise become plain modules of the same names.

    Returns:
        The copy, in the same modes.
    """
    made: nn.Module = Copier(Cloning()).copy(model)
    return made


def run_copy(model: nn.Module, examples: Examples) -> None:
    """Run a copy of a model, to see whether it runs.

    Args:
        model: Any module; not changed.
        examples: Its inputs.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        examples.run(Copier(Cloning(), training=False).copy(model))


def _problem(module: str, reason: str, advice: str) -> tuple[Problem, ...]:
    return (Problem(module, "export", "", reason, advice),)
