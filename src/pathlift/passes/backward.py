"""Back from the outputs through a program of one track: the path mass of every weight and every neuron (mathematics §3, §6).

With A the path activation and G(v) the sum of the weights of all paths from v to an output, A(v)·G(v) is the total
|Φ_p| of the paths through v, and |θ_i|·Σ A(u)·G(v) over the edges that carry θ_i is that of the paths through θ_i,
which is the path-magnitude (10)–(12), (14). G starts at 1/‖Φ‖₁, so that everything comes out as a share of the whole.

**Exponents.** A and G of a layer may be far apart, as 1e30 and 1e-30, and a share is a float in [0, 1]. Write A(u) = a·2^α,
G(v) = g·2^γ and θ = w·2^ω: mantissa and exponent, one exponent per tensor. An edge map multiplies mantissas, so g is brought to
the exponent ε = −(α + ω), at which the product of the mantissas is the share itself:

    w · a · (g·2^(γ−ε)) = θ·A(u)·G(v)·2^−(ω+α+ε) = θ·A(u)·G(v).

An example: a = 1, α = 10; w = 1/2, ω = 0; g = 2⁻²⁰, γ = 4. Then ε = −10, g becomes 2⁻²⁰·2¹⁴ = 2⁻⁶, and the share is
1/2·1·2⁻⁶ = 2⁻⁷, which is 1/2·2¹⁰·2⁻¹⁶.

**Guards.** Mantissas have the range of their type. Five things might go wrong, and each either costs a share no more than
2^floor for each of its edges (`MantissaWindow`) or ends the attempt by `RangeError`, after which the pass begins anew in
float64, then with an exponent for each neuron (`propagate.in_range`). All of them use that a path through u → v goes through u
and through v, so that no share of an edge, and no part that one edge brings to G(u), is more than the mass of the paths through
either: what is left out of G(v) costs at most the largest A(v)·G(v) among what is left out.

1. *Overflow* of Σ a·g before the tiny w comes in: log₂(max a) + log₂(max g) + log₂(positions) must fit (`_refuse_overflow`).
2. *Small g*. Where even the largest a makes a·g ≤ 2^least, that is g ≤ 2^(least − log₂ max a), g becomes 0: the mass A(v)·G(v)
   of these v is looked at (`_refuse_small`).
3. *Small a*. Where mantissas of A fill the upper end of the range they are divided by 2^wide to make room for the product
   (`_room_for_product`), and those up to 2^(least + wide) become 0. When it is known what comes back to u, the mass
   A(u)·(what came back) of these u is looked at.
4. *Small g again*, wherever G is brought to a larger exponent: to be added to what came back by other edges, or into its
   window. Entries below the smallest normal number afterwards, g ≤ 2^(log₂ tiny + (new − old exponent)), lose digits; the mass
   A·G of them is looked at (`_refuse_shift`).
5. *Small products* a·g before a large w comes in. Below the smallest normal number they lose digits, tiny at most; that is
   w·tiny of a share (`_refuse_products`).

**Small shares.** Where shares of a weight are below the smallest normal number of float32, as those of the last bias of a deep
network are, and those of channels in front of a long concatenation, these shares alone are taken again in float64: the
mantissas of θ, A and G are numbers of float32, whose products float64 holds (2⁻⁴⁰¹ to 2³⁸⁴). What they are made of has to have
all its digits. A has them (`propagate._checked`). G has them as long as no guard has let anything go, and as long as no product
g·w was below the smallest normal number where they were added up. The second is asked only when a share is small, of all
layers so far where G has an entry that is 0 or tiny: was the smallest g times the smallest w a normal number? If not, the
attempt ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.edges.weights import Weights
from pathlift.graph.layers import Bias, Connection, Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.graph.recall import extremes, minimum
from pathlift.passes import wide
from pathlift.passes.scaled import RangeError, Scaled, least_above_zero, normalised, power, top, total
from pathlift.passes.tracks import Program, Receivers, Tracks
from pathlift.precision import full_precision

SMALLEST = torch.finfo(torch.float32).tiny
"""Below this a number has fewer digits in float32, or is 0."""


def small(share: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are shares that float32 does not hold in full, if that is the precision.

    Args:
        share: Shares.
        dtype: The precision.

    Returns:
        True when it must be asked whether they are 0 in truth.
    """
    return dtype == torch.float32 and share.numel() > 0 and minimum(share) < SMALLEST


