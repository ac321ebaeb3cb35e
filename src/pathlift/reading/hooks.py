"""Forward hooks: those that change what the model computes belong to it, those that only look on are left out.

A hook that records activations must never be handed the stand-ins of a trace, nor write into the user's lists. So the model is
run once on copies, and each hook is watched: one that returns nothing, writes to none of the tensors that it was given and
sets nothing on its module only looks on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.utils import _pytree as pytree

from pathlift.reading.examples import Examples
from pathlift.reading.freeze import Cloning, Copier

HookKey: TypeAlias = tuple[str, str, int]
"""Path of the module, attribute that holds its hooks, number of the hook."""

KINDS = ("_forward_pre_hooks", "_forward_hooks")
COMPUTING = (prune.BasePruningMethod, weight_norm.__globals__["WeightNorm"], spectral_norm.__globals__["SpectralNorm"])
"""Hooks of PyTorch that compute a weight."""


def idle_hooks(model: nn.Module, examples: Examples) -> frozenset[HookKey]:
    """Find the hooks that only look on.

    Args:
        model: The user's model; a copy of it runs, with copies of the hooks.
        examples: One example per input.

    Returns:
        Their keys; all that never ran are among them.
    """
    hooks = {key: hook for key, hook in _hooks(model) if not isinstance(hook, COMPUTING)}
    if not hooks:
        return frozenset()
    twin: nn.Module = Copier(Cloning(), training=False).copy(model)
    modules = dict(twin.named_modules())
    watched = {key: _Watched(getattr(modules[key[0]], key[1])[key[2]]) for key in hooks}
    for (path, kind, number), hook in watched.items():
        getattr(modules[path], kind)[number] = hook
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        examples.form.run(twin, [torch.zeros_like(example) for example in examples.tensors])
    return frozenset(key for key, hook in watched.items() if not hook.effective)


def without(model: nn.Module, keys: frozenset[HookKey]) -> nn.Module:
    """Take hooks off a copy.

    Args:
        model: A copy of the user's model; changed.
        keys: Which.

    Returns:
        The same copy.
    """
    modules = dict(model.named_modules()) if keys else {}
    for path, kind, number in keys:
        getattr(modules[path], kind).pop(number)
    return model


def _hooks(model: nn.Module) -> Iterator[tuple[HookKey, Callable[..., Any]]]:
    for path, module in model.named_modules():
        for kind in KINDS:
            for number, hook in getattr(module, kind).items():
                yield (path, kind, number), hook


class _Watched:
    """A hook that is watched."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook
        self.effective = False

    def __call__(self, module: nn.Module, *given: Any, **named: Any) -> Any:
        """Call the hook and see what it does."""
        tensors = [leaf for leaf in pytree.tree_leaves((given, named)) if isinstance(leaf, Tensor)]
        before = (_held(module), [tensor._version for tensor in tensors])
        result = self.hook(module, *given, **named)
        after = (_held(module), [tensor._version for tensor in tensors])
        self.effective = self.effective or result is not None or before != after
        return result


def _held(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the identity and version of every tensor that a module holds."""
    attributes = {**vars(module), **module._parameters, **module._buffers}
    return {key: (id(value), value._version) for key, value in attributes.items() if isinstance(value, Tensor)}
