"""One weight on several edges (mathematics §7): what that asks of the scales of the neurons at their ends.

With the neurons laid out as a `Pattern` does, weight [g, o, i, t] stands on the edge from [g, i, q] to [g, o, p] for each
triple (t, q, p). It scales by one number, so

    for each g, o, i, t:  s(g, o, p) − s(g, i, q)  is the same for all (q, p) of tap t.   (*)

There are three cases, by what is known below:

1. Each channel below has one label at all places (`_labels_of_channels`). Then (*) says s(o, p) = s(o, p') for all places
   p, p' that one tap reaches: one new label for each channel and each set of places that taps link. No equation is left.
2. Labels differ from place to place, but all channels are at the same places (`_labels_of_places`). Taking (*) for two
   channels i, i' gives s(i, q) − s(i', q) = s(i, q') − s(i', q'): s is a function of the channel plus one of the place,
   below and, alike, above. That is (ins + outs + edges) equations in place of ins·outs·edges.
3. Channels are at different places, as behind a padded mask: (*) as it stands, channel by channel.

Worked example: a kernel of two taps, stride 1, one channel, from places 0, 1, 2 to places 0, 1, so that the triples are (0,
0, 0), (0, 1, 1), (1, 1, 0), (1, 2, 1). With one label a at all places below, tap 0 asks for s(0) − a = s(1) − a: one label
above. With labels a, b, c, tap 0 asks for s(0) − a = s(1) − b and tap 1 for s(0) − b = s(1) − c: so b − a = c − b = s(1) −
s(0), and factors may grow geometrically along the row, as a convolution takes a geometric sequence to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.edges.pattern import Pattern
from pathlift.rescaling.antecedents import blocks, tie_stars
from pathlift.rescaling.relations import NOTHING, Relations, components
from pathlift.rescaling.repeats import all_places, one_place


@dataclass(frozen=True, eq=False)
class WeightedEdges:
    """The edges of one connection on which weights stand that scale.

    Attributes:
        pattern: Which weight stands on which edge.
        below: Labels of the neurons below, (groups, ins, places), or with one place for all.
        above: Labels of the neurons above, (groups, outs, places).
    """

    pattern: Pattern
    below: Tensor
    above: Tensor


def labelled(relations: Relations, pattern: Pattern, labels: Tensor, alive: Tensor) -> WeightedEdges:
    """Label the neurons above a map whose weights scale, and write down what weights at several places ask for.

    Args:
        relations: The unknowns.
        pattern: Which weight stands on which edge.
        labels: Labels of the neurons below, in their own shape.
        alive: Which neurons above matter, in their own shape.

    Returns:
        The edges.
    """
    below, live = one_place(pattern.below.split(labels)), one_place(pattern.above.split(alive))
    above = _labels_of_channels(relations, pattern, below, live)
    if above is None:
        above = _labels_of_places(relations, pattern, all_places(below, pattern.below), all_places(live, pattern.above))
    return WeightedEdges(pattern, below, above)


# ---- case 1


def _labels_of_channels(relations: Relations, pattern: Pattern, below: Tensor, live: Tensor) -> Tensor | None:
    """Label the neurons above when each channel below has one label at all places; None when it has not.

    Args:
        relations: The unknowns.
        pattern: The map.
        below: Labels below, (groups, ins, places), or with one place for all.
        live: Which neurons above matter, (groups, outs, places), or with one place for all.

    Returns:
        Labels above, (groups, outs, places).
    """
    real = below > NOTHING
    any_real, any_live = real.any(1), live.any(1)
    top = below.amax(2, keepdim=True)
    alike = ((below == top) | ~real).all()
    if not alike or not _all_or_none(real, any_real) or not _all_or_none(live, any_live):
        return None
    there = torch.cat([all_places(any_real, pattern.below), all_places(any_live, pattern.above)], 1)
    if bool((there == there[:1]).all()):  # all groups are alike, and so are the places that their taps link
        kinds, kind = there[:1], torch.zeros(len(there), dtype=torch.long, device="cpu")
    else:
        kinds, kind = torch.unique(there, dim=0, return_inverse=True)
    positions = pattern.below.shape[2]
    linked = torch.stack([_linked(pattern, ends_there[:positions], ends_there[positions:]) for ends_there in kinds])[kind]
    groups, outs, _ = pattern.above.shape
    if linked.numel() and bool((linked == 0).all()):
        linked = linked[:, :1]
    count = int(linked.max()) + 1 if linked.numel() else 0
    fresh = relations.new(groups * outs * count).reshape(groups, outs, count)
    if not count:
        return torch.zeros((), dtype=torch.long, device="cpu").expand(pattern.above.shape)
    chosen = fresh.gather(2, linked.clamp(min=0)[:, None].expand(groups, outs, linked.shape[1]))
    return torch.where(live & (linked >= 0)[:, None], chosen, NOTHING).expand(pattern.above.shape)


def _linked(pattern: Pattern, real: Tensor, live: Tensor) -> Tensor:
    """Number the sets of places above that taps link: two places that one tap reaches, and what such pairs join.

    Args:
        pattern: The map.
        real: Places below where there is a neuron.
        live: Places above where there is one.

    Returns:
        Number of its set for each place above, −1 where nothing is read.
    """
    tap, source, target = pattern.triples.unbind(1)
    kept = real[source] & live[target]
    tap, target = tap[kept], target[kept]
    out = torch.full(live.shape, -1, device="cpu")
    count = pattern.weight.shape[3]
    if count == 1:
        out[target] = 0
        return out
    of_tap = torch.arange(count, device="cpu")  # the smallest tap that is linked to each tap: it stands for the set
    while True:
        of_target = torch.full(live.shape, count, device="cpu").scatter_reduce_(0, target, of_tap[tap], "amin")
        further = of_tap.scatter_reduce(0, tap, of_target[target], "amin")
        if torch.equal(further, of_tap):
            break
        of_tap = further
    there = of_target < count
    if bool(there.any()):
        out[there] = torch.unique(of_target[there], return_inverse=True)[1]
    return out


def _all_or_none(there: Tensor, some: Tensor) -> bool:
    """Whether the channels of each group are at the same places, apart from channels that are nowhere."""
    return bool(((there == some[:, None]) | ~there.any(2, keepdim=True)).all())


# ---- cases 2 and 3


def _labels_of_places(relations: Relations, pattern: Pattern, below: Tensor, live: Tensor) -> Tensor:
    """Label the neurons above when places differ, group by group.

    Args:
        relations: The unknowns.
        pattern: The map.
        below: Labels below, (groups, ins, places).
        live: Which neurons above matter, (groups, outs, places).

    Returns:
        Labels above, (groups, outs, places).
    """
    tap, source, target = pattern.triples.unbind(1)
    above = torch.zeros(live.shape, dtype=torch.long, device="cpu")
    for group in range(len(below)):
        x, y = below[group], above[group]
        read = torch.zeros(live.shape[2], dtype=torch.bool, device="cpu").index_fill_(
            0, target[(x > NOTHING).any(0)[source]], value=True
        )
        there = live[group] & read
        ins, outs = (x > NOTHING).any(1).nonzero()[:, 0], there.any(1).nonzero()[:, 0]
        if not len(ins) or not len(outs):
            continue
        if _all_or_none((x > NOTHING)[None], (x > NOTHING).any(0)[None]) and _all_or_none(there[None], there.any(0)[None]):
            kept = (x[ins[0]] > NOTHING)[source] & there[outs[0]][target]
            labels = _separate(relations, x[ins], tap[kept], source[kept], target[kept], (len(outs), y.shape[1]))
            y[outs] = torch.where(there[outs], labels, NOTHING)
        else:
            y[there] = relations.new(int(there.sum()))
            for one_tap in range(int(tap.max()) + 1):
                _pairwise(relations, x[:, source[tap == one_tap]], y[:, target[tap == one_tap]])
    return above


def _separate(relations: Relations, x: Tensor, tap: Tensor, source: Tensor, target: Tensor, shape: tuple[int, int]) -> Tensor:
    """Label the neurons above a block of weights all of whose channels are at the same places (case 2).

    Where places are linked by taps, s is a function of the channel plus one of the place, on both sides, and the functions of
    the place differ along all edges of a tap by one number. Two short cuts keep this small. Places below at which one channel
    has the same s have it in all channels: they are one *kind* of place. Places above that read a kind by the same tap have
    the same s too: they are one *spot*. Equations are written for kinds and spots alone.

    Args:
        relations: The unknowns.
        x: Labels below, shape (ins, places below).
        tap: Of each edge.
        source: Place below of each edge.
        target: Place above of each edge.
        shape: Number of channels and of places above.

    Returns:
        Labels above, of that shape.
    """
    low, (outs, high) = x.shape[1], shape
    taps = int(tap.max()) + 1 if len(tap) else 0
    linked = components(low + taps, source, low + tap)[:low]
    kind = components(low, *_alike(relations.find(x) + (linked << 32)))
    kinds = int(kind.max()) + 1
    x = tie_stars(relations, x, torch.arange(low, device="cpu"), kind, kinds)
    _sums(relations, x, components(kinds + taps, kind[source], kinds + tap)[:kinds])

    spot = components(high + taps * kinds, target, high + tap * kinds + kind[source])[:high]
    spots = int(spot.max()) + 1
    y = relations.new(outs * spots).reshape(outs, spots)
    edges = torch.stack([tap, kind[source], spot[target]])
    if kinds < low or spots < high:
        edges = torch.unique(edges, dim=1)
    tap, source, target = edges
    _sums(relations, y, components(spots + taps, target, spots + tap)[:spots])
    first = _first(tap, taps)[tap]  # of each edge: the first one of its tap
    relations.equation([y[0, target], y[0, target[first]], x[0, source], x[0, source[first]]], [1, -1, -1, 1])
    return y[:, spot]


def _sums(relations: Relations, labels: Tensor, linked: Tensor) -> None:
    """Write down that among linked places s is a sum of a function of the channel and one of the place.

    s(c, p) − s(c, p₀) = s(0, p) − s(0, p₀), with p₀ the first place that is linked to p, for each channel c but the first.

    Args:
        relations: The unknowns.
        labels: Shape (channels, places).
        linked: Number of its set for each place.
    """
    first = _first(linked, int(linked.max()) + 1)[linked]
    other = (first != torch.arange(len(first), device="cpu")).nonzero()[:, 0]
    first = first[other]
    for part in blocks(len(labels) - 1, len(other)):
        rows = labels[1:][part]
        relations.equation([rows[:, other], rows[:, first], labels[:1, other], labels[:1, first]], [1, -1, -1, 1])


def _pairwise(relations: Relations, low: Tensor, high: Tensor) -> None:
    """Write down s(v) − s(u) = s(v') − s(u') for all edges of each weight of one tap (case 3).

    Args:
        relations: The unknowns.
        low: Labels below, (ins, edges).
        high: Labels above, (outs, edges).
    """
    there = (low > NOTHING)[None] & (high > NOTHING)[:, None]
    first = there.byte().argmax(2, keepdim=True)
    x, y = low[None].expand(there.shape), high[:, None].expand(there.shape)
    masked = torch.where(there, y, NOTHING)
    relations.equation([masked, y.gather(2, first), x, x.gather(2, first)], [1, -1, -1, 1])


def _first(number: Tensor, count: int) -> Tensor:
    """Return the first place of each number below ``count``."""
    indices = torch.arange(len(number), device="cpu")
    return torch.full((count,), len(number), device="cpu").scatter_reduce_(0, number, indices, "amin")


def _alike(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs of columns that link all columns in which a row has the same number."""
    column = torch.arange(x.shape[1], device="cpu").expand(x.shape)
    if not bool((x[:, 1:] >= x[:, :-1]).all()):
        x, column = torch.sort(x, dim=1, stable=True)
    same = x[:, 1:] == x[:, :-1]
    return column[:, :-1][same], column[:, 1:][same]


