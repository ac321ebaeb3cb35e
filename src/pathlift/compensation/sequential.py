"""Pruning that is made up for with data: layer after layer, by what comes in now and what went out before (mathematics §9).

All samples go through the network as it was and the pruned one side by side. A weight w that multiplied u and now multiplies
ũ becomes the least-squares fit of w·u by v·ũ, so that it makes up for what the layers below have changed as well. A bias behind
it takes up the mean; mean and variance of every batch norm are moved as those of its input moved on the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from pathlift.compensation.least_squares import least_squares
from pathlift.compensation.sides import Place, SideBySide, Windows, standing_at_several_places
from pathlift.compensation.update import Update, blocks_of, fit_by_moments, joined, moments_of_masked
from pathlift.graph.calling import Samples
from pathlift.graph.network import Network
from pathlift.statistics.model import activation_model


def fitted_to_data(network: Network, pruned: Network, masks: Mapping[str, Tensor], batches: Sequence[Samples]) -> Update:
    """Make up for pruning, layer after layer.

    Args:
        network: The network as it was.
        pruned: The network with zeros.
        masks: Parameter name to bool mask.
        batches: Inputs.

    Returns:
        The network whose weights were fitted.

    Raises:
        InputError: There is no batch, or one is malformed.
        NumericalError: A weight is NaN or infinite.
    """
    return _Fit(network, pruned, masks, batches).update


class _Fit(SideBySide):
    """One way through both networks."""

    def __init__(self, network: Network, pruned: Network, masks: Mapping[str, Tensor], batches: Sequence[Samples]) -> None:
        self.update, self.masks = Update(pruned, "data"), masks
        shared = standing_at_several_places(network, masks)
        model = activation_model(network, batches if shared else None, correlations="channels", running="scaled")
        self.moments = moments_of_masked(model, masks, self.update.left)
        super().__init__(model, batches, self.moments.keys() - shared)
        for name in shared & self.moments.keys():
            fit_by_moments(self.update, network, self.moments[name], masks[name], variance=False)
        self.run()

    @property
    @override
    def state(self) -> Mapping[str, Tensor]:
        return self.update.network.state

    @override
    def renormalise(self, changed: dict[str, Tensor]) -> None:
        self.update.put(changed, corrected=True)

    @override
    def weigh(self, name: str, place: Place) -> None:
        """Fit the entries of a weight that stay."""
        mask, moments = self.masks[name], self.moments[name]
        if place.sides.same and bool(mask.all()):
            return
        device, following = moments.mean.device, moments.following
        before = moments.split(self.network.state[name].detach().double().to(device))
        keep = moments.split(mask.to(device))
        pieces = []
        shift: Tensor | float = 0.0
        for block in blocks_of(before.shape[1], before.shape[2]):
            seen = Windows.at(place, moments.correlations(block), block)
            if seen is None:
                self.update.left[name] = f"'{name}' multiplies several values at once with each of its entries."
                return
            second, cross = seen.moments(centred=self.takes_shifts(following))
            pieces.append(least_squares(before[:, :, block], keep[:, :, block], second, cross))
            shift = shift + seen.shift(before[:, :, block], pieces[-1])
        changed = {}
        if following is not None and following in self.network.parameters and self.takes_shifts(following):
            old = self.state[following]
            assert isinstance(shift, Tensor)
            changed[following] = (old.double() - shift.to(old.device)).to(old.dtype)
        self.update.take(name, joined(moments, torch.cat(pieces, 2), self.network.state[name], mask), changed)
