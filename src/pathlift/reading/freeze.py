"""A deep-frozen, eval-mode view of the user's model: new module objects around the very same tensors.

The user's module is only read. Whatever tracing does (mode, hooks that store things on their module, lazily set
attributes) happens to the view.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.errors import Problem, UnsupportedModelError


def frozen_view(model: nn.Module) -> nn.Module:
    """Copy the module tree without copying a tensor, and put the copy in eval mode.

    Args:
        model: The user's model; not changed.

    Returns:
        A model with the same parameters and buffers (same storage, no gradients) in eval mode.

    Raises:
        UnsupportedModelError: The model is a scripted module, has lazy parameters, or cannot be copied.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the module it was given
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            _problem("It is a TorchScript module, which has no graph to export.", "Give the original nn.Module.")
        )
    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_modules", "_backward_hooks", "_backward_pre_hooks"):
                _alias_tensors(value, memo, name)
    try:
        view: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(
            _problem(
                f"Its module objects cannot be copied ({type(error).__name__}: {error}).",
                "Remove the attribute that cannot be copied (an open file, a lock, a generator) from the model.",
            )
        ) from error
    for module in view.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return view.eval()


def _alias_tensors(value: Any, memo: dict[int, Any], module: str) -> None:
    """Enter every tensor inside ``value`` into the deepcopy memo as an alias without gradient."""
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = _alias(value, module)
    elif isinstance(value, dict):
        for item in value.values():
            _alias_tensors(item, memo, module)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            _alias_tensors(item, memo, module)


def _alias(tensor: Tensor, module: str) -> Tensor:
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise UnsupportedModelError(
            _problem(
                f"Module '{module}' has a lazy parameter without a shape.", "Run the model once so that it gets its shape."
            )
        )
    alias = tensor.detach()
    if isinstance(tensor, nn.Parameter) and alias.dtype.is_floating_point:
        return nn.Parameter(alias, requires_grad=False)
    return alias


def _problem(reason: str, advice: str) -> tuple[Problem, ...]:
    return (Problem("", "export", "", reason, advice),)
