"""Antecedents of one neuron that share a scale, tied map by map (mathematics §7).

If v = max(u, u'), or v = c·u + c'·u' with constants that are not 0, then max(λ_u·u, λ_u'·u') = λ_v·max(u, u') for all
values only when λ_u = λ_u' = λ_v. A maximum, a sum without weights, and weights that do not scale (constants, derived
weights) give all antecedents of a neuron one s. Tying them costs about as much as listing the edges once, and less where a
map is a product of maps along single dimensions, or where every neuron above reads all channels of a place.

Worked example: MaxPool1d(2, stride=1) over places with labels 5, 6, 7, 8. Place 0 above reads 5 and 6, place 1 reads 6 and
7, place 2 reads 7 and 8: all four become one class, which goes by its smallest label, 5, and is the label of all three
places above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.edges import Edges, Weights
from pathlift.edges.contraction import AxisMap, Contraction, Dense, WeightedTaps
from pathlift.edges.convolution import Convolution
from pathlift.edges.gathered import GatheredConvolution
from pathlift.edges.pattern import Pattern
from pathlift.edges.unit import Overlap
from pathlift.edges.wall import Beside
from pathlift.edges.window import Counted, Reduce, Taps, Window
from pathlift.rescaling.relations import NOTHING, Relations
from pathlift.rescaling.repeats import thinned

LARGE = 2.0**40
"""Above every label; a maximum of LARGE − label finds the smallest label."""

ELEMENTS = 1 << 20
"""Edges are listed in blocks of about this many."""

HIGH = 1 << 62
"""Above every label."""

PATTERNED = (Dense, Contraction, Convolution, GatheredConvolution)
"""Maps with many weights to a neuron, which their patterns tell."""


@dataclass(frozen=True, eq=False)
class Line:
    """What a map reads along one dimension.

    Attributes:
        dim: The dimension.
        source: Positions below, one per edge.
        target: Positions above, one per edge.
        count: Number of positions above.
    """

    dim: int
    source: Tensor
    target: Tensor
    count: int


def lines(edges: Edges, below: tuple[int, ...], above: tuple[int, ...]) -> list[Line]:
    """Write a map as maps along single dimensions, one after the other; none for a map that is no such product.

    Args:
        edges: The map.
        below: Shape of the neurons below.
        above: Shape of the neurons above.

    Returns:
        The maps.
    """
    if isinstance(edges, (Beside, Counted)):
        return lines(edges.pool, below, above)
    if isinstance(edges, Reduce):
        return [_line(dim, torch.arange(below[dim], device="cpu")[None], below[dim]) for dim in edges.dims]
    if isinstance(edges, AxisMap):
        target, source = edges.matrix.cpu().nonzero().unbind(1)
        return [Line(edges.dim, source, target, len(edges.matrix))]
    if isinstance(edges, WeightedTaps):
        return [_line(edges.dim, edges.table.index, below[edges.dim])]
    if isinstance(edges, Taps):
        return [_line(dim, table.index, below[dim]) for dim, table in edges.tables.items()]
    if isinstance(edges, Window):
        return [_line(dim, table, below[dim]) for dim, table in edges.reads(above).items()]
    return []


def _line(dim: int, table: Tensor, size: int) -> Line:
    """Return a map from what each position above reads, shape (positions, taps); what lies outside is no neuron."""
    target, tap = ((table >= 0) & (table < size)).nonzero().unbind(1)
    return Line(dim, table[target, tap], target, len(table))


def tie_lines(relations: Relations, several: list[Line], labels: Tensor) -> None:
    """Tie what each neuron above reads through a product of maps along single dimensions.

    Args:
        relations: The unknowns.
        several: The maps.
        labels: Labels of the neurons below, of size 1 along dimensions of no map along which they only repeat themselves.
    """
    for line in several:  # what is not read along one dimension must not be tied along another
        read = torch.zeros(labels.shape[line.dim], dtype=torch.bool, device="cpu").index_fill_(0, line.source, value=True)
        if not bool(read.all()):
            labels = labels.index_fill(line.dim, (~read).nonzero()[:, 0], NOTHING)
    for line in several:
        moved = labels.movedim(line.dim, -1)
        low = tie_stars(relations, moved.reshape(-1, moved.shape[-1]), line.source, line.target, line.count)
        labels = low.reshape(*moved.shape[:-1], line.count).movedim(-1, line.dim)


def tie_overlap(relations: Relations, edges: Overlap, labels: Tensor, above: tuple[int, ...], device: torch.device) -> None:
    """Tie what each neuron above reads, when each one below is read once at most.

    Args:
        relations: The unknowns.
        edges: The map.
        labels: Labels of the neurons below.
        above: Shape of the neurons above.
        device: Where the map works.
    """
    count = torch.Size(above).numel() + 1
    numbers = torch.arange(1, count, dtype=torch.float64, device=device).reshape(above)
    target = edges.transpose(numbers).long().reshape(-1).cpu()
    source = (target > 0).nonzero()[:, 0]
    tie_stars(relations, labels.reshape(1, -1), source, target[source], count)


def tie_through(
    relations: Relations, edges: Edges, weights: Weights | None, labels: Tensor, above: tuple[int, ...], device: torch.device
) -> Tensor:
    """Tie what each neuron above reads through a map without weights that scale and without a pattern.

    Where the map is a product of maps along single dimensions, or reads each neuron once at most, nearly all is tied at once.
    What is left shows when the largest and the smallest label that a neuron above reads, each a maximum over the map, differ:
    these two are tied, until none differ.

    Args:
        relations: The unknowns.
        edges: The map.
        weights: 1 where its constant weights are not 0; None for everywhere.
        labels: Labels of the neurons below.
        above: Shape of the neurons above.
        device: Where the map works.

    Returns:
        Labels above; `NOTHING` for a neuron that reads nothing.
    """
    below = tuple(labels.shape)
    several = lines(edges, below, above)
    if several:
        thin, dims = thinned(labels), {line.dim for line in several}
        wide = [size if dim in dims else thin_size for dim, (size, thin_size) in enumerate(zip(below, thin.shape, strict=True))]
        tie_lines(relations, several, thin.expand(wide))
    elif isinstance(edges, Overlap):
        tie_overlap(relations, edges, labels, above, device)
    while True:
        labels = relations.find(labels)
        x = labels.double().to(device)
        high = edges.max(x, weights).cpu()
        low = LARGE - edges.max(torch.where(x > NOTHING, LARGE - x, 0.0), weights).cpu()
        apart = (high > NOTHING) & (high != low)
        if not bool(apart.any()):
            return high.long()
        relations.tie(high[apart].long(), low[apart].long())


def tie_stars(relations: Relations, labels: Tensor, source: Tensor, target: Tensor, count: int) -> Tensor:
    """Tie all that one place reads, row by row.

    Args:
        relations: The unknowns.
        labels: Shape (rows, places below).
        source: Place below of each edge.
        target: Place above of each edge.
        count: Number of places above.

    Returns:
        Labels above, shape (rows, count); `NOTHING` for a place that reads nothing.
    """
    out = torch.full((len(labels), count), HIGH, device="cpu")
    for part in blocks(len(labels), len(source)):
        read = relations.find(labels[part])[:, source]
        low = out[part].scatter_reduce_(1, target.expand(read.shape), torch.where(read > NOTHING, read, HIGH), "amin")
        low.masked_fill_(low == HIGH, NOTHING)
        relations.tie(read, low[:, target])
    return relations.find(out)


def tie_pattern(relations: Relations, pattern: Pattern, there: Tensor | None, labels: Tensor) -> Tensor:
    """Tie what each neuron above reads through weights that do not scale.

    Args:
        relations: The unknowns.
        pattern: The map.
        there: Where weights are not 0, (groups, outs, ins, taps); None for everywhere.
        labels: Labels of the neurons below, (groups, ins, places), or with one place for all.

    Returns:
        Labels above, (groups, outs, places).
    """
    _, source, target = pattern.triples.unbind(1)
    groups, outs, positions = pattern.above.shape
    if there is not None:
        return _tie_masked(relations, pattern, there, labels)
    if labels.shape[2] == 1:
        source = torch.zeros_like(source)
    read = torch.unique(source)
    spread = torch.arange(labels.shape[1], device="cpu")
    low = labels.new_zeros(groups, labels.shape[2])
    rows = labels[:, :, read].movedim(1, 2).reshape(-1, labels.shape[1])
    low[:, read] = tie_stars(relations, rows, spread, torch.zeros_like(spread), 1).reshape(groups, -1)
    return tie_stars(relations, low, source, target, positions)[:, None].expand(groups, outs, positions)


def _tie_masked(relations: Relations, pattern: Pattern, there: Tensor, labels: Tensor) -> Tensor:
    """The same, edge by edge."""
    tap, source, target = pattern.triples.unbind(1)
    groups, outs, positions = pattern.above.shape
    if labels.shape[2] == 1:  # places that read by the same taps are alike
        reads = torch.zeros(positions, there.shape[3], dtype=torch.bool, device="cpu")
        reads[target, tap] = True
        kinds, kind = torch.unique(reads, dim=0, return_inverse=True)
        target, tap = kinds.nonzero().unbind(1)
        source = torch.zeros_like(tap)
    else:
        kinds, kind = torch.arange(positions, device="cpu"), torch.arange(positions, device="cpu")
    out = torch.full((groups, outs, len(kinds)), HIGH, device="cpu")
    edges = []
    for one_tap in range(there.shape[3]):
        group, above, below = there[..., one_tap].nonzero().unbind(1)
        chosen = tap == one_tap
        edges += [
            (group[part, None], above[part, None], below[part, None], source[chosen], target[chosen])
            for part in blocks(len(group), int(chosen.sum()))
        ]
    for group, above, below, low, high in edges:
        read = relations.find(labels[group, below, low])
        index = (group * outs + above) * len(kinds) + high
        out.view(-1).scatter_reduce_(0, index.reshape(-1), torch.where(read > NOTHING, read, HIGH).reshape(-1), "amin")
    out.masked_fill_(out == HIGH, NOTHING)
    for group, above, below, low, high in edges:
        relations.tie(labels[group, below, low], out[group, above, high])
    return relations.find(out)[:, :, kind]


def blocks(size: int, each: int) -> Iterator[slice]:
    """Yield slices of ``size`` rows with ``each`` elements, about `ELEMENTS` in all."""
    step = max(1, ELEMENTS // max(each, 1))
    for first in range(0, size, step):
        yield slice(first, first + step)
