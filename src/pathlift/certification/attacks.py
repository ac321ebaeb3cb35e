"""The other side of a certificate: search the set for a network and an input whose class changes.

What this finds is a proof that a sample cannot be certified; what it does not find proves nothing. The share of samples
that are neither certified nor attacked is what remains unknown. What moves are the parameters themselves: a weight that is
used in several places moves in all of them, a batch norm's scale and shift move together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.arguments.common import Randomness, source_of
from pathlift.budget import Clock
from pathlift.certification.certificates import logits_of
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
class Attack(Result, rows=("changed", "margin", "stopped"), axes=("sample",)):
    """What was found, sample by sample.

    Attributes:
        changed: (batch,) bool: a network of the set and an input of the ball with another arg-max were found.
        margin: (batch,) float64: the smallest margin of the original class that was found, below 0 where changed.
        stopped: (batch,) bool: the time was up before the last step.
    """

    changed: Tensor
    margin: Tensor
    stopped: Tensor

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
    generator: Randomness | None = None,
    seconds: float | None = None,
) -> Attack:
    """Search for a changed class by sign-gradient descent on the margin, over parameters and inputs at once, in float64.

    Each sample has a network of its own. The first step goes to a corner of the set, later ones a fifth of the way.

    Args:
        model: A module, or a captured `Network`, that returns one vector of logits per sample.
        x: Inputs, shape (batch, …); a tuple or dictionary of them as the model takes them.
        tolerance: The set of networks, as for `certify`; of one other network that network alone, without the model.
        radius: Largest change of each element of every input.
        steps: Number of steps.
        generator: Start at a random place of the set, drawn from it or from a seed, instead of at the model itself.
        seconds: Time to spend; when it is up, the best that was found so far is returned. None: no limit.

    Returns:
        What was found.

    Raises:
        InputError: ``radius`` or ``steps`` is malformed.
        NumericalError: A weight is NaN or infinite.
    """
    reach, clock = float(radius), Clock(seconds)
    network = captured_on(model, x)
    name, samples = logits_of(network), feed_of(network, x)
    source = source_of(generator)
    state, low, high = _set(network, tolerance)
    blame({weight: tensor for weight, tensor in network.values(state).items() if isinstance(weight.expression, StateTensor)})

    def margin(moving: Mapping[str, Tensor], sample: Mapping[str, Tensor], label: Tensor) -> Tensor:
        values = network.values({**state, **moving})
        out = forward(network, values, {entry: x[None] for entry, x in sample.items()}, torch.float64)[name].reshape(-1)
        mine = torch.arange(len(out), device=out.device) == label
        return torch.where(mine, out, 0.0).sum() - out.masked_fill(mine, -torch.inf).amax()

    value = torch.vmap(margin)
    gradient = torch.vmap(torch.func.grad(margin, argnums=(0, 1)))
    margins, late = [], []
    chunk = max(1, PARAMETERS // max(1, sum(tensor.numel() for tensor in low.values())))
    with torch.no_grad():
        outputs = forward(network, network.values(), samples, torch.float64)
        labels = flat_outputs(network, outputs, len(next(iter(samples.values())))).argmax(1)
        for chosen in torch.arange(len(labels), device=labels.device).split(chunk):
            center, label = {entry: values[chosen] for entry, values in samples.items()}, labels[chosen]
            batch = len(chosen)
            start = {key: state[key].double().expand(batch, *low[key].shape) for key in low}
            point = center
            if source is not None:
                start = {
                    key: low[key] + (high[key] - low[key]) * _uniform((batch, *low[key].shape), source, low[key]) for key in low
                }
                point = {
                    entry: values + reach * (2 * _uniform(tuple(values.shape), source, values) - 1)
                    for entry, values in center.items()
                }
            moving = {key: start[key].clamp(low[key], high[key]) for key in low}
            best, stopped = value(moving, point, label), False
            for step in range(steps):
                stopped = clock.over()
                if stopped:
                    break
                to_weights, to_point = gradient(moving, point, label)
                share = 1.0 if step == 0 else 0.2
                moving = {
                    key: (tensor - share * (high[key] - low[key]) * torch.sign(to_weights[key])).clamp(low[key], high[key])
                    for key, tensor in moving.items()
                }
                moved = {entry: values - share * 2 * reach * torch.sign(to_point[entry]) for entry, values in point.items()}
                point = {entry: moved[entry].clamp(values - reach, values + reach) for entry, values in center.items()}
                best = torch.fmin(best, value(moving, point, label))
            margins.append(best)
            late.append(torch.full_like(label, stopped, dtype=torch.bool))
    smallest = torch.cat(margins)
    return Attack(smallest < 0, smallest, torch.cat(late))


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