# ---- the ends of weights, and weights in several connections


def ends(edges: WeightedEdges) -> tuple[Tensor, Tensor]:
    """Return for each weight the labels of the ends of one of its edges; `NOTHING` for a weight without edges.

    Args:
        edges: The edges, labelled.

    Returns:
        Labels above, (groups, outs, 1 or ins, taps), and below, (groups, 1 or outs, ins, taps).
    """
    tap, source, target = edges.pattern.triples.unbind(1)
    groups, outs, ins, taps = edges.pattern.weight.shape
    real, live = one_place(edges.below) > NOTHING, one_place(edges.above) > NOTHING
    if not _all_or_none(real, real.any(1)) or not _all_or_none(live, live.any(1)):
        return _ends_one_by_one(edges)
    there = all_places(real.any(1), edges.pattern.below)[:, source] & all_places(live.any(1), edges.pattern.above)[:, target]
    number = torch.where(there, torch.arange(len(tap), device="cpu"), len(tap))
    first = torch.full((groups, taps), len(tap), device="cpu").scatter_reduce_(1, tap.expand(groups, -1), number, "amin")
    none = (first == len(tap))[:, None]
    first = first.clamp(max=max(len(tap) - 1, 0))
    if not len(tap):
        above = torch.zeros(groups, outs, 1, taps, dtype=torch.long, device="cpu")
        return above, torch.zeros(groups, 1, ins, taps, dtype=torch.long, device="cpu")
    above, below = edges.above.expand(edges.pattern.above.shape), edges.below.expand(edges.pattern.below.shape)
    top = above.gather(2, target[first][:, None].expand(groups, outs, taps)).masked_fill(none, NOTHING)
    bottom = below.gather(2, source[first][:, None].expand(groups, ins, taps)).masked_fill(none, NOTHING)
    return top[:, :, None], bottom[:, None]


