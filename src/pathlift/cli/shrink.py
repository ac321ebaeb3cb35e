"""The command ``shrink``: remove whole channels for good and write the smaller network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

import pathlift
from pathlift.cli.common import (
    CHANGE,
    Device,
    Force,
    Json,
    Key,
    ModelArg,
    ModelName,
    OutModel,
    Seed,
    Shape,
    Trust,
    Weights,
    app,
    built,
    check_options,
    check_used,
    out,
    print_json,
    print_table,
    progress_bar,
    scientific,
    working,
)
from pathlift.cli.tables import Column
from pathlift.errors import InputError
from pathlift.output import MODELS, check_outputs, write_outputs

if TYPE_CHECKING:
    from pathlift.pruning import PruneReport, ShrinkReport


@app.command(rich_help_panel=CHANGE)
def shrink(
    model: ModelName,
    amount: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            metavar="X",
            help="Share of the weights that goes with whole channels; without it, channels that no path runs through.",
        ),
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="As for prune; one that looks at no data.", metavar="NAME")
    ] = "relative_path_magnitude",
    steps: Annotated[Optional[int], typer.Option(help="Rounds of scoring and pruning.", metavar="N")] = None,  # noqa: UP045
    scope: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Name patterns with commas; !pattern excludes.", metavar="PATTERNS"),
    ] = None,
    weights: Weights = None,
    shape: Shape = None,
    out_file: OutModel = None,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    model_arg: ModelArg = None,
    trust: Trust = False,
    force: Force = False,
    key: Key = None,
) -> None:
    """Remove whole channels, so that the network is smaller and faster; print what became of its layers."""
    check_outputs({"--out": out_file}, suffixes=MODELS, inputs={"--weights": weights}, replace=force)
    choices = {
        "--criterion": criterion != "relative_path_magnitude",
        "--steps": steps is not None,
        "--scope": scope is not None,
    }
    check_used(choices, "--amount", there=amount is not None)
    check_options("prune", amount=amount, steps=steps)
    from pathlift.pruning.catalogue import criterion_of
    from pathlift.saving import check_extra, model_writer

    if criterion_of(criterion).needs != "nothing":
        raise InputError(f"The criterion '{criterion}' looks at data: use pathlift.prune(…, data=…, shrink=True) in Python.")
    module, sizes = built(model, weights, shape, seed, device, model_arg, trust=trust, key=key)
    check_extra(module, out_file)
    report: PruneReport | None = None
    if amount is None:
        with working("looking for channels that no path runs through"):
            smaller, shrunk = pathlift.pruning.shrink(module, sizes)
    else:
        with progress_bar() as bar:
            task = bar.add_task("pruning", total=None)
            smaller, report = pathlift.prune(
                module,
                sizes,
                amount,
                criterion,
                selection="channels",
                steps=steps,
                scope=None if scope is None else [part.strip() for part in scope.split(",")],
                generator=seed,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                shrink=True,
            )
        assert report.shrunk is not None
        shrunk = report.shrunk
    if out_file is not None:
        with working(f"writing {out_file}"):
            write_outputs({out_file: model_writer(smaller, out_file.suffix, sizes)}, replace=force)
    if as_json:
        pruned = {} if report is None else {"sparsity": report.sparsity, "log10_cost": report.log10_cost}
        print_json({"model": model, **pruned, **shrunk.to_dict(), "out": None if out_file is None else str(out_file)})
        return
    _print(model, shrunk, report)
    if out_file is not None:
        out.print(f"written: {out_file}", markup=False)


COLUMNS = (
    Column("layer", kind="name"),
    Column("channels before", "{:,}".format),
    Column("and after", "{:,}".format),
)


def _print(model: str, shrunk: ShrinkReport, report: PruneReport | None) -> None:
    if shrunk.layers:
        rows = [(layer.name, layer.before, layer.after) for layer in shrunk.layers]
        print_table(f"{model}: layers that lost channels", COLUMNS, rows)
    else:
        out.print(f"{model}: a path runs through every channel that could go", markup=False)
    for left in shrunk.left:
        numbers = f"{len(left.channels)} of weights 0"
        out.print(f"{left.name}: {numbers} stay: {left.reason}", markup=False)
    for title, before, after in (
        ("parameters", shrunk.parameters_before, shrunk.parameters),
        ("multiply-adds of a sample", shrunk.multiply_adds_before, shrunk.multiply_adds),
        ("bytes of the weights", shrunk.bytes_before, shrunk.bytes),
    ):
        out.print(f"{title:31} {before:,} → {after:,} ({after / before if before else 1:.1%})")
    if report is not None:
        out.print(f"path-norm before                {scientific(report.log10_path_norm)}")
        out.print(f"joint cost, exact path-metric   {scientific(report.log10_cost)}")
    out.print(f"path-norm                       {scientific(shrunk.log10_path_norm)}")
