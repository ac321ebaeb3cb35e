"""Models back into files: what is written is the model, under the names that it came with, or nothing is written."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import importlib.util
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pathlift
import test_exported
from pathlift import saving
from pathlift.storage.models import load_model
from plain import run
from process import small_model
from test_checkpoints import KEYS, PREFIXES

ALL = (".onnx", ".pt2", ".safetensors", ".pt")
PROGRAMS = (".onnx", ".pt2")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="the extra 'onnx' is not installed",
)
SUFFIXES = [pytest.param(suffix, marks=needs_onnx if suffix == ".onnx" else ()) for suffix in ALL]
PROGRAM_SUFFIXES = SUFFIXES[:2]
RARELY = [pytest.param(".onnx", marks=[needs_onnx, pytest.mark.hunt]), *SUFFIXES[1:]]
"""An export to ONNX takes seconds."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


def leaves(folder: Path = Path()) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def run_file(path: str, *inputs: Tensor) -> Tensor:
    """Run a program without pathlift."""
    if path.endswith(".onnx"):
        session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
        given = {own.name: tensor.numpy() for own, tensor in zip(session.get_inputs(), inputs, strict=True)}
        return torch.from_numpy(np.asarray(session.run(None, given)[0]))
    with torch.no_grad():
        outputs: Tensor = torch.export.load(path).module()(*inputs)
    return outputs


def read_state(path: str) -> Mapping[str, Tensor]:
    return load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)


def check_file(path: str, model: nn.Module, *inputs: Tensor) -> None:
    """Make sure that a file is the model, in evaluation mode."""
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(*inputs)
    if Path(path).suffix in PROGRAMS:
        torch.testing.assert_close(run_file(path, *inputs), expected)
        return
    fresh = copy.deepcopy(model)
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    fresh.load_state_dict(read_state(path), strict=True)
    assert all(same(own, model.state_dict()[name]) for name, own in fresh.state_dict().items())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(*inputs), expected)


