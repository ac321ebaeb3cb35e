"""Whose channels or units the neurons of a layer are: one name for what one weight makes, however often it is called.

A module with one weight gives its path, as a convolution does. A module that calls several itself, with `torch.nn.functional`,
gives each the name of its weight; parts of one weight that make different layers go by the names of these layers.

Example: ``w2 @ relu(w1 @ x)`` in one module has the units ``w1`` and ``w2``; with ``w[:8]`` and ``w[8:]`` in the place of
both, they are ``linear`` and ``linear_1``. Under one name, shares of channels would be added up that have nothing to do with
each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pathlift.graph.layers import Layer, WeightTensor


def with_named_units(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Name the units of all layers that a scored weight makes.

    Args:
        layers: The layers of a graph.

    Returns:
        The same with `Layer.unit_name`.
    """
    made = {layer.name: weights for layer in layers if layer.unit_dim is not None and (weights := _scored(layer))}
    names: dict[str, str] = {}
    ways: tuple[Callable[[Layer], str], ...] = (
        lambda layer: layer.origin.module,
        lambda layer: str(made[layer.name][0].score_name),
        lambda layer: layer.name,
    )
    for name_of in ways:
        called: dict[str, list[str]] = {}
        for layer in layers:
            if layer.name in made and layer.name not in names:
                called.setdefault(name_of(layer), []).append(layer.name)
        taken = set(names.values())
        for name, together in called.items():
            if name not in taken and len({made[layer] for layer in together}) == 1:
                names |= dict.fromkeys(together, name)
    return tuple(replace(layer, unit_name=names.get(layer.name)) for layer in layers)


def _scored(layer: Layer) -> tuple[WeightTensor, ...]:
    weights = (connection.weight for connection in layer.connections)
    return tuple(weight for weight in weights if weight is not None and weight.score_name is not None)
