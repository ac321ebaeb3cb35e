"""The second network of a comparison: its parameters under the names of the first, or the reason why they do not fit.

Two models are alike when their lowered networks are: the same neurons, joined by the same edges, with weights that follow from
the parameters in the same way and constants of the same values. In-place operators, dropout, identity modules, wrappers, the
order of registration and a pass through `torch.nn.utils.prune` make no difference.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pathlift.edges.unit import Identity
from pathlift.errors import InputError, MismatchError, name_differences
from pathlift.network import Apply, Constant, Expression, Leaf, Network, Node, StateTensor, Term, evaluate, substitute
from pathlift.reading import capture, program_of
from pathlift.reading.fingerprint import fingerprint
from pathlift.reading.live import verify
from pathlift.reading.wrappers import BESIDE, bare, names_of

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
        MismatchError: A name, a shape, a constant or the graph differs, or nothing is named as in the first network.
        InputError: ``other`` is neither a module nor a network nor a mapping.
    """
    if isinstance(other, nn.Module):
        if network.program and program_of(other) == network.program:
            return fitted(network, named_tensors(other))
        check_names(network, translated(network, named_tensors(other)), strict=True)
        other = _captured_alike(network, other)
    if isinstance(other, Network):
        verify(other)
        given = translated(network, other.named(other.state))
        check_names(network, given, strict=True)
        state = fitted(network, given)
        _check_graph(network, other, state)
        return state
    if not isinstance(other, Mapping):
        raise InputError(f"other must be a module, a captured Network or a state-dict, found {type(other).__name__}.")
    return fitted(network, other)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module under all their names.

    Args:
        model: The module.

    Returns:
        Name to tensor.
    """
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def all_names(network: Network) -> list[str]:
    """Return every name that a network has for a parameter or buffer."""
    return [*network.state, *network.aliases, *network.views]


def translated(network: Network, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names of a network: wrappers, and masks of `torch.nn.utils.prune`, make no difference.

    Args:
        network: The network.
        given: Name to tensor.

    Returns:
        The same tensors; those that fit nothing under their own names.
    """
    names = set(all_names(network))
    masked = _masked(names)
    pairs = {name: (given[f"{name}_orig"], given[f"{name}_mask"]) for name in _masked(given)}
    entries: dict[str, Any] = {name: own for name, own in given.items() if name[:-5] not in pairs} | pairs
    found: dict[str, Tensor] = {}
    for name, own in names_of([*(name for name in names if name[:-5] not in masked), *masked], entries).items():
        original, mask = own if isinstance(own, tuple) else (own, None)
        if mask is not None and name in names:
            found[name] = original * mask
        elif mask is not None or name in masked:
            found[f"{name}_orig"] = original
            found[f"{name}_mask"] = torch.ones_like(original) if mask is None else mask
        else:
            found[name] = original
    return found


def _masked(names: Collection[str]) -> set[str]:
    """Return the names of weights that `torch.nn.utils.prune` keeps as ``name_orig`` and ``name_mask``."""
    ends = {name[:-5] for name in names if name.endswith("_orig")}
    return {name for name in ends if f"{name}_mask" in names}


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
    given = translated(network, given)
    check_names(network, given)
    state: dict[str, Tensor] = {}
    for name, own in network.state.items():
        places = (name, *(alias for alias, target in network.aliases.items() if target == name))
        place = next((place for place in places if place in given), None)
        state[name] = own if place is None else given[place].detach().to(network.host)
    for name, value in network.baked.items():
        if not torch.equal(state[name].cpu(), value.cpu()):
            raise MismatchError(f"The values of the buffer '{name}' are part of the graph and differ between the networks.")
    return state


