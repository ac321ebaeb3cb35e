"""One kind of result: a line, a table in a notebook, a dictionary for JSON, a data frame, numbers for a logger, a picture.

What a public function returns is a `Result`: a frozen dataclass, or a mapping or tensor that knows more than its entries.
It shows its public attributes, properties among them, and a mapping also its ``tensors``. A class says nothing more than
which of them stand in its line, which are shown at all, where these are not all of them, which are the rows of its data frame,
and how its picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

from pathlift.failures import InputError, package

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame
    from torch import Tensor

LINE = 200
"""Characters of a line, at most."""

FEW = 4
"""Up to so many numbers or items are written out in a line."""

ROWS = 20
"""Rows of a table within a table."""

MISSING = object()
"""In place of an attribute that a result does not have."""


class Result:
    """What a public function returns; `bool` of it raises TypeError where it is neither a verdict nor a mapping."""

    _line: ClassVar[tuple[str, ...]] = ()
    _shows: ClassVar[tuple[str, ...]] = ()
    _rows: ClassVar[tuple[str, ...]] = ()
    _axes: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(
        cls,
        *,
        line: tuple[str, ...] = (),
        shows: tuple[str, ...] = (),
        rows: tuple[str, ...] = (),
        axes: tuple[str, ...] = (),
        **others: Any,
    ) -> None:
        """Take what the class says of itself.

        Args:
            line: Attributes that stand in its line, in this order; none: all that are not computed.
            shows: Attributes that are shown at all; none: all.
            rows: What its data frame has a row for each entry of: one attribute, a tuple of results or a mapping; or several,
                tuples and tensors of one shape, side by side. None: the result is one row.
            axes: What the axes of these tensors count.
            others: For further base classes.
        """
        super().__init_subclass__(**others)
        cls._line, cls._shows = line or cls._line, shows or cls._shows
        cls._rows, cls._axes = rows or cls._rows, axes or cls._axes

    def to_dict(self) -> dict[str, Any]:
        """Return all that the result shows as what ``json.dumps`` and data frames take.

        Returns:
            Attribute to its value: tensors and tuples are lists, results within it are dictionaries. JSON has no numbers that
            are not finite: they are the strings "inf", "-inf" and "nan", which ``float`` reads. What this result does not
            have (bounds per output neuron for q = 2, say) is left out.
        """
        return {name: plain(value) for name, value in self._attributes().items()}

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Return its numbers as a logger takes them.

        Args:
            prefix: Stands before each key, as it is: ``"val/"``.

        Returns:
            Name to number: 1 and 0 for a verdict, ``name/mean`` for a tensor of floats or verdicts, ``name/key`` for the
            numbers of a result within it. Words, whole numbers in tensors, tuples and mappings are left out, and what this
            result does not have.
        """
        numbers = {name: value for name, value in _record(self).items() if isinstance(value, (bool, int, float))}
        return {f"{prefix}{name}": float(value) for name, value in numbers.items()}

    def to_frame(self) -> DataFrame:
        """Return a table for pandas: a row for each layer, tensor, sample … where the result is a list of such, else one row.

        Returns:
            Columns as in `scalars`, words beside numbers. Of a tensor in a mapping: its shape, its number of entries, their
            sum, and the smallest and the largest of them.

        Raises:
            InputError: pandas is not installed.
        """
        frame: DataFrame = package("pandas", "frames").DataFrame(self._records())
        return frame

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw it with matplotlib, where a picture says more than numbers.

        Args:
            ax: Where; None for a new figure of `matplotlib.pyplot`.

        Returns:
            The axes.

        Raises:
            InputError: This kind of result has no picture, or matplotlib is not installed.
        """
        if type(self)._draw is Result._draw:
            raise InputError(f"{type(self).__name__} has no picture: its numbers say it all. Print it, or take to_frame().")
        if ax is None:
            ax = package("matplotlib.pyplot", "plots").subplots(layout="constrained")[1]
            assert ax is not None
        self._draw(ax)
        return ax

    def _draw(self, ax: Axes) -> None:
        """Draw on axes; written by the kinds of results that have a picture."""

    def _records(self) -> list[dict[str, object]]:
        """Return the rows of the data frame."""
        values = [value for value in (self._attributes().get(name) for name in self._rows) if value is not None]
        if not values:
            return [_record(self)]
        if len(self._rows) == 1 and isinstance(values[0], Mapping):
            return [{"name": str(name), **_entry(self._rows[0], value)} for name, value in values[0].items()]
        if len(self._rows) == 1 and isinstance(values[0], tuple) and all(isinstance(item, Result) for item in values[0]):
            return [_record(item) for item in values[0]]
        columns = {name: value for name in self._rows if (value := self._attributes().get(name)) is not None}
        shape = next(tuple(value.shape) for value in columns.values() if hasattr(value, "shape"))
        entries = {name: _flat(value) for name, value in columns.items()}
        places = product(*map(range, shape))
        return [
            {**dict(zip(self._axes, place, strict=True)), **{name: entry[number] for name, entry in entries.items()}}
            for number, place in enumerate(places)
        ]

    def __repr__(self) -> str:
        """Return one line."""
        size = [f"{len(self)} tensors"] if isinstance(self, Mapping) else []
        values = {name: getattr(self, name) for name in self._line or self._stored()}
        parts = size + [f"{name}={_short(value)}" for name, value in values.items() if not _nothing(value)]
        line = f"{type(self).__name__}({', '.join(parts)})"
        return line if len(line) <= LINE else f"{line[: LINE - 2]}…)"

    def _repr_html_(self) -> str:
        """Return a table, for a notebook."""
        shown = {name: value for name, value in self._attributes().items() if not _nothing(value)}
        rows = [f"<tr><th>{escape(name)}</th><td>{_cell(value)}</td></tr>" for name, value in shown.items()]
        return f"<table><caption>{type(self).__name__}</caption>{''.join(rows)}</table>"

    def __bool__(self) -> bool:
        """Return whether a mapping holds anything; any other result is neither true nor false.

        Raises:
            TypeError: This is no mapping.
        """
        if isinstance(self, Mapping):
            return len(self) > 0
        name = type(self).__name__
        raise TypeError(f"{name} is neither true nor false. Ask for what you mean: {', '.join(self._attributes())}.")

    def _stored(self) -> list[str]:
        return [name for name in vars(self) if not name.startswith("_")]

    def _attributes(self) -> dict[str, object]:
        """Return what is shown, by name; a property that this result does not have raises AttributeError and is left out."""
        kinds = [kind for kind in reversed(type(self).__mro__) if issubclass(kind, Result)]
        computed = [name for kind in kinds for name, value in vars(kind).items() if isinstance(value, property)]
        names = self._shows or [name for name in (*self._stored(), *computed) if not name.startswith("_")]
        values = {name: getattr(self, name, MISSING) for name in names}
        values |= {"tensors": dict(self)} if isinstance(self, Mapping) else {}
        return {name: value for name, value in values.items() if value is not MISSING}


def verdict_of_one(result: Result, name: str) -> bool:
    """Return the verdict of a result that has one for each sample, when there is one sample.

    Args:
        result: The result.
        name: Its attribute, a bool tensor of shape (samples,).

    Returns:
        The verdict.

    Raises:
        TypeError: There are several samples, or none.
    """
    verdicts: Tensor = getattr(result, name)
    if len(verdicts) != 1:
        raise TypeError(
            f"{type(result).__name__} speaks of {len(verdicts)} samples, and is true or false for a single one. Ask "
            f"{name}.all(), {name}.any() or {name}[sample]."
        )
    return bool(verdicts[0])


def plain(value: object) -> Any:
    """Return a value as JSON has it, on the command line too.

    Args:
        value: A number, a word, a tensor or a result; or tuples, lists and mappings of these.

    Returns:
        Dictionaries and lists; inf, −inf and NaN as strings.
    """
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _record(result: Result) -> dict[str, object]:
    """Return the numbers and words of a result, those of results within it among them."""
    record: dict[str, object] = {}
    for name, value in result._attributes().items():
        if isinstance(value, Result) and not isinstance(value, Mapping):
            record |= {f"{name}/{key}": item for key, item in _record(value).items()}
        elif isinstance(value, (bool, int, float, str)):
            record[name] = value
        elif isinstance(value, tuple) and all(isinstance(item, (int, float, str)) for item in value):
            record[name] = ", ".join(map(str, value))
        elif hasattr(value, "tolist"):
            record |= _in_a_number(name, value)
    return record


def _in_a_number(name: str, tensor: Any) -> dict[str, object]:
    """Return the only entry of a tensor, or the mean of those that have one."""
    if tensor.dim() == 0:
        return {name: tensor.item()}
    averaged = tensor.is_floating_point() or str(tensor.dtype) == "torch.bool"
    return {f"{name}/mean": tensor.double().mean().item()} if averaged and tensor.numel() else {}


def _entry(name: str, value: Any) -> dict[str, object]:
    """Return what a data frame says of an entry of a mapping."""
    if not hasattr(value, "tolist"):
        return {name: value}
    ends: dict[str, object] = {"smallest": value.min().item(), "largest": value.max().item()} if value.numel() else {}
    return {"shape": "×".join(map(str, value.shape)), "entries": value.numel(), "sum": value.double().sum().item(), **ends}


def _flat(value: Any) -> list[object]:
    return list(value) if isinstance(value, tuple) else list(value.reshape(-1).tolist())


def _nothing(value: object) -> bool:
    return value is None or (isinstance(value, (str, tuple, list)) and not value)


def _short(value: object) -> str:
    """Return a value in a few words."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Result):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{len(value)} entries"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_short, value))})" if len(value) <= FEW else f"{len(value)} items"
    return _short_tensor(value) if hasattr(value, "tolist") else repr(value)


