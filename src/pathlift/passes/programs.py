"""The programs of the paper: what travels for the path-norm, the difference of two networks, and the ℓ² metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pathlift.edges.weights import Bundle, Entry, Stream, Weights, extents_of
from pathlift.fused import Recipe
from pathlift.graph.layers import Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.propagate import is_wide
from pathlift.passes.scaled import WINDOWS, MantissaWindow, RangeError, Scaled, normalised, too_small
from pathlift.passes.tracks import Entries, Program, Tracks

Values = Mapping[WeightTensor, Tensor]

SMALL_ELEMENTS = 1 << 13
"""Weights up to this size are transformed together."""

LOST = 1000
"""What is smaller than the largest of its bundle by so many bits may vanish in float64: normal numbers end at 2⁻¹⁰²²."""

SPANS = {torch.float16: 40, torch.bfloat16: 262, torch.float32: 278, torch.float64: 2098}
"""Bits from the smallest to the largest number of a type."""


def shift_of(values: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """Return the power of two that brings weights near 1; 0 in float32, where the range is watched instead.

    A weight of 2¹⁰⁰ to the 11th power leaves the range of float64; divided by 2¹⁰¹ it is 1/2, and the exponent 11·101 is
    carried along. Shifts are powers of two, so no bit of a result depends on them.

    Args:
        values: The weights of one weight tensor in each network.
        dtype: Precision of the pass.

    Returns:
        An integer as a float.
    """
    if dtype != torch.float64:
        return 0.0
    size = max((float(v.detach().abs().max()) for v in values if v.numel()), default=0.0)
    if size == 0.0 or not math.isfinite(size):
        return 0.0
    shift = math.frexp(size)[1]
    if 0 < shift <= NEAR:
        return 0.0  # near enough, and numbers at the lower end of the range keep their digits
    return float(min(max(shift, -1000), 1000))  # 2**±1000 and its inverse are floats


NEAR = 64
"""Weights up to 2**NEAR are left as they are."""


def _near_one(weights: Tensor) -> bool:
    """Whether all weights but zeros are within 2**±NEAR."""
    sizes = weights.abs()
    low, high = torch.aminmax(torch.where(sizes > 0, sizes, 1.0))
    return bool((low >= 2.0**-NEAR) & (high <= 2.0**NEAR))


class WeightedProgram(Program):
    """A program whose weights are functions of the same weight tensor in one or two networks."""

    def __init__(
        self, network: Network, values: tuple[Values, ...], dtype: torch.dtype, feed: Mapping[str, Tensor] | None = None
    ) -> None:
        self.network = network
        self.values = values
        self.dtype = dtype
        self.feed = feed
        self.batch = None if feed is None else len(next(iter(feed.values())))
        self._shifts: dict[WeightTensor, float] = {}
        self._small: dict[Callable[..., Tensor], dict[WeightTensor, Weights]] = {}

    def _ready(self, transform: Callable[..., Tensor]) -> dict[WeightTensor, Weights]:
        """Transform all small weights together: a network has hundreds of batch-norm vectors and biases."""
        ready: dict[WeightTensor, Weights] = {}
        for alike, flat in self._joined:
            sizes = [self.values[0][weight].numel() for weight in alike]
            joined = Weights(flat, transform, self.dtype).full()
            for weight, piece, extent in zip(alike, joined.split(sizes), extents_of(joined, sizes), strict=True):
                values = tuple(side[weight] for side in self.values)
                ready[weight] = Weights(values, transform, self.dtype, ready=piece.view(values[0].shape), extent=extent)
        return ready

    @cached_property
    def _joined(self) -> list[tuple[list[WeightTensor], tuple[Tensor, ...]]]:
        """The small weights of the same types, and their values in each network end to end; without those to be shifted."""
        alike: dict[tuple[torch.dtype, ...], list[WeightTensor]] = {}
        for weight in self.network.weights:
            if weight.scalar is None and math.prod(weight.shape) <= SMALL_ELEMENTS:
                alike.setdefault(tuple(values[weight].dtype for values in self.values), []).append(weight)
        joined = [
            (weights, tuple(torch.cat([values[weight].reshape(-1) for weight in weights]) for values in self.values))
            for weights in alike.values()
        ]
        return joined if self.dtype == torch.float32 else [each for each in joined if all(map(_near_one, each[1]))]

    def weights(self, weight: WeightTensor, transform: Callable[..., Tensor], degree: float) -> Weights:
        """Return a homogeneous function of the weight tensor's values.

        Args:
            weight: The weight.
            transform: Function of its value in each network.
            degree: Degree of homogeneity.

        Returns:
            The weights, not yet computed.
        """
        if not torch.is_grad_enabled() and self._joins:
            if transform not in self._small:
                self._small[transform] = self._ready(transform)
            ready = self._small[transform].get(weight)
            if ready is not None:
                return ready
        if weight.scalar is not None:
            number = torch.tensor(weight.scalar, dtype=torch.float64, device=self.network.device)
            values: tuple[Tensor, ...] = (number,) * len(self.values)
        else:
            values = tuple(v[weight] for v in self.values)
        return Weights(values, transform, self.dtype, shift=self._shift_of(weight, values, degree), degree=degree)

    def magnitudes(self, weight: WeightTensor, side: int) -> Weights:
        """Return |θ| or |θ'|, of a pass with two networks.

        Args:
            weight: The weight.
            side: 0 for θ, 1 for θ'.

        Returns:
            The weights; what a map reads of them row by row is read of one network alone.
        """
        known = self.weights(weight, (_first_magnitude, _second_magnitude)[side], 1.0)
        if known.ready is not None or weight.scalar is not None:
            return known
        shift = self._shift_of(weight, known.values, 1.0)
        return Weights(known.values[side : side + 1], torch.abs, self.dtype, shift=shift)

    @property
    def _joins(self) -> bool:
        """Whether small weights may be transformed together, without a shift."""
        return self.dtype == torch.float32 or (self.degree == 1.0 and not is_wide())

    def _shift_of(self, weight: WeightTensor, values: tuple[Tensor, ...], degree: float) -> float:
        """Return what `shift` does, once for each weight, and make sure that no weight is lost."""
        if weight not in self._shifts:
            self._shifts[weight] = self.shift(values)
            self._refuse_lost(values, self._shifts[weight], degree)
        return self._shifts[weight]

    def _refuse_lost(self, values: tuple[Tensor, ...], shift: float, degree: float) -> None:
        """Make sure that no weight vanishes beside the largest of its bundle: it may meet a large activation.

        Divided by 2^shift the largest is near 1, and its q-th power too; a weight of 2^e becomes 2^(q·(e − shift)). Where q
        times the bits that the type spans is less than `LOST`, no look is needed, as for q = 3 in float32: 3·278.

        Raises:
            RangeError: One does.
        """
        span = max(SPANS.get(value.dtype, SPANS[torch.float64]) for value in values)
        if self.dtype != torch.float64 or is_wide() or degree * span < LOST:
            return
        sizes = [value.detach().double().abs() for value in values]
        size = sizes[0] if len(sizes) == 1 else torch.maximum(*sizes)
        least = float(torch.where(size > 0, size, math.inf).amin()) if size.numel() else math.inf
        if math.isfinite(least) and degree * (shift - math.frexp(least)[1]) > LOST:
            raise RangeError

    def shift(self, values: tuple[Tensor, ...]) -> float:
        """Return the power of two by which the weights of a weight tensor are divided: see `shift_of`."""
        narrow = self.degree == 1.0 and all(SPANS.get(value.dtype, LOST) < LOST for value in values)
        return 0.0 if narrow else shift_of(values, self.dtype)

    def fed(self, layer: Layer) -> Scaled | None:
        """Return what an input layer starts with: the non-negative ``feed``, (samples, *shape), or 1 for every neuron."""
        if self.feed is None:
            return Scaled(torch.ones(layer.shape, dtype=self.dtype, device=self.network.device), 0.0)
        feed = self.feed[layer.name]
        if self.dtype != feed.dtype and too_small(feed, self.window.floor):
            raise RangeError
        return normalised(Scaled(feed.to(self.dtype), 0.0), self.window)[0]


class NormProgram(WeightedProgram):
    """One track with weights |θ|^q: at the outputs it is Σ_p |Φ_p|^q, or max_p |Φ_p| for q = ∞ (mathematics §3)."""

    def __init__(
        self,
        network: Network,
        values: Values,
        dtype: torch.dtype,
        *,
        q: float = 1.0,
        from_inputs: bool = True,
        from_biases: bool = True,
        feed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Choose the order and the paths.

        Args:
            network: The graph.
            values: Weight tensor to weights.
            dtype: Precision.
            q: Order, 1 ≤ q ≤ ∞.
            from_inputs: Count the paths that start at an input (I).
            from_biases: Count the paths that start at a bias (H).
            feed: Input layer to what its paths are weighted with, non-negative, (samples, *shape); ones when None.
        """
        super().__init__(network, (values,), dtype, feed)
        self.largest = math.isinf(q)
        self.degree = 1.0 if self.largest else q
        self.from_inputs, self.from_biases = from_inputs, from_biases

        self.transform = torch.abs if self.degree == 1.0 else self._power

    def _power(self, value: Tensor) -> Tensor:
        return value.abs().pow(self.degree)

    def edge(self, weight: WeightTensor) -> Entries:
        """See `Program.edge`."""
        if weight.scalar in (1.0, -1.0):
            return {(0, 0): None}
        return {(0, 0): self.weights(weight, self.transform, self.degree)}

    def start(self, weight: WeightTensor) -> Mapping[int, Weights]:
        """See `Program.start`."""
        return {0: self.weights(weight, self.transform, self.degree)} if self.from_biases else {}

    def inputs(self, layer: Layer) -> Tracks:
        """See `Program.inputs`."""
        return (self.fed(layer),) if self.from_inputs else (None,)


