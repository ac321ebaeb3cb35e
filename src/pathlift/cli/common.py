"""What all commands share: the application, its options, how models are read and results printed.

A command imports what loads PyTorch where it needs it: help, and what is refused at once, must not wait for that.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import io
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Optional, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from typer.models import OptionInfo

import pathlift
from pathlift.cli.tables import Column, Layout, as_csv, laid_out
from pathlift.errors import InputError
from pathlift.results import plain

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pathlift.graph.calling import Samples
    from pathlift.graph.network import Network
    from pathlift.storage.programs import Shapes

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class Manner:
    """How the command that runs answers.

    Attributes:
        csv: Its table as CSV.
        quiet: Neither progress nor notes nor warnings.
        written: Whether a table was written as CSV.
        options: Its options by the names that arguments of the library have: ``input_mean`` to ``--input-mean``.
    """

    csv: bool = False
    quiet: bool = False
    written: bool = False
    options: Mapping[str, str] = field(default_factory=dict)


manner = Manner()
MODEL, ANSWER = "The model", "The answer"
"""Groups of options in the help; those of one command alone come first."""

Csv = Annotated[bool, typer.Option("--csv", help="Print the table as CSV, with all digits.", rich_help_panel=ANSWER)]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, notes or warnings.", rich_help_panel=ANSWER)]


class Commands(typer.Typer):
    """An application whose commands all have ``--csv`` and ``--quiet``."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]:
        """Register a command, as Typer's own `command` does.

        Args:
            name: As for Typer.
            options: As for Typer.

        Returns:
            The decorator.
        """
        register = super().command(name, **{"rich_help_panel": CHANGE, **options})

        def decorate(function: Function) -> Function:
            register(_answering(function))
            return function

        return decorate


def _answering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command with the options of all commands."""
    signature = inspect.signature(function, eval_str=True)
    options = {option.removeprefix("--").replace("-", "_"): option for option in _options(signature)}

    @functools.wraps(function)
    def command(*, _csv: bool, _quiet: bool, **given: Any) -> None:
        manner.options = options
        if _csv and given.get("as_json"):
            raise InputError("Give --json or --csv, found both.")
        manner.csv, manner.quiet, manner.written = _csv, _quiet, False
        out.quiet = _csv
        try:
            function(**given)
        finally:
            out.quiet = False
        if _csv and not manner.written:
            raise InputError("This answer is no table: leave out --csv, or take --json.")

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("_csv", Csv), ("_quiet", Quiet))
    ]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _options(signature: inspect.Signature) -> Iterator[str]:
    """Yield the options of a command as they are written."""
    for name, parameter in signature.parameters.items():
        for said in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(said, OptionInfo):
                yield next(iter(said.param_decls or ()), f"--{name.replace('_', '-')}")


PANELS = MEASURE, COMPARE, CHANGE = "Measure a network", "Compare networks", "Change the weights"
"""Groups of commands in the help."""


def known(*names: str) -> Callable[[str], list[str]]:
    """Return what completes one of these names in a shell."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


app = Commands(help="Path-norms, path-metrics and path-magnitudes of ReLU networks.", pretty_exceptions_enable=False)
LARGEST = 10**12
"""An input has fewer numbers than this."""

PIPED = 160
"""Columns of an answer that goes into a file or a pipe, unless COLUMNS says otherwise."""

out = Console(soft_wrap=True, highlight=False, width=10**4)
"""A line is never cut by what prints it: its parts have been laid out for `width`."""
err = Console(stderr=True, soft_wrap=True)