def sum_of_outputs(network: Network, tracks: Mapping[str, Tracks], track: int = 0) -> Scaled | None:
    """Add one track over all output neurons, in float64.

    Args:
        network: The graph.
        tracks: Layer name to tracks.
        track: Which track.

    Returns:
        A scalar, None when it is zero.
    """
    values = ((network.layer[name], tracks[name][track]) for name in network.outputs)
    sums = [counted(layer, value) for layer, value in values if value is not None]
    if not sums:
        return None
    norm, _ = total(sums, fresh=False)
    return None if float(norm.tensor.detach()) == 0.0 else norm


def counted(layer: Layer, value: Scaled) -> Scaled:
    """Add up a layer, in float64; an entry of a compact tensor counts for each neuron that it stands for."""
    count = layer.multiplicity(value.tensor.device)
    tensor = value.tensor.double()
    return Scaled((tensor if count is None else tensor * count).sum(), value.exponent)


def up_to(tensor: Tensor, bound: float) -> Tensor:
    """Return a tensor with 0 in the place of entries above a bound; `torch.where` takes several times as long.

    Args:
        tensor: Non-negative.
        bound: 0, or a power of two.

    Returns:
        Of the same shape.
    """
    kind = torch.finfo(tensor.dtype)
    if bound >= kind.max:
        return tensor
    beyond = bound + max(bound * kind.eps, kind.smallest_normal * kind.eps)  # the next larger number
    return F.threshold(tensor.neg(), -beyond, 0.0).neg_()


def least_of(weights: Weights) -> float:
    """Return the smallest positive of some non-negative weights, without their exponent; infinity where all are 0."""
    blocks = (block for _, block in weights.rows()) if weights.shape else iter([weights.full()])
    return min(map(least_above_zero, blocks))


def widened(weights: Weights, low: float) -> Weights:
    """Return weights in float64.

    Args:
        weights: Those of a pass in float32.
        low: The least that they may be, and its inverse the most.

    Returns:
        The same.

    Raises:
        RangeError: A power of a weight leaves it.
    """
    wider = Weights(weights.values, weights.transform, torch.float64, shift=-math.log2(weights.scale))
    wider.exponent = weights.exponent
    if wider.transform is not torch.abs and not (low <= least_of(wider) and float(wider.full().amax()) <= 1.0 / low):
        raise RangeError
    return wider


MIDDLE = 2.0**-500
"""Such a number, or its inverse, times two numbers of float32 is a normal number of float64, and so is a sum of these."""


def times_power(tensor: Tensor, exponent: float) -> Tensor:
    """Multiply a tensor of float64 by a power of two that may lie beyond its range, in place; the products must not."""
    if abs(exponent) < FAR:
        return tensor.mul_(power(exponent))
    half = exponent // 2
    return tensor.mul_(power(half)).mul_(power(exponent - half))


FAR = 1000
"""2**±FAR and all powers between are normal numbers of float64."""


def _least_exponent(value: Scaled) -> float:
    """Return a bound from below of log₂ of the mantissas that are not 0: the one that is known, or by a look."""
    if value.trough is not None and value.trough > -math.inf:
        return value.trough
    return math.log2(least_above_zero(value.tensor))


