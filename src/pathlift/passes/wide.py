"""Tracks with an exponent for each neuron: for networks in which one layer takes more than the range of float64.

A rescaling of neurons moves the path activations of a layer as far apart as it likes, and must not change what is said of the
network. The tracks here are non-negative and every bundle of edges is linear in them (or takes maxima), so a layer is cut into
bands by size, which travel by themselves, and what arrives is put together neuron by neuron. The weights of a bundle are cut in
the same way. That takes bands² passes over a layer, so it is done only where float64 does not suffice (`propagate.in_range`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pathlift.edges.unit import Identity
from pathlift.edges.weights import Weights
from pathlift.graph.layers import Connection, Layer
from pathlift.passes.propagate import Entries, Program, apply
from pathlift.passes.scaled import RangeError, Scaled
from pathlift.precision import full_precision

if TYPE_CHECKING:
    from pathlift.passes.backward import Backward

BAND = 300
"""Bits of a band: the product of three of them is a float."""

NOTHING = -(1 << 40)
"""The exponent of 0."""


class Wide(NamedTuple):
    """The value ``mantissa · 2**exponent``, entry by entry: float64 in [1/2, 1) or 0, and int64."""

    mantissa: Tensor
    exponent: Tensor

    @staticmethod
    def of(tensor: Tensor, exponent: float = 0.0) -> Wide:
        """Return ``tensor · 2**exponent``."""
        whole = math.floor(exponent)
        mantissa, own = torch.frexp(tensor.detach().double() * 2.0 ** (exponent - whole))
        return Wide(mantissa, torch.where(mantissa == 0, NOTHING, own.long() + whole))

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
        aligned = [own.mantissa * powers(own.exponent - exponent) for own in (self, other)]
        return Wide.of(aligned[0] + aligned[1])._shifted(exponent)

    def larger(self, other: Wide) -> Wide:
        """Return the larger of two, entry by entry."""
        above = other.exponent > self.exponent
        other_is = above | ((other.exponent == self.exponent) & (other.mantissa > self.mantissa))
        return Wide(*(torch.where(other_is, two, one) for one, two in zip(self, other, strict=True)))

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
        lift = max(0, min(900, highest - lowest - 900))
        return Scaled(self.mantissa * powers(self.exponent - highest + lift), float(highest - lift))

    def sum(self) -> Wide:
        """Add all entries up, into a scalar."""
        found = Wide.of(self.mantissa.new_zeros(()))
        for tensor, exponent in bands(self):
            found = found.plus(Wide.of(tensor.sum(), exponent))
        return found

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
    values = [own.detach().double() for own in weights.values]
    size = values[0].abs()
    for own in values[1:]:
        size = torch.maximum(size, own.abs())
    for tensor, exponent in bands(Wide.of(size), max(1, int(BAND / degree))):
        kept = tuple(torch.where(tensor > 0, own, 0.0) for own in values)
        yield Weights(kept, weights.transform, torch.float64, shift=min(max(exponent, -1000.0), 1000.0), degree=degree)


Tracks = tuple["Wide | None", ...]


def step(layer: Layer, tracks: Mapping[str, Tracks], program: Program) -> Tracks:
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
        return tuple(None if own is None else Wide.of(own.tensor, own.exponent) for own in program.inputs(layer))
    return tuple(_track(layer, tracks, program, track) for track in range(program.tracks))


def _track(layer: Layer, tracks: Mapping[str, Tracks], program: Program, track: int) -> Wide | None:
    pieces = [_together(_arriving(connection, tracks, program, track), program) for connection in layer.connections]
    if layer.concat is not None:
        known = next((own.mantissa for own in pieces if own is not None), None)
        if known is None:
            return None
        shapes = [layer.concat.shape(place, layer.shape) for place in range(len(pieces))]
        full = [Wide.of(known.new_zeros(shape)) if own is None else own for own, shape in zip(pieces, shapes, strict=True)]
        return Wide(*(torch.cat(parts, layer.concat.dim) for parts in zip(*full, strict=True)))
    for bias in layer.biases:
        weights = program.start(bias.weight).get(track)
        if weights is not None:
            cut = weight_bands(weights, program.degree)
            pieces += [Wide.of(own.full().reshape(bias.view), own.exponent) for own in cut]
    return _together((own.expanded(*layer.shape) for own in pieces if own is not None), program)


def _together(parts: Iterable[Wide], program: Program) -> Wide | None:
    """Add up, or take the largest."""
    found: Wide | None = None
    for own in parts:
        found = own if found is None else found.larger(own) if program.largest else found.plus(own)
    return found


def _arriving(connection: Connection, tracks: Mapping[str, Tracks], program: Program, track: int) -> Iterator[Wide]:
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
            for own in (None,) if weights is None else weight_bands(weights, program.degree):
                shift = 0.0 if own is None else own.exponent
                yield Wide.of(apply(connection.edges, x, own, program), exponent + shift)


def _refuse_choice(connection: Connection) -> None:
    """Refuse edges that look at values to choose among them: bands do not add up there."""
    if connection.edges.chooses:
        raise RangeError


def pull_back(back: Backward, tracks: dict[str, Tracks]) -> Scaled | None:
    """Go back as `Backward.run` does.

    Args:
        back: What is wanted.
        tracks: The tracks of every layer; emptied.

    Returns:
        The whole, None when it is zero.

    Raises:
        RangeError: Derivatives by biases are wanted, or an operator of this network cannot be cut into bands.
    """
    if back.bias is not None:
        raise RangeError
    network, program = back.network, back.program
    above: dict[str, Wide] = {}
    for name in network.outputs:
        own, count = tracks[name][0], network.layer[name].multiplicity(network.device)
        if own is not None:
            ones = torch.ones(network.layer[name].shape, dtype=torch.float64, device=network.device)
            weight = Wide.of(ones if count is None else ones * count)
            above[name] = above[name].plus(weight) if name in above else weight
    whole = _together((own.times(above[name]).sum() for name in above if (own := tracks[name][0]) is not None), program)
    if whole is None or float(whole.mantissa) == 0.0:
        return None
    one = Wide(1.0 / whole.mantissa, -whole.exponent)
    above = {name: own.times(one) for name, own in above.items()}
    with full_precision():
        for layer in reversed(network.layers):
            own, g = tracks.pop(layer.name)[0], above.pop(layer.name, None)
            if own is not None and g is not None:
                _node(back, layer, g, own, tracks, above)
    return Scaled(whole.mantissa, float(whole.exponent))


def _node(back: Backward, layer: Layer, g: Wide, own: Wide, tracks: Mapping[str, Tracks], above: dict[str, Wide]) -> None:
    if back.unit is not None and layer.unit_name is not None:
        back.unit(layer, own.times(g).at(0))
    offset = 0
    for place, connection in enumerate(layer.connections):
        piece = g
        if layer.concat is not None:
            piece = g.narrow(layer.concat.dim, offset, layer.concat.sizes[place])
            offset += layer.concat.sizes[place]
        below = tracks[connection.source][0]
        if below is not None:
            _term(back, connection, piece, below, above)
    for bias in layer.biases:
        weights = back.program.start(bias.weight).get(0)
        if back.share is not None and weights is not None and bias.weight.score_name is not None:
            found = torch.zeros(weights.shape, dtype=torch.float64, device=g.mantissa.device)
            for w in weight_bands(weights, back.program.degree):
                placed = w.full().reshape(bias.view)
                for tensor, exponent in bands(g):
                    mass = tensor.sum_to_size(placed.shape) * placed
                    found += Wide.of(mass, exponent + w.exponent).at(0).reshape(weights.shape)
            back.share(bias.weight, found)


def _term(back: Backward, connection: Connection, g: Wide, below: Wide, above: dict[str, Wide]) -> None:
    """Take what comes back through one bundle of edges to the layer below, and to its weights."""
    _refuse_choice(connection)
    weights = None if connection.weight is None else back.program.edge(connection.weight)[0, 0]
    scored = back.share is not None and connection.weight is not None and connection.weight.score_name is not None
    found: Wide | None = None
    share: Tensor | None = None
    for w in (None,) if weights is None else weight_bands(weights, back.program.degree):
        shift = 0.0 if w is None else w.exponent
        for from_above, out in bands(g):
            for place, (x, into) in enumerate(bands(below)):
                to_below, to_weight = connection.edges.adjoint(x, w, from_above, below=place == 0, share=scored)
                if to_below is not None:
                    brought = Wide.of(to_below, out + shift)
                    found = brought if found is None else found.plus(brought)
                if to_weight is not None:
                    part = Wide.of(to_weight, into + out + shift).at(0)
                    share = part if share is None else share + part
                if not scored:
                    break
    if found is not None:
        above[connection.source] = above[connection.source].plus(found) if connection.source in above else found
    if share is not None and connection.weight is not None and back.share is not None:
        back.share(connection.weight, share)
