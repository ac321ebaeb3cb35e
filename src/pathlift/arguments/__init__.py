"""The door of the library: what a public function is given is used or refused, by one mechanism.

`public` stands above every function that a user may call. It looks each argument up by its name in
`pathlift.arguments.registry`, where the rooms say, once for the whole library, what is accepted and in which words anything
else is refused. Regions around the call, autocast say, end at the door (`pathlift.precision.plainly`). On the way out a lack of
memory becomes an error of pathlift's own that says how much was asked for.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar, cast

import torch

from pathlift.arguments import common as common
from pathlift.arguments.registry import check_together, declare, kind_of
from pathlift.errors import CallError, InputError, nearest, shortage
from pathlift.precision import plainly, recordable

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


class Door:
    """What a function is called with, checked.

    Attributes:
        function: The function.
        name: Its name in declarations and in messages; that of the class for a constructor.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = function.__qualname__.removesuffix(".__init__")

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """The signature of the function."""
        return inspect.signature(self.function)

    @functools.cached_property
    def kinds(self) -> dict[str, Callable[[str, Any], Any]]:
        """What each argument may be, by its name; looked up at the first call, when every room has declared its own."""
        names = [name for name in self.signature.parameters if name != "self"]
        return {name: kind_of(self.name, name, may_be_none=self.signature.parameters[name].default is None) for name in names}

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """The values that arguments have when they are left out."""
        parameters = self.signature.parameters
        return {name: parameter.default for name, parameter in parameters.items() if parameter.default is not parameter.empty}

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Keep from the function what stands around the call, and say what the machine could not hold."""
        try:
            with plainly():
                yield
        except Exception as error:
            if isinstance(error, RuntimeError) and "saved tensor hooks" in str(error):
                raise InputError(
                    f"{self.name} differentiates by torch.func, which PyTorch does not allow inside saved_tensors_hooks or "
                    "save_on_cpu. Call it outside of them."
                ) from error
            short = shortage(error, self.name)
            if short is None:
                raise
            raise short from error

    def admit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """Check a call.

        Args:
            args: Positional arguments.
            kwargs: Named arguments.

        Returns:
            The arguments as the function takes them: a NumPy number is a Python number, say.

        Raises:
            InputError: One of them is refused.
        """
        bound = self._bound(args, kwargs)
        given = bound.arguments
        for name, kind in self.kinds.items():
            if name in given:
                try:
                    given[name] = recordable(kind(name, given[name]))
                except InputError as error:
                    raise InputError(f"{error}{self._fitting(name, given[name])}") from error.__cause__
        check_together(self.name, given, self.defaults)
        return bound

    def _fitting(self, name: str, value: object) -> str:
        """Say where a value would have been right: arguments are exchanged by mistake."""
        if value is None or isinstance(value, (str, bytes, bool, int, float, list, tuple, Mapping)):
            return ""
        for other, kind in self.kinds.items():
            if other != name:
                with contextlib.suppress(InputError):
                    kind(other, value)
                    return f" It would do for '{other}'."
        return ""

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        unknown = [name for name in kwargs if name not in self.signature.parameters]
        if unknown:
            known = [name for name in self.signature.parameters if name != "self"]
            raise CallError(f"{self.name} has no argument {unknown[0][:60]!r}.{nearest(unknown[0][:60], known)}")
        try:
            return self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CallError(f"{self.name}: {error}. It is called as {self.name}{_written(self.signature)}.") from None


def _written(signature: inspect.Signature) -> str:
    """Write a signature without types."""
    untyped = [given.replace(annotation=given.empty) for given in signature.parameters.values() if given.name != "self"]
    return str(signature.replace(parameters=untyped, return_annotation=signature.empty))


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function one that users call: its arguments are looked at, and what the machine cannot hold is said.

    Args:
        function: A function, a method or a constructor. Every argument must have been declared.

    Returns:
        The function, of the same name, documentation and signature.
    """
    door = Door(function)

    def through(args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        with door.around():
            bound = door.admit(args, kwargs)
            result = function(*bound.args, **bound.kwargs)
        return cast("R", _drawn(door, result)) if isinstance(result, Generator) else result

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return _untraced(through)(args, kwargs)

    return call


def _untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that `torch.compile` leaves alone: it would draw items ahead of time whose memory is used again."""
    if "torch._dynamo" not in sys.modules:
        return function
    disabled: Callable[P, R] = torch.compiler.disable(function)
    return disabled


def _drawn(door: Door, items: Generator[Any, Any, Any]) -> Iterator[Any]:
    """Draw from a generator; what is around the caller when he asks for an item is kept from it, too."""
    with contextlib.closing(items):
        while True:
            with door.around():
                try:
                    item = _untraced(next)(items)
                except StopIteration:
                    return
            yield item


def public_constructor(made: C) -> C:
    """Make a class one that users construct: see `public`.

    Args:
        made: The class.

    Returns:
        The same class.
    """
    made.__init__ = public(made.__init__)  # type: ignore[misc]
    return made


__all__ = ["Door", "declare", "public", "public_constructor"]
