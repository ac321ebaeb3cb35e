"""What users wrap models in, and the names that it gives to parameters.

`torch.compile`, data-parallel wrappers and averaged models hold the model as a child and put that child's name in front of
every name of a state-dict. Here is the one place that knows them: `names_of` finds, for the names of one model, the tensors
of a mapping that names them with other wrappers, or inside another module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

SEGMENTS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Names under which wrappers hold what they wrap."""

BESIDE = ("n_averaged", "num_batches_tracked")
"""State that comes and goes without a change of the function."""

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}
"""Classes of PyTorch whose forward pass is that of what they wrap, and the name that they hold it by."""

Value = TypeVar("Value")


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


def bare(name: str) -> str:
    """Return a name without the segments that wrappers add.

    Args:
        name: Name of a parameter, buffer or module.

    Returns:
        What is left.
    """
    return ".".join(part for part in name.split(".") if part not in SEGMENTS)


def names_of(expected: Iterable[str], given: Mapping[str, Value], *, inside: bool = True) -> dict[str, Value]:
    """Give the entries of a mapping the names of a model.

    An entry keeps its name when the model knows it. Otherwise names are compared without the segments of wrappers; and when
    still nothing fits, the mapping may be that of a module that holds the model, or of a part of that module which the model
    is: one prefix, the same for all.

    Args:
        expected: The names of the model.
        given: The mapping.
        inside: Whether the mapping may be that of a module around the model, or of a part of it.

    Returns:
        The same entries; one that fits nothing keeps its name.
    """
    wanted = list(dict.fromkeys(expected))
    if all(name in given for name in wanted):
        return dict(given)
    known = set(wanted)
    by_bare = _unique(wanted)
    renamed: dict[str, Value] = {}
    for name, value in given.items():
        target = name if name in known else by_bare.get(bare(name), name)
        if target in renamed:
            return dict(given)
        renamed[target] = value
    if inside and known.isdisjoint(renamed):
        needed = {bare(name): name for name in wanted if name.rpartition(".")[2] not in BESIDE}
        return _without_prefix(needed, {bare(name): value for name, value in given.items()}) or dict(given)
    return renamed


def _unique(names: Collection[str]) -> dict[str, str]:
    by_bare: dict[str, str] = {}
    twice: set[str] = set()
    for name in names:
        if by_bare.setdefault(bare(name), name) != name:
            twice.add(bare(name))
    return {short: name for short, name in by_bare.items() if short not in twice}


def _without_prefix(expected: Mapping[str, str], given: Mapping[str, Value]) -> dict[str, Value] | None:
    """Match names that differ by one prefix; None when no prefix, or more than one, fits them all."""
    fitting = []
    first = next(iter(expected), "")
    for name in given:
        if name.endswith(f".{first}"):
            prefix = name[: len(name) - len(first)]
            if all(prefix + key in given for key in expected):
                fitting.append({expected.get(n.removeprefix(prefix), n): v for n, v in given.items()})
    counted = {name: value for name, value in given.items() if name.rpartition(".")[2] not in BESIDE}
    start = next(iter(counted), "")
    for name in expected:
        if name.endswith(f".{start}"):
            prefix = name[: len(name) - len(start)]
            if all(key.startswith(prefix) for key in expected) and all(prefix + n in expected for n in counted):
                fitting.append({expected.get(prefix + n, n): v for n, v in given.items()})
    return fitting[0] if len(fitting) == 1 else None
