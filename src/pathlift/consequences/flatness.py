"""Worst-case adaptive sharpness: the bound of Lemma 4.5 in closed form, and what projected gradient ascent finds (§5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.errors import InputError
from pathlift.graph.calling import Samples
from pathlift.graph.compact import compacted
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.norm import to_float
from pathlift.passes.backward import sum_of_outputs
from pathlift.passes.forward import feed_of, flat_outputs, forward
from pathlift.passes.programs import ORDERED, DifferenceProgram, Values
from pathlift.passes.propagate import blame, in_range, propagate
from pathlift.passes.rounded import rounded_up
from pathlift.passes.rounding import rounding_factor
from pathlift.passes.scaled import Scaled
from pathlift.reading import Inputs, capture, captured_on
from pathlift.results import Result

Loss = Literal["cross_entropy", "mse"]


@dataclass(frozen=True, repr=False)
class Sharpness(Result):
    """max_{|δ| ≤ r|θ|} L(θ+δ) − L(θ) on a data set: bounds, and a value that was found.

    Attributes:
        lemma: The bound of Lemma 4.5, through the path-metric of the whole box and max(‖x‖_∞, 1).
        per_input: The same with the difference track fed with |x|: never above ``lemma``.
        measured: The largest increase of the loss that projected gradient ascent found; a lower bound.
        log10_path_metric: log₁₀ of max_δ ‖Φ(θ+δ) − Φ(θ)‖₁.
    """

    lemma: float
    per_input: float
    measured: float
    log10_path_metric: float


def _grown(values: Values, r: float) -> tuple[dict[WeightTensor, Tensor], set[WeightTensor]]:
    """Return (1+r)·θ, constants left alone, and the weight tensors that grew."""
    moved = {weight for weight in values if weight.score_name is not None}
    return {weight: value.double() * (1 + r) if weight in moved else value for weight, value in values.items()}, moved


@public
@torch.no_grad()
def box_path_metric(model: nn.Module | Network, inputs: Inputs | None = None, *, r: float) -> float:
    """Compute log₁₀ of max over |δ| ≤ r|θ| of ‖Φ(θ+δ) − Φ(θ)‖₁ = ‖Φ((1+r)|θ|)‖₁ − ‖Φ(θ)‖₁, by a difference track.

    The maximum is attained at δ = r·θ, since |∏(1+e) − 1| ≤ (1+r)^d − 1 on a path of d weights.

    Args:
        model: A module, or a captured `Network`.
        inputs: As for `capture`; not needed for a Network.
        r: Relative change of every weight as the theory sees it (a batch norm's s and t), from 0 to 1.

    Returns:
        log₁₀ of the maximum, −inf for 0.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.fill_(-3.0)
        >>> round(10 ** box_path_metric(layer, (2,), r=0.5), 6)
        3.0
    """
    network = compacted(capture(model, inputs))
    values = network.values()
    blame(values)
    grown, moved = _grown(values, r)

    def attempt(dtype: torch.dtype) -> Scaled | None:
        return sum_of_outputs(
            network, propagate(network, DifferenceProgram(network, grown, values, dtype, moved, through=ORDERED)), 1
        )

    return to_float(in_range(attempt, network.dtype, values) if r else None)[1]


@public
def sharpness(
    model: nn.Module | Network, x: Samples, y: Tensor, r: float, *, loss: Loss = "cross_entropy", steps: int = 20
) -> Sharpness:
    """Bound and measure the worst-case adaptive sharpness of a network on data (Lemma 4.5).

    The loss is averaged over samples. With d_o ≥ |R_θ+δ(x)_o − R_θ(x)_o|: cross-entropy is 1-Lipschitz for ‖·‖₁ and
    2-Lipschitz for ‖·‖_∞ on logits, so it grows by at most min(Σ d_o, 2·max d_o); the mean of (R_o − y_o)² over outputs
    grows by at most the mean of 2·|R_o − y_o|·d_o + d_o².

    Args:
        model: A module, or a captured `Network`.
        x: Inputs, shape (batch, …).
        y: Classes (batch,) for cross-entropy, values of the output's shape for ``mse``.
        r: Relative change of every weight as the theory sees it, from 0 to 1.
        loss: Which loss.
        steps: Steps of sign gradient ascent for ``measured``.

    Returns:
        Both bounds and the measured value.

    Raises:
        InputError: An argument is malformed.
        NumericalError: A weight is NaN or infinite.
    """
    network = captured_on(model, x)
    feed = feed_of(network, x)
    values = {weight: value.detach() for weight, value in network.values().items()}
    blame(values)
    y = y.detach().to(network.device)
    with torch.no_grad():
        logits = flat_outputs(network, forward(network, values, feed, torch.float64), len(next(iter(feed.values()))))
        _check_targets(logits, y, loss)
        log10 = box_path_metric(network, r=r)
        metric = 10**log10 * (1 + rounding_factor(network, network.dtype)) if log10 < 308 else math.inf
        largest = torch.stack([tensor.flatten(1).abs().amax(1) for tensor in feed.values()]).amax(0).clamp(min=1.0)
        grown, moved = _grown(values, r)
        sizes = {name: tensor.abs() for name, tensor in feed.items()}
        drift = rounded_up(
            network, lambda dtype: DifferenceProgram(network, grown, values, dtype, moved, feed=sizes), 1, values
        ) if r else torch.zeros_like(logits)  # fmt: skip
        return Sharpness(
            _growth(logits, y, (largest * metric)[:, None], loss, total=True),
            _growth(logits, y, drift, loss, total=False),
            _ascend(network, values, feed, y, r, loss, steps),
            log10,
        )


def _check_targets(logits: Tensor, y: Tensor, loss: str) -> None:
    if loss == "cross_entropy":
        good = y.dim() == 1 and len(y) == len(logits) and not y.dtype.is_floating_point
        good = good and bool(((y >= 0) & (y < logits.shape[1])).all())
        expected = f"classes from 0 to {logits.shape[1] - 1}, shape ({len(logits)},)"
    else:
        good = len(y) == len(logits) and y[0].numel() == logits.shape[1] and bool(torch.isfinite(y).all())
        expected = f"finite values, shape ({len(logits)}, {logits.shape[1]})"
    if not good:
        raise InputError(f"y has shape {tuple(y.shape)} and dtype {y.dtype}; expected {expected}.")


def _growth(logits: Tensor, y: Tensor, drift: Tensor, loss: str, *, total: bool) -> float:
    """Bound the growth of the mean loss, from bounds on each output or (``total``) on their sum."""
    if loss == "cross_entropy":
        each = drift[:, 0] if total else torch.minimum(drift.sum(1), 2 * drift.amax(1))
        return float(each.mean())
    gap = (logits - y.reshape(logits.shape).double()).abs()
    if total:
        return float(((2 * gap.amax(1) * drift[:, 0] + drift[:, 0] ** 2) / logits.shape[1]).mean())
    return float((2 * gap * drift + drift**2).mean())


def _loss(logits: Tensor, y: Tensor, loss: str) -> Tensor:
    return F.cross_entropy(logits, y) if loss == "cross_entropy" else F.mse_loss(logits, y.reshape(logits.shape).double())


def _ascend(network: Network, values: Values, feed: Mapping[str, Tensor], y: Tensor, r: float, loss: str, steps: int) -> float:
    """Sign gradient ascent over relative changes in [−r, r]; the best increase of the loss seen."""
    shares = {weight: torch.zeros_like(v, dtype=torch.float64) for weight, v in values.items() if weight.score_name is not None}
    batch = len(y)

    def risk(change: Mapping[WeightTensor, Tensor]) -> Tensor:
        moved = {weight: v.double() * (1 + change[weight]) if weight in change else v for weight, v in values.items()}
        return _loss(flat_outputs(network, forward(network, moved, feed, torch.float64), batch), y, loss)

    first, best = float(risk(shares)), 0.0
    size = 2.5 * r / max(steps, 1)
    for _ in range(steps):
        with torch.enable_grad():
            weights = {weight: share.detach().requires_grad_() for weight, share in shares.items()}
            gradients = torch.autograd.grad(risk(weights), list(weights.values()), allow_unused=True)
        shares = {
            weight: share if g is None else (share + size * torch.sign(g)).clamp(-r, r)
            for (weight, share), g in zip(shares.items(), gradients, strict=True)
        }
        best = max(best, float(risk(shares)) - first)
    return best
