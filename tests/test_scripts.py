"""Every script of benchmarks/, examples/ and docs/tools/ can be read, and those that have options say which.

What they compute takes minutes and more; that a name is gone which they take from another file shows when they are read.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("benchmarks", "examples", "docs/tools")
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).glob("*.py"))
OF_EXTRAS = {
    "griffe", "lightning", "math_core", "matplotlib", "mkdocs", "numpy", "onnx", "onnxruntime", "scipy", "sklearn", "timm",
    "torchvision",
}  # fmt: skip
"""Packages that a script may need and that need not be there."""


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Scripts of two folders may have one name; and tests have names of their own."""
    before, path = dict(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in [name for name, module in sys.modules.items() if module is not before.get(name) and _of_a_script(module)]:
        del sys.modules[name]


def _of_a_script(module: ModuleType) -> bool:
    file = Path(getattr(module, "__file__", None) or "/")
    return ROOT in file.parents and "src" not in file.relative_to(ROOT).parts[:1]


def read(script: str) -> Any:
    """Run a script up to its ``if __name__ == "__main__"``."""
    file = ROOT / script
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in OF_EXTRAS:
            pytest.skip(f"{error.name} is not installed")
        raise
    return module


@pytest.mark.one_in(6)
@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_read_and_says_its_options(script: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    module = read(script)
    assert module.__doc__
    if "argparse" not in vars(module):
        return
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.startswith("usage:") and module.__doc__.split()[0] in said


@pytest.mark.usefixtures("forgotten")
def test_the_entries_of_the_zoo_are_what_a_study_reads(tmp_path: Path) -> None:
    for name in ("torchvision", "timm", "yaml"):
        pytest.importorskip(name)
    from pathlift.study.zoo import read_zoo

    zoo = read("benchmarks/zoo.py")
    names = {library: zoo.supported(library) for library in ("torchvision", "timm")}
    assert len(names["torchvision"]) >= 40 and len(names["timm"]) >= 200
    entries = [zoo.untrained("torchvision", "squeezenet1_1"), zoo.untrained("timm", "resnet18")]
    lines = [f"  - {json.dumps(entry)}" for entry in [*(entry for _, entry in entries), *zoo.trained()]]
    (tmp_path / "zoo.yaml").write_text("\n".join(["functions: [path_norm]", "models:", *lines]))
    first, second, *_ = read_zoo(tmp_path / "zoo.yaml")
    assert (first.model, first.shape) == ("torchvision:squeezenet1_1", (3, 64, 64))
    assert first.about is not None and 50 < first.about["accuracy"] < 65
    assert second.model == "timm:resnet18" and entries[0][0] < entries[1][0]