def seed_of(text: str) -> int:
    """Read a seed."""
    try:
        seed = int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number") from None
    if not 0 <= seed < 2**63:
        raise typer.BadParameter(f"{text[:30]} is not a whole number from 0 to 2**63 - 1")
    return seed


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="torchvision:NAME, timm:NAME, hf:FOLDER, package.module:factory, or a .onnx/.pt2 file."
    ),
]
Weights = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="Weights to load: .safetensors, .pt, .pth, .ckpt, .bin, an index of several, or a folder with either.",
        metavar="PATH",
        rich_help_panel=MODEL,
    ),
]
Key = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--key",
        metavar="KEY",
        help="Which of several sets of weights in a file: model_ema, or generator.",
        rich_help_panel=MODEL,
    ),
]
OtherKey = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--other-key", metavar="KEY", help="As --key, in the file OTHER.", rich_help_panel=MODEL),
]
Shape = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="Input shape without batch, e.g. 3,224,224. Once for each input.", metavar="SIZES", rich_help_panel=MODEL
    ),
]
InputMean = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Mean of the inputs, or with commas one for each channel.  [default: 0]", metavar="X", show_default=False
    ),
]
InputVariance = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Their variance, likewise.  [default: 1]", metavar="X", show_default=False),
]
Until = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Stop behind this module, or this value of the graph.", metavar="NAME", rich_help_panel=MODEL),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.", rich_help_panel=ANSWER)]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read the weights layer by layer from --weights: a file, an index, or a folder of them.",
        rich_help_panel=MODEL,
    ),
]
ModelArg = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--model-arg",
        metavar="NAME=VALUE",
        help="Argument of what builds the model: num_classes=10. Repeatable.",
        rich_help_panel=MODEL,
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Load .pt2 files, which run code of whoever wrote them.", rich_help_panel=MODEL)
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.", rich_help_panel=ANSWER)]
Seed = Annotated[
    int,
    typer.Option(
        parser=seed_of, metavar="N", help="Seed of the random initial weights when none are loaded.", rich_help_panel=MODEL
    ),
]
OtherSeed = Annotated[
    int, typer.Option(parser=seed_of, metavar="N", help="Seed of random weights of OTHER.", rich_help_panel=MODEL)
]
Others = Annotated[
    list[str],
    typer.Argument(
        metavar="OTHER...",
        help="Files of weights, or models by name; a folder of several files of weights is each of them.",
    ),
]
Limit = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Only the first samples of --data.  [default: 256]", metavar="N", show_default=False),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, …", metavar="DEVICE", rich_help_panel=MODEL)]
OutModel = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--out",
        metavar="FILE",
        help="Write the model: .onnx, .pt2, or its state-dict as .safetensors or .pt.",
        rich_help_panel=ANSWER,
    ),
]


@contextlib.contextmanager
def working(on: str) -> Iterator[None]:
    """Show on a terminal what is being worked on; what a model prints meanwhile goes to stderr, stdout is for the answer."""
    shown = contextlib.nullcontext() if manner.quiet else err.status(on)
    with shown, contextlib.redirect_stdout(io.StringIO() if manner.quiet else sys.stderr):
        yield


@contextlib.contextmanager
def progress_bar(*columns: str | ProgressColumn) -> Iterator[Progress]:
    """Show a progress bar on a terminal, gone afterwards; as with `working`, stdout is for the answer."""
    hidden = manner.quiet or not err.is_terminal
    shown = Progress(*columns or Progress.get_default_columns(), console=err, transient=True, disable=hidden)
    with shown, contextlib.redirect_stdout(io.StringIO() if manner.quiet else sys.stderr):
        yield shown


def shape_of(name: str, shape: Sequence[str] | None) -> Shapes:
    """Read --shape, once for each input, or take the shape that the model's name tells."""
    if not shape:
        from pathlift.storage.models import default_shape

        return default_shape(name)
    sizes = tuple(map(_sizes, shape))
    return sizes[0] if len(sizes) == 1 else sizes


def _sizes(shape: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in shape.replace("x", ",").split(","))
    except ValueError:
        raise InputError(f"--shape must be whole numbers separated by commas, found '{shape}'.") from None
    if min(sizes) < 1 or math.prod(sizes) >= LARGEST:
        raise InputError(f"--shape must be positive sizes of fewer than {LARGEST:.0e} numbers in all, found '{shape}'.")
    return sizes


