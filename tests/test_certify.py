"""Certificates: what is certified never changes, nothing is lost that could be had, and rescaling changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathlift
from agreement import randomised
from cases import perceptron
from pathlift import Absolute, Pruned, Relative, Rounding
from pathlift.budget import Clock
from pathlift.certification import Tolerance
from pathlift.certification.attacks import Search
from pathlift.passes.forward import feed_of

SETS: tuple[tuple[Tolerance | None, float], ...] = (
    (Relative(0.01), 0.0),
    (Relative(0.05), 0.02),
    (Absolute(0.01), 0.0),
    (Rounding(6), 0.0),
    (Rounding(8, per="tensor", step=1.0), 0.01),
    (Pruned(0.3), 0.0),
    (Pruned(0.2, "magnitude"), 0.0),
    (None, 0.03),
)


class Corners(nn.Module):
    """Ties, padded maxima, clamps at their corners, skips with signs, learned slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn, self.slope = nn.BatchNorm2d(4), nn.PReLU(4)
        self.other = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(2 * self.bn(self.conv(x)))
        y = self.slope(y - self.other(y))
        y = F.max_pool2d(y, 3, 2, 1) - F.avg_pool2d(y, 3, 2, 1)
        return self.fc(torch.maximum(y, y.flip(1)).flatten(1)[:, :16])


def convolutional() -> nn.Sequential:
    conv = [nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*conv, nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


def strided() -> nn.Sequential:
    """Positions of the second and third convolution see a part of what is below, and hang over its borders."""
    layers: list[nn.Module] = []
    for below, above, stride in ((1, 3, 2), (3, 4, 1), (4, 4, 1)):
        layers += [nn.Conv2d(below, above, 3, stride, 1, bias=False), nn.BatchNorm2d(above), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 3))


