"""What is captured is the model, or it is refused; and the user's model is the same bits afterwards.

The right values come from plain PyTorch: the path-norm of two layers is written down by hand, that of any network without
negative weights is the sum of its own outputs on ones.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import logging
import math
import operator
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import pathlift
from agreement import parallel
from pathlift import InputError, MismatchError, NumericalError, PathliftError, UnsupportedModelError
from pathlift.passes.forward import forward
from test_untouched import same, snapshot

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
NAMES = ("w1", "b1", "w2", "b2")


class Two(nn.Module):
    """Two layers whose weights are reached in the way that ``keep`` sets up: it returns what finds them in a forward pass."""

    def __init__(self, keep: Callable[[Two], Callable[[Two], Any]] | None = None, seed: int = 0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        for name, shape in zip(NAMES, ((5, 4), (5,), (3, 5), (3,)), strict=True):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=draws)))
        self.find = Two.own if keep is None else keep(self)

    def own(self) -> Weights:
        return self.w1, self.b1, self.w2, self.b2

    def forward(self, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = self.find(self)
        return F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)


def by_hand(weights: Weights) -> float:
    """Σ over paths of |weights|: the network with |weights| and without ReLU, on ones."""
    w1, b1, w2, b2 = (own.detach().double().abs() for own in weights)
    return float((w2 @ (w1.sum(1) + b1) + b2).sum())


def close(one: float, two: float, tolerance: float = 1e-5) -> bool:
    return math.isclose(one, two, rel_tol=tolerance, abs_tol=1e-30)


def runs_as(model: nn.Module, network: pathlift.Network, shape: tuple[int, ...]) -> bool:
    """Whether a captured graph gives what the model itself gives, on inputs and weights of today."""
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    name = next(layer.name for layer in network.layers if layer.kind == "input")
    ours = forward(network, network.values(), {name: x.unsqueeze(1)}, torch.float32)[network.outputs[0]].squeeze(1)
    return torch.allclose(ours, model(x), rtol=1e-4, atol=1e-5)


# ---- memory is identity


class Holder:
    """A plain object."""

    def __init__(self, held: Any) -> None:
        self.held = held


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class Fixed(Slotted):
    """A constant of a class with slots: its own attribute stands in the place of the slot, which cannot be set."""

    __slots__ = ()
    held = 0

    def __init__(self) -> None:
        """Set nothing."""


class Cloner(Holder):
    """Copies itself with its own methods, and would lose the memory."""

    def __deepcopy__(self, memo: object) -> Cloner:
        return Cloner([own.clone() for own in self.held])

    def __reduce__(self) -> Any:
        return Cloner, ([own.clone() for own in self.held],)


class Itself(Holder):
    def __deepcopy__(self, memo: object) -> Itself:
        return self


class Variable:
    """As Keras 3 has them."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    @property
    def value(self) -> Tensor:
        return self._value


@dataclasses.dataclass(frozen=True)
class Record:
    items: Any


Four = collections.namedtuple("Four", NAMES)  # noqa: PYI024 (the plain form)


def _held(make: Callable[[list[Tensor]], Any], find: Callable[[Any], Any] = lambda held: held) -> Any:
    def keep(model: Two) -> Callable[[Two], Any]:
        model.held = make(list(model.own()))
        return lambda own: find(own.held)

    return keep


def _objects(weights: list[Tensor]) -> Any:
    array = np.empty(4, dtype=object)
    array[:] = [Holder(own.detach()) for own in weights]
    return array


def _closure(model: Two) -> Any:
    weights = [own.detach() for own in model.own()]
    return lambda own: weights


def _defaults(model: Two) -> Any:
    def find(own: Two, w1: Tensor = model.w1, *, rest: Any = (model.b1, model.w2, model.b2)) -> Any:
        return w1, *rest

    return find


def _method(model: Two) -> Any:
    def forward(self: Two, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))

    model.first = functools.partial(F.linear, weight=model.w1, bias=model.b1)
    model.last = types.MethodType(lambda held, x: F.linear(x, *held), (model.w2.detach(), model.b2))
    model.forward = types.MethodType(forward, model)
    return Two.own


