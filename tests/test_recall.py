"""On an accelerator a pass waits once, not at every layer, and gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pathlift
from pathlift.edges.weights import Weights
from pathlift.graph.network import Network, _memories


class Waits(TorchDispatchMode):
    """Counts how often the host asks for numbers that are on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def waits(run: Callable[[], object]) -> int:
    lists = torch.Tensor.tolist
    with Waits() as counted, pytest.MonkeyPatch.context() as patch:

        def tolist(tensor: torch.Tensor) -> Any:
            counted.count += 1
            return lists(tensor)

        patch.setattr(torch.Tensor, "tolist", tolist)
        run()
    return counted.count


def deep(layers: int) -> nn.Module:
    torch.manual_seed(0)
    pairs: list[nn.Module] = []
    for _ in range(layers):
        pairs += [nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()]
    return nn.Sequential(*pairs).eval()


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Network, "memory", lambda self, *key: self.remembered(_memories).setdefault(key, {}))
    monkeypatch.setattr(Weights, "extent", None)


def passes(network: Network) -> list[Callable[[], Any]]:
    smaller = {name: weight * 0.5 if weight.dim() == 2 else weight for name, weight in network.state.items()}
    return [
        lambda: pathlift.path_norm(network).log10,
        lambda: list(pathlift.path_magnitude(network).values()),
        lambda: list(pathlift.unit_path_magnitude(network).values()),
        lambda: pathlift.path_metric(network, smaller).value,
    ]


def same(one: Any, two: Any) -> bool:
    return all(map(torch.equal, one, two)) if isinstance(one, list) else one == two


@pytest.mark.hunt
def test_the_number_of_waits_does_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [run() for run in passes(pathlift.capture(deep(40), (16,)))]
    monkeypatch.setattr(Network, "memory", lambda self, *key: self.remembered(_memories).setdefault(key, {}))
    monkeypatch.setattr(Weights, "extent", None)  # of weights on the CPU alone
    for run, wanted in zip(passes(pathlift.capture(deep(40), (16,))), expected, strict=True):
        first = waits(run)
        assert same(run(), wanted)
        assert waits(run) < first
        assert same(run(), wanted)
    counts = []
    for layers in (10, 40):
        own = passes(pathlift.capture(deep(layers), (16,)))[:3]
        for run in own:
            run()
        counts.append([waits(run) for run in own])
    few, many = counts
    assert few == many
    assert max(few) < 12


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("scale", [1.0001, 3.0, 1e-3, 1e30, 0.0])
def test_a_memory_that_no_longer_fits_is_found_out(scale: float) -> None:
    model = deep(12)
    network = pathlift.capture(model, (16,))
    for run in passes(network):
        run()
    with torch.no_grad():
        model[6].weight.mul_(scale)
    fresh = pathlift.capture(model, (16,))
    for run, wanted in zip(passes(network), passes(fresh), strict=True):
        assert same(run(), wanted())


@pytest.mark.usefixtures("as_on_a_device")
def test_a_weight_that_became_nan_is_named() -> None:
    model = deep(3)
    network = pathlift.capture(model, (16,))
    pathlift.path_norm(network)
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(pathlift.NumericalError, match=r"3\.weight"):
        pathlift.path_norm(network)


@pytest.mark.usefixtures("as_on_a_device")
def test_whether_shares_are_too_small_for_float32_is_remembered_too() -> None:
    def model(scale: float) -> nn.Module:
        own = deep(6)
        with torch.no_grad():
            own[3].weight[2] *= scale
            own[9].weight[:, 1] = 0.0
        return own

    network = pathlift.capture(model(1e-36), (16,))
    right = pathlift.path_magnitude(model(1e-36).double(), (16,))
    first = waits(lambda: pathlift.path_magnitude(network))
    assert waits(lambda: pathlift.path_magnitude(network)) < first / 2
    found = pathlift.path_magnitude(network)
    for name, share in right.items():
        torch.testing.assert_close(found[name].double(), share, rtol=1e-5, atol=0.0)
    assert found["3.weight"].dtype == torch.float64
    other = pathlift.capture(model(1.0), (16,))
    other.remembered(_memories).update(network.remembered(_memories))
    assert pathlift.path_magnitude(other)["3.weight"].dtype == torch.float32
