"""One page on many networks: what goes with depth and with what is known of them, all numbers, which are refused."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pathlift.drawing as drawing
from pathlift.report.figures import HEIGHT, WIDTH, Figure, figure_of
from pathlift.report.page import rendered, template, versions
from pathlift.storage.checkpoints import PROGRAMS
from pathlift.study.functions import headline
from pathlift.study.networks import FAILED, MEASURED, REFUSED
from pathlift.study.table import Row
from pathlift.study.zoo import Subject

MEASURES = {"depth": "depth: weights on the longest path", "parameters": "parameters"}
"""What every network has and numbers are drawn against, and what it is called; parameters on a scale of logarithms."""

GROUPS = 4
"""A picture tells so many groups apart."""

FEW = 8
"""A rank correlation is said of at least so many networks."""


@dataclass(frozen=True)
class Study:
    """What the page shows.

    Attributes:
        title: The name of the study.
        subjects: Its networks.
        rows: Their rows.
        command: The command line.
        versions: Of the packages that computed it.
    """

    title: str
    subjects: Sequence[Subject]
    rows: Sequence[Row]
    command: str
    versions: dict[str, str] = field(default_factory=versions)

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """How many networks ended in which way."""
        counts = Counter(row["outcome"] for row in self.rows)
        return {outcome: counts[outcome] for outcome in (MEASURED, REFUSED, FAILED)}

    def rows_of(self, outcome: str) -> list[tuple[str, Row]]:
        """Return the networks that ended in one way, with their rows."""
        named = zip(self.subjects, self.rows, strict=True)
        return [(subject.name, row) for subject, row in named if row["outcome"] == outcome]

    @functools.cached_property
    def headlines(self) -> list[str]:
        """The columns that are drawn: one of each function."""
        found: dict[str, None] = {}
        for subject, row in zip(self.subjects, self.rows, strict=True):
            for call in subject.calls:
                prefix = f"{call.label}/"
                numbers = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
                name = headline(call, {name: value for name, value in numbers.items() if name not in {"reason", "seconds"}})
                if name is not None:
                    found[prefix + name] = None
        return list(found)

    @functools.cached_property
    def known(self) -> list[str]:
        """The columns with numbers that were known of the networks before."""
        names = dict.fromkeys(name for row in self.rows for name in row if name.startswith("about/"))
        return [name for name in names if all(isinstance(row.get(name), (int, float, type(None))) for row in self.rows)]

    def without_answer(self) -> list[tuple[str, str, str]]:
        """Return network, function and reason of every function that a measured network did not answer."""
        return [
            (subject.name, call.label, row[f"{call.label}/reason"])
            for subject, row in zip(self.subjects, self.rows, strict=True)
            for call in subject.calls
            if f"{call.label}/reason" in row
        ]


def written(study: Study) -> str:
    """Fill in the page.

    Args:
        study: The study.

    Returns:
        HTML that needs nothing else.

    Raises:
        InputError: matplotlib is not installed.
    """
    return rendered(template("page.html", "pathlift.study"), made=study, study=study, figures=drawn(study), numbers=study.rows)


def drawn(study: Study) -> dict[str, Figure]:
    """Draw every headline over the depth, the number of parameters, and every number that was known.

    Args:
        study: The study.

    Returns:
        Name to figure.
    """
    figures: dict[str, Figure] = {}
    for number, up in enumerate(study.headlines):
        for place, across in enumerate((*MEASURES, *study.known)):
            groups = points(study.rows, across, up)
            if sum(map(len, groups.values())) > 1:
                name = f"figure-{number}-{place}"
                words = across.removeprefix("about/")
                draw = functools.partial(_draw, groups=groups, across=_axis(across), up=up)
                figures[name] = figure_of(name, f"{up} against {words}", _trend(groups, words), draw, (WIDTH, HEIGHT))
    return figures


def _draw(ax: drawing.Picture, groups: dict[str, list[tuple[float, float]]], across: str, up: str) -> None:
    drawing.clouds(ax, groups, across, up)
    if across == MEASURES["parameters"] and all(pair[0] > 0 for pairs in groups.values() for pair in pairs):
        ax.set_xscale("log")


def _axis(name: str) -> str:
    return MEASURES.get(name, name.removeprefix("about/"))


def points(rows: Sequence[Row], across: str, up: str) -> dict[str, list[tuple[float, float]]]:
    """Return the networks as points, by where their models come from.

    Args:
        rows: The rows.
        across: A column.
        up: Another one.

    Returns:
        Group to points; a network that does not have both numbers is left out. Where there are more groups than a picture
        tells apart, the small ones are ``others``.
    """
    counts = Counter(origin(row["model"]) for row in rows)
    shown = [name for name, _ in counts.most_common(None if len(counts) <= GROUPS else GROUPS - 1)]
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        pair = row.get(across), row.get(up)
        if all(isinstance(value, (int, float)) and math.isfinite(value) for value in pair):
            group = origin(row["model"])
            groups.setdefault(group if group in shown else "others", []).append((float(pair[0]), float(pair[1])))  # type: ignore[arg-type]
    return groups


def origin(model: str) -> str:
    """Say where a model comes from: a library or a package, or files."""
    return model.partition(":")[0].partition(".")[0] if ":" in model and Path(model).suffix not in PROGRAMS else "files"


def _trend(groups: dict[str, list[tuple[float, float]]], across: str) -> str:
    pairs = [pair for each in groups.values() for pair in each]
    said = f"{len(pairs)} networks."
    together = rank_correlation(pairs)
    if len(pairs) < FEW or math.isnan(together):
        return said
    return f"{said} Rank correlation with {across}: {together:.2f}."


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Return Spearman's ρ: the correlation of the ranks, equal numbers sharing the mean of theirs.

    Args:
        pairs: Numbers side by side.

    Returns:
        A number from −1 to 1; NaN where one side is the same for all.
    """
    first, second = (_ranks([pair[side] for pair in pairs]) for side in range(2))
    middle = (len(pairs) + 1) / 2
    product = sum((a - middle) * (b - middle) for a, b in zip(first, second, strict=True))
    sizes = [math.sqrt(sum((rank - middle) ** 2 for rank in ranks)) for ranks in (first, second)]
    return product / math.prod(sizes) if all(sizes) else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values), 1):
        places.setdefault(value, []).append(place)
    return [sum(places[value]) / len(places[value]) for value in values]
