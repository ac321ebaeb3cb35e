"""The reference: it imports nothing of the library, and says for single operators what one says by hand."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import rooms
from pathlift.reference import Bias, Dag, Edge, Probe, ProbeError, dag_of


class Applied(nn.Module):
    """A function of the input, and of two parameters."""

    def __init__(self, function: Callable[[Applied, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a = nn.Parameter(torch.tensor([2.0, 3.0], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([5.0, 7.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def written(function: Callable[[Applied, Tensor], Tensor], *shape: int) -> Dag:
    return dag_of(Applied(function), torch.zeros(1, *shape))


def into(dag: Dag, output: int) -> tuple[tuple[Edge, ...], tuple[Bias, ...]]:
    neuron = dag.neurons[dag.outputs[output]]
    return neuron.edges, neuron.biases


def test_the_reference_imports_nothing_but_torch() -> None:
    """So that what is tested against it shares no code with it."""
    imported = rooms.imports()
    assert any(room == "reference" for room in map(rooms.room, imported))
    for module, path in rooms.modules().items():
        if rooms.room(module) != "reference":
            continue
        assert {rooms.room(other) for other in imported[module]} <= {"reference"}, module
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= {"torch", "pathlift", *sys.stdlib_module_names}, module


# ------------------------------------------------------------------------------------------------- operators, worked by hand


def test_a_linear_layer_has_its_weights_on_its_edges() -> None:
    """y_o = Σ_i W_oi·x_i + β_o."""
    layer = nn.Linear(2, 1)
    w0, w1, bias = *layer.weight[0].tolist(), layer.bias.item()
    edges, biases = into(dag_of(layer, torch.zeros(1, 2)), 0)
    assert edges == (Edge(0, w0, ("weight", 0)), Edge(1, w1, ("weight", 1)))
    assert biases == (Bias(bias, ("bias", 0)),)


def test_constants_weigh_without_a_label_and_what_is_read_twice_has_two_edges() -> None:
    edges, biases = into(written(lambda own, x: x + x / 2 + 4, 1), 0)
    assert biases == (Bias(4.0),)
    assert sum(edge.weight for edge in into(written(lambda own, x: x + x, 1), 0)[0]) == 2
    assert all(edge.label is None for edge in edges)


def test_a_parameter_that_multiplies_and_is_added_is_an_edge_and_a_bias() -> None:
    dag = written(lambda own, x: torch.addcmul(own.b, x, own.a), 2)
    assert into(dag, 1) == ((Edge(1, 3.0, ("a", 1)),), (Bias(7.0, ("b", 1)),))


def test_an_activation_has_the_slopes_that_it_has_at_one() -> None:
    for function, gain, slopes in (
        (F.relu, 1.0, (1.0, 0.0)),
        (torch.abs, 1.0, (1.0, -1.0)),
        (lambda x: F.leaky_relu(x, 0.25), 1.0, (1.0, 0.25)),
        (lambda x: F.leaky_relu(x, 4.0), 4.0, (0.25, 1.0)),
    ):
        dag = written(lambda own, x, function=function: function(x), 1)
        neuron = dag.neurons[dag.outputs[0]]
        assert (neuron.kind, neuron.edges, neuron.slopes) == ("slopes", (Edge(0, gain),), slopes)


def test_a_maximum_reads_what_raises_it_and_a_minimum_is_the_last_of_its_candidates() -> None:
    dag = written(lambda own, x: F.max_pool1d(x, 2, 1), 1, 3)
    assert [[edge.source for edge in into(dag, output)[0]] for output in (0, 1)] == [[0, 1], [1, 2]]
    dag = written(lambda own, x: torch.minimum(x, own.a), 2)
    neuron = dag.neurons[dag.outputs[1]]
    assert (neuron.kind, neuron.k, neuron.edges, neuron.biases) == ("pool", 2, (Edge(1, 1.0),), (Bias(3.0, ("a", 1)),))


def test_a_batch_norm_is_its_scale_and_shift() -> None:
    norm = nn.BatchNorm1d(1, eps=0.0).double().eval()
    norm.running_mean.fill_(3.0), norm.running_var.fill_(4.0)
    nn.init.constant_(norm.weight, 6.0), nn.init.constant_(norm.bias, 5.0)
    edges, biases = into(dag_of(norm, torch.zeros(1, 1)), 0)
    assert edges == (Edge(0, 3.0, ("weight", 0)),) and biases == (Bias(-4.0, ("bias", 0)),)


def test_a_border_of_minus_infinity_has_no_neurons() -> None:
    dag = written(lambda own, x: F.max_pool1d(F.pad(x, (1, 0), value=-torch.inf), 2, 1), 1, 2)
    assert [[edge.source for edge in into(dag, output)[0]] for output in (0, 1)] == [[0], [0, 1]]


# --------------------------------------------------------------------------------------------------------- what is refused


def padded(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1), value=-torch.inf)


REFUSED: dict[str, Callable[[Applied, Tensor], Tensor]] = {
    "a product of activations": lambda own, x: x * x,
    "a product of two parameters": lambda own, x: torch.addcmul(x, own.a.reshape(1, 1, 2), own.b.reshape(1, 1, 2)),
    "sine": lambda own, x: torch.sin(x),
    "a sum of two borders": lambda own, x: F.max_pool1d(padded(x) + padded(x), 3),
    "a border that is scaled": lambda own, x: F.max_pool1d(padded(x) * 2, 3),
    "a border that comes out": lambda own, x: padded(x),
    "a border through ReLU": lambda own, x: F.max_pool1d(F.leaky_relu(padded(x), 0.1), 3),
    "a border through PReLU": lambda own, x: F.max_pool1d(F.prelu(padded(x), own.a[:1]), 3),
    "a border through a batch norm": lambda own, x: F.max_pool1d(F.batch_norm(padded(x), own.a[:1], own.a[:1]), 3),
    "a border through a clamp": lambda own, x: F.max_pool1d(F.relu6(padded(x)), 3),
    "bounds that depend on the input": lambda own, x: torch.clamp(x, max=x.flip(-1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_out_is_refused(name: str) -> None:
    with pytest.raises(ProbeError):
        written(REFUSED[name], 1, 2)


# ---------------------------------------------------------------------------------------------------------- models, states


def test_the_model_is_not_changed_and_may_hold_weights_that_a_hook_computes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.ReLU(), nn.Linear(2, 1))
    prune.random_unstructured(model[0], "weight", 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert dag_of(model, torch.zeros(1, 2)).count() == 2 * 2 + 2 + 1
    assert all(module.training for module in model.modules())
    assert all(
        torch.equal(tensor, before[name]) and tensor.dtype == torch.float32 for name, tensor in model.state_dict().items()
    )


def test_a_probe_takes_other_weights() -> None:
    layer = nn.Linear(1, 1)
    edges, biases = into(
        Probe(layer, torch.zeros(1, 1)).dag({"weight": torch.tensor([[11.0]]), "bias": torch.tensor([13.0])}), 0
    )
    assert (edges[0].weight, biases[0].value) == (11, 13)
