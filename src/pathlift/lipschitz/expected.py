"""Bounds over a data distribution, and the Lipschitz constant of the network in its input (mathematics §5).

The paper asks for a bound in expectation. The difference track is linear in what its paths start with, so one pass fed
with E|x| bounds E|R_θ(x) − R_θ'(x)|; by Minkowski's inequality one pass fed with (E|x|^q)^{1/q} bounds the ℓ^q form.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.errors import InputError
from pathlift.graph.calling import Samples, batches_of
from pathlift.graph.compact import compacted
from pathlift.graph.network import Network
from pathlift.lipschitz.gauge_rounding import rounding_of_computed, rounding_of_gauge
from pathlift.lipschitz.outputs import Ball, per_input
from pathlift.metric.comparison import compared_with
from pathlift.passes.box import Tolerance
from pathlift.passes.forward import feed_of, flat_outputs, forward
from pathlift.passes.programs import NormProgram
from pathlift.passes.propagate import blame
from pathlift.passes.rounded import rounded_up
from pathlift.reading import Inputs, capture, captured_on
from pathlift.reading.second import Other
from pathlift.results import Result


@public
@torch.no_grad()
def expected_bound(
    model: nn.Module | Network,
    other: Other | Tolerance,
    batches: Samples | Iterable[Samples],
    *,
    q: float = 1,
) -> Tensor:
    """Bound (E_x |R_θ(x) − R_θ'(x)|^q)^{1/q} for each output, over the data given, by one pass.

    Σ_p |ΔΦ_p|·(E|x̄(p₀)|^q)^{1/q}, through the pivot for weights whose signs differ. For q = 1 it is the mean of the
    ``per_input`` bounds, at the cost of one sample, and like them on exact real arithmetic. Its ℓ^q norm over outputs
    bounds (E‖R_θ(x) − R_θ'(x)‖_q^q)^{1/q}.

    Args:
        model: A module, or a captured `Network`: θ.
        other: θ', as for `path_metric`, or a set of networks.
        batches: All inputs in one tensor, or in a dictionary by keyword; or an iterable of such batches. Lists and tuples
            are iterables, too: a model of several positional inputs takes them in a tuple within it, [(a, b)]. A data loader
            that yields (inputs, labels) is to be mapped to its inputs. Only moments are kept.
        q: Order, 1 ≤ q < ∞.

    Returns:
        float64 tensor (outputs,).

    Raises:
        InputError: There is no batch, or a batch or ``q`` is malformed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(3.0), other.weight.data.fill_(2.0)
        >>> round(expected_bound(model, other, torch.tensor([[1.0], [3.0]])).item(), 4)
        2.0
    """
    stream = batches_of(batches)
    network: Network | None = capture(model) if isinstance(model, Network) else None
    sums: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    count = 0
    for batch in stream:
        network = captured_on(model, batch) if network is None else network
        feed = feed_of(network, batch)
        for name, x in feed.items():
            size = x.abs()
            top = torch.maximum(size.amax(0, keepdim=True), largest.get(name, size[:1])).clamp(min=torch.finfo(x.dtype).tiny)
            before = sums[name] * (largest[name] / top).pow(q) if name in sums else 0.0
            sums[name], largest[name] = before + (size / top).pow(q).sum(0, keepdim=True), top
        count += len(next(iter(feed.values())))
    if network is None or count == 0:
        raise InputError("batches is empty: give at least one batch of inputs.")
    rounded_up = 1 + (4 * count + 16) * 2.0**-53
    moments = {name: largest[name] * (total / count).pow(1 / q) * rounded_up for name, total in sums.items()}
    comparison, ball = compared_with(network, other), Ball(moments, 0.0)
    rounding = rounding_of_gauge(comparison, ball.sizes) + rounding_of_computed(comparison, ball)
    return (per_input(comparison, ball) + rounding)[0]


@dataclass(frozen=True, eq=False, repr=False)
class InputLipschitz(Result, line=("total", "per_output"), rows=("per_output",), axes=("output",)):
    """Lipschitz constants of x ↦ R_θ(x) for ‖·‖_∞ on the input.

    Attributes:
        per_output: float64 (outputs,): |R_θ(x)_o − R_θ(x')_o| ≤ per_output_o·‖x − x'‖_∞.
        total: Their sum: ‖R_θ(x) − R_θ(x')‖₁ ≤ total·‖x − x'‖_∞.
    """

    per_output: Tensor
    total: float


@public
@torch.no_grad()
def input_lipschitz(model: nn.Module | Network, inputs: Inputs | None = None) -> InputLipschitz:
    """Bound the Lipschitz constant in the input by the path-norm's input part ‖Φ^I(θ)‖₁, per output.

    Args:
        model: A module, or a captured `Network`.
        inputs: As for `capture`; not needed for a Network.

    Returns:
        The constants, rounded up.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.fill_(-3.0)
        >>> round(input_lipschitz(layer, (2,)).total, 4)
        6.0
    """
    network = compacted(capture(model, inputs))
    values = network.values()
    per_output = rounded_up(network, lambda dtype: NormProgram(network, values, dtype, from_biases=False), 0, values)
    return InputLipschitz(per_output, float(per_output.sum()))


@public
def gradient_norms(model: nn.Module | Network, x: Samples) -> Tensor:
    """Return the ℓ¹ norm of each output's gradient at each input: what `input_lipschitz` bounds, measured.

    Args:
        model: A module, or a captured `Network`.
        x: Inputs with a batch dimension; a sequence of them when the model has several.

    Returns:
        float64 tensor (batch, outputs).

    Raises:
        InputError: ``x`` is malformed.
        NumericalError: A weight is NaN or infinite.
    """
    network = captured_on(model, x)
    values = {weight: value.detach() for weight, value in network.values().items()}
    blame(values)
    feed = {name: tensor.requires_grad_() for name, tensor in feed_of(network, x).items()}
    with torch.enable_grad():
        out = flat_outputs(network, forward(network, values, feed, torch.float64), len(next(iter(feed.values()))))
        for tensor in feed.values():
            out = out + 0 * tensor.flatten(1).sum(1, keepdim=True)  # an output may depend on none of them
        columns = []
        for column in range(out.shape[1]):
            gradients = torch.autograd.grad(out[:, column].sum(), list(feed.values()), retain_graph=True)
            columns.append(sum(gradient.abs().flatten(1).sum(1) for gradient in gradients))
    return torch.stack([torch.as_tensor(column) for column in columns], 1)
