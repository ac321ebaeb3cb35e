"""Bounds from both sides on ‖Φ(θ)−Φ(θ')‖₁ for any two networks of one architecture (SPEC §4).

`frame` compares both networks in one gauge, `moments` and `affinity` sum characters over all paths, `quadrature` turns the
sums into bounds, `tighten` and `dual` improve them step by step, `sampling` estimates what lies between.
"""

from pathlift.metric import arguments as arguments
