"""Rescaling symmetries: the groups of a network, representatives of its orbit, and comparing networks modulo rescaling."""

from pathlift.rescaling import arguments as arguments
from pathlift.rescaling.equivalence import Equivalence, align, equivalent, rescaling_distance
from pathlift.rescaling.groups import (
    BalancedState,
    Family,
    Pinned,
    RescaledState,
    Symmetries,
    axes_text,
    symmetries,
    with_state,
)

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