def fitted(model: nn.Module, shape: tuple[int, ...], seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network trained for a moment on three separable classes, so that margins are real, and test inputs."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(3, *shape, generator=generator)
    y = torch.arange(240) % 3
    x = centers[y] + 0.6 * torch.randn(240, *shape, generator=generator)
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimiser.step()
    return model.eval(), x[:60]


NETWORKS = {
    "perceptron": (lambda: perceptron(5, 24, 24, 3), (5,)),
    "convolutional": (convolutional, (1, 4, 4)),
    "corners": (Corners, (1, 4, 4)),
    "strided": (strided, (1, 12, 12)),
}


@pytest.mark.hunt
@pytest.mark.hunt_one_in(6)
@pytest.mark.parametrize("place", range(len(SETS)))
@pytest.mark.parametrize("name", NETWORKS)
def test_no_certified_class_can_be_changed_by_a_search(name: str, place: int) -> None:
    """The hunt: gradient search inside the set over weights and inputs at once, from the model and from random starts."""
    tolerance, radius = SETS[place]
    make, shape = NETWORKS[name]
    model, x = fitted(make(), shape, place)
    network = pathlift.capture(model, x)
    certificate = pathlift.certify(network, x, tolerance, radius)
    assert torch.equal(certificate.certified, certificate.margin > certificate.bound)
    for start in (None, *(torch.Generator().manual_seed(seed) for seed in range(3))):
        hunted = pathlift.attack(network, x, tolerance, radius, steps=12, restarts=0 if start else 1, generator=start)
        assert not bool((hunted.changed & certificate.certified).any())
        if hunted.on_grid is not None:  # the grid lies in the set
            assert not bool((hunted.on_grid & ~hunted.changed).any())
        assert bool((certificate.margin - certificate.bound <= hunted.margin + 1e-9).all()), (
            "the bound is below every margin found"
        )
    uncut, few = (pathlift.certify(network, x[:6], tolerance, radius, splits=splits) for splits in (0, 3))
    assert few.found is not None
    assert not bool((few.certified & (few.found < 0)).any())
    assert bool((few.bound <= uncut.bound).all())
    assert bool((few.margin - few.bound <= hunted.margin[:6] + 1e-9).all())


@pytest.mark.one_in(3)
@pytest.mark.parametrize("tolerance", [Rounding(4, step=1.0), Rounding(3, per="tensor", step=1.0), Relative(0.1)], ids=str)
@pytest.mark.parametrize("grid", [False, True], ids=["box", "grid"])
def test_what_an_attack_finds_lies_in_the_set_and_changes_the_class(tolerance: Tolerance, grid: bool) -> None:
    """The network and the input themselves are looked at: on the grid, every parameter is a whole number of steps."""
    model, x = fitted(convolutional(), (1, 4, 4))
    model, x, radius = model.double(), x.double()[:20], 0.5
    network = pathlift.capture(model, x)
    search = Search(network, tolerance, radius, 5, Clock(None))
    if grid and search.grid is None:
        assert isinstance(tolerance, Relative)
        return
    with torch.no_grad():
        label = model(x).argmax(1)
        found = search.run(feed_of(network, x), label, torch.Generator().manual_seed(0), grid=grid)
    moved = next(iter(found.inputs.values())).reshape(x.shape)
    assert bool(((moved - x).abs() <= radius + 1e-12).all())
    assert bool((found.margin < 0).any())
    intervals = tolerance.intervals(network)
    for name, values in found.parameters.items():
        low, high = intervals[name]
        assert bool(((values >= low) & (values <= high)).all())
        if isinstance(tolerance, Rounding) and grid:
            most = 2 ** (tolerance.bits - 1) - 1
            weight = network.state[name].detach()
            alone = [dim for dim in range(weight.dim()) if weight.dim() == 1 or (dim == 0 and tolerance.per == "channel")]
            if tolerance.per == "channel" or weight.dim() > 1:
                others = [dim for dim in range(weight.dim()) if dim not in alone]
                step = (weight.abs().amax(others, keepdim=True) if others else weight.abs()) / most
                numbers = (values / step).round()
                assert torch.equal(values, numbers * step)
                assert float(numbers.abs().max()) <= most
                if tolerance.step == 1.0:  # a neighbour, or a point beside a weight that lies on the grid
                    assert bool((numbers - weight / step).abs().max() <= 1 + 1e-9)
    for sample in torch.nonzero(found.margin < 0)[:, 0].tolist():
        other = copy.deepcopy(model)
        other.load_state_dict({**other.state_dict(), **{name: values[sample] for name, values in found.parameters.items()}})
        with torch.no_grad():
            logits = other(moved[sample : sample + 1])[0]
        assert int(logits.argmax()) != int(label[sample])
        apart = logits[label[sample]] - logits[torch.arange(3) != label[sample]].max()
        torch.testing.assert_close(apart, found.margin[sample])


def test_a_box_may_be_attacked_where_its_grid_is_not() -> None:
    """0.26 with steps of 0.1 may be 0.16, below 0.18; on the grid it is 0.2 or 0.3, and 0.18 ends its own."""
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.26, 0.3], [0.18, 0.0]], dtype=torch.float64))
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    found = pathlift.attack(model, x, Rounding(3, step=1.0))
    assert found.changed.tolist() == [True]
    assert found.on_grid is not None and found.on_grid.tolist() == [False]
    grid = Rounding(3, step=1.0).grid(pathlift.capture(model, x))
    assert grid is not None
    own = grid["weight"]
    ends = (own.least * own.step)[0, 0], (own.most * own.step)[0, 0]
    assert [float(end) for end in ends] == pytest.approx([0.2, 0.3])
    assert own.most[1, 0] == 3, "the end of a grid of 3 bits"
    assert pathlift.attack(model, x, Rounding(3, step=0.2)).on_grid is None, "0.26 has no point of the grid within 0.02"
    assert pathlift.attack(model, x, Relative(0.1)).on_grid is None


