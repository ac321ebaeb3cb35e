"""What a newcomer does first: install without extras, name a model, read what is printed. Nothing is downloaded."""

from __future__ import annotations

import importlib
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch

import pathlift
from pathlift.storage.models import load_model
from pathlift.storage.packages import package
from plain import make, run, run_all

MODEL = """
import warnings
from torch import nn
from pathlift.errors import PathliftWarning

def mlp(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

def talks():
    print("a model that talks")
    return Talking()

class Talking(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        print("and talks")
        return super().forward(x)

def warns():
    warnings.warn("of the user's own")
    warnings.warn("two lines\\nof pathlift", PathliftWarning, stacklevel=2)
    return mlp()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "first_hour_nets.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.hunt
def test_all_commands_work_with_the_declared_packages_alone(tmp_path: Path) -> None:
    python = make(tmp_path / "plain", wheel=False)
    (tmp_path / "work").mkdir()
    run_all(python, tmp_path / "work")


@pytest.mark.search
def test_no_model_of_torchvision_touches_the_network_when_it_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of them, detection and segmentation with their backbones, on the meta device; RegNets need real memory."""
    models = pytest.importorskip("torchvision.models")
    tried = network_is_down(monkeypatch, tmp_path)
    for name in models.list_models():
        with torch.device("cpu" if name == "regnet_x_400mf" else "meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not name.startswith("regnet") or name == "regnet_x_400mf":
                assert sum(1 for _ in load_model(f"torchvision:{name}").parameters()), name
    assert not tried


@pytest.mark.hunt
def test_no_model_of_timm_touches_the_network_when_it_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    tried = network_is_down(monkeypatch, tmp_path)
    for name in ("resnet18", "resnet18.a1_in1k", "vit_tiny_patch16_224", "mobilenetv3_small_050", "vit_base_patch16_clip_224"):
        with torch.device("meta"):
            assert sum(1 for _ in load_model(f"timm:{name}").parameters()), name
    for name in ("hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/resnet18", "local-dir:/tmp"):
        with pytest.raises(pathlift.InputError, match="no model"):
            load_model(f"timm:{name}")
    assert not tried


def network_is_down(monkeypatch: pytest.MonkeyPatch, empty: Path) -> list[object]:
    """No connection can be made, no weights are in a cache; every try is listed."""
    tried: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        tried.append(arguments)
        raise OSError("there is no network")

    for name in ("TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(empty))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def test_a_model_that_reads_values_while_it_is_built_has_a_graph_without_weights_too(here: Path) -> None:
    (here / "first_hour_ramp.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n    return nn.Linear(4, [int(n) for n in torch.arange(1, 4).tolist()][-1])\n"
    )
    assert run("score", "first_hour_ramp:model", "--shape", "4", "--out", "w.safetensors").code == 0
    done = run("norm", "first_hour_ramp:model", "--shape", "4", "--weights", "w.safetensors", "--stream")
    assert done.code == 0, done.stderr


def test_the_version_is_printed() -> None:
    done = run("--version")
    assert done == (0, f"pathlift {pathlift.__version__}\n", "")


def test_help_is_printed_on_request_and_without_a_command() -> None:
    for arguments in ((), ("--help",), ("norm", "--help")):
        done = run(*arguments)
        assert done.code == 0 and "Usage" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("norm",),
        ("score",),
        ("support",),
        ("rescale", "--to", "balanced"),
        ("prune", "--amount", "0.5"),
        ("metric", "first_hour_nets:mlp"),
        ("metric", "first_hour_nets:mlp", "--tighten", "2"),
        ("equivalent", "first_hour_nets:mlp", "--other-seed", "0"),
        ("certify", "--data", "x.pt", "--radius", "0.01"),
        ("certify", "--data", "x.pt"),
    ],
    ids=" ".join,
)
def test_a_command_that_succeeds_says_nothing_on_stderr(here: Path, command: tuple[str, ...]) -> None:
    torch.save({"x": torch.rand(4, 4)}, here / "x.pt")
    name, *rest = command
    done = run(name, "first_hour_nets:mlp", *rest, "--shape", "4")
    assert done.code == 0 and done.stdout and not done.stderr, done


def test_compare_and_many_norms_say_nothing_on_stderr(here: Path) -> None:
    for seed in ("0", "1"):
        arguments = ("--to", "random", "--seed", seed, "--out", f"{seed}.safetensors")
        assert run("rescale", "first_hour_nets:mlp", "--shape", "4", *arguments).code == 0
    for done in (
        run("compare", "0.safetensors", "1.safetensors", "--model", "first_hour_nets:mlp", "--shape", "4"),
        run("norm", "first_hour_nets:mlp", "--shape", "4", "--weights", "0.safetensors", "--weights", "1.safetensors"),
    ):
        assert done.code == 0 and not done.stderr, done


def test_what_a_model_prints_does_not_spoil_the_answer(here: Path) -> None:
    import json

    for command in ("norm", "score", "support"):
        done = run(command, "first_hour_nets:talks", "--shape", "4", "--json")
        assert json.loads(done.stdout)["model"] == "first_hour_nets:talks"
        assert "a model that talks" in done.stderr


def test_warnings_of_pathlift_are_one_line_and_others_are_silent(here: Path) -> None:
    done = run("norm", "first_hour_nets:warns", "--shape", "4")
    assert done.code == 0
    assert done.stderr == "pathlift: two lines of pathlift\n"


def test_a_criterion_that_empties_layers_is_warned_of_in_one_line(here: Path) -> None:
    (here / "first_hour_deep.py").write_text(
        "from torch import nn\ndef model():\n"
        "    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))\n"
    )
    common = ("prune", "first_hour_deep:model", "--shape", "4", "--amount", "0.99")
    done = run(*common, "--criterion", "magnitude")
    assert done.code == 0 and "collapsed" in done.stdout
    assert done.stderr.startswith("pathlift: ") and "relative_path_magnitude" in done.stderr
    assert done.stderr.count("\n") == 1 and ".py" not in done.stderr


def test_a_head_of_another_size_is_an_argument_of_the_model(here: Path) -> None:
    wide = load_model("first_hour_nets:mlp", arguments={"width": 5})
    torch.save(wide.state_dict(), here / "wide.pt")
    common = ("norm", "first_hour_nets:mlp", "--shape", "4", "--weights", "wide.pt")
    refused = run(*common)
    assert refused.code == 2 and "--model-arg" in refused.stderr
    done = run(*common, "--model-arg", "width=5")
    assert done.code == 0 and f"{pathlift.path_norm(wide, (4,)).value:.6g}" in done.stdout


def test_lightning_that_is_not_installed_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pathlift.lightning", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'pathlift\[lightning\]'"):
        importlib.import_module("pathlift.lightning")


def test_an_extra_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(pathlift.InputError, match="pip install 'pathlift\\[vision\\]'"):
        package("torchvision.models", "vision")
