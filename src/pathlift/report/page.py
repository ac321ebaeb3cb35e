"""A report as one page: its template is filled in, and everything that comes from a model is escaped on the way."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined

from pathlift.report.figures import Figure
from pathlift.report.findings import Findings
from pathlift.version import VERSION

PACKAGES = ("torch", "matplotlib")
"""Beside pathlift itself: whose numbers and pictures these are."""


RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
"""Digits of exponents."""


def versions() -> dict[str, str]:
    """Return the versions of pathlift and of what it computes and draws with."""
    found = {"pathlift": VERSION}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def written(report: Findings, figures: Mapping[str, Figure]) -> str:
    """Fill in the page.

    Args:
        report: The report.
        figures: Its figures, by name.

    Returns:
        HTML.
    """
    return rendered(template("page.html"), made=report, report=report, figures=figures, numbers=report.to_dict())


def template(name: str, room: str = "pathlift.report") -> str:
    """Read a template.

    Args:
        name: Its file.
        room: The package in which it lies.

    Returns:
        Its text.
    """
    return resources.files(room).joinpath(name).read_text(encoding="utf-8")


def rendered(text: str, **values: object) -> str:
    """Fill in a template, which may extend ``frame.html`` and take the macros of ``macros.html``.

    Args:
        text: The template.
        values: What it shows: ``made`` with the command and the versions, ``numbers`` for the JSON, and what is its own.

    Returns:
        HTML.
    """
    loader = FunctionLoader(template)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader)
    environment.filters |= {"power": power, "share": share, "count": "{:,}".format, "number": number, "sizes": sizes}
    return environment.from_string(text).render(**values)


def power(log10: float) -> str:
    """Write 10**log10 with three digits, at any size."""
    if not math.isfinite(log10):
        return "0" if log10 < 0 else "unknown"
    exponent = math.floor(log10)
    return f"{10**log10:.3g}" if -3 <= exponent < 5 else f"{10 ** (log10 - exponent):.2f}·10{str(exponent).translate(RAISED)}"


def share(value: float | None) -> str:
    """Write a share as a percentage; small ones are not 0."""
    if value is None:
        return "–"
    return "0 %" if value == 0 else f"{100 * value:.3g} %" if value >= 1e-6 else f"{100 * value:.1e} %"


def number(value: float | None) -> str:
    """Write a number with three digits, a dash for none."""
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


def sizes(shape: tuple[int, ...]) -> str:
    """Write a shape."""
    return "×".join(map(str, shape)) or "a number"
