"""Weights that stay on disk, and many checkpoints of one model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from typer.testing import CliRunner

import pathlift
from pathlift import reading
from pathlift.cli.app import app
from pathlift.storage.checkpoints import INDEX, Checkpoint


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 5)
    )


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype.is_floating_point:
            tensor.data = torch.rand(tensor.shape, dtype=tensor.dtype) - 0.4
            if tensor.dim() == 1:
                tensor.data = tensor.data.abs() + 0.1
    return model.eval()


def sharded(state: dict[str, Tensor], folder: Path, *, index: bool = True) -> Path:
    """Write each tensor to a file of its own."""
    folder.mkdir()
    files = {name: f"part-{number}.safetensors" for number, name in enumerate(state)}
    for name, file in files.items():
        save_file({name: state[name].contiguous()}, folder / file)
    if index:
        (folder / f"model{INDEX}").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["file", "index", "folder", "files"])
def test_streamed_weights_give_the_same_numbers(kind: str, tmp_path: Path) -> None:
    model = trained(small())
    with torch.device("meta"):
        hollow = small()
    folder = tmp_path / "weights"
    if kind == "file":
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        weights = folder / "model.safetensors"
    else:
        sharded(model.state_dict(), folder, index=kind != "files")
        weights = folder / f"model{INDEX}" if kind == "index" else folder
    network = pathlift.stream(hollow, (3, 8, 8), weights=weights)
    found, expected = pathlift.path_norm(network), pathlift.path_norm(model, (3, 8, 8))
    assert found.value == expected.value
    assert found.bias_part == expected.bias_part
    torch.testing.assert_close(found.per_output, expected.per_output, rtol=0.0, atol=0.0)
    scores, wanted = pathlift.path_magnitude(network), pathlift.path_magnitude(model, (3, 8, 8))
    written = pathlift.path_magnitude(network, out=tmp_path / "scores")
    assert set(scores) == set(wanted) == set(written) == set(Checkpoint(tmp_path / "scores"))
    assert written.log10_path_norm == wanted.log10_path_norm
    for name in wanted:
        torch.testing.assert_close(scores[name], wanted[name], rtol=0.0, atol=0.0)
        torch.testing.assert_close(written[name], wanted[name], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_precision_is_that_of_the_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(small()).to(dtype)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    network = pathlift.stream(small(), (3, 8, 8), weights=tmp_path / "model.safetensors")
    assert pathlift.path_norm(network).value == pathlift.path_norm(model, (3, 8, 8)).value


def test_tied_and_derived_weights(tmp_path: Path) -> None:
    tied = trained(Tied())
    state = tied.state_dict()
    for kept in ("first.weight", "second.weight"):
        save_file({name: weight.clone() for name, weight in state.items() if name != kept}, tmp_path / f"{kept}.safetensors")
        network = pathlift.stream(Tied(), (4,), weights=tmp_path / f"{kept}.safetensors")
        assert pathlift.path_norm(network).value == pathlift.path_norm(tied, (4,)).value
        written = pathlift.path_magnitude(network, out=tmp_path / f"{kept}.scores")
        torch.testing.assert_close(written["first.weight"], pathlift.path_magnitude(tied, (4,))["first.weight"])
    save_file({name: weight + (name == "second.weight") for name, weight in state.items()}, tmp_path / "apart.safetensors")
    with pytest.raises(pathlift.MismatchError, match="one tensor in the model"):
        pathlift.stream(Tied(), (4,), weights=tmp_path / "apart.safetensors")
    model = parametrizations.weight_norm(trained(nn.Linear(4, 3)))
    save_file(model.state_dict(), tmp_path / "derived.safetensors")
    network = pathlift.stream(parametrizations.weight_norm(nn.Linear(4, 3)), (4,), weights=tmp_path / "derived.safetensors")
    assert pathlift.path_norm(network).value == pathlift.path_norm(model, (4,)).value
    assert set(pathlift.path_magnitude(network, out=tmp_path / "s")) == set(pathlift.path_magnitude(model, (4,)))


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    state = trained(small()).state_dict()
    save_file({name: weight for name, weight in state.items() if name != "5.weight"}, tmp_path / "short.safetensors")
    save_file({**state, "5.weight": torch.zeros(5, 7)}, tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    twice = sharded(state, tmp_path / "twice", index=False)
    save_file({"5.bias": state["5.bias"]}, twice / "again.safetensors")
    lacking = sharded(state, tmp_path / "lacking")
    next(file for file in lacking.glob("part-*") if "5.bias" in Checkpoint(file)).unlink()
    broken = sharded(state, tmp_path / "broken")
    (broken / f"model{INDEX}").write_text("{}")
    cases = {
        "short.safetensors": (pathlift.MismatchError, r"5\.weight"),
        "other.safetensors": (pathlift.MismatchError, r"\(5, 7\)"),
        "torn.safetensors": (pathlift.InputError, "cannot be read"),
        "none.safetensors": (pathlift.InputError, "There is no file"),
        "empty": (pathlift.InputError, "holds no .safetensors"),
        "twice": (pathlift.InputError, "'5.bias' is in"),
        "lacking": (pathlift.InputError, "There is no file"),
        "broken": (pathlift.InputError, "weight_map"),
    }
    for name, (error, text) in cases.items():
        with pytest.raises(error, match=text):
            pathlift.stream(small(), (3, 8, 8), weights=tmp_path / name)


def test_nothing_is_written_when_scoring_fails(tmp_path: Path) -> None:
    model = trained(small())
    model[5].weight.data[0, 0] = torch.nan
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    network = pathlift.stream(small(), (3, 8, 8), weights=tmp_path / "model.safetensors")
    with pytest.raises(pathlift.NumericalError, match=r"5\.weight"):
        pathlift.path_magnitude(network, out=tmp_path / "scores")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(pathlift.InputError, match="exists already"):
        pathlift.path_magnitude(trained(small()), (3, 8, 8), out=tmp_path)
    with pytest.raises(pathlift.InputError, match="does not exist"):
        pathlift.path_magnitude(trained(small()), (3, 8, 8), out=tmp_path / "no" / "scores")


LIMITED = """
import dataclasses, resource, sys, torch, pathlift
from pathlib import Path
from torch import nn
torch.set_num_threads(2)
folder, what = Path(sys.argv[1]), sys.argv[2]
with torch.device("meta"):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 15 * 15, {wide}), nn.ReLU(),
                          nn.Linear({wide}, {wide}), nn.ReLU(), nn.Linear({wide}, {wide}), nn.ReLU(), nn.Linear({wide}, 10))
