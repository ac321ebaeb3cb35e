"""Weights as people have them: any kind of file, prefix and key gives the numbers of the model; a choice is refused."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import enum
import functools
import importlib.util
import io
import json
import logging
import os
import pathlib
import pickle
import random
import subprocess
import sys
import time
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import pathlift
from pathlift.storage import checkpoints, pickles, sizes
from pathlift.storage.checkpoints import Checkpoint
from pathlift.storage.models import default_shape, load_model, load_state
from pathlift.storage.names import fit
from plain import run

State = dict[str, Tensor]


def mlp(seed: int = 0, classes: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, classes))


def by_hand(state: Mapping[str, Tensor]) -> float:
    """The path-norm of `mlp` with a state: the network of absolute values, fed with ones."""
    one, bias, two, last = (state[name].detach().double().abs() for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    return float((two @ (one.sum(1) + bias) + last).sum())


@functools.cache
def network() -> pathlift.Network:
    return pathlift.capture(mlp(1), (4,))


def norm_of(file: Path | str | Checkpoint, model: nn.Module | None = None) -> float:
    (found,) = pathlift.path_norms(network() if model is None else pathlift.capture(model, (4,)), [file])
    return found.value


@pytest.fixture
def state() -> State:
    return dict(mlp().state_dict())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def right(file: Path, state: Mapping[str, Tensor], **options: Any) -> None:
    """Make sure that a file gives its path-norm, in Python and to a model that is built by name."""
    assert norm_of(Checkpoint(file, **options)) == pytest.approx(by_hand(state), rel=1e-6)
    if not options:
        assert norm_of(file) == norm_of(str(file)) == pytest.approx(by_hand(state), rel=1e-6)
    built = load_model("test_checkpoints:mlp", file, arguments={"seed": 3}, **options)
    assert by_hand(built.state_dict()) == pytest.approx(by_hand(state), rel=1e-6)


# ---- prefixes


PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_forward_module.model.", "a.long.way.down.", "0.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_prefix_that_all_names_share_makes_no_difference(
    prefix: str, suffix: str, state: State, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = {prefix + name: tensor for name, tensor in state.items()}
    file = here / f"run{suffix}"
    save_file(named, file) if suffix == ".safetensors" else torch.save(named, file)
    with caplog.at_level(logging.INFO, "pathlift"):
        right(file, state)
    assert f"'{prefix}'" in caplog.text


def test_names_without_a_prefix_are_not_spoken_of(state: State, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(state, here / "run.pt")
    with caplog.at_level(logging.INFO, "pathlift"):
        right(here / "run.pt", state)
    assert not caplog.text


def test_wrappers_of_torch(state: State, here: Path) -> None:
    model = mlp()
    for name, wrapped in {
        "compiled": torch.compile(model, backend="eager"),
        "parallel": nn.DataParallel(model),
        "both": nn.DataParallel(torch.compile(model, backend="eager")),
        "averaged": torch.optim.swa_utils.AveragedModel(model),
        "inside": torch.compile(nn.Sequential(collections.OrderedDict(net=model)), backend="eager"),
    }.items():
        torch.save(wrapped.state_dict(), here / f"{name}.pt")
        right(here / f"{name}.pt", state)
    inner = nn.Sequential(*(torch.compile(layer, backend="eager") for layer in model))
    torch.save(inner.state_dict(), here / "layers.pt")
    right(here / "layers.pt", state)


def test_two_networks_side_by_side_are_chosen_by_the_beginning_of_their_names(state: State, here: Path) -> None:
    other = mlp(7).state_dict()
    both = {f"generator.{name}": own for name, own in state.items()} | {f"critic.{name}": own for name, own in other.items()}
    save_file(both, here / "both.safetensors")
    torch.save({"state_dict": both, "epoch": 1}, here / "both.ckpt")
    for file in (here / "both.safetensors", here / "both.ckpt"):
        with pytest.raises(pathlift.MismatchError, match="--key critic"):
            load_model("test_checkpoints:mlp", file)
        with pytest.raises(pathlift.MismatchError):
            norm_of(file)
        right(file, state, key="generator")
        right(file, other, key="critic")
        with pytest.raises(pathlift.InputError, match=r"'discriminator'.*critic"):
            Checkpoint(file, key="discriminator")
    right(here / "both.ckpt", state, key="state_dict.generator")


def test_what_lies_beside_the_model_in_a_training_module_is_named(state: State, here: Path) -> None:
    own = {f"model.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": {**own, "loss.weight": torch.ones(2)}}, here / "run.ckpt")
    with pytest.raises(pathlift.MismatchError, match=r"loss\.weight.*begin with model\., say so: --key model\."):
        load_model("test_checkpoints:mlp", here / "run.ckpt")
    right(here / "run.ckpt", state, key="model")


# ---- keys


KEYS = (
    "state_dict", "model_state_dict", "model", "net", "model_ema", "ema", "params_ema", "params", "generator", "weights",
    "network", "my_own_word",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_weights_are_found_under_a_key(key: str, state: State, here: Path) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    beside = {"epoch": 3, "loss": torch.tensor(0.5), "optimizer_state_dict": optimizer.state_dict(), "best": None}
    file = here / "run.pt"
    torch.save({**beside, key: state, "rng": {"cpu": torch.get_rng_state()}}, file)
    right(file, state)
    right(file, state, key=key)
    assert Checkpoint(file).key == key
    torch.save(
        {"pytorch-lightning_version": "2", key: {f"model.{name}": own for name, own in state.items()}}, here / "run.ckpt"
    )
    right(here / "run.ckpt", state)
    torch.save({"run": {key: state}, "history": [1.0, 2.0]}, here / "deep.pth")
    right(here / "deep.pth", state)
    right(here / "deep.pth", state, key="run")
    right(here / "deep.pth", state, key=f"run.{key}")


def test_a_choice_is_refused_until_it_is_made(state: State, here: Path) -> None:
    average, other = mlp(5).state_dict(), mlp(6).state_dict()
    file = here / "run.pt"
    torch.save({"model": state, "model_ema": average, "nets": {"critic": other}}, file)
    for read in (norm_of, load_state, Checkpoint, lambda path: load_model("test_checkpoints:mlp", path)):
        with pytest.raises(pathlift.InputError, match=r"'model' \(4 tensors\), 'model_ema' \(4 tensors\), 'nets.critic'"):
            read(file)
    for key, tensors in {"model": state, "model_ema": average, "nets.critic": other, "nets": other}.items():
        right(file, tensors, key=key)
    with pytest.raises(pathlift.InputError, match="several"):
        Checkpoint(file, key="modle")


def test_the_same_weights_under_two_keys_are_no_choice(state: State, here: Path) -> None:
    torch.save({"state_dict": state, "model": state}, here / "run.pt")
    right(here / "run.pt", state)


def test_tensors_beside_the_weights_are_no_weights(state: State, here: Path) -> None:
    torch.save({"mean": torch.zeros(3), "model": state, "std": torch.ones(3)}, here / "run.pt")
    right(here / "run.pt", state)
    torch.save({"state_dict": state, "statistics": {"mean": torch.zeros(3), "std": torch.ones(3)}}, here / "run.pt")
    right(here / "run.pt", state)
    torch.save({**state, "epoch": 3, "args": argparse.Namespace(lr=1), "name": "run", "history": [1.0]}, here / "flat.pt")
    right(here / "flat.pt", state)


# ---- what lies beside the weights


@dataclass
class Settings:
    rate: float
    layers: tuple[int, ...]


class Colour(enum.Enum):
    RED = 1


class Attributes(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Listed(list[int]):
    pass


def configuration() -> object:
    """An object of a class that is called as OmegaConf's is, which need not be installed."""
    return type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})()


