"""The figures of a report as SVG that stands in a page: text stays text, and the page says in which colour."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import pathlift.drawing as drawing
from pathlift.failures import package
from pathlift.report.findings import Findings

INK = "#010203"
"""Stands for the colour of the text, whichever that is."""

FAINT = 1e-4
"""A histogram begins where a column has more than this part of the largest one."""

WIDTH, HEIGHT = 9.0, 3.6
"""Inches of a figure."""

REM = 7.2
"""Letters of a page that stand for an inch of a figure."""

SETTINGS = {
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK,
    "grid.color": INK, "legend.labelcolor": INK, "svg.fonttype": "none", "svg.hashsalt": "pathlift",
}  # fmt: skip
"""Settings of matplotlib while figures are drawn."""


Draw: TypeAlias = "Callable[[Findings, drawing.Picture], None]"


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: For links.
        title: What it shows.
        text: What there is to see, in words.
        svg: The picture.
        width: At most so many letters wide.
    """

    name: str
    title: str
    text: str
    svg: str
    width: float


def drawn(report: Findings) -> dict[str, Figure]:
    """Draw all that a report has.

    Args:
        report: The report.

    Returns:
        Name to figure.

    Raises:
        InputError: matplotlib is not installed.
    """
    wide, low = (WIDTH, HEIGHT), (WIDTH, 2.8)
    side = 0.5 * len(report.checkpoints) + 3.0
    wanted: list[tuple[str, str, str, Draw, tuple[float, float]]] = []
    if report.layers:
        text = "Of the paths that have started by then: how much runs through the weights of a layer, how much runs past it."
        if report.from_constants:
            text = "How much of all paths runs through the weights of a layer. The rest runs past it, or starts behind it."
        wanted.append(("flow", "Path mass by depth", text, flow, wide))
        wanted.append(("scores", "Scores by layer", "Path-magnitudes of its weights that are not 0.", scores, wide))
        text = "How many weights have a path-magnitude of which size."
        wanted.append(("histogram", "All scores", text, all_scores, low))
    if any(layer.imbalance is not None for layer in report.layers):
        text = "The channel of each layer that is farthest from balanced, before and after balancing."
        wanted.append(("balance", "Imbalance by layer", text, imbalance, wide))
    if report.kernel is not None:
        text = "1 for networks that are rescalings of each other, or multiples."
        wanted.append(("cosines", "Cosines of the path-liftings", text, cosines, (1.25 * side, side)))
    if len(report.checkpoints) > 2:
        text = "Distances of points are as near to those of path-liftings as a plane allows."
        wanted.append(("trajectory", "The networks in path space", text, trajectory, wide))
    if report.compared:
        text = "How far the others are, relative to the path-norm."
        wanted.append(("metric", "Path-metrics", text, metrics, (WIDTH, 1.5 + 0.4 * len(report.compared))))
    if report.pruning:
        wanted.append(("pruning", "What pruning keeps", "Share of the weights of each layer that stay.", pruning, wide))
    if report.quantisation:
        text = "Relative error of the weights of each layer."
        wanted.append(("quantisation", "What rounding changes", text, rounding, wide))
    return {
        name: figure_of(name, title, text, functools.partial(draw, report), size) for name, title, text, draw, size in wanted
    }


def figure_of(name: str, title: str, text: str, draw: Callable[[drawing.Picture], None], size: tuple[float, float]) -> Figure:
    """Draw one figure as a part of a page: names of its own, no addresses, the page's colour of text.

    Args:
        name: For links.
        title: What it shows.
        text: What there is to see, in words.
        draw: Draws it.
        size: Width and height in inches.

    Returns:
        The figure.

    Raises:
        InputError: matplotlib is not installed.
    """
    return Figure(name, title, text, _svg(name, draw, size), REM * min(size[0], WIDTH))


def _svg(name: str, draw: Callable[[drawing.Picture], None], size: tuple[float, float]) -> str:
    with package("matplotlib", "plots").rc_context(SETTINGS):
        figure = package("matplotlib.figure", "plots").Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        for ax in figure.axes:
            ax.set_facecolor("none")
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    return re.sub(r'(<svg )height="[^"]*" (.*?)width="[^"]*"|(<svg )', lambda found: found[1] or found[3], text, count=1)