def arguments_of(pairs: list[str] | None) -> dict[str, object]:
    """Read --model-arg: numbers, True, None and tuples as Python writes them, anything else as text."""
    arguments: dict[str, object] = {}
    for pair in pairs or ():
        name, sign, text = pair.partition("=")
        if not sign or not name.isidentifier():
            raise InputError(f"--model-arg must be NAME=VALUE, such as num_classes=10, found '{pair}'.")
        try:
            arguments[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[name] = text
    return arguments


def captured(
    name: str,
    weights: Path | None,
    shape: Sequence[str] | None,
    seed: int,
    device: str,
    model_arg: list[str] | None,
    *,
    trust: bool,
    streamed: bool = False,
    key: str | None = None,
    until: str | None = None,
) -> pathlift.Network:
    """Build a model by name, load its weights (or leave them on disk) and capture it."""
    if streamed:
        check_model(shape, model_arg, device)
        if weights is None:
            raise InputError("--stream reads weights from disk as they are needed: name them with --weights.")
        checkpoint = pathlift.storage.Checkpoint(weights, device, key)
        return pathlift.stream(hollow(name, shape, model_arg, trust=trust, until=until), weights=checkpoint)
    model, sizes = built(name, weights, shape, seed, device, model_arg, trust=trust, key=key)
    with working("capturing the graph"):
        return pathlift.capture(model, sizes, until)


def built(
    name: str,
    weights: Path | None,
    shape: Sequence[str] | None,
    seed: int,
    device: str,
    model_arg: list[str] | None,
    *,
    trust: bool,
    key: str | None = None,
) -> tuple[nn.Module, Shapes]:
    """Build a model by name with its weights, on a device; also return its input shape."""
    check_model(shape, model_arg, device)
    check_used({"--key": key is not None}, "--weights", there=weights is not None or name.startswith("hf:"))
    checkpoint = None if weights is None else pathlift.storage.Checkpoint(weights, key=key)  # is it there, and whole?
    from pathlift.storage.models import load_model

    with working(f"building {name}"):
        own = key if checkpoint is None else None
        model = load_model(name, checkpoint, arguments=arguments_of(model_arg), generator=seed, trust=trust, key=own)
        return model.to(device), shape_of(name, shape)


def check_model(shape: Sequence[str] | None, model_arg: list[str] | None, device: str = "cpu") -> None:
    """Refuse what is said of a model before it is built."""
    for sizes in shape or ():
        _sizes(sizes)
    arguments_of(model_arg)
    if device != "cpu":
        check_options("captured_on", device=device)


SYNTHETIC = "synthetic"
"""Names inputs that are made from the model's batch norms, where --data takes that."""

MADE = 32
"""At most so many of them."""

SAMPLES = 256
"""Samples of --data that are read where --limit does not say how many."""


def check_data(name: str | None, limit: int | None, *, synthetic: bool = False) -> int:
    """Refuse --data and --limit before a model is built; return how many samples are read where none or fewer are named."""
    check_used({"--limit": limit is not None}, "--data", there=name is not None)
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1 sample, found {limit}.")
    if name is not None:
        from pathlift.storage.data import check_name

        check_name(name, *((SYNTHETIC,) if synthetic else ()))
    return SAMPLES if limit is None else limit


def inputs_of(network: Network, name: str, limit: int, declared: DeclaredInputs, seed: int) -> list[Samples]:
    """Return the inputs that --data names, in batches: those of a file or a package, or made from batch norms."""
    if name != SYNTHETIC:
        from pathlift.storage.data import load_data

        x, _ = load_data(name, network.graph.examples[0][0][1:], limit)
        return [x.to(network.graph.examples[0][1])]
    with progress_bar() as bar:
        task = bar.add_task("making inputs", total=None)
        return pathlift.synthetic_inputs(
            network,
            count=min(limit, MADE),
            input_mean=declared.mean,
            input_variance=declared.variance,
            generator=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def check_options(function: str, **given: object) -> None:
    """Refuse values before a model is built for them, in the words in which the function would.

    Args:
        function: Name of the function of the library that takes them.
        given: Its arguments by name, which the options have, too; those that are None are left to their defaults.

    Raises:
        InputError: One is not what it may be.
    """
    for name, value in given.items():
        if value is not None:
            check_option(f"--{name.replace('_', '-')}", value, function, name)


def check_option(option: str, value: object, function: str, name: str) -> None:
    """Refuse a value as `check_options` does, of an option that is called otherwise than the argument.

    Args:
        option: As it is written.
        value: What it says.
        function: Name of the function of the library that takes it.
        name: Of the argument.

    Raises:
        InputError: It is not what it may be.
    """
    import pathlift.public  # noqa: F401 - every room declares its arguments
    from pathlift.arguments.registry import kind_of

    kind_of(function, name, may_be_none=False)(option, value)


def hollow(
    name: str, shape: Sequence[str] | None, model_arg: list[str] | None, *, trust: bool, until: str | None = None
) -> pathlift.Network:
    """Capture a model without weights, or with random ones if it reads values while it is built."""
    check_model(shape, model_arg)
    with working(f"building {name}"):
        model = _without_values(name, arguments_of(model_arg), trust=trust)
        sizes = shape_of(name, shape)
    with working("capturing the graph"):
        return pathlift.capture(model, sizes, until)


def _without_values(name: str, arguments: dict[str, object], *, trust: bool) -> nn.Module:
    import torch

    from pathlift.storage.models import load_model

    with torch.device("meta"), contextlib.suppress(InputError):
        return load_model(name, arguments=arguments, trust=trust)
    return load_model(name, arguments=arguments, trust=trust)


class DeclaredInputs(NamedTuple):
    """What inputs were said to look like, as the functions of the library take it.

    Attributes:
        mean: Their mean: a number, or one for each channel.
        variance: Their variance, likewise.
        options: The options that were given.
    """

    mean: float | Tensor
    variance: float | Tensor
    options: tuple[str, ...]


def declared_inputs(function: str, mean: str | None, variance: str | None) -> DeclaredInputs:
    """Read what inputs were said to look like.

    Args:
        function: Name of the function of the library that takes it.
        mean: A number, or with commas one for each channel; None: not said.
        variance: Likewise.

    Returns:
        What was said; 0 and 1 for what was not.

    Raises:
        InputError: One is no number, not finite, or a negative variance.
    """
    given = {"--input-mean": mean, "--input-variance": variance}
    declared = DeclaredInputs(
        _numbers("--input-mean", mean, 0.0),
        _numbers("--input-variance", variance, 1.0),
        tuple(option for option, value in given.items() if value is not None),
    )
    check_options(function, input_mean=declared.mean, input_variance=declared.variance)
    return declared


def _numbers(option: str, given: str | None, default: float) -> float | Tensor:
    """Read a number, or several with commas."""
    import torch

    if given is None:
        return default
    try:
        numbers = [float(part) for part in given.split(",")]
    except ValueError as error:
        raise InputError(f"{option} is '{given[:100]}': give a number, or numbers with commas.") from error
    return numbers[0] if len(numbers) == 1 else torch.tensor(numbers, dtype=torch.float64)


def check_unmeasured(declared: DeclaredInputs, data: str | None) -> None:
    """Refuse to be told what inputs look like where that is measured."""
    if declared.options and data is not None:
        raise InputError(f"{declared.options[0]} has no effect with --data, on which inputs are measured: leave it out.")


def check_used(options: dict[str, bool], where: str, *, there: bool) -> None:
    """Refuse options that were given and have no effect, since what they are about is not there."""
    for option, given in options.items():
        if given and not there:
            raise InputError(f"{option} has no effect without {where}: give {where}, or leave it out.")


def print_json(values: dict[str, object]) -> None:
    """Print one JSON object; inf and NaN as strings."""
    typer.echo(json.dumps(plain(values), allow_nan=False))


def scientific(log10: float) -> str:
    """Write 10**log10 with six digits at any size."""
    if not math.isfinite(log10):
        return "0" if log10 < 0 else str(log10)
    power = math.floor(log10)
    if -4 <= power < 6:
        return f"{10**log10:.6g}"
    return f"{10 ** (log10 - power):.5f}e{power:+d}"


def titled(model: str, weights: Path | None) -> str:
    """Name a network that is printed about, and where its weights come from if not from a file: a factory may load its own."""
    library, colon, _ = model.partition(":")
    if weights is not None or not colon or library == "hf":
        return model
    return f"{model} ({'random initial weights' if library in {'torchvision', 'timm'} else 'as it is built'})"


def print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    """Print names and values."""
    if manner.csv:
        print_table(title, (Column("quantity"), Column("value")), [(name.strip(), value) for name, value in rows])
    else:
        print_table(title, (Column("", kind="words"), Column("", kind="words")), rows, style="bold")


def print_table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[Any]], style: str = "") -> None:
    """Print a table for people, as wide as the terminal and never with a cut number, or as CSV.

    Args:
        title: Stands above it.
        columns: Its columns.
        rows: Values.
        style: Of the first column.
    """
    if manner.csv:
        manner.written = True
        typer.echo(as_csv(columns, rows), nl=False)
        return
    cells = [[column.shown(value) for column, value in zip(columns, row, strict=True)] for row in rows]
    out.print(title, style="italic", markup=False)
    layout = laid_out(columns, cells, width())
    print_header(layout)
    for row in cells:
        print_cells(layout, row, style)


