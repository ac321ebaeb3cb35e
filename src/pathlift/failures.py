"""The root of all errors that pathlift raises on purpose, and packages of extras that are missing: what results need, too.

The other errors, and all names together, are in `pathlift.errors`.
"""

from __future__ import annotations

import importlib
import types


class PathliftError(Exception):
    """Base class of every error that pathlift raises on purpose."""


class InputError(PathliftError, ValueError):
    """An argument is malformed: a shape, an example input, a name, a file."""


class CallError(InputError, TypeError):
    """A function is called with an argument that it does not have, or without one that it needs."""


def one_line(error: BaseException) -> str:
    """Return the type of an exception and the first line of what it says."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


class MissingPackageError(InputError, ImportError):
    """A package is not installed that an extra of pathlift brings; also an `ImportError`, for code that can go on without."""

    def __init__(self, name: str, extra: str, cause: ImportError) -> None:
        """Say which.

        Args:
            name: The module that was wanted.
            extra: Which extra of pathlift brings it.
            cause: What the import raised.
        """
        package = name.partition(".")[0]
        absent = isinstance(cause, ModuleNotFoundError) and (cause.name or package).partition(".")[0] == package
        problem = "is not installed" if absent else f"cannot be imported: {one_line(cause)}"
        super().__init__(
            f"The package '{package}' {problem}{'' if problem.endswith('.') else '.'} Run: pip install 'pathlift[{extra}]'"
        )
        self.arguments = name, extra, cause

    def __reduce__(self) -> tuple[type[MissingPackageError], tuple[str, str, ImportError]]:
        """Pickle by what it was made from.

        Returns:
            The constructor and its arguments.
        """
        return type(self), self.arguments


def package(name: str, extra: str) -> types.ModuleType:
    """Import a package that comes with an extra.

    Args:
        name: The module.
        extra: Which extra of pathlift brings it.

    Returns:
        The module.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(name, extra, error) from error
