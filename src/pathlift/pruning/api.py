"""Prune a network: score, select, in one round or many, and say what it costs (mathematics §6).

The pruned network θ' has |θ'| ≤ |θ| and no sign changed, so that the path-metric ‖Φ(θ) − Φ(θ')‖₁ is exact (Lemma 4.2) and
bounds the change of the function by max(‖x‖_∞, 1) times itself (Theorem 4.1). It never exceeds the sum (13) of the
path-magnitudes of what was pruned. With ``update="compensate"`` the weights that stay are fitted anew
(`pathlift.compensation`): then neither holds, and the path-metric is enclosed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias, overload

import torch
from torch import Tensor, nn
from typing_extensions import override

import pathlift.drawing as drawing
from pathlift.arguments import public
from pathlift.arguments.common import Randomness, source_of
from pathlift.compensation import Update, compensated
from pathlift.errors import InputError, PathliftWarning
from pathlift.graph.axes import Axes, channel_axes
from pathlift.graph.calling import Samples
from pathlift.graph.compact import compacted
from pathlift.graph.network import Network
from pathlift.magnitude import PathMagnitude, path_magnitude
from pathlift.metric.metric import PathMetric, path_metric
from pathlift.passes.propagate import blame
from pathlift.passes.rounding import rounding_factor
from pathlift.precision import without_autocast
from pathlift.pruning.axes import along_channels
from pathlift.pruning.batches import Data, held, inputs_of
from pathlift.pruning.catalogue import RECOMMENDED, Criterion, Told, criterion_of
from pathlift.pruning.criteria import Batch
from pathlift.pruning.masks import apply_masks, elsewhere, masked
from pathlift.pruning.removal import ShrinkReport, whole_channels
from pathlift.pruning.removal import shrink as without_channels
from pathlift.pruning.scope import Scope, checked_scores, scoped
from pathlift.pruning.selection import BY_CHANNEL, Masks, NofM, Scores, Selection, select_channels, selection_of
from pathlift.reading import Inputs, capture
from pathlift.rescaling import with_state
from pathlift.rescaling.states import state_of
from pathlift.results import Result
from pathlift.statistics.model import moments_of_inputs

Scoring: TypeAlias = "str | Criterion | Callable[[Network], Mapping[str, Tensor]] | Mapping[str, Tensor]"
"""A name of `CRITERIA`, a criterion, a function of the network, or scores by parameter name."""


@dataclass(frozen=True, repr=False)
class PrunedTensor(Result):
    """What became of one tensor.

    Attributes:
        name: Its name.
        shape: Its shape.
        weights: Its number of weights.
        kept: How many stay.
        share: Share of the path-norm that ran through it before.
        left: The same for the pruned network, as a share of its own path-norm; 0 when no path runs through it any more.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    share: float
    left: float

    @property
    def sparsity(self) -> float:
        """Share of its weights that went."""
        return 1 - self.kept / self.weights

    @property
    def collapsed(self) -> bool:
        """Whether paths ran through it and none does any more."""
        return self.share > 0 and self.left == 0


@dataclass(frozen=True, repr=False)
class WeightUpdate(Result):
    """How the weights that stay make up for those that went.

    Attributes:
        statistics: Where the second moments of what they multiply came from: ``data``, ``batch norm`` or ``propagation``.
        weights: The weights that were fitted anew.
        corrected: Biases, running means and running variances that took up means and variances.
        left: Weights that were pruned and not fitted, and why.
    """

    statistics: str
    weights: tuple[str, ...]
    corrected: tuple[str, ...]
    left: dict[str, str]


