"""Bad input: one clear error each, of our own family, naming what was found and what to do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathlift
from cases import Fn, Residual, Tied
from pathlift.storage.data import load_data
from pathlift.storage.models import load_model, load_state, save_tensors
from pathlift.storage.packages import package

MODEL = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv1.weight", "bn1.bias", "fc.weight", "down.bias"])
def test_a_weight_that_is_not_finite_is_named(bad: float, name: str) -> None:
    model = Residual()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = bad
    for call in (
        lambda: pathlift.path_norm(model, (1, 3, 3)),
        lambda: pathlift.path_norm(model, (1, 3, 3), q=float("inf")),
        lambda: pathlift.path_magnitude(model, (1, 3, 3)),
        lambda: pathlift.path_metric(Residual(), model, (1, 3, 3)),
        lambda: pathlift.path_metric(model, model, (1, 3, 3)),
        lambda: pathlift.path_metric(model, Residual(), (1, 3, 3), q=2),
    ):
        with pytest.raises(pathlift.NumericalError, match=name):
            call()


def test_bad_batch_norm_statistics_are_named() -> None:
    model = Residual()
    model.bn1.running_var.fill_(float("nan"))
    with pytest.raises(pathlift.NumericalError, match=r"bn1\.running_var"):
        pathlift.path_norm(model, (1, 3, 3))


@pytest.mark.parametrize(
    "inputs",
    [
        (),
        (0,),
        (3, 0),
        (-1,),
        (2.5,),
        ("3",),
        "3",
        3,
        None,
        True,
        torch.zeros(0, 3),
        torch.tensor(1.0),
        torch.zeros(1, 3).long(),
        (None,),
    ],
    ids=str,
)
def test_malformed_inputs_are_refused(inputs: object) -> None:
    with pytest.raises(pathlift.InputError):
        pathlift.path_norm(MODEL, inputs)  # type: ignore[arg-type]


def test_a_wrong_channel_count_quotes_the_shape_and_the_models_own_reason() -> None:
    with pytest.raises(pathlift.InputError, match=r"\(1, 4, 8, 8\).*4 channels"):
        pathlift.path_norm(nn.Conv2d(3, 2, 3), (4, 8, 8))


def test_a_model_that_is_no_module_is_refused() -> None:
    with pytest.raises(pathlift.InputError, match=r"torch\.nn\.Module"):
        pathlift.path_norm(lambda x: x, (3,))  # type: ignore[arg-type]


@pytest.mark.parametrize("q", [0.5, 0, -1, float("nan"), "2", True, None])
def test_an_order_below_one_is_refused(q: object) -> None:
    with pytest.raises(pathlift.InputError, match="q must be"):
        pathlift.path_norm(MODEL, (3,), q=q)  # type: ignore[arg-type]


def test_a_mismatch_names_the_key_and_the_shapes() -> None:
    state = MODEL.state_dict()
    with pytest.raises(pathlift.MismatchError, match=r"0\.weight.*\(2, 3\).*\(4, 3\)"):
        pathlift.path_metric(MODEL, {**state, "0.weight": torch.zeros(4, 3)}, (3,))
    with pytest.raises(pathlift.MismatchError, match=r"missing: 2\.bias"):
        pathlift.path_metric(MODEL, {k: v for k, v in state.items() if k != "2.bias"}, (3,))
    with pytest.raises(pathlift.MismatchError, match=r"not in the first network: extra"):
        pathlift.path_metric(MODEL, {**state, "extra": torch.zeros(1)}, (3,))
    with pytest.raises(pathlift.MismatchError, match="not a tensor"):
        pathlift.path_metric(MODEL, {**state, "2.bias": 3.0}, (3,))  # type: ignore[dict-item]
    with pytest.raises(pathlift.InputError, match="other must be"):
        pathlift.path_metric(MODEL, 3, (3,))  # type: ignore[arg-type]


def test_the_same_parameters_in_another_graph_are_a_mismatch() -> None:
    class Subtracting(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    with pytest.raises(pathlift.MismatchError, match="different graphs"):
        pathlift.path_metric(Residual(), Subtracting(), (1, 3, 3))


def test_a_tied_tensor_must_be_tied_in_both() -> None:
    model = Tied()
    state = {**model.state_dict(), "second.weight": torch.zeros(3, 3)}
    with pytest.raises(pathlift.MismatchError, match="one tensor"):
        pathlift.path_metric(model, state, (3,))


def test_a_norm_stays_that_of_the_weights_it_was_taken_of() -> None:
    model = nn.Linear(2, 1)
    norm = pathlift.path_norm(model, (2,))
    value = norm.value
    for weight in model.parameters():
        weight.data.mul_(2)
    assert norm.input_part + norm.bias_part == pytest.approx(value)
    assert float(norm.per_output.sum()) == pytest.approx(value)
    assert pathlift.path_norm(model, (2,)).value == pytest.approx(2 * value)


def test_models_without_a_graph_are_refused() -> None:
    with pytest.raises(pathlift.UnsupportedModelError, match="lazy"):
        pathlift.path_norm(nn.LazyLinear(2), (3,))
    with pytest.raises(pathlift.UnsupportedModelError, match="TorchScript"):
        pathlift.path_norm(torch.jit.trace(nn.Linear(3, 1), torch.ones(1, 3)), (3,))
    with pytest.raises(pathlift.UnsupportedModelError, match="no floating-point tensor"):
        pathlift.path_norm(Fn(lambda x: None), (3,))


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    assert pathlift.check_support(model, (3,)).supported
    with pytest.raises(pathlift.NumericalError, match="meta device"):
        pathlift.path_norm(model, (3,))


def test_enumeration_has_a_limit() -> None:
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(6)))
    with pytest.raises(pathlift.InputError, match="paths, more than the limit"):
        pathlift.path_lifting(model, (30,))


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code was run')",))


def test_unreadable_and_malicious_checkpoints_are_refused(tmp_path: Path) -> None:
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"weight": Malicious()}))
    torch.save({"weight": Malicious()}, tmp_path / "zip.pt")
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pt")
    short = {f"short{index}.pt": content for index, content in enumerate((b"abc", b"\x80", b"\x80\x02.", b"I1\n.", b"PK\3\4"))}
    for name, content in short.items():
        (tmp_path / name).write_bytes(content)
    for name in (
        *short,
        "code.pt",
        "zip.pt",
        "noise.pt",
        "noise.safetensors",
        "empty.pt",
        "list.pt",
        "numbers.pt",
        "missing.pt",
    ):
        with pytest.raises(pathlift.InputError, match=name):
            load_state(tmp_path / name)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (lambda: torch.ones(16, 3).to_sparse(), "no dense tensor"),
        (lambda: torch.ones(16, 3).to_sparse_csr(), "no dense tensor"),
        (lambda: torch.ones(16, 3, device="meta"), "no values"),
        (lambda: torch.ones(16, 3) + 5j, "complex64"),
        (lambda: torch.ones(16, 3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.ones(16, 3).to(torch.float8_e5m2), "float8_e5m2"),
    ],
    ids=range(6),
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_weights_that_are_no_plain_numbers_are_named(tensor: Callable[[], Tensor], words: str, tmp_path: Path) -> None:
    torch.save({"layer.weight": tensor()}, tmp_path / "odd.pt")
    for read in (load_state, pathlift.pruning.load_masks):
        with pytest.raises(pathlift.InputError, match=rf"(?s)layer\.weight.*odd\.pt.*{words}"):
            read(tmp_path / "odd.pt")


def test_masks_of_three_bytes_are_refused(tmp_path: Path) -> None:
    for name in ("short.pt", "short.safetensors"):
        (tmp_path / name).write_bytes(b"abc")
        with pytest.raises(pathlift.InputError, match=name):
            pathlift.pruning.load_masks(tmp_path / name)


BUILDERS = """
import sys
from torch import nn

