"""Certificates: the arg-max provably stays for every network of a set and every input of a ball (mathematics §5).

With c the class that the model gives to x, each difference of two logits R_c − R_j is a linear functional of the last
layer, so the enclosure bounds it from below as a whole: the row difference, not twice the bound on a logit. The class is
certified when all of these lower bounds are positive.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

import pathlift.drawing as drawing
from pathlift.arguments import public
from pathlift.arguments.kinds import batches
from pathlift.budget import Clock
from pathlift.certification.attacks import Search as Attacker
from pathlift.certification.logits import logits_of
from pathlift.errors import InputError
from pathlift.graph.calling import Samples, batches_of
from pathlift.graph.network import Network
from pathlift.passes.box import Box, Tolerance, box, point
from pathlift.passes.enclosure import ELEMENTS, Enclosure
from pathlift.passes.forward import feed_of, flat_outputs, forward
from pathlift.passes.rounding import Arithmetic, Format
from pathlift.reading import captured_on
from pathlift.reading.second import Other, other_state
from pathlift.results import Result, verdict_of_one

STEPS = 12
"""Steps of ascent over the free slopes, for samples that the first bounds do not certify."""

ATTACK = 10
"""Steps of the attack on samples whose set is to be cut."""

UNCUT = 0.3
"""What part of the work on a sample comes before its set is cut, roughly."""

ROUNDS = ((False, 0.2), (True, 0.8))
"""How a sample is tried: with narrower intervals, and what part of the work that is, roughly."""


@dataclass(frozen=True, eq=False, repr=False)
class Certificate(
    Result,
    line=("certified", "covers", "margin", "bound"),
    rows=("certified", "predicted", "margin", "bound", "stopped", "difference", "found"),
    axes=("sample",),
):
    """What is certified, sample by sample.

    Attributes:
        certified: (batch,) bool: the arg-max is the same for every network of the set and every input of the ball; for one
            other network: for both of them.
        predicted: (batch,) int64: the arg-max of the model itself, in exact arithmetic.
        margin: (batch,) float64: the model's largest logit minus its second largest, in exact arithmetic. Logits are what a
            softmax at the end, or the like, reads.
        bound: (batch,) float64: how much that margin can shrink, at most; infinite where nothing is known, because a value
            may leave the range of its type, say. ``certified`` is ``margin > bound``.
        covers: What the class stays under, in words.
        stopped: (batch,) bool: the time was up before this sample was done; more time may give a smaller bound.
        difference: (batch,) float64, for one other network only: how much less than the model's own the other network's logit
            of the predicted class can lie above any other logit, at most, at one and the same input of the ball. Wherever
            the model prefers that class by more, the other network does, too.
        found: (batch,) float64, where ``splits`` were asked for: the smallest margin of the class that is known in the set, by
            an attack on the samples that were not certified without: below 0 the class changes there. The true smallest
            margin lies between ``margin - bound`` and this.
    """

    certified: Tensor
    predicted: Tensor
    margin: Tensor
    bound: Tensor
    covers: str
    stopped: Tensor
    difference: Tensor | None = None
    found: Tensor | None = None

    @property
    def verdict(self) -> list[str]:
        """For each sample ``certified``, ``attacked`` (another class was found in the set) or ``undecided``."""
        attacked = torch.zeros_like(self.certified) if self.found is None else self.found < 0
        pairs = zip(self.certified.tolist(), attacked.tolist(), strict=True)
        return ["certified" if sure else "attacked" if changed else "undecided" for sure, changed in pairs]

    @property
    def share(self) -> float:
        """Share of samples that are certified."""
        return float(self.certified.double().mean())

    @override
    def _draw(self, ax: drawing.Picture) -> None:
        top = 1.1 * float(torch.cat([self.margin, self.bound[self.bound.isfinite()]]).max().clamp(min=1e-9))
        ax.fill_between([0, top], [0, top], [top, top], color=drawing.BLUE, alpha=0.12, label="certified: margin above bound")
        ax.plot([0, top], [0, top], color=drawing.GREY, linewidth=1, linestyle="--")
        for kind, marker, colour in ((self.certified, "o", drawing.BLUE), (~self.certified, "x", drawing.ORANGE)):
            chosen = kind & self.bound.isfinite()
            ax.plot(self.bound[chosen].tolist(), self.margin[chosen].tolist(), marker, color=colour, markersize=6)
        unknown = int((~self.bound.isfinite()).sum())
        ax.set(xlabel="bound: how much the margin can shrink", ylabel="margin of the class", xlim=(0, top), ylim=(0, top))
        left_out = f"; {unknown} without a bound are left out" if unknown else ""
        ax.plot([], [], " ", label=f"{int(self.certified.sum())} of {len(self.certified)} samples certified{left_out}")
        drawing.legend_above(ax, 1)

    def __bool__(self) -> bool:
        """Return whether the sample is certified; of several, or none, TypeError."""
        return verdict_of_one(self, "certified")


@public
@torch.no_grad()
def certify(
    model: nn.Module | Network,
    x: Samples | Iterable[Samples],
    tolerance: Tolerance | Other | None = None,
    radius: float = 0.0,
    *,
    splits: int = 0,
    seconds: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> Certificate:
    """Tell for which inputs the predicted class provably stays, for a whole set of networks and of inputs.

    min over θ' in the set and ‖x' − x‖_∞ ≤ radius of R_θ'(x')_c − R_θ'(x')_j is bounded from below for each class j by
    linear bounds that go backwards through the network (`pathlift.passes.enclosure`). Samples that the intervals of plain
    interval arithmetic do not certify are tried again with intervals that are narrowed by linear bounds of their own, and what
    comes close then, in networks of moderate size, by what the neurons before kinks can do together.

    With ``splits`` what is then still open is first attacked, and where no other class is found the set is cut in two at a
    kink, z ≤ 0 and z ≥ 0, again and again, the part with the lowest bound first (branch and bound). It ends as soon as the
    sample is certified. More splits never lower a bound; each takes a fraction of a second in a small network.

    One other network, a quantised or pruned copy, is certified together with the model: that both give the predicted class
    at every input of the ball, each in its own arithmetic. Two networks whose class changes somewhere in the ball would have
    to change it at the very same inputs, so nothing less is an agreement on all of it. `Certificate.difference` says what
    holds where the model's own class does change.

    The certificate covers the model's own forward pass: the rounding of every layer in its own type, sums in any order,
    underflow, casts, weights that are computed from parameters, and a softmax or the like behind the logits; a sample of
    which any number may leave the range of its type is not certified. It covers TF32 and bfloat16 products where PyTorch's
    switches allow them, but neither Winograd nor FFT convolutions. The computation here runs in float64, and its rounding is
    covered as well. Without a tolerance and a radius it covers nothing else: only that the model's arithmetic gives the
    class that exact arithmetic gives. `Certificate.covers` says it in words.

    Memory stays within a few times that of all activations of one sample in float64, and about half a gigabyte: classes and
    neurons go in blocks.

    Args:
        model: A module, or a captured `Network`, that returns one vector of logits per sample.
        x: Inputs with a batch dimension, shape (batch, …), or a dictionary of them by keyword; or an iterable of such
            batches, a list or a data loader say, whose batches may also be (inputs, labels). A model of several positional
            inputs takes them in a tuple within it: [(a, b)] or [((a, b), labels)]. One batch is held at a time.
        tolerance: The set of networks: `Relative`, `Absolute`, `Rounding`, `Pruned`, or one other network (a module, a
            state-dict or a file of weights); None: the model alone.
        radius: Largest change of each element of every input; 0: the inputs themselves.
        splits: Number of times that the set of a sample may be cut in two; 0: it is not, and nothing is attacked.
        seconds: Time to spend; when it is up, the best bounds so far are returned, and batches of an iterable that were not
            begun are left out. None: no limit.
        progress: Called with the number of samples done since the last call, parts of one included, as the work goes on.

    Returns:
        The certificate.

    Raises:
        UnsupportedModelError: The model lies outside the theory, or does not return one vector of logits.
        InputError: ``x``, ``tolerance`` or ``radius`` is malformed.
        MismatchError: The other network has other parameters.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pathlift import Relative
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> certify(model, torch.tensor([[3.0, 1.0], [2.0, 1.9]]), Relative(0.1)).certified
        tensor([ True, False])
    """
    reach, clock = float(radius), Clock(seconds)
    search: Search | None = None
    results = []
    for batch in batches_of(x):
        if search is None:
            search = Search(captured_on_batch(model, batch), tolerance, reach, clock, progress, splits=splits)
        results.append(search.samples(search.fed(batch)))
        if clock.over():
            break
    if search is None:
        raise InputError("x is empty: give at least one batch of inputs.")
    margin, worst, predicted, stopped, difference, found = (torch.cat(parts) for parts in zip(*results, strict=True))
    bound = margin - worst
    return Certificate(
        margin > bound,
        predicted,
        margin,
        bound,
        search.covers(tolerance),
        stopped,
        None if search.model is None else difference,
        found if splits else None,
    )


def captured_on_batch(model: nn.Module | Network, batch: Samples) -> Network:
    """Capture a model for the inputs of a batch, which may come as (inputs, labels)."""
    if not isinstance(batch, Sequence):
        return captured_on(model, batch)
    try:
        return captured_on(model, batch[0])
    except InputError as error:  # then the model takes all of them, or none
        try:
            return captured_on(model, batches("a batch", batch))
        except InputError:
            raise error from None


def _without_labels(network: Network, batch: Samples) -> Samples:
    """Return the inputs of a batch, which may come as (inputs, labels)."""
    if isinstance(batch, Sequence) and network.graph.form.fits(batch[0]):
        return batch[0]
    checked: Samples = batches("a batch", batch)
    return checked


class Search:
    """The search for the smallest margin in a set, batch by batch."""

    def __init__(
        self,
        network: Network,
        tolerance: Tolerance | Other | None,
        radius: float,
        clock: Clock,
        progress: Callable[[float], None] | None,
        part: float = 1.0,
        splits: int = 0,
    ) -> None:
        self.network = network
        self.logits = logits_of(network)
        self.radius = radius
        self.clock = clock
        self.progress = progress
        self.arithmetic = Arithmetic(network)
        self.weights = box_of(network, tolerance)
        center = self.weights if tolerance is None else point(network, network.state, arithmetic=True)
        self.values = {weight: low / 2 + center.upper[weight] / 2 for weight, low in center.lower.items()}
        self.widest = max(math.prod(layer.shape) for layer in network.layers)
        self.classes = network.layer[self.logits].shape[-1]
        self.model: Search | None = None
        self.splits = splits
        self.part = part * (UNCUT if splits else 1.0)
        self.attacker = Attacker(network, tolerance, radius, ATTACK, clock) if splits else None
        if tolerance is not None and not isinstance(tolerance, Tolerance):  # the model itself is the other half of the work
            self.model = Search(network, None, radius, clock, progress, part / 2, splits)
            self.part = self.model.part

    def covers(self, tolerance: Tolerance | Other | None, reach: str = "") -> str:
        """Say what the certificate covers; ``reach`` are words in place of the radius."""
        reach = reach or (f"{self.radius:g}" if self.radius else "")
        rounding = f"the rounding of the model's own forward pass in {self.arithmetic.words}"
        if self.network.left_off:
            rounding += f", {' and '.join(name.strip('_') for name in self.network.left_off)} included"
        what = str(tolerance) if isinstance(tolerance, Tolerance) else "the model and one other network"
        given = [] if tolerance is None else [what]
        given += [f"changes of each input element up to {reach}"] if reach else []
        return f"{', '.join(given)} and {rounding}" if given else f"{rounding}, and nothing else"

    def at(self, radius: float) -> Search:
        """Return the search in balls of another radius, without cuts."""
        other = copy.copy(self)
        other.radius, other.splits, other.attacker = radius, 0, None
        other.model = None if self.model is None else self.model.at(radius)
        return other

    def fed(self, batch: Samples) -> dict[str, Tensor]:
        """Return a batch, which may come as (inputs, labels), as the network takes it."""
        return feed_of(self.network, _without_labels(self.network, batch))

    def samples(self, feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Bound the margins of some samples.

        Args:
            feed: A batch.

        Returns:
            For each sample its margin, the smallest in the set at least, its class, whether time was short, `difference`, and
            the smallest margin in the set that is known.
        """
        chunk = max(1, ELEMENTS // (min(self.classes, 8) * self.widest))
        pieces = zip(*(value.split(chunk) for value in feed.values()), strict=True)
        parts = [self._pair(dict(zip(feed, piece, strict=True))) for piece in pieces]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _pair(self, feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        margin, above, predicted, stopped = self._samples(feed)
        difference, bounds = torch.zeros_like(margin), [above]
        if self.model is not None:
            _, original, _, late = self.model._samples(feed)
            apart = torch.cat([
                self._apart(self.model, dict(zip(feed, part, strict=True)), chosen)
                for *part, chosen in zip(*(value.split(self._few) for value in (*feed.values(), predicted)), strict=True)
            ])  # fmt: skip
            if not self.network.left_off:  # what is behind the logits may need them farther apart in one network than the other
                above = torch.maximum(above, original + apart)
            difference, bounds = (-apart).amax(1).clamp(min=0.0), [above, original]
            stopped = stopped | late
        found = self._cut(feed, predicted, bounds, stopped, margin) if self.splits else margin
        worst = torch.stack(bounds).amin(0).amin(1)
        return margin, worst, predicted, stopped & (worst <= 0), difference, found

    def _cut(
        self, feed: Mapping[str, Tensor], predicted: Tensor, bounds: Sequence[Tensor], stopped: Tensor, margin: Tensor
    ) -> Tensor:
        """Attack what is not certified, and cut the sets of what is not changed: raises ``bounds`` in place.

        Args:
            feed: The batch.
            predicted: Classes.
            bounds: How far the predicted logit stays above each other, at least, in this network and in the model.
            stopped: Marked where the time is up.
            margin: Of the model.

        Returns:
            The smallest margin in the set that is known.
        """
        searches = [self] if self.model is None else [self, self.model]
        found, count = margin.clone(), len(margin)
        left = (torch.stack(list(bounds)).amin(0).amin(1) <= 0).nonzero()[:, 0]
        self._report((count - len(left)) * (1 / UNCUT - 1) * len(searches))
        for search in searches:
            assert search.attacker is not None
            for part in left.split(search.attacker.chunk) if len(left) else ():
                inputs = {name: value[part] for name, value in feed.items()}
                found[part] = torch.fmin(found[part], search.attacker.run(inputs, predicted[part], None, grid=False).margin)
        for sample in left.tolist():
            one = {name: value[sample : sample + 1] for name, value in feed.items()}
            for search, above in zip(searches, bounds, strict=True):
                if found[sample] < 0 or bool((above[sample] > 0).all()):
                    continue
                if self.clock.over():
                    stopped[sample] = True
                    break
                above[sample] = search._divided(one, predicted[sample], above[sample])
                if not bool((above[sample] > 0).all()):  # then the other network need not be certified
                    stopped[sample] |= self.clock.over()
                    break
            self._report((1 / UNCUT - 1) * len(searches))
        return found

    def _divided(self, feed: Mapping[str, Tensor], predicted: Tensor, above: Tensor) -> Tensor:
        """Bound the differences of logits of one sample that are not positive yet on parts of the set."""
        enclosure = self._enclosure(feed, refine=True)
        if bool(enclosure.lost.any()):
            return above
        identity = torch.eye(self.classes, dtype=torch.float64, device=predicted.device)
        classes = (above <= 0).nonzero()[:, 0]
        rows = {self.logits: (identity[predicted] - identity[classes])[None, :, None]}
        needed = self._needed(enclosure).expand(1, len(classes))
        return above.scatter(0, classes, enclosure.split(0, rows, above[classes][None], needed, self.splits)[0])

    def _needed(self, enclosure: Enclosure) -> Tensor:
        """Return how far two logits must lie apart, (samples, 1)."""
        size = enclosure.intervals[self.logits].size.reshape(enclosure.batch, -1).amax(1)
        return _resolution(self.network.left_off, size, self.arithmetic.of(self.network.layer[self.logits]))[:, None]

    @property
    def _few(self) -> int:
        """Number of samples at a time where a functional per neuron is needed."""
        return max(1, ELEMENTS // (self.classes * self.widest * 8))

    def _enclosure(self, feed: Mapping[str, Tensor], *, refine: bool) -> Enclosure:
        return Enclosure(
            self.network,
            self.weights,
            feed,
            self.radius,
            self.arithmetic,
            refine=refine,
            clock=self.clock,
        )

    def _apart(self, model: Search, feed: Mapping[str, Tensor], predicted: Tensor) -> Tensor:
        """Bound from below how much farther the predicted logit lies above each other one in this network than in the model."""
        identity = torch.eye(self.classes, dtype=torch.float64, device=predicted.device)
        if self.clock.over():
            return torch.where(identity[predicted] > 0, 0.0, -math.inf)
        rows = {self.logits: (identity[predicted].unsqueeze(1) - identity).unsqueeze(2)}
        first, second = (search._enclosure(feed, refine=True) for search in (model, self))
        return torch.where(identity[predicted] > 0, 0.0, second.beyond(first, rows))

    def _samples(self, feed: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return margins, how far the predicted logit stays above each other, classes, and whether time was short."""
        outputs = forward(self.network, self.network.values(), feed, torch.float64)
        nominal = flat_outputs(self.network, outputs, len(next(iter(feed.values()))))  # one row each, also of constants
        top = nominal.topk(2, 1)
        predicted, margin = top.indices[:, 0], (top.values[:, 0] - top.values[:, 1]).nan_to_num(0.0)
        # How far the predicted logit stays above each other, at least; above itself it does by definition.
        above = torch.full_like(nominal, -math.inf).scatter(1, predicted.unsqueeze(1), math.inf)
        stopped = torch.zeros_like(predicted, dtype=torch.bool)
        chosen, rest = torch.arange(len(predicted), device=predicted.device), 1.0
        for refine, share in ROUNDS:
            if len(chosen) == 0 or self.clock.over():
                stopped[chosen] = True
                break
            # Narrower intervals cost a functional per neuron: a few samples at a time.
            for part in chosen.split(self._few if refine else len(chosen)):
                inputs = {name: value[part] for name, value in feed.items()}
                enclosure = self._enclosure(inputs, refine=refine)
                above[part], late = self._rows(enclosure, predicted[part], above[part], share)
                stopped[part] |= late
            left, rest = (above.amin(1) <= 0).nonzero()[:, 0], rest - share
            self._report((len(chosen) - len(left)) * rest)
            chosen = left
        self._report(len(chosen) * rest)
        return margin, above, predicted, stopped & (above.amin(1) <= 0)

    def _rows(self, enclosure: Enclosure, predicted: Tensor, above: Tensor, share: float) -> tuple[Tensor, bool]:
        """Bound the differences of logits from below, a few classes at a time, those that are in most danger first.

        Args:
            enclosure: The intervals of some samples.
            predicted: Their classes.
            above: What is known of the differences, (samples, classes).
            share: What part of the work on a sample this is.

        Returns:
            What is known now, and whether the time was up before all was done.
        """
        batch, winner = len(predicted), predicted.unsqueeze(1)
        interval = enclosure.intervals[self.logits]
        low, high = interval.low.reshape(batch, -1), interval.high.reshape(batch, -1)
        needed = self._needed(enclosure)
        above = torch.maximum(above, low.gather(1, winner) - high - needed)
        identity = torch.eye(self.classes, dtype=torch.float64, device=predicted.device)
        order = above.argsort(1)[:, :-1]  # the predicted class comes last
        if enclosure.refine:  # classes that are known to stay below need no better bound
            order = order[:, : max(1, int((above <= 0).sum(1).max()))]
        steps = STEPS if enclosure.refine else 0
        size = max(1, ELEMENTS // (batch * (self.widest if steps == 0 else 8 * self.widest)))
        late = False
        for columns in order.split(size, 1):
            if self.clock.over():
                late = True
                break
            rows = {self.logits: (identity[predicted].unsqueeze(1) - identity[columns]).unsqueeze(2)}
            bounds = enclosure.tightened(rows, steps=steps) if steps else enclosure.lower(rows)
            bounds = torch.where(bounds.isnan(), -math.inf, bounds) - needed
            above = above.scatter(1, columns, torch.maximum(above.gather(1, columns), bounds))
            self._report(batch * share * columns.shape[1] / order.shape[1])
        if enclosure.refine:
            for sample in ((above.amin(1) <= 0) & ~enclosure.lost).nonzero()[:, 0].tolist():
                differences = identity[predicted[sample]] - identity
                above[sample] = self._together(enclosure, sample, differences, above[sample], needed[sample])
                late = late or self.clock.over()
        above[enclosure.lost] = -math.inf
        return above.scatter(1, winner, math.inf), late

    def _together(self, enclosure: Enclosure, sample: int, differences: Tensor, above: Tensor, needed: Tensor) -> Tensor:
        """Bound the differences of logits of one sample that are not positive yet by what neurons can do together."""
        classes = (above <= 0).nonzero()[:, 0]
        rows = {self.logits: differences[classes][None, :, None]}
        bounds = enclosure.raised(sample, rows, above[classes][None], needed.expand(1, len(classes)))
        return above.scatter(0, classes, bounds[0])

    def _report(self, done: float) -> None:
        if self.progress is not None and done > 0:
            self.progress(done * self.part)


def _resolution(left_off: Sequence[str], size: Tensor, kind: Format) -> Tensor:
    """Return how far two logits must lie apart for what is behind them to tell them apart, rounded as it is.

    Args:
        left_off: The activations behind the logits.
        size: Largest magnitude of a logit, (samples,).
        kind: The type of the outputs.

    Returns:
        (samples,).
    """
    needed = torch.zeros_like(size)
    for name in left_off:
        if name in ("softmax", "_softmax"):  # 1 − e^−δ against the roundings of two exponentials and two quotients
            gap = torch.full_like(size, 32 * kind.unit)
        elif name in ("log_softmax", "_log_softmax"):
            gap = 16 * kind.unit * (2 * size + 64)
        else:  # sigmoid, tanh, log-sigmoid: the smallest slope between −size and size is at least e^−2·size / 4
            gap = 32 * kind.unit * (size + 1) * torch.exp(2 * size)
        needed = needed + gap + kind.least
    return needed


def box_of(network: Network, tolerance: Tolerance | Other | None) -> Box:
    """Return the set of networks that a user means.

    Args:
        network: The graph.
        tolerance: See `certify`.

    Returns:
        The box.
    """
    if tolerance is None:
        return point(network, network.state, arithmetic=True)
    if isinstance(tolerance, Tolerance):
        return box(network, tolerance, arithmetic=True)
    return point(network, other_state(network, tolerance), arithmetic=True)
