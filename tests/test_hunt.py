"""Bounds and certificates are proofs: a search for weights and inputs for which one of them is not.

Weights are what Gaussians never give (`hunting.Pool`): 1e-40 beside 1e30, ties, opposites, neighbours in floating point,
denormals, variances of 0. What is true is worked out in rational arithmetic, or by the model itself in its own precision.
`PATHLIFT_SEARCH` makes the search longer.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import pathlift
from habit import LONGER
from hunting import FEET, MODELS, Divide, Pool, Through, beside, change, fill, numbers, rational
from pathlift import Absolute, Pruned, Relative, Rounding
from pathlift.certification import Tolerance
from pathlift.lipschitz.bound import BOUNDS
from pathlift.passes import intervals, rounding
from pathlift.passes.enclosure.roundoff import Roundoff

DTYPES = tuple(FEET)


@dataclass
class Found:
    """What a hunt saw: how many cases, the smallest slack relative to the truth, and what broke a bound."""

    cases: int = 0
    slack: float = math.inf
    broken: list[str] = field(default_factory=list)

    def bound(self, bound: float, truth: Fraction, words: str) -> None:
        self.cases += 1
        if math.isnan(bound) or (math.isfinite(bound) and Fraction(bound) < truth):
            self.broken.append(f"{words}: {bound!r} below the true change {float(truth)!r}")
        elif truth and math.isfinite(bound):
            self.slack = min(self.slack, float(min(Fraction(bound) / truth - 1, Fraction(10**9))))


class Hunted:
    """One architecture in one precision, captured once: weights change in place."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.name, self.dtype = name, dtype
        self.model = MODELS[name]().to(dtype).eval()
        self.network = pathlift.capture(self.model, torch.zeros(1, 2, dtype=dtype))
        self.casts = any(isinstance(part, Through) for part in self.model.modules())
        self.behind = next((part for part in self.model if isinstance(part, (nn.Sigmoid, nn.Softmax))), None)

    def like(self, state: Mapping[str, Tensor]) -> nn.Module:
        """A network of the set, in float64."""
        other = copy.deepcopy(self.model).double()
        other.load_state_dict({**other.state_dict(), **state})
        return other


def rescaled(state: dict[str, Tensor], pool: Pool) -> dict[str, Tensor]:
    """The first linear layer times a factor, the last divided by it, both rounded."""
    weights = [key for key in state if key.endswith("weight") and state[key].dim() == 2]
    factor = (1.7, 3.0, 1 / 3, 2.0**5)[pool.pick(4)]
    if len(weights) > 1:
        state[weights[0]] = state[weights[0]] * factor
        if weights[0].replace("weight", "bias") in state:
            state[weights[0].replace("weight", "bias")] *= factor
        state[weights[-1]] = state[weights[-1]] / factor
    return state


