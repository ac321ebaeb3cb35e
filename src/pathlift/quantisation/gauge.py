"""In which gauge to round: the rescaling that is best for the grids, by factors that are powers of two (mathematics §7, §9).

What a batch norm reads keeps its scale: its running variance, by which statistics are known, does not move along.

The function of a network does not see a rescaling, but its grids do. So every gauge but ``none`` begins with a representative
of the orbit that depends on no start, by powers of two: two networks that differ by such a rescaling are the same from there
on, bit for bit. The factors that are then found are rounded to powers of two as well, which changes no digit of any weight.

    balanced    the smallest Σ θ²
    equalised   equal ranges of what comes into a channel and goes out of it (Nagel et al., 2019)
    optimal     the smallest expected error of rounding to nearest

**Optimal.** The step of a cell of weights is its largest magnitude over 2^(b−1) − 1, the variance of a rounding error a
twelfth of its square, and the change of the outputs

    F = Σ_cells (1/12)·max_{o,j ∈ cell} (W_oj·λ_o/λ_j)²/(2^(b−1) − 1)² · Σ_{o,j ∈ cell} (g_o/λ_o²)·(h_j·λ_j²),

which is convex in log λ: a maximum of monomials times a sum of them. With one grid per output channel λ_o drops out, and only
the factors of the columns matter. The maximum is approached from above by (Σ_j a_j^p)^(1/p), which is convex as well, with p
up to 64; its minimum exceeds that of F by n^(1/p) at most, n entries in a cell. A weight below 2^−24 of the largest of its
cell counts as that much, so that there is a minimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.graph.network import Network
from pathlift.quantisation.formats import Format
from pathlift.quantisation.matrices import Matrices
from pathlift.quantisation.ranges import cells_of
from pathlift.rescaling import Symmetries, gauges
from pathlift.rescaling.constraints import ScaleConstraints
from pathlift.results import Result
from pathlift.statistics import activation_model, input_moments
from pathlift.statistics.model import DOUBT

GAUGES = ("none", "equalised", "balanced", "optimal")
"""The gauges by name; the first is the default."""

OFFSET = 0.4142
"""Added to logarithms before they are cut off: numbers that are likely (whole ones, halves) do not lie where that jumps."""

POWERS = (4.0, 16.0, 64.0)
"""p, one search after another."""

STEPS = 60
"""Steps of each search."""

LEAST = 24.0
"""Weights below 2^−this of the largest of their cell count as that much."""


@dataclass(frozen=True, repr=False)
class GaugeChoice(Result):
    """The gauge in which weights were rounded.

    Attributes:
        name: ``none``, ``equalised``, ``balanced`` or ``optimal``.
        log2_cost_before: log₂ F of the representative that every search starts from; NaN but for ``optimal``.
        log2_cost: log₂ F where the weights were rounded: with factors that are powers of two.
        log2_optimum: log₂ of the least F that the search found, with any factors.
        log2_slack: How far the least F there is can lie below that for the smoothing of the maximum, in log₂.
        imbalance: The certificate: the largest |∂ log F/∂ log λ| of a group, 0 at the minimum of a convex function and
            nowhere else.
        pinned: How many channels have no factor: what reads them (ReLU6, an output) does not let them.
    """

    name: str
    log2_cost_before: float = math.nan
    log2_cost: float = math.nan
    log2_optimum: float = math.nan
    log2_slack: float = math.nan
    imbalance: float = math.nan
    pinned: int = 0


@torch.no_grad()
def in_gauge(
    network: Network,
    name: str,
    matrices: Mapping[str, Matrices],
    formats: Mapping[str, Format],
    granularity: str | int,
    declared: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> tuple[Network, GaugeChoice]:
    """Rescale a network by powers of two to the gauge in which it is rounded.

    Args:
        network: The network.
        name: A name of `GAUGES`.
        matrices: How weights are laid out.
        formats: The formats of those that are rounded.
        granularity: What has a scale of its own.
        declared: Input layer to mean and variance, as `activation_model` takes them.

    Returns:
        The same function with other weights, and what was chosen.

    Raises:
        InputError: A weight would leave the range of its type.
    """
    if name == "none":
        return network, GaugeChoice(name)
    start = representative(network)
    constraints = Symmetries(start).constraints
    pinned = sum(len(part.channels) for part in Symmetries(start).pinned)
    if name == "balanced":
        return _rescaled(start, gauges.balance(start, constraints, 2.0).free), GaugeChoice(name, pinned=pinned)
    if name == "equalised":
        return _rescaled(start, gauges.equalized(start, constraints)[0]), GaugeChoice(name, pinned=pinned)
    problem = ExpectedError(start, constraints, matrices, formats, granularity, declared)
    free, imbalance = problem.minimum()
    chosen = _rescaled(start, free)
    before, after = problem.value(torch.zeros_like(free)), problem.value(free.round())
    return chosen, GaugeChoice(name, before, after, problem.value(free), problem.slack, imbalance, pinned)


def representative(network: Network) -> Network:
    """Return the network of the same orbit that no rescaling by powers of two changes, but for inputs of batch norms."""
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in network.state.items()}
    logs = gauges.even(replace(network, state=wide), Symmetries(network).constraints)
    return _rescaled(network, (logs + OFFSET).floor())


def _rescaled(network: Network, logs: Tensor) -> Network:
    """Return the network rescaled by the powers of two nearest to 2^logs."""
    groups = Symmetries(network)
    whole = logs.round()
    scales = groups.constraints.solution.scales(whole)
    if not torch.equal(scales, scales.round()):
        raise InputError(
            "The rescaling groups of this model share factors by roots, and powers of two for the groups are none for the "
            "channels. Use gauge='none'."
        )
    rescaled = groups.rescale(torch.exp2(_held(network, groups.constraints, whole)).tolist())
    return replace(network, state={name: rescaled.get(name, tensor) for name, tensor in network.state.items()})


def _held(network: Network, constraints: ScaleConstraints, logs: Tensor) -> Tensor:
    """Return the logarithms, 0 for groups by which a number would leave the range of its type: of nearly dead channels."""
    solution, logs = constraints.solution, logs.clone()
    for name, scaling in constraints.scalings.items():
        if name not in network.parameters:  # a running mean: the running variance beside it stays, and has to be right
            inputs = torch.isin(solution.rows, torch.cat([scaling.above.reshape(-1), scaling.below.reshape(-1)]))
            logs[solution.columns[inputs]] = 0.0
    while True:
        scales, touched = solution.scales(logs), torch.zeros(solution.count, dtype=torch.bool, device="cpu")
        for name, scaling in constraints.scalings.items():
            tensor = network.state[name].detach()
            limits = torch.finfo(tensor.dtype)
            before = scaling.split(tensor).double().cpu().abs()
            after = before * torch.exp2(scales[scaling.above] - scales[scaling.below])
            lost = (before >= limits.tiny) & ((after < limits.tiny) | (after > limits.max))
            for classes in (scaling.above, scaling.below):
                touched[classes.expand(lost.shape)[lost]] = True
        groups = solution.columns[touched[solution.rows]]
        groups = groups[logs[groups] != 0]
        if not len(groups):
            return logs
        logs[groups] = 0.0


@dataclass(frozen=True, eq=False)
class _Part:
    """One weight tensor in F, everything in log₂.

    Attributes:
        above: Classes of the rows, broadcasting against (groups, rows, columns).
        below: Classes of the columns, likewise.
        size: Of the weights.
        sensitivity: g, over the square of the number of levels, shape (groups, rows, 1).
        moment: h, shape (groups, 1, columns).
        cells: Number of cells in a row; 0 for one cell of all.
    """

    above: Tensor
    below: Tensor
    size: Tensor
    sensitivity: Tensor
    moment: Tensor
    cells: int

    def log2(self, scales: Tensor, power: float | None) -> Tensor:
        """Return log₂ of the terms of F; of F itself for the power None."""
        up, down = scales[self.above], scales[self.below]
        sizes = self._in_cells(2.0 * (self.size + up - down))
        largest = sizes.amax(-1) if power is None else _log2_sum(power * sizes, -1) / power
        weights = self._in_cells((self.sensitivity - 2.0 * up) + (self.moment + 2.0 * down))
        return largest + _log2_sum(weights, -1)

    def _in_cells(self, x: Tensor) -> Tensor:
        x = x.expand(self.size.shape)
        return x.reshape(1, -1) if self.cells == 0 else x.reshape(*x.shape[:2], self.cells, -1)


def _log2_sum(x: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(x * math.log(2.0), dim) / math.log(2.0)


class ExpectedError:
    """F of a network over the factors of its groups."""

    def __init__(
        self,
        network: Network,
        constraints: ScaleConstraints,
        matrices: Mapping[str, Matrices],
        formats: Mapping[str, Format],
        granularity: str | int,
        declared: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Collect what F is made of.

        Args:
            network: The network at the factors 1.
            constraints: Its groups.
            matrices: How weights are laid out.
            formats: The formats of those that are rounded.
            granularity: What has a scale of its own.
            declared: Input layer to mean and variance.
        """
        self.solution = constraints.solution
        activations = activation_model(network, moments=declared, doubt=DOUBT)
        self.parts: list[_Part] = []
        for name, form in formats.items():
            scaling, laid_out = constraints.scalings.get(name), matrices[name]
            moments = input_moments(activations, name)
            sizes = torch.log2(laid_out.split(network.state[name].detach()).double().abs().cpu())
            none = torch.zeros(1, 1, 1, dtype=torch.long, device="cpu")
            above = below = none
            if scaling is not None and scaling.index is None and scaling.layout.shape == laid_out.piece.layout.shape:
                above, below = (_by_column(classes, laid_out) for classes in (scaling.above, scaling.below))
            cells = 0 if granularity == "tensor" else cells_of(laid_out.shape[2], granularity, laid_out.taps)
            part = _Part(
                above, below, sizes,
                torch.log2(moments.sensitivity.cpu() / (12.0 * form.top() ** 2))[:, :, None],
                torch.log2(moments.diagonal.cpu())[:, None, :], cells,
            )  # fmt: skip
            if bool(torch.isfinite(sizes).any()) and bool(
                torch.isfinite(part.sensitivity).any() & torch.isfinite(part.moment).any()
            ):
                self.parts.append(_bounded(part))

    @property
    def slack(self) -> float:
        """What the smoothing of the maximum can cost, in log₂ F."""
        sizes = [part._in_cells(part.size).shape[-1] for part in self.parts]
        return math.log2(max(sizes, default=1)) / POWERS[-1]

    def log2(self, free: Tensor, power: float | None) -> Tensor:
        """Return log₂ F, smoothed by a power, differentiable."""
        scales = self.solution.scales(free)
        terms = [part.log2(scales, power).reshape(-1) for part in self.parts]
        return _log2_sum(torch.cat(terms), 0) if terms else scales.sum() * 0.0

    def value(self, free: Tensor) -> float:
        """Return log₂ F.

        Args:
            free: log₂ λ by group.

        Returns:
            The logarithm.
        """
        return float(self.log2(free, None))

    def minimum(self) -> tuple[Tensor, float]:
        """Return log₂ of the best factors, and the largest slope that is left.

        Returns:
            Shape (groups,), and the certificate.
        """
        free = torch.zeros(self.solution.dimension, dtype=torch.float64, device="cpu")
        if not len(free):  # nothing can be rescaled
            return free, 0.0
        with torch.inference_mode(False), torch.enable_grad():
            free = free.clone().requires_grad_()
            for power in POWERS:
                search = torch.optim.LBFGS(
                    [free],
                    max_iter=STEPS,
                    history_size=20,
                    tolerance_grad=1e-9,
                    tolerance_change=1e-12,
                    line_search_fn="strong_wolfe",
                )
                search.step(partial(self._slope, free, power))
            self._slope(free, POWERS[-1])
            left = 0.0 if free.grad is None else float(free.grad.abs().max())
        return free.detach().clone(), left

    def _slope(self, free: Tensor, power: float) -> Tensor:
        free.grad = None
        value = self.log2(free, power)
        value.backward()
        return value


def _by_column(classes: Tensor, matrices: Matrices) -> Tensor:
    """Return classes laid out as (groups, outs, ins, taps) as (groups, rows, columns), of size 1 where they do not change."""
    groups, outs, ins, taps = classes.shape
    if ins == taps == 1:
        return classes.reshape(groups, outs, 1)
    _, _, all_ins, all_taps = matrices.piece.layout.shape
    return classes.expand(groups, outs, all_ins, all_taps).reshape(groups, outs, -1)


def _bounded(part: _Part) -> _Part:
    """Return the part with logarithms that are finite: small weights count as a share of the largest of their cell."""
    split = part._in_cells(part.size)
    largest = split.amax(-1, keepdim=True)
    largest = torch.where(torch.isfinite(largest), largest, split[torch.isfinite(split)].min())
    size = torch.maximum(split, largest - LEAST).reshape(part.size.shape)

    def floored(logs: Tensor) -> Tensor:
        return torch.maximum(logs, logs[torch.isfinite(logs)].max() - 4 * LEAST)

    return replace(part, size=size, sensitivity=floored(part.sensitivity), moment=floored(part.moment))
