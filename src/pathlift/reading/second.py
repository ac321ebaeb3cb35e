"""The second network of a comparison: its parameters under the names of the first, or the reason why they do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pathlift.errors import InputError, MismatchError, name_differences
from pathlift.network import Network
from pathlift.reading import capture

Other: TypeAlias = nn.Module | Network | Mapping[str, Tensor]
"""The second network: a module or captured network of the same architecture, or a state-dict."""


def other_state(network: Network, other: Other) -> dict[str, Tensor]:
    """Return the parameters and buffers of a second network under the names of the first.

    Args:
        network: The first network.
        other: The second, see `Other`.

    Returns:
        Canonical name to tensor, on the first network's device; on the CPU when that is the meta device.

    Raises:
        MismatchError: A name, a shape or the graph differs.
        InputError: ``other`` is neither a module nor a network nor a mapping.
    """
    if isinstance(other, nn.Module):
        examples = tuple(torch.zeros(shape, dtype=dtype, device=network.host) for shape, dtype in network.examples)
        other = _captured_alike(network, other, examples)
    if isinstance(other, Network):
        check_names(network, {**other.state, **{a: other.state[n] for a, n in other.aliases.items()}}, strict=True)
        if other.fingerprint != network.fingerprint:
            raise MismatchError(
                "The two models have the same parameters but different graphs (another operator, order or constant). "
                "path_metric compares two parameter vectors of one architecture."
            )
        found: Mapping[str, Tensor] = other.state
    elif isinstance(other, Mapping):
        check_names(network, other, strict=False)
        found = other
    else:
        raise InputError(f"other must be a module, a captured Network or a state-dict, found {type(other).__name__}.")
    state = {name: found[name].detach().to(network.host) if name in found else tensor for name, tensor in network.state.items()}
    for name in network.baked:
        if not torch.equal(state[name], network.state[name]):
            raise MismatchError(f"The buffer '{name}' is part of the graph (an index) and differs between the networks.")
    return state


def _captured_alike(network: Network, other: nn.Module, examples: tuple[Tensor, ...]) -> Network:
    """Capture the second model; a model that does not even have the same parameters is told so first."""
    own = getattr(other, "_orig_mod", other)
    named = dict(own.named_parameters(remove_duplicate=False)) | dict(own.named_buffers(remove_duplicate=False))
    check_names(network, named, strict=True)
    like = next((p for p in own.parameters() if p.dtype.is_floating_point), None)
    if like is not None:
        examples = tuple(example.to(like.device, like.dtype) for example in examples)
    return capture(other, examples)


def check_names(network: Network, found: Mapping[str, Tensor], *, strict: bool = False) -> None:
    """Make sure that tensors have the names and shapes of a network's parameters and buffers.

    Args:
        network: The network.
        found: The tensors by name; on the meta device only their shapes are compared.
        strict: No name may be missing; otherwise those that no weight needs may.

    Raises:
        MismatchError: They have not.
    """
    expected = {**network.state, **{alias: network.state[name] for alias, name in network.aliases.items()}}
    needed = ({name for leaf in network.leaves for name in leaf.requires} | network.baked) & network.saved
    missing = [name for name in expected if name not in found and (strict or name in needed)]
    surplus = [name for name in found if name not in expected and name not in network.saved]
    if missing or surplus:
        difference = name_differences(missing, surplus, "the first network")
        raise MismatchError(f"The second network does not have the parameters of the first. {difference}.")
    for name, tensor in expected.items():
        if name not in found:
            continue
        if not isinstance(found[name], Tensor):
            raise MismatchError(f"'{name}' of the second network is a {type(found[name]).__name__}, not a tensor.")
        if found[name].shape != tensor.shape:
            raise MismatchError(
                f"'{name}' has shape {tuple(tensor.shape)} in the first network and {tuple(found[name].shape)} in the second."
            )
    for alias, name in network.aliases.items():
        if alias in found and name in found and not torch.equal(found[alias].cpu(), found[name].cpu()):
            raise MismatchError(f"'{alias}' and '{name}' are one tensor in the first network and differ in the second.")
