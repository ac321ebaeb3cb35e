"""What grids, ways of rounding and numbers of bits may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pathlift.arguments import declare
from pathlift.arguments.common import done_of_all
from pathlift.arguments.kinds import (
    anything,
    batches,
    choice,
    either,
    flag,
    instance,
    mapping,
    module_with_values,
    numbers,
    positive,
    positive_count,
    refusal,
    shown,
    whole,
)
from pathlift.errors import InputError, nearest
from pathlift.graph.network import Network
from pathlift.metric.arguments import any_moments
from pathlift.quantisation.formats import FLOATS, MOST_BITS
from pathlift.quantisation.gauge import GAUGES
from pathlift.quantisation.ranges import RANGES
from pathlift.quantisation.report import QuantizeReport
from pathlift.quantisation.rounding import ROUNDINGS
from pathlift.quantisation.spending import Bytes
from pathlift.reading.arguments import streamed


def some_bits(name: str, value: Any) -> int | str:
    """A number of bits, or a floating-point format."""
    if isinstance(value, str) and value in FLOATS:
        return value
    what = f"2 to {MOST_BITS}, or one of {', '.join(FLOATS)}"
    if isinstance(value, str):
        raise InputError(f"{name} must be {what}, found {shown(value)}.{nearest(value[:60], FLOATS)}")
    number: int = whole(what, lambda bits: 2 <= bits <= MOST_BITS)(name, value)
    return number


def ends(name: str, value: Any) -> tuple[float, float]:
    """A range that holds 0."""
    what = "two finite numbers, the smaller first, with 0 between them"
    low, high = (*numbers(what, least=2)(name, value), math.nan)[:2]
    if len(value) != 2 or not -math.inf < low <= 0 <= high < math.inf or low == high:
        raise refusal(name, what, value)
    return low, high


bits_or_float = either("bits, or None", (type(None), anything), (object, some_bits))

bits_by_name = either(
    "a number of bits, a floating-point format, or patterns to either",
    (Mapping, mapping("a mapping from name patterns to bits", bits_or_float)),
    (object, some_bits),
)

declare(__name__, {
    "quantize.bits": bits_by_name,
    "layer_sensitivities.bits": bits_by_name,
    "layer_sensitivities.data": streamed(batches),
    "layer_sensitivities.progress": done_of_all,
    "granularity": either(
        "channel, tensor, or a number of input channels for each scale", (str, choice("channel", "tensor")), (object,
        positive_count)
    ),
    "rounding": choice(*ROUNDINGS),
    "quantize.gauge": choice(*GAUGES),
    "range": choice(*RANGES),
    "affine": flag,
    "ends": some_bits,
    "correction": choice("mean", "variance", "none"),
    "bits_needed.tolerance": positive,
    "quantized": either(
        "the module or network that quantize returned", (Network, anything), (object, module_with_values)
    ),
    "save_onnx.activations": either("ranges by name of a weight", (Mapping, mapping("ranges by name of a weight", ends))),
    "deviations": positive,
    "activation_ranges.data": streamed(batches),
    "report": instance("the report that quantize returned", QuantizeReport),
    "budget": either("bits of a weight on average, or Bytes", (Bytes, anything), (object, positive)),
    "Bytes.count": positive_count,
    "quantize.data": streamed(batches),
    "quantize.moments": either("0, 2, 4, 6 or 8, or None", (type(None), anything), (object, any_moments)),
    "sequential": flag,
    "quantize.progress": done_of_all,
}, excluded={("activation_ranges", name): "data" for name in ("deviations", "input_mean", "input_variance")},
   needed={("quantize", "sequential"): "data"})  # fmt: skip
