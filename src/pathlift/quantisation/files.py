"""Quantised weights in safetensors files, in the naming and with the metadata that torchao reads.

`storage.quantized` has the naming and reads it. A weight in bfloat16 is a tensor like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pathlift.arguments import public
from pathlift.output import Writer
from pathlift.quantisation.formats import WholeNumbers
from pathlift.quantisation.tensors import QuantizedTensor
from pathlift.storage.checkpoints import Checkpoint
from pathlift.storage.quantized import FLOAT8, PARTS, PLAIN, WHOLE, part_name


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
        metadata[name] = json.dumps({"_type": PLAIN})
    metadata["tensor_names"] = json.dumps([*metadata])
    plain = {name: content.detach().cpu().contiguous().clone() for name, content in contents.items()}
    return lambda path: save_file(plain, path, metadata)


def _described(tensor: QuantizedTensor) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the parts of a tensor by their keys in the file, and what the metadata say of it."""
    if not tensor._form.scaled:
        return {tensor.name: tensor.integers}, {"_type": PLAIN}
    dtype = tensor.dtype if tensor.dtype in {torch.float16, torch.bfloat16} else torch.float32
    common = {"block_size": list(tensor.block), "dtype": _dtype(dtype)}
    parts = {part_name(tensor.name, "qdata"): tensor.integers, part_name(tensor.name, "scale"): tensor.scale}
    if isinstance(tensor._form, WholeNumbers):
        parts[part_name(tensor.name, "zero_point")] = tensor.zero_point
        target = _dtype(getattr(torch, f"int{tensor.bits}"))
        data: dict[str, object] = {"target_dtype": target, **common, "activation_quantization": None}
        return parts, {"_type": WHOLE, "_data": data, "_tensor_data_names": [*PARTS[WHOLE]]}
    return parts, {"_type": FLOAT8, "_data": common, "_tensor_data_names": [*PARTS[FLOAT8]]}


def _dtype(dtype: torch.dtype) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}


@public
def load_quantized(path: str | Path) -> dict[str, Tensor]:
    """Read what `QuantizeReport.save` wrote as a state-dict in floating point.

    Such a file is taken wherever weights are read from files, see `Checkpoint`.

    Args:
        path: The file.

    Returns:
        Name to tensor, as `torch.nn.Module.load_state_dict` takes it: the weights lie on their grids.

    Raises:
        InputError: The file cannot be read, or has quantised weights of another kind.
    """
    return dict(Checkpoint(path))
