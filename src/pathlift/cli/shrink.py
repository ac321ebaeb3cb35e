"""The command ``shrink``: remove whole channels for good and write the smaller network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.table import Table

import pathlift
from pathlift.cli.common import (
    Device,
    Force,
    Json,
    Key,
    ModelArg,
    ModelName,
    Seed,
    Shape,
    Trust,
    Weights,
    app,
    built,
    check_used,
    number,
    out,
    print_json,
    progress_bar,
    scientific,
    working,
)
from pathlift.errors import InputError
from pathlift.output import Writer, check_outputs, tensor_writer, write_outputs

if TYPE_CHECKING:
    from torch import nn

    from pathlift.pruning import PruneReport, ShrinkReport

FILES = (".pt2", ".safetensors")
"""What the smaller network is written to: a program of torch.export, or the weights alone."""


@app.command()
def shrink(
    model: ModelName,
    amount: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Share of the weights that goes with whole channels; without it, channels that no path runs through."
        ),
    ] = None,
    criterion: Annotated[str, typer.Option(help="As for prune; one that looks at no data.")] = "relative_path_magnitude",
    steps: Annotated[Optional[int], typer.Option(help="Rounds of scoring and pruning.")] = None,  # noqa: UP045
    scope: Annotated[Optional[str], typer.Option(help="Name patterns with commas; !pattern excludes.")] = None,  # noqa: UP045
    weights: Weights = None,
    shape: Shape = None,
    out_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="Write the smaller network: a .pt2 program, or its state-dict to a .safetensors file."),
    ] = None,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    model_arg: ModelArg = None,
    trust: Trust = False,
    force: Force = False,
    key: Key = None,
) -> None:
    """Remove whole channels, so that the network is smaller and faster; print what became of its layers."""
    check_outputs({"--out": out_file}, suffixes=FILES, inputs={"--weights": weights}, replace=force)
    choices = {
        "--criterion": criterion != "relative_path_magnitude",
        "--steps": steps is not None,
        "--scope": scope is not None,
    }
    check_used(choices, "--amount", there=amount is not None)
    from pathlift.pruning.catalogue import criterion_of

    if criterion_of(criterion).needs != "nothing":
        raise InputError(f"The criterion '{criterion}' looks at data: use pathlift.prune(…, data=…, shrink=True) in Python.")
    module, sizes = built(model, weights, shape, seed, device, model_arg, trust=trust, key=key)
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
        write_outputs({out_file: _writer(smaller, sizes, out_file)}, replace=force)
    if as_json:
        pruned = {} if report is None else {"sparsity": report.sparsity, "log10_cost": number(report.log10_cost)}
        print_json({"model": model, **pruned, **shrunk.to_dict(), "out": None if out_file is None else str(out_file)})
        return
    _print(model, shrunk, report)
    if out_file is not None:
        out.print(f"written: {out_file}", markup=False, highlight=False)


def _writer(smaller: nn.Module, sizes: tuple[int, ...] | tuple[tuple[int, ...], ...], path: Path) -> Writer:
    """Return what writes the smaller network: its forward pass with its weights, for any batch, or its weights."""
    if path.suffix == ".safetensors":
        return tensor_writer(smaller.state_dict())
    import torch

    from pathlift.errors import told
    from pathlift.reading.examples import examples_of

    examples = examples_of(smaller, sizes).tensors
    batches = tuple(example.expand(2, *example.shape[1:]) for example in examples)
    free = tuple({0: torch.export.Dim.AUTO} for _ in batches)
    try:
        program = torch.export.export(smaller.eval(), batches, dynamic_shapes=free)
    except Exception as error:  # whatever the exporter raises, there is no program
        raise InputError(f"The smaller network cannot be exported as a program: {told(error)}") from error
    return lambda file: _saved(program, file)


def _saved(program: object, file: Path) -> None:
    import torch

    with file.open("wb") as opened:
        torch.export.save(program, opened)  # type: ignore[arg-type]


def _print(model: str, shrunk: ShrinkReport, report: PruneReport | None) -> None:
    table = Table(title=f"{model}: layers that lost channels", title_justify="left", box=None, padding=(0, 2))
    for header in ("layer", "channels before", "and after"):
        table.add_column(header, justify="left" if header == "layer" else "right", no_wrap=True)
    for layer in shrunk.layers:
        table.add_row(layer.name, f"{layer.before:,}", f"{layer.after:,}")
    if shrunk.layers:
        out.print(table)
    else:
        out.print(f"{model}: a path runs through every channel that could go", markup=False, highlight=False)
    for left in shrunk.left:
        numbers = f"{len(left.channels)} of weights 0"
        out.print(f"{left.name}: {numbers} stay: {left.reason}", markup=False, highlight=False)
    for title, before, after in (
        ("parameters", shrunk.parameters_before, shrunk.parameters),
        ("multiply-adds of a sample", shrunk.multiply_adds_before, shrunk.multiply_adds),
        ("bytes of the weights", shrunk.bytes_before, shrunk.bytes),
    ):
        out.print(f"{title:31} {before:,} → {after:,} ({after / before if before else 1:.1%})", highlight=False)
    if report is not None:
        out.print(f"path-norm before                {scientific(report.log10_path_norm)}")
        out.print(f"joint cost, exact path-metric   {scientific(report.log10_cost)}")
    out.print(f"path-norm                       {scientific(shrunk.log10_path_norm)}")
