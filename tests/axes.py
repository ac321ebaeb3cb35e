"""The law of compact axes, checked edge map by edge map: storing equal positions once must not be seen in any number.

For every edge map F, all axes of the neurons below and all values that are constant on their classes,
``expand(compact F (x)) = F (expand x)``; the same for the (max, ×) form; and the adjoints are transposes of one another, so
what comes back to a class is the sum of what comes back to its positions, and a weight gets the same either way. The maps
are those of captured networks, rules' declarations included.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor

from pathlift.edges.axis import Axis, classify, compact_shape
from pathlift.edges.base import Compact, Edges
from pathlift.edges.chain import Chain
from pathlift.edges.unit import UnitEdges
from pathlift.edges.weights import Weights
from pathlift.graph.layers import Connection, Layer
from pathlift.graph.network import Network

RTOL = 1e-11
Axes = tuple[Axis, ...]


def random_axis(size: int, generator: torch.Generator) -> Axis:
    """Full, constant, or any classes in between."""
    kind = int(torch.randint(3, (), generator=generator))
    if kind == 0:
        return Axis.full(size)
    if kind == 1:
        return Axis.constant(size)
    return classify(torch.randint(max(1, size - 1), (size,), generator=generator))[0]


def expand(x: Tensor, axes: Axes) -> Tensor:
    """One entry per position."""
    for dim, axis in enumerate(axes):
        x = x.index_select(dim, axis.index)
    return x


def added(g: Tensor, axes: Axes) -> Tensor:
    """The transpose of `expand`: the sum over the positions of each class."""
    for dim, axis in enumerate(axes):
        shape = list(g.shape)
        shape[dim] = axis.count
        g = g.new_zeros(shape).index_add(dim, axis.index, g)
    return g


def scattered(x: Tensor, generator: torch.Generator) -> Tensor:
    """The same values in memory of another order and with a beginning of its own, as views leave them."""
    order = torch.randperm(x.dim(), generator=generator).tolist()
    turned = x.permute(order)
    memory = torch.full((turned.numel() + 3,), 7.0, dtype=x.dtype)
    memory[3:] = turned.reshape(-1)
    return memory[3:].view(turned.shape).permute(sorted(range(x.dim()), key=order.__getitem__))


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values that are positive, because the (max, ×) form asks for it."""
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1


def constant_weights(value: Tensor) -> Weights:
    return Weights((value,), torch.abs, torch.float64)


def compact_form(edges: Edges, below: Axes, out: tuple[int, ...], weight: tuple[int, ...] | None) -> tuple[Compact, Axes]:
    """The compact map and the axes that it reads, once the dimensions that it asks for are full."""
    asked = edges.compact(below, out, weight)
    if isinstance(asked, frozenset):
        assert asked, "a map that asks for nothing has to give its compact form"
        assert all(below[dim].classes is not None for dim in asked)
        below = tuple(Axis.full(axis.size) if dim in asked else axis for dim, axis in enumerate(below))
        asked = edges.compact(below, out, weight)
    assert isinstance(asked, Compact), "a map asks once for full dimensions"
    return asked, below


def assert_law(
    edges: Edges, below: Axes, out: tuple[int, ...], weight: Tensor | None, generator: torch.Generator, *, scored: bool
) -> None:
    """Check one edge map for given axes of the neurons below."""
    compact, below = compact_form(edges, below, out, None if weight is None else tuple(weight.shape))
    above = compact.axes
    assert tuple(axis.size for axis in above) == out, (edges, [axis.size for axis in above], out)
    x = scattered(drawn(compact_shape(below), generator), generator)
    x_in_full = expand(x, below)
    constant = None if weight is None else constant_weights(weight)
    small = None if weight is None else constant_weights(weight if compact.weight is None else compact.weight(weight))
    for name in ("sum", "max"):
        value, expected = getattr(compact.edges, name)(x, small), getattr(edges, name)(x_in_full, constant)
        assert tuple(expected.shape) == out
        assert tuple(value.shape) == compact_shape(above), (name, edges, value.shape, compact_shape(above))
        torch.testing.assert_close(expand(value, above), expected, rtol=RTOL, atol=1e-14)
    g = drawn(out, generator)
    share = weight is not None and compact.weight is None
    found_below, found_weight = compact.edges.adjoint(x, small, added(g, above), below=True, share=share)
    to_below, to_weight = edges.adjoint(x_in_full, constant, g, below=True, share=share)
    torch.testing.assert_close(found_below, added(to_below, below), rtol=RTOL, atol=1e-14)
    if share:
        torch.testing.assert_close(found_weight, to_weight, rtol=RTOL, atol=1e-14)
    if scored and weight is not None:
        assert_pattern(edges, x_in_full, weight.abs())
        assert_pattern(compact.edges, x, weight.abs())


