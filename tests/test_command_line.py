"""What the commands print: complete at every width, the same in a table, as CSV and as JSON, and nothing beside the answer."""

from __future__ import annotations

import csv
import fcntl
import functools
import io
import json
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rich.console import Console

import exact
import pathlift
from pathlift.cli.tables import Column, laid_out
from pathlift.storage.models import load_state
from plain import run

HERE = Path(__file__).parent
SNAPSHOTS = HERE / "snapshots"
MODEL = ("exact:net", "--shape", "4")
TRAINED = (*MODEL, "--weights", "trained.safetensors")
LINES = {
    "norm": ("norm", *TRAINED),
    "norms": ("norm", *MODEL, "--weights", "trained.safetensors", "--weights", "another_training.safetensors"),
    "metric": ("metric", "exact:net", "another_training.safetensors", *TRAINED[1:], "--moments", "4"),
    "metric_exact": ("metric", "exact:net", "half.safetensors", *TRAINED[1:]),
    "metric_all": ("metric", "exact:net", "another_training.safetensors", *TRAINED[1:], "--all"),
    "metrics": ("metric", "exact:net", "half.safetensors", "rescaled.safetensors", *TRAINED[1:]),
    "score": ("score", *TRAINED),
    "prune": ("prune", *TRAINED, "--amount", "0.5"),
    "prune_compensated": ("prune", *TRAINED, "--amount", "0.5", "--update", "compensate"),
    "shrink": ("shrink", *TRAINED, "--amount", "0.4"),
    "rescale": ("rescale", *TRAINED),
    "statistics": ("statistics", *TRAINED),
    "statistics_told": ("statistics", *TRAINED, "--input-mean", "0.5", "--input-variance", "2,1,1,0.5"),
    "quantize": ("quantize", *TRAINED, "--bits", "4"),
    "quantize_told": ("quantize", *TRAINED, "--bits", "4", "--input-mean", "1,0,0,-2", "--input-variance", "4"),
    "quantize_exact": ("quantize", *TRAINED, "--bits", "classifier=8,*=3", "--rounding", "towards_zero"),
    "quantize_sequential": ("quantize", *TRAINED, "--bits", "3", "--data", "data.safetensors", "--sequential"),
    "bits": ("bits", *TRAINED, "--tolerance", "0.2"),
    "rescale_balanced": ("rescale", *TRAINED, "--to", "normal"),
    "equivalent": ("equivalent", "exact:net", "rescaled.safetensors", *TRAINED[1:]),
    "equivalents": ("equivalent", "exact:net", "rescaled.safetensors", "half.safetensors", *TRAINED[1:]),
    "compare": (
        "compare", "trained.safetensors", "half.safetensors", "another_training.safetensors", "--model", "exact:net", "--shape",
        "4",
    ),
    "certify": ("certify", *TRAINED, "--data", "data.safetensors", "--bits", "12"),
    "certify_cut": ("certify", *TRAINED, "--data", "data.safetensors", "--relative", "0.01", "--splits", "1"),
    "report": ("report", *TRAINED, "--prune", "none", "--bits", "none", "--force"),
    "report_refused": ("report", "exact:unsupported", "--shape", "4", "--force"),
    "study": ("study", "zoo.yaml"),
    "support": ("support", *MODEL),
    "unsupported": ("support", "exact:unsupported", "--shape", "4"),
}  # fmt: skip
ZOO = """
functions: [path_norm]
models:
  - {model: "exact:net", shape: [4], weights: [trained.safetensors, half.safetensors]}
  - {model: "exact:unsupported", shape: [4]}
  - {model: "exact:nowhere", shape: [4]}
"""
STATUS = {"equivalents": 1, "report_refused": 1, "unsupported": 1}
NUMBER = re.compile(r"(?<![\w.\-])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?(?![\w.]*[\w])")
SOURCE = re.compile(r"\.py:\d+\)")
SECONDS = re.compile(r" \d+\.\d\d(?=  (?:no|yes))")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = tmp_path_factory.mktemp("weights")
    exact.write(weights)
    (weights / "zoo.yaml").write_text(ZOO)
    return weights


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path) -> Callable[[str, int], str]:
    """What a line prints at a width; each is run once."""

    @functools.cache
    def at(name: str, columns: int) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("COLUMNS", str(columns))
            done = run(*LINES[name])
        assert done.code == STATUS.get(name, 0) and not done.stderr, done
        return "\n".join(line.rstrip() for line in SOURCE.sub(".py:1)", SECONDS.sub(" 0.00", done.stdout)).splitlines()) + "\n"

    return at


