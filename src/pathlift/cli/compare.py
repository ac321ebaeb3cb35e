"""The commands ``metric`` and ``compare``: how far networks of one architecture are from each other."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import pathlift
from pathlift.cli.common import (
    Device,
    Force,
    Json,
    Key,
    ModelArg,
    ModelName,
    OtherKey,
    Seed,
    Shape,
    Trust,
    Weights,
    app,
    captured,
    each_checkpoint,
    hollow,
    out,
    print_json,
    print_rows,
    progress_bar,
    scientific,
    second_network,
    working,
)
from pathlift.errors import InputError
from pathlift.output import Writer, check_outputs, write_outputs

PICTURES = (".png", ".svg", ".pdf")

STEPS = 40
"""Steps of tightening that ``--ratio`` may take when ``--tighten`` does not say."""


@app.command()
def metric(
    model: ModelName,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="A file of weights, or a second model by name.")],
    weights: Weights = None,
    shape: Shape = None,
    q: Annotated[int, typer.Option(help="1, or 2 (exact for any pair).")] = 1,
    moments: Annotated[Optional[int], typer.Option(help="0, 2, 4, 6 or 8: bounds by so many moments; 0 for one pass.")] = None,  # noqa: UP045
    tighten: Annotated[Optional[int], typer.Option(help="Steps that improve the bounds.")] = None,  # noqa: UP045
    ratio: Annotated[float, typer.Option(help="Improve the bounds until upper/lower is at most this.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="Stop improving after this time.")] = math.inf,
    estimate: Annotated[int, typer.Option(help="Number of paths to sample for an unbiased estimate.")] = 0,
    as_json: Json = False,
    seed: Seed = 0,
    other_seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the second model's random weights.")] = 1,
    device: Device = "cpu",
    all_bounds: Annotated[bool, typer.Option("--all", help="Every bound on the path-metric, loosest first.")] = False,
    model_arg: ModelArg = None,
    trust: Trust = False,
    key: Key = None,
    other_key: OtherKey = None,
) -> None:
    """Path-metric between two networks of one architecture. MODEL may be a file when --weights holds its weights."""
    if all_bounds and q != 1:
        raise InputError(f"--all lists bounds on the l1 path-metric; found --q {q}.")
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key)
    with working("reading the second network"):
        second = second_network(other, other_seed, model_arg, trust=trust, key=other_key)
    if all_bounds:
        with working("computing all bounds"):
            bounds = pathlift.metric.path_metric_bounds(network, second, moments=moments)
        _print_bounds(model, other, bounds, as_json=as_json)
        return
    steps = tighten if tighten is not None else (STEPS if ratio > 1 else 0)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[reached]}"), TimeElapsedColumn())
    with progress_bar(*columns) as bar:
        task = bar.add_task("path-metric", total=steps or None, reached="")

        def progress(step: pathlift.metric.Step) -> None:
            bar.update(task, completed=step.number, description=step.by, reached=f"upper/lower {step.ratio:.4g}")

        distance = pathlift.path_metric(
            network,
            second,
            q=q,
            moments=moments,
            tighten=steps,
            ratio=ratio,
            seconds=seconds,
            estimate=estimate,
            generator=seed if estimate else 0,
            progress=progress,
        )
        norm = pathlift.path_norm(network, q=q)
    if as_json:
        _print_json(model, other, distance, norm)
    else:
        _print_metric(model, other, distance, norm)


def _print_json(model: str, other: str, distance: pathlift.metric.PathMetric, norm: pathlift.norm.PathNorm) -> None:
    print_json({
        "model": model,
        "other": other,
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
        "log10_path_norm": norm.log10,
    })


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


def _print_bounds(model: str, other: str, bounds: tuple[pathlift.metric.MetricBound, ...], *, as_json: bool) -> None:
    if as_json:
        rows = [{**dataclasses.asdict(bound), "log10": None if math.isnan(bound.log10) else bound.log10} for bound in bounds]
        print_json({"model": model, "other": other, "bounds": rows})
        return
    table = Table(title=f"Bounds on ‖Φ(θ) − Φ(θ')‖₁: {model} and {other}", title_justify="left", box=None, padding=(0, 2))
    for header in ("bound", "from", "value", "log10", "moves under rescaling"):
        table.add_column(header, justify="right" if header in {"value", "log10"} else "left", no_wrap=True)
    for bound in bounds:
        if not bound.reason:
            sign = "≤ " if bound.side == "upper" else "≥ "
            moves = "no" if bound.invariant else "yes"
            table.add_row(bound.name, bound.reference, sign + scientific(bound.log10), f"{bound.log10:.3f}", moves)
    out.print(table)
    for bound in bounds:
        if bound.reason:
            out.print(f"{bound.name} does not apply. {bound.reason}", style="dim", markup=False, highlight=False)


@app.command()
def compare(
    weights: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINTS...", help="Files of weights as for --weights; a folder of several is each of them."
        ),
    ],
    model: Annotated[str, typer.Option(help="The architecture: torchvision:NAME, timm:NAME, package.module:factory.")],
    shape: Shape = None,
    plot: Annotated[Path | None, typer.Option(help="Draw cosines and path space: .png, .svg, .pdf.")] = None,
    as_json: Json = False,
    model_arg: ModelArg = None,
    trust: Trust = False,
    force: Force = False,
    key: Key = None,
) -> None:
    """Cosines and distances of the path-liftings of several checkpoints: they do not see a rescaling."""
    check_outputs({"--plot": plot}, suffixes=PICTURES, replace=force)
    if plot is not None:
        from pathlift.storage.packages import package

        package("matplotlib", "experiments")
    paths = each_checkpoint(weights)
    network = hollow(model, shape, model_arg, trust=trust)
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
    _print_matrix("cosine of Φ", names, [[f"{value:.6f}" for value in row] for row in kernel.cosine.tolist()])
    _print_matrix("‖Φ − Φ'‖₂", names, [[scientific(value) for value in row] for row in kernel.log10_distance.tolist()])
    _print_matrix("‖Φ‖₂", names, [[scientific(value)] for value in kernel.log10_norm.tolist()], columns=[""])
    if plot is not None:
        out.print(f"Drawn to {plot}", markup=False, highlight=False)


def _short(paths: list[Path]) -> list[str]:
    """Name files by their stems where these differ."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _print_matrix(title: str, names: list[str], rows: list[list[str]], columns: list[str] | None = None) -> None:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    table.add_column("", style="bold")
    for name in names if columns is None else columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in zip(names, rows, strict=True):
        table.add_row(name, *row)
    out.print(table)


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
    from pathlift.storage.packages import package

    package("matplotlib", "experiments").use("Agg")
    plots = package("matplotlib.pyplot", "experiments")
    drawing, (left, right) = plots.subplots(1, 2, figsize=(12, 5), layout="constrained")
    lowest = float(kernel.cosine.nan_to_num(1.0).min())
    image = left.imshow(kernel.cosine, vmin=-1.0 if lowest < 0 else 0.0, vmax=1.0, cmap="viridis")
    left.set_xticks(range(len(names)), names, rotation=45, ha="right")
    left.set_yticks(range(len(names)), names)
    left.set_title("cosine of the path-liftings")
    drawing.colorbar(image, ax=left, shrink=0.8)
    points, shown = kernel.coordinates(min(2, len(names)))
    x, y = points[:, 0].tolist(), (points[:, 1].tolist() if points.shape[1] > 1 else [0.0] * len(names))
    right.scatter(x, y)
    for name, across, up in zip(names, x, y, strict=True):
        right.annotate(name, (across, up), xytext=(4, 4), textcoords="offset points", fontsize=8)
    right.set_title(f"path space, classical MDS ({shown:.0%} of Σ distance²)")
    right.set_aspect("equal", adjustable="datalim")

    def write(path: Path) -> None:
        try:
            drawing.savefig(path, dpi=150, format=kind)
        finally:
            plots.close(drawing)

    return write
