"""Which axis of a parameter counts output channels, which input channels: told by the edges on which it stands (§1).

A weight is laid out as the ordinary convolution that it is, (output channels, input channels of a group, *kernel), whatever
the operator keeps first: a transposed convolution has (in, out/groups, …), ``x @ W`` has (in, out), a slice of a larger
parameter is a matrix of its own. Where a weight acts element by element (a bias, a scale, a slope), each element is an
output channel. A parameter that stands on edges with two different roles (W and Wᵀ) has no channels of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathlift.edges.base import Edges
from pathlift.edges.chain import Chain
from pathlift.edges.pattern import Layout
from pathlift.graph.compact import compacted
from pathlift.graph.expressions import StateTensor
from pathlift.graph.layers import Connection, WeightTensor
from pathlift.graph.network import Network
from pathlift.graph.origins import is_moved, origins


@dataclass(frozen=True, eq=False)
class Piece:
    """A parameter, or the part of it that one operator reads, as blocks (groups, outs, ins, taps).

    Attributes:
        layout: How the weight of the operator is laid out.
        kernel: Sides of the block of taps.
        indices: Where the blocks' elements are in the flattened parameter, shape (groups, outs, ins, taps); None when the
            weight is the parameter itself.
    """

    layout: Layout
    kernel: tuple[int, ...]
    indices: Tensor | None = None

    @property
    def elementwise(self) -> bool:
        """Whether each element joins two neurons that no other element joins to anything."""
        return math.prod(self._shape[1:]) == 1

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.layout.shape if self.indices is None else tuple(self.indices.shape)

    def blocks(self, x: Tensor) -> Tensor:
        """Return what stands on the elements of a tensor of the parameter's shape, (groups, outs, ins, taps)."""
        return self.layout.split(x) if self.indices is None else x.reshape(-1)[self.indices]

    def put(self, blocks: Tensor, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape with these blocks in place of its own."""
        if self.indices is None:
            return self.layout.join(blocks.reshape(self._shape)).reshape(tensor.shape)
        return tensor.reshape(-1).index_put((self.indices,), blocks.reshape(self._shape)).view(tensor.shape)

    def as_convolution(self, x: Tensor) -> Tensor:
        """Return the same as the weight of an ordinary convolution, (groups·outs, ins, *kernel)."""
        groups, outs, ins, _ = self._shape
        return self.blocks(x).reshape(groups * outs, ins, *self.kernel)

    def numbered(self) -> Tensor:
        """Return `indices`, also of a weight that is the parameter itself."""
        if self.indices is not None:
            return self.indices
        return self.layout.split(torch.arange(math.prod(self.layout.original)).reshape(self.layout.original))


@dataclass(frozen=True, eq=False)
class Axes:
    """The axes of one parameter.

    Attributes:
        pieces: Its parts, no two of which share an element; none where it has no channels.
        conflict: Why it has no output channels of its own, empty when it has; the pieces of a weight used as W and as Wᵀ are
            right but for which is which.
    """

    pieces: tuple[Piece, ...]
    conflict: str = ""


def channel_axes(network: Network, names: Sequence[str]) -> dict[str, Axes]:
    """Find the axes of parameters from the edges on which they stand.

    Args:
        network: The network.
        names: Parameters whose elements each are a weight, or are moved to one.

    Returns:
        Name to axes. A parameter on no edge has no pieces.
    """
    uses_of: dict[str, list[tuple[str, Piece | str]]] = {name: [] for name in names}
    seen: set[tuple[WeightTensor, Layout]] = set()
    for where, weight, layout in _uses(compacted(network), set(names)):
        if (weight, layout) not in seen:
            seen.add((weight, layout))
            for name, piece in _pieces(network, weight, layout):
                if name in uses_of:
                    uses_of[name].append((where, piece))
    return {name: _joined(name, uses) for name, uses in uses_of.items()}


def _uses(network: Network, names: set[str]) -> Iterator[tuple[str, WeightTensor, Layout]]:
    """Yield each use of a parameter as a weight: the module, the weight and its layout."""
    for layer in network.layers:
        where = f"'{layer.origin.module}' ({layer.origin.op})"
        for connection in layer.connections:
            if connection.weight is not None and connection.weight.requires & names:
                yield where, connection.weight, weight_layout(network, connection)
        for bias in layer.biases:
            if bias.weight.requires & names:
                yield where, bias.weight, elementwise_layout(bias.weight.shape)


def elementwise_layout(shape: Sequence[int]) -> Layout:
    """Return the layout (size, 1, 1, 1) of a weight whose elements have each a neuron to itself."""
    plain = Layout.plain(shape)
    return replace(plain, shape=(plain.shape[1], 1, 1, 1))


def weight_layout(network: Network, connection: Connection) -> Layout:
    """Return how the weight of a bundle of edges is laid out, as its own pattern tells.

    Args:
        network: The network.
        connection: A bundle with a weight.

    Returns:
        The layout, with the groups of elementwise weights told apart.
    """
    assert connection.weight is not None
    x = torch.zeros(()).expand(network.layer[connection.source].shape)
    links = _links(connection.edges, weighted=True)
    link, weighted = next(links)
    while not weighted:
        x = link.sum(x, None)
        link, weighted = next(links)
    return link.pattern(tuple(x.shape), tuple(connection.weight.shape)).weight


def layouts(network: Network) -> dict[str, Layout]:
    """Return how the weights of bundles of edges are laid out, by the name under which they are scored.

    Args:
        network: The network.

    Returns:
        Name to layout; derived weights are among them.
    """
    connections = [connection for layer in compacted(network).layers for connection in layer.connections]
    scored = [(connection.weight.score_name, connection) for connection in connections if connection.weight is not None]
    return {name: weight_layout(compacted(network), connection) for name, connection in scored if name is not None}


def _links(edges: Edges, *, weighted: bool) -> Iterator[tuple[Edges, bool]]:
    if isinstance(edges, Chain):
        for index, link in enumerate(edges.links):
            yield from _links(link, weighted=weighted and index == edges.weighted)
    else:
        yield edges, weighted


def _pieces(network: Network, weight: WeightTensor, layout: Layout) -> Iterator[tuple[str, Piece | str]]:
    """Yield the part of each parameter that a weight reads, or why it is no matrix."""
    if isinstance(weight.expression, StateTensor):
        yield weight.expression.name, Piece(layout, layout.kernel())
        return
    moved = origins(network, weight) if is_moved(network, weight) else None
    for name, indices in ({} if moved is None else moved.places()).items():
        blocks = layout.split(indices.cpu())
        there = blocks >= 0
        turned = _turned(blocks, tuple(network.state[name].shape))
        if turned is not None:
            yield name, Piece(turned, turned.kernel())
        elif bool(there.any()):
            yield name, _submatrix(layout, blocks, there)


def _turned(blocks: Tensor, shape: tuple[int, ...]) -> Layout | None:
    """Return the layout of a parameter that an operator reads as a whole, its axes in another order; None of any other.

    Along each dimension of the blocks the place in the flattened parameter grows by one step; from the largest step to the
    smallest they are the digits of the place.
    """
    if blocks.numel() != math.prod(shape) or not blocks.numel():
        return None
    steps = [
        int(blocks.select(dim, 1).flatten()[0] - blocks.flatten()[0]) if size > 1 else 0
        for dim, size in enumerate(blocks.shape)
    ]
    digits = sorted(range(4), key=lambda dim: -steps[dim])
    sizes = tuple(blocks.shape[dim] for dim in digits)
    layout = Layout(shape, sizes, tuple(map(digits.index, range(4))), tuple(blocks.shape))
    places = torch.arange(blocks.numel(), device="cpu").reshape(shape)
    return layout if torch.equal(layout.split(places), blocks) else None


def _submatrix(layout: Layout, blocks: Tensor, there: Tensor) -> Piece | str:
    """Return the elements of a weight that come from one parameter, if they are all of some of its rows and columns."""
    if int(there.sum()) != len(blocks[there].unique()):
        return "repeats its elements"
    if not bool(there.all()):
        sides = [there.any([other for other in range(4) if other != dim]) for dim in range(4)]
        for dim, side in enumerate(sides):
            blocks = blocks.index_select(dim, side.nonzero()[:, 0])
        if not bool((blocks >= 0).all()):
            return "spreads its elements over no whole rows and columns"
    kernel = layout.kernel() if math.prod(layout.kernel()) == blocks.shape[3] else (blocks.shape[3],)
    return Piece(layout, kernel, blocks)


def _joined(name: str, uses: Sequence[tuple[str, Piece | str]]) -> Axes:
    """Put the uses of one parameter together: the same role again, other elements, or a conflict."""
    kept: list[tuple[str, Piece]] = []
    conflict = ""
    for where, piece in uses:
        if isinstance(piece, str):
            return Axes((), f"'{name}' has no output channels: {where} {piece}")
        roles = [(other, _roles(piece, earlier)) for other, earlier in kept]
        clash = next((other for other, role in roles if role == "clash"), None)
        swapped = next((other for other, role in roles if role == "swapped"), None)
        if clash is not None or swapped is not None:
            conflict = f"'{name}' has two roles: what are output channels in {clash or swapped} are none in {where}"
        if clash is not None:
            return Axes((), conflict)
        if all(role == "apart" for _, role in roles):
            kept.append((where, piece))
    return Axes(tuple(piece for _, piece in kept), conflict)


def _roles(piece: Piece, other: Piece) -> str:
    """Compare two uses of a parameter: ``same`` channels, ``swapped`` ones, elements ``apart``, or a ``clash``."""
    if piece.indices is None and other.indices is None and piece.layout == other.layout:
        return "same"
    first, second = piece.numbered(), other.numbered()
    size = int(max(first.max(), second.max())) + 1
    (outs, ins), (other_outs, other_ins) = (_labels(blocks, size) for blocks in (first, second))
    if not bool(((outs >= 0) & (other_outs >= 0)).any()):
        return "apart"
    if torch.equal(outs, other_outs) and torch.equal(ins, other_ins):
        return "same"
    return "swapped" if torch.equal(outs, other_ins) and torch.equal(ins, other_outs) else "clash"


def _labels(indices: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Name the output and the input channel of each element of a parameter by the first element in it; −1 outside."""
    labels = []
    for dims in ((2, 3), (1, 3)):
        first = indices.amin(dims, keepdim=True).expand(indices.shape)
        labels.append(torch.full((size,), -1).index_put((indices,), first))
    return labels[0], labels[1]
