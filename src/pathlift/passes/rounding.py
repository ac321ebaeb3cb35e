"""How far a computed number can be from the exact one (SPEC §8): counts of roundings, and what they amount to.

A sum of n products computed in floating point, in any order, is the exact sum for weights that are off by a relative
error of at most n·u (u: the unit roundoff). So rounding is a change of weights like any other: a pass of non-negative
terms has a relative error of at most (roundings on the longest chain)·u, and a signed one is covered by letting every
weight of a neuron vary by n·u. Winograd and FFT convolutions and TF32 are outside this model of arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pathlift.network import Network, Node
from pathlift.passes.propagate import walk
from pathlift.passes.realise import carried, weighted

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Unit roundoff of each precision."""

SPARE = 8
"""Roundings per neuron besides those of its sum: weights made from parameters, exponents, a nonlinearity."""


@torch.no_grad()
def fan_in(network: Network) -> dict[str, int]:
    """Count the summands of a neuron, for each node: edges into it and biases, at most.

    Args:
        network: The graph; a compact one is cheaper and has the same counts.

    Returns:
        Node name to the largest count among its neurons.
    """
    values = network.values()
    ones = weighted(values, dtype=torch.float64, transform=torch.ones_like)
    there = weighted(values, dtype=torch.float64, transform=_there)
    counts: dict[str, int] = {}

    def step(node: Node, below: Mapping[str, Tensor]) -> Tensor:
        if node.kind == "input" or not node.terms:
            counts[node.name] = len(node.starts)
        else:
            edges = carried(node, below, lambda leaf: ones(leaf) if leaf.score_name is not None else there(leaf))
            counts[node.name] = int(edges.max()) + len(node.starts)
        return torch.ones((1, *node.shape), dtype=torch.float64, device=network.device)

    walk(network, step)
    return counts


def _there(value: Tensor) -> Tensor:
    """1 where a constant is an edge."""
    return (value != 0).to(value.dtype)


def chain(network: Network, spare: int = SPARE) -> int:
    """Return the number of roundings on the longest chain from an input to an output, the final sum included.

    Args:
        network: The graph.
        spare: Roundings per neuron besides those of its sum.

    Returns:
        The number.
    """
    depth: dict[str, int] = {}
    for node in network.nodes:
        below = max((depth[term.source] for term in node.terms), default=0)
        depth[node.name] = below + network.fan_in[node.name] + spare
    outputs = sum(math.prod(network.node[name].full_shape) for name in network.outputs)
    return max(depth[name] for name in network.outputs) + outputs


def rounding_factor(network: Network, dtype: torch.dtype = torch.float64, tracks: int = 4, spare: int = SPARE) -> float:
    """Bound the relative error of a non-negative pass: (roundings on the longest chain)·u.

    Args:
        network: The graph.
        dtype: Precision of the pass.
        tracks: How many tracks may add up in one neuron.
        spare: See `chain`.

    Returns:
        The bound.
    """
    return tracks * chain(network, spare) * UNIT[dtype]
