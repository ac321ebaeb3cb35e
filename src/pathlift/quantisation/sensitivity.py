"""What rounding each layer alone does to the outputs, measured on a few inputs.

The expected error of a layer (`pathlift.statistics.sensitivity`) takes errors as independent of which neurons are active, and
as equally correlated everywhere. Where layers are all of one kind, as in a ResNet, that is too rough to tell what suffers most.
Inputs tell, and inputs made from batch norms (`pathlift.synthetic_inputs`) nearly as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.errors import InputError
from pathlift.graph.calling import Samples, batches_of, mapped
from pathlift.graph.compact import compacted
from pathlift.graph.network import Network
from pathlift.passes.forward import feed_of, flat_outputs, forward
from pathlift.passes.propagate import blame
from pathlift.precision import without_autocast
from pathlift.quantisation.choices import Bits, formats_of
from pathlift.quantisation.layer import Covariances, Way
from pathlift.quantisation.matrices import matrices_of
from pathlift.quantisation.underway import Underway
from pathlift.reading import Inputs, capture
from pathlift.statistics import activation_model, input_moments
from pathlift.statistics.model import DOUBT

LOOKED_AT = 32
"""Inputs of the data on which outputs are compared."""

Feed = Mapping[str, Tensor]
"""Input layer to its values, (samples, *shape)."""


class Noted:
    """Batches on their way to something else, the first inputs of which are kept."""

    def __init__(self, network: Network, batches: Iterable[Samples]) -> None:
        """Take batches that are inputs of a network."""
        self._network, self._batches = network, batches
        self.feeds: list[Feed] = []

    def __iter__(self) -> Iterator[Samples]:
        """Yield the batches."""
        left = LOOKED_AT
        for batch in self._batches:
            if left > 0:
                self.feeds.append(feed_of(self._network, mapped(batch, itemgetter(slice(left)))))
                left -= samples_of(self.feeds[-1])
            yield batch


def samples_of(feed: Feed) -> int:
    """Return the number of samples."""
    return len(next(iter(feed.values())))


def outputs_of(network: Network, feed: Feed) -> Tensor:
    """Return the outputs, float64, (samples, outputs)."""
    return flat_outputs(network, forward(network, network.values(), feed, network.dtype), samples_of(feed)).double()


class OutputChange:
    """What becomes of the outputs on some inputs when weights become others."""

    def __init__(self, network: Network, feeds: Sequence[Feed]) -> None:
        """Run the network as it is."""
        self._network, self._feeds = network, feeds
        self._before = [outputs_of(network, feed) for feed in feeds]

    def by(self, state: Mapping[str, Tensor]) -> float:
        """Return the mean of ‖R' − R‖² over the inputs, R' by other parameters and buffers."""
        other = replace(self._network, state=state)
        pairs = zip(self._feeds, self._before, strict=True)
        return sum(float((outputs_of(other, feed) - old).square().sum()) for feed, old in pairs) / sum(map(len, self._before))


@public
@torch.no_grad()
def layer_sensitivities(
    model: nn.Module | Network,
    inputs: Inputs | None = None,
    bits: Bits = 4,
    *,
    data: Samples | Iterable[Samples],
    granularity: str | int = "channel",
    range: str = "mse",  # noqa: A002 - the word of the field
    affine: bool = False,
    correction: str = "mean",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Return how far the outputs move when each weight alone is rounded to nearest, on the first 32 inputs of some data.

    It takes a forward pass of those inputs for each weight. What the mean of a change is corrected by is that of all data, with
    windows at borders as within. `pathlift.synthetic_inputs` makes inputs where there are none.

    Args:
        model: A module, or a captured `Network`; not changed.
        inputs: As for `capture`; not needed for a Network.
        bits: See `quantize`; weights that it leaves alone are left out.
        data: Inputs with a batch dimension, shape (batch, …), or an iterable of such batches.
        granularity: See `quantize`.
        range: See `quantize`.
        affine: See `quantize`.
        correction: See `quantize`.
        progress: Called after each tensor with its number and that of all.

    Returns:
        Weight to the root of the mean of ‖R' − R‖² over inputs, in the units of the outputs.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: An argument is malformed, or data hold no batch.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.7, -0.28]]))
        >>> found = layer_sensitivities(layer, (2,), 4, data=torch.ones(1, 2), range="minmax", correction="none")
        >>> round(found["weight"], 4)
        0.02
    """
    with without_autocast():
        network = capture(model, inputs)
        blame(compacted(network).values())
        matrices = matrices_of(network)
        formats = formats_of(list(matrices), bits, None, affine=affine)
        noted = Noted(network, batches_of(data))
        activations = activation_model(network, noted, doubt=DOUBT)
        if not any(map(samples_of, noted.feeds)):
            raise InputError("data holds no input: give at least one.")
        way, change, found = Way("nearest", granularity, range, correction), OutputChange(network, noted.feeds), {}
        for number, (name, form) in enumerate(formats.items(), 1):
            moments, alone = input_moments(activations, name), Underway(network, matrices, {name: form}, way)
            alone.correct(alone.round(moments, Covariances(moments)))
            found[name] = change.by(alone.state) ** 0.5
            if progress is not None:
                progress(number, len(formats))
        return found
