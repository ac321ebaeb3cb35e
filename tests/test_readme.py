"""README.md is what a newcomer types: every command and every line of Python in it works as printed."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import pathlift
from pathlift.storage.models import load_model, save_tensors
from plain import run
from test_first_hour import network_is_down

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line[2:].partition(" #")[0].strip() for kind, text in BLOCKS for line in text.splitlines() if line.startswith("$ ")]
NETS = """
from torch import nn
def mlp():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
"""
STAND_INS = {"checkpoint": "torchvision:resnet18", "mlp": "mypackage.nets:mlp", "other": "mypackage.nets:mlp"}
"""The files of a reader."""


@pytest.mark.hunt
def test_the_commands_of_the_readme_work_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with nothing but the files that a reader has: checkpoints, and a package with a model."""
    for name in ("torchvision", "timm", "sklearn", "lightning", "matplotlib"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tried = network_is_down(monkeypatch, tmp_path / "no-cache")
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "__init__.py").touch()
    (tmp_path / "mypackage" / "nets.py").write_text(NETS)
    for seed, (name, model) in enumerate(STAND_INS.items()):
        save_tensors(load_model(model, generator=seed).state_dict(), tmp_path / f"{name}.safetensors")
    commands = [shlex.split(line)[1:] for line in LINES if line.startswith("pathlift ")]
    named = {command[0] for command in commands}
    assert named >= {"norm", "quantize", "metric", "score", "prune", "certify", "support", "experiment"}
    for command in commands:
        done = run(*command)
        unsupported = command[0] == "support" and "not supported" in done.stdout
        assert done.code == (1 if unsupported else 0), f"{command}: {done}"
        assert done.stdout and not done.stderr, f"{command}: {done}"
    assert not tried


@pytest.mark.hunt
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    tried = network_is_down(monkeypatch, tmp_path)
    snippets = [text for kind, text in BLOCKS if kind == "python"]
    assert snippets
    for text in snippets:
        exec(compile(text, "README.md", "exec"), {})
    assert not tried


def test_the_readmes_make_commands_are_there() -> None:
    targets = [line.split()[1] for line in LINES if line.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_line_of_the_readmes_consoles_is_known() -> None:
    assert all(line.startswith(("make ", "pathlift ")) for line in LINES)


def test_names_options_extras_and_links_of_the_readme_exist() -> None:
    for name, arguments in re.findall(r"`(?:pathlift\.)?(\w+)\(([^`]*)\)`", README):
        parameters = inspect.signature(getattr(pathlift, name)).parameters
        for option in re.findall(r"(\w+)=", arguments):
            assert option in parameters, f"{name}(…, {option}=)"
    for text in re.findall(r"`\.(\w+)\b", README.partition("`symmetries(model, inputs)`")[2].partition("\n")[0]):
        assert hasattr(pathlift.rescaling.Symmetries, text), text
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
    table = README.partition("| extra | brings |")[2].partition("\n\n")[0]
    listed = {name for cell in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`([\w-]+)`", cell)}
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    assert listed == set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)) - {"dev"}


def test_certificates_without_a_set_are_described_as_the_readme_says() -> None:
    covers = pathlift.certify(nn.Linear(3, 2), torch.ones(1, 3)).covers
    assert "rounding of the model's own forward pass" in covers and "nothing else" in covers
    assert "the rounding of the model's own forward pass, and nothing else" in README