def _flattened(model: Two) -> Any:
    """One flat buffer, parameters that view it, and a forward pass that reads NumPy's view of a part."""
    flat = torch.cat([own.detach().reshape(-1) for own in model.own()])
    for name, part in zip(NAMES, flat.split([20, 5, 15, 3]), strict=True):
        own = getattr(model, name)
        own.data = part.view(own.shape)
    model.part = torch.from_numpy(flat.numpy()[:20].reshape(5, 4))
    return lambda own: (own.part, own.b1, own.w2, own.b2)


HOLDING: dict[str, Callable[[Two], Any]] = {
    "list": _held(list),
    "detached": _held(lambda ws: [own.detach() for own in ws]),
    "nested dict": _held(lambda ws: {"a": ws[:1], "b": {"c": tuple(ws[1:])}}, lambda d: (*d["a"], *d["b"]["c"])),
    "named tuple": _held(lambda ws: Four(*ws)),
    "dataclass": _held(Record, operator.attrgetter("items")),
    "simple namespace": _held(lambda ws: types.SimpleNamespace(held=ws), operator.attrgetter("held")),
    "plain object": _held(Holder, operator.attrgetter("held")),
    "slots": _held(Slotted, operator.attrgetter("held")),
    "a slot that cannot be set": _held(lambda ws: (Fixed(), ws), operator.itemgetter(1)),
    "copies itself": _held(Cloner, operator.attrgetter("held")),
    "is never copied": _held(Itself, operator.attrgetter("held")),
    "Keras": _held(lambda ws: [Variable(own) for own in ws], lambda vs: [own.value for own in vs]),
    "weak reference": _held(lambda ws: [weakref.ref(own) for own in ws], lambda rs: [own() for own in rs]),
    "weak proxy": _held(lambda ws: [h := Cloner(ws), weakref.proxy(h)], lambda hs: hs[1].held),
    "ordered": _held(lambda ws: collections.OrderedDict(zip("abcd", ws, strict=True)), lambda d: d.values()),
    "chain of maps": _held(lambda ws: collections.ChainMap(dict(enumerate(ws))), lambda d: [d[k] for k in range(4)]),
    "array of objects": _held(_objects, lambda a: [own.held for own in a]),
    "NumPy": _held(lambda ws: [own.detach().numpy() for own in ws], lambda a: [torch.from_numpy(own) for own in a]),
    "one NumPy view": _held(lambda ws: ws[0].detach().numpy().T, lambda a: a),
    "from NumPy": _held(lambda ws: [torch.from_numpy(own.detach().numpy()) for own in ws]),
    "transposed": _held(lambda ws: [ws[0].detach().t(), *ws[1:]], lambda ws: [ws[0].t(), *ws[1:]]),
    "closure": _closure,
    "default arguments": _defaults,
    "methods and partials": _method,
    "data": lambda model: lambda own: [weight.data for weight in own.own()],
    "parameters()": lambda model: lambda own: list(own.parameters()),
    "part of a flat buffer": _flattened,
}


def _numpy_first(model: Two) -> Any:
    model.array = model.w1.detach().numpy().T
    return lambda own: (torch.from_numpy(own.array).t(), own.b1, own.w2, own.b2)


HOLDING["one NumPy view"] = _numpy_first


@pytest.mark.one_in(4)
@pytest.mark.parametrize("way", HOLDING)
def test_a_weight_is_the_parameter_however_forward_reaches_it(way: str) -> None:
    model, other = Two(HOLDING[way]), Two(seed=1)
    plain = Two()
    before = snapshot(model)
    network = pathlift.capture(model, (4,))
    assert close(pathlift.path_norm(network).value, by_hand(model.own()))
    scores, expected = pathlift.path_magnitude(network), pathlift.path_magnitude(plain, (4,))
    assert set(scores) == set(NAMES)
    assert all(torch.allclose(scores[name], expected[name], rtol=1e-4) for name in NAMES)
    found, right = (pathlift.path_metric(own, other.state_dict(), (4,)) for own in (model, plain))
    assert close(found.lower, right.lower) and close(found.upper, right.upper)
    assert same(before, snapshot(model))


GLOBAL: dict[str, Tensor] = {}


def _global(model: Two) -> Any:
    GLOBAL.update(zip(NAMES, model.own(), strict=True))
    return lambda own: tuple(GLOBAL[name] for name in NAMES)


