"""Piecewise linear functions of a Gaussian: mean, variance, expected slope, Hermite coefficients; the largest of several.

A kink is y = f(z) for a continuous, piecewise linear f: ReLU, leaky ReLU, PReLU, |x|, a clamp. With z = μ + σg, g standard
normal, and a segment of slope s between the breakpoints a and b (in units of g, after μ is taken off), everything follows from

    P = Φ(b) − Φ(a),   D = E g·1[a<g<b] = φ(a) − φ(b),   S = E g²·1[a<g<b] = P + aφ(a) − bφ(b).

Breakpoints enter as (breakpoint − μ)/σ, which no rescaling changes, and what comes out is a multiple of σ or of values of f.
So under a rescaling by λ > 0 means are multiplied by λ and variances by λ², with λ a power of two bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NODES_SHARED = torch.arange(-12, 13, dtype=torch.float64, device="cpu") * 0.5
"""Nodes for the part that equicorrelated Gaussians share; the trapezoidal rule is exact to rounding for smooth functions."""

NODES_LARGEST = torch.arange(-60, 61, dtype=torch.float64, device="cpu") * 0.15
"""Nodes for the largest of independent standard normal numbers."""

NEGLIGIBLE = 1e-12
"""Share of the weight of all nodes below which one is left out."""


@dataclass(frozen=True, eq=False)
class Kink:
    """A continuous, piecewise linear function, of its own for each neuron.

    Attributes:
        breakpoints: Where slopes change, rising; they broadcast over the neurons.
        slopes: One more than there are breakpoints.
        value: f at the first breakpoint.
        active: Which segment counts as active.
    """

    breakpoints: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]
    value: Tensor
    active: int

    def lines(self) -> list[tuple[Tensor, Tensor]]:
        """Return for each segment a point (z, f(z)) of its line."""
        points = [(self.breakpoints[0], self.value)] * 2
        for slope, last, point in zip(self.slopes[1:], self.breakpoints, self.breakpoints[1:], strict=False):
            points.append((point, points[-1][1] + slope * (point - last)))
        return points

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(z)."""
        out = None
        for (point, value), slope, start in zip(self.lines(), self.slopes, (None, *self.breakpoints), strict=True):
            line = value + slope * (z - point)
            out = line if out is None or start is None else torch.where(z > start, line, out)
        assert out is not None
        return out

    @property
    def rises(self) -> bool:
        """Whether f never falls, so that it commutes with maxima."""
        return all(bool((slope >= 0).all()) for slope in self.slopes)


@dataclass(frozen=True, eq=False)
class Response:
    """What a kink makes of Gaussian pre-activations.

    Attributes:
        mean: E f(z).
        variance: Var f(z).
        gain: E f'(z)²: what becomes of the variance of a small independent error.
        activity: Probability of the active segment.
    """

    mean: Tensor
    variance: Tensor
    gain: Tensor
    activity: Tensor


