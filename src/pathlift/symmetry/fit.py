"""Which rescaling leads from one network to another: robust regression of log-ratios of weights on the groups (SPEC §4, §7).

If θ' = λ∘θ, then log₂|θ'_i/θ_i| = s(above) − s(below) for every weight. Going up the network, the scale of each class is the
median of what its incoming weights say, which is exact for rescaled and pruned copies; what is left (rounding, noise) goes
to least squares with weights that fall with the residual.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pathlift.symmetry.couplings import Dense, Sparse, coupling
from pathlift.symmetry.linear import conjugate_gradients
from pathlift.symmetry.relations import Solution
from pathlift.symmetry.tying import Scaling

Ratios = Mapping[str, Tensor]
"""log₂|θ'/θ| by parameter, NaN where either is 0."""

ROUNDS = 8
"""Rounds of reweighted least squares."""

EXACT, PRECISE = 1e-5, 1e-14
"""Residuals at which medians are as good as least squares can be: rounding of float32 averages out; and of float64."""


def log_ratios(scalings: Mapping[str, Scaling], state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compare two parameter vectors weight by weight.

    Args:
        scalings: How the parameters scale; only these are compared.
        state: θ.
        other: θ'.

    Returns:
        log₂|θ'/θ| in float64 on the CPU, NaN where a weight is 0 or changes its sign.
    """
    found: dict[str, Tensor] = {}
    for name in scalings:
        first, second = (tensor[name].detach().cpu().double() for tensor in (state, other))
        there = (first * second.sign() * first.sign() != 0) & (first.sign() == second.sign())
        found[name] = torch.where(there, torch.log2((second / first).abs()), torch.nan)
    return found


def fitted(scalings: Mapping[str, Scaling], solution: Solution, ratios: Ratios) -> Tensor:
    """Return the log₂ factors that explain the ratios best.

    Args:
        scalings: How the parameters scale.
        solution: The groups.
        ratios: What is to be explained.

    Returns:
        g, float64, shape (groups,); 0 for a group that no weight tells anything about.
    """
    if not scalings:
        return torch.zeros(solution.dimension, dtype=torch.float64)
    free = projected(solution, _medians(scalings, solution, ratios))
    for _ in range(ROUNDS):
        scales = solution.scales(free)
        residuals = {name: ratios[name] - scaled(own, scales, ratios[name]) for name, own in scalings.items()}
        sizes = torch.cat([residual[~residual.isnan()].abs() for residual in residuals.values()])
        if not len(sizes) or float(sizes.max()) < (EXACT if solution.plain else PRECISE):
            break
        step = _least_squares(scalings, solution, residuals, max(float(sizes.median()), 1e-9))
        free = free + step
        if float(step.abs().max()) < PRECISE:
            break
    return free


def scaled(scaling: Scaling, scales: Tensor, like: Tensor) -> Tensor:
    """Return log₂ of the factor of each element of a parameter.

    Args:
        scaling: How it scales.
        scales: s by class.
        like: A tensor of its shape.

    Returns:
        Tensor of its shape, float64.
    """
    return scaling.join(scales[scaling.above] - scales[scaling.below], like.shape)


def _medians(scalings: Mapping[str, Scaling], solution: Solution, ratios: Ratios) -> Tensor:
    """Go up the network: the scale of a class is the median of ratio + s(below) over the weights that come in."""
    scales = torch.full((solution.count,), torch.nan, dtype=torch.float64)
    scales[0] = 0.0
    for name, scaling in scalings.items():
        laid = scaling.split(ratios[name]) + scales[scaling.below]
        above = scaling.above
        if above.shape[2:] == (1, 1):
            says = laid.flatten(2).nanmedian(2).values.reshape(-1)
            above = above.expand(*laid.shape[:2], 1, 1).reshape(-1)
        else:
            says, above = laid.reshape(-1), above.expand(laid.shape).reshape(-1)
        known = ~says.isnan() & scales[above].isnan()
        _grouped_median(scales, above[known], says[known])
    return scales


def _grouped_median(scales: Tensor, classes: Tensor, values: Tensor) -> None:
    """Set the scale of each class to the median of its values."""
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(classes[order], stable=True)]
    found, counts = torch.unique_consecutive(classes[order], return_counts=True)
    middle = counts.cumsum(0) - counts + torch.div(counts - 1, 2, rounding_mode="floor")
    scales[found] = values[order][middle]


def projected(solution: Solution, scales: Tensor) -> Tensor:
    """Return the g with B·g nearest to the known scales."""
    known = (~scales.isnan()).double()
    target = torch.nan_to_num(scales)
    if solution.plain:
        weight = solution.pulled_back(known)
        return solution.pulled_back(target) / weight.clamp(min=1.0)
    return conjugate_gradients(
        lambda g: solution.pulled_back(known * solution.scales(g)),
        solution.pulled_back(known * target),
        _positive(solution.pulled_back_magnitude(known)),
        1e-12,
    )


def _least_squares(scalings: Mapping[str, Scaling], solution: Solution, residuals: Ratios, spread: float) -> Tensor:
    """Return the step that minimises Σ weight·(residual − r(step))², with weights 1/(1 + (residual/spread)²)."""
    weights: list[Dense | Sparse] = []
    target = torch.zeros(solution.count, dtype=torch.float64)
    ones = torch.ones_like(target)
    degree = torch.zeros_like(target)
    for name, scaling in scalings.items():
        there = ~residuals[name].isnan()
        weight = torch.where(there, 1.0 / (1.0 + (residuals[name] / spread) ** 2), 0.0)
        part = coupling(scaling, weight)
        pull = coupling(scaling, weight * torch.nan_to_num(residuals[name]))
        weights.append(part)
        part.up(ones, degree)
        part.down(ones, degree)
        back = torch.zeros_like(target)
        pull.up(ones, target)
        pull.down(ones, back)
        target -= back

    def operator(g: Tensor) -> Tensor:
        x = solution.scales(g)
        out = degree * x
        across = torch.zeros_like(x)
        for part in weights:
            part.up(x, across)
            part.down(x, across)
        return solution.pulled_back(out - across)

    return conjugate_gradients(operator, solution.pulled_back(target), _positive(solution.pulled_back_magnitude(degree)), 1e-12)


def _positive(diagonal: Tensor) -> Tensor:
    return torch.where(diagonal > 0, diagonal, 1.0)
