"""Tables that never cut a number: laid out for the width that there is, or written as CSV.

Where all columns fit, they stand beside each other; headers and words are broken at spaces first. Where they do not, the name
of a row stands on a line of its own above its numbers; and where these alone are wider than the terminal, each is on its own
line.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

GAP = 2
"""Spaces between columns."""

LEAST = 16
"""Names and words are broken into lines of this length, never of a smaller one."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: Its header.
        shown: How a value is written for people.
        kind: ``number`` is never broken, ``words`` at spaces only, ``name`` at dots and underscores.
        raw: How a value is written to CSV.
    """

    name: str
    shown: Callable[[Any], str] = str
    kind: Literal["number", "words", "name"] = "number"
    raw: Callable[[Any], object] = lambda value: value

    def least(self, cells: Sequence[str]) -> int:
        """Return the smallest width that breaks nothing that must stay whole."""
        widest = max(map(cell_len, cells), default=0)
        word = max(map(_longest_word, cells), default=0)
        needed = {"number": widest, "words": max(word, min(widest, LEAST)), "name": min(widest, LEAST)}[self.kind]
        return max(needed, _longest_word(self.name), 1)

    def natural(self, cells: Iterable[str]) -> int:
        """Return the width at which no cell is broken."""
        return max(self.least(()), *map(cell_len, cells), 1)


def _longest_word(text: str) -> int:
    """Return the width that a text needs that is broken at spaces, save those that it is indented by."""
    indented = cell_len(text) - cell_len(text.lstrip())
    return indented + max(map(cell_len, text.split()), default=0)


@dataclass(frozen=True)
class Layout:
    """Where the columns of a table stand.

    Attributes:
        columns: The columns.
        widths: Of those that stand beside each other; empty where each value is on its own line.
        above: Whether the first column stands above the others.
    """

    columns: tuple[Column, ...]
    widths: tuple[int, ...]
    above: bool = False

    def header(self) -> list[Table | Text]:
        """Return the headers as lines to print."""
        names = [column.name for column in self.columns]
        if not any(names):
            return []
        shown = [f"  {names[1]}", *names[2:]] if self.above else names
        return [_line(self._beside(), self.widths, shown, "bold", vertical="bottom")] if self.widths else []

    def row(self, cells: Sequence[str], style: str = "") -> list[Table | Text]:
        """Return one row as lines to print; a number that is wider than its column makes it wider in this row."""
        if not self.widths:
            named = zip(self.columns[1:], cells[1:], strict=True)
            return [Text(cells[0], style), *(Text(f"  {column.name}  {cell}".rstrip()) for column, cell in named)]
        beside = [f"  {cells[1]}", *cells[2:]] if self.above else cells
        pairs = list(zip(self._beside(), self.widths, beside, strict=True))
        widths = [max(width, cell_len(cell)) if column.kind == "number" else width for column, width, cell in pairs]
        texts = [folded(cell, width) if column.kind == "name" else cell for column, width, cell in pairs]
        line = _line(self._beside(), widths, texts, "", first="" if self.above else style)
        return [Text(cells[0], style), line] if self.above else [line]

    def _beside(self) -> tuple[Column, ...]:
        return self.columns[self.above :]


def laid_out(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> Layout:
    """Find the layout of a table.

    Args:
        columns: Its columns.
        cells: Its rows, as text.
        width: Of the terminal.

    Returns:
        The layout.
    """
    parts = [[row[index] for row in cells] for index in range(len(columns))]
    names = [column.kind == "name" for column in columns]
    alone = names.count(True) == 1 and names[0]  # such a name stays whole, above the numbers, before it is broken
    first = max(cell_len(name) for name in (*parts[0], "")) if alone else 0
    if (widths := _fitted(columns, parts, width, first)) is not None:
        return Layout(tuple(columns), widths)
    beside = [replace(columns[1], name=f"  {columns[1].name}"), *columns[2:]] if len(columns) > 1 else []
    indented = [[f"  {cell}" for cell in parts[1]], *parts[2:]] if beside else []
    widths = _fitted(beside, indented, width) if beside else None
    return Layout(tuple(columns), widths or (), above=widths is not None)


def _fitted(columns: Sequence[Column], parts: Sequence[Sequence[str]], width: int, first: int = 0) -> tuple[int, ...] | None:
    """Share a width among columns: what each needs, then names and words, then headers; None where they do not fit."""
    widths = [column.least(part) for column, part in zip(columns, parts, strict=True)]
    widths[0] = max(widths[0], first)
    spare = width - GAP * (len(columns) - 1) - sum(widths)
    if spare < 0:
        return None
    cells = [column.natural(part) for column, part in zip(columns, parts, strict=True)]
    headers = [max(cell, cell_len(column.name)) for column, cell in zip(columns, cells, strict=True)]
    for wanted in (cells, headers):
        wanting = sorted(range(len(columns)), key=lambda index: wanted[index] - widths[index])
        for position, index in enumerate(wanting):
            more = max(min(wanted[index] - widths[index], spare // (len(wanting) - position)), 0)
            widths[index] += more
            spare -= more
    return tuple(widths)


def _line(
    columns: Sequence[Column],
    widths: Sequence[int],
    cells: Sequence[str],
    style: str,
    first: str = "",
    vertical: Literal["top", "bottom"] = "top",
) -> Table:
    line = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_header=False)
    for column, width in zip(columns, widths, strict=True):
        line.add_column(width=width, justify="right" if column.kind == "number" else "left", overflow="fold", vertical=vertical)
    line.add_row(*(Text(cell, style or (first if index == 0 else "")) for index, cell in enumerate(cells)))
    return line


def folded(name: str, width: int) -> str:
    """Break words that are longer than a width behind a dot, an underscore or a slash; elsewhere only where there is none.

    Args:
        name: Words.
        width: Of a line.

    Returns:
        The words, with line breaks.
    """
    return " ".join(_folded(word, width) for word in name.split(" "))


def _folded(word: str, width: int) -> str:
    lines: list[str] = []
    while cell_len(word) > width:
        ends = [match.end() for match in re.finditer(r"[._/\\:]+", word) if match.end() <= width]
        end = ends[-1] if ends else width
        lines.append(word[:end])
        word = word[end:]
    return "\n".join([*lines, word])


def as_csv(columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table as CSV: a header, and a line for each row with all digits of its numbers.

    Args:
        columns: Its columns.
        rows: Values.

    Returns:
        The text.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    writer.writerows([[column.raw(value) for column, value in zip(columns, row, strict=True)] for row in rows])
    return text.getvalue()
