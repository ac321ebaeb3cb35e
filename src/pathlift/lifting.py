"""The path-lifting Φ(θ) itself, path by path, for small networks (mathematics §2): the reference, behind the library's door."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.arguments import declare, public
from pathlift.arguments.kinds import module, positive_count
from pathlift.errors import InputError, NumericalError, readable
from pathlift.graph.calling import Form, Samples
from pathlift.graph.network import Network
from pathlift.norm import to_float
from pathlift.passes.backward import counted
from pathlift.passes.programs import NormProgram
from pathlift.passes.propagate import in_range, propagate
from pathlift.passes.scaled import Scaled, total
from pathlift.passes.tracks import SupportProgram
from pathlift.reading import Inputs, capture
from pathlift.reading.examples import Examples, examples_of
from pathlift.reading.freeze import frozen_view
from pathlift.reading.turns import in_turn
from pathlift.reference import Dag, Path, ProbeError, TooManyPathsError, dag_of
from pathlift.results import Result

EXACT = 2**53
"""Sums of whole numbers below this are exact in float64."""

BYTES = 1024
"""So much memory does a path take while it is listed."""

LARGEST = 30
"""log10 of a number of paths whose memory is worth telling."""

declare(__name__, {"path_lifting.model": module, "limit": positive_count})


@dataclass(frozen=True, eq=False, repr=False)
class PathLifting(
    Result,
    line=("phi", "starts_at_input", "activations", "realisation"),
    rows=("names", "phi", "starts_at_input", "output", "activations"),
    axes=("path",),
):
    """All paths of a small network.

    Attributes:
        names: Each path in words: the neurons it visits, from its start to an output.
        phi: Φ(θ), float64 of shape (paths,).
        starts_at_input: Whether p ∈ I (else p ∈ H, it starts at a bias), bool of shape (paths,).
        output: Index of the output neuron at which each path ends, in the order of the flattened outputs.
        activations: a_p(θ, x), float64 of shape (paths,), when an input x was given.
        realisation: R_θ(x), float64 of shape (outputs,), when an input x was given.
    """

    names: tuple[str, ...]
    phi: Tensor
    starts_at_input: Tensor
    output: Tensor
    activations: Tensor | None = None
    realisation: Tensor | None = None
    _starts: Tensor | None = field(default=None, repr=False)

    @public
    def reconstruction(self) -> Tensor:
        """Return Σ_p Φ_p(θ)·a_p(θ,x)·x̄(p₀) per output: the right side of the key identity (4), (4').

        Returns:
            float64 of shape (outputs,); equal to `realisation` up to rounding.

        Raises:
            InputError: No input was given.
        """
        if self.activations is None or self._starts is None or self.realisation is None:
            raise InputError("path_lifting was called without x: give an input to have path activations.")
        out = torch.zeros_like(self.realisation)
        return out.index_add(0, self.output, self.phi * self.activations * self._starts)

    def __len__(self) -> int:
        """Return the number of paths."""
        return len(self.names)


@public
@torch.no_grad()
def path_lifting(model: nn.Module, inputs: Inputs, x: Samples | None = None, *, limit: int = 200_000) -> PathLifting:
    """List every path p of a small network with Φ_p(θ), and for an input x the path activations a_p(θ, x).

    Everything is computed from the definitions, on the network written out neuron by neuron in float64.

    Args:
        model: A small module; the number of paths grows exponentially with depth. They are counted before any is listed.
        inputs: As for `capture`.
        x: One input with batch size 1 (a tuple for a model with several inputs).
        limit: Refuse networks with more paths than this, those that end at a hidden neuron among them.

    Returns:
        The path-lifting.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: The network has more than ``limit`` paths, a layer is too large to be written out neuron by neuron, or
            ``inputs`` or ``x`` is malformed.
        NumericalError: A weight is NaN or infinite.

    References:
        Definitions A.5–A.7 of the paper.

    Example:
        The one-hidden-layer network of the paper's section 3, x ↦ Σ_j v_j·relu(u_j·x):

        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[2.0], [-3.0]]))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[5.0, 7.0]]))
        >>> lifting = path_lifting(model, (1,), torch.tensor([[1.0]]))
        >>> lifting.phi.tolist()  # (u_1·v_1, u_2·v_2)
        [10.0, -21.0]
        >>> lifting.activations.tolist()  # the second neuron is off at x = 1
        [1.0, 0.0]
        >>> lifting.realisation.tolist(), lifting.reconstruction().tolist()
        ([10.0], [10.0])
    """
    network = capture(model, inputs)  # refuses what lies outside the theory
    if network.left_off:
        left_off = " and ".join(network.left_off)
        raise InputError(f"The model ends in {left_off}, which has no path-lifting. Give the model without it.")
    broken = next((name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())), None)
    if broken is not None:
        raise NumericalError(f"'{broken}' holds NaN or infinite values.")
    count, log10 = path_count(network)
    if count > limit:
        number = f"{count:,.0f}" if count < EXACT else f"about {10 ** (log10 % 1):.3f}e{math.floor(log10):+d}"
        raise InputError(_too_many(f"{number} paths", log10, limit))
    examples = examples_of(model, inputs)

    def copied(given: nn.Module) -> nn.Module:
        return Positional(frozen_view(given)[0], examples.form)

    try:
        # traced where captures are traced: the exporter traces one model at a time in a process
        dag = in_turn(lambda: dag_of(model, *examples.tensors, copied=copied), network.host)
    except ProbeError as error:
        raise InputError(f"The network cannot be written out neuron by neuron: {error}") from error
    try:
        paths = dag.paths(limit)
    except TooManyPathsError:
        every = dag.count(every=True)
        raise InputError(_too_many(f"{every:,} paths to all of its neurons", math.log10(every), limit)) from None
    lifting = PathLifting(
        names=tuple(_name(dag, path) for path in paths),
        phi=torch.tensor([float(path.phi) for path in paths], dtype=torch.float64),
        starts_at_input=torch.tensor([path.bias is None for path in paths]),
        output=_ends(dag, paths),
    )
    return lifting if x is None else _activated(lifting, dag, paths, x, examples)


def path_count(network: Network) -> tuple[float, float]:
    """Count the paths of a network in one forward pass: the path-norm of weights that are all 1.

    A constant of the graph that is 0 is no edge, and an end of a clamp that is 0 no bias.

    Args:
        network: Of any size.

    Returns:
        The number, exact below 2⁵³ and infinite past float64's range, and its log10.
    """
    values = {
        weight: torch.ones_like(value, dtype=torch.float64) if weight.requires else value
        for weight, value in network.values().items()
    }

    def attempt(dtype: torch.dtype) -> list[Scaled]:
        tracks = propagate(network, SupportProgram(NormProgram(network, values, dtype)))
        ends = ((network.layer[name], tracks[name][0]) for name in network.outputs)
        return [counted(layer, value) for layer, value in ends if value is not None]

    counts = in_range(attempt, torch.float64, values, memory=network.memory("path_count"))
    return to_float(total(counts, fresh=False)[0] if counts else None)


def _too_many(number: str, log10: float, limit: int) -> str:
    size = f"some {readable(10**log10 * BYTES)} of memory" if log10 < LARGEST else "more memory than there is"
    return (
        f"The network has {number}, more than the limit of {limit:,}: to list them takes {size}. path_lifting is for "
        "small networks; path_norm, path_metric and path_magnitude work at any size."
    )


class Positional(nn.Module):
    """A model that takes its tensors one after the other."""

    def __init__(self, model: nn.Module, form: Form) -> None:
        super().__init__()
        self.model = model
        self.form = form

    def forward(self, *tensors: Tensor) -> Any:
        """Return what the model returns."""
        return self.form.run(self.model, tensors)


def _ends(dag: Dag, paths: list[Path]) -> Tensor:
    """Number the outputs; paths are listed output by output."""
    ends: list[int] = []
    counts = {v: sum(1 for path in paths if path.end == v) // dag.outputs.count(v) for v in set(dag.outputs)}
    for output, v in enumerate(dag.outputs):
        ends.extend([output] * counts[v])
    return torch.tensor(ends, dtype=torch.long)


def _name(dag: Dag, path: Path) -> str:
    start = dag.neurons[path.start].name
    start = start if path.bias is None else f"bias of {start}"
    return " → ".join([start, *(dag.neurons[v].name for v, _ in path.steps)])


def _activated(lifting: PathLifting, dag: Dag, paths: list[Path], x: Samples, examples: Examples) -> PathLifting:
    given = examples.form.tensors(x)
    expected = [tuple(example.shape) for example in examples.tensors]
    if [tuple(part.shape) for part in given] != expected:
        raise InputError(f"x has shape {[tuple(part.shape) for part in given]}, expected {expected} (batch size 1).")
    numbers = torch.cat([part.detach().double().reshape(-1) for part in given]).tolist()
    states = dag.states(numbers)
    position = {v: index for index, v in enumerate(dag.inputs)}
    starts = [numbers[position[path.start]] if path.bias is None else 1.0 for path in paths]
    return PathLifting(
        lifting.names,
        lifting.phi,
        lifting.starts_at_input,
        lifting.output,
        torch.tensor([float(dag.activation(path, states)) for path in paths], dtype=torch.float64),
        torch.tensor([float(states[v].value) for v in dag.outputs], dtype=torch.float64),
        torch.tensor(starts, dtype=torch.float64),
    )


__all__ = ["PathLifting", "path_lifting"]