def flow(report: Findings, ax: drawing.Picture) -> None:
    """Draw the share of paths that have started before each layer, and of those that run through it.

    Args:
        report: The report.
        ax: The axes.
    """
    names = [layer.module or "(the model)" for layer in report.layers]
    through = [layer.share for layer in report.layers]
    before = [layer.before for layer in report.layers if layer.before is not None]
    places = list(range(len(names)))
    blue = drawing.BLUE
    ax.set_axisbelow(True)
    ax.bar(places, through, width=1.0, color=blue, edgecolor=blue, linewidth=0.4, label="through its weights")
    if before:
        past = [max(started - share, 0.0) for started, share in zip(before, through, strict=True)]
        ax.bar(places, past, width=1.0, bottom=through, color=drawing.GREY, alpha=0.35, hatch="//", label="past it")
        ax.plot(places, before, drawstyle="steps-mid", color=drawing.ORANGE, linewidth=1.4, label="paths that have started")
    drawing.layer_axis(ax, names)
    ax.set(xlabel="layer, from the input to the output", ylabel="share of the path-norm")
    ax.set_ylim(0, 1.05 * max([1.0, *through]))
    ax.grid(axis="y", alpha=0.3)
    drawing.legend_above(ax, 3)


def scores(report: Findings, ax: drawing.Picture) -> None:
    """Draw the range of scores of each layer."""
    rows = [(layer.score_low, layer.score_median, layer.score_high) for layer in report.layers]
    drawing.ranges_by_layer(ax, [layer.module for layer in report.layers], rows, "share of the path-norm\nthrough a weight")


def all_scores(report: Findings, ax: drawing.Picture) -> None:
    """Draw the histogram of all scores."""
    found = report.scores
    assert found is not None
    edges, counts = list(found.log10_edges), list(found.counts)
    first = next((column for column, count in enumerate(counts) if count > FAINT * max(counts)), 0)
    ax.set_axisbelow(True)
    ax.bar(edges[first:-1], counts[first:], width=edges[1] - edges[0], align="edge", color=drawing.BLUE)
    rest = [f"{sum(counts[:first]):,} are smaller"] if first else []
    rest += [f"{found.zeros:,} are 0"] if found.zeros else []
    ax.set(xlabel="; ".join(["log₁₀ of the share of the path-norm through a weight", *rest]), ylabel="weights")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.grid(axis="y", alpha=0.3)


def imbalance(report: Findings, ax: drawing.Picture) -> None:
    """Draw the largest imbalance of each layer."""
    layers = [layer for layer in report.layers if layer.imbalance is not None]
    lines = {
        "as it is": [_number(layer.imbalance) for layer in layers],
        "balanced": [_number(layer.imbalance_balanced) for layer in layers],
    }
    drawing.lines_by_layer(ax, [layer.module for layer in layers], lines, "largest |in − out| / (in + out)")
    ax.set_ylim(-0.03, 1.05)


def cosines(report: Findings, ax: drawing.Picture) -> None:
    """Draw the matrix of cosines."""
    assert report.kernel is not None
    drawing.matrix(ax, report.checkpoints, report.kernel.cosine.tolist(), "cosine")


def trajectory(report: Findings, ax: drawing.Picture) -> None:
    """Draw the networks as points."""
    assert report.kernel is not None
    points, shown = report.kernel.coordinates(min(2, len(report.checkpoints)))
    drawing.points(ax, report.checkpoints, points[:, 0].tolist(), points[:, 1].tolist())
    ax.set(xlabel=f"first axis, in units of the largest distance ({shown:.0%} of Σ distance² is shown)", ylabel="second axis")


def metrics(report: Findings, ax: drawing.Picture) -> None:
    """Draw the interval of each path-metric."""
    rows: dict[str, drawing.Interval] = {}
    for number, each in enumerate(report.compared, 2):
        norm = report.log10_path_norm if math.isfinite(report.log10_path_norm) else 0.0
        low, high, inner = each.metric._interval()
        moved = None if inner is None else (inner[0] - norm, inner[1] - norm, inner[2] - norm)
        rows[f"{number}: {each.name}"] = (low - norm, high - norm, moved)
    drawing.intervals(ax, rows, "path-metric / path-norm")


def pruning(report: Findings, ax: drawing.Picture) -> None:
    """Draw what pruning keeps of each layer."""
    lines = {f"{cost.amount:.0%} pruned": cost.kept for cost in report.pruning}
    drawing.lines_by_layer(ax, report.pruning[0].names, lines, "share of weights kept")
    ax.set_ylim(-0.03, 1.05)


def rounding(report: Findings, ax: drawing.Picture) -> None:
    """Draw what rounding does to the weights of each layer."""
    lines = {f"{cost.bits} bits": cost.errors for cost in report.quantisation}
    drawing.lines_by_layer(ax, report.quantisation[0].names, lines, "relative error of the weights")
    if any(error > 0 for cost in report.quantisation for error in cost.errors):
        ax.set_yscale("log")


def _number(value: float | None) -> float:
    return math.nan if value is None else value