def test_the_set_of_a_quantised_network_is_attacked_on_its_grids() -> None:
    """Each weight is one of the two values of its grid that it lies between, or what it became; all else stays."""
    model, x = fitted(perceptron(5, 12, 3), (5,))
    model, x = model.double(), x.double()[:20]
    _, report = pathlift.quantize(model, x[:1], 3)
    network = pathlift.capture(model, x)
    search = Search(network, report.tolerance, 0.0, 5, Clock(None))
    assert search.grid is not None
    with torch.no_grad():
        found = search.run(feed_of(network, x), model(x).argmax(1), None, grid=True)
    assert bool((found.margin < 0).any())
    tensors = {tensor.name: tensor for tensor in report.tolerance.tensors}
    assert found.parameters.keys() <= tensors.keys()
    for name, values in found.parameters.items():
        points = torch.stack([*tensors[name].neighbours, tensors[name].values]).double()
        assert bool((values.unsqueeze(1) == points).any(1).all())
        assert bool((values != values[0]).any()), "each sample has a network of its own"
    attacked = pathlift.attack(model, x, report.tolerance, steps=5)
    assert attacked.on_grid is not None and bool((attacked.on_grid >= (found.margin < 0)).all())
    assert not bool((attacked.changed & pathlift.certify(model, x, report.tolerance).certified).any())


def test_restarts_only_add_to_what_is_found() -> None:
    model, x = fitted(perceptron(5, 24, 24, 3), (5,))
    once = pathlift.attack(model, x, Relative(0.05), 0.02, steps=3)
    often = pathlift.attack(model, x, Relative(0.05), 0.02, steps=3, restarts=4)
    assert not bool((once.changed & ~often.changed).any())
    assert bool((often.margin <= once.margin).all()) and bool((often.margin < once.margin).any())
    again = pathlift.attack(model, x, Relative(0.05), 0.02, steps=3, restarts=4)
    assert torch.equal(often.margin, again.margin)


def draws(model: nn.Module, network: pathlift.Network, tolerance: Tolerance | None, generator: torch.Generator) -> nn.Module:
    """A random corner of the set as a module in the model's own precision."""
    other = copy.deepcopy(model)
    if tolerance is not None:
        state = other.state_dict()
        for key, (low, high) in tolerance.intervals(network).items():
            share = torch.rand(low.shape, generator=generator, dtype=torch.float64).round()
            end = torch.where(share > 0, high, low).to(state[key].dtype)
            inside = (end.double() >= low) & (end.double() <= high)
            state[key] = torch.where(inside, end, state[key])  # rounding to float32 may step outside
        other.load_state_dict(state)
    return other


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_network_of_a_set_falls_below_bounds_from_windows(dtype: torch.dtype) -> None:
    """Corners of the set, in the model's own precision, against the smallest lead that is certified."""
    model, x = fitted(strided(), (1, 12, 12))
    model, x = model.to(dtype), x[:12].to(dtype)
    network = pathlift.capture(model, x)
    for tolerance, radius in ((Relative(0.02), 0.0), (Rounding(6), 0.02)):
        certificate = pathlift.certify(network, x, tolerance, radius)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            moved = x + radius * 0.999999 * (2 * torch.rand(x.shape, generator=generator).round() - 1).to(dtype)
            lead = leads(draws(model, network, tolerance, generator), moved, certificate.predicted)
            lead = lead.scatter(1, certificate.predicted[:, None], torch.inf).amin(1)
            assert bool((certificate.margin - certificate.bound <= lead + 1e-12).all())
        attacked = pathlift.attack(network, x, tolerance, radius, steps=5)
        assert bool((certificate.margin - certificate.bound <= attacked.margin + 1e-9).all())


