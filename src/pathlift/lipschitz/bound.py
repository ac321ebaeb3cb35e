"""Bounds on how far two networks of one architecture, or all networks of a set, can differ (mathematics §4, §5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.graph.calling import Samples
from pathlift.graph.network import Network
from pathlift.lipschitz import outputs, perceptron
from pathlift.lipschitz.gauge_rounding import rounding_of_computed, rounding_of_gauge
from pathlift.lipschitz.outputs import Ball
from pathlift.metric.comparison import Comparison, compared_with
from pathlift.metric.perceptron import layers_of
from pathlift.passes.box import Tolerance
from pathlift.passes.forward import feed_of
from pathlift.passes.rounded import never_nan
from pathlift.reading import captured_on
from pathlift.reading.second import Other
from pathlift.results import Result

Kind: TypeAlias = Literal[
    "auto",
    "theorem",
    "pivot",
    "per_input",
    "telescoping",
    "three_step",
    "activation",
    "enclosure",
    "prior",
    "corollary_g1",
]

BOUNDS: dict[str, Callable[[Comparison, Ball], Tensor]] = {
    "theorem": outputs.theorem_4_1,
    "pivot": outputs.pivot,
    "per_input": outputs.per_input,
    "telescoping": outputs.telescoping,
    "three_step": outputs.three_step,
    "activation": outputs.activation,
    "enclosure": outputs.enclosure,
    "prior": perceptron.equation_2,
    "corollary_g1": perceptron.corollary_g1,
}


def applying(comparison: Comparison, ball: Ball) -> list[str]:
    """Name what ``auto`` takes the smallest of.

    ``theorem`` and ``pivot`` are never below ``per_input``; ``enclosure`` costs a pass back per output.

    Args:
        comparison: The comparison.
        ball: The inputs.

    Returns:
        Keys of `BOUNDS` whose hypotheses hold.
    """
    names = ["per_input", "telescoping", "activation"]
    names += ["three_step"] if comparison.others is not None else []
    layered = isinstance(layers_of(comparison.network), list) and ball.radius == 0.0
    return names + (["prior", "corollary_g1"] if layered else [])


class LipschitzBound(Result, Tensor, line=("bounds", "winner"), rows=("bounds", "which"), axes=("sample", "output")):  # type: ignore[misc]  # Tensor.__repr__ has an option
    """A float64 tensor (batch, outputs) of bounds that knows which bound gave each entry.

    Arithmetic with it gives plain tensors.

    Attributes:
        kinds: Names of the bounds that were computed.
        which: int64 tensor (batch, outputs): the place in ``kinds`` of the bound that gave the entry.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    kinds: tuple[str, ...]
    which: Tensor

    @property
    def bounds(self) -> Tensor:
        """The bounds as a plain tensor, of the same memory."""
        return self.as_subclass(Tensor)

    @property
    def winner(self) -> str:
        """Name of the bound that gave most entries."""
        counts = torch.bincount(self.which.reshape(-1), minlength=len(self.kinds))
        return self.kinds[int(counts.argmax())]

    def __str__(self) -> str:
        """Return all bounds."""
        return str(self.bounds)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Pickle as a plain tensor and what it knows."""
        del protocol
        return _bound, (self.bounds, self.kinds, self.which)

    def __deepcopy__(self, memo: dict[int, Any]) -> LipschitzBound:
        """Copy the tensor and what it knows."""
        copied = memo[id(self)] = _bound(self.bounds.clone(), self.kinds, self.which.clone())
        return copied

    def __copy__(self) -> LipschitzBound:
        """Return the same tensor with what it knows."""
        return _bound(self.bounds, self.kinds, self.which)


def _bound(values: Tensor, kinds: tuple[str, ...], which: Tensor) -> LipschitzBound:
    bound = values.as_subclass(LipschitzBound)
    bound.kinds, bound.which = kinds, which
    return bound


def _named(bounds: dict[str, Tensor]) -> LipschitzBound:
    smallest, which = torch.stack(list(bounds.values())).min(0)
    return _bound(smallest, tuple(bounds), which)


@public
@torch.no_grad()
def lipschitz_bound(
    model: nn.Module | Network,
    other: Other | Tolerance,
    x: Samples,
    *,
    kind: Kind = "auto",
    radius: float = 0.0,
) -> LipschitzBound:
    """Bound |R_θ(x) − R_θ'(x')| for every sample and output, for one θ' or all of a set, and all ‖x' − x‖_∞ ≤ radius.

    - ``theorem``: ‖x‖_∞·‖Φ^I(θ)−Φ^I(θ')‖₁ + ‖Φ^H(θ)−Φ^H(θ')‖₁ per output (Theorem B.1, equation (15), which implies
      Theorem 4.1 (5)). Needs weights whose signs agree, θθ' ≥ 0.
    - ``pivot``: the same through the pivot m (the smaller magnitude where signs agree, 0 elsewhere): any pair.
    - ``per_input``: Σ_p |ΔΦ_p|·|x̄(p₀)| through the pivot, fed with |x|: any pair. Never above ``pivot``.
    - ``telescoping``: D = f(D; |θ'|) + f(A; |θ−θ'|), fed with |x|, the better of both orders: any pair.
    - ``three_step``: sign changes taken out exactly, the rest by Hellinger, fed with |x|: any two networks.
    - ``activation``: D = f(D; |θ'|) + f(|u(θ, x)|; |θ−θ'|) with the real activations, both orders: any pair.
    - ``enclosure``: linear bounds with signs kept over the set (for two networks, the box between them), as `certify` uses.
    - ``prior``, ``corollary_g1``: equation (2) and Corollary G.1, for layered ReLU perceptrons only. A rescaling makes them
      as bad as one likes; nothing else here moves.
    - ``auto``: the smallest of those that apply, but for ``enclosure``, entry by entry.

    Everything is rounded up by its error analysis: a non-negative pass has a relative error of at most (roundings on the
    longest chain)·u. The bound is on exact real arithmetic on the weights as they are stored; the rounding of the models' own
    forward passes is not part of it (it is part of `certify`). θ' is brought into the gauge of θ first; what its weights may
    have lost to rounding on the way, nothing for powers of two, is added.

    Args:
        model: A module, or a captured `Network`: θ.
        other: θ', as for `path_metric`; or a set of networks (`Relative`, `Absolute`, `Rounding`, `Pruned`).
        x: Inputs with a batch dimension, shape (batch, …); a sequence of them when the model has several.
        kind: Which bound.
        radius: Largest change of each element of the input.

    Returns:
        float64 tensor of shape (batch, outputs): the outputs of a sample are flattened, several outputs one after the other.
        Its ``which``, ``kinds`` and ``winner`` say which bound gave it.

    Raises:
        UnsupportedModelError: The model lies outside the theory, or ``prior`` is asked for another architecture.
        MismatchError: ``other`` has other parameters, or ``theorem`` is asked for weights whose signs differ.
        InputError: ``x``, ``radius`` or ``kind`` is malformed, or x is not finite.
        NumericalError: A weight is NaN or infinite.

    References:
        Gonon et al., "A rescaling-invariant Lipschitz bound based on path-metrics", ICML 2025, Theorems 4.1 and B.1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, pruned = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> _ = pruned.weight.data.copy_(torch.tensor([[3.0, 0.0]]))
        >>> round(lipschitz_bound(model, pruned, torch.tensor([[1.0, 0.5]])).item(), 4)
        0.5
    """
    network = captured_on(model, x)
    ball = Ball(feed_of(network, x), radius)
    comparison = compared_with(network, other)
    names = applying(comparison, ball) if kind == "auto" else [kind]
    if comparison.unbounded:
        anything = torch.full_like(BOUNDS["enclosure"](comparison, ball), math.inf)
        return _named(dict.fromkeys(names, anything))
    bounds = {name: BOUNDS[name](comparison, ball) for name in names}
    extra = rounding_of_gauge(comparison, {name: size + ball.radius for name, size in ball.sizes.items()})
    extra = extra + rounding_of_computed(comparison, ball)
    return _named({name: never_nan(bound + extra) for name, bound in bounds.items()})


__all__ = ["BOUNDS", "Kind", "LipschitzBound", "lipschitz_bound"]
