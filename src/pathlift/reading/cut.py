"""Where the reading of a graph ends: at what the model returns, in front of an increasing activation there, or at ``until``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from pathlift.errors import InputError, nearest
from pathlift.reading.nodes import IGNORED, base_name, module_paths

LAST = {
    "softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "tanh", "log_sigmoid", "logsigmoid",
    "log_sigmoid_forward",
}  # fmt: skip
"""Increasing functions of the logits, or of each, that a model may end with: they are left off."""

STAYING = {
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "alias", "detach",
    "to", "_to_copy", "type_as", "dropout",
}  # fmt: skip
"""What may still follow them."""


@dataclass(frozen=True)
class Cut:
    """Where the reading of a graph ends.

    Attributes:
        returned: What the model returns, all of it.
        outputs: The graph's nodes that are taken for the model's outputs.
        left_off: Nodes at the end that are left off: each stands for its argument.
    """

    returned: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    left_off: frozenset[fx.Node]


def cut_of(program: ExportedProgram, until: str | None) -> Cut:
    """Say where the reading of a graph ends.

    Args:
        program: The exporter's graph.
        until: Name of a module, or of a value of the graph, behind which it ends; None for the end of the model.

    Returns:
        The cut.

    Raises:
        InputError: ``until`` names nothing.
    """
    returned = program.graph.output_node().args[0]
    wanted = tuple(
        node
        for spec, node in zip(program.graph_signature.output_specs, returned, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT and isinstance(node, fx.Node)
    )
    if until is not None:
        return Cut(wanted, _results(program.graph, until), frozenset())
    return Cut(wanted, wanted, frozenset(last for node in wanted if (last := _last_activation(node)) is not None))


def _results(graph: fx.Graph, until: str) -> tuple[fx.Node, ...]:
    """Return the values that a module hands to the rest of the graph, or the value of that name."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    inside = {node for node in calls if until in module_paths(node)}
    if not inside:
        named = tuple(node for node in calls if node.name == until)
        if not named:
            known = dict.fromkeys([path for node in calls for path in module_paths(node) if path] + [n.name for n in calls])
            raise InputError(
                f"until names no module that the forward pass calls and no value of it: '{until}'.{nearest(until, known)}"
            )
        return named
    handed = tuple(
        node
        for node in graph.nodes
        if node in inside and isinstance(node.meta.get("val"), Tensor) and any(user not in inside for user in node.users)
    )
    return handed or (next(node for node in reversed(graph.nodes) if node in inside),)


def _last_activation(node: fx.Node) -> fx.Node | None:
    """Return the activation that an output ends with, if nothing else reads it."""
    while node.op == "call_function" and len([user for user in node.users if base_name(user) not in IGNORED]) == 1:
        name = base_name(node)
        if name in LAST:
            return node
        if name == "getitem" and isinstance(node.args[0], fx.Node) and base_name(node.args[0]) in LAST:
            return node.args[0]
        if name not in STAYING or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return None
