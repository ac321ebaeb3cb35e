"""The entry point and the commands ``norm``, ``metric``, ``score``, ``certify``, ``support``: call one function, print."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional, TextIO

import typer

import pathlift
from pathlift.cli import compare, experiment, pruning, quantisation, report, rescaling, shrink, statistics, study  # noqa: F401 - register their commands
from pathlift.cli.common import (
    ANSWER,
    MEASURE,
    MODEL,
    PANELS,
    Device,
    Force,
    Json,
    Key,
    ModelArg,
    ModelName,
    Seed,
    Shape,
    Stream,
    Trust,
    Until,
    Weights,
    app,
    arguments_of,
    captured,
    check_data,
    check_model,
    check_option,
    check_options,
    check_used,
    each_checkpoint,
    err,
    for_shell,
    hollow,
    known,
    manner,
    out,
    print_json,
    print_rows,
    print_table,
    progress_bar,
    scientific,
    shape_of,
    titled,
    working,
)
from pathlift.cli.tables import Column
from pathlift.errors import InputError, PathliftError, PathliftWarning, grouped
from pathlift.output import TENSORS, check_outputs, tensor_writer, write_outputs

if TYPE_CHECKING:
    from torch import Tensor

PER, RANKINGS = known("channel", "tensor"), known("path_magnitude", "magnitude")

UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
"""Why the answer may not get to where it goes: a full disk, a pipe that is closed."""

UsageError: type[typer.BadParameter] = typer.BadParameter.__bases__[0]
"""What typer raises for any option that is not there or does not fit; it has no public name for it."""


def main() -> None:
    """Run the command line: exit status 2 and one sentence on bad input."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=PathliftWarning)
    warnings.showwarning = _warn
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        with noted():
            status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
            sys.stdout.flush()
            sys.exit(status)
    except PathliftError as error:
        _refuse(for_shell(str(error)))
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "pathlift"
        message = error.format_message().replace(": Value error, ", ": ")  # as typer has it from pydantic
        _refuse(f"{message.rstrip('.')}. See {command} --help.")
    except (KeyboardInterrupt, typer.Abort):
        err.print("pathlift: interrupted", style="red")
        sys.exit(130)
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITTEN:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left cannot be written either
        if error.errno == errno.EPIPE:  # nobody reads it any more
            sys.exit(1)
        _refuse(f"The answer cannot be written: {error.strerror}.")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        from pathlift.errors import one_line

        _refuse(f"There is not enough memory for this: {one_line(error)}")


class _Notes(logging.Handler):
    """Prints what the library notes, each thing once: under which names the weights of a file were taken, say."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        note = for_shell(" ".join(record.getMessage().split()))
        if note not in self.printed and not manner.quiet:
            self.printed.add(note)
            err.print(f"pathlift: {note}", style="dim", markup=False, highlight=False)


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Print the notes of the library while a command runs."""
    logger, notes = logging.getLogger("pathlift"), _Notes()
    level = logger.level
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)


def _refuse(sentence: str) -> NoReturn:
    shortened = re.sub(r"\S{300,}", lambda long: f"{long[0][:100]}…", sentence)  # what was written may be a whole file
    err.print(f"pathlift: {shortened}", style="red", markup=False, highlight=False)
    sys.exit(2)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,  # noqa: ARG001 - as `warnings.showwarning` is called
    lineno: int,  # noqa: ARG001
    file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    """Print a warning of pathlift's own as one line; those of other packages say nothing to the user of a command."""
    if issubclass(category, PathliftWarning) and not manner.quiet:
        err.print(f"pathlift: {for_shell(' '.join(str(message).split()))}", style="yellow", markup=False, highlight=False)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"pathlift {pathlift.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Path-norms, path-metrics and path-magnitudes of ReLU networks."""


