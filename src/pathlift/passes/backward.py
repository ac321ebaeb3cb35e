"""Back from the outputs through a program of one track: the path mass of every weight and every neuron (SPEC §3, §6).

With A the path activation and G(v) the sum of the weights of all paths from v to an output, A(v)·G(v) is the total
|Φ_p| of the paths through v, and |θ_i|·Σ A(u)·G(v) over the edges that carry θ_i is that of the paths through θ_i,
which is the path-magnitude (10)–(12), (14). G starts at 1/‖Φ‖₁, so that everything comes out as a share of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.graph.layers import Bias, Connection, Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.graph.recall import extremes
from pathlift.passes import wide
from pathlift.passes.propagate import Program, Tracks
from pathlift.passes.scaled import RangeError, Scaled, normalised, power, top, total
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
    return dtype == torch.float32 and share.numel() > 0 and extremes(share)[0] < SMALLEST


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
    whole, _ = total(sums, fresh=False)
    return None if float(whole.tensor.detach()) == 0.0 else whole


def counted(layer: Layer, value: Scaled) -> Scaled:
    """Add up a layer, in float64; an entry of a compact tensor counts for each neuron that it stands for."""
    count = layer.multiplicity(value.tensor.device)
    tensor = value.tensor.double()
    return Scaled((tensor if count is None else tensor * count).sum(), value.exponent)


class Backward:
    """One way back through the graph."""

    def __init__(
        self,
        network: Network,
        program: Program,
        share: Callable[[WeightTensor, Tensor], None] | None = None,
        unit: Callable[[Layer, Tensor], None] | None = None,
        bias: Callable[[WeightTensor, Tensor], None] | None = None,
    ) -> None:
        """Describe what is wanted.

        Args:
            network: The graph.
            program: A program of one non-negative track.
            share: Called with each use of a scored weight and the share of the path mass that goes through it there.
            unit: Called with each layer that has units and its neurons' shares of the path mass.
            bias: Called with each use of a scored bias and the derivative of the share by it: Σ G(v) over its neurons,
                float64.
        """
        self.network = network
        self.program = program
        self.share = share
        self.unit = unit
        self.bias = bias
        self.window = program.window
        self.gradients: dict[str, Scaled] = {}
        self.summed: set[str] = set()
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
        if any(isinstance(own, wide.Wide) for each in tracks.values() for own in each):
            return wide.pull_back(self, cast("dict[str, wide.Tracks]", tracks))
        whole = sum_of_outputs(self.network, tracks)
        if whole is None:
            return None
        self.tracks = tracks
        seed = 1.0 / float(whole.tensor)
        for layer in self.network.layers:
            for _ in range(self.network.outputs.count(layer.name)):
                ones = torch.full(layer.shape, seed, dtype=self.program.dtype, device=self.network.device)
                count = layer.multiplicity(self.network.device)
                ones = ones if count is None else ones * count.to(ones.dtype)
                self._accumulate(layer.name, Scaled(ones, -whole.exponent))
        with full_precision():
            for layer in reversed(self.network.layers):
                above, own = self._gathered(layer.name), tracks.pop(layer.name)[0]
                if above is not None and own is not None:
                    self._node(layer, above, own, tracks)
        return whole

    def _node(self, layer: Layer, above: Scaled, own: Scaled, tracks: Mapping[str, Tracks]) -> None:
        if self.unit is not None and layer.unit_name is not None:
            mass = own.tensor.double() * above.tensor.double() * power(own.exponent + above.exponent)
            if small(mass, self.program.dtype) and bool(((mass < SMALLEST) & (own.tensor > 0)).any()):
                raise RangeError
            self.unit(layer, mass.to(own.tensor.dtype))
        offset = 0
        for place, connection in enumerate(layer.connections):
            piece, part = above, own
            if layer.concat is not None:
                size = layer.concat.sizes[place]
                piece, part = (
                    whole._replace(tensor=whole.tensor.narrow(layer.concat.dim, offset, size)) for whole in (above, own)
                )
                offset += size
            below = tracks[connection.source][0]
            if below is not None:
                self._term(connection, piece, part, below)
        for bias in layer.biases:
            self._start(bias, above)

    def _term(self, connection: Connection, above: Scaled, own: Scaled, below: Scaled) -> None:
        weights = None if connection.weight is None else self.program.edge(connection.weight)[0, 0]
        scored = self.share is not None and connection.weight is not None and connection.weight.score_name is not None
        shift = 0.0 if weights is None else weights.exponent
        g, whole = above, below
        if scored:
            # Bring G to the exponent at which w·A·G is the share itself, and drop what no share can hold.
            below = self._narrow(below)
            exponent, size = -below.exponent - shift, top(below) - below.exponent
            self._refuse_overflow(top(above) - exponent, size, above.tensor.numel())
            least = self.window.least - size
            self._refuse_small(above, least + exponent - above.exponent, own)
            if top(above) - exponent <= least:
                return
            g = Scaled(F.threshold(above.at(exponent), power(least), 0.0), exponent)
        to_below, to_weight = connection.edges.adjoint(below.tensor, weights, g.tensor, below=True, share=scored)
        if below is not whole and to_below is not None:
            self._refuse_small(whole, self.window.least + self.window.wide, Scaled(to_below, g.exponent + shift))
        if to_below is not None:
            back = g if to_below is g.tensor else Scaled(to_below, g.exponent)
            self._accumulate(connection.source, back._replace(exponent=back.exponent + shift))
        if to_weight is not None and connection.weight is not None and self.share is not None:
            self.share(connection.weight, to_weight)

    def _refuse_overflow(self, above: float, below: float, count: int) -> None:
        """Make sure that Σ A·G over ``count`` positions, before it meets a tiny weight, is a float."""
        if above + below + math.log2(count) > math.log2(torch.finfo(self.program.dtype).max):
            raise RangeError

    def _narrow(self, below: Scaled) -> Scaled:
        """Leave room for the product A·G; what falls below the range here is left out, and looked at again afterwards."""
        if top(below) - below.exponent <= self.window.high:
            return below
        shift = self.window.wide
        kept = F.threshold(below.tensor * power(-shift), power(self.window.least), 0.0)  # subnormal numbers are slow
        return Scaled(kept, below.exponent + shift, None if below.peak is None else below.peak - shift)

    def _start(self, bias: Bias, above: Scaled) -> None:
        if self.bias is not None and bias.weight.score_name is not None:
            shape = torch.empty(bias.weight.shape, device="meta").reshape(bias.view).shape
            free = Scaled(above.tensor.double(), above.exponent).at(0.0).sum_to_size(shape)
            self.bias(bias.weight, free.reshape(bias.weight.shape))
        weights = self.program.start(bias.weight).get(0)
        if weights is None or bias.weight.score_name is None or self.share is None:
            return
        value = weights.full()
        placed = value.reshape(bias.view)
        self._refuse_shift(above, -weights.exponent, Scaled(placed, weights.exponent))
        mass = above.at(-weights.exponent).sum_to_size(placed.shape) * placed
        self.share(bias.weight, mass.reshape(value.shape))

    def _accumulate(self, name: str, value: Scaled) -> None:
        """Add to what has come back to a layer; what an operator made is brought into its window first."""
        scaled = value if value.peak is not None else self._normalised(name, value)
        if scaled is None:
            return
        if name in self.gradients:
            known = self.gradients[name]
            exponent = max(known.exponent, scaled.exponent)
            for part in (known, scaled):
                self._refuse_shift(part, exponent, self.tracks[name][0])
            scaled, _ = total([known, scaled], fresh=name in self.summed)
            self.summed.add(name)
        self.gradients[name] = scaled

    def _normalised(self, name: str, value: Scaled) -> Scaled | None:
        """Bring what has come back to a layer into its window."""
        scaled, low = normalised(value, self.window)
        if scaled is not None and low >= torch.finfo(value.tensor.dtype).tiny:
            return scaled._replace(trough=math.frexp(low)[1] - 1)
        if scaled is not None:
            self._refuse_shift(value, scaled.exponent, self.tracks[name][0])
        return scaled

    def _refuse_shift(self, value: Scaled, exponent: float, own: Scaled | None) -> None:
        """Make sure that what falls below the smallest float with another exponent holds no share that counts."""
        if exponent > value.exponent:
            smallest = math.log2(torch.finfo(value.tensor.dtype).tiny)
            self._refuse_small(value, smallest + exponent - value.exponent, own)

    def _refuse_small(self, value: Scaled, least: float, other: Scaled | None) -> None:
        """Make sure that the entries of a value up to 2**least hold no share that counts, for they are left out.

        A share is the product of a path activation and what comes back for it. Either may be tiny within its layer, and most
        of all where the other is large; so the product is looked at.

        Raises:
            RangeError: They do.
        """
        bound = power(least)
        if other is None or (value.trough is not None and value.trough > least) or extremes(value.tensor)[0] > bound:
            return
        lost = torch.where(value.tensor <= bound, value.tensor, 0.0)
        mass = float((lost.double() * other.tensor.double()).amax())
        if mass > 0.0 and math.log2(mass) + value.exponent + other.exponent > self.window.floor:
            raise RangeError

    def _gathered(self, name: str) -> Scaled | None:
        """Take what has come back to a layer."""
        value = self.gradients.pop(name, None)
        return self._normalised(name, value) if value is not None and name in self.summed else value