def _ends(kink: Kink, mean: Tensor, deviation: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the ends (a, b) of each segment in units of g; without deviation all lies on one side."""
    inside = [
        torch.where(deviation > 0, (point - mean) / deviation, torch.where(point < mean, -math.inf, math.inf))
        for point in kink.breakpoints
    ]
    low, high = torch.full_like(inside[0], -math.inf), torch.full_like(inside[0], math.inf)
    edges = [low, *inside, high]
    return list(itertools.pairwise(edges))


def probability(low: Tensor, high: Tensor) -> Tensor:
    """Return Φ(high) − Φ(low) ≥ 0, accurate in both tails."""
    normal = torch.special.ndtr
    return torch.where(low > 0, normal(-low) - normal(-high), normal(high) - normal(low)).clamp(min=0.0)


def density(x: Tensor) -> Tensor:
    """Return φ(x)."""
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _weighted_density(x: Tensor) -> Tensor:
    """Return x·φ(x), which is 0 at ±∞."""
    return torch.where(torch.isinf(x), 0.0, x * density(x))


def respond(kink: Kink, mean: Tensor, variance: Tensor) -> Response:
    """Return the moments of f(z) for Gaussian z.

    Deviations are taken from f(μ), so that nothing cancels where μ is many σ away from 0.

    Args:
        kink: f.
        mean: μ.
        variance: σ².

    Returns:
        The moments; all broadcast over the neurons.
    """
    deviation = variance.sqrt()
    centre = kink(mean)
    first = second = gain = torch.zeros_like(centre)
    activity = first
    segments = zip(_ends(kink, mean, deviation), kink.slopes, kink.lines(), strict=True)
    for number, ((low, high), slope, (point, value)) in enumerate(segments):
        share, tilt = probability(low, high), density(low) - density(high)
        spread = share + _weighted_density(low) - _weighted_density(high)
        offset = value + slope * (mean - point) - centre
        step = slope * deviation
        first = first + offset * share + step * tilt
        second = second + offset**2 * share + 2 * offset * step * tilt + step**2 * spread
        gain = gain + slope**2 * share
        activity = share if number == kink.active else activity
    return Response(centre + first, (second - first**2).clamp(min=0.0), gain, activity)


def hermite(kink: Kink, mean: Tensor, variance: Tensor, terms: int) -> list[Tensor]:
    """Return c_k = E f(μ+σg)·He_k(g)/√k! for k = 1 … terms, so that Cov(f(z_i), f(z_j)) = Σ_k c_k(i)·c_k(j)·ρ_ij^k.

    By parts, c_k = σ/√k!·E f'(z)·He_{k−1}(g), and ∫ He_n φ = −He_{n−1} φ.

    Args:
        kink: f.
        mean: μ.
        variance: σ².
        terms: How many.

    Returns:
        The coefficients.
    """
    deviation = variance.sqrt()
    ends = _ends(kink, mean, deviation)
    slopes = [slope * probability(low, high) for slope, (low, high) in zip(kink.slopes, ends, strict=True)]
    coefficients = [deviation * sum(slopes[1:], slopes[0])]
    for order in range(2, terms + 1):
        terms_of = [
            slope * (_hermite_density(low, order - 2) - _hermite_density(high, order - 2))
            for slope, (low, high) in zip(kink.slopes, ends, strict=True)
        ]
        coefficients.append(deviation * sum(terms_of[1:], terms_of[0]) / math.sqrt(math.factorial(order)))
    return coefficients


def _hermite_density(x: Tensor, order: int) -> Tensor:
    """Return He_order(x)·φ(x), which is 0 at ±∞."""
    finite = torch.where(torch.isinf(x), 0.0, x)
    before, polynomial = torch.zeros_like(finite), torch.ones_like(finite)
    for number in range(order):
        before, polynomial = polynomial, finite * polynomial - number * before
    return torch.where(torch.isinf(x), 0.0, polynomial * density(finite))


def largest_of_equal(
    kink: Kink | None, mean: Tensor, variance: Tensor, correlation: Tensor, count: int, *, largest: bool
) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the largest of f(z_1) … f(z_k) for equicorrelated Gaussians of one mean and variance.

    z_j = μ + σ·(√ρ·g₀ + √(1−ρ)·g_j), so the largest is μ + σ·(√ρ·g₀ + √(1−ρ)·M) with M the largest of k independent
    standard normal numbers, of density k·φ·Φ^{k−1}: quadrature over g₀ and M.

    Args:
        kink: f, which never falls; None for the identity.
        mean: μ.
        variance: σ².
        correlation: ρ, clamped to [0, 1].
        count: k.
        largest: False for the smallest.

    Returns:
        Mean and variance.
    """
    shared, extreme = NODES_SHARED[:, None], NODES_LARGEST[None, :]
    weight = density(shared) * density(extreme) * torch.special.ndtr(extreme) ** (count - 1)
    weight = weight / weight.sum()
    kept = weight > NEGLIGIBLE
    lead = (-1, *[1] * (mean + variance).dim())
    weight, g, m = (part.expand(weight.shape)[kept].reshape(lead).to(mean.device) for part in (weight, shared, extreme))
    rho = correlation.clamp(0.0, 1.0)
    sign = 1.0 if largest else -1.0
    z = mean + variance.sqrt() * sign * (rho.sqrt() * g + (1.0 - rho).sqrt() * m)
    centre = mean if kink is None else kink(mean)
    offset = (z if kink is None else kink(z)) - centre
    first, second = (weight * offset).sum(0), (weight * offset**2).sum(0)
    return centre + first, (second - first**2).clamp(min=0.0)


def larger_of_two(
    mean: tuple[Tensor, Tensor], variance: tuple[Tensor, Tensor], covariance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance of the larger of two Gaussians, and the probability that it is the first.

    Args:
        mean: Both means.
        variance: Both variances.
        covariance: Their covariance.

    Returns:
        Mean, variance, probability.

    References:
        Clark, "The greatest of a finite set of random variables", Operations Research 9 (1961).
    """
    gap = mean[0] - mean[1]
    spread = (variance[0] + variance[1] - 2 * covariance).clamp(min=0.0).sqrt()
    ratio = torch.where(spread > 0, gap / spread, torch.where(gap >= 0, math.inf, -math.inf))
    first = torch.special.ndtr(ratio)
    other = torch.special.ndtr(-ratio)
    bump = torch.where(torch.isinf(ratio), 0.0, spread * density(ratio))
    base = torch.maximum(*mean)  # deviations from here: nothing cancels where means are far from 0
    low, high = mean[0] - base, mean[1] - base
    centre = low * first + high * other + bump
    second = (variance[0] + low**2) * first + (variance[1] + high**2) * other + (low + high) * bump
    return base + centre, (second - centre**2).clamp(min=0.0), first


def largest_of(
    means: Sequence[Tensor], variances: Sequence[Tensor], correlation: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return mean and variance of the largest of several Gaussians, one after the other, and how often each is it.

    Args:
        means: Their means, −inf for one that is not there.
        variances: Their variances.
        correlation: Between any two of them.

    Returns:
        Mean, variance, probabilities.
    """
    mean, variance, deviation = means[0], variances[0], variances[0].sqrt()
    shares = [torch.ones_like(mean)]
    for other, spread in zip(means[1:], variances[1:], strict=True):
        there, here = torch.isfinite(other), torch.isfinite(mean)
        both = (torch.where(here, mean, 0.0), torch.where(there, other, 0.0))
        covariance = correlation * deviation * spread.sqrt()
        joint, joint_variance, first = larger_of_two(both, (variance, spread), covariance)
        first = torch.where(there, torch.where(here, first, 0.0), 1.0)
        mean = torch.where(there & here, joint, torch.where(there, other, mean))
        variance = torch.where(there & here, joint_variance, torch.where(there, spread, variance))
        deviation = first * deviation + (1.0 - first) * spread.sqrt()
        shares = [share * first for share in shares] + [1.0 - first]
    return mean, variance, shares
