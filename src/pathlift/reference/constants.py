"""What is computed from parameters and constants alone: its value, and which parameter each element of it is.

An element that is only moved about keeps its label, and so does one that is multiplied by a constant. Anything else (a
weight-normalised weight, a masked one) is a weight of its own, named after the module in which it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from pathlift.reference.calls import Labelled
from pathlift.reference.dag import Label

MOVES = {"view", "reshape", "t", "transpose", "permute", "slice", "select", "cat", "unsqueeze", "squeeze", "expand"}
MOVES |= {"clone", "contiguous", "detach", "alias", "flatten", "numpy_T", "_unsafe_view", "narrow", "stack"}


def computed(node: fx.Node, name: str, args: Any, kwargs: Any) -> Labelled:
    """Compute a node that reads no activation.

    Args:
        node: The node.
        name: Name of its operator.
        args: Its arguments.
        kwargs: Those with a name.

    Returns:
        Its value with labels.
    """
    value = _applied(node, _value_of, args, kwargs)
    labelled = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Labelled) and leaf.labels]
    if not labelled:
        return Labelled(value)
    if name in MOVES:
        return Labelled(value, _moved(node, args, kwargs))
    if name == "neg" or (name in {"mul", "div"} and not isinstance(args[1], Labelled)):
        return Labelled(value, labelled[0].labels)
    if not isinstance(value, Tensor):
        return Labelled(value)
    label = _user_of(node)
    return Labelled(value, [(label, index) for index in range(value.numel())])


def _value_of(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Labelled) else leaf


def _applied(node: fx.Node, value: Any, args: Any, kwargs: Any) -> Any:
    assert callable(node.target)
    return node.target(*tree_map(value, args), **tree_map(value, kwargs))


def _moved(node: fx.Node, args: Any, kwargs: Any) -> list[Label]:
    """Send numbers of labels through an operator that moves elements, and see where they come out; 0 is no label."""
    table: list[Label] = [None]

    def numbered(leaf: Any) -> Any:
        if not isinstance(leaf, Labelled) or not isinstance(leaf.value, Tensor):
            return _value_of(leaf)
        if not leaf.labels:
            return torch.zeros_like(leaf.value, dtype=torch.float64)
        first = len(table)
        table.extend(leaf.labels)
        return torch.arange(first, len(table), dtype=torch.float64).reshape(leaf.value.shape)

    return [table[int(number)] for number in _applied(node, numbered, args, kwargs).reshape(-1)]


def _user_of(node: fx.Node) -> str:
    """Return the name of the weight of the module that uses a computed weight: that of the convolution or linear layer."""
    user = next(iter(node.users))
    while user.target not in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default) and user.users:
        user = next(iter(user.users))
    modules = list((user.meta.get("nn_module_stack") or {}).values())
    return f"{modules[-1][0]}.weight" if modules and modules[-1][0] else "weight"
