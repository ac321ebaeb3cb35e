"""Pruning that is made up for with data: layer after layer, by what comes in now and what went out before (mathematics §9).

All samples go through the network as it was and the pruned one side by side. A weight w that multiplied u and now multiplies
ũ becomes the least-squares fit of w·u by v·ũ, so that it makes up for what the layers below have changed as well. A bias behind
it takes up the mean; mean and variance of every batch norm are moved as those of its input moved on the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pathlift.compensation.correction import scaled
from pathlift.compensation.least_squares import least_squares
from pathlift.compensation.update import Update, blocks_of, fit_by_moments, joined, moments_of_masked
from pathlift.edges.weights import Weights
from pathlift.errors import InputError
from pathlift.graph.calling import Samples
from pathlift.graph.expressions import Normalisation, StateTensor, evaluate
from pathlift.graph.layers import Connection, Extremum, Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.forward import Below, carried, feed_of, respond, unchanged
from pathlift.passes.propagate import blame, in_forward_order
from pathlift.statistics.input_moments import InputMoments
from pathlift.statistics.measure import columns_of
from pathlift.statistics.model import activation_model
from pathlift.statistics.transfer import Weighted

SAMPLES = 32
"""Samples that go through a layer at once."""


@dataclass(frozen=True, eq=False)
class Sides:
    """The values of a layer, in parts of `SAMPLES` samples: of the network as it was, and of the pruned one.

    Attributes:
        before: Tensors of shape (samples, *layer.shape).
        now: The same; the same object where nothing has changed.
    """

    before: Sequence[Tensor]
    now: Sequence[Tensor]

    @property
    def same(self) -> bool:
        """Whether nothing has changed."""
        return self.now is self.before


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
    if not batches:
        raise InputError("data holds no batch: give at least one.")
    feeds = [feed_of(network, batch) for batch in batches]
    blame(network.values())
    return _Fit(network, pruned, masks, feeds, batches).run()


class _Fit:
    """One way through both networks."""

    def __init__(
        self,
        network: Network,
        pruned: Network,
        masks: Mapping[str, Tensor],
        feeds: Sequence[Below],
        batches: Sequence[Samples],
    ) -> None:
        self.network, self.masks, self.feeds = network, masks, feeds
        self.update = Update(pruned, "data")
        uses = Counter(
            name
            for layer in network.layers
            for connection in layer.connections
            if connection.weight is not None
            for name in connection.weight.requires & masks.keys()
        )
        several = {name for name in masks if uses[name] > 1}
        model = activation_model(network, batches if several else None, correlations="channels" if several else "taps")
        self.bundles = model.propagation.bundles
        self.moments = moments_of_masked(model, masks, self.update.left)
        for name in several & self.moments.keys():  # what they will multiply at the second place is not known at the first
            fit_by_moments(self.update, network, self.moments[name], masks[name], variance=False)
        self.single = {name: moments for name, moments in self.moments.items() if name not in several}
        self.norms = Counter(
            norm.mean.name
            for layer in network.layers
            if (norm := layer.normalisation()) is not None and isinstance(norm.mean, StateTensor)
        )

    def run(self) -> Update:
        in_forward_order(self.network, self._step)
        return self.update

    def _weights(self, network: Network, weight: WeightTensor) -> Weights:
        if weight.scalar is not None:
            value = torch.tensor(weight.scalar, dtype=torch.float64)
        else:
            value = torch.as_tensor(evaluate(weight.expression, network.state))
        return Weights((value.detach(),), unchanged, self.network.dtype)

    def _step(self, layer: Layer, below: Mapping[str, Sides]) -> Sides:
        if layer.kind == "input":
            dtype = self.network.dtype
            parts = [part for feed in self.feeds for part in feed[layer.name].to(dtype).split(SAMPLES)]
            return Sides(parts, parts)
        norm = layer.normalisation()
        if norm is not None:
            self._estimated(norm, below[layer.connections[0].source])
        if not isinstance(layer.nonlinearity, Extremum):
            for position, connection in enumerate(layer.connections):
                self._fitted(layer, position, connection, below[connection.source])
        before = self._values(self.network, layer, {name: sides.before for name, sides in below.items()})
        weights = [connection.weight for connection in layer.connections] + [bias.weight for bias in layer.biases]
        names = {name for weight in weights if weight is not None for name in weight.requires}
        sources = [below[connection.source] for connection in layer.connections]
        state, old = self.update.network.state, self.network.state
        if all(sides.same for sides in sources) and all(state[name] is old[name] for name in names):
            return Sides(before, before)
        now = self._values(self.update.network, layer, {name: sides.now for name, sides in below.items()})
        return Sides(before, now)

    def _values(self, network: Network, layer: Layer, below: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        weights_of = partial(self._weights, network)
        sources = {connection.source for connection in layer.connections}
        count = max((len(below[source]) for source in sources), default=1)
        made = []
        for part in range(count):
            values = {source: below[source][part if len(below[source]) > 1 else 0] for source in sources}
            if layer.nonlinearity is not None:
                made.append(respond(layer, values, weights_of))
            else:
                made.append(carried(layer, values, weights_of, biases=weights_of))
        return made

    # ---- weights

    def _fitted(self, layer: Layer, position: int, connection: Connection, sides: Sides) -> None:
        """Fit the weight of a bundle of edges."""
        names = () if connection.weight is None else connection.weight.requires & self.single.keys()
        for name in names:
            mask, moments = self.masks[name], self.single[name]
            if sides.same and bool(mask.all()):
                continue
            transfer = self.bundles(layer)[position]
            assert isinstance(transfer, Weighted)
            self._fit(layer, connection, transfer, moments, mask, sides)

    def _fit(
        self, layer: Layer, connection: Connection, transfer: Weighted, moments: InputMoments, mask: Tensor, sides: Sides
    ) -> None:
        name, device = moments.name, moments.mean.device
        before = moments.split(self.network.state[name].detach().double().to(device))
        keep = moments.split(mask.to(device))
        pieces = []
        shift: Tensor | float = 0.0
        for block in blocks_of(before.shape[1], before.shape[2]):
            seen = _Windows.of(layer, connection, transfer, sides, block)
            if seen is None:
                self.update.left[name] = f"'{name}' multiplies several values at once with each of its entries."
                return
            new = least_squares(before[:, :, block], keep[:, :, block], *seen.moments(centred=moments.following is not None))
            pieces.append(new)
            shift = shift + (new @ seen.now[:, :, None] - before[:, :, block] @ seen.before[:, :, None]).reshape(-1)
        following = {}
        bias = moments.following
        if bias is not None and bias in self.network.parameters:
            old = self.update.network.state[bias]
            assert isinstance(shift, Tensor)
            following[bias] = (old.double() - shift.to(old.device)).to(old.dtype)
        self.update.take(name, joined(moments, torch.cat(pieces, 2), self.network.state[name], mask), following)

    # ---- batch norms

    def _estimated(self, norm: Normalisation, sides: Sides) -> None:
        """Move running mean and running variance as mean and variance of the input have moved on the data."""
        mean, variance = norm.mean, norm.variance
        if sides.same or not isinstance(mean, StateTensor) or not isinstance(variance, StateTensor):
            return
        if self.norms[mean.name] > 1:  # one batch norm at several places
            return
        (first, spread), (other, widened) = _channel_moments(sides.before), _channel_moments(sides.now)
        state = self.update.network.state
        old = state[mean.name]
        moved = (old.double() + (other - first).to(old.device)).to(old.dtype)
        changed = {mean.name: moved, variance.name: scaled(state[variance.name], spread, widened)}
        self.update.put(
            {name: tensor for name, tensor in changed.items() if not torch.equal(tensor, state[name])}, corrected=True
        )


def _channel_moments(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel over samples and positions, float64."""
    dims = [dim for dim in range(parts[0].dim()) if dim != 2]
    count = sum(part.numel() // part.shape[2] for part in parts)
    mean = torch.stack([part.double().sum(dims) for part in parts]).sum(0) / count
    shape = [-1 if dim == 2 else 1 for dim in range(parts[0].dim())]
    spread = torch.stack([(part.double() - mean.reshape(shape)).square().sum(dims) for part in parts]).sum(0) / count
    return mean, spread


@dataclass
class _Windows:
    """Sums over all windows of what a weight multiplied before, u, and multiplies now, ũ; then means.

    Attributes:
        now: E ũ, (groups, columns).
        before: E u.
        second: E ũũᵀ, (groups, columns, columns).
        cross: E ũuᵀ; None where both are the same.
    """

    now: Tensor
    before: Tensor
    second: Tensor
    cross: Tensor | None

    @staticmethod
    def of(layer: Layer, connection: Connection, transfer: Weighted, sides: Sides, block: slice) -> _Windows | None:
        """Look at all samples; None where no windows can be told apart."""
        count, total = 0, None
        for before, now in zip(sides.before, sides.now, strict=True):
            for first, second in zip(before, now, strict=True):
                u = columns_of(connection.edges, transfer, first, layer.shape)
                changed = u if sides.same else columns_of(connection.edges, transfer, second, layer.shape)
                if u is None or changed is None:
                    return None
                u, changed = u[:, :, block], changed[:, :, block]
                count += u.shape[1]
                parts = [changed.sum(1), u.sum(1), changed.mT @ changed]
                parts += [] if sides.same else [changed.mT @ u]
                total = parts if total is None else [one + other for one, other in zip(total, parts, strict=True)]
        assert total is not None
        now_mean, mean, moment, *cross = (part / count for part in total)
        return _Windows(now_mean, mean, moment, cross[0] if cross else None)

    def moments(self, *, centred: bool) -> tuple[Tensor, Tensor | None]:
        """Return E ũũᵀ and E ũuᵀ, or the covariances."""
        if not centred:
            return self.second, self.cross
        cross = None if self.cross is None else self.cross - self.now[:, :, None] * self.before[:, None, :]
        return self.second - self.now[:, :, None] * self.now[:, None, :], cross
