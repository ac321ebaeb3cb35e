"""What networks and their weights may be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pathlift.arguments import declare
from pathlift.arguments.kinds import anything, either, file, module_with_values, named, plain_tensor, refusal, shown, text
from pathlift.errors import InputError, MismatchError, nearest
from pathlift.graph.network import CompactNetwork, LazyState, Network
from pathlift.storage.checkpoints import Checkpoint


def captured(name: str, value: Any) -> Network:
    """A network with one entry per neuron."""
    if not isinstance(value, Network):
        raise refusal(name, "a captured Network (network = capture(model, inputs) once, then give the network)", value)
    if isinstance(value, CompactNetwork):
        raise InputError(f"{name} is the compact form of a Network, which only passes over ones may read. Give the Network.")
    return value


def state(name: str, value: Any) -> Any:
    """Tensors by name. Entries that are no tensors are for the function: a state-dict may hold some beside the weights."""
    what = "a mapping from names to tensors, such as a state-dict"
    if not isinstance(value, Mapping):
        raise refusal(name, what, value)
    if isinstance(value, (LazyState, Checkpoint)):  # read when they are needed, and checked by then
        return value
    for key, tensor in value.items():
        inside = f"{name}['{named(name, what, key)}']"
        if isinstance(tensor, Tensor):
            plain_tensor(inside, tensor)
    return value


def check_names(network: Network, given: Mapping[str, Any]) -> None:
    """Make sure that what a method of a network is given has the network's names and shapes.

    Args:
        network: The network.
        given: The arguments of the call, by name.

    Raises:
        InputError: A ``name`` is none of the network's.
        MismatchError: A tensor of a ``state`` is missing, or has another shape.
    """
    name, tensors = given.get("name"), given.get("state")
    if name is not None and name not in network.state:
        raise InputError(f"The network has no parameter or buffer '{name[:100]}'.{nearest(name[:100], network.state)}")
    if isinstance(tensors, Mapping) and not isinstance(tensors, (LazyState, Checkpoint)):
        for key, held in network.state.items():
            tensor = tensors.get(key)
            if not (isinstance(tensor, Tensor) and _can_stand_for(tensor, held)):
                what = "nothing" if key not in tensors else shown(tensor)
                raise MismatchError(f"'{key}' must be {shown(held)}, found {what}.")


def _can_stand_for(tensor: Tensor, held: Tensor) -> bool:
    """Whether a tensor can stand for one of a network; where whole numbers count batches, averaged ones may stand."""
    return tensor.shape == held.shape and (tensor.is_floating_point() or not held.is_floating_point())


def _of_a_network(given: Mapping[str, Any]) -> None:
    if isinstance(given.get("self"), Network):
        check_names(given["self"], given)


other = either(
    "a module, a captured Network, a state-dict or a file of weights",
    (nn.Module, module_with_values), (Network, captured), (Mapping, state), ((str, Path), file),
)  # fmt: skip
weights = either(
    "a module, a mapping from names to tensors or a file of weights",
    (nn.Module, module_with_values), (Mapping, state), ((str, Path), file),
)  # fmt: skip

declare(__name__, {
    "model": either("a torch.nn.Module, or a captured Network", (nn.Module, anything), (Network, captured)),
    "network": captured,
    "other": other,
    "state": state,
    "Network.kind_of.name": text("the name of a parameter or buffer"),
}, check=_of_a_network)  # fmt: skip
