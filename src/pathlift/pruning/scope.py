"""Which parameters may be pruned: the weights of convolutions and linear layers, or what a user names (SPEC §6).

A parameter is eligible when each of its elements is one weight or bias of the theory, or is moved there by views and
slices. Setting such an element to 0 lets paths vanish and changes no other, so that (13) and Lemma 4.2 hold. It is not so
for a batch norm: its shift β − μ·s has no zero where β or the scale has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from pathlift.edges.contraction import Dense
from pathlift.edges.convolution import Convolution
from pathlift.errors import InputError
from pathlift.network import Leaf, Network, StateTensor

Scope: TypeAlias = "str | type[nn.Module] | Sequence[str | type[nn.Module]] | None"
"""Name patterns (``"layer4.*"``; ``"!fc.*"`` excludes) and module types; None: weights of convolutions and linear layers."""


def eligible(network: Network) -> list[str]:
    """Return the names of all parameters whose elements can be set to 0 one by one, in the model's order.

    Args:
        network: The network.

    Returns:
        Names; batch norms and parameters of derived weights are not among them.
    """
    used = {name for leaf in network.leaves for name in leaf.requires}
    elsewhere = {name for leaf in network.leaves if not _one_by_one(leaf) for name in leaf.requires}
    return [name for name in network.parameters if name in used and name not in elsewhere]


def _one_by_one(leaf: Leaf) -> bool:
    return isinstance(leaf.expression, StateTensor) or leaf.pull_back is not None


def prunable(network: Network) -> list[str]:
    """Return the names of the weights of convolutions and linear layers, in the model's order.

    Args:
        network: The network.

    Returns:
        Names.
    """
    used = {
        name
        for node in network.nodes
        for term in node.terms
        if (leaf := term.weight) is not None and isinstance(term.edges, (Convolution, Dense))
        for name in leaf.requires
    }
    return [name for name in eligible(network) if name in used]


def scoped(network: Network, scope: Scope, model: nn.Module | None = None) -> list[str]:
    """Return the names of the parameters that a scope chooses.

    Args:
        network: The network.
        scope: See `Scope`.
        model: The module it was captured from, which is asked for the types of its parts.

    Returns:
        Names in the model's order, at least one.

    Raises:
        InputError: A pattern or type matches nothing that can be pruned, or types are given without a module.
    """
    default = prunable(network)
    if scope is None:
        _refuse_derived(network)
        return _some(default, "no convolution or linear layer with a plain weight")
    wanted = [scope] if isinstance(scope, (str, type)) else list(scope)
    included = [item for item in wanted if not (isinstance(item, str) and item.startswith("!"))]
    names = eligible(network)
    chosen: set[str] = set() if included else set(default)
    for item in included:
        found = _matching(item, names) if isinstance(item, str) else _of_type(item, default, model)
        if not found:
            raise InputError(f"Nothing that can be pruned matches {item!r}. {_hint(network, item, names)}")
        chosen |= found
    for item in wanted:
        if isinstance(item, str) and item.startswith("!"):
            chosen -= _matching(item[1:], names)
    return _some([name for name in names if name in chosen], f"nothing in the scope {scope!r}")


def _matching(pattern: str, names: Sequence[str]) -> set[str]:
    return {name for name in names if fnmatchcase(name, pattern)}


def _of_type(kind: type[nn.Module], names: Sequence[str], model: nn.Module | None) -> set[str]:
    if model is None:
        raise InputError("A scope of module types needs the module itself: pass the model and its inputs, not a Network.")
    owners = {path for path, module in model.named_modules() if isinstance(module, kind)}
    return {name for name in names if name.rpartition(".")[0] in owners}


def _hint(network: Network, item: str | type[nn.Module], names: Sequence[str]) -> str:
    if isinstance(item, str) and any(fnmatchcase(name, item) for name in network.parameters):
        return (
            "Its parameters belong to a batch norm or a derived weight, whose elements are no weights of the theory: setting "
            "one to 0 does not remove paths."
        )
    return f"There are: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"


def _refuse_derived(network: Network) -> None:
    """A mask cannot be laid on a weight that is computed from others: name it rather than leave it out in silence."""
    for term in (term for node in network.nodes for term in node.terms if isinstance(term.edges, (Convolution, Dense))):
        leaf = term.weight
        if leaf is not None and not _one_by_one(leaf) and leaf.requires & set(network.parameters):
            raise InputError(
                f"'{leaf.label}' is computed from {', '.join(sorted(leaf.requires))} and cannot be masked. Make it a plain "
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
    found = {}
    for name in names:
        if name not in scores:
            raise InputError(f"The criterion has no score for '{name}'. It has: {', '.join(list(scores)[:5])} …")
        score, shape = scores[name].detach(), tuple(network.state[name].shape)
        if tuple(score.shape) != shape:
            raise InputError(f"The score of '{name}' has shape {tuple(score.shape)}; the parameter has {shape}.")
        if bool(score.isnan().any()):
            raise InputError(f"The score of '{name}' holds NaN: the criterion does not work for this network and these data.")
        found[name] = score
    return found