def given_weights(network: Network, given: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a network that a module or a mapping gives, as they are: gradients go through them.

    Args:
        network: The network.
        given: A module with all of its parameters, alone or inside another; or some of them by name.

    Returns:
        Canonical name to tensor.

    Raises:
        MismatchError: None is named, or some that the network has not, or shapes differ.
        InputError: ``given`` is neither.
    """
    if isinstance(given, nn.Module):
        found = translated(network, named_tensors(given))
        known = set(all_names(network))
        found = {name: tensor for name, tensor in found.items() if name in known}
        check_names(network, found, strict=True)
    elif isinstance(given, Mapping):
        found = translated(network, given)
        check_names(network, {**network.named(dict(network.state)), **found} if not _names_none(network, found) else found)
    else:
        raise InputError(f"Weights are given as a module or a mapping from names to tensors, found {type(given).__name__}.")
    return {network.aliases.get(name, name): tensor for name, tensor in found.items() if name not in network.views}


def _names_none(network: Network, found: Mapping[str, Tensor]) -> bool:
    return bool(network.state) and set(all_names(network)).isdisjoint(found)


def check_names(network: Network, found: Mapping[str, Tensor], *, strict: bool = False) -> None:
    """Make sure that tensors have the names and shapes of a network's parameters and buffers.

    Args:
        network: The network.
        found: The tensors by name; on the meta device only their shapes are compared.
        strict: No name may be missing; otherwise those that no weight needs may.

    Raises:
        MismatchError: They have not.
    """
    aliases: dict[str, list[str]] = {}
    for alias, name in network.aliases.items():
        aliases.setdefault(name, []).append(alias)
    needed = {name for leaf in network.leaves for name in leaf.requires} | set(network.baked)
    wanted = [name for name in network.state if (strict or name in needed) and _kept(network, name, aliases)]
    wanted = [name for name in wanted if name in needed or name.rpartition(".")[2] not in BESIDE]
    missing = [name for name in wanted if name not in found and not any(alias in found for alias in aliases.get(name, ()))]
    known = {*all_names(network), *network.saved}
    surplus = [name for name in found if name not in known and bare(name).rpartition(".")[2] not in BESIDE]
    if missing or surplus or _names_none(network, found):
        difference = name_differences(missing, surplus, "the first network") or "it names none of them"
        raise MismatchError(f"The second network does not have the parameters of the first. {difference}.")
    for name, tensor in found.items():
        if name not in network.state and name not in network.aliases:
            continue
        expected = network.state[network.aliases.get(name, name)]
        if not isinstance(tensor, Tensor):
            raise MismatchError(f"'{name}' of the second network is a {type(tensor).__name__}, not a tensor.")
        if tensor.shape != expected.shape:
            raise MismatchError(
                f"'{name}' has shape {tuple(expected.shape)} in the first network and {tuple(tensor.shape)} in the second."
            )
    _check_shared(network, found)


def _kept(network: Network, name: str, aliases: Mapping[str, list[str]]) -> bool:
    """Whether a state-dict of the model has a tensor."""
    return any(own in network.saved for own in (name, *aliases.get(name, ())))


def _check_shared(network: Network, found: Mapping[str, Tensor]) -> None:
    """Make sure that tensors which are one in the network agree."""
    for alias, name in network.aliases.items():
        if alias in found and name in found and not _equal(found[alias], found[name]):
            raise MismatchError(f"'{alias}' and '{name}' are one tensor in the first network and differ in the second.")
    for view, expression in network.views.items():
        (name,) = _names_in(expression)
        if view in found and name in found and not found[name].is_meta:
            held = evaluate(expression, {name: found[name]})
            if held.shape != found[view].shape or not _equal(held, found[view]):
                raise MismatchError(f"'{view}' is a part of '{name}' in the first network and differs from it in the second.")


def _equal(one: Tensor, two: Tensor) -> bool:
    if one is two or one.is_meta or two.is_meta:
        return True
    return torch.equal(one.detach().cpu(), two.detach().to("cpu", one.dtype))


def _names_in(expression: Any) -> set[str]:
    if isinstance(expression, StateTensor):
        return {expression.name}
    if isinstance(expression, Apply):
        return _names_in([*expression.args, *expression.kwargs.values()])
    if isinstance(expression, (list, tuple)):
        return {name for item in expression for name in _names_in(item)}
    return set()


def _captured_alike(network: Network, other: nn.Module) -> Network:
    """Capture the second model on inputs of the same shapes, where and as it keeps its own parameters."""
    examples = tuple(torch.zeros(shape, dtype=dtype, device=network.host) for shape, dtype in network.examples)
    like = next((p for p in other.parameters() if p.dtype.is_floating_point), None)
    if like is not None:
        examples = tuple(example.to(like.device, like.dtype) for example in examples)
    return capture(other, examples)


# ---- the graphs


def _check_graph(network: Network, other: Network, state: Mapping[str, Tensor]) -> None:
    """Make sure that a second network is the same function of its parameters.

    Args:
        network: The first network.
        other: The second.
        state: The parameters of the second under the names of the first.

    Raises:
        MismatchError: It is not.
    """
    names = {own: name for name, own in names_of(all_names(network), {own: own for own in all_names(other)}).items()}
    names = {own: network.aliases.get(name, name) for own, name in names.items()}
    if len(network.outputs) != len(other.outputs):
        raise MismatchError(f"The first network has {len(network.outputs)} outputs, the second {len(other.outputs)}.")
    one_input, two_input = ([node.name for node in own.nodes if node.kind == "input"] for own in (network, other))
    pairs = dict(zip(one_input, two_input, strict=True)) if len(one_input) == len(two_input) else {}
    stack = list(zip(network.outputs, other.outputs, strict=True))
    leaves: dict[tuple[Leaf, Leaf], Node] = {}
    done: set[tuple[str, str]] = set()
    while stack:
        first, second = (_settled(own, name) for own, name in zip((network, other), stack.pop(), strict=True))
        if (first.name, second.name) in done:
            continue
        done.add((first.name, second.name))
        if first.kind == "input" or second.kind == "input":
            if pairs.get(first.name) != second.name:
                raise MismatchError(_different(first, second))
            continue
        for one, two in _leaf_pairs(first, second):
            leaves.setdefault((one, two), first)
        stack.extend((one.source, two.source) for one, two in zip(first.terms, second.terms, strict=True))
    memos: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})
    for (one, two), node in leaves.items():
        if not _same_weight(one, two, names, (state, other.state), memos):
            what = f"how the weight '{one.label}' is computed" if one.requires or two.requires else "a constant"
            raise MismatchError(
                f"The two models have the same parameters, but {what} differs in {_place(node)}. Networks are compared that "
                "differ in their parameters only."
            )


def _settled(network: Network, name: str) -> Node:
    """Return a node, or the first one below it that is not merely handed on."""
    node = network.node[name]
    while (
        len(node.terms) == 1
        and not node.starts
        and node.nonlinearity is None
        and node.concat is None
        and node.terms[0].weight is None
        and type(node.terms[0].edges) is Identity
        and network.node[node.terms[0].source].shape == node.shape
    ):
        node = network.node[node.terms[0].source]
    return node


def _leaf_pairs(first: Node, second: Node) -> Iterable[tuple[Leaf, Leaf]]:
    """Yield the weights of two layers that correspond; refuse layers that are not alike."""
    if _shape_of(first) != _shape_of(second):
        raise MismatchError(_different(first, second))
    one, two = _weights(first), _weights(second)
    return zip(one, two, strict=True)


def _shape_of(node: Node) -> tuple[object, ...]:
    """Return all of a layer but its weights and what it reads."""
    terms = tuple((fingerprint(term.edges), term.weight is None) for term in node.terms)
    kind = node.nonlinearity
    rest = {key: _without_weight(own) for key, own in vars(kind).items()} if kind is not None else {}
    return (node.shape, terms, tuple(start.view for start in node.starts), node.concat, type(kind), tuple(rest.items()))


def _without_weight(value: object) -> object:
    return value.view if hasattr(value, "view") else value


def _weights(node: Node) -> list[Leaf]:
    ends = [own for own in vars(node.nonlinearity).values() if hasattr(own, "weight")] if node.nonlinearity is not None else []
    terms: list[Term] = [term for term in node.terms if term.weight is not None]
    return [own.weight for own in (*terms, *node.starts, *ends)]


def _same_weight(
    one: Leaf,
    two: Leaf,
    names: Mapping[str, str],
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    memos: tuple[dict[Any, Any], dict[Any, Any]],
) -> bool:
    """Whether two weights follow from the parameters alike, or at least have the same values."""
    if one.shape != two.shape:
        return False
    if one.scalar is not None and two.scalar is not None:
        return one.scalar == two.scalar
    if _written(one.expression, {}) == _written(two.expression, names):
        return True
    first, second = (
        torch.as_tensor(evaluate(leaf.expression, state, memo) if leaf.scalar is None else leaf.scalar)
        for leaf, state, memo in zip((one, two), states, memos, strict=True)
    )
    if first.is_meta or second.is_meta:
        return False
    second = second.detach().to(first.device)
    return bool((first == second).all())


def _written(expression: Expression, names: Mapping[str, str]) -> str:
    def write(own: Expression) -> Any:
        if isinstance(own, StateTensor):
            return ("parameter", names.get(own.name, own.name))
        if isinstance(own, Constant):
            return ("constant", own.value)
        assert isinstance(own, Apply)
        return (own.function, substitute(own.args, write), substitute(dict(own.kwargs), write))

    return fingerprint(write(expression))


def _different(first: Node, second: Node) -> str:
    return (
        "The two models have the same parameters but different graphs (another operator, order or constant): "
        f"{_place(first)} in the first, {_place(second)} in the second. Networks are compared that differ in their parameters "
        "only."
    )


def _place(node: Node) -> str:
    module = f" of module '{node.origin.module}'" if node.origin.module else ""
    line = f" ({node.origin.where})" if node.origin.where else ""
    return f"{node.origin.op}{module}{line}"