@dataclass(frozen=True, eq=False, repr=False)
class PruneReport(
    Result,
    line=("criterion", "sparsity", "mass_kept", "log10_cost", "log10_bound", "collapsed"),
    rows=("tensors",),
):
    """What was pruned and what it costs.

    Attributes:
        criterion: Name of the criterion.
        amount: Share of the weights in scope that was asked for.
        masks: Parameter name to bool tensor, true where the weight stays.
        tensors: What became of each tensor in scope.
        log10_path_norm: log₁₀ ‖Φ(θ)‖₁ before.
        log10_path_norm_left: log₁₀ ‖Φ(θ')‖₁ after.
        log10_cost: log₁₀ of the joint cost ‖Φ(θ) − Φ(θ')‖₁, exact: the changes of all outputs add up to no more than
            max(‖x‖_∞, 1) times this. With an update it is the upper end of `path_metric`, and bounds the outputs only where no
            weight changes its sign; `pathlift.lipschitz_bound` is for any.
        log10_bound: log₁₀ of the bound (13), Σ PathMag(θ, i) over all that was pruned; never below `log10_cost`. With an update
            (13) says nothing, and this is inf.
        rounding: What the relative error of these numbers cannot exceed; a certificate is rounded up by it.
        path_metric: ‖Φ(θ) − Φ(θ')‖₁ for the network with its masks and its update: exact without one, else enclosed.
        updated: What became of the weights that stay; None without an update.
        shrunk: What became smaller, when channels were removed for good (``shrink=True``).
    """

    criterion: str
    amount: float
    masks: dict[str, Tensor]
    tensors: tuple[PrunedTensor, ...]
    log10_path_norm: float
    log10_path_norm_left: float
    log10_cost: float
    log10_bound: float
    rounding: float
    path_metric: PathMetric
    updated: WeightUpdate | None = None
    shrunk: ShrinkReport | None = None

    @property
    def sparsity(self) -> float:
        """Share of the weights in scope that went."""
        return 1 - sum(tensor.kept for tensor in self.tensors) / sum(tensor.weights for tensor in self.tensors)

    @property
    def mass_kept(self) -> float:
        """Share of the path-norm that is left: ‖Φ(θ')‖₁/‖Φ(θ)‖₁."""
        return 10 ** (self.log10_path_norm_left - self.log10_path_norm) if self.log10_path_norm > -math.inf else 1.0

    @property
    def cost(self) -> float:
        """The joint cost as a number; inf beyond the range of floats."""
        return _power(self.log10_cost)

    @property
    def bound(self) -> float:
        """The bound (13) as a number; inf beyond the range of floats."""
        return _power(self.log10_bound)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Names of the tensors through which paths ran and none does any more."""
        return tuple(tensor.name for tensor in self.tensors if tensor.collapsed)

    @property
    def advice(self) -> str:
        """What to do about `collapsed` tensors; empty when there are none."""
        if not self.collapsed:
            return ""
        better = f"Try criterion='{RECOMMENDED}', which keeps layers connected, or prune less."
        return (
            f"No path runs through {', '.join(self.collapsed)} any more after pruning {self.sparsity:.1%} by "
            f"'{self.criterion}'. {'Prune less.' if self.criterion == RECOMMENDED else better}"
        )

    @override
    def _draw(self, ax: drawing.Picture) -> None:
        names = [tensor.name for tensor in self.tensors]
        drawing.bars_by_layer(ax, names, [tensor.kept / tensor.weights for tensor in self.tensors], "share of weights kept")
        ax.set_ylim(0, 1.02)
        ax.axhline(1 - self.sparsity, color=drawing.ORANGE, linestyle="--", label=f"of all weights: {1 - self.sparsity:.1%}")
        gone = [number for number, tensor in enumerate(self.tensors) if tensor.collapsed]
        if gone:
            ax.plot(gone, [0.02] * len(gone), "x", color="black", label="no path runs through it any more")
        drawing.legend_above(ax, 2)

    def __str__(self) -> str:
        """Return a few lines of text."""
        lines = [
            f"{self.criterion}: {self.sparsity:.2%} of {sum(tensor.weights for tensor in self.tensors):,} weights pruned",
            f"  path mass kept {self.mass_kept:.3g}, {self._price()}",
        ]
        lines += [f"  collapsed: {self.advice}"] if self.collapsed else []
        lines += [f"  {tensor.name}: {tensor.kept:,} of {tensor.weights:,} stay" for tensor in self.tensors]
        return "\n".join(lines)

    def _price(self) -> str:
        if self.updated is None:
            return f"joint cost 10^{self.log10_cost:.3f}, bound (13) 10^{self.log10_bound:.3f}"
        low, high = self.path_metric.log10_lower, self.path_metric.log10_upper
        return f"path-metric 10^{low:.3f} to 10^{high:.3f}; {len(self.updated.weights)} weights made up for the others"


def _power(log10: float) -> float:
    return 10**log10 if log10 < 308 else math.inf


@overload
def prune(
    model: Network,
    inputs: None = None,
    amount: float | None = None,
    criterion: Scoring = ...,
    *,
    selection: str | Selection | None = None,
    steps: int | None = None,
    scope: Scope = None,
    data: Data | Iterable[Samples | Batch] | None = None,
    generator: Randomness | None = None,
    progress: Callable[[int, int], None] | None = None,
    shrink: bool = False,
    update: str = "none",
    input_mean: float | Tensor = 0.0,
    input_variance: float | Tensor = 1.0,
) -> tuple[Network, PruneReport]: ...


@overload
def prune(
    model: nn.Module,
    inputs: Inputs,
    amount: float | None = None,
    criterion: Scoring = ...,
    *,
    selection: str | Selection | None = None,
    steps: int | None = None,
    scope: Scope = None,
    data: Data | Iterable[Samples | Batch] | None = None,
    generator: Randomness | None = None,
    progress: Callable[[int, int], None] | None = None,
    shrink: bool = False,
    update: str = "none",
    input_mean: float | Tensor = 0.0,
    input_variance: float | Tensor = 1.0,
) -> tuple[nn.Module, PruneReport]: ...


@public
def prune(
    model: nn.Module | Network,
    inputs: Inputs | None = None,
    amount: float | None = None,
    criterion: Scoring = RECOMMENDED,
    *,
    selection: str | Selection | None = None,
    steps: int | None = None,
    scope: Scope = None,
    data: Data | Iterable[Samples | Batch] | None = None,
    generator: Randomness | None = None,
    progress: Callable[[int, int], None] | None = None,
    shrink: bool = False,
    update: str = "none",
    input_mean: float | Tensor = 0.0,
    input_variance: float | Tensor = 1.0,
) -> tuple[nn.Module | Network, PruneReport]:
    """Set the least important weights of a copy to 0 and report the price.

    Each round scores the network as the rounds before left it and prunes so much that after round k of n the share
    (1 − amount)^{k/n} is left; what is gone stays gone.

    Args:
        model: A module, or a captured `Network`; not changed.
        inputs: As for `capture`; not needed for a Network.
        amount: Share of the weights in scope that goes, in [0, 1), rounded down to whole weights. May be left out when the
            selection is n:m, which fixes it.
        criterion: See `Scoring`; `CRITERIA` has them by name. The default is the one that keeps layers connected.
        selection: What competes with what: ``global``, ``per_layer``, ``per_output``, ``lamp``, ``erk``, ``channels``,
            ``2:4``; the criterion's own when None.
        steps: Rounds; the criterion's own when None, and one for n:m.
        scope: Which parameters, see `Scope`; all weights of convolutions, linear layers and matrix products when None.
        data: What the criterion, or the update, looks at: inputs, shape (samples, …), or tensors in containers as the model
            takes them; or `Batch` with targets and a loss; or several of these, one after the other. Of several, what has
            not the form of the model's inputs is inputs and classes, as data loaders give them. All are held in memory.
            Criteria that look at none leave them alone.
        generator: Source of randomness, on the CPU, or a seed, for criteria that draw; the others leave it alone.
        progress: Called after each round with its number and that of all rounds.
        update: ``none``: the weights that stay are as they were. ``compensate``: they make up for those that go. The masks are
            the same; each row of a weight is fitted by least squares to what it was, over what it multiplies, and biases and
            batch norms take up means and variances. What weights multiply is known from batch norms and by propagation, or
            measured on ``data``, layer after layer.
        input_mean: Mean of the inputs, from which moments are propagated without data: a number, one for each channel, or of a
            sample's shape. A network without batch norms whose inputs are no images of mean 0 and variance 1 needs it, or data,
            for ``update="compensate"`` and for the criterion ``output_error``; no other looks at it.
        input_variance: Their variance, likewise.
        shrink: Remove the channels for good (``selection="channels"``, extra ``torch-pruning``). Channels that are tied to each
            other, by a residual stream say, go together, with the weights that make them and those that read them; only
            channels go all of whose weights are in the scope. See `pathlift.pruning.shrink`.

    Returns:
        A pruned copy of what was given (module or Network), and the report; with ``shrink`` a smaller module, which is the
        copy without these channels. A `PathliftWarning` names layers through which no
        path runs any more.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: An argument is malformed, a name is not known, or the criterion needs data that are not there.
        MismatchError: Scores belong to another model.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> pruned, report = prune(layer, (2,), 0.5)
        >>> pruned.weight.tolist(), report.mass_kept, round(report.cost, 4)
        ([[3.0, 0.0]], 0.75, 1.0)
    """
    with without_autocast():
        network = capture(model, inputs)
        module = None if isinstance(model, Network) else model
        names, seen = scoped(network, scope, module), held(data, network.graph.form)
        declared = moments_of_inputs(network, input_mean, input_variance)
        chosen = _with_declared(_criterion(criterion), declared)
        select = chosen.selection if selection is None else selection_of(selection)
        if shrink:
            if select is not select_channels:
                raise InputError("shrink=True removes whole channels: say selection='channels'.")
            select = whole_channels(module, inputs, network, names)
        share, source = _amount(amount, select), source_of(generator)
        rounds = _rounds(_steps(chosen, select) if steps is None else steps, criterion, select)
        blame(compacted(network).values())

        axes = channel_axes(network, names) if _tells_channels(select) else {}
        masks = {name: torch.ones(network.state[name].shape, dtype=torch.bool, device=network.device) for name in names}
        pruned = network
        for step in range(1, rounds + 1):
            scores = checked_scores(chosen.scores(pruned, seen, source), names, network)
            if step > 1:
                scores = {name: elsewhere(score, masks[name].to(score.device), -math.inf) for name, score in scores.items()}
            kept = _selected(select, scores, share if rounds == 1 else 1 - (1 - share) ** (step / rounds), axes)
            masks = {name: kept[name] & mask.to(kept[name].device) for name, mask in masks.items()}
            pruned = replace(network, state=masked(network.state, masks))
            if progress is not None:
                progress(step, rounds)
        fitted = None if update == "none" else compensated(network, masks, None if seen is None else inputs_of(seen), declared)
        pruned = pruned if fitted is None else fitted.network
        report = _report(network, pruned, masks, chosen.name, share, fitted)
        if report.collapsed:
            warnings.warn(report.advice, PathliftWarning, stacklevel=3)
        if module is None:
            return pruned.with_memory_of_its_own(), report
        made = apply_masks(module, masks) if fitted is None else with_state(module, state_of(pruned))
        if not shrink or inputs is None:
            return made, report
        smaller, shrunk = without_channels(made, inputs)
        return smaller, replace(report, shrunk=shrunk)


def _tells_channels(select: Selection) -> bool:
    return isinstance(select, NofM) or select in BY_CHANNEL


def _selected(select: Selection, scores: Scores, amount: float, axes: Mapping[str, Axes]) -> Masks:
    """Select, and check what a selection of the user's returns."""
    masks = along_channels(select, scores, amount, axes) if axes else select(scores, amount)
    for name, score in scores.items():
        mask = masks.get(name) if isinstance(masks, Mapping) else None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != score.shape:
            raise InputError(f"The selection gives no bool mask of shape {tuple(score.shape)} for '{name}'.")
    return masks


