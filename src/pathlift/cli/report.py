"""The command ``report``: one page on a network, with figures and all numbers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

import pathlift
from pathlift.cli.common import (
    ANSWER,
    MEASURE,
    MODEL,
    Device,
    Force,
    Json,
    Key,
    Limit,
    ModelArg,
    ModelName,
    OtherSeed,
    Seed,
    Shape,
    Trust,
    Until,
    Weights,
    app,
    built,
    check_data,
    check_option,
    check_options,
    check_used,
    each_other,
    out,
    print_json,
    print_rows,
    progress_bar,
    scientific,
    second_network,
    titled,
    working,
)
from pathlift.errors import InputError
from pathlift.output import check_outputs, write_outputs

PAGES = (".html", ".htm")


@app.command(rich_help_panel=MEASURE)
def report(
    model: ModelName,
    other: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Another network of the architecture: a file of weights, a folder of several, or a model by name. Repeatable.",
            metavar="OTHER",
        ),
    ] = None,
    prune: Annotated[
        str, typer.Option(help="What pruning of these shares would cost; 'none' to leave it out.", metavar="X,…")
    ] = "0.3,0.5,0.7",
    bits: Annotated[
        str, typer.Option(help="What rounding to so many bits would cost; 'none' to leave it out.", metavar="N,…")
    ] = "8,6,4",
    estimate: Annotated[int, typer.Option(help="Paths to sample for an estimate of each path-metric.", metavar="N")] = 400,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Measure accuracy, and quantise by: digits, fashion-mnist, or a file.", metavar="DATA"),
    ] = None,
    limit: Limit = None,
    weights: Weights = None,
    shape: Shape = None,
    out_file: Annotated[Path, typer.Option("--out", help="The page.", metavar="FILE", rich_help_panel=ANSWER)] = Path(
        "report.html"
    ),
    as_json: Json = False,
    seed: Seed = 0,
    other_seed: OtherSeed = 1,
    device: Device = "cpu",
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
    force: Force = False,
    key: Key = None,
    other_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--other-key", metavar="KEY", help="As --key, in the files --other.", rich_help_panel=MODEL),
    ] = None,
) -> None:
    """Write one page on a network: its paths, layers and scores, other networks, what pruning and rounding would cost."""
    read = {"MODEL": model, "--weights": weights, "--data": data}
    check_outputs({"--out": out_file}, suffixes=PAGES, inputs=read, replace=force)
    amounts, widths = _numbers("--prune", prune, float), _numbers("--bits", bits, int)
    check_options("path_metric", estimate=estimate)
    check_options("Report", bits=widths)
    check_option("--prune", amounts, "Report", "amounts")
    count = check_data(data, limit)
    check_used({"--other-key": other_key is not None}, "--other", there=bool(other))
    from pathlift.storage.packages import package

    package("matplotlib", "plots")
    import torch

    from pathlift.report import Report
    from pathlift.storage.data import load_data

    module, sizes = built(model, weights, shape, seed, device, model_arg, trust=trust, key=key)
    names = each_other(other or [])
    with working("reading the other networks"):
        others = [second_network(name, other_seed, model_arg, trust=trust, key=other_key) for name in names]
    samples: torch.Tensor | pathlift.pruning.Batch | None = None
    if data is not None:
        single = [size for size in sizes if isinstance(size, int)] if isinstance(sizes, tuple) else []
        if len(single) != len(sizes):
            raise InputError("--data holds inputs 'x' of one kind, and this model takes several: leave it out.")
        x, y = load_data(data, single, count)
        samples = x if y is None else pathlift.pruning.Batch(x, y)
    with progress_bar() as bar:
        task = bar.add_task("report", total=None)
        made = Report(
            module,
            sizes,
            others or None,
            data=samples,
            until=until,
            title=titled(model, weights) if weights is None else f"{model} with {weights.name}",
            names=[weights.stem if weights is not None else model, *map(_short, names)],
            amounts=amounts,
            bits=[int(each) for each in widths],
            samples=estimate,
            command=f"pathlift {shlex.join(sys.argv[1:])}",
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    with working("drawing"):
        page = made.html()
    write_outputs({out_file: lambda path: path.write_text(page, encoding="utf-8")}, replace=force)
    if as_json:
        print_json({"model": model, "out": str(out_file), **made.to_dict()})
    else:
        _print(titled(model, weights), made, out_file)
    if not made.supported:
        raise typer.Exit(1)


def _short(name: str) -> str:
    return Path(name).stem or name


def _numbers(option: str, text: str, kind: type[int | float]) -> list[float]:
    """Read numbers with commas between them; the word none for no number."""
    if text.strip() == "none":
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        words = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} must be {words} with commas between them, or none; found '{text[:30]}'.") from None


def _print(model: str, made: pathlift.report.Report, file: Path) -> None:
    rows = [("supported", "yes" if made.supported else f"no: {len(made.problems)} problems")]
    if made.supported:
        rows += [
            ("path-norm", scientific(made.log10_path_norm)),
            ("parameters", f"{made.parameters:,}"),
            ("modules with weights", f"{len(made.layers):,}"),
            ("channels without a path", f"{sum(layer.dead or 0 for layer in made.layers):,}"),
        ]
    rows += [(f"at most, from {each.name}", scientific(each.metric.log10_upper)) for each in made.compared]
    rows += [("page", str(file))]
    print_rows(model, rows)
    for note in made.notes:
        out.print(note, markup=False)
