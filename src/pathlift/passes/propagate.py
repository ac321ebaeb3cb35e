"""The one traversal of the graph: the tracks of a program travel from the inputs to the outputs together, kept in range.

**Who may write into whose buffer.** The tracks of a layer are read by every later layer, may be kept for the way back, and may
share their memory with others: a movement gives views, edges of weight 1 from one neuron to one give the very tensor. So a
tensor is written to only by the step that made it, before that step ends. `Arrival` carries the flag: what an edge map brings
is new memory if the map says so (`Edges.fresh`) or if weights came in, for a product is never a view. Nor are weights written
to: those of a bias may be kept by the program (`Weights.ready`). And nothing is overwritten that autograd may need.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from pathlift.edges.unit import Identity
from pathlift.edges.weights import Bundle, Weights
from pathlift.errors import NumericalError
from pathlift.graph.layers import Connection, Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.graph.recall import Memory, remembering
from pathlift.passes import wide
from pathlift.passes.scaled import (
    MantissaWindow,
    RangeError,
    Scaled,
    known,
    normalised,
    power,
    raised,
    told,
    too_small,
    top,
    total,
)
from pathlift.passes.tracks import Entries, Program, SupportProgram, Tracks, apply
from pathlift.precision import full_precision

Result = TypeVar("Result")

_WIDE = ContextVar("wide", default=False)
"""Whether tracks have an exponent for each neuron."""


class TooWideError(NumericalError):
    """The values of one layer need more range than float64 has."""


def is_wide() -> bool:
    """Return whether tracks have an exponent for each neuron: the last attempt of `in_range`."""
    return _WIDE.get()


def in_range(
    attempt: Callable[[torch.dtype], Result],
    first: torch.dtype,
    *values: Mapping[WeightTensor, Tensor],
    memory: Memory | None = None,
) -> Result:
    """Run a pass in one precision, in float64 when its range does not suffice, and then with an exponent for each neuron.

    Args:
        attempt: The pass, a function of the precision.
        first: Precision to start with.
        values: The weights that it uses, to name the culprit when one is not finite.
        memory: See `Network.memory`; the pass may then be run twice.

    Returns:
        What the pass returns.

    Raises:
        NumericalError: A weight is NaN or infinite.
        TooWideError: Float64 has not enough range either.
    """
    for dtype in dict.fromkeys((first, torch.float64)):
        try:
            return remembering(attempt, dtype, memory)
        except RangeError:
            continue
        except NumericalError:
            for weights in values:
                blame(weights)
            continue  # finite weights overflowed in this precision
    token = _WIDE.set(True)
    try:
        return attempt(torch.float64)
    except RangeError:
        pass
    finally:
        _WIDE.reset(token)
    raise TooWideError(
        "The path activations inside one layer differ by more than the range of float64 (factors beyond 1e300). "
        "Rescale the network's neurons to comparable magnitudes first."
    )


def blame(values: Mapping[WeightTensor, Tensor]) -> None:
    """Name a weight that is not finite.

    Args:
        values: Weight tensor to tensor.

    Raises:
        NumericalError: There is one.
    """
    for weight, value in values.items():
        if bool(torch.isfinite(value.sum())):  # one cheap pass; a sum that overflows is looked at closely
            continue
        finite = torch.isfinite(value)
        if not bool(finite.all()):
            bad = value[~finite].reshape(-1)[0].item()
            names = ", ".join(sorted(weight.requires)) or weight.label
            raise NumericalError(
                f"'{weight.label}' (from {names}) contains {bad} in {int((~finite).sum())} of {value.numel()} places; "
                "every weight must be finite. Restore a sound checkpoint."
            )


def propagate(
    network: Network,
    program: Program,
    *,
    keep: bool = False,
) -> dict[str, Tracks]:
    """Carry the tracks of a program from the inputs to the outputs.

    Args:
        network: The graph.
        program: What travels.
        keep: Keep the tracks of every layer; otherwise only those of the outputs.

    Returns:
        Layer name to tracks.

    Raises:
        RangeError: The precision of the program does not suffice.
        NumericalError: A track is not finite.
    """
    if _WIDE.get():
        return _wide(network, program, keep=keep)

    def step(layer: Layer, tracks: Mapping[str, Tracks]) -> Tracks:
        return program.inputs(layer) if layer.kind == "input" else _step(layer, tracks, program)

    return in_forward_order(network, step, keep=keep)


def _wide(network: Network, program: Program, *, keep: bool) -> dict[str, Any]:
    """Carry tracks with an exponent for each neuron; all of them are kept as such, for `Backward`."""
    if not program.ranges or program.batch is not None or torch.is_grad_enabled():
        raise RangeError
    tracks = in_forward_order(network, lambda layer, below: wide.step(layer, below, program), keep=keep)
    if keep:
        return tracks
    return {name: tuple(None if value is None else value.scaled() for value in each) for name, each in tracks.items()}


def in_forward_order(
    network: Network, step: Callable[[Layer, Mapping[str, Result]], Result], *, keep: bool = False
) -> dict[str, Result]:
    """Go through the graph from the inputs to the outputs; what no later layer reads is let go.

    Args:
        network: The graph.
        step: Computes what belongs to a layer from what belongs to the layers below.
        keep: Keep what belongs to every layer; otherwise only the outputs.

    Returns:
        Layer name to result.
    """
    last_use = _last_uses(network)
    results: dict[str, Result] = {}
    with full_precision():
        for position, layer in enumerate(network.layers):
            results[layer.name] = step(layer, results)
            if not keep:
                for connection in layer.connections:
                    if last_use[connection.source] == position:
                        results.pop(connection.source, None)
    return results if keep else {name: results[name] for name in network.outputs}


def _last_uses(network: Network) -> dict[str, int]:
    last: dict[str, int] = {}
    for position, layer in enumerate(network.layers):
        for connection in layer.connections:
            last[connection.source] = position
    for name in network.outputs:
        last[name] = len(network.layers)
    return last


def _step(layer: Layer, tracks: Mapping[str, Tracks], program: Program) -> Tracks:
    """Compute the tracks of one layer, within range and checked for lost digits."""
    values: list[Scaled | None] = []
    brought = [_arrivals(connection, tracks, program) for connection in layer.connections]
    starts = [program.start(bias.weight) for bias in layer.biases]
    for track in range(program.tracks):
        arriving = [arrivals.get(track, []) for arrivals in brought]
        biases = [start.get(track) for start in starts]
        if layer.concat is not None:
            value, shifted = _concatenated(layer, arriving, program)
        elif not any(arriving) and all(bias is None or bias.nothing for bias in biases):
            value, shifted = None, False  # as in the track of the biases of a network that has just been made
        else:
            value, shifted = _summed(layer, arriving, biases, program)
        if value is None or (layer.moves and not shifted):
            values.append(value)
            continue
        values.append(_checked(value, layer, tracks, program, track))
    return tuple(values)


def _checked(value: Scaled, layer: Layer, tracks: Mapping[str, Tracks], program: Program, track: int) -> Scaled | None:
    """Bring a value into its window; make sure that small and zero entries are what they seem.

    An entry that lay below 2**sound when it was made may have lost digits; the shift to its window has moved it since. One
    below 2**floor now may lose them when it is multiplied: it is raised, if the range holds all entries. A zero may be a sum
    whose products all underflowed: it is one in truth if no edge of positive weight comes from a positive entry. In a signed
    track small entries are differences, whose error is bounded by another track.

    Args:
        value: The track of the layer.
        layer: The layer.
        tracks: Those of the layers below.
        program: What travels.
        track: Which one it is.

    Returns:
        The value in its window, None when it is zero everywhere.

    Raises:
        RangeError: An entry may have lost digits, or is 0 although a path reaches it.
    """
    window = program.window
    if value.within(window):
        return value
    scaled, smallest = normalised(value, window)
    if track in program.signed:
        return scaled
    shift = 0.0 if scaled is None else value.exponent - scaled.exponent
    sound = window.sound + shift
    if smallest >= power(max(window.floor, sound)):
        return scaled
    if scaled is not None and too_small(scaled.tensor, sound):
        raise RangeError
    if scaled is not None and too_small(scaled.tensor, window.floor):
        scaled = raised(scaled, window)
        if scaled is None:
            raise RangeError
    if _vanished(layer, tracks, program, track, value.tensor):
        raise RangeError
    return scaled


def _vanished(layer: Layer, tracks: Mapping[str, Tracks], program: Program, track: int, value: Tensor) -> bool:
    """Whether an entry is 0 although a path reaches it: some product fell below the smallest float."""
    needed = {(connection.source, below) for connection in layer.connections for below in _below(connection, program, track)}

    def support(source: str, below: int, scaled: Scaled | None) -> Scaled | None:
        told = scaled is not None and (source, below) in needed
        return Scaled((scaled.tensor != 0).to(program.dtype), 0.0) if told and scaled is not None else None

    reached = {
        connection.source: tuple(
            support(connection.source, below, value) for below, value in enumerate(tracks[connection.source])
        )
        for connection in layer.connections
    }
    counting = SupportProgram(program)
    arriving = [_arrivals(connection, reached, counting).get(track, []) for connection in layer.connections]
    if layer.concat is not None:
        count, _ = _concatenated(layer, arriving, counting)
    else:
        count, _ = _summed(layer, arriving, [counting.start(bias.weight).get(track) for bias in layer.biases], counting)
    return count is not None and bool(((count.tensor > 0) & (value == 0)).any())


def _below(connection: Connection, program: Program, track: int) -> set[int]:
    """Return the tracks that these edges carry into a track."""
    return {track} if connection.weight is None else {source for to, source in program.edge(connection.weight) if to == track}


ONE = Scaled(torch.ones(()), 0.0, 0.0, 0.0)
"""A bias is an edge from a neuron that is 1."""

Arrival: TypeAlias = "list[tuple[Scaled, bool]]"
"""What one bundle of edges brings to one track, and whether its memory is new: free to be overwritten."""


def _arrivals(connection: Connection, tracks: Mapping[str, Tracks], program: Program) -> dict[int, Arrival]:
    """Return what one bundle of edges brings to the tracks; nothing for those to which it brings 0."""
    below = {track: value for track, value in enumerate(tracks[connection.source]) if value is not None}
    if not below:
        return {}
    edges, weight = connection.edges, connection.weight
    if weight is None:
        if isinstance(edges, Identity):
            return {track: [(value, False)] for track, value in below.items()}
        return {
            track: [_arrived(connection, value, apply(edges, value.tensor, None, program), None)]
            for track, value in below.items()
        }
    bundle = program.bundle(weight)
    if bundle is not None:
        return _bundle_arrivals(connection, below, bundle)
    entries = {entry: weights for entry, weights in program.edge(weight).items() if entry[1] in below}
    shared = _shared(entries, program) if len(entries) == len(below) > 1 else None
    if shared is not None:
        sums = edges.each([value.tensor for value in below.values()], shared)
        return {
            track: [_arrived(connection, value, tensor, shared)]
            for (track, value), tensor in zip(below.items(), sums, strict=True)
        }
    arrivals: dict[int, Arrival] = {}
    for (to, source), weights in entries.items():
        tensor = apply(edges, below[source].tensor, weights, program)
        arrivals.setdefault(to, []).append(_arrived(connection, below[source], tensor, weights))
    return arrivals


def _shared(entries: Entries, program: Program) -> Weights | None:
    """Return the weights with which each track travels by itself, if all do with the same; they are then computed once."""
    first = next(iter(entries.values()), None)
    alike = all(to == source and weights is first for (to, source), weights in entries.items())
    return first if alike and program.batch is None and not program.largest else None


def _bundle_arrivals(connection: Connection, below: Mapping[int, Scaled], bundle: Bundle) -> dict[int, Arrival]:
    """Return what one bundle of edges brings to the tracks when the program has all its entries at once.

    An entry (i, j) brings M_ij·T_j to track i. The T_j have exponents of their own, so each sum is taken at the largest of
    them, e_i = max_j e_j over the entries of row i, with factors 2^(e_j − e_i) ≤ 1.
    """
    keys = [key for key in bundle.keys if key[1] in below]
    if not keys:
        return {}
    exponents: dict[int, float] = {}
    for to, source in keys:
        exponents[to] = max(exponents.get(to, -math.inf), below[source].exponent)
    factors = {(to, source): power(below[source].exponent - exponents[to]) for to, source in keys}
    tensors = {track: value.tensor for track, value in below.items()}
    sums = connection.edges.sums(tensors, bundle, factors)
    return {to: [(Scaled(tensor, exponents[to] + bundle.exponent), True)] for to, tensor in sums.items()}


def _arrived(connection: Connection, below: Scaled, tensor: Tensor, weights: Weights | None) -> tuple[Scaled, bool]:
    """Return what edges made of a value, and whether it is new memory."""
    fresh = connection.edges.fresh or weights is not None
    if connection.edges.single:
        return below.times(tensor, weights), fresh
    if fresh:
        return Scaled(tensor, below.exponent + (0.0 if weights is None else weights.exponent)), True
    # what is only moved about has the entries that it had, and zeros beside them
    return Scaled(tensor, below.exponent, below.peak, None if below.trough is None else -math.inf), False


def _summed(
    layer: Layer, arriving: list[Arrival], starts: Sequence[Weights | None], program: Program
) -> tuple[Scaled | None, bool]:
    """Add up what arrives, and biases; also return whether a summand was shifted.

    The sum is made in the memory of the first arrival, if that is new. A bias is never the first where edges arrive; it
    may broadcast, as may an arrival, whose neurons then share memory: then the sum is new.

    Args:
        layer: The layer.
        arriving: What each bundle of edges brings.
        starts: What each bias adds to the track; None for nothing.
        program: What travels.

    Returns:
        The sum, None for 0, and the answer.
    """
    arrivals = [arrival for arrivals in arriving for arrival in arrivals]
    parts, fresh = [part for part, _ in arrivals], bool(arrivals) and arrivals[0][1]
    for bias, weights in zip(layer.biases, starts, strict=True):
        if weights is not None:
            parts.append(ONE.times(weights.full().reshape(bias.view), weights))
    if not parts:
        return None, False
    shape = (*program.lead, *layer.shape)
    if parts[0].tensor.shape != shape:
        parts[0], fresh = parts[0]._replace(tensor=parts[0].tensor.expand(shape)), False
    if len(parts) == 1:
        return parts[0], False
    return total(parts, fresh=fresh, largest=program.largest)


def _concatenated(layer: Layer, arriving: list[Arrival], program: Program) -> tuple[Scaled | None, bool]:
    """Lay what arrives side by side, at one exponent; also return whether a piece was shifted."""
    assert layer.concat is not None
    pieces = [arrivals[0][0] if arrivals else None for arrivals in arriving]
    there = [piece for piece in pieces if piece is not None]
    if not there:
        return None, False
    exponent, shifted = there[0].exponent, any(piece.exponent != there[0].exponent for piece in there)
    if shifted:
        exponent = _common_exponent(there, program.window)
    joined, room = _laid_out(layer, pieces, exponent, program)
    highest, lowest = known(there)
    peak = None if highest is None else max(highest) - exponent
    trough = -math.inf if len(there) < len(pieces) else None if lowest is None else min(lowest)
    return Scaled(joined, exponent, peak, told(trough, -exponent, joined), room), shifted


def _laid_out(layer: Layer, pieces: Sequence[Scaled | None], exponent: float, program: Program) -> tuple[Tensor, Tensor | None]:
    """Return pieces side by side, and the memory that begins with them where others will go on."""
    concat = layer.concat
    assert concat is not None
    first, along = pieces[0], len(program.lead) + concat.dim
    length, like = sum(concat.sizes), next(piece.tensor for piece in pieces if piece is not None)
    room = None if first is None or not concat.goes_on or first.exponent != exponent else first.room
    if room is None:
        tensors = [
            like.new_zeros((*program.lead, *concat.shape(number, layer.shape))) if piece is None else piece.at(exponent)
            for number, piece in enumerate(pieces)
        ]
        if length >= concat.room or program.lead or torch.is_grad_enabled():
            return torch.cat(tensors, along), None
        room = like.new_empty((*layer.shape[: concat.dim], concat.room, *layer.shape[concat.dim + 1 :]))
        return torch.cat(tensors, along, out=room.narrow(along, 0, length)), room
    offset = concat.sizes[0]
    for piece, size in zip(pieces[1:], concat.sizes[1:], strict=True):
        place = room.narrow(along, offset, size)
        if piece is None:
            place.zero_()
        else:
            torch.mul(piece.tensor, power(piece.exponent - exponent), out=place)
        offset += size
    return room.narrow(along, 0, length), room


def _common_exponent(pieces: list[Scaled], window: MantissaWindow) -> float:
    """Choose the exponent that most pieces have already, or that of most range where it puts the largest beyond the window.

    Args:
        pieces: What is laid side by side.
        window: The window of their precision.

    Returns:
        The exponent.
    """
    highest = max(top(piece) for piece in pieces)
    usual = Counter(piece.exponent for piece in pieces).most_common(1)[0][0]
    return usual if window.low <= highest - usual <= window.high else highest - window.wide
