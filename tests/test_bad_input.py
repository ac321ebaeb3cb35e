"""Bad input: one clear error each, of our own family, naming what was found and what to do."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pathlift
from cases import Fn, Residual, Tied
from pathlift.data import load_data
from pathlift.models import load_model, load_state, save_tensors

MODEL = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))


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


def test_parts_of_a_norm_are_refused_after_the_weights_changed() -> None:
    model = nn.Linear(2, 1)
    norm = pathlift.path_norm(model, (2,))
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(pathlift.PathliftError, match="Call path_norm again"):
        _ = norm.input_part


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
    for name in (
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


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(pathlift.InputError, match="cannot be written"):
        save_tensors({"a": torch.ones(1)}, tmp_path / "no" / "such.safetensors")
    save_tensors({"a": torch.ones(1)}, tmp_path / "fine.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["fine.safetensors"]
    assert torch.equal(load_state(tmp_path / "fine.safetensors")["a"], torch.ones(1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "names no model"),
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
        pytest.importorskip("onnx2torch")
    with pytest.raises(pathlift.InputError, match=words):
        load_model(name)


def test_data_is_read_by_name_and_refused_in_one_sentence(tmp_path: Path) -> None:
    x, y = load_data("digits", (1, 8, 8))
    assert x.shape == (1797, 1, 8, 8)
    assert y is not None
    assert float(x.min()) == 0.0
    assert float(x.max()) == 1.0
    save_tensors({"inputs": torch.zeros(2, 3)}, tmp_path / "nameless.safetensors")
    save_tensors({"x": torch.zeros(2, 3, dtype=torch.long)}, tmp_path / "whole.safetensors")
    for name, shape, message in (
        ("digits", (10,), "do not fill the input shape"),
        ("cats", (3,), "is not known"),
        (str(tmp_path / "missing.pt"), (3,), "There is no file"),
        (str(tmp_path / "nameless.safetensors"), (3,), "under the name 'x'"),
        (str(tmp_path / "whole.safetensors"), (3,), "floating-point"),
    ):
        with pytest.raises(pathlift.InputError, match=message):
            load_data(name, shape)
