"""Tensors of a file or state-dict under the names of a model, however they are called and written there.

`torch.compile`, data-parallel wrappers, averaged models and training frameworks hold the model as a child and put that child's
name in front of every name. `torch.nn.utils.prune` keeps a weight as a tensor and a mask, weight norm as directions and
lengths. Here is the one place that knows them: `fit` says, for the names of one model, from which tensors of a mapping each
follows.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from pathlift.errors import MismatchError, PathliftWarning

LOG = logging.getLogger("pathlift")


SEGMENTS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Names under which wrappers hold what they wrap."""

BESIDE = ("n_averaged", "num_batches_tracked")
"""State that comes and goes without a change of the function."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Recipe:
    """How a tensor of a model follows from tensors of another mapping.

    Attributes:
        names: Their names in the mapping.
        make: What is computed from them.
    """

    names: tuple[str, ...]
    make: Callable[..., Tensor]

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        """Compute it."""
        return self.make(*(given[name] for name in self.names))


class Fit(NamedTuple):
    """How the tensors of a mapping become those of a model.

    Attributes:
        recipes: Name in the model to what it follows from; a tensor that fits nothing is there under its own name.
        prefix: What was in front of every name, with its dot; empty if nothing was, or not everywhere the same.
        normed: Weights that are computed from what their names say are the lengths and directions of weight norm.
    """

    recipes: dict[str, Recipe]
    prefix: str
    normed: list[str]

    def tell(self, source: object) -> None:
        """Say what was done that the names alone do not tell.

        Args:
            source: Where the tensors come from.
        """
        if self.prefix:
            LOG.info("'%s': the names of its tensors are taken without '%s' in front of them.", source, self.prefix)
        if self.normed:
            more = f" and {len(self.normed) - 1} more" if len(self.normed) > 1 else ""
            warnings.warn(
                f"Weights in '{source}' ('{self.normed[0]}'{more}) are computed from lengths and directions as PyTorch's "
                "weight norm does it: so the names say. If something else was done with these, give the module itself.",
                PathliftWarning,
                stacklevel=2,
            )


def fit(
    expected: Iterable[str],
    given: Mapping[str, Tensor],
    spec: Callable[[str], Tensor | None],
    model: nn.Module | None = None,
    *,
    inside: bool = True,
) -> Fit:
    """Give tensors the names of a model.

    Args:
        expected: The names of the model.
        given: Name to tensor, or to tensors without memory of their shapes.
        spec: The tensor that the model has by a name, or one of its shape; None if that is no tensor of its own.
        model: The model itself, if it is at hand: it alone can tell that weight norm is what it does with such tensors.
        inside: As for `names_of`.

    Returns:
        Where each comes from. Nothing is computed or read.
    """
    wanted = _forms(expected, spec)
    written = _forms(given, given.get)
    recipes: dict[str, Recipe] = {}
    renamed = names_of(wanted, written, inside=inside)
    normed = []
    for weight, form in renamed.items():
        target = wanted.get(weight)
        if target is not None and target.kind == NORMED and target.ends != form.ends and not _is_weight_norm(model, target):
            target = None
        recipes |= _written_as(target, form, spec)
        if target is not None and form.kind == NORMED and target.kind != NORMED:
            normed.append(weight)
    prefixes = {
        form.weight.removesuffix(weight) if form.weight.endswith(weight) else None
        for weight, form in renamed.items() if weight in wanted
    }  # fmt: skip
    return Fit(recipes, (prefixes.pop() or "") if len(prefixes) == 1 else "", normed)


PLAIN, MASKED, NORMED = "plain", "masked", "normed"


class _Form(NamedTuple):
    """How a weight is written down."""

    weight: str
    kind: str
    names: tuple[str, ...]
    ends: tuple[str, ...] = ()


ENDS = {("_orig", "_mask"): MASKED, ("_g", "_v"): NORMED, (".original0", ".original1"): NORMED}
"""How the names of two tensors end that stand for one."""


def _forms(names: Iterable[str], spec: Callable[[str], Tensor | None]) -> dict[str, _Form]:
    """Return how each weight is written down."""
    known = dict.fromkeys(names)
    forms: dict[str, _Form] = {}
    for name in known:
        for ends, kind in ENDS.items():
            first, second = ends
            stem = name.removesuffix(first)
            pair = (name, stem + second)
            if name.endswith(first) and pair[1] in known and _are_a_pair(kind, *map(spec, pair)):
                before, _, last = stem.rpartition("parametrizations.")
                weight = before + last if first == ".original0" else stem
                if weight not in known and not any(other.startswith(f"{stem}.") for other in known if other not in pair):
                    forms[weight] = _Form(weight, kind, pair, ends)
    taken = {name for form in forms.values() for name in form.names}
    for name in known:
        if name not in taken:
            forms[name] = _Form(name, PLAIN, (name,))
    return forms


def _is_weight_norm(model: nn.Module | None, form: _Form) -> bool:
    """Whether a model computes a weight by weight norm of PyTorch, and by nothing else."""
    if model is None:
        return False
    stem = form.names[0].removesuffix(form.ends[0])
    holder, _, name = stem.rpartition(".")
    try:
        module = model.get_submodule(stem if form.ends[0] == ".original0" else holder)
    except AttributeError:
        return False
    if isinstance(module, ParametrizationList):
        return len(module) == 1 and type(module[0]) is parametrizations._WeightNorm
    return any(isinstance(hook, WeightNorm) and hook.name == name for hook in module._forward_pre_hooks.values())


def _are_a_pair(kind: str, first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two tensors have the shapes of a weight and its mask, or of lengths and directions."""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return first.shape == second.shape if kind == MASKED else _dimension(first, second) is not None


