"""What losses, samples and the boxes around weights may be."""

from __future__ import annotations

from typing import get_args

from pathlift.arguments import declare
from pathlift.arguments.kinds import batches, choice, count, number, positive, positive_count
from pathlift.consequences.flatness import Loss

declare(__name__, {
    "sharpness.x": batches,
    "sharpness.steps": count,
    "loss": choice(*get_args(Loss)),
    "r": number("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "samples": positive_count,
    "input_bound": positive,
    "loss_lipschitz": positive,
    "loss_range": positive,
})  # fmt: skip
