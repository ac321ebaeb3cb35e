"""`activation_statistics`: what the activations of a network look like, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.graph.calling import Samples, batches_of
from pathlift.graph.layers import Layer
from pathlift.graph.network import Network
from pathlift.reading import Inputs, capture
from pathlift.results import Result
from pathlift.statistics.model import TAPS, ActivationModel, Correlations, activation_model, disagreement, moments_of_inputs
from pathlift.statistics.transfer import stationary


@dataclass(frozen=True, repr=False)
class LayerStatistics(
    Result,
    line=("name", "module", "source", "mean", "variance"),
    rows=("mean", "variance", "correlation", "sensitivity", "activity", "expected_mean", "expected_variance"),
    axes=("channel",),
):
    """What the values of one layer look like; all tensors are float64, of shape (channels,).

    Attributes:
        name: The layer.
        module: Path of the module.
        operator: The operator.
        source: What the moments were taken from: ``data``, ``batch norm`` or ``propagation``.
        mean: E u over inputs and positions.
        variance: Var u over inputs and positions.
        correlation: ρ of two neurons of one channel inside a window.
        sensitivity: g = ∂E‖ΔR‖²/∂E(Δu)²: what a small independent error of the channel does to the outputs.
        activity: Probability that a kink is active; None for other layers.
        expected_mean: For the input of a batch norm, whose running mean is `mean`: what data, or propagation, say instead.
        expected_variance: The same for the variance.
    """

    name: str
    module: str
    operator: str
    source: str
    mean: Tensor
    variance: Tensor
    correlation: Tensor
    sensitivity: Tensor
    activity: Tensor | None
    expected_mean: Tensor | None
    expected_variance: Tensor | None


@dataclass(frozen=True, repr=False)
class ActivationStatistics(Result, line=("layers", "source", "shift", "spread"), rows=("layers",)):
    """What the activations of a network look like.

    Attributes:
        layers: Those of every layer, inputs first.
        source: ``data``, ``batch norm`` where there are such, or ``propagation``.
        shift: How far batch norms say otherwise: the median over all of their channels of |m − running_mean|/√running_var, m
            as data or propagation have it; NaN without batch norms.
        spread: The same for |log₂ v/running_var|.
    """

    layers: tuple[LayerStatistics, ...]
    source: str
    shift: float
    spread: float


@public
@torch.no_grad()
def activation_statistics(
    model: nn.Module | Network,
    inputs: Inputs | None = None,
    data: Samples | Iterable[Samples] | None = None,
    *,
    input_mean: float | Tensor = 0.0,
    input_variance: float | Tensor = 1.0,
    correlation: float = TAPS,
    correlations: Correlations = "taps",
) -> ActivationStatistics:
    """Compute mean, variance and correlation of all activations, and what errors of them do to the outputs, also without data.

    Moments are measured on data where there are some. Else a batch norm knows those of its input and of its output, and all
    others are propagated: pre-activations are taken as Gaussian, E ReLU(z) = μΦ(μ/σ) + σφ(μ/σ). They are a model, and certify
    nothing. Under a rescaling m → λm, v → λ²v, g → g/λ². A rescaling of the input of a batch norm is the exception: none
    changes the running variance, which goes on to tell of the network as it was.

    Args:
        model: A module, or a captured `Network`.
        inputs: As for `capture`; not needed for a Network.
        data: Inputs with a batch dimension, shape (batch, …), or an iterable of such batches.
        input_mean: Mean of the inputs: a number, one for each channel, or of a sample's shape.
        input_variance: Their variance, likewise.
        correlation: ρ of two taps of one channel, where nothing else is known.
        correlations: ``taps``: those of two taps of one channel, by ``correlation``. ``channels``: covariances of all
            channels at small distances are propagated.

    Returns:
        Statistics for every channel of every layer.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: An argument is malformed.
        NumericalError: A weight is NaN or infinite, or numbers leave the range of float64.

    Example:
        >>> from torch import nn
        >>> statistics = activation_statistics(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (4,))
        >>> [layer.operator for layer in statistics.layers]
        ['input', 'linear', 'relu']
        >>> bool((statistics.layers[-1].activity > 0).all())
        True
    """
    network = capture(model, inputs)
    moments = moments_of_inputs(network, input_mean, input_variance)
    batches = None if data is None else batches_of(data)
    activations = activation_model(network, batches, moments=moments, correlation=correlation, correlations=correlations)
    layers = tuple(_of_layer(activations, layer) for layer in network.layers)
    sources = {statistics.source for statistics in layers}
    source = next(kind for kind in ("data", "batch norm", "propagation") if kind in sources)
    return ActivationStatistics(layers, source, *disagreement(activations.propagation))


def _of_layer(model: ActivationModel, layer: Layer) -> LayerStatistics:
    step, channel = model.steps[layer.name], model.propagation.channels[layer.name]

    def vector(tensor: Tensor) -> Tensor:
        """Return the mean over all that is no channel."""
        shape = [size if dim == channel else 1 for dim, size in enumerate(layer.shape)]
        return stationary(tensor.expand(layer.shape), torch.zeros_like(tensor), shape)[0].reshape(-1).clone()

    mean, variance = _over_positions(layer, channel, step.moments.mean, step.moments.variance)
    sensitivity = model.sensitivity[layer.name]
    expected = None if step.expected is None else _over_positions(layer, channel, *step.expected)
    positions = math.prod(layer.shape) / (layer.shape[channel] if channel is not None else 1)
    return LayerStatistics(
        layer.name,
        layer.origin.module,
        layer.origin.op.removeprefix("aten.").split(".")[0],
        step.moments.source,
        mean,
        variance,
        vector(step.moments.correlation),
        vector(sensitivity) * positions * (sensitivity.numel() / math.prod(layer.shape)),
        None if step.response is None else vector(step.response.activity),
        None if expected is None else expected[0],
        None if expected is None else expected[1],
    )


def _over_positions(layer: Layer, channel: int | None, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    shape = [size if dim == channel else 1 for dim, size in enumerate(layer.shape)]
    parts = stationary(mean.expand(layer.shape), variance.expand(layer.shape), shape)
    first, second = (part.reshape(-1).clone() for part in parts)
    return first, second
