"""The command line as its users meet it: tables and JSON, exit status 2 and one sentence for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pathlift
from pathlift.storage.models import load_state, save_tensors
from plain import Done
from plain import run as in_process

SMALL = "cases:Residual"
HERE = Path(__file__).parent


def test_the_module_is_the_command_line() -> None:
    for arguments, code, words in ((("--version",), 0, pathlift.__version__), (("norm",), 2, "Missing argument")):
        command = [sys.executable, "-m", "pathlift", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=False)
        assert done.returncode == code and words in done.stdout + done.stderr, done


def run(*args: str, code: int = 0) -> Done:
    done = in_process(*args)
    assert done.code == code, done
    return done


def one_json(*args: str, code: int = 0) -> dict[str, object]:
    found: dict[str, object] = json.loads(run(*args, "--json", code=code).stdout)
    return found


def test_norm_prints_a_table_and_the_same_number_as_json(tmp_path: Path) -> None:
    from cases import Residual

    model = Residual()
    save_tensors(model.state_dict(), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    value = pathlift.path_norm(model, (1, 3, 3)).value
    for file in ("w.safetensors", "w.pt"):
        record = one_json("norm", SMALL, "--shape", "1,3,3", "--weights", str(tmp_path / file))
        assert record["value"] == pytest.approx(value)
    table = run("norm", SMALL, "--shape", "1,3,3", "--weights", str(tmp_path / "w.pt")).stdout
    assert f"{value:.6g}" in table and table.startswith(f"{SMALL}\n")
    built = run("norm", SMALL, "--shape", "1,3,3").stdout  # a factory may have loaded weights of its own
    assert built.startswith(f"{SMALL} (as it is built)\n")
    assert "from biases" in table


def test_metric_compares_with_a_file(tmp_path: Path) -> None:
    from cases import Residual

    model = Residual()
    save_tensors(model.state_dict(), tmp_path / "a.safetensors")
    state = {**model.state_dict(), "fc.weight": model.fc.weight.detach() * 0.5}
    save_tensors(state, tmp_path / "b.safetensors")
    record = one_json(
        "metric",
        SMALL,
        str(tmp_path / "b.safetensors"),
        "--weights",
        str(tmp_path / "a.safetensors"),
        "--shape",
        "1,3,3",
    )
    assert record["exact"]
    right = pathlift.path_metric(model, state, (1, 3, 3)).value
    assert record["lower"] <= right <= record["upper"]
    assert one_json("metric", SMALL, SMALL, "--shape", "1,3,3", "--q", "2")["method"] == "l2 tracks"


@pytest.mark.hunt
def test_metric_stops_at_a_ratio_and_says_what_gave_the_bounds() -> None:
    loose = one_json("metric", SMALL, SMALL, "--shape", "1,3,3", "--moments", "4")
    record = one_json("metric", SMALL, SMALL, "--shape", "1,3,3", "--ratio", "1.3", "--estimate", "500")
    assert record["ratio"] <= 1.3 < loose["ratio"] or loose["ratio"] <= 1.3
    assert loose["lower"] <= record["upper"]
    assert record["lower_by"]
    assert record["history"][0]["by"] == "pivot"
    assert record["estimate"]["samples"] == 500
    assert record["lower"] * 0.9 <= record["estimate"]["value"] <= record["upper"] * 1.1
    table = run("metric", SMALL, SMALL, "--shape", "1,3,3", "--moments", "8", "--estimate", "50").stdout
    assert "upper / lower" in table
    assert "95% confidence" in table


@pytest.mark.hunt
def test_compare_prints_and_draws_the_kernel(tmp_path: Path) -> None:
    from cases import Residual

    pytest.importorskip("matplotlib")
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"seed{seed}.safetensors")
        save_tensors(Residual().state_dict(), paths[-1])
    arguments = [*map(str, paths), "--model", SMALL, "--shape", "1,3,3"]
    record = one_json("compare", *arguments)
    kernel = pathlift.path_kernel(paths, (1, 3, 3), model=Residual())
    assert record["cosine"] == kernel.cosine.tolist()
    picture = tmp_path / "compare.png"
    printed = run("compare", *arguments, "--plot", str(picture)).stdout
    assert f"{float(kernel.cosine[0, 1]):.6f}" in printed
    assert "seed2" in printed
    assert picture.stat().st_size > 10_000


def test_score_writes_every_share(tmp_path: Path) -> None:
    out = tmp_path / "scores.safetensors"
    record = one_json("score", SMALL, "--shape", "1,3,3", "--out", str(out))
    scores = load_state(out)
    assert set(scores) == set(record["tensors"])
    assert float(scores["fc.weight"].sum()) <= 1
    assert "share of all paths" in run("score", SMALL, "--shape", "1,3,3").stdout


def test_support_says_yes_or_lists_all_problems() -> None:
    assert one_json("support", SMALL, "--shape", "1,3,3")["supported"] is True
    record = one_json("support", "torch.nn:GELU", "--shape", "3", code=1)
    assert record["problems"][0]["op"] == "aten.gelu.default"
    assert "fixed slopes" in run("support", "torch.nn:GELU", "--shape", "3", code=1).stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("norm", "nonsense"), "names no model"),
        (("norm", SMALL), "Give it with --shape"),
        (("norm", SMALL, "--shape", "1,x"), "whole numbers"),
        (("norm", SMALL, "--shape", "2,3,3"), "cannot run on inputs"),
        (("norm", SMALL, "--shape", "1,3,3", "--q", "0"), "q must be"),
        (("norm", SMALL, "--shape", "1,3,3", "--weights", "no.pt"), "no file"),
        (("norm", SMALL, "--shape", "1,3,3", "--device", "nowhere"), "--device must be a device that is there"),
        (("norm", "torch.nn:GELU", "--shape", "3"), "outside the theory"),
        (("score", SMALL, "--shape", "1,3,3", "--out", "scores.txt"), ".safetensors"),
        (("metric", SMALL, "cases:Tied", "--shape", "1,3,3"), "does not have the parameters"),
        (("norm", SMALL, "--no-such-option"), "No such option"),
        (("norm",), "Missing argument 'MODEL'"),
        (("no-such-command",), "No such command"),
        (("norm", SMALL, "--seed", "one"), "--seed"),
        (("norm", SMALL, "--shape", "1,3,3", "--seed", "9" * 30), "--seed"),
        (("norm", SMALL, "--shape", "9" * 20), "--shape must be positive sizes"),
        (("norm", SMALL, "--shape", "99999999999,99999999999"), "--shape must be positive sizes"),
        (("norm", SMALL, "--shape", "-1,3,3"), "--shape must be positive sizes"),
        (("norm", ":b", "--shape", "1,3,3"), "names no model"),
        (("norm", SMALL, "--shape", "1,3,3", "--model-arg", "width"), "NAME=VALUE"),
        (("prune", SMALL, "--shape", "1,3,3", "--amount", "0.5", "--criterion", "snip"), "Give it with --data"),
        (("experiment", "lottery", "--data", "digits", "--limit", "0"), "limit must be at least 1"),
        (("experiment", "lottery", "--data", "digits", "--jobs", "0"), "--jobs must be at least 1"),
        (("experiment", "lottery", "--data", "digits", "--rate", "-1"), "rate must be a positive number"),
        (("experiment", "lottery", "--data", "digits", "--rate", "nan"), "rate must be a positive number"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_bad_input_exits_with_2_and_says_why(args: tuple[str, ...], words: str) -> None:
    done = run(*args, code=2)
    assert not done.stdout
    assert words in done.stderr
    assert done.stderr.startswith("pathlift: ")
    assert done.stderr.count("\n") == 1 or "outside the theory" in done.stderr, done.stderr


def test_an_onnx_file_is_read(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(torch.tensor([[2.0, -3.0]]).numpy(), "w")
    bias = onnx.numpy_helper.from_array(torch.tensor([-1.0]).numpy(), "b")
    layers = [
        onnx.helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        onnx.helper.make_node("Relu", ["h"], ["y"]),
    ]
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 1])
    graph = onnx.helper.make_graph(layers, "g", [x], [y], [weight, bias])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)]), tmp_path / "m.onnx")
    assert one_json("norm", str(tmp_path / "m.onnx"), "--shape", "2")["value"] == pytest.approx(6.0)


def test_an_exported_program_gives_the_same_number(tmp_path: Path) -> None:
    from cases import Residual

    model = Residual().eval()
    value = pathlift.path_norm(model, (1, 3, 3)).value
    program = torch.export.export(model, (torch.zeros(1, 1, 3, 3),))
    torch.export.save(program, tmp_path / "m.pt2")
    assert one_json("norm", str(tmp_path / "m.pt2"), "--trust", "--shape", "1,3,3")["value"] == pytest.approx(value, rel=1e-6)


@pytest.mark.hunt
def test_certify_prints_a_share_and_each_sample_as_json(tmp_path: Path) -> None:
    from cases import Residual

    model = Residual()
    x, y = torch.randn(6, 1, 3, 3), torch.zeros(6, dtype=torch.long)
    save_tensors(model.state_dict(), tmp_path / "w.safetensors")
    save_tensors({"x": x, "y": y}, tmp_path / "data.safetensors")
    common = (SMALL, "--shape", "1,3,3", "--weights", str(tmp_path / "w.safetensors"))
    common += ("--data", str(tmp_path / "data.safetensors"))
    record = one_json("certify", *common, "--bits", "12")
    expected = pathlift.certify(model, x, pathlift.Rounding(12))
    assert record["certified"] == expected.certified.tolist()
    assert record["samples"] == 6
    table = run("certify", *common, "--relative", "0.001", "--radius", "0.01", "--limit", "5").stdout
    assert "certified: the class cannot change" in table
    assert "accuracy of the model" in table
    other = one_json("certify", *common, "--other", str(tmp_path / "w.safetensors"))
    assert other["share"] == 1.0
    hurried = one_json("certify", *common, "--relative", "0.5", "--seconds", "0")
    assert hurried["stopped"] == [True] * 6 and not any(hurried["certified"])
    table = run("certify", *common, "--relative", "0.5", "--seconds", "0").stdout
    assert "not done when the time was up" in table
    assert not any(one_json("certify", *common, "--relative", "0.5")["stopped"])
    alone = one_json("certify", *common)
    assert alone["covers"] == "the rounding of the model's own forward pass in float32, and nothing else"
    assert alone["covers"] in run("certify", *common).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "1"), "bits must be"),
        (("--relative", "-1"), "--relative must be"),
        (("--bits", "8", "--prune", "0.5"), "Give one set"),
        (("--bits", "8", "--limit", "-5"), "--limit must be at least 1 sample, found -5"),
        (("--limit", "0"), "--limit must be at least 1 sample, found 0"),
        (("--radius", "-1"), "--radius must be"),
        (("--seconds", "-1"), "--seconds must be"),
        (("--prune", "0.5", "--criterion", "luck"), "criterion must be"),
        (("--bits", "8", "--data", "nowhere"), "is not known"),
    ],
)
def test_certify_refuses_bad_input_in_one_sentence(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    save_tensors({"x": torch.zeros(2, 1, 3, 3)}, tmp_path / "data.safetensors")
    data = () if "--data" in options else ("--data", str(tmp_path / "data.safetensors"))
    done = run("certify", SMALL, "--shape", "1,3,3", *data, *options, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--amount", "1.5"), "--amount must be"),
        (("--amount", "0.5", "--steps", "0"), "--steps must be"),
        (("--steps", "2"), "--steps has no effect without --amount"),
    ],
)
def test_shrink_refuses_bad_options_before_it_looks_for_the_model(options: tuple[str, ...], message: str) -> None:
    assert message in run("shrink", "nowhere:net", "--shape", "8", *options, code=2).stderr


def test_compare_refuses_bad_input_in_one_sentence(tmp_path: Path) -> None:
    for arguments, words in (
        ((str(tmp_path / "no.safetensors"), "--model", SMALL, "--shape", "1,3,3"), "no.safetensors"),
        ((str(tmp_path), "--model", SMALL, "--shape", "1,3,3", "--plot", "a.txt"), "--plot must end in .png"),
    ):
        done = run("compare", *arguments, code=2)
        assert words in done.stderr


@pytest.mark.hunt
def test_metric_lists_all_bounds(tmp_path: Path) -> None:
    from cases import Residual

    torch.manual_seed(3)
    save_tensors(Residual().state_dict(), tmp_path / "b.safetensors")
    record = one_json("metric", SMALL, str(tmp_path / "b.safetensors"), "--shape", "1,3,3", "--all")
    names = [bound["name"] for bound in record["bounds"]]  # type: ignore[attr-defined]
    assert {"Lemma F.1", "Theorem F.2", "pivot", "telescoping"} <= set(names)
    table = run("metric", SMALL, str(tmp_path / "b.safetensors"), "--shape", "1,3,3", "--all", "--moments", "4").stdout
    assert "Lemma 4.4 does not apply" in table
    assert "4 moments" in table or "4 affinities" in table


@pytest.mark.hunt
def test_rescale_shows_groups_and_writes_an_equivalent_network(tmp_path: Path) -> None:
    from cases import Residual

    torch.manual_seed(0)
    model = Residual()
    save_tensors(model.state_dict(), tmp_path / "a.safetensors")
    options = ["--weights", str(tmp_path / "a.safetensors"), "--shape", "1,3,3"]
    table = run("rescale", SMALL, *options).stdout
    assert "8 rescaling groups" in table
    assert "conv1.weight[i], bn1.running_mean[i]" in table
    assert "the output" in table
    network = pathlift.capture(model, (1, 3, 3))
    for target in ("random", "normal", "balanced", "equalized", "conditioned"):
        file = tmp_path / f"{target}.safetensors"
        rescaled = one_json("rescale", SMALL, *options, "--to", target, "--out", str(file))
        assert rescaled["groups"] == 8 and len(rescaled["factors"]) == 8
        answer = pathlift.equivalent(network, load_state(file))
        assert answer and answer.factors.tolist() == pytest.approx(rescaled["factors"], rel=1e-4)
    again = one_json("equivalent", SMALL, str(tmp_path / "random.safetensors"), *options)
    assert again["equivalent"] is True and len(again["factors"]) == 8
    assert "imbalance" in run("rescale", SMALL, *options, "--to", "balanced").stdout
    drawn = one_json("rescale", SMALL, *options, "--to", "random", "--choices", "1,128")
    assert set(drawn["factors"]) <= {1.0, 128.0}


def test_equivalent_exits_with_1_and_names_the_first_difference(tmp_path: Path) -> None:
    from cases import Residual

    torch.manual_seed(0)
    model = Residual()
    save_tensors(model.state_dict(), tmp_path / "a.safetensors")
    state = {**model.state_dict(), "fc.bias": model.fc.bias.detach() + 1}
    save_tensors(state, tmp_path / "b.safetensors")
    options = ["--weights", str(tmp_path / "a.safetensors"), "--shape", "1,3,3"]
    assert (
        "not equivalent: 'fc.bias' takes no part"
        in run("equivalent", SMALL, str(tmp_path / "b.safetensors"), *options, code=1).stdout
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--to", "random", "--choices", "1,-2"), "positive"),
        (("--to", "random", "--choices", "one"), "--choices must be numbers"),
        (("--to", "balance"), "Invalid value for '--to': 'balance' is not one of 'random', 'normal',"),
        (("--to", "balanced", "--p", "-1"), "p must be a positive"),
        (("--out", "x.safetensors"), "--out needs --to"),
        (("--to", "balanced", "--out", "x.txt"), "--out must end in .safetensors or .pt or .onnx or .pt2"),
    ],
)
def test_rescale_refuses_bad_input_in_one_sentence(args: tuple[str, ...], words: str) -> None:
    assert words in run("rescale", SMALL, "--shape", "1,3,3", *args, code=2).stderr


def test_prune_writes_weights_and_masks_and_says_what_it_costs(tmp_path):
    weights, masks = tmp_path / "pruned.safetensors", tmp_path / "masks.safetensors"
    done = run("prune", "cases:Residual", "--shape", "1,3,3", "--amount", "0.5", "--out", str(weights), "--masks", str(masks))
    assert "joint cost" in done.stdout and "bound (13)" in done.stdout
    kept = pathlift.pruning.load_masks(masks)
    state = load_state(weights)
    assert all(not bool(state[name][~mask].any()) for name, mask in kept.items())
    assert "pruned by relative_path_magnitude" in done.stdout, "the recommended criterion is the default, and is named"
