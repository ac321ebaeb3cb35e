"""The path-norm ‖Φ(θ)‖_q in one forward pass (mathematics §3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pathlift.arguments import declare, public
from pathlift.arguments.kinds import number
from pathlift.edges.axis import Axis, expand
from pathlift.errors import InputError
from pathlift.graph.arguments import weights
from pathlift.graph.averaged import averaged
from pathlift.graph.compact import compacted
from pathlift.graph.layers import Layer
from pathlift.graph.network import Network
from pathlift.passes.backward import counted, sum_of_outputs
from pathlift.passes.programs import NormProgram, PartsProgram, Values
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.scaled import Scaled, total
from pathlift.reading import Inputs, capture, verify
from pathlift.reading.second import given_weights, other_state
from pathlift.results import Result

LOG10_OF_2 = math.log10(2.0)

LARGEST_ORDER = 1000
"""Powers of a larger order leave every range; infinity has a way of its own."""

finite_order = number("a finite number from 1 to 1000", lambda v: 1 <= v <= LARGEST_ORDER)

declare(__name__, {
    "q": number("a number with 1 <= q <= 1000, or inf", lambda v: 1 <= v <= LARGEST_ORDER or v == math.inf),
    "log_path_norm.q": finite_order,
    "log_path_norm.weights": weights,
})  # fmt: skip


def to_float(value: Scaled | None, root: float = 1.0) -> tuple[float, float]:
    """Return a scalar's value and log10, after the root.

    Args:
        value: A scalar, None for 0.
        root: q, for the 1/q power.

    Returns:
        Value (inf past float64's range) and log10 (−inf for 0).
    """
    if value is None or float(value.tensor) == 0.0:
        return 0.0, -math.inf
    mantissa = float(value.tensor)
    log2 = math.log2(mantissa) + value.exponent
    if root == 1.0 and float(value.exponent).is_integer() and abs(log2) < 1000:
        return math.ldexp(mantissa, int(value.exponent)), log2 * LOG10_OF_2
    log2 /= root
    return (2.0**log2 if log2 < 1024 else math.inf), log2 * LOG10_OF_2


@dataclass(frozen=True, repr=False)
class PathNorm(Result, line=("value", "log10", "q", "input_part", "bias_part", "left_off")):
    """The path-norm ‖Φ(θ)‖_q.

    Attributes:
        value: ‖Φ(θ)‖_q; inf only past float64's range.
        log10: log₁₀ of it, finite at any depth (−inf for 0).
        log10_scale: Unit of `per_output` as a power of ten: 0 unless the values would leave float64's range.
        q: The order.
        input_part: ‖Φ^I(θ)‖_q: only the paths that start at an input neuron.
        bias_part: ‖Φ^H(θ)‖_q: only the paths that start at a bias.
        log10_input_part: log₁₀ of `input_part`.
        log10_bias_part: log₁₀ of `bias_part`.
        left_off: Activations at the end of the model that are no part of the network: the norm is that of the logits.
    """

    value: float
    log10: float
    log10_scale: float
    q: float
    input_part: float
    bias_part: float
    log10_input_part: float
    log10_bias_part: float
    left_off: tuple[str, ...]
    _outputs: tuple[_Output, ...] = field(repr=False, compare=False)

    @property
    def per_output(self) -> Tensor:
        """‖Φ^{→out}(θ)‖_q for each output neuron, float64, in units of ``10**log10_scale``.

        Of the output's shape without the batch dimension, or flat over all outputs when the model returns several.
        """
        pieces = [output.expand(self.q, self.log10_scale) for output in self._outputs]
        if len(pieces) == 1:
            return pieces[0][0] if pieces[0].dim() else pieces[0]
        return torch.cat([piece.reshape(-1) for piece in pieces])

    def __float__(self) -> float:
        """Return `value`."""
        return self.value


@public
@torch.no_grad()
def path_norm(model: nn.Module | Network, inputs: Inputs | None = None, q: float = 1) -> PathNorm:
    """Compute the path-norm ‖Φ(θ)‖_q = (Σ_p |Φ_p(θ)|^q)^{1/q} in one forward pass.

    The path program is the model's graph with |θ|^q for θ, the identity for ReLU, the sum for max-pooling, and ones as
    input. For q = ∞ it runs over (max, ×) and gives the largest |Φ_p|. Orders other than 1 run in float64.

    Args:
        model: A module, or a captured `Network`.
        inputs: As for `capture`; not needed for a Network.
        q: Order, 1 ≤ q ≤ ∞.

    Returns:
        The path-norm, with its value per output neuron and its parts.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: ``inputs`` or ``q`` is malformed.
        NumericalError: A weight is NaN or infinite.

    References:
        Gonon et al., "A path-norm toolkit for modern networks", ICLR 2024, Theorem A.1.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, -3.0)
        >>> path_norm(layer, (2,)).value
        6.0
    """
    order = float(q)
    network = compacted(capture(model, inputs))
    values = network.values()
    parts = _run(network, values, order)
    outputs = tuple(_Output.of(layer, pair, largest=math.isinf(order)) for layer, pair in parts)
    root = 1.0 if math.isinf(order) else order
    (value, log10), (of_inputs, log10_of_inputs), (of_biases, log10_of_biases) = (
        to_float(_over_outputs(parts, which, order), root) for which in (None, 0, 1)
    )
    return PathNorm(
        value,
        log10,
        _log10_scale(outputs, root),
        order,
        of_inputs,
        of_biases,
        log10_of_inputs,
        log10_of_biases,
        network.left_off,
        outputs,
    )


Parts: TypeAlias = "tuple[Scaled | None, Scaled | None]"
"""What the paths from inputs, and those from biases, bring to a layer."""


def _run(network: Network, values: Values, q: float) -> list[tuple[Layer, Parts]]:
    """Return, for each output layer, what its paths bring, told apart by where they start."""
    network = network if math.isinf(q) else averaged(network)

    def attempt(dtype: torch.dtype) -> list[tuple[Layer, Parts]]:
        tracks = propagate(network, PartsProgram(network, values, dtype, q=q))
        return [(network.layer[name], (tracks[name][0], tracks[name][1])) for name in network.outputs]

    precision = network.dtype if q in {1.0, math.inf} else torch.float64
    return in_range(attempt, precision, values, memory=network.memory("path_norm", q))


def _over_outputs(parts: list[tuple[Layer, Parts]], which: int | None, q: float) -> Scaled | None:
    """Sum, or maximum, over all outputs, of one part or of both."""
    chosen = [
        (layer, part) for layer, both in parts for part in (both if which is None else (both[which],)) if part is not None
    ]
    if math.isinf(q):
        known = [Scaled(part.tensor.double().amax(), part.exponent) for _, part in chosen]
    else:
        known = [counted(layer, part) for layer, part in chosen]
    return total(known, fresh=False, largest=math.isinf(q))[0] if known else None


def _log10_scale(outputs: tuple[_Output, ...], root: float) -> float:
    """Choose the unit that keeps the values of output neurons in float64's range."""
    known = [Scaled(value.tensor.double().amax(), value.exponent) for output in outputs if (value := output.value) is not None]
    if not known:
        return 0.0
    log10 = to_float(total(known, fresh=False, largest=True)[0], root)[1]
    return 0.0 if math.isinf(log10) or abs(log10) < 290 else float(math.floor(log10))


