"""‖Φ(θ)−Φ(θ')‖₁ of any two networks of one architecture: exact, or bounds from both sides (mathematics §4).

| what | file: function |
| --- | --- |
| the path-metric, and a result that can be improved | `metric`: `path_metric`, `PathMetric` |
| Lemma 4.2, exact for ordered weights | `exact`: `ordered_difference`; ℓ²: `squared_difference` |
| (6) and the pivot | `bracket`: `pivot_bounds` |
| the moment bounds | `moments`: `moment_sums`, `moment_bounds`; `quadrature`: `root_above`, `root_below` |
| the comparison weights g of the moments | `comparison_weights`: `chosen` |
| affinities (Hellinger for order 2) | `affinities`: `affinity_bounds` |
| the best of all bounds, step by step | `bracket`: `bracketed`; `tightening` |
| the estimate from sampled paths | `sampling`: `estimated` |
| Lemma 4.3 (8), Lemma 4.4 (9), Lemma F.1, Theorem F.2 | `lemmas`: `lemma_4_3`, `lemma_4_4`, `lemma_f1`, `theorem_f2` |
| all of the paper's bounds in one table | `paper_bounds`: `path_metric_bounds` |
| both networks in one gauge | `common_gauge`: `in_common_gauge` |

Bounds on what networks compute, Theorem 4.1 (5) and equation (2) among them, are in `pathlift.lipschitz`.
"""

from pathlift.metric import arguments as arguments
from pathlift.metric.bracket import Step
from pathlift.metric.metric import PathMetric, path_metric
from pathlift.metric.paper_bounds import MetricBound, path_metric_bounds
from pathlift.metric.sampling import Estimate

__all__ = [
    "Estimate",
    "MetricBound",
    "PathMetric",
    "Step",
    "path_metric",
    "path_metric_bounds",
]