@pytest.fixture(scope="module")
def as_json(folder: Path) -> Callable[[str], Any]:
    """The JSON of a line; each is run once."""

    @functools.cache
    def of(name: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            done = run(*LINES[name], "--json")
        assert done.code == STATUS.get(name, 0), done
        return json.loads(done.stdout)

    return of


# ---- widths


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", LINES)
def test_at_80_columns_a_command_prints_its_snapshot(name: str, printed: Callable[[str, int], str]) -> None:
    """To write them anew: PATHLIFT_SNAPSHOTS=write, and look at the difference."""
    text = printed(name, 80)
    file = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("PATHLIFT_SNAPSHOTS") == "write":
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", LINES)
def test_no_number_is_cut_at_60_and_80_columns(name: str, printed: Callable[[str, int], str]) -> None:
    wide = Counter(NUMBER.findall(printed(name, 400)))
    for columns in (60, 80):
        narrow = printed(name, columns)
        assert not wide - Counter(NUMBER.findall(narrow)), narrow
        assert "…" not in narrow.replace(" … ", ""), narrow


@pytest.mark.hunt  # in a process of its own, which takes seconds
def test_no_number_is_cut_in_a_pipe_that_says_no_width(folder: Path, printed: Callable[[str, int], str]) -> None:
    env = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), *sys.path[1:]])
    command = [sys.executable, "-m", "pathlift", *LINES["prune"]]
    piped = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=env)
    assert [line.rstrip() for line in piped.stdout.splitlines()] == printed("prune", 160).splitlines()


texts = st.text("abcdef._", min_size=1, max_size=50)
numbers = st.floats(allow_nan=False, allow_infinity=False).map("{:.6g}".format)


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(8, 120),
    table=st.lists(st.tuples(texts, numbers, st.integers(0, 10**9).map("{:,}".format), numbers), min_size=1, max_size=4),
    kind=st.sampled_from(["name", "words"]),
    headers=st.lists(st.text("abc ", max_size=25), min_size=4, max_size=4),
)
def test_every_table_shows_every_number_whole_at_any_width(
    width: int, table: list[tuple[str, ...]], kind: str, headers: list[str]
) -> None:
    columns = (Column(headers[0], kind=kind), *map(Column, headers[1:]))  # type: ignore[arg-type]
    layout = laid_out(columns, table, width)
    text = io.StringIO()
    console = Console(file=text, width=width, soft_wrap=True, highlight=False)
    for row in table:
        for line in layout.row(row):
            console.print(line, width=10**4)
    lines = text.getvalue().splitlines()
    for row in table:
        assert set(row[1:]) <= {word for line in lines for word in line.split()}
    needed = max(2 + 2 + len(header) + len(cell) for row in table for header, cell in zip(headers[1:], row[1:], strict=True))
    names = max(len(row[0]) for row in table)
    assert max(map(len, lines)) <= max(width, needed, names)
    if layout.above or not layout.widths:
        assert {row[0] for row in table} <= set(lines)


def test_a_number_that_is_wider_than_its_column_is_whole() -> None:
    layout = laid_out((Column("bound", kind="words"), Column("value")), [("pivot", "1.0")], 30)
    text = io.StringIO()
    for line in layout.row(("pivot", "1.23456e+12345")):
        Console(file=text, width=30).print(line, width=10**4)
    assert "1.23456e+12345" in text.getvalue()


def terminal(*lines: tuple[str, ...], columns: int, folder: Path, **environment: str) -> str:
    """Run commands one after the other in a terminal of so many columns; what it shows, escapes included."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}}
    env |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]]), **environment}
    code = f"""
