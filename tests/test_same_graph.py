"""Which two networks may be compared: the same function of their parameters, whatever surrounds it.

Constants have values: networks that differ in one are never equal. In-place operators, dropout, identity modules, the order of
registration, wrappers and a pass through `torch.nn.utils.prune` make no difference.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import pathlift
from agreement import parallel
from pathlift import MismatchError
from pathlift.reading.fingerprint import fingerprint

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
VECTOR = torch.rand(6, generator=torch.Generator().manual_seed(1)) + 0.5
ORDER = torch.arange(6)


class With(nn.Module):
    """Two layers, and in between a function with a constant."""

    def __init__(self, function: Callable[..., Tensor], constant: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.function, self.constant = function, constant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), self.constant))


CONSTANTS: dict[str, tuple[Callable[[Tensor, Any], Tensor], Any, Any]] = {
    "factor": (lambda h, k: F.relu(h) * k, 1.5, 2.0),
    "whole factor": (lambda h, k: F.relu(h) * k, 2, 3),
    "factor of one element": (lambda h, k: F.relu(h) * k, torch.tensor(1.5), torch.tensor(2.0)),
    "vector": (lambda h, k: F.relu(h) * k, VECTOR, VECTOR * 1.1),
    "last bit": (lambda h, k: F.relu(h) * k, VECTOR, torch.nextafter(VECTOR, VECTOR + 1)),
    "shift": (lambda h, k: F.relu(h + k), VECTOR, VECTOR.flip(0)),
    "divisor": (lambda h, k: F.relu(h) / k, 1.5, 2.0),
    "power": (lambda h, k: F.relu(h) * k**2, torch.tensor(2.0), torch.tensor(3.0)),
    "slope": (F.leaky_relu, 0.1, 0.2),
    "upper end": (lambda h, k: h.clamp(0, k), 6.0, 5.0),
    "lower end": (lambda h, k: h.clamp(min=k), 0.0, 0.1),
    "border": (lambda h, k: F.pad(F.relu(h), (1, 0), value=k)[:, :6], 0.0, 1.0),
    "index": (lambda h, k: F.relu(h)[:, k], ORDER, ORDER.flip(0)),
    "index list": (lambda h, k: F.relu(h)[:, k], [0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5]),
    "mask": (lambda h, k: F.relu(h).masked_fill(k, 0.0), ORDER > 2, ORDER < 2),
    "choice": (lambda h, k: torch.where(k, F.relu(h), h), ORDER > 2, ORDER < 2),
    "roll": (lambda h, k: torch.roll(F.relu(h), k, 1), 1, 2),
    "stride": (lambda h, k: F.avg_pool1d(F.pad(F.relu(h), (0, 10)), 3, k)[..., :6], 1, 2),
    "eps": (lambda h, k: F.relu(F.batch_norm(h, VECTOR * 0, VECTOR, eps=k)), 1e-5, 1e-3),
    "matrix": (lambda h, k: F.relu(h) @ k, torch.eye(6), torch.eye(6).flip(0)),
    "maximum": (torch.maximum, VECTOR * 0, VECTOR),
    "list entry": (lambda h, k: F.relu(h) * k[1], [0.0, 1.5], [0.0, 2.0]),
    "dict entry": (lambda h, k: F.relu(h) * k["a"], {"a": 1.5}, {"a": 2.0}),
    "branch": (lambda h, k: F.relu(h) if k else h, True, False),
    "number of rounds": (lambda h, k: F.relu(h) * 2.0**k, 1, 2),
}  # fmt: skip


def _closing(constant: float) -> nn.Module:
    return With(lambda h, _: F.relu(h) * constant, None)


def _defaulting(constant: float) -> nn.Module:
    def function(h: Tensor, _: None, factor: float = constant) -> Tensor:
        return F.relu(h) * factor

    return With(function, None)


def _hooked(constant: float) -> nn.Module:
    model = With(lambda h, _: F.relu(h), None)
    model.first.register_forward_hook(lambda module, given, result: result * constant)
    return model


PAIRS: dict[str, tuple[nn.Module, nn.Module]] = {
    **{name: (With(function, one), With(function, two)) for name, (function, one, two) in CONSTANTS.items()},
    "closure": (_closing(1.5), _closing(2.0)),
    "default argument": (_defaulting(1.5), _defaulting(2.0)),
    "hook": (_hooked(1.5), _hooked(2.0)),
}

COMPARISONS: dict[str, Callable[[nn.Module, Any], object]] = {
    "path_metric": lambda model, other: pathlift.path_metric(model, other, (4,)),
    "path_metrics": lambda model, other: list(pathlift.path_metrics(model, [other], (4,))),
    "path_metric_bounds": lambda model, other: pathlift.metric.path_metric_bounds(model, other, (4,)),
    "lipschitz_bound": lambda model, other: pathlift.lipschitz_bound(model, other, X),
    "path_kernel": lambda model, other: pathlift.path_kernel([model, other], (4,)),
    "equivalent": lambda model, other: pathlift.equivalent(model, other, (4,)),
    "rescaling_distance": lambda model, other: pathlift.rescaling.rescaling_distance(model, other, (4,)),
    "align": lambda model, other: pathlift.align(model, other, (4,)),
    "certify": lambda model, other: pathlift.certify(model, X, other),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("pair", PAIRS)
def test_networks_that_differ_in_a_constant_are_never_equal(pair: str) -> None:
    model, other = PAIRS[pair]
    network = pathlift.capture(model, (4,))
    assert pathlift.capture(other, (4,)).graph.checked  # each is sound by itself
    with pytest.raises(MismatchError, match=r"constant|graph|differ"):
        pathlift.path_metric(network, other)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", COMPARISONS)
def test_no_comparison_overlooks_a_constant(name: str) -> None:
    for pair in ("vector", "index", "closure"):
        with pytest.raises(MismatchError, match=r"constant|graph|differ"):
            COMPARISONS[name](*PAIRS[pair])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", [lambda own: pathlift.capture(own, (4,)), torch.compile, parallel, nn.Sequential])
@pytest.mark.parametrize("pair", ["factor", "hook"])
def test_no_form_of_the_second_network_hides_a_constant(pair: str, form: Callable[[nn.Module], Any]) -> None:
    model, other = PAIRS[pair]
    with pytest.raises(MismatchError):
        pathlift.path_metric(model, form(other), (4,))
    with pytest.raises(MismatchError):
        pathlift.certify(model, X, form(other))


def test_a_network_compared_with_itself_is_equal_whatever_constants_it_has() -> None:
    for name in ("factor", "vector", "mask", "matrix", "list entry", "eps"):
        function, constant, _ = CONSTANTS[name]
        one, two = With(function, constant), With(function, constant)
        assert pathlift.path_metric(one, two, (4,)).value == 0, name
        with torch.no_grad():
            two.last.bias.add_(1)
        metric = pathlift.path_metric(one, two, (4,))
        assert metric.lower <= 3 * (1 + 1e-6) and metric.upper >= 3 * (1 - 1e-6), name  # three biases moved by one


# ---- the same network


def plain() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Identity(), nn.Linear(6, 3))


def moved() -> nn.Sequential:
    """The same architecture with other weights."""
    model = plain()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5).add_(0.1)
    return model


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Parallel(nn.Module):
    """Like the wrappers of data-parallel training."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Functional(nn.Module):
    """The same layers, registered the other way round and called by hand."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.add_module("3", model[3])
        self.add_module("0", model[0])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.get_submodule("0")(x).relu()
        return self.get_submodule("3")(hidden)


def _replaced(place: int, layer: Callable[[], nn.Module]) -> Callable[[nn.Sequential], nn.Module]:
    def change(model: nn.Sequential) -> nn.Module:
        model[place] = layer()
        return model

    return change


def _changed(change: Callable[[nn.Sequential], object]) -> Callable[[nn.Sequential], nn.Module]:
    def made(model: nn.Sequential) -> nn.Module:
        change(model)
        return model

    return made


def _masked(model: nn.Sequential) -> nn.Module:
    for layer in (model[0], model[3]):
        for name in ("weight", "bias"):
            prune.identity(layer, name)
    return model


def _compiled_child(model: nn.Sequential) -> nn.Module:
    model[0] = torch.compile(model[0], backend="eager")
    return model


def _compiled_forward(model: nn.Sequential) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def _made_permanent(model: nn.Sequential) -> nn.Module:
    prune.identity(model[0], "weight")
    prune.remove(model[0], "weight")
    return model


SAME: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "itself": lambda model: model,
    "in place": _replaced(1, lambda: nn.ReLU(inplace=True)),
    "dropout": _replaced(2, lambda: nn.Dropout(0.5)),
    "train": lambda model: model.train(),
    "a pruning pass": lambda model: prune.identity(model[0], "weight") and model,
    "masks everywhere": _masked,
    "masks made permanent": _made_permanent,
    "sequential": nn.Sequential,
    "sequential twice": lambda model: nn.Sequential(nn.Sequential(model)),
    "plain wrapper": Around,
    "plain wrapper of masks": lambda model: Around(_masked(model)),
    "data parallel": parallel,
    "distributed": Parallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": _changed(lambda model: model.compile(backend="eager")),
    "compiled child": _compiled_child,
    "compiled forward": _compiled_forward,
    "compiled wrapper": lambda model: torch.compile(Around(model), backend="eager"),
    "averaged": AveragedModel,
    "averaged wrapper": lambda model: AveragedModel(Around(model)),
    "parallel and compiled": lambda model: parallel(torch.compile(model, backend="eager")),
    "recording hook": _changed(lambda model: model[0].register_forward_hook(lambda *given: None)),
    "order of registration": Functional,
}


def _alike(one: float, two: float) -> bool:
    return abs(one - two) <= 1e-5 * max(abs(one), abs(two))


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("way", SAME)
def test_what_surrounds_a_network_makes_no_difference(way: str) -> None:
    model, first, second = SAME[way](plain()), plain(), moved()
    norm = pathlift.path_norm(first, (4,)).log10
    network = pathlift.capture(first, (4,))
    assert _alike(pathlift.path_norm(model, (4,)).log10, norm)
    given, own = (pathlift.log_path_norm(network, weights).item() for weights in (model, first))
    assert _alike(given, own)
    for other in (model, model.state_dict(), pathlift.capture(model, (4,))):
        assert pathlift.path_metric(first, other, (4,)).value == 0
        assert _alike(pathlift.path_metric(second, other, (4,)).upper, pathlift.path_metric(second, first, (4,)).upper)
    for other in (first, first.state_dict()):
        assert pathlift.path_metric(model, other, (4,)).value == 0
    assert pathlift.equivalent(first, model, (4,))
    # distances from the wrapped network enclose the same number
    found, right = pathlift.path_metric(model, second.state_dict(), (4,)), pathlift.path_metric(first, second, (4,))
    assert found.lower <= right.upper * (1 + 1e-6) and right.lower <= found.upper * (1 + 1e-6)


def test_masks_are_part_of_a_second_network() -> None:
    first, masked, permanent = plain(), plain(), plain()
    for model in (masked, permanent):
        prune.l1_unstructured(model[0], "weight", 0.5)
    prune.remove(permanent[0], "weight")
    right = pathlift.path_metric(first, permanent, (4,))
    assert right.exact
    for other in (masked, masked.state_dict(), Around(masked), torch.compile(masked, backend="eager")):
        metric = pathlift.path_metric(first, other, (4,))
        assert metric.exact and _alike(metric.value, right.value)


@pytest.mark.parametrize("given", [{}, {"a": torch.ones(1)}, {"weight": torch.ones(6, 4)}, {"0.weight": torch.ones(6, 4)}])
def test_a_mapping_that_does_not_name_the_network_is_an_error(given: dict[str, Tensor]) -> None:
    with pytest.raises(MismatchError):
        pathlift.path_metric(plain(), given, (4,))


def test_an_ambiguous_or_misshapen_second_network_is_an_error() -> None:
    first = plain()
    twice = nn.ModuleDict({"a": plain(), "b": moved()})
    wider = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Identity(), nn.Linear(7, 3))
    shared = {**first.state_dict(), "0.bias": torch.ones(3)}
    for other in (twice.state_dict(), wider, wider.state_dict(), shared):
        with pytest.raises(MismatchError):
            pathlift.path_metric(first, other, (4,))


def _last(function: Callable[[nn.Linear, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """The plain network with another last layer of the same parameters."""

    def made() -> nn.Module:
        model = plain()
        model[3].forward = functools.partial(function, model[3])
        return model

    return made


DIFFERENT: dict[str, Callable[[], nn.Module]] = {
    "activation": lambda: _replaced(1, lambda: nn.LeakyReLU(0.1))(plain()),
    "no activation": lambda: _replaced(1, nn.Identity)(plain()),
    "another at the end": lambda: _replaced(2, nn.ReLU6)(plain()),
    "weight without negatives": _last(lambda layer, x: F.linear(x, layer.weight.relu(), layer.bias)),
    "weight twice": _last(lambda layer, x: F.linear(x, 2 * layer.weight, layer.bias)),
    "without bias": _last(lambda layer, x: F.linear(x, layer.weight)),
}


@pytest.mark.one_in(4, first=2)
@pytest.mark.parametrize("how", DIFFERENT)
def test_another_function_of_the_same_parameters_is_an_error(how: str) -> None:
    for one, two in ((plain(), DIFFERENT[how]()), (DIFFERENT[how](), plain())):
        with pytest.raises(MismatchError):
            pathlift.path_metric(one, two, (4,))
        with pytest.raises(MismatchError):
            pathlift.equivalent(one, pathlift.capture(two, (4,)), (4,))


def test_normalisation_statistics_and_counters() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(collections.OrderedDict(a=nn.Linear(4, 6), n=nn.BatchNorm1d(6), r=nn.ReLU(), b=nn.Linear(6, 3)))

    first, trained, other = make(), make(), make()
    trained.n.num_batches_tracked += 7
    assert pathlift.path_metric(first, trained, (4,)).value == 0
    assert pathlift.path_metric(first, Around(trained), (4,)).value == 0
    assert pathlift.path_metric(AveragedModel(first), trained, (4,)).value == 0
    other.n.running_var.mul_(2)
    for second in (other, other.state_dict(), Around(other)):
        assert pathlift.path_metric(first, second, (4,)).lower > 0


def test_a_constant_is_told_by_its_elements_and_not_by_the_memory_around_them() -> None:
    large = torch.arange(1 << 22, dtype=torch.float32)  # written down byte by byte this would take a minute
    view = large[3:8]
    assert fingerprint(view) == fingerprint(view.clone())
    assert fingerprint(view) != fingerprint(large[4:9])
    assert fingerprint(torch.tensor([1 + 2j]).conj()) == fingerprint(torch.tensor([1 - 2j]))


class TwoInputs(nn.Module):
    """Not the same in its two inputs."""

    def __init__(self, *, exchanged: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two, self.exchanged = nn.Linear(3, 4), nn.Linear(3, 4), exchanged

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (y, x) if self.exchanged else (x, y)
        return F.relu(self.one(x) + self.two(y))


def test_the_order_of_keywords_makes_no_difference() -> None:
    model = TwoInputs()
    shapes = {"x": (3,), "y": (3,)}
    first, second = pathlift.capture(model, shapes), pathlift.capture(model, dict(reversed(shapes.items())))
    assert pathlift.path_metric(first, second).value == 0
    assert pathlift.equivalent(second, first)
    samples = {"y": torch.randn(4, 3), "x": torch.randn(4, 3)}
    assert not pathlift.lipschitz_bound(first, second, samples).any()
    within = [pathlift.capture(Taking(model), {"given": given}) for given in (shapes, dict(reversed(shapes.items())))]
    assert pathlift.path_metric(*within).value == 0
    assert pathlift.path_metric(pathlift.capture(model, ((3,), (3,))), first).value == 0, "in order where containers differ"


class Taking(nn.Module):
    """Takes both inputs in a dictionary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        return self.model(**given)


def test_models_that_read_their_inputs_elsewhere_are_refused_for_that_reason() -> None:
    shapes = {"x": (3,), "y": (3,)}
    first = pathlift.capture(TwoInputs(), shapes)
    with pytest.raises(MismatchError, match="read their inputs in different places"):
        pathlift.path_metric(first, pathlift.capture(TwoInputs(exchanged=True), dict(reversed(shapes.items()))))
    with pytest.raises(MismatchError, match=r"inputs as \(tensor, tensor\), the second as \{'y'"):
        pathlift.path_metric(
            pathlift.capture(TwoInputs(), ((3,), (3,))), pathlift.capture(TwoInputs(), dict(reversed(shapes.items())))
        )
