"""What rescalings are chosen by: which weights lie on paths at all, and the path kernel's diagonal on parameters.

G = ∂Φᵀ∂Φ has G_ii = Σ_p (∂Φ_p/∂θ_i)². A path-lifting is linear in each weight, so for a weight w of the theory the sum is the
share of Σ_p Φ_p² that goes through w, divided by w²: one forward and one backward pass. For a parameter of which w is a
function the chain rule adds (∂w/∂θ)².
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pathlift.graph.compact import compacted
from pathlift.graph.expressions import FunctionCall, StateTensor, evaluate
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.backward import Backward
from pathlift.passes.programs import ScoreProgram
from pathlift.passes.propagate import blame, in_range, propagate
from pathlift.passes.scaled import Scaled
from pathlift.passes.tracks import SupportProgram
from pathlift.rescaling.monomials import Factor, products
from pathlift.rules.affine import is_batch_norm_shift


@torch.no_grad()
def on_paths(network: Network) -> dict[str, Tensor]:
    """Tell which elements of parameters lie on a path of non-zero weights, from an input or a bias to an output.

    A batch norm's shift counts as a bias by its parameter β alone.

    Args:
        network: The network as captured.

    Returns:
        Parameter name to bool tensor of its shape.

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    compact = compacted(network)
    values = dict(compact.values())
    blame(values)
    for weight in compact.weights:
        if is_batch_norm_shift(weight.expression):
            beta = weight.expression.args[1]
            values[weight] = (
                torch.zeros_like(values[weight]) if beta is None else evaluate(beta, compact.state).to(values[weight])
            )
    counts: dict[WeightTensor, Tensor] = {}

    def attempt(dtype: torch.dtype) -> Scaled | None:
        counts.clear()
        program = SupportProgram(ScoreProgram(compact, values, dtype))
        return Backward(compact, program, share=_adder(counts)).run(propagate(compact, program, keep=True))

    in_range(attempt, torch.float64, values)
    found: dict[str, Tensor] = {}
    for weight, count in counts.items():
        for product in products(compact, weight) or ():
            for factor in product[:1] if is_batch_norm_shift(weight.expression) else product:
                _add(found, factor, compact.state[factor.name], count.double())
    return {name: value > 0 for name, value in found.items()}


@torch.no_grad()
def kernel_diagonal(network: Network) -> dict[str, Tensor]:
    """Return diag(∂Φᵀ∂Φ)/‖Φ‖₂² by parameter.

    Args:
        network: The network as captured.

    Returns:
        Parameter name to float64 tensor of its shape, for the parameters whose elements each make one element of a weight
        (up to a factor), and those of batch norm. Weights that are 0 get 0, as if they were pruned; biases do not.

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    compact = compacted(network)
    values = compact.values()
    shares: dict[WeightTensor, Tensor] = {}
    biases: dict[WeightTensor, Tensor] = {}

    def attempt(dtype: torch.dtype) -> Scaled | None:
        shares.clear()
        biases.clear()
        program = ScoreProgram(compact, values, dtype, q=2.0)
        back = Backward(compact, program, share=_adder(shares), bias=_adder(biases))
        return back.run(propagate(compact, program, keep=True))

    in_range(attempt, torch.float64, values)
    found: dict[str, Tensor] = {}
    added = {bias.weight for layer in compact.layers for bias in layer.biases}
    for weight, share in shares.items():
        if weight not in added:
            value = values[weight].double()
            _spread(compact, weight, torch.where(value != 0, share.double() / value**2, 0.0), values, found)
    for weight, derivative in biases.items():
        if is_batch_norm_shift(weight.expression):
            _through_shift(compact, weight, derivative, values, found)
        else:
            _spread(compact, weight, derivative, values, found)
    return found


def _adder(found: dict[WeightTensor, Tensor]) -> Callable[[WeightTensor, Tensor], None]:
    def add(weight: WeightTensor, value: Tensor) -> None:
        found[weight] = found[weight] + value if weight in found else value

    return add


def _spread(
    network: Network, weight: WeightTensor, own: Tensor, values: Mapping[WeightTensor, Tensor], found: dict[str, Tensor]
) -> None:
    """Send the kernel of a weight tensor that is a parameter up to a factor, or its inverse, to the parameter."""
    for product in products(network, weight) or ():
        for factor in product:
            parameter = network.state[factor.name]
            read = parameter.double() if factor.index is None else parameter.double().reshape(-1)[factor.index.to(own.device)]
            slope = torch.where(read != 0, values[weight].double() / read.reshape(own.shape), 1.0)
            _add(found, factor, parameter, own * (factor.degree * slope) ** 2)


def _through_shift(
    network: Network, weight: WeightTensor, own: Tensor, values: Mapping[WeightTensor, Tensor], found: dict[str, Tensor]
) -> None:
    """For t = β − μ·s with s = γ/√(σ²+ε): the kernel of t goes to β, and with (μ/√(σ²+ε))² to γ."""
    assert isinstance(weight.expression, FunctionCall)
    scale, bias, mean = weight.expression.args[:3]
    if isinstance(bias, StateTensor):
        _add(found, Factor(bias.name, None, 1), network.state[bias.name], own)
    gamma = scale.args[0]
    if isinstance(gamma, StateTensor):
        partner = next((other for other in values if other.expression is scale), None)
        read = network.state[gamma.name].double()
        if partner is not None:
            slope = network.state[mean.name].double() * torch.where(read != 0, values[partner].double() / read, 0.0)
            _add(found, Factor(gamma.name, None, 1), read, own * slope**2)


def _add(found: dict[str, Tensor], factor: Factor, like: Tensor, values: Tensor) -> None:
    out = found.setdefault(factor.name, torch.zeros(like.shape, dtype=torch.float64, device=like.device))
    places = torch.arange(like.numel(), device="cpu") if factor.index is None else factor.index.reshape(-1)
    out.view(-1).index_add_(0, places.to(like.device), values.reshape(-1))