@pytest.mark.hunt
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_hundred_thousand_random_pairs_keep_every_certified_class(name: str) -> None:
    """In float32, as the model runs: 8 sets × 75 networks × 60 inputs for each of three networks, over 10⁵ in all."""
    make, shape = NETWORKS[name]
    pairs = 0
    for index, (tolerance, radius) in enumerate(SETS):
        model, x = fitted(make(), shape, 20 + index)
        network = pathlift.capture(model, x)
        certificate = pathlift.certify(network, x, tolerance, radius)
        generator = torch.Generator().manual_seed(index)
        for _ in range(75):
            other = draws(model, network, tolerance, generator)
            moved = x + radius * 0.999999 * (2 * torch.rand(x.shape, generator=generator).round() - 1)
            with torch.no_grad():
                kept = other(moved).argmax(1) == certificate.predicted
            assert bool(kept[certificate.certified].all()), (tolerance, radius)
            pairs += len(x)
    assert pairs >= 35_000


@pytest.mark.hunt
@pytest.mark.parametrize("name", ["perceptron", "convolutional"])
def test_what_is_not_certified_is_mostly_attacked(name: str) -> None:
    """Certificates that certify: at moderate sets, little is left between what is certified and what an attack breaks."""
    make, shape = NETWORKS[name]
    model, x = fitted(make(), shape)
    for tolerance, radius in ((Relative(0.01), 0.0), (Rounding(8), 0.0), (None, 0.01)):
        certified = pathlift.certify(model, x, tolerance, radius)
        attacked = pathlift.attack(model, x, tolerance, radius)
        assert float((~certified.certified & ~attacked.changed).double().mean()) <= 0.05


@pytest.mark.parametrize("tolerance", [Relative(0.03), Pruned(0.3), None], ids=str)
def test_certificates_do_not_move_under_adversarial_rescaling(tolerance: Tolerance | None) -> None:
    model, x = fitted(convolutional(), (1, 4, 4))
    twin = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        factors = 2.0 ** torch.randint(-20, 20, (6,), generator=generator).double()
        twin[1].running_mean.mul_(factors), twin[1].running_var.mul_(1.0)
        twin[0].weight.mul_(factors[:, None, None, None])
        outer = 2.0 ** torch.randint(-20, 20, (6,), generator=generator).double()
        twin[1].weight.mul_(outer / factors), twin[1].bias.mul_(outer)
        twin[4].weight.div_(outer[None, :, None, None])
        last = 2.0 ** torch.randint(-20, 20, (6,), generator=generator).double()
        twin[4].weight.mul_(last[:, None, None, None]), twin[4].bias.mul_(last)
        twin[7].weight.div_(last.repeat_interleave(4))
    before = pathlift.certify(copy.deepcopy(model).double(), x.double(), tolerance, 0.01)
    after = pathlift.certify(twin, x.double(), tolerance, 0.01)
    assert torch.equal(before.certified, after.certified)
    torch.testing.assert_close(after.bound, before.bound, rtol=1e-9, atol=1e-12)


def test_one_other_network_is_run_and_nothing_more() -> None:
    model, x = fitted(perceptron(5, 24, 3), (5,))
    other, _ = fitted(perceptron(5, 24, 3), (5,), 7)
    certificate = pathlift.certify(model, x, other)
    with torch.no_grad():
        same = model(x).argmax(1) == other(x).argmax(1)
    assert torch.equal(certificate.certified, same)
    assert torch.equal(certificate.certified, pathlift.certify(model, x, other.state_dict()).certified)


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy on a grid per output channel."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for value in copied.parameters():
            step = value.abs().flatten(1).amax(1) if value.dim() > 1 else value.abs()
            step = step.reshape(-1, *[1] * (value.dim() - 1)).clamp(min=1e-9) / (2 ** (bits - 1) - 1)
            value.copy_((value / step).round() * step if value.dim() > 1 else value)
    return copied


