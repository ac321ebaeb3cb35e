"""What users wrap models in: modules whose forward pass is that of a child. `pathlift.storage.names` knows their names."""

from __future__ import annotations

from typing import Any

from torch import nn

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}
"""Classes of PyTorch whose forward pass is that of what they wrap, and the name that they hold it by."""


def inner(module: nn.Module) -> nn.Module | None:
    """Return what a wrapper of PyTorch wraps, None for any other module.

    Args:
        module: Any module.

    Returns:
        Its child.
    """
    for cls in type(module).__mro__:
        held = WRAPPERS.get(cls.__name__)
        if held is not None and cls.__module__.partition(".")[0] == "torch":
            return module._modules.get(held)
    return None


class Transparent(nn.Module):
    """Stands in for a wrapper: the names are the wrapper's, all else is that of its only child."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call what is wrapped."""
        return next(self.children())(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Find an attribute on the wrapper, or else on what it wraps."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(next(self.children()), name)
