"""The largest ball around each input in which the class provably stays, and the share of inputs for which it stays so far.

A certificate for a ball is one for every smaller ball with the same centre, so the largest of some radii is found by bisection,
sample by sample: log₂ of their number certificates for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

import pathlift.drawing as drawing
from pathlift.arguments import public
from pathlift.budget import Clock
from pathlift.certification.certificates import Search, captured_on_batch
from pathlift.errors import InputError
from pathlift.graph.calling import Samples, batches_of
from pathlift.graph.network import Network
from pathlift.passes.box import Tolerance
from pathlift.reading.second import Other
from pathlift.results import Result, verdict_of_one

DECADES, EACH = 5, 8
"""Radii that are tried when none are given: so many powers of ten below the largest input element, so many steps in each."""

WIDE = 50.0
"""A picture whose radii span a larger ratio has a logarithmic axis."""


@dataclass(frozen=True, eq=False, repr=False)
class CertifiedRadius(
    Result,
    line=("radius", "certified", "covers"),
    rows=("radius", "certified", "predicted", "stopped"),
    axes=("sample",),
):
    """How far each input may move with its class provably the same.

    Attributes:
        radius: (batch,) float64: the largest of ``radii`` that is certified, in units of an input element; 0 also where nothing
            is.
        certified: (batch,) bool: the class stays at the input itself, where nothing but the weights and the rounding change.
        predicted: (batch,) int64: the arg-max of the model itself, in exact arithmetic.
        radii: (tried,) float64: what was tried, in increasing order; the first is 0.
        covers: What the class stays under, in words.
        stopped: (batch,) bool: the time was up before this sample was done; more time may give a larger radius.
    """

    radius: Tensor
    certified: Tensor
    predicted: Tensor
    radii: Tensor
    covers: str
    stopped: Tensor

    @property
    def share(self) -> Tensor:
        """(tried,) float64: the share of samples that are certified up to each of ``radii``."""
        within = self.certified & (self.radius >= self.radii[:, None])
        return within.double().mean(1)

    @override
    def _draw(self, ax: drawing.Picture) -> None:
        radii, share = self.radii.tolist(), self.share.tolist()
        end = next((place for place, each in enumerate(share) if each == 0.0), len(share) - 1)
        begin = min(max(place for place, each in enumerate(share) if each == share[0]), max(end - 1, 0))
        logarithmic = begin > 0 and radii[end] > WIDE * radii[begin]
        first = max(1, begin) if logarithmic else 0
        x, y = radii[first:], share[first:]
        # Between two radii at least as many are certified as at the larger one.
        ax.fill_between(x, y, step="pre", color=drawing.BLUE, alpha=0.12, linewidth=0)
        ax.plot(x, y, drawstyle="steps-pre", color=drawing.BLUE, linewidth=1.6, label="class provably the same")
        if logarithmic:
            ax.set_xscale("log")
        ax.set(xlabel="radius: largest change of an input element", ylabel="share of samples", ylim=(0.0, 1.02))
        ax.set_xlim(radii[first], radii[end] if radii[end] > radii[first] else radii[first] + 1.0)
        ax.grid(alpha=0.3)
        ax.plot([], [], " ", label=f"of {len(self.radius)}; at the inputs themselves: {share[0]:.0%}")
        drawing.legend_above(ax, 2)

    def __bool__(self) -> bool:
        """Return whether the class of the sample stays at all; of several samples, or none, TypeError."""
        return verdict_of_one(self, "certified")


@public
@torch.no_grad()
def certified_radius(
    model: nn.Module | Network,
    x: Samples | Iterable[Samples],
    tolerance: Tolerance | Other | None = None,
    radii: Sequence[float] | Tensor | None = None,
    *,
    seconds: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> CertifiedRadius:
    """Tell how far each input may move in ‖·‖_∞ while the predicted class provably stays, for a whole set of networks.

    Each sample gets the largest of some radii for which `certify` proves that its class stays; ``.plot()`` draws the share of
    samples over the radius.

    Args:
        model: As for `certify`.
        x: As for `certify`.
        tolerance: As for `certify`.
        radii: What is tried, beside 0: numbers ≥ 0, in units of an input element. None: eight steps in each of the five powers
            of ten below the largest element of the first batch.
        seconds: Time to spend; when it is up, what has been proved so far is returned, and batches of an iterable that were not
            begun are left out. None: no limit.
        progress: Called with the number of samples done since the last call, parts of one included, as the work goes on.

    Returns:
        The radii of the samples.

    Raises:
        UnsupportedModelError: The model lies outside the theory, or does not return one vector of logits.
        InputError: ``x``, ``tolerance`` or ``radii`` is malformed.
        MismatchError: The other network has other parameters.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> certified_radius(model, torch.tensor([[3.0, 1.0], [2.0, 1.5]]), radii=[0.1, 0.2, 0.5]).radius.tolist()
        [0.5, 0.2]
    """
    clock = Clock(seconds)
    tried = None if radii is None else sorted({0.0, *map(float, radii)})
    search: Search | None = None
    results = []
    for batch in batches_of(x):
        if search is None:
            search = Search(captured_on_batch(model, batch), tolerance, 0.0, clock, None)
        feed = search.fed(batch)
        tried = _scale(feed) if tried is None else tried
        results.append(_bisected(search, feed, tried, progress))
        if clock.over():
            break
    if search is None or tried is None:
        raise InputError("x is empty: give at least one batch of inputs.")
    place, predicted, stopped = (torch.cat(parts) for parts in zip(*results, strict=True))
    steps = torch.tensor(tried, dtype=torch.float64, device=place.device)
    covers = search.covers(tolerance, "the radius of the sample" if len(tried) > 1 else "")
    return CertifiedRadius(steps[place.clamp(min=0)], place >= 0, predicted, steps, covers, stopped)


def _scale(feed: Mapping[str, Tensor]) -> list[float]:
    """Return radii for inputs of this size."""
    largest = max(float(value.abs().max()) for value in feed.values()) or 1.0
    return [0.0, *(largest * 10 ** (-step / EACH) for step in range(DECADES * EACH, -1, -1))]


def _bisected(
    search: Search, feed: Mapping[str, Tensor], radii: Sequence[float], progress: Callable[[float], None] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the largest radius of each sample of a batch.

    Args:
        search: What certifies.
        feed: The batch.
        radii: In increasing order.
        progress: See `certified_radius`.

    Returns:
        Its place among the radii, −1 where there is none; classes; and whether time was short.
    """
    count, device = len(next(iter(feed.values()))), search.network.device
    low, high = torch.full((count,), -1, device=device), torch.full((count,), len(radii) - 1, device=device)
    predicted, stopped = torch.zeros_like(low), torch.zeros_like(low, dtype=torch.bool)
    reported = 0.0
    while bool((open_ := low < high).any()):
        middle = (low + high + 1) // 2
        for place in middle[open_].unique().tolist():
            chosen = (open_ & (middle == place)).nonzero()[:, 0]
            part = {name: value[chosen] for name, value in feed.items()}
            margin, worst, predicted[chosen], stopped_now, *_ = search.at(radii[place]).samples(part)
            certified = margin > margin - worst
            stopped[chosen] |= stopped_now
            low[chosen] = torch.where(certified, place, low[chosen])
            high[chosen] = torch.where(certified, high[chosen], place - 1)
        done = count * (1 - float((high - low).double().mean()) / len(radii))
        if progress is not None:
            progress(done - reported)
        reported = done
    return low, predicted, stopped