pathlift.path_magnitude(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4096)), (3, 8, 8))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
limit = int(status["VmData"].split()[0]) * 1024 + int(sys.argv[3]) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if what == "eager":
    from safetensors.torch import load_file
    state = {{}}
    for file in sorted(folder.glob("*.safetensors")):
        state |= {{name: own.clone() for name, own in load_file(file).items()}}
    network = pathlift.capture(model, (3, 32, 32))
    print(pathlift.path_norm(dataclasses.replace(network, state=state, device=torch.device("cpu"))).log10)
else:
    network = pathlift.stream(model, (3, 32, 32), weights=folder)
    if what == "norm":
        print(pathlift.path_norm(network).log10)
    else:
        scores = pathlift.path_magnitude(network, out=folder.parent / "scores")
        print(scores.log10_path_norm, sum(float(scores[name].double().sum()) for name in ("0.weight", "0.bias")))
"""


@pytest.mark.hunt
@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_model_larger_than_memory(tmp_path: Path) -> None:
    """Four layers of 75 to 144 MiB, and no more memory for data than one layer and its scores take."""
    wide = 6144
    torch.manual_seed(0)
    sizes = {"3": (wide, 8 * 15 * 15), "5": (wide, wide), "7": (wide, wide), "9": (10, wide)}
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"0.weight": torch.randn(8, 3, 3, 3), "0.bias": torch.randn(8)}, folder / "conv.safetensors")
    for name, shape in sizes.items():
        state = {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
        save_file(state, folder / f"linear-{name}.safetensors")

    def run(what: str, mebibytes: int) -> subprocess.CompletedProcess[str]:
        program = LIMITED.format(wide=wide)
        arguments = [sys.executable, "-c", program, str(folder), what, str(mebibytes)]
        # Scratch memory from the heap, where small results between two pieces of it would keep the pieces apart.
        surroundings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False, env=surroundings)

    norm = run("norm", 200)
    assert norm.returncode == 0, norm.stderr
    scores = run("scores", 380)
    assert scores.returncode == 0, scores.stderr
    log10, first_layer = map(float, scores.stdout.split())
    assert log10 == pytest.approx(float(norm.stdout), rel=1e-6)
    assert 0.0 < first_layer < 1.0
    assert run("eager", 380).returncode != 0


@pytest.mark.hunt
def test_many_checkpoints_need_one_capture_and_constant_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = trained(small())
    captured: list[object] = []
    lower = reading._lowered
    monkeypatch.setattr(reading, "_lowered", lambda *a: (captured.append(a), lower(*a))[1])
    alive: list[weakref.ref[Tensor]] = []

    def checkpoints() -> object:
        for index in range(200):
            state = {
                name: weight * (1 + index) if name == "5.weight" else weight.clone()
                for name, weight in model.state_dict().items()
            }
            alive.append(weakref.ref(state["5.weight"]))
            yield state
            del state
            assert sum(reference() is not None for reference in alive) <= 2

    norms = [found.value for found in pathlift.path_norms(model, checkpoints(), (3, 8, 8))]  # type: ignore[arg-type]
    assert len(norms) == 200
    assert len(captured) == 1
    again = trained(small())
    again[5].weight.data *= 100
    assert norms[99] == pathlift.path_norm(again, (3, 8, 8)).value
    save_file(again.state_dict(), tmp_path / "again.safetensors")
    torch.save(again.state_dict(), tmp_path / "again.pt")
    stored = [tmp_path / "again.safetensors", str(tmp_path / "again.pt"), again, Checkpoint(tmp_path / "again.safetensors")]
    assert [found.value for found in pathlift.path_norms(model, stored, (3, 8, 8))] == [norms[99]] * 4
    with torch.device("meta"):
        hollow = small()
    for kind in (stored[:2], [again.state_dict(), again]):
        assert [found.value for found in pathlift.path_norms(hollow, kind, (3, 8, 8))] == [norms[99]] * 2
    distances = [found.value for found in pathlift.path_metrics(model, stored, (3, 8, 8))]
    assert distances == [pathlift.path_metric(model, again, (3, 8, 8)).value] * 4


@pytest.mark.hunt
def test_command_line(tmp_path: Path) -> None:
    model = trained(torchvision.models.squeezenet1_1())
    one = sharded(model.state_dict(), tmp_path / "one")
    save_file(model.state_dict(), tmp_path / "two.safetensors")
    run = CliRunner()
    name = "torchvision:squeezenet1_1"
    found = run.invoke(app, ["norm", name, "--weights", str(one), "--stream", "--json"])
    assert found.exit_code == 0, found.output
    expected = pathlift.path_norm(model, (3, 224, 224)).log10
    assert json.loads(found.stdout)["log10"] == pytest.approx(expected, rel=1e-12)
    both = run.invoke(app, ["norm", name, "--weights", str(one), "--weights", str(tmp_path / "two.safetensors"), "--json"])
    assert [row["log10"] for row in json.loads(both.stdout)["checkpoints"]] == pytest.approx([expected] * 2, rel=1e-12)
    hollow = run.invoke(app, ["norm", name, "--weights", str(one), "--weights", str(tmp_path / "two.safetensors"), "--stream"])
    assert hollow.exit_code == 0, hollow.output
    assert hollow.stdout.count("e+") == 2
    scored = run.invoke(app, ["score", name, "--weights", str(one), "--stream", "--out", str(tmp_path / "scores"), "--json"])
    assert scored.exit_code == 0, scored.output
    assert len(Checkpoint(tmp_path / "scores")) == len(list(model.parameters()))
    assert isinstance(run.invoke(app, ["norm", name, "--stream"]).exception, pathlift.InputError)
