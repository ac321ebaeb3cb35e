"""How many bits for each layer: the least sum of costs within a budget, exactly (mathematics §9).

Minimise Σ_ℓ cost_ℓ(b_ℓ) where Σ_ℓ size_ℓ(b_ℓ) ≤ budget, over finitely many choices for each layer. For any λ ≥ 0

    Σ_ℓ min_b [cost_ℓ(b) + λ·size_ℓ(b)] − λ·budget

is no larger than the minimum; at the best λ the two are close. A dynamic programme goes from layer to layer over all partial
choices that no other beats in both size and cost, and drops those that cannot lead below the best known choice, by this bound
for the layers that are left. What is left at the end is the minimum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pathlift.errors import InputError, NumericalError

STATES = 4_000_000
"""Partial choices that are followed at once, at most."""


def allocated(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Choose one option for each layer.

    Args:
        costs: For each layer the cost of each option.
        sizes: For each layer the size of each option.
        budget: Of all sizes together.

    Returns:
        For each layer the number of its option; of choices that cost the same, one of the smallest size.

    Raises:
        InputError: Even the smallest options exceed the budget.
        NumericalError: There are too many choices that are nearly as good.
    """
    cost = [np.asarray(layer, dtype=np.float64) for layer in costs]
    size = [np.asarray(layer, dtype=np.int64) for layer in sizes]
    least = sum(int(layer.min()) for layer in size)
    budget = min(budget, sum(int(layer.max()) for layer in size))  # more than everything takes is as good
    if least > budget:
        raise InputError(f"The budget cannot be met: the narrowest grids take {least:,}, and it allows {budget:,}.")
    price = _best_price(cost, size, budget)
    known = _lagrangian(cost, size, price)
    best = sum(layer[choice] for layer, choice in zip(cost, known, strict=True))
    # what the layers that are left add at least, by size and by the Lagrangian
    after_size = [sum(int(layer.min()) for layer in size[first:]) for first in range(len(size) + 1)]
    bounds = [float((c + price * s).min()) for c, s in zip(cost, size, strict=True)]
    after_bound = [sum(bounds[first:]) for first in range(len(bounds) + 1)]
    reached_cost, reached_size = np.zeros(1), np.zeros(1, dtype=np.int64)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for layer in range(len(cost)):
        options = len(cost[layer])
        new_cost = (reached_cost[:, None] + cost[layer]).reshape(-1)
        new_size = (reached_size[:, None] + size[layer]).reshape(-1)
        bound = new_cost + after_bound[layer + 1] - price * (budget - new_size)
        slack = 1e-12 * (abs(best) + price * budget)
        kept = np.flatnonzero((new_size + after_size[layer + 1] <= budget) & (bound <= best + slack))
        order = kept[np.lexsort((new_cost[kept], new_size[kept]))]
        lowest = np.minimum.accumulate(new_cost[order])
        order = order[np.concatenate([[True], new_cost[order][1:] < lowest[:-1]])] if len(order) else order
        if len(order) > STATES:
            raise NumericalError(f"More than {STATES:,} choices of bits are nearly as good. Allow fewer numbers of bits.")
        if not len(order):  # rounding of the bound: the known choice is the best
            return [int(choice) for choice in known]
        trail.append((order // options, order % options))
        reached_cost, reached_size = new_cost[order], new_size[order]
    state, choices = int(reached_cost.argmin()), []
    if reached_cost[state] > best:
        return [int(choice) for choice in known]
    for before, option in reversed(trail):
        choices.append(int(option[state]))
        state = int(before[state])
    return choices[::-1]


def _lagrangian(cost: Sequence[np.ndarray], size: Sequence[np.ndarray], price: float) -> list[int]:
    """Return the choice of least cost + price·size, of equal ones the smallest."""
    return [
        int(min(range(len(c)), key=lambda index, c=c, s=s: (c[index] + price * s[index], s[index])))  # type: ignore[misc]
        for c, s in zip(cost, size, strict=True)
    ]


def _best_price(cost: Sequence[np.ndarray], size: Sequence[np.ndarray], budget: int) -> float:
    """Return the least price, up to rounding, at which the choice of the Lagrangian meets the budget."""

    def met(price: float) -> bool:
        return sum(int(s[index]) for s, index in zip(size, _lagrangian(cost, size, price), strict=True)) <= budget

    if met(0.0):
        return 0.0
    high = 1e-300
    while not met(high):
        high *= 1e3
        if high > 1e300:
            return high
    low = high / 1e3
    for _ in range(200):
        middle = (low * high) ** 0.5 if low > 0 else high / 2
        if met(middle):
            high = middle
        else:
            low = middle
    return high
