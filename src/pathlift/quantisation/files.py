"""Quantised weights in safetensors files, in the naming and with the metadata that torchao reads.

A tensor ``layer.weight`` of whole numbers is kept as ``layer._weight_qdata`` (int8), ``layer._weight_scale`` and
``layer._weight_zero_point``; the metadata of the file say of each tensor of which kind it is. A weight on a floating-point
grid of eight bits is ``qdata`` and ``scale``; one in bfloat16 is a tensor like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pathlift.arguments import public
from pathlift.errors import InputError
from pathlift.output import Writer
from pathlift.quantisation.formats import WholeNumbers
from pathlift.quantisation.tensors import QuantizedTensor, dequantized

WHOLE, FLOAT8 = "IntxUnpackedToInt8Tensor", "Float8Tensor"


def quantized_writer(tensors: Sequence[QuantizedTensor], others: Mapping[str, Tensor]) -> Writer:
    """Return what writes quantised and other tensors to a safetensors file.

    Args:
        tensors: The quantised ones.
        others: All others by name.

    Returns:
        The writer.
    """
    contents: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for tensor in tensors:
        parts, described = _described(tensor)
        contents |= parts
        metadata[tensor.name] = json.dumps(described)
    for name, other in others.items():
        contents[name] = other
        metadata[name] = json.dumps({"_type": "Tensor"})
    metadata["tensor_names"] = json.dumps([*metadata])
    plain = {name: content.detach().cpu().contiguous().clone() for name, content in contents.items()}
    return lambda path: save_file(plain, path, metadata)


def _key(name: str, part: str) -> str:
    module, dot, parameter = name.rpartition(".")
    return f"{module}{dot}_{parameter}_{part}"


def _described(tensor: QuantizedTensor) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the parts of a tensor by their keys in the file, and what the metadata say of it."""
    if not tensor._form.scaled:
        return {tensor.name: tensor.integers}, {"_type": "Tensor"}
    dtype = tensor.dtype if tensor.dtype in {torch.float16, torch.bfloat16} else torch.float32
    common = {"block_size": list(tensor.block), "dtype": _dtype(dtype)}
    parts = {_key(tensor.name, "qdata"): tensor.integers, _key(tensor.name, "scale"): tensor.scale}
    if isinstance(tensor._form, WholeNumbers):
        parts[_key(tensor.name, "zero_point")] = tensor.zero_point
        target = _dtype(getattr(torch, f"int{tensor.bits}"))
        data: dict[str, object] = {"target_dtype": target, **common, "activation_quantization": None}
        return parts, {"_type": WHOLE, "_data": data, "_tensor_data_names": ["qdata", "scale", "zero_point"]}
    return parts, {"_type": FLOAT8, "_data": common, "_tensor_data_names": ["qdata", "scale"]}


def _dtype(dtype: torch.dtype) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}


@public
def load_quantized(path: str | Path) -> dict[str, Tensor]:
    """Read what `QuantizeReport.save` wrote as a state-dict in floating point.

    Args:
        path: The file.

    Returns:
        Name to tensor, as `torch.nn.Module.load_state_dict` takes it: the weights lie on their grids.

    Raises:
        InputError: The file cannot be read, or is no such file.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: _read(name, json.loads(metadata[name]), file) for name in json.loads(metadata["tensor_names"])}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"'{path}' cannot be read as a file of quantised weights: {error}") from error


def _read(name: str, described: Mapping[str, Any], file: Any) -> Tensor:
    held: Tensor
    if described["_type"] == "Tensor":
        held = file.get_tensor(name)
        return held
    if described["_type"] not in {WHOLE, FLOAT8}:
        raise ValueError(f"'{name}' is a {described['_type']}")
    data = described["_data"]
    parts = {part: file.get_tensor(_key(name, part)) for part in described["_tensor_data_names"]}
    values = dequantized(parts["qdata"], parts["scale"], parts.get("zero_point"), tuple(data["block_size"]))
    return values.to(getattr(torch, data["dtype"]["_data"]))
