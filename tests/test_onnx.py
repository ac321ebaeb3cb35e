"""ONNX files: what is read of one computes what the file says, under the file's own names, or is refused by node."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pathlift
from cases import Fn
from pathlift.storage.models import default_shape, load_model

onnx = pytest.importorskip("onnx")

from pathlift.storage.onnx import OnnxModule, input_shapes, read_onnx  # noqa: E402
from pathlift.storage.onnx.host import HOST  # noqa: E402
from pathlift.storage.onnx.operators import OPERATORS  # noqa: E402
from pathlift.storage.onnx.program import STATIC, tensor_of  # noqa: E402
from pathlift.storage.onnx.trial import difference  # noqa: E402

helper, numpy_helper = onnx.helper, onnx.numpy_helper
node = helper.make_node
runtime = importlib.util.find_spec("onnxruntime") is not None
needs_script = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="PyTorch's exporter needs onnxscript")

Sizes = Sequence[int | str | None]


def array(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


def write(
    path: Path,
    nodes: Sequence[Any],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    shape: Sizes,
    opset: int = 17,
    outputs: Sequence[str] = ("y",),
) -> Path:
    """Write a program of x that returns y."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def inputs(module: OnnxModule, batch: int = 2) -> Tensor:
    """Draw an input of the declared shape."""
    shape = module.inputs[0].shape
    assert shape is not None
    sizes = [batch, *(size for size in shape[1:] if size is not None)]
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1))


def reads(path: Path, expected: Callable[[Tensor], Tensor], batch: int = 2) -> OnnxModule:
    """Read a file; its outputs are those expected, on a batch too."""
    module = read_onnx(path)
    x = inputs(module, batch)
    torch.testing.assert_close(module(x).detach(), expected(x), rtol=1e-4, atol=1e-5)
    return module


# ---- the tests of the onnx package


@cache
def node_cases() -> list[Any]:
    """Return the package's cases of one node whose operators and versions are read."""
    from onnx.backend.test.case.node import collect_testcases

    known = {*OPERATORS, *HOST, "Constant", "If"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    return [
        case
        for case in cases
        if all(own.op_type in known and own.domain == "" for own in case.model.graph.node)
        and 7 <= max(own.version for own in case.model.opset_import if own.domain == "") <= 25
    ]


def as_array(value: Any) -> np.ndarray[Any, Any]:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def decided(case: Any) -> Iterator[tuple[Any, list[Tensor], list[Tensor]]]:
    """Make what decides the computation (axes, shapes, limits) a constant of the file, as exporters do."""
    names = [own.name for own in case.model.graph.input]
    static = {
        own.input[place] for own in case.model.graph.node for place in STATIC.get(own.op_type, ()) if place < len(own.input)
    }
    for given, returned in case.data_sets:
        values = dict(zip(names, (as_array(own) for own in given if own is not None), strict=False))
        program = onnx.ModelProto.FromString(case.model.SerializeToString())
        program.graph.initializer.extend(numpy_helper.from_array(own, name) for name, own in values.items() if name in static)
        try:
            tensors = [tensor_of(own) for name, own in values.items() if name not in static]
            parts = [part for own in returned for part in (own if isinstance(own, list) else [own])]  # sequences
            results = [tensor_of(as_array(own)) for own in parts if own is not None]
        except pathlift.InputError:
            continue  # types that PyTorch does not have
        yield program, tensors, results


@pytest.mark.hunt  # the package takes seconds to make its cases
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("shard", range(16))
def test_nodes_compute_what_the_standard_says(shard: int, tmp_path: Path) -> None:
    compared = 0
    for case in node_cases()[shard::16]:
        for program, given, expected in decided(case):
            (tmp_path / "m.onnx").write_bytes(program.SerializeToString())
            try:
                found = read_onnx(tmp_path / "m.onnx", check=False)(*given)
            except pathlift.PathliftError:
                continue
            for one, two in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
                assert one.shape == two.shape and one.dtype == two.dtype, case.name
                rough = 8 * torch.finfo(torch.bfloat16).eps if two.dtype in {torch.float16, torch.bfloat16} else 1e-3
                torch.testing.assert_close(one.detach(), two, rtol=rough, atol=rough / 100, equal_nan=True, msg=case.name)
            compared += 1
    assert compared > 40


REFUSED_CASES = {
    "argmax", "argmin", "batchnorm", "col2im", "cumsum", "dropout", "gathernd", "identity", "if", "layer", "maxpool", "nonzero",
    "reduce", "resize",
    "scatter", "scatternd", "training", "affine", "attention", "blackmanwindow", "hammingwindow", "hannwindow", "center",
}  # fmt: skip
"""First words of the names of cases of which some are refused: a way to use the operator that is not read."""


@pytest.mark.hunt
def test_nodes_that_are_refused_are_few_and_known(tmp_path: Path) -> None:
    refused = []
    for case in node_cases():
        for program, given, _ in decided(case):
            (tmp_path / "m.onnx").write_bytes(program.SerializeToString())
            try:
                read_onnx(tmp_path / "m.onnx", check=False)(*given)
            except pathlift.PathliftError:
                refused.append(case.name)
    odd = [name for name in refused if name.split("_")[1] not in REFUSED_CASES]
    declared = [name for name in odd if "uint" not in name and "castlike" not in name and "opt" not in name]
    assert sorted(declared) == [] and len(refused) < 0.2 * len(node_cases())


def stored(group: str) -> list[Path]:
    return sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / group).glob("*/model.onnx"))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("group", ["pytorch-converted", "pytorch-operator"])
def test_operators_of_old_files_once_converted(group: str, tmp_path: Path) -> None:
    from onnx import version_converter

    compared = 0
    for file in stored(group):
        try:
            program = version_converter.convert_version(onnx.load(file), 13)
        except Exception:  # the converter does not know all old operators
            continue
        onnx.save(program, tmp_path / "m.onnx")
        try:
            module = read_onnx(tmp_path / "m.onnx", check=False)
            data = file.parent / "test_data_set_0"
            given, expected = (
                [tensor_of(numpy_helper.to_array(onnx.load_tensor(data / f"{kind}_{place}.pb"))) for place in range(count)]
                for kind, count in (("input", len(module.inputs)), ("output", len(program.graph.output)))
            )
            found = module(*given)
        except pathlift.PathliftError:
            continue
        for one, two in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
            torch.testing.assert_close(one.detach(), two, rtol=1e-3, atol=1e-5, equal_nan=True, msg=str(file))
        compared += 1
    assert compared > 15


