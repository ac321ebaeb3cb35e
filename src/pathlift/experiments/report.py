"""What an experiment found: one table, one figure in the style of Fig. 4, and both as files."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pathlift.experiments import store
from pathlift.storage.packages import package

Row = dict[str, Any]
COLUMNS = (
    "seed", "criterion", "rescaled", "level", "sparsity", "accuracy", "one_shot", "collapsed", "mass_kept", "log10_cost",
    "log10_bound", "seconds", "mask",
)  # fmt: skip


def cells(rows: Sequence[Row], what: str) -> dict[tuple[str, bool], dict[float, list[float]]]:
    """Sort values by criterion and rescaling, then by level.

    Args:
        rows: Rows of `pathlift.experiments.lottery.rows`.
        what: ``accuracy`` or ``one_shot``.

    Returns:
        (criterion, rescaled) to level to the values of all seeds.
    """
    grouped: dict[tuple[str, bool], dict[float, list[float]]] = {}
    for row in rows:
        if row.get(what) is not None:
            grouped.setdefault((row["criterion"], row["rescaled"]), {}).setdefault(row["level"], []).append(row[what])
    return grouped


def mean_and_deviation(values: Sequence[float]) -> str:
    """Write percentages as mean ± standard deviation over seeds; the mean alone for one."""
    percent = [100 * value for value in values]
    middle = statistics.fmean(percent)
    return f"{middle:.1f}" if len(percent) == 1 else f"{middle:.1f} ± {statistics.stdev(percent):.1f}"


def table(rows: Sequence[Row], what: str) -> tuple[list[str], list[list[str]]]:
    """Lay out accuracies: a line per criterion and rescaling, a column per level.

    Args:
        rows: The results.
        what: ``accuracy`` or ``one_shot``.

    Returns:
        The headers, and a line of texts for each criterion.
    """
    grouped = cells(rows, what)
    levels = sorted({level for (name, _), values in grouped.items() if name != "dense" for level in values})
    lines = [
        [
            f"{name}, rescaled" if rescaled else name,
            *(mean_and_deviation(values[level]) if level in values else "" for level in levels),
        ]
        for (name, rescaled), values in grouped.items()
        if name != "dense"
    ]
    return ["criterion", *(f"{level:.0%}" for level in levels)], lines


def as_csv(rows: Sequence[Row]) -> str:
    """Write all rows, a line each."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "collapsed": " ".join(row.get("collapsed", ()))})
    return out.getvalue()


def figure(rows: Sequence[Row], rewind: int, level: float, path: Path) -> None:
    """Draw test accuracy over epochs at one level, as Fig. 4, and accuracy over levels.

    Args:
        rows: The results.
        rewind: Epoch at which tickets begin.
        level: Of the left picture.
        path: A .png file.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    plots = package("matplotlib.pyplot", "experiments")
    package("matplotlib", "experiments").use("Agg")
    drawing, (left, right) = plots.subplots(1, 2, figsize=(15, 4.6), constrained_layout=True)
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["criterion"] for row in rows))}
    colours["dense"] = "black"
    chosen = [row for row in rows if row["criterion"] == "dense" or row["level"] == level]
    for (name, rescaled), values in cells(rows, "accuracy").items():
        style = ":" if rescaled else "-"
        label = f"{name}, rescaled" if rescaled else name
        trained = [row for row in chosen if (row["criterion"], row["rescaled"]) == (name, rescaled) and row["history"]]
        if trained:
            start = 1 if name == "dense" else rewind + 1
            curve = [100 * statistics.fmean(points) for points in zip(*(row["history"] for row in trained), strict=True)]
            left.plot(
                range(start, start + len(curve)), curve, style, color=colours[name], label=label, marker=".", lw=3 - rescaled
            )
        if name == "dense":
            right.axhline(100 * statistics.fmean(values[0.0]), color="black", lw=1, label="dense")
            continue
        levels = sorted(values)
        means = [100 * statistics.fmean(values[share]) for share in levels]
        spread = [100 * statistics.stdev(values[share]) if len(values[share]) > 1 else 0.0 for share in levels]
        positions = [-math.log10(1 - share) for share in levels]
        right.errorbar(
            positions, means, spread, ls=style, color=colours[name], label=label, marker=".", capsize=2, lw=3 - rescaled
        )
        right.set_xticks(positions, [f"{share:.0%}" for share in levels])
    left.set(xlabel="epoch", ylabel="test accuracy (%)", title=f"{level:.0%} pruned, rewound to epoch {rewind}, finetuned")
    right.set(xlabel="weights pruned", ylabel="test accuracy (%)", title="after finetuning")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    left.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=130)
    plots.close(drawing)
    store.write(path, buffer.getvalue())
