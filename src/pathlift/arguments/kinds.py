"""Kinds of arguments: each takes a name and a value, and returns the value as functions use it or refuses it in a sentence.

A kind looks at what a value is, never at what it is used for: whether a name is one of the model's, or a shape is that of its
input, is for the function to say.
"""

from __future__ import annotations

import inspect
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pathlift.errors import InputError, nearest
from pathlift.precision import recordable

Kind: TypeAlias = Callable[[str, Any], Any]
"""The name of an argument and its value ↦ the value to use; raises `InputError`."""

PRECISIONS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
WHOLE = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool})

DTYPES = PRECISIONS | WHOLE
"""What a tensor may hold."""

TEXTS = (str, bytes, bytearray)
"""Sequences that are never lists of things."""

LONGEST = 1024
"""Characters of a name; a longer one is no name."""

DEEPEST = 20
"""Containers within each other, at most."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 4
_SHORT.maxlevel = 2


def shown(value: object) -> str:
    """Say what a value is, in a few words however large it is.

    Args:
        value: Anything.

    Returns:
        At most some hundred characters on one line.
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {_dtype(value)}" if not value.is_nested else "a nested tensor"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Path)):
        return _SHORT.repr(value)
    if type(value) in {list, tuple, set, frozenset, dict}:
        return f"a {type(value).__name__} of length {len(value)}"  # type: ignore[arg-type]
    return f"{'an' if type(value).__name__[:1] in 'AEIOU' else 'a'} {type(value).__name__}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def refusal(name: str, what: str, value: object) -> InputError:
    """Return the error of a value that is not what it must be.

    Args:
        name: The argument.
        what: What it must be.
        value: What was found.

    Returns:
        The error.
    """
    return InputError(f"{name} must be {what}, found {shown(value)}.{from_array(what, value)}")


def from_array(what: str, value: object) -> str:
    """Say how an array becomes a tensor, where one would do."""
    numbers = isinstance(value, np.ndarray) and value.dtype.kind in "fiu"
    return " Convert it with torch.from_numpy(…)." if numbers and "tensor" in what else ""


def optional(kind: Kind) -> Kind:
    """Accept None as well: for an argument whose default it is."""
    return lambda name, value: None if value is None else kind(name, value)


# ---- numbers, words


def number(what: str, good: Callable[[float], bool] = lambda _: True) -> Kind:
    """Real numbers of Python and NumPy that are not NaN: never a truth value, a string or a tensor."""

    def checked(name: str, value: Any) -> float:
        if isinstance(value, Real) and not isinstance(value, bool):
            try:
                real = float(value)
                if not math.isnan(real) and good(real):
                    return value if isinstance(value, int) and abs(value) < 2**53 else real
            except OverflowError:  # beyond the range of floats
                pass
        raise refusal(name, what, value)

    return checked


def whole(what: str, good: Callable[[int], bool] = lambda _: True) -> Kind:
    """Whole numbers of Python and NumPy that fit into 64 bits: never a truth value."""

    def checked(name: str, value: Any) -> int:
        if isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63 and good(int(value)):
            return int(value)
        raise refusal(name, what, value)

    return checked