def leads(model: nn.Module, x: Tensor, predicted: Tensor) -> Tensor:
    """How far the logit of a class lies above each other, the model run in its own precision."""
    with torch.no_grad():
        out = model(x).double()
    return out.gather(1, predicted[:, None]) - out


PAIRS = {
    "rounded perceptron": (lambda: perceptron(5, 24, 24, 3), (5,), lambda model: rounded(model, 5)),
    "rounded convolutions": (convolutional, (1, 4, 4), lambda model: rounded(model, 6)),
    "every operator": (Corners, (1, 4, 4), lambda model: rounded(model, 7)),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("radius", [0.0, 0.05])
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_gives_the_certified_class_and_no_more_than_the_difference(name: str, radius: float) -> None:
    """The hunt for pairs: gradient steps inside the ball after whatever lessens the copy's lead, and random corners."""
    make, shape, copied = PAIRS[name]
    model, x = fitted(make(), shape, 5)
    other = copied(model)
    certificate = pathlift.certify(model, x, other, radius)
    assert certificate.difference is not None
    assert bool(certificate.certified.any())
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        moved = x + 0.999999 * radius * (2 * torch.rand(x.shape, generator=generator) - 1)
        for step in range(4 if radius else 1):
            before, after = (leads(each, moved, certificate.predicted) for each in (model, other))
            assert bool(((before - after).amax(1) <= certificate.difference + 1e-6).all())
            for lead in (before, after):
                kept = (lead + torch.nn.functional.one_hot(certificate.predicted, 3)).amin(1) > 0
                assert bool(kept[certificate.certified].all())
            moved = moved.detach().requires_grad_()
            gap = (model(moved) - other(moved)).gather(1, certificate.predicted[:, None])
            (slope,) = torch.autograd.grad(
                gap.sum() if step % 2 else -other(moved).gather(1, certificate.predicted[:, None]).sum(), moved
            )
            moved = (x + (moved.detach() + radius * slope.sign() / 2 - x).clamp(-0.999999 * radius, 0.999999 * radius)).detach()


@pytest.mark.hunt
def test_the_difference_of_a_pair_is_followed_layer_by_layer() -> None:
    """At the inputs themselves the difference is what it is; a network and itself differ by rounding alone, also in a ball."""
    model, x = fitted(convolutional(), (1, 4, 4), 5)
    model, x = model.double(), x.double()
    other = rounded(model, 6)
    at_points = pathlift.certify(model, x, other)
    before, after = (leads(each, x, at_points.predicted) for each in (model, other))
    assert at_points.difference is not None
    torch.testing.assert_close(at_points.difference, (before - after).amax(1).clamp(min=0.0), rtol=1e-6, atol=1e-9)
    same = pathlift.certify(model, x, copy.deepcopy(model), 0.05).difference
    assert same is not None and float(same.max()) < 1e-9
    assert pathlift.certify(model, x, Relative(0.01)).difference is None


def test_a_known_slope_multiplies_a_difference_in_double_precision() -> None:
    model = randomised(nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.1), nn.Linear(8, 2))).double()
    other, x = copy.deepcopy(model), torch.randn(20, 3, dtype=torch.float64)
    with torch.no_grad():
        other[0].weight.mul_(1 + 1e-3)
    certificate = pathlift.certify(model, x, other)
    before, after = (leads(each, x, certificate.predicted) for each in (model, other))
    assert certificate.difference is not None
    assert bool(((before - after).amax(1) <= certificate.difference + 1e-14).all())


def test_a_class_that_the_model_itself_changes_in_the_ball_is_not_agreed_on() -> None:
    """The copy is certified only where both networks keep the class: here the model changes it and the copy does not."""
    model, other = nn.Linear(1, 2, bias=False).double(), nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0]])), other.weight.copy_(torch.tensor([[1.0], [0.0]]))
    x = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    assert pathlift.certify(model, x, other, 1.0).certified.tolist() == [False, True]


