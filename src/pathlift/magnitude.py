"""Path-magnitude: each weight's share of the path-norm, all in one forward and one backward pass (§6, (10)–(14))."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

import pathlift.drawing as drawing
from pathlift.arguments import declare, public
from pathlift.arguments.kinds import file
from pathlift.errors import NumericalError
from pathlift.graph.averaged import averaged
from pathlift.graph.calling import Samples
from pathlift.graph.expressions import widen
from pathlift.graph.layers import Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.graph.origins import is_moved, moved_back, moved_from
from pathlift.graph.recall import extremes
from pathlift.norm import finite_order, to_float
from pathlift.passes.backward import SMALLEST, Backward
from pathlift.passes.forward import feed_of
from pathlift.passes.programs import ScoreProgram, Values
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.scaled import Scaled, least_above_zero
from pathlift.precision import without_autocast
from pathlift.reading import Inputs, capture
from pathlift.results import Result
from pathlift.storage.checkpoints import Checkpoint, ShardWriter

PIECE = 1 << 20
"""Shares that are compared with weights at a time."""

declare(__name__, {"path_magnitude.q": finite_order, "out": file})


@dataclass(frozen=True, eq=False, repr=False)
class PathMagnitude(Result, Mapping[str, Tensor], rows=("tensors",)):
    """Shares of the path-norm by parameter name; multiply by the path-norm to get PathMag(θ, i) of equation (10).

    A batch norm is scored as the theory sees it: ``bn.weight`` is the share of the paths through its scale
    s = γ/√(σ²+ε), ``bn.bias`` that of the paths that start at its shift t = β − μ·s. A derived weight (weight_norm,
    pruning masks, weight standardisation) is scored under the name of the module that owns it, such as ``conv.weight``.

    A share is right up to the rounding of the model's precision and, in float32, up to 2⁻¹⁰⁰ of the whole for each edge that
    carries the weight: neurons whose paths are less together may be left out.

    Attributes:
        log10_path_norm: log₁₀ of the whole that the shares are parts of: ‖Φ(θ)‖₁, or what `path_magnitude` was asked to
            share out; −inf for 0.
    """

    _scores: Mapping[str, Tensor]
    log10_path_norm: float

    def __getitem__(self, name: str) -> Tensor:
        """Return the shares of one parameter."""
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over names."""
        return iter(self._scores)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._scores)

    @override
    def _draw(self, ax: drawing.Picture) -> None:
        scores = {name: spread(tensor) for name, tensor in self.items()}
        drawing.ranges_by_layer(ax, list(scores), list(scores.values()), "share of the path-norm through a weight")


def spread(scores: Tensor) -> tuple[float, float, float]:
    """Return the 5 % and 95 % quantiles of the scores that are not 0, and their median between; NaN when there are none."""
    there = scores.detach().reshape(-1)
    there = there[there > 0].cpu().double().sort().values
    if not len(there):
        return math.nan, math.nan, math.nan
    low, middle, high = (float(there[round(share * (len(there) - 1))]) for share in (0.05, 0.5, 0.95))
    return low, middle, high


@public
@torch.no_grad()
def path_magnitude(
    model: nn.Module | Network,
    inputs: Inputs | None = None,
    *,
    q: float = 1,
    x: Samples | None = None,
    out: Path | str | None = None,
) -> PathMagnitude:
    """Compute PathMag(θ, i)/‖Φ(θ)‖₁ for every parameter: the share of the path-norm that goes through it.

    PathMag(θ, i) = ‖Φ(θ) − Φ(θ with θ_i = 0)‖₁ = |θ_i|·∂‖Φ(θ)‖₁/∂|θ_i| (equations (10)–(12), (14)). Invariant under
    every neuron-wise rescaling. A tensor that is used several times has the sum over its uses, as in the derivative.

    With ``q`` it shares out Σ_p |Φ_p|^q instead, and with ``x`` the mean over the samples of Σ_p |Φ_p·x[p₀]|^q, where a
    path counts by the input pixel p₀ that it starts at (1 for a bias): also without labels, also invariant.

    Args:
        model: A module, or a captured `Network`.
        inputs: As for `capture`; not needed for a Network.
        q: Order, at least 1 and finite.
        x: Inputs, shape (samples, …), one tensor per input of the model; None for ones.
        out: A new folder to write the scores to as they come (safetensors files and their index); they are then read from
            there when asked for, and never all in memory. Written whole or not at all.

    Returns:
        Mapping from parameter name to a tensor of the parameter's shape, in its dtype or wider, on its device. Entries
        lie in [0, 1], in float64 where float32 would lose some. Parameters that no path uses get zeros.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: ``inputs``, ``q`` or ``x`` is malformed, or ``out`` exists or cannot be written.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> path_magnitude(layer, (2,))["weight"]
        tensor([[0.7500, 0.2500]])
        >>> path_magnitude(layer, (2,), x=torch.tensor([[1.0, 3.0]]))["weight"]
        tensor([[0.5000, 0.5000]])
    """
    with without_autocast():
        return magnitudes(capture(model, inputs), q, x, out)


