"""The commands ``metric`` and ``compare``: how far networks of one architecture are from each other."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

import pathlift
from pathlift.cli.common import (
    ANSWER,
    COMPARE,
    MODEL,
    Device,
    Force,
    Json,
    Key,
    ModelArg,
    ModelName,
    OtherKey,
    Others,
    OtherSeed,
    Seed,
    Shape,
    Trust,
    Until,
    Weights,
    app,
    captured,
    check_options,
    each_checkpoint,
    each_other,
    hollow,
    manner,
    out,
    print_cells,
    print_header,
    print_json,
    print_rows,
    print_table,
    progress_bar,
    scientific,
    second_network,
    width,
    working,
)
from pathlift.cli.tables import Column, laid_out
from pathlift.errors import InputError
from pathlift.output import Writer, check_outputs, write_outputs

if TYPE_CHECKING:
    from torch import Tensor, nn

PICTURES = (".png", ".svg", ".pdf")

STEPS = 40
"""Steps of tightening that ``--ratio`` may take when ``--tighten`` does not say."""


@app.command(rich_help_panel=COMPARE)
def metric(
    model: ModelName,
    others: Others,
    weights: Weights = None,
    shape: Shape = None,
    q: Annotated[int, typer.Option(help="1, or 2 (exact for any pair).", metavar="Q")] = 1,
    moments: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="0, 2, 4, 6 or 8: bounds by so many moments; 0 for one pass.", metavar="N"),
    ] = None,
    tighten: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Steps that improve the bounds.", metavar="N"),
    ] = None,
    ratio: Annotated[float, typer.Option(help="Improve the bounds until upper/lower is at most this.", metavar="X")] = 1.0,
    seconds: Annotated[float, typer.Option(help="Stop improving after this time.", metavar="X", show_default=False)] = math.inf,
    estimate: Annotated[int, typer.Option(help="Number of paths to sample for an unbiased estimate.", metavar="N")] = 0,
    all_bounds: Annotated[bool, typer.Option("--all", help="Every bound on the path-metric, and what it costs.")] = False,
    as_json: Json = False,
    seed: Seed = 0,
    other_seed: OtherSeed = 1,
    device: Device = "cpu",
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
    key: Key = None,
    other_key: OtherKey = None,
) -> None:
    """Path-metric to one or several networks of one architecture. MODEL may be a file when --weights holds its weights."""
    if all_bounds and q != 1:
        raise InputError(f"--all lists bounds on the l1 path-metric; found --q {q}.")
    if moments == 0 and tighten:
        raise InputError("--moments 0 takes one pass, and --tighten improves the bounds of moments: leave one of them out.")
    if q == 2 and (moments is not None or tighten or estimate):
        raise InputError("For --q 2 the path-metric is exact: --moments, --tighten and --estimate are for --q 1.")
    check_options("path_metric", q=q, moments=moments, tighten=tighten, ratio=ratio, seconds=seconds, estimate=estimate)
    names = each_other(others)
    if all_bounds and len(names) > 1:
        raise InputError(f"--all takes one OTHER, found {len(names)}.")
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key, until=until)
    norm = None
    distances: list[pathlift.metric.PathMetric] = []
    for name in names:
        with working("reading the second network"):
            second = second_network(name, other_seed, model_arg, trust=trust, key=other_key)
        if all_bounds:
            _all_bounds(network, second, model, name, moments, as_json=as_json)
            return
        options = _Options(
            q, moments, tighten if tighten is not None else (STEPS if ratio > 1 else 0), ratio, seconds, estimate
        )
        distances.append(_distance(network, second, name, options, seed))
        norm = pathlift.path_norm(network, q=q) if norm is None else norm
    assert norm is not None
    if len(names) > 1:
        _print_distances(model, names, distances, norm, as_json=as_json)
    elif as_json:
        print_json({"model": model, "other": names[0], **_record(distances[0]), "log10_path_norm": norm.log10})
    else:
        _print_metric(model, names[0], distances[0], norm)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What `path_metric` is to do."""

    q: int
    moments: int | None
    tighten: int
    ratio: float
    seconds: float
    estimate: int


def _distance(
    network: pathlift.Network,
    second: nn.Module | pathlift.storage.Checkpoint,
    name: str,
    options: _Options,
    seed: int,
) -> pathlift.metric.PathMetric:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[reached]}"), TimeElapsedColumn())
    with progress_bar(*columns) as bar:
        task = bar.add_task(name, total=options.tighten or None, reached="")

        def progress(step: pathlift.metric.Step) -> None:
            bar.update(task, completed=step.number, description=step.by, reached=f"upper/lower {step.ratio:.4g}")

        return pathlift.path_metric(
            network,
            second,
            **dataclasses.asdict(options),
            generator=seed if options.estimate else 0,
            progress=progress,
        )