class PartsProgram(NormProgram):
    """The path-norm in two tracks: the paths that start at an input, and those that start at a bias."""

    tracks = 2
    ranges = True

    def edge(self, weight: WeightTensor) -> Entries:
        """See `Program.edge`."""
        magnitudes = None if weight.scalar in {1.0, -1.0} else self.weights(weight, self.transform, self.degree)
        return {(0, 0): magnitudes, (1, 1): magnitudes}

    def start(self, weight: WeightTensor) -> Mapping[int, Weights]:
        """See `Program.start`."""
        return {1: self.weights(weight, self.transform, self.degree)}

    def inputs(self, layer: Layer) -> Tracks:
        """See `Program.inputs`."""
        return (self.fed(layer), None)


ALL: tuple[Entry, ...] = ((0, 0), (1, 1), (1, 0))


class ScoreProgram(NormProgram):
    """The path-norm with room for the way back."""

    ranges = True

    def __init__(
        self,
        network: Network,
        values: Values,
        dtype: torch.dtype,
        *,
        q: float = 1.0,
        starting: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Choose the order and what the input neurons start with.

        Args:
            network: The graph.
            values: Weight tensor to weights.
            dtype: Precision.
            q: Order, 1 ≤ q < ∞.
            starting: Input layer to non-negative values of its shape; ones when None.
        """
        super().__init__(network, values, dtype, q=q)
        self.starting = starting

    def inputs(self, layer: Layer) -> Tracks:
        """See `Program.inputs`."""
        if self.starting is None:
            return super().inputs(layer)
        return (normalised(Scaled(self.starting[layer.name].to(self.dtype), 0.0), self.window)[0],)

    @property
    def window(self) -> MantissaWindow:
        """See `Program.window`."""
        return WINDOWS[self.dtype]


def pivot(first: Tensor, second: Tensor) -> Tensor:
    """Return |m|: the smaller magnitude where the signs agree, 0 where they differ (mathematics §4).

    θ and m have equal signs and |θ| ≥ |m|, so ‖Φ(θ) − Φ(m)‖₁ is ‖Φ(θ)‖₁ − ‖Φ(m)‖₁ (Lemma 4.2), and likewise for θ'. An example:
    θ = (2, −1, 3), θ' = (−2, −4, 1) give |m| = (0, 1, 1).

    Args:
        first: θ.
        second: θ'.

    Returns:
        Of the same shape.
    """
    return torch.minimum(first.abs(), (second * torch.sign(first)).clamp(min=0.0))


def above_pivot(first: Tensor, second: Tensor) -> Tensor:
    """Return |θ| − |m|, never negative."""
    return first.abs() - pivot(first, second)


def _first_magnitude(first: Tensor, _second: Tensor) -> Tensor:
    return first.abs()


def _second_magnitude(_first: Tensor, second: Tensor) -> Tensor:
    return second.abs()


def _above_second(first: Tensor, second: Tensor) -> Tensor:
    return first.abs() - second.abs()


def distance(first: Tensor, second: Tensor) -> Tensor:
    """Return |θ − θ'|."""
    return (first - second).abs()


def _pivoted(first: Tensor, second: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    below, size = pivot(first, second), first.abs_()
    return size, below, torch.sub(size, below, out=room)


def _ordered(first: Tensor, second: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size, below = first.abs_(), second.abs_()
    return size, below, torch.sub(size, below, out=room)


def _telescoping(first: Tensor, second: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    above = torch.sub(first, second, out=room).abs_()
    return first.abs_(), second.abs_(), above


class Through(NamedTuple):
    """The weights of the second track of a `DifferenceProgram`.

    Attributes:
        below: Along it.
        above: From the first track into it.
        all: |θ| and these two at once, of θ, θ' and a tensor of their shape; it overwrites them.
        recipe: Their name.
    """

    below: Callable[[Tensor, Tensor], Tensor]
    above: Callable[[Tensor, Tensor], Tensor]
    all: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    recipe: Recipe


PIVOT = Through(pivot, above_pivot, _pivoted, Recipe.PIVOT)
"""D = Φ(θ) − Φ(m), m the pivot of θ and θ'."""

ORDERED = Through(_second_magnitude, _above_second, _ordered, Recipe.PIVOT)
"""The same where θ' is the pivot: |θ'| ≤ |θ| with equal signs everywhere, which saves finding it."""

TELESCOPING = Through(_second_magnitude, distance, _telescoping, Recipe.TELESCOPING)
"""D(v) = f(D; |θ'|) + f(A; |θ−θ'|): the telescoping bound on Φ(θ) − Φ(θ'), any signs."""


class NormsProgram(WeightedProgram):
    """The path-norms of two networks, θ and θ', beside each other: large weights of both are read in one go."""

    tracks = 2
    ranges = True

    def __init__(self, network: Network, values: Values, other: Values, dtype: torch.dtype) -> None:
        """Take two networks.

        Args:
            network: The graph.
            values: θ.
            other: θ'.
            dtype: Precision.
        """
        super().__init__(network, (values, other), dtype)

    def edge(self, weight: WeightTensor) -> Entries:
        """See `Program.edge`."""
        if weight.scalar in (1.0, -1.0):
            return {(0, 0): None, (1, 1): None}
        return {(0, 0): self.magnitudes(weight, 0), (1, 1): self.magnitudes(weight, 1)}

    def start(self, weight: WeightTensor) -> Mapping[int, Weights]:
        """See `Program.start`."""
        return {0: self.weights(weight, _first_magnitude, 1.0), 1: self.weights(weight, _second_magnitude, 1.0)}

    def inputs(self, layer: Layer) -> Tracks:
        """See `Program.inputs`."""
        return (self.fed(layer), self.fed(layer))


class DifferenceProgram(WeightedProgram):
    """Two tracks, A for θ and D for Φ(θ) − Φ(m), m the pivot of θ and θ' (mathematics §4).

    |θ|·A − |m|·M = |m|·(A − M) + (|θ| − |m|)·A with M the path activations of m, so D(v) = f(D; |m|) + f(A; |θ|−|m|): all terms
    are non-negative, nothing is subtracted but weights. Other recursions of this shape are `ORDERED` and `TELESCOPING`.
    """

    tracks = 2
    ranges = True

    def __init__(
        self,
        network: Network,
        values: Values,
        other: Values,
        dtype: torch.dtype,
        changed: set[WeightTensor],
        *,
        feed: Mapping[str, Tensor] | None = None,
        from_inputs: bool = True,
        from_biases: bool = True,
        through: Through = PIVOT,
    ) -> None:
        """Take two networks.

        Args:
            network: The graph.
            values: θ.
            other: θ'.
            dtype: Precision.
            changed: The weight tensors where the weights from the first track into the second are not 0 everywhere.
            feed: Input layer to |x|, shape (samples, 1, …); ones, without samples, when None.
            from_inputs: Count the paths that start at an input (I).
            from_biases: Count the paths that start at a bias (H).
            through: The weights of the second track.
        """
        super().__init__(network, (values, other), dtype, feed)
        self.changed = changed
        self.through = through
        self.from_inputs, self.from_biases = from_inputs, from_biases

    def edge(self, weight: WeightTensor) -> Entries:
        """See `Program.edge`."""
        if weight.scalar in (1.0, -1.0):
            return {(0, 0): None, (1, 1): None}
        if weight not in self.changed:
            magnitudes = self.magnitudes(weight, 0)
            return {(0, 0): magnitudes, (1, 1): magnitudes}
        return {
            (0, 0): self.weights(weight, _first_magnitude, 1.0),
            (1, 1): self.weights(weight, self.through.below, 1.0),
            (1, 0): self.weights(weight, self.through.above, 1.0),
        }

    def bundle(self, weight: WeightTensor) -> Bundle | None:
        """See `Program.bundle`: large weights are read once for both tracks."""
        if self.batch is not None or weight.scalar is not None or math.prod(weight.shape) <= SMALL_ELEMENTS:
            return None
        if torch.is_grad_enabled() or weight not in self.changed:
            return None
        values = tuple(side[weight] for side in self.values)
        shift = self._shift_of(weight, values, 1.0)
        return Bundle(values, ALL, self._entries, self.dtype, shift=shift, overwrites=True, recipe=self.through.recipe)

    def _entries(self, first: Tensor, second: Tensor, room: Tensor) -> Stream:
        return zip(ALL, self.through.all(first, second, room), strict=True)

    def start(self, weight: WeightTensor) -> Mapping[int, Weights]:
        """See `Program.start`."""
        if not self.from_biases:
            return {}
        magnitudes = self.weights(weight, _first_magnitude, 1.0)
        return {0: magnitudes, 1: self.weights(weight, self.through.above, 1.0)} if weight in self.changed else {0: magnitudes}

    def inputs(self, layer: Layer) -> Tracks:
        """See `Program.inputs`."""
        return (self.fed(layer) if self.from_inputs else None, None)