def _short_tensor(tensor: Any) -> str:
    """Return the entries of a small tensor, or what a large one holds."""
    if tensor.numel() <= FEW:
        return ", ".join(map(_short, tensor.reshape(-1).tolist())).join("[]" if tensor.dim() else ("", ""))
    shape = "×".join(map(str, tensor.shape))
    if str(tensor.dtype) == "torch.bool":
        return f"{int(tensor.sum())} of {shape} true"
    return f"{shape} values from {_short(tensor.min().item())} to {_short(tensor.max().item())}"


def _cell(value: object) -> str:
    """Return a value for a table: results in a tuple, and the entries of a mapping, are rows of a table of its own."""
    if isinstance(value, Mapping):
        return _rows(("", ""), [(str(name), value[name]) for name in list(value)[:ROWS]], len(value))
    if isinstance(value, tuple) and value and all(isinstance(item, Result) for item in value):
        records = [item._attributes() for item in value[:ROWS]]
        return _rows(list(records[0]), [list(record.values()) for record in records], len(value))
    return escape(value if isinstance(value, str) else _short(value))


def _rows(header: Sequence[str], rows: Sequence[Sequence[object]], count: int) -> str:
    titles = f"<tr>{''.join(f'<th>{escape(title)}</th>' for title in header)}</tr>" if any(header) else ""
    cells = [[escape(value if isinstance(value, str) else _short(value)) for value in row] for row in rows]
    lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells]
    more = f"… and {count - len(rows)} more" if count > len(rows) else ""
    return f"<table>{titles}{''.join(lines)}</table>{more}"
