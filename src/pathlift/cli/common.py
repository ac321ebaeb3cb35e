"""What all commands share: the application, its options, how models are read and results printed.

A command imports what loads PyTorch where it needs it: help, and what is refused at once, must not wait for that.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.table import Table

import pathlift
from pathlift.errors import InputError

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    help="Path-norms, path-metrics and path-magnitudes of ReLU networks.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
LARGEST = 10**12
"""An input has fewer numbers than this."""

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, soft_wrap=True)

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="torchvision:NAME, timm:NAME, hf:FOLDER, package.module:factory, or a .onnx/.pt2 file."
    ),
]
Weights = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Weights to load: .safetensors, .pt, .pth, .ckpt, .bin, an index of several, or a folder with either."),
]
Key = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--key", metavar="KEY", help="Which of several sets of weights in a file: model_ema, or generator."),
]
OtherKey = Annotated[Optional[str], typer.Option("--other-key", metavar="KEY", help="As --key, in the file OTHER.")]  # noqa: UP045
Shape = Annotated[Optional[str], typer.Option(help="Input shape without batch, e.g. 3,224,224.")]  # noqa: UP045
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Stream = Annotated[
    bool,
    typer.Option("--stream", help="Read the weights layer by layer from --weights: a file, an index, or a folder of them."),
]
ModelArg = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--model-arg", metavar="NAME=VALUE", help="Argument of what builds the model: num_classes=10. Repeatable."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Load .pt2 files, which run code of whoever wrote them.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the random initial weights when none are loaded.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, …")]


@contextlib.contextmanager
def working(on: str) -> Iterator[None]:
    """Show on a terminal what is being worked on; what a model prints meanwhile goes to stderr, stdout is for the answer."""
    with err.status(on), contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def progress_bar(*columns: str | ProgressColumn) -> Iterator[Progress]:
    """Show a progress bar on a terminal, gone afterwards; as with `working`, stdout is for the answer."""
    shown = Progress(*columns or Progress.get_default_columns(), console=err, transient=True, disable=not err.is_terminal)
    with shown, contextlib.redirect_stdout(sys.stderr):
        yield shown


def shape_of(name: str, shape: str | None) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """Read --shape, or take the shape that the model's name tells."""
    if shape is None:
        from pathlift.storage.models import default_shape

        return default_shape(name)
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
    shape: str | None,
    seed: int,
    device: str,
    model_arg: list[str] | None,
    *,
    trust: bool,
    streamed: bool = False,
    key: str | None = None,
) -> pathlift.Network:
    """Build a model by name, load its weights (or leave them on disk) and capture it."""
    if streamed:
        if weights is None:
            raise InputError("--stream reads weights from disk as they are needed: name them with --weights.")
        checkpoint = pathlift.storage.Checkpoint(weights, device, key)
        return pathlift.stream(hollow(name, shape, model_arg, trust=trust), weights=checkpoint)
    model, sizes = built(name, weights, shape, seed, device, model_arg, trust=trust, key=key)
    with working("capturing the graph"):
        return pathlift.capture(model, sizes)


def built(
    name: str,
    weights: Path | None,
    shape: str | None,
    seed: int,
    device: str,
    model_arg: list[str] | None,
    *,
    trust: bool,
    key: str | None = None,
) -> tuple[nn.Module, tuple[int, ...] | tuple[tuple[int, ...], ...]]:
    """Build a model by name and load its weights; return it with the shape of its input."""
    from pathlift.storage.models import load_model

    with working(f"building {name}"):
        model = load_model(name, weights, arguments=arguments_of(model_arg), generator=seed, trust=trust, key=key)
        sizes = shape_of(name, shape)
        try:
            return model.to(device), sizes
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def hollow(name: str, shape: str | None, model_arg: list[str] | None, *, trust: bool) -> pathlift.Network:
    """Capture a model without weights, or with random ones if it reads values while it is built."""
    with working(f"building {name}"):
        model = _without_values(name, arguments_of(model_arg), trust=trust)
        sizes = shape_of(name, shape)
    with working("capturing the graph"):
        return pathlift.capture(model, sizes)


def _without_values(name: str, arguments: dict[str, object], *, trust: bool) -> nn.Module:
    import torch

    from pathlift.storage.models import load_model

    with torch.device("meta"), contextlib.suppress(InputError):
        return load_model(name, arguments=arguments, trust=trust)
    return load_model(name, arguments=arguments, trust=trust)


def check_used(options: dict[str, bool], where: str, *, there: bool) -> None:
    """Refuse options that were given and have no effect, since what they are about is not there."""
    for option, given in options.items():
        if given and not there:
            raise InputError(f"{option} has no effect without {where}: leave it out.")


def number(value: float) -> float | str:
    """JSON has no inf and no NaN."""
    return value if math.isfinite(value) else str(value)


def print_json(values: dict[str, object]) -> None:
    """Print one JSON object; inf and NaN as strings."""
    clean = {key: number(value) if isinstance(value, float) else value for key, value in values.items()}
    typer.echo(json.dumps(clean, allow_nan=False))


def scientific(log10: float) -> str:
    """Write 10**log10 with six digits at any size."""
    if not math.isfinite(log10):
        return "0" if log10 < 0 else str(log10)
    power = math.floor(log10)
    if -4 <= power < 6:
        return f"{10**log10:.6g}"
    return f"{10 ** (log10 - power):.5f}e{power:+d}"


def print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    """Print names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    out.print(table)


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


def each_checkpoint(paths: list[Path] | None) -> list[Path]:
    """Return files and folders of weights; a folder of several is each of them."""
    if not paths:
        return []
    from pathlift.storage.checkpoints import checkpoint_paths

    return [checkpoint for path in paths for checkpoint in checkpoint_paths(path)]