@dataclass(frozen=True, eq=False)
class _Output:
    """Σ_p |Φ_p|^q (or the maximum, for q = ∞) of the neurons of one output, compact; it holds nothing of the network.

    Attributes:
        value: The compact values, None for 0.
        axes: What each entry stands for, None for itself.
        shape: One entry per neuron.
        device: Where it is.
    """

    value: Scaled | None
    axes: tuple[Axis, ...] | None
    shape: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(layer: Layer, parts: Parts, *, largest: bool) -> _Output:
        known = [Scaled(part.tensor.double(), part.exponent) for part in parts if part is not None]
        device = known[0].tensor.device if known else torch.device("cpu")
        value = total(known, fresh=False, largest=largest)[0] if known else None
        return _Output(value, layer.axes, layer.full_shape, device)

    def expand(self, q: float, log10_scale: float) -> Tensor:
        """Return the values of all neurons, after the root, in a unit."""
        if self.value is None:
            return torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        return expand(self.axes, self._in_units(self.value, 1.0 if math.isinf(q) else q, log10_scale))

    @staticmethod
    def _in_units(value: Scaled, root: float, log10_scale: float) -> Tensor:
        tensor, exponent = value.tensor.double(), value.exponent
        if root == 1.0 and log10_scale == 0.0 and float(exponent).is_integer() and abs(exponent) < 1000:
            return torch.ldexp(tensor, torch.tensor(int(exponent), device=tensor.device))
        return torch.exp2((torch.log2(tensor) + exponent) / root - log10_scale / LOG10_OF_2)


@public
def log_path_norm(
    network: Network, weights: nn.Module | Mapping[str, Tensor] | Path | str | None = None, q: float = 1
) -> Tensor:
    """Compute ln ‖Φ(θ)‖_q as a differentiable function of the parameters, for use as a regulariser.

    The logarithm keeps value and gradient finite at any depth; ``torch.exp`` of it is the path-norm.

    Args:
        network: The model, captured once outside the training loop.
        weights: The module whose parameters the result is differentiated by (the one that was captured, in general, or what
            wraps it), with its buffers as they are; or a mapping from parameter names to tensors, which may be a part of
            them. None: those of the network; or a file of weights, as for `path_metric`. Neither has a gradient.
        q: Order, 1 ≤ q < ∞.

    Returns:
        Scalar tensor. Its gradient reaches every parameter that requires one.

    Raises:
        InputError: q is not in [1, ∞), or ``network`` is no Network.
        MismatchError: ``weights`` names none of the network's parameters, some that it has not, or other shapes.
        NumericalError: A weight is NaN or infinite, or the path-norm is 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pathlift import capture
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> network = capture(model, (2,))
        >>> loss = model(torch.ones(1, 2)).sum() + 1e-3 * log_path_norm(network, model)
        >>> loss.backward()
    """
    order = float(q)
    verify(network)
    state = dict(network.state)
    if isinstance(weights, (str, Path)):
        state |= other_state(network, weights)
    elif weights is not None:
        state |= given_weights(network, weights)
    network = averaged(network)
    values = network.values(state)

    def attempt(dtype: torch.dtype) -> Scaled | None:
        program = NormProgram(network, values, dtype, q=order)
        return sum_of_outputs(network, propagate(network, program))

    power = in_range(attempt, network.dtype if order == 1.0 else torch.float64, values)
    if power is None:
        raise InputError("The path-norm is 0: its logarithm does not exist.")
    return (torch.log(power.tensor) + power.exponent * math.log(2.0)) / order


__all__ = ["PathNorm", "log_path_norm", "path_norm"]