@functools.cache
def small_file(suffix: str) -> bytes:
    """A program of `small_model`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"m{suffix}")
        pathlift.save(small_model(), path, (1, 4, 4))
        return path.read_bytes()


def write_small(path: str) -> None:
    Path(path).write_bytes(small_file(Path(path).suffix))


# ---- what was read, pruned and written


@pytest.mark.one_in(2)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_model_comes_back(suffix: str) -> None:
    model = small_model().train()
    before = copy.deepcopy(model.state_dict())
    pathlift.save(model, f"m{suffix}", (1, 4, 4))
    check_file(f"m{suffix}", model, torch.randn(3, 1, 4, 4))
    assert model.training and all(same(own, before[name]) for name, own in model.state_dict().items())
    assert leaves() == [f"m{suffix}"]


@pytest.mark.parametrize("suffix", RARELY)
def test_a_pruned_or_rescaled_network_is_the_model_with_its_weights(suffix: str) -> None:
    model = small_model()
    network = pathlift.capture(model, (1, 4, 4))
    pruned, report = pathlift.prune(network, amount=0.5)
    expected = pathlift.pruning.apply_masks(model, report.masks)
    del network, model
    pathlift.save(pruned, f"pruned{suffix}")
    check_file(f"pruned{suffix}", expected, torch.randn(3, 1, 4, 4))
    drawn = pathlift.symmetries(pruned).randomize(generator=0)
    rescaled = dataclasses.replace(pruned, state={**pruned.state, **drawn})
    pathlift.save(rescaled, f"rescaled{suffix}")
    check_file(f"rescaled{suffix}", pathlift.rescaling.with_state(expected, drawn), torch.randn(3, 1, 4, 4))


@pytest.mark.parametrize("suffix", RARELY[:2])
def test_what_is_read_pruned_and_written_runs(suffix: str) -> None:
    write_small(f"a{suffix}")
    norm = pathlift.path_norm(small_model(), (1, 4, 4)).value
    shape = pathlift.storage.default_shape("a.pt2") if suffix == ".pt2" else (1, 4, 4)
    read = load_model(f"a{suffix}", trust=True)
    assert pathlift.path_norm(read, shape).value == pytest.approx(norm, rel=1e-5)
    for other in (suffix, ".pt2"):
        pruned, report = pathlift.prune(read, shape, 0.5)
        pathlift.save(pruned, f"module{other}", shape, overwrite=True)
        network, _ = pathlift.prune(pathlift.capture(read, shape), amount=0.5)
        pathlift.save(network, f"network{other}", overwrite=True)
        by_hand = pathlift.pruning.apply_masks(read, report.masks)
        x = torch.randn(3 if other == suffix else 1, 1, 4, 4)
        for written in (f"module{other}", f"network{other}"):
            with torch.no_grad():
                torch.testing.assert_close(run_file(written, x), by_hand(x))
            again = load_model(written, trust=True)
            assert all(not bool(again.state_dict()[name][~mask].any()) for name, mask in report.masks.items())


@needs_onnx
def test_an_onnx_file_goes_back_as_the_same_graph() -> None:
    onnx: Any = importlib.import_module("onnx")
    write_small("a.onnx")
    before = onnx.load("a.onnx")
    before.metadata_props.add(key="author", value="someone")
    onnx.save(before, "a.onnx")
    pruned, _ = pathlift.prune(pathlift.capture(load_model("a.onnx"), (1, 4, 4)), amount=0.5)
    pathlift.save(pruned, "b.onnx")
    after = onnx.load("b.onnx")
    changed = [one.name for one, two in zip(before.graph.initializer, after.graph.initializer, strict=True) if one != two]
    assert changed, "weights were pruned"
    del before.graph.initializer[:], after.graph.initializer[:]
    assert after == before


@pytest.mark.one_in(3)
@needs_onnx
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_type_are_written_in_that_of_the_file(dtype: torch.dtype) -> None:
    write_small("a.onnx")
    model = load_model("a.onnx").to(dtype)
    pathlift.save(model, "b.onnx")
    again = load_model("b.onnx")
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == torch.float32
        assert torch.equal(again.state_dict()[name], tensor.float())


@pytest.mark.one_in(2)
@needs_onnx
@pytest.mark.parametrize("wrong", [False, True])
def test_what_onnxruntime_refuses_is_compared_by_the_evaluator(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx: Any = importlib.import_module("onnx")
    write_small("a.onnx")
    program = onnx.load("a.onnx")
    for node in program.graph.node:
        node.name = "same"
    onnx.save(program, "a.onnx")
    with pytest.raises(Exception, match="same node name"):
        run_file("a.onnx", torch.ones(1, 1, 4, 4))
    pruned, _ = pathlift.prune(load_model("a.onnx"), (1, 4, 4), 0.5)
    if wrong:
        fill = saving.program_with

        def moved(module: Any) -> Any:
            made = copy.deepcopy(module)
            with torch.no_grad():
                next(made.parameters()).mul_(1.01)
            return fill(made)

        monkeypatch.setattr(saving, "program_with", moved)
        with pytest.raises(pathlift.NumericalError, match="gives other outputs"):
            pathlift.save(pruned, "b.onnx")
        assert leaves() == ["a.onnx"]
        return
    pathlift.save(pruned, "b.onnx")
    x = torch.ones(3, 1, 4, 4)
    assert torch.equal(load_model("b.onnx")(x), pruned(x))


@pytest.mark.hunt
@needs_onnx
def test_a_part_of_an_onnx_file_is_no_file() -> None:
    write_small("a.onnx")
    model = load_model("a.onnx")
    node = next(name for name in model.nodes if "conv" in name)
    with pytest.raises(pathlift.InputError, match="until="):
        pathlift.save(pathlift.capture(model, (1, 4, 4), until=node), "b.onnx")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("suffix", RARELY[:2])
@pytest.mark.parametrize("name", test_exported.CALLS)
def test_inputs_are_those_of_the_model(name: str, suffix: str) -> None:
    _, _, shapes = test_exported.CALLS[name]
    model = test_exported.Two()
    pathlift.save(pathlift.capture(model, shapes), f"m{suffix}")
    if suffix == ".pt2":
        assert pathlift.storage.default_shape("m.pt2") == shapes
    value = pathlift.path_norm(load_model(f"m{suffix}", trust=True), pathlift.storage.default_shape("m.pt2")).value if (
        suffix == ".pt2"
    ) else pathlift.path_norm(load_model("m.onnx"), tuple(_flat(shapes))).value  # fmt: skip
    assert value == pytest.approx(pathlift.path_norm(model, shapes).value, rel=1e-5)


def _flat(shapes: Any) -> list[Any]:
    if isinstance(shapes, tuple) and all(isinstance(size, int) for size in shapes):
        return [shapes]
    return [leaf for item in (shapes.values() if isinstance(shapes, dict) else shapes) for leaf in _flat(item)]


class Fixed(nn.Linear):
    """Runs on one sample only, as far as an exporter can tell."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(1, 4))


