"""Rescaling symmetries during training: gauges kept by a hook on the user's own optimiser, and Path-SGD.

Gradient steps depend on the gauge although the function does not. `rescale_after_steps` brings the weights back to a
representative every few steps (ENorm, Stock et al. 2019, with `Symmetries.balance`; path-conditioned training with
`Symmetries.condition`), `path_sgd` makes the steps themselves invariant (Neyshabur et al. 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pathlift.arguments import public
from pathlift.errors import InputError
from pathlift.graph.network import Network
from pathlift.precision import overwrite, plainly
from pathlift.reading import verify
from pathlift.rescaling import RescaledState, Symmetries
from pathlift.rescaling.conditioning import kernel_diagonal

DEGREES = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "sum": 2, "square_avg": 2, "grad_avg": 1}
"""Optimiser buffers by the power of the gradient that they hold: a gradient is divided by the factor of its weight."""


@public
@torch.no_grad()
def rescale_in_place(groups: Symmetries, state: RescaledState, optimizer: Optimizer | None = None) -> None:
    """Overwrite the parameters of a model by a representative of their orbit, and let the optimiser's memory follow.

    The one function of pathlift that changes a model: the symmetries' network shares its tensors with the model. Buffers of
    gradients are divided by the factor of their weight, buffers of their squares by its square.

    Args:
        groups: The symmetries of the model.
        state: What one of their methods returned for the weights as they are now.
        optimizer: The optimiser in use.

    Raises:
        InputError: The optimiser keeps a tensor that is not known to scale, or trains none of these parameters.
    """
    network = groups.network
    factors = groups.weight_factors(state.factors)
    if optimizer is not None:
        trained = _trained(optimizer, network)
        _rescale_memory(optimizer, {id(parameter): factors[name] for name, parameter in trained.items() if name in factors})
    for name, tensor in state.items():
        if name in factors:
            overwrite(network.state[name], tensor)


def _trained(optimizer: Optimizer, network: Network) -> dict[str, Tensor]:
    """Find the parameters of a network that an optimiser trains: they share their memory.

    Args:
        optimizer: The optimiser.
        network: The network.

    Returns:
        Name to the optimiser's own tensor.

    Raises:
        InputError: There are none.
    """
    names = {(tensor.data_ptr(), tensor.shape): name for name, tensor in network.state.items() if tensor.numel()}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = {names[key]: tensor for tensor in given if (key := (tensor.data_ptr(), tensor.shape)) in names}
    if not trained:
        raise InputError(
            "The optimiser trains none of the network's parameters. Capture the model after it was moved to its device, and "
            "give the optimiser the parameters of that model."
        )
    return trained


def _rescale_memory(optimizer: Optimizer, known: Mapping[int, Tensor]) -> None:
    chosen: list[tuple[Tensor, Tensor]] = []
    for parameter, memory in optimizer.state.items():
        factor = known.get(id(parameter))
        if factor is None:
            continue
        for name, value in memory.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0:
                if name not in DEGREES:
                    kind = type(optimizer).__name__
                    raise InputError(f"{kind} keeps '{name}', which is not known to scale. Use SGD, Adam, AdamW or RMSprop.")
                normalised = name == "momentum_buffer" and isinstance(optimizer, torch.optim.RMSprop)  # of g/√v
                chosen.append((value, factor.to(value.device) ** (0 if normalised else DEGREES[name])))
    for value, divisor in chosen:
        overwrite(value, value.double() / divisor)


@public
def rescale_after_steps(
    optimizer: Optimizer, groups: Symmetries, gauge: Callable[[Symmetries], RescaledState], *, every: int = 1
) -> RemovableHandle:
    """Bring the weights to a representative of their orbit after every few steps of an optimiser.

    Args:
        optimizer: Any of PyTorch's SGD, Adam, AdamW, RMSprop, Adagrad; its learning-rate schedulers go on working.
        groups: ``symmetries(model, inputs)`` of the model that it trains.
        gauge: ``Symmetries.balance`` (ENorm), ``Symmetries.condition`` (path-conditioned training), ``Symmetries.normalize``.
        every: Number of steps between two rescalings.

    Returns:
        A handle; ``.remove()`` ends it.

    Raises:
        InputError: ``every`` is not a positive whole number, or the optimiser trains none of the model's parameters.

    Example:
        >>> from torch import nn
        >>> from pathlift import symmetries
        >>> from pathlift.rescaling import Symmetries
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> handle = rescale_after_steps(optimizer, symmetries(model, (2,)), Symmetries.balance, every=10)
        >>> handle.remove()
    """
    _trained(optimizer, groups.network)
    count = 0

    def after(*_: Any) -> None:
        nonlocal count
        count += 1
        if count % every == 0:
            rescale_in_place(groups, gauge(groups), optimizer)

    return optimizer.register_step_post_hook(after)


@public
def path_sgd(optimizer: Optimizer, network: Network) -> RemovableHandle:
    """Divide every gradient by the path kernel before each step: Path-SGD, steps that no rescaling can change.

    θ_i ← θ_i − η·∂L/∂θ_i / κ_i with κ_i = Σ_p (∂Φ_p/∂θ_i)²/‖Φ‖₂², the steepest descent in the geometry of the ℓ²
    path-norm. Each step costs one forward and one backward pass more on ones.

    Args:
        optimizer: Any optimiser that is linear in the gradient (SGD, with or without momentum).
        network: ``capture(model, inputs)`` of the model that it trains.

    Returns:
        A handle; ``.remove()`` ends it. Parameters without a kernel (derived weights, weights that are 0) keep their
        gradient.

    Raises:
        InputError: The optimiser trains none of the network's parameters.

    References:
        Neyshabur, Salakhutdinov, Srebro, "Path-SGD: path-normalized optimization in deep neural networks", NeurIPS 2015.
    """
    _trained(optimizer, network)

    @plainly()
    @torch.no_grad()
    def before(*_: Any) -> None:
        verify(network)
        trained = _trained(optimizer, network)
        for name, kernel in kernel_diagonal(network).items():
            gradient = trained[name].grad if name in trained else None
            if gradient is not None:
                overwrite(gradient, torch.where(kernel > 0, gradient.double() / kernel, gradient.double()))

    return optimizer.register_step_pre_hook(before)