def _record(distance: pathlift.metric.PathMetric) -> dict[str, object]:
    return {
        "q": int(distance.q),
        "exact": distance.exact,
        "method": distance.method,
        "lower": distance.lower,
        "upper": distance.upper,
        "log10_lower": distance.log10_lower,
        "log10_upper": distance.log10_upper,
        "ratio": distance.ratio,
        "lower_by": distance.lower_by,
        "upper_by": distance.upper_by,
        "passes": distance.passes,
        "history": distance.history,
        "estimate": distance.sampled,
    }


def _print_distances(
    model: str,
    names: list[str],
    distances: list[pathlift.metric.PathMetric],
    norm: pathlift.norm.PathNorm,
    *,
    as_json: bool,
) -> None:
    if as_json:
        others = [{"other": name, **_record(distance)} for name, distance in zip(names, distances, strict=True)]
        print_json({"model": model, "others": others, "log10_path_norm": norm.log10})
        return
    columns = (
        Column("network", kind="name"),
        Column("at least", scientific, raw=scientific),
        Column("at most", scientific, raw=scientific),
        Column("relative to the norm", scientific, raw=scientific),
    )
    rows = [
        (name, distance.log10_lower, distance.log10_upper, distance.log10_upper - norm.log10)
        for name, distance in zip(names, distances, strict=True)
    ]
    print_table(f"‖Φ(θ) − Φ(θ')‖ (q = {distances[0].q:g}) from {model}, path-norm {scientific(norm.log10)}", columns, rows)


def _print_metric(model: str, other: str, distance: pathlift.metric.PathMetric, norm: pathlift.norm.PathNorm) -> None:
    rows = [("path-norm of MODEL", scientific(norm.log10))]
    if distance.exact:
        rows += [("path-metric", scientific(distance.log10_upper)), ("exact", f"yes ({distance.method})")]
    else:
        rows += [
            ("path-metric, at least", f"{scientific(distance.log10_lower)}  ({distance.lower_by})"),
            ("path-metric, at most", f"{scientific(distance.log10_upper)}  ({distance.upper_by})"),
            ("upper / lower", "inf" if math.isinf(distance.ratio) else scientific(math.log10(distance.ratio))),
            ("exact", "no (weights not ordered)"),
        ]
    if distance.sampled is not None:
        estimate = distance.sampled
        interval = f"{scientific(estimate.log10_low)} … {scientific(estimate.log10_high)}"
        rows += [
            (f"estimate ({estimate.samples} paths)", scientific(estimate.log10_value)),
            (f"  {estimate.confidence:.0%} confidence", interval),
        ]
    rows += [("relative to the norm", scientific(distance.log10_upper - norm.log10))]
    print_rows(f"‖Φ(θ) − Φ(θ')‖ (q = {distance.q:g}): {model} and {other}", rows)


BOUNDS = (
    Column("bound", kind="words"),
    Column("from", kind="words"),
    Column("value"),
    Column("log10", "{:.3f}".format),
    Column("seconds", "{:.2f}".format),
    Column("moves under rescaling", kind="words"),
)
WIDE = ("Hellinger in three steps", "(6), Lemma 4.2", "≤ 9.99999e+99", "100.000", "1000.00", "yes")
"""A row as wide as rows are: they are printed as they come, before the next is known."""


def _all_bounds(
    network: pathlift.Network,
    second: nn.Module | pathlift.storage.Checkpoint,
    model: str,
    other: str,
    moments: int | None,
    *,
    as_json: bool,
) -> None:
    """Print each bound when it is there, with the time since the one before."""
    layout = laid_out(BOUNDS, [WIDE], width())
    shown = not as_json and not manner.csv
    spent: dict[str, float] = {}
    last = time.monotonic()
    if shown:
        out.print(f"Bounds on ‖Φ(θ) − Φ(θ')‖₁: {model} and {other}", style="italic", markup=False)
        print_header(layout)

    def progress(bound: pathlift.metric.MetricBound) -> None:
        nonlocal last
        now = time.monotonic()
        spent[f"{bound.name} {bound.side}"] = now - last
        if shown and not bound.reason:
            with contextlib.redirect_stdout(terminal):
                print_cells(layout, [c.shown(v) for c, v in zip(BOUNDS, _row(bound, now - last), strict=True)])
        elif shown:
            with contextlib.redirect_stdout(terminal):
                out.print(f"{bound.name} does not apply. {bound.reason}", style="dim", markup=False)
        last = now

    terminal = sys.stdout
    with working("computing all bounds"):
        bounds = pathlift.metric.path_metric_bounds(
            network, second, moments=(4 if moments is None else moments) or None, progress=progress
        )
    if as_json:
        rows = [
            {
                **dataclasses.asdict(bound),
                "log10": None if math.isnan(bound.log10) else bound.log10,
                "seconds": spent[f"{bound.name} {bound.side}"],
            }
            for bound in bounds
        ]
        print_json({"model": model, "other": other, "bounds": rows})
    elif manner.csv:
        columns = (BOUNDS[0], Column("side"), BOUNDS[1], Column("value"), *BOUNDS[3:])
        applying = [(bound, spent[f"{bound.name} {bound.side}"]) for bound in bounds if not bound.reason]
        lines = [(bound, _row(bound, seconds)) for bound, seconds in applying]
        print_table("", columns, [(row[0], bound.side, row[1], str(row[2])[2:], *row[3:]) for bound, row in lines])