def numbers(what: str, each: Kind | None = None, least: int = 0) -> Kind:
    """A sequence of so many numbers or more, or a tensor or array of them."""
    each = each or number("a number")

    def checked(name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.tensor(value.tolist(), dtype=torch.float64, device="cpu")
        if isinstance(value, Tensor) and (least == 0 or value.dim() == 1):
            plain_tensor(name, value)
            return value if least == 0 else checked(name, value.tolist())
        if isinstance(value, TEXTS) or not isinstance(value, Sequence) or len(value) < least:
            raise refusal(name, what, value)
        return [each(f"{name}[{index}]", item) for index, item in enumerate(value)]

    return checked


least_zero = number("a finite number of at least 0", lambda v: 0 <= v < math.inf)
positive = number("a positive finite number", lambda v: 0 < v < math.inf)
count = whole("a whole number of at least 0", lambda v: v >= 0)
positive_count = whole("a positive whole number", lambda v: v >= 1)


def flag(name: str, value: Any) -> bool:
    """A truth value."""
    if not isinstance(value, (bool, np.bool_)):
        raise refusal(name, "True or False", value)
    return bool(value)


def choice(*words: str) -> Kind:
    """One of a few words."""

    def checked(name: str, value: Any) -> str:
        if isinstance(value, str) and value in words:
            return value
        near = nearest(value[:60], words) if isinstance(value, str) else ""
        raise InputError(f"{name} must be one of {', '.join(words)}, found {shown(value)}.{near if 'mean' in near else ''}")

    return checked


def text(what: str, least: int = 0) -> Kind:
    """A word of the user's, of so many letters or more."""

    def checked(name: str, value: Any) -> str:
        if not isinstance(value, str) or not least <= len(value) <= LONGEST:
            raise refusal(name, what, value)
        return value

    return checked


# ---- objects


def instance(what: str, *classes: type) -> Kind:
    """An object of one of some classes."""

    def checked(name: str, value: Any) -> Any:
        if not isinstance(value, classes):
            raise refusal(name, what, value)
        return value

    return checked


def either(what: str, *kinds: tuple[type | tuple[type, ...], Kind]) -> Kind:
    """What the first kind says whose classes the value has."""

    def checked(name: str, value: Any) -> Any:
        for classes, kind in kinds:
            if isinstance(value, classes):
                return kind(name, value)
        raise refusal(name, what, value)

    return checked


module = instance("a torch.nn.Module", nn.Module)
"""One that cannot be read is refused, or reported, with its problems."""


def subclass(what: str, of: type) -> Kind:
    """A class below another."""

    def checked(name: str, value: Any) -> Any:
        if not (isinstance(value, type) and issubclass(value, of)):
            raise refusal(name, what, value)
        return value

    return checked


def collection(what: str, each: Kind) -> Kind:
    """A list, tuple or set of at least one thing."""

    def checked(name: str, value: Any) -> list[Any]:
        if not isinstance(value, (list, tuple, set, frozenset)) or not value:
            raise refusal(name, what, value)
        return [each(f"an item of {name}", item) for item in value]

    return checked


def function(what: str, count: int, *, modules: bool = False) -> Kind:
    """A function of so many arguments, not a class; a module of torch only where that makes sense."""

    def checked(name: str, value: Any) -> Any:
        if not callable(value) or isinstance(value, type) or (isinstance(value, nn.Module) and not modules):
            raise refusal(name, what, value)
        try:
            inspect.signature(value).bind(*range(count))
        except TypeError as error:
            raise InputError(f"{name} must be {what}; {shown(value)} cannot be called so: {error}.") from None
        except ValueError:  # a built-in function that does not tell
            pass
        return value

    return checked


def anything(_: str, value: Any) -> Any:
    """What the function itself looks at."""
    return value


def generator(name: str, value: Any) -> torch.Generator | int:
    """A source of randomness on the CPU, or a whole number to begin one with."""
    if isinstance(value, torch.Generator) and value.device.type == "cpu":
        return value
    seed: int = whole("a torch.Generator on the CPU, or a seed: a whole number of at most 64 bits")(name, value)
    return seed


def any_generator(name: str, value: Any) -> torch.Generator | int:
    """A source of randomness on any device, or a whole number to begin one with."""
    return value if isinstance(value, torch.Generator) else generator(name, value)


def device(name: str, value: Any) -> torch.device:
    """A device on which tensors can be made."""
    if not isinstance(value, (str, torch.device)):
        raise refusal(name, "a device such as 'cpu' or 'cuda:0'", value)
    try:
        where = torch.device(value)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:200] or "there is none"
        raise InputError(f"{name} must be a device that is there, found {shown(value)}: {reason}") from error
    if where.type == "meta":
        raise InputError(f"{name} must be a device that holds values, found 'meta'.")
    return where