def another(model: nn.Module, pool: Pool) -> dict[str, Tensor]:
    """A second network: near, rescaled, pruned, with other signs, or any other."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    way = pool.pick(5)
    if way == 0:
        return rescaled(state, pool)
    for key, value in state.items():
        if not value.is_floating_point() or "running" in key:
            continue
        if way == 1:
            value.copy_(torch.nextafter(value, torch.full_like(value, math.inf)))
        elif way == 2:
            value.mul_(torch.rand(value.shape, generator=pool.made).round().to(value.dtype) if not key.endswith(".t") else 1)
        elif way == 3:
            value.mul_((1 + 0.1 * torch.randn(value.shape, generator=pool.made)).to(value.dtype))
        else:
            drawn = pool.tensor(value.shape)
            value.copy_(torch.where(drawn == 0, torch.ones_like(drawn), drawn) if key.endswith(".t") else drawn)
    return state


def pairs(hunted: Hunted, kinds: tuple[str, ...], seed: int, cases: int) -> dict[str, Found]:
    """Bounds on two networks, in exact arithmetic."""
    found = {kind: Found() for kind in kinds}
    for case in range(cases):
        pool = Pool(hunted.dtype, 1000 * seed + case)
        fill(hunted.model, pool)
        state = another(hunted.model, pool)
        x = pool.tensor(torch.Size((2, 2)))
        other = hunted.like(state)
        truth = [
            [abs(a - b) for a, b in zip(rational(hunted.model, numbers(row)), rational(other, numbers(row)), strict=True)]
            for row in x
        ]
        for kind in kinds:
            try:
                bound = pathlift.lipschitz_bound(hunted.network, state, x, kind=kind)
            except (pathlift.MismatchError, pathlift.UnsupportedModelError) as error:
                assert kind in ("theorem", "prior", "corollary_g1"), f"{hunted.name}, {kind}: {error}"  # noqa: PT017
                continue
            for row, rows in zip(bound.tolist(), truth, strict=True):
                for value, right in zip(row, rows, strict=True):
                    found[kind].bound(value, right, f"{hunted.name}, {hunted.dtype}, {kind}, seed {seed}, case {case}")
    return found


def tolerance_of(pool: Pool) -> Tolerance:
    """A set of networks."""
    return (
        Relative(0.25 * 2.0 ** -pool.pick(20)),
        Absolute(2.0 ** -pool.pick(16)),
        Rounding(2 + pool.pick(9)),
        Pruned(0.25 * (1 + pool.pick(3)), "magnitude"),
    )[pool.pick(4)]


def member(hunted: Hunted, tolerance: Tolerance, pool: Pool) -> dict[str, Tensor]:
    """A corner of a set, or a network inside it."""
    state = {}
    corner = pool.chance(0.75)
    for name, (low, high) in tolerance.intervals(hunted.network).items():
        share = torch.rand(low.shape, generator=pool.made, dtype=torch.float64)
        share = share.round() if corner else share
        value = torch.where(share == 1, high, low + share * (high - low)).clamp(low, high)
        near = ((low < 0) & (high > 0)) & (torch.rand(low.shape, generator=pool.made) < 0.3)
        state[name] = torch.where(near, high * 2.0 ** -(4 + pool.pick(8)), value)  # hardly above 0
    return state


def sets(hunted: Hunted, kinds: tuple[str, ...], seed: int, cases: int, members: int = 4) -> dict[str, Found]:
    """Bounds on whole sets of networks and inputs, in exact arithmetic."""
    found = {kind: Found() for kind in kinds}
    for case in range(cases):
        pool = Pool(hunted.dtype, 1000 * seed + case)
        fill(hunted.model, pool)
        tolerance, radius = tolerance_of(pool), (0.0, 0.125)[pool.pick(2)]
        x = pool.tensor(torch.Size((1, 2)))
        here = rational(hunted.model, numbers(x))
        bounds = {kind: pathlift.lipschitz_bound(hunted.network, tolerance, x, kind=kind, radius=radius)[0] for kind in kinds}
        for _ in range(members):
            state = member(hunted, tolerance, pool)
            if any(bool((value == 0).any()) for key, value in state.items() if key.endswith(".t")):
                continue
            moved = [v + Fraction(radius) * (pool.pick(3) - 1) for v in numbers(x)]
            there = rational(hunted.like(state), moved)
            for kind in kinds:
                for value, a, b in zip(bounds[kind].tolist(), here, there, strict=True):
                    words = f"{hunted.name}, {hunted.dtype}, {kind}, {tolerance}, radius {radius}, seed {seed}, case {case}"
                    found[kind].bound(value, abs(a - b), words)
    return found


def own_outputs(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """What a model gives for a sample, alone and beside others, with and without denormals: float64, (outputs,)."""
    with torch.no_grad():
        yield model(x)[0].double()
        yield model(torch.cat([x + 1, x, x - 1]))[1].double()
        try:
            torch.set_flush_denormal(True)
            yield model(x)[0].double()
        finally:
            torch.set_flush_denormal(False)


def representable(hunted: Hunted, tolerance: Tolerance | None, pool: Pool) -> nn.Module:
    """A network of the set in the model's own precision."""
    other = copy.deepcopy(hunted.model)
    if tolerance is not None:
        ends, state = tolerance.intervals(hunted.network), other.state_dict()
        for key, value in member(hunted, tolerance, pool).items():
            low, high = ends[key]
            rounded = value.to(hunted.dtype)
            state[key] = torch.where((rounded.double() >= low) & (rounded.double() <= high), rounded, state[key])
        other.load_state_dict(state)
    return other