def _forever(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    while True:
        yield weights


UNTOLD: dict[str, Callable[[Two], Any]] = {
    "global": _global,
    "cached function": lambda model: functools.lru_cache(lambda own: model.own()),
    "generator": _held(_forever, next),
    "view of a dict": _held(lambda ws: dict(enumerate(ws)).values(), tuple),
    "memoryview": _held(
        lambda ws: [memoryview(ws[0].detach().numpy()), *ws[1:]],
        lambda ws: [torch.frombuffer(ws[0], dtype=torch.float32).view(5, 4), *ws[1:]],
    ),
    "arithmetic of NumPy's": _held(
        lambda ws: [ws[0].detach().numpy(), *ws[1:]], lambda ws: [torch.from_numpy(ws[0] * 2), *ws[1:]]
    ),
    "none is read": _held(lambda ws: [own.detach().clone() for own in ws]),
}


@pytest.mark.parametrize("way", UNTOLD)
def test_a_weight_that_cannot_be_told_is_refused(way: str) -> None:
    model = Two(UNTOLD[way])
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError):
        pathlift.capture(model, (4,))
    assert same(before, snapshot(model))


class Shared(nn.Module):
    """x ↦ q · relu(p x), with two parameters of one memory in the order in which they are given."""

    def __init__(self, parameters: dict[str, Tensor], forward: Callable[[Shared, Tensor], Tensor]) -> None:
        super().__init__()
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(torch.empty(0)))
            getattr(self, name).data = value
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _both(model: Shared, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, model.p)), model.q)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("part", ["transposed", "sliced", "strided"])
def test_parameters_that_share_memory_are_one(part: str, turned: bool) -> None:
    whole = torch.randn(4, 4)
    view = {"transposed": whole.t(), "sliced": whole[1:3], "strided": whole[::2]}[part]
    given = {"p": whole, "q": view}
    model = Shared(dict(reversed(given.items())) if turned else given, _both)
    network = pathlift.capture(model, (4,))
    scores = pathlift.path_magnitude(network)
    assert len(scores) == 1
    apart = Shared({"p": whole.clone(), "q": view.clone()}, _both)
    expected = pathlift.path_magnitude(apart, (4,))
    index = torch.arange(16).view(4, 4)
    places = {"transposed": index.t(), "sliced": index[1:3], "strided": index[::2]}[part]
    total = expected["p"].reshape(-1).index_add(0, places.reshape(-1), expected["q"].reshape(-1))
    (name,) = scores
    found = scores[name] if name == "p" else scores[name].t()
    assert torch.allclose(found.reshape(-1), total, rtol=1e-4)
    assert close(pathlift.path_norm(network).value, pathlift.path_norm(apart, (4,)).value)
    with pytest.raises(MismatchError):
        pathlift.path_metric(model, {"p": whole, "q": view + 1}, (4,))


def test_interleaved_parts_of_one_buffer_stay_apart_and_partial_overlaps_are_refused() -> None:
    flat = torch.randn(32)
    even, odd = flat[::2].view(4, 4), flat[1::2].view(4, 4)
    scores = pathlift.path_magnitude(Shared({"p": even, "q": odd}, _both), (4,))
    expected = pathlift.path_magnitude(Shared({"p": even.clone(), "q": odd.clone()}, _both), (4,))
    assert all(torch.allclose(scores[name], expected[name], rtol=1e-4) for name in "pq")
    with pytest.raises(UnsupportedModelError, match="share a part of their memory"):
        pathlift.capture(Shared({"p": flat[:16].view(4, 4), "q": flat[8:24].view(4, 4)}, _both), (4,))


# ---- the same bits afterwards; nothing of the user's is called


class Restless(Two):
    """A forward pass that leaves traces wherever it can."""

    end: BaseException | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.calls, self.kept, self.log = 0, [], Holder({"calls": 0})
        self.array = np.zeros(2)
        self.deep = {"list": [], "set": set()}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.held["calls"] += 1
        self.kept.append(x)
        self.deep["list"].append(self.calls)
        self.deep["set"].add(self.calls)
        self.array += 1
        self.scratch = torch.zeros(2)
        self.noise = torch.rand(2)
        y = super().forward(x)
        self.seen.data = self.seen.data + 1
        self.w1.data = self.w1.data * 2
        if self.end is not None:
            raise self.end
        return y

    def traces(self) -> Any:
        return self.calls, len(self.kept), self.log.held["calls"], self.array.tolist(), self.deep, hasattr(self, "scratch")


