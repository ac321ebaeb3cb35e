"""Tracks with an exponent for each neuron: for networks in which one layer takes more than the range of float64.

A rescaling of neurons moves the path activations of a layer as far apart as it likes, and must not change what is said of the
network. The tracks here are non-negative and every bundle of edges is linear in them (or takes maxima), so a layer is cut into
bands by size, which travel by themselves, and what arrives is put together neuron by neuron. The weights of a bundle are cut in
the same way. That takes bands² passes over a layer, so it is done only where float64 does not suffice (`propagate.in_range`).

Why bands of 300 bits: mantissas of a band lie in [2⁻³⁰⁰, 1). An edge map multiplies a value by a weight, and on the way back by
what comes back: 2⁻⁹⁰⁰ at least, and sums of numbers below 1, so floats that are normal, and nothing is lost but rounding. For
weights that enter by their q-th power (degree q) a band is 300/q bits wide.

An example: a layer (2⁴⁰⁰, 1, 2⁻⁶⁰⁰) with weights (1, 1, 2⁹⁰⁰) into one neuron is cut into three bands of one entry each, the
weights into two. What arrives is 2⁴⁰⁰, 1 and 2³⁰⁰, each exact, and they add up to 2⁴⁰⁰·(1 + 2⁻¹⁰⁰ + 2⁻⁴⁰⁰), rounded to 2⁴⁰⁰.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from pathlift.edges.unit import Identity
from pathlift.edges.weights import Weights
from pathlift.graph.layers import Bias, Connection, Layer
from pathlift.graph.network import Network
from pathlift.passes.scaled import RangeError, Scaled
from pathlift.passes.tracks import Entries, Program, Receivers, apply
from pathlift.precision import full_precision

BAND = 300
"""Bits of a band: the product of three of them is a normal float."""

NOTHING = -(1 << 40)
"""The exponent of 0."""


class Wide(NamedTuple):
    """The value ``mantissa · 2**exponent``, entry by entry: float64 in [1/2, 1) or 0, and int64."""

    mantissa: Tensor
    exponent: Tensor

    @staticmethod
    def of(tensor: Tensor, exponent: float = 0.0) -> Wide:
        """Return ``tensor · 2**exponent``."""
        integer = math.floor(exponent)
        mantissa, shift = torch.frexp(tensor.detach().double() * 2.0 ** (exponent - integer))
        return Wide(mantissa, torch.where(mantissa == 0, NOTHING, shift.long() + integer))

    def expanded(self, *shape: int) -> Wide:
        """Return the same entries, repeated."""
        return Wide(self.mantissa.expand(shape), self.exponent.expand(shape))

    def narrow(self, dim: int, start: int, length: int) -> Wide:
        """Return a slice."""
        return Wide(self.mantissa.narrow(dim, start, length), self.exponent.narrow(dim, start, length))

    def times(self, other: Wide) -> Wide:
        """Return the product."""
        return Wide.of(self.mantissa * other.mantissa)._shifted(self.exponent + other.exponent)

    def plus(self, other: Wide) -> Wide:
        """Return the sum."""
        exponent = torch.maximum(self.exponent, other.exponent)
        aligned = [value.mantissa * powers(value.exponent - exponent) for value in (self, other)]
        return Wide.of(aligned[0] + aligned[1])._shifted(exponent)

    def larger(self, other: Wide) -> Wide:
        """Return the larger of two, entry by entry."""
        above = other.exponent > self.exponent
        larger = above | ((other.exponent == self.exponent) & (other.mantissa > self.mantissa))
        return Wide(torch.where(larger, other.mantissa, self.mantissa), torch.where(larger, other.exponent, self.exponent))

    def at(self, exponent: float) -> Tensor:
        """Return the value divided by 2**exponent, as floats: 0 below their range."""
        return self.mantissa * powers(self.exponent - int(exponent))

    def scaled(self) -> Scaled | None:
        """Return the same with one exponent for all.

        Returns:
            None for 0.

        Raises:
            RangeError: The entries differ by more than float64 can hold.
        """
        there = self.mantissa > 0
        if not bool(there.any()):
            return None
        highest, lowest = int(self.exponent[there].max()), int(self.exponent[there].min())
        if highest - lowest > 1900:
            raise RangeError
        # Exponents up to 900 below the largest go under 0; beyond that the largest is lifted, by 900 at most: −1000 … 900.
        lift = max(0, min(900, highest - lowest - 900))
        return Scaled(self.mantissa * powers(self.exponent - highest + lift), float(highest - lift))

    def sum(self) -> Wide:
        """Add all entries up, into a scalar."""
        total = Wide.of(self.mantissa.new_zeros(()))
        for tensor, exponent in bands(self):
            total = total.plus(Wide.of(tensor.sum(), exponent))
        return total

    def _shifted(self, exponent: Tensor) -> Wide:
        return Wide(self.mantissa, torch.where(self.mantissa == 0, NOTHING, self.exponent + exponent))


def powers(exponent: Tensor) -> Tensor:
    """Return 2**exponent in float64, bit by bit; 0 and infinity outside the normal numbers."""
    bits = (exponent.clamp(-1023, 1024) + 1023) << 52
    return bits.view(torch.float64)


def bands(value: Wide, width: int = BAND) -> Iterator[tuple[Tensor, float]]:
    """Cut a value into pieces that differ by less than 2**width inside, from the largest to the smallest.

    Args:
        value: Non-negative entries.
        width: Bits of a band.

    Yields:
        A tensor with entries in [2**-width, 1) or 0, and its exponent.
    """
    left = value.exponent
    while left.numel() and int(left.max()) > NOTHING // 2:
        highest = int(left.max())
        inside = left > highest - width
        yield torch.where(inside, value.mantissa, 0.0) * powers(left - highest), float(highest)
        left = torch.where(inside, NOTHING, left)


def weight_bands(weights: Weights, degree: float) -> Iterator[Weights]:
    """Cut the weights of a bundle of edges by their size, the largest of the networks' where they belong to several.

    Args:
        weights: A homogeneous function of the values.
        degree: Its degree.

    Yields:
        Weights of which the others are 0.
    """
    values = [value.detach().double() for value in weights.values]
    size = values[0].abs()
    for value in values[1:]:
        size = torch.maximum(size, value.abs())
    for tensor, exponent in bands(Wide.of(size), max(1, int(BAND / degree))):
        kept = tuple(torch.where(tensor > 0, value, 0.0) for value in values)
        yield Weights(kept, weights.transform, torch.float64, shift=min(max(exponent, -1000.0), 1000.0), degree=degree)


WideTracks: TypeAlias = "tuple[Wide | None, ...]"
"""One value per track; None stands for zero everywhere."""


def step(layer: Layer, tracks: Mapping[str, WideTracks], program: Program) -> WideTracks:
    """Compute the tracks of one layer.

    Args:
        layer: The layer.
        tracks: Those of the layers below.
        program: What travels; non-negative, without samples.

    Returns:
        One value per track.

    Raises:
        RangeError: An operator of this network cannot be cut into bands.
    """
    if layer.kind == "input":
        return tuple(None if value is None else Wide.of(value.tensor, value.exponent) for value in program.inputs(layer))
    return tuple(_track(layer, tracks, program, track) for track in range(program.tracks))


def _track(layer: Layer, tracks: Mapping[str, WideTracks], program: Program, track: int) -> Wide | None:
    pieces = [_combined(_arriving(connection, tracks, program, track), program) for connection in layer.connections]
    if layer.concat is not None:
        known = next((piece.mantissa for piece in pieces if piece is not None), None)
        if known is None:
            return None
        shapes = [layer.concat.shape(position, layer.shape) for position in range(len(pieces))]
        filled = zip(pieces, shapes, strict=True)
        full = [Wide.of(known.new_zeros(shape)) if piece is None else piece for piece, shape in filled]
        return Wide(*(torch.cat(parts, layer.concat.dim) for parts in zip(*full, strict=True)))
    for bias in layer.biases:
        weights = program.start(bias.weight).get(track)
        if weights is not None:
            cut = weight_bands(weights, program.degree)
            pieces += [Wide.of(band.full().reshape(bias.view), band.exponent) for band in cut]
    return _combined((piece.expanded(*layer.shape) for piece in pieces if piece is not None), program)


def _combined(parts: Iterable[Wide], program: Program) -> Wide | None:
    """Add up, or take the largest."""
    total: Wide | None = None
    for part in parts:
        total = part if total is None else total.larger(part) if program.largest else total.plus(part)
    return total


def _arriving(connection: Connection, tracks: Mapping[str, WideTracks], program: Program, track: int) -> Iterator[Wide]:
    """Yield what one bundle of edges brings to one track, band by band."""
    entries: Entries = {(track, track): None} if connection.weight is None else program.edge(connection.weight)
    for (to, source), weights in entries.items():
        below = tracks[connection.source][source]
        if to != track or below is None:
            continue
        if weights is None and isinstance(connection.edges, Identity):
            yield below
            continue
        _refuse_choice(connection)
        for x, exponent in bands(below):
            for band in (None,) if weights is None else weight_bands(weights, program.degree):
                shift = 0.0 if band is None else band.exponent
                yield Wide.of(apply(connection.edges, x, band, program), exponent + shift)


def _refuse_choice(connection: Connection) -> None:
    """Refuse edges that look at values to choose among them: bands do not add up there."""
    if connection.edges.chooses:
        raise RangeError


def backward(network: Network, program: Program, receivers: Receivers, tracks: dict[str, WideTracks]) -> Scaled | None:
    """Go back as `Backward.run` does: no guard is needed, for each share is a sum of products of bands.

    Args:
        network: The graph.
        program: A program of one non-negative track.
        receivers: Who is told.
        tracks: The tracks of every layer; emptied.

    Returns:
        The whole, None when it is zero.

    Raises:
        RangeError: Derivatives by biases are wanted, or an operator of this network cannot be cut into bands.
    """
    if receivers.bias is not None:
        raise RangeError
    arrived: dict[str, Wide] = {}
    for name in network.outputs:
        count = network.layer[name].multiplicity(network.device)
        if tracks[name][0] is not None:
            ones = torch.ones(network.layer[name].shape, dtype=torch.float64, device=network.device)
            times = Wide.of(ones if count is None else ones * count)
            arrived[name] = arrived[name].plus(times) if name in arrived else times
    norm = _combined((a.times(arrived[name]).sum() for name in arrived if (a := tracks[name][0]) is not None), program)
    if norm is None or float(norm.mantissa) == 0.0:
        return None
    seed = Wide(1.0 / norm.mantissa, -norm.exponent)
    arrived = {name: times.times(seed) for name, times in arrived.items()}
    back = _Backward(program, receivers, tracks, arrived)
    with full_precision():
        for layer in reversed(network.layers):
            a, g = tracks.pop(layer.name)[0], arrived.pop(layer.name, None)
            if a is not None and g is not None:
                back.through_layer(layer, g, a)
    return Scaled(norm.mantissa, float(norm.exponent))


@dataclass(frozen=True)
class _Backward:
    """The way back; ``arrived`` is G of the layers that are still to come, as far as it has come back."""

    program: Program
    receivers: Receivers
    tracks: Mapping[str, WideTracks]
    arrived: dict[str, Wide]

    def through_layer(self, layer: Layer, g: Wide, a: Wide) -> None:
        """Hand G(v) of a layer down, with A(v) beside it."""
        if self.receivers.unit is not None and layer.unit_name is not None:
            self.receivers.unit(layer, a.times(g).at(0))
        offset = 0
        for position, connection in enumerate(layer.connections):
            piece = g
            if layer.concat is not None:
                piece = g.narrow(layer.concat.dim, offset, layer.concat.sizes[position])
                offset += layer.concat.sizes[position]
            a_below = self.tracks[connection.source][0]
            if a_below is not None:
                self._through_connection(connection, piece, a_below)
        for bias in layer.biases:
            self._to_bias(bias, g)

    def _to_bias(self, bias: Bias, g: Wide) -> None:
        """Bring b·G(v), whose A is 1, to a bias."""
        weights = self.program.start(bias.weight).get(0)
        if self.receivers.share is None or weights is None or bias.weight.score_name is None:
            return
        share = torch.zeros(weights.shape, dtype=torch.float64, device=g.mantissa.device)
        for band in weight_bands(weights, self.program.degree):
            placed = band.full().reshape(bias.view)
            for tensor, exponent in bands(g):
                mass = tensor.sum_to_size(placed.shape) * placed
                share += Wide.of(mass, exponent + band.exponent).at(0).reshape(weights.shape)
        self.receivers.share(bias.weight, share)

    def _through_connection(self, connection: Connection, g: Wide, a_below: Wide) -> None:
        """Bring G(v) down to the neurons u below, and θ·A(u)·G(v) to the weight: bands of θ, G(v) and A(u), each with each."""
        _refuse_choice(connection)
        weight, tell = connection.weight, self.receivers.share
        weights = None if weight is None else self.program.edge(weight)[0, 0]
        scored = tell is not None and weight is not None and weight.score_name is not None
        g_below: Wide | None = None
        share: Tensor | None = None
        for band in (None,) if weights is None else weight_bands(weights, self.program.degree):
            shift = 0.0 if band is None else band.exponent
            for from_above, out in bands(g):
                for number, (x, into) in enumerate(bands(a_below)):
                    to_below, to_weight = connection.edges.adjoint(x, band, from_above, below=number == 0, share=scored)
                    if to_below is not None:
                        brought = Wide.of(to_below, out + shift)
                        g_below = brought if g_below is None else g_below.plus(brought)
                    if to_weight is not None:
                        part = Wide.of(to_weight, into + out + shift).at(0)
                        share = part if share is None else share + part
                    if not scored:
                        break
        if g_below is not None:
            name = connection.source
            self.arrived[name] = self.arrived[name].plus(g_below) if name in self.arrived else g_below
        if share is not None and weight is not None and tell is not None:
            tell(weight, share)
