"""One rule per operator family: what each ATen operator is in the model of SPEC §1, or why it is refused.

An operator without a rule is refused; none is ever guessed to be harmless.
"""

from pathlift.rules import activation, affine, arithmetic, movement, order, outside, pooling, resampling
from pathlift.rules.base import MOVEMENTS, REASONS, RULES, Activation, Call, Forbidden, Layer, Refusal, Static, Walled, problem

__all__ = [
    "MOVEMENTS",
    "REASONS",
    "RULES",
    "Activation",
    "Call",
    "Forbidden",
    "Layer",
    "Refusal",
    "Static",
    "Walled",
    "activation",
    "affine",
    "arithmetic",
    "movement",
    "order",
    "outside",
    "pooling",
    "problem",
    "resampling",
]