@pytest.mark.parametrize("end", [None, RuntimeError("no"), MemoryError(), KeyboardInterrupt(), ValueError("no")])
def test_a_forward_pass_leaves_no_trace(end: BaseException | None) -> None:
    model = Restless()
    model.end = end
    before, traces, random = snapshot(model), copy.deepcopy(model.traces()), torch.get_rng_state()
    with contextlib.suppress(PathliftError, type(end)) if end is not None else contextlib.suppress(PathliftError):
        pathlift.path_norm(model, (4,))
    assert same(before, snapshot(model))
    assert same(traces, model.traces())
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class Private(Two):
    """Every method that a tool may call to get ready says no."""

    def _no(self, *args: object, **kwargs: object) -> Any:
        raise AssertionError("called")

    train = eval = __deepcopy__ = __copy__ = __getstate__ = __reduce__ = __reduce_ex__ = _no
    requires_grad_ = zero_grad = to = double = float = apply = load_state_dict = _no


def test_nothing_of_the_users_is_called_to_get_ready() -> None:
    model = Private()
    assert close(pathlift.path_norm(model, (4,)).value, by_hand(model.own()))


class Merging(nn.Linear):
    """A low-rank layer that merges its weights when it is put into eval mode."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.a, self.b = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.randn(1, 4))

    def train(self, mode: bool = True) -> Merging:
        if not mode:
            self.weight.data += self.a.data @ self.b.data
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.a @ self.b, self.bias)


def test_a_layer_that_merges_in_eval_is_read_as_it_stands() -> None:
    model = Merging()
    before = snapshot(model)
    weight = (model.weight + model.a @ model.b).detach().double()
    expected = float(weight.abs().sum() + model.bias.detach().double().abs().sum())
    assert close(pathlift.path_norm(model, (4,)).value, expected)
    assert same(before, snapshot(model))


# ---- a traced function that is another one


SENTINEL, ACTIVATION = object(), nn.ReLU()


class Kind(Enum):
    RELU = 1


class Chosen(nn.Module):
    """A branch by identity."""

    def __init__(self, choice: object) -> None:
        super().__init__()
        self.choice = choice
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.choice is SENTINEL or self.choice is ACTIVATION or self.choice is Kind.RELU:
            return self.last(F.relu(x))
        return self.last(x - 0.5)


@pytest.mark.parametrize("choice", [SENTINEL, ACTIVATION, Kind.RELU, object(), None], ids=range(5))
def test_a_branch_by_identity_is_the_models_or_refused(choice: object) -> None:
    model = Chosen(choice)
    try:
        network = pathlift.capture(model, (4,))
    except UnsupportedModelError:
        assert choice is ACTIVATION
    else:
        assert runs_as(model, network, (4,))


class ByParameter(Two):
    """A branch by the identity of a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        first = next(iter(self.parameters()))
        return super().forward(x) * (2 if first.data_ptr() == self.address else 1)


def test_a_branch_by_an_address_is_refused() -> None:
    model = ByParameter()
    model.address = model.w1.data_ptr()
    try:
        network = pathlift.capture(model, (4,))
    except UnsupportedModelError:
        return
    assert runs_as(model, network, (4,))


