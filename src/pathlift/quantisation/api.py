"""Quantise the weights of a network, without data or with them, and say what it costs (mathematics §9).

For each convolution and linear layer, in this order: a gauge (`pathlift.quantisation.gauge`), a grid (`ranges`), the integers
(`rounding`, `compensated`), and what takes up the mean of the change (`correction`). Batch norms and biases stay in floating
point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.arguments.common import Randomness, source_of
from pathlift.compensation.sides import standing_at_several_places
from pathlift.graph.calling import Samples, batches_of
from pathlift.graph.compact import compacted
from pathlift.graph.network import Network
from pathlift.magnitude import summed_magnitudes
from pathlift.metric.metric import path_metric
from pathlift.passes.propagate import blame
from pathlift.precision import without_autocast
from pathlift.quantisation.choices import Bits, formats_of
from pathlift.quantisation.gauge import GaugeChoice, in_gauge
from pathlift.quantisation.layer import Covariances, Way
from pathlift.quantisation.matrices import matrices_of
from pathlift.quantisation.report import QuantizeReport
from pathlift.quantisation.rounding import ORDERED
from pathlift.quantisation.sensitivity import Feed, Noted, outputs_of
from pathlift.quantisation.sequential import round_on_data
from pathlift.quantisation.spending import Bytes, bytes_of, within
from pathlift.quantisation.underway import Underway
from pathlift.reading import Inputs, capture
from pathlift.rescaling import with_state
from pathlift.rescaling.states import state_of
from pathlift.statistics import ActivationModel, InputMoments, activation_model, input_moments
from pathlift.statistics.model import DOUBT, moments_of_inputs, squared_outputs

SOME = 16
"""Inputs of the data on which the change of the outputs is looked at."""


@overload
def quantize(
    model: Network,
    inputs: None = None,
    bits: Bits = 8,
    *,
    granularity: str | int = "channel",
    rounding: str = "compensated",
    gauge: str = "none",
    range: str = "mse",
    affine: bool = False,
    ends: int | str | None = None,
    correction: str | None = None,
    budget: float | Bytes | None = None,
    data: Samples | Iterable[Samples] | None = None,
    sequential: bool = False,
    input_mean: float | Tensor = 0.0,
    input_variance: float | Tensor = 1.0,
    generator: Randomness | None = None,
    moments: int | None = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Network, QuantizeReport]: ...


@overload
def quantize(
    model: nn.Module,
    inputs: Inputs,
    bits: Bits = 8,
    *,
    granularity: str | int = "channel",
    rounding: str = "compensated",
    gauge: str = "none",
    range: str = "mse",
    affine: bool = False,
    ends: int | str | None = None,
    correction: str | None = None,
    budget: float | Bytes | None = None,
    data: Samples | Iterable[Samples] | None = None,
    sequential: bool = False,
    input_mean: float | Tensor = 0.0,
    input_variance: float | Tensor = 1.0,
    generator: Randomness | None = None,
    moments: int | None = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, QuantizeReport]: ...


@public
@torch.no_grad()
def quantize(
    model: nn.Module | Network,
    inputs: Inputs | None = None,
    bits: Bits = 8,
    *,
    granularity: str | int = "channel",
    rounding: str = "compensated",
    gauge: str = "none",
    range: str = "mse",  # noqa: A002 - the word of the field
    affine: bool = False,
    ends: int | str | None = None,
    correction: str | None = None,
    budget: float | Bytes | None = None,
    data: Samples | Iterable[Samples] | None = None,
    sequential: bool = False,
    input_mean: float | Tensor = 0.0,
    input_variance: float | Tensor = 1.0,
    generator: Randomness | None = None,
    moments: int | None = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module | Network, QuantizeReport]:
    """Round the weights of convolutions and linear layers of a copy to grids, and report what that costs.

    What the weights are multiplied by is known without data too: from the batch norms of the model, and by propagation where
    there is none.

    Args:
        model: A module, or a captured `Network`; not changed.
        inputs: As for `capture`; not needed for a Network.
        bits: See `Bits`.
        granularity: What has a scale of its own: ``channel``, each output channel; ``tensor``; or a number of input channels
            of an output channel, of which the largest divisor of theirs is taken.
        rounding: See `pathlift.quantisation.rounding`.
        gauge: See `pathlift.quantisation.gauge`; the copy is rescaled by powers of two, and rounded in that gauge.
        range: See `pathlift.quantisation.ranges`.
        affine: Whether grids of whole numbers have a zero point.
        ends: Bits of the first and of the last layer; None: as the others.
        correction: ``mean``: the mean of what rounding changes goes into the bias or the batch norm that follows;
            ``variance``: that, and running variances are estimated anew; ``none``. None: ``mean``, but ``none`` for rounding
            towards zero or away from it, whose path-metric is exact only then.
        budget: Bits of a weight on average, or `Bytes` of all parameters and buffers. Then ``bits`` says how many a tensor
            may have at most, and each gets as many from 2 on as make the sum of expected errors least; with data, of errors
            that are scaled to what rounding each tensor alone does to the outputs there (`layer_sensitivities`).
        data: Inputs with a batch dimension, shape (batch, …), or an iterable of such batches, to measure on what weights are
            multiplied by. A gauge is chosen without them.
        sequential: Layer after layer: a weight is fitted to what it did before by what it multiplies in the network that is
            rounded so far, and then rounded, so that each layer makes up for those below. Needs data, all of which are held
            in memory with the activations of a few layers.
        input_mean: Mean of the inputs, from which moments are propagated: a number, one for each channel, or of a sample's
            shape. A network without batch norms whose inputs are no images of mean 0 and variance 1 needs it, or data.
        input_variance: Their variance, likewise.
        generator: Source of randomness, on the CPU, or a seed, for stochastic rounding.
        moments: As for `path_metric`: 0, 2, 4, 6, 8 or None; how well the cost is enclosed where it is not exact.
        progress: Called after each tensor with its number and that of all.

    Returns:
        A quantised copy of what was given (module or Network), and the report.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: An argument is malformed, a pattern matches nothing, or a weight has no grid.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.7, -0.28]]))
        >>> quantized, report = quantize(layer, (2,), 4, rounding="towards_zero", range="minmax")
        >>> report.integers["weight"].tolist(), report.path_metric.exact
        ([[7, -2]], True)
    """
    with without_autocast():
        network = capture(model, inputs)
        source = source_of(generator)
        blame(compacted(network).values())
        matrices = matrices_of(network)
        formats = formats_of(list(matrices), bits, ends, affine=affine)
        declared = moments_of_inputs(network, input_mean, input_variance)
        network, choice = in_gauge(network, gauge, matrices, formats, granularity, declared)
        way = Way(rounding, granularity, range, correction or ("none" if rounding in ORDERED else "mean"))
        held = list(batches_of(data)) if sequential and data is not None else None
        windows = held is None or budget is not None or bool(standing_at_several_places(network, formats))
        activations, feeds = _looked_at(network, data if held is None else held, declared, windows=windows)
        known = _Known.of(activations, feeds, formats)
        if budget is not None:
            formats = within(budget, network, matrices, formats, way, known.moments, feeds)
        underway = Underway(network, matrices, formats, way, source, progress)
        if held is None:
            del activations  # what is known of each weight is given up when it is rounded
            _round_each_alone([underway], known.moments)
        else:
            round_on_data(underway, activations, known.moments, held)
        quantized = replace(network, state=underway.state)
        report = _report(quantized, underway, choice, known, moments, sequential=sequential)
        if isinstance(model, Network):
            return quantized.with_memory_of_its_own(), report
        return with_state(model, state_of(quantized)), report


def rounded_to_nearest(
    network: Network, several: Sequence[Bits], data: Samples | None = None
) -> list[tuple[Network, QuantizeReport]]:
    """Round to the nearest numbers of grids that reach to the largest weights, with several numbers of bits in one go.

    Args:
        network: The network.
        several: What `quantize` takes as ``bits``, one after the other.
        data: Inputs to measure statistics on.

    Returns:
        What `quantize` returns for each, without moments.

    Raises:
        InputError: A weight has no grid.
        NumericalError: A weight is NaN or infinite.
    """
    with without_autocast():
        blame(compacted(network).values())
        matrices = matrices_of(network)
        formats = [formats_of(list(matrices), bits, None, affine=False) for bits in several]
        way, choice = Way("nearest", "channel", "minmax", "mean"), GaugeChoice("none")
        known = _Known.of(*_looked_at(network, data), matrices)
        underway = [Underway(network, matrices, each, way) for each in formats]
        _round_each_alone(underway, known.moments)
        return [
            (quantized, _report(quantized, each, choice, known, 0))
            for each in underway
            for quantized in (replace(network, state=each.state),)
        ]


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of the activations.

    Attributes:
        origin: Where it comes from.
        moments: What each weight is multiplied by.
        squared_outputs: E‖R‖², by the same model.
        feeds: The first inputs of the data; empty without data.
    """

    origin: str
    moments: dict[str, InputMoments]
    squared_outputs: float
    feeds: Sequence[Feed]

    @staticmethod
    def of(activations: ActivationModel, feeds: Sequence[Feed], names: Iterable[str]) -> _Known:
        """Gather it for some weights."""
        moments = {name: input_moments(activations, name) for name in names}
        return _Known(activations.source, moments, squared_outputs(activations), feeds)


