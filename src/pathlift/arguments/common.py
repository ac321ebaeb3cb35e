"""Arguments that belong to no room: time, randomness, devices, what is told on the way."""

from __future__ import annotations

from pathlift.arguments.kinds import device, function, generator, least_zero, whole
from pathlift.arguments.registry import declare

done_of_all = function("a function of the number that is done and that of all", 2)

declare(__name__, {
    "device": device,
    "generator": generator,
    "progress": function("a function of the number that is done", 1),
    "seconds": least_zero,
    "seed": whole("a whole number of at most 64 bits"),
})  # fmt: skip