@app.command(rich_help_panel=MEASURE)
def norm(
    model: ModelName,
    weights: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            help="Weights to load, as for all commands. Several, or a folder of several: the path-norm of each.",
            metavar="PATH",
            rich_help_panel=MODEL,
        ),
    ] = None,
    shape: Shape = None,
    q: Annotated[float, typer.Option(help="Order of the norm, 1 to inf.", metavar="Q")] = 1.0,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    streamed: Stream = False,
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
    key: Key = None,
) -> None:
    """Path-norm of a network, or of each of many checkpoints."""
    check_options("path_norm", q=q)
    paths = each_checkpoint(weights)
    if len(paths) > 1:
        if streamed:
            network = hollow(model, shape, model_arg, trust=trust, until=until)
        else:
            network = captured(model, None, shape, seed, device, model_arg, trust=trust, until=until)
        _norms(network, model, paths, key, q, as_json=as_json)
        return
    only = paths[0] if paths else None
    network = captured(model, only, shape, seed, device, model_arg, trust=trust, streamed=streamed, key=key, until=until)
    _norm(network, model, only, q, as_json=as_json)


def _norms(network: pathlift.Network, model: str, paths: list[Path], key: str | None, q: float, *, as_json: bool) -> None:
    norms = pathlift.path_norms(network, (pathlift.storage.Checkpoint(path, network.host, key) for path in paths), q=q)
    with progress_bar() as bar:
        values = [norm.log10 for norm in bar.track(norms, len(paths), description="path-norms")]
    if as_json:
        rows = [{"weights": str(path), "log10": value} for path, value in zip(paths, values, strict=True)]
        print_json({"model": model, "q": q, "checkpoints": rows})
        return
    columns = (Column("weights", kind="name"), LOGARITHM, Column("log10", "{:.6f}".format))
    rows_ = [(str(path), value, value) for path, value in zip(paths, values, strict=True)]
    print_table(f"{model}: path-norms (q = {q:g})", columns, rows_)


LOGARITHM = Column("path-norm", scientific, raw=scientific)
"""A number that is kept as its logarithm."""


def _norm(network: pathlift.Network, model: str, weights: Path | None, q: float, *, as_json: bool) -> None:
    with working("computing the path-norm"):
        norm = pathlift.path_norm(network, q=q)
        parts = {"log10_input_part": norm.log10_input_part, "log10_bias_part": norm.log10_bias_part}
    if as_json:
        print_json({
            "model": model,
            "q": q,
            "value": norm.value,
            "log10": norm.log10,
            **parts,
            "outputs": norm.per_output.numel(),
            "left_off": list(norm.left_off),
            "weights": None if weights is None else str(weights),
        })
        return
    per_output = norm.per_output.reshape(-1)
    largest = int(per_output.argmax())
    rows = [
        (f"path-norm (q = {q:g})", scientific(norm.log10)),
        ("  from inputs", scientific(parts["log10_input_part"])),
        ("  from biases", scientific(parts["log10_bias_part"])),
        ("log10", f"{norm.log10:.6f}"),
        ("output neurons", str(per_output.numel())),
        ("largest output", f"{largest} ({scientific(_log10(per_output[largest]) + norm.log10_scale)})"),
    ]
    rows += [("left off at the end", f"{', '.join(norm.left_off)}: the norm is that of the logits")] if norm.left_off else []
    print_rows(titled(model, weights), rows)


def _log10(value: Tensor) -> float:
    return math.log10(float(value)) if float(value) > 0 else -math.inf


