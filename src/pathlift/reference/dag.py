"""The paper's definitions, word by word, on an explicit graph of single neurons (mathematics §1, §2; paper Def. A.2, A.5–A.7).

Slow and obviously correct: every path is listed. Numbers may be floats or exact `fractions.Fraction`. Nothing here is
shared with the fast passes, which are tested against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, TypeAlias

Number: TypeAlias = float | Fraction
Label: TypeAlias = "tuple[str, int] | None"
"""The parameter that a weight is: its name and the flat index in it; None for a constant."""


@dataclass(frozen=True)
class Edge:
    """An edge u → v with its weight."""

    source: int
    weight: Number
    label: Label = None


@dataclass(frozen=True)
class Bias:
    """A bias of a neuron: paths start there. A clamp has two (its bounds), a maximum with constants may have several."""

    value: Number
    label: Label = None


@dataclass(frozen=True)
class Neuron:
    """One neuron v.

    Attributes:
        name: Readable name.
        kind: ``input``; ``identity``: the sum of its edges and biases; ``slopes``: that sum times a slope by its sign;
            ``pool``: the k-th largest of its edges and biases; ``clamp``: the sum of its edges, cut off at its biases.
        edges: Incoming edges.
        biases: Its biases.
        slopes: (s₊, s₋) of ``slopes``: the neuron is s₊·z for z > 0 and s₋·z for z ≤ 0, both of magnitude at most 1.
        k: Rank of ``pool``, from 1 (maximum) to the number of antecedents (minimum).
        low: Index of the lower bound among the biases of ``clamp``, None for no bound.
        high: Index of the upper bound.
    """

    name: str
    kind: Literal["input", "identity", "slopes", "pool", "clamp"]
    edges: tuple[Edge, ...] = ()
    biases: tuple[Bias, ...] = ()
    slopes: tuple[Number, Number] = (1, 0)
    k: int = 1
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class State:
    """A neuron's value on an input, and the activation of each of its edges and biases."""

    value: Number
    edges: tuple[Number, ...]
    biases: tuple[Number, ...]


@dataclass(frozen=True)
class Path:
    """A path: where it starts, the (neuron, edge) pairs it takes.

    Attributes:
        start: The neuron p₀.
        bias: Which bias of it, None for an input neuron.
        steps: (v, index of the edge into v), in order.
        phi: Φ_p(θ).
        labels: The parameters it goes through, with multiplicity.
    """

    start: int
    bias: int | None
    steps: tuple[tuple[int, int], ...]
    phi: Number
    labels: tuple[tuple[str, int], ...] = field(repr=False, default=())

    @property
    def end(self) -> int:
        """The neuron at which the path ends."""
        return self.steps[-1][0] if self.steps else self.start


class TooManyPathsError(Exception):
    """The network has more paths than the limit."""