def _ends_one_by_one(edges: WeightedEdges) -> tuple[Tensor, Tensor]:
    """The same when the channels are not all at the same places: then one edge serves some weights of a tap only."""
    top = torch.zeros(edges.pattern.weight.shape, dtype=torch.long, device="cpu")
    bottom = torch.zeros_like(top)
    above, below = edges.above.expand(edges.pattern.above.shape), edges.below.expand(edges.pattern.below.shape)
    for tap, source, target in edges.pattern.triples.tolist():
        high, low = above[:, :, None, target], below[:, None, :, source]
        fresh = (top[..., tap] == NOTHING) & (high > NOTHING) & (low > NOTHING)
        top[..., tap] = torch.where(fresh, high, top[..., tap])
        bottom[..., tap] = torch.where(fresh, low, bottom[..., tap])
    return top, bottom


def ends_in_any(several: Sequence[WeightedEdges]) -> tuple[Tensor, Tensor]:
    """Return the labels by which a weight scales, from the first connection in which both its ends are there.

    Args:
        several: The connections that use it.

    Returns:
        Labels above and below, as `ends` does, laid out as the first connection lays the weight out.
    """
    (top, bottom), *rest = _ends_alike(several)
    for other_top, other_bottom in rest:
        there = (top > NOTHING) & (bottom > NOTHING)
        other_there = (other_top > NOTHING) & (other_bottom > NOTHING)
        if bool((other_there & ~there).any()):
            top, bottom = torch.where(there, top, other_top), torch.where(there, bottom, other_bottom)
    return top, bottom


