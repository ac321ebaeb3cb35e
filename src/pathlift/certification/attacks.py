"""The other side of a certificate: search the set for a network and an input whose class changes.

What this finds is a proof that a sample cannot be certified; what it does not find proves nothing. The share of samples
that are neither certified nor attacked is what remains unknown. What moves are the parameters themselves: a weight that is
used in several places moves in all of them, a batch norm's scale and shift move together.

The sets of `Rounding` and of the report of `quantize` are boxes with a grid in them. A certificate is about the box, and so is
``changed``; a network that is really quantised lies on the grid, and there are far fewer of those. They are searched apart: the
gradient is taken at the nearest point of the grid inside the box, and moves a point of the box that is rounded again.

An example: a weight of 0.26 whose grid has the step 0.1 and may move by one step, [0.16, 0.36]. On the grid it is 0.2 or 0.3. A
margin w − 0.18 falls below 0 in the box and stays at 0.02 or more on the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.arguments.common import Randomness, source_of
from pathlift.budget import Clock
from pathlift.certification.logits import logits_of
from pathlift.graph.calling import Samples
from pathlift.graph.expressions import StateTensor
from pathlift.graph.network import Network
from pathlift.passes.box import Tolerance, checked_intervals
from pathlift.passes.forward import feed_of, flat_outputs, forward
from pathlift.passes.propagate import blame
from pathlift.reading import captured_on
from pathlift.reading.second import Other, other_state
from pathlift.results import Result, verdict_of_one

PARAMETERS = 1 << 24
"""Parameters of the networks, one for each sample, that are searched at a time."""


@dataclass(frozen=True, eq=False, repr=False)
class Attack(Result, rows=("changed", "margin", "stopped", "on_grid"), axes=("sample",)):
    """What was found, sample by sample.

    Attributes:
        changed: (batch,) bool: a network of the set and an input of the ball with another arg-max were found.
        margin: (batch,) float64: the smallest margin of the original class that was found, below 0 where changed.
        stopped: (batch,) bool: the time was up before the last step.
        on_grid: (batch,) bool, for a `Rounding` or the tolerance of a `QuantizeReport`: such a network was found among those
            whose every parameter lies on the grid. A method for rounded networks alone, and not for all between them, can
            certify the rest at most. None for other sets, and where no network of the set lies on the grid.
    """

    changed: Tensor
    margin: Tensor
    stopped: Tensor
    on_grid: Tensor | None = None

    def __bool__(self) -> bool:
        """Return whether another class was found for the sample; of several, or none, TypeError."""
        return verdict_of_one(self, "changed")


@public
def attack(
    model: nn.Module | Network,
    x: Samples,
    tolerance: Tolerance | Other | None = None,
    radius: float = 0.0,
    *,
    steps: int = 10,
    restarts: int = 0,
    generator: Randomness | None = None,
    seconds: float | None = None,
) -> Attack:
    """Search for a changed class by sign-gradient descent on the margin, over parameters and inputs at once, in float64.

    Each sample has a network of its own. The first step goes to a corner of the set, later ones a fifth of the way. A
    `Rounding` and the tolerance of a `QuantizeReport` are searched twice: all of the set, and the networks on the grid.

    Args:
        model: A module, or a captured `Network`, that returns one vector of logits per sample.
        x: Inputs, shape (batch, …); a tuple or dictionary of them as the model takes them.
        tolerance: The set of networks, as for `certify`; of one other network that network alone, without the model.
        radius: Largest change of each element of every input.
        steps: Number of steps.
        restarts: Number of further searches, each from a random place of the set, for samples whose class did not change yet.
        generator: Start at a random place of the set, drawn from it or from a seed, instead of at the model itself; without
            one the places of ``restarts`` are those of seed 0.
        seconds: Time to spend; when it is up, the best that was found so far is returned. None: no limit.

    Returns:
        What was found.

    Raises:
        InputError: ``radius``, ``steps`` or ``restarts`` is malformed.
        NumericalError: A weight is NaN or infinite.
    """
    network = captured_on(model, x)
    search = Search(network, tolerance, float(radius), steps, Clock(seconds))
    samples, first = feed_of(network, x), source_of(generator)
    later = source_of(0) if first is None else first
    margins, grids, late = [], [], []
    with torch.no_grad():
        outputs = forward(network, network.values(), samples, torch.float64)
        labels = flat_outputs(network, outputs, len(next(iter(samples.values())))).argmax(1)
        for chosen in torch.arange(len(labels), device=labels.device).split(search.chunk):
            stopped = torch.zeros(len(chosen), dtype=torch.bool, device=labels.device)
            smallest = []
            for grid in (False, True) if search.grid is not None else (False,):
                best = torch.full((len(chosen),), torch.inf, dtype=torch.float64, device=labels.device)
                for turn in range(1 + restarts):
                    left = (~(best < 0)).nonzero()[:, 0]
                    if len(left) == 0:
                        break
                    part = {entry: values[chosen[left]] for entry, values in samples.items()}
                    found = search.run(part, labels[chosen[left]], later if turn else first, grid=grid)
                    best[left] = torch.fmin(best[left], found.margin)
                    stopped[left] |= found.stopped
                smallest.append(best)
            margins.append(torch.stack(smallest).amin(0))
            grids.append(smallest[-1])
            late.append(stopped)
    margin, on_grid = torch.cat(margins), torch.cat(grids)
    return Attack(margin < 0, margin, torch.cat(late), None if search.grid is None else on_grid < 0)


@dataclass(frozen=True)
class Found:
    """The best that one search found, sample by sample.

    Attributes:
        margin: (samples,), float64.
        parameters: The parameters that move, (samples, *shape).
        inputs: (samples, *shape), by input layer.
        stopped: Whether the time was up before the last step.
    """

    margin: Tensor
    parameters: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    stopped: bool


class Search:
    """Descent on the margin inside a set.

    Attributes:
        grid: The grid of each parameter that moves; None where the set has none, or no network of it lies on the grid.
        chunk: Number of samples at a time.
    """

    def __init__(self, network: Network, tolerance: Tolerance | Other | None, radius: float, steps: int, clock: Clock) -> None:
        """Prepare the set.

        Args:
            network: The graph.
            tolerance: See `attack`.
            radius: Largest change of an input.
            steps: Number of steps.
            clock: Looked at before each.
        """
        self.network, self.radius, self.steps, self.clock = network, radius, steps, clock
        self.logits = logits_of(network)
        self.state, self.low, self.high = _set(network, tolerance)
        blame({
            weight: tensor
            for weight, tensor in network.values(self.state).items()
            if isinstance(weight.expression, StateTensor)
        })
        grid = tolerance.grid(network) if isinstance(tolerance, Tolerance) else None
        self.grid = None if grid is None else {name: grid[name] for name in self.low}
        self.chunk = max(1, PARAMETERS // max(1, sum(tensor.numel() for tensor in self.low.values())))
        self._value = torch.vmap(self._margin)
        self._gradient = torch.vmap(torch.func.grad(self._margin, argnums=(0, 1)))

    def _margin(self, moving: Mapping[str, Tensor], sample: Mapping[str, Tensor], label: Tensor) -> Tensor:
        values = self.network.values({**self.state, **moving})
        out = forward(self.network, values, {entry: x[None] for entry, x in sample.items()}, torch.float64)
        logits = out[self.logits].reshape(-1)
        mine = torch.arange(len(logits), device=logits.device) == label
        return torch.where(mine, logits, 0.0).sum() - logits.masked_fill(mine, -torch.inf).amax()

    def inside(self, name: str, value: Tensor, *, grid: bool) -> Tensor:
        """Return the nearest value in the set, on its grid if that is asked for."""
        value = value.clamp(self.low[name], self.high[name])
        return self.grid[name].nearest(value) if grid and self.grid is not None else value

    def run(self, center: Mapping[str, Tensor], label: Tensor, source: torch.Generator | None, *, grid: bool) -> Found:
        """Search once.

        Args:
            center: The inputs, by input layer.
            label: The class of each.
            source: Where random starts come from; None to start at the model itself.
            grid: Whether parameters have to lie on the grid.

        Returns:
            The best that was found.
        """
        batch, low, high = len(label), self.low, self.high
        start = {key: self.state[key].double().expand(batch, *low[key].shape) for key in low}
        point = dict(center)
        if source is not None:
            start = {
                key: low[key] + (high[key] - low[key]) * _uniform((batch, *low[key].shape), source, low[key]) for key in low
            }
            point = {
                entry: values + self.radius * (2 * _uniform(tuple(values.shape), source, values) - 1)
                for entry, values in center.items()
            }
        latent = {key: start[key].clamp(low[key], high[key]) for key in low}
        moving = {key: self.inside(key, value, grid=grid) for key, value in latent.items()}
        found = Found(self._value(moving, point, label), moving, point, stopped=False)
        for step in range(self.steps):
            if self.clock.over():
                return replace(found, stopped=True)
            to_weights, to_point = self._gradient(moving, point, label)
            share = 1.0 if step == 0 else 0.2
            latent = {
                key: (value - share * (high[key] - low[key]) * torch.sign(to_weights[key])).clamp(low[key], high[key])
                for key, value in latent.items()
            }
            moving = {key: self.inside(key, value, grid=grid) for key, value in latent.items()}
            moved = {entry: values - share * 2 * self.radius * torch.sign(to_point[entry]) for entry, values in point.items()}
            point = {entry: moved[entry].clamp(values - self.radius, values + self.radius) for entry, values in center.items()}
            found = _better(found, Found(self._value(moving, point, label), moving, point, stopped=False))
        return found


def _better(one: Found, two: Found) -> Found:
    """Take the better of two for each sample; a margin that is NaN is no find."""
    taken = (two.margin < one.margin) | one.margin.isnan()

    def chosen(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: torch.where(taken.reshape(-1, *[1] * (value.dim() - 1)), second[key], value) for key, value in first.items()
        }

    inputs, parameters = chosen(one.inputs, two.inputs), chosen(one.parameters, two.parameters)
    return Found(torch.where(taken, two.margin, one.margin), parameters, inputs, stopped=False)


def _set(
    network: Network, tolerance: Tolerance | Other | None
) -> tuple[Mapping[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return where a search starts, and the smallest and largest values of the parameters that move."""
    if tolerance is None:
        return network.state, {}, {}
    if not isinstance(tolerance, Tolerance):
        return other_state(network, tolerance), {}, {}
    ends = {
        name: pair
        for name, pair in checked_intervals(network, tolerance).items()
        if not all(torch.equal(end, network.state[name].double()) for end in pair)
    }
    low, high = ({name: pair[end] for name, pair in ends.items()} for end in (0, 1))
    return network.state, low, high


def _uniform(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw numbers in [0, 1) on the generator's device and send them where they are needed."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).to(like.device)
