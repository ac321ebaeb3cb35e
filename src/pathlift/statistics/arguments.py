"""What activations are told about: moments of inputs, correlations, data."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

from pathlift.arguments import declare
from pathlift.arguments.common import done_of_all
from pathlift.arguments.kinds import batches, choice, count, either, least_zero, number, plain_tensor, positive_count
from pathlift.errors import InputError
from pathlift.reading.arguments import streamed
from pathlift.statistics.model import Correlations

finite_values = "a finite number, or a tensor of finite numbers, one for each channel or value of a sample"
finite = number(finite_values, math.isfinite)


def finite_tensor(name: str, value: Any) -> Tensor:
    """Finite numbers."""
    tensor = plain_tensor(name, value)
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name} holds NaN or inf: give {finite_values}.")
    return tensor


def no_less_than_zero(name: str, value: Any) -> Tensor:
    """Finite numbers of at least 0."""
    tensor = finite_tensor(name, value)
    if bool((tensor < 0).any()):
        raise InputError(f"{name} holds {float(tensor.min())}: a variance is at least 0.")
    return tensor


declare(__name__, {
    "activation_statistics.data": streamed(batches),
    "input_mean": either(finite_values, (Tensor, finite_tensor), (object, finite)),
    "input_variance": either(finite_values, (Tensor, no_less_than_zero), (object, least_zero)),
    "correlation": number("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "correlations": choice(*get_args(Correlations)),
    "synthetic_inputs.count": positive_count,
    "synthetic_inputs.steps": count,
    "synthetic_inputs.progress": done_of_all,
}, excluded={("activation_statistics", name): "data" for name in ("input_mean", "input_variance", "correlation")})  # fmt: skip