def assert_pattern(edges: Edges, x: Tensor, weight: Tensor) -> None:
    """Check that a map with weights of its own is what its pattern says: one product for each triple of each block."""
    if isinstance(edges, Chain):
        for link in edges.links[: edges.weighted]:
            x = link.sum(x, None)
        edges = edges.links[edges.weighted]
        if isinstance(edges, Chain):
            assert_pattern(edges, x, weight)
            return
    pattern = edges.pattern(tuple(x.shape), tuple(weight.shape))
    tap, below, above = pattern.triples.unbind(1)
    products = torch.einsum("goie,gie->goe", pattern.weight.split(weight)[..., tap], pattern.below.split(x)[..., below])
    sums = products.new_zeros(pattern.above.shape).index_add(2, above, products)
    torch.testing.assert_close(pattern.above.join(sums), edges.sum(x, constant_weights(weight)), rtol=RTOL, atol=1e-14)


def values_of(network: Network) -> dict[object, Tensor]:
    """Values of all weight tensors, numbers among them."""
    values = dict(network.values())
    numbers = {
        weight: torch.tensor(weight.scalar, dtype=torch.float64) for weight in network.weights if weight.scalar is not None
    }
    return {weight: value.detach().double() for weight, value in (values | numbers).items()}


def connections(network: Network) -> Iterator[tuple[Layer, Connection, tuple[int, ...]]]:
    """Every bundle of edges, and the shape of what it brings."""
    for layer in network.layers:
        for number, connection in enumerate(layer.connections):
            yield layer, connection, layer.shape if layer.concat is None else layer.concat.shape(number, layer.shape)


def assert_terms_respect_axes(network: Network, seed: int, draws: int = 1) -> None:
    """Check every edge map of a network for random axes below it."""
    generator = torch.Generator().manual_seed(seed)
    values = values_of(network)
    for layer, connection, out in connections(network):
        shape = network.layer[connection.source].shape
        weight = None if connection.weight is None else values[connection.weight]
        for _ in range(draws):
            below = tuple(random_axis(size, generator) for size in shape)
            scored = connection.weight is not None and connection.weight.score_name is not None
            try:
                assert_law(connection.edges, below, out, weight, generator, scored=scored)
            except Exception as error:
                classes = [axis.index.tolist() for axis in below]
                raise AssertionError(f"{layer.origin}: axes {classes} of {shape}") from error


def kinds(network: Network) -> set[type[Edges]]:
    """The kinds of maps that a network is made of."""
    every: set[type[Edges]] = set()
    stack = [connection.edges for _, connection, _ in connections(network)]
    while stack:
        edges = stack.pop()
        every.add(type(edges))
        stack.extend(edges.links if isinstance(edges, Chain) else ())
    return every


def all_kinds(base: type[Edges] = Edges) -> set[type[Edges]]:
    """Every kind of map that rules and compact forms are made of."""
    below = set().union(*(all_kinds(kind) for kind in base.__subclasses__()))
    is_kind = base.__module__.startswith("pathlift.edges.") and base is not UnitEdges and not inspect.isabstract(base)
    return below | ({base} if is_kind else set())