@pytest.mark.parametrize("suffix", RARELY[:2])
def test_a_model_of_one_sample_is_written_for_one(suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pathlift")
    model = Fixed(4, 2)
    pathlift.save(model, f"m{suffix}", (4,))
    assert "one sample" in caplog.text
    check_file(f"m{suffix}", model, torch.randn(1, 4))
    assert pathlift.storage.default_shape(f"m{suffix}") == (4,)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3))


def double() -> nn.Module:
    return tied().double()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("suffix", RARELY)
@pytest.mark.parametrize("make", [tied, normed, double])
def test_names_ties_and_types_are_kept(make: Callable[[], nn.Module], suffix: str) -> None:
    model = make()
    network = pathlift.capture(model, (4,))
    for number, written in enumerate((model, network)):
        path = f"{number}{suffix}"
        pathlift.save(written, path, (4,) if written is model else None)
        check_file(path, model, torch.randn(3, 4, dtype=model[2].weight.dtype))


@pytest.mark.parametrize("suffix", SUFFIXES[2:])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_stay_halves(dtype: torch.dtype, suffix: str) -> None:
    model = tied().to(dtype)
    pathlift.save(model, f"m{suffix}")
    assert all(same(own, model.state_dict()[name]) for name, own in read_state(f"m{suffix}").items())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_of_another_type_are_written_in_it(suffix: str) -> None:
    model = tied()
    network = pathlift.capture(model, (4,))
    state = {name: own.double() * (1 + 1e-12) for name, own in network.state.items()}
    wide = dataclasses.replace(network, state=state)
    if suffix in PROGRAMS:
        with pytest.raises(pathlift.InputError, match="cannot run on inputs"):
            pathlift.save(wide, f"m{suffix}")
    else:
        pathlift.save(wide, f"m{suffix}")
        assert same(read_state(f"m{suffix}")["2.weight"], state["0.weight"])


def test_weights_of_another_model_are_no_weights_of_this_one() -> None:
    network = pathlift.capture(tied(), (4,))
    state = {**network.state, "2.bias": torch.zeros(1)}
    with pytest.raises(pathlift.MismatchError, match=r"2\.bias"):
        pathlift.save(dataclasses.replace(network, state=state), "m.pt")
    network.origin.root[0] = nn.Linear(4, 4, bias=False)  # type: ignore[union-attr]
    with pytest.raises(pathlift.MismatchError):
        pathlift.save(dataclasses.replace(network, state=dict.fromkeys(network.names)), "m.pt")
    assert not leaves()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_network_without_a_model_has_weights(suffix: str) -> None:
    model = tied()
    network = pathlift.capture(model, (4,))
    pathlift.storage.save_tensors(model.state_dict(), Path("w.safetensors"))
    with torch.device("meta"):
        hollow = pathlift.capture(tied(), (4,))
    for other in (pickle.loads(pickle.dumps(network)), pathlift.stream(hollow, weights="w.safetensors")):
        if suffix in PROGRAMS:
            with pytest.raises(pathlift.InputError, match="weights alone"):
                pathlift.save(other, f"m{suffix}")
        else:
            pathlift.save(other, f"m{suffix}", overwrite=True)
            check_file(f"m{suffix}", model, torch.randn(3, 4))