def _criterion(criterion: Scoring) -> Criterion:
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        return criterion_of(criterion)
    if isinstance(criterion, Mapping):
        given = criterion
        return Criterion("scores", "given scores", lambda *_: given)
    function = criterion
    return Criterion(getattr(function, "__name__", "function"), "a function", lambda network, *_: function(network))


def _with_declared(criterion: Criterion, moments: Told) -> Criterion:
    """Return the criterion for inputs of known moments."""
    propagated = criterion.propagated
    if propagated is None:
        return criterion
    return replace(criterion, score=lambda network, *_: propagated(network, moments))


def _amount(amount: float | None, select: Selection) -> float:
    if amount is None:
        if not isinstance(select, NofM):
            raise InputError("Say how much to prune: amount, a share in [0, 1).")
        return select.amount
    return amount


def _steps(criterion: Criterion, select: Selection) -> int:
    return 1 if isinstance(select, NofM) else criterion.steps


def _rounds(steps: int, criterion: Scoring, select: Selection) -> int:
    if steps > 1 and isinstance(criterion, Mapping):
        raise InputError(f"Given scores cannot be computed anew: steps must be 1, found {steps}.")
    if steps > 1 and isinstance(select, NofM):
        raise InputError(f"{select.n}:{select.m} sparsity is reached in one round: steps must be 1, found {steps}.")
    return steps