@dataclass(frozen=True)
class Dag:
    """A network of single neurons in topological order."""

    neurons: tuple[Neuron, ...]
    outputs: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The input neurons."""
        return tuple(v for v, neuron in enumerate(self.neurons) if neuron.kind == "input")

    def count(self, *, every: bool = False) -> int:
        """Count the paths to the outputs, without listing them.

        Args:
            every: Count those to all neurons that an output depends on, which `paths` lists on its way.

        Returns:
            The number.
        """
        counts: list[int] = []
        for neuron in self.neurons:
            starts = 1 if neuron.kind == "input" else len(neuron.biases)
            counts.append(starts + sum(counts[edge.source] for edge in neuron.edges))
        return sum(counts[v] for v in (self._ancestors() if every else self.outputs))

    def paths(self, limit: int = 200_000) -> list[Path]:
        """List every path that ends at an output; an output that is returned twice ends twice as many.

        Args:
            limit: Largest number of paths (to any neuron) that is listed.

        Returns:
            The paths.

        Raises:
            TooManyPathsError: There are more.
        """
        needed = self._ancestors()
        total = 0
        arriving: dict[int, list[Path]] = {}
        for v, neuron in enumerate(self.neurons):
            if v not in needed:
                continue
            paths: list[Path] = []
            if neuron.kind == "input":
                paths.append(Path(v, None, (), 1))
            for index, bias in enumerate(neuron.biases):
                paths.append(Path(v, index, (), bias.value, () if bias.label is None else (bias.label,)))
            for index, edge in enumerate(neuron.edges):
                label = () if edge.label is None else (edge.label,)
                total += len(arriving[edge.source])
                if total > limit:
                    raise TooManyPathsError(f"more than {limit} paths")
                paths.extend(
                    Path(p.start, p.bias, (*p.steps, (v, index)), p.phi * edge.weight, (*p.labels, *label))
                    for p in arriving[edge.source]
                )
            arriving[v] = paths
        return [path for v in self.outputs for path in arriving[v]]

    def _ancestors(self) -> set[int]:
        """Return the outputs and all neurons below them."""
        ancestors: set[int] = set()
        stack = list(self.outputs)
        while stack:
            v = stack.pop()
            if v not in ancestors:
                ancestors.add(v)
                stack.extend(edge.source for edge in self.neurons[v].edges)
        return ancestors

    def states(self, x: Sequence[Number]) -> list[State]:
        """Compute v(θ, x) and the activations of its edges for every neuron.

        Args:
            x: One number per input neuron, in order.

        Returns:
            One state per neuron.
        """
        values: Iterator[Number] = iter(x)
        states: list[State] = []
        for neuron in self.neurons:
            if neuron.kind == "input":
                states.append(State(next(values), (), ()))
            else:
                states.append(_respond(neuron, [states[edge.source].value * edge.weight for edge in neuron.edges]))
        return states

    def activation(self, path: Path, states: Sequence[State]) -> Number:
        """Return a_p(θ, x): the product of the activations along the path.

        Args:
            path: The path.
            states: What `states` returned for x.

        Returns:
            A number in [−1, 1].
        """
        product: Number = 1 if path.bias is None else states[path.start].biases[path.bias]
        for v, edge in path.steps:
            product = product * states[v].edges[edge]
        return product


def _respond(neuron: Neuron, arriving: list[Number]) -> State:
    """Return a neuron's value and activations, given what arrives on its edges.

    The value is always Σ activation·arriving over edges plus Σ activation·bias over biases: the key identity (4), neuron by
    neuron. A pool of (3, 5) with k = 1 is 5 with activations (0, 1); a clamp to [0, 6] of 8 is its upper bound, activation 1.
    """
    biases = [bias.value for bias in neuron.biases]
    if neuron.kind == "pool":
        candidates = arriving + biases
        ranked = sorted(candidates, reverse=True)[neuron.k - 1]
        first = candidates.index(ranked)
        active = [1 if index == first else 0 for index in range(len(candidates))]
        return State(ranked, tuple(active[: len(arriving)]), tuple(active[len(arriving) :]))
    if neuron.kind == "clamp":
        z = sum(arriving, 0)
        crossed = neuron.low is not None and neuron.high is not None and biases[neuron.low] > biases[neuron.high]
        if neuron.high is not None and (crossed or z >= biases[neuron.high]):  # min(max(z, low), high)
            on = neuron.high
        elif neuron.low is not None and z <= biases[neuron.low]:
            on = neuron.low
        else:
            return State(z, (1,) * len(arriving), (0,) * len(biases))
        return State(biases[on], (0,) * len(arriving), tuple(int(index == on) for index in range(len(biases))))
    z = sum(arriving, 0) + sum(biases, 0)
    slope: Number = 1
    if neuron.kind == "slopes":
        slope = neuron.slopes[0] if z > 0 else neuron.slopes[1]
    return State(slope * z, (slope,) * len(arriving), (slope,) * len(biases))
