"""Rounding that is sequential over layers: each layer makes up for what those below have changed, on data (mathematics §9).

All samples go through the network as it was and the rounded one side by side. A weight w that multiplied u and now multiplies
ũ first becomes v, the least-squares fit of w·u by v·ũ; then v is rounded, as ever, by the moments of ũ. A bias behind it takes
up what is left of the mean; running means of batch norms are moved as the means of their inputs moved on the data.

To round w itself by the moments of ũ, as GPTQ does, makes up for nothing that the layers below have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from pathlift.compensation.least_squares import least_squares
from pathlift.compensation.sides import Place, SideBySide, Windows, several_times
from pathlift.graph.calling import Samples
from pathlift.graph.network import Network
from pathlift.quantisation.correction import corrections
from pathlift.quantisation.formats import Format
from pathlift.quantisation.layer import Covariances, Way, rounded
from pathlift.quantisation.matrices import Matrices
from pathlift.quantisation.underway import Underway
from pathlift.statistics import InputMoments
from pathlift.statistics.input_moments import positive

DAMPING = 2.0
"""Of the least-squares fit, relative to the diagonal: how far weights stay where they are. Where there are many inputs of the
kind that is to come 0.05 fits better; this is right where they are few, or made from batch norms."""


def rounded_on_data(
    network: Network,
    matrices: Mapping[str, Matrices],
    formats: Mapping[str, Format],
    way: Way,
    moments: Mapping[str, InputMoments],
    batches: Sequence[Samples],
    source: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Underway:
    """Round layer after layer.

    Weights that stand at several places are rounded before all others, by the moments of the network as it was.

    Args:
        network: The network as it was.
        matrices: How weights are laid out.
        formats: Weight to format.
        way: How to round.
        moments: What weights multiply in the network as it was.
        batches: Inputs, all of which are held in memory.
        source: Source of randomness, for stochastic rounding.
        progress: Called after each tensor with its number and that of all.

    Returns:
        The rounded network.

    Raises:
        InputError: There is no batch, or one is malformed.
        NumericalError: A weight is NaN or infinite.
    """
    course = _Sequence(network, matrices, formats, way, moments, batches, source, progress)
    course.run()
    course.done.tensors = {name: course.done.tensors[name] for name in formats}
    return course.done


class _Sequence(SideBySide):
    """One way through both networks."""

    def __init__(
        self,
        network: Network,
        matrices: Mapping[str, Matrices],
        formats: Mapping[str, Format],
        way: Way,
        moments: Mapping[str, InputMoments],
        batches: Sequence[Samples],
        source: torch.Generator | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        several = several_times(network, formats)
        super().__init__(network, batches, formats.keys() - several)
        self.matrices, self.formats, self.way, self.moments = matrices, formats, way, moments
        self.source, self.progress = source, progress
        self.done = Underway(dict(network.state))
        for name in formats:
            if name in several:
                self._as_it_was(name)

    @property
    @override
    def state(self) -> Mapping[str, Tensor]:
        return self.done.state

    @override
    def renormalise(self, changed: dict[str, Tensor]) -> None:
        if self.way.correction == "none":
            return
        buffers = {norm: tensor for norm, tensor in changed.items() if norm in self._norms or self.way.correction == "variance"}
        self.done.correct(buffers)

    @override
    def weigh(self, name: str, place: Place) -> None:
        """Fit a weight to what it did, and round it."""
        moments = self.moments[name]
        if not self.takes_shifts(moments.following):
            moments = replace(moments, following=None, variance=None)
        weight, matrices = self.network.state[name], self.matrices[name]
        covariances = Covariances(moments)
        before = matrices.split(weight.detach()).double()
        windows = [Windows.at(place, block) for block in covariances.blocks]
        seen = [each for each in windows if each is not None]
        if len(seen) < len(windows):  # it multiplies several values at once with each of its entries
            self._as_it_was(name)
            return
        centred = self.way.correction != "none" and moments.following is not None
        fitted = torch.cat(
            [
                least_squares(rows, torch.ones_like(rows, dtype=torch.bool), *each.moments(centred=centred), damping=DAMPING)
                for rows, each in zip((before[:, :, block] for block in covariances.blocks), seen, strict=True)
            ],
            2,
        )
        known = _Measured(moments, covariances.blocks, seen)
        outcome = rounded(matrices.join(fitted), matrices, self.formats[name], self.way, moments, known, self.source)
        self.done.take(matrices, outcome, weight)
        following = moments.following
        if outcome.corrected and following in self.network.parameters:
            drift = torch.stack([
                each.shift(before[:, :, block], fitted[:, :, block])
                for block, each in zip(covariances.blocks, seen, strict=True)
            ]).sum(0)
            moved = replace(outcome, shift=outcome.shift + drift, variances=None)
            self.done.correct(corrections(replace(self.network, state=self.done.state), moved))
        self._count()

    def _as_it_was(self, name: str) -> None:
        """Round a weight by what it multiplied in the network as it was."""
        weight, moments = self.network.state[name], self.moments[name]
        covariances = Covariances(moments)
        outcome = rounded(weight, self.matrices[name], self.formats[name], self.way, moments, covariances, self.source)
        self.done.take(self.matrices[name], outcome, weight)
        if moments.following in self.network.parameters:
            self.done.correct(corrections(replace(self.network, state=self.done.state), outcome))
        self._count()

    def _count(self) -> None:
        if self.progress is not None:
            self.progress(len(self.done.tensors), len(self.formats))


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
