"""The captured graph is the model: run with its nonlinearities, it computes what the model computes."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import pathlift
from agreement import examples, outputs, randomised, samples
from cases import NETWORKS, OPERATORS, Case
from habit import LONGER
from networks import networks, over
from pathlift.passes.forward import feed_of, flat_outputs, forward


def assert_runs(model: nn.Module, shape: tuple[int, ...]) -> None:
    batch = samples(shape)
    network = pathlift.capture(model, examples(shape))
    values = forward(network, network.values(), feed_of(network, batch), torch.float64)
    expected = outputs(model, batch)
    torch.testing.assert_close(flat_outputs(network, values, len(batch[0])), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [*OPERATORS, *NETWORKS], ids=lambda case: case.name)
def test_the_graph_computes_what_the_model_computes(case: Case) -> None:
    assert_runs(randomised(case.make()), case.shape)


@pytest.mark.one_in(20)
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("part", range(12 * LONGER))
def test_random_graphs_compute_what_the_model_computes(part: int) -> None:
    over(networks(), 300, part, lambda model, shape, weights: assert_runs(randomised(model, weights), shape))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_classifiers_run_in_float32(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    x = torch.randn(2, 3, 64, 64)
    network = pathlift.capture(model, (3, 64, 64))
    values = forward(network, network.values(), feed_of(network, (x,)), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(flat_outputs(network, values, 2), model(x), rtol=1e-3, atol=1e-4)
