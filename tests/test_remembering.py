"""A captured network tells what its model is now, results tell what it was, and both are values: they pickle and copy."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import pathlift
from agreement import parallel
from pathlift import Network
from pathlift.rescaling import Symmetries
from pathlift.rescaling.training import path_sgd, rescale_after_steps


class Model(nn.Module):
    """A convolution, a batch norm, weights tied and not, a plain tensor attribute, a mask in a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.body = nn.Linear(12, 4)
        self.again = nn.Linear(4, 4, bias=False)
        self.twin = nn.Linear(4, 4, bias=False)
        self.twin.weight = self.again.weight
        self.head = nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 0.5]))
        self.scale = torch.tensor([0.5, 1.0, 2.0, 1.5])
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2.0)
            self.norm.running_mean.normal_()
            self.norm.weight.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).flatten(1)
        y = torch.relu(self.body(y)) * self.mask * self.scale
        return self.head(torch.relu(self.twin(torch.relu(self.again(y)))))


SHAPE = (2, 3, 3)


def batch() -> Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))


# ---- what may happen to a model


def step(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(batch()).square().sum().backward()
        optimizer.step()
    model.eval()


def written(model: Model) -> None:
    model.head.weight.data[0] = 0.0
    model.conv.weight.data.mul_(-3.0)


def assigned(model: Model) -> None:
    model.body.weight.data = model.body.weight.data * 2.0
    model.norm.running_var.data = model.norm.running_var.data * 3.0


def cast_there_and_back(model: Model) -> None:
    model.double().float()
    with torch.no_grad():
        model.head.bias.add_(1.0)


def cast(model: Model) -> None:
    model.double()
    with torch.no_grad():
        model.head.weight.mul_(1.5)


def halved(model: Model) -> None:
    model.half()
    model.scale.data = model.scale.data.half()


def loaded_by_assignment(model: Model) -> None:
    model.load_state_dict(Model(5).state_dict(), assign=True)


def child_replaced(model: Model) -> None:
    model.head = nn.Linear(4, 3)


def child_of_another_kind(model: Model) -> None:
    model.norm = nn.Identity()


def parameter_replaced(model: Model) -> None:
    model.head.weight = nn.Parameter(torch.randn(3, 4))


def buffer_replaced(model: Model) -> None:
    model.mask = torch.tensor([0.0, 1.0, 1.0, 1.0])


def buffer_written(model: Model) -> None:
    model.mask.copy_(torch.tensor([0.0, 1.0, 1.0, 1.0]))


def untied(model: Model) -> None:
    model.twin.weight = nn.Parameter(torch.randn(4, 4))


def untied_to_the_same_values(model: Model) -> None:
    model.twin.weight = nn.Parameter(model.twin.weight.detach().clone())
    with torch.no_grad():
        model.again.weight.mul_(2.0)


def tied(model: Model) -> None:
    model.again.weight.data = model.body.weight.data[:, :4]


def parametrised(model: Model) -> None:
    parametrizations.weight_norm(model.head)
    with torch.no_grad():
        model.head.parametrizations.weight.original0.mul_(2.0)


def masked(model: Model) -> None:
    prune.l1_unstructured(model.head, "weight", 0.5)


def attribute_written(model: Model) -> None:
    model.scale.mul_(2.0)


def attribute_replaced(model: Model) -> None:
    model.scale = torch.tensor([1.0, 0.0, 1.0, 1.0])


def averaged(model: Model) -> None:
    """An average of weights is swapped in, as its users do before they validate."""
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(Model(3))
    average.update_parameters(Model(4))
    for weight, other in zip(model.parameters(), average.module.parameters(), strict=True):
        weight.data, other.data = other.data, weight.data


def zeroed(model: Model) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()


def shape_changed(model: Model) -> None:
    model.head.weight.data = torch.randn(5, 4)
    model.head.bias.data = torch.randn(5)


CHANGES: tuple[Callable[[Model], None], ...] = (
    step, written, assigned, cast_there_and_back, cast, halved, loaded_by_assignment, child_replaced, child_of_another_kind,
    parameter_replaced, buffer_replaced, buffer_written, untied, untied_to_the_same_values, tied, parametrised, masked,
    attribute_written, attribute_replaced, averaged, zeroed, shape_changed,
)  # fmt: skip


# ---- what is asked


def _flat(state: Mapping[str, Tensor]) -> list[Tensor]:
    return [state[name].double() for name in sorted(state)]


def other() -> Model:
    return Model(7).eval()


def prune_masks(network: Network) -> list[Tensor]:
    _, report = pathlift.prune(network, amount=0.3)
    return _flat(report.masks)


QUESTIONS: dict[str, Callable[[Network], list[Tensor | float | None]]] = {
    "path_norm": lambda n: [pathlift.path_norm(n).log10, pathlift.path_norm(n).per_output, pathlift.path_norm(n, q=2).log10],
    "log_path_norm": lambda n: [pathlift.log_path_norm(n).double()],
    "path_magnitude": lambda n: _flat(pathlift.path_magnitude(n)),
    "unit_path_magnitude": lambda n: _flat(pathlift.unit_path_magnitude(n)),
    "path_kernel": lambda n: [pathlift.path_kernel([n, n]).log10_gram],
    "path_norms": lambda n: [found.log10 for found in pathlift.path_norms(n, [n])],
    "lipschitz_bound": lambda n: [pathlift.lipschitz_bound(n, pathlift.Relative(0.1), batch()).as_subclass(Tensor)],
    "certify": lambda n: [pathlift.certify(n, batch(), pathlift.Relative(0.01)).margin],
    "attack": lambda n: [pathlift.attack(n, batch(), pathlift.Relative(0.01), steps=2).margin],
    "symmetries": lambda n: [float(len(pathlift.symmetries(n))), *_flat(pathlift.symmetries(n).normalize())],
    "balance": lambda n: _flat(pathlift.symmetries(n).balance()),
    "condition": lambda n: _flat(pathlift.symmetries(n).condition()),
    "sharpness": lambda n: [pathlift.consequences.sharpness(n, batch(), torch.tensor([0, 1, 2]), 0.1, steps=2).lemma],
    "generalisation": lambda n: [pathlift.consequences.generalisation_bound(n, samples=100).log10_theorem],
    "gradient_norms": lambda n: [pathlift.lipschitz.gradient_norms(n, batch())],
    "prune": prune_masks,
}


def answer(question: Callable[[Network], Any], network: Network) -> list[Any] | type[pathlift.PathliftError]:
    try:
        return question(network)
    except pathlift.PathliftError as error:
        return type(error)


@pytest.mark.hunt
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_network_gives_the_numbers_of_its_model_or_says_that_it_cannot(change: Callable[[Model], None]) -> None:
    model = Model().eval()
    network = pathlift.capture(model, SHAPE)
    for question in QUESTIONS.values():
        question(network)  # whatever is remembered is remembered now
    change(model)
    anew = pathlift.capture(model, torch.zeros(1, *SHAPE, dtype=next(model.parameters()).dtype))
    for name, question in QUESTIONS.items():
        now, right = answer(question, network), answer(question, anew)
        if isinstance(now, list):
            assert isinstance(right, list), (name, now, right)
            assert len(now) == len(right), name
            for one, two in zip(now, right, strict=True):
                torch.testing.assert_close(
                    one, two, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda text, at=name: f"{at}: {text}"
                )


@pytest.mark.one_in(8, first=2)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_symmetries_found_before_a_change_give_states_of_the_model_as_it_is(change: Callable[[Model], None]) -> None:
    model = Model().eval()
    groups = pathlift.symmetries(model, SHAPE)
    groups.normalize()
    change(model)
    x = batch().to(next(model.parameters()).dtype)
    for make in (Symmetries.normalize, Symmetries.balance, Symmetries.condition):
        try:
            state = make(groups)
        except pathlift.PathliftError:
            continue
        rescaled = pathlift.rescaling.with_state(model, state).eval()
        tolerance = 0.02 if x.dtype == torch.float16 else 1e-4
        torch.testing.assert_close(rescaled(x), model.eval()(x), rtol=tolerance, atol=tolerance)


class Joined(nn.Module):
    """Two branches that are added behind a mask: where it is zero, one of them does not matter."""

    def __init__(self, *, in_buffer: bool) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 1)
        mask = torch.tensor([1.0, 0.0, 1.0])
        if in_buffer:
            self.register_buffer("mask", mask)
        else:
            self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.one(x)) * self.mask + torch.relu(self.two(x)))


