"""How far activations reach, for files whose activations are whole numbers as well (mathematics §9).

Without data a layer reaches from the least of m − kσ to the largest of m + kσ over its channels, m and σ by its statistics, cut
off where a ReLU or a clamp does so; on data, from the smallest to the largest value that is seen. 0 always lies within: padding
has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.errors import InputError
from pathlift.graph.calling import Samples, batches_of
from pathlift.graph.layers import Clamp, Extremum, Layer, Slopes
from pathlift.graph.network import Network
from pathlift.passes.forward import feed_of, forward
from pathlift.precision import without_autocast
from pathlift.quantisation.matrices import matrices_of
from pathlift.reading import Inputs, capture
from pathlift.statistics import activation_model
from pathlift.statistics.model import DOUBT, moments_of_inputs

DEVIATIONS = 6.0
"""k above."""


@public
@torch.no_grad()
def activation_ranges(
    model: nn.Module | Network,
    inputs: Inputs | None = None,
    *,
    data: Samples | Iterable[Samples] | None = None,
    deviations: float = DEVIATIONS,
    input_mean: float | Tensor = 0.0,
    input_variance: float | Tensor = 1.0,
) -> dict[str, tuple[float, float]]:
    """Return the range of what each weight of a convolution or linear layer is multiplied by, for `save_onnx`.

    Args:
        model: A module, or a captured `Network`: the quantised one, say.
        inputs: As for `capture`; not needed for a Network.
        data: Inputs with a batch dimension, shape (batch, …), or an iterable of such batches: the range is what they reach.
            None: by the statistics of batch norms and propagation.
        deviations: k: without data, how many standard deviations beside the mean still lie within.
        input_mean: Mean of the inputs, where there are no data: a number, one for each channel, or of a sample's shape.
        input_variance: Their variance, likewise.

    Returns:
        Name of the weight to the smallest and the largest value; 0 lies within.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: An argument is malformed, or there is no such weight.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> ranges = activation_ranges(model, (2,), data=torch.tensor([[1.0, -3.0], [2.0, 0.5]]))
        >>> ranges["0.weight"], ranges["2.weight"][0]
        ((-3.0, 2.0), 0.0)
    """
    with without_autocast():
        network = capture(model, inputs)
        names = matrices_of(network)
        sources: dict[str, set[str]] = {name: set() for name in names}
        for layer in network.layers:
            for connection in layer.connections:
                for name in connection.weight.requires if connection.weight is not None else ():
                    if name in sources:
                        sources[name].add(connection.source)
        if data is None:
            ends = _by_statistics(network, deviations, moments_of_inputs(network, input_mean, input_variance))
        else:
            ends = _seen(network, batches_of(data))
        return {
            name: (min(0.0, *(ends[layer][0] for layer in read)), max(0.0, *(ends[layer][1] for layer in read)))
            for name, read in sources.items()
        }


def _by_statistics(
    network: Network, deviations: float, declared: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[float, float]]:
    steps, ends = activation_model(network, moments=declared, doubt=DOUBT).steps, {}
    limits: dict[str, tuple[float, float]] = {}
    for layer in network.layers:
        moments = steps[layer.name].moments
        reach = deviations * moments.variance.sqrt()
        limits[layer.name] = low, high = _limits(layer, limits)
        ends[layer.name] = (
            max(low, float((moments.mean - reach).min())),
            min(high, float((moments.mean + reach).max())),
        )
    return ends


def _limits(layer: Layer, below: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Return what the values of a layer cannot leave, by its nonlinearity and those it takes values from."""
    kind = layer.nonlinearity
    if isinstance(kind, Slopes):
        return (0.0 if kind.plus >= 0 >= kind.minus else -torch.inf), torch.inf
    if isinstance(kind, Clamp):
        low, high = (end if isinstance(end, float) else None for end in (kind.low, kind.high))
        return (-torch.inf if low is None else low), (torch.inf if high is None else high)
    taken = [below[connection.source] for connection in layer.connections]
    if taken and (layer.moves or (isinstance(kind, Extremum) and not layer.biases)):
        zero = [(0.0, 0.0)] if isinstance(kind, Extremum) and kind.zero else []
        return min(low for low, _ in taken + zero), max(high for _, high in taken + zero)
    return -torch.inf, torch.inf


def _seen(network: Network, batches: Iterable[Samples]) -> dict[str, tuple[float, float]]:
    ends: dict[str, tuple[float, float]] = {}
    for batch in batches:
        for name, value in forward(network, network.values(), feed_of(network, batch), network.dtype, keep=True).items():
            low, high = ends.get(name, (torch.inf, -torch.inf))
            ends[name] = (min(low, float(value.min())), max(high, float(value.max())))
    if not ends:
        raise InputError("data holds no batch: give at least one.")
    return ends
