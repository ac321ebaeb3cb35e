"""Programs of several tracks against the list of all paths, and what bounds their rounding beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import pathlift
from agreement import random_perceptron
from pathlift.graph.layers import WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.backward import sum_of_outputs
from pathlift.passes.differences import DifferenceMomentProgram, DualProgram, PivotProgram
from pathlift.passes.products import ProductProgram
from pathlift.passes.programs import Values
from pathlift.passes.propagate import propagate
from pathlift.passes.squares import HellingerProgram, InnerProgram, SquaredDifferenceProgram


@dataclass(frozen=True)
class Pair:
    """Two networks as they are."""

    values: tuple[Values, Values]

    @property
    def changed(self) -> frozenset[WeightTensor]:
        """All."""
        return frozenset(self.values[0])

    def parts(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """θ and θ'."""
        return tuple(values[weight] for values in self.values)

    def joined(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """The same."""
        return parts[0], parts[1]


class Larger:
    """g = max(|θ|, |θ'|)."""

    def extras(self, weight: WeightTensor) -> tuple[Tensor, ...]:
        """None."""
        return ()

    def __call__(self, weight: WeightTensor, a: Tensor, b: Tensor, *_: Tensor) -> Tensor:
        """Take the larger."""
        return torch.maximum(a.abs(), b.abs())


PROGRAMS: dict[str, tuple[Callable[[Network, Pair], ProductProgram], dict[int, Callable[..., Tensor]], Mapping[int, int]]] = {
    "inner": (lambda n, p: InnerProgram(n, *p.values), {0: lambda a, b, m, g: a * b}, {0: 1}),
    "squares": (
        lambda n, p: SquaredDifferenceProgram(n, *p.values, set(p.changed)),
        {0: lambda a, b, m, g: a**2, 1: lambda a, b, m, g: (b - a) * a, 2: lambda a, b, m, g: (b - a) ** 2},
        {1: 3, 2: 4},
    ),
    "Hellinger": (
        lambda n, p: HellingerProgram(n, *p.values, set(p.changed)),
        {0: lambda a, b, m, g: a.abs(), 2: lambda a, b, m, g: (b.abs().sqrt() - a.abs().sqrt()) ** 2},
        {1: 3, 2: 4},
    ),
    "pivot": (
        lambda n, p: PivotProgram(n, p),
        {
            0: lambda a, b, m, g: a.abs(), 1: lambda a, b, m, g: a.abs() - m,
            2: lambda a, b, m, g: b.abs(), 3: lambda a, b, m, g: b.abs() - m,
        },
        {},
    ),
    "dual": (
        lambda n, p: DualProgram(n, p, {}),
        {0: lambda a, b, m, g: a.abs(), 1: lambda a, b, m, g: (b - a) * a.sign()},
        {0: 2, 1: 3},
    ),
    "moment 4": (
        lambda n, p: DifferenceMomentProgram(n, p, 4, Larger()),
        {4: lambda a, b, m, g: (b - a) ** 4 / g**3, 2: lambda a, b, m, g: (b - a) ** 2 * a**2 / g**3},
        {1: 5, 2: 6, 3: 7, 4: 8},
    ),
}  # fmt: skip


@functools.cache
def networks() -> tuple[Network, Pair, Sequence[Tensor]]:
    """Two perceptrons, and of each path Φ, Φ', |Φ| of the pivot and Φ(g)."""
    model, other = random_perceptron(3, 4, 4, 2), random_perceptron(3, 4, 4, 2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    first, second = pathlift.capture(model, (3,)), pathlift.capture(other, (3,))
    state = {name: (dict(model.named_parameters())[name], dict(other.named_parameters())[name]) for name in first.parameters}
    pivot = {n: torch.where(a * b > 0, torch.minimum(a.abs(), b.abs()), 0.0) for n, (a, b) in state.items()}
    larger = {n: torch.maximum(a.abs(), b.abs()) for n, (a, b) in state.items()}
    models = [model, other, *(pathlift.rescaling.with_state(model, each) for each in (pivot, larger))]
    liftings = [pathlift.path_lifting(each, (3,)).phi.detach() for each in models]
    pair = Pair((first.values(), dict(zip(first.values(), second.values().values(), strict=True))))
    return first, pair, liftings


@pytest.mark.parametrize("name", PROGRAMS)
def test_tracks_are_the_sums_over_all_paths_and_bounded_by_those_of_magnitudes(name: str) -> None:
    make, sums, magnitudes = PROGRAMS[name]
    network, pair, liftings = networks()
    program = make(network, pair)
    tracks = propagate(network, program)

    def total(track: int) -> float:
        found = sum_of_outputs(network, tracks, track)
        return 0.0 if found is None else float(found.tensor) * 2.0**found.exponent

    for track, of_path in sums.items():
        assert total(track) == pytest.approx(float(of_path(*liftings).sum()), rel=1e-10)
    for track, magnitude in magnitudes.items():
        assert program.tracks > magnitude
        assert abs(total(track)) <= (1 + 1e-12) * total(magnitude)


@pytest.mark.parametrize("name", PROGRAMS)
def test_entries_are_what_was_announced(name: str) -> None:
    make, *_ = PROGRAMS[name]
    network, pair, _ = networks()
    program = make(network, pair)
    for weight in network.values():
        found = program.entries(weight, *pair.parts(weight))
        assert set(found) == set(program.keys(weight))