def test_weights_that_move_together_cost_what_the_worst_of_them_costs() -> None:
    """Behind a ReLU whose sign is known the bound over all weights ±r is the smallest value, attained at a corner."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.abs_(), model[0].bias.abs_()
        model[1].running_mean.copy_(torch.tensor([0.1, -2.0, 0.3])), model[1].bias.fill_(3.0)
        model[4].weight.copy_(torch.stack([torch.rand(12), -torch.rand(12)])), model[4].bias.zero_()
    x = torch.rand(3, 1, 3, 3, dtype=torch.float64) + 0.5
    certificate = pathlift.certify(model, x, Relative(0.02))
    worst = copy.deepcopy(model)
    with torch.no_grad():  # the lead of class 0 grows in the magnitude of every weight: those of class 1 are below 0
        for value in worst.parameters():
            value.mul_(0.98)
    attained = leads(worst, x, torch.zeros(3, dtype=torch.long))[:, 1]
    torch.testing.assert_close(certificate.margin - certificate.bound, attained, rtol=1e-9, atol=1e-9)


def test_batches_of_a_loader_give_what_the_whole_gives() -> None:
    model, x = fitted(convolutional(), (1, 4, 4))
    done: list[float] = []
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(len(x))), batch_size=16)
    certificate = pathlift.certify(model, loader, Relative(0.02), progress=done.append)
    whole = pathlift.certify(model, x, Relative(0.02))
    assert torch.equal(certificate.certified, whole.certified)
    torch.testing.assert_close(certificate.bound, whole.bound)
    assert sum(done) == pytest.approx(len(x))
    with pytest.raises(pathlift.InputError, match="at least one batch"):
        pathlift.certify(model, [], Relative(0.02))
    with pytest.raises(pathlift.InputError, match="at least one batch"):
        pathlift.certify(pathlift.capture(model, x), [], Relative(0.02))


class Shifted(nn.Module):
    """The same network with its bias inside the linear layer, or added apart, beside a skip."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        self.first, self.last = nn.Linear(4, 4, bias=not apart), nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(F.relu(y + self.shift if self.apart else y))


def test_a_bias_added_apart_costs_what_a_bias_costs() -> None:
    """Only what varies is paid for: a sum with a parameter does not pay for its other summand."""
    one, two = Shifted(apart=False).double(), Shifted(apart=True).double()
    with torch.no_grad():
        two.first.weight.copy_(one.first.weight), two.shift.copy_(one.first.bias)
        two.last.load_state_dict(one.last.state_dict())
    x = torch.randn(6, 4, dtype=torch.float64)
    for kind in ("certify", "activation"):
        if kind == "certify":
            found = [pathlift.certify(model, x, Relative(0.01)).bound for model in (one, two)]
        else:
            found = [pathlift.lipschitz_bound(model, Relative(0.01), x, kind="activation") for model in (one, two)]
        torch.testing.assert_close(found[0] * 1, found[1] * 1, rtol=1e-9, atol=1e-12)


def test_a_tie_is_never_certified() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    certificate = pathlift.certify(model, torch.ones(1, 2))
    assert not bool(certificate.certified[0])
    assert float(certificate.margin[0]) == 0.0


def test_rounding_of_the_forward_pass_is_part_of_the_set() -> None:
    """Margins of the size of float32's rounding are not certified, of the size of float64's they are."""
    model = nn.Linear(200, 2, bias=False)
    with torch.no_grad():
        model.weight[0].fill_(1.0), model.weight[1].fill_(1.0)
        model.weight[0, 0] += 2e-5
    x = torch.ones(1, 200)
    assert not bool(pathlift.certify(model, x).certified[0])
    assert bool(pathlift.certify(model.double(), x.double()).certified[0])


