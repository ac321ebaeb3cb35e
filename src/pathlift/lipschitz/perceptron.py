"""Bounds of the literature on the outputs of layered ReLU perceptrons: (2), Corollary G.1. No rescaling leaves them alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.lipschitz.outputs import Ball
from pathlift.metric.comparison import Comparison
from pathlift.metric.perceptron import Layered, layered
from pathlift.passes.rounding import rounding_factor


def _for_each_output(comparison: Comparison, ball: Ball, factors: Tensor, net: Layered) -> Tensor:
    if ball.radius != 0.0:
        raise InputError("This bound is about one input; it takes no radius. Use kind='per_input' or kind='activation'.")
    if net.distance == 0.0:
        factors = torch.zeros_like(factors)
    return (factors * (1.0 + rounding_factor(comparison.network))).expand(-1, net.outputs).clone()


def equation_2(comparison: Comparison, ball: Ball) -> Tensor:
    """Equation (2): (W·‖x‖_∞ + 1)·W·L²·R^{L−1}·‖θ−θ'‖_∞ for each output.

    With biases, too: |R_θ(x)−R_θ'(x)| ≤ L·R^{L−1}·(W·max(‖x‖_∞, 1) + 1)·‖θ−θ'‖_∞ for one output, which is less, by the
    recursion of Lemma F.1.

    Args:
        comparison: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    net = layered(comparison)
    return _for_each_output(comparison, ball, (net.width * ball.largest + 1) * (net.width * net.depth**2 * net.factor), net)


def corollary_g1(comparison: Comparison, ball: Ball) -> Tensor:
    """Corollary G.1: max(‖x‖_∞, 1)·2·L·W²·R^{L−1}·‖θ−θ'‖_∞ for each output; any signs, with biases or without.

    Args:
        comparison: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    net = layered(comparison)
    return _for_each_output(comparison, ball, ball.largest.clamp(min=1.0) * (2 * net.depth * net.width**2 * net.factor), net)
