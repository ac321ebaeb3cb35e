"""A weight tensor as integers and scales, and what it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.quantisation.formats import Format
from pathlift.results import Result
from pathlift.storage.quantized import dequantized


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor(
    Result,
    line=("name", "format", "weights", "expected_error", "path_share"),
    shows=(
        "name",
        "format",
        "shape",
        "weights",
        "block",
        "bytes",
        "step",
        "clipped",
        "expected_error",
        "relative_error",
        "path_share",
        "propagated",
        "integers",
        "scale",
        "zero_point",
    ),
):
    """What became of one weight tensor: value = float32((integer − zero_point)·scale), block by block.

    Of a floating-point format the integers are the bits of the numbers, and value = float32(number·scale).

    Attributes:
        name: Its name.
        integers: Of its shape: int8, or for floating-point formats that type itself.
        scale: Float32, one for each block, with an axis for each axis of the tensor.
        zero_point: Int8, of the same shape; 0 without a zero point.
        block: Sides of the blocks that share a scale.
        dtype: The type that the model keeps the weight in.
        expected_error: E‖ΔR‖² by the model of the activations, Σ_o g(o)·Δ_oᵀ H Δ_o; an estimate, up to a factor that all layers
            share.
        clipped: How many of the model's weights lie beyond the ends of their grid by more than half of the last step.
        relative_error: ‖Δ‖₂/‖θ‖₂.
        path_share: Σ |Δ_i|·∂‖Φ‖₁/∂|θ_i| as a share of ‖Φ(θ)‖₁: the path-metric of rounding this tensor alone, where no path
            runs through it twice.
        propagated: Through how many other weights the statistics of what it is multiplied by were propagated since something
            was known of them: 0 right behind inputs and batch norms, and where data were measured. The more, the less they and
            the expected error are worth.
    """

    name: str
    _form: Format
    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    block: tuple[int, ...]
    _between: tuple[Tensor, Tensor]
    dtype: torch.dtype
    expected_error: float
    clipped: int
    relative_error: float
    path_share: float
    propagated: int

    @property
    def format(self) -> str:
        """Name of the format: ``int4``, ``fp8_e4m3``, …"""
        return f"{self._form.name}{' affine' if self._form.affine else ''}"

    @property
    def bits(self) -> int:
        """Bits of one weight."""
        return self._form.bits

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.integers.shape)

    @property
    def weights(self) -> int:
        """Its number of weights."""
        return self.integers.numel()

    @property
    def bytes(self) -> int:
        """What it takes: weights packed to their bits, scales as float32, zero points as bytes where there are any."""
        return packed(self.weights, self._form, self.scale.numel())

    @property
    def step(self) -> float:
        """The largest of the steps of its grids: of floating-point formats that below the largest value."""
        return float(self.scale.max()) * self._form.last_step()

    @property
    def values(self) -> Tensor:
        """The weights that the integers stand for, as the model has them."""
        return dequantized(self.integers, self.scale, self.zero_point, self.block).to(self.dtype)

    @property
    def neighbours(self) -> tuple[Tensor, Tensor]:
        """The values of the grid that each weight lay between; one beyond the grid has the end of it twice."""
        down, up = (self._stands_for(integers) for integers in self._between)
        return down, up

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of the grid of each weight."""
        low, high = (self._stands_for(torch.full_like(self._between[0], end)) for end in (self._form.low, self._form.high))
        return low, high

    def _stands_for(self, integers: Tensor) -> Tensor:
        levels = self._form.levels(integers, torch.zeros_like(integers))
        return dequantized(levels, self.scale, self.zero_point, self.block).to(self.dtype)


def packed(weights: int, form: Format, scales: int) -> int:
    """Return the bytes of a quantised tensor.

    Args:
        weights: Number of weights.
        form: Their format.
        scales: Number of scales.

    Returns:
        Bytes.
    """
    return math.ceil(weights * form.bits / 8) + (scales * (5 if form.affine else 4) if form.scaled else 0)
