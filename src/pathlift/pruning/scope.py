"""Which parameters may be pruned: the weights of convolutions and linear layers, or what a user names (mathematics §6).

A parameter is eligible when each of its elements is one weight or bias of the theory, or is moved there by views and
slices. Setting such an element to 0 lets paths vanish and changes no other, so that (13) and Lemma 4.2 hold. It is not so
for a batch norm: its shift β − μ·s has no zero where β or the scale has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pathlift.edges.contraction import Contraction, Dense
from pathlift.edges.convolution import Convolution
from pathlift.errors import InputError
from pathlift.graph.expressions import FunctionCall, StateTensor
from pathlift.graph.layers import Connection, WeightTensor
from pathlift.graph.network import Network
from pathlift.graph.origins import is_moved

Scope: TypeAlias = "str | type[nn.Module] | nn.Module | Sequence[str | type[nn.Module] | nn.Module] | None"
"""Name patterns (``"layer4.*"``; ``"!fc.*"`` excludes), module types, and modules of the model with all that they hold; None:
weights of convolutions, linear layers and matrix products."""


def eligible(network: Network) -> list[str]:
    """Return the names of all parameters whose elements can be set to 0 one by one, in the model's order.

    Args:
        network: The network.

    Returns:
        Names; batch norms and parameters of derived weights are not among them.
    """
    used = {name for weight in network.weights for name in weight.requires}
    elsewhere = {name for weight in network.weights if not _one_by_one(network, weight) for name in weight.requires}
    return [name for name in network.parameters if name in used and name not in elsewhere]


def _one_by_one(network: Network, weight: WeightTensor) -> bool:
    """Whether each element of a weight vanishes with one element of a parameter; one that is divided by does not."""
    if isinstance(weight.expression, FunctionCall) and weight.expression.function is torch.reciprocal:
        return False
    return isinstance(weight.expression, StateTensor) or is_moved(network, weight)


def _mixes(connection: Connection) -> bool:
    """Whether edges are those of a convolution, a linear layer or a matrix product."""
    if isinstance(connection.edges, Contraction):
        operands, result = connection.edges.equation.split("->")
        return any(letter not in result for letter in operands.partition(",")[0])
    return isinstance(connection.edges, (Convolution, Dense))


def prunable(network: Network) -> list[str]:
    """Return the names of the weights of convolutions, linear layers and matrix products, in the model's order.

    Args:
        network: The network.

    Returns:
        Names.
    """
    used = {
        name
        for layer in network.layers
        for connection in layer.connections
        if (weight := connection.weight) is not None and _mixes(connection)
        for name in weight.requires
    }
    return [name for name in eligible(network) if name in used]


def scoped(network: Network, scope: Scope, model: nn.Module | None = None) -> list[str]:
    """Return the names of the parameters that a scope chooses.

    Args:
        network: The network.
        scope: See `Scope`.
        model: The module it was captured from, which is asked for its parts and their types.

    Returns:
        Names in the model's order, at least one.

    Raises:
        InputError: An item matches nothing that can be pruned, or types or modules are given without the model.
    """
    default = prunable(network)
    if scope is None:
        refuse_derived(network)
        return _some(default, "no convolution or linear layer with a plain weight")
    wanted: list[object] = [scope] if isinstance(scope, (str, type, nn.Module)) else list(scope)
    included = [item for item in wanted if not (isinstance(item, str) and item.startswith("!"))]
    names = eligible(network)
    chosen: set[str] = set() if included else set(default)
    for item in included:
        matched = _chosen(item, network, names, default, model)
        if not matched:
            raise InputError(f"Nothing that can be pruned matches {_said(item)}. {_hint(network, item, names)}")
        chosen |= matched
    for item in wanted:
        if isinstance(item, str) and item.startswith("!"):
            chosen -= _matching(item[1:], names)
    return _some([name for name in names if name in chosen], f"nothing in the scope {', '.join(map(_said, wanted))}")


def _chosen(item: object, network: Network, names: Sequence[str], default: Sequence[str], model: nn.Module | None) -> set[str]:
    if isinstance(item, str):
        return _matching(item, names)
    if isinstance(item, nn.Module):
        return _inside(item, network, names, default, model)
    assert isinstance(item, type)
    return _of_type(item, default, model)


def _said(item: object) -> str:
    return f"the module {type(item).__name__}" if isinstance(item, nn.Module) else repr(item)


def _matching(pattern: str, names: Sequence[str]) -> set[str]:
    return {name for name in names if fnmatchcase(name, pattern)}


def _of_type(kind: type[nn.Module], names: Sequence[str], model: nn.Module | None) -> set[str]:
    if model is None:
        raise InputError("A scope of module types needs the module itself: pass the model and its inputs, not a Network.")
    owners = {path for path, module in model.named_modules() if isinstance(module, kind)}
    return {name for name in names if name.rpartition(".")[0] in owners}


def _inside(
    part: nn.Module, network: Network, names: Sequence[str], default: Sequence[str], model: nn.Module | None
) -> set[str]:
    """Return the weights that a module of the model and its children hold: all that can be pruned where there are none."""
    if model is None:
        raise InputError("A scope of modules needs the module itself: pass the model and its inputs, not a Network.")
    if all(part is not child for child in model.modules()):
        raise InputError(f"The scope holds a module ({type(part).__name__}) that is no part of the model.")
    memory = {(tensor.data_ptr(), tensor.shape) for tensor in part.parameters() if tensor.numel() and not tensor.is_meta}
    held = {name for name in names if (network.state[name].data_ptr(), network.state[name].shape) in memory}
    return held & set(default) or held


def _hint(network: Network, item: object, names: Sequence[str]) -> str:
    if isinstance(item, str) and any(fnmatchcase(name, item) for name in network.parameters):
        return (
            "Its parameters belong to a batch norm or a derived weight, whose elements are no weights of the theory: setting "
            "one to 0 does not remove paths."
        )
    return f"There are: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"


def refuse_derived(network: Network) -> None:
    """Name a weight that is computed from others, and can be neither masked nor rounded, rather than leave it out in silence.

    Args:
        network: The network.

    Raises:
        InputError: There is one.
    """
    for connection in (connection for layer in network.layers for connection in layer.connections if _mixes(connection)):
        weight = connection.weight
        if weight is not None and not _one_by_one(network, weight) and weight.requires & set(network.parameters):
            raise InputError(
                f"'{weight.label}' is computed from {', '.join(sorted(weight.requires))} and can be "
                "neither masked nor rounded. Make it a plain "
                "parameter first (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)."
            )


def _some(names: list[str], nothing: str) -> list[str]:
    if not names:
        raise InputError(f"There is nothing to prune: {nothing}.")
    return names


def checked_scores(scores: Mapping[str, Tensor], names: Sequence[str], network: Network) -> dict[str, Tensor]:
    """Check that scores fit the parameters that are to be pruned.

    Args:
        scores: Name to score.
        names: The parameters in scope.
        network: The network.

    Returns:
        The scores of these parameters, flat order and device unchanged.

    Raises:
        InputError: A score is missing, has another shape or holds NaN.
    """
    if not isinstance(scores, Mapping):
        raise InputError(f"A criterion gives a mapping of parameter names to scores, found {type(scores).__name__}.")
    checked = {}
    for name in names:
        if name not in scores:
            raise InputError(f"The criterion has no score for '{name}'. It has: {', '.join(map(str, list(scores)[:5]))} …")
        score, shape = scores[name], tuple(network.state[name].shape)
        if not isinstance(score, Tensor) or score.dtype.is_complex:
            raise InputError(f"The score of '{name}' must be a tensor of real numbers, found {_kind(score)}.")
        if tuple(score.shape) != shape:
            raise InputError(f"The score of '{name}' has shape {tuple(score.shape)}; the parameter has {shape}.")
        if bool(score.sum().isnan()) and bool(score.isnan().any()):  # a sum costs less
            raise InputError(f"The score of '{name}' holds NaN: the criterion does not work for this network and these data.")
        wide = torch.promote_types(score.dtype, torch.float32) if score.is_floating_point() else torch.float64
        checked[name] = score.detach().to(wide)
    return checked


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
