"""The part of a relaxation that one position of a layer sees, many positions at a time (mathematics §5).

A functional of one neuron of a convolutional layer has coefficients inside the neuron's receptive field only; everything else
that `substitution` would carry down is 0. So the layers below are cut to windows: with the neuron at position p, a layer whose
window is [p·s + a, p·s + a + n) is read through a convolution of step t, padding q, gap g and k taps from the window
[p·s·t + a·t − q, …) of size (n − 1)·t + (k − 1)·g + 1. All positions have windows of one size, and become samples of a small
network, whose convolutions have no padding.

Where a window hangs over the border there are no neurons. Intervals, slack and lines are 0 there, which is what padding is: a
coefficient that arrives at a missing input, or above a missing nonlinearity, is multiplied by 0. A missing neuron of an affine
layer would bring its bias, so coefficients there are set to 0 (`Relaxation.present`).

An example: a kernel of 3 taps with padding 1 over 4 inputs, a ReLU, and another such kernel: position 0 of the last layer sees
the window [−1, 2) of the ReLU and [−2, 3) of the input; 1 and 2 entries of these are missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathlift.edges.convolution import Convolution
from pathlift.edges.unit import Identity, Scale
from pathlift.graph.interval import Interval
from pathlift.graph.layers import Connection, Layer
from pathlift.passes.enclosure.lines import Choice, Lines
from pathlift.passes.enclosure.relaxation import Relaxation

WORTH = 0.7
"""Windows are cut where they hold fewer neurons than this share of the layers."""


@dataclass(frozen=True)
class Span:
    """The window [p·step + start, p·step + start + size) of one spatial dimension, for the position p above."""

    step: int
    start: int
    size: int

    def below(self, step: int, padding: int, gap: int, taps: int) -> Span:
        """Return the window that a convolution reads of the layer below."""
        size = (self.size - 1) * step + (taps - 1) * gap + 1
        return Span(self.step * step, self.start * step - padding, size)


@dataclass(frozen=True)
class Windows:
    """What the positions of a layer see of the layers below.

    Attributes:
        top: The layer.
        spans: Layer name to its windows, one for each spatial dimension, from the layer down to the input.
        layers: The same layers, cut, from the input up.
        hanging: Affine layers without neurons at some places of the windows.
    """

    top: Layer
    spans: Mapping[str, tuple[Span, ...]]
    layers: Mapping[str, Layer]
    hanging: frozenset[str]

    def of(self, relaxation: Relaxation, samples: Tensor, positions: Tensor) -> Relaxation:
        """Cut a relaxation to the windows of some positions of some samples.

        Args:
            relaxation: What is known of all layers up to the top.
            samples: Number of the sample, (places,).
            positions: Number of the position in the top layer, flat, (places,).

        Returns:
            A relaxation of the layers below the top with one sample for each place.
        """
        where = torch.stack(torch.unravel_index(positions, self.top.shape[2:]), 1)
        cut = _Cut(relaxation, samples, where)
        intervals, slack, present = {}, {}, {}
        lines: dict[str, Lines | Choice] = {}
        for name, spans in self.spans.items():
            if name in relaxation.intervals:
                interval = relaxation.intervals[name]
                intervals[name] = Interval(cut(name, spans, interval.low), cut(name, spans, interval.high))
            if name in relaxation.slack:
                slack[name] = cut(name, spans, relaxation.slack[name])
            own = relaxation.lines.get(name)
            if isinstance(own, Lines):
                parts = (own.lower_slope, own.lower, own.upper_slope, own.upper)
                lines[name] = Lines(*(cut(name, spans, part) for part in parts))
            if name in self.hanging:
                present[name] = cut.present(name, spans)
        feed = {name: cut(name, self.spans[name], x) for name, x in relaxation.feed.items() if name in self.spans}
        return replace(
            relaxation, feed=feed, intervals=intervals, slack=slack, lines=lines, free={}, part=self.layers, present=present
        )


class _Cut:
    """Cuts tensors to windows."""

    def __init__(self, relaxation: Relaxation, samples: Tensor, where: Tensor) -> None:
        self.relaxation, self.samples, self.where = relaxation, samples, where

    def _places(self, name: str, spans: tuple[Span, ...]) -> tuple[list[Tensor], Tensor]:
        """Return the index of each spatial dimension, as they broadcast, and where there is a neuron, (places, *window)."""
        shape, count = self.relaxation.network.layer[name].shape[2:], len(spans)
        indices, there = [], torch.ones((), dtype=torch.bool, device=self.where.device)
        for dim, span in enumerate(spans):
            index = self.where[:, dim, None] * span.step + span.start + torch.arange(span.size, device=self.where.device)
            view = (len(index), *(span.size if other == dim else 1 for other in range(count)))
            there = there & ((index >= 0) & (index < shape[dim])).reshape(view)
            indices.append(index.clamp(0, shape[dim] - 1).reshape(view))
        return indices, there

    def __call__(self, name: str, spans: tuple[Span, ...], tensor: Tensor) -> Tensor:
        """Return the windows of a tensor, (places, 1, channels, *window), 0 where there is no neuron."""
        full = tensor.expand(len(tensor), *self.relaxation.network.layer[name].shape)
        indices, there = self._places(name, spans)
        sample = self.samples if len(full) > 1 else torch.zeros_like(self.samples)
        index = (sample.reshape(-1, *[1] * len(spans)), *indices)
        read = full[:, 0].movedim(1, -1)[index]
        return torch.where(there.unsqueeze(-1), read, 0.0).movedim(-1, 1).unsqueeze(1).contiguous()

    def present(self, name: str, spans: tuple[Span, ...]) -> Tensor:
        """Return 1 where there is a neuron and 0 elsewhere, (places, 1, 1, 1, *window)."""
        _, there = self._places(name, spans)
        return there.to(torch.float64)[:, None, None, None]


def windows_below(relaxation: Relaxation, top: Layer) -> Windows | None:
    """Return what the positions of a layer see, where the layers below it are a chain of convolutions.

    Args:
        relaxation: What is known of all layers up to the top.
        top: The layer.

    Returns:
        The windows; None where the layers are none that can be cut, or where little would be saved.
    """
    if relaxation.constants or len(top.shape) not in (3, 4):
        return None
    spans = {top.name: tuple(Span(1, 0, 1) for _ in top.shape[2:])}
    cut: list[Layer] = []
    layer, convolved = top, False  # whether the layer above is a convolution
    hanging: set[str] = set()
    while True:
        own = spans[layer.name]
        shape = (1, layer.shape[1], *(span.size for span in own))
        if layer.shape[0] != 1 or len(layer.shape) != len(top.shape):
            return None
        if convolved and layer.kind != "input" and layer.nonlinearity is None:
            hanging.add(layer.name)
        if layer.kind == "input":
            cut.append(replace(layer, shape=shape))
            break
        passed = _passed(relaxation, layer)
        if passed is None:
            return None
        connection, edges = passed
        below = relaxation.network.layer[connection.source]
        if isinstance(edges, Convolution):
            assert connection.weight is not None
            taps = relaxation.weights.middle[connection.weight].shape[2:]
            options = zip(own, edges.stride, edges.padding, edges.dilation, taps, strict=True)
            spans[below.name] = tuple(span.below(step, pad, gap, count) for span, step, pad, gap, count in options)
            edges = replace(edges, padding=(0,) * len(own))
        else:
            spans[below.name] = own
        convolved = isinstance(edges, Convolution)
        cut.append(replace(layer, shape=shape, connections=(replace(connection, edges=edges),)))
        layer = below
    size = sum(math.prod(layer.shape) for layer in cut)
    if size > WORTH * sum(math.prod(relaxation.network.layer[layer.name].shape) for layer in cut):
        return None
    return Windows(top, spans, {layer.name: layer for layer in reversed(cut)}, frozenset(hanging))


def _passed(relaxation: Relaxation, layer: Layer) -> tuple[Connection, Convolution | Identity | Scale] | None:
    """Return the only connection of a layer, and its edges, if they are the same at all positions; else None."""
    if len(layer.connections) != 1 or layer.concat is not None:
        return None
    dims = len(layer.shape) - 2
    flat = (1,) * dims
    if any(tuple(bias.view[-dims:]) != flat for bias in layer.biases if len(bias.view) >= dims and math.prod(bias.view) > 1):
        return None
    if any(len(bias.view) < dims and math.prod(bias.view) > 1 for bias in layer.biases):
        return None
    if layer.nonlinearity is not None and not isinstance(relaxation.lines.get(layer.name), Lines):
        return None
    connection = layer.connections[0]
    edges, weight, below = connection.edges, connection.weight, relaxation.network.layer[connection.source]
    if isinstance(edges, Convolution):
        fair = not edges.transposed and not edges.pad_before and weight is not None and weight.scalar is None
        return (connection, edges) if fair else None
    if below.shape != layer.shape:
        return None
    if isinstance(edges, Identity):
        return (connection, edges) if weight is None or weight.scalar is not None else None
    if isinstance(edges, Scale) and weight is not None and weight.scalar is None:
        view = tuple(relaxation.weights.middle[weight].shape) if edges.view is None else edges.view
        return (connection, edges) if math.prod(view) == 1 or (len(view) >= dims and tuple(view[-dims:]) == flat) else None
    return None
