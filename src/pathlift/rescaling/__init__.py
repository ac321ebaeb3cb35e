"""Rescaling symmetries: the groups of a network, representatives of its orbit, and comparing networks modulo rescaling."""

from pathlift.rescaling import arguments as arguments
from pathlift.rescaling.equivalence import Equivalence, align, equivalent, rescaling_distance
from pathlift.rescaling.families import Family, Pinned
from pathlift.rescaling.groups import Symmetries, symmetries
from pathlift.rescaling.states import BalancedState, RescaledState, with_state

__all__ = [
    "BalancedState",
    "Equivalence",
    "Family",
    "Pinned",
    "RescaledState",
    "Symmetries",
    "align",
    "equivalent",
    "rescaling_distance",
    "symmetries",
    "with_state",
]