@pytest.mark.parametrize("in_buffer", [True, False])
def test_a_mask_that_opens_ties_what_it_held_apart(in_buffer: bool) -> None:
    torch.manual_seed(0)
    model = Joined(in_buffer=in_buffer)
    groups = pathlift.symmetries(model, (2,))
    groups.balance()
    model.mask.fill_(1.0)
    x = torch.randn(5, 2)
    torch.testing.assert_close(pathlift.rescaling.with_state(model, groups.balance())(x), model(x))
    assert len(groups) == 3
    twin = copy.deepcopy(model)
    twin.load_state_dict(groups.randomize(generator=torch.Generator().manual_seed(0)))
    assert pathlift.path_metric(groups.network, twin).upper < 1e-4


def lifted(model: Joined) -> Tensor:
    """The path-lifting, product by product."""
    one, two = (torch.cat([own.weight, own.bias[:, None]], 1) for own in (model.one, model.two))
    head = model.head.weight.T
    return torch.cat([(head * model.mask[:, None] * one).reshape(-1), (head * two).reshape(-1), model.head.bias]).detach()


def test_a_metric_between_masks_that_differ_does_not_use_the_freedom_of_one() -> None:
    torch.manual_seed(0)
    model, second = Joined(in_buffer=True), Joined(in_buffer=True)
    second.load_state_dict(pathlift.symmetries(model, (2,)).randomize(generator=torch.Generator().manual_seed(1)))
    second.mask.fill_(1.0)
    right = float((lifted(model) - lifted(second)).abs().sum())
    metric = pathlift.path_metric(model, second, (2,), moments=4)
    assert metric.lower <= right * (1 + 1e-5)
    assert right <= metric.upper * (1 + 1e-5)


