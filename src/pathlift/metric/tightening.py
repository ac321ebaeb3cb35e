"""Better g and better dual certificates by gradients (mathematics §4, "Tightening").

Upper: Σ_out (M_0·M_2)^(1/2) is log-convex in log g. Quasi-Newton steps begin with few parameters: per layer c, e and f of
g = f·(max(|θ|, |θ'|) + c·|θ'−θ| + e), then a factor per output and input channel, then one per weight. Lower: for any |s| ≤ 1,
|⟨Φ(θ')−Φ(θ), Φ(s)⟩| ≤ ‖Φ(θ')−Φ(θ)‖₁, and s goes up by gradients. Every iterate is a bound.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pathlift.budget import running
from pathlift.graph.layers import WeightTensor
from pathlift.metric.common_gauge import CommonGauge
from pathlift.metric.comparison_weights import ByLayer
from pathlift.metric.moments import Sides, moment_bounds, summed
from pathlift.metric.outputs import per_output
from pathlift.passes.characters import CharacterProgram, Moments
from pathlift.passes.differences import DualProgram
from pathlift.passes.propagate import propagate
from pathlift.passes.rounding import rounding_factor

Stage = Literal["layers", "channels", "weights"]
STAGES: tuple[tuple[Stage, float], ...] = (("layers", 0.2), ("channels", 0.5), ("weights", 1.0))
"""The stages of the search for g, and the part of all steps at which each ends."""

HISTORY = 6
"""Pairs of vectors that a quasi-Newton step remembers."""

LARGEST = 300.0
"""Logarithms of c, e and f that another search may begin with."""

RATE = 0.15
"""Step size of the dual ascent."""


class _Learned:
    """g with parameters: see the head of this module."""

    def __init__(self, start: ByLayer, pair: CommonGauge) -> None:
        self.pair = pair
        self.start = start
        self.layers: dict[WeightTensor, Tensor] = {}
        self.channels: dict[WeightTensor, list[Tensor]] = {}
        self.weights: dict[WeightTensor, Tensor] = {}
        device = pair.network.device
        for weight, (c, e, f) in start.formulas.items():
            logs = [math.log(max(c, 0.03)), math.log(e), math.log(f)]
            self.layers[weight] = torch.tensor(logs, dtype=torch.float64, device=device)

    def parameters(self, stage: Stage) -> list[Tensor]:
        """Return the parameters of a stage, made when it begins."""
        if stage == "layers":
            return list(self.layers.values())
        for weight in self.layers:
            shape = self.pair.parts(weight)[0].shape
            if stage == "channels" and weight not in self.channels:
                sizes = [[size if dim == along else 1 for dim, size in enumerate(shape)] for along in range(min(len(shape), 2))]
                self.channels[weight] = [
                    torch.zeros(size, dtype=torch.float64, device=self.pair.network.device) for size in sizes
                ]
            if stage == "weights" and weight not in self.weights:
                self.weights[weight] = torch.zeros(shape, dtype=torch.float64, device=self.pair.network.device)
        return (
            [factor for each in self.channels.values() for factor in each]
            if stage == "channels"
            else list(self.weights.values())
        )

    def by_layer(self) -> ByLayer:
        """Return as much of it as is a few numbers for each layer, to begin with another time."""
        formulas = {}
        for weight, logs in self.layers.items():
            c, e, f = logs.detach().clamp(-LARGEST, LARGEST).exp().tolist()
            formulas[weight] = (c, e, f) if not math.isnan(c + e + f) else self.start.formulas[weight]
        return replace(self.start, formulas=formulas)

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """See `pathlift.passes.characters.ComparisonWeights`."""
        shape = self.pair.parts(weight)[0].shape
        factors = [factor.expand(shape) for factor in self.channels.get(weight, [])]
        return (*factors, *([self.weights[weight]] if weight in self.weights else []))

    def __call__(self, weight: WeightTensor, a: Tensor, b: Tensor, *extras: Tensor) -> Tensor:
        """Return g."""
        c, e, f = self.layers[weight].exp()
        most = torch.maximum(a.abs(), b.abs())
        g = f * (most + c * (b - a).abs() + e)
        if extras:
            g = g * sum(extras, torch.zeros((), dtype=g.dtype, device=g.device)).exp()
        return torch.where(most > 0, g, 0.0)


class _OverError(Exception):
    """The time of the call is up in the middle of a step."""


class Tightened:
    """The search for g."""

    def __init__(self, pair: CommonGauge, start: ByLayer) -> None:
        """Begin.

        Args:
            pair: The networks.
            start: The g to start from.
        """
        self.pair = pair
        self.weights = _Learned(start, pair)
        self.evaluations = 0
        self._stage: Stage | None = None
        self._optimizer: torch.optim.LBFGS | None = None

    @staticmethod
    def stage(number: int, steps: int) -> Stage:
        """Return the stage of a step.

        Args:
            number: Of the step, from 1.
            steps: How many there are in all.

        Returns:
            The stage.
        """
        return next(name for name, end in STAGES if number <= math.ceil(end * steps))

    def step(self, stage: Stage) -> Sides:
        """Make one quasi-Newton step; when the time of the call is up, end it after the first g that it looks at.

        Args:
            stage: Which parameters to change.

        Returns:
            The upper bound of the best g that the step looked at.
        """
        if stage != self._stage:
            parameters = [parameter.requires_grad_() for parameter in self.weights.parameters(stage)]
            self._optimizer = torch.optim.LBFGS(parameters, max_iter=1, history_size=HISTORY, line_search_fn="strong_wolfe")
            self._stage = stage
        assert self._optimizer is not None
        tried: list[Sides] = []

        def closure() -> Tensor:
            assert self._optimizer is not None
            if tried and running().over():
                raise _OverError
            self._optimizer.zero_grad()
            with torch.enable_grad():
                loss, sides = self._evaluate()
                if loss.requires_grad:  # not so where M_2 is 0
                    loss.backward()
            tried.append(sides)
            return loss

        with contextlib.suppress(_OverError):  # every g is a bound, also one in the middle of a line search
            self._optimizer.step(closure)
        self.evaluations = len(tried)
        best = torch.stack([sides.upper for sides in tried]).amin(0)
        return Sides(f"g by {stage}", torch.full_like(best, -math.inf), best)

    def _evaluate(self) -> tuple[Tensor, Sides]:
        family = Moments(2, self.weights)
        tracks = propagate(self.pair.network, CharacterProgram(self.pair.network, self.pair, [family]))
        sums, exponent = per_output(self.pair.network, tracks, range(family.count))
        product = sums[0] * (sums[1] - 2 * sums[2] + sums[3]).clamp(min=0.0)  # M_0·M_2
        positive = product[product.detach() > 0]
        # where networks are so near each other that rounding hides M_2, the loss is flat and g stays as it is
        log = torch.log(torch.sqrt(positive).sum()) + exponent * math.log(2.0)
        loss = log if positive.numel() else product.sum()
        with torch.no_grad():
            return loss, moment_bounds(summed(family, sums.detach(), exponent, self.pair))


class Dual:
    """The search for s: tanh of free numbers, started at the signs of θ."""

    def __init__(self, pair: CommonGauge) -> None:
        """Begin.

        Args:
            pair: The networks.
        """
        self.pair = pair
        with torch.no_grad():
            self.free = {}
            for weight in pair.network.weights:
                if weight in pair.changed:
                    a, b = pair.joined(*(part.double() for part in pair.parts(weight)))
                    self.free[weight] = 1.5 * torch.where(a == 0, b, a).sign()
        self.optimizer = torch.optim.Adam([free.requires_grad_() for free in self.free.values()], lr=RATE)

    def step(self) -> Sides:
        """Make one step up.

        Returns:
            The lower bound of the s before the step.
        """
        network = self.pair.network
        self.optimizer.zero_grad()
        with torch.enable_grad():
            program = DualProgram(network, self.pair, {weight: torch.tanh(free) for weight, free in self.free.items()})
            sums, exponent = per_output(network, propagate(network, program), [1, 3])
            total = sums[0].abs().sum()
            balanced = float(total.detach()) == 0.0
            if not balanced:
                (-torch.log(total)).backward()
        if not balanced:
            self.optimizer.step()
        else:  # what s gains in one place it loses in another: leave the balance
            for free in self.free.values():
                free.detach().mul_(
                    torch.linspace(0.5, 1.0, free.numel(), dtype=free.dtype, device=free.device).view(free.shape)
                )
        value, magnitude = sums.detach()
        lower = (value.abs() - rounding_factor(network) * magnitude).clamp(min=0.0)
        return Sides("dual", torch.log2(lower) + exponent, torch.full_like(lower, math.inf))
