"""What activations are told about: moments of inputs, correlations, data."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from pathlift.arguments import declare
from pathlift.arguments.kinds import batches, choice, either, least_zero, number, plain_tensor
from pathlift.reading.arguments import streamed
from pathlift.statistics.model import Correlations

told = "a number, or a tensor with one number for each channel or value of a sample"

declare(__name__, {
    "activation_statistics.data": streamed(batches),
    "input_mean": either(told, (Tensor, plain_tensor), (object, number(told))),
    "input_variance": either(told, (Tensor, plain_tensor), (object, least_zero)),
    "correlation": number("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "correlations": choice(*get_args(Correlations)),
})  # fmt: skip
