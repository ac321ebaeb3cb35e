"""What pictures have in common: numbers by layer, intervals, matrices; readable without colours, and with names that fit.

Lines differ in dashes and markers as well as in colour, bars in hatching. Functions draw on axes that they are given and
need nothing of matplotlib themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Picture: TypeAlias = "Axes"
"""What is drawn on; matplotlib is only there when somebody draws."""

Interval: TypeAlias = "tuple[float, float, tuple[float, float, float] | None]"
"""log₁₀ of both ends; and of an estimate with the ends of its confidence interval, None without one."""

STYLES: tuple[dict[str, str], ...] = (
    {"color": "#1f5fa8", "linestyle": "-", "marker": "o"},
    {"color": "#d97a0b", "linestyle": "--", "marker": "s"},
    {"color": "#6b6b6b", "linestyle": ":", "marker": "^"},
    {"color": "#8a3a8a", "linestyle": "-.", "marker": "D"},
)
"""How lines look, one after the other."""

BLUE, ORANGE, GREY = STYLES[0]["color"], STYLES[1]["color"], STYLES[2]["color"]
NAMES = 24
"""So many names of layers have room on an axis; of more, evenly many."""

LONGEST = 26
"""Characters of a name on an axis."""

NEAR = 0.09
"""Points nearer than this, in units of the picture, have one label."""

LISTED = 24
"""So many names are listed beside a picture."""

CELLS = 12
"""A matrix of up to so many rows has room for its numbers."""


def shortened(name: str, most: int = LONGEST) -> str:
    """Return a name of at most so many characters, as matplotlib writes it; what it ends with tells more than its beginning."""
    short = name if len(name) <= most else f"…{name[1 - most :]}"
    return short.replace("$", r"\$")


def layer_axis(ax: Picture, names: Sequence[str]) -> None:
    """Name the places 0, 1, 2, … of the x axis, as many as have room.

    Args:
        ax: The axes.
        names: Of layers.
    """
    step = max(1, math.ceil(len(names) / NAMES))
    places = list(range(0, len(names), step))
    ax.set_xticks(
        places, [shortened(names[place]) for place in places], rotation=50, ha="right", rotation_mode="anchor", fontsize=8
    )
    ax.set_xlim(-0.8, max(len(names), 1) - 0.2)


def lines_by_layer(ax: Picture, names: Sequence[str], lines: Mapping[str, Sequence[float]], label: str) -> None:
    """Draw one line or several over the layers; NaN leaves a gap.

    Args:
        ax: The axes.
        names: Of layers, in their order.
        lines: Label to a number for each layer.
        label: What the numbers are.
    """
    size = 5 if len(names) <= NAMES else 3
    for (name, values), style in zip(lines.items(), _styles(len(lines)), strict=True):
        ax.plot(range(len(names)), list(values), label=name, markersize=size, linewidth=1.3, **style)
    layer_axis(ax, names)
    ax.set(xlabel="layer, from the input to the output", ylabel=label)
    ax.grid(axis="y", alpha=0.3)
    if len(lines) > 1:
        legend_above(ax, len(lines))


def bars_by_layer(ax: Picture, names: Sequence[str], values: Sequence[float], label: str) -> None:
    """Draw a bar for each layer.

    Args:
        ax: The axes.
        names: Of layers, in their order.
        values: A number for each.
        label: What the numbers are.
    """
    ax.set_axisbelow(True)
    ax.bar(range(len(names)), list(values), color=BLUE, width=0.8)
    layer_axis(ax, names)
    ax.set(xlabel="layer, from the input to the output", ylabel=label)
    ax.grid(axis="y", alpha=0.3)


def ranges_by_layer(ax: Picture, names: Sequence[str], ranges: Sequence[Sequence[float]], label: str) -> None:
    """Draw for each layer the range of its numbers and their median, on a logarithmic axis.

    Args:
        ax: The axes.
        names: Of layers, in their order.
        ranges: Lower end, median and upper end of each; NaN where it has none.
        label: What the numbers are.
    """
    places = list(range(len(names)))
    low, middle, high = ([row[end] for row in ranges] for end in range(3))
    ax.vlines(places, low, high, color=GREY, linewidth=4 if len(names) <= NAMES else 2, alpha=0.7, label="5 % to 95 % of them")
    ax.plot(places, middle, "o", color=BLUE, markersize=6 if len(names) <= NAMES else 3.5, label="their median")
    layer_axis(ax, names)
    if any(value > 0 for value in (*low, *middle, *high)):
        ax.set_yscale("log")
    ax.set(xlabel="layer, from the input to the output", ylabel=label)
    ax.grid(axis="y", alpha=0.3)
    legend_above(ax, 2)


def intervals(ax: Picture, rows: Mapping[str, Interval], label: str) -> None:
    """Draw intervals below each other, with an estimate within where there is one; the axis is logarithmic.

    Args:
        ax: The axes.
        rows: Name to interval.
        label: What lies in them.
    """
    places = [-place for place in range(len(rows))]
    shift = max((end for row in rows.values() for end in row[:2] if math.isfinite(end)), default=0.0)
    unit = math.floor(shift) if abs(shift) > 6 else 0
    for place, (low, high, estimate) in zip(places, rows.values(), strict=True):
        lower = low - unit if math.isfinite(low) else high - unit - 1
        ax.plot([10**lower, 10 ** (high - unit)], [place, place], color=BLUE, linewidth=5, solid_capstyle="butt", alpha=0.55)
        ax.plot([10**lower, 10 ** (high - unit)], [place, place], "|", color=BLUE, markersize=16, markeredgewidth=2)
        if estimate is not None:
            value, from_, to = (10 ** (each - unit) if math.isfinite(each) else 10**lower for each in estimate)
            around = [[value - from_], [to - value]]
            ax.errorbar([value], [place], xerr=around, fmt="D", color=ORANGE, markersize=6, capsize=4, linewidth=1.5)
    ax.plot([], [], color=BLUE, linewidth=5, alpha=0.55, label="it lies here, for certain")
    if any(row[2] is not None for row in rows.values()):
        ax.plot([], [], "D", color=ORANGE, label="estimate from sampled paths, and its confidence interval")
    ax.set_yticks(places, [shortened(name) for name in rows])
    ax.set_ylim(min(places, default=0) - 0.6, 0.6)
    ax.set_xlabel(f"{label}, in units of $10^{{{unit}}}$" if unit else label)
    ax.grid(axis="x", alpha=0.3)
    legend_above(ax, 1)


def matrix(ax: Picture, names: Sequence[str], values: Sequence[Sequence[float]], label: str) -> None:
    """Draw a matrix of cosines with its numbers, on a scale that tells its entries apart.

    Args:
        ax: The axes.
        names: Of rows and columns.
        values: The matrix; NaN stays blank.
        label: What its numbers are.
    """
    apart = [v for i, row in enumerate(values) for j, v in enumerate(row) if i != j and math.isfinite(v)]
    low = min(apart, default=0.0)
    floor = low - 0.05 * max(1.0 - low, 1e-6)
    image = ax.imshow(values, vmin=floor, vmax=1.0, cmap="cividis")
    shown = [shortened(name, 18) for name in names]
    ax.set_xticks(range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), shown)
    digits = 2 if 1.0 - low > 0.02 else 4 if 1.0 - low > 2e-4 else 6
    if len(names) <= CELLS:
        size = 10 if len(names) <= 6 and digits < 6 else 7
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "black" if value > (floor + 1.0) / 2 else "white"
                ax.text(j, i, f"{value:.{digits}f}", ha="center", va="center", color=colour, fontsize=size)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.85)
    bar.set_label(label)


def points(ax: Picture, names: Sequence[str], x: Sequence[float], y: Sequence[float]) -> None:
    """Draw networks as points, joined in their order; numbers stand at points, those of near ones together, names beside.

    Args:
        ax: The axes.
        names: Of the networks.
        x: Across.
        y: Up.
    """
    ax.plot(x, y, color=GREY, linewidth=1, linestyle=":", zorder=1)
    ax.scatter(x, y, color=BLUE, zorder=2)
    span = max(max(x) - min(x), max(y) - min(y)) or 1.0
    together: list[list[int]] = []
    for number, (across, up) in enumerate(zip(x, y, strict=True)):
        near = (group for group in together if math.hypot(across - x[group[0]], up - y[group[0]]) < NEAR * span)
        group = next(near, None)
        if group is None:
            together.append([number])
        else:
            group.append(number)
    for group in together:
        text = ", ".join(str(number + 1) for number in group[:6]) + (" …" if len(group) > 6 else "")
        ax.annotate(text, (x[group[0]], y[group[0]]), xytext=(6, 6), textcoords="offset points", fontsize=9)
    for number, name in enumerate(names[:LISTED]):
        ax.plot([], [], " ", label=f"{number + 1}  {shortened(name)}")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, handlelength=0, handletextpad=0)
    ax.margins(0.15)
    ax.set_aspect("equal", adjustable="datalim")
    ax.grid(alpha=0.3)


def clouds(ax: Picture, groups: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> None:
    """Draw points of several groups, which differ in marker as well as in colour.

    Args:
        ax: The axes.
        groups: Name to points.
        across: What the first number of a point is.
        up: What the second one is.
    """
    for (name, pairs), style in zip(groups.items(), _styles(len(groups)), strict=True):
        x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        ax.plot(x, y, label=name, alpha=0.75, markersize=5, **(style | {"linestyle": ""}))
    ax.set(xlabel=across, ylabel=up)
    ax.grid(alpha=0.3)
    if len(groups) > 1:
        legend_above(ax, len(groups))


def legend_above(ax: Picture, columns: int) -> None:
    """Put the legend above the picture, where it covers nothing."""
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=min(columns, 4), frameon=False, fontsize=9)


def _styles(count: int) -> list[dict[str, Any]]:
    return [dict(STYLES[number % len(STYLES)]) for number in range(count)]
