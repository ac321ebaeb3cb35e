"""Results are never written over a file by accident, where they cannot be, or by half."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

import pathlift
from pathlift.output import check_folder_of_results, check_outputs, tensor_writer, write_outputs
from pathlift.storage.models import load_state, save_tensors
from plain import run

WORK = b"months of work"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file that exists, and a model that ends the program when it is built."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.safetensors").write_bytes(WORK)
    (tmp_path / "best.png").write_bytes(WORK)
    (tmp_path / "ending.py").write_text("def model():\n    raise SystemExit(77)\n")
    return tmp_path


def spellings(folder: Path) -> dict[str, str]:
    """Names of files that must not be written, and what a refusal says."""
    (folder / "link.safetensors").symlink_to("best.safetensors")
    os.link(folder / "best.safetensors", folder / "hard.safetensors")
    (folder / "elsewhere").symlink_to(folder)
    (folder / "dangling.safetensors").symlink_to("gone/away.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    return {
        "best.safetensors": "exists already",
        "./best.safetensors": "exists already",
        f"../{folder.name}/best.safetensors": "exists already",
        "elsewhere/best.safetensors": "exists already",
        "link.safetensors": "exists already",
        "hard.safetensors": "exists already",
        "folder.safetensors": "is a folder",
        "pipe.safetensors": "no plain file",
        "dangling.safetensors": "does not exist",
        "no/such/folder.safetensors": "'no/such', which does not exist",
        "ending.py/scores.safetensors": "'ending.py', which is a file",
        "ending.py/a/scores.safetensors": "'ending.py', which is a file",
        "/proc/scores.safetensors": "no file can be made",
        f"{'x' * 300}.safetensors": "no name for a file",
        "scores.txt": "must end in .safetensors",
        ".safetensors": "must end in .safetensors",
        "": "must end in .safetensors",
    }


def test_what_must_not_be_written_is_refused_under_every_name(here: Path) -> None:
    for name, words in spellings(here).items():
        with pytest.raises(pathlift.InputError, match="--out") as error:
            check_outputs({"--out": Path(name)})
        assert words in str(error.value), (name, str(error.value))
    assert (here / "best.safetensors").read_bytes() == WORK


def test_force_replaces_files_and_nothing_else(here: Path) -> None:
    for name, words in spellings(here).items():
        if words == "exists already":
            check_outputs({"--out": Path(name)}, replace=True)
        else:
            with pytest.raises(pathlift.InputError):
                check_outputs({"--out": Path(name)}, replace=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_read_only_is_named(here: Path) -> None:
    (here / "shut").mkdir(mode=0o555)
    with pytest.raises(pathlift.InputError, match="'shut', where no file can be made: Permission denied"):
        check_outputs({"--out": Path("shut/scores.safetensors")})


def test_two_outputs_need_two_names(here: Path) -> None:
    (here / "elsewhere").symlink_to(here)
    with pytest.raises(pathlift.InputError, match="--out and --masks name the same file"):
        check_outputs({"--out": Path("new.safetensors"), "--masks": Path("elsewhere/new.safetensors")})


def test_an_output_that_is_an_input_is_told_so(here: Path) -> None:
    (here / "link.safetensors").symlink_to("best.safetensors")
    with pytest.raises(pathlift.InputError, match="is the file that --weights reads"):
        check_outputs({"--out": Path("link.safetensors")}, inputs={"--weights": Path("best.safetensors")})


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), ValueError("bad"), KeyboardInterrupt()], ids=repr)
def test_two_files_are_written_or_none(here: Path, trouble: BaseException) -> None:
    before = sorted(here.iterdir())

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise trouble

    writers = {Path("best.safetensors"): tensor_writer({"a": torch.ones(1)}), Path("second.safetensors"): fail}
    with pytest.raises((pathlift.InputError, KeyboardInterrupt)) as error:
        write_outputs(writers, replace=True)
    assert ".pathlift-" not in str(error.value)
    assert sorted(here.iterdir()) == before
    assert (here / "best.safetensors").read_bytes() == WORK


def test_a_file_that_appears_meanwhile_is_kept(here: Path) -> None:
    def slow(path: Path) -> None:
        path.write_bytes(b"scores")
        (here / "new.safetensors").write_bytes(WORK)

    with pytest.raises(pathlift.InputError, match="exists already"):
        write_outputs({Path("new.safetensors"): slow}, replace=False)
    assert (here / "new.safetensors").read_bytes() == WORK


def test_a_file_has_the_rights_of_any_other_and_a_link_is_followed(here: Path) -> None:
    (here / "other").touch()
    (here / "link.safetensors").symlink_to("target.safetensors")
    write_outputs({Path("link.safetensors"): tensor_writer({"a": torch.ones(1)})}, replace=False)
    assert (here / "link.safetensors").is_symlink()
    assert stat.S_IMODE((here / "target.safetensors").stat().st_mode) == stat.S_IMODE((here / "other").stat().st_mode)
    assert list(load_state(here / "target.safetensors")) == ["a"]


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    tensors = {"whole": whole, "again": whole, "row": whole[1], "columns": whole.t(), "same": whole.view(-1)}
    save_tensors(tensors, tmp_path / "t.safetensors")
    state = load_state(tmp_path / "t.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_tensors_without_plain_memory_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for tensor in (torch.ones(2, device="meta"), torch.ones(2, 2).to_sparse()):
        with pytest.raises(pathlift.InputError, match=r"tensors\['a'\] .*(meta|sparse)"):
            save_tensors({"a": tensor}, tmp_path / "t.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ("score", "ending:model", "--shape", "4", "--out"),
        ("prune", "ending:model", "--shape", "4", "--amount", "0.5", "--out"),
        ("prune", "ending:model", "--shape", "4", "--amount", "0.5", "--masks"),
        ("rescale", "ending:model", "--shape", "4", "--to", "normal", "--out"),
        ("score", "ending:model", "--shape", "4", "--stream", "--weights", "best.safetensors", "--out"),
        ("compare", "best.safetensors", "--model", "ending:model", "--shape", "4", "--plot"),
        ("experiment", "lottery", "--data", "digits", "--model", "ending:model", "--out"),
    ],
    ids=lambda command: f"{command[0]} {command[-1]}",
)
def test_commands_look_at_their_outputs_before_the_model_is_built(here: Path, command: tuple[str, ...]) -> None:
    name = "best.png" if command[-1] == "--plot" else "best.safetensors"
    for place in (name, f"{name}/{name}"):
        done = run(*command, place)
        assert done.code == 2 and not done.stdout
        assert name in done.stderr and "77" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    if command[0] != "experiment":  # whose folder of results may be made
        done = run(*command, f"nodir/{name}")
        assert done.code == 2 and "'nodir', which does not exist" in done.stderr
    assert (here / name).read_bytes() == WORK


def test_force_replaces_what_was_there(here: Path) -> None:
    (here / "forced.py").write_text("from torch import nn\ndef model():\n    return nn.Linear(2, 1)\n")
    common = ("score", "forced:model", "--shape", "2", "--out", "best.safetensors")
    assert run(*common).code == 2
    assert run(*common, "--force").code == 0
    assert set(load_state(here / "best.safetensors")) == {"weight", "bias"}


def test_weights_can_be_pruned_in_place_only_by_force(here: Path) -> None:
    (here / "inplace.py").write_text("from torch import nn\ndef model():\n    return nn.Linear(8, 1)\n")
    save_tensors(nn.Linear(8, 1).state_dict(), here / "w.safetensors")
    before = (here / "w.safetensors").read_bytes()
    common = (
        "prune",
        "inplace:model",
        "--shape",
        "8",
        "--weights",
        "w.safetensors",
        "--amount",
        "0.5",
        "--out",
        "w.safetensors",
    )
    done = run(*common)
    assert done.code == 2 and "the file that --weights reads" in done.stderr
    assert (here / "w.safetensors").read_bytes() == before
    assert run(*common, "--force").code == 0
    assert int((load_state(here / "w.safetensors")["weight"] == 0).sum()) == 4


def test_a_folder_of_an_experiment_holds_nothing_else(here: Path) -> None:
    with pytest.raises(pathlift.InputError, match="holds other files"):
        check_folder_of_results("--out", here, "settings.json")
    (here / "new").mkdir()
    (here / "new" / ".lock").touch()
    check_folder_of_results("--out", here / "new", "settings.json")
    check_folder_of_results("--out", here / "not" / "yet" / "there", "settings.json")
    (here / "settings.json").touch()
    check_folder_of_results("--out", here, "settings.json")