def slack_of(
    hunted: Hunted, x: Tensor, tolerance: Tolerance | None, radius: float, pool: Pool, found: Found, words: str
) -> float:
    """Compare a certificate with what members of its set do; return the smallest slack relative to the bound."""
    splits = 3 if found.cases % 8 == 7 else 0  # also the bounds of a set that was cut
    certificate = pathlift.certify(hunted.network, x, tolerance, radius, splits=splits)
    found.cases += 1
    label, margin, bound = (float(own[0]) for own in (certificate.predicted, certificate.margin, certificate.bound))
    if not math.isfinite(bound):
        return math.inf
    least, scale = margin - bound, abs(bound) + 1e-300
    seen = []
    for index in range(3):
        other = representable(hunted, tolerance if index else None, pool)
        moved = x + radius * (pool.pick(3) - 1)
        if bool(((moved.double() - x.double()).abs() > radius).any()):
            moved = x
        if any(bool((part.t == 0).any()) for part in other.modules() if isinstance(part, Divide)):
            continue
        if hunted.behind is None:
            runs = [("the model itself", own.tolist()) for own in own_outputs(other, moved)]
            if not hunted.casts:
                runs.append(("exact arithmetic", [float(v) for v in rational(other, numbers(moved))]))
            for who, values in runs:
                apart = values[int(label)] - max(value for index, value in enumerate(values) if index != int(label))
                seen.append((apart - least) / scale)
                if not apart >= least - 1e-13 * (abs(margin) + abs(bound)):
                    found.broken.append(f"{words}: margin {apart!r} in {who}, at least {least!r} is certified")
        elif bool(certificate.certified[0]):
            for own in own_outputs(other, moved):
                if int(own.argmax()) != int(label):
                    found.broken.append(f"{words}: certified as {int(label)}, the model itself gives {own.tolist()}")
    attacked = pathlift.attack(hunted.network, x, tolerance, radius, steps=3)
    if float(attacked.margin[0]) < least - 1e-12 * (abs(margin) + abs(bound)):
        found.broken.append(f"{words}: certified above {least!r}, attacked at {float(attacked.margin[0])!r}")
    found.slack = min([found.slack, *seen])
    return min(seen, default=math.inf)


def certificates(hunted: Hunted, seed: int, climbs: int, steps: int = 12) -> Found:
    """Certificates: the model's own arithmetic, exact arithmetic, members of the set and the attack against the bound.

    Each climb starts anywhere and takes the steps that lessen the slack.
    """
    found = Found()
    for climb in range(climbs):
        pool = Pool(hunted.dtype, 1000 * seed + climb)
        fill(hunted.model, pool)
        tolerance = None if pool.chance(0.5) else tolerance_of(pool)
        radius = (0.0, 0.0, 2.0**-6)[pool.pick(3)]
        x = pool.tensor(torch.Size((1, 2)))
        if hunted.behind is not None:
            x, tolerance, radius = torch.full_like(x, 1.0), None, 0.0
        if isinstance(hunted.model[0], nn.BatchNorm1d) and pool.chance(0.5):
            x = beside(hunted.model[0].running_mean[None], pool.pick(3))
        words = f"{hunted.name}, {hunted.dtype}, {tolerance}, radius {radius}, seed {seed}, climb {climb}"
        best = slack_of(hunted, x, tolerance, radius, pool, found, words)
        for _ in range(steps):
            back = change(hunted.model, x, pool)
            slack = slack_of(hunted, x, tolerance, radius, pool, found, words)
            if found.broken:
                return found
            if slack > best:
                back()
            else:
                best = slack
    return found


EXACT = [name for name in MODELS if not any(isinstance(part, (Through, nn.Sigmoid, nn.Softmax)) for part in MODELS[name]())]
SETS = ("per_input", "telescoping", "activation", "enclosure", "pivot")


def assert_held(found: Mapping[str, Found]) -> None:
    """No bound was broken; ``-s`` tells how many numbers a hunt looked at, and how near the truth came to each bound."""
    print({kind: f"{own.cases} cases, smallest slack {own.slack:.1e}" for kind, own in found.items()})
    assert not [words for own in found.values() for words in own.broken]


@pytest.mark.one_in(26)
@pytest.mark.hunt_one_in(6)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_bounds_on_two_networks_cover_the_exact_change(name: str, dtype: torch.dtype) -> None:
    assert_held(pairs(Hunted(name, dtype), tuple(BOUNDS), 0, 4 * LONGER))


