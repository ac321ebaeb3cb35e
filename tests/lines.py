"""Bad command lines: every option of every command with values that it cannot have, and how the command ends.

`LINES` has one right line of each command; `FAIR` says which of the values an option may be answered for. Everything else must
end with exit status 2 and one sentence.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors.torch import save_file
from torch import nn

from pathlift.cli import common
from pathlift.cli.app import app, main

MODEL = ("torch.nn:Linear", "--model-arg", "in_features=4", "--model-arg", "out_features=3", "--shape", "4")

LINES: dict[str, tuple[str, ...]] = {
    "norm": MODEL,
    "metric": (MODEL[0], "torch.nn:Linear", *MODEL[1:]),
    "compare": ("weights.safetensors", "other.safetensors", "--model", *MODEL),
    "prune": (*MODEL, "--amount", "0.5", "--criterion", "wanda", "--data", "data.safetensors"),
    "quantize": (*MODEL, "--bits", "4"),
    "bits": MODEL,
    "shrink": MODEL,
    "rescale": (*MODEL, "--to", "random"),
    "equivalent": (MODEL[0], "other.safetensors", *MODEL[1:]),
    "certify": (*MODEL, "--data", "data.safetensors", "--bits", "8"),
    "score": MODEL,
    "statistics": MODEL,
    "report": (*MODEL, "--bits", "none", "--prune", "none"),
    "study": ("zoo.yaml",),
    "support": MODEL,
    "experiment lottery": ("--data", "digits", "--out", "results", "--jobs", "0"),  # nothing is trained here
}
"""The arguments of a right line of each command; the last is refused for its --jobs when nothing else is wrong."""

ANSWERED = set(LINES) - {"experiment lottery"}

VALUES = (
    "", " ", "nonsense", "nan", "inf", "-inf", "-1", "0", "1", "2", "0.5", "1.5", "1e400", "1e-400", "9" * 30,
    "9" * 5000, "1,2", "1,x", "a=b", "=", "in_features", "in_features=-1", "in_features=1e9", "out_features=(",
    "True", "None", "missing.safetensors", "missing.pt", "missing.onnx", "missing.pt2", "/", ".", "/dev/null",
    "empty.safetensors", "empty.pt", "garbage.safetensors", "garbage.pt", "garbage.onnx", "garbage.pt2",
    "long.safetensors", "text.pt", "weights.safetensors", "other.safetensors", "data.safetensors", "x" * 5000, "ünï",
    "-", "a\0b", "cuda:99", "meta", "torchvision:nonsense", "timm:nonsense", "os:getcwd", "math:pi",
    "no.such.module:f", "torch.nn:Softmax", "4,4", "4x4x4x4x4x4x4", "0,4", "new.safetensors",
    "no/such/folder.safetensors",
)  # fmt: skip


def files(folder: Path) -> None:
    """Write the files that the lines name."""
    torch.manual_seed(0)
    save_file(nn.Linear(4, 3).state_dict(), folder / "weights.safetensors")
    save_file(nn.Linear(4, 3).state_dict(), folder / "other.safetensors")
    save_file({"x": torch.randn(6, 4), "y": torch.tensor([0, 1, 2, 0, 1, 2])}, folder / "data.safetensors")
    for name in ("empty.safetensors", "empty.pt"):
        (folder / name).write_bytes(b"")
    garbage = bytes((7 * number * number + 3) % 256 for number in range(5000))
    for name in ("garbage.safetensors", "garbage.pt", "garbage.onnx", "garbage.pt2"):
        (folder / name).write_bytes(garbage)
    (folder / "long.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    (folder / "zoo.yaml").write_text("functions: [path_norm]\nmodels: [{model: 'torch.nn:Softmax', shape: [4]}]\n")
    (folder / "text.pt").write_text("these are no weights\n")


def _number(low: float, high: float = math.inf, *, integer: bool = False, end: bool = False) -> Callable[[str], bool]:
    def good(value: str) -> bool:
        try:
            number = int(value) if integer else float(value)
        except ValueError:
            return False
        return low <= number < high or (end and number == high)

    return good


def _one_of(*values: str) -> Callable[[str], bool]:
    return lambda value: value in values


def _new_folder(value: str) -> bool:
    return "\0" not in value and len(value) < 200 and value not in {"", " ", ".", "/", "-"} and not Path(value).is_file()


SEED = _number(0, 2**63, integer=True)
SIZE = _number(1, 2**31, integer=True)
WEIGHTS = _one_of("weights.safetensors", "other.safetensors")

FAIR: dict[str, Callable[[str], bool]] = {
    "model": _one_of("torch.nn:Softmax"),  # which is a network of nothing that is left off, where it is answered at all
    "other": WEIGHTS,
    "checkpoints": WEIGHTS,
    "--weights": WEIGHTS,
    "--shape": _one_of("4", "4,4", "2,4", "4x4x4x4x4x4x4"),
    "--q": lambda value: value == "inf" or _number(1, 1001)(value),
    "metric --q": _one_of("1", "2"),
    "--moments": _one_of("0", "2"),
    "--tighten": SEED,
    "--ratio": _number(1, end=True),
    "--seconds": _number(1e-300, end=True),
    "--estimate": _one_of("0", "2"),
    "--seed": _number(-(2**63), 2**63, integer=True),
    "equivalent --other-seed": _number(-math.inf, integer=True),  # the other is a file
    "--other-seed": _number(-(2**63), 2**63, integer=True),
    "--device": _one_of("cpu"),
    "--model-arg": _one_of(),
    "--plot": _one_of(),
    "--amount": _number(0, 1),
    "--criterion": _one_of(),
    "--selection": _one_of(),
    "--steps": _number(1, 2**63, integer=True),
    "--update": _one_of("none", "compensate"),
    "--scope": _one_of(),
    "--data": _one_of("data.safetensors"),
    "--limit": _number(1, integer=True),
    "--correlation": _number(0, 1, end=True),
    "--out": _one_of("new.safetensors", "missing.safetensors"),
    "--masks": _one_of("new.safetensors", "missing.safetensors"),
    "--to": _one_of(),
    "--choices": lambda value: all(map(_number(5e-324, 1e300), value.split(","))),
    "--sigma": _number(0, 1e300),
    "--p": _one_of("2"),  # without --to balanced
    "--tolerance": _number(0),
    "--bits": _number(2, 65, integer=True),
    "quantize --bits": _one_of("2"),
    "--ends": _one_of("2"),
    "--granularity": _one_of("1", "2"),
    "--budget": _one_of("2", "9" * 30),
    "--onnx": _one_of("missing.onnx"),
    "--per": _one_of(),
    "--step": _number(0, 1e308),
    "--relative": _one_of(),  # beside --bits
    "--absolute": _one_of(),
    "--prune": _one_of(),
    "--radius": _number(0, 1e308),
    "--other": _one_of(),
    "report --other": WEIGHTS,
    "report --out": _one_of(),
    "report --prune": lambda value: value == "none" or all(map(_number(0, 1), value.split(","))),
    "report --bits": _one_of("2"),
    "report --estimate": _one_of("0", "2"),
    "--name": _one_of(),
    "study --out": _new_folder,
    "study --jobs": _number(1, integer=True),
}


def _says_an_argument(command: str, sentence: str) -> bool:
    """Whether a sentence calls an option as Python calls its argument: ``input_mean`` for ``--input-mean``."""
    options = [option[2:] for parameter in commands().get(command, ()) for option in parameter.opts if option[:2] == "--"]
    names = "|".join(option.replace("-", "_") for option in options)
    said = rf"(?:^pathlift: |^pathlift: an item of |[;:] )(?:{names})\b[\[\]\d]* (?:must|has)"
    return bool(names) and re.search(said, sentence) is not None


@dataclass(frozen=True)
class End:
    """How a command line ended: ``refused``, ``answered``, ``wrong``, ``traceback`` or ``mute`` (no sentence, or several)."""

    line: str
    how: str
    text: str


def commands() -> dict[str, list[Any]]:
    """Return the parameters of every command, by its name."""
    parameters_of: dict[str, list[Any]] = {}

    def walk(group: Any, path: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, (*path, name))
            else:
                parameters_of[" ".join((*path, name))] = command.params

    walk(typer.main.get_command(app), ())
    return parameters_of


def tries() -> Iterator[tuple[str, str, list[str], str]]:
    """Return command, option, the whole line and the value, for each option of each command and each value."""
    for command, parameters in commands().items():
        for index, parameter in enumerate(parameter for parameter in parameters if parameter.param_type_name == "argument"):
            for value in VALUES:
                line = list(LINES[command])
                line[index] = value
                yield command, parameter.name, [*command.split(), *line], value
        for parameter in parameters:
            if parameter.param_type_name != "argument":
                for value in VALUES if not parameter.is_flag else ("1", "nonsense", ""):
                    word = [f"{parameter.opts[0]}={value}"]
                    line = list(LINES[command])
                    if parameter.opts[0] in line and parameter.opts[0] != "--model-arg":
                        index = line.index(parameter.opts[0])
                        line[index : index + 2] = []
                    yield command, parameter.opts[0], [*command.split(), *line, *word], value


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Put back what `main` sets for its process."""
    level, shown, argv = logging.getLogger("torch").level, warnings.showwarning, sys.argv
    with warnings.catch_warnings():
        try:
            yield
        finally:
            logging.getLogger("torch").setLevel(level)
            warnings.showwarning, sys.argv = shown, argv