BESIDE: dict[str, Callable[[], object]] = {
    "namespace": lambda: argparse.Namespace(lr=0.1, data=pathlib.Path("here")),
    "numpy scalar": lambda: np.float64(0.5),
    "numpy array": lambda: np.arange(3),
    "path": lambda: pathlib.PurePosixPath("a/b"),
    "ordered": lambda: collections.OrderedDict(a=1),
    "counter": lambda: collections.Counter("abc"),
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "deque": lambda: collections.deque([1, 2], maxlen=3),
    "date": lambda: dt.datetime(2024, 1, 1),
    "dataclass": lambda: Settings(0.1, (1, 2)),
    "enum": lambda: Colour.RED,
    "attributes": lambda: Attributes(lr=0.1, nested=Attributes(a=[1])),
    "list": lambda: Listed([1, 2]),
    "set": lambda: {1, (2, 3), frozenset("ab")},
    "tuples for keys": lambda: {(1, 2): "a", None: "b"},
    "bytes": lambda: (b"abc", bytearray(b"d"), 1 << 100, 2.5, 1j),
    "dtype": lambda: [torch.float16, torch.device("cpu"), torch.Size([1])],
    "class": lambda: Settings,
    "schedule": lambda: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)]), 1).state_dict(),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_settings_beside_the_weights_are_left_alone(beside: str, protocol: int, state: State, here: Path) -> None:
    content = {"before": BESIDE[beside](), "model": state, "after": [BESIDE[beside]()]}
    torch.save(content, here / "run.pt", pickle_protocol=protocol)
    right(here / "run.pt", state)
    torch.save(content, here / "old.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    right(here / "old.pt", state)


def test_settings_of_classes_that_are_not_installed_are_left_alone(
    state: State, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("omegaconf.dictconfig")
    config = configuration()
    config.__dict__["_content"] = {"lr": 0.1}
    module.DictConfig = type(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    torch.save({"state_dict": state, "hyper_parameters": config}, here / "run.ckpt")
    monkeypatch.delitem(sys.modules, "omegaconf.dictconfig")
    monkeypatch.delitem(sys.modules, "omegaconf")
    right(here / "run.ckpt", state)
    assert "omegaconf.dictconfig" not in sys.modules


class Weights(dict[str, Tensor]):
    """A dictionary of a class of its own."""


def test_weights_in_dictionaries_of_other_classes(state: State, here: Path) -> None:
    for kind in (collections.OrderedDict, Weights, lambda own: collections.defaultdict(int, own)):
        torch.save({"model": kind(state)}, here / "run.pt")
        right(here / "run.pt", state)


class Loud:
    """Would leave a mark if a pickle of it were run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("RAN",)


def test_code_beside_the_weights_is_not_run(state: State, here: Path) -> None:
    for old in (True, False):
        torch.save({"model": state, "hook": Loud()}, here / "run.pt", _use_new_zipfile_serialization=old)
        right(here / "run.pt", state)
        torch.save({**state, "0.weight": Loud()}, here / "bad.pt", _use_new_zipfile_serialization=old)
        for read in (norm_of, load_state, Checkpoint):
            with pytest.raises(pathlift.InputError, match=r"'0.weight'.*holds code or objects \(posix.mkdir\)"):
                read(here / "bad.pt")
    assert not (here / "RAN").exists()


def test_a_whole_module_is_refused_with_a_remedy(here: Path) -> None:
    for content in (mlp(), {"epoch": 1, "model": mlp()}):
        torch.save(content, here / "whole.pt")
        with pytest.raises(pathlift.InputError, match=r"whole module.*Sequential.*torch.save\(model.state_dict\(\)"):
            Checkpoint(here / "whole.pt")
    scripted = torch.jit.script(mlp())  # type: ignore[no-untyped-call]
    scripted.save("scripted.pt")
    with pytest.raises(pathlift.InputError, match=r"TorchScript.*model.state_dict\(\)"):
        Checkpoint(here / "scripted.pt")


# ---- kinds of files


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".tar", ""])
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_files_of_torch_save(suffix: str, new: bool, protocol: int, state: State, here: Path) -> None:
    file = here / f"run{suffix}"
    torch.save(state, file, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    right(file, state)


def test_safetensors_are_known_by_what_they_are(state: State, here: Path) -> None:
    save_file(state, here / "run.bin")
    right(here / "run.bin", state)


@pytest.mark.parametrize("new", [True, False])
def test_tensors_are_those_that_were_saved(new: bool, here: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "turned": base.t(),
        "part": base[1:3, ::2],
        "last": base[-1, -1],
        "wide": torch.ones(1).expand(3),
        "empty": torch.ones(0, 3),
        "number": torch.tensor(2.5),
        "parameter": nn.Parameter(base[0]),
        "truth": torch.tensor([True, False, True]),
        "none": torch.ones(3)[0:0],
        **{str(dtype).removeprefix("torch."): torch.tensor([[1, 2]]).to(dtype) for dtype in sizes_of_all_kinds()},
    }
    torch.save(tensors, here / "odd.pt", _use_new_zipfile_serialization=new)
    found = load_state(here / "odd.pt")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name
        assert Checkpoint(here / "odd.pt").specs[name].shape == tensor.shape


def sizes_of_all_kinds() -> list[torch.dtype]:
    whole = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    return [torch.float64, torch.float32, torch.float16, torch.bfloat16, *whole]


def test_views_in_the_old_format(here: Path) -> None:
    base = torch.arange(10.0)
    torch.save({"a": base[:4], "b": base[4:], "c": base.view(2, 5)}, here / "v.pt", _use_new_zipfile_serialization=False)
    found = load_state(here / "v.pt")
    assert torch.equal(found["a"], base[:4]) and torch.equal(found["b"], base[4:]) and torch.equal(found["c"], base.view(2, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_other_precisions(dtype: torch.dtype, suffix: str, here: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in mlp().state_dict().items()}
    file = here / f"run{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    right(file, state)


@pytest.mark.parametrize("bits", [{"*": 4}, {"0.weight": "fp8_e5m2", "2.weight": 3}], ids=str)
def test_quantised_weights_are_what_they_stand_for(bits: Any, here: Path) -> None:
    quantized, report = pathlift.quantize(mlp(), (4,), bits, granularity=2, affine="fp8_e5m2" not in bits.values(), moments=0)
    report.save(here / "q.safetensors")
    right(here / "q.safetensors", quantized.state_dict())
    found = load_state(here / "q.safetensors")
    assert found.keys() == quantized.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in quantized.state_dict().items())
    assert pathlift.path_metric(quantized, here / "q.safetensors", (4,)).upper == 0


def described(**change: Any) -> dict[str, str]:
    """The metadata of a tensor ``w`` of whole numbers, one scale for two of them."""
    data = {"block_size": [1, 2], "dtype": {"_type": "torch.dtype", "_data": "float32"}} | change.pop("data", {})
    about = {"_type": "IntxUnpackedToInt8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale", "zero_point"]}
    return {"tensor_names": '["w"]', "w": json.dumps(about | change)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_type": "Int4Tensor"}, "its tensor 'w' is a Int4Tensor, which is not read"),
        ({"_tensor_data_names": ["qdata", "scale"]}, "is not read"),
        ({"data": {"block_size": [1, 3]}}, r"do not fit it: shape \(3, 2\) for \(3, 4\)"),
        ({"data": {"block_size": [12]}}, "do not fit it"),
        ({"data": {"block_size": [1, 2, 1]}}, "do not fit it"),
        ({"data": {"block_size": [1, 0]}}, "do not fit it"),
        ({"data": {"dtype": {"_data": "int8"}}}, "is said to be of type 'int8'"),
        ({"data": {"block_size": "many"}}, "cannot be read"),
        ({"data": {"dtype": {"_data": "no_type"}}}, "cannot be read"),
    ],
    ids=str,
)
def test_weights_quantised_otherwise_are_refused(change: dict[str, Any], said: str, here: Path) -> None:
    parts = {"_w_qdata": torch.ones(3, 4, dtype=torch.int8), "_w_scale": torch.ones(3, 2), "_w_zero_point": torch.zeros(3, 2)}
    save_file(parts, here / "w.safetensors", described())
    assert torch.equal(load_state(here / "w.safetensors")["w"], torch.ones(3, 4))
    save_file(parts, here / "w.safetensors", described(**change))
    with pytest.raises(pathlift.InputError, match=said):
        load_state(here / "w.safetensors")
    save_file({"_w_qdata": parts["_w_qdata"]}, here / "w.safetensors", described())
    with pytest.raises(pathlift.InputError, match="its tensor 'w' lacks the part '_w_scale'"):
        load_state(here / "w.safetensors")


def test_eight_bit_numbers_without_scales_are_refused(here: Path) -> None:
    save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, here / "w.safetensors")
    with pytest.raises(pathlift.InputError, match=r"holds 'w' in torch\.float8_e4m3fn, and does not say what scales it"):
        load_state(here / "w.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_several_files_with_an_index(suffix: str, state: State, here: Path) -> None:
    folder = here / "sharded"
    folder.mkdir()
    files = {}
    for number, (name, tensor) in enumerate(state.items()):
        files[name] = f"part-{number}{suffix}"
        one = {name: tensor}
        save_file(one, folder / files[name]) if suffix == ".safetensors" else torch.save(one, folder / files[name])
    index = folder / f"model{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    right(index, state)
    right(folder, state)
    index.unlink()
    right(folder, state)


def test_the_usual_file_of_a_folder_is_taken(state: State, here: Path) -> None:
    save_file(state, here / "model.safetensors")
    torch.save(state, here / "pytorch_model.bin")
    torch.save(torch.optim.SGD(mlp().parameters()).state_dict(), here / "optimizer.pt")
    right(here, state)
    (here / "model.safetensors").unlink()
    right(here, state)


@pytest.mark.hunt
def test_a_folder_of_checkpoints_is_these_in_their_order(here: Path) -> None:
    folder = here / "runs"
    folder.mkdir()
    states = {epoch: mlp(epoch).state_dict() for epoch in (2, 10, 1)}
    for epoch, own in states.items():
        torch.save({"state_dict": own}, folder / f"epoch{epoch}.pt")
    (folder / "notes.txt").write_text("not weights")
    expected = [by_hand(states[epoch]) for epoch in (1, 2, 10)]
    for others in (folder, str(folder), [folder]):
        assert [found.value for found in pathlift.path_norms(mlp(), others, (4,))] == pytest.approx(expected)
        assert len(list(pathlift.path_metrics(mlp(), others, (4,)))) == 3
        assert pathlift.path_kernel(others, (4,), model=mlp()).cosine.shape == (3, 3)
    with pytest.raises(pathlift.InputError, match=r"is in 'epoch1\.pt' and in 'epoch2\.pt'"):
        norm_of(Checkpoint(folder))
    with pytest.raises(pathlift.InputError, match=r"holds no \.safetensors file"):
        list(pathlift.path_norms(mlp(), [(here / "empty").mkdir() or here / "empty"], (4,)))


def test_bits_that_were_flipped_on_the_disk_are_found(state: State, here: Path) -> None:
    file = here / "run.pt"
    torch.save(state, file)
    content = bytearray(file.read_bytes())
    content[content.index(state["0.weight"].numpy().tobytes()) + 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(pathlift.InputError, match=r"'0.weight' cannot be read.*checksum"):
        norm_of(file)


# ---- masks and weight norm


def masked(seed: int = 0) -> nn.Module:
    model = mlp(seed)
    prune.l1_unstructured(model[0], "weight", 0.2)
    return model


def normed_old() -> nn.Module:
    model = mlp()
    model[0] = weight_norm(model[0])
    return model


def normed_new() -> nn.Module:
    model = mlp()
    model[0] = parametrizations.weight_norm(model[0])
    return model


FORMS: dict[str, Callable[[], nn.Module]] = {"plain": mlp, "masked": masked, "old norm": normed_old, "new norm": normed_new}


@pytest.mark.one_in(15)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("model", FORMS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_weight_is_the_same_however_it_is_written_down(saved: str, model: str, prefix: str, here: Path) -> None:
    source = FORMS[saved]()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter *= 1.25
    file = here / "run.pt"
    torch.save({prefix + name: tensor for name, tensor in source.state_dict().items()}, file)
    expected = pathlift.path_norm(source, (4,)).value
    target = FORMS[model]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", pathlift.errors.PathliftWarning)
        assert norm_of(file, target) == pytest.approx(expected, rel=1e-6)
    told = [warning for warning in caught if "weight norm" in str(warning.message)]
    assert bool(told) == (saved.endswith("norm") and not model.endswith("norm"))
    assert pathlift.path_norm(pathlift.rescaling.with_state(target, file), (4,)).value == pytest.approx(expected, rel=1e-6)
    assert pathlift.path_metric(source, file, (4,)).value <= 1e-6 * expected
    built = load_model("test_checkpoints:" + FORMS[model].__name__, file)
    assert pathlift.path_norm(built, (4,)).value == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_weight_that_weight_norm_cannot_give_is_refused(state: State, here: Path) -> None:
    state["0.weight"][1] = 0
    torch.save(state, here / "run.pt")
    for model in (normed_old(), normed_new()):
        with pytest.raises(pathlift.MismatchError, match="weight norm"):
            norm_of(here / "run.pt", model)


class Scaled(nn.Module):
    """Another thing that is done with two tensors of the shapes of lengths and directions."""

    def forward(self, lengths: Tensor, directions: Tensor) -> Tensor:
        return lengths * directions

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(weight), 1), 2.0), weight / 2


def scaled() -> nn.Module:
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", Scaled(), unsafe=True)
    return model


def positive() -> nn.Module:
    model = normed_new()
    parametrize.register_parametrization(model[0], "weight", nn.ReLU())
    return model


@pytest.mark.parametrize("model", [scaled, positive])
def test_what_is_not_weight_norm_is_not_taken_for_it(model: Callable[[], nn.Module], state: State, here: Path) -> None:
    torch.save(state, here / "run.pt")
    refusals: tuple[Callable[[], object], ...] = (
        lambda: norm_of(here / "run.pt", model()),
        lambda: pathlift.path_metric(model(), state, (4,)),
        lambda: pathlift.path_metric(model(), mlp(), (4,)),
        lambda: pathlift.path_metric(mlp(), model(), (4,)),
        lambda: pathlift.rescaling.with_state(model(), state),
        lambda: load_model(f"test_checkpoints:{model.__name__}", here / "run.pt"),
    )
    for refused in refusals:
        with pytest.raises(pathlift.MismatchError):
            refused()
    torch.save(model().state_dict(), here / "own.pt")
    assert norm_of(here / "own.pt", model()) == pathlift.path_norm(model(), (4,)).value


class Gains(nn.Module):
    """Its parameters are called as those of weight norm are, and are none."""

    def __init__(self) -> None:
        super().__init__()
        self.w_g = nn.Parameter(torch.ones(4))
        self.w_v = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.w_v) * 2 + self.w_g


def test_names_that_only_look_like_pairs(here: Path) -> None:
    model = Gains()
    torch.save(model.state_dict(), here / "run.pt")
    assert norm_of(here / "run.pt", Gains()) == pathlift.path_norm(model, (4,)).value
    given = {"a_orig": torch.ones(2), "a_mask": torch.ones(3)}
    assert set(fit(["b"], given, lambda _: None).recipes) == {"a_orig", "a_mask"}
    given = {"a": torch.ones(2), "a_orig": torch.ones(2), "a_mask": torch.ones(2)}
    assert set(fit(["a"], given, lambda _: None).recipes) == set(given)


# ---- other models


def test_another_number_of_classes_names_layer_numbers_and_remedy(here: Path) -> None:
    torch.save({"state_dict": {f"module.{name}": own for name, own in mlp(0, 7).state_dict().items()}}, here / "seven.pt")
    with pytest.raises(pathlift.MismatchError, match=r"'2' has 7 outputs.*2 in the model.*--model-arg num_classes=7"):
        load_model("test_checkpoints:mlp", here / "seven.pt")
    assert load_model("test_checkpoints:mlp", here / "seven.pt", arguments={"classes": 7})


def test_a_command_opens_a_file_of_weights_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": mlp(0, 2).state_dict(), "b": mlp(1, 2).state_dict()}, here / "m.pt")
    opened, opens = [], checkpoints._opened
    monkeypatch.setattr(checkpoints, "_opened", lambda path, key: opened.append(path) or opens(path, key))
    done = run("norm", "test_checkpoints:mlp", "--shape", "4", "--weights", str(here / "m.pt"), "--key", "b", "--json")
    assert done.code == 0 and len(opened) == 1, done
    assert json.loads(done.stdout)["value"] == pathlift.path_norm(mlp(1, 2), (4,)).value


def test_a_checkpoint_that_is_open_is_loaded(here: Path) -> None:
    torch.save({"a": mlp(0, 2).state_dict(), "b": mlp(1, 2).state_dict()}, here / "m.pt")
    checkpoint = Checkpoint(here / "m.pt", key="b")
    loaded = load_model("test_checkpoints:mlp", checkpoint)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in mlp(1, 2).state_dict().items())
    with pytest.raises(pathlift.InputError, match="leave it out"):
        load_model("test_checkpoints:mlp", checkpoint, key="b")


def test_a_number_in_the_place_of_a_vector_is_a_mismatch(here: Path) -> None:
    torch.save({**mlp(0, 2).state_dict(), "2.bias": torch.tensor(1.0)}, here / "m.pt")
    with pytest.raises(pathlift.MismatchError, match=r"'2.bias' has shape \(\)"):
        load_model("test_checkpoints:mlp", here / "m.pt")


def test_tied_weights_may_be_saved_once(here: Path) -> None:
    model = tied()
    state = model.state_dict()
    for kept in ("0.weight", "2.weight"):
        torch.save({name: own for name, own in state.items() if "bias" in name or name == kept}, here / "run.pt")
        assert torch.equal(load_model("test_checkpoints:tied", here / "run.pt", generator=5)[0].weight, model[0].weight)
    torch.save({name: own for name, own in state.items() if "bias" in name}, here / "run.pt")
    with pytest.raises(pathlift.MismatchError, match=r"missing: 0\.weight"):
        load_model("test_checkpoints:tied", here / "run.pt")


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


# ---- folders of transformers


def folder_of_transformers(folder: Path, model: nn.Module) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet", "image_size": 32}))
    save_file({name: own.contiguous() for name, own in model.state_dict().items()}, folder / "model.safetensors")


def test_a_folder_of_transformers_is_built_from_its_settings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, which reads settings as it does: what is asked of it, and which weights are loaded."""
    asked: dict[str, Any] = {}

    class AutoConfig:
        @staticmethod
        def from_pretrained(folder: Path, **options: Any) -> types.SimpleNamespace:
            asked.update(options)
            return types.SimpleNamespace(**json.loads((folder / "config.json").read_text()), **options)

    class AutoModelForImageClassification:
        @staticmethod
        def from_config(config: types.SimpleNamespace, *, trust_remote_code: bool) -> nn.Module:
            assert not trust_remote_code and config.return_dict is False
            return mlp(9, classes=getattr(config, "num_labels", 2))

    package = types.ModuleType("transformers")
    package.AutoConfig, package.AutoModelForImageClassification = AutoConfig, AutoModelForImageClassification  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", package)
    folder_of_transformers(here / "net", mlp())
    assert by_hand(load_model("hf:net").state_dict()) == pytest.approx(by_hand(mlp().state_dict()))
    assert asked == {"local_files_only": True, "trust_remote_code": False}
    torch.save(mlp(4).state_dict(), here / "other.pt")
    assert by_hand(load_model("hf:net", here / "other.pt").state_dict()) == pytest.approx(by_hand(mlp(4).state_dict()))
    with pytest.raises(pathlift.MismatchError, match="--model-arg num_labels=2"):
        load_model("hf:net", arguments={"num_labels": 5})
    (here / "net" / "model.safetensors").unlink()
    for name, words in {"hf:net": r"holds no \.safetensors", "hf:none": r"no file 'none/config\.json'"}.items():
        with pytest.raises(pathlift.InputError, match=words):
            load_model(name)


@pytest.mark.parametrize(
    ("config", "prepared", "shape"),
    [
        ({"image_size": 32}, None, (3, 32, 32)),
        ({"image_size": [32, 48], "num_channels": 1}, None, (1, 32, 48)),
        ({}, {"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (3, 224, 224)),
        ({}, {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 192}}, (3, 224, 192)),
        ({}, {"size": 64}, (3, 64, 64)),
        ({}, None, None),
        ({"image_size": "large"}, None, None),
    ],
)
def test_the_shape_of_pictures_is_in_the_folder(config: Any, prepared: Any, shape: Any, here: Path) -> None:
    (here / "config.json").write_text(json.dumps(config))
    if prepared is not None:
        (here / "preprocessor_config.json").write_text(json.dumps(prepared))
    if shape is None:
        with pytest.raises(pathlift.InputError, match="--shape"):
            default_shape(f"hf:{here}")
    else:
        assert default_shape(f"hf:{here}") == shape


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the extra 'transformers' is not installed")
def test_a_classifier_of_transformers(here: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    model.save_pretrained(here / "net")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.model(x).logits
            return logits

    expected = pathlift.path_norm(Logits(), (3, 32, 32)).log10
    assert pathlift.path_norm(load_model("hf:net"), (3, 32, 32)).log10 == pytest.approx(expected)


# ---- every function that takes another network


X = torch.linspace(-1, 1, 8).reshape(2, 4)

TAKERS: dict[str, Callable[[nn.Module, Any], object]] = {
    "path_metric": lambda model, other: pathlift.path_metric(model, other, (4,)).upper,
    "path_metric_bounds": lambda model, other: [own.log10 for own in pathlift.metric.path_metric_bounds(model, other, (4,))],
    "path_norms": lambda model, other: [own.value for own in pathlift.path_norms(model, [other], (4,))],
    "log_path_norm": lambda model, other: pathlift.log_path_norm(pathlift.capture(model, (4,)), other).item(),
    "path_metrics": lambda model, other: [own.upper for own in pathlift.path_metrics(model, [other], (4,))],
    "path_kernel": lambda model, other: pathlift.path_kernel([model, other], (4,)).cosine.tolist(),
    "equivalent": lambda model, other: bool(pathlift.equivalent(model, other, (4,))),
    "align": lambda model, other: pathlift.align(model, other, (4,)).factors.tolist(),
    "rescaling_distance": lambda model, other: pathlift.rescaling.rescaling_distance(model, other, (4,)),
    "lipschitz_bound": lambda model, other: pathlift.lipschitz_bound(model, other, X).tolist(),
    "expected_bound": lambda model, other: pathlift.lipschitz.expected_bound(model, other, X).tolist(),
    "certify": lambda model, other: pathlift.certify(model, X, other).bound.tolist(),
    "attack": lambda model, other: pathlift.attack(model, X, other).margin.tolist(),
    "with_state": lambda model, other: pathlift.path_norm(pathlift.rescaling.with_state(model, other), (4,)).value,
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("function", TAKERS)
def test_a_file_stands_for_its_weights(function: str, here: Path) -> None:
    other = mlp(3).state_dict()
    torch.save({"state_dict": {f"model.{name}": own for name, own in other.items()}}, here / "other.ckpt")
    save_file(other, here / "other.safetensors")
    expected = str(TAKERS[function](mlp(), other))
    for file in (here / "other.ckpt", str(here / "other.safetensors"), Checkpoint(here / "other.ckpt")):
        assert str(TAKERS[function](mlp(), file)) == expected
    with pytest.raises(pathlift.InputError, match=r"no file.*none\.pt"):
        TAKERS[function](mlp(), here / "none.pt")
    torch.save(nn.Linear(4, 1).state_dict(), here / "wrong.pt")
    with pytest.raises(pathlift.MismatchError):
        TAKERS[function](mlp(), here / "wrong.pt")


def test_weights_of_any_file_are_read_as_they_are_needed(state: State, here: Path) -> None:
    torch.save({"state_dict": {f"model.{name}": own for name, own in state.items()}}, here / "run.ckpt")
    with torch.device("meta"):
        hollow = mlp()
    streamed = pathlift.stream(hollow, (4,), weights=here / "run.ckpt")
    assert pathlift.path_norm(streamed).value == pathlift.path_norm(mlp(), (4,)).value
    for copy in (
        pickle.loads(pickle.dumps(streamed)),
        pickle.loads(pickle.dumps(pathlift.stream(masked(), (4,), weights="run.ckpt"))),
    ):
        assert pathlift.path_norm(copy).value == pytest.approx(pathlift.path_norm(mlp(), (4,)).value)


# ---- the command line


NETS = "from torch import nn\ndef mlp(): return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))\n"


@pytest.fixture
def nets(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    (here / "nets_of_checkpoints.py").write_text(NETS)
    monkeypatch.syspath_prepend(here)

    def done(command: str, *arguments: str, code: int = 0) -> Any:
        model = ("--model", "nets_of_checkpoints:mlp") if command == "compare" else ("nets_of_checkpoints:mlp",)
        found = run(command, *(model if command != "compare" else ()), *arguments, *(model if command == "compare" else ()),
                    "--shape", "4", *(("--json",) if code == 0 else ()))  # fmt: skip
        assert found.code == code, found
        return (json.loads(found.stdout), found.stderr) if code == 0 else found.stderr

    yield done
    sys.modules.pop("nets_of_checkpoints", None)


def test_the_command_line_says_which_prefix_it_left_out(nets: Callable[..., Any], state: State) -> None:
    torch.save({"state_dict": {f"model.{name}": own for name, own in state.items()}}, "run.ckpt")
    found, notes = nets("norm", "--weights", "run.ckpt")
    assert found["value"] == pytest.approx(by_hand(state))
    assert notes.count("\n") == 1 and "'model.'" in notes
    torch.save(state, "plain.pt")
    found, notes = nets("norm", "--weights", "plain.pt")
    assert found["value"] == pytest.approx(by_hand(state)) and not notes


@pytest.mark.hunt
def test_the_command_line_chooses_by_key(nets: Callable[..., Any], state: State) -> None:
    average = mlp(5).state_dict()
    torch.save({"model": state, "ema": average}, "run.pt")
    refused = nets("norm", "--weights", "run.pt", code=2)
    assert "'model'" in refused and "--key ema" in refused and refused.count("\n") == 1
    for key, tensors in {"model": state, "ema": average}.items():
        assert nets("norm", "--weights", "run.pt", "--key", key)[0]["value"] == pytest.approx(by_hand(tensors))
    for command in ("score", "rescale"):
        nets(command, "--weights", "run.pt", "--key", "ema")
    nets("prune", "--weights", "run.pt", "--key", "ema", "--amount", "0.5")
    found, _ = nets("metric", "run.pt", "--weights", "run.pt", "--key", "ema", "--other-key", "ema")
    assert found["upper"] == 0
    found, _ = nets("equivalent", "run.pt", "--weights", "run.pt", "--key", "ema", "--other-key", "ema")
    assert found["equivalent"]
    assert "--other-key has no effect" in nets("metric", "torch.nn:Identity", "--other-key", "a", code=2)


def test_the_command_line_reads_folders(nets: Callable[..., Any], here: Path) -> None:
    (here / "runs").mkdir()
    for epoch in (10, 9):
        torch.save(mlp(epoch).state_dict(), here / "runs" / f"epoch{epoch}.pt")
    expected = [by_hand(mlp(epoch).state_dict()) for epoch in (9, 10)]
    found, _ = nets("norm", "--weights", "runs")
    assert [10 ** row["log10"] for row in found["checkpoints"]] == pytest.approx(expected)
    assert [Path(row["weights"]).name for row in found["checkpoints"]] == ["epoch9.pt", "epoch10.pt"]
    found, _ = nets("compare", "runs")
    assert [Path(name).name for name in found["checkpoints"]] == ["epoch9.pt", "epoch10.pt"] and len(found["cosine"]) == 2


# ---- files that were damaged on their way, or by someone


KINDS: dict[str, Callable[[State, Path], object]] = {
    "safetensors": lambda state, path: save_file(state, path),
    "archive": lambda state, path: torch.save({"model": state, "epoch": 3}, path),
    "protocol 4": lambda state, path: torch.save({"model": state, "args": Settings(0.1, (1,))}, path, pickle_protocol=4),
    "old": lambda state, path: torch.save({"model": state}, path, _use_new_zipfile_serialization=False),
}


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Flip bits, write other bytes, cut, double or move pieces."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 3, 10])):
        place, other = draw.randrange(len(changed)), draw.randrange(len(changed))
        size = draw.choice([1, 2, 4, 8, 64])
        match draw.randrange(6):
            case 0 | 1:
                changed[place] ^= 1 << draw.randrange(8)
            case 2:
                changed[place] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, *b".R}]bcth"])
            case 3:
                changed[place : place + size] = changed[other : other + size]
            case 4:
                changed[place:place] = changed[other : other + size]
            case 5:
                del changed[place : draw.choice([place + size, len(changed)])]
        if not changed:
            return b""
    return bytes(changed)


def trusted(path: Path, kind: str) -> Mapping[str, Tensor] | None:
    """What the makers of a format read from a file; None where they cannot, or not without running code."""
    try:
        content = load_file(path) if kind == "safetensors" else torch.load(path, weights_only=True)
    except Exception:  # a damaged file: they raise anything
        return None
    return content.get("model", content) if isinstance(content, Mapping) else None


def same_bytes(one: Tensor, two: Tensor) -> bool:
    plain = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*plain)


def read_or_why_not(path: Path) -> tuple[State | None, str]:
    try:
        return load_state(path), ""
    except pathlift.InputError as error:
        return None, str(error)


def read_or_refused(kind: str, seeds: range, folder: Path) -> tuple[int, int]:
    """Read mutations of a file. Each must be refused in a sentence, or give what the makers of the format read."""
    whole, bad = folder / "whole.bin", folder / "bad.bin"
    KINDS[kind](dict(mlp().state_dict()), whole)
    content, read, compared = whole.read_bytes(), 0, 0
    for seed in seeds:
        bad.write_bytes(mutated(content, random.Random(f"{kind} {seed}")))
        start = time.monotonic()
        found, refusal = read_or_why_not(bad)
        assert time.monotonic() - start < 20, (kind, seed)
        if found is None:
            assert "bad.bin" in refusal and "\n" not in refusal, (kind, seed, refusal)
            continue
        read += 1
        expected = trusted(bad, kind)
        if expected is not None:
            compared += 1
            assert all(same_bytes(found[name], tensor) for name, tensor in expected.items() if name in found), (kind, seed)
    return read, compared


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_read_as_it_is(kind: str, here: Path) -> None:
    read, compared = read_or_refused(kind, range(100), here)
    assert read >= 3 and (compared >= 3 or kind == "protocol 4")  # which torch.load does not read


LIMITED = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_checkpoints import KINDS, read_or_refused
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
limit = int(status["VmData"].split()[0]) * 1024 + 2 * 2**30
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(read_or_refused(sys.argv[2], range(100, 100 + int(sys.argv[3])), Path.cwd()))
"""


@pytest.mark.hunt
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_files(kind: str, here: Path) -> None:
    program = [sys.executable, "-W", "ignore", "-c", LIMITED, str(Path(__file__).parent), kind, "1000"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=here, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr


def test_an_archive_of_a_machine_of_the_other_order_of_bytes(state: State, here: Path) -> None:
    torch.save(state, here / "little.pt")
    with zipfile.ZipFile(here / "little.pt") as old, zipfile.ZipFile(here / "big.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("byteorder"):
                content = b"big"
            elif "/data/" in name:
                content = np.frombuffer(content, dtype="<f4").astype(">f4").tobytes()
            new.writestr(name, content)
    right(here / "big.pt", state)


@pytest.mark.hunt
def test_a_tensor_within_calls_within_calls_is_refused(here: Path) -> None:
    program = b"}U\x06weight" + b"ctorch._utils\n_rebuild_parameter\n(" * 50_000 + b"K\x01" + b"tR" * 50_000 + b"s."
    torch.save({}, here / "empty.pt")
    with zipfile.ZipFile(here / "empty.pt") as old, zipfile.ZipFile(here / "deep.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, program if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(pathlift.InputError, match=r"'weight'.*damaged"):
        Checkpoint(here / "deep.pt")


# ---- pickles as data


def test_a_pickle_is_read_as_data() -> None:
    content = {"a": [1, 2.5, "text", b"bytes", None, True], "b": ({"c": ()}, [[]]), "d": {1, 2}, "e": 1 << 70}
    for protocol in range(6):
        found = pickles.read_pickle(io.BytesIO(pickle.dumps(content, protocol)), lambda saved: saved)
        if protocol < 3:  # bytes are a call there
            found["a"][3] = content["a"][3]  # type: ignore[index]
        if protocol < 4:  # and sets
            found["d"] = content["d"]
        assert {**found, "d": set(found["d"])} == content


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"N",
        b"0.",
        b"t.",
        b"(t",
        b"R.",
        b"NNR.",
        b"N)R" * 50,
        b"h\x05.",
        b"a.",
        b"]](a.",
        b"NNa.",
        b"NNNs.",
        b"}(Nu.",
        b"b.",
        b"c\n.",
        b"cos\nsystem",
        b"cos\nsystem\n(S'touch RAN'\ntR",
        b"\x82\x01.",
        b"\x97.",
        b"\x8c\xffabc.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\xff.",
        b"I" + b"1" * 10000 + b"\n.",
        b"ccollections\nOrderedDict\n(](K\x01K\x02lltR.",
        b"NN\x93.",
    ],
)
def test_programs_that_are_none_are_refused(program: bytes) -> None:
    with pytest.raises(pathlift.InputError):
        pickles.read_pickle(io.BytesIO(program), lambda saved: saved)


def test_programs_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MOST_STEPS", 1000)
    pairs = b"(]" + b"K\x01K\x02\x86a" * 100 + b"tq\x00"
    for program in (b"]" * 1001 + b".", pairs + b"0ccollections\nOrderedDict\nh\x00R" * 20 + b"."):
        with pytest.raises(pathlift.InputError, match=r"^it holds a pickle of more than 1,000 steps"):
            pickles.read_pickle(io.BytesIO(program), lambda saved: saved)


def test_a_key_that_takes_forever_to_hash_is_not_hashed() -> None:
    program = b"(tq\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(200)) + b"}h\xc8K\x01s."
    found = pickles.read_pickle(io.BytesIO(program), lambda saved: saved)
    assert isinstance(found, dict) and list(found.values()) == [1]


def test_regions_around_a_call_do_not_change_what_is_read(state: State, here: Path) -> None:
    torch.save(state, here / "run.pt")
    for region in (torch.device("meta"), torch.inference_mode(), torch.autocast("cpu")):
        with region:
            checkpoint = Checkpoint(here / "run.pt")
            found = {name: checkpoint[name] for name in checkpoint}
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_thousand_names_for_one_dictionary_are_looked_through_once(here: Path, state: State) -> None:
    tree: dict[str, Any] = {"model": state}
    for _ in range(4):
        tree = {f"branch{number}": tree for number in range(1000)}
    torch.save(tree, here / "tree.pt")
    with pytest.raises(pathlift.InputError, match="holds no mapping"):
        Checkpoint(here / "tree.pt")


def test_more_tensors_than_any_model_has(monkeypatch: pytest.MonkeyPatch, state: State, here: Path) -> None:
    torch.save(state, here / "run.pt")
    monkeypatch.setattr(sizes, "MOST_TENSORS", 3)
    with pytest.raises(pathlift.InputError, match="4 tensors"):
        Checkpoint(here / "run.pt")


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_of_a_model_is_no_file_of_weights(suffix: str, here: Path) -> None:
    (here / f"m{suffix}").write_bytes(b"anything")
    with pytest.raises(pathlift.InputError, match=r"is a model, not a file of weights: take the state_dict\(\) of"):
        pathlift.path_metric(mlp(), here / f"m{suffix}", (4,))
