"""A captured model: a `Graph` without weights, and the `Network` that it is with some (mathematics §1)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pathlift.arguments import public
from pathlift.errors import NumericalError
from pathlift.graph.calling import Form
from pathlift.graph.expressions import Expression, StateTensor, Together, evaluate, together
from pathlift.graph.layers import Layer, WeightTensor
from pathlift.graph.recall import Memory

R = TypeVar("R")


class TypedState(Mapping[str, Tensor]):
    """Parameters and buffers by canonical name that need not be read to tell their types."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it.

        Args:
            name: Its name.

        Returns:
            The dtype.
        """


class LazyState(TypedState):
    """Parameters and buffers by canonical name that are too large to hold: each is read anew whenever it is asked for."""


@dataclass(frozen=True, eq=False)
class Graph:
    """Layers of neurons, the edges between them and the expressions of their weights; the same for every θ.

    Attributes:
        layers: Layers of neurons in topological order, inputs first.
        outputs: Names of the output layers in the order in which the model returns them.
        weights: Every weight tensor that a layer uses.
        aliases: Further state-dict names of shared tensors, to the canonical one.
        parameters: Canonical names of trainable parameters, in the model's order.
        examples: Shapes (with batch 1) and dtypes of the inputs, to capture other models alike.
        form: The containers in which the model takes its inputs.
        saved: The names in the model's state-dict; other buffers are not persistent.
        versions: The ``_metadata`` of the model's state-dict, which some modules ask for when they load one.
        views: Further state-dict names of tensors that lie in the memory of another: how they follow from it.
        baked: Buffers whose values are part of the graph (constant indices), and those values.
        left_off: Activations at the end of the model that are no part of the network (a softmax), with their modules.
        checked: Whether the graph was compared with the model on random inputs; not so on the meta device.
        program: A text that two modules share only when their forward pass is the same function of their parameters.
        until: Where the reading ended, when it was told to.
        known: What followed from the graph so far, by the function that computed it; see `Network.remembered`.
    """

    layers: tuple[Layer, ...]
    outputs: tuple[str, ...]
    weights: tuple[WeightTensor, ...]
    aliases: Mapping[str, str]
    parameters: tuple[str, ...]
    examples: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    form: Form
    saved: frozenset[str]
    versions: Mapping[str, Any]
    views: Mapping[str, Expression] = field(default_factory=dict)
    baked: Mapping[str, Tensor] = field(default_factory=dict)
    left_off: tuple[str, ...] = ()
    checked: bool = False
    program: str = ""
    until: str | None = None
    known: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what can be worked out again."""
        return {name: value for name, value in vars(self).items() if name not in {"layer", "depth", "joint_calls"}} | {
            "known": {}
        }

    @cached_property
    def layer(self) -> Mapping[str, Layer]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def depth(self) -> Mapping[str, int]:
        """Name of each layer to the largest number of weights on a path to it."""
        depth: dict[str, int] = {}
        for layer in self.layers:
            below = max((depth[connection.source] for connection in layer.connections), default=0)
            depth[layer.name] = below + any(connection.weight is not None for connection in layer.connections)
        return depth

    @cached_property
    def joint_calls(self) -> tuple[Together, ...]:
        """Calls of elementwise functions among the expressions that are made together."""
        return together([weight.expression for weight in self.weights])


class CompactGraph(Graph):
    """A graph whose layers are stored by classes of equal positions (`pathlift.graph.compact`), for passes fed with ones."""