def _ends_alike(several: Sequence[WeightedEdges]) -> list[tuple[Tensor, Tensor]]:
    """Return the ends in each connection, all laid out as in the first: an out of x @ W is an in of W @ x."""
    wanted = several[0].pattern.weight
    pairs = []
    for edges in several:
        own, parts = edges.pattern.weight, ends(edges)
        if own != wanted:
            top, bottom = (wanted.split(own.join(part.expand(own.shape)).reshape(wanted.original)) for part in parts)
            parts = (top, bottom)
        pairs.append(parts)
    return pairs


def share(relations: Relations, several: Sequence[WeightedEdges], labels: Tensor | None) -> None:
    """Make a weight that several connections use, or that is a bias too, scale in the same way everywhere.

    Args:
        relations: The unknowns.
        several: The connections that use it.
        labels: Labels for how its elements scale, of its shape; None where there are none.
    """
    pairs = _ends_alike(several)
    if labels is not None:
        laid_out = several[0].pattern.weight.split(labels)
        for top, bottom in pairs:
            relations.equation([top, bottom, laid_out], [1, -1, -1])
    for index, (top, bottom) in enumerate(pairs):
        for other_top, other_bottom in pairs[index + 1 :]:
            _same_ratio(relations, top, bottom, other_top, other_bottom)


def _same_ratio(relations: Relations, top: Tensor, bottom: Tensor, other_top: Tensor, other_bottom: Tensor) -> None:
    """Write down s(top) − s(bottom) = s(other top) − s(other bottom) for all weights.

    Where tops say nothing of the ins and bottoms nothing of the outs, it is enough for the first in with all outs, and for the
    first out with all ins.
    """
    parts, signs = [top, bottom, other_top, other_bottom], [1, -1, -1, 1]
    separate = top.shape[2] == other_top.shape[2] == 1 and bottom.shape[1] == other_bottom.shape[1] == 1
    if not separate:
        relations.equation(parts, signs)
        return
    for group in range(top.shape[0]):
        for tap in range(top.shape[3]):
            high, other_high = top[group, :, 0, tap], other_top[group, :, 0, tap]
            low, other_low = bottom[group, 0, :, tap], other_bottom[group, 0, :, tap]
            outs, ins = (high > NOTHING) & (other_high > NOTHING), (low > NOTHING) & (other_low > NOTHING)
            if not bool(outs.any()) or not bool(ins.any()):
                continue
            high, other_high, low, other_low = high[outs], other_high[outs], low[ins], other_low[ins]
            relations.equation([high, low[:1], other_high, other_low[:1]], signs)
            relations.equation([high[:1], low, other_high[:1], other_low], signs)
