"""What may be asked of a path-metric."""

from __future__ import annotations

from pathlift.arguments import declare
from pathlift.arguments.kinds import count, function, number, whole

one_or_two = number("1 or 2 for the path-metric", lambda v: v in {1, 2})

declare(__name__, {
    "path_metric.q": one_or_two,
    "moments": whole("2, 4, 6 or 8", lambda v: v in {2, 4, 6, 8}),
    "tighten": count,
    "ratio": number("a number of at least 1", lambda v: v >= 1),
    "path_metric.seconds": number("a positive number", lambda v: v > 0),
    "estimate": whole("0, or a whole number of at least 2: one path has no spread", lambda v: v == 0 or v >= 2),
    "confidence": number("a number between 0 and 1", lambda v: 0 < v < 1),
    "path_metric.progress": function("a function of a Step", 1),
}, needed={("path_metric", "confidence"): "estimate", ("path_metric", "seed"): "estimate"})  # fmt: skip
