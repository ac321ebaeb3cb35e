"""Masks: laid on a network, on a module, kept in files, and exchanged with `torch.nn.utils.prune`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from pathlift.arguments import public
from pathlift.errors import InputError, MismatchError
from pathlift.graph.expressions import evaluate
from pathlift.pruning.selection import keep_largest, kept_of
from pathlift.reading.memory import Memory
from pathlift.rescaling import with_state
from pathlift.storage.models import load_state, save_tensors


def checked_masks(masks: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Check that masks belong to parameters of these shapes and hold nothing but 0 and 1.

    Args:
        masks: Name to mask.
        shapes: Name to shape, of all parameters.

    Returns:
        Name to bool mask.

    Raises:
        MismatchError: A name or a shape is not the model's.
        InputError: A mask holds other values.
    """
    checked = {}
    for name, mask in masks.items():
        if name not in shapes:
            raise MismatchError(f"There is a mask for '{name}', which is no parameter of this model.")
        if mask.shape != shapes[name]:
            raise MismatchError(f"The mask of '{name}' has shape {tuple(mask.shape)}; the parameter has {tuple(shapes[name])}.")
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(f"The mask of '{name}' holds other values than 0 and 1.")
        checked[name] = mask.bool()
    return checked


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def elsewhere(tensor: Tensor, mask: Tensor, value: float) -> Tensor:
    """Return a tensor where a mask is true and a number elsewhere.

    By arithmetic on bits, which is exact and several times faster than a choice element by element.

    Args:
        tensor: Real floating-point numbers.
        mask: Bool, of the same shape.
        value: The number.

    Returns:
        New memory of the same type.
    """
    kind = INTEGERS[tensor.element_size()]
    other = int(torch.tensor(value, dtype=tensor.dtype).view(kind))
    return tensor.view(kind).sub(other).mul_(mask).add_(other).view(tensor.dtype)


def masked(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters with those set to 0 that a mask removes; nothing is changed in place.

    Args:
        state: Parameters and buffers.
        masks: Name to bool mask.

    Returns:
        The same names.
    """
    return {
        name: elsewhere(tensor.detach(), masks[name].to(tensor.device), 0.0) if name in masks else tensor
        for name, tensor in state.items()
    }


@public
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with pruned weights set to 0.

    Args:
        model: Any module; not changed.
        masks: Parameter name to mask, true where the weight stays.

    Returns:
        The copy.

    Raises:
        MismatchError: The masks are those of another model.
        InputError: A mask holds other values than 0 and 1.

    Example:
        >>> apply_masks(nn.Linear(2, 1), {"weight": torch.tensor([[True, False]])}).weight[0, 1].item()
        0.0
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    checked = checked_masks(masks, {name: parameter.shape for name, parameter in parameters.items()})
    memory = Memory(parameters.items())
    part = next((name for name in checked if name in memory.views), None)
    if part is not None:
        raise InputError(f"'{part}' is a part of another parameter: give the mask of that one.")
    pruned = masked(memory.state, {memory.aliases.get(name, name): mask for name, mask in checked.items()})
    state, names = model.state_dict(), memory.names
    unknown = [name for name in checked if name not in state]
    if unknown:
        raise MismatchError(f"The model's state-dict has no '{unknown[0]}': it names its parameters otherwise.")
    changed = {name: evaluate(memory.expression(name), pruned) for name in names if name in state}
    return with_state(model, {**state, **changed})


@public
def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Write masks to a safetensors file, all or nothing.

    Args:
        masks: Name to bool mask.
        path: A file that ends in ``.safetensors``.

    Raises:
        InputError: The file cannot be written, or a mask holds other values than 0 and 1.
    """
    save_tensors(checked_masks(masks, {name: mask.shape for name, mask in masks.items()}), Path(path))


@public
def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Read masks from a safetensors file.

    Args:
        path: The file.

    Returns:
        Name to bool mask.

    Raises:
        InputError: The file cannot be read, or holds other values than 0 and 1.
    """
    tensors = load_state(Path(path))
    return checked_masks(tensors, {name: tensor.shape for name, tensor in tensors.items()})


class ScorePruning(torch_prune.BasePruningMethod):
    """A method of `torch.nn.utils.prune` that keeps the largest scores, whatever criterion they come from.

    Pass it to `torch.nn.utils.prune.global_unstructured` with ``importance_scores=importance_scores(model, scores)``, or
    prune one tensor of a module in place by ``ScorePruning.apply(module, "weight", amount, importance_scores=scores)``.
    Unlike ``L1Unstructured`` it does not take magnitudes, and ties fall as in `pathlift.prune`.
    """

    PRUNING_TYPE = "unstructured"

    @public
    def __init__(self, amount: float) -> None:
        """Choose how much goes.

        Args:
            amount: Share of the weights that are still there, from 0 to 1.

        Raises:
            InputError: It is no share.
        """
        self.amount = amount

    @public
    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the mask.

        Args:
            t: Scores.
            default_mask: 1 where a weight is still there.

        Returns:
            A mask of the shape and type of ``default_mask``.

        Raises:
            InputError: The scores have another shape, or are NaN.
        """
        if t.shape != default_mask.shape:
            raise InputError(f"t has shape {tuple(t.shape)}, and default_mask {tuple(default_mask.shape)}.")
        there = default_mask.bool()
        keep = kept_of(int(there.sum()), self.amount)
        (mask,) = keep_largest([torch.where(there, t.detach(), -torch.inf)], keep)
        return (mask & there).to(default_mask)


@public
def importance_scores(model: nn.Module, scores: Mapping[str, Tensor]) -> dict[tuple[nn.Module, str], Tensor]:
    """Key scores by module and name, as `torch.nn.utils.prune.global_unstructured` takes them.

    Args:
        model: The module.
        scores: Parameter name to scores.

    Returns:
        (module, name in it) to scores.

    Raises:
        MismatchError: The scores are those of another model.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, score in scores.items():
        if name not in shapes or score.shape != shapes[name]:
            raise MismatchError(f"The model has no parameter '{name}' of shape {tuple(score.shape)}, which has scores.")
    return {(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]): score for name, score in scores.items()}


@public
def to_torch_prune(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model that carries masks as `torch.nn.utils.prune` does: it can be trained, saved and pruned on.

    Args:
        model: Any module; not changed.
        masks: Parameter name to mask.

    Returns:
        The copy, with ``…_orig`` parameters and ``…_mask`` buffers.

    Raises:
        MismatchError: The masks are those of another model.
        InputError: A mask holds other values than 0 and 1.
    """
    made = with_state(model, model.state_dict())
    checked = checked_masks(masks, {name: parameter.shape for name, parameter in made.named_parameters()})
    for (module, name), mask in importance_scores(made, checked).items():
        torch_prune.custom_from_mask(module, name, mask.clone())
    return made


@public
def from_torch_prune(model: nn.Module) -> dict[str, Tensor]:
    """Read the masks that `torch.nn.utils.prune` left on a model.

    Args:
        model: A module pruned by it.

    Returns:
        Name of the pruned tensor (``conv.weight``) to bool mask.

    Raises:
        InputError: It carries none.
    """
    masks = dict(_masks_of(model))
    if not masks:
        raise InputError("The model carries no masks of torch.nn.utils.prune.")
    return masks


def _masks_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = {name for name, _ in model.named_parameters()}
    for name, buffer in model.named_buffers():
        parameter = name.removesuffix("_mask")
        if name.endswith("_mask") and f"{parameter}_orig" in names:
            yield parameter, buffer.bool()