# ---- the regulariser


def test_a_regulariser_reads_the_parameters_and_buffers_of_the_module_that_it_is_given() -> None:
    model = Model()
    network = pathlift.capture(model, SHAPE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(4):
        optimizer.zero_grad()
        penalty = pathlift.log_path_norm(network, model)
        assert float(penalty) == pytest.approx(by_hand(model), rel=1e-5)
        (model(batch()).square().mean() + penalty).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()  # the batch norm's statistics have moved too


def by_hand(model: Model) -> float:
    """The logarithm of the path-norm by one forward pass on ones of a model of magnitudes in which nothing is bent."""
    with torch.no_grad():
        scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
        shift = model.norm.bias - model.norm.running_mean * scale
        y = torch.conv2d(torch.ones(1, *SHAPE), model.conv.weight.abs()) * scale.abs()[:, None, None]
        y = (y + shift.abs()[:, None, None]).flatten(1)
        y = torch.nn.functional.linear(y, model.body.weight.abs(), model.body.bias.abs()) * (model.mask * model.scale).abs()
        y = y @ model.again.weight.abs().T @ model.twin.weight.abs().T
        return float((y @ model.head.weight.abs().T + model.head.bias.abs()).sum().log())


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.unrelated = nn.Linear(2, 2)


@pytest.mark.hunt
@pytest.mark.parametrize("wrap", [torch.compile, parallel, Wrapped], ids=["compile", "data parallel", "wrapper"])
def test_a_regulariser_sends_its_gradient_through_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Model().double()
    network = pathlift.capture(model.eval(), torch.zeros(1, *SHAPE, dtype=torch.float64))
    pathlift.log_path_norm(network, wrap(model)).backward()
    for name, parameter in model.named_parameters():
        place = tuple(index // 2 for index in parameter.shape)
        ends = []
        for offset in (1e-6, -1e-6):
            with torch.no_grad():
                parameter[place] += offset
                ends.append(float(pathlift.log_path_norm(network)))
                parameter[place] -= offset
        assert parameter.grad is not None, name
        torch.testing.assert_close(float(parameter.grad[place]), (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("given", [{}, {"nothing": torch.ones(2)}, nn.Linear(2, 2), nn.ReLU(), 3], ids=repr)
def test_a_regulariser_of_nothing_of_the_network_is_refused(given: Any) -> None:
    network = pathlift.capture(Model().eval(), SHAPE)
    with pytest.raises(pathlift.PathliftError):
        pathlift.log_path_norm(network, given)


def test_hooks_of_training_refuse_a_model_that_was_rebuilt() -> None:
    model = Model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = pathlift.symmetries(model, SHAPE)
    path_sgd(optimizer, groups.network)
    rescale_after_steps(optimizer, groups, Symmetries.balance)
    model.head = nn.Linear(4, 3)
    model(batch()).sum().backward()
    with pytest.raises(pathlift.MismatchError, match="head"):
        optimizer.step()


# ---- one architecture, one program


class Behaved(nn.Module):
    """A linear layer, and something else that it does."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(self.then.factor) if hasattr(self.then, "factor") else self.then(self.layer(x))


class Hidden:
    def __init__(self, factor: float) -> None:
        self._factor = factor

    @property
    def factor(self) -> float:
        return self._factor


class Labelled(float):
    factor: float


def labelled(factor: float) -> Labelled:
    number = Labelled(1.0)
    number.factor = factor
    return number


def class_of(factor: float) -> type:
    class Local:
        pass

    Local.factor = factor  # type: ignore[attr-defined]
    return Local


def method_of_class(factor: float) -> Callable[[Tensor], Tensor]:
    class Local:
        @classmethod
        def times(cls, x: Tensor) -> Tensor:
            return x * factor

    return Local.times


def with_attribute(factor: float) -> Callable[[Tensor], Tensor]:
    def times(x: Tensor, own: Any = lambda: None) -> Tensor:
        return x * own.factor

    own = times.__defaults__[0]  # type: ignore[index]
    own.factor = factor
    return times


def with_globals(factor: float) -> Callable[[Tensor], Tensor]:
    names: dict[str, Any] = {"FACTOR": factor, "__name__": __name__}
    exec("def times(x): return x * FACTOR", names)
    times: Callable[[Tensor], Tensor] = names["times"]
    return times


def with_default(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x, by=factor: x * by


def with_closure(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


BEHAVIOURS = (Hidden, labelled, class_of, method_of_class, with_attribute, with_globals, with_default, with_closure)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("make", BEHAVIOURS, ids=lambda make: make.__name__)
def test_modules_that_differ_in_what_they_do_are_no_equal_networks(make: Callable[[float], Any]) -> None:
    model, second = Behaved(make(1.0)), Behaved(make(3.0))
    second.load_state_dict(model.state_dict())
    with pytest.raises(pathlift.MismatchError):
        pathlift.path_metric(model, second, (2,))
    assert pathlift.path_metric(model, copy.deepcopy(model), (2,)).value == 0.0


class Patched(nn.Linear):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


@pytest.mark.parametrize(("name", "value"), [("factor", 3.0), ("forward", lambda self, x: 3.0 * nn.Linear.forward(self, x))])
def test_a_class_that_is_patched_after_the_capture_makes_another_network(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = pathlift.capture(Patched(2, 2), (2,))
    second = Patched(2, 2)
    monkeypatch.setattr(Patched, name, value)
    with pytest.raises(pathlift.MismatchError):
        pathlift.path_metric(network, second)


def test_many_modules_of_one_architecture_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = 0
    export = torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal captures
        captures += 1
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    models = [Model(seed).eval() for seed in range(3)]
    pathlift.path_kernel(models, SHAPE)
    assert captures == 1
    list(pathlift.path_norms(models[0], models, SHAPE))
    assert captures == 2
    list(pathlift.path_metrics(models[0], models, SHAPE))
    assert captures == 3


# ---- results are values


def results() -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """Every result, and numbers of it."""
    model = Model().eval()
    network, other, x = pathlift.capture(model, SHAPE), Model(1).eval(), batch()
    other.mask.copy_(model.mask)
    small = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    groups = pathlift.symmetries(network)
    return {
        "network": (network, lambda own: pathlift.path_norm(own).per_output),
        "norm": (pathlift.path_norm(network), lambda own: own.per_output),
        "metric": (pathlift.path_metric(network, other, moments=2), lambda own: own.log10_upper_per_output),
        "metric of order 2": (pathlift.path_metric(network, other, q=2), lambda own: torch.tensor(own.value)),
        "bound": (
            pathlift.lipschitz_bound(network, other, x),
            lambda own: own.as_subclass(Tensor) + own.which + len(own.winner),
        ),
        "metric bound": (pathlift.metric.path_metric_bounds(network, other), lambda own: repr(own)),
        "kernel": (pathlift.path_kernel([network, other]), lambda own: own.coordinates()[0]),
        "magnitude": (pathlift.path_magnitude(network), lambda own: own["conv.weight"]),
        "certificate": (pathlift.certify(network, x, pathlift.Relative(0.01)), lambda own: own.bound),
        "attack": (pathlift.attack(network, x, pathlift.Relative(0.01), steps=1), lambda own: own.margin),
        "prune report": (pathlift.prune(network, amount=0.2)[1], lambda own: own.masks["conv.weight"]),
        "symmetries": (groups, lambda own: own.normalize()["conv.weight"]),
        "rescaled": (groups.normalize(), lambda own: own["conv.weight"]),
        "balanced": (groups.balance(), lambda own: own["conv.weight"]),
        "equivalence": (pathlift.equivalent(network, groups.normalize(), tolerance=1e-3), lambda own: own.factors),
        "lifting": (pathlift.path_lifting(small, (2,)), lambda own: own.phi),
        "sharpness": (
            pathlift.consequences.sharpness(network, x, torch.tensor([0, 1, 2]), 0.1, steps=1),
            lambda own: repr(own),
        ),
        "generalisation": (pathlift.consequences.generalisation_bound(network, samples=10), lambda own: repr(own)),
        "support": (pathlift.check_support(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)), (2,)), str),
        "tolerance": (pathlift.Pruned(0.3), repr),
    }


def same(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, Tensor) else bool(one == two)


@pytest.mark.hunt
def test_results_pickle_copy_and_have_no_attribute_that_raises() -> None:
    for name, (result, numbers) in results().items():
        right = numbers(result)
        for make in (copy.deepcopy, copy.copy, lambda own: pickle.loads(pickle.dumps(own))):
            made = make(result)
            assert same(numbers(made), right), name
        for attribute in dir(result):
            if not attribute.startswith("_") and not isinstance(result, Tensor):
                hasattr(result, attribute)
        if dataclasses.is_dataclass(result) and name not in ("network", "symmetries"):
            assert isinstance(dataclasses.asdict(result), dict), name


@pytest.mark.hunt
def test_results_keep_their_numbers_and_no_weights_when_the_model_changes() -> None:
    model = Model().eval()
    made = {name: (result, numbers(result)) for name, (result, numbers) in _of(model).items()}
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    zeroed(model)
    numbers = {name: own[1] for name, own in _of(Model().eval()).items()}
    for name, (result, right) in made.items():
        assert same(numbers[name](result), right), name
    del model
    gc.collect()
    assert all(own() is None for own in weights), "a result keeps its model alive"


def _of(model: Model) -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    x = batch()
    other = Model(1).eval()
    other.mask.copy_(model.mask)
    return {
        "norm": (pathlift.path_norm(model, SHAPE), lambda own: own.per_output),
        "metric": (pathlift.path_metric(model, other, SHAPE), lambda own: own.log10_upper_per_output),
        "bound": (pathlift.lipschitz_bound(model, other, x), lambda own: own.as_subclass(Tensor) + own.which),
        "kernel": (pathlift.path_kernel([model, other], SHAPE), lambda own: own.log10_norm),
        "magnitude": (pathlift.path_magnitude(model, SHAPE), lambda own: own["conv.weight"]),
        "certificate": (pathlift.certify(model, x, pathlift.Relative(0.01)), lambda own: own.bound),
        "prune report": (pathlift.prune(model, SHAPE, amount=0.2)[1], lambda own: own.masks["conv.weight"]),
        "rescaled": (pathlift.symmetries(model, SHAPE).balance(), lambda own: own["conv.weight"]),
        "equivalence": (pathlift.equivalent(model, model, SHAPE), lambda own: own.factors),
        "generalisation": (pathlift.consequences.generalisation_bound(model, SHAPE, samples=10), repr),
    }


def test_a_copied_network_is_a_snapshot() -> None:
    model = Model().eval()
    network = pathlift.capture(model, SHAPE)
    snapshots = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    before = pathlift.path_norm(network).value
    step(model)
    assert pathlift.path_norm(network).value != before
    assert all(pathlift.path_norm(own).value == before for own in snapshots)
    assert pathlift.path_metric(snapshots[0], snapshots[1]).method == "equal"
    assert pathlift.path_metric(snapshots[0], model.eval()).upper > 0.0


@pytest.mark.hunt
def test_results_cross_into_another_process_and_back() -> None:
    made = results()
    chosen = {name: made[name][0] for name in ("network", "norm", "bound", "symmetries", "certificate")}
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        back = pool.apply(copy.deepcopy, (chosen,))
    for name, result in back.items():
        assert same(made[name][1](result), made[name][1](made[name][0])), name


@pytest.mark.parametrize("make", [Symmetries.normalize, Symmetries.balance])
def test_a_rescaled_state_saved_and_read_back_is_a_plain_state(make: Callable[[Symmetries], Any]) -> None:
    model, file = Model().eval(), io.BytesIO()
    torch.save(make(pathlift.symmetries(model, SHAPE)), file)
    file.seek(0)
    twin = Model(9).eval()
    twin.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(twin(batch()), model(batch()), rtol=1e-4, atol=1e-5)


def test_a_network_without_values_says_that_nothing_was_compared() -> None:
    with torch.device("meta"):
        hollow = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert "not compared" in repr(pathlift.capture(hollow, torch.zeros(1, 2, device="meta")))
    assert "not compared" not in repr(pathlift.capture(Model().eval(), SHAPE))


def test_one_value_written_to_a_place_twice_counts_once() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x) * 1.0
            y[:, [0, 0]] = y[:, 1:2] * 2.0
            return y

    model = Written()
    share = pathlift.path_magnitude(model, (2,))["layer.weight"]
    mass = model.layer.weight.detach().abs() * torch.tensor([[0.0], [3.0], [1.0]])
    torch.testing.assert_close(share, mass / mass.sum())


class Scaled(nn.Module):
    """Numbers of every place that a forward pass can look at: the class, the module, a layer, a tuple; and a counter."""

    gain = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.slope, self.head = nn.Conv2d(1, 3, 3), nn.LeakyReLU(0.1), nn.Linear(3, 2)
        self.weights, self.calls, self.epoch = [1.0, 0.5], 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.slope(self.conv(x)).mean((2, 3)) * (self.gain * self.weights[1]))


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [("", "gain", 5.0), ("", "weights", [1.0, 0.7]), ("slope", "negative_slope", 3.0), ("conv", "padding", (1, 1))],
)
def test_a_number_that_the_graph_was_made_with_may_not_change(path: str, key: str, value: object) -> None:
    model = Scaled()
    network = pathlift.capture(model, (1, 6, 6))
    before = pathlift.path_norm(network).value
    setattr(model.get_submodule(path), key, value)
    with pytest.raises(pathlift.MismatchError, match=key):
        pathlift.path_norm(network)
    assert pathlift.path_norm(model, (1, 6, 6)).value != pytest.approx(before)


def test_a_number_that_no_graph_depends_on_may_change() -> None:
    model = Scaled()
    network = pathlift.capture(model, (1, 6, 6))
    before = pathlift.path_norm(network).value
    model(torch.ones(1, 1, 6, 6))
    model.epoch, model.conv.momentum = 7, 0.3
    assert pathlift.path_norm(network).value == before


def test_a_hook_or_a_child_that_is_added_is_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    network = pathlift.capture(model, (2,))
    before = pathlift.path_norm(network).value
    seen: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda *given: seen.append(given[2]))
    assert pathlift.path_norm(network).value == before  # it only looks on
    handle.remove()
    handle = model[0].register_forward_hook(lambda *given: given[2] * 2)
    with pytest.raises(pathlift.MismatchError, match="hook"):
        pathlift.path_norm(network)
    handle.remove()
    assert pathlift.path_norm(network).value == before
    model.append(nn.Linear(2, 1))
    with pytest.raises(pathlift.MismatchError, match="module"):
        pathlift.log_path_norm(network, model)
