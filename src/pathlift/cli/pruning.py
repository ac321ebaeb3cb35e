"""The command ``prune``: set the least important weights to 0 and say what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

import pathlift
from pathlift.cli.common import (
    ANSWER,
    CHANGE,
    SYNTHETIC,
    Device,
    Force,
    InputMean,
    InputVariance,
    Json,
    Key,
    Limit,
    ModelArg,
    ModelName,
    OutModel,
    Seed,
    Shape,
    Trust,
    Until,
    Weights,
    app,
    captured,
    check_data,
    check_options,
    check_unmeasured,
    check_used,
    declared_inputs,
    inputs_of,
    known,
    out,
    print_json,
    print_table,
    progress_bar,
    scientific,
    working,
)
from pathlift.cli.tables import Column
from pathlift.errors import InputError
from pathlift.output import MODELS, TENSORS, check_outputs, tensor_writer, write_outputs

if TYPE_CHECKING:
    from pathlift.graph.calling import Samples
    from pathlift.pruning.batches import Data

CRITERIA = (
    "path_magnitude, path_magnitude_iterated, path_magnitude_lamp, path_magnitude_l2, path_magnitude_data, "
    "relative_path_magnitude, balanced_magnitude, balanced_lamp, magnitude, lamp, random, synflow, obd, snip, grasp, "
    "fisher, wanda, output_error, output_error_data"
)
"""The names in `pathlift.pruning.CRITERIA`, for the help."""

SELECTIONS = ("global", "per_layer", "per_output", "lamp", "erk", "channels", "2:4")
"""Names of selections, for the help."""


@app.command(rich_help_panel=CHANGE)
def prune(
    model: ModelName,
    amount: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Share of the weights that goes; n:m selections fix it.", metavar="X"),
    ] = None,
    criterion: Annotated[
        str,
        typer.Option(help=f"One of {CRITERIA}.", metavar="NAME", autocompletion=known(*CRITERIA.split(", "))),
    ] = "relative_path_magnitude",
    selection: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="global, per_layer, lamp, erk, channels, 2:4 …", metavar="NAME", autocompletion=known(*SELECTIONS)),
    ] = None,
    steps: Annotated[Optional[int], typer.Option(help="Rounds of scoring and pruning.", metavar="N")] = None,  # noqa: UP045
    scope: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Name patterns with commas; !pattern excludes.", metavar="PATTERNS"),
    ] = None,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="For criteria that look at data, and for --update: digits, fashion-mnist, a file, or synthetic: 32 inputs "
            "that are made from the model's batch norms.",
            metavar="DATA",
        ),
    ] = None,
    limit: Limit = None,
    update: Annotated[
        str,
        typer.Option(
            help="compensate: the weights that stay make up for those that go.",
            metavar="NAME",
            autocompletion=known("none", "compensate"),
        ),
    ] = "none",
    input_mean: InputMean = None,
    input_variance: InputVariance = None,
    weights: Weights = None,
    shape: Shape = None,
    out_file: OutModel = None,
    masks_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--masks", metavar="FILE", help="Write the masks to a .safetensors file.", rich_help_panel=ANSWER),
    ] = None,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
    force: Force = False,
    key: Key = None,
) -> None:
    """Prune a network; print what became of each tensor and how far the function can have moved."""
    read = {"MODEL": model, "--weights": weights, "--data": data}
    check_outputs({"--masks": masks_file}, suffixes=TENSORS, inputs=read, replace=force)
    check_outputs({"--out": out_file, "--masks": masks_file}, suffixes=MODELS, inputs=read, replace=force)
    import torch

    from pathlift.pruning.catalogue import criterion_of
    from pathlift.pruning.selection import NofM, selection_of
    from pathlift.saving import check_extra, model_writer
    from pathlift.storage.data import load_data

    check_options("prune", amount=amount, steps=steps, update=update)
    declared = declared_inputs("prune", input_mean, input_variance)
    chosen = criterion_of(criterion)
    selects = chosen.selection if selection is None else selection_of(selection)
    if amount is None and not isinstance(selects, NofM):
        raise InputError("Say how much to prune: --amount, a share in [0, 1).")
    samples = check_data(data, limit, synthetic=True)
    if chosen.propagated is None:
        check_used(
            dict.fromkeys(declared.options, True),
            "--update compensate or a criterion that propagates moments",
            there=update == "compensate",
        )
        check_unmeasured(declared, None if data == SYNTHETIC else data)
    needs = chosen.needs
    if needs != "nothing" and data is None:
        what = "inputs 'x'" if needs == "inputs" else "inputs 'x' and classes 'y'"
        raise InputError(
            f"The criterion '{criterion}' looks at data. Give it with --data: digits, fashion-mnist, or a file with {what}."
        )
    if needs == "loss" and data == SYNTHETIC:
        raise InputError(f"The criterion '{criterion}' looks at a loss, and inputs that are made have no classes.")
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key, until=until)
    check_extra(network, out_file)
    seen: Data | list[Samples] | None = None
    if data == SYNTHETIC:
        seen = inputs_of(network, data, samples, declared, seed)
    elif data is not None:
        x, y = load_data(data, network.graph.examples[0][0][1:], samples)
        x = x.to(network.graph.examples[0][1])
        if needs == "loss" and y is None:
            raise InputError(f"The criterion '{criterion}' looks at a loss, and '{data}' has no classes 'y'.")
        seen = pathlift.pruning.Batch(x, y) if needs == "loss" and y is not None else x
    with progress_bar() as bar:
        task = bar.add_task("pruning", total=None)
        pruned, report = pathlift.prune(
            network,
            amount=amount,
            criterion=criterion,
            selection=selection,
            steps=steps,
            scope=None if scope is None else [part.strip() for part in scope.split(",")],
            data=seen,
            update=update,
            input_mean=declared.mean,
            input_variance=declared.variance,
            generator=torch.Generator().manual_seed(seed),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    with working("writing files"):
        writers = {} if out_file is None else {out_file: model_writer(pruned, out_file.suffix)}
        writers |= {} if masks_file is None else {masks_file: tensor_writer(report.masks)}
        write_outputs(writers, replace=force)
    written = [str(path) for path in writers]
    if as_json:
        print_json({
            "model": model,
            "criterion": report.criterion,
            "amount": report.amount,
            "sparsity": report.sparsity,
            "log10_path_norm": report.log10_path_norm,
            "log10_cost": report.log10_cost,
            "log10_bound": report.log10_bound,
            "mass_kept": report.mass_kept,
            "collapsed": list(report.collapsed),
            **({} if report.updated is None else {"log10_path_metric": _ends(report), "updated": report.updated.to_dict()}),
            "tensors": {row.name: {"weights": row.weights, "kept": row.kept, "share": row.share} for row in report.tensors},
            "written": written,
        })
        return
    _print(model, report)
    if written:
        out.print(f"written: {', '.join(written)}")


def _ends(report: pathlift.pruning.PruneReport) -> list[float]:
    return [report.path_metric.log10_lower, report.path_metric.log10_upper]


def _print(model: str, report: pathlift.pruning.PruneReport) -> None:
    total = sum(row.weights for row in report.tensors)
    title = f"{model}: {report.sparsity:.2%} of {total:,} weights pruned by {report.criterion}"
    columns = (
        Column("tensor", kind="name"),
        Column("weights", "{:,}".format),
        Column("kept", "{:,}".format),
        Column("sparsity", "{:.2%}".format),
        Column("share of all paths before", "{:.4f}".format),
        Column("and after", lambda left: left if isinstance(left, str) else f"{left:.4f}"),
    )
    rows = [
        (row.name, row.weights, row.kept, row.sparsity, row.share, "collapsed" if row.collapsed else row.left)
        for row in report.tensors
    ]
    print_table(title, columns, rows)
    out.print(f"path-norm                       {scientific(report.log10_path_norm)}")
    out.print(f"share of it that is left        {report.mass_kept:.3g}")
    if report.updated is None:
        out.print(f"joint cost, exact path-metric   {scientific(report.log10_cost)}")
        out.print(f"bound (13), sum of the scores   {scientific(report.log10_bound)}")
    else:
        low, high = _ends(report)
        out.print(f"path-metric, between            {scientific(low)} and {scientific(high)}")
        out.print(f"weights fitted anew, by         {len(report.updated.weights)}, {report.updated.statistics}")
        for reason in report.updated.left.values():
            out.print(f"only pruned: {reason}")
    if report.collapsed:
        out.print(f"{len(report.collapsed)} tensors collapsed: no path runs through them any more", style="bold")
