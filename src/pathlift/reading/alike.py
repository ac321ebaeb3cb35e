"""Whether two lowered networks are the same function of their parameters.

The same neurons, joined by the same edges, with weights that follow from the parameters in the same way and constants of the
same values. Layers that only hand on what is below (dropout, identity modules) make no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pathlift.edges.unit import Identity
from pathlift.errors import MismatchError
from pathlift.graph.expressions import Constant, Expression, FunctionCall, StateTensor, evaluate, substitute
from pathlift.graph.layers import Connection, Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.reading.fingerprint import fingerprint
from pathlift.storage.names import names_of


def check_graph(network: Network, other: Network, state: Mapping[str, Tensor]) -> None:
    """Make sure that a second network is the same function of its parameters.

    Args:
        network: The first network.
        other: The second.
        state: The parameters of the second under the names of the first.

    Raises:
        MismatchError: It is not.
    """
    names = {theirs: name for name, theirs in names_of(network.names, {name: name for name in other.names}).items()}
    names = {theirs: network.aliases.get(name, name) for theirs, name in names.items()}
    if len(network.outputs) != len(other.outputs):
        raise MismatchError(f"The first network has {len(network.outputs)} outputs, the second {len(other.outputs)}.")
    inputs, other_inputs = ([layer.name for layer in side.layers if layer.kind == "input"] for side in (network, other))
    if len(inputs) != len(other_inputs):
        raise MismatchError(f"The first network has {len(inputs)} inputs, the second {len(other_inputs)}.")
    pairs = {inputs[first]: other_inputs[second] for first, second in network.graph.form.beside(other.graph.form)}
    stack = list(zip(network.outputs, other.outputs, strict=True))
    weights: dict[tuple[WeightTensor, WeightTensor], Layer] = {}
    done: set[tuple[str, str]] = set()
    while stack:
        first, second = (_settled(side, name) for side, name in zip((network, other), stack.pop(), strict=True))
        if (first.name, second.name) in done:
            continue
        done.add((first.name, second.name))
        if first.kind == "input" or second.kind == "input":
            if first.kind != second.kind:
                raise MismatchError(_different(first, second))
            if pairs[first.name] != second.name:
                raise MismatchError(
                    f"The two models read their inputs in different places: input {inputs.index(first.name)} of the first "
                    f"where the second reads input {other_inputs.index(second.name)}. The first was captured with inputs as "
                    f"{network.graph.form}, the second as {other.graph.form}; inputs of the same name, or of the same place, "
                    "are taken for the same."
                )
            continue
        for weight, other_weight in _weight_pairs(first, second):
            weights.setdefault((weight, other_weight), first)
        stack.extend((left.source, right.source) for left, right in zip(first.connections, second.connections, strict=True))
    memos: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})
    for (weight, other_weight), layer in weights.items():
        if not _same_weight(weight, other_weight, names, (state, other.state), memos):
            what = f"how the weight '{weight.label}' is computed" if weight.requires or other_weight.requires else "a constant"
            raise MismatchError(
                f"The two models have the same parameters, but {what} differs in {_where(layer)}. Networks are compared that "
                "differ in their parameters only."
            )


def _settled(network: Network, name: str) -> Layer:
    """Return a layer, or the first one below it that is not merely handed on."""
    layer = network.layer[name]
    while (
        len(layer.connections) == 1
        and not layer.biases
        and layer.nonlinearity is None
        and layer.concat is None
        and layer.connections[0].weight is None
        and type(layer.connections[0].edges) is Identity
        and network.layer[layer.connections[0].source].shape == layer.shape
    ):
        layer = network.layer[layer.connections[0].source]
    return layer


def _weight_pairs(first: Layer, second: Layer) -> Iterable[tuple[WeightTensor, WeightTensor]]:
    """Yield the weights of two layers that correspond; refuse layers that are not alike."""
    if _shape_of(first) != _shape_of(second):
        raise MismatchError(_different(first, second))
    return zip(_weights(first), _weights(second), strict=True)


def _shape_of(layer: Layer) -> tuple[object, ...]:
    """Return all of a layer but its weights and what it reads."""
    connections = tuple((fingerprint(connection.edges), connection.weight is None) for connection in layer.connections)
    kind = layer.nonlinearity
    rest = {key: _without_weight(value) for key, value in vars(kind).items()} if kind is not None else {}
    return (layer.shape, connections, tuple(bias.view for bias in layer.biases), layer.concat, type(kind), tuple(rest.items()))


def _without_weight(value: object) -> object:
    return value.view if hasattr(value, "view") else value


def _weights(layer: Layer) -> list[WeightTensor]:
    ends = (
        [part for part in vars(layer.nonlinearity).values() if hasattr(part, "weight")]
        if layer.nonlinearity is not None
        else []
    )
    connections: list[Connection] = [connection for connection in layer.connections if connection.weight is not None]
    return [part.weight for part in (*connections, *layer.biases, *ends)]


def _same_weight(
    first: WeightTensor,
    second: WeightTensor,
    names: Mapping[str, str],
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    memos: tuple[dict[Any, Any], dict[Any, Any]],
) -> bool:
    """Whether two weights follow from the parameters alike, or at least have the same values."""
    if first.shape != second.shape:
        return False
    if first.scalar is not None and second.scalar is not None:
        return first.scalar == second.scalar
    if _written(first.expression, {}) == _written(second.expression, names):
        return True
    values, other_values = (
        torch.as_tensor(evaluate(weight.expression, state, memo) if weight.scalar is None else weight.scalar)
        for weight, state, memo in zip((first, second), states, memos, strict=True)
    )
    if values.is_meta or other_values.is_meta:
        return False
    other_values = other_values.detach().to(values.device)
    return bool((values == other_values).all())


def _written(expression: Expression, names: Mapping[str, str]) -> str:
    def write(part: Expression) -> Any:
        if isinstance(part, StateTensor):
            return ("parameter", names.get(part.name, part.name))
        if isinstance(part, Constant):
            return ("constant", part.value)
        assert isinstance(part, FunctionCall)
        return (part.function, substitute(part.args, write), substitute(dict(part.kwargs), write))

    return fingerprint(write(expression))


def _different(first: Layer, second: Layer) -> str:
    return (
        "The two models have the same parameters but different graphs (another operator, order or constant): "
        f"{_where(first)} in the first, {_where(second)} in the second. Networks are compared that differ in their parameters "
        "only."
    )


def _where(layer: Layer) -> str:
    module = f" of module '{layer.origin.module}'" if layer.origin.module else ""
    line = f" ({layer.origin.where})" if layer.origin.where else ""
    return f"{layer.origin.op}{module}{line}"