ROUNDING = {"light_resnet50": 14, "light_vgg19": 2}
"""All their filters are equal numbers, so all classes have one value, of size 10^18 and more: which of them the softmax takes
is a matter of rounding, and no graph can be compared with that. They are refused, unless all roundings happen to agree (on one
thread those of the first do); what stands before has so many parameters."""

LIGHT = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("*.onnx"))


def refusal(module: nn.Module, shape: tuple[int, ...]) -> pathlift.UnsupportedModelError | None:
    try:
        pathlift.capture(module, shape)
    except pathlift.UnsupportedModelError as error:
        return error
    return None


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.skipif(not runtime, reason="onnxruntime is what it is compared with")
@pytest.mark.parametrize("file", LIGHT, ids=lambda file: file.stem)
def test_the_models_of_the_onnx_package(file: Path) -> None:
    module = read_onnx(file)  # compares the outputs
    shape = default_shape(str(file))
    kinds = {one.kind for one in module.program.nodes}
    if file.stem in ROUNDING:
        logits = module.program.nodes[-1].inputs[0]
        refused = refusal(module, shape)
        assert refused is None or re.search(r"nothing but rounding.*until=", str(refused), re.DOTALL)
        assert pathlift.path_norm(pathlift.capture(module, shape, until=logits)).log10 > 18
        assert len(pathlift.capture(module, shape, until=logits).parameters) == ROUNDING[file.stem]
    elif "LRN" in kinds:
        with pytest.raises(pathlift.UnsupportedModelError, match=r"local_response|pow|avg_pool|div"):
            pathlift.capture(module, shape)
    else:
        assert pathlift.path_norm(module, shape).value > 0


# ---- PyTorch's two exporters


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.down = nn.Conv2d(4, 6, 3, stride=2)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        x = torch.relu(self.two(x) + x)
        x = F.max_pool2d(torch.relu(self.down(x)), 2, ceil_mode=True)
        return self.out(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class UpAgain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)
        self.slope = nn.PReLU(4)
        self.last = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.slope(self.up(F.relu6(self.down(x))))
        y = torch.cat([y, F.leaky_relu(F.pad(x, (0, 0, 0, 1)), 0.2)], 1)
        return F.interpolate(self.last(F.avg_pool2d(y, 3, 2, 1)), scale_factor=2, mode="nearest")


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1, dilation=1)
        self.two = nn.Conv2d(4, 4, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left, torch.relu(self.two(right))], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return F.interpolate(x, size=(10, 14), mode="bilinear", align_corners=False).mean((2, 3))


def drawn(model: nn.Module) -> nn.Module:
    """Give a model weights and statistics that all show."""
    torch.manual_seed(3)
    for own in model.modules():
        if isinstance(own, nn.BatchNorm2d):
            for tensor, low in ((own.weight, 0.5), (own.bias, -0.5), (own.running_mean, -0.5), (own.running_var, 0.5)):
                assert tensor is not None
                nn.init.uniform_(tensor, low, low + 1)
    return model.eval()


def exported(model: nn.Module, path: Path, *, new: bool, opset: int | None = None, dynamic: bool = False) -> Path:
    """Export a model by one of PyTorch's exporters."""
    x = torch.randn(2 if dynamic else 1, 3, 9, 12)
    options: dict[str, Any] = {} if opset is None else {"opset_version": opset}
    if dynamic:
        options |= {"dynamic_shapes": ({0: "batch"},)} if new else {"dynamic_axes": {"x": {0: "batch"}}, "input_names": ["x"]}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            torch.onnx.export(model, (x,), path, dynamo=new, verbose=False, **options)
        finally:
            logging.disable(logging.NOTSET)
    return path


@needs_script
@pytest.mark.one_in(15)
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("kind", [Residual, UpAgain, Shuffled])
@pytest.mark.parametrize("way", ["new", "new, any batch", "old", "old, any batch", "old, opset 9"])
def test_what_pytorch_exports_comes_back(kind: type[nn.Module], way: str, tmp_path: Path) -> None:
    model = drawn(kind())
    if kind is Shuffled and way == "old, opset 9":
        pytest.skip("that exporter writes bilinear resizing as another one")
    new, dynamic = way.startswith("new"), way.endswith("batch")
    path = exported(model, tmp_path / "m.onnx", new=new, dynamic=dynamic, opset=9 if way.endswith("9") else None)
    module = reads(path, lambda x: model(x).detach(), batch=3 if dynamic or kind is not Shuffled else 1)
    assert default_shape(str(path)) == (3, 9, 12)
    found, expected = (pathlift.path_norm(own, (3, 9, 12)).value for own in (module, model))
    assert found == pytest.approx(expected, rel=1e-5)
    assert sum(own.numel() for own in module.parameters()) <= sum(own.numel() for own in model.parameters())


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split": lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1),
    "one piece": lambda x: x.split(4, 1)[0],
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0),
    "clamp": lambda x: x.clamp(max=0.75),
    "clamp_min": lambda x: x.clamp_min(-0.25),
    "diagonal": lambda x: x + torch.diagonal(x, 1, 2, 3).sum(-1)[..., None, None],
    "fold": lambda x: F.fold(F.unfold(x, 2, padding=1), (3, 4), 2, padding=1),
}


@needs_script
@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", WRITTEN)
def test_what_save_writes_comes_back(name: str, tmp_path: Path) -> None:
    between = Fn(WRITTEN[name])
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), between, nn.Conv2d(4, 3, 1)).eval()
    pathlift.save(model, tmp_path / "m.onnx", (2, 3, 4))
    module = read_onnx(tmp_path / "m.onnx")
    x = torch.randn(2, 2, 3, 4)
    torch.testing.assert_close(module(x), model(x))
    assert pathlift.path_norm(module, (2, 3, 4)).value == pytest.approx(pathlift.path_norm(model, (2, 3, 4)).value, rel=1e-5)
    assert sum(own.numel() for own in module.parameters()) == sum(own.numel() for own in model.parameters())


@pytest.mark.one_in(2, first=1)
@needs_script
@pytest.mark.parametrize("new", [True, False])
def test_weights_keep_the_names_of_the_model(new: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(280, 2)).eval()
    module = read_onnx(exported(model, tmp_path / "m.onnx", new=new))
    assert {name: tuple(own.shape) for name, own in module.state_dict().items()} == {
        name: tuple(own.shape) for name, own in model.state_dict().items()
    }
    scores, expected = (pathlift.path_magnitude(own, (3, 9, 12)) for own in (module, model))
    for name, score in expected.items():
        torch.testing.assert_close(scores[name], score, rtol=1e-4, atol=1e-6)


# ---- habits of exporters