# ---- checkpoints: prefixes and keys


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", [*(("", prefix) for prefix in PREFIXES), *((key, "module.") for key in KEYS)])
def test_a_checkpoint_comes_back_under_the_names_of_the_model(form: tuple[str, str]) -> None:
    key, prefix = form
    state = {prefix + name: weight for name, weight in small_model(3).state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, "run.ckpt")
    built = load_model("process:small_model", "run.ckpt")
    pruned, report = pathlift.prune(built, (1, 4, 4), 0.5)
    expected = pathlift.pruning.apply_masks(small_model(3), report.masks)
    x = torch.randn(3, 1, 4, 4)
    for suffix in (".safetensors", ".pt"):
        pathlift.save(pruned, f"pruned{suffix}")
        model = small_model(7)
        model.load_state_dict(read_state(f"pruned{suffix}"), strict=True)
        assert torch.equal(model(x), expected(x))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("suffix", RARELY)
def test_the_command_line_writes_what_it_pruned_and_rescaled(suffix: str) -> None:
    torch.save({"state_dict": {f"model.{name}": own for name, own in small_model(3).state_dict().items()}}, "run.ckpt")
    given = ("process:small_model", "--weights", "run.ckpt", "--shape", "1,4,4")
    done = run("prune", *given, "--amount", "0.5", "--out", f"p{suffix}", "--masks", "masks.safetensors")
    assert done.code == 0, done
    masks = pathlift.pruning.load_masks("masks.safetensors")
    check_file(f"p{suffix}", pathlift.pruning.apply_masks(small_model(3), masks), torch.randn(3, 1, 4, 4))
    done = run("rescale", *given, "--to", "random", "--choices", "0.5,2", "--out", f"r{suffix}")
    assert done.code == 0, done
    if suffix in PROGRAMS:
        check_file(f"r{suffix}", small_model(3), torch.randn(3, 1, 4, 4))
        assert not same(load_model(f"r{suffix}", trust=True).state_dict()["0.weight"], small_model(3)[0].weight)
    else:
        groups = pathlift.symmetries(small_model(3), (1, 4, 4))
        check_file(f"r{suffix}", pathlift.rescaling.with_state(small_model(3), groups.randomize([0.5, 2], 0)),
                   torch.randn(3, 1, 4, 4))  # fmt: skip


# ---- nothing is written


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "no folder": (lambda: "gone/m", "'gone', which does not exist"),
    "a folder": (lambda: _made("m", folder=True), "folder"),
    "there already": (lambda: _made("m"), "exists already"),
    "under a file": (lambda: f"{_made('own', suffix='')}/m", "is a file"),
}


def _made(name: str, *, folder: bool = False, suffix: str | None = None) -> str:
    for own in ALL if suffix is None else (suffix,):
        Path(name + own).mkdir() if folder else Path(name + own).write_bytes(b"months of work")
    return name


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", REFUSED)
def test_where_nothing_can_be_written_nothing_is(name: str, suffix: str) -> None:
    place, words = REFUSED[name]
    path = place() + suffix
    before = leaves()
    with pytest.raises(pathlift.InputError, match=words):
        pathlift.save(small_model(), path, (1, 4, 4))
    for command in (("prune", "--amount", "0.5"), ("rescale", "--to", "normal")):
        done = run(command[0], "process:small_model", *command[1:], "--shape", "1,4,4", "--out", path)
        assert done.code == 2 and done.stderr.count("\n") == 1 and not done.stdout, done
    assert leaves() == before


def test_a_file_is_replaced_only_when_that_is_said() -> None:
    _made("m")
    pathlift.save(tied(), "m.pt", overwrite=True)
    assert set(read_state("m.pt")) == set(tied().state_dict())
    given = ("prune", "process:small_model", "--amount", "0.5", "--shape", "1,4,4", "--out", "m.pt2")
    assert run(*given).code == 2 and Path("m.pt2").read_bytes() == b"months of work"
    assert run(*given, "--force").code == 0 and Path("m.pt2").read_bytes()[:2] == b"PK"