import sys
from pathlift.cli import main
for line in {lines!r}:
    sys.argv = ["pathlift", *line]
    try:
        main()
    except SystemExit as end:
        assert not end.code
    print("----")
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=follower, stderr=follower, cwd=folder, env=env) as process:
        os.close(follower)
        parts = []
        while True:
            try:
                part = os.read(leader, 1 << 16)
            except OSError:
                break
            if not part:
                break
            parts.append(part)
    os.close(leader)
    assert process.returncode == 0, parts
    return b"".join(parts).decode(errors="replace")


@pytest.mark.hunt
def test_a_terminal_shows_progress_and_colours_unless_it_is_told_not_to(folder: Path) -> None:
    both = terminal(LINES["score"], ("norm", *TRAINED, "--quiet"), columns=60, folder=folder, NO_COLOR="1")
    plain, quiet, _ = both.split("----")
    assert not re.search(r"\x1b\[(?:[0-9;]*;)?(?:3[0-7]|38|4[0-7]|9[0-7])(?:;[0-9;]*)?m", plain)
    assert "capturing the graph" in plain
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", plain).replace("\r", "")
    answer = shown[shown.rindex("exact:net\n") :]
    assert max(map(len, answer.splitlines())) <= 60 and "path-norm " in answer
    assert "capturing" not in quiet and "path-norm" in quiet


# ---- CSV, JSON, quiet


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", LINES)
def test_csv_has_the_rows_of_the_table(name: str, here: Path, printed: Callable[[str, int], str]) -> None:
    rows = list(csv.reader(io.StringIO(run(*LINES[name], "--csv").stdout)))
    if name == "support":
        assert rows == [["module", "op", "where", "reason", "advice"]]
        return
    assert len(rows) > 1 and len({len(row) for row in rows}) == 1
    table = printed(name, 400)
    names = {"compare": [row[1] for row in rows[1:]], "rescale": []}.get(name, [row[0] for row in rows[1:]])
    assert all(first in table for first in names)


def test_csv_has_all_digits(here: Path, as_json: Callable[[str], Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(run(*LINES["score"], "--csv").stdout)))
    assert {row["tensor"]: float(row["share of all paths"]) for row in rows} == {
        name: tensor["share"] for name, tensor in as_json("score")["tensors"].items()
    }


def keys(value: object, path: str = "") -> set[str]:
    """The keys of a JSON value, with dots; those of lists of objects with [], of tensors by name with *."""
    if isinstance(value, list):
        return {key for item in value for key in keys(item, f"{path}[]")} if any(isinstance(v, dict) for v in value) else set()
    if not isinstance(value, dict):
        return set()
    if path == "tensors":
        value = {"*": next(iter(value.values()))}
    every: set[str] = set()
    for key, item in value.items():
        inner = f"{path}.{key}" if path else key
        every |= {inner} | keys(item, inner)
    return every


