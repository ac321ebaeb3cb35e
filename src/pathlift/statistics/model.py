"""What is known of the activations of one network: the moments of every layer, and what errors do to its outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.graph.calling import Samples
from pathlift.graph.layers import Layer
from pathlift.graph.network import Network
from pathlift.passes.propagate import blame
from pathlift.statistics.channels import channel_dims
from pathlift.statistics.correlated import CorrelatedPropagation
from pathlift.statistics.covariances import Lags
from pathlift.statistics.measure import Seen, measured
from pathlift.statistics.propagation import Propagation, Running, Step
from pathlift.statistics.sensitivity import sensitivities

Correlations: TypeAlias = Literal["taps", "channels"]
"""Of which neurons correlations are known: of two taps of one channel, or of all channels at small distances."""

TAPS = 0.5
"""The correlation of two taps of one channel where nothing else is known."""

SPREAD = 2.0
"""Median |log₂ v/running_var| from which on running variances are no longer taken for those of what batch norms read."""


DOUBT = 0.1
"""How far off what is propagated is taken to be with each weight, where errors choose what is done to weights: the variance of
the error of u as a share of E u²."""


@dataclass(frozen=True, eq=False)
class ActivationModel:
    """The moments of all activations of a network.

    Attributes:
        propagation: The way forward, with the moments of every layer.
        sensitivity: Layer name to g, see `pathlift.statistics.sensitivity`.
        seen: Layer and source to what the weight between them multiplied, where that was measured.
        propagated: Layer name to what it does to moments as they are propagated, with data too.
    """

    propagation: Propagation
    sensitivity: Mapping[str, Tensor]
    seen: Mapping[tuple[str, str], Seen]
    propagated: Mapping[str, Step]

    @property
    def network(self) -> Network:
        """The network."""
        return self.propagation.network

    @property
    def source(self) -> str:
        """Where moments came from in the main: ``data``, ``batch norm``, ``batch norm up to scale`` or ``propagation``."""
        sources = {step.moments.source for step in self.steps.values()}
        source = next((source for source in ("data", "batch norm") if source in sources), "propagation")
        return f"{source} up to scale" if source == "batch norm" and self.propagation.running == "scaled" else source

    def lags(self, layer: str, source: str) -> Lags | None:
        """Return the correlations of what a weight between two layers multiplies, None where there are none."""
        return self.propagation.read.get((layer, source)) if isinstance(self.propagation, CorrelatedPropagation) else None

    @property
    def steps(self) -> Mapping[str, Step]:
        """Layer name to what it does to moments."""
        return self.propagation.steps


@torch.no_grad()
def activation_model(
    network: Network,
    data: Iterable[Samples] | None = None,
    *,
    moments: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    correlation: float = TAPS,
    correlations: Correlations = "taps",
    running: Running | Literal["checked"] = "stored",
    doubt: float = 0.0,
    windows: bool = True,
) -> ActivationModel:
    """Work out what the activations of a network look like.

    Args:
        network: The network.
        data: Batches of inputs, to measure moments on; then running variances are ``scaled``, whatever ``running`` says.
        moments: Input layer to mean and variance, broadcastable to its shape; 0 and 1 for others.
        correlation: Of two taps of one channel.
        correlations: What is known of covariances: ``taps`` or ``channels``.
        doubt: See `Propagation`.
        running: See `Propagation`; ``checked``: ``stored``, but ``scaled`` where they are off by a factor of 4 for more than
            half of the channels, as in a network that was rescaled before its batch norms.
        windows: Measure all second moments of what weights multiply, too, where correlations of channels are asked for.

    Returns:
        The model.

    Raises:
        InputError: There is no batch in the data, or one is malformed.
        NumericalError: A weight is NaN or infinite, or numbers leave the range of float64.
    """
    kind = CorrelatedPropagation if correlations == "channels" else Propagation
    if data is not None:
        running = "scaled"  # tells only what is usual, and goes with any rescaling
    elif running == "checked":
        running = _checked(network, moments or {}, correlation, doubt)
    propagation = kind(network, moments or {}, correlation, running=running, doubt=doubt)
    blame(propagation.values)
    propagated = propagation.run()
    seen: dict[tuple[str, str], Seen] = {}
    if data is not None:
        propagation.steps, seen = measured(propagation, data, windows=windows and correlations == "channels")
    return ActivationModel(propagation, sensitivities(propagation), seen, propagated)


def _checked(
    network: Network, moments: Mapping[str, tuple[Tensor, Tensor]], correlation: float, doubt: float
) -> Literal["stored", "scaled"]:
    """Return what running variances are taken for; independent channels tell it as well as correlated ones do, and soon."""
    propagation = Propagation(network, moments, correlation, doubt=doubt)
    blame(propagation.values)
    if not propagation.norms:
        return "stored"
    propagation.run()
    return "scaled" if disagreement(propagation)[1] > SPREAD else "stored"


def squared_outputs(model: ActivationModel) -> float:
    """Return E‖R‖², the sum of the squares of all outputs.

    Args:
        model: What is known of the activations.

    Returns:
        The number.
    """
    network, total = model.network, 0.0
    for name in network.outputs:
        moments = model.steps[name].moments
        total += float((moments.mean.square() + moments.variance).expand(network.layer[name].shape).sum())
    return total


def moments_of_inputs(network: Network, mean: float | Tensor, variance: float | Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what all inputs of a network were told as `activation_model` takes it.

    Args:
        network: The network.
        mean: A number, one for each channel, or of a sample's shape.
        variance: Likewise.

    Returns:
        Input layer to mean and variance, broadcastable to its shape.

    Raises:
        InputError: A tensor has another shape.
    """
    channels = channel_dims(network)
    return {
        layer.name: (
            _placed(layer, channels[layer.name], "input_mean", mean),
            _placed(layer, channels[layer.name], "input_variance", variance),
        )
        for layer in network.layers
        if layer.kind == "input"
    }


def _placed(layer: Layer, channel: int | None, name: str, value: float | Tensor) -> Tensor:
    """Return what an input was told as it broadcasts over its layer."""
    rank = len(layer.shape)
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if tensor.dim() == 0:
        return tensor.reshape([1] * rank)
    if channel and tensor.shape == (layer.shape[channel],):
        return tensor.reshape([-1 if dim == channel else 1 for dim in range(rank)])
    if tensor.shape == layer.shape[1:]:
        return tensor.unsqueeze(0)
    shapes = dict.fromkeys([*([(layer.shape[channel],)] if channel else []), tuple(layer.shape[1:])])
    raise InputError(f"{name} must have shape {' or '.join(map(str, shapes))}, found {tuple(tensor.shape)}.")


def disagreement(propagation: Propagation) -> tuple[float, float]:
    """Return how far batch norms say otherwise than data or propagation.

    Args:
        propagation: A propagation that has run.

    Returns:
        The medians over all channels of shifts in deviations, and of doublings of variances; NaN without batch norms.
    """
    shifts, spreads = [], []
    for name, norm in propagation.norms.items():
        expected = propagation.steps[name].expected
        if expected is None:
            continue
        rank = len(propagation.network.layer[name].shape)
        mean, variance = (propagation.evaluated(part, 0.0, rank) for part in (norm.mean, norm.variance))
        shifts.append(((expected[0] - mean).abs() / variance.sqrt()).flatten())
        spreads.append((expected[1] / variance).log2().abs().flatten())
    if not shifts:
        return math.nan, math.nan
    return float(torch.cat(shifts).median()), float(torch.cat(spreads).median())
