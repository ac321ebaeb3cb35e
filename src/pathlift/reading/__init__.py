"""Capture a model once as a `Network`: freeze, export, lower by the operators' rules (mathematics §1).

The user's module is only read. A model outside the theory is refused before any number is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from pathlift.arguments import public
from pathlift.errors import InputError, MismatchError, PathliftError, Problem, UnsupportedModelError
from pathlift.graph.calling import Samples
from pathlift.graph.network import Network
from pathlift.reading import arguments as arguments
from pathlift.reading.alike import check_graph
from pathlift.reading.check import check
from pathlift.reading.examples import Examples, Inputs, examples_of
from pathlift.reading.export import export_graph, raise_if_model_fails, sources_forgotten
from pathlift.reading.fingerprint import fingerprint
from pathlift.reading.freeze import check_modules, frozen_view, run_copy
from pathlift.reading.hooks import idle_hooks, without
from pathlift.reading.live import AGAIN, LiveState
from pathlift.reading.lower import Lowered, lower
from pathlift.reading.memory import Memory
from pathlift.reading.turns import in_turn
from pathlift.results import Result
from pathlift.storage.onnx import OnnxModule


@dataclass(frozen=True, repr=False)
class SupportReport(Result, line=("supported", "operators", "left_off", "problems"), rows=("problems",)):
    """Whether a model lies inside the theory, and every reason why not.

    Attributes:
        supported: True when `capture` succeeds.
        problems: Every operator outside the theory, in the order of execution; empty when supported.
        operators: Number of operator calls that were looked at.
        left_off: Activations at the end of the model that are no part of the network.
    """

    supported: bool
    problems: tuple[Problem, ...]
    operators: int
    left_off: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Return `supported`."""
        return self.supported

    def __str__(self) -> str:
        """Return one line per problem."""
        if self.supported:
            left_off = f", without the last {' and '.join(self.left_off)}" if self.left_off else ""
            return f"supported ({self.operators} operators{left_off})"
        return "not supported:\n" + "\n".join(f"  - {problem}" for problem in self.problems)