def documented() -> dict[str, set[str]]:
    """The keys that docs/commands.md lists, by section."""
    text = (HERE.parent / "docs" / "commands.md").read_text()
    sections = re.findall(r"^### `([\w ]+)`\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    return {title: set(re.findall(r"^\| `([\w.\[\]*]+)` \|", body, re.MULTILINE)) for title, body in sections}


SECTIONS = {
    "norm": "norm", "norms": "norm", "metric": "metric", "metric_exact": "metric", "metrics": "metric", "metric_all": "metric",
    "score": "score", "prune": "prune", "prune_compensated": "prune", "shrink": "shrink", "rescale": "rescale",
    "quantize": "quantize", "quantize_exact": "quantize", "bits": "bits",
    "statistics_told": "statistics", "quantize_told": "quantize", "quantize_sequential": "quantize",
    "statistics": "statistics", "rescale_balanced": "rescale", "equivalent": "equivalent",
    "equivalents": "equivalent", "compare": "compare", "certify": "certify", "certify_cut": "certify",
    "report": "report", "report_refused": "report",
    "study": "study", "support": "support", "unsupported": "support",
}  # fmt: skip


MORE = {
    "metric": ("--estimate", "50"),
    "report": ("--prune", "0.5", "--bits", "8", "--other", "another_training.safetensors"),
}
"""Options with which a line prints keys that it does not print without."""


@pytest.mark.hunt
def test_the_keys_of_json_are_those_that_are_documented(here: Path, as_json: Callable[[str], Any]) -> None:
    printed: dict[str, set[str]] = {}
    for name in LINES:
        more = MORE.get(name)
        answer = json.loads(run(*LINES[name], "--json", *more).stdout) if more else as_json(name)
        printed.setdefault(SECTIONS[name], set()).update(keys(answer))
    said = documented()
    assert set(printed) <= set(said)
    assert {name: said[name] for name in printed} == printed


def test_json_and_csv_exclude_each_other(here: Path) -> None:
    done = run(*LINES["norm"], "--json", "--csv")
    assert done.code == 2 and done.stderr == "pathlift: Give --json or --csv, found both.\n" and not done.stdout


def test_what_inputs_look_like_is_said_as_in_python(here: Path) -> None:
    told = ("--input-mean", "1,0,0,-2", "--input-variance", "4")
    known = {"input_mean": torch.tensor([1.0, 0.0, 0.0, -2.0]), "input_variance": 4.0}
    network = pathlift.capture(pathlift.load_model("exact:net", "trained.safetensors"), (4,))
    answers = [json.loads(run(*line, *told, "--json").stdout) for line in (LINES["quantize"], LINES["prune_compensated"])]
    assert answers[0]["expected_error"] == pathlift.quantize(network, bits=4, **known)[1].expected_error
    updated = pathlift.prune(network, amount=0.5, update="compensate", **known)[1].updated
    assert updated is not None and answers[1]["updated"] == updated.to_dict()
    assert answers[1]["updated"] != json.loads(run(*LINES["prune_compensated"], "--json").stdout)["updated"]
    answer = json.loads(run(*LINES["statistics"], *told, "--json").stdout)
    assert answer["layers"][0]["mean"] == known["input_mean"].tolist()


def test_what_is_measured_is_not_said_too(here: Path) -> None:
    data = ("--data", "data.safetensors", "--input-mean", "1")
    for line in (LINES["statistics"], LINES["prune_compensated"], LINES["quantize"]):
        done = run(*line, *data)
        assert done.code == 2 and "--input-mean has no effect with --data" in done.stderr
    done = run(*LINES["statistics"], *data[:2], "--correlation", "0.3")
    assert done.code == 2 and "--correlation has no effect beside --data" in done.stderr
    assert run(*LINES["quantize"], *data, "--gauge", "optimal").code == 0  # which is chosen by what is said


def test_samples_are_counted_where_there_are_some(here: Path) -> None:
    for name in ("statistics", "prune_compensated", "quantize", "report"):
        done = run(*LINES[name], "--limit", "8")
        assert done.code == 2 and "--limit has no effect without --data" in done.stderr


def test_quiet_says_the_answer_alone(here: Path) -> None:
    line = ("prune", *TRAINED, "--amount", "0.97", "--criterion", "magnitude")
    loud, quiet = run(*line), run(*line, "--quiet")
    assert "No path runs" in loud.stderr and not quiet.stderr and quiet.stdout == loud.stdout


def test_bounds_are_printed_as_they_come_with_what_they_cost(
    here: Path, printed: Callable[[str, int], str], as_json: Callable[[str], Any]
) -> None:
    text = printed("metric_all", 400)
    assert text.index("norm difference") < text.index("Lemma F.1") < text.index("4 moments")
    assert "seconds" in text
    names: list[str] = []
    bounds = pathlift.metric.path_metric_bounds(
        exact.net(), load_state(here / "half.safetensors"), (4,), progress=lambda bound: names.append(bound.name)
    )
    assert sorted(names) == sorted(bound.name for bound in bounds)
    records = as_json("metric_all")["bounds"]
    assert all(record["seconds"] >= 0 for record in records) and any("moments" in record["name"] for record in records)


# ---- inputs, until, several files


def test_several_inputs_are_several_shapes() -> None:
    done = run("norm", "exact:two", "--shape", "2", "--shape", "4", "--json")
    assert json.loads(done.stdout)["value"] == pathlift.path_norm(exact.two(), ((2,), (4,))).value


CAPTURING = (
    ("norm", *MODEL), ("statistics", *MODEL), ("quantize", *MODEL), ("bits", *MODEL),
    ("score", *MODEL), ("support", *MODEL), ("rescale", *MODEL), ("prune", *MODEL, "--amount", "0.5"),
    ("report", *MODEL, "--prune", "none", "--bits", "none", "--force"),
    ("metric", "exact:net", "exact:net", "--shape", "4"), ("equivalent", "exact:net", "exact:net", "--shape", "4"),
    ("certify", *MODEL, "--data", "data.safetensors", "--bits", "8"),
    ("compare", "trained.safetensors", "half.safetensors", "--model", "exact:net", "--shape", "4"),
)  # fmt: skip


@pytest.mark.one_in(3)
@pytest.mark.parametrize("line", CAPTURING, ids=lambda line: line[0])
def test_every_command_that_captures_can_stop_at_a_module(line: tuple[str, ...], here: Path) -> None:
    done = run(*line, "--until", "encoder_blocks")
    assert done.code == 0, done
    refused = run(*line, "--until", "encoder_block")
    assert refused.code == 2
    assert refused.stderr == (
        "pathlift: --until names no module that the forward pass calls and no value of it: 'encoder_block'. "
        "Did you mean 'encoder_blocks'?\n"
    )


def test_until_reads_the_part_that_is_supported(here: Path) -> None:
    done = run("norm", "exact:unsupported", "--shape", "4", "--until", "0", "--json")
    assert json.loads(done.stdout)["value"] == pathlift.path_norm(exact.net(), (4,)).value
    assert run("support", "exact:unsupported", "--shape", "4", "--until", "0").code == 0


def test_folders_of_weights_are_each_of_them(here: Path, tmp_path: Path, as_json: Callable[[str], Any]) -> None:
    for name in ("half", "another_training"):
        (tmp_path / f"{name}.safetensors").write_bytes((here / f"{name}.safetensors").read_bytes())
    others = json.loads(run("metric", "exact:net", str(tmp_path), *TRAINED[1:], "--json").stdout)["others"]
    alone = as_json("metric_exact")
    assert [Path(other["other"]).stem for other in others] == ["another_training", "half"]
    assert others[1]["upper"] == alone["upper"]
    assert run("equivalent", "exact:net", str(tmp_path), *TRAINED[1:]).code == 1


@pytest.mark.hunt
def test_quantised_files_are_written_together_or_not_at_all(here: Path, tmp_path: Path) -> None:
    whole, program = tmp_path / "q.safetensors", tmp_path / "q.onnx"
    line = ("quantize", *TRAINED, "--bits", "classifier=8", "--bits", "*=float", "--out", str(whole))
    found = json.loads(run(*line, "--json").stdout)
    assert list(found["tensors"]) == ["classifier.weight"] and found["written"] == {str(whole): whole.stat().st_size}
    loaded = pathlift.quantisation.load_quantized(whole)
    assert found["log10_path_norm"] == pytest.approx(pathlift.path_norm(exact.net(), (4,)).log10)
    before = load_state(here / "trained.safetensors")
    assert {name for name in before if not torch.equal(before[name], loaded[name])} <= {"classifier.weight", "classifier.bias"}
    assert "exists already" in run(*line).stderr and run(*line, "--force").code == 0
    pytest.importorskip("onnxscript")
    whole.unlink()
    wrong = run(*line[:-1], str(whole), "--bits", "encoder*=4", "--onnx", str(tmp_path / "none" / "q.onnx"))
    assert wrong.code == 2 and not whole.exists()
    data = ("--data", "data.safetensors", "--activations")
    done = run("quantize", *TRAINED, "--until", "classifier", "--out", str(whole), "--onnx", str(program), *data)
    assert done.code == 0 and f"written: {program} ({program.stat().st_size:,} bytes)" in done.stdout, done
    assert "statistics of activations       data" in done.stdout


# ---- what is wrong is found before the model is built


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "line",
    [
        ("norm", "--q", "0.5"), ("norm", "--shape", "4,0"), ("norm", "--shape", "4", "--shape", "x"), ("norm", "--seed", "-1"),
        ("norm", "--device", "nowhere"), ("norm", "--device", "meta"), ("norm", "--weights", "none.pt"), ("norm", "--key", "a"),
        ("norm", "--stream"), ("norm", "--model-arg", "width"), ("norm", "--weights", "data.safetensors", "--key", "none"),
        ("support", "--shape", "x"), ("score", "--out", "a.txt"), ("score", "--out", "none/a.safetensors"),
        ("prune",), ("prune", "--amount", "1"), ("prune", "--amount", "nan"), ("prune", "--amount", "0.5", "--steps", "0"),
        ("prune", "--amount", "0.5", "--criterion", "luck"), ("prune", "--amount", "0.5", "--selection", "luck"),
        ("prune", "--amount", "0.5", "--input-mean", "1"), ("quantize", "--input-mean", "x"),
        ("quantize", "--input-mean", "inf"), ("statistics", "--input-variance", "-1"),
        ("prune", "--amount", "0.5", "--data", "none.pt"), ("prune", "--amount", "0.5", "--data", "digits", "--limit", "0"),
        ("statistics", "--data", "digits", "--limit", "0"),
        ("rescale", "--to", "nowhere"), ("rescale", "--to", "balanced", "--p", "0"),
        ("rescale", "--to", "random", "--sigma", "-1"),
        ("rescale", "--to", "random", "--choices", "0"), ("rescale", "--out", "a.safetensors"),
        ("metric", "--q", "3"), ("metric", "--moments", "3"), ("metric", "--ratio", "0.5"), ("metric", "--tighten", "-1"),
        ("metric", "--estimate", "1"), ("metric", "--seconds", "-1"), ("metric", "--moments", "0", "--tighten", "1"),
        ("metric", "--q", "2", "--estimate", "9"), ("metric", "--all", "--q", "2"), ("metric", "--other-seed", "x"),
        ("equivalent", "--tolerance", "-1"), ("certify", "--data", "none.pt"), ("certify", "--data", "luck"),
        ("certify", "--data", "data.safetensors", "--bits", "1"), ("certify", "--data", "data.safetensors", "--radius", "-1"),
        ("certify", "--data", "data.safetensors", "--per", "luck"), ("certify", "--data", "data.safetensors", "--limit", "0"),
        ("compare", "--plot", "a.txt"), ("compare", "--shape", "x"), ("bits", "--tolerance", "0"),
        ("quantize", "--bits", "9"), ("quantize", "--bits", "a=9"), ("quantize", "--bits", "a=4,b"),
        ("quantize", "--ends", "1"),
        ("quantize", "--granularity", "0"), ("quantize", "--rounding", "up"), ("quantize", "--range", "all"),
        ("quantize", "--gauge", "best"), ("quantize", "--correction", "all"), ("quantize", "--budget", "4 MiB"),
        ("quantize", "--budget", "0"), ("quantize", "--budget", "0kB"), ("quantize", "--data", "none.pt"),
        ("quantize", "--data", "digits", "--limit", "0"), ("quantize", "--activations"), ("quantize", "--sequential"),
        ("quantize", "--out", "a.pt"),
        ("quantize", "--onnx", "a.safetensors"), ("quantize", "--out", "none/a.safetensors"),
        ("report", "--out", "a.txt"), ("report", "--prune", "1"), ("report", "--prune", "x"), ("report", "--bits", "9"),
        ("report", "--bits", "4.5"), ("report", "--estimate", "1"), ("report", "--data", "none.pt"),
        ("report", "--other-key", "a"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_values_are_found_before_the_model_is_built(line: tuple[str, ...], here: Path) -> None:
    command, *options = line
    arguments = {
        "metric": ("exact:ending", "half.safetensors"),
        "equivalent": ("exact:ending", "half.safetensors"),
        "compare": ("half.safetensors", "--model", "exact:ending"),
    }.get(command, ("exact:ending",))
    shape = () if "--shape" in options else ("--shape", "4")
    done = run(command, *arguments, *shape, *options)
    assert done.code == 2, done
    assert done.stderr.startswith("pathlift: ") and done.stderr.count("\n") == 1 and not done.stdout, done


# ---- files that are damaged, disks that are full


@pytest.mark.one_in(3)
@pytest.mark.parametrize("damage", ["half", "three bytes", "nothing", "other model", "folder", "text"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_is_no_good_is_one_sentence(damage: str, suffix: str, here: Path, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    if damage == "folder":
        file.mkdir()
    else:
        other = damage == "other model"
        tensors = {"other.weight": torch.ones(2)} if other else exact.net().state_dict()
        torch.save(tensors, file) if suffix == ".pt" else pathlift.storage.models.save_tensors(tensors, file)
        data = file.read_bytes()
        wrong = {"half": data[: len(data) // 2], "three bytes": data[:3], "nothing": b"", "text": b"no weights\n" * 99}
        file.write_bytes(wrong.get(damage, data))
    lines = (
        ("norm", *MODEL, "--weights", str(file)),
        ("metric", "exact:net", str(file), "--shape", "4"),
        ("compare", str(file), "--model", "exact:net", "--shape", "4"),
        ("certify", *MODEL, "--data", str(file)),
        ("score", *MODEL, "--weights", str(file), "--out", str(tmp_path / "out.safetensors")),
    )
    for line in lines:
        done = run(*line)
        assert done.code == 2 and done.stderr.startswith("pathlift: ") and done.stderr.count("\n") == 1, done
        assert not done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def outside(*arguments: str, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]])}
    command = [sys.executable, "-m", "pathlift", *arguments]
    return subprocess.run(command, cwd=folder, env=env, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_an_answer_that_cannot_be_written_is_one_sentence(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = outside("--version", folder=folder, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, "pathlift: The answer cannot be written: No space left on device.\n")


def test_a_disk_that_fills_up_leaves_nothing(here: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        done = run("score", *MODEL, "--out", str(tmp_path / "a.safetensors"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.code == 2 and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr, done
    assert not list(tmp_path.iterdir())


# ---- start


COMMANDS = (
    (), ("norm",), ("metric",), ("compare",), ("score",), ("support",), ("certify",), ("prune",), ("shrink",), ("rescale",),
    ("equivalent",), ("statistics",), ("quantize",), ("bits",),
    ("report",), ("study",), ("experiment",), ("experiment", "lottery"),
)  # fmt: skip


@pytest.mark.hunt
def test_help_and_version_load_neither_torch_nor_numpy() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from plain import run
for command in {COMMANDS!r}:
    done = run(*command, "--help")
    assert done.code == 0 and "Usage" in done.stdout, done
assert run("--version").code == 0
print([name for name in ("torch", "numpy", "safetensors.torch", "pathlift.public") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done


def test_help_takes_little_time() -> None:
    """Half a second of a machine of 2024; the bound leaves room for slower ones, not for PyTorch."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "pathlift", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def completed(words: str) -> list[str]:
    env = {
        **os.environ, "_PATHLIFT_COMPLETE": "complete_bash", "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }  # fmt: skip
    code = "import sys; sys.argv = ['pathlift']; from pathlift.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    return done.stdout.split()


@pytest.mark.hunt
def test_a_shell_completes_commands_options_and_names() -> None:
    assert completed("pathlift eq") == ["equivalent"]
    assert completed("pathlift norm --unt") == ["--until"]
    assert completed("pathlift prune --criterion path_magnitude_l") == ["path_magnitude_lamp", "path_magnitude_l2"]
    assert completed("pathlift rescale --to bal") == ["balanced"]


def test_options_stand_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("norm", "metric", "score", "certify", "prune", "quantize", "rescale", "equivalent", "compare"):
        text = run(command, "--help").stdout
        own, model, answer = (text.index(f" {title} ─") for title in ("Options", "The model", "The answer"))
        assert own < model < text.index("--shape") < answer < text.index("--json") < text.index("--quiet"), command
    groups = run("--help").stdout
    assert groups.index("norm ") < groups.index("metric ") < groups.index("prune ") < groups.index("experiment ")
