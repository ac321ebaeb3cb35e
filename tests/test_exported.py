"""Exported programs, .pt2 files: the inputs are those that the file was exported with, and a damaged file is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathlift
from pathlift.storage import default_shape
from pathlift.storage.models import load_model
from plain import run
from test_checkpoints import mutated
from test_files import rezip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Two(nn.Module):
    """Takes an image and, in a dictionary or not, a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 2, 3)
        self.other = nn.Linear(5, 2)

    def forward(self, image: Tensor, other: Any) -> Tensor:
        other = other["mask"][0] if isinstance(other, dict) else other
        return self.image(image).relu().mean((2, 3)) + self.other(other)


IMAGE, OTHER = torch.zeros(2, 1, 6, 7), torch.zeros(2, 5)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {
    "two inputs": ((IMAGE, OTHER), {}, ((1, 6, 7), (5,))),
    "keywords": ((), {"image": IMAGE, "other": OTHER}, {"image": (1, 6, 7), "other": (5,)}),
    "keywords in another order": ((), {"other": OTHER, "image": IMAGE}, {"image": (1, 6, 7), "other": (5,)}),
    "a dictionary": ((IMAGE, {"mask": [OTHER]}), {}, ((1, 6, 7), {"mask": [(5,)]})),
    "keywords with a dictionary": (
        (), {"image": IMAGE, "other": {"mask": (OTHER,)}}, {"image": (1, 6, 7), "other": {"mask": ((5,),)}},
    ),
}  # fmt: skip


def exported(model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], path: str, *, fixed: bool = False) -> None:
    """Write a program that takes any number of samples, or one."""
    shapes = None if fixed else torch.export.ShapesCollection()
    for tensor in torch.utils._pytree.tree_leaves((args, keywords)) if shapes is not None else ():
        shapes[tensor] = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, args, keywords, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", CALLS)
def test_the_file_says_which_inputs_it_takes(name: str) -> None:
    args, keywords, shapes = CALLS[name]
    model = Two()
    exported(model, args, keywords, "m.pt2")
    assert default_shape("m.pt2") == shapes
    right = pathlift.path_norm(model, shapes).value
    assert pathlift.path_norm(load_model("m.pt2", trust=True), default_shape("m.pt2")).value == pytest.approx(right, rel=1e-6)
    done = run("norm", "m.pt2", "--trust", "--json")
    assert done.code == 0 and json.loads(done.stdout)["value"] == pytest.approx(right, rel=1e-6), done


@pytest.mark.one_in(2)
@pytest.mark.parametrize("fixed", [True, False])
def test_one_input_needs_no_shape_in_any_command(fixed: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    exported(model, (torch.zeros(1 if fixed else 2, 4),), {}, "m.pt2", fixed=fixed)
    assert default_shape("m.pt2") == (4,)
    for command in (("norm",), ("support",), ("score",), ("prune", "--amount", "0.5"), ("rescale",)):
        done = run(command[0], "m.pt2", *command[1:], "--trust")
        assert done.code == 0, done
    assert run("norm", "m.pt2").code == 2, "the shape is known, and the file is not trusted"


def test_a_size_that_may_vary_is_that_of_the_example() -> None:
    image = torch.zeros(2, 1, 6, 7)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=4)}
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    torch.export.save(torch.export.export(model, (image,), dynamic_shapes=(sizes,)), "m.pt2")
    assert default_shape("m.pt2") == (1, 6, 7)


class Shifted(nn.Linear):
    def forward(self, x: Tensor, by: int = 0) -> Tensor:  # type: ignore[override]
        return super().forward(x) + by


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda: exported(nn.Linear(4, 2), (torch.zeros(4),), {}, "m.pt2", fixed=True), "no size beside the batch"),
        (lambda: exported(nn.Linear(4, 2), (torch.zeros(3, 4),), {}, "m.pt2", fixed=True), "exactly 3 samples"),
        (lambda: exported(Two(), (IMAGE,), {"other": OTHER}, "m.pt2"), "by position and others by keyword"),
        (lambda: exported(Shifted(4, 2), (torch.zeros(1, 4), 3), {}, "m.pt2", fixed=True), "no tensor"),
        (lambda: torch.save({}, "m.pt2"), "holds 0 models"),
        (lambda: Path("m.pt2").write_bytes(b"PK"), "cannot be read"),
        (lambda: None, "no file"),
    ],
)
def test_a_file_that_does_not_tell_says_why(write: Callable[[], object], words: str) -> None:
    write()
    with pytest.raises(pathlift.InputError, match=words) as error:
        default_shape("m.pt2")
    assert "\n" not in str(error.value)


def changed(edit: Callable[[Any], None]) -> None:
    """Change the description of a graph."""

    def change(name: str, content: bytes) -> bytes:
        if "/models/" not in name:
            return content
        described = json.loads(content)
        edit(described["graph_module"])
        return json.dumps(described).encode()

    exported(nn.Linear(4, 2), (torch.zeros(1, 4),), {}, "good.pt2", fixed=True)
    rezip(Path("good.pt2"), Path("m.pt2"), change)


def deep(graph: Any) -> None:
    graph["module_call_graph"][0]["signature"]["in_spec"] = '[1, {"type": "builtins.tuple", "children_spec": [' * 10**4


def sized(size: Any) -> Callable[[Any], None]:
    def edit(graph: Any) -> None:
        graph["graph"]["tensor_values"]["input"]["sizes"][1] = size

    return edit


@pytest.mark.parametrize(
    "edit",
    [deep, sized({"as_int": "4"}), sized({}), sized([]), sized({"as_expr": {"hint": None}}), lambda graph: graph.clear(),
     lambda graph: graph["module_call_graph"].clear(), lambda graph: graph["signature"]["input_specs"].clear()],
)  # fmt: skip
def test_a_description_that_is_none_is_refused(edit: Callable[[Any], None]) -> None:
    changed(edit)
    with pytest.raises(pathlift.InputError, match=r"'m\.pt2' does not tell"):
        default_shape("m.pt2")


def test_a_size_beyond_all_bounds_is_refused_when_it_is_used() -> None:
    changed(sized({"as_int": 10**30}))
    done = run("support", "m.pt2", "--trust")
    assert done.code == 2 and done.stderr.count("\n") == 1, done


# ---- cut and changed files


def read_or_why_not(read: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return read(), ""
    except pathlift.PathliftError as error:
        return None, str(error)


def refused_or_the_same(seeds: range) -> int:
    """Read mutations of a trusted file: each must be refused in a sentence, or be the same model; how many were refused."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    exported(model, (torch.zeros(2, 4),), {}, "good.pt2")
    content, bad, x = Path("good.pt2").read_bytes(), Path("bad.pt2"), torch.randn(3, 4)
    refused = 0
    for seed in seeds:
        draw = random.Random(seed)
        bad.write_bytes(mutated(content, draw) if seed % 3 else content[: draw.randrange(len(content))])
        loaded, why = read_or_why_not(lambda: load_model("bad.pt2", trust=True))
        shape, why_not = read_or_why_not(lambda: default_shape("bad.pt2"))
        assert torch.equal(loaded(x), model(x)) if loaded is not None else "bad.pt2" in why and "\n" not in why, seed
        assert shape == (4,) if shape is not None else "bad.pt2" in why_not and "\n" not in why_not, seed
        refused += bool(why)
    return refused


def test_a_damaged_program_is_refused() -> None:
    assert refused_or_the_same(range(36)) >= 24


@pytest.mark.hunt
def test_hundreds_of_damaged_programs() -> None:
    assert refused_or_the_same(range(1000, 1600)) >= 400
