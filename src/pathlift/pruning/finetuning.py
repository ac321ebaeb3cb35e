"""Masks that are kept while the other weights are trained, by hooks on the user's own optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from pathlift.arguments import public
from pathlift.errors import InputError
from pathlift.pruning.masks import checked_masks

NO_GRADIENT = {"step_size"}
"""What an optimiser keeps per weight that is no memory of gradients or weights: Rprop's lengths of steps."""


class MaskHandle:
    """Masks that an optimiser keeps until `remove`, or until the ``with`` block ends of which this is the context."""

    def __init__(self, *hooks: RemovableHandle) -> None:
        """Take the hooks.

        Args:
            hooks: Those of the optimiser.
        """
        self._hooks = hooks

    @public
    def remove(self) -> None:
        """Let the optimiser go on without the masks."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        """Return the handle itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End it."""
        self.remove()


@public
def keep_masks(optimizer: Optimizer, masks: Mapping[str, Tensor], model: nn.Module | None = None) -> MaskHandle:
    """Keep pruned weights at 0 while an optimiser trains the others.

    Before each step the gradients of what is gone are set to 0, after it the weights and what the optimiser remembers of them
    (momentum, averages of gradients), so that weight decay, momentum from before the pruning, optimisers that mix the elements
    of a tensor and closures that compute gradients within the step bring nothing back. With optimisers that treat each weight
    by itself, SGD or Adam, the others are trained as if these weights were not there. Steps that a ``GradScaler`` skips change
    nothing. A norm of gradients that is clipped before the step counts those of pruned weights too.

    Args:
        optimizer: Any optimiser of PyTorch; parameter groups may be added later.
        masks: Parameter name to mask, true where the weight stays: ``PruneReport.masks``. Parameters that
            the optimiser does not train are left alone.
        model: The pruned model that it trains, which has the names. May be left out when the optimiser knows them itself:
            ``SGD(model.named_parameters(), …)``.

    Returns:
        A handle: ``.remove()`` ends it, as does the end of a ``with`` block.

    Raises:
        MismatchError: The masks are those of another model.
        InputError: A weight that is gone is not 0, the optimiser trains none of these parameters, or nobody knows their names.

    Example:
        >>> from pathlift import prune
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> pruned, report = prune(model, (4,), 0.5, "magnitude")
        >>> optimizer = torch.optim.AdamW(pruned.parameters(), lr=0.01)
        >>> with keep_masks(optimizer, report.masks, pruned):
        ...     pruned(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        >>> bool((pruned[0].weight[~report.masks["0.weight"]] == 0).all())
        True
    """
    named = _named(optimizer) if model is None else dict(model.named_parameters(remove_duplicate=False))
    removed: dict[int, Tensor] = {}
    for name, mask in checked_masks(masks, {name: parameter.shape for name, parameter in named.items()}).items():
        parameter = named[name]
        gone = ~mask.to(parameter.device)
        if bool((parameter.detach()[gone] != 0).any()):
            raise InputError(
                f"'{name}' is not 0 where its mask says that it is gone. Prune it first: apply_masks(model, masks)."
            )
        removed[id(parameter)] = gone | removed.get(id(parameter), gone)
    if not any(True for _ in _trained(optimizer, removed)):
        raise InputError("The optimiser trains none of the parameters that have masks. Give it those of the pruned model.")

    @torch.no_grad()
    def before(*_: Any) -> None:
        for parameter, gone in _trained(optimizer, removed):
            _clear(parameter.grad, gone)

    @torch.no_grad()
    def after(*_: Any) -> None:
        for parameter, gone in _trained(optimizer, removed):
            _clear(parameter, gone)
            for name, memory in optimizer.state.get(parameter, {}).items():
                if isinstance(memory, Tensor) and memory.shape == parameter.shape and name not in NO_GRADIENT:
                    _clear(memory, gone)

    return MaskHandle(optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after))


def _named(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the parameters of an optimiser that was told their names."""
    if any("param_names" not in group for group in optimizer.param_groups):
        raise InputError(
            "The optimiser does not know the names of its parameters: give keep_masks the model as well, or make the optimiser "
            "from model.named_parameters()."
        )
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _trained(optimizer: Optimizer, removed: Mapping[int, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter of an optimiser that has a mask, and where its weights are gone."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in removed:
                yield parameter, removed[id(parameter)]


def _clear(tensor: Tensor | None, gone: Tensor) -> None:
    """Set what is gone to 0; gradients that are stored sparsely wait for the end of the step."""
    if tensor is not None and tensor.layout == torch.strided:
        tensor.masked_fill_(gone.to(tensor.device), 0.0)
