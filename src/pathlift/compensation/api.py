"""A whole network is pruned by masks, and what stays makes up for what goes (mathematics §9).

Without data each weight is fitted to what it was by propagated moments, with the correlations between channels: without these
there would be nothing for the weights that stay to do. With data see `pathlift.compensation.sequential`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pathlift.compensation.sequential import fitted_to_data
from pathlift.compensation.update import Update, fit_by_moments, moments_of_masked
from pathlift.graph.calling import Samples
from pathlift.graph.network import Network
from pathlift.statistics.model import DOUBT, activation_model


@torch.no_grad()
def compensated(
    network: Network,
    masks: Mapping[str, Tensor],
    data: Iterable[Samples] | None = None,
    declared: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Update:
    """Prune a network by masks and make up for it.

    Args:
        network: The network as it was.
        masks: Parameter name to bool mask, true where an entry stays.
        data: Batches of inputs, all of which are held in memory, to measure second moments on; None to propagate them.
        declared: Input layer to mean and variance, from which they are propagated; 0 and 1 for others.

    Returns:
        The pruned network, with zeros where the masks say so.

    Raises:
        InputError: There is no batch in the data, or one is malformed.
        NumericalError: A weight is NaN or infinite, or numbers leave the range of float64.
    """
    network = replace(network, state=dict(network.state))
    pruned = replace(network, state={name: _masked(tensor, masks.get(name)) for name, tensor in network.state.items()})
    if data is not None:
        return fitted_to_data(network, pruned, masks, list(data))
    if all(bool(mask.all()) for mask in masks.values()):
        return Update(pruned, "propagation")
    model = activation_model(network, moments=declared, correlations="channels", running="checked", doubt=DOUBT)
    update = Update(pruned, model.source)
    for name, moments in moments_of_masked(model, masks, update.left).items():
        fit_by_moments(update, network, moments, masks[name], variance=True)
    return update


def _masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return a tensor with zeros; the tensor itself where nothing goes."""
    if mask is None or bool(mask.all()):
        return tensor
    return torch.where(mask.to(tensor.device), tensor.detach(), torch.zeros_like(tensor))
