"""The path-norm ‖Φ(θ)‖_q in one forward pass (SPEC §3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from pathlift.errors import InputError, PathliftError
from pathlift.network import LazyState, Network, Node
from pathlift.passes.programs import NormProgram, Values
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.pull_back import counted, sum_of_outputs
from pathlift.passes.scaled import Scaled, total
from pathlift.reading import Inputs, capture

LOG10_OF_2 = math.log10(2.0)


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


@dataclass(frozen=True)
class _Parts:
    """The two parts of a path-norm, computed when first asked for."""

    network: Network
    values: Values
    q: float
    versions: tuple[int, ...]

    def compute(self, *, from_inputs: bool) -> tuple[float, float]:
        if self.versions != _versions(self.network):
            raise PathliftError(
                "The model's weights changed after this path-norm was computed, so its parts can no longer be computed. "
                "Call path_norm again."
            )
        found = _run(self.network, self.values, self.q, from_inputs=from_inputs, from_biases=not from_inputs)
        outputs = _Outputs(self.network, found, self.q)
        return to_float(outputs.whole(), outputs.root)


def _versions(network: Network) -> tuple[int, ...]:
    if isinstance(network.state, LazyState):
        return ()  # read anew whenever they are needed
    return tuple(tensor._version for tensor in network.state.values())


@dataclass(frozen=True)
class PathNorm:
    """The path-norm ‖Φ(θ)‖_q.

    Attributes:
        value: ‖Φ(θ)‖_q; inf only past float64's range.
        log10: log₁₀ of it, finite at any depth (−inf for 0).
        log10_scale: Unit of `per_output` as a power of ten: 0 unless the values would leave float64's range.
        q: The order.
    """

    value: float
    log10: float
    log10_scale: float
    q: float
    _parts: _Parts = field(repr=False, compare=False)
    _outputs: _Outputs = field(repr=False, compare=False)

    @cached_property
    def per_output(self) -> Tensor:
        """‖Φ^{→out}(θ)‖_q for each output neuron, float64, in units of ``10**log10_scale``.

        Of the output's shape without the batch dimension, or flat over all outputs when the model returns several.
        """
        return self._outputs.spread(self.log10_scale)

    @property
    def input_part(self) -> float:
        """‖Φ^I(θ)‖_q: only the paths that start at an input neuron. Costs one more pass."""
        return self._parts.compute(from_inputs=True)[0]

    @property
    def bias_part(self) -> float:
        """‖Φ^H(θ)‖_q: only the paths that start at a bias. Costs one more pass."""
        return self._parts.compute(from_inputs=False)[0]

    @property
    def log10_input_part(self) -> float:
        """log₁₀ of `input_part`."""
        return self._parts.compute(from_inputs=True)[1]

    @property
    def log10_bias_part(self) -> float:
        """log₁₀ of `bias_part`."""
        return self._parts.compute(from_inputs=False)[1]

    def __float__(self) -> float:
        """Return `value`."""
        return self.value


def checked_order(q: float) -> float:
    """Return q as a float.

    Args:
        q: Order of the norm.

    Returns:
        The order.

    Raises:
        InputError: It is not in [1, ∞].
    """
    if isinstance(q, bool) or not isinstance(q, (int, float)) or not q >= 1:
        raise InputError(f"q must be a number with 1 <= q <= inf, found {q!r}.")
    return float(q)


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
    order = checked_order(q)
    network = capture(model, inputs).compact
    values = network.values()
    outputs = _Outputs(network, _run(network, values, order), order)
    value, log10 = to_float(outputs.whole(), outputs.root)
    return PathNorm(value, log10, outputs.log10_scale(), order, _Parts(network, values, order, _versions(network)), outputs)


def _run(
    network: Network, values: Values, q: float, *, from_inputs: bool = True, from_biases: bool = True
) -> list[Scaled | None]:
    def attempt(dtype: torch.dtype) -> list[Scaled | None]:
        program = NormProgram(network, values, dtype, q=q, from_inputs=from_inputs, from_biases=from_biases)
        tracks = propagate(network, program)
        return [tracks[name][0] for name in network.outputs]

    precision = network.dtype if q in (1.0, math.inf) else torch.float64
    return in_range(attempt, precision, values, memory=network.memory("path_norm", q, from_inputs, from_biases))


@dataclass(frozen=True)
class _Outputs:
    """Σ_p |Φ_p|^q (or the maximum, for q = ∞) of every output neuron, compact."""

    network: Network
    values: list[Scaled | None]
    q: float

    @property
    def root(self) -> float:
        return 1.0 if math.isinf(self.q) else self.q

    def _named(self) -> list[tuple[Node, Scaled | None]]:
        return [(self.network.node[name], value) for name, value in zip(self.network.outputs, self.values, strict=True)]

    def whole(self) -> Scaled | None:
        """Sum, or maximum, over all outputs."""
        if math.isinf(self.q):
            known = [Scaled(value.tensor.double().amax(), value.exponent) for value in self.values if value is not None]
        else:
            known = [counted(node, value) for node, value in self._named() if value is not None]
        return total(known, fresh=False, largest=math.isinf(self.q))[0] if known else None

    def log10_scale(self) -> float:
        """Choose the unit that keeps the values in float64's range."""
        known = [Scaled(value.tensor.double().amax(), value.exponent) for value in self.values if value is not None]
        if not known:
            return 0.0
        log10 = to_float(total(known, fresh=False, largest=True)[0], self.root)[1]
        return 0.0 if math.isinf(log10) or abs(log10) < 290 else float(math.floor(log10))

    def spread(self, log10_scale: float) -> Tensor:
        """Return the values of all output neurons, after the root, in a unit."""
        pieces = []
        for node, value in self._named():
            if value is None:
                pieces.append(torch.zeros(node.full_shape, dtype=torch.float64, device=self.network.device))
            else:
                pieces.append(node.spread(self._in_units(value, log10_scale)))
        if len(pieces) == 1:
            return pieces[0][0]
        return torch.cat([piece.reshape(-1) for piece in pieces])

    def _in_units(self, value: Scaled, log10_scale: float) -> Tensor:
        tensor, exponent = value.tensor.double(), value.exponent
        if self.root == 1.0 and log10_scale == 0.0 and float(exponent).is_integer() and abs(exponent) < 1000:
            return torch.ldexp(tensor, torch.tensor(int(exponent), device=tensor.device))
        return torch.exp2((torch.log2(tensor) + exponent) / self.root - log10_scale / LOG10_OF_2)