def ended(command: str, option: str, line: list[str], value: str) -> End:
    """Run a command line in this process."""
    said = io.StringIO()
    shown = " ".join(word if len(word) < 60 else word[:60] + "…" for word in line)
    with _as_before(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        sys.argv = ["pathlift", *line]
        before, common.err._file = common.err._file, said  # the property `file` gives what stands for None
        outer, common.out._file = common.out._file, io.StringIO()
        try:
            main()
            status: object = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException as error:
            return End(shown, "traceback", f"{type(error).__name__}: {str(error)[:200]}")
        finally:
            common.err._file, common.out._file = before, outer
    sentences = [row for row in said.getvalue().splitlines() if row.strip()]
    if status == 2:
        good = sentences and sentences[0].startswith("pathlift: ") and len("".join(sentences)) < 1500
        good = good and not _says_an_argument(command, sentences[0])
        return End(shown, "refused" if good else "mute", "\n".join(sentences)[:300])
    test = FAIR.get(f"{command} {option}", FAIR.get(option))
    allowed = status in {0, 1} and test is not None and test(value)
    return End(shown, "answered" if allowed else "wrong", f"status {status}")


def cross() -> None:
    """Run every line, and count how they end."""
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        files(Path(folder))
        kept = {path.name for path in Path(folder).iterdir()}
        for command, option, line, value in tries():
            end = ended(command, option, line, value)
            counts[end.how] = counts.get(end.how, 0) + 1
            if end.how in {"wrong", "traceback", "mute"}:
                print(f"{end.how:9} {end.line[:150]}: {end.text[:200]}", flush=True)
            for path in Path(folder).iterdir():
                if path.name not in kept and path.is_file():
                    path.unlink()
    print(counts, "of", sum(counts.values()))


if __name__ == "__main__":
    cross()