@app.command(rich_help_panel=MEASURE)
def certify(
    model: ModelName,
    data: Annotated[
        str, typer.Option(help="digits, fashion-mnist, or a .safetensors/.pt file with 'x' (and 'y').", metavar="DATA")
    ],
    weights: Weights = None,
    shape: Shape = None,
    bits: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Any rounding of the weights to this many bits.", metavar="N"),
    ] = None,
    per: Annotated[
        str, typer.Option(help="One grid per output channel, or per tensor.", metavar="NAME", autocompletion=PER)
    ] = "channel",
    step: Annotated[float, typer.Option(help="0.5: to the nearest point of the grid; 1: up or down.", metavar="X")] = 0.5,
    relative: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Any relative change of each weight up to this.", metavar="X"),
    ] = None,
    absolute: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Any change of each weight up to this.", metavar="X"),
    ] = None,
    prune: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Any pruning among this lowest share of weights.", metavar="X"),
    ] = None,
    criterion: Annotated[
        str,
        typer.Option(help="Ranking for --prune: path_magnitude or magnitude.", metavar="NAME", autocompletion=RANKINGS),
    ] = "path_magnitude",
    other: Annotated[Optional[Path], typer.Option(help="One other file of weights.", metavar="PATH")] = None,  # noqa: UP045
    other_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="KEY", help="As --key, in the file --other."),
    ] = None,
    radius: Annotated[float, typer.Option(help="Any change of each input element up to this.", metavar="X")] = 0.0,
    splits: Annotated[
        int, typer.Option(help="Cut the set of a sample at kinks so many times where that may decide it.", metavar="N")
    ] = 0,
    seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Stop after so long with the bounds so far.", metavar="X"),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="Only the first samples.", metavar="N")] = None,  # noqa: UP045
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
    key: Key = None,
) -> None:
    """Share of inputs whose class provably stays for a set of networks and inputs; for neither, under the model's rounding."""
    from pathlift.storage.data import load_data

    check_used({"--per": per != "channel", "--step": step != 0.5}, "--bits", there=bits is not None)
    check_used({"--criterion": criterion != "path_magnitude"}, "--prune", there=prune is not None)
    check_used({"--other-key": other_key is not None}, "--other", there=other is not None)
    chosen: dict[str, pathlift.certification.Tolerance | pathlift.storage.Checkpoint] = {}
    if bits is not None:
        chosen["--bits"] = pathlift.Rounding(bits, per=per, step=step)  # type: ignore[arg-type]
    for option, share in {"--relative": relative, "--absolute": absolute}.items():
        if share is not None:
            check_option(option, share, option.removeprefix("--").capitalize(), "r")
    if prune is not None:
        check_option("--prune", prune, "Pruned", "amount")
    if relative is not None:
        chosen["--relative"] = pathlift.Relative(relative)
    if absolute is not None:
        chosen["--absolute"] = pathlift.Absolute(absolute)
    if prune is not None:
        chosen["--prune"] = pathlift.Pruned(prune, criterion)  # type: ignore[arg-type]
    if other is not None:
        chosen["--other"] = pathlift.storage.Checkpoint(other, key=other_key)
    if len(chosen) > 1:
        raise InputError(f"Give one set of networks, found {' and '.join(chosen)}.")
    check_options("certify", radius=radius, splits=splits, seconds=seconds)
    check_data(data, limit)
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, key=key, until=until)
    x, y = load_data(data, network.graph.examples[0][0][1:], limit)
    x = x.to(network.graph.examples[0][1])
    with progress_bar() as progress:
        task = progress.add_task("certifying", total=len(x))
        certificate = pathlift.certify(
            network,
            x,
            next(iter(chosen.values()), None),
            radius,
            splits=splits,
            seconds=seconds,
            progress=lambda done: progress.advance(task, done),
        )
    accuracy = None if y is None else float((certificate.predicted.cpu() == y).double().mean())
    if as_json:
        print_json({
            "model": model,
            "covers": certificate.covers,
            "samples": len(x),
            "share": certificate.share,
            "accuracy": accuracy,
            "certified": certificate.certified.tolist(),
            "predicted": certificate.predicted.tolist(),
            "margin": certificate.margin.tolist(),
            "bound": certificate.bound,
            "stopped": certificate.stopped.tolist(),
            "difference": certificate.difference,
            "found": certificate.found,
        })
        return
    rows = [("samples", f"{len(x):,}")]
    rows += [] if accuracy is None else [("accuracy of the model", f"{accuracy:.2%}")]
    rows += [("certified: the class cannot change", f"{certificate.share:.2%}")]
    if y is not None:
        right = (certificate.certified.cpu() & (certificate.predicted.cpu() == y)).double().mean()
        rows += [("certified and right", f"{float(right):.2%}")]
    rows += [
        ("median margin", f"{float(certificate.margin.median()):.4g}"),
        ("median bound", f"{float(certificate.bound.median()):.4g}"),
    ]
    if certificate.difference is not None:
        rows += [("median difference of the lead", f"{float(certificate.difference.median()):.4g}")]
    if certificate.found is not None:
        rows += [("attacked: another class is known", f"{float((certificate.found < 0).double().mean()):.2%}")]
    stopped = int(certificate.stopped.sum())
    rows += [("not done when the time was up", f"{stopped:,}")] if stopped else []
    print_rows(titled(model, weights), rows)
    covers = certificate.covers if other is None else f"{other}: {certificate.covers}"
    out.print(f"covers {covers}", markup=False)


