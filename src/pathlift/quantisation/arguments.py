"""What grids, ways of rounding and numbers of bits may be."""

from __future__ import annotations

from collections.abc import Mapping

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
    positive,
    positive_count,
    whole,
)
from pathlift.metric.arguments import any_moments
from pathlift.quantisation.formats import FLOATS, MOST_BITS
from pathlift.quantisation.gauge import GAUGES
from pathlift.quantisation.ranges import RANGES
from pathlift.quantisation.report import QuantizeReport
from pathlift.quantisation.rounding import ROUNDINGS
from pathlift.quantisation.spending import Bytes
from pathlift.reading.arguments import streamed

some_bits = either(
    f"2 to {MOST_BITS} bits, or one of {', '.join(FLOATS)}",
    (str, choice(*FLOATS)), (object, whole(f"2 to {MOST_BITS}", lambda v: 2 <= v <= MOST_BITS)),
)  # fmt: skip
bits_or_float = either("bits, or None", (type(None), anything), (object, some_bits))

declare(__name__, {
    "quantize.bits": either(
        "a number of bits, a floating-point format, or patterns to either",
        (Mapping, mapping("a mapping from name patterns to bits", bits_or_float)), (object, some_bits),
    ),
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
    "quantized": module_with_values,
    "report": instance("the report that quantize returned", QuantizeReport),
    "budget": either("bits of a weight on average, or Bytes", (Bytes, anything), (object, positive)),
    "Bytes.count": positive_count,
    "quantize.data": streamed(batches),
    "quantize.moments": any_moments,
    "quantize.progress": done_of_all,
})  # fmt: skip
