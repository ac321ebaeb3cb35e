"""What the neurons before the last kinks can do together: never more than its bound, and less than one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from pathlift import Absolute, Relative
from pathlift.budget import Clock
from pathlift.certification import Tolerance
from pathlift.graph.layers import Connection, Layer, WeightTensor
from pathlift.graph.network import Network
from pathlift.passes.box import box, checked_intervals, point
from pathlift.passes.enclosure import Enclosure, parabolas, rests, splitting, substitution, together
from pathlift.passes.enclosure import forms as affine_forms
from pathlift.passes.enclosure.forms import forms, symbols
from pathlift.passes.enclosure.relaxation import UP, Form, Relaxation, of_bias, of_connection
from pathlift.passes.enclosure.substitution import handed_down, lower_bound
from pathlift.passes.forward import feed_of, forward
from pathlift.passes.rounding import Arithmetic
from test_certify import strided


class Branches(nn.Module):
    """A skip, pieces side by side, shared weights, a clamp, a maximum, a learned slope and a leaky one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.slope, self.other = nn.PReLU(4), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.fc, self.out = nn.Linear(72, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        z = self.other(self.slope(y)) - y
        y = F.max_pool2d(torch.cat([F.relu6(z), F.leaky_relu(y, 0.2)], 1), 2)
        return self.out(F.leaky_relu(self.fc(y.flatten(1)), 0.1))


class Past(nn.Module):
    """Some of what is read goes past the last kinks, and past those before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor(1.1))
        self.third, self.fourth = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.out, self.past, self.first = nn.Linear(36, 3), nn.Linear(36, 3), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        z = self.other(y) + self.gain * y
        w = self.fourth(self.third(y))
        return self.out(F.leaky_relu(z, 0.1).flatten(1)) + self.past(w.flatten(1)) - self.first(x.flatten(1))


class KinksOfInputs(nn.Module):
    """A nonlinearity reads inputs themselves, which others read as well."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(torch.cat([F.relu(x), x], 1))))


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))


def captured(name: str) -> tuple[Network, Tensor]:
    """Return a network whose batch norms are not trivial, and an input."""
    models: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "strided": (strided, (1, 1, 12, 12)),
        "branches": (Branches, (1, 1, 6, 6)),
        "past": (Past, (1, 1, 6, 6)),
        "perceptron": (perceptron, (1, 9)),
        "inputs": (KinksOfInputs, (1, 2)),
    }
    make, shape = models[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.3, 0.3)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.1, 0.3)
    x = torch.randn(shape)
    return pathlift.capture(model.eval(), x), x


def enclosed(network: Network, x: Tensor, tolerance: Tolerance | None, radius: float) -> Enclosure:
    weights = (
        box(network, tolerance, arithmetic=True) if tolerance is not None else point(network, network.state, arithmetic=True)
    )
    return Enclosure(network, weights, feed_of(network, x), radius, Arithmetic(network), refine=True)


def formed(
    network: Network, x: Tensor, tolerance: Tolerance | None, radius: float
) -> tuple[Relaxation, Layer, dict[str, Form]]:
    """Return what is known of the set, the layer that the last kinks read, and the forms up to it."""
    relaxation = enclosed(network, x, tolerance, radius)._relaxation.of_sample(0)
    source = network.layer[[layer for layer in network.layers if layer.nonlinearity is not None][-1].connections[0].source]
    known = forms(relaxation, source)
    assert known is not None
    return relaxation, source, known


