"""Which rescaling leads from one network to another: robust regression of log-ratios of weights on the groups (§4, §7).

If θ' = λ∘θ, then log₂|θ'_i/θ_i| = s(above) − s(below) for every weight. Going up the network, the scale of each class is the
median of what its incoming weights say, which is exact for rescaled and pruned copies; what is left (rounding, noise) goes
to least squares with weights that fall with the residual.

The medians go from tensor to tensor, and the first one that tells of a class decides: of two weights that lead to a sum,
the one further down. That order is `GaugeFit.upwards`, the same for a graph whatever the state-dicts and mappings are.

Worked example: x → W = (2, 3) → two hidden neurons → V = (5, 7) → y, and W' = (4, 3), V' = (2.5, 0). W says s_1 = log₂(4/2)
= 1 and s_2 = 0; V, whose second weight was pruned, says s(y) = 0 = log₂(2.5/5) + s_1. All agree: λ = (2, 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pathlift.budget import running
from pathlift.rescaling.couplings import Coupling, coupling
from pathlift.rescaling.linear import conjugate_gradients
from pathlift.rescaling.relations import Solution
from pathlift.rescaling.scaling import Scaling

ROUNDS = 3
"""Rounds of reweighted least squares; as many as they take for the last digits of float64 where B is not plain."""

EXACT, PRECISE = 1e-5, 1e-14
"""Residuals at which medians are as good as least squares can be: rounding of float32 averages out; and of float64."""

ENOUGH = 128
"""Weights of a channel that are asked for their median."""


@dataclass(frozen=True, eq=False)
class GaugeFit:
    """Two parameter vectors, compared weight by weight.

    Attributes:
        scalings: How the parameters scale; only these are compared.
        upwards: Their names, going up the network.
        solution: The groups.
        state: θ.
        other: θ'.
    """

    scalings: Mapping[str, Scaling]
    upwards: Sequence[str]
    solution: Solution
    state: Mapping[str, Tensor]
    other: Mapping[str, Tensor]

    def ratios(self, name: str) -> Tensor:
        """Return log₂|θ'/θ| of a parameter, float64 on the CPU; NaN where a weight is 0 or changes its sign."""
        return _log_ratio(self.state[name].detach().cpu(), self.other[name].detach().cpu())

    @cached_property
    def rough(self) -> Tensor:
        """A first guess at `factors`, by medians."""
        return projected(self.solution, self._medians())

    @cached_property
    def disagreement(self) -> tuple[float, float]:
        """Mean |log₂|θ'/θ||, and what of it `rough` leaves unexplained; of some of the weights."""
        scales = self.solution.scales(self.rough)
        before, after, count = 0.0, 0.0, 0
        for name in self.upwards:
            scaling, (step, ratio) = self.scalings[name], self._some_ratios(name)
            above, below = (part[:, :, ::step] if part.shape[2] > 1 else part for part in (scaling.above, scaling.below))
            expected = scales[above] - scales[below]
            before += float(ratio.abs().nansum())
            after += float((ratio - expected).abs().nansum())
            count += ratio.numel()
        return before / max(count, 1), after / max(count, 1)

    def _some_ratios(self, name: str) -> tuple[int, Tensor]:
        """Return every how many-th neuron below is asked, and log₂|θ'/θ| of its weights, laid out; kept, for they are few."""
        if name not in self._sampled:
            mine, theirs = (self.scalings[name].split(state[name].detach().cpu()) for state in (self.state, self.other))
            step = max(1, mine.shape[2] * mine.shape[3] // ENOUGH)
            self._sampled[name] = step, _log_ratio(mine[:, :, ::step], theirs[:, :, ::step])
        return self._sampled[name]

    @cached_property
    def _sampled(self) -> dict[str, tuple[int, Tensor]]:
        return {}

    @cached_property
    def factors(self) -> Tensor:
        """The log₂ factors g that explain the ratios best, shape (groups,); 0 for a group that no weight tells about."""
        return self._search[0]

    @property
    def stopped(self) -> bool:
        """Whether the time of the call was up before `factors` was the best there is."""
        return self._search[1]

    @cached_property
    def _search(self) -> tuple[Tensor, bool]:
        solution = self.solution
        if not self.scalings:
            return torch.zeros(solution.dimension, dtype=torch.float64, device="cpu"), False
        free = self.rough
        ratios: dict[str, Tensor] = {}
        for _ in range(ROUNDS if solution.plain else 8):
            if running().over():
                return free, True
            scales = solution.scales(free)
            if not (ratios and solution.plain):
                if self._largest_deviation(scales) < (EXACT if solution.plain else PRECISE):
                    break
                ratios = {name: self.ratios(name) for name in self.upwards}
            step = self._least_squares({
                name: ratio - self.scalings[name].logs(scales, ratio.shape) for name, ratio in ratios.items()
            })
            free = free + step
            if float(step.abs().max()) < PRECISE:
                break
        return free, False

    def deviations(self, name: str, scales: Tensor) -> Tensor:
        """Return |θ'/(λ∘θ) − 1| as the parameter is laid out, float64; 0 where a weight is 0 or changes its sign."""
        scaling = self.scalings[name]
        mine, theirs = (scaling.split(state[name].detach()) for state in (self.state, self.other))
        expected = mine.double() * torch.exp2(scales[scaling.above] - scales[scaling.below]).to(mine.device)
        theirs = theirs.to(expected)
        same = theirs * expected > 0
        return (theirs - expected).abs_().div_(expected.abs_()).mul_(same).nan_to_num_(0.0, 0.0, 0.0)

    def _largest_deviation(self, scales: Tensor) -> float:
        return max(float(self.deviations(name, scales).amax()) for name in self.upwards)

    def _medians(self) -> Tensor:
        """Go up the network: the scale of a class is the median of ratio + s(below) over the weights that come in."""
        scales = torch.full((self.solution.count,), torch.nan, dtype=torch.float64, device="cpu")
        scales[0] = 0.0
        for name in self.upwards:
            scaling = self.scalings[name]
            mine, theirs = (scaling.split(state[name].detach().cpu()) for state in (self.state, self.other))
            above, below = scaling.above, scales[scaling.below]
            if above.shape[2:] == (1, 1):
                says = self._voted(name, mine, theirs, below)
                above = above.expand(*mine.shape[:2], 1, 1).reshape(-1)
            else:
                says = (_log_ratio(mine, theirs) + below).reshape(-1)
                above = above.expand(mine.shape).reshape(-1)
            known = ~says.isnan() & scales[above].isnan()
            _grouped_median(scales, above[known], says[known])
        for name in reversed(self.upwards):  # a channel whose incoming weights were all pruned
            self._told_from_above(name, scales)
        return scales

    def _told_from_above(self, name: str, scales: Tensor) -> None:
        """Give classes that are not known yet the median of s(above) − ratio over the weights that go out."""
        scaling = self.scalings[name]
        unknown = scales[scaling.below].isnan()
        if not bool(unknown.any()):
            return
        ins = (
            unknown.any(dim=(0, 1, 3)).nonzero()[:, 0]
            if unknown.shape[2] > 1
            else torch.arange(scaling.layout.shape[2], device="cpu")
        )
        mine, theirs = (scaling.split(state[name].detach().cpu())[:, :, ins] for state in (self.state, self.other))
        above, below = (
            part.expand(*part.shape[:2], scaling.layout.shape[2], part.shape[3])[:, :, ins].expand(mine.shape)
            for part in (scaling.above, scaling.below)
        )
        says = scales[above] - _log_ratio(mine, theirs)
        known = ~says.isnan() & scales[below].isnan()
        _grouped_median(scales, below[known], says[known])

    def _voted(self, name: str, mine: Tensor, theirs: Tensor, below: Tensor) -> Tensor:
        """Return the median of each channel above, from some of its weights where they suffice."""
        step, ratio = self._some_ratios(name)
        some = ratio + (below[:, :, ::step] if below.shape[2] > 1 else below)
        says: Tensor = some.flatten(2).nanmedian(2).values.reshape(-1)
        if step > 1 and bool(says.isnan().any()):
            says = (_log_ratio(mine, theirs) + below).flatten(2).nanmedian(2).values.reshape(-1)
        return says

    def _least_squares(self, residuals: Mapping[str, Tensor]) -> Tensor:
        """Return the step that minimises Σ weight·(residual − r(step))², with weights 1/(1 + (residual/median)²)."""
        solution = self.solution
        some = [residual.reshape(-1)[:: max(1, residual.numel() // 2**20)] for residual in residuals.values()]
        sizes = torch.cat([residual[~residual.isnan()].abs() for residual in some])
        typical = max(float(sizes.median()), 1e-9) if len(sizes) else 1.0
        weights: list[Coupling] = []
        target = torch.zeros(solution.count, dtype=torch.float64, device="cpu")
        ones, degree = torch.ones_like(target), torch.zeros_like(target)
        for name in self.upwards:
            scaling = self.scalings[name]
            there = ~residuals[name].isnan()
            weight = torch.where(there, 1.0 / (1.0 + (residuals[name] / typical) ** 2), 0.0)
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
            across = torch.zeros_like(x)
            for part in weights:
                part.up(x, across)
                part.down(x, across)
            return solution.pulled_back(degree * x - across)

        diagonal = solution.pulled_back_magnitude(degree)
        accuracy = 1e-4 if solution.plain else 1e-12
        return conjugate_gradients(operator, solution.pulled_back(target), _positive(diagonal), accuracy)


def projected(solution: Solution, scales: Tensor) -> Tensor:
    """Return the g with B·g nearest to known scales.

    Args:
        solution: B.
        scales: By class, NaN where not known.

    Returns:
        Shape (groups,).
    """
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


def _log_ratio(first: Tensor, second: Tensor) -> Tensor:
    there = ((first > 0) & (second > 0)) | ((first < 0) & (second < 0))
    return torch.where(there, torch.log2((second.double() / first.double()).abs()), torch.nan)


def _grouped_median(scales: Tensor, classes: Tensor, values: Tensor) -> None:
    """Set the scale of each class to the median of its values."""
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(classes[order], stable=True)]
    known, counts = torch.unique_consecutive(classes[order], return_counts=True)
    middle = counts.cumsum(0) - counts + torch.div(counts - 1, 2, rounding_mode="floor")
    scales[known] = values[order][middle]


def _positive(diagonal: Tensor) -> Tensor:
    return torch.where(diagonal > 0, diagonal, 1.0)
