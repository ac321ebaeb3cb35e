"""The second network of a comparison: its parameters under the names of the first, or the reason why they do not fit.

Two models are alike when their lowered networks are: the same neurons, joined by the same edges, with weights that follow from
the parameters in the same way and constants of the same values. In-place operators, dropout, identity modules, wrappers, the
order of registration and a pass through `torch.nn.utils.prune` make no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pathlift.arguments.kinds import from_array
from pathlift.errors import MismatchError, name_differences
from pathlift.graph.expressions import FunctionCall, StateTensor, evaluate
from pathlift.graph.network import Network
from pathlift.reading import capture, program_of, verify
from pathlift.reading.alike import check_graph
from pathlift.reading.live import LiveState
from pathlift.storage.checkpoints import Checkpoint
from pathlift.storage.names import BESIDE, Fit, bare, fit
from pathlift.storage.onnx import OnnxModule

Other: TypeAlias = nn.Module | Network | Mapping[str, Tensor] | Path | str
"""The second network: a module or captured network of the same architecture, a state-dict, or a file or folder of weights."""


def other_state(network: Network, other: Other) -> dict[str, Tensor]:
    """Return the parameters and buffers of a second network under the names of the first.

    Args:
        network: The first network.
        other: The second, see `Other`.

    Returns:
        Canonical name to tensor, on the first network's device; on the CPU when that is the meta device.

    Raises:
        MismatchError: A name, a shape, a constant or the graph differs, or nothing is named as in the first network.
        InputError: A file cannot be read.
    """
    if isinstance(other, (str, Path)):
        other = Checkpoint(other, network.host)
    if isinstance(other, OnnxModule):
        other = _in_floating_point(network, other)
    if isinstance(other, nn.Module):
        if network.graph.program and program_of(other) == network.graph.program:
            return fitted(network, named_tensors(other))
        check_tensors(network, translated(network, named_tensors(other)), strict=True)
        other = _captured_alike(network, other)
    if isinstance(other, Network):
        verify(other)
        given = translated(network, other.named(other.state))
        check_tensors(network, given, strict=True)
        state = fitted(network, given)
        check_graph(network, other, state)
        return state
    return fitted(network, other)


def _in_floating_point(network: Network, other: OnnxModule) -> OnnxModule:
    """Return a program whose whole numbers and scales have become the weights of the network."""
    first = network.state.root if isinstance(network.state, LiveState) else None
    if isinstance(first, OnnxModule) and first.with_weights(named_tensors(other).keys()) is not first:
        raise MismatchError(
            "The first network has whole numbers and scales where the second has weights: give the second one first."
        )
    return other.with_weights(network.names)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module under all their names.

    Args:
        model: The module.

    Returns:
        Name to tensor.
    """
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def translated(network: Network, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names of a network: wrappers, pruning masks and weight norm make no difference, see `names.fit`.

    Args:
        network: The network.
        given: Name to tensor.

    Returns:
        The same tensors, or what follows from them; those that fit nothing under their own names.
    """
    return {name: recipe(given) for name, recipe in fit_to(network, given).recipes.items()}


def fit_to(network: Network, given: Mapping[str, Tensor]) -> Fit:
    """Tell from which of given tensors those of a network follow; nothing is computed.

    Args:
        network: The network.
        given: Name to tensor, or a checkpoint.

    Returns:
        See `names.fit`.
    """
    specs = given.specs if isinstance(given, Checkpoint) else given
    model = network.state.root if isinstance(network.state, LiveState) else None
    return fit(network.names, specs, lambda name: network.state.get(network.aliases.get(name, name)), model)


def fitted(network: Network, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return given tensors as a complete state of a network.

    Args:
        network: The network.
        given: Parameters and buffers by name; those that no weight needs may be missing.

    Returns:
        Canonical name to tensor, on the network's device (the CPU for the meta device).

    Raises:
        MismatchError: Names or shapes differ, tensors that are one in the network differ, or a buffer that is part of the
            graph has other values.
    """
    fitting = fit_to(network, given)
    fitting.tell(given.path if isinstance(given, Checkpoint) else "the second network")
    given = {name: recipe(given) for name, recipe in fitting.recipes.items()}
    check_tensors(network, given)
    state: dict[str, Tensor] = {}
    for name, weight in network.state.items():
        names = (name, *(alias for alias, target in network.aliases.items() if target == name))
        given_name = next((alias for alias in names if alias in given), None)
        state[name] = weight if given_name is None else _as_weight(given[given_name].detach().to(network.host), weight)
    for name, value in network.graph.baked.items():
        if not torch.equal(state[name].cpu(), value.cpu()):
            raise MismatchError(f"The values of the buffer '{name}' are part of the graph and differ between the networks.")
    return state


def _as_weight(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return whole numbers as what they are to the model: it loads them into floating-point weights."""
    return tensor.to(weight.dtype) if weight.is_floating_point() and not tensor.is_floating_point() else tensor


def given_weights(network: Network, given: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a network that a module or a mapping gives, as they are: gradients go through them.

    Args:
        network: The network.
        given: A module with all of its parameters, alone or inside another; or some of them by name.

    Returns:
        Canonical name to tensor.

    Raises:
        MismatchError: None is named, or some that the network has not, or shapes differ.
    """
    if isinstance(given, nn.Module):
        tensors = translated(network, named_tensors(given))
        known = set(network.names)
        tensors = {name: tensor for name, tensor in tensors.items() if name in known}
        check_tensors(network, tensors, strict=True)
    else:
        tensors = translated(network, given)
        check_tensors(
            network, {**network.named(dict(network.state)), **tensors} if not _names_none(network, tensors) else tensors
        )
    elsewhere = [name for name, tensor in tensors.items() if tensor.device.type != network.host.type]
    if elsewhere:
        device = tensors[elsewhere[0]].device
        raise MismatchError(f"'{elsewhere[0]}' is on {device}, the network on {network.host}. Move one to the other's device.")
    return {network.aliases.get(name, name): tensor for name, tensor in tensors.items() if name not in network.graph.views}


def _names_none(network: Network, tensors: Mapping[str, Tensor]) -> bool:
    return bool(network.state) and set(network.names).isdisjoint(tensors)


def check_tensors(network: Network, tensors: Mapping[str, Tensor], *, strict: bool = False) -> None:
    """Make sure that tensors have the names and shapes of a network's parameters and buffers.

    Args:
        network: The network.
        tensors: By name; on the meta device only their shapes are compared.
        strict: No name may be missing; otherwise those that no weight needs may.

    Raises:
        MismatchError: They have not.
    """
    aliases: dict[str, list[str]] = {}
    for alias, name in network.aliases.items():
        aliases.setdefault(name, []).append(alias)
    needed = {name for weight in network.weights for name in weight.requires} | set(network.graph.baked)
    wanted = [name for name in network.state if (strict or name in needed) and _is_saved(network, name, aliases)]
    wanted = [name for name in wanted if name in needed or name.rpartition(".")[2] not in BESIDE]
    missing = [name for name in wanted if name not in tensors and not any(alias in tensors for alias in aliases.get(name, ()))]
    known = {*network.names, *network.graph.saved}
    surplus = [name for name in tensors if name not in known and bare(name).rpartition(".")[2] not in BESIDE]
    if missing or surplus or _names_none(network, tensors):
        difference = name_differences(missing, surplus, "the first network") or "it names none of them"
        raise MismatchError(f"The second network does not have the parameters of the first. {difference}.")
    for name, tensor in tensors.items():
        if name not in network.state and name not in network.aliases:
            continue
        expected = network.state[network.aliases.get(name, name)]
        if not isinstance(tensor, Tensor):
            hint = from_array("tensor", tensor)
            raise MismatchError(f"'{name}' of the second network is a {type(tensor).__name__}, not a tensor.{hint}")
        if tensor.shape != expected.shape:
            raise MismatchError(
                f"'{name}' has shape {tuple(expected.shape)} in the first network and {tuple(tensor.shape)} in the second."
            )
    _check_shared(network, tensors)


def _is_saved(network: Network, name: str, aliases: Mapping[str, list[str]]) -> bool:
    """Whether a state-dict of the model has a tensor."""
    return any(spelling in network.graph.saved for spelling in (name, *aliases.get(name, ())))


def _check_shared(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Make sure that tensors which are one in the network agree."""
    for alias, name in network.aliases.items():
        if alias in tensors and name in tensors and not _equal(tensors[alias], tensors[name]):
            raise MismatchError(f"'{alias}' and '{name}' are one tensor in the first network and differ in the second.")
    for view, expression in network.graph.views.items():
        (name,) = _names_in(expression)
        if view in tensors and name in tensors and not tensors[name].is_meta:
            held = evaluate(expression, {name: tensors[name]})
            if held.shape != tensors[view].shape or not _equal(held, tensors[view]):
                raise MismatchError(f"'{view}' is a part of '{name}' in the first network and differs from it in the second.")


def _equal(first: Tensor, second: Tensor) -> bool:
    if first is second or first.is_meta or second.is_meta:
        return True
    return torch.equal(first.detach().cpu(), second.detach().to("cpu", first.dtype))


def _names_in(expression: Any) -> set[str]:
    if isinstance(expression, StateTensor):
        return {expression.name}
    if isinstance(expression, FunctionCall):
        return _names_in([*expression.args, *expression.kwargs.values()])
    if isinstance(expression, (list, tuple)):
        return {name for item in expression for name in _names_in(item)}
    return set()


def _captured_alike(network: Network, other: nn.Module) -> Network:
    """Capture the second model on inputs of the same shapes, where and as it keeps its own parameters."""
    examples = tuple(torch.zeros(shape, dtype=dtype, device=network.host) for shape, dtype in network.graph.examples)
    like = next((p for p in other.parameters() if p.dtype.is_floating_point), None)
    if like is not None:
        examples = tuple(example.to(like.device, like.dtype) for example in examples)
    return capture(other, network.graph.form.filled(examples), network.graph.until)
