"""A network as it was and one that is being changed, side by side on data: layer after layer, what comes in now and before.

What changes weights on its way (`pathlift.compensation.sequential`, `pathlift.quantisation.sequential`) sees, for each, what it
multiplied before, u, and what it multiplies now, ũ, in the network whose layers below are changed already (mathematics §9).
Mean and, if asked for, variance of every batch norm move as those of its input move on the data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pathlift.compensation.correction import scaled
from pathlift.edges.weights import Weights
from pathlift.errors import InputError
from pathlift.graph.calling import Samples
from pathlift.graph.expressions import Normalisation, StateTensor, evaluate
from pathlift.graph.layers import Connection, Extremum, Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.forward import carried, feed_of, respond, unchanged
from pathlift.passes.propagate import blame, in_forward_order
from pathlift.statistics.measure import floor_of, in_parts, tells_windows_apart, windows_of
from pathlift.statistics.model import ActivationModel
from pathlift.statistics.shrinkage import Products, shrunk
from pathlift.statistics.transfer import Weighted

STILL = 0.05
"""The variance of ũ is taken for no less than this share of E ũ² and of E u²: no weight grows a hundredfold to make up for
something by a value that hardly moves, or has all but gone."""


@dataclass(frozen=True, eq=False)
class Sides:
    """The values of a layer, in parts of a few samples (`pathlift.statistics.measure`): of the network as it was, and now.

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


@dataclass(frozen=True, eq=False)
class Place:
    """Where a weight stands, and what comes in there."""

    layer: Layer
    connection: Connection
    transfer: Weighted
    sides: Sides
    expected: Tensor
    """E u² of each column as it is propagated, (groups, columns)."""