W, V, B = array(4, 3, 3, 3), array(4, 2, seed=1), array(4, seed=2)
CONV = torch.from_numpy(W)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["Constant", "Identity", "Transpose", "Cast", "Reshape", "DequantizeLinear", "both"])
def test_a_weight_is_a_parameter_however_it_comes(kind: str, tmp_path: Path) -> None:
    weight, tensors, before = V, {}, []
    if kind == "Constant":
        before = [node("Constant", [], ["w"], value=numpy_helper.from_array(V, "v"))]
    elif kind == "Identity":
        before, tensors = [node("Identity", ["v"], ["u"]), node("Identity", ["u"], ["w"])], {"v": V}
    elif kind == "Transpose":
        before, tensors = [node("Transpose", ["v"], ["w"], perm=[1, 0])], {"v": np.ascontiguousarray(V.T)}
    elif kind == "Cast":
        before, tensors = [node("Cast", ["v"], ["w"], to=1)], {"v": V.astype(np.float16)}
        weight = V.astype(np.float16).astype(np.float32)
    elif kind == "Reshape":
        before, tensors = [node("Reshape", ["v", "s"], ["w"])], {"v": V.reshape(8), "s": ints(4, 2)}
    else:
        scale, zero = np.float32(0.05), np.int8(3)
        numbers = np.clip(np.round(V / scale) + zero, -128, 127).astype(np.int8)
        weight, tensors = ((numbers.astype(np.float32) - zero) * scale).astype(np.float32), {"scale": scale, "zero": zero}
        before = [node("DequantizeLinear", ["q", "scale", "zero"], ["w"])]
        if kind == "both":
            before.insert(0, node("QuantizeLinear", ["v", "scale", "zero"], ["q"]))
            tensors["v"] = V
        else:
            tensors["q"] = numbers
    nodes = [*before, node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    module = reads(write(tmp_path / "m.onnx", nodes, tensors, ["n", 4], 17), lambda x: torch.relu(x @ torch.from_numpy(weight)))
    assert pathlift.path_norm(module, (4,)).value == pytest.approx(float(np.abs(weight).sum()), rel=1e-6)
    if kind != "DequantizeLinear":
        name = "w" if kind == "Constant" else "v"
        assert [own for own, _ in module.named_parameters()] == [name]
        assert list(pathlift.path_magnitude(module, (4,))) == ["h.weight" if kind == "both" else name]


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID", "uneven"])
def test_padding_of_a_convolution(auto: str, tmp_path: Path) -> None:
    def right(x: Tensor) -> Tensor:
        sides = {"SAME_UPPER": (0, 1, 0, 1), "SAME_LOWER": (1, 0, 1, 0), "VALID": (0, 0, 0, 0), "uneven": (2, 0, 0, 1)}[auto]
        return F.conv2d(F.pad(x, sides), CONV, stride=2)

    options = {"pads": [0, 2, 1, 0]} if auto == "uneven" else {"auto_pad": auto}
    conv = node("Conv", ["x", "w"], ["y"], strides=[2, 2], **options)
    module = reads(write(tmp_path / "m.onnx", [conv], {"w": W}, [1, 3, 6, 6]), right)
    expected = (
        F.conv2d(F.pad(torch.ones(1, 3, 6, 6), (0, 1, 0, 1)), CONV.abs(), stride=2).sum() if auto == "SAME_UPPER" else None
    )
    if expected is not None:
        assert pathlift.path_norm(module, (3, 6, 6)).value == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1), (1, 4, 1, 1), (5,), (4, 5, 5)])
def test_slopes_of_any_shape_are_those_of_two_neurons_each(shape: tuple[int, ...], tmp_path: Path) -> None:
    slope = torch.from_numpy(np.asarray(3 * array(*shape, seed=5)))
    path = write(tmp_path / "m.onnx", [node("Conv", ["x", "w"], ["c"]), node("PRelu", ["c", "a"], ["y"])],
                 {"w": W, "a": slope.numpy()}, [1, 3, 7, 7])  # fmt: skip

    def right(x: Tensor) -> Tensor:
        made = F.conv2d(x, CONV)
        return torch.where(made > 0, made, made * slope)

    counted = F.conv2d(torch.ones(1, 3, 7, 7), CONV.abs()) * (1 + slope.abs())
    assert pathlift.path_norm(reads(path, right), (3, 7, 7)).value == pytest.approx(float(counted.sum()), rel=1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("options", [
    {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"pads": [0, 1, 1, 0]}, {"ceil_mode": 1}, {"pads": [1, 1, 1, 1]},
    {"ceil_mode": 1, "pads": [0, 0, 1, 1]},
])  # fmt: skip
def test_pooling_agrees_with_a_runtime(pool: str, options: dict[str, Any], tmp_path: Path) -> None:
    several = [{}, {"count_include_pad": 1}] if pool == "AveragePool" else [{}]
    for more in several:
        made = node(pool, ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], **options, **more)
        path = write(tmp_path / "m.onnx", [made], {}, [1, 2, 6, 7], 19)
        run = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"]).run
        reads(path, lambda x, run=run: torch.cat([torch.from_numpy(run(None, {"x": one[None].numpy()})[0]) for one in x]))
        assert pathlift.path_norm(read_onnx(path), (2, 6, 7)).value > 0


