"""Criteria made of paths or of the rescaling orbit: no rescaling of neurons changes them, and they need no data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pathlift.network import Network
from pathlift.passes.magnitude import path_magnitude
from pathlift.passes.propagate import blame
from pathlift.passes.realise import flat_outputs, realise
from pathlift.pruning.scope import eligible
from pathlift.symmetry import symmetries
from pathlift.symmetry.kernel import on_paths


def path_magnitude_scores(network: Network, *, q: float = 1, x: Tensor | Sequence[Tensor] | None = None) -> dict[str, Tensor]:
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
        Name to scores, for every parameter that can be pruned; vectors are scored (P_i)^{1/q}.

    Raises:
        InputError: ``q`` or ``x`` is malformed.
        NumericalError: A weight is NaN or infinite.
    """
    return {name: _relative(share, q) for name, share in path_magnitude_scores(network, q=q, x=x).items()}


def _relative(share: Tensor, q: float) -> Tensor:
    if share.dim() < 2:
        return share.pow(1 / q)
    flat = share.flatten(2) if share.dim() > 2 else share.unsqueeze(2)
    into, out_of = flat.sum((1, 2), keepdim=True), flat.sum((0, 2), keepdim=True)
    least = torch.finfo(share.dtype).tiny
    score = (flat / into.clamp(min=least).sqrt()) / out_of.clamp(min=least).sqrt()
    return score.pow_(1 / q).view(share.shape)


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


@torch.enable_grad()
def synflow(network: Network) -> dict[str, Tensor]:
    """Score |θ_i|·∂R/∂|θ_i|, R the sum of the outputs of the network of all |weights|, fed with ones.

    It is path-magnitude when no max-pooling, no clamp and no nonlinearity but ReLU-like ones take part: R lets only the largest
    antecedent of a max-pooling neuron through. A batch norm counts as its scale and shift. Always in float64.

    Args:
        network: The network.

    Returns:
        Name to scores, for every parameter that can be pruned, float64, relative to R.

    Raises:
        NumericalError: A weight is NaN or infinite.

    References:
        Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic flow",
        NeurIPS 2020.
    """
    names = eligible(network)
    parameters = {name: network.state[name].detach().double().abs().requires_grad_() for name in names}
    values = network.values({**network.state, **parameters})
    blame({leaf: value.detach() for leaf, value in values.items()})
    magnitudes = {leaf: value.abs() for leaf, value in values.items()}
    feed = {
        node.name: torch.ones((1, *node.shape), dtype=torch.float64, device=network.device)
        for node in network.nodes
        if node.kind == "input"
    }
    found = realise(network, magnitudes, feed, torch.float64)
    whole = flat_outputs(network, found, 1).sum()
    unit = whole.detach() if float(whole) > 0 else 1.0  # without any path all gradients are 0
    gradients = torch.autograd.grad(whole / unit, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(own).detach() if gradient is None else (own * gradient).detach()
        for (name, own), gradient in zip(parameters.items(), gradients, strict=True)
    }