class SideBySide(ABC):
    """One way through both networks."""

    def __init__(self, model: ActivationModel, batches: Sequence[Samples], names: Collection[str]) -> None:
        """Take the inputs.

        Args:
            model: What is known of the network as it was: how its weights act, and what is usual, which goes with any rescaling
                (running variances ``scaled``).
            batches: Inputs, all of which are held in memory.
            names: Weights that may change.

        Raises:
            InputError: There is no batch, or one is malformed.
            NumericalError: A weight is NaN or infinite.
        """
        if not batches:
            raise InputError("data holds no batch: give at least one.")
        self.network = network = model.network
        self._model = model
        self._feeds = list(in_parts(feed_of(network, batch) for batch in batches))
        blame(network.values())
        self._names = frozenset(names)
        self._norms = Counter(
            norm.mean.name
            for layer in network.layers
            if (norm := layer.normalisation()) is not None and isinstance(norm.mean, StateTensor)
        )
        self._biases = Counter(name for layer in network.layers for bias in layer.biases for name in bias.weight.requires)

    def run(self) -> None:
        """Go from the inputs to the outputs."""
        in_forward_order(self.network, self._step)

    @property
    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """The changed network, so far."""

    @abstractmethod
    def weigh(self, name: str, place: Place) -> None:
        """Change a weight that may change."""

    @abstractmethod
    def renormalise(self, changed: dict[str, Tensor]) -> None:
        """Take the running mean and the running variance of a batch norm whose input has changed."""

    def takes_shifts(self, name: str | None) -> bool:
        """Whether a bias or a running mean takes up what the mean of a layer shifts by: one that stands at one place."""
        return name is not None and self._norms[name] + self._biases[name] == 1

    def _step(self, layer: Layer, below: Mapping[str, Sides]) -> Sides:
        if layer.kind == "input":
            dtype = self.network.dtype
            parts = [feed[layer.name].to(dtype) for feed in self._feeds]
            return Sides(parts, parts)
        norm = layer.normalisation()
        if norm is not None:
            self._estimated(norm, below[layer.connections[0].source])
        if not isinstance(layer.nonlinearity, Extremum):
            for position, connection in enumerate(layer.connections):
                self._weighed(layer, position, connection, below[connection.source])
        before = self._values(self.network.state, layer, {name: sides.before for name, sides in below.items()})
        weights = [connection.weight for connection in layer.connections] + [bias.weight for bias in layer.biases]
        names = {name for weight in weights if weight is not None for name in weight.requires}
        sources = [below[connection.source] for connection in layer.connections]
        state, old = self.state, self.network.state
        if all(sides.same for sides in sources) and all(state[name] is old[name] for name in names):
            return Sides(before, before)
        return Sides(before, self._values(state, layer, {name: sides.now for name, sides in below.items()}))

    def _weighed(self, layer: Layer, position: int, connection: Connection, sides: Sides) -> None:
        for name in () if connection.weight is None else connection.weight.requires & self._names:
            transfer = self._model.propagation.bundles(layer)[position]
            assert isinstance(transfer, Weighted)
            expected = self._model.propagated[connection.source].squares(transfer)
            self.weigh(name, Place(layer, connection, transfer, sides, expected))

    def _weights(self, state: Mapping[str, Tensor], weight: WeightTensor) -> Weights:
        if weight.scalar is not None:
            value = torch.tensor(weight.scalar, dtype=torch.float64)
        else:
            value = torch.as_tensor(evaluate(weight.expression, state))
        return Weights((value.detach(),), unchanged, self.network.dtype)

    def _values(self, state: Mapping[str, Tensor], layer: Layer, below: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        weights_of = partial(self._weights, state)
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

    def _estimated(self, norm: Normalisation, sides: Sides) -> None:
        """Move running mean and running variance as mean and variance of the input have moved on the data."""
        mean, variance = norm.mean, norm.variance
        if sides.same or not isinstance(mean, StateTensor) or not isinstance(variance, StateTensor):
            return
        if self._norms[mean.name] > 1:  # one batch norm at several places
            return
        (first, spread), (other, widened) = _channel_moments(sides.before), _channel_moments(sides.now)
        state = self.state
        old = state[mean.name]
        moved = (old.double() + (other - first).to(old.device)).to(old.dtype)
        changed = {mean.name: moved, variance.name: scaled(state[variance.name], spread, widened)}
        self.renormalise({name: tensor for name, tensor in changed.items() if not torch.equal(tensor, state[name])})


def standing_at_several_places(network: Network, names: Collection[str]) -> set[str]:
    """Return the weights that stand at several places: what they will multiply at the second is not known at the first."""
    uses = Counter(
        name
        for layer in network.layers
        for connection in layer.connections
        if connection.weight is not None
        for name in connection.weight.requires & set(names)
    )
    return {name for name in names if uses[name] > 1}


def _channel_moments(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel over samples and positions, float64."""
    dims = [dim for dim in range(parts[0].dim()) if dim != 2]
    count = sum(part.numel() // part.shape[2] for part in parts)
    mean = torch.stack([part.double().sum(dims) for part in parts]).sum(0) / count
    shape = [-1 if dim == 2 else 1 for dim in range(parts[0].dim())]
    spread = torch.stack([(part.double() - mean.reshape(shape)).square().sum(dims) for part in parts]).sum(0) / count
    return mean, spread


@dataclass
class Windows:
    """Means and covariances over all windows of what a weight multiplied before, u, and multiplies now, ũ.

    As far as covariances are chance, they are those of T, where ũ is u (`pathlift.statistics.shrinkage`).

    Attributes:
        now: E ũ, (groups, columns).
        before: E u.
        spread: Cov ũũᵀ, (groups, columns, columns).
        cross: Cov ũuᵀ; None where both are the same.
        floor: What E ũ² is known up to: by the choice of samples, by `floor_of`, and by `STILL`; (groups, columns).
    """

    now: Tensor
    before: Tensor
    spread: Tensor
    cross: Tensor | None
    floor: Tensor

    @staticmethod
    def at(place: Place, correlations: Tensor, block: slice = slice(None)) -> Windows | None:
        """Look at all samples; None where no windows can be told apart.

        Args:
            place: Where the weight stands.
            correlations: Of ũ, as they are known without data, (groups, columns, columns).
            block: Columns.

        Returns:
            Moments of these columns, float64.
        """
        edges, transfer, above, sides = place.connection.edges, place.transfer, place.layer.shape, place.sides
        if not tells_windows_apart(edges, transfer):
            return None
        count, total, centre = 0, None, None
        products = Products()
        for before, now in zip(sides.before, sides.now, strict=True):
            below = windows_of(edges, transfer, before, above)
            beside = below if sides.same else windows_of(edges, transfer, now, above)
            for whole in below:
                u = whole[..., block]
                changed = u if sides.same else next(beside)[..., block]
                if centre is None:  # squares of what is left when this is subtracted cancel no digits
                    centre = (changed.mean((1, 2)), u.mean((1, 2)))
                count += u.shape[1] * u.shape[2]
                changed, u = changed - centre[0][:, None, None], u - centre[1][:, None, None]
                parts = [changed.sum((1, 2)), u.sum((1, 2)), u.square().sum((1, 2))]
                parts += [] if sides.same else [changed.flatten(1, 2).mT @ (u - changed).flatten(1, 2)]
                total = parts if total is None else [one.add_(other) for one, other in zip(total, parts, strict=True)]
                products.add(changed)
        assert total is not None
        assert centre is not None
        off, other, size, *gap = (part / count for part in total)
        now, first, variance = centre[0] + off, centre[1] + other, products.variance
        spread, share = shrunk(products.mean.sub_(off[:, :, None] * off[:, None, :]), variance, correlations)
        cross = None
        if not sides.same:  # of T both are alike
            cross = gap[0].sub_(off[:, :, None] * (other - off)[:, None, :]).mul_(1.0 - share).add_(spread)
        squares = spread.diagonal(dim1=1, dim2=2).clamp(min=0.0) + now.square()
        floor = floor_of(squares, place.expected[:, block], products.samples, sides.now[0].dtype)
        size = torch.maximum(size - other.square() + first.square(), squares)
        lacking = (STILL * size - spread.diagonal(dim1=1, dim2=2)).clamp(min=0.0)
        floor += torch.where(squares > 0, lacking, 0.0) + variance.diagonal(dim1=1, dim2=2).sqrt()
        return Windows(now, first, spread, cross, floor)

    @property
    def diagonal(self) -> Tensor:
        """E ũ², (groups, columns)."""
        return self.spread.diagonal(dim1=1, dim2=2) + self.now.square()

    def moments(self, *, centred: bool) -> tuple[Tensor, Tensor | None]:
        """Return E ũũᵀ and E ũuᵀ, or the covariances.

        Both are those of values with independent noise on top, the same for ũ and u: nothing is fitted to chance (`floor_of`).
        """
        noise = torch.diag_embed(self.floor)
        second, cross = self.spread + noise, None if self.cross is None else self.cross + noise
        if not centred:
            second += self.now[:, :, None] * self.now[:, None, :]
            cross = None if cross is None else cross.add_(self.now[:, :, None] * self.before[:, None, :])
        return second, cross

    def shift(self, before: Tensor, now: Tensor) -> Tensor:
        """Return E[w̃·ũ] − E[w·u] of each row, (groups·rows,)."""
        return (now @ self.now[:, :, None] - before @ self.before[:, :, None]).reshape(-1)
