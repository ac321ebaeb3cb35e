"""What the arguments of public functions may be: each declared once, by the room in which its concept lives.

A room declares the arguments that it introduces in its module ``arguments`` (or in its only file). An argument goes by its
name, and by ``function.name`` where a function means something of its own by it; the longer one goes before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from pathlift.arguments.kinds import Kind, optional
from pathlift.errors import InputError

Check: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Looks at the arguments of a call together, by name and ``self`` among them; raises a `PathliftError`."""


@dataclass(frozen=True)
class Declaration:
    """What one module declares.

    Attributes:
        kinds: Name of an argument, or function and name, to its kind.
        needed: Function and argument to the argument without which it would have no effect.
        excluded: Function and argument to the argument beside which it would have no effect.
        check: What the arguments of any call have to be together.
    """

    kinds: Mapping[str, Kind]
    needed: Mapping[tuple[str, str], str] = field(default_factory=dict)
    excluded: Mapping[tuple[str, str], str] = field(default_factory=dict)
    check: Check | None = None


DECLARED: dict[str, Declaration] = {}
"""Every declaration, by the module that made it."""


def declare(
    module: str,
    kinds: Mapping[str, Kind],
    *,
    needed: Mapping[tuple[str, str], str] | None = None,
    excluded: Mapping[tuple[str, str], str] | None = None,
    check: Check | None = None,
) -> None:
    """Say what the arguments are that a module introduces; once for each module, which may be loaded anew.

    Args:
        module: Its ``__name__``.
        kinds: Name of an argument, or function and name, to its kind.
        needed: Function and argument to the argument without which it would have no effect.
        excluded: Function and argument to the argument beside which it would have no effect.
        check: What the arguments of any call have to be together.

    Raises:
        ValueError: Another module has declared one of them.
    """
    for other, declaration in DECLARED.items():
        twice = sorted(kinds.keys() & declaration.kinds.keys()) if other != module else []
        if twice:
            raise ValueError(f"The argument '{twice[0]}' is declared in {other} and again in {module}.")
    DECLARED[module] = Declaration(kinds, needed or {}, excluded or {}, check)


def kind_of(function_name: str, argument: str, *, may_be_none: bool) -> Kind:
    """Look an argument up.

    Args:
        function_name: Qualified name of the function, or of the class for its constructor.
        argument: Name of the argument.
        may_be_none: Whether None is its default, and so accepted.

    Returns:
        Its kind.

    Raises:
        LookupError: No module that is loaded has declared it.
    """
    for name in (f"{function_name}.{argument}", argument):
        for declaration in DECLARED.values():
            if name in declaration.kinds:
                kind = declaration.kinds[name]
                return optional(kind) if may_be_none else kind
    raise LookupError(f"The argument '{argument}' of {function_name} is declared by none of {', '.join(DECLARED)}.")


def check_together(function_name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse arguments that do not fit each other, or would have no effect beside the others or without them.

    Args:
        function_name: As for `kind_of`.
        given: The arguments of a call, by name, that were written down.
        defaults: Those of all arguments that have one.

    Raises:
        InputError: One would be ignored, or what a room's own check says.
    """
    for declaration in DECLARED.values():
        if declaration.check is not None:
            declaration.check(given)

    def says_something(name: str) -> bool:
        return name in given and (isinstance(given[name], Tensor) or bool(given[name] != defaults.get(name)))

    for declaration in DECLARED.values():
        for partners, ignored in ((declaration.needed, False), (declaration.excluded, True)):
            for (function, name), partner in partners.items():
                if function == function_name and says_something(name) and says_something(partner) is ignored:
                    if ignored:
                        raise InputError(f"{name} has no effect beside {partner}: leave it out.")
                    raise InputError(f"{name} has no effect without {partner}: give {partner}, or leave it out.")