def program_of(model: nn.Module) -> str:
    """Return a text that two modules share only when their forward pass is the same function of their parameters.

    Modules of one class with the same attributes share it; where that cannot be told, they do not.

    Args:
        model: Any module.

    Returns:
        The text; an empty one tells nothing, and is shared with no module.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    memory = Memory(named)
    labels = {id(tensor): str(sorted({memory.aliases.get(name, name)})) for name, tensor in named}
    try:
        return fingerprint(model, labels, code=True)
    except RecursionError:
        return ""  # it holds too much to be written down


def _lowered(model: nn.Module, inputs: Inputs, until: str | None = None) -> Lowered:
    part = model.ending_at(until) if until is not None and isinstance(model, OnnxModule) else None
    model, until = (model, until) if part is None else (part, None)
    examples = examples_of(model, inputs)
    check_modules(model)
    return in_turn(lambda: _read(model, examples, until), examples.tensors[0].device)


@torch.random.fork_rng(devices=[])  # a forward pass may seed, or draw
@sources_forgotten()
def _read(model: nn.Module, examples: Examples, until: str | None) -> Lowered:
    runs = partial(run_copy, model, examples)
    try:
        idle = idle_hooks(model, examples)
    except Exception as error:
        raise_if_model_fails(examples, error, runs, examples.unlike(model))
        raise
    view, copier = frozen_view(model)
    exported = export_graph(without(view, idle), examples, runs)
    lowered = lower(exported, copier, model, examples, until)
    network = lowered.network
    if network is None:
        return lowered
    assert isinstance(network.state, LiveState)
    network.state.remember(
        check(model, network, exported, lowered, examples, idle) if network.device.type != "meta" else frozenset()
    )
    program = "" if until else program_of(model)
    graph = replace(network.graph, checked=network.device.type != "meta", program=program, until=until)
    return replace(lowered, network=replace(network, graph=graph))


@public
def capture(model: nn.Module | Network, inputs: Inputs | None = None, until: str | None = None) -> Network:
    """Capture a model as a typed, immutable graph of neurons.

    Works for any model that `torch.export` can trace and whose operators all have a rule. The model is traced in eval
    mode on a frozen view; the model itself is not changed. The result shares the parameters' memory with the model.

    Args:
        model: Any module; a Network is returned as it is.
        inputs: An input shape without the batch dimension, such as ``(3, 224, 224)``, or an example tensor with it; for a
            model with several inputs or keywords, a tuple or dictionary of these, nested as the model takes them.
        until: Name of a module, or of a value of the exported graph, whose result is taken for the model's output: an encoder
            in front of a decoder, a backbone in front of a head. For a model read from an ``.onnx`` file, also the name of a
            node or a value of the file. None reads the whole model; an activation at its very end
            that keeps the order of the logits (softmax, log-softmax, sigmoid, tanh) is left off, and the network says so.

    Returns:
        The network. Every function of pathlift accepts it in place of ``(model, inputs)``.

    Raises:
        UnsupportedModelError: An operator lies outside the theory, or the exporter cannot capture the model; every
            problem is listed with module, operator, source line and advice.
        InputError: ``inputs`` is malformed or given with a Network, ``until`` names nothing, or the model cannot run on such
            an input.
        MismatchError: A Network is given whose model is another one now: a module was replaced, say.

    Example:
        >>> from torch import nn
        >>> capture(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), (2,))
        Network(4 layers, 4 weight tensors, 4 parameters)
    """
    if isinstance(model, Network):
        verify(model)
        return model
    if inputs is None:
        raise InputError("inputs is missing: give an input shape such as (3, 224, 224), or an example tensor.")
    lowered = _lowered(model, inputs, until)
    if lowered.network is None:
        raise UnsupportedModelError(lowered.problems)
    return lowered.network


def verify(network: Network) -> None:
    """Make sure that a captured network still is that of its model.

    Args:
        network: The network.

    Raises:
        MismatchError: See `LiveState.verify`; or a buffer whose values are part of the graph has others now; or attributes,
            modules or hooks are others, and the model captured anew has another graph.
    """
    state = network.state
    if not isinstance(state, LiveState):
        return
    state.verify()
    for name, value in network.graph.baked.items():
        if not torch.equal(state[name], value):
            raise MismatchError(f"The values of the buffer '{name}' are part of the graph and have changed. {AGAIN}")
    if (moved := state.moved) is not None:
        examples = tuple(torch.zeros(shape, dtype=dtype, device=network.device) for shape, dtype in network.graph.examples)
        try:
            check_graph(network, capture(state.root, network.graph.form.filled(examples), network.graph.until), state)
        except PathliftError as error:
            raise MismatchError(f"{moved}, and the graph is another one. {AGAIN}") from error
        state.remember(state.passing)


def captured_on(model: nn.Module | Network, samples: Samples) -> Network:
    """Capture a model for inputs that a function looks at anyway.

    Args:
        model: A module, or a captured Network.
        samples: Example tensors, which only a module needs.

    Returns:
        The network.
    """
    return capture(model) if isinstance(model, Network) else capture(model, samples)


@public
def check_support(model: nn.Module, inputs: Inputs, until: str | None = None) -> SupportReport:
    """Tell whether a model lies inside the theory; list every operator that does not.

    Needs no weights: a model on the meta device will do.

    Args:
        model: Any module.
        inputs: As for `capture`.
        until: As for `capture`.

    Returns:
        The report. An unsupported model is reported, never raised.

    Raises:
        InputError: ``inputs`` is malformed, ``until`` names nothing, or the model cannot run on such an input.

    Example:
        >>> from torch import nn
        >>> report = check_support(nn.Sequential(nn.Linear(2, 3), nn.GELU()), (2,))
        >>> report.supported, report.problems[0].op, report.problems[0].module
        (False, 'aten.gelu.default', '1')
    """
    try:
        lowered = _lowered(model, inputs, until)
    except UnsupportedModelError as error:
        return SupportReport(False, error.problems, 0)
    left_off = () if lowered.network is None else lowered.network.left_off
    return SupportReport(lowered.network is not None, lowered.problems, lowered.operators, left_off)


__all__ = ["Inputs", "SupportReport", "capture", "captured_on", "check_support", "program_of", "verify"]
