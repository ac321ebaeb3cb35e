"""Edge maps: how the weights of an operator join the neurons below to the neurons above.

An edge map is bilinear: out[v] = Σ_{u→v} x[u]·w[k(u→v)]. It knows the wiring only. Which weights run along it (|θ|,
|θ|−|θ'|, θ·θ', a power) is the business of the pass, so each quantity of the paper is written once for all operators.
Next to the sum each map has its (max, ×) form, for q = ∞.
"""

from pathlift.edges.base import Edges
from pathlift.edges.contraction import AxisMap, Contraction, Dense
from pathlift.edges.convolution import Convolution
from pathlift.edges.movement import Move
from pathlift.edges.unit import Identity, Overlap, Scale
from pathlift.edges.weights import Weights
from pathlift.edges.window import Reduce, Window

__all__ = [
    "AxisMap",
    "Contraction",
    "Convolution",
    "Dense",
    "Edges",
    "Identity",
    "Move",
    "Overlap",
    "Reduce",
    "Scale",
    "Weights",
    "Window",
]