def _looked_at(
    network: Network,
    data: Samples | Iterable[Samples] | None,
    declared: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    *,
    windows: bool = True,
) -> tuple[ActivationModel, list[Feed]]:
    """Return what is known of the activations, and the first inputs of the data.

    With windows also the second moments of all that a weight multiplies are measured, not only those of channels.
    """
    noted = None if data is None else Noted(network, batches_of(data))
    activations = activation_model(
        network, noted, moments=declared, correlations="channels", running="checked", doubt=DOUBT, windows=windows
    )
    return activations, [] if noted is None else noted.feeds


def _round_each_alone(several: Sequence[Underway], moments: dict[str, InputMoments]) -> None:
    """Round tensor by tensor, to several formats each; the moments, of the network as it was, are given up one by one."""
    for name in several[0].formats:
        known = moments.pop(name)
        covariances = Covariances(known)
        for underway in several:
            underway.correct(underway.round(known, covariances))
        del covariances, known


def _report(
    quantized: Network,
    underway: Underway,
    choice: GaugeChoice,
    known: _Known,
    moments: int | None,
    *,
    sequential: bool = False,
) -> QuantizeReport:
    network, way, tensors = underway.network, underway.way, underway.tensors
    shares, log10_path_norm = _path_shares(network, quantized, list(tensors))
    metric = path_metric(network, dict(quantized.state), moments=moments)
    rows = tuple(replace(tensor, path_share=shares[name]) for name, tensor in tensors.items())
    saved = state_of(quantized)
    before = bytes_of(network)
    after = before - sum(network.state[row.name].nbytes - row.bytes for row in rows)
    others = {name: tensor for name, tensor in saved.items() if name not in tensors}
    change, size = _changed(network, quantized, known.feeds[0]) if known.feeds else (None, None)
    granularity = way.granularity if isinstance(way.granularity, str) else f"{way.granularity} input channels"
    return QuantizeReport(
        way.rounding,
        sequential,
        granularity,
        way.rule,
        choice,
        known.origin,
        rows,
        known.squared_outputs,
        change,
        size,
        log10_path_norm,
        metric,
        sum(layer.normalisation() is not None for layer in network.layers),
        tuple(underway.corrected),
        before,
        after,
        others,
    )