def _row(bound: pathlift.metric.MetricBound, seconds: float) -> tuple[object, ...]:
    sign = "≤ " if bound.side == "upper" else "≥ "
    return (
        bound.name, bound.reference, sign + scientific(bound.log10), bound.log10, seconds, "no" if bound.invariant else "yes",
    )  # fmt: skip


@app.command(rich_help_panel=COMPARE)
def compare(
    weights: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINTS...", help="Files of weights as for --weights; a folder of several is each of them."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="The architecture: torchvision:NAME, timm:NAME, package.module:factory.",
            metavar="MODEL",
            rich_help_panel=MODEL,
        ),
    ],
    shape: Shape = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw cosines and path space: .png, .svg, .pdf.", metavar="FILE", rich_help_panel=ANSWER),
    ] = None,
    as_json: Json = False,
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
    force: Force = False,
    key: Key = None,
) -> None:
    """Cosines and distances of the path-liftings of several checkpoints: they do not see a rescaling."""
    check_outputs({"--plot": plot}, suffixes=PICTURES, replace=force)
    if plot is not None:
        from pathlift.storage.packages import package

        package("matplotlib", "plots")
    paths = each_checkpoint(weights)
    network = hollow(model, shape, model_arg, trust=trust, until=until)
    with progress_bar() as bar:
        task = bar.add_task("pairs of checkpoints", total=len(paths) * (len(paths) + 1) // 2)
        kernel = pathlift.path_kernel(
            [pathlift.storage.Checkpoint(path, network.host, key) for path in paths],
            model=network,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    names = _short(paths)
    if plot is not None:
        write_outputs({plot: picture(kernel, names, plot.suffix.removeprefix("."))}, replace=force)
    if as_json:
        print_json({
            "model": model,
            "checkpoints": [str(path) for path in paths],
            "cosine": kernel.cosine,
            "log10_distance": kernel.log10_distance,
            "log10_norm": kernel.log10_norm,
        })
        return
    _print_kernel(kernel, names)
    if plot is not None:
        out.print(f"Drawn to {plot}", markup=False)


def _short(paths: list[Path]) -> list[str]:
    """Name files by their stems where these differ."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _print_kernel(kernel: pathlift.kernel.PathKernel, names: list[str]) -> None:
    tables: list[tuple[str, list[str], Tensor, Callable[[float], str], Callable[[float], object]]] = [
        ("cosine of Φ", names, kernel.cosine, "{:.6f}".format, float),
        ("‖Φ − Φ'‖₂", names, kernel.log10_distance, scientific, scientific),
        ("‖Φ‖₂", [""], kernel.log10_norm[:, None], scientific, scientific),
    ]
    if manner.csv:  # one row for each number, so that all three are one table
        rows = [
            (title, name, other, raw(value))
            for title, others, matrix, _, raw in tables
            for name, line in zip(names, matrix.tolist(), strict=True)
            for other, value in zip(others, line, strict=True)
        ]
        print_table("", tuple(map(Column, ("quantity", "network", "other", "value"))), rows)
        return
    for title, others, matrix, shown, _ in tables:
        columns = (Column("", kind="name"), *(Column(name, shown) for name in others))
        print_table(title, columns, [(name, *line) for name, line in zip(names, matrix.tolist(), strict=True)], "bold")


def picture(kernel: pathlift.kernel.PathKernel, names: list[str], kind: str) -> Writer:
    """Draw the matrix of cosines, and the networks as points in path space.

    Args:
        kernel: What to draw.
        names: Of the networks.
        kind: ``png``, ``svg`` or ``pdf``.

    Returns:
        What writes the picture.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    import pathlift.drawing as drawing
    from pathlift.storage.packages import package

    size = max(5.0, 0.55 * len(names) + 2.5)
    figure = package("matplotlib.figure", "plots").Figure(figsize=(2.3 * size, size), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawing.matrix(left, names, kernel.cosine.tolist(), "cosine of the path-liftings")
    points, shown = kernel.coordinates(min(2, len(names)))
    x, y = points[:, 0].tolist(), (points[:, 1].tolist() if points.shape[1] > 1 else [0.0] * len(names))
    drawing.points(right, names, x, y)
    right.set(
        title=f"path space ({shown:.0%} of Σ distance²)",
        xlabel="first axis, in units of the largest distance",
        ylabel="second axis",
    )

    def write(path: Path) -> None:
        figure.savefig(path, dpi=150, format=kind)

    return write