@dataclass(frozen=True, eq=False, repr=False)
class Network:
    """A captured model: an immutable graph, and parameters.

    The tensors in ``state`` share their storage with the model's own: after a training step the same Network gives the
    numbers of the new weights. Every public function of pathlift accepts a Network in place of ``(model, inputs)``. Another
    θ on the same graph is ``dataclasses.replace(network, state=…)``; what is known of the graph is known of both.

    Attributes:
        graph: Layers, edges and expressions of weights.
        state: Parameters and buffers by canonical state-dict name.
        device: Where the parameters live and the passes run.
        origin: The parameters and buffers of the model that was captured, as they are there; None in a copy.
    """

    graph: Graph
    state: Mapping[str, Tensor]
    device: torch.device
    origin: Mapping[str, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model behind."""
        return vars(self) | {"origin": None}

    def __repr__(self) -> str:
        """Return a one-line summary."""
        sizes = f"{len(self.layers)} layers, {len(self.weights)} weight tensors, {len(self.parameters)} parameters"
        left_off = f", without the last {' and '.join(self.left_off)}" if self.left_off else ""
        unchecked = "" if self.graph.checked else ", not compared with the model: it has no values"
        return f"Network({sizes}{left_off}{unchecked})"

    # ---- the graph

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Layers of neurons in topological order, inputs first."""
        return self.graph.layers

    @property
    def layer(self) -> Mapping[str, Layer]:
        """The layers by name."""
        return self.graph.layer

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the output layers."""
        return self.graph.outputs

    @property
    def weights(self) -> tuple[WeightTensor, ...]:
        """Every weight tensor that a layer uses."""
        return self.graph.weights

    @property
    def parameters(self) -> tuple[str, ...]:
        """Canonical names of trainable parameters, in the model's order."""
        return self.graph.parameters

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further state-dict names of shared tensors, to the canonical one."""
        return self.graph.aliases

    @property
    def left_off(self) -> tuple[str, ...]:
        """Activations at the end of the model that are no part of the network."""
        return self.graph.left_off

    def remembered(self, compute: Callable[[Network], R]) -> R:
        """Return what follows from the graph alone, computed once for all networks of the graph.

        Args:
            compute: A function of a network whose result is the same for any values of its state.

        Returns:
            Its result, which nobody may change.
        """
        if compute not in self.graph.known:
            self.graph.known[compute] = compute(self)
        result: R = self.graph.known[compute]
        return result

    # ---- the state

    @property
    def dtype(self) -> torch.dtype:
        """float64 when a parameter is float64, else float32: the precision the passes start with."""
        state = self.state
        kinds = [*map(state.dtype, state)] if isinstance(state, TypedState) else [tensor.dtype for tensor in state.values()]
        kinds = kinds or [dtype for _, dtype in self.graph.examples]
        return torch.float64 if torch.float64 in kinds else torch.float32

    @property
    def names(self) -> list[str]:
        """Every name that the model has for a parameter or buffer."""
        return [*self.state, *self.graph.aliases, *self.graph.views]

    @property
    def host(self) -> torch.device:
        """Where other weights for this graph are put: its own device, or the CPU when that is the meta device."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    def with_memory_of_its_own(self) -> Network:
        """Return the network with copies of its tensors: what is done to the model from now on does not change it."""
        return replace(self, state={name: tensor.detach().clone() for name, tensor in self.state.items()})

    @public
    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters and buffers under every name that the model has for them.

        Args:
            state: By canonical name, complete.

        Returns:
            The same, with aliases and with views of them.
        """
        aliases = {alias: state[name] for alias, name in self.graph.aliases.items()}
        views = {name: evaluate(expression, state) for name, expression in self.graph.views.items()}
        return {**state, **aliases, **views}

    @public
    def kind_of(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter or buffer without reading it."""
        return self.state.dtype(name) if isinstance(self.state, TypedState) else self.state[name].dtype

    @public
    def values(self, state: Mapping[str, Tensor] | None = None) -> Mapping[WeightTensor, Tensor]:
        """Evaluate every weight tensor.

        Args:
            state: Parameters and buffers by canonical name; the network's own when None.

        Returns:
            Weight tensor to values. Plain parameters are not copied. Of a state that is not held in memory, each is evaluated
            when it is asked for.

        Raises:
            NumericalError: A tensor has no data (a model on the meta device).
        """
        state = self.state if state is None else state
        if isinstance(state, LazyState):
            return _WeightsOnDisk(self.graph, state)
        memo: dict[Any, Any] = {}
        values: dict[WeightTensor, Tensor] = {}
        for joint in self.graph.joint_calls:
            joint.run(state, memo)
        for weight in self.weights:
            if weight.scalar is None:
                if isinstance(weight.expression, StateTensor):
                    values[weight] = state[weight.expression.name]
                else:
                    values[weight] = torch.as_tensor(evaluate(weight.expression, state, memo))
                _refuse_hollow(weight, values[weight])
        return values

    def memory(self, *key: object) -> Memory | None:
        """Return what earlier passes of a kind saw, so that the next need not wait for an accelerator at every layer.

        Args:
            key: What tells the kind apart from others of this graph.

        Returns:
            The memory, changed by `pathlift.graph.recall`; None on the CPU, where nothing is gained.
        """
        return None if self.device.type == "cpu" else self.remembered(_memories).setdefault(key, {})


def _memories(_: Network) -> dict[tuple[object, ...], Memory]:
    return {}


class CompactNetwork(Network):
    """A network on a compact graph; passes do not know, and no function for users takes it."""


def _refuse_hollow(weight: WeightTensor, value: Tensor) -> None:
    if value.is_meta:
        raise NumericalError(
            f"'{weight.label}' is on the meta device and has no values. Load the weights first (model.to_empty(device=...) and "
            "load_state_dict), or read them from disk as they are needed (pathlift.stream)."
        )


class _WeightsOnDisk(Mapping[WeightTensor, Tensor]):
    """The values of weights that are read from disk: small ones are kept, the others evaluated when asked for."""

    def __init__(self, graph: Graph, state: LazyState) -> None:
        self.weights = {weight: None for weight in graph.weights if weight.scalar is None}
        self.state = state
        self.held: WeakValueDictionary[WeightTensor, Tensor] = WeakValueDictionary()
        self.memo: dict[Any, Any] = {}
        for joint in graph.joint_calls:
            joint.run(state, self.memo)

    def __getitem__(self, weight: WeightTensor) -> Tensor:
        """Evaluate a weight tensor, unless somebody still holds what it was."""
        value = self.held.get(weight)
        if value is not None:
            return value
        if isinstance(weight.expression, StateTensor):
            value = self.state[weight.expression.name]
        elif weight.expression in self.memo:
            value = self.memo[weight.expression]
        else:
            value = torch.as_tensor(evaluate(weight.expression, self.state, dict(self.memo)))
        _refuse_hollow(weight, value)
        self.held[weight] = value
        return value

    def __iter__(self) -> Iterator[WeightTensor]:
        """Iterate over weight tensors."""
        return iter(self.weights)

    def __len__(self) -> int:
        """Return the number of weight tensors."""
        return len(self.weights)
