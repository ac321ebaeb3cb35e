"""Packages that come with an extra of pathlift, and the error that says which extra when one is missing."""

from __future__ import annotations

import importlib
import types

from pathlift.errors import InputError, told


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
        problem = "is not installed" if absent else f"cannot be imported: {told(cause)}"
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
