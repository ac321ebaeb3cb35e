"""Tightening by optimisation: narrower intervals at kinks, and slopes that are chosen for the functional (mathematics §5).

Both only add bounds to bounds. An interval and a linear bound of the same neuron both hold, so their intersection does. The
line below a ReLU on an interval across 0 may have any slope t in [0, 1], as ReLU(z) ≥ t·z for all z: so every step of the
ascent over these slopes gives a bound that holds, and the best of all steps is kept.

An example: z in [−1, 1], the functional ReLU(z) − z/4. With t = 1 the rest 3z/4 is at least −3/4, with t = 0 the rest −z/4 is
at least −1/4, with t = 1/4 it is 0, which is attained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from pathlift.budget import Clock
from pathlift.graph.interval import Interval
from pathlift.graph.layers import Clamp, Extremum, Layer, Slopes
from pathlift.passes.enclosure.lines import Lines
from pathlift.passes.enclosure.local import Windows, windows_below
from pathlift.passes.enclosure.relaxation import Relaxation
from pathlift.passes.enclosure.substitution import ELEMENTS, lower_bound, transposed
from pathlift.passes.forward import ends

CACHED = 1 << 19
"""Coefficients of neurons with windows of their own that are worked on at a time (4 MiB): what stays in a cache is faster."""

PATIENCE = 3
"""Steps of an ascent before its pace tells whether it is worth going on."""

RATE = 0.25
"""Of the ascent over slopes, which lie in [0, 1]."""


def ascended(
    relaxation: Relaxation, functionals: Mapping[str, Tensor], *, steps: int, clock: Clock, constant: Tensor | float = 0.0
) -> Tensor:
    """Bound linear functionals plus a constant from below, and raise what is not positive by ascent over the free slopes.

    Args:
        relaxation: What is known of all layers.
        functionals: Layer name to coefficients, (samples, functionals, *shape).
        steps: Steps of gradient ascent.
        clock: The ascent ends when its time is up.
        constant: Added to each functional, (samples, functionals).

    Returns:
        Shape (samples, functionals).
    """
    best = lower_bound(relaxation, functionals) + constant
    left = (~(best > 0)).any(0).nonzero()[:, 0]
    if not relaxation.free or len(left) == 0:
        return best
    chosen, added = {name: a[:, left] for name, a in functionals.items()}, (torch.zeros_like(best) + constant)[:, left]
    best[:, left] = _ascended(relaxation, chosen, best[:, left], added, steps, clock)
    return best


def stepped(
    ascent: torch.optim.Optimizer, bound: Tensor, tilts: Mapping[str, Tensor], multipliers: Mapping[str, Tensor]
) -> None:
    """Take a step up, and bring what it moves back to where it may be.

    Args:
        ascent: The optimiser.
        bound: A number.
        tilts: Where free slopes lie, in [0, 1].
        multipliers: At least 0.
    """
    ascent.zero_grad()
    bound.backward()
    ascent.step()
    with torch.no_grad():
        for tilt in tilts.values():
            tilt.clamp_(0.0, 1.0)
        for multiplier in multipliers.values():
            multiplier.clamp_(min=0.0)


def _ascended(
    relaxation: Relaxation, functionals: Mapping[str, Tensor], best: Tensor, constant: Tensor, steps: int, clock: Clock
) -> Tensor:
    rows = best.shape[1]
    tilts = {name: first_tilt(relaxation, name, rows) for name in relaxation.free}
    with torch.enable_grad():
        parameters = {name: tilt.requires_grad_() for name, tilt in tilts.items()}
        ascent = torch.optim.Adam(parameters.values(), lr=RATE, maximize=True)
        for step in range(steps):
            if clock.over():
                return best
            bound = lower_bound(relaxation, functionals, tilts=parameters) + constant
            before, best = best, torch.maximum(best, bound.detach())
            if step >= PATIENCE and not bool(((best <= 0) & (best + (best - before) * (steps - step) > 0)).any()):
                return best  # at this pace nothing more gets above 0
            stepped(ascent, bound.sum(), parameters, {})
    last = {name: tilt.detach() for name, tilt in parameters.items()}
    return torch.maximum(best, lower_bound(relaxation, functionals, tilts=last) + constant)


def first_tilt(relaxation: Relaxation, name: str, rows: int) -> Tensor:
    """Return where CROWN's slopes lie between their ends, once for every functional."""
    lines, free = relaxation.lines[name], relaxation.free[name]
    assert isinstance(lines, Lines)
    tilt = ((lines.lower_slope - free.least) / (free.most - free.least).clamp(min=1e-300)).clamp(0.0, 1.0)
    return tilt.unsqueeze(1).repeat(1, rows, *[1] * (tilt.dim() - 1))


def narrowed(
    relaxation: Relaxation, layer: Layer, interval: Interval, readers: list[Layer], clock: Clock, *, everywhere: bool
) -> Interval:
    """Narrow the interval of neurons at a kink of what reads them by linear bounds of their own, ±v.

    Args:
        relaxation: What is known of all layers up to this one.
        layer: The layer.
        interval: Its interval.
        readers: The nonlinearities that read it.
        clock: Neurons keep their intervals when its time is up.
        everywhere: Narrow also what lies beside the kinks: weights above it that move have less to move then.

    Returns:
        The intersection of both.
    """
    windows = windows_below(relaxation, layer)
    wanted, positive = torch.ones_like(interval.low, dtype=torch.bool), interval.middle >= 0
    for turned in (False, True):  # the end towards 0 first: where the sign is known then, the other end may be of no use
        wanted = wanted & (_not_flat(interval, readers) if everywhere else _at_kinks(relaxation, interval, readers))
        below = positive ^ turned
        interval = _one_end(relaxation, layer, interval, windows, wanted, below, clock)
    return interval


