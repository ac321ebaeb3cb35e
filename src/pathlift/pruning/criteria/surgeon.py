"""What a weight costs when those that stay in its row make up for it: optimal brain surgery without data (mathematics §9)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pathlift.compensation.damping import damped
from pathlift.compensation.least_squares import DAMPING
from pathlift.compensation.update import blocks_of
from pathlift.graph.calling import Samples
from pathlift.graph.network import Network
from pathlift.pruning.scope import prunable
from pathlift.statistics import InputMoments, activation_model, input_moments
from pathlift.statistics.model import DOUBT


@torch.no_grad()
def output_error(
    network: Network, *, x: Samples | None = None, moments: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> dict[str, Tensor]:
    """Score g(o)·w_oj²/(A⁻¹)_jj: the least expected change E‖ΔR‖² of the outputs when weight j of row o goes.

    A is the damped second moment of what the row multiplies, or its covariance where a bias or a batch norm behind it takes up
    the mean; g the sensitivity of the outputs to the row. No rescaling changes the scores: what batch norms read has the
    variance that propagation gives, or the data, not the running variance, which a rescaling leaves as it is.

    Args:
        network: The network.
        x: Inputs to measure the statistics on, shape (samples, …), one tensor per input of the model; None to propagate them.
        moments: Input layer to mean and variance, broadcastable to its shape, to propagate them from; 0 and 1 for others.

    Returns:
        Name to scores, for the weights of convolutions and linear layers, float64.

    Raises:
        InputError: ``x`` is malformed, or a weight has no rows of several columns.
        NumericalError: A weight is NaN or infinite, or numbers leave the range of float64.

    References:
        Hassibi, Stork, "Second order derivatives for network pruning: optimal brain surgeon", NeurIPS 1992.
    """
    model = activation_model(
        network, None if x is None else [x], moments=moments, correlations="channels", running="none", doubt=DOUBT
    )
    return {name: _scores(network.state[name].detach().double(), input_moments(model, name)) for name in prunable(network)}


def _scores(weight: Tensor, moments: InputMoments) -> Tensor:
    rows = moments.split(weight.to(moments.mean.device))
    parts = []
    for block in blocks_of(rows.shape[1], rows.shape[2]):
        factored = damped(moments.blocks(block, centred=moments.following is not None), DAMPING)
        alone = torch.cholesky_inverse(factored.lower).diagonal(dim1=1, dim2=2)
        size = torch.where(factored.alive, factored.scale / alone.sqrt(), 0.0)
        parts.append((rows[:, :, block] * size[:, None, :]).square())
    scores = torch.cat(parts, 2) * moments.sensitivity[:, :, None]
    return moments.join(scores, torch.zeros_like(weight)).reshape(weight.shape)
