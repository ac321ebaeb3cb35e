"""Quantised weights in files of safetensors, named and described as torchao does it: what they are in floating point.

A tensor ``layer.weight`` of whole numbers is ``layer._weight_qdata``, ``layer._weight_scale`` and ``layer._weight_zero_point``
there, one on a floating-point grid of eight bits has the first two; the metadata of the file say of each tensor of which kind
it is. Kinds that keep several weights in a byte, or anything else, are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathlift.errors import InputError

PLAIN, WHOLE, FLOAT8 = "Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"
"""Kinds of tensors: as they stand, whole numbers in bytes, and floating-point numbers of eight bits, by torchao's names."""

PARTS = {WHOLE: ("qdata", "scale", "zero_point"), FLOAT8: ("qdata", "scale")}
"""What the quantised ones consist of."""


def part_name(name: str, part: str) -> str:
    """Return the name of a part of a tensor in a file.

    Args:
        name: Of the tensor.
        part: ``qdata``, ``scale`` or ``zero_point``.

    Returns:
        Its name.
    """
    module, dot, parameter = name.rpartition(".")
    return f"{module}{dot}_{parameter}_{part}"


def dequantized(integers: Tensor, scale: Tensor, zero_point: Tensor | None, block: tuple[int, ...]) -> Tensor:
    """Return float32((integer − zero_point)·scale) with one scale for each block.

    Args:
        integers: The integers, or numbers of a floating-point type.
        scale: One for each block.
        zero_point: The same; None for 0.
        block: Sides of the blocks.

    Returns:
        Float32, of the shape of the integers.
    """

    def spread(tensor: Tensor) -> Tensor:
        for dim, side in enumerate(block):
            tensor = tensor.repeat_interleave(side, dim) if side > 1 and tensor.shape[dim] > 1 else tensor
        return tensor

    levels = integers.float() if zero_point is None else integers.float() - spread(zero_point.float())
    return levels * spread(scale)


@dataclass(frozen=True)
class Quantized:
    """How a tensor lies in a file.

    Attributes:
        parts: Names of its parts: numbers, scales, and zero points where there are any.
        block: Sides of the blocks that share a scale.
        dtype: The type that its values have.
    """

    parts: tuple[str, ...]
    block: tuple[int, ...]
    dtype: torch.dtype

    def checked(self, name: str, specs: Mapping[str, Tensor]) -> Tensor:
        """Return a tensor without memory of its shape and type.

        Args:
            name: What it is called.
            specs: Tensors without memory of all that the file holds.

        Raises:
            InputError: A part is missing, or they do not fit each other.
        """
        missing = next((part for part in self.parts if part not in specs), None)
        if missing is not None:
            raise InputError(f"its tensor {name!r} lacks the part {missing!r}.")
        numbers, *others = (specs[part] for part in self.parts)
        shape, found = tuple(numbers.shape), " and ".join(sorted({str(tuple(other.shape)) for other in others}))
        if any(tuple(other.shape) != self._scales(shape) for other in others):
            raise InputError(
                f"the scales of its tensor {name!r} do not fit it: shape {found} for {shape}, blocks {self.block}."
            )
        return torch.empty(numbers.shape, dtype=self.dtype, device="meta")

    def _scales(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of the scales, one for each block; None where the blocks do not fill the tensor."""
        if len(self.block) != len(shape) or any(side < 1 or size % side for size, side in zip(shape, self.block, strict=True)):
            return None
        return tuple(size // side for size, side in zip(shape, self.block, strict=True))


def quantized_in(metadata: Mapping[str, str]) -> dict[str, Quantized]:
    """Return the quantised tensors that the metadata of a file tell of.

    Args:
        metadata: Text by name, as a file of safetensors has them.

    Returns:
        Name to how it lies in the file; empty for a file that tells of none.

    Raises:
        InputError: It tells of one of another kind, or the metadata are no description.
    """
    if "tensor_names" not in metadata:
        return {}
    try:
        described = {name: json.loads(metadata[name]) for name in json.loads(metadata["tensor_names"])}
        return {name: _described(name, own) for name, own in described.items() if own["_type"] != PLAIN}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"what it says of its quantised tensors cannot be read: {error}.") from error


def _described(name: str, described: Mapping[str, Any]) -> Quantized:
    kind, data = described["_type"], described["_data"]
    if kind not in PARTS or tuple(described["_tensor_data_names"]) != PARTS[kind]:
        raise InputError(f"its tensor {name!r} is a {kind}, which is not read: only {' and '.join(PARTS)} are.")
    dtype = getattr(torch, data["dtype"]["_data"])
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"its tensor {name!r} is said to be of type {data['dtype']['_data']!r}.")
    return Quantized(tuple(part_name(name, part) for part in PARTS[kind]), tuple(map(int, data["block_size"])), dtype)