def _one_end(
    relaxation: Relaxation,
    layer: Layer,
    interval: Interval,
    windows: Windows | None,
    wanted: Tensor,
    below: Tensor,
    clock: Clock,
) -> Interval:
    """Narrow the lower end of the neurons that are marked ``below``, and the upper end of the others."""
    flat = wanted.flatten(1)
    if not bool(flat.any()):
        return interval
    low, high = interval.low.flatten(1).clone(), interval.high.flatten(1).clone()
    sign = torch.where(below.flatten(1), 1.0, -1.0).to(low)
    pieces = _all_at_once(relaxation, layer, flat) if windows is None else _by_position(relaxation, windows, flat)
    for part, samples, neurons, unit in pieces:
        if clock.over():
            break
        own = sign[samples, neurons]
        bound = lower_bound(part, {layer.name: unit * own.reshape(*own.shape, *[1] * (unit.dim() - 2))})
        low[samples, neurons] = torch.where(own > 0, torch.maximum(low[samples, neurons], bound), low[samples, neurons])
        high[samples, neurons] = torch.where(own < 0, torch.minimum(high[samples, neurons], -bound), high[samples, neurons])
    return Interval(low.reshape(interval.low.shape), torch.maximum(low, high).reshape(interval.high.shape))


_Piece: TypeAlias = tuple[Relaxation, Tensor, Tensor, Tensor]
"""A relaxation, the sample (rows, 1) and the neuron (rows, neurons) of each functional, and the functionals themselves."""


def _all_at_once(relaxation: Relaxation, layer: Layer, wanted: Tensor) -> Iterator[_Piece]:
    """Yield functionals of a few neurons of every sample, over the whole network."""
    batch, most = len(wanted), int(wanted.sum(1).max())
    order = torch.argsort(wanted.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]
    rows = max(1, max(1, ELEMENTS // _widest_below(relaxation, layer)) // batch)
    samples = torch.arange(batch, device=wanted.device)[:, None]
    for neurons in order.split(rows, 1):
        unit = torch.zeros((batch, neurons.shape[1], wanted.shape[1]), dtype=torch.float64, device=wanted.device)
        yield relaxation, samples, neurons, unit.scatter_(2, neurons.unsqueeze(2), 1.0).unflatten(2, layer.shape)


def _by_position(relaxation: Relaxation, windows: Windows, wanted: Tensor) -> Iterator[_Piece]:
    """Yield functionals of the neurons at a few positions, each over the windows that it sees."""
    channels, spatial = windows.top.shape[1], windows.top.shape[2:]
    wanted = wanted.unflatten(1, (channels, -1)).transpose(1, 2)  # (samples, positions, channels)
    count = wanted.sum(2)
    places = count.flatten().argsort(descending=True)[: int((count > 0).sum())]
    widest = max(math.prod(layer.shape) for layer in windows.layers.values())
    for part in places.split(max(1, CACHED // (channels * widest))):
        sample, position = part // count.shape[1], part % count.shape[1]
        own = wanted[sample, position].to(torch.int8)
        chosen = torch.argsort(own, dim=1, descending=True, stable=True)[:, : int(own.sum(1).max())]
        unit = torch.zeros((*chosen.shape, channels), dtype=torch.float64, device=wanted.device)
        unit.scatter_(2, chosen.unsqueeze(2), 1.0)
        neurons = chosen * math.prod(spatial) + position[:, None]
        yield (
            windows.of(relaxation, sample, position),
            sample[:, None],
            neurons,
            unit.reshape(*chosen.shape, 1, channels, *[1] * len(spatial)),
        )


def _not_flat(interval: Interval, readers: list[Layer]) -> Tensor:
    """Tell which neurons reach what is above them: all but those that every reader takes for 0."""
    kinds = [reader.nonlinearity for reader in readers]
    rectified = all(isinstance(kind, Slopes) and kind.minus == 0.0 for kind in kinds)
    return interval.high > 0 if rectified else torch.ones_like(interval.high, dtype=torch.bool)


def _at_kinks(relaxation: Relaxation, interval: Interval, readers: list[Layer]) -> Tensor:
    """Tell for which neurons a narrower interval helps: those at a kink of what reads them."""
    wanted = torch.zeros_like(interval.low, dtype=torch.bool)
    for reader in readers:
        kind = reader.nonlinearity
        if isinstance(kind, Clamp):
            for end in ends(reader, relaxation.weights.middles):
                if end is not None:
                    wanted |= (interval.low < end.to(interval.low)) & (interval.high > end.to(interval.low))
        elif isinstance(kind, Extremum):
            if len(reader.connections) == 1:
                wanted |= _undecided(reader, interval, kind)
        else:
            wanted |= (interval.low < 0) & (interval.high > 0)
    return wanted


def _undecided(reader: Layer, interval: Interval, kind: Extremum) -> Tensor:
    """Tell which neurons may be the extremum of a window without surely being it."""
    connection = reader.connections[0]
    least, most = (interval.low, interval.high) if kind.largest else (-interval.high, -interval.low)
    tops = torch.vmap(connection.edges.antecedents)(most)
    bottom = torch.vmap(connection.edges.antecedents)(least).amax(1, keepdim=True)
    candidates = (tops >= bottom).to(torch.float64)
    several = candidates.sum(1, keepdim=True) > 1
    _, back = transposed(connection.edges.antecedents, torch.zeros_like(interval.low[0]))
    return back(candidates * several) > 0


def _widest_below(relaxation: Relaxation, layer: Layer) -> int:
    """Return the largest number of neurons of a layer on the way back from this one."""
    widest = 0
    for below in relaxation.network.layers:
        widest = max(widest, math.prod(below.shape))
        if below.name == layer.name:
            break
    return widest