def evaluated(path: Path) -> Callable[[Tensor], Tensor]:
    """Return what runs a program by onnx's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    run = ReferenceEvaluator(str(path)).run
    return lambda x: torch.from_numpy(np.asarray(run(None, {"x": x.numpy()})[0]))


REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceSum", "ReduceMean", "ReduceMax")


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("empty", [False, True])
def test_a_reduction_over_nothing_is_what_it_does_to_single_numbers(kind: str, empty: bool, tmp_path: Path) -> None:
    made = node(kind, ["x", "axes"] if empty else ["x"], ["y"], noop_with_empty_axes=1)
    path = write(tmp_path / "m.onnx", [made], {"axes": ints()} if empty else {}, ["n", 4], 18)
    reads(path, evaluated(path))


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
@pytest.mark.parametrize("sizes", [(3,), (3, 4), (3, 4, 5), (3, 4, 3, 5)])
def test_padding_along_one_axis_of_several(mode: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    made = node("Pad", ["x", "pads", "", "axes"], ["y"], mode=mode)
    path = write(tmp_path / "m.onnx", [made], {"pads": ints(1, 2), "axes": ints(-1)}, ["n", *sizes], 19)
    reads(path, lambda x: torch.from_numpy(np.pad(x.numpy(), [(0, 0)] * len(sizes) + [(1, 2)], mode=mode)))


@pytest.mark.parametrize("outputs", [["y", "m", "v"], ["y", "m", "v", "sm", "sv"]])
def test_a_batch_norm_that_returns_statistics_takes_them_from_the_batch(outputs: list[str], tmp_path: Path) -> None:
    made = node("BatchNormalization", ["x", "s", "b", "mean", "var"], outputs)
    tensors = {"s": array(3), "b": array(3), "mean": array(3), "var": np.abs(array(3))}
    with pytest.raises(pathlift.UnsupportedModelError, match="from the batch"):
        read_onnx(write(tmp_path / "m.onnx", [made], tensors, ["n", 3, 2], 9), check=False)(torch.ones(2, 3, 2))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("kind", ["INT8", "UINT8", "INT4", "UINT4"])
@pytest.mark.parametrize("zeros", [False, True])
def test_weights_of_few_bits_and_numbers_for_blocks_of_them(axis: int, kind: str, zeros: bool, tmp_path: Path) -> None:
    low, high = (0, 15) if kind.startswith("U") else (-8, 7)
    draws, shape = np.random.default_rng(3), (2, 6) if axis == 0 else (4, 3)
    of = getattr(onnx.TensorProto, kind)
    numbers, zero = draws.integers(low, high, (4, 6)), draws.integers(low, high, shape)
    scale = np.abs(array(*shape))
    names = ["q", "scale", "zero"] if zeros else ["q", "scale"]
    nodes = [
        node("DequantizeLinear", names, ["w"], axis=axis, block_size=2), node("MatMul", ["x", "w"], ["h"]),
        node("Relu", ["h"], ["y"]),
    ]  # fmt: skip
    path = write(tmp_path / "m.onnx", nodes, {"scale": scale}, ["n", 4], 21)
    program = onnx.load(path)
    program.graph.initializer.append(helper.make_tensor("q", of, (4, 6), numbers.ravel().tolist()))
    if zeros:
        program.graph.initializer.append(helper.make_tensor("zero", of, shape, zero.ravel().tolist()))
    program.ir_version = 10
    onnx.save(program, path)
    blocks = [np.repeat(each, 2, axis).astype(np.float32) for each in (scale, zero if zeros else 0 * zero)]
    weight = torch.from_numpy(((numbers - blocks[1]) * blocks[0]).astype(np.float32))
    module = reads(path, lambda x: torch.relu(x @ weight))
    assert pathlift.path_norm(module, (4,)).value == pytest.approx(float(weight.abs().sum()), rel=1e-6)
    pathlift.save(module, tmp_path / "again.onnx")
    reads(tmp_path / "again.onnx", lambda x: torch.relu(x @ weight))


def test_a_branch_with_a_constant_condition_is_the_chosen_one(tmp_path: Path) -> None:
    def branch(sign: str) -> Any:
        value = helper.make_tensor_value_info(sign, onnx.TensorProto.FLOAT, None)
        return helper.make_graph([node("Neg" if sign == "minus" else "Identity", ["h"], [sign])], sign, [], [value])

    nodes = [
        node("MatMul", ["x", "w"], ["h"]), node("Shape", ["h"], ["s"]), node("Gather", ["s", "one"], ["size"], axis=0),
        node("Equal", ["size", "two"], ["c"]),
        node("If", ["c"], ["y"], then_branch=branch("minus"), else_branch=branch("plus")),
    ]  # fmt: skip
    tensors = {"w": V, "one": np.int64(1)}
    for two, sign in ((2, -1), (3, 1)):
        path = write(tmp_path / "m.onnx", nodes, {**tensors, "two": np.int64(two)}, ["n", 4])
        module = reads(path, lambda x, sign=sign: sign * x @ torch.from_numpy(V))  # type: ignore[misc]
        assert pathlift.path_norm(module, (4,)).value == pytest.approx(float(np.abs(V).sum()), rel=1e-6)
    nodes[1:4] = [node("ReduceSum", ["h"], ["t"], keepdims=0), node("Greater", ["t", "zero"], ["c"])]
    module = read_onnx(write(tmp_path / "m.onnx", nodes, {"w": V, "zero": np.float32(0)}, ["n", 4]))
    report = pathlift.check_support(module, (4,))
    assert [problem.op for problem in report.problems] == ["aten.gt.Tensor"]  # what follows from it is no problem of its own
    with pytest.raises(pathlift.UnsupportedModelError, match="If"):
        module(torch.ones(1, 4))


def test_images_with_channels_last_as_keras_writes_them(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), node("Conv", ["t", "w"], ["c"], auto_pad="SAME_UPPER"),
        node("Transpose", ["c"], ["u"], perm=[0, 2, 3, 1]), node("Add", ["u", "b"], ["a"]), node("Relu", ["a"], ["r"]),
        node("ReduceMean", ["r"], ["m"], axes=[1, 2], keepdims=0), node("MatMul", ["m", "v"], ["l"]),
        node("Softmax", ["l"], ["y"]),
    ]  # fmt: skip
    path = write(tmp_path / "m.onnx", nodes, {"w": W, "b": B, "v": V}, ["unk", 5, 5, 3], 13)

    def right(x: Tensor) -> Tensor:
        images = torch.relu(F.conv2d(x.permute(0, 3, 1, 2), CONV, torch.from_numpy(B), padding=1))
        return torch.softmax(images.mean((2, 3)) @ torch.from_numpy(V), -1)

    module = reads(path, right)
    network = pathlift.capture(module, default_shape(str(path)))
    assert network.left_off == ("softmax",) and default_shape(str(path)) == (5, 5, 3)


def test_a_flattening_of_computed_sizes_keeps_the_batch_open(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]), node("Shape", ["c"], ["s"]), node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "axes"], ["n1"]), node("Concat", ["n1", "rest"], ["sizes"], axis=0),
        node("Reshape", ["c", "sizes"], ["y"]),
    ]  # fmt: skip
    tensors = {"w": W, "zero": np.int64(0), "axes": ints(0), "rest": ints(-1)}
    for shape in (["n", 3, 4, 4], [1, 3, 4, 4]):
        module = reads(write(tmp_path / "m.onnx", nodes, tensors, shape), lambda x: F.conv2d(x, CONV).flatten(1), batch=5)
        assert [name for name, _ in module.named_parameters()] == ["w"] and not list(module.buffers())


def test_a_fixed_batch_is_the_batch_where_that_is_sound(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Reshape", ["c", "s"], ["y"])]
    for batch in (1, 4):
        path = write(tmp_path / "m.onnx", nodes, {"w": W, "s": ints(batch, 16)}, [batch, 3, 4, 4])
        module = reads(path, lambda x: F.conv2d(x, CONV).flatten(1), batch=3)
        assert pathlift.path_norm(module, (3, 4, 4)).value > 0
    nodes = [node("Transpose", ["x"], ["t"], perm=[1, 0]), node("MatMul", ["w", "t"], ["m"]), node("Transpose", ["m"], ["u"])]
    mixed = [*nodes, node("Softmax", ["u"], ["p"], axis=0), node("Mul", ["p", "u"], ["y"])]
    path = write(tmp_path / "m.onnx", mixed, {"w": np.ascontiguousarray(V.T)}, [4, 4])
    assert read_onnx(path)(torch.ones(4, 4)).shape == (4, 2)
    with pytest.raises(pathlift.InputError, match="4 samples"):
        pathlift.capture(read_onnx(path), (4,))


@pytest.mark.parametrize("opset", [9, 11, 13, 18, 22, 25])
def test_what_became_an_input_was_an_attribute(opset: int, tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {"w": W}

    def made(kind: str, value: str, result: str, since: int, **settings: Any) -> Any:
        if opset < since:
            return node(kind, [value], [result], **settings)
        tensors.update({f"{result}_{key}": np.array(own) for key, own in settings.items()})
        return node(kind, [value, *(f"{result}_{key}" for key in settings)], [result])

    nodes = [
        node("Conv", ["x", "w"], ["c"]), made("Pad", "c", "p", 11, pads=[0, 0, 1, 0, 0, 0, 0, 1]),
        made("Clip", "p", "k", 11, min=np.float32(0), max=np.float32(6)),
        made("Slice", "k", "s", 10, starts=[1], ends=[9], axes=[2]), made("Unsqueeze", "s", "u", 13, axes=[1]),
        made("Squeeze", "u", "q", 13, axes=[1]), node("ReduceMean", ["q", "axes"], ["y"], keepdims=0) if opset >= 18
        else node("ReduceMean", ["q"], ["y"], axes=[2, 3], keepdims=0),
    ]  # fmt: skip
    if opset >= 18:
        tensors["axes"] = ints(2, 3)
    path = write(tmp_path / "m.onnx", nodes, tensors, ["n", 3, 5, 5], opset)
    reads(path, lambda x: F.pad(F.conv2d(x, CONV), (0, 1, 1, 0)).clamp(0, 6)[:, :, 1:].mean((2, 3)))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["w", "fc.weight", "/fc/w", "a.", ".a", "a..b", "training", "forward", "x\"y", "a\\b", "é",
                                  "50%", "a b", "_modules", "kind", "d." * 40 + "e", "a\nb"])  # fmt: skip
def test_names_come_back_from_the_state_dict(name: str, tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", name], ["h"], name=name),
        node("Add", ["h", f"{name}.bias"], ["r"]),
        node("Relu", ["r"], ["y"]),
    ]
    tensors = {name: V, f"{name}.bias": array(2)}
    module = read_onnx(write(tmp_path / "m.onnx", nodes, tensors, ["n", 4]))
    assert {unquote(own) for own in module.state_dict()} == {name, f"{name}.bias"}
    assert pathlift.path_norm(module, (4,)).value == pytest.approx(
        float(np.abs(V).sum() + np.abs(tensors[f"{name}.bias"]).sum())
    )
    assert all(set("\"\\\n'").isdisjoint(own) for own, _ in (*module.named_modules(), *module.named_parameters()))


# ---- what is refused, and what stands before it


def test_unknown_operators_are_named_together(tmp_path: Path) -> None:
    nodes = [
        node("Magic", ["x"], ["a"], name="one"),
        node("Relu", ["a"], ["b"]),
        node("Fused", ["b"], ["y"], name="two", domain="own"),
    ]
    with pytest.raises(pathlift.InputError, match=r"Magic.*one.*Fused.*own.*two"):
        load_model(str(write(tmp_path / "m.onnx", nodes, {}, ["n", 4])))


def test_what_stands_before_a_decoder_can_be_read(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="/head/MatMul"), node("Relu", ["h"], ["/head/Relu_output_0"], name="/head/Relu"),
        node("Unsqueeze", ["/head/Relu_output_0", "axes"], ["u"]),
        node("LSTM", ["u", "a", "b"], ["l"], name="lstm", hidden_size=3),
        node("NonZero", ["l"], ["z"], name="zeros"), node("Cast", ["z"], ["y"], to=1, name="cast"),
    ]  # fmt: skip
    tensors = {"w": V, "axes": ints(0), "a": array(1, 12, 2), "b": array(1, 12, 3)}
    module = read_onnx(write(tmp_path / "m.onnx", nodes, tensors, ["n", 4]))
    report = pathlift.check_support(module, (4,))
    assert [(problem.module, problem.op) for problem in report.problems] == [
        ("lstm", "onnx.LSTM"), ("zeros", "onnx.NonZero"),
    ]  # fmt: skip
    assert "gates" in report.problems[0].reason and "until=" in report.problems[0].advice
    for until in ("/head/Relu", "/head/Relu_output_0"):
        network = pathlift.capture(module, (4,), until=until)
        assert pathlift.path_norm(network).value == pytest.approx(float(np.abs(V).sum()), rel=1e-6)
        assert list(network.parameters) == ["w"]
    with pytest.raises(pathlift.UnsupportedModelError, match="lstm"):
        module(torch.ones(1, 4))


@pytest.mark.parametrize("kind", ["Expand", "Tile", "ConstantOfShape", "Range"])
def test_a_small_file_does_not_unfold(kind: str, tmp_path: Path) -> None:
    many = 1 << 40
    nodes = {
        "Expand": [node("Expand", ["c", "s"], ["b"])],
        "Tile": [node("Tile", ["c", "s"], ["b"])],
        "ConstantOfShape": [node("ConstantOfShape", ["s"], ["b"])],
        "Range": [node("Range", ["zero", "many", "one"], ["b"])],
    }[kind]
    tensors = {
        "c": np.ones(1, np.float32),
        "s": ints(many),
        "zero": np.float32(0),
        "many": np.float32(many),
        "one": np.float32(1),
    }
    nodes = [*nodes, node("ReduceSum", ["b"], ["t"], keepdims=0), node("Add", ["x", "t"], ["y"])]
    module = read_onnx(write(tmp_path / "m.onnx", nodes, tensors, ["n", 4], 13), check=False)
    with pytest.raises(pathlift.InputError, match=kind):
        module(torch.ones(1, 4))


def test_a_reading_that_disagrees_with_a_runtime_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("LeakyRelu", ["h"], ["y"], alpha=0.2)]
    path = write(tmp_path / "m.onnx", nodes, {"w": V}, ["n", 4])
    read_onnx(path, check=True)
    monkeypatch.setitem(OPERATORS, "LeakyRelu", lambda node, x: F.leaky_relu(x, 0.21))
    with pytest.raises(pathlift.InputError, match="not what a runtime makes of it"):
        read_onnx(path, check=True)
    read_onnx(path, check=False)


def test_numbers_that_are_not_finite_agree_where_they_are_the_same(tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    one = torch.tensor([1.0, inf, -inf, nan])
    assert difference(one, one) == 0
    assert difference(one, torch.tensor([1.5, inf, -inf, nan])) == pytest.approx(1 / 3)
    for place, value in ((1, -inf), (1, nan), (1, 1e30), (2, inf), (2, nan), (3, inf), (3, 0.0)):
        other = one.clone()
        other[place] = value
        assert difference(one, other) == difference(other, one) == inf
    assert difference(torch.ones(2), torch.ones(2, 1)) == inf and difference(torch.zeros(2), torch.zeros(2)) == 0
    nodes = [node("Div", ["x", "zero"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"zero": np.zeros(4, np.float32)}, ["n", 4])
    read_onnx(path, check=True)


def test_an_infinity_of_the_other_sign_is_another_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.onnx", [node("Div", ["x", "zero"], ["y"])], {"zero": np.zeros(4, np.float32)}, ["n", 4])
    monkeypatch.setitem(OPERATORS, "Div", lambda node, x, y: -x / y)
    with pytest.raises(pathlift.InputError, match="not what a runtime makes of it"):
        read_onnx(path, check=True)


def test_a_model_in_half_precision_that_is_read_wrongly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("Cast", ["x"], ["c"], to=10), node("Neg", ["c"], ["h"]), node("Cast", ["h"], ["y"], to=1)]
    path = write(tmp_path / "m.onnx", nodes, {}, ["n", 64])
    read_onnx(path, check=True)
    monkeypatch.setitem(OPERATORS, "Neg", lambda node, x: -0.7 * x)
    with pytest.raises(pathlift.InputError, match="not what a runtime makes of it"):
        read_onnx(path, check=True)


def test_a_model_in_half_precision_is_compared_with_its_own_rounding(tmp_path: Path) -> None:
    nodes = [node("Cast", ["x"], ["c"], to=10), node("MatMul", ["c", "w"], ["h"]), node("Cast", ["h"], ["y"], to=1)]
    path = write(tmp_path / "m.onnx", nodes, {"w": array(64, 8).astype(np.float16)}, ["n", 64])
    assert pathlift.path_norm(read_onnx(path, check=True), (64,)).value > 0


# ---- back into a file


def test_a_pruned_model_goes_back_as_the_same_graph(tmp_path: Path) -> None:
    nodes = [
        node("Constant", [], ["v"], name="made", value=numpy_helper.from_array(V, "inner")), node("Transpose", ["u"], ["w"]),
        node("Conv", ["x", "c"], ["h"], name="/conv"), node("Relu", ["h"], ["r"]), node("GlobalAveragePool", ["r"], ["g"]),
        node("Flatten", ["g"], ["f"]), node("MatMul", ["f", "v"], ["m"]), node("Gemm", ["m", "w"], ["y"]),
    ]  # fmt: skip
    path = write(tmp_path / "m.onnx", nodes, {"c": W, "u": array(3, 2)}, ["n", 3, 5, 5])
    before = onnx.load(path)
    before.metadata_props.add(key="author", value="someone")
    onnx.save(before, path)
    module = read_onnx(path)
    pathlift.save(module, tmp_path / "same.onnx")
    assert onnx.load(tmp_path / "same.onnx") == before
    with torch.no_grad():
        for tensor in module.parameters():
            tensor[tensor.abs() < tensor.abs().median()] = 0
    pathlift.save(module, tmp_path / "pruned.onnx")
    after, x = read_onnx(tmp_path / "pruned.onnx", check=True), inputs(module)
    assert torch.equal(after(x), module(x)) and not torch.equal(after(x), read_onnx(path)(x))
    assert after.state_dict().keys() == module.state_dict().keys() == {"c", "u", "v"}
    for name, own in module.state_dict().items():
        assert torch.equal(after.state_dict()[name], own) and 0.3 * own.numel() < int((own == 0).sum()) < own.numel()
    written = onnx.load(tmp_path / "pruned.onnx")
    assert written.metadata_props == before.metadata_props and written.opset_import == before.opset_import
    assert [own.name for own in written.graph.initializer] == ["c", "u"] and written.graph.node[0].attribute[
        0
    ].t.name == "inner"
    with pytest.raises(pathlift.InputError, match="exists"):
        pathlift.save(module, path)


def test_two_branches_with_weights_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    def branch(name: str, scale: float) -> Any:
        value = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        weight = numpy_helper.from_array(np.full((4, 2), scale, np.float32), "same")
        return helper.make_graph([node("MatMul", ["x", "same"], [name])], name, [], [value], [weight])

    nodes = [node("If", ["c"], ["y"], then_branch=branch("one", 1), else_branch=branch("two", 2))]
    path = write(tmp_path / "m.onnx", nodes, {"c": np.array(True)}, ["n", 4])
    with pytest.raises(pathlift.InputError, match="same"):
        read_onnx(path)


# ---- programs of other kinds


def test_a_function_of_the_file_is_what_it_says(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    leaky = node("LeakyRelu", ["a"], ["b"], name="leaky")
    inner = helper.make_function("own", "Leaky", ["a"], ["b"], [leaky], opsets, ["alpha"])
    inner.node[0].attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT))
    body = [
        node("MatMul", ["x", "w"], ["h"], name="matmul"),
        node("Leaky", ["h"], ["y"], domain="own", alpha=0.25, name="activation"),
    ]
    layer = helper.make_function("own", "Layer", ["x", "w"], ["y"], body, opsets)
    nodes = [node("Layer", ["x", "w"], ["y"], domain="own", name="layer")]
    path = write(tmp_path / "m.onnx", nodes, {"w": V}, ["n", 4])
    program = onnx.load(path)
    program.functions.extend([inner, layer])
    program.opset_import.append(opsets[1])
    onnx.save(program, path)
    module = reads(path, lambda x: F.leaky_relu(x @ torch.from_numpy(V), 0.25))
    assert list(module.state_dict()) == ["w"] and pathlift.path_norm(module, (4,)).value > 0
    pathlift.save(module, tmp_path / "again.onnx")
    assert onnx.load(tmp_path / "again.onnx") == program


def with_function(path: Path, function: Any, nodes: Sequence[Any], tensors: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """Write a program with a function of the domain ``own``."""
    program = onnx.load(write(path, nodes, tensors, ["n", 4]))
    program.functions.append(function)
    program.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(program, path)
    return path


def test_weights_within_a_function_belong_to_each_call_of_it(tmp_path: Path) -> None:
    square = array(4, 4)
    body = [node("Constant", [], ["w"], value=numpy_helper.from_array(square, "w")), node("MatMul", ["x", "w"], ["m"])]
    function = helper.make_function(
        "own", "Layer", ["x"], ["y"], [*body, node("Relu", ["m"], ["y"])], [helper.make_opsetid("", 17)]
    )
    nodes = [node("Layer", ["x"], ["h"], domain="own"), node("Layer", ["h"], ["y"], domain="own")]
    weight = torch.from_numpy(square)
    module = reads(
        with_function(tmp_path / "m.onnx", function, nodes, {}), lambda x: torch.relu(torch.relu(x @ weight) @ weight)
    )
    with torch.no_grad():
        list(module.parameters())[1].mul_(0)
    pathlift.save(module, tmp_path / "again.onnx")
    again = read_onnx(tmp_path / "again.onnx", check=True)
    assert not again(torch.ones(1, 4)).any() and len(list(again.parameters())) == 2


def test_a_function_in_another_version_of_the_standard(tmp_path: Path) -> None:
    total = node("ReduceSum", ["x"], ["y"], axes=[1])
    function = helper.make_function("own", "Total", ["x"], ["y"], [total], [helper.make_opsetid("", 11)])
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Total", ["h"], ["y"], domain="own")]
    path = with_function(tmp_path / "m.onnx", function, nodes, {"w": V})
    reads(path, lambda x: (x @ torch.from_numpy(V)).sum(1, keepdim=True))
    reduced = node("Squeeze", ["x", "axes"], ["y"])
    function = helper.make_function("own", "Total", ["x", "axes"], ["y"], [reduced], [helper.make_opsetid("", 13)])
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Total", ["h", "axes"], ["y"], domain="own")]
    path = with_function(tmp_path / "m.onnx", function, nodes, {"w": array(4, 1), "axes": ints(1)})
    reads(path, lambda x: (x @ torch.from_numpy(array(4, 1)))[:, 0])


@pytest.mark.parametrize("opset", [6, 7, 8])
def test_an_old_version_is_converted(opset: int, tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Relu", ["c"], ["r"]), node("Add", ["r", "r"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"w": W}, [1, 3, 5, 5], opset)
    module = reads(path, lambda x: 2 * torch.relu(F.conv2d(x, CONV)))
    assert list(module.state_dict()) == ["w"]
    pathlift.save(module, tmp_path / "again.onnx")
    assert onnx.load(tmp_path / "again.onnx").opset_import[0].version == opset
    path = write(tmp_path / "m.onnx", nodes, {"w": W}, ["n", 3, 5, 5], opset)
    if opset < 7:
        with pytest.raises(pathlift.InputError, match=f"convert it from version {opset}"):
            read_onnx(path)


@pytest.mark.parametrize("labels", [True, False])
def test_a_classifier_of_scikit_learn(labels: bool, tmp_path: Path) -> None:
    ml = "ai.onnx.ml"
    nodes = [
        node("Scaler", ["x"], ["s"], domain=ml, offset=[0.5, 0.0, -1.0, 2.0], scale=[2.0, 1.0, 0.5, -1.0]),
        node("Cast", ["s"], ["t"], to=1), node("MatMul", ["t", "w"], ["m"]), node("Add", ["m", "b"], ["logits"]),
        node("Softmax", ["logits"], ["y"]),
    ]  # fmt: skip
    tensors, outputs = {"w": V, "b": array(1, 2)}, ["y"]
    if labels:
        nodes += [
            node("ArgMax", ["y"], ["best"], axis=1), node("ArrayFeatureExtractor", ["classes", "best"], ["text"], domain=ml),
            node("ZipMap", ["y"], ["z"], domain=ml, classlabels_int64s=[3, 5]), node("Identity", ["text"], ["label"]),
        ]  # fmt: skip
        tensors, outputs = {**tensors, "classes": np.array([3, 5])}, ["label", "z"]
    path = write(tmp_path / "m.onnx", nodes, tensors, ["n", 4], 15, outputs)
    program = onnx.load(path)
    program.opset_import.append(helper.make_opsetid(ml, 1))
    for value in program.graph.output if labels else ():
        value.ClearField("type")
    onnx.save(program, path)
    module = read_onnx(path, check=None if labels else True)
    x = inputs(module)
    scaled = (x - torch.tensor([0.5, 0, -1, 2])) * torch.tensor([2, 1, 0.5, -1])
    expected = torch.softmax(scaled @ torch.from_numpy(V) + torch.from_numpy(tensors["b"]), -1)
    returned = module(x)
    torch.testing.assert_close(returned[-1] if labels else returned, expected)
    if labels:
        assert returned[0].flatten().tolist() == [[3, 5][index] for index in expected.argmax(1)]
    factor, shift = np.array([2, 1, 0.5, 1]), np.array([1, 0, 0.5, 2])
    counted = (factor + shift) @ np.abs(V) + np.abs(tensors["b"])
    network = pathlift.capture(module, (4,), until="logits")
    assert pathlift.path_norm(network).value == pytest.approx(float(counted.sum()), rel=1e-6)
    if not labels:
        assert pathlift.capture(module, (4,)).left_off == ("softmax",)
    pathlift.save(module, tmp_path / "again.onnx")
    assert onnx.load(tmp_path / "again.onnx") == program


def test_labels_that_are_text_are_problems_of_their_node(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["logits"]), node("ArgMax", ["logits"], ["best"], axis=1),
        node("ArrayFeatureExtractor", ["classes", "best"], ["y"], domain="ai.onnx.ml", name="decoder"),
    ]  # fmt: skip
    path = write(tmp_path / "m.onnx", nodes, {"w": V}, ["n", 4], 15)
    program = onnx.load(path)
    program.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    program.graph.initializer.append(helper.make_tensor("classes", onnx.TensorProto.STRING, [2], [b"cat", b"dog"]))
    program.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.STRING
    onnx.save(program, path)
    module = read_onnx(path, check=True)
    assert [problem.op for problem in pathlift.check_support(module, (4,)).problems] == ["aten.argmax.default"]
    with pytest.raises(pathlift.UnsupportedModelError, match=r"ArrayFeatureExtractor.*decoder.*reads text"):
        module(torch.ones(1, 4))
    network = pathlift.capture(module, (4,), until="logits")
    assert pathlift.path_norm(network).value == pytest.approx(float(np.abs(V).sum()), rel=1e-6)


def test_a_batch_that_is_not_first_is_refused(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    with pytest.raises(pathlift.InputError, match=r"'x'.*dimension 2.*batch first"):
        read_onnx(write(tmp_path / "m.onnx", nodes, {"w": V}, [7, "batch_size", 4]))


def test_an_input_that_is_one_number_has_no_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [node("MatMul", ["x", "w"], ["y"])], {"w": V}, ["n", 4])
    program = onnx.load(path)
    program.graph.input.append(helper.make_tensor_value_info("rate", onnx.TensorProto.INT64, []))
    onnx.save(program, path)
    with pytest.raises(pathlift.InputError, match=r"The input 'rate' of .* is one number for all samples of a batch\. Export"):
        input_shapes(path)


def test_weights_in_lists_of_a_constant_go_back_too(tmp_path: Path) -> None:
    nodes = [node("Constant", [], ["c"], value_floats=[1.0, 2.0, 3.0, 4.0]), node("Mul", ["x", "c"], ["y"])]
    module = read_onnx(write(tmp_path / "m.onnx", nodes, {}, ["n", 4]))
    with torch.no_grad():
        module.get_parameter("c").mul_(2)
    pathlift.save(module, tmp_path / "again.onnx")
    assert read_onnx(tmp_path / "again.onnx").get_parameter("c").tolist() == [2, 4, 6, 8]


def test_a_long_axis_that_is_not_resized_is_no_hindrance(tmp_path: Path) -> None:
    nodes = [node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear")]
    path = write(tmp_path / "m.onnx", nodes, {"sizes": ints(1, 1, 4, 70_000)}, [1, 1, 2, 70_000])
    reads(path, lambda x: F.interpolate(x, size=(4, 70_000), mode="bilinear"), batch=1)


def asymmetric(x: Tensor, times: int) -> Tensor:
    """Stretch the last axis linearly: number i of the result stands at i/times."""
    after = torch.cat([x[..., 1:], x[..., -1:]], -1)
    shares = [torch.lerp(x, after, step / times) for step in range(times)]
    return torch.stack(shares, -1).flatten(-2)


@pytest.mark.parametrize(
    ("mode", "how"), [("linear", "asymmetric"), ("cubic", "asymmetric"), ("linear", "half_pixel_symmetric")]
)
def test_a_linear_resizing_is_read_wherever_its_numbers_stand(mode: str, how: str, tmp_path: Path) -> None:
    nodes = [node("Resize", ["x", "", "scales"], ["y"], mode=mode, coordinate_transformation_mode=how, name="up")]
    path = write(tmp_path / "m.onnx", nodes, {"scales": np.array([1, 1, 1, 2.5], np.float32)}, [1, 2, 4, 5], opset=19)
    if mode == "cubic":
        with pytest.raises(pathlift.UnsupportedModelError, match=r"Resize.*up.*PyTorch has no operator"):
            read_onnx(path)(torch.ones(1, 2, 4, 5))
    else:
        module = read_onnx(path, check=True)  # by the runtime, or the evaluator
        assert module(torch.ones(3, 2, 4, 5)).shape == (3, 2, 4, 12)
        assert pathlift.path_norm(module, (2, 4, 5)).value == pytest.approx(2 * 4 * 12, rel=1e-6)


def test_the_habits_of_paddle(tmp_path: Path) -> None:
    """Constants through Identity, biases through Reshape, sizes with the batch, linear maps by MatMul and Add."""
    tensors = {
        "conv_w": array(4, 3, 3, 3), "conv_b": array(4, seed=1), "fc_w": array(4, 5, seed=2), "fc_b": array(5, seed=3),
        "channels": ints(1, -1, 1, 1), "none": np.zeros(0, np.float32), "zero": ints(0), "one": ints(1), "axis": ints(0),
        "wide": ints(4, 6, 12), "flat": ints(4),
    }  # fmt: skip
    nodes = [node("Constant", [], [name], value=numpy_helper.from_array(value, name)) for name, value in tensors.items()]
    nodes += [
        node("Conv", ["x", "conv_w"], ["conv"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1], dilations=[1, 1]),
        node("Identity", ["channels"], ["auto.cast.0"]),
        node("Reshape", ["conv_b", "auto.cast.0"], ["bias"]),
        node("Add", ["conv", "bias"], ["Add.1"]),
        node("Identity", ["Add.1"], ["add.0"]),
        node("Relu", ["add.0"], ["relu"]),
        node("Shape", ["relu"], ["Shape.1"]),
        node("Slice", ["Shape.1", "zero", "one", "axis"], ["batch"]),
        node("Concat", ["batch", "wide"], ["wanted"], axis=0),
        node("Resize", ["relu", "none", "none", "wanted"], ["up"], mode="linear", coordinate_transformation_mode="asymmetric"),
        node("GlobalAveragePool", ["up"], ["pool"]),
        node("Shape", ["pool"], ["Shape.2"]),
        node("Slice", ["Shape.2", "zero", "one", "axis"], ["batch.2"]),
        node("Concat", ["batch.2", "flat"], ["wanted.2"], axis=0),
        node("Reshape", ["pool", "wanted.2"], ["vector"]),
        node("MatMul", ["vector", "fc_w"], ["product"]),
        node("Add", ["product", "fc_b"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, {}, ["DynamicDimension.0", 3, 6, 6], opset=13)
    weight, bias, fc_weight, fc_bias = (torch.from_numpy(tensors[name]) for name in ("conv_w", "conv_b", "fc_w", "fc_b"))
    module = reads(
        path,
        lambda x: F.linear(asymmetric(F.conv2d(x, weight, bias, padding=1).relu(), 2).mean((2, 3)), fc_weight.T, fc_bias),
    )
    assert {name for name, _ in module.named_parameters()} == {"conv_w", "conv_b", "fc_w", "fc_b"}


# ---- damaged files


@pytest.mark.hunt
@pytest.mark.hunt_one_in(8)
@pytest.mark.parametrize("first", range(0, 2000, 250))
def test_a_damaged_file_is_refused_or_read_in_little_time_and_memory(first: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("onnx_mutants.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, tmp_path, str(first), "250"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.split()[1:2] not in (["read"], ["refused"])] == [], done.stderr
    assert done.returncode == 0 and len(lines) == 250, done.stderr
    assert sum(line.split()[1] == "read" for line in lines) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["mutant.onnx"]
