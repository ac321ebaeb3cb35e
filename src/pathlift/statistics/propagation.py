"""Mean and variance of every neuron without data: from batch norms where there are some, by rules elsewhere (mathematics §9).

Channels are taken as independent and pre-activations as Gaussian. One step forward through each layer:

- the input has the moments that were given, 0 and 1 unless told;
- a batch norm knows those of its input, running_mean and running_var, which take the place of what was propagated, and those
  of its output, β and γ²σ²/(σ²+ε);
- an affine layer adds what its bundles of edges bring (`pathlift.statistics.transfer`): branches as if they were independent,
  but for several elementwise edges from one layer, whose weights add up first;
- a kink makes of N(μ, σ²) what its truncated moments say (`pathlift.statistics.kinks`);
- maxima over windows are those of equicorrelated Gaussians; where a kink that never falls stands before, it is taken out of the
  maximum; antecedents of unlike moments are joined two by two (Clark).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pathlift.edges import Identity, Reduce, Window
from pathlift.graph.expressions import Expression, Normalisation, evaluate
from pathlift.graph.layers import Bias, Bound, Clamp, Connection, Extremum, Layer, LearnedSlope, Slopes
from pathlift.graph.network import Network
from pathlift.passes.forward import antecedents, value_of
from pathlift.passes.programs import Values
from pathlift.precision import full_precision
from pathlift.statistics.channels import channel_dims
from pathlift.statistics.kinks import Kink, Response, largest_of, largest_of_equal, respond
from pathlift.statistics.transfer import (
    Apart,
    Elementwise,
    Transfer,
    Weighted,
    collapsed,
    each_apart,
    numbered,
    stationary,
    told_apart,
    transfer_of,
)

Running: TypeAlias = Literal["stored", "scaled", "none"]
"""What running variances say of what batch norms read: their value; that, times the power of 4 that brings it nearest to the
propagated variance, so that it does not matter who rescaled what stands before; or nothing."""

FAINT = 2.0**-40
"""Below this share of the variance of its pre-activation, a neuron is taken to stand still: a ReLU 7 deviations under 0.

