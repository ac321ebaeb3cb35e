"""A quantised network as an ONNX file: integers, and a DequantizeLinear in front of each operator that reads them.

The file is that of `pathlift.save`; then each weight that was rounded becomes a node

    weight = DequantizeLinear(integers, scales, zero points)

of the standard operators (opset 21 has integers of 4 bits and blocks). Grids of up to 4 bits are stored in 4, those of 5 to 8
in 8, floating-point formats as they are. The node computes float32((q − z)·s), which is what the quantised module holds, so
that the outputs are those of the module up to the arithmetic of the runtime. Activations that have a range become whole numbers
of 8 bits in between: a QuantizeLinear and a DequantizeLinear in front of the operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.errors import InputError, MismatchError
from pathlift.graph.network import Network
from pathlift.output import Writer, check_outputs, write_outputs
from pathlift.quantisation.report import QuantizeReport
from pathlift.quantisation.tensors import QuantizedTensor
from pathlift.reading import Inputs
from pathlift.reading.second import named_tensors
from pathlift.saving import check_extra, onnx_file
from pathlift.storage.packages import package

OPSET = 21
"""Version of the standard that has integers of 4 bits and blocks."""

IR_VERSION = 10
"""Version of the file format that goes with it."""

READERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators that multiply by a weight."""

MOVES = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity"}
"""Operators that a weight may go through first."""


