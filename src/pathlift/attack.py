"""The other side of a certificate: search the set for a network and an input whose class changes.

What this finds is a proof that a sample cannot be certified; what it does not find proves nothing. The share of samples
that are neither certified nor attacked is what remains unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathlift.bounds import checked_radius
from pathlift.certify import box_of, logits_of
from pathlift.errors import InputError
from pathlift.network import Network
from pathlift.passes.propagate import blame
from pathlift.passes.realise import feed_of, realise
from pathlift.reading import captured_on
from pathlift.reading.second import Other
from pathlift.tolerance import Tolerance


@dataclass(frozen=True)
class Attack:
    """What was found, sample by sample.

    Attributes:
        changed: (batch,) bool: a network of the set and an input of the ball with another arg-max were found.
        margin: (batch,) float64: the smallest margin of the original class that was found, at most 0 where changed.
    """

    changed: Tensor
    margin: Tensor


def attack(
    model: nn.Module | Network,
    x: Tensor,
    tolerance: Tolerance | Other | None = None,
    radius: float = 0.0,
    *,
    steps: int = 10,
    generator: torch.Generator | None = None,
) -> Attack:
    """Search for a changed class by sign-gradient descent on the margin, over weights and inputs at once, in float64.

    Each sample has a network of its own. The first step goes to a corner of the set, later ones a fifth of the way.

    Args:
        model: A module, or a captured `Network`, that returns one vector of logits per sample.
        x: Inputs, shape (batch, …).
        tolerance: The set of networks, as for `certify`.
        radius: Largest change of each element of the input.
        steps: Number of steps.
        generator: Start at a random place of the set instead of at the model itself.

    Returns:
        What was found.

    Raises:
        InputError: ``radius`` or ``steps`` is malformed.
        NumericalError: A weight is NaN or infinite.
    """
    reach = checked_radius(radius)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(f"steps must be a whole number of at least 0, found {steps!r}.")
    network = captured_on(model, x)
    name, samples = logits_of(network), feed_of(network, (x,))
    (source,) = samples
    weights = box_of(network, tolerance)
    blame(weights.lower)
    blame(weights.upper)
    fixed = {leaf: value for leaf, value in weights.lower.items() if weights.upper[leaf] is value}
    moving = [leaf for leaf in weights.lower if leaf not in fixed]
    low, high = [weights.lower[leaf] for leaf in moving], [weights.upper[leaf] for leaf in moving]
    own = network.values()

    def margin(values: list[Tensor], sample: Tensor, label: Tensor) -> Tensor:
        full = fixed | dict(zip(moving, values, strict=True))
        out = realise(network, full, {source: sample[None]}, torch.float64)[name].reshape(-1)
        mine = torch.arange(len(out), device=out.device) == label
        return torch.where(mine, out, 0.0).sum() - out.masked_fill(mine, -torch.inf).amax()

    value = torch.vmap(margin)
    gradient = torch.vmap(torch.func.grad(margin, argnums=(0, 1)))
    found = []
    chunk = max(1, (1 << 24) // max(1, sum(tensor.numel() for tensor in low)))
    with torch.no_grad():
        labels = realise(network, own, samples, torch.float64)[name][:, 0].argmax(1)
        for center, label in zip(samples[source].split(chunk), labels.split(chunk), strict=True):
            batch = len(center)
            start = [own[leaf].double().expand(batch, *own[leaf].shape) for leaf in moving]
            place = center
            if generator is not None:
                start = [a + (b - a) * _uniform((batch, *a.shape), generator, a) for a, b in zip(low, high, strict=True)]
                place = center + reach * (2 * _uniform(tuple(center.shape), generator, center) - 1)
            values = [torch.minimum(torch.maximum(v, a), b) for v, a, b in zip(start, low, high, strict=True)]
            best = value(values, place, label)
            for step in range(steps):
                to_values, to_place = gradient(values, place, label)
                share = 1.0 if step == 0 else 0.2
                values = [
                    torch.minimum(torch.maximum(v - share * (b - a) * torch.sign(g), a), b)
                    for v, g, a, b in zip(values, to_values, low, high, strict=True)
                ]
                moved = place - share * 2 * reach * torch.sign(to_place)
                place = torch.minimum(torch.maximum(moved, center - reach), center + reach)
                best = torch.minimum(best, value(values, place, label))
            found.append(best)
    smallest = torch.cat(found)
    return Attack(smallest <= 0, smallest)


def _uniform(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw numbers in [0, 1) on the generator's device and send them where they are needed."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).to(like.device)