Nobody knows the tails of a pre-activation so far out, and weights that are fitted to make up for others would lean on them.
"""


@dataclass(frozen=True, eq=False)
class Moments:
    """What the values of a layer look like; tensors have the layer's dimensions, with size 1 where positions are alike.

    Attributes:
        mean: E u.
        variance: Var u.
        correlation: ρ, of two neurons of one channel inside a window.
        source: What they were taken from: ``data``, ``batch norm`` or ``propagation``.
        before: Of a kink: its function and the moments of its pre-activations.
    """

    mean: Tensor
    variance: Tensor
    correlation: Tensor
    source: str
    before: tuple[Kink, Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """What a layer does to moments.

    Attributes:
        moments: Those of its values.
        response: Of a kink.
        shares: Of a maximum: how often each antecedent is it, by connection; None: all alike.
        expected: For the input of a batch norm: mean and variance as they were propagated.
    """

    moments: Moments
    response: Response | None = None
    shares: tuple[Tensor, ...] | None = None
    expected: tuple[Tensor, Tensor] | None = None

    def squares(self, transfer: Weighted) -> Tensor:
        """Return E u² of what each column of a weight reads of these values, (groups, columns)."""
        moments = self.moments
        return transfer.squares(*(transfer.per_channel(x) for x in (moments.mean, moments.variance, moments.correlation)))


class Propagation:
    """One way forward through a network."""

    def __init__(
        self,
        network: Network,
        inputs: Mapping[str, tuple[Tensor, Tensor]],
        correlation: float,
        *,
        running: Running = "stored",
        doubt: float = 0.0,
    ) -> None:
        """Describe what is known.

        Args:
            network: The network.
            inputs: Input layer to mean and variance, broadcastable to its shape; 0 and 1 for others.
            correlation: ρ.
            running: What running variances say. Propagated ones are farther off, and go along with any rescaling, which
                running variances do not.
            doubt: The variance of the error that a weight makes of independent errors of all that it multiplies, of variance
                doubt·E u² each, is added to what it brings; not where a batch norm says what that looks like.
        """
        self.network, self.running, self.doubt = network, running, doubt
        self.values: Values = network.values()
        self.inputs = inputs
        self.rho = torch.tensor(correlation, dtype=torch.float64, device=network.device)
        self.channels = channel_dims(network)
        self.norms = {
            layer.connections[0].source: norm for layer in reversed(network.layers) if (norm := layer.normalisation())
        }
        self.steps: dict[str, Step] = {}
        self.depth: dict[str, int] = {}
        """Layer name to how many weights stand between it and what is known: the inputs, and what batch norms read and give."""
        self.classes: dict[str, Tensor] = {}
        self._bundles: dict[str, list[Transfer]] = {}

    def run(self) -> dict[str, Step]:
        """Go through all layers.

        Returns:
            Layer name to what it does.
        """
        with full_precision():
            for layer in self.network.layers:
                self.classes[layer.name] = self._classes(layer)
                step = self._step(layer)
                norm = self.norms.get(layer.name)
                self.steps[layer.name] = step if norm is None else self._anchored(layer, step, norm)
                self.depth[layer.name] = 0 if step.moments.source == "batch norm" or norm is not None else self._depth(layer)
                self._done(layer)
        return self.steps

    def _done(self, layer: Layer) -> None:
        """Do what is left to do when the moments of a layer are known."""

    # ---- values of weights

    def evaluated(self, expression: Expression | None, default: float, rank: int) -> Tensor:
        """Return a vector of a batch norm as it broadcasts, in float64."""
        value = (
            torch.tensor(default, dtype=torch.float64)
            if expression is None
            else torch.as_tensor(evaluate(expression, self.network.state))
        )
        return value.detach().to(self.network.device, torch.float64).reshape(1, -1, *[1] * (rank - 2))

    def placed(self, bias: Bias) -> Tensor:
        """Return biases as they broadcast over their layer, in float64."""
        return value_of(bias.weight, self.values).detach().to(self.network.device, torch.float64).reshape(bias.view)

    def weight(self, connection: Connection) -> Tensor | None:
        """Return the value of the weight of a bundle of edges, None for 1."""
        if connection.weight is None:
            return None
        return value_of(connection.weight, self.values).detach().to(self.network.device)

    def bundles(self, layer: Layer) -> list[Transfer]:
        """Return how moments go along each bundle of edges of a layer; of a PReLU only what brings its pre-activations."""
        if layer.name not in self._bundles:
            self._bundles[layer.name] = self._made_bundles(layer)
        return self._bundles[layer.name]

    def _made_bundles(self, layer: Layer) -> list[Transfer]:
        connections = layer.connections[:1] if isinstance(layer.nonlinearity, LearnedSlope) else layer.connections
        return [
            transfer_of(
                connection.edges,
                self.weight(connection),
                self.network.layer[connection.source].shape,
                layer.shape if layer.concat is None else layer.concat.shape(position, layer.shape),
                self.channels[connection.source],
                self.classes[connection.source],
                constant=connection.weight is None or not connection.weight.requires & set(self.network.parameters),
            )
            for position, connection in enumerate(connections)
        ]

    def transfers(self, layer: Layer) -> list[tuple[Connection, Transfer]]:
        """Return the bundles of a layer, those that are elementwise and start at one layer joined, and how moments go along."""
        others: list[tuple[Connection, Transfer]] = []
        joined: dict[str, tuple[Connection, Elementwise]] = {}
        for connection, transfer in zip(layer.connections, self.bundles(layer), strict=False):
            if isinstance(transfer, Elementwise) and layer.concat is None:
                known = joined.get(connection.source)
                joined[connection.source] = (connection, transfer if known is None else known[1].joined(transfer))
            else:
                others.append((connection, transfer))
        return [*joined.values(), *others]

    # ---- which neurons are alike

    def _classes(self, layer: Layer) -> Tensor:
        """Return a number for each class of neurons of a layer whose moments are alike whatever the weights are."""
        if layer.kind == "input":
            moments = self.inputs.get(layer.name)
            channel = self.channels[layer.name]
            shape = [size if dim == channel else 1 for dim, size in enumerate(layer.shape)]
            declared = () if moments is None else tuple(each_apart(part.shape, self.network.device) for part in moments)
            return told_apart(each_apart(shape, self.network.device), *declared)
        if isinstance(layer.nonlinearity, Extremum):
            return self._classes_of_extremum(layer, layer.nonlinearity)
        transfers = self.transfers(layer)
        alone = len(transfers) == 1 and not layer.biases
        pieces = [transfer.classes(self.classes[connection.source], alone=alone) for connection, transfer in transfers]
        if layer.concat is not None:
            shapes = [layer.concat.shape(position, layer.shape) for position in range(len(pieces))]
            full = [
                (numbered(piece) + number * 2.0**31).expand(shape)
                for number, (piece, shape) in enumerate(zip(pieces, shapes, strict=True))
            ]
            return numbered(collapsed(torch.cat(full, layer.concat.dim)))
        known = set(self.network.parameters)
        views = [bias.view for bias in layer.biases if bias.weight.requires & known]
        views += [slope.shape for slope in self.kink(layer).slopes] if isinstance(layer.nonlinearity, LearnedSlope) else []
        ones = torch.ones([1] * len(layer.shape), dtype=torch.float64, device=self.network.device)
        return told_apart(ones, *pieces, *(each_apart(view, self.network.device) for view in views))

    def _classes_of_extremum(self, layer: Layer, kind: Extremum) -> Tensor:
        if self._pools_alike(layer, kind):
            (connection,) = layer.connections
            classes = self.classes[connection.source]
            if isinstance(connection.edges, Reduce) and not connection.edges.keepdim:
                return classes.squeeze(connection.edges.dims)
            return classes
        biases = [each_apart(bias.view, self.network.device) for bias in layer.biases]
        laid_out = self._laid_out(layer, self.classes, biases, Extremum(True, kind.zero))
        ranks = torch.arange(1, len(laid_out) + 1, dtype=torch.float64, device=laid_out.device)
        there = torch.where(torch.isfinite(laid_out), laid_out, 0.0)
        return numbered(collapsed(torch.einsum("a...,a->...", there, ranks)))

    # ---- layers

    def _depth(self, layer: Layer) -> int:
        """Return the largest number of weights since something was known."""
        if isinstance(layer.nonlinearity, Extremum) or not layer.connections:
            return max((self.depth[connection.source] for connection in layer.connections), default=0)
        return max(
            self.depth[connection.source] + isinstance(transfer, (Weighted, Apart))
            for connection, transfer in self.transfers(layer)
        )

    def _step(self, layer: Layer) -> Step:
        if layer.kind == "input":
            return Step(self._input(layer))
        if isinstance(layer.nonlinearity, Extremum):
            return self._extremum(layer, layer.nonlinearity)
        norm = layer.normalisation()
        if norm is not None:
            return Step(self._normalised(layer, norm))
        mean, variance, correlation = self._affine(layer)
        if layer.nonlinearity is None:
            return Step(Moments(mean, variance, correlation, "propagation"))
        kink = self.kink(layer)
        response = respond(kink, mean, variance)
        still = response.variance < FAINT * variance
        centre, spread = torch.where(still, kink(mean), response.mean), torch.where(still, 0.0, response.variance)
        return Step(Moments(centre, spread, correlation, "propagation", (kink, mean, variance)), response)

    def _input(self, layer: Layer) -> Moments:
        shape = self.classes[layer.name].shape
        one = torch.ones(shape, dtype=torch.float64, device=self.network.device)
        mean, variance = self.inputs.get(layer.name, (torch.zeros_like(one), one))
        return Moments(mean.expand(shape), variance.expand(shape), self._rho(layer), "propagation")

    def _rho(self, layer: Layer) -> Tensor:
        return self.rho.reshape([1] * len(layer.shape))

    def _normalised(self, layer: Layer, norm: Normalisation) -> Moments:
        rank, below = len(layer.shape), self.steps[layer.connections[0].source].moments
        variance, beta, gamma = (
            self.evaluated(expression, default, rank)
            for expression, default in ((norm.variance, 1.0), (norm.bias, 0.0), (norm.weight, 1.0))
        )
        read = self.variance_read(variance, below.variance)
        return Moments(beta, gamma**2 * read / (variance + norm.epsilon), below.correlation, "batch norm")

    def _anchored(self, layer: Layer, step: Step, norm: Normalisation) -> Step:
        """Put what a batch norm knows of its input in the place of what was propagated."""
        rank, moments = len(layer.shape), step.moments
        mean, variance = (self.evaluated(expression, 0.0, rank) for expression in (norm.mean, norm.variance))
        known = Moments(mean, self.variance_read(variance, moments.variance), moments.correlation, "batch norm")
        return replace(step, moments=known, expected=(moments.mean, moments.variance))

    def variance_read(self, stored: Tensor, propagated: Tensor) -> Tensor:
        """Return the variance of what a batch norm reads.

        Args:
            stored: The running variance.
            propagated: The variance as it was propagated.

        Returns:
            The variance.
        """
        if self.running == "stored":
            return stored
        if self.running == "none":
            return propagated
        there = (stored > 0) & (propagated > 0)
        exponent = torch.frexp(torch.where(there, propagated / stored, 1.0)).exponent
        powers = torch.div(exponent, 2, rounding_mode="floor")  # 2^(2k−1) ≤ propagated/stored < 2^(2k+1)
        return torch.ldexp(stored, torch.where(there, 2 * powers, 0))

    def _affine(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and correlation of what the edges and biases bring."""
        brought = []
        for connection, transfer in self.transfers(layer):
            mean, variance = self._brought(layer, connection, transfer)
            doubt = self.doubted(layer, connection, transfer)
            brought.append((mean, variance if doubt is None else variance + doubt))
        nothing = torch.zeros([1] * len(layer.shape), dtype=torch.float64, device=self.network.device)
        if layer.concat is not None:
            pieces = [layer.concat.shape(position, layer.shape) for position in range(len(brought))]
            mean, variance = (
                torch.cat([part[which].expand(shape) for part, shape in zip(brought, pieces, strict=True)], layer.concat.dim)
                for which in (0, 1)
            )
        else:
            mean, variance = (sum((part[which] for part in brought), nothing) for which in (0, 1))
            if layer.nonlinearity is None:
                mean = sum((self.placed(bias) for bias in layer.biases), mean)
        return *stationary(mean, variance, self.classes[layer.name].shape), self._rho(layer)

    def _brought(self, layer: Layer, connection: Connection, transfer: Transfer) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return mean and variance that one bundle of edges brings to a layer."""
        below = self.steps[connection.source].moments
        variance = transfer.variance(below.variance, below.correlation)
        more = transfer.variance_of_means(below.mean, below.correlation)
        return transfer.mean(below.mean), variance if more is None else variance + more

    def doubted(self, layer: Layer, connection: Connection, transfer: Transfer) -> Tensor | None:
        """Return the variance of the error that one bundle of edges brings, None where there is none to speak of."""
        if not self.doubt or layer.name in self.norms or not isinstance(transfer, (Weighted, Apart)):
            return None
        below = self.steps[connection.source].moments
        return self.doubt * transfer.variance(below.variance + below.mean**2, torch.zeros_like(below.correlation))

    def kink(self, layer: Layer) -> Kink:
        """Return the function of a layer with slopes or a clamp."""
        kind, one = layer.nonlinearity, torch.ones([1] * len(layer.shape), dtype=torch.float64, device=self.network.device)
        zero = torch.zeros_like(one)
        if isinstance(kind, Slopes):
            return Kink((zero,), (kind.minus * one, kind.plus * one), zero, 1)
        if isinstance(kind, LearnedSlope):
            slope = layer.connections[1]
            known = self.classes[layer.connections[0].source]
            transfer = transfer_of(slope.edges, self.weight(slope), layer.shape, layer.shape, None, known, constant=False)
            assert isinstance(transfer, Elementwise)
            return Kink((zero,), (transfer.weight, one), zero, 1)
        assert isinstance(kind, Clamp)
        low, high = self._end(kind.low, one), self._end(kind.high, one)
        low = torch.minimum(low, high) if low is not None and high is not None else low
        points = tuple(point for point in (low, high) if point is not None)
        if not points:
            return Kink((zero,), (one, one), zero, 1)
        slopes = ((zero,) if low is not None else ()) + (one,) + ((zero,) if high is not None else ())
        return Kink(points, slopes, points[0], 0 if low is None else 1)

    def _end(self, end: Bound, one: Tensor) -> Tensor | None:
        if isinstance(end, Bias):
            return self.placed(end) * one
        return None if end is None else end * one

    def _extremum(self, layer: Layer, kind: Extremum) -> Step:
        if self._pools_alike(layer, kind):
            return Step(Moments(*self._of_a_window(layer, kind), self._rho(layer), "propagation"))
        biases = [self.placed(bias) for bias in layer.biases]
        means = self._laid_out(layer, {name: step.moments.mean for name, step in self.steps.items()}, biases, kind)
        spread = {name: step.moments.variance for name, step in self.steps.items()}
        variances = self._laid_out(layer, spread, [torch.zeros_like(bias) for bias in biases], Extremum(True, kind.zero))
        variances = torch.where(torch.isfinite(means), variances, 0.0)
        within = len(layer.connections) == 1 and not biases and self._one_channel(layer.connections[0])
        mean, variance, shares = largest_of(list(means), list(variances), self.rho if within else torch.zeros_like(self.rho))
        mean = mean if kind.largest else -mean
        mean, variance = stationary(mean, variance, self.classes[layer.name].shape)
        return Step(Moments(mean, variance, self._rho(layer), "propagation"), shares=tuple(shares))

    @staticmethod
    def distinct(layer: Layer) -> tuple[Connection, ...]:
        """Return the connections of a maximum, without a second one to the very same neurons."""
        plain = {connection.source: connection for connection in layer.connections if isinstance(connection.edges, Identity)}
        moved = [connection for connection in layer.connections if not isinstance(connection.edges, Identity)]
        return (*plain.values(), *moved)

    def _laid_out(self, layer: Layer, below: Mapping[str, Tensor], biases: list[Tensor], kind: Extremum) -> Tensor:
        """Return the antecedents of each neuron side by side, shape (antecedents, *shape)."""
        layer = replace(layer, connections=self.distinct(layer))
        full = {
            connection.source: below[connection.source].expand(self.network.layer[connection.source].shape).unsqueeze(0)
            for connection in layer.connections
        }
        return antecedents(layer, full, biases, kind)[0]

    def _one_channel(self, connection: Connection) -> bool:
        channel, edges = self.channels[connection.source], connection.edges
        if isinstance(edges, Reduce):
            return channel not in edges.dims
        rank = len(self.network.layer[connection.source].shape)
        return isinstance(edges, Window) and (channel is None or channel < rank - len(edges.kernel))

    def _pools_alike(self, layer: Layer, kind: Extremum) -> bool:
        """Whether an extremum is one over positions of one channel that are alike."""
        connection = layer.connections[0]
        if len(layer.connections) > 1 or layer.biases or kind.zero or not isinstance(connection.edges, (Window, Reduce)):
            return False
        classes = self.classes[connection.source]
        return self._one_channel(connection) and all(
            classes.shape[dim] == 1 for dim in self._pooled(connection.edges, classes.dim())
        )

    def _pooled(self, edges: Window | Reduce, rank: int) -> tuple[int, ...]:
        return edges.dims if isinstance(edges, Reduce) else tuple(range(rank - len(edges.kernel), rank))

    def _of_a_window(self, layer: Layer, kind: Extremum) -> tuple[Tensor, Tensor]:
        """Return the moments of the extremum over positions that are alike, on average over windows of all sizes."""
        (connection,) = layer.connections
        shape, moments = self.network.layer[connection.source].shape, self.steps[connection.source].moments
        kink, mean, variance = moments.before or (None, moments.mean, moments.variance)
        if kink is not None and not kink.rises:
            kink, mean, variance = None, moments.mean, moments.variance
        counts = connection.edges.sum(torch.ones(shape, dtype=torch.float64, device=self.network.device), None)
        numbers, times = counts.unique(return_counts=True)
        parts = [
            (
                times_ / counts.numel(),
                *largest_of_equal(kink, mean, variance, moments.correlation, int(number), largest=kind.largest),
            )
            for number, times_ in zip(numbers.tolist(), times.tolist(), strict=True)
        ]
        centre = torch.stack([share * first for share, first, _ in parts]).sum(0)
        spread = torch.stack([share * (second + (first - centre) ** 2) for share, first, second in parts]).sum(0)
        if isinstance(connection.edges, Reduce) and not connection.edges.keepdim:
            centre, spread = (part.squeeze(connection.edges.dims) for part in (centre, spread))
        return centre, spread