@public
def save_onnx(
    quantized: nn.Module | Network,
    report: QuantizeReport,
    path: str | Path,
    inputs: Inputs | None = None,
    *,
    activations: Mapping[str, tuple[float, float]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a quantised network to an ONNX file with integer weights, all or nothing.

    What was written is run where onnxruntime is installed, and has to give the outputs of the quantised network, unless
    activations are quantised too.

    Args:
        quantized: The module or network that `quantize` returned. One that was read from an ``.onnx`` file goes back as the
            same graph.
        report: Its report.
        path: A file that ends in ``.onnx``.
        inputs: As for `capture`; a Network knows them. The batch has any size.
        activations: Name of a weight to the range of what it is multiplied by, as `activation_ranges` gives it: that becomes
            whole numbers of 8 bits, with a zero point. None: activations stay in floating point.
        overwrite: Replace a file that exists.

    Raises:
        InputError: A package is missing, the module cannot be exported, or the file cannot be written or exists already.
        MismatchError: The weights of the module are not those of the report.
        NumericalError: What was written gives other outputs than the module; nothing is left of it.
    """
    path = Path(path)
    check_outputs({"The file": path}, suffixes=(".onnx",), replace=overwrite)
    check_extra(quantized, path)
    write_outputs({path: onnx_writer(quantized, report, inputs, activations)}, replace=overwrite)


def onnx_writer(
    quantized: nn.Module | Network,
    report: QuantizeReport,
    inputs: Inputs | None = None,
    activations: Mapping[str, tuple[float, float]] | None = None,
) -> Writer:
    """Return what writes the file of `save_onnx`; all that can be refused without a file is refused now.

    Args:
        quantized: See `save_onnx`.
        report: See `save_onnx`.
        inputs: See `save_onnx`.
        activations: See `save_onnx`.

    Returns:
        The writer. It raises a `NumericalError` when what it wrote gives other outputs.

    Raises:
        InputError: See `save_onnx`.
    """
    onnx = package("onnx", "onnx")
    _check_weights(quantized, report)
    file = onnx_file(quantized, inputs, OPSET)
    program = onnx.ModelProto.FromString(file.content)
    if max((opset.version for opset in program.opset_import if opset.domain in {"", "ai.onnx"}), default=0) < OPSET:
        program = onnx.version_converter.convert_version(program, OPSET)
    program.ir_version = max(program.ir_version, IR_VERSION)
    names = {tensor.name: file.names.get(tensor.name, tensor.name) for tensor in report.tensors}
    for tensor in report.tensors:
        _replace(onnx, program.graph, tensor, names[tensor.name])
    if activations is not None:
        unknown = next((name for name in activations if name not in names), None)
        if unknown is not None:
            raise InputError(f"activations has a range for '{unknown}', which was not quantised.")
        _with_integers(onnx, program.graph, {names[name]: ends for name, ends in activations.items()})
    onnx.checker.check_model(program)
    trial = file.trial if activations is None else None
    return replace(file, content=program.SerializeToString(), trial=trial).writer()


def _check_weights(quantized: nn.Module | Network, report: QuantizeReport) -> None:
    held = quantized.state if isinstance(quantized, Network) else named_tensors(quantized)
    for tensor in report.tensors:
        if tensor.name not in held or not torch.equal(held[tensor.name].detach().cpu(), tensor.values.cpu()):
            raise MismatchError(
                f"'{tensor.name}' of the module is not what the report has: give the module that quantize returned."
            )


# ---- weights


def _replace(onnx: Any, graph: Any, tensor: QuantizedTensor, name: str) -> None:
    """Put integers and a node that reads them in the place of a weight."""
    kind = _taken_out(graph, name)
    if kind is None:
        raise InputError(f"The exported program has no weight '{name}': it was computed away, and cannot be integers.")
    last = f"{name}_float32"
    if tensor._form.scaled:
        stored = onnx.TensorProto.DataType.Value(_stored_as(tensor))
        axis, block, scale, zero = _blocks(tensor)
        parts = [
            _initialiser(onnx, f"{name}_quantized", tensor.integers, stored),
            _initialiser(onnx, f"{name}_scale", scale, onnx.TensorProto.FLOAT),
        ]
        if tensor._form.affine:
            parts.append(_initialiser(onnx, f"{name}_zero_point", zero, stored))
        graph.initializer.extend(parts)
        options = {} if axis is None else {"axis": axis} | ({"block_size": block} if block else {})
        nodes = [onnx.helper.make_node("DequantizeLinear", [part.name for part in parts], [last], **options)]
    else:
        part = _initialiser(onnx, f"{name}_bfloat16", tensor.integers, onnx.TensorProto.BFLOAT16)
        graph.initializer.append(part)
        nodes = [onnx.helper.make_node("Cast", [part.name], [last], to=onnx.TensorProto.FLOAT)]
    nodes.append(onnx.helper.make_node("Cast", [last], [name], to=kind))
    if kind == onnx.TensorProto.FLOAT:
        del nodes[-1]
        nodes[-1].output[0] = name
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)


def _taken_out(graph: Any, name: str) -> int | None:
    """Remove a stored weight, and return its type; None where there is none of that name."""
    for held in graph.initializer:
        if held.name == name:
            kind = int(held.data_type)
            graph.initializer.remove(held)
            for declared in [value for value in graph.input if value.name == name]:
                graph.input.remove(declared)
            return kind
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] == name and node.attribute[0].name == "value":
            kind = int(node.attribute[0].t.data_type)
            graph.node.remove(node)
            return kind
    return None


def _stored_as(tensor: QuantizedTensor) -> str:
    if tensor.integers.dtype == torch.int8:
        return "INT4" if tensor.bits <= 4 else "INT8"
    return {torch.float8_e4m3fn: "FLOAT8E4M3FN", torch.float8_e5m2: "FLOAT8E5M2"}[tensor.integers.dtype]


def _blocks(tensor: QuantizedTensor) -> tuple[int | None, int, Tensor, Tensor]:
    """Return axis, size of blocks (0 for none), scales and zero points as DequantizeLinear takes them.

    It knows one scale, one for each index of an axis, or blocks along one axis with a scale for each index of the others.
    """
    scale, zero = tensor.scale, tensor.zero_point
    if scale.numel() == 1:
        return None, 0, scale.reshape(()), zero.reshape(())
    told_apart = [dim for dim, size in enumerate(scale.shape) if size > 1]
    if len(told_apart) == 1 and tensor.block[told_apart[0]] == 1:
        return told_apart[0], 0, scale.reshape(-1), zero.reshape(-1)
    axis = max(told_apart, key=lambda dim: tensor.block[dim])
    for dim, side in enumerate(tensor.block):
        if dim != axis and side > 1:
            scale, zero = (part.repeat_interleave(side, dim) for part in (scale, zero))
    return axis, tensor.block[axis], scale, zero


def _initialiser(onnx: Any, name: str, values: Tensor, kind: int) -> Any:
    """Return a stored tensor; two integers of 4 bits share a byte, the first in its lower half."""
    plain = values.detach().cpu().contiguous()
    if kind == onnx.TensorProto.INT4:
        flat = plain.reshape(-1).to(torch.int16) & 0xF
        padded = torch.cat([flat, flat.new_zeros(len(flat) % 2)]).reshape(-1, 2)
        content = (padded[:, 0] | (padded[:, 1] << 4)).to(torch.uint8).numpy().tobytes()
    else:
        content = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    return onnx.TensorProto(name=name, data_type=kind, dims=list(plain.shape), raw_data=content)


# ---- activations


def _with_integers(onnx: Any, graph: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Quantise what weights are multiplied by, and dequantise it again in front of the operator."""
    wanted: dict[str, tuple[float, float]] = {}
    readers: dict[str, list[tuple[Any, int]]] = {}
    for name, (low, high) in ranges.items():
        places = list(_readers(graph, name))
        if not places:
            raise InputError(f"No operator of the exported program multiplies by '{name}' alone: it has no activations.")
        for node, place in places:
            value = node.input[place]
            known = wanted.get(value, (0.0, 0.0))
            wanted[value] = (min(known[0], low), max(known[1], high))
            readers.setdefault(value, []).append((node, place))
    for value, (low, high) in wanted.items():
        scale = np.float32((high - low) / 255 if high > low else 1.0)
        zero = np.uint8(np.clip(np.rint(-low / scale), 0, 255))
        parts = [f"{value}_{part}" for part in ("activation_scale", "activation_zero_point", "uint8", "of_uint8")]
        graph.initializer.extend([
            onnx.numpy_helper.from_array(np.asarray(scale), parts[0]),
            onnx.numpy_helper.from_array(np.asarray(zero), parts[1]),
        ])
        first = min(list(graph.node).index(node) for node, _ in readers[value])
        for offset, (operator, source, target) in enumerate((
            ("QuantizeLinear", value, parts[2]), ("DequantizeLinear", parts[2], parts[3]),
        )):  # fmt: skip
            graph.node.insert(first + offset, onnx.helper.make_node(operator, [source, *parts[:2]], [target]))
        for node, place in readers[value]:
            node.input[place] = parts[3]


def _readers(graph: Any, weight: str) -> Iterator[tuple[Any, int]]:
    """Yield the operators that multiply by a weight, and the place of what they multiply among their inputs."""
    for node in graph.node:
        if weight in node.input:
            if node.op_type in READERS:
                yield node, 1 - list(node.input).index(weight)
            elif node.op_type in MOVES:
                yield from _readers(graph, node.output[0])
