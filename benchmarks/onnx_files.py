"""Which ONNX files are read: those that packages ship, and what PyTorch's two exporters write of torchvision's classifiers.

    python benchmarks/onnx_files.py files FOLDER …      every .onnx file below, as rows of a table
    python benchmarks/onnx_files.py exporters [NAME …]  outputs and path-norm against the model itself

NAME@64 takes images of 64 pixels a side instead of 224.

A file that lies inside the theory is compared with onnx's own evaluator, which is given the absolute values of its weights, in
double precision, with sums in the place of maxima and ones for an input: its path-norm must come out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import pathlift
from pathlift.storage.onnx import input_shapes, read_onnx

OPEN = {"height": 64, "width": 64, "image_width": 64, "frames": 64, "sequence": 576}
"""Sizes for those that a file leaves open, by name; 64 for all others."""

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def shape_for(path: Path) -> Any:
    try:
        return input_shapes(path)
    except pathlift.InputError:
        inputs = read_onnx(path, check=False).inputs
        if any(own.sizes == () for own in inputs):
            raise
        shapes = [tuple(s if isinstance(s, int) else OPEN.get(s, 64) for s in (own.sizes or ())[1:]) for own in inputs]
        return shapes[0] if len(shapes) == 1 else tuple(shapes)


def absolute(path: Path) -> Any:
    """Return the program with absolute weights, whose value at ones is the path-norm."""
    program = onnx.load(path)
    graph = program.graph
    for node in [own for own in graph.node if own.op_type == "Constant"]:
        tensor = onnx.helper.get_attribute_value(node.attribute[0])
        tensor = tensor if isinstance(tensor, onnx.TensorProto) else numpy_helper.from_array(np.asarray(tensor))
        graph.initializer.append(tensor)
        graph.initializer[-1].name = node.output[0]
        graph.node.remove(node)
    held = {tensor.name: tensor for tensor in graph.initializer}
    array = {name: numpy_helper.to_array(tensor) for name, tensor in held.items()}

    def put(name: str, value: Any) -> None:
        held[name].CopyFrom(numpy_helper.from_array(value, name))

    for name, tensor in held.items():
        if tensor.data_type in FLOATS:
            put(name, np.abs(array[name].astype(np.float64)))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in FLOATS:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        settings = {own.name: onnx.helper.get_attribute_value(own) for own in node.attribute}
        if node.op_type == "BatchNormalization":
            scale, shift, mean, variance = (array[name].astype(np.float64) for name in node.input[1:])
            factor = scale / np.sqrt(variance + settings.get("epsilon", 1e-5))
            for name, value in zip(node.input[1:], (factor, shift - mean * factor, 0 * mean, 0 * mean + 1), strict=True):
                put(name, np.abs(value))
            node.attribute.remove(next(own for own in node.attribute if own.name == "epsilon"))
            node.attribute.append(onnx.helper.make_attribute("epsilon", 0.0))
        elif node.op_type in {"Softmax", "Sigmoid", "Clip"}:
            node = onnx.helper.make_node("Identity", node.input[:1], node.output)
        elif node.op_type == "Sub":
            node.op_type = "Add"
        elif node.op_type == "GlobalMaxPool":
            node = onnx.helper.make_node("ReduceL1", node.input, node.output, axes=[2, 3])
        elif node.op_type == "PRelu":  # two neurons, one for each sign
            put(node.input[1], 1 + np.abs(array[node.input[1]].astype(np.float64)))
            node.op_type = "Mul"
        elif node.op_type == "ReduceMax":
            node.op_type = "ReduceL1"
        elif node.op_type == "MaxPool":
            several = {**settings, "count_include_pad": 1}
            for name, usual in (("storage_order", {0}), ("dilations", {1})):  # which old versions of a mean have not
                assert set(np.atleast_1d(several.pop(name, [*usual])).tolist()) == usual
            mean = f"{node.output[0]} averaged"
            count = onnx.helper.make_tensor("n", onnx.TensorProto.DOUBLE, (), [float(np.prod(settings["kernel_shape"]))])
            graph.node.append(onnx.helper.make_node("AveragePool", node.input, [mean], **several))
            graph.node.append(onnx.helper.make_node("Constant", [], [f"{mean} over"], value=count))
            node = onnx.helper.make_node("Mul", [mean, f"{mean} over"], node.output)
        graph.node.append(node)
    return program


def norm_by_onnx(path: Path, shape: tuple[int, ...]) -> float:
    program = absolute(path)
    held = {tensor.name for tensor in program.graph.initializer}
    (name,) = (own.name for own in program.graph.input if own.name not in held)
    return sum(float(own.sum()) for own in ReferenceEvaluator(program).run(None, {name: np.ones((1, *shape))}))


def row(path: Path) -> str:
    program = onnx.load(path, load_external_data=False)
    opset = max(own.version for own in program.opset_import if own.domain in {"", "ai.onnx"})
    start = f"| {path.parents[0].name}/{path.name} | {program.producer_name or '?'} | {opset} | {len(program.graph.node)} |"
    try:
        shape = shape_for(path)
        module = read_onnx(path)
        report = pathlift.check_support(module, shape)
    except pathlift.PathliftError as error:
        reason = str(error).replace(str(path), path.name).removeprefix(f"'{path.name}' cannot be read as ONNX: ")
        return f"{start} no | {reason[:280]} |"
    if not report.supported:
        counts = Counter(problem.op.removeprefix("aten.").split(".")[0] if problem.op.startswith("aten") else problem.op
                         for problem in report.problems)  # fmt: skip
        return f"{start} outside the theory | {', '.join(f'{op} ×{count}' for op, count in counts.most_common(6))} |"
    norm = pathlift.path_norm(module, shape).value
    try:
        other = norm_by_onnx(path, shape)
        told = f"path-norm {norm:.6g}, by onnx {other:.6g}, apart {abs(norm - other) / other:.1e}"
    except (RuntimeError, TypeError, NotImplementedError) as error:
        told = f"path-norm {norm:.6g}; onnx's evaluator cannot: {type(error).__name__}"
    return f"{start} read | {told} |"


def files(folders: list[str]) -> None:
    print("| file | made by | opset | nodes | read | |")
    print("| --- | --- | ---: | ---: | --- | --- |")
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.onnx")):
            print(row(path), flush=True)


def shown(name: str) -> nn.Module:
    """Build a classifier whose statistics all show."""
    import torchvision

    torch.manual_seed(0)
    more: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **more).eval()
    for own in model.modules():
        if isinstance(own, nn.BatchNorm2d):
            for tensor, low in ((own.weight, 0.5), (own.bias, -0.2), (own.running_mean, -0.2), (own.running_var, 0.5)):
                nn.init.uniform_(tensor, low, low + 1)
    return model


def exporters(names: list[str]) -> None:
    import torchvision

    logging.disable(logging.CRITICAL)
    names = names or [own for own in torchvision.models.list_models(torchvision.models) if "quant" not in own]
    print("| model | exporter | outputs differ | path-norms differ | seconds |")
    print("| --- | --- | ---: | ---: | ---: |")
    for own in names:
        name, _, side = own.partition("@")
        model = shown(name)
        size = int(side or (299 if name == "inception_v3" else 224))
        x = torch.randn(1, 3, size, size)
        report = pathlift.check_support(model, (3, size, size))
        norm = pathlift.path_norm(model, (3, size, size)).log10 if report else None
        for new in (True, False):
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                path = Path(folder) / "model.onnx"
                with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    torch.onnx.export(model, (x,), path, dynamo=new, verbose=False)
                module = read_onnx(path, check=False)
                off = float((module(x) - model(x)).abs().max() / model(x).abs().max())
                if norm is not None:
                    told = f"{abs(10 ** (pathlift.path_norm(module, (3, size, size)).log10 - norm) - 1):.1e}"
                else:
                    same = not pathlift.check_support(module, (3, size, size))
                    told = f"both outside the theory: {report.problems[0].op}" if same else "the file alone is read"
            exporter, seconds = "torch.export" if new else "TorchScript", time.perf_counter() - start
            print(f"| {name} | {exporter} | {off:.1e} | {told} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    {"files": files, "exporters": exporters}[sys.argv[1]](sys.argv[2:])