def print_header(layout: Layout) -> None:
    """Print the headers of a table whose rows follow one by one."""
    for line in layout.header():
        out.print(line)


def print_cells(layout: Layout, cells: Sequence[str], style: str = "") -> None:
    """Print one row of a table."""
    for line in layout.row(cells, style):
        out.print(line)


def width() -> int:
    """Return how many columns there are to print in."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    return os.get_terminal_size(sys.stdout.fileno()).columns or PIPED if out.is_terminal else PIPED


QUOTE = "'"


def for_shell(message: str) -> str:
    """Return a message of the library with the names that its arguments have as options of the command that runs.

    Args:
        message: As the library words it: ``correlation must be …``, ``use moments=0``, ``until has no effect beside …``.

    Returns:
        The message with ``--correlation``, ``--moments 0``, ``--until``. What is said of Python stays.
    """
    options = manner.options
    if not options:
        return message
    names = "|".join(sorted(options, key=len, reverse=True))
    message = re.sub(
        rf"(?<!in Python )(?<![\w.\-/'])({names})=('[^']*'|[\w.]*)(?![\w(])",
        lambda match: f"{options[match[1]]} {shlex.quote(match[2].strip(QUOTE)) if match[2] else ''}".rstrip(),
        message,
    )
    for place in (
        rf"(?:^|(?<=[.;:] )|(?<=^an item of ))({names})(?=(?:\[\d+\])? (?:must|has|names|needs|holds|takes)\b)",
        rf"(?<=\bhas no effect beside )({names})(?=:)",
        rf"(?<=\bhas no effect without )({names})(?=:)",
    ):
        message = re.sub(place, lambda match: options[match[1]], message)
    return message


def second_network(
    name: str, seed: int, model_arg: list[str] | None, *, trust: bool, key: str | None = None
) -> nn.Module | pathlift.storage.Checkpoint:
    """Read what a command compares with: a file or folder of weights, or a model by name."""
    from pathlift.storage.checkpoints import WEIGHTS
    from pathlift.storage.models import load_model

    suffix = Path(name).suffix.lower()
    if suffix in WEIGHTS or (os.path.exists(name) and suffix not in {".onnx", ".pt2"}):
        return pathlift.storage.Checkpoint(name, key=key)
    check_used({"--other-key": key is not None}, "a file OTHER", there=False)
    return load_model(name, arguments=arguments_of(model_arg), generator=seed, trust=trust)


def each_other(names: list[str]) -> list[str]:
    """Return what a command compares with, one by one; a folder of several files of weights is each of them."""
    from pathlift.storage.checkpoints import checkpoint_paths

    return [other for name in names for other in (map(str, checkpoint_paths(Path(name))) if os.path.isdir(name) else (name,))]


def each_checkpoint(paths: list[Path] | None) -> list[Path]:
    """Return files and folders of weights; a folder of several is each of them."""
    if not paths:
        return []
    from pathlift.storage.checkpoints import checkpoint_paths

    return [checkpoint for path in paths for checkpoint in checkpoint_paths(path)]
