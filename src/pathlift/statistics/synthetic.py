"""Inputs that are made from a model alone: noise that is changed until its batch norms read what they store (mathematics §9).

Each batch norm has stored mean and variance of what it read while the network was trained. From noise with the spectrum and the
colours of photographs on, inputs go down the gradient of how far mean and variance of what all batch norms read are from that.
What comes out looks like nothing, but runs through the network as its own data do, with all correlations between layers: data
for what asks for data (`quantize`, `prune`, `activation_statistics`).

References:
    Cai, Yao, Dong, Gholami, Mahoney, Keutzer, "ZeroQ: a novel zero shot quantization framework", CVPR 2020; Yin et al.,
    "Dreaming to distill: data-free knowledge transfer via DeepInversion", CVPR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.arguments.common import Randomness, source_of
from pathlift.errors import InputError, NumericalError
from pathlift.graph.calling import Samples
from pathlift.graph.layers import Layer
from pathlift.graph.network import Network
from pathlift.passes.forward import Below, WeightsOf, carried, respond, weighted
from pathlift.passes.propagate import blame, in_forward_order
from pathlift.precision import without_autocast
from pathlift.reading import Inputs, capture
from pathlift.statistics.covariances import COLOURS
from pathlift.statistics.model import TAPS, moments_of_inputs
from pathlift.statistics.propagation import Propagation

TOGETHER = 16
"""Inputs of one batch, which share the means and variances that batch norms read."""

RATE = 0.1
"""Of Adam, in deviations of the inputs; it falls to 0 by half a cosine."""

SHIFT = 56
"""Images are moved by up to a part of so many of their sides at each step, round their edges."""


@public
def synthetic_inputs(
    model: nn.Module | Network,
    inputs: Inputs | None = None,
    count: int = 32,
    *,
    steps: int = 60,
    input_mean: float | Tensor = 0.0,
    input_variance: float | Tensor = 1.0,
    generator: Randomness | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Samples]:
    """Make inputs for which the batch norms of a model read what they store: data where there are none.

    Args:
        model: A module, or a captured `Network`; not changed.
        inputs: As for `capture`; not needed for a Network.
        count: How many.
        steps: Of Adam. Each costs a forward and a backward pass.
        input_mean: Mean of the noise to begin with: a number, one for each channel, or of a sample's shape.
        input_variance: Its variance, likewise.
        generator: Source of randomness, on the CPU, or a seed.
        progress: Called after each step with its number and that of all.

    Returns:
        Batches of up to `TOGETHER` inputs, as ``data`` of other functions: tensors of shape (batch, …) in the containers that
        the model takes, in the network's type (float32 for half precision), on its device. `prune` takes those of a model of
        several inputs as `pathlift.pruning.Batch`, with any targets.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: It has no batch norm, or an argument is malformed.
        NumericalError: A weight is NaN or infinite, or values leave the range of the type.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> [batch.shape for batch in synthetic_inputs(model, (3, 8, 8), 20, steps=2, generator=0)]
        [torch.Size([10, 3, 8, 8]), torch.Size([10, 3, 8, 8])]
    """
    network, source = capture(model, inputs), source_of(generator)
    with without_autocast(), torch.inference_mode(mode=False):
        search = _Search(network, moments_of_inputs(network, input_mean, input_variance))
        parts = math.ceil(count / TOGETHER)
        sizes = [count * (part + 1) // parts - count * part // parts for part in range(parts)]
        made = []
        for number, size in enumerate(sizes):

            def told(step: int, before: int = number * steps) -> None:
                if progress is not None:
                    progress(before + step, len(sizes) * steps)

            made.append(search.batch(size, steps, source, told))
    return made


class _Search:
    """Goes down the gradient of what batch norms read."""

    def __init__(self, network: Network, moments: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Read off what the batch norms of a network store.

        Args:
            network: The network.
            moments: Input layer to mean and variance of the noise to begin with.

        Raises:
            InputError: The network has none.
            NumericalError: A weight is NaN or infinite.
        """
        values = network.values()
        blame(values)
        values = {weight: value.clone() if value.is_inference() else value for weight, value in values.items()}
        propagation = Propagation(network, moments, TAPS)
        if not propagation.norms:
            raise InputError("The model has no batch norm that stores what its inputs look like: nothing to make inputs from.")
        self.network, self.channels = network, propagation.channels
        self.dtype = network.dtype if network.dtype == torch.float64 else torch.float32
        self.weights_of: WeightsOf = weighted(values, dtype=self.dtype)
        self.stored = {}
        for name, norm in propagation.norms.items():
            rank = len(network.layer[name].shape)
            mean, variance = (propagation.evaluated(part, 0.0, rank).to(self.dtype) for part in (norm.mean, norm.variance))
            self.stored[name] = (mean, variance + norm.epsilon, norm.epsilon)
        self.inputs = [layer for layer in network.layers if layer.kind == "input"]
        self.moments = {
            layer.name: tuple(part.to(network.device, self.dtype) for part in moments[layer.name]) for layer in self.inputs
        }

    def batch(self, count: int, steps: int, source: torch.Generator | None, told: Callable[[int], None]) -> Samples:
        """Make inputs that share the means and variances that batch norms read."""
        free = [self._noise(layer, count, source).requires_grad_(True) for layer in self.inputs]
        optimizer = torch.optim.Adam(free, lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for step in range(1, steps + 1):
            with torch.enable_grad():
                gap = self._gap([self._moved(layer, x, source) for layer, x in zip(self.inputs, free, strict=True)])
                optimizer.zero_grad()
                gap.backward()
            optimizer.step()
            schedule.step()
            told(step)
        samples = [self._placed(layer, x.detach()).squeeze(1) for layer, x in zip(self.inputs, free, strict=True)]
        if not all(bool(torch.isfinite(sample).all()) for sample in samples):
            raise NumericalError("What the batch norms of the model read leaves the range of its type, or has no slope.")
        form = self.network.graph.form
        whole: Samples = samples[0] if form.fits(samples[0]) else form.filled(samples)
        return whole

    def _placed(self, layer: Layer, x: Tensor) -> Tensor:
        mean, variance = self.moments[layer.name]
        return mean + variance.sqrt() * x

    def _gap(self, free: list[Tensor]) -> Tensor:
        """Return the mean over batch norms of (m − μ)²/(σ²+ε) + (√((v+ε)/(σ²+ε)) − 1)², each the mean over its channels."""
        feed = {layer.name: self._placed(layer, x) for layer, x in zip(self.inputs, free, strict=True)}
        gaps: list[Tensor] = []

        def step(layer: Layer, below: Below) -> Tensor:
            if layer.kind == "input":
                value = feed[layer.name]
            elif layer.nonlinearity is None:
                value = carried(layer, below, self.weights_of, biases=self.weights_of)
            else:
                value = respond(layer, below, self.weights_of)
            if layer.name in self.stored:
                mean, known, epsilon = self.stored[layer.name]
                dims = [dim for dim in range(value.dim()) if dim != 2]
                read = value.mean(dims, keepdim=True)[0]
                spread = value.var(dims, correction=0, keepdim=True)[0] + epsilon
                gaps.append(((read - mean).square() / known + ((spread / known).sqrt() - 1).square()).mean())
            return value

        in_forward_order(self.network, step)
        return torch.stack(gaps).mean()

    def _noise(self, layer: Layer, count: int, source: torch.Generator | None) -> Tensor:
        """Return noise of variance 1; along positions its spectrum falls like that of photographs, in colours like theirs."""
        noise = torch.randn(count, *layer.shape, generator=source, dtype=self.dtype)
        dims = self._positions(layer)
        if dims:
            frequency = torch.zeros([1] * noise.dim(), dtype=self.dtype)
            for dim in dims:
                shape = [-1 if other == dim else 1 for other in range(noise.dim())]
                frequency = frequency + torch.fft.fftfreq(noise.shape[dim], dtype=self.dtype).reshape(shape).square()
            lowest = 1.0 / max(noise.shape[dim] for dim in dims)
            noise = torch.fft.ifftn(torch.fft.fftn(noise, dim=dims) / frequency.sqrt().clamp(min=lowest), dim=dims).real
        channel = self.channels[layer.name]
        if channel is not None and layer.shape[channel] == len(COLOURS) and len(dims) == 2:
            mixed = torch.linalg.cholesky(torch.tensor(COLOURS, dtype=self.dtype))
            noise = torch.tensordot(noise, mixed, ([1 + channel], [1])).movedim(-1, 1 + channel)
        return (noise / noise.square().mean().sqrt()).contiguous().to(self.network.device)

    def _positions(self, layer: Layer) -> list[int]:
        """Return the dimensions of a batch that count positions: all of a sample but that of channels."""
        channel = self.channels[layer.name]
        if channel is None:
            return []
        return [1 + dim for dim in range(1, len(layer.shape)) if dim != channel and layer.shape[dim] > 1]

    def _moved(self, layer: Layer, x: Tensor, source: torch.Generator | None) -> Tensor:
        for dim in self._positions(layer):
            most = round(x.shape[dim] / SHIFT)
            if most:
                x = x.roll(int(torch.randint(-most, most + 1, (), generator=source)), dim)
        return x
