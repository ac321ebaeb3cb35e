"""A quantised network as an ONNX file: integers, and a DequantizeLinear in front of each operator that reads them.

The file is written by ``torch.onnx``; then each weight that was rounded becomes a node

    weight = DequantizeLinear(integers, scales, zero points)

of the standard operators (opset 21 has integers of 4 bits and blocks). Grids of up to 4 bits are stored in 4, those of 5 to 8
in 8, floating-point formats as they are. The node computes float32((q − z)·s), which is what the quantised module holds, so
that the outputs are those of the module up to the arithmetic of the runtime.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.errors import InputError, told
from pathlift.output import check_outputs, write_outputs
from pathlift.quantisation.report import QuantizeReport
from pathlift.quantisation.tensors import QuantizedTensor
from pathlift.reading import Inputs
from pathlift.reading.examples import examples_of
from pathlift.reading.freeze import cloned
from pathlift.storage.packages import package

OPSET = 21


@public
def save_onnx(quantized: nn.Module, report: QuantizeReport, path: str | Path, inputs: Inputs) -> None:
    """Write a quantised module to an ONNX file with integer weights, all or nothing.

    Args:
        quantized: The module that `quantize` returned.
        report: Its report.
        path: A file that ends in ``.onnx``; one that is there is replaced.
        inputs: As for `capture`. The batch has any size.

    Raises:
        InputError: A package is missing, the module cannot be exported, its weights are not those of the report, or the file
            cannot be written.
    """
    check_outputs({"The file": Path(path)}, suffixes=(".onnx",), replace=True)
    package("onnxscript", "onnx")
    onnx = package("onnx", "onnx")
    state = quantized.state_dict()
    for tensor in report.tensors:
        if tensor.name not in state or not torch.equal(state[tensor.name].cpu(), tensor.values.cpu()):
            raise InputError(
                f"'{tensor.name}' of the module is not what the report has: give the module that quantize returned."
            )
    program = _exported(onnx, cloned(quantized).eval(), inputs)
    for tensor in report.tensors:
        _replace(onnx, program.graph, tensor)
    onnx.checker.check_model(program)
    content = program.SerializeToString()
    write_outputs({Path(path): lambda partial: partial.write_bytes(content)}, replace=True)


def _exported(onnx: Any, module: nn.Module, inputs: Inputs) -> Any:
    """Return the module as a program of ONNX, its parameters under their names."""
    examples = examples_of(module, inputs)
    filled = examples.form.filled(examples.tensors)
    args, kwargs = ((), filled) if isinstance(filled, dict) else (tuple(filled), None)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, args, kwargs=kwargs, opset_version=OPSET, dynamo=True, optimize=False, verbose=False,
                dynamic_shapes=_any_batch(args, kwargs),
            )  # fmt: skip
            assert program is not None
            content: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # whatever torch.onnx cannot do
        raise InputError(f"torch.onnx cannot export the model: {told(error)}") from error
    finally:
        logger.setLevel(level)
    return onnx.ModelProto.FromString(content)


def _any_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
    batch = torch.export.Dim.AUTO

    def shapes(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch}
        if isinstance(value, Mapping):
            return {name: shapes(item) for name, item in value.items()}
        return type(value)(shapes(item) for item in value)

    return shapes(kwargs) if kwargs else shapes(args)


def _replace(onnx: Any, graph: Any, tensor: QuantizedTensor) -> None:
    """Put integers and a node that reads them in the place of a weight."""
    held = next((item for item in graph.initializer if item.name == tensor.name), None)
    if held is None:
        raise InputError(f"The exported program has no weight '{tensor.name}': it was computed away, and cannot be integers.")
    kind, last = held.data_type, f"{tensor.name}_float32"
    graph.initializer.remove(held)
    if tensor._form.scaled:
        stored = onnx.TensorProto.DataType.Value(_stored_as(tensor))
        axis, block, scale, zero = _blocks(tensor)
        parts = [
            _initialiser(onnx, f"{tensor.name}_quantized", tensor.integers, stored),
            _initialiser(onnx, f"{tensor.name}_scale", scale, onnx.TensorProto.FLOAT),
        ]
        if tensor._form.affine:
            parts.append(_initialiser(onnx, f"{tensor.name}_zero_point", zero, stored))
        graph.initializer.extend(parts)
        options = {} if axis is None else {"axis": axis} | ({"block_size": block} if block else {})
        nodes = [onnx.helper.make_node("DequantizeLinear", [part.name for part in parts], [last], **options)]
    else:
        part = _initialiser(onnx, f"{tensor.name}_bfloat16", tensor.integers, onnx.TensorProto.BFLOAT16)
        graph.initializer.append(part)
        nodes = [onnx.helper.make_node("Cast", [part.name], [last], to=onnx.TensorProto.FLOAT)]
    nodes.append(onnx.helper.make_node("Cast", [last], [tensor.name], to=kind))
    if kind == onnx.TensorProto.FLOAT:
        del nodes[-1]
        nodes[-1].output[0] = tensor.name
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)


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