def log_path_norm(network: Network, model: nn.Module | Mapping[str, Tensor] | None = None, q: float = 1) -> Tensor:
    """Compute ln ‖Φ(θ)‖_q as a differentiable function of the parameters, for use as a regulariser.

    The logarithm keeps value and gradient finite at any depth; ``torch.exp`` of it is the path-norm.

    Args:
        network: The model, captured once outside the training loop.
        model: The module whose parameters the result is differentiated by (the one that was captured, in general), or a
            mapping from parameter names to tensors. None: no gradient.
        q: Order, 1 ≤ q < ∞.

    Returns:
        Scalar tensor. Its gradient reaches every parameter that requires one.

    Raises:
        InputError: q is not in [1, ∞).
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
    order = checked_order(q)
    if math.isinf(order):
        raise InputError("log_path_norm needs a finite q: the largest path is not differentiable.")
    network = network.compact
    state = dict(network.state)
    given = model.named_parameters(remove_duplicate=False) if isinstance(model, nn.Module) else (model or {}).items()
    state.update({name: tensor for name, tensor in given if name in state})
    values = network.values(state)

    def attempt(dtype: torch.dtype) -> Scaled | None:
        program = NormProgram(network, values, dtype, q=order)
        return sum_of_outputs(network, propagate(network, program))

    whole = in_range(attempt, network.dtype if order == 1.0 else torch.float64, values)
    if whole is None:
        raise InputError("The path-norm is 0: its logarithm does not exist.")
    return (torch.log(whole.tensor) + whole.exponent * math.log(2.0)) / order