@app.command(rich_help_panel=MEASURE)
def score(
    model: ModelName,
    weights: Weights = None,
    shape: Shape = None,
    out_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--out",
            help="Write the scores to a .safetensors file, or with --stream to a new folder of them.",
            metavar="FILE",
            rich_help_panel=ANSWER,
        ),
    ] = None,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    streamed: Stream = False,
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
    force: Force = False,
    key: Key = None,
) -> None:
    """Path-magnitude of every weight: its share of the path-norm."""
    suffixes = () if streamed else TENSORS
    check_outputs({"--out": out_file}, suffixes=suffixes, inputs={"--weights": weights}, replace=force)
    network = captured(model, weights, shape, seed, device, model_arg, trust=trust, streamed=streamed, key=key, until=until)
    with working("scoring all weights"):
        scores = pathlift.path_magnitude(network, out=out_file if streamed else None)
    if out_file is not None and not streamed:
        write_outputs({out_file: tensor_writer(scores)}, replace=force)
    if as_json:
        print_json({
            "model": model,
            "log10_path_norm": scores.log10_path_norm,
            "out": None if out_file is None else str(out_file),
            "tensors": {
                name: {"share": float(s.sum()), "max": float(s.max()), "weights": s.numel()} for name, s in scores.items()
            },
        })
        return
    columns = (
        Column("tensor", kind="name"),
        Column("weights", "{:,}".format),
        Column("share of all paths", "{:.4f}".format),
        Column("largest", "{:.2e}".format),
        Column("median", "{:.2e}".format),
    )
    rows = [
        (name, tensor.numel(), float(tensor.sum()), float(tensor.max()), float(tensor.reshape(-1).median()))
        for name, tensor in scores.items()
    ]
    print_table(titled(model, weights), columns, rows)
    out.print(f"path-norm {scientific(scores.log10_path_norm)}" + (f", scores written to {out_file}" if out_file else ""))


@app.command(rich_help_panel=MEASURE)
def support(
    model: ModelName,
    shape: Shape = None,
    as_json: Json = False,
    until: Until = None,
    model_arg: ModelArg = None,
    trust: Trust = False,
) -> None:
    """Tell whether a model lies inside the theory; list every operator that does not. Exit status 1 if unsupported."""
    check_model(shape, model_arg)
    from pathlift.storage.models import load_model

    with working(f"looking at {model}"):
        built = load_model(model, arguments=arguments_of(model_arg), trust=trust)
        report = pathlift.check_support(built, shape_of(model, shape), until)
    if as_json:
        problems = [
            {"module": p.module, "op": p.op, "where": p.where, "reason": p.reason, "advice": for_shell(p.advice)}
            for p in report.problems
        ]
        print_json({
            "model": model,
            "supported": report.supported,
            "operators": report.operators,
            "left_off": list(report.left_off),
            "problems": problems,
        })
    elif manner.csv:
        columns = tuple(Column(name) for name in ("module", "op", "where", "reason", "advice"))
        print_table(model, columns, [(p.module, p.op, p.where, p.reason, for_shell(p.advice)) for p in report.problems])
    elif report.supported:
        out.print(f"{model}: {report}", markup=False)
    else:
        count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        out.print(f"{model}: not supported, {count}", style="bold", markup=False)
        for same in grouped(report.problems):
            first = same[0]
            out.print(f"\n{first.op}, {len(same)} ×. {first.reason}\n{for_shell(first.advice)}", markup=False)
            for p in same:
                line = f" ({p.where.rsplit('/', 1)[-1]})" if p.where else ""
                out.print(f"  {p.module or 'the model itself'}{line}", markup=False)
    raise typer.Exit(0 if report.supported else 1)


app.registered_commands.sort(key=lambda command: PANELS.index(str(command.rich_help_panel)))

__all__ = ["app", "main"]