def magnitudes(network: Network, q: float = 1.0, x: Samples | None = None, out: Path | str | None = None) -> PathMagnitude:
    """Compute `path_magnitude` of a network as it stands, which may be a compact form.

    Args:
        network: The network.
        q: As for `path_magnitude`.
        x: As for `path_magnitude`; not for a compact form.
        out: As for `path_magnitude`.

    Returns:
        The shares.
    """
    feed = None if x is None else _mean_power(network, x, q)
    network = averaged(network) if x is None else network
    values = network.values()
    with nullcontext() if out is None else ShardWriter(out) as writer:
        total, scores = _scored(network, values, q, feed, writer)
    shares = scores if out is None else Checkpoint(out, network.device)
    return PathMagnitude(shares, to_float(total)[1])


def summed_magnitudes(network: Network, summed: Callable[[str, Tensor], float]) -> tuple[dict[str, float], float]:
    """Reduce the path-magnitude of each parameter to a number as it comes: all of them are never in memory.

    Args:
        network: The network.
        summed: From the name of a parameter and its shares to a number.

    Returns:
        Name to number, and log₁₀ ‖Φ‖₁.
    """
    network, numbers = averaged(network), _Numbers(summed)
    total, _ = _scored(network, network.values(), 1.0, None, numbers)
    return numbers.of, to_float(total)[1]


class _Taker(Protocol):
    """Takes the shares of parameters one after another."""

    def restart(self) -> None: ...

    def add(self, name: str, tensor: Tensor) -> None: ...

    def __contains__(self, name: str) -> bool: ...


class _Numbers:
    """Keeps one number of each parameter."""

    def __init__(self, summed: Callable[[str, Tensor], float]) -> None:
        self.summed = summed
        self.of: dict[str, float] = {}

    def restart(self) -> None:
        self.of.clear()

    def add(self, name: str, tensor: Tensor) -> None:
        self.of[name] = self.summed(name, tensor)

    def __contains__(self, name: str) -> bool:
        return name in self.of


def _scored(
    network: Network, values: Values, q: float, feed: Mapping[str, Tensor] | None, writer: _Taker | None
) -> tuple[Scaled | None, dict[str, Tensor]]:
    """Return the total, and its shares; those that a writer took are not among them."""
    narrowest = network.dtype

    def attempt(dtype: torch.dtype) -> tuple[Scaled | None, dict[str, Tensor]]:
        if writer is not None:
            writer.restart()
        scores = _Scores(network, writer, values, narrowest)
        program = ScoreProgram(network, values, dtype, q=q, starting=feed)
        if q == 2:
            program.transform = torch.square  # the same bits in one step
        tracks = propagate(network, program, keep=True)
        return Backward(network, program, share=scores.add, lost=scores.lost).run(tracks), scores.finished()

    return in_range(attempt, narrowest, values, memory=network.memory("path_magnitude", q) if feed is None else None)


def _mean_power(network: Network, x: Samples, q: float) -> dict[str, Tensor]:
    """Return the mean of |x|^q over the samples, by input layer.

    Raises:
        NumericalError: It is 0 where x is not, or infinite.
    """
    powers = {}
    for name, value in feed_of(network, x).items():
        power = value.abs().pow(q)
        if bool((torch.isinf(power) | ((power == 0) & (value != 0))).any()):
            raise NumericalError(f"The inputs to the power q = {q:g} leave the range of float64. Choose a smaller q.")
        powers[name] = power.mean(0)
    return powers


@public
@torch.no_grad()
def unit_path_magnitude(model: nn.Module | Network, inputs: Inputs | None = None) -> PathMagnitude:
    """Compute the share of the path-norm that goes through each channel or neuron: A(v)·G(v)/‖Φ(θ)‖₁.

    Args:
        model: A module, or a captured `Network`.
        inputs: As for `capture`; not needed for a Network.

    Returns:
        Mapping from module path (of each convolution, linear layer and batch norm with parameters that paths run through) to
        a tensor with one share per output channel or neuron, summed over spatial positions and over the calls of the module.
        A module that calls several such operators itself has an entry for each, under the name of its weight; in an ONNX file
        each node is a module.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: ``inputs`` is malformed.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> shares = unit_path_magnitude(model, (2,))
        >>> [name for name in shares], tuple(shares["0"].shape)
        (['0', '2'], (3,))
    """
    network = averaged(capture(model, inputs))
    values = network.values()

    def attempt(dtype: torch.dtype) -> tuple[Scaled | None, dict[str, Tensor]]:
        shares: dict[str, Tensor] = {}

        def unit(layer: Layer, mass: Tensor) -> None:
            assert layer.unit_name is not None
            assert layer.unit_dim is not None
            summed = mass.sum([dim for dim in range(mass.dim()) if dim != layer.unit_dim])
            shares[layer.unit_name] = shares[layer.unit_name] + summed if layer.unit_name in shares else summed

        program = ScoreProgram(network, values, dtype)
        tracks = propagate(network, program, keep=True)
        return Backward(network, program, unit=unit).run(tracks), shares

    total, shares = in_range(attempt, network.dtype, values, memory=network.memory("unit_path_magnitude"))
    order = dict.fromkeys(layer.unit_name for layer in network.layers if layer.unit_name is not None)
    return PathMagnitude({name: shares[name] for name in order if name in shares}, to_float(total)[1])