def _changed(network: Network, quantized: Network, feed: Feed) -> tuple[float, float]:
    """Return by how much the outputs of some inputs change, and how large they are: roots of mean squares."""
    some = {name: x[:SOME] for name, x in feed.items()}
    outputs, others = outputs_of(network, some), outputs_of(quantized, some)
    return float((others - outputs).square().mean().sqrt()), float(outputs.square().mean().sqrt())


FAINT = 2.0**-60
"""In place of a weight that is 0, relative to the largest of its tensor, to learn what paths run there."""


def _path_shares(network: Network, quantized: Network, names: list[str]) -> tuple[dict[str, float], float]:
    """Return Σ |θ'−θ|·∂‖Φ‖₁/∂|θ| of each tensor as a share of ‖Φ‖₁, and log₁₀ ‖Φ‖₁."""
    state = dict(network.state)
    for name in names:
        if bool((state[name] == 0).any()):
            exact = state[name].double()
            state[name] = torch.where(exact == 0, FAINT * exact.abs().amax(), exact)
    left = set(names)

    def summed(name: str, magnitude: Tensor) -> float:
        if name not in left:
            return 0.0
        change = (quantized.state[name].double() - network.state[name].double()).abs_()
        alone = magnitude.double() / state[name].abs().double() * change  # 0/0 where all are 0, and stay so
        return float(torch.where(change > 0, alone, 0.0).sum())

    shares, log10_path_norm = summed_magnitudes(replace(network, state=state), summed)
    return {name: shares[name] for name in names}, log10_path_norm