@pytest.mark.parametrize("suffix", ["", ".pth", ".txt", ".bin"])
def test_an_ending_that_is_none_is_refused(suffix: str) -> None:
    with pytest.raises(pathlift.InputError, match=r"\.safetensors or \.pt or \.onnx or \.pt2"):
        pathlift.save(tied(), f"m{suffix}", (4,))
    done = run("prune", "process:small_model", "--amount", "0.5", "--shape", "1,4,4", "--out", f"m{suffix}")
    assert done.code == 2 and "must end in" in done.stderr and not leaves()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("suffix", RARELY)
def test_a_full_disk_leaves_nothing(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    given = ("process:small_model", "--shape", "1,4,4", "--out", f"m{suffix}")
    for command in (("prune", *given, "--amount", "0.5"), ("rescale", *given, "--to", "normal")):
        done = run(*command)
        assert done.code == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr, done
    assert not leaves()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_that_takes_no_files_is_refused(suffix: str) -> None:
    Path("locked").mkdir(mode=0o500)
    done = run("prune", "process:small_model", "--amount", "0.5", "--shape", "1,4,4", "--out", f"locked/m{suffix}")
    assert done.code == 2 and "no file can be made" in done.stderr and done.stderr.count("\n") == 1


class Deciding(nn.Linear):
    """Looks at its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > 0 else x


@pytest.mark.parametrize("suffix", PROGRAM_SUFFIXES)
def test_a_model_that_cannot_be_exported_says_why(suffix: str) -> None:
    with pytest.raises(pathlift.InputError, match=r"PyTorch cannot export the model: .*data-dependent") as error:
        pathlift.save(Deciding(4, 4), f"m{suffix}", (4,))
    assert "\n" not in str(error.value) and not leaves()
    with pytest.raises(pathlift.InputError, match="inputs is missing"):
        pathlift.save(tied(), f"m{suffix}")
    with pytest.raises(pathlift.InputError, match="cannot run on inputs"):
        pathlift.save(tied(), f"m{suffix}", (5,))
    assert not leaves()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_model_without_values_has_nothing_to_write(suffix: str) -> None:
    with torch.device("meta"):
        model = tied()
    for hollow in (model, pathlift.capture(model, (4,))):
        with pytest.raises(pathlift.InputError, match="has no values"):
            pathlift.save(hollow, f"m{suffix}", (4,) if hollow is model else None)
    assert not leaves()


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.import_module

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(name=name)
        return found(name, *rest, **named)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ImportError, match=r"pathlift\[onnx\]"):
        pathlift.save(tied(), "m.onnx", (4,))
    done = run("rescale", "process:small_model", "--to", "normal", "--shape", "1,4,4", "--out", "m.onnx")
    assert done.code == 2 and "pathlift[onnx]" in done.stderr and not leaves()


@pytest.mark.parametrize("suffix", RARELY[:2])
@pytest.mark.parametrize("read", [False, True])
def test_a_file_that_gives_other_outputs_is_not_left(suffix: str, read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = small_model()
    if read:
        write_small(f"a{suffix}")
        model = load_model(f"a{suffix}", trust=True)
    network = pathlift.capture(model, (1, 4, 4))
    export, fill = saving._program, saving.program_with

    def moved(module: Any) -> Any:
        made = copy.deepcopy(module)
        with torch.no_grad():
            next(made.parameters()).mul_(1.001)
        return made

    monkeypatch.setattr(saving, "_program", lambda module, examples: export(moved(module), examples))
    monkeypatch.setattr(saving, "program_with", lambda module: fill(moved(module)))
    before = leaves()
    with pytest.raises(pathlift.NumericalError, match="gives other outputs"):
        pathlift.save(network, f"m{suffix}")
    assert leaves() == before


@pytest.mark.parametrize("suffix", RARELY)
def test_the_model_and_the_random_numbers_are_left_alone(suffix: str) -> None:
    model = small_model().train()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    versions = [parameter._version for parameter in model.parameters()]
    pathlift.save(pathlift.capture(model, (1, 4, 4)), f"m{suffix}")
    assert torch.equal(drawn, torch.get_rng_state()) and model.training
    assert versions == [parameter._version for parameter in model.parameters()]
    assert all(same(own, before[name]) for name, own in model.state_dict().items())