class Layered(nn.Module):
    """The second layer reads its weight through a global name, so that a copy of the model reads another one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 16), Global(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(F.relu(self.one(x))))


class Global(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, GLOBAL["two"], self.bias)


def test_the_first_layer_that_differs_is_named() -> None:
    torch.manual_seed(0)
    model = Layered()
    GLOBAL["two"] = model.two.weight
    with pytest.raises(UnsupportedModelError) as caught:
        pathlift.capture(model, (4,))
    assert caught.value.problems[0].module == "two"


ACROSS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "cumulative": lambda h: h.cumsum(0),
    "cumulative from behind": lambda h: h.flip(0).cumsum(0).flip(0),
    "first": lambda h: h[:1].expand_as(h),
    "last": lambda h: h[-1:].expand_as(h),
    "mean": lambda h: h - h.mean(0),
    "size": lambda h: h * len(h),
    "statistics": lambda h: F.batch_norm(h, None, None, training=True) if len(h) > 1 else h,
}


class Inside(nn.Module):
    """Two layers with a function of the hidden one and a constant in between."""

    def __init__(self, function: Callable[..., Tensor], *constants: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.function, self.constants = function, list(constants)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.function(self.first(x), *self.constants)))


@pytest.mark.parametrize("how", ACROSS)
def test_samples_that_see_each_other_are_refused(how: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"batch"):
        pathlift.capture(Inside(ACROSS[how]), (4,))


def test_a_model_that_takes_one_sample_only_is_captured() -> None:
    model = Inside(lambda h: h.view(1, 6))
    assert pathlift.capture(model, (4,)).graph.checked


# ---- numbers read into Python


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda k: k.item(),
    "int": int,
    "tolist": lambda k: k.tolist(),
    "numpy": lambda k: float(k.numpy()),
    "bool": lambda k: 3.0 if bool(k) else 1.0,
    "range": lambda k: float(len(range(k))),
    "index": lambda k: [1.0, 5.0, 2.0, 7.0][k],
    "item of an expression": lambda k: (k * 2).item(),
}


class Counted(Two):
    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(2))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.read(self.count))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", NUMBERS)
def test_numbers_of_a_buffer_are_part_of_the_graph_or_followed(how: str) -> None:
    model, other = Counted(NUMBERS[how]), Counted(NUMBERS[how])
    network = pathlift.capture(model, (4,))
    scaled = (model.w1 * float(NUMBERS[how](model.count)), *model.own()[1:])
    assert close(pathlift.path_norm(network).value, by_hand(scaled))
    other.count.zero_()
    if network.graph.baked:
        for second in (other, other.state_dict()):
            with pytest.raises(MismatchError, match="count"):
                pathlift.path_metric(network, second)
        model.count.add_(1)
        with pytest.raises(MismatchError, match="count"):
            pathlift.path_norm(network)
    else:
        model.count.add_(1)
        scaled = (model.w1 * float(NUMBERS[how](model.count)), *model.own()[1:])
        assert close(pathlift.path_norm(network).value, by_hand(scaled))


# ---- where the reading ends


LAST: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda z: z.softmax(1),
    "log_softmax": lambda z: F.log_softmax(z, -1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "sigmoid squeezed": lambda z: torch.sigmoid(z).squeeze(-1),
    "sigmoid viewed": lambda z: torch.sigmoid(z).view(-1),
}


class Ending(Two):
    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(super().forward(x))


@pytest.mark.parametrize("end", LAST)
def test_a_last_activation_is_left_off_and_named(end: str) -> None:
    model = Ending(LAST[end])
    network, result = pathlift.capture(model, (4,)), pathlift.path_norm(model, (4,))
    assert close(result.value, by_hand(model.own()))
    name = end.split()[0]
    assert name in repr(network) and name in repr(result)


@pytest.mark.parametrize(
    "end", [lambda z: torch.sigmoid(z) * 2, lambda z: (y := z.softmax(1), y + 1), F.gelu, lambda z: z.softmax(0)]
)
def test_an_activation_that_something_reads_is_refused(end: Callable[[Tensor], Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        pathlift.capture(Ending(end), (4,))


def test_until_stops_before_a_decoder() -> None:
    encoder = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model = nn.Sequential(collections.OrderedDict(encoder=encoder, decoder=nn.Sequential(nn.GELU(), nn.Linear(3, 4))))
    right = pathlift.path_norm(encoder, (4,)).value
    assert close(pathlift.path_norm(pathlift.capture(model, (4,), until="encoder")).value, right)
    with pytest.raises(InputError, match="encoder"):
        pathlift.capture(model, (4,), until="encodr")


# ---- modes, threads, types and sizes


def _default(setter: Callable[[Any], None], value: Any, before: Any) -> Any:
    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        setter(value)
        try:
            yield
        finally:
            setter(before)

    return inside


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
    "float64": _default(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": _default(torch.set_default_device, "meta", None),
    "anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize("mode", MODES)
def test_capture_is_the_same_in_any_mode(mode: str) -> None:
    model = Two()
    with MODES[mode]():
        network = pathlift.capture(model, (4,))
        found = pathlift.path_norm(network).value
    assert network.graph.checked and close(found, by_hand(model.own()))


def test_capture_under_autocast_is_checked_in_full_precision() -> None:
    model = Two()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network = pathlift.capture(model, (4,))
    assert close(pathlift.path_norm(network).value, by_hand(model.own()))


def test_threads_capture_side_by_side() -> None:
    models = [Two(seed=seed) for seed in range(6)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        values = list(pool.map(lambda own: pathlift.path_norm(own, (4,)).value, models))
    assert all(close(value, by_hand(model.own())) for value, model in zip(values, models, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e3])
def test_any_type_and_size_of_weights_is_captured(dtype: torch.dtype, size: float) -> None:
    model = Two().to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(size)
    assert close(pathlift.path_norm(model, (4,)).value, by_hand(model.own()))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_weights_are_captured(size: float) -> None:
    model = Two()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(size)
    assert close(pathlift.path_norm(model, (4,)).value, by_hand(model.own()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_checkpoint_is_a_numerical_error(value: float) -> None:
    model = Two()
    model.w1.data[0, 0] = value
    with pytest.raises(NumericalError, match="w1"):
        pathlift.path_norm(model, (4,))


# ---- wrappers, hooks and attributes


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Recomputed(Around):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False)


class WithoutGradients(Around):
    forward = torch.no_grad()(Around.forward)


class Inferred(Around):
    forward = torch.inference_mode()(Around.forward)


class Switched(Around):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            y = self.model(x)
        return y * 1


class Unmixed(Around):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.model(x)
        return y * 1


def _distributed(model: nn.Module) -> nn.Module:
    """A wrapper of PyTorch's that cannot run here: there is no group of processes."""
    made: nn.Module = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(made)
    made.module = model
    return made


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "wrapper", [Around, Recomputed, WithoutGradients, Inferred, Switched, Unmixed, torch.compile, parallel, _distributed]
)
def test_a_wrapper_makes_no_difference(wrapper: Callable[[nn.Module], nn.Module]) -> None:
    model = Two()
    assert close(pathlift.path_norm(wrapper(model), (4,)).value, by_hand(model.own()))


