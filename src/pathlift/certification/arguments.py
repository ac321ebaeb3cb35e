"""What tolerances, and the samples to certify or to attack, may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pathlift.arguments import declare
from pathlift.arguments.kinds import any_generator, batches, choice, count, either, least_zero, number, numbers, whole
from pathlift.lipschitz.arguments import one_of_set
from pathlift.pruning.arguments import scores
from pathlift.reading.arguments import streamed


def labelled(name: str, value: Any) -> Any:
    """A batch, which may come as (inputs, labels); that what follows is inputs is seen when the model is known."""
    if isinstance(value, (list, tuple)) and value:
        return (batches(name, value[0]), *value[1:])
    return batches(name, value)


declare(__name__, {
    "tolerance": one_of_set,
    "attack.x": batches,
    "certify.x": streamed(labelled),
    "certified_radius.x": streamed(labelled),
    "radii": numbers("a list of at least one finite number that is not negative", least_zero, least=1),
    "Absolute.r": least_zero,
    "Relative.r": least_zero,
    "bits": whole("a whole number from 2 to 64", lambda v: 2 <= v <= 64),
    "per": choice("channel", "tensor"),
    "step": least_zero,
    "Pruned.amount": number("a share from 0 to 1", lambda v: 0 <= v <= 1),
    "Pruned.criterion": either(
        "path_magnitude, magnitude, or scores by parameter name",
        (str, choice("path_magnitude", "magnitude")), (Mapping, scores),
    ),
    "attack.steps": count,
    "attack.restarts": count,
    "splits": count,
    "attack.generator": any_generator,
})  # fmt: skip
