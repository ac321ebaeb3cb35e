"""Rounding that is sequential over layers: each layer makes up for what those below have changed, on data (mathematics §9).

All samples go through the network as it was and the rounded one side by side. A weight w that multiplied u and now multiplies
ũ first becomes v, the least-squares fit of w·u by v·ũ; then v is rounded, as ever, by the moments of ũ. A bias behind it takes
up what is left of the mean; running means of batch norms are moved as the means of their inputs moved on the data.

To round w itself by the moments of ũ, as GPTQ does, makes up for nothing that the layers below have changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from pathlift.compensation.least_squares import least_squares
from pathlift.compensation.sides import Place, SideBySide, Windows, standing_at_several_places
from pathlift.graph.calling import Samples
from pathlift.quantisation.layer import Covariances, Rounded
from pathlift.quantisation.underway import Underway
from pathlift.statistics import ActivationModel, InputMoments
from pathlift.statistics.input_moments import positive


def round_on_data(
    underway: Underway, model: ActivationModel, moments: Mapping[str, InputMoments], batches: Sequence[Samples]
) -> None:
    """Round layer after layer.

    Weights that stand at several places are rounded before all others, by the moments of the network as it was.

    Args:
        underway: The network before anything is rounded; takes what becomes of it.
        model: What is known of the network as it was.
        moments: What weights multiply in the network as it was.
        batches: Inputs, all of which are held in memory.

    Raises:
        InputError: There is no batch, or one is malformed.
        NumericalError: A weight is NaN or infinite.
    """
    _Sequence(underway, model, moments, batches).run()
    underway.tensors = {name: underway.tensors[name] for name in underway.formats}


class _Sequence(SideBySide):
    """One way through both networks."""

    def __init__(
        self, underway: Underway, model: ActivationModel, moments: Mapping[str, InputMoments], batches: Sequence[Samples]
    ) -> None:
        names = underway.formats.keys()
        shared = standing_at_several_places(model.network, names)
        super().__init__(model, batches, names - shared)
        self.underway, self.moments = underway, moments
        for name in names:
            if name in shared:
                self._round_as_it_was(name)

    @property
    @override
    def state(self) -> Mapping[str, Tensor]:
        return self.underway.state

    @override
    def renormalise(self, changed: dict[str, Tensor]) -> None:
        correction = self.underway.way.correction
        if correction != "none":
            self.underway.put({
                name: tensor for name, tensor in changed.items() if name in self._norms or correction == "variance"
            })

    @override
    def weigh(self, name: str, place: Place) -> None:
        """Fit a weight to what it did, and round it."""
        moments = self.moments[name]
        if not self.takes_shifts(moments.following):
            moments = replace(moments, following=None, variance=None)
        before, blocks = self.underway.split(name), Covariances(moments).blocks
        windows = [Windows.at(place, moments.correlations(block), block) for block in blocks]
        seen = [each for each in windows if each is not None]
        if len(seen) < len(windows):  # it multiplies several values at once with each of its entries
            self._round_as_it_was(name)
            return
        centred = self.underway.way.correction != "none" and moments.following is not None
        fitted = torch.cat(
            [
                least_squares(rows, torch.ones_like(rows, dtype=torch.bool), *each.moments(centred=centred))
                for rows, each in zip((before[:, :, block] for block in blocks), seen, strict=True)
            ],
            2,
        )
        outcome = self.underway.round(moments, _Measured(moments, blocks, seen), fitted)
        drift = torch.stack([
            each.shift(before[:, :, block], fitted[:, :, block]) for block, each in zip(blocks, seen, strict=True)
        ]).sum(0)
        self._correct(replace(outcome, shift=outcome.shift + drift, variances=None))

    def _round_as_it_was(self, name: str) -> None:
        """Round a weight by what it multiplied in the network as it was."""
        moments = self.moments[name]
        self._correct(self.underway.round(moments, Covariances(moments)))

    def _correct(self, outcome: Rounded) -> None:
        """Let a bias take up a shift; the mean of a batch norm moves by what comes in there (`renormalise`)."""
        if outcome.moments.following in self.network.parameters:
            self.underway.correct(outcome)


class _Measured(Covariances):
    """What a weight multiplies in the network that is rounded so far."""

    def __init__(self, moments: InputMoments, blocks: Sequence[slice], seen: Sequence[Windows]) -> None:
        super().__init__(moments)
        self.mean = torch.cat([each.now for each in seen], 1)
        self._seen = list(zip(blocks, seen, strict=True))

    @override
    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for block, each in self._seen:
            covariance = each.moments(centred=True)[0]
            covariance.diagonal(dim1=1, dim2=2).clamp_(min=0.0)
            yield block, positive(covariance)

    @property
    @override
    def diagonal(self) -> Tensor:
        return torch.cat([each.diagonal for _, each in self._seen], 1)

    @property
    @override
    def noise(self) -> Tensor:
        return torch.cat([each.floor for _, each in self._seen], 1)
