"""Bounds on |R_θ(x) − R_θ'(x')|, sample by sample and output by output: one function per bound (SPEC §5).

Each takes a comparison (θ with another network, or with a set) and the inputs, and returns (samples, outputs), rounded up.
Those through path-metrics are made of the difference tracks of SPEC §4, fed with |x| or with ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.bounds.spread import Spread, compact
from pathlift.errors import InputError, MismatchError
from pathlift.network import Leaf, Network
from pathlift.passes.drift import Drift, Side
from pathlift.passes.enclosure import Enclosure
from pathlift.passes.joint import HellingerProgram
from pathlift.passes.programs import TELESCOPING, DifferenceProgram, NormProgram, Values
from pathlift.passes.propagate import Program, TooWideError, in_range, propagate
from pathlift.passes.realise import flat_outputs
from pathlift.passes.rounding import rounding_factor
from pathlift.passes.scaled import Scaled, power
from pathlift.tolerance import Box


@dataclass(frozen=True)
class Ball:
    """A batch of inputs, each with everything around it.

    Attributes:
        feed: Input node to x, float64, (samples, *shape).
        radius: ‖x' − x‖_∞ at most.
    """

    feed: Mapping[str, Tensor]
    radius: float

    @property
    def sizes(self) -> dict[str, Tensor]:
        """|x| by input node."""
        return {name: x.abs() for name, x in self.feed.items()}

    @property
    def largest(self) -> Tensor:
        """‖x‖_∞ of each sample, (samples, 1)."""
        return torch.stack([x.abs().flatten(1).amax(1) for x in self.feed.values()]).amax(0)[:, None]

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(next(iter(self.feed.values())))


def plain(value: Scaled) -> Tensor:
    """Return non-negative values as float64: inf past its range, never 0 for what is positive."""
    half = float(math.floor(value.exponent / 2))
    found = value.tensor.double() * power(half) * power(value.exponent - half)
    return torch.where(value.tensor > 0, found.clamp(min=torch.finfo(torch.float64).tiny), found)


def flat(network: Network, outputs: Sequence[Scaled | None], batch: int | None) -> Tensor:
    """Lay the outputs side by side, one entry per neuron.

    Args:
        network: The graph.
        outputs: One value per output node, None for 0.
        batch: Number of samples; None when the values have no such dimension.

    Returns:
        (samples, outputs) or (outputs,), float64.
    """
    lead = () if batch is None else (batch,)
    pieces = []
    for name, value in zip(network.outputs, outputs, strict=True):
        node = network.node[name]
        if value is None:
            pieces.append(torch.zeros((*lead, math.prod(node.full_shape)), dtype=torch.float64, device=network.device))
        else:
            tensor = plain(value)
            pieces.append((node.spread(tensor) if batch is None else tensor).reshape(*lead, -1))
    return torch.cat(pieces, -1)


def run(network: Network, make: Callable[[torch.dtype], Program], track: int, *values: Values) -> Tensor:
    """Run a program and round one track up, in the model's own precision where its range suffices.

    Args:
        network: The graph.
        make: The program for a precision.
        track: Which track.
        values: The weights it uses, to name one that is not finite.

    Returns:
        (samples, outputs) or (outputs,), float64.
    """

    def attempt(dtype: torch.dtype) -> Tensor:
        program = make(dtype)
        tracks = propagate(network, program)
        found = flat(network, [tracks[name][track] for name in network.outputs], program.batch)
        return found * (1.0 + rounding_factor(network, program.dtype))

    try:
        return in_range(attempt, network.dtype, *values)
    except TooWideError:  # an infinite bound holds
        batch = make(torch.float64).batch
        lead = () if batch is None else (batch,)
        return torch.full((*lead, _outputs(network)), math.inf, dtype=torch.float64, device=network.device)


CHUNK_ELEMENTS = 1 << 23
"""Samples travel together as long as the widest layer has at most so many values: larger tensors cost page faults."""


def in_chunks(network: Network, feed: Mapping[str, Tensor], one: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
    """Compute something sample by sample, a few at a time.

    Args:
        network: The graph.
        feed: Input node to values, (samples, *shape).
        one: The computation for some of the samples, (samples, …).

    Returns:
        The results for all samples.
    """
    step = max(1, CHUNK_ELEMENTS // max(math.prod(node.shape) for node in network.nodes))
    pieces = zip(*(value.split(step) for value in feed.values()), strict=True)
    return torch.cat([one(dict(zip(feed, piece, strict=True))) for piece in pieces])


def _metric(spread: Spread, feed: Mapping[str, Tensor] | None, *, from_inputs: bool = True, from_biases: bool = True) -> Tensor:
    """Σ_p |Φ_p(upper) − Φ_p(lower)|·|x̄(p₀)| over the halves of a comparison: exact or the pivot bound."""
    lead = () if feed is None else (len(next(iter(feed.values()))),)
    whole = torch.zeros((*lead, _outputs(spread.network)), dtype=torch.float64, device=spread.network.device)
    for first, second, changed in spread.halves:

        def make(dtype: torch.dtype, first: Values = first, second: Values = second, changed: set[Leaf] = changed) -> Program:
            return DifferenceProgram(
                spread.network,
                first,
                second,
                dtype,
                changed,
                feed=feed,
                from_inputs=from_inputs,
                from_biases=from_biases,
                through=spread.through,
            )

        whole = whole + run(spread.network, make, 1, first, second)
    return whole


def _around(spread: Spread, radius: float) -> Tensor | float:
    """How far R_θ' moves when its input moves by ``radius``: radius·‖Φ^I(θ')‖₁ per output, over the set."""
    if radius == 0.0:
        return 0.0
    thin = compact(spread)
    most = thin.most
    found = run(thin.network, lambda dtype: NormProgram(thin.network, most, dtype, from_biases=False), 0, most)
    return radius * found * (1.0 + 4 * 2.0**-53)


def pivot(spread: Spread, ball: Ball) -> Tensor:
    """‖x‖_∞·‖Φ^I(θ)−Φ^I(θ')‖₁ + ‖Φ^H(θ)−Φ^H(θ')‖₁ per output, through the pivot: (15) carried over to any pair.

    Linear in ‖x‖_∞, so two passes fed with ones on the compact network serve the whole batch.

    Args:
        spread: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    thin = compact(spread)
    from_inputs = _metric(thin, None, from_biases=False)
    from_biases = _metric(thin, None, from_inputs=False)
    there = (ball.largest > 0) & (from_inputs > 0)  # 0·inf is 0 here, and no product of positive numbers is 0
    scaled = torch.where(there, (ball.largest * from_inputs).clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return (scaled + from_biases) * (1.0 + 4 * 2.0**-53) + _around(spread, ball.radius)


def theorem(spread: Spread, ball: Ball) -> Tensor:
    """Theorem B.1, equation (15), from which Theorem 4.1 (5) follows: needs weights whose signs agree.

    Args:
        spread: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).

    Raises:
        MismatchError: A weight changes its sign.
    """
    flipped = spread.flipped()
    if flipped is not None:
        leaf, where = flipped
        place = tuple(int(index) for index in torch.nonzero(where)[0])
        raise MismatchError(
            f"Theorem 4.1 needs weights whose signs agree; '{leaf.label}' changes its sign in {int(where.sum())} of "
            f"{where.numel()} places, first at {place}. Use kind='pivot' or kind='per_input', which hold for any pair."
        )
    return pivot(spread, ball)


def per_input(spread: Spread, ball: Ball) -> Tensor:
    """Σ_p |ΔΦ_p|·|x̄(p₀)| through the pivot: the difference track fed with |x|; any pair.

    Args:
        spread: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    found = in_chunks(spread.network, ball.sizes, lambda feed: _metric(spread, feed))
    return found + _around(spread, ball.radius)


def telescoping(spread: Spread, ball: Ball) -> Tensor:
    """D = f(D; |θ'|) + f(A; |θ−θ'|) fed with |x|, in both orders for a pair, the smaller entry by entry; any pair.

    Args:
        spread: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    if spread.others is not None:
        orders = [(spread.values, spread.others), (spread.others, spread.values)]
    else:
        orders = [(spread.values, {leaf: _signed_sum(value, spread.gap[0][leaf]) for leaf, value in spread.values.items()})]
    found = []
    for first, second in orders:

        def make(dtype: torch.dtype, first: Values = first, second: Values = second) -> Program:
            return DifferenceProgram(spread.network, first, second, dtype, spread.changed, feed=ball.sizes, through=TELESCOPING)

        found.append(run(spread.network, make, 1, first, second))
    return torch.stack(found).amin(0) + _around(spread, ball.radius)


def _signed_sum(value: Tensor, gap: Tensor) -> Tensor:
    """Θ moved outwards by all it may move: |θ| + Δ, with the sign of θ."""
    return torch.where(value < 0, value.double() - gap, value.double() + gap)


def three_step(spread: Spread, ball: Ball) -> Tensor:
    """Θ → θ·1[θθ'>0] → θ'·1[θθ'>0] → θ': both outer steps exact by Lemma 4.2, the middle one by Hellinger (SPEC §4).

    With S = Σ|Φ||x̄| and S' of the middle pair and H² = Σ(√|Φ| − √|Φ'|)²·|x̄|, the middle step is at most
    √(H²·(2(S+S') − H²)). Fed with |x|; any pair.

    Args:
        spread: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).

    Raises:
        InputError: ``spread`` is a set.
    """
    if spread.others is None:
        raise InputError("kind='three_step' compares two networks, not a set. Use kind='per_input' or kind='activation'.")
    network, feed = spread.network, ball.sizes
    masks = {leaf: torch.sign(value) * torch.sign(spread.others[leaf]) > 0 for leaf, value in spread.values.items()}
    middle = [
        {leaf: torch.where(masks[leaf], value, 0.0) for leaf, value in side.items()} for side in (spread.values, spread.others)
    ]
    outer = [Spread(network, side, own, None) for side, own in zip((spread.values, spread.others), middle, strict=True)]
    whole = sum((_metric(own, feed) for own in outer), torch.zeros((), dtype=torch.float64, device="cpu"))
    changed = Spread(network, middle[0], middle[1], None).changed

    def attempt(_: torch.dtype) -> tuple[Tensor, Tensor]:
        tracks = propagate(network, HellingerProgram(network, middle[0], middle[1], changed, feed=feed))
        squares, errors = ([tracks[name][track] for name in network.outputs] for track in (2, 4))
        signed = [None if value is None else Scaled(value.tensor.clamp(min=0.0), value.exponent) for value in squares]
        slack = rounding_factor(network) * flat(network, errors, ball.batch)
        found = flat(network, signed, ball.batch)
        return (found - slack).clamp(min=0.0), found + slack

    try:
        low, high = in_range(attempt, torch.float64, *middle)
    except TooWideError:
        return torch.full((ball.batch, _outputs(network)), math.inf, dtype=torch.float64, device=network.device)
    norms = [
        run(network, lambda dtype, own=own: NormProgram(network, own, dtype, feed=feed), 0, own)  # type: ignore[misc]
        for own in middle
    ]
    # Increasing in H² up to S+S', which H² cannot exceed.
    sums = norms[0] + norms[1]
    hellinger = torch.sqrt(torch.minimum(high, sums)) * torch.sqrt((2 * sums - low).clamp(min=0.0)) * (1.0 + 8 * 2.0**-53)
    hellinger = torch.minimum(_never_nan(hellinger), _metric(Spread(network, middle[0], middle[1], None), feed))
    return (whole + hellinger) * (1.0 + 4 * 2.0**-53) + _around(spread, ball.radius)


def activation(spread: Spread, ball: Ball) -> Tensor:
    """D = f(D; |θ'|) + f(|u(θ, x)|; |θ−θ'|) with the real activations, both orders joined neuron by neuron; any pair.

    Args:
        spread: The comparison.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    network = spread.network
    if not spread.changed and ball.radius == 0.0:
        return torch.zeros((), dtype=torch.float64, device=network.device).expand(ball.batch, _outputs(network)).clone()
    sides: tuple[Side, ...] = (Side(spread.values, spread.most),)
    if spread.others is not None and ball.radius == 0.0:
        sides = (Side(spread.values, spread.others), Side(spread.others, spread.values))

    def one(feed: Mapping[str, Tensor]) -> Tensor:
        for dtype in dict.fromkeys((network.dtype, torch.float64)):
            found = Drift(network, sides, spread.gap, spread.changed, feed, ball.radius, dtype).bounds()
            bound = flat_outputs(network, found, len(next(iter(feed.values())))).double()
            if bool(torch.isfinite(bound).all()):
                break
        return _never_nan(bound)

    return in_chunks(network, ball.feed, one)


def _never_nan(bound: Tensor) -> Tensor:
    """A bound that left the range of its precision is infinite."""
    return torch.where(bound.isnan(), math.inf, bound)


def _outputs(network: Network) -> int:
    return sum(math.prod(network.node[name].full_shape) for name in network.outputs)


def enclosure(spread: Spread, ball: Ball) -> Tensor:
    """The distance of R_θ(x) to the farther end of its linear enclosure over the set (`pathlift.passes.enclosure`).

    Args:
        spread: The comparison; a pair stands for the box between both networks.
        ball: The inputs.

    Returns:
        (samples, outputs).
    """
    network, weights = spread.network, spread.box
    if weights is None:
        assert spread.others is not None
        ends = [(value.double(), spread.others[leaf].double()) for leaf, value in spread.values.items()]
        same = [bool(torch.equal(*pair)) for pair in ends]
        lower = {leaf: a if eq else torch.minimum(a, b) for leaf, (a, b), eq in zip(spread.values, ends, same, strict=True)}
        upper = {leaf: a if eq else torch.maximum(a, b) for leaf, (a, b), eq in zip(spread.values, ends, same, strict=True)}
        weights = Box(lower, upper)
    alone = {leaf: value.double() for leaf, value in spread.values.items()}
    own = Enclosure(network, Box(alone, alone), ball.feed, 0.0, None, refine=False)
    least, most = (
        flat_outputs(network, {name: getattr(own.intervals[name], end) for name in network.outputs}, ball.batch)
        for end in ("low", "high")
    )
    walls = Enclosure(network, weights, ball.feed, ball.radius, None, refine=False)
    pieces = []
    for name in network.outputs:
        node = network.node[name]
        unit = torch.eye(math.prod(node.shape), dtype=torch.float64, device=network.device).reshape(-1, *node.shape)
        unit = unit.expand(ball.batch, *unit.shape)
        pieces.append((walls.lower({name: unit}, joint=True), -walls.lower({name: -unit}, joint=True)))
    low, high = torch.cat([piece[0] for piece in pieces], 1), torch.cat([piece[1] for piece in pieces], 1)
    found = torch.maximum(most - low, high - least) * (1.0 + 4 * 2.0**-53)
    return _never_nan(torch.where((own.lost | walls.lost)[:, None], math.inf, found))