@pytest.mark.one_in(22, first=3)
@pytest.mark.hunt_one_in(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_bounds_on_sets_cover_every_network_and_input_of_them(name: str, dtype: torch.dtype) -> None:
    assert_held(sets(Hunted(name, dtype), SETS, 1, 4 * LONGER))


@pytest.mark.hunt
@pytest.mark.hunt_one_in(8)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_no_network_of_the_set_falls_below_what_is_certified(name: str, dtype: torch.dtype) -> None:
    assert_held({"certificate": certificates(Hunted(name, dtype), 2, 2 * LONGER)})


def patched(patch: pytest.MonkeyPatch, what: str) -> None:
    """Take one of the fixes out."""
    certify = sys.modules["pathlift.certification.certificates"]
    box, point, kind_of = certify.box, certify.point, rounding.Arithmetic.of
    if what == "underflow":
        patch.setattr(Roundoff, "underflow", lambda *_: 0.0)
        patch.setattr(Roundoff, "underflow_of_bend", lambda *_: 0.0)
    elif what == "overflow":
        patch.setattr(rounding.Arithmetic, "of", lambda self, layer: replace(kind_of(self, layer), largest=math.inf))
        patch.setattr(rounding.Arithmetic, "words", "")
        patch.setattr(Roundoff, "out_of_range", lambda *_: False)
    elif what == "casts":

        def of_parameters(self: rounding.Arithmetic, _: object) -> rounding.Format:
            return max((rounding.FORMATS[self.network.kind_of(own)] for own in self.network.parameters), key=lambda f: f.unit)

        patch.setattr(rounding.Arithmetic, "of", of_parameters)
    elif what == "derived weights":
        patch.setattr(certify, "box", lambda network, given, **_: box(network, given))
        patch.setattr(certify, "point", lambda network, given, **_: point(network, given))
    elif what == "division through zero":

        def ends(ranges: intervals.Ranges, x: object) -> intervals.Interval:
            given = ranges.interval(x)
            one, two = given.low.reciprocal(), given.high.reciprocal()
            return intervals.Interval(torch.minimum(one, two), torch.maximum(one, two))

        patch.setattr(intervals, "_reciprocal", ends)
        patch.setitem(intervals.OPERATIONS, "reciprocal", ends)
    elif what == "cancellation in a batch norm":
        patch.setattr(certify, "box", lambda *a, **k: replace(box(*a, **k), cancelled={}))
        patch.setattr(certify, "point", lambda *a, **k: replace(point(*a, **k), cancelled={}))
    elif what == "positions between pixels":
        patch.setattr(Roundoff, "positions", lambda *_: 0.0)
    elif what == "what is behind the logits":
        patch.setattr(certify, "_resolution", lambda left_off, size, kind: torch.zeros_like(size))
    elif what == "rounding of sums":
        patch.setattr(Roundoff, "model_sum", lambda *_: 0.0)
    else:
        assert what == "rounding of nonlinearities"
        patch.setattr(Roundoff, "model_bend", lambda *_: 0.0)


@pytest.mark.hunt
@pytest.mark.hunt_one_in(3)
@pytest.mark.parametrize(
    ("what", "name", "dtype", "climbs"),
    [
        ("underflow", "bare", torch.float16, 40),
        ("overflow", "perceptron", torch.float16, 40),
        ("overflow", "narrow", torch.float32, 40),
        ("casts", "cast", torch.float32, 40),
        ("derived weights", "centred", torch.bfloat16, 40),
        ("division through zero", "division", torch.float64, 40),
        ("cancellation in a batch norm", "norm alone", torch.float32, 40),
        ("positions between pixels", "wider", torch.float32, 40),
        ("what is behind the logits", "sigmoid", torch.float32, 40),
        ("what is behind the logits", "softmax", torch.float32, 40),
        ("rounding of sums", "perceptron", torch.float32, 40),
        ("rounding of nonlinearities", "bent", torch.float32, 40),
    ],
)
def test_the_hunt_finds_the_fault_when_its_fix_is_taken_out(
    what: str, name: str, dtype: torch.dtype, climbs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hunted = Hunted(name, dtype)
    patched(monkeypatch, what)
    assert any(certificates(hunted, seed, 1).broken for seed in range(climbs))
