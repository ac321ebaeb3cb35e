"""The diagonal of the path kernel G = ∂Φᵀ∂Φ on parameters: G_ii = Σ_p (∂Φ_p/∂θ_i)².

A path-lifting is linear in each weight, so for a weight w of the theory the sum is the share of Σ_p Φ_p² that goes through
w, divided by w²: one forward and one backward pass. For a parameter of which w is a function the chain rule adds (∂w/∂θ)².
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathlift.network import Apply, Leaf, Network, StateTensor
from pathlift.passes.programs import ScoreProgram
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.pull_back import PullBack
from pathlift.passes.scaled import Scaled
from pathlift.rules.affine import batch_norm_shift
from pathlift.symmetry.monomials import products

TINY = 2.0**-40
"""A weight that is 0 stands in the pass with this much of the root mean square of its tensor, to see what it would do."""


@torch.no_grad()
def kernel_diagonal(network: Network) -> dict[str, Tensor]:
    """Return diag(∂Φᵀ∂Φ)/‖Φ‖₂² by parameter.

    Args:
        network: The network as captured.

    Returns:
        Parameter name to float64 tensor of its shape, for the parameters whose elements each make one element of a weight
        (up to a factor), and those of batch norm.

    Raises:
        NumericalError: A weight is NaN or infinite.
    """
    compact = network.compact
    state = {**compact.state, **{name: _nowhere_zero(compact.state[name]) for name in compact.parameters}}
    values = compact.values(state)
    seen = {leaf: _nowhere_zero(value) for leaf, value in values.items()}
    shares: dict[Leaf, Tensor] = {}

    def attempt(dtype: torch.dtype) -> Scaled | None:
        shares.clear()
        program = ScoreProgram(compact, seen, dtype, q=2.0)

        def add(leaf: Leaf, share: Tensor) -> None:
            shares[leaf] = shares[leaf] + share if leaf in shares else share

        return PullBack(compact, program, share=add).run(propagate(compact, program, keep=True))

    in_range(attempt, torch.float64, values)
    found: dict[str, Tensor] = {}
    for leaf, share in shares.items():
        own = share.double() / seen[leaf].double() ** 2
        if isinstance(leaf.expression, Apply) and leaf.expression.function is batch_norm_shift:
            _through_shift(leaf, own, state, values, found)
            continue
        for product in products(compact, leaf) or ():
            for factor in product:
                parameter = state[factor.name].double()
                places = torch.arange(parameter.numel(), device=parameter.device) if factor.index is None else factor.index
                read = parameter.reshape(-1)[places.to(parameter.device).reshape(-1)].reshape(own.shape)
                _add(found, factor.name, parameter, own * (factor.degree * values[leaf].double() / read) ** 2, places)
    return found


def _through_shift(
    leaf: Leaf, own: Tensor, state: dict[str, Tensor], values: dict[Leaf, Tensor], found: dict[str, Tensor]
) -> None:
    """For t = β − μ·s with s = γ/√(σ²+ε): the kernel of t goes to β, and with (μ/√(σ²+ε))² to γ."""
    assert isinstance(leaf.expression, Apply)
    scale, bias, mean = leaf.expression.args
    whole = torch.arange(own.numel(), device=own.device)
    if isinstance(bias, StateTensor):
        _add(found, bias.name, state[bias.name].double(), own, whole)
    gamma = scale.args[0]
    if isinstance(gamma, StateTensor):
        partner = next((other for other in values if other.expression is scale), None)
        if partner is not None:
            slope = state[mean.name].double() * values[partner].double() / state[gamma.name].double()
            _add(found, gamma.name, state[gamma.name].double(), own * slope**2, whole)


def _add(found: dict[str, Tensor], name: str, like: Tensor, values: Tensor, places: Tensor) -> None:
    out = found.setdefault(name, torch.zeros_like(like))
    out.view(-1).index_add_(0, places.to(like.device).reshape(-1), values.reshape(-1))


def _nowhere_zero(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or bool((tensor != 0).all()):
        return tensor
    size = float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
    return torch.where(tensor == 0, torch.tensor(TINY * (size or 1.0), dtype=tensor.dtype, device=tensor.device), tensor)