def _report(
    network: Network, pruned: Network, masks: dict[str, Tensor], criterion: str, amount: float, fitted: Update | None
) -> PruneReport:
    before, after = path_magnitude(network), path_magnitude(pruned)
    cost = path_metric(network, dict(pruned.state), moments=None if fitted is None else 4)
    bound, updated = math.inf, None
    if fitted is None:
        assert cost.exact
        lost = sum(float(elsewhere(before[name], ~mask, 0.0).sum(dtype=torch.float64)) for name, mask in masks.items())
        bound = max(before.log10_path_norm + math.log10(lost) if lost > 0 else -math.inf, cost.log10_upper)
    else:
        updated = WeightUpdate(fitted.statistics, tuple(fitted.compensated), tuple(fitted.corrected), fitted.left)
    tensors = tuple(_tensor(name, mask, before, after) for name, mask in masks.items())
    norms = before.log10_path_norm, after.log10_path_norm
    rounding = rounding_factor(compacted(network), network.dtype)
    return PruneReport(criterion, amount, masks, tensors, *norms, cost.log10_upper, bound, rounding, cost, updated)


def _tensor(name: str, mask: Tensor, before: PathMagnitude, after: PathMagnitude) -> PrunedTensor:
    share, left = (float(shares[name].sum(dtype=torch.float64)) for shares in (before, after))
    return PrunedTensor(name, tuple(mask.shape), mask.numel(), int(mask.sum()), share, left)