class Needs(nn.Linear):
    def __init__(self, width):
        super().__init__(4, width)

class Broken(nn.Module):
    def __init__(self):
        self.layer = nn.Linear(1, 1)

def raises(): raise RuntimeError("no such luck" + chr(10) + "and more")
def raises_nothing(): raise ValueError
def fails(): assert False
def ends(): sys.exit("bye")
def ends_well(): sys.exit(0)
def needs(width, *, depth): return nn.Linear(width, depth)
def nothing(): pass
def kind(): return nn.Linear
async def later(): return nn.Linear(1, 1)
def fine(width=2): return nn.Linear(width, 1)
model = nn.Linear(3, 1)
number = 3
"""


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("raises", "RuntimeError: no such luck$"),
        ("raises_nothing", "ValueError$"),
        ("fails", "AssertionError"),
        ("ends", "SystemExit: bye$"),
        ("ends_well", "SystemExit: 0$"),
        ("Needs", "Needs.*'width'"),
        ("needs", "'width'"),
        ("Broken", "AttributeError: cannot assign module"),
        ("nothing", "gave a NoneType"),
        ("kind", "gave a type"),
        ("later", "gave a coroutine"),
        ("number", "is a int, not a torch.nn.Module"),
        ("number.real.no", "has no 'number.real.no'"),
        ("fine.", "has no 'fine.'"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_builder_that_does_not_build_is_told_in_one_sentence(
    entry: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "builders_of_all_kinds.py").write_text(BUILDERS)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pathlift.InputError, match=words) as error:
        load_model(f"builders_of_all_kinds:{entry}")
    assert f"builders_of_all_kinds:{entry}" in str(error.value) or "has no" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_builder_takes_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "builders_with_arguments.py").write_text(BUILDERS)
    monkeypatch.syspath_prepend(tmp_path)
    name = "builders_with_arguments"
    assert load_model(f"{name}:fine", arguments={"width": 5}).in_features == 5
    assert load_model(f"{name}:needs", arguments={"width": 5, "depth": 2}).out_features == 2
    for entry, arguments, words in (
        ("fine", {"height": 1}, "unexpected keyword argument 'height'"),
        ("model", {"width": 1}, "a model already"),
        ("fine", {"width": "wide"}, "TypeError"),
    ):
        with pytest.raises(pathlift.InputError, match=words):
            load_model(f"{name}:{entry}", arguments=arguments)


@pytest.mark.parametrize("code", ["import sys; sys.exit(3)", "1 / 0", "def (", "import no_such_package_at_all"])
def test_a_module_that_cannot_be_imported_is_told_in_one_sentence(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"broken_module_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pathlift.InputError, match=f"'{name}' cannot be imported: [A-Z]") as error:
        load_model(f"{name}:model")
    assert "\n" not in str(error.value)


def test_weights_of_another_size_name_the_option_that_helps(tmp_path: Path) -> None:
    save_tensors(nn.Linear(3, 7).state_dict(), tmp_path / "seven.safetensors")
    arguments = {"in_features": 3, "out_features": 10}
    with pytest.raises(pathlift.MismatchError, match=r"\(7,.*\(10,.*--model-arg"):
        load_model("torch.nn:Linear", tmp_path / "seven.safetensors", arguments=arguments)
    assert load_model("torch.nn:Linear", tmp_path / "seven.safetensors", arguments={**arguments, "out_features": 7})


def test_weights_of_a_lazy_model_are_loaded(tmp_path: Path) -> None:
    save_tensors({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, tmp_path / "w.safetensors")
    model = load_model("torch.nn:LazyLinear", tmp_path / "w.safetensors", arguments={"out_features": 2})
    assert torch.equal(model.weight, torch.ones(2, 3))


def test_a_missing_package_is_an_import_error_too() -> None:
    with pytest.raises(ImportError, match="pip install 'pathlift\\[vision\\]'") as error:
        package("no_such_package_at_all.models", "vision")
    assert isinstance(error.value, pathlift.InputError)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_a_package_that_is_there_and_broken_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_in_pieces.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"'package_in_pieces' cannot be imported.*no_such_package_at_all"):
        package("package_in_pieces", "vision")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(pathlift.InputError, match="does not exist"):
        save_tensors({"a": torch.ones(1)}, tmp_path / "no" / "such.safetensors")
    save_tensors({"a": torch.ones(1)}, tmp_path / "fine.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["fine.safetensors"]
    assert torch.equal(load_state(tmp_path / "fine.safetensors")["a"], torch.ones(1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "names no model"),
        (":b", "names no model"),
        ("a:", "names no model"),
        (":", "names no model"),
        ("", "names no model"),
        (".a:b", "names no model"),
        ("a..b:c", "names no model"),
        ("no such:f", "cannot be imported"),
        ("math:pi.", "has no 'pi.'"),
        ("torchvision:resnet19", "Did you mean 'resnet18'"),
        ("no_such_module:f", "cannot be imported"),
        ("math:tau", "not a torch.nn.Module"),
        ("math:no", "has no 'no'"),
        ("missing.onnx", "no file"),
        ("missing.pt2", "no file"),
    ],
)
def test_a_wrong_model_name_says_what_is_expected(name: str, words: str) -> None:
    if "torchvision" in name:
        pytest.importorskip("torchvision")
    if name.endswith(".onnx"):
        pytest.importorskip("onnx")
    with pytest.raises(pathlift.InputError, match=words):
        load_model(name)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".pt", ".safetensors"])
def test_a_folder_in_the_place_of_a_file_is_called_one(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    read = partial(load_model, trust=True) if suffix in {".onnx", ".pt2"} else partial(load_data, shape=(1,))
    with pytest.raises(pathlift.InputError, match="is a folder"):
        read(str(folder))


def test_data_is_read_by_name_and_refused_in_one_sentence(tmp_path: Path) -> None:
    x, y = load_data("digits", (1, 8, 8))
    assert x.shape == (1797, 1, 8, 8)
    assert y is not None
    assert float(x.min()) == 0.0
    assert float(x.max()) == 1.0
    save_tensors({"inputs": torch.zeros(2, 3)}, tmp_path / "nameless.safetensors")
    save_tensors({"x": torch.zeros(2, 3, dtype=torch.long)}, tmp_path / "whole.safetensors")
    save_tensors({"x": torch.zeros(2, 3), "y": torch.zeros(5, dtype=torch.long)}, tmp_path / "five.safetensors")
    save_tensors({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, tmp_path / "real.safetensors")
    assert [len(part) for part in load_data("digits", (64,), 5)] == [5, 5]
    for limit in (0, -5):
        with pytest.raises(pathlift.InputError, match="limit must be at least 1"):
            load_data("digits", (64,), limit)
    for name, shape, message in (
        ("digits", (10,), "do not fill the input shape"),
        ("cats", (3,), "is not known"),
        (str(tmp_path / "missing.pt"), (3,), "There is no file"),
        (str(tmp_path / "nameless.safetensors"), (3,), "under the name 'x'"),
        (str(tmp_path / "whole.safetensors"), (3,), "floating-point"),
        (str(tmp_path / "five.safetensors"), (3,), "one whole number for each of 2 inputs"),
        (str(tmp_path / "real.safetensors"), (3,), "one whole number for each of 2 inputs"),
    ):
        with pytest.raises(pathlift.InputError, match=message):
            load_data(name, shape)


def small(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)


DOORS: dict[str, Callable[[nn.Module, Any], object]] = {
    "capture": pathlift.capture,
    "check_support": pathlift.check_support,
    "path_norm": pathlift.path_norm,
    "path_lifting": lambda model, x: pathlift.path_lifting(model, x, None),
    "path_metric": lambda model, x: pathlift.path_metric(model, small(), x),
    "path_norms": lambda model, x: list(pathlift.path_norms(model, [small()], x)),
    "path_kernel": lambda model, x: pathlift.path_kernel([model, small()], x),
    "symmetries": pathlift.symmetries,
    "lipschitz_bound": lambda model, x: pathlift.lipschitz_bound(model, small(), x),
    "expected_bound": lambda model, x: pathlift.lipschitz.expected_bound(model, small(), [x]),
    "gradient_norms": pathlift.lipschitz.gradient_norms,
    "certify": pathlift.certify,
    "certify batches": lambda model, x: pathlift.certify(model, [x]),
    "attack": pathlift.attack,
    "prune": lambda model, x: pathlift.prune(model, x, 0.5),
    "sharpness": lambda model, x: pathlift.consequences.sharpness(model, x, torch.zeros(len(x), dtype=torch.int64), 0.1),
}
"""Functions that take inputs or samples."""


@pytest.mark.one_in(2)
@pytest.mark.parametrize("door", DOORS)
def test_inputs_of_another_type_than_the_weights_are_refused_with_both(door: str) -> None:
    for dtype, words in ((torch.float64, "float64.*float32"), (torch.int64, "int64.*float32")):
        with pytest.raises(pathlift.InputError, match=rf"{words}.*Convert the input with \.to\(torch\.float32\)"):
            DOORS[door](small(), torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize("door", DOORS)
def test_arrays_are_refused_with_the_way_to_a_tensor(door: str) -> None:
    for array in (np.ones((2, 3), dtype=np.float32), [np.ones((2, 3))]):
        with pytest.raises(pathlift.InputError, match=r"torch\.from_numpy"):
            DOORS[door](small(), array)


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 2, 1), nn.ConvTranspose1d(3, 2, 1), nn.BatchNorm1d(3), nn.PReLU(3)])
def test_layers_of_any_kind_name_both_types(layer: nn.Module) -> None:
    with pytest.raises(pathlift.InputError, match=r"dtype float64, the weights have float32"):
        pathlift.capture(layer, torch.ones(1, 3, 2, dtype=torch.float64))
    with pytest.raises(pathlift.InputError, match=r"dtype float32, the weights have float64"):
        pathlift.capture(copy.deepcopy(layer).double(), torch.ones(1, 3, 2))


def test_a_model_that_converts_its_inputs_is_read_and_one_outside_the_theory_is_told_why() -> None:
    class Converting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.float())

    x, model = torch.ones(1, 3, dtype=torch.float64), Converting(3, 2)
    assert pathlift.path_norm(model, x).value == pathlift.path_norm(model, (3,)).value
    with pytest.raises(pathlift.UnsupportedModelError, match="gelu"):
        pathlift.capture(nn.Sequential(Converting(3, 2), nn.GELU()), x)


def test_weights_that_are_arrays_are_refused_with_the_way_to_a_tensor() -> None:
    arrays = {name: value.numpy() for name, value in small().state_dict().items()}
    with pytest.raises(pathlift.MismatchError, match=r"torch\.from_numpy"):
        pathlift.path_metric(small(), arrays, (3,))


def test_a_model_with_hooks_that_cannot_run_on_its_inputs_is_said_in_one_sentence() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(pathlift.InputError, match=r"cannot run on inputs of shape \(1, 5\)"):
        pathlift.path_norm(model, (5,))
    assert pathlift.path_norm(model, (4,)).value > 0