class _Scores:
    """Adds up the shares of each weight over its uses, moved back to the parameters where a weight tensor only moves them."""

    def __init__(self, network: Network, writer: _Taker | None, values: Values, narrowest: torch.dtype) -> None:
        self.network = network
        self.writer = writer
        self.values = values
        self.narrowest = narrowest
        self.at_once = network.memory("shares") is None
        self.sums: dict[str, Tensor] = {}
        self.open = Counter(network.remembered(_used_names))

    def lost(self, weight: WeightTensor, share: Tensor) -> bool:
        """Whether there are shares below the smallest normal number of float32 that are not those of weights of 0."""
        parts = zip(*(tensor.reshape(-1).split(PIECE) for tensor in (share, self.values[weight])), strict=True)
        if self.at_once:
            return any(float(part.min()) < SMALLEST and bool(_lost(part, weights).any()) for part, weights in parts)
        anywhere = torch.stack([_lost(part, weights).any() for part, weights in parts]).any()
        return extremes(anywhere.to(share.dtype))[1] > 0.0  # what an accelerator is not waited for: see `recall`

    def add(self, weight: WeightTensor, share: Tensor) -> None:
        self._add_all(weight, share)
        names = _names(self.network, weight)
        self.open.subtract(names)
        if self.writer is not None:
            for name in names:
                if self.open[name] == 0:
                    self.writer.add(name, self._narrowed(self.sums.pop(name)))

    def _add_all(self, weight: WeightTensor, share: Tensor) -> None:
        if is_moved(self.network, weight):
            for name, part in moved_back(self.network, weight, share).items():
                self._add(name, part)
        else:
            self._add(_names(self.network, weight)[0], share)

    def _add(self, name: str, share: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = share
            return
        known = self.sums[name]
        if share.dtype == torch.float64 != known.dtype:
            self.sums[name] = known = known.double()
        known += share.reshape(known.shape)

    def _narrowed(self, shares: Tensor) -> Tensor:
        """Return shares in the precision of the network where that holds them: those that are 0 in truth need no other."""
        if shares.dtype != torch.float64 or self.narrowest == torch.float64:
            return shares
        return shares if shares.numel() and least_above_zero(shares) < SMALLEST else shares.float()

    def finished(self) -> dict[str, Tensor]:
        """Give zeros to parameters that no path uses, in the model's order; a writer takes what it has not got yet."""
        reached = {name for weight in self.network.weights for name in weight.requires}
        scored = {
            name for weight in self.network.weights if weight.score_name is not None for name in _names(self.network, weight)
        }
        ordered: dict[str, Tensor] = {}

        def done(name: str, tensor: Tensor) -> None:
            if self.writer is None:
                ordered[name] = self._narrowed(tensor)
            else:
                self.writer.add(name, self._narrowed(tensor))

        for name in self.network.parameters:
            if name in self.sums:
                done(name, self.sums.pop(name))
            elif (name not in reached or name in scored) and (self.writer is None or name not in self.writer):
                done(name, torch.zeros_like(widen(self.network.state[name]), requires_grad=False))
        for weight in self.network.weights:  # weights that are no parameters
            for name in _names(self.network, weight) if weight.score_name is not None else ():
                if name in self.sums:
                    done(name, self.sums.pop(name))
        return ordered


def _lost(share: Tensor, weights: Tensor) -> Tensor:
    """Return where float32 has lost a share: a weight of 0 has a share of 0."""
    return (share < SMALLEST) & (weights != 0)


def _uses(network: Network) -> Iterator[WeightTensor]:
    """Yield the scored weight of each bundle of edges and of each bias."""
    for layer in network.layers:
        for weight in (*(connection.weight for connection in layer.connections), *(bias.weight for bias in layer.biases)):
            if weight is not None and weight.score_name is not None:
                yield weight


def _used_names(network: Network) -> Counter[str]:
    """Count how often each name is told a share."""
    return Counter(name for weight in _uses(network) for name in _names(network, weight))


def _names(network: Network, weight: WeightTensor) -> list[str]:
    """Return the names under which a weight tensor is reported."""
    if is_moved(network, weight):
        return moved_from(network, weight)
    assert weight.score_name is not None
    return [weight.score_name if weight.movement is None else f"{weight.score_name}.derived"]


__all__ = ["PathMagnitude", "path_magnitude", "unit_path_magnitude"]