def _scripted(model: nn.Module) -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Linear(4, 4)), model)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_child_is_called_so() -> None:
    with pytest.raises(UnsupportedModelError, match="TorchScript"):
        pathlift.capture(_scripted(Two()), (4,))


PARAMETRISED: dict[str, Callable[[nn.Linear], object]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": nn.utils.weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", PARAMETRISED)
def test_parametrised_weights_are_those_of_the_moment(how: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    PARAMETRISED[how](model[0])
    model.eval()
    before = snapshot(model)
    try:
        value = pathlift.path_norm(model, (4,)).value
    except UnsupportedModelError:
        assert how == "orthogonal"
    else:
        model(torch.zeros(1, 4))  # old forms compute their weight when they run
        assert close(value, by_hand((model[0].weight, model[0].bias, model[2].weight, model[2].bias)), 1e-4)
    del before["module 0"]
    assert same(before, {key: own for key, own in snapshot(model).items() if key in before})


def test_hooks_that_look_on_see_nothing_and_hooks_that_change_are_part_of_the_function() -> None:
    plain = Two()
    model = nn.Sequential(Around(Two()), nn.Identity())
    seen: list[Any] = []
    model[0].register_forward_hook(lambda module, given, result: seen.append(result.detach().numpy().copy()))
    model[0].register_forward_pre_hook(lambda module, given: seen.append(float(given[0].sum())))
    model[0].model.register_forward_hook(lambda module, args, kwargs, result: seen.append(1), with_kwargs=True)
    assert close(pathlift.path_norm(model, (4,)).value, by_hand(plain.own()))
    assert not seen
    scale = torch.tensor([1.0, 2.0, 3.0])
    model[1].register_forward_hook(lambda module, given, result: result * scale)
    w1, b1, w2, b2 = plain.own()
    scaled = (w1, b1, w2 * scale[:, None], b2 * scale)
    assert close(pathlift.path_norm(model, (4,)).value, by_hand(scaled))
    model[0].register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    assert close(pathlift.path_norm(model, (4,)).value, by_hand((w1 * 2, b1, w2 * scale[:, None], b2 * scale)))


class Anything:
    """An object that has every attribute."""

    def __getattr__(self, name: str) -> Any:
        return Anything()


def test_attributes_that_cannot_be_copied_are_shared(tmp_path: Path) -> None:
    model = Two()
    with (tmp_path / "log").open("w") as file, concurrent.futures.ThreadPoolExecutor(1) as pool:
        model.attributes = [
            threading.Lock(), threading.Condition(), threading.local(), file, pool, (own for own in ()), {}.keys(), {}.items(),
            torch.distributions.Normal(torch.zeros(2), torch.ones(2)), logging.getLogger("a"), math, iter([]),
            np.random.default_rng(0),
            torch.Generator(), torch.optim.SGD(model.parameters(), 0.1), Anything(), Kind.RELU, ValueError("a"),
            memoryview(b"a"),
        ]  # fmt: skip
        before = snapshot(model)
        assert close(pathlift.path_norm(model, (4,)).value, by_hand(model.own()))
        assert same(before, snapshot(model))


# ---- no false refusals: common styles of networks


def _conv(c: int, d: int, k: int = 3, **more: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, d, k, padding=k // 2, bias=False, **more), nn.BatchNorm2d(d), nn.ReLU(inplace=True))


class RepVGG(nn.Module):
    """Three branches; the deployed form is one convolution."""

    def __init__(self, deploy: bool = False) -> None:
        super().__init__()
        if deploy:
            self.reparam = nn.Conv2d(3, 3, 3, padding=1)
        else:
            self.dense, self.point, self.same = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam"):
            return F.relu(self.reparam(x))
        return F.relu(self.dense(x) + self.point(x) + (0 if self.same is None else self.same(x)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up, self.out = _conv(3, 4), _conv(4, 6), nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        deep = self.up(self.deep(F.avg_pool2d(skip, 2)))
        return self.out(torch.cat([skip, F.pad(deep, (0, skip.shape[3] - deep.shape[3], 0, skip.shape[2] - deep.shape[2]))], 1))


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([_conv(3, 4), _conv(4, 4, stride=2), _conv(4, 4, stride=2)])
        self.lateral = nn.ModuleDict({str(index): nn.Conv2d(4, 2, 1) for index in range(3)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        top, found = None, {}
        for place, feature in reversed(list(enumerate(features))):
            own = self.lateral[str(place)](feature)
            top = own if top is None else own + F.interpolate(top, size=own.shape[-2:], mode="nearest")
            found[f"p{place}"] = top
        return found


class Branches(nn.Module):
    """Inception with an auxiliary head in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _conv(3, 2, 1), nn.Sequential(_conv(3, 2, 1), _conv(2, 3, 5)), _conv(3, 2, 1)
        self.aux, self.head = nn.Linear(7, 2), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Any:
        y = torch.cat([self.a(x), self.b(x), self.c(F.avg_pool2d(x, 3, 1, 1))], dim=1)
        y = torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)
        return (self.head(y), self.aux(y)) if self.training else self.head(y)


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pointwise, self.depthwise = _conv(4, 8, 1, groups=2), _conv(8, 8, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.pointwise(x[:, :4]).chunk(2, 1)
        y = torch.cat((one, two), 1)
        n, c, h, w = y.size()
        return self.depthwise(y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)).mean([2, 3])


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([
            nn.Sequential(nn.BatchNorm2d(3 + 2 * k), nn.ReLU(), nn.Conv2d(3 + 2 * k, 2, 3, padding=1)) for k in range(3)
        ])

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Both(nn.Module):
    """Two inputs, outputs in a dict, a tuple and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        hidden = F.relu(self.a(x) + self.b(y))
        return {"out": self.c(hidden), "more": (hidden, [hidden.sum(1), None])}


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x)).sum()


def _audio() -> nn.Module:
    layers = nn.Conv1d(2, 4, 5, dilation=2), nn.BatchNorm1d(4), nn.LeakyReLU(0.2), nn.AvgPool1d(2)
    return nn.Sequential(*layers, nn.ConvTranspose1d(4, 1, 3, 2, 1))


def _video() -> nn.Module:
    layers = nn.Conv3d(3, 4, (1, 3, 3)), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, (3, 1, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten())


def _segmentation() -> nn.Module:
    return nn.Sequential(_conv(3, 4, stride=2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 2, 1))


STYLES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "RepVGG": (lambda: nn.Sequential(RepVGG(), RepVGG()), (3, 5, 7)),
    "RepVGG deployed": (lambda: RepVGG(deploy=True), (3, 5, 7)),
    "UNet": (UNet, (3, 9, 7)),
    "pyramid": (Pyramid, (3, 9, 8)),
    "Inception": (Branches, (3, 6, 5)),
    "ShuffleNet": (Shuffle, (6, 5, 4)),
    "DenseNet": (Dense, (3, 5, 4)),
    "PReLU": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Conv2d(4, 2, 2), nn.PReLU()), (3, 6, 5)),
    "audio": (_audio, (2, 24)),
    "video": (_video, (3, 4, 5, 6)),
    "segmentation": (_segmentation, (3, 6, 8)),
    "pixel shuffle": (lambda: nn.Sequential(_conv(3, 8), nn.PixelShuffle(2), nn.Conv2d(2, 1, 3)), (3, 4, 5)),
    "mixer of positions": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)), (3, 5)),
    "two inputs": (Both, ((4,), (3,))),
    "scalar": (Scalar, (4,)),
    "deep": (lambda: nn.Sequential(*[layer for _ in range(60) for layer in (nn.Linear(4, 4), nn.ReLU(True))]), (4,)),
}  # fmt: skip


