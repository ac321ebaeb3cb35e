"""One rule per operator family: what each ATen operator is in the model of mathematics §1, or why it is refused.

An operator without a rule is refused; none is ever guessed to be harmless.
"""

from pathlift.rules import (
    activation,
    affine,
    arithmetic,
    batch_norm,
    movement,
    order,
    outside,
    pooling,
    products,
    recurrent,
    resampling,
    sampling,
    selection,
)
from pathlift.rules.base import (
    MOVEMENTS,
    READS_WALLS,
    REASONS,
    RULES,
    Activation,
    Call,
    Draft,
    Forbidden,
    Refusal,
    Static,
    Walled,
    problem,
)
from pathlift.rules.replay import Operator

__all__ = [
    "MOVEMENTS",
    "READS_WALLS",
    "REASONS",
    "RULES",
    "Activation",
    "Call",
    "Draft",
    "Forbidden",
    "Operator",
    "Refusal",
    "Static",
    "Walled",
    "activation",
    "affine",
    "arithmetic",
    "batch_norm",
    "movement",
    "order",
    "outside",
    "pooling",
    "problem",
    "products",
    "recurrent",
    "resampling",
    "sampling",
    "selection",
]