def _dimension(lengths: Tensor, directions: Tensor) -> int | None:
    """Return along which dimension a weight has a length for each index: -1 for one length in all, None for no such pair."""
    if lengths.dim() == 0:
        return -1
    rank = directions.dim()
    shapes = [[1] * dimension + [size] + [1] * (rank - dimension - 1) for dimension, size in enumerate(directions.shape)]
    return shapes.index(list(lengths.shape)) if list(lengths.shape) in shapes else None


def _written_as(wanted: _Form | None, form: _Form, spec: Callable[[str], Tensor | None]) -> dict[str, Recipe]:
    """Write a weight down as a model does; one that it does not have stays as it is."""
    if wanted is None or wanted.kind == form.kind:
        targets = form.names if wanted is None else wanted.names
        return {target: Recipe((name,), _same) for target, name in zip(targets, form.names, strict=True)}
    plain = PLAINLY[form.kind]
    first = Recipe(form.names, plain)
    if wanted.kind == PLAIN:
        return {wanted.names[0]: first}
    if wanted.kind == MASKED:
        return {wanted.names[0]: first, wanted.names[1]: Recipe(form.names, partial(_all_kept, plain))}
    lengths, directions = map(spec, wanted.names)
    assert lengths is not None and directions is not None
    make = partial(_lengths, plain, _dimension(lengths, directions), form.weight)
    return {wanted.names[0]: Recipe(form.names, make), wanted.names[1]: first}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _pruned(original: Tensor, mask: Tensor) -> Tensor:
    return original * mask


def _all_kept(plain: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return torch.ones_like(plain(*tensors))


def _of_length(lengths: Tensor, directions: Tensor) -> Tensor:
    dimension = _dimension(lengths, directions)
    assert dimension is not None
    return torch._weight_norm(directions, lengths, dimension)


PLAINLY: dict[str, Callable[..., Tensor]] = {PLAIN: _same, MASKED: _pruned, NORMED: _of_length}
"""How a weight follows from what it is written down as."""


def _lengths(plain: Callable[..., Tensor], dimension: int | None, name: str, *tensors: Tensor) -> Tensor:
    """Return the lengths with which a weight is its own direction, if weight norm then gives the weight itself."""
    assert dimension is not None
    weight = plain(*tensors)
    lengths = torch.norm_except_dim(weight, 2, dimension)
    if not weight.is_meta and not torch.equal(torch._weight_norm(weight, lengths, dimension), weight):
        raise MismatchError(
            f"'{name}' is no weight that weight norm gives exactly, since a part of it is 0. Remove weight norm from the model."
        )
    return lengths


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
            if all(prefix + short in given for short in expected):
                fitting.append({expected.get(n.removeprefix(prefix), n): v for n, v in given.items()})
    counted = {name: value for name, value in given.items() if name.rpartition(".")[2] not in BESIDE}
    start = next(iter(counted), "")
    for name in expected:
        if name.endswith(f".{start}"):
            prefix = name[: len(name) - len(start)]
            if all(short.startswith(prefix) for short in expected) and all(prefix + n in expected for n in counted):
                fitting.append({expected.get(prefix + n, n): v for n, v in given.items()})
    return fitting[0] if len(fitting) == 1 else None
