"""Positions that are only read as averages are stored as averages: the same sums over paths, with fewer products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from agreement import randomised
from pathlift.edges.base import Edges
from pathlift.edges.chain import Chain
from pathlift.edges.gathered import GatheredConvolution
from pathlift.edges.window import Averages, Taps
from pathlift.graph.averaged import averaged, averaging
from pathlift.graph.compact import compacted
from pathlift.graph.layers import Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.backward import Backward
from pathlift.passes.programs import DifferenceProgram, PartsProgram, ScoreProgram
from pathlift.passes.propagate import propagate
from pathlift.passes.rounding import rounding_factor


class Residual(nn.Module):
    """Two convolutions, one with a stride, beside a shortcut whose positions have other classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 2, 1)
        self.second = nn.Conv2d(4, 4, 3, 1, 1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.shortcut = nn.Conv2d(3, 4, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.second(F.relu(self.first(x)))) + self.shortcut(x))


class Dense(nn.Module):
    """What two convolutions make, beside what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(5, 2, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x, F.relu(self.first(x))), 1)
        return torch.cat((x, F.relu(self.second(x))), 1)


class Spread(nn.Module):
    """A bias and a factor of its own at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.scale = nn.Parameter(torch.ones(3, 9, 9)), nn.Parameter(torch.ones(9, 9))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.bias


class Mean(nn.Module):
    def __init__(self, *dims: int, keepdim: bool = False) -> None:
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=self.keepdim)


CONV = nn.Conv2d

MODELS = {
    "mean": lambda: (CONV(3, 4, 3, padding=1), nn.ReLU(), CONV(4, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1)),
    "one dimension": lambda: (CONV(3, 4, 3, padding=1), CONV(4, 5, (3, 2)), Mean(3), nn.ReLU(), nn.Linear(7, 2)),
    "kept": lambda: (CONV(3, 4, 5, padding=(4, 1)), Mean(2, 3, keepdim=True), CONV(4, 3, 1)),
    "residual": lambda: (CONV(3, 3, 3, padding=1), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    "dense": lambda: (
        CONV(3, 3, 2),
        Dense(),
        CONV(7, 4, 1),
        nn.AvgPool2d(2),
        CONV(4, 2, 3, padding=1),
        Mean(2, 3),
    ),
    "largest": lambda: (
        CONV(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        CONV(4, 4, 3, padding=1),
        Mean(2, 3),
    ),
    "transposed": lambda: (CONV(3, 4, 3, 2), nn.ConvTranspose2d(4, 3, 3, 2, 1), CONV(3, 3, 3), Mean(2, 3)),
    "padding alone": lambda: (CONV(3, 2, 1, padding=5), nn.ReLU(), nn.AvgPool2d(4, 15)),
    "spread": lambda: (CONV(3, 3, 3, padding=1), Spread(), CONV(3, 3, 3), nn.BatchNorm2d(3), Mean(2, 3)),
    "uneven": lambda: (CONV(3, 3, 3, padding=1), nn.AdaptiveAvgPool2d((4, 2)), CONV(3, 3, 2), Mean(-1, -2)),
}


def links(edges: Edges) -> tuple[Edges, ...]:
    return edges.links if isinstance(edges, Chain) else (edges,)


def network(name: str) -> Network:
    return pathlift.capture(randomised(nn.Sequential(*MODELS[name]()), 0).double(), (3, 9, 9))


def numbers(net: Network, q: float) -> dict[str, Tensor]:
    """Both parts of the path-norm per output, the difference to smaller weights, and the shares of weights and channels."""
    values = net.values()
    smaller = {weight: value * 0.75 if value.dim() > 1 else value for weight, value in values.items()}
    changed = {weight for weight, value in values.items() if value.dim() > 1}
    found: dict[str, Tensor] = {}
    programs = {
        "part": PartsProgram(net, values, torch.float64, q=q),
        "pair": DifferenceProgram(net, values, smaller, torch.float64, changed),
    }
    for kind, program in programs.items():
        for name, tracks in propagate(net, program).items():
            for number, value in enumerate(tracks):
                found[f"{kind} {number} of {name}"] = torch.zeros(()) if value is None else torch.exp2(value.log2())

    def add(key: str, share: Tensor) -> None:
        found[key] = found[key] + share if key in found else share

    def share(weight: WeightTensor, tensor: Tensor) -> None:
        add(f"share of {weight.score_name}", tensor)

    def unit(layer: Layer, mass: Tensor) -> None:
        add(f"unit {layer.unit_name}", mass.sum([dim for dim in range(mass.dim()) if dim != layer.unit_dim]))

    program = ScoreProgram(net, values, torch.float64, q=q)
    Backward(net, program, share=share, unit=unit).run(propagate(net, program, keep=True))
    return found


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_averages_give_the_same_sums_and_shares_with_no_more_numbers(name: str) -> None:
    compact = compacted(network(name))
    fewer = averaged(compact)
    assert averaged(fewer) is fewer
    for q in (1.0, 2.5):
        expected, found = numbers(compact, q), numbers(fewer, q)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=0.0, msg=lambda text, key=key: f"{key}: {text}")  # type: ignore[misc]
    sizes = [(sum(torch.Size(layer.shape).numel() for layer in net.layers)) for net in (compact, fewer)]
    assert sizes[1] < sizes[0]
    matrices = [edges for layer in fewer.layers for connection in layer.connections for edges in links(connection.edges)]
    averages = [edges for edges in matrices if isinstance(edges, Averages) and not isinstance(edges, Taps)]
    assert averaging(fewer) >= sum(matrix.shape[1] for edges in averages for matrix in edges.matrices.values()) > 0
    assert rounding_factor(compact) >= 4 * averaging(fewer) * 2.0**-53


def test_a_mean_of_a_convolution_reads_three_averages_along_each_dimension() -> None:
    net = pathlift.capture(nn.Sequential(nn.Conv2d(2, 3, 3, padding=2), nn.Conv2d(3, 4, 3, padding=1), Mean(2, 3)), (2, 5, 5))
    first, second, mean = (layer for layer in averaged(net).layers if layer.kind == "hidden")
    assert compacted(net).layer[second.name].shape == (1, 4, 7, 7)
    assert (first.shape, second.shape, mean.shape) == ((1, 3, 3, 3), (1, 4, 1, 1), (1, 4))
    (chain,) = (connection.edges for connection in second.connections)
    assert isinstance(chain, Chain)
    scales, convolution = chain.links
    assert isinstance(scales, Averages) and isinstance(convolution, GatheredConvolution)
    for matrix in scales.matrices.values():
        torch.testing.assert_close(matrix, torch.diag(torch.tensor([6 / 7, 1.0, 6 / 7], dtype=torch.float64)))


def test_what_varies_over_space_is_not_averaged() -> None:
    thin = averaged(network("spread"))
    (spread,) = (layer for layer in thin.layers if any(len(bias.view) > 2 and bias.view[-1] > 1 for bias in layer.biases))
    assert spread.shape == (1, 3, 9, 9)


def test_outputs_are_told_apart_by_position() -> None:
    net = pathlift.capture(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3)), (3, 9, 9))
    assert [layer.shape for layer in averaged(net).layers] == [layer.shape for layer in compacted(net).layers]
    assert pathlift.path_norm(net).per_output.shape == (2, 7, 7)