@pytest.mark.one_in(2)
@pytest.mark.parametrize("style", STYLES)
def test_common_styles_are_captured(style: str) -> None:
    make, shape = STYLES[style]
    torch.manual_seed(1)
    model = make()
    network = pathlift.capture(model, shape)  # with weights of both signs, which the check compares
    assert network.graph.checked
    with torch.no_grad():
        for own in model.parameters():
            own.abs_()
        for module in model.modules():
            if isinstance(module, nn.PReLU):
                module.weight.zero_()  # a path of its own besides that of the positive side
    model.double().eval()
    shapes = [shape] if isinstance(shape[0], int) else shape
    returned = model(*(torch.ones(1, *own, dtype=torch.float64) for own in shapes))
    expected = sum(float(own.detach().sum()) for own in pytree.tree_leaves(returned) if isinstance(own, Tensor))
    assert close(pathlift.path_norm(network).value, expected, 1e-9)


class Numbered(nn.Module):
    """A layer, and numbers that forward reads from buffers or that its output has nothing left of."""

    def __init__(self, function: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(2, 2), function
        self.register_buffer("k", torch.tensor(4.0))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.layer(x), x)


@pytest.mark.parametrize(
    ("function", "factor"),
    [
        (lambda m, h, x: h / m.k.item(), 0.25),
        (lambda m, h, x: h * (m.k.item() * 2 + 1), 9.0),
        (lambda m, h, x: nn.functional.leaky_relu(h, m.k.item() / 10), 1.0),
        (lambda m, h, x: h.sigmoid().float(), 1.0),
        (lambda m, h, x: h.sum(), 1.0),
    ],
    ids=["divisor", "arithmetic", "slope", "cast behind the last activation", "no dimensions left"],
)
def test_numbers_and_ends_of_every_kind(function: Callable[..., Any], factor: float) -> None:
    model = Numbered(function)
    right = factor * float(model.layer.weight.detach().abs().sum() + model.layer.bias.detach().abs().sum())
    norm = pathlift.path_norm(model, (2,))
    assert close(norm.value, right)
    assert close(float(norm.per_output.sum()), right)