def file(name: str, value: Any) -> Path:
    """The name of a file or folder, whether it is there or not."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise refusal(name, "the path of a file", value)
    if not os.fspath(value):
        raise InputError(f"{name} must be the path of a file, found an empty string.")
    try:
        os.stat(value)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{name} must be the path of a file, found {shown(value)}: {reason}.") from error
    return Path(value)


# ---- tensors


def unfit(tensor: Tensor, dtypes: frozenset[torch.dtype] = DTYPES) -> str | None:
    """Say why a tensor is no array of numbers.

    Args:
        tensor: Any tensor.
        dtypes: What it may hold.

    Returns:
        What it is and what to do, None when it is one; where it lies is another question.
    """
    if is_lazy(tensor):
        return "has no shape yet. Run the model once, so that its lazy layers know theirs"
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"is no dense tensor ({layout}). Convert it with .to_dense()"
    if tensor.dtype not in dtypes:
        kinds = ["floating-point numbers of 16, 32 or 64 bits"]
        kinds += ["whole numbers"] if dtypes & (WHOLE - {torch.bool}) else []
        kinds += ["truth values"] if torch.bool in dtypes else []
        allowed = " or ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[1:] else kinds)
        advice = "Dequantize it" if tensor.is_quantized else "Convert it, with .float() say"
        return f"has dtype {_dtype(tensor)}; expected {allowed}. {advice}"
    return None


def plain_tensor(name: str, value: Any, dtypes: frozenset[torch.dtype] = DTYPES, *, hollow: bool = False) -> Tensor:
    """A dense tensor of numbers that has values; a ``hollow`` one may lie on the meta device."""
    if not isinstance(value, Tensor):
        raise refusal(name, "a tensor", value)
    problem = unfit(value, dtypes)
    if problem is None and value.is_meta and not hollow:
        problem = "is on the meta device and has no values"
    if problem is not None:
        raise InputError(f"{name} {problem}.")
    return value


def module_with_values(name: str, value: Any) -> nn.Module:
    """A module whose parameters are dense tensors of numbers."""
    if not isinstance(value, nn.Module):
        raise refusal(name, "a torch.nn.Module", value)
    for key, parameter in value.named_parameters():
        plain_tensor(f"'{key}' of {name}", parameter)
    return value


def batch(name: str, value: Any) -> Tensor:
    """Inputs with a batch dimension: real numbers, at least one sample and no empty axis."""
    if not isinstance(value, Tensor):
        raise refusal(name, "a tensor with a batch dimension, shape (batch, …)", value)
    plain_tensor(name, value, DTYPES - {torch.bool})
    if value.dim() == 0:
        raise InputError(f"{name} must be a tensor with a batch dimension, found a scalar.")
    if value.numel() == 0:
        raise InputError(f"{name} is empty: shape {tuple(value.shape)}. Every size must be at least 1.")
    return value


def stream(what: str, each: Kind) -> Kind:
    """Things that come one after the other; each is looked at when it comes."""

    def checked(name: str, value: Any) -> Iterator[Any]:
        alone = (*TEXTS, Path, Mapping, Tensor, np.ndarray, nn.Module)
        if isinstance(value, alone) or not isinstance(value, Iterable):
            raise refusal(name, what, value)
        return (each(f"an item of {name}", item) for item in value)

    return checked


def named(name: str, what: str, key: Any) -> str:
    """Return a key of a mapping that has names for keys."""
    if not isinstance(key, str) or len(key) > LONGEST:
        raise InputError(f"{name} must be {what}, found the key {shown(key)}.")
    return key


def mapping(what: str, each: Kind) -> Kind:
    """A mapping from names to things."""

    def checked(name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise refusal(name, what, value)
        for key, item in value.items():
            each(f"{name}['{named(name, what, key)}']", item)
        return value

    return checked


def nested(what: str, leaf: Kind, is_leaf: Callable[[Any], bool]) -> Kind:
    """One thing, or tuples, lists and dictionaries of it, within each other."""

    def checked(name: str, value: Any, depth: int = 0) -> Any:
        if is_leaf(value):
            return recordable(leaf(name, value))
        if isinstance(value, TEXTS) or not isinstance(value, (Sequence, Mapping)) or len(value) > 1000 or depth > DEEPEST:
            raise refusal(name, what, value)
        if hasattr(value, "_fields"):
            raise InputError(f"{name} is a {type(value).__name__}, whose names would be lost; wrap the model to take a tuple.")
        if not value:
            raise InputError(f"{name} is empty; expected {what}.")
        if isinstance(value, Mapping):
            return {key: checked(f"{name}['{named(name, what, key)}']", item, depth + 1) for key, item in value.items()}
        items = [checked(f"{name}[{index}]", item, depth + 1) for index, item in enumerate(value)]
        return tuple(items) if depth == 0 or isinstance(value, tuple) else items

    return checked


def one_input(value: Any) -> bool:
    """Whether something is one input of a model, a tensor or a shape, and no container of several."""
    if isinstance(value, Tensor):
        return True
    holds = (Sequence, Mapping, Tensor)
    sizes = isinstance(value, Sequence) and not isinstance(value, TEXTS) and 0 < len(value) <= 1000
    return sizes and not any(isinstance(item, holds) and not isinstance(item, TEXTS) for item in value)


def _input(name: str, value: Any) -> Any:
    return _example(name, value) if isinstance(value, Tensor) else _shape(name, value)


def _shape(name: str, sizes: Sequence[object]) -> tuple[int, ...]:
    shape = []
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, Integral) or not 1 <= int(size) < 2**63:
            raise InputError(
                f"{name} is no shape: every size must be an integer of at least 1, found {shown(size)}."
                f"{from_array('tensor', size) or ' Give the shape without the batch dimension.'}"
            )
        shape.append(int(size))
    if math.prod(shape) >= 2**63:
        raise InputError(f"{name} is no shape: {'×'.join(map(str, shape[:8]))} are more numbers than a tensor can have.")
    return tuple(shape)


def _example(name: str, value: Tensor) -> Tensor:
    plain_tensor(name, value, DTYPES - {torch.bool}, hollow=True)
    if value.dim() == 0:
        raise InputError(f"{name} has no batch dimension; expected shape (batch, …), found a scalar.")
    if value.numel() == 0:
        raise InputError(f"{name} is empty: shape {tuple(value.shape)}. Every size must be at least 1.")
    return value


shapes = nested(
    "a shape such as (3, 224, 224) or an example tensor with a batch dimension, or a tuple or dictionary of these as the model "
    "takes them", _input, one_input,
)  # fmt: skip
batches = nested(
    "a tensor with a batch dimension, shape (batch, …), or a tuple or dictionary of these as the model takes them", batch,
    lambda value: isinstance(value, Tensor),
)  # fmt: skip
