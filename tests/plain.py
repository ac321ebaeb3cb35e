"""An environment with pathlift and what it declares, and nothing else; and every command, with its files, run in it.

`pip install .` of a user brings no extras. To see what that user sees without installing PyTorch twice, `make` links the
distributions that pathlift declares, and those which they declare in turn, into a virtual environment of its own: an import of
anything else fails there. `python tests/plain.py FOLDER` does it with the wheel that pip builds, the test suite with src.
"""

from __future__ import annotations

import contextlib
import importlib.metadata as metadata
import io
import json
import subprocess
import sys
import tempfile
import venv
import warnings
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
NETS = """
from torch import nn
def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
"""
MODEL = ("nets:mlp", "--shape", "4")
WORK = (
    (0, ("norm", *MODEL)),
    (0, ("support", *MODEL)),
    (0, ("score", *MODEL, "--out", "scores.safetensors")),
    (0, ("rescale", *MODEL, "--to", "random", "--out", "rescaled.safetensors")),
    (0, ("rescale", *MODEL, "--to", "balanced", "--out", "balanced.safetensors")),
    (0, ("prune", *MODEL, "--amount", "0.5", "--out", "pruned.safetensors", "--masks", "masks.safetensors")),
    (0, ("quantize", *MODEL, "--bits", "4", "--budget", "3.5", "--out", "quantised.safetensors")),
    (0, ("bits", *MODEL)),
    (0, ("score", *MODEL, "--stream", "--weights", "pruned.safetensors", "--out", "folder")),
    (0, ("norm", *MODEL, "--weights", "rescaled.safetensors", "--weights", "pruned.safetensors")),
    (0, ("metric", *MODEL, "pruned.safetensors", "--moments", "4")),
    (0, ("metric", *MODEL, "pruned.safetensors", "--all")),
    (0, ("compare", "rescaled.safetensors", "pruned.safetensors", "--model", "nets:mlp", "--shape", "4")),
    (0, ("equivalent", *MODEL, "balanced.safetensors")),
    (0, ("certify", *MODEL, "--data", "data.safetensors")),
    (0, ("certify", *MODEL, "--data", "data.safetensors", "--bits", "8", "--radius", "0.01")),
)
FILES = ("scores", "rescaled", "balanced", "pruned", "masks")
EXTRAS = (
    ("vision", ("norm", "torchvision:resnet18")),
    ("timm", ("norm", "timm:resnet18")),
    ("transformers", ("norm", "hf:folder", "--shape", "4")),
    ("onnx", ("norm", "model.onnx", "--shape", "4")),
    ("onnx", ("quantize", *MODEL, "--onnx", "quantised.onnx")),
    ("torch-pruning", ("shrink", *MODEL)),
    ("demo", ("certify", *MODEL, "--data", "digits")),
    ("experiments", ("experiment", "lottery", "--data", "digits", "--out", "lottery")),
    ("plots", ("report", *MODEL)),
    ("study", ("study", "zoo.yaml")),
    ("plots", ("compare", "pruned.safetensors", "--model", "nets:mlp", "--shape", "4", "--plot", "a.png")),
)
"""Commands that need an extra: one sentence that says which."""


def make(folder: Path, *, wheel: bool) -> Path:
    """Make the environment from the packages of the one that this runs in.

    Args:
        folder: Where.
        wheel: Whether pathlift is installed as a user does, from a wheel that pip builds; otherwise it is read from src.

    Returns:
        Its Python.
    """
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in declared():
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in {"..", "__pycache__"}}:
            link = site / top
            if not link.is_symlink():
                link.symlink_to(Path(str(distribution.locate_file(top))).absolute())
    if wheel:
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", str(ROOT)], check=True)
        subprocess.run([*pip, "check"], check=True)
        subprocess.run([folder / "bin" / "pathlift", "--version"], check=True)
    else:
        (site / "pathlift.pth").write_text(f"{ROOT / 'src'}\n")
    return python


def declared() -> list[metadata.Distribution]:
    """Return the distributions that pathlift needs, directly or not, without extras and without itself."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    distributions: dict[str, metadata.Distribution] = {}
    seen = set()
    waiting = [("pathlift", "")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        distributions[name] = metadata.distribution(name)
        for text in distributions[name].requires or ():
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(wanted.name), requested) for requested in ("", *wanted.extras)]
    del distributions["pathlift"]
    return list(distributions.values())


def run_all(python: Path, folder: Path) -> None:
    """Run every command under a Python, in a folder; fail with what it said if one does not do its work."""
    (folder / "nets.py").write_text(NETS)
    (folder / "model.onnx").write_bytes(b"")
    done = subprocess.run(
        [python, "-I", __file__, "--commands", folder], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _commands(folder: Path) -> None:
    """Run the commands in this process, which is one of the environment."""
    sys.path.insert(0, str(folder))
    import torch

    from pathlift.storage.models import load_state, save_tensors

    save_tensors({"x": torch.rand(6, 4, generator=torch.Generator().manual_seed(0))}, folder / "data.safetensors")
    for code, arguments in WORK:
        done = run(*arguments)
        assert done.code == code, f"{arguments}: {done}"
    for name in FILES:
        assert load_state(folder / f"{name}.safetensors"), name
    assert json.loads((folder / "folder" / "scores.safetensors.index.json").read_text())["weight_map"]
    for extra, arguments in EXTRAS:
        done = run(*arguments)
        assert done.code == 2 and f"pip install 'pathlift[{extra}]'" in done.stderr, f"{arguments}: {done}"
    for module in ("lightning", "hugging_face", "experiments.training"):
        assert "pip install 'pathlift[" in str(_import_error(f"pathlift.{module}"))


def _import_error(module: str) -> ImportError | None:
    try:
        __import__(module)
    except ImportError as error:
        return error
    return None


class Done(NamedTuple):
    """How a command ended, and what it said."""

    code: object
    stdout: str
    stderr: str


def run(*arguments: str) -> Done:
    """Run a command line in this process, with the arguments as a shell would give them."""
    from pathlift.cli import main

    answer, said, before = io.StringIO(), io.StringIO(), sys.argv
    with contextlib.redirect_stdout(answer), contextlib.redirect_stderr(said), warnings.catch_warnings():
        try:
            sys.argv = ["pathlift", *map(str, arguments)]
            main()
        except SystemExit as end:
            return Done(end.code or 0, answer.getvalue(), said.getvalue())
        finally:
            sys.argv = before
    return Done(None, answer.getvalue(), said.getvalue())


if __name__ == "__main__":
    if sys.argv[1] == "--commands":
        _commands(Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            run_all(make(Path(sys.argv[1]).absolute(), wheel=True), Path(scratch))
            print("All commands work with declared packages only.")
