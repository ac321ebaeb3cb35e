"""Rescaling symmetries: the groups of a network, representatives of its orbit, and comparing networks modulo rescaling."""

from pathlift.symmetry.compare import Equivalence, align, equivalent, rescaling_distance
from pathlift.symmetry.groups import BalancedState, Family, Pinned, RescaledState, Symmetries, axes_text, symmetries, with_state

__all__ = [
    "BalancedState",
    "Equivalence",
    "Family",
    "Pinned",
    "RescaledState",
    "Symmetries",
    "align",
    "axes_text",
    "equivalent",
    "rescaling_distance",
    "symmetries",
    "with_state",
]