class Worst:
    """A search of corners of the set for the smallest value of a function of all layers, by the signs of its gradient."""

    def __init__(self, network: Network, x: Tensor, tolerance: Tolerance | None, radius: float) -> None:
        self.network, self.radius = network, radius
        self.feed = {name: value.double() for name, value in feed_of(network, x).items()}
        self.ends = {} if tolerance is None else checked_intervals(network, tolerance)

    def values(self, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = self.network.values({**self.network.state, **weights})
        return forward(self.network, values, inputs, torch.float64, keep=True)

    def smallest(self, function: Callable[[dict[str, Tensor]], Tensor], starts: int, steps: int) -> float:
        """Return the smallest value that was found."""
        found = math.inf
        for start in range(starts):
            share = {name: torch.rand_like(low) if start else torch.full_like(low, 0.5) for name, (low, _) in self.ends.items()}
            shift = {name: 2 * torch.rand_like(x) - 1 if start else torch.zeros_like(x) for name, x in self.feed.items()}
            for _ in range(steps):
                with torch.enable_grad():
                    moving = [part.requires_grad_() for part in (*share.values(), *shift.values())]
                    weights = {name: low + share[name] * (high - low) for name, (low, high) in self.ends.items()}
                    value = function(self.values(weights, {n: x + self.radius * shift[n] for n, x in self.feed.items()}))
                    slopes = torch.autograd.grad(value, moving, allow_unused=True)
                found = min(found, float(value.detach()))
                signs = [torch.zeros_like(p) if s is None else -s.sign() for p, s in zip(moving, slopes, strict=True)]
                share = {name: (1 + sign) / 2 for name, sign in zip(share, signs[: len(share)], strict=True)}
                shift = dict(zip(shift, signs[len(share) :], strict=True))
        return found


CASES: list[tuple[str, Tolerance | None, float]] = [
    ("strided", Relative(0.03), 0.0),
    ("strided", Absolute(0.01), 0.02),
    ("branches", Relative(0.02), 0.01),
    ("branches", None, 0.3),
    ("past", Relative(0.03), 0.02),
    ("perceptron", Relative(0.2), 0.0),
    ("perceptron", None, 0.6),
]


@pytest.mark.parametrize(("name", "tolerance", "radius"), CASES, ids=str)
def test_no_network_of_the_set_moves_neurons_further_than_their_squares_allow(
    name: str, tolerance: Tolerance | None, radius: float
) -> None:
    network, x = captured(name)
    relaxation = enclosed(network, x, tolerance, radius)._relaxation.of_sample(0)
    top = [layer for layer in network.layers if layer.nonlinearity is not None][-1]
    source = network.layer[top.connections[0].source]
    known = forms(relaxation, source)
    assert known is not None
    search = Worst(network, x, tolerance, radius)
    for layer, form in known.items():
        centre, reach = form.centre, form.linear + form.rest
        q = torch.rand(centre.shape[1:], dtype=torch.float64)
        bound = (rests._moves(form, q) - rests._length(q, form.rest) + rests.rest_of(relaxation, known, layer, q)) ** 2
        last = layer == source.name
        found = -search.smallest(lambda u, n=layer, c=centre, w=q: -(w * (u[n] - c) ** 2).sum(), 3 if last else 1, 4)
        assert found <= bound
        if last:
            assert search.smallest(lambda u, n=layer, c=centre, r=reach: (r - (u[n] - c).abs()).amin(), 3, 3) >= 0
    assert found > bound / 20  # of the neurons before the last kinks: it says something


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "tolerance", "radius"), CASES, ids=str)
def test_no_functional_falls_below_its_raised_bound(
    name: str, tolerance: Tolerance | None, radius: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "HOPE", math.inf)
    monkeypatch.setattr(together, "STEPS", 20)  # any parabolas and slopes give a bound
    monkeypatch.setattr(parabolas, "_too_slow", lambda _: False)
    network, x = captured(name)
    enclosure = enclosed(network, x, tolerance, radius)
    search = Worst(network, x, tolerance, radius)
    output = network.outputs[0]
    better = 0
    for sign in (-1.0, 1.0):
        for a in sign * torch.tensor([[1.0, -1.0, 0.0], [0.0, -1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64):
            before = enclosure.tightened({output: a[None, None, None]}, steps=3)
            needed = before + 1.0  # always out of reach before, so that there is something to raise
            after = enclosure.raised(0, {output: a[None, None, None]}, before - needed, needed) + needed
            found = search.smallest(lambda u, row=a: (row * u[output]).sum(), 2, 4)
            assert float(before) - 1e-12 <= float(after) <= found
            better += float(after) > float(before) + 1e-9
    assert better


@pytest.mark.parametrize(("name", "tolerance", "radius"), CASES, ids=str)
def test_a_bound_that_keeps_its_symbols_is_at_its_smallest_that_of_one_that_does_not_or_better(
    name: str, tolerance: Tolerance | None, radius: float
) -> None:
    network, x = captured(name)
    relaxation, source, known = formed(network, x, tolerance, radius)
    kept_most, search = 0.0, Worst(network, x, tolerance, radius)
    for _ in range(4):
        functional = {source.name: torch.randn(1, 1, *source.shape, dtype=torch.float64)}
        plain, kept = lower_bound(relaxation, functional), symbols(relaxation, known)
        bound, _ = handed_down(relaxation, functional, None, {}, kept)
        factors, others = parabolas._factors(known[source.name], kept)
        smallest = bound - factors.abs().sum() - others
        gap = functional[source.name].abs().sum() * known[source.name].linear.max()
        assert float(smallest) <= search.smallest(lambda u, a=functional[source.name]: (a[0] * u[source.name]).sum(), 2, 3)
        assert float(smallest) >= float(plain) - 0.05 * float(gap)
        kept_most = max(kept_most, float(factors.abs().sum() + others))
    assert kept_most > 0


@pytest.mark.parametrize(("name", "tolerance", "radius"), [CASES[0], CASES[1], CASES[2], CASES[4]], ids=str)
def test_what_neurons_that_a_shared_weight_reads_do_together_is_bounded(
    name: str, tolerance: Tolerance | None, radius: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """|Σ a·(u − centre)| over the edges of a weight is no more in networks that a search finds, and can be half as much."""
    network, x = captured(name)
    relaxation, source, known = formed(network, x, tolerance, radius)
    search, kept, shares = Worst(network, x, tolerance, radius), symbols(relaxation, known), []
    handed_down(relaxation, {source.name: torch.randn(1, 1, *source.shape, dtype=torch.float64)}, None, {}, kept)
    for layer in network.layers:
        for edge in layer.connections[:1]:
            if edge.weight is None or of_connection(layer, 0) not in kept.parts:
                continue
            form, value = known[edge.source], relaxation.weights.middle[edge.weight]
            a = torch.randn(1, 1, *layer.shape, dtype=torch.float64)
            bound = substitution._together(kept, edge, value, a, of_connection(layer, 0)).flatten()
            with monkeypatch.context() as patch:  # without room it is summed up anew each time, a few generators at a time
                patch.setattr(substitution, "HELD", 0)
                patch.setattr(substitution, "ELEMENTS", 1000)
                again = substitution._together(symbols(relaxation, known), edge, value, a, of_connection(layer, 0)).flatten()
            torch.testing.assert_close(again, bound)
            apart = edge.edges.gathered(form.reach(relaxation.intervals[edge.source]), value, a.abs())
            assert float(bound.sum()) < 1.05 * float(apart.sum())
            assert float(kept.parts[of_connection(layer, 0)].max()) <= 1.0
            widest = int(bound.argmax())

            def moved_back(
                u: dict[str, Tensor],
                edge: Connection = edge,
                form: Form = form,
                value: Tensor = value,
                a: Tensor = a,
                k: int = widest,
            ) -> Tensor:
                return -edge.edges.gathered(u[edge.source] - form.centre, value, a).flatten()[k].abs()

            shares.append(-search.smallest(moved_back, 4, 4) / float(bound[widest]))
    assert 0.5 < max(shares) <= 1.0


def moved(
    relaxation: Relaxation, known: Mapping[str, Form], values: Mapping[WeightTensor, Tensor], u: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return ε of one network of the set and one input, by the definition of each symbol, by the name of its block."""
    weights, found = relaxation.weights, dict[str, Tensor]()

    def share(weight: WeightTensor, change: Tensor) -> Tensor:
        radius = weights.radius[weight]
        assert radius is not None
        return torch.where(radius > 0, change / radius.clamp(min=1e-300), 0.0).flatten()

    for name, form in known.items():
        layer = relaxation.network.layer[name]
        changes = {w: values[w].double() - weights.middle[w] for w in weights.middle if w in values}
        for position, edge in enumerate(layer.connections):
            if of_connection(layer, position) in form.blocks and edge.weight is not None:
                found[of_connection(layer, position)] = share(edge.weight, changes[edge.weight])
        for position, bias in enumerate(layer.biases):
            if of_bias(layer, position) in form.blocks:
                change = changes[bias.weight]
                if name in weights.centres:  # a shift β − μ·s, of which β alone is left
                    scale = layer.connections[0].weight
                    assert scale is not None
                    change = change + weights.centres[name].reshape(-1) * changes[scale].reshape(-1)
                found[of_bias(layer, position)] = share(bias.weight, change)
        if name in form.blocks:  # a symbol for each neuron: what is left at it
            rest = u[name].flatten() - form.centre.flatten()
            for block, generators in form.blocks.items():
                rest = rest - (found[block] @ generators.flatten(1) if block != name else 0.0)
            width = form.blocks[name].flatten(1).sum(0)
            found[name] = (rest / width)[width != 0]
    return found


@pytest.mark.parametrize(("tolerance", "radius"), [(Relative(0.003), 0.0), (Absolute(0.001), 0.002), (None, 0.1)], ids=str)
def test_a_functional_lies_above_what_its_bound_says_for_the_symbols_that_there_are(
    tolerance: Tolerance | None, radius: float
) -> None:
    network, x = captured("strided")
    relaxation, source, known = formed(network, x, tolerance, radius)
    search, closest = Worst(network, x, tolerance, radius), math.inf
    for _ in range(8):
        functional = torch.randn(1, 1, *source.shape, dtype=torch.float64)
        kept = symbols(relaxation, known)
        bound, _ = handed_down(relaxation, {source.name: functional}, None, {}, kept)
        factors, others = parabolas._factors(known[source.name], kept)
        for _ in range(8):  # corners and what is between
            state = {n: low + torch.rand_like(low).round() * (high - low) for n, (low, high) in search.ends.items()}
            values = network.values({**network.state, **state})
            inputs = {n: x + radius * (2 * torch.rand_like(x) - 1) for n, x in search.feed.items()}
            u = forward(network, values, inputs, torch.float64, keep=True)
            symbolic = moved(relaxation, known, values, u)
            eps = torch.cat([symbolic[block] for block in known[source.name].blocks])
            assert float(eps.abs().max()) <= 1 + 1e-6
            over = float((functional[0] * u[source.name]).sum() - bound - factors @ eps + others)
            assert over >= -1e-6
            closest = min(closest, over / float(factors.abs().sum()))
    assert closest < 0.2  # products of two changes are all that is lost


class Opposed(nn.Module):
    """R(x) = (lead + x₁ − x₂ − |x₁ + x₂|, 0), where x₁ − x₂ is least where |x₁ + x₂| is 0."""

    def __init__(self, lead: float) -> None:
        super().__init__()
        self.rows, self.out = nn.Linear(2, 3), nn.Linear(3, 2, bias=False)
        self.rows.weight.data = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
        self.rows.bias.data = torch.tensor([0.0, 0.0, 2.0 + lead])
        self.out.weight.data = torch.tensor([[-1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.rows(x))) - torch.tensor([2.0, 0.0])


def test_squares_and_what_is_linear_do_not_pay_for_two_corners() -> None:
    """On [−1, 1]² one is −2 where the other is 0: −2 together, −4 if each is taken where it is least.

    Squares find 2·√2: S₁ = S₂ ≥ 2κ and ≥ 1/(2·S₀), so S₀ + S₁ + S₂ + 1/(4κ) is 1/S₁ + 2·S₁ at best.
    """
    x = torch.zeros(1, 2)
    assert pathlift.certify(Opposed(2.95), x, radius=1.0).certified.tolist() == [True]
    assert pathlift.certify(Opposed(1.9), x, radius=1.0).certified.tolist() == [False]
    assert pathlift.attack(Opposed(1.9), x, radius=1.0, restarts=20).changed.tolist() == [True]


def test_what_a_bound_depends_on_and_a_form_does_not_know_is_paid() -> None:
    """Below a maximum forms start anew, and a bound does not."""
    network, x = captured("branches")
    relaxation, source, known = formed(network, x, Relative(0.02), 0.01)
    kept = symbols(relaxation, known)
    handed_down(relaxation, {source.name: torch.ones(1, 1, *source.shape, dtype=torch.float64)}, None, {}, kept)
    unknown = {name for name in kept.factors if name not in known[source.name].blocks}
    _, others = parabolas._factors(known[source.name], kept)
    assert unknown
    assert float(others) == pytest.approx(sum(float(kept.factors[name].abs().sum()) for name in unknown))


@pytest.mark.hunt
@pytest.mark.hunt_one_in(3)
@pytest.mark.parametrize("seed", range(40))
def test_no_network_that_a_search_finds_breaks_a_bound_of_all_that_moves(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random convolutional networks and sets; every functional is raised, however far it is from what it should exceed."""
    monkeypatch.setattr(together, "HOPE", math.inf)
    torch.manual_seed(seed)
    monkeypatch.setattr(splitting, "PAYS", math.inf)
    name = ("strided", "branches", "perceptron", "past", "inputs")[seed % 5]
    network, x = captured(name)
    share = 10.0 ** (-1 - 2 * float(torch.rand(())))
    sets = [(Relative(share), 0.0), (None, 3 * share), (Absolute(share / 4), share / 2), (Relative(share / 4), share)]
    tolerance, radius = sets[seed // 5 % 4]
    enclosure, search = enclosed(network, x, tolerance, radius), Worst(network, x, tolerance, radius)
    output = network.outputs[0]
    for _ in range(3):
        a = torch.randn(3, dtype=torch.float64)
        before = enclosure.tightened({output: a[None, None, None]}, steps=3)
        for shift in (1e-3, 1.0):  # what little is missing may be reached after a few steps
            needed = before + shift
            found = search.smallest(lambda u, row=a: (row * u[output]).sum(), 4, 8) + 1e-12
            after = enclosure.raised(0, {output: a[None, None, None]}, before - needed, needed) + needed
            assert float(after) <= found
            after = enclosure.split(0, {output: a[None, None, None]}, before - needed, needed, 6) + needed
            assert float(after) <= found


@pytest.mark.parametrize("convolution", [False, True])
def test_products_of_two_changes_are_paid_and_no_more(convolution: bool) -> None:
    """Let z = w₂·ReLU(w₁·x), x = 1 and both weights in 1 ± 1/2: z is 1 ± (1/2 + 1/2 + 1/4), at one position or at two alike."""
    places = 2 if convolution else 1
    layers = [nn.Conv1d(1, 1, 1, bias=False) if convolution else nn.Linear(1, 1, bias=False) for _ in range(2)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Flatten(), nn.Linear(places, 2)).double()
    x = torch.ones(1, 1, 2, dtype=torch.float64) if convolution else torch.ones(1, 1, dtype=torch.float64)
    network = pathlift.capture(model, x)
    relaxation = enclosed(network, x, Relative(0.5), 0.0)._relaxation.of_sample(0)
    source = [layer for layer in network.layers if layer.kind == "hidden" and layer.nonlinearity is None][1]
    known = forms(relaxation, source)
    assert known is not None
    q = torch.ones(source.shape, dtype=torch.float64)
    linear = rests._moves(known[source.name], q) - rests._length(q, known[source.name].rest)
    assert linear == pytest.approx(math.sqrt(places), rel=1e-6)
    assert rests.rest_of(relaxation, known, source.name, q) == pytest.approx(math.sqrt(places) / 4, rel=1e-6)
    assert rests.rest_of(relaxation, known, source.name, q) >= math.sqrt(places) / 4


class Doubled(nn.Module):
    """Layers without kinks, each of which reads the one below twice: 2^depth ways down."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(depth))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.layers:
            x = first(x) + second(x)
        return self.out(F.relu(x))


def test_what_is_left_over_is_followed_layer_by_layer_and_not_way_by_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4)
    network = pathlift.capture(Doubled(30), x)
    relaxation = enclosed(network, x, Relative(1e-3), 0.0)._relaxation.of_sample(0)
    kinks = next(layer for layer in network.layers if layer.nonlinearity is not None)
    source = network.layer[kinks.connections[0].source]
    known = forms(relaxation, source)
    assert known is not None
    taken, below = [], rests._below
    monkeypatch.setattr(rests, "_below", lambda *args: (taken.append(args), below(*args))[1])
    q = torch.ones(source.shape, dtype=torch.float64)
    assert 0.0 < rests.rest_of(relaxation, known, source.name, q) <= UP * rests._length(q, known[source.name].rest)
    assert len(taken) == 3 * 60  # each weight by its size and by its radius, and each summand


def hadamard(size: int, lead: float) -> nn.Sequential:
    """R(x) = (lead − Σ|H·x|, 0), as ReLU(H·x) + ReLU(−H·x)."""
    rows = torch.ones(1, 1)
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    model = nn.Sequential(nn.Linear(size, 2 * size, bias=False), nn.ReLU(), nn.Linear(2 * size, 2))
    model[0].weight.data = torch.cat([rows, -rows])
    model[2].weight.data = torch.stack([-torch.ones(2 * size), torch.zeros(2 * size)])
    model[2].bias.data = torch.tensor([lead, 0.0])
    return model


def test_neurons_that_cannot_all_be_at_their_ends_do_not_pay_for_it() -> None:
    """Each of four neurons reaches 4, so that chords pay 16; all four together reach 4^1.5 = 8."""
    x = torch.zeros(1, 4)
    assert pathlift.certify(hadamard(4, 8.3), x, radius=1.0).certified.tolist() == [True]
    several = torch.cat([x + 2.0, x, x + 0.01])  # each is searched by itself
    assert pathlift.certify(hadamard(4, 8.3), several, radius=1.0).certified.tolist() == [False, True, True]
    assert pathlift.certify(hadamard(4, 7.9), x, radius=1.0).certified.tolist() == [False]
    assert pathlift.attack(hadamard(4, 7.9), x, radius=1.0, restarts=20).changed.tolist() == [True]


def test_bounds_stay_as_they_are_without_time_or_room_or_hope(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = captured("strided")
    enclosure = enclosed(network, x, Relative(0.03), 0.0)
    functional = {network.outputs[0]: torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)[None, None, None]}
    far = torch.tensor([[-1e6]], dtype=torch.float64)
    assert torch.equal(enclosure.raised(0, functional, far, -far), far)
    with monkeypatch.context() as patch:  # a layer that is too large is never laid out
        patch.setattr(affine_forms, "GENERATORS", 100)
        patch.setattr(affine_forms, "_diagonal", None)
        low = torch.tensor([[-1e-6]], dtype=torch.float64)
        assert torch.equal(enclosure.raised(0, functional, low, -low), low)
    enclosure._clock = Clock(0.0)
    low = torch.tensor([[-1e-6]], dtype=torch.float64)
    assert torch.equal(enclosure.raised(0, functional, low, -low), low)


def test_numbers_of_any_size_are_bounded_or_left_alone() -> None:
    """A change of units changes nothing; squares beyond the range of float64 say nothing, nor do inputs that cannot move."""
    x = torch.zeros(1, 4, dtype=torch.float64)
    for scale, radius, certified in ((1e-30, 1.0, True), (1e30, 1.0, True), (1e-160, 2.0, False), (1e160, 2.0, False)):
        model = hadamard(4, 8.3).double()
        model[0].weight.data *= scale
        model[2].bias.data *= scale
        with torch.inference_mode():
            assert pathlift.certify(model, x, radius=radius).certified.tolist() == [certified]
    assert pathlift.certify(hadamard(4, 0.0), x.float()).certified.tolist() == [False]


def uneven(lead: float, middle: float, radius: float) -> nn.Sequential:
    """R(x, y) = (lead − |x₁ + x₂| − |x₁ − x₂| + Σ (y − middle), 0) while |y − middle| is below 10·radius."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    rows = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]])
    model[0].weight.data = torch.cat([rows, -rows, torch.eye(4)[2:]]).double()
    model[0].bias.data = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0]).double() * (10 * radius - middle)
    model[2].weight.data = torch.tensor([[-1.0, -1.0, -1.0, -1.0, 1.0, 1.0], [0.0] * 6]).double()
    model[2].bias.data = torch.tensor([lead - 20 * radius, 0.0]).double()
    return model


def test_inputs_that_hardly_move_are_paid_although_they_have_no_symbol() -> None:
    """Two inputs of 1e6 move by a part of 8.5e-13, and bring down the margin by radius each; the others by 2·radius."""
    middle, radius = 1e6, 8.5e-7
    x = torch.tensor([[0.0, 0.0, middle, middle]], dtype=torch.float64)
    for lead, certified in ((3.8, False), (6.2, True)):  # chords pay 4 and 2, and rounding 0.7
        assert pathlift.certify(uneven(lead * radius, middle, radius), x, radius=radius).certified.tolist() == [certified]
    corner = x + radius * torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    assert uneven(3.8 * radius, middle, radius)(corner).argmax(1).tolist() == [1]  # the class changes


@pytest.mark.parametrize("seed", range(8))
def test_a_cut_at_the_kink_of_an_input_leaves_half_of_its_ball(seed: int) -> None:
    """The lead is such that the other class wins by 0.003 at a point of a grid: no cuts certify that."""
    torch.manual_seed(seed)
    model, x, radius = KinksOfInputs(2).double(), 0.3 * torch.randn(1, 2, dtype=torch.float64), 0.5
    line = torch.linspace(-radius, radius, 81, dtype=torch.float64)
    points = x + torch.cartesian_prod(line, line)
    with torch.no_grad():
        model.out.bias[0] -= (model(points) @ torch.tensor([1.0, -1.0], dtype=torch.float64)).min() + 0.003
    found = pathlift.certify(model, x, radius=radius, splits=60)
    assert found.predicted.tolist() == [0]
    assert float(found.margin - found.bound) <= -0.003 + 1e-9


def test_a_cut_may_leave_room_for_the_kinks_of_one_more_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ascent that goes on has no shapes for them."""
    torch.manual_seed(1)
    monkeypatch.setattr(splitting, "PAYS", math.inf)
    x = torch.randn(1, 6)
    network = pathlift.capture(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), x)
    enclosure, search = enclosed(network, x, None, 0.6), Worst(network, x, None, 0.6)
    a = torch.randn(1, 1, 1, 3, dtype=torch.float64)
    functional = {network.outputs[0]: a}
    before = enclosure.tightened(functional, steps=3)
    for room in range(9, 16):
        monkeypatch.setattr(parabolas, "NEURONS", room)
        needed = before + 3.0
        after = enclosure.split(0, functional, before - needed, needed, 10) + needed
        assert float(before) <= float(after)
        assert float(after) <= search.smallest(lambda u: (a[0, 0] * u[network.outputs[0]]).sum(), 4, 6)
