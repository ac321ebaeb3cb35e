"""What a set of networks around one may be, and what may be asked of a bound."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from torch import nn

from pathlift.arguments import declare
from pathlift.arguments.kinds import anything, batches, choice, either, file, least_zero, module_with_values
from pathlift.graph.arguments import captured, state
from pathlift.graph.network import Network
from pathlift.lipschitz.bound import Kind
from pathlift.norm import finite_order
from pathlift.passes.box import Tolerance
from pathlift.reading.arguments import streamed

one_of_set = either(
    "Relative, Absolute, Rounding, Pruned, a module, a captured Network, a state-dict or a file of weights",
    (Tolerance, anything), (nn.Module, module_with_values), (Network, captured), (Mapping, state), ((str, Path), file),
)  # fmt: skip

declare(__name__, {
    "expected_bound.other": one_of_set,
    "lipschitz_bound.other": one_of_set,
    "expected_bound.q": finite_order,
    "batches": streamed(batches),
    "kind": choice(*get_args(Kind)),
    "radius": least_zero,
})  # fmt: skip
