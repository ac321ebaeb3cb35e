"""Files of strangers: no code in them runs, nothing is written, and what cannot be read is refused in one sentence, soon."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import os
import pickle
import random
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pathlift
from pathlift.experiments import store
from pathlift.storage import data, sizes
from pathlift.storage.checkpoints import Checkpoint
from pathlift.storage.data import load_data
from pathlift.storage.models import default_shape, load_model, load_state, save_tensors
from plain import run

MARK = "RAN"
"""The file that code in a hostile file would make."""


def damaged(content: bytes) -> Iterator[bytes]:
    """Yield a file with a few of its bytes changed, sixty times."""
    draw = random.Random(0)
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 5, 20])):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        yield bytes(changed)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder in which no code may have left its mark."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / MARK).exists(), "code of a file was run"


class Touch:
    """Leaves the mark when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return (os.system, (f"touch {MARK}",))


def rezip(source: Path, target: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive again with other contents."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        contents = {name: old.read(name) for name in old.namelist()}
        changed = {name: change(name, content) for name, content in contents.items()}
        assert changed != contents or method != zipfile.ZIP_STORED, "the format has another layout: write the case anew"
        for name, content in changed.items():
            new.writestr(name, content)
    return target


# ---- exported programs


def exported() -> Path:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    torch.export.save(torch.export.export(model, (torch.zeros(1, 4),)), "good.pt2")
    return Path("good.pt2")


def with_a_guard(name: str, content: bytes) -> bytes:
    if "models/" not in name or not name.endswith(".json"):
        return content
    code = f"__import__('os').system('touch {MARK}') == 0"
    return json.dumps({**json.loads(content), "guards_code": [code]}).encode()


def with_a_pickle(name: str, content: bytes) -> bytes:
    return pickle.dumps(Touch()) if "sample_inputs" in name else content


@pytest.mark.one_in(2)
@pytest.mark.parametrize("change", [with_a_guard, with_a_pickle])
@pytest.mark.parametrize("suffix", [".pt2", ".PT2"])
def test_an_exported_program_is_not_even_opened_without_trust(change: Callable[[str, bytes], bytes], suffix: str) -> None:
    try:
        bad = str(rezip(exported(), Path(f"bad{suffix}"), change))
    except AssertionError:
        pytest.skip("this version of PyTorch writes no such part")
    with pytest.raises(pathlift.InputError, match=r"runs code .* trust=True"):
        load_model(bad)
    for command in (
        ("norm", bad, "--shape", "4"),
        ("support", bad, "--shape", "4"),
        ("score", bad, "--shape", "4"),
        ("prune", bad, "--shape", "4", "--amount", "0.5"),
        ("rescale", bad, "--shape", "4"),
        ("metric", bad, bad, "--shape", "4"),
        ("metric", "torch.nn:Identity", bad, "--shape", "4"),
        ("equivalent", bad, bad, "--shape", "4"),
        ("certify", bad, "--data", bad, "--shape", "4"),
        ("compare", bad, bad, "--model", bad, "--shape", "4"),
        ("norm", "torch.nn:Linear", "--weights", bad, "--shape", "4", "--model-arg", "in_features=4"),
    ):
        done = run(*command)
        assert done.code == 2 and done.stderr.count("\n") == 1, (command, done)
    assert "--trust" in run("norm", bad, "--shape", "4").stderr


@pytest.mark.hunt
def test_a_trusted_program_is_loaded_by_every_command() -> None:
    file = str(exported())
    assert isinstance(load_model(file, trust=True), nn.Module)
    save_tensors(load_model(file, trust=True).state_dict(), Path("w.safetensors"))
    save_tensors({"x": torch.zeros(2, 4)}, Path("x.safetensors"))
    for command in (
        ("norm", file),
        ("norm", file, "--weights", "w.safetensors", "--weights", "w.safetensors"),
        ("support", file),
        ("score", file),
        ("prune", file, "--amount", "0.5"),
        ("rescale", file),
        ("metric", file, "w.safetensors"),
        ("metric", file, file),
        ("equivalent", file, "w.safetensors"),
        ("certify", file, "--data", "x.safetensors"),
        ("compare", "w.safetensors", "w.safetensors", "--model", file),
    ):
        done = run(*command, "--shape", "4", "--trust")
        assert done.code == 0, done


def test_trust_opens_no_other_door() -> None:
    torch.save({"w": Touch()}, "bad.pt")
    with pytest.raises(pathlift.InputError, match="holds code or objects"):
        load_model("torch.nn:Linear", Path("bad.pt"), arguments={"in_features": 1, "out_features": 1}, trust=True)


# ---- pickles


@pytest.mark.parametrize("name", ["bad.pt", "bad.pth", "bad.ckpt", "bad.bin", "bad"])
@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_with_code_is_refused_wherever_weights_are_read(name: str, new: bool) -> None:
    torch.save({"x": torch.zeros(1), "w": Touch()}, name, _use_new_zipfile_serialization=new)
    for read in READERS:
        with pytest.raises(pathlift.InputError):
            read(name)


READERS: tuple[Callable[[str], object], ...] = (
    lambda name: load_state(Path(name)),
    lambda name: load_model("torch.nn:Linear", Path(name), arguments={"in_features": 1, "out_features": 1}),
    lambda name: pathlift.pruning.load_masks(name),
    lambda name: Checkpoint(name),
    lambda name: load_data(name, (1,)),
    lambda name: store.read_checkpoint(Path(name)),
    lambda name: store.read_json(Path(name)),
    lambda name: list(pathlift.path_norms(pathlift.capture(nn.Linear(1, 1), (1,)), [Path(name)])),
)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> int:
    """Files may unfold to a million bytes more than they have."""
    monkeypatch.setattr(sizes, "SPARE_BYTES", 10**6)
    return 10**7


def test_an_archive_that_unfolds_to_much_more_than_it_is_refused(little: int) -> None:
    torch.save({"x": torch.zeros(little)}, "full.pt")
    bomb = rezip(Path("full.pt"), Path("bomb.pt"), lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**5
    for read in (load_state, store.read_checkpoint):
        with pytest.raises(pathlift.InputError, match="unfold"):
            read(bomb)


def test_an_archive_whose_entries_are_one_and_the_same_is_refused(little: int) -> None:
    with zipfile.ZipFile("overlap.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(little // 2))
        archive.filelist += [archive.filelist[-1]] * 10
    with pytest.raises(pathlift.InputError, match="unfold"):
        load_state(Path("overlap.pt"))


def test_a_tensor_that_is_larger_than_its_file_is_refused(little: int) -> None:
    torch.save({"x": torch.zeros(1).expand(little, little)}, "wide.pt")
    torch.save({"x": torch.zeros(3).expand(2, 3)}, "fine.pt")
    assert load_state(Path("fine.pt"))["x"].shape == (2, 3)
    for read in (
        lambda: load_state(Path("wide.pt")),
        lambda: pathlift.pruning.load_masks("wide.pt"),
        lambda: load_data("wide.pt", (1,)),
    ):
        with pytest.raises(pathlift.InputError, match=r"'x'.*unfold"):
            read()


# ---- safetensors and their index


def headed(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def described(shape: list[int], kind: str = "F32", size: int = 0) -> dict[str, Any]:
    return {"w": {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}


HEADERS = {
    "empty": b"",
    "short": b"\0\0\0",
    "longer than the file": struct.pack("<Q", 10**8),
    "longer than any file": struct.pack("<Q", 2**64 - 1),
    "no JSON": headed(b"\xff" * 100),
    "a list": headed([1, 2]),
    "nested lists": headed(b"[" * 10**5),
    "nested objects": headed(b'{"a":' * 10**5),
    "beyond 64 bits": headed(described([0, 2**63])),
    "product beyond 64 bits": headed(described([2**32, 2**32])),
    "negative": headed(described([-1, -1], size=4), b"0000"),
    "other offsets": headed(described([4], size=8), bytes(8)),
    "beyond the end": headed(described([4], size=16), bytes(8)),
    "half a surrogate": headed(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "of no known type": headed(described([2], "F4", 1), b"0"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_is_refused(name: str, here: Path) -> None:
    file = here / "bad.safetensors"
    file.write_bytes(HEADERS[name])
    for read in (load_state, Checkpoint, pathlift.pruning.load_masks):
        with pytest.raises(pathlift.InputError, match=r"bad\.safetensors") as error:
            read(file)
        assert "\n" not in str(error.value)


def test_more_tensors_than_any_model_has_are_refused_soon(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setattr(sizes, "MOST_TENSORS", 100)
    own = described([0])["w"]
    for count in (100, 101):
        (here / f"{count}.safetensors").write_bytes(headed({f"w{place}": own for place in range(count)}))
    assert len(Checkpoint("100.safetensors")) == 100
    with pytest.raises(pathlift.InputError, match="101 tensors"):
        Checkpoint("101.safetensors")


INDICES = {
    "nested": "[" * 10**5,
    "nested objects": '{"weight_map":' * 10**5,
    "bytes": "\x00\x01",
    "a list": "[1]",
    "a map that is a list": '{"weight_map":["w.safetensors"]}',
    "a number for a file": '{"weight_map":{"w":1}}',
    "a number of many digits": f'{{"weight_map":{"1" * 10**5}}}',
    "no name": '{"weight_map":{"w":""}}',
    "the folder above": '{"weight_map":{"w":".."}}',
    "a file above": '{"weight_map":{"w":"../w.safetensors"}}',
    "a file elsewhere": '{"weight_map":{"w":"/w.safetensors"}}',
    "a zero byte": '{"weight_map":{"w":"a\\u0000b"}}',
    "half a surrogate": '{"weight_map":{"w":"\\ud800"}}',
    "a control character": '{"weight_map":{"w":"\\u001b[2J"}}',
    "itself": '{"weight_map":{"w":"bad.safetensors.index.json"}}',
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_leads_only_to_files_beside_it(name: str, here: Path) -> None:
    save_tensors({"w": torch.ones(1)}, here / "w.safetensors")
    (here / "folder").mkdir()
    file = here / "folder" / "bad.safetensors.index.json"
    file.write_text(INDICES[name])
    with pytest.raises(pathlift.InputError) as error:
        Checkpoint(file)
    assert str(error.value).isprintable()


def test_an_index_of_any_length_is_not_read(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setattr(sizes, "HEADER_BYTES", 100)
    (here / "long.safetensors.index.json").write_text('{"weight_map": {}}' + " " * 100)
    with pytest.raises(pathlift.InputError, match="more than 100"):
        Checkpoint(here / "long.safetensors.index.json")


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "", "[1]", f'{{"a":{"1" * 10**5}}}'])
def test_a_damaged_record_of_an_experiment_is_refused(text: str, here: Path) -> None:
    (here / "settings.json").write_text(text)
    with pytest.raises(pathlift.InputError, match="damaged"):
        store.read_json(here / "settings.json")


def refusal_of(read: Callable[[Any], object], file: object) -> str:
    """Return why a file is refused, or its name when it is read; anything else fails the test."""
    try:
        read(file)
    except pathlift.InputError as error:
        return str(error)
    return str(file)


# ---- any of them, cut or changed anywhere


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".old.pt"])
def test_cut_and_changed_files_are_refused_or_read(suffix: str, here: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    whole = here / f"good{suffix}"
    if suffix == ".safetensors":
        save_tensors(state, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=suffix == ".pt")
    content, bad = whole.read_bytes(), here / f"bad{suffix}"
    readers: tuple[Callable[[Path], object], ...] = (load_state, store.read_checkpoint, Checkpoint)
    for length in range(0, len(content), max(1, len(content) // 60)):
        bad.write_bytes(content[:length])
        for read in readers:
            with pytest.raises(pathlift.InputError):
                read(bad)
    for changed in damaged(content):
        bad.write_bytes(changed)
        for read in readers:
            assert str(bad) in refusal_of(read, bad)


# ---- names of models


@pytest.mark.parametrize("name", ["nets.py:mlp", "./nets.py:mlp", "folder/nets:mlp", "folder/nets.py:mlp", "nets.pt2:mlp"])
def test_a_path_is_no_module(name: str, here: Path) -> None:
    (here / "folder").mkdir()
    for file in ("nets.py", "folder/nets.py", "nets.pt2"):
        (here / file).write_text(f"open({MARK!r}, 'w').close()\n")
    for own in (name, name.replace("folder", str(here / "folder"))):
        with pytest.raises(pathlift.InputError, match=r"names no model|is a file"):
            load_model(own)


def test_damaged_pictures_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "FASHION_MNIST", here)
    labels, images = gzip.compress(bytes(8 + 2)), gzip.compress(bytes(16 + 2 * 784))
    for first, second in ((images, labels), (images[:-9], labels), (b"", labels), (images, labels[:5]), (images, b"PK")):
        (here / "t10k-images-idx3-ubyte.gz").write_bytes(first)
        (here / "t10k-labels-idx1-ubyte.gz").write_bytes(second)
        if (first, second) == (images, labels):
            assert data.fashion_mnist("t10k")[0].shape == (2, 784)
        else:
            with pytest.raises(pathlift.InputError, match="damaged"):
                data.fashion_mnist("t10k")


# ---- ONNX


onnx: Any = importlib.import_module("onnx") if importlib.util.find_spec("onnx") else None
needs_onnx = pytest.mark.skipif(onnx is None, reason="the extra 'onnx' is not installed")


def tensor(name: str, shape: tuple[int, ...]) -> Any:
    return onnx.numpy_helper.from_array(torch.ones(shape).numpy(), name)


def written(nodes: list[Any], tensors: list[Any], **changes: Any) -> str:
    """Write a program of x, shape (1, 4), that returns y."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], tensors)
    imports = [onnx.helper.make_opsetid("", 13), onnx.helper.make_opsetid("own", 1)]
    program = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8, **changes)
    Path("folder").mkdir(exist_ok=True)
    Path("folder/m.onnx").write_bytes(program.SerializeToString())
    return "folder/m.onnx"


def two_layers(first: str, second: str, **changes: Any) -> str:
    """Write a program of three nodes, x ↦ w₂·relu(w₁·x), of ones, whose path-norm is 4·8·3."""
    node = onnx.helper.make_node
    return written(
        [
            node("Gemm", ["x", "w1"], ["h"], name=first, transB=1),
            node("Relu", ["h"], ["r"], name="Relu_1"),
            node("Gemm", ["r", "w2"], ["y"], name=second, transB=1),
        ],
        [tensor("w1", (8, 4)), tensor("w2", (3, 8))],
        **changes,
    )


PLAIN = re.compile(r"[\w/:;,=@#~+ .%-]+", re.ASCII)
CALL = f'getattr(__import__("os"), "system")("touch {MARK}")'
NAMES = {
    "a call": f'a", {CALL} and "b',
    "a call in single quotes": CALL.replace('"', "'"),
    "a line": f'a")\n    {CALL}\n    ("',
    "a line at once": f'a")\n{CALL}\n("',
    "a backslash": f'a\\", {CALL}, "',
    "a function": f"a(__import__('os').system('touch {MARK}'))",
    "a keyword": "class",
    "a constant": "None",
    "a method": "forward",
    "an attribute": "training",
    "an attribute of the reader": "settings",
    "a name of the exporter": "p_w1",
    "a path": "/layers/0/Gemm",
    "dots": "layers.0.Gemm",
    "a number": "17",
    "another alphabet": "é",
    "a ligature": "ﬁ",
    "none": "",
    "what every graph has": "graph",
    "in every class": "__class__",
    "itself": "self",
    "like its neighbour": "Relu.1",
}


@pytest.mark.one_in(12)
@needs_onnx
@pytest.mark.parametrize("name", NAMES)
def test_no_name_in_an_onnx_file_becomes_source(name: str) -> None:
    for file in (two_layers(NAMES[name], "Gemm_2"), two_layers("Gemm_1", NAMES[name]), two_layers(NAMES[name], NAMES[name])):
        model = load_model(file)
        assert pathlift.path_norm(model, (4,)).value == 4 * 8 * 3
        assert all(PLAIN.fullmatch(path) for path, _ in model.named_modules() if path)
    assert run("support", file, "--shape", "4").code == 0


@needs_onnx
@pytest.mark.parametrize("name", ["a call", "a line", "a keyword"])
def test_nor_does_a_domain_an_operator_or_a_value(name: str) -> None:
    node, text = onnx.helper.make_node, NAMES[name]
    for nodes, tensors in (
        ([node("Gemm", ["x", text], ["y"], transB=1)], [tensor(text, (2, 4))]),
        ([node("Relu", ["x"], [text]), node("Relu", [text], ["y"])], []),
        ([node("Relu", ["x"], ["y"], doc_string=text)], []),
    ):
        assert pathlift.path_norm(load_model(written(nodes, tensors)), (4,)).value > 0
    for nodes in (
        [node("Relu", ["x"], ["y"], domain=text)],
        [node(text, ["x"], ["y"])],
        [node(text, ["x"], ["y"], domain="own")],
        [node("Einsum", ["x"], ["y"], equation=text)],
    ):
        with pytest.raises(pathlift.PathliftError) as error:
            pathlift.path_norm(load_model(written(nodes, [])), (4,))
        assert "\n" not in str(error.value) or isinstance(error.value, pathlift.UnsupportedModelError)


def outside(location: str, **entries: int) -> str:
    """Write a program whose weight lies in another file."""
    weight = onnx.TensorProto(name="w", dims=[2, 4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=str(value))
    return written([onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], [weight])


@needs_onnx
@pytest.mark.parametrize("command", [False, True])
def test_weights_in_another_file_lie_beside_the_program(here: Path, command: bool) -> None:
    file = outside("own.bin")
    for name in ("own.bin", "deeper/own.bin", "../secret.bin"):
        (here / "folder" / name).parent.mkdir(exist_ok=True)
        (here / "folder" / name).write_bytes(torch.ones(8).numpy().tobytes())
    (here / "folder" / "link.bin").symlink_to("../secret.bin")
    (here / "folder" / "up").symlink_to("..")
    os.mkfifo(here / "folder" / "pipe.bin")
    for location in ("own.bin", "deeper/own.bin", "./own.bin"):
        assert pathlift.path_norm(load_model(outside(location)), (4,)).value == 8
    bad = (
        "../secret.bin",
        str(here / "secret.bin"),
        "link.bin",
        "up/secret.bin",
        "up/folder/../secret.bin",
        "pipe.bin",
        "",
        ".",
    )
    for location in (*bad, "gone.bin", "a\0b", "/dev/zero", "x" * 1000):
        file = outside(location)
        if command:
            done = run("norm", file, "--shape", "4")
            assert done.code == 2 and done.stderr.count("\n") == 1, done
        else:
            with pytest.raises(pathlift.InputError, match=r"m\.onnx"):
                load_model(file)
    for entries in ({"offset": -4}, {"offset": 8}, {"length": 64}, {"length": 10**15}, {"offset": 10**15}, {"length": -1}):
        with pytest.raises(pathlift.InputError, match=r"m\.onnx"):
            load_model(outside("own.bin", **entries))


@needs_onnx
def test_one_file_of_weights_is_not_read_a_thousand_times(little: int, here: Path) -> None:
    node = onnx.helper.make_node
    weights = []
    for place in range(100):
        weight = onnx.TensorProto(name=f"w{place}", dims=[25_000, 4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
        weight.external_data.add(key="location", value="own.bin")
        weights.append(weight)
    file = written([node("Gemm", ["x", "w0"], ["y"], transB=1)], weights)
    (here / "folder" / "own.bin").write_bytes(bytes(400_000))
    with pytest.raises(pathlift.InputError, match="unfold"):
        load_model(file)


@needs_onnx
def test_functions_that_call_each_other_are_not_unfolded() -> None:
    node, imports = onnx.helper.make_node, [onnx.helper.make_opsetid("", 13), onnx.helper.make_opsetid("own", 1)]

    def function(name: str, called: str) -> Any:
        body = [node(called, ["a"], ["t"], domain="own"), node(called, ["t"], ["b"], domain="own")]
        return onnx.helper.make_function("own", name, ["a"], ["b"], body, imports)

    for functions in (
        [function("F0", "F0")],
        [function(f"F{place}", f"F{place + 1}") for place in range(60)],
    ):
        file = written([node("F0", ["x"], ["y"], domain="own")], [], functions=functions)
        with pytest.raises(pathlift.InputError, match="F0"):
            load_model(file)
        assert pathlift.path_norm(load_model(two_layers("a", "b", functions=functions)), (4,)).value == 4 * 8 * 3


@needs_onnx
def test_programs_within_programs_are_refused_at_any_depth() -> None:
    program = onnx.load(two_layers("a", "b"))
    for depth in (1, 2, 10, 30, 100, 10_000):
        inner = b""
        for _ in range(depth):  # a graph with a node with an attribute that is a graph
            for field in (6, 5, 1):
                inner = bytes([field << 3 | 2]) + length(inner) + inner
        Path("folder/m.onnx").write_bytes(program.SerializeToString() + bytes([7 << 3 | 2]) + length(inner) + inner)
        with pytest.raises(pathlift.InputError, match=r"m\.onnx"):
            load_model("folder/m.onnx")


def length(content: bytes) -> bytes:
    """Write a length as protocol buffers do."""
    size, found = len(content), []
    while size > 127:
        found.append(size & 127 | 128)
        size >>= 7
    return bytes([*found, size])


@needs_onnx
def test_an_onnx_file_that_is_cut_or_changed_is_refused_or_read(here: Path) -> None:
    content = Path(two_layers("a", "b")).read_bytes()
    bad = here / "bad.onnx"
    for length in range(0, len(content), 7):
        bad.write_bytes(content[:length])
        with pytest.raises(pathlift.InputError, match=r"bad\.onnx"):
            load_model(str(bad))
    for changed in damaged(content):
        bad.write_bytes(changed)
        assert str(bad) in refusal_of(load_model, str(bad))


@needs_onnx
def test_reading_an_onnx_file_makes_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file = two_layers("a", "b")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was made")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert isinstance(load_model(file), nn.Module)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".onnx", ".pt2"])
@pytest.mark.parametrize(("content", "words"), [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "pointer of Git LFS"),
    ("\n<!DOCTYPE html>\n<html><body>Not found</body></html>", "web page"),
    ("<html>", "web page"),
])  # fmt: skip
def test_what_was_not_downloaded_is_named(suffix: str, content: str, words: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnx")
    path = tmp_path / f"m{suffix}"
    path.write_text(content)
    program = suffix in {".onnx", ".pt2"}
    of_programs = [lambda: load_model(str(path), trust=True), lambda: default_shape(str(path))]
    readers: list[Callable[[], object]] = of_programs if program else [lambda: load_state(path)]
    for read in readers:
        with pytest.raises(pathlift.InputError, match=words):
            read()


@pytest.mark.skipif(os.name != "posix", reason="files have other rights elsewhere")
def test_a_file_that_is_replaced_stays_as_private_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_tensors({"a": torch.ones(2)}, path)
    path.chmod(0o600)
    save_tensors({"a": torch.zeros(2)}, path)
    assert not load_state(path)["a"].any() and path.stat().st_mode & 0o777 == 0o600