def test_a_layer_of_no_neurons_is_refused() -> None:
    with pytest.raises(pathlift.UnsupportedModelError, match="no elements"):
        pathlift.capture(Numbered(lambda m, h, x: (h, x[:, :0])), (2,))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table, self.last = nn.Linear(4, 4), nn.Embedding(4, 4), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        h = h.unsqueeze(-1) * (h > 0).to(h.dtype).unsqueeze(-1)
        h = torch.where(x > 0, h.squeeze(-1), x)
        h = h + self.table(x.topk(2).indices).sum(1)
        return self.last(h * nn.functional.one_hot(x.argmax(-1), 4))


def test_what_follows_from_a_refusal_is_no_cause_of_its_own() -> None:
    problems = pathlift.check_support(Masked(), (4,)).problems
    assert [problem.op for problem in problems] == [
        "aten.gt.Scalar", "aten.gt.Scalar", "aten.topk.default", "aten.argmax.default", "aten.gelu.default",
    ]  # fmt: skip


def test_a_second_model_is_read_to_where_the_first_one_was() -> None:
    one, two = (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)) for _ in range(2))
    network = pathlift.capture(one, (4,), until="0")
    assert pathlift.path_metric(network, two).upper >= pathlift.path_metric(one[0], two[0].state_dict(), (4,)).lower
    assert pathlift.path_metric(network, two, q=2).value == pathlift.path_metric(one[0], two[0], (4,), q=2).value


def test_a_deep_network_that_leaves_the_range_of_float32_is_read_in_float64() -> None:
    """Its own roundings add up to more than a hundred units: they are measured where float32 has only infinities."""
    torch.manual_seed(0)
    layers = [layer for _ in range(60) for layer in (nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(30)
    assert 100 < pathlift.path_norm(model, (2, 6, 6)).log10 < 110