@pytest.mark.hunt
def test_a_certificate_says_what_it_covers() -> None:
    """Without a set and a radius nothing but the model's own arithmetic is covered, and the certificate says so."""
    model, x = perceptron(5, 8, 3), torch.randn(4, 5)
    alone = pathlift.certify(model, x)
    assert alone.covers == "the rounding of the model's own forward pass in float32, and nothing else"
    assert alone.covers in repr(alone)
    for other, explicit in ((None, 0.0), (None, 0)):
        assert pathlift.certify(model, x, other, explicit).covers == alone.covers
    assert "float64, and nothing else" in pathlift.certify(model.double(), x.double()).covers
    half = copy.deepcopy(model).bfloat16()
    assert "bfloat16, and nothing else" in pathlift.certify(half, x.bfloat16()).covers
    model.float()
    scores = dict(pathlift.path_magnitude(model, (5,)))
    for tolerance, radius, words in (
        (Relative(0.1), 0.0, ("Relative(r=0.1)",)),
        (Rounding(8), 0.25, ("Rounding(bits=8", "each input element up to 0.25")),
        (None, 0.25, ("each input element up to 0.25",)),
        (Pruned(0.3, scores), 0.0, ("Pruned(amount=0.3, criterion=given scores)",)),
        (perceptron(5, 8, 3), 0.0, ("one other network",)),
        (model.state_dict(), 0.0, ("one other network",)),
    ):
        certificate = pathlift.certify(model, x, tolerance, radius)
        assert all(word in certificate.covers for word in (*words, "rounding of the model's own forward pass in float32"))
        assert "nothing else" not in certificate.covers
        assert len(repr(certificate)) < 250


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_way_of_rounding_lies_in_the_set(bits: int) -> None:
    model = randomised(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.ConvTranspose2d(3, 4, 2), nn.Flatten(), nn.Linear(64, 2))
    )
    network = pathlift.capture(model, (2, 5, 5))
    intervals = Rounding(bits).intervals(network)
    for name, axis in (("0.weight", 0), ("2.weight", 1), ("4.weight", 0)):
        weight = network.state[name].detach()
        others = [dim for dim in range(weight.dim()) if dim != axis]
        grid = weight.abs().amax(others, keepdim=True) / (2 ** (bits - 1) - 1)
        rounded = torch.round(weight / grid) * grid
        low, high = intervals[name]
        slack = 1e-12 * grid
        assert bool(((rounded >= low - slack) & (rounded <= high + slack)).all())
        assert float((high - low).max()) == pytest.approx(float(grid.max()))


