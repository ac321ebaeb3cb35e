"""The one family of exceptions that pathlift raises on purpose.

Every message names what was found, where, what was expected and what to do. Anything else that escapes a public call is
a bug of pathlift.
"""

from __future__ import annotations

import difflib
import errno
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pathlift.failures import CallError as CallError
from pathlift.failures import InputError as InputError
from pathlift.failures import PathliftError as PathliftError
from pathlift.failures import one_line as one_line
from pathlift.results import Result


class MismatchError(PathliftError, ValueError):
    """Two networks that were to be compared do not have the same parameters or the same graph."""


class NumericalError(PathliftError, ArithmeticError):
    """A weight is NaN or infinite, or the numbers leave the range in which the answer would be right."""


class OutOfTimeError(PathliftError, TimeoutError):
    """The seconds that a call was given are over, and it has nothing valid to return."""


class OutOfMemoryError(PathliftError, MemoryError):
    """The machine, or the limit that it was given, cannot hold what the call needs."""


class PathliftWarning(UserWarning):
    """The answer is right, and probably not what was wanted."""


@dataclass(frozen=True, repr=False)
class Problem(Result, line=("module", "op", "reason", "advice")):
    """One reason why a model lies outside the theory.

    Attributes:
        module: Path of the module that runs the operator, ``""`` for the model itself.
        op: The operator, as PyTorch's exporter names it (``aten.softmax.int``), or ``export`` when there is no graph.
        where: ``file:line`` of the user's source, ``""`` when the exporter does not know it.
        reason: Why the theory does not cover it.
        advice: What the user can do.
    """

    module: str
    op: str
    where: str
    reason: str
    advice: str

    def __str__(self) -> str:
        """Return the problem as one sentence."""
        module = f"module '{self.module}'" if self.module else "the model itself"
        line = f" ({self.where})" if self.where else ""
        return f"{self.op} in {module}{line}: {self.reason} {self.advice}".rstrip()


def name_differences(missing: list[str], surplus: list[str], container: str) -> str:
    """Say which names a state-dict lacks and which it has too many.

    Args:
        missing: Names that were expected.
        surplus: Names that were not.
        container: What the names were expected in, such as "the model".

    Returns:
        One phrase; at most five names of each.
    """
    return "; ".join(
        f"{what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), (f"not in {container}", surplus))
        if names
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: what was perhaps meant, or what there is.

    Args:
        name: What was found.
        known: What there is.

    Returns:
        One sentence, with a space before it.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    if near:
        return f" Did you mean '{near[0]}'?"
    return "" if len(names) > 30 else f" There are: {', '.join(names)}."


ASKED = re.compile(r"(?:tried to allocate|unable to allocate|unable to mmap|allocate about) ([\d.,]+ ?\w+)", re.IGNORECASE)
"""How much was asked for, in the messages of PyTorch and NumPy."""


def shortage(error: BaseException, what: str) -> OutOfMemoryError | None:
    """Return the error that a lack of memory ends in, None for other errors.

    PyTorch raises a RuntimeError that says so in words, and what runs in between may wrap it.

    Args:
        error: What was raised.
        what: Name of the call.

    Returns:
        An error that says how much was asked for, as far as that is known.
    """
    if isinstance(error, OutOfMemoryError):
        return None
    for cause in _causes(error):
        text = " ".join(str(cause).split())
        if isinstance(cause, OutOfMemoryError):
            return OutOfMemoryError(text)
        if _is_shortage(cause, text):
            match = ASKED.search(text)
            amount = _readable(match[1]) if match else "a piece of a size that the system does not tell"
            return OutOfMemoryError(f"{what} needs more memory than there is: it asked for {amount}.")
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and what it was raised from."""
    for _ in range(50):  # a chain may be circular
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_shortage(error: BaseException, text: str) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "cannot allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in text.lower() for w in words))


def _readable(amount: str) -> str:
    """Write a number of bytes in units that people read."""
    number, unit = re.fullmatch(r"([\d.,]+) ?(\w+)", amount).groups()  # type: ignore[union-attr]
    size = float(number.replace(",", ""))
    if unit.lower() not in {"byte", "bytes"}:
        return amount
    return readable(size)


def readable(size: float) -> str:
    """Write a number of bytes in units that people read.

    Args:
        size: The number.

    Returns:
        For example "1.5 GiB".
    """
    power = min(int(math.log(size, 1024)), 5) if size >= 1 else 0
    return f"{size / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def grouped(problems: tuple[Problem, ...]) -> list[list[Problem]]:
    """Group problems of the same operator and reason, in order of first appearance.

    Args:
        problems: Any problems.

    Returns:
        Non-empty groups.
    """
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.op, problem.reason), []).append(problem)
    return list(groups.values())


def _elsewhere(same: list[Problem]) -> str:
    return "" if len(same) == 1 else f" (and {len(same) - 1} more calls like it)"


class UnsupportedModelError(PathliftError):
    """The model uses something outside the theory; raised before any number is computed.

    Attributes:
        problems: Every `Problem` that was found, in the order of execution.
    """

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        """Build the message from the problems.

        Args:
            problems: At least one problem.
        """
        self.problems = problems
        kinds = grouped(problems)
        lines = "\n".join(f"  - {same[0]}{_elsewhere(same)}" for same in kinds[:8])
        more = f"\n  … and {len(kinds) - 8} further kinds (check_support lists all)" if len(kinds) > 8 else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"This model is outside the theory of path-liftings: {count}.\n{lines}{more}")

    def __reduce__(self) -> tuple[type[UnsupportedModelError], tuple[tuple[Problem, ...]]]:
        """Pickle by the problems, so that the error survives a process boundary.

        Returns:
            The constructor and its argument.
        """
        return type(self), (self.problems,)
