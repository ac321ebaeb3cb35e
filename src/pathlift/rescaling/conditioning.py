"""What rescalings are chosen by: which weights lie on paths at all, and the path kernel's diagonal on parameters.

G = ∂Φᵀ∂Φ has G_ii = Σ_p (∂Φ_p/∂θ_i)². A path-lifting is linear in each weight, so for a weight w of the theory the sum is the
share of Σ_p Φ_p² that goes through w, divided by w²: one forward and one backward pass. For a parameter of which w is a
function the chain rule adds (∂w/∂θ)².
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pathlift.graph.compact import compacted
from pathlift.graph.expressions import Expression, StateTensor, evaluate
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.backward import Backward
from pathlift.passes.programs import ScoreProgram
from pathlift.passes.propagate import blame, in_range, propagate
from pathlift.passes.scaled import Scaled
from pathlift.passes.tracks import SupportProgram
from pathlift.rescaling.monomials import Factor, products


@torch.no_grad()
def on_paths(network: Network) -> dict[str, Tensor]:
    """Tell which elements of parameters lie on a path of non-zero weights, from an input or a bias to an output.

    A bias that is a sum, the shift t = β − μ·s of a batch norm, counts by its parameters alone, β: what a buffer adds, μ·s, is
    no weight that anybody chose, and the parameter in s counts where s stands on edges.

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
        buffers = [summand.buffer for summand in weight.expression.summands() or () if summand.buffer is not None]
        if buffers:
            without: dict[Any, Any] = dict.fromkeys(buffers, torch.zeros_like(values[weight]))
            values[weight] = evaluate(weight.expression, compact.state, without).to(values[weight])
    counts: dict[WeightTensor, Tensor] = {}

    def attempt(dtype: torch.dtype) -> Scaled | None:
        counts.clear()
        program = SupportProgram(ScoreProgram(compact, values, dtype))
        return Backward(compact, program, share=_adder(counts)).run(propagate(compact, program, keep=True))

    in_range(attempt, torch.float64, values)
    by_parameter: dict[str, Tensor] = {}
    for weight, count in counts.items():
        for product in products(compact, weight) or ():
            for factor in [factor for factor in product if factor.buffer] or product:
                _add(by_parameter, factor, compact.state[factor.name], count.double())
    return {name: value > 0 for name, value in by_parameter.items()}


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
    diagonal: dict[str, Tensor] = {}
    added = {bias.weight for layer in compact.layers for bias in layer.biases}
    for weight, share in shares.items():
        if weight not in added:
            value = values[weight].double()
            _to_parameters(compact, weight, torch.where(value != 0, share.double() / value**2, 0.0), values, diagonal)
    evaluated = {weight.expression: value for weight, value in values.items()}
    for weight, kernel in biases.items():
        if weight.expression.summands() is None:
            _to_parameters(compact, weight, kernel, values, diagonal)
        else:
            for name, slope in _slopes(compact, weight.expression, evaluated):
                _add(diagonal, Factor(name, None, 1), compact.state[name], kernel * slope**2)
    return diagonal


def _adder(sums: dict[WeightTensor, Tensor]) -> Callable[[WeightTensor, Tensor], None]:
    def add(weight: WeightTensor, value: Tensor) -> None:
        sums[weight] = sums[weight] + value if weight in sums else value

    return add


def _to_parameters(
    network: Network, weight: WeightTensor, kernel: Tensor, values: Mapping[WeightTensor, Tensor], diagonal: dict[str, Tensor]
) -> None:
    """Send the kernel of a weight tensor w that is a parameter up to a factor, w = c·θ^d, to θ: times (∂w/∂θ)² = (d·w/θ)²."""
    for product in products(network, weight) or ():
        for factor in product:
            parameter = network.state[factor.name]
            read = (
                parameter.double() if factor.index is None else parameter.double().reshape(-1)[factor.index.to(kernel.device)]
            )
            slope = torch.where(read != 0, values[weight].double() / read.reshape(kernel.shape), 1.0)
            _add(diagonal, factor, parameter, kernel * (factor.degree * slope) ** 2)


def _slopes(
    network: Network, expression: Expression, evaluated: Mapping[Expression, Tensor]
) -> Iterator[tuple[str, Tensor | float]]:
    """Yield the parameters θ of an expression w with |∂w/∂θ|, or its negative.

    Of w = c·θ it is w/θ, and 0 where θ = 0, which counts as pruned; of a sum Σ μ·w it is μ·∂w/∂θ, summand by summand. So
    t = β − μ·s with s = γ/√(σ²+ε) has 1 for β and μ·s/γ for γ.
    """
    summands = expression.summands() or ()
    if isinstance(expression, StateTensor):
        yield expression.name, 1.0
    elif len(summands) == 1 and summands[0].buffer is None:
        for parameter in summands[0].factors:
            if isinstance(parameter, StateTensor) and expression in evaluated:
                value = network.state[parameter.name].double()
                yield parameter.name, torch.where(value != 0, evaluated[expression].double() / value, 0.0)
    else:
        for summand in summands:
            buffer = network.state[summand.buffer.name].double() if isinstance(summand.buffer, StateTensor) else 1.0
            for factor in summand.factors:
                for name, slope in _slopes(network, factor, evaluated):
                    yield name, buffer * slope


def _add(sums: dict[str, Tensor], factor: Factor, like: Tensor, values: Tensor) -> None:
    out = sums.setdefault(factor.name, torch.zeros(like.shape, dtype=torch.float64, device=like.device))
    indices = torch.arange(like.numel(), device="cpu") if factor.index is None else factor.index.reshape(-1)
    out.view(-1).index_add_(0, indices.to(like.device), values.reshape(-1))
