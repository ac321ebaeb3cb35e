"""Criteria made of paths or of the rescaling orbit: no rescaling of neurons changes them, and they need no data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pathlift.graph.axes import Axes, channel_axes
from pathlift.graph.calling import Samples
from pathlift.graph.network import Network
from pathlift.magnitude import magnitudes, path_magnitude
from pathlift.precision import without_autocast
from pathlift.pruning.criteria.antecedent import one_antecedent
from pathlift.pruning.scope import eligible
from pathlift.rescaling import symmetries
from pathlift.rescaling.conditioning import on_paths


def path_magnitude_scores(network: Network, *, q: float = 1, x: Samples | None = None) -> dict[str, Tensor]:
    """Score by `pathlift.path_magnitude`: the share of the path-norm that goes through a weight, (10)–(14).

    Args:
        network: The network.
        q: Order; see `pathlift.path_magnitude`.
        x: Inputs whose mean |x|^q the paths start with; None for ones.

    Returns:
        Name to scores, for every parameter that can be pruned.

    Raises:
        InputError: ``q`` or ``x`` is malformed.
        NumericalError: A weight is NaN or infinite.
    """
    shares = path_magnitude(network, q=q, x=x)
    return {name: shares[name] for name in eligible(network)}


def relative_path_magnitude(network: Network, *, q: float = 2, x: Tensor | Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """Score the ℓ^q path mass of a weight relative to that of the two channels it joins.

    With P_i the share of Σ_p |Φ_p|^q through weight i, R_v the sum of P over the weights of its tensor into the same
    output channel v and C_u that over the weights from the same input channel u, the score is (P_i/√(R_v·C_u))^{1/q}. For
    a perceptron without biases it is |θ_i| in that representative of the orbit in which as much path mass comes in to
    each neuron as goes out, A(v) = G(v). In a layer of equal weights it is of the size of a weight at initialisation, so
    the scores of layers of all widths can compete, which shares of a total that is 1 in every layer cannot.

    Args:
        network: The network.
        q: Order; see `pathlift.path_magnitude`.
        x: Inputs whose mean |x|^q the paths start with; None for ones.

    Returns:
        Name to scores, for every parameter that can be pruned; biases and others that act element by element, and those
        without channels (`pathlift.graph.axes`), are scored (P_i)^{1/q}.

    Raises:
        InputError: ``q`` or ``x`` is malformed.
        NumericalError: A weight is NaN or infinite.
    """
    shares = path_magnitude_scores(network, q=q, x=x)
    axes = channel_axes(network, list(shares))
    return {name: _relative(share, axes[name], q) for name, share in shares.items()}


def _relative(share: Tensor, axes: Axes, q: float) -> Tensor:
    """Score the shares of one parameter, in their own memory."""
    pieces = [piece for piece in axes.pieces if not piece.elementwise]
    least = torch.finfo(share.dtype).tiny
    for piece in pieces:
        blocks = piece.blocks(share)
        into, out_of = blocks.sum((2, 3), keepdim=True), blocks.sum((1, 3), keepdim=True)
        blocks.div_(into.clamp_(min=least).sqrt_()).div_(out_of.clamp_(min=least).sqrt_())
        share = piece.put(blocks, share)
    return share.pow_(1 / q)


@torch.no_grad()
def balanced_magnitude(network: Network) -> dict[str, Tensor]:
    """Score |θ_i| in the representative of the rescaling orbit with the smallest ‖θ‖₂ (`Symmetries.balance`).

    Weights on no path of non-zero weights score 0: nothing fixes the scale of their neurons.

    Args:
        network: The network.

    Returns:
        Name to scores, for every parameter that can be pruned.

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    state, there = symmetries(network).balance(), on_paths(network)
    return {
        name: torch.where(there[name], state[name].abs(), 0) if name in there else torch.zeros_like(state[name])
        for name in eligible(network)
    }


@torch.no_grad()
def synflow(network: Network) -> dict[str, Tensor]:
    """Score |θ_i|·∂R/∂|θ_i| relative to R, the sum of the outputs of the network of all |weights|, fed with ones.

    It is path-magnitude but for max-pooling: R lets only the largest antecedent of a neuron that takes an extremum through,
    which a path-norm adds up. A batch norm counts as its scale and shift, a subtraction as a sum. Works at any depth.

    Args:
        network: The network.

    Returns:
        Name to scores, for every parameter that can be pruned.

    Raises:
        NumericalError: A weight is NaN or infinite.

    References:
        Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic flow",
        NeurIPS 2020.
    """
    with without_autocast():
        shares = magnitudes(one_antecedent(network))
    return {name: shares[name] for name in eligible(network)}