class Backward:
    """One way back through the graph."""

    def __init__(
        self,
        network: Network,
        program: Program,
        share: Callable[[WeightTensor, Tensor], None] | None = None,
        unit: Callable[[Layer, Tensor], None] | None = None,
        bias: Callable[[WeightTensor, Tensor], None] | None = None,
        lost: Callable[[WeightTensor, Tensor], bool] | None = None,
    ) -> None:
        """Describe what is wanted.

        Args:
            network: The graph.
            program: A program of one non-negative track.
            share: Is told the shares of weights (`Receivers`).
            unit: Is told the shares of neurons.
            bias: Is told the derivatives by biases.
            lost: Tells whether float32 has lost shares; None where that does not matter.
        """
        self.network = network
        self.program = program
        self.receivers = Receivers(share, unit, bias, lost)
        self.window = program.window
        self.arrived: dict[str, Scaled] = {}  # G of the layers that are still to come, as far as it has come back
        self.summed: set[str] = set()  # those to which several connections brought something
        self.exact = True  # whether no guard has let anything of a G go so far
        self.doubts: list[tuple[float, Weights]] = []  # log2 of the smallest g, and weights, whose products may have been lost
        self.tracks: Mapping[str, Tracks] = {}

    def run(self, tracks: dict[str, Tracks]) -> Scaled | None:
        """Go back; the tracks are let go as they are used up.

        Args:
            tracks: The tracks of every layer (``propagate(..., keep=True)``); emptied.

        Returns:
            The whole: the track summed over all outputs, None when it is zero.

        Raises:
            RangeError: The precision of the program does not suffice.
        """
        if any(isinstance(value, wide.Wide) for values in tracks.values() for value in values):
            return wide.backward(self.network, self.program, self.receivers, cast("dict[str, wide.WideTracks]", tracks))
        norm = sum_of_outputs(self.network, tracks)
        if norm is None:
            return None
        self.tracks = tracks
        seed = 1.0 / float(norm.tensor)
        for layer in self.network.layers:
            for _ in range(self.network.outputs.count(layer.name)):
                ones = torch.full(layer.shape, seed, dtype=self.program.dtype, device=self.network.device)
                count = layer.multiplicity(self.network.device)
                ones = ones if count is None else ones * count.to(ones.dtype)
                self._arrive(layer.name, Scaled(ones, -norm.exponent))
        with full_precision():
            for layer in reversed(self.network.layers):
                g, a = self._taken(layer.name), tracks.pop(layer.name)[0]
                if g is not None and a is not None:
                    self._through_layer(layer, g, a, tracks)
        return norm

    def _through_layer(self, layer: Layer, g: Scaled, a: Scaled, tracks: Mapping[str, Tracks]) -> None:
        """Hand G(v) of a layer down, with A(v) beside it."""
        if self.receivers.unit is not None and layer.unit_name is not None:
            mass = a.tensor.double() * g.tensor.double() * power(a.exponent + g.exponent)
            if small(mass, self.program.dtype) and bool(((mass < SMALLEST) & (a.tensor > 0)).any()):
                raise RangeError
            self.receivers.unit(layer, mass.to(a.tensor.dtype))
        offset = 0
        for position, connection in enumerate(layer.connections):
            g_piece, a_piece = g, a
            if layer.concat is not None:
                size = layer.concat.sizes[position]
                g_piece, a_piece = (
                    value._replace(tensor=value.tensor.narrow(layer.concat.dim, offset, size)) for value in (g, a)
                )
                offset += size
            a_below = tracks[connection.source][0]
            if a_below is not None:
                self._through_connection(connection, g_piece, a_piece, a_below)
        for bias in layer.biases:
            self._to_bias(bias, g)

    def _through_connection(self, connection: Connection, g: Scaled, a: Scaled, a_below: Scaled) -> None:
        """Bring G(v) down to the neurons u below, and θ·A(u)·G(v) to the weight."""
        weights = None if connection.weight is None else self.program.edge(connection.weight)[0, 0]
        scored = self.receivers.share is not None and connection.weight is not None and connection.weight.score_name is not None
        shift = 0.0 if weights is None else weights.exponent
        given, a_kept, exact = g, a_below, self.exact
        if scored:
            a_kept = self._room_for_product(a_below)
            exponent, size = -a_kept.exponent - shift, top(a_kept) - a_kept.exponent
            self._refuse_overflow(top(g) - exponent, size, g.tensor.numel())  # guard 1
            least = self.window.least - size
            left_out = self._refuse_small(g, least + exponent - g.exponent, a)  # guard 2
            if top(g) - exponent <= least:
                if left_out and self.receivers.lost is not None:
                    raise RangeError
                return
            lowest = -math.inf if g.trough is None else g.trough + g.exponent - exponent
            self.exact &= not left_out and max(least, lowest) >= math.log2(torch.finfo(self.program.dtype).tiny)
            given = g.moved(exponent)
            if lowest <= least:
                given = given._replace(tensor=F.threshold(given.tensor, power(least), 0.0), trough=-math.inf)
            if weights is not None:
                self._refuse_products(a_kept, given, weights)  # guard 5
        to_below, to_weight = connection.edges.adjoint(a_kept.tensor, weights, given.tensor, below=True, share=scored)
        if to_weight is not None and connection.weight is not None and self.receivers.share is not None:
            if weights is not None and self._lost(connection.weight, to_weight):
                self._refuse_inexact(exact)
                precise, values = widened(weights, MIDDLE), (a_below.tensor.double(), g.tensor.double())
                _, to_weight = connection.edges.adjoint(values[0], precise, values[1], below=False, share=True)
                assert to_weight is not None
                to_weight = times_power(to_weight, a_below.exponent + g.exponent + precise.exponent)
            self.receivers.share(connection.weight, to_weight)
        if to_below is not None:
            if a_kept is not a_below:  # guard 3
                self._refuse_small(a_below, self.window.least + self.window.wide, Scaled(to_below, given.exponent + shift))
            back = Scaled(to_below, given.exponent + shift)
            if to_below is given.tensor:
                back = given  # edges that hand on G as it is (a sum of branches) hand on what is known of its size
            elif connection.edges.single and to_below.shape == given.tensor.shape:
                back = given.times(to_below, weights)
            self._arrive(connection.source, back, given.tensor, weights)

    def _lost(self, weight: WeightTensor, share: Tensor) -> bool:
        """Whether shares of a weight are lost in float32."""
        return self.receivers.lost is not None and small(share, self.program.dtype) and self.receivers.lost(weight, share)

    def _refuse_overflow(self, g: float, a: float, count: int) -> None:
        """Make sure that Σ a·g over ``count`` positions, before it meets a tiny weight, is a float.

        Raises:
            RangeError: It may not be.
        """
        if g + a + math.log2(count) > math.log2(torch.finfo(self.program.dtype).max):
            raise RangeError

    def _refuse_products(self, a: Scaled, g: Scaled, weights: Weights) -> None:
        """Make sure that no product a·g that is not a normal number loses more than 2^floor of a share when w comes in.

        Raises:
            RangeError: One may.
        """
        tiny = math.log2(torch.finfo(self.program.dtype).tiny)
        if sum(map(_least_exponent, (a, g))) >= tiny:
            return
        signed = weights.magnitudes_of  # whose largest is known without writing |W|
        largest = max(map(abs, extremes(weights.full() if signed is None else signed)))
        if largest > 0.0 and math.log2(largest) + tiny > self.window.floor:
            raise RangeError

    def _room_for_product(self, a: Scaled) -> Scaled:
        """Divide mantissas at the upper end of the range by 2**wide; what falls below the range here is 0: see guard 3."""
        if top(a) - a.exponent <= self.window.high:
            return a
        shift = self.window.wide
        kept = F.threshold(a.tensor * power(-shift), power(self.window.least), 0.0)  # subnormal numbers are slow
        return Scaled(kept, a.exponent + shift, None if a.peak is None else a.peak - shift, -math.inf)

    def _to_bias(self, bias: Bias, g: Scaled) -> None:
        """Bring b·G(v), whose A is 1, to a bias."""
        if self.receivers.bias is not None and bias.weight.score_name is not None:
            shape = torch.empty(bias.weight.shape, device="meta").reshape(bias.view).shape
            free = Scaled(g.tensor.double(), g.exponent).at(0.0).sum_to_size(shape)
            self.receivers.bias(bias.weight, free.reshape(bias.weight.shape))
        weights = self.program.start(bias.weight).get(0)
        if weights is None or bias.weight.score_name is None or self.receivers.share is None:
            return
        value = weights.full()
        if weights.extent == (0.0, 0.0) and weights.nothing:  # as those of a network that has just been made
            self.receivers.share(bias.weight, torch.zeros_like(value))
            return
        self._refuse_overflow(top(g) - g.exponent, 0.0, g.tensor.numel())  # guard 1
        free = g.tensor.sum_to_size(value.reshape(bias.view).shape).double().reshape(value.shape)
        share = times_power(free * value, g.exponent + weights.exponent)
        narrow = share.to(self.program.dtype)
        if self._lost(bias.weight, narrow):
            self._refuse_inexact(self.exact)
            precise = widened(weights, torch.finfo(torch.float64).tiny)
            narrow = times_power(free * precise.full(), g.exponent + precise.exponent)
        self.receivers.share(bias.weight, narrow)

    def _refuse_inexact(self, exact: bool) -> None:
        """Make sure that every G so far has all its digits; see "Small shares" at the head of this module.

        Args:
            exact: Whether no guard has let anything go.

        Raises:
            RangeError: It may not.
        """
        smallest = math.log2(torch.finfo(self.program.dtype).tiny)
        if not exact or any(sent + math.log2(least_of(weights)) < smallest for sent, weights in self.doubts):
            raise RangeError
        self.doubts.clear()

    def _arrive(self, name: str, value: Scaled, sent: Tensor | None = None, weights: Weights | None = None) -> None:
        """Add to what has come back to a layer; what an operator made is brought into its window first.

        Args:
            name: The layer.
            value: What has come back by one bundle of edges.
            sent: The mantissas that it was made of …
            weights: … and the weights.
        """
        inside = value.tensor is sent or value.within(self.window)
        scaled = value if inside else self._normalised(name, value, sent, weights)
        if scaled is None:
            return
        if name in self.arrived:
            known = self.arrived[name]
            exponent = max(known.exponent, scaled.exponent)
            for part in (known, scaled):
                self.exact &= not self._refuse_shift(part, exponent, self.tracks[name][0])  # guard 4
            scaled, _ = total([known, scaled], fresh=name in self.summed)
            self.summed.add(name)
        self.arrived[name] = scaled

    def _normalised(
        self, name: str, value: Scaled, sent: Tensor | None = None, weights: Weights | None = None
    ) -> Scaled | None:
        """Bring what has come back to a layer into its window; the arguments are those of `_arrive`."""
        scaled, low = normalised(value, self.window)
        tiny = torch.finfo(value.tensor.dtype).tiny
        made = low if scaled is None else low * power(scaled.exponent - value.exponent)
        if made < power(self.window.sound) and self.receivers.lost is not None and sent is not None and weights is not None:
            self.doubts.append((math.log2(least_above_zero(sent)), weights))
            if scaled is None:  # no share below will be looked at
                self._refuse_inexact(self.exact)
        if scaled is not None and low < tiny:
            self.exact &= not self._refuse_shift(value, scaled.exponent, self.tracks[name][0])  # guard 4
        return scaled

    def _refuse_shift(self, value: Scaled, exponent: float, other: Scaled | None) -> bool:
        """Make sure that what falls below the smallest normal number with another exponent holds no share that counts.

        Returns:
            Whether it holds any.
        """
        if exponent <= value.exponent:
            return False
        smallest = math.log2(torch.finfo(value.tensor.dtype).tiny)
        return self._refuse_small(value, smallest + exponent - value.exponent, other)

    def _refuse_small(self, value: Scaled, least: float, other: Scaled | None) -> bool:
        """Make sure that the mantissas of a value up to 2**least hold no share that counts, for they are left out.

        A share is the product of a path activation and what comes back for it. Either may be tiny within its layer, and most
        of all where the other is large; so the product is looked at: it must not exceed 2**floor.

        Args:
            value: A or G.
            least: Exponent of the largest mantissa that is left out.
            other: G or A of the same neurons.

        Returns:
            Whether they hold any.

        Raises:
            RangeError: They do hold one that counts.
        """
        bound = power(least)
        if other is None or (value.trough is not None and value.trough > least) or minimum(value.tensor) > bound:
            return False
        mass = float((up_to(value.tensor, bound).double() * other.tensor.double()).amax())
        if mass > 0.0 and math.log2(mass) + value.exponent + other.exponent > self.window.floor:
            raise RangeError
        return mass > 0.0

    def _taken(self, name: str) -> Scaled | None:
        """Take what has come back to a layer."""
        value = self.arrived.pop(name, None)
        if value is None or name not in self.summed or value.within(self.window):
            return value
        return self._normalised(name, value)
