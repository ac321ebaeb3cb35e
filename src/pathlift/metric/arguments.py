"""What may be asked of a path-metric."""

from __future__ import annotations

from pathlift.arguments import declare
from pathlift.arguments.kinds import count, function, number, whole

one_or_two = number("1 or 2 for the path-metric", lambda v: v in {1, 2})
any_moments = whole("0, 2, 4, 6 or 8", lambda v: v in {0, 2, 4, 6, 8})
positive = number("a positive number", lambda v: v > 0)
of_a_step = function("a function of a Step", 1)

declare(__name__, {
    "path_metric.q": one_or_two,
    "moments": whole("2, 4, 6 or 8", lambda v: v in {2, 4, 6, 8}),
    "path_metric.moments": any_moments,
    "path_metrics.moments": any_moments,
    "tighten": count,
    "ratio": number("a number of at least 1", lambda v: v >= 1),
    "path_metric.seconds": positive,
    "PathMetric.tighten.steps": count,
    "PathMetric.tighten.seconds": positive,
    "estimate": whole("0, or a whole number of at least 2: one path has no spread", lambda v: v == 0 or v >= 2),
    "PathMetric.estimate.samples": whole("a whole number of at least 2: one path has no spread", lambda v: v >= 2),
    "confidence": number("a number between 0 and 1", lambda v: 0 < v < 1),
    "path_metric.progress": of_a_step,
    "path_metric_bounds.progress": function("a function of a MetricBound", 1),
    "PathMetric.tighten.progress": of_a_step,
}, needed={("path_metric", "generator"): "estimate"})  # fmt: skip
