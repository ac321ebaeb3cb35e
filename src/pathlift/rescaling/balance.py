"""The balanced representative of an orbit: the rescaling with the smallest Σ|θ_i|^p (mathematics §7).

Over log-scales, Σ_i |θ_i|^p·2^(p·(s(above) − s(below))) is a sum of exponentials of linear functions: convex, and strictly
so where every class lies on a path of non-zero weights. At its minimum as much ℓ^p mass comes into each group as goes out
of it. A few damped coordinate steps, which divide the mass evenly, are followed by Newton's method with conjugate gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlift.budget import running
from pathlift.errors import NumericalError
from pathlift.rescaling.couplings import Coupling, sums
from pathlift.rescaling.linear import Operator, conjugate_gradients
from pathlift.rescaling.relations import Solution

TOLERANCE = 1e-13
"""Largest difference of what comes in and goes out of a group, relative to their sum, at which the search ends."""
MOST_STEPS = 200
POOR = 1e-6
"""An imbalance that is no optimum any more."""

LOG_2 = math.log(2.0)


@dataclass(frozen=True)
class Balance:
    """The outcome of a minimisation.

    Attributes:
        free: log₂ factors by group.
        imbalance: The certificate: the largest |∂F/∂log λ|, relative to the mass that the group has, over all groups. 0 at
            the minimum, where it is the only stationary point of a convex function.
        steps: Newton steps that were made.
        stopped: The time of the call was up before the minimum was reached.
    """

    free: Tensor
    imbalance: float
    steps: int
    stopped: bool


@dataclass(frozen=True, eq=False)
class Logarithmic:
    """The objective n·ln F(y) + linear·y in place of F(y), y the natural logarithms of the factors times p.

    Attributes:
        number: n.
        linear: Shape (groups,).
    """

    number: float
    linear: Tensor


def balanced(
    couplings: Sequence[Coupling], solution: Solution, power: float, logarithmic: Logarithmic | None = None
) -> Balance:
    """Minimise F(g) = Σ mass·2^(p·r), where r = s(above) − s(below) and s = B·g.

    Args:
        couplings: The masses.
        solution: B.
        power: p; may be negative.
        logarithmic: Minimise this function of F instead.

    Returns:
        The minimiser.

    Raises:
        NumericalError: The search ends far from the minimum.
    """
    problem = _Problem(couplings, solution, power, logarithmic)
    free = problem.coordinate_steps(torch.zeros(solution.dimension, dtype=torch.float64, device="cpu"))
    steps = 0
    while steps < MOST_STEPS:
        state = problem.at(free)
        if state.imbalance <= TOLERANCE:
            break
        if running().over():
            return Balance(free, state.imbalance, steps, True)
        steps += 1
        near = state.imbalance < 0.1
        accuracy, most = (min(1e-2, state.imbalance), 500) if near else (1e-2, 30)
        newton = conjugate_gradients(state.hessian, -state.gradient, state.diagonal, accuracy, most)
        for direction in (newton, -state.gradient / state.diagonal):  # the second where rounding errors spoil the first
            length = problem.line_search(free, direction, state)
            if length:
                break
        else:
            break
        free = free + length * direction
    imbalance = problem.at(free).imbalance
    if not imbalance < POOR:
        raise NumericalError(
            f"No optimal rescaling was found: after {steps} Newton steps a group is out of balance by {imbalance:.1e}. "
            "Its factors may differ by more than float64 can hold; bring the network nearer with normalize() first."
        )
    return Balance(free, imbalance, steps, False)


def imbalances(couplings: Sequence[Coupling], solution: Solution, power: float, free: Tensor) -> Tensor:
    """Return by how much each group is out of balance.

    Args:
        couplings: The masses.
        solution: B.
        power: p.
        free: log₂ factors by group.

    Returns:
        |∂F/∂log λ| relative to the mass that the group has, in [0, 1], shape (groups,); 0 for a group without mass.
    """
    return _Problem(couplings, solution, power, None).at(free).relative


@dataclass(frozen=True)
class _Point:
    value: float
    gradient: Tensor
    hessian: Operator
    diagonal: Tensor
    relative: Tensor

    @property
    def imbalance(self) -> float:
        """The largest of all groups."""
        return float(self.relative.max()) if len(self.relative) else 0.0


class _Problem:
    """The function and its derivatives, in natural logarithms of the factors times p."""

    def __init__(
        self,
        couplings: Sequence[Coupling],
        solution: Solution,
        power: float,
        logarithmic: Logarithmic | None,
    ) -> None:
        self.couplings = couplings
        self.solution = solution
        self.power = power
        self.logarithmic = logarithmic

    def value(self, free: Tensor) -> float:
        scales = self.power * self.solution.scales(free)
        up, down = torch.exp2(scales), torch.exp2(-scales)
        coming = torch.zeros_like(scales)
        for part in self.couplings:
            part.up(down, coming)
        return self._objective((coming * up).sum(), free)

    def _objective(self, total: Tensor, free: Tensor) -> float:
        """Return the function from F and the factors."""
        if self.logarithmic is None:
            return float(total)
        return self.logarithmic.number * float(torch.log(total)) + float(self.logarithmic.linear @ free) * self.power * LOG_2

    def at(self, free: Tensor) -> _Point:
        solution = self.solution
        scales = self.power * solution.scales(free)
        coming, going = sums(self.couplings, scales)
        sum_of_powers = coming.sum()
        total = float(sum_of_powers)
        gradient = solution.pulled_back(coming - going)
        mass = solution.pulled_back_magnitude(coming + going)
        up, down = torch.exp2(scales), torch.exp2(-scales)
        weight, linear = 1.0, None
        if self.logarithmic is not None:
            weight, linear = self.logarithmic.number / total, gradient / total
            gradient = weight * gradient + self.logarithmic.linear
            mass = weight * mass + self.logarithmic.linear.abs()

        def hessian(direction: Tensor) -> Tensor:
            x = solution.scales(direction)
            out = (coming + going) * x
            across, back = torch.zeros_like(x), torch.zeros_like(x)
            for part in self.couplings:
                part.up(down * x, across)
                part.down(up * x, back)
            image = weight * solution.pulled_back(out - up * across - down * back)
            if linear is not None and self.logarithmic is not None:
                image = image - self.logarithmic.number * linear * float(linear @ direction)
            return image

        floor = 1e-12 * float(mass.max()) if len(mass) else 1.0
        relative = gradient.abs() / mass.clamp(min=1e-300)
        return _Point(self._objective(sum_of_powers, free), gradient, hessian, mass.clamp(min=floor or 1.0), relative)

    def coordinate_steps(self, free: Tensor) -> Tensor:
        """Move every group half of the way to where its own mass would be balanced; no such step makes F larger.

        For the logarithmic form, too, it is a start that does not depend on the gauge.

        Args:
            free: Where to start.

        Returns:
            Where it leads.
        """
        if not self.solution.plain:
            return free
        for _ in range(12):
            if running().over():
                break
            scales = self.power * self.solution.scales(free)
            coming, going = sums(self.couplings, scales)
            there = (coming > 0) & (going > 0)
            step = torch.where(there, torch.log2(going / coming), 0.0) / (4 * self.power)
            free = free + self.solution.pulled_back(step)
        return free

    def line_search(self, free: Tensor, direction: Tensor, state: _Point) -> float:
        """Halve the Newton step until the function falls as it should.

        Returns:
            Its length in units of log₂ factors; 0 when rounding errors hide any progress.
        """
        slope = float(state.gradient @ direction)
        length = 1.0
        while length > 1e-8:
            trial = length * direction / (self.power * LOG_2)
            value = self.value(free + trial)
            if value <= state.value + 1e-4 * length * slope:
                return length / (self.power * LOG_2)
            if abs(length * slope) <= 1e-13 * abs(state.value):  # too near the minimum for values to tell
                gradient = self.at(free + trial).imbalance
                return length / (self.power * LOG_2) if gradient < state.imbalance else 0.0
            length /= 2
        return 0.0