def test_pruned_allows_the_lowest_and_no_others() -> None:
    model = randomised(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    network = pathlift.capture(model, (4,))
    scores = pathlift.path_magnitude(network)
    flat = torch.cat([scores["0.weight"].reshape(-1), scores["2.weight"].reshape(-1)])
    limit = flat.sort().values[int(0.4 * len(flat)) - 1]
    for name, (low, high) in Pruned(0.4).intervals(network).items():
        weight = network.state[name].detach()
        may = (scores[name] <= limit) if name.endswith("weight") else torch.zeros_like(weight, dtype=torch.bool)
        assert torch.equal(torch.where(low * high == 0, 0.0, weight), torch.where(may | (weight == 0), 0.0, weight))
    with pytest.raises(pathlift.MismatchError, match="no scores"):
        Pruned(0.4, {"0.weight": scores["0.weight"]}).intervals(network)


def test_bad_input_is_one_clear_error() -> None:
    model, x = perceptron(5, 8, 3), torch.zeros(2, 5)
    for make, message in (
        (lambda: Relative(-0.1), "r must be"),
        (lambda: Absolute(float("nan")), "r must be"),
        (lambda: Rounding(1), "bits must be"),
        (lambda: Rounding(8, per="row"), "per must be"),
        (lambda: Pruned(1.5), "amount must be"),
        (lambda: pathlift.certify(model, x, Relative(0.1), -1.0), "radius must be"),
        (lambda: pathlift.certify(model, x, "8 bits"), "There is no file '8 bits'"),
        (lambda: pathlift.certify(model, x * float("nan"), Relative(0.1)), "NaN or inf"),
        (lambda: pathlift.certify(model, torch.tensor(1.0), Relative(0.1)), "batch dimension"),
        (lambda: pathlift.certify(pathlift.capture(model, x), torch.zeros(2, 4), Relative(0.1)), "expected"),
    ):
        with pytest.raises(pathlift.InputError, match=message):
            make()
    with pytest.raises(pathlift.UnsupportedModelError, match="one vector of logits"):
        pathlift.certify(nn.Sequential(nn.Conv2d(1, 2, 1)), torch.zeros(1, 1, 3, 3), Relative(0.1))
    with pytest.raises(pathlift.MismatchError):
        pathlift.certify(model, x, perceptron(5, 9, 3))
    with pytest.raises(pathlift.UnsupportedModelError, match="remove_parametrizations"):
        pathlift.certify(nn.utils.parametrizations.orthogonal(nn.Linear(5, 3)), x, Relative(0.1))
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(pathlift.NumericalError, match=r"0\.weight"):
        pathlift.certify(model, x, Relative(0.1))


class Both(nn.Module):
    """One model of two inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model(torch.cat([x, y], 1))


@pytest.mark.hunt
def test_two_inputs_are_certified_and_attacked_as_one_that_holds_both() -> None:
    model, x = fitted(perceptron(5, 12, 3), (5,))
    model, x = model.double(), x.double()
    both, pair = Both(model), (x[:, :2], x[:, 2:])
    network = pathlift.capture(both, ((2,), (3,)))
    labels = torch.zeros(len(x))
    for tolerance, radius in ((Relative(0.2), 0.0), (None, 0.5)):
        right = pathlift.certify(model, x, tolerance, radius)
        assert 0 < right.share < 1
        for batches in ([pair], [(pair, labels)], {"x": pair[0], "y": pair[1]}, [{"y": pair[1], "x": pair[0]}], [(*pair,)]):
            certificate = pathlift.certify(both, batches, tolerance, radius)
            assert torch.equal(certificate.certified, right.certified)
            torch.testing.assert_close(certificate.bound, right.bound, rtol=1e-9, atol=1e-12)
        for batches in ([pair], [(pair, labels)]):
            assert torch.equal(pathlift.certify(network, batches, tolerance, radius).certified, right.certified)
        searched = pathlift.attack(model, x, tolerance, radius)
        for own in (both, network):
            torch.testing.assert_close(pathlift.attack(own, pair, tolerance, radius).margin, searched.margin)
        drawn = pathlift.attack(both, pair, tolerance, radius, generator=1)
        assert not bool((drawn.changed & right.certified).any())


def test_batches_are_never_taken_for_several_inputs() -> None:
    model, x = fitted(perceptron(5, 12, 3), (5,))
    model, x = model.double(), x.double()
    both, pair = Both(model), (x[:, :2], x[:, 2:])
    for own in (both, pathlift.capture(both, ((2,), (3,)))):
        for given in (pair, list(pair)):
            with pytest.raises(pathlift.InputError, match=r"\[\(a, b\)\]"):
                pathlift.certify(own, given)
            with pytest.raises(pathlift.InputError, match=r"\[\(a, b\)\]"):
                pathlift.lipschitz.expected_bound(own, Relative(0.1), given)
    for given in ([pair], {"x": pair[0], "y": pair[1]}, (pair, pair)):
        computed = pathlift.lipschitz.expected_bound(both, Relative(0.1), given)
        torch.testing.assert_close(computed, pathlift.lipschitz.expected_bound(model, Relative(0.1), [x]), rtol=1e-9, atol=0)
    bound = pathlift.lipschitz.expected_bound(model, Relative(0.1), x)
    assert torch.allclose(pathlift.lipschitz.expected_bound(model, Relative(0.1), x.split(7)), bound, rtol=1e-9)
