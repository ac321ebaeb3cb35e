"""Bounds and certificates are proofs: a search for weights and inputs for which one of them is not.

Weights are what Gaussians never give (`hunting.Pool`): 1e-40 beside 1e30, ties, opposites, neighbours in floating point,
denormals, variances of 0. What is true is worked out in rational arithmetic, or by the model itself in its own precision.
`PATHLIFT_PARTS` makes the search longer.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import pathlift
from hunting import FEET, MODELS, Divide, Pool, Through, fill, numbers, rational
from pathlift import Absolute, Pruned, Relative, Rounding, Tolerance

PARTS = int(os.environ.get("PATHLIFT_PARTS", "1"))
CASES = 6 * PARTS
DTYPES = tuple(FEET)
KINDS = ("per_input", "telescoping", "three_step", "activation", "enclosure", "pivot", "theorem", "prior", "corollary_g1")


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
        state[name] = torch.where(share == 1, high, low + share * (high - low)).clamp(low, high)
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


def own_class(model: nn.Module, x: Tensor) -> Iterator[int]:
    """The class that a model gives, one sample at a time, with and without denormals."""
    with torch.no_grad():
        yield int(model(x).argmax())
        yield int(model(torch.cat([x, x + 1]))[0].argmax())
        try:
            torch.set_flush_denormal(True)
            yield int(model(x).argmax())
        finally:
            torch.set_flush_denormal(False)


def at_the_edge(hunted: Hunted, x: Tensor, tolerance: Tolerance | None, radius: float) -> pathlift.Certificate:
    """Move a bias of the last layer so that the margin hardly exceeds what is certified: there a fault shows."""
    last = [part for part in hunted.model.modules() if isinstance(part, nn.Linear) and part.bias is not None][-1]
    found = pathlift.certify(hunted.network, x, tolerance, radius)
    for spare in (1e-3, 1e-2, 0.1):
        gap = float(found.margin[0] - found.bound[0])
        if not math.isfinite(gap) or gap == 0:
            break
        with torch.no_grad():
            before = last.bias.clone()
            last.bias[int(found.predicted[0])] -= gap - spare * abs(float(found.bound[0]))
            if not bool(torch.isfinite(last.bias).all()):
                last.bias.copy_(before)
                break
        found = pathlift.certify(hunted.network, x, tolerance, radius)
        if bool(found.certified[0]):
            break
    return found


def certificates(hunted: Hunted, seed: int, cases: int, members: int = 4) -> Found:
    """Certificates: the model's own arithmetic, members of the set, and the attack, against what is certified."""
    found = Found()
    for case in range(cases):
        pool = Pool(hunted.dtype, 1000 * seed + case)
        fill(hunted.model, pool)
        tolerance = None if pool.chance(0.4) else tolerance_of(pool)
        radius = (0.0, 0.0, 2.0**-6)[pool.pick(3)]
        x = pool.tensor(torch.Size((1, 2)))
        certificate = at_the_edge(hunted, x, tolerance, radius)
        found.cases += 1
        if not bool(certificate.certified[0]):
            continue
        words = f"{hunted.name}, {hunted.dtype}, {tolerance}, radius {radius}, seed {seed}, case {case}"
        label = int(certificate.predicted[0])
        bound, margin = float(certificate.bound[0]), float(certificate.margin[0])
        found.slack = min(found.slack, margin / bound - 1) if bound > 0 else found.slack
        attacked = pathlift.attack(hunted.network, x, tolerance, radius, steps=4)
        if bool(attacked.changed[0]) or float(attacked.margin[0]) < margin - bound - 1e-12 * abs(margin):
            found.broken.append(f"{words}: certified above {margin - bound!r}, attacked at {float(attacked.margin[0])!r}")
        for place in range(members):
            state = member(hunted, tolerance, pool) if tolerance is not None and place else {}
            moved = x + radius * (pool.pick(3) - 1) if place else x
            inside = {key: value.to(hunted.dtype) for key, value in state.items()}
            ends = tolerance.intervals(hunted.network) if state and tolerance is not None else {}
            inside = {
                key: torch.where(
                    (own.double() >= ends[key][0]) & (own.double() <= ends[key][1]), own, hunted.model.state_dict()[key]
                )
                for key, own in inside.items()
            }
            other = copy.deepcopy(hunted.model)
            other.load_state_dict({**other.state_dict(), **inside})
            if any(bool((part.t == 0).any()) for part in other.modules() if isinstance(part, Divide)):
                continue
            if bool(((moved.double() - x.double()).abs() <= radius).all()):
                classes = set(own_class(other, moved))
                if classes != {label}:
                    found.broken.append(f"{words}: certified as {label}, the model gives {classes}")
            exact = rational(other.double(), numbers(moved)) if not hunted.casts else []
            if exact and bool(((moved.double() - x.double()).abs() <= radius).all()) and exact.index(max(exact)) != label:
                found.broken.append(f"{words}: certified as {label}, exact arithmetic prefers {exact.index(max(exact))}")
    return found


if __name__ == "__main__":
    import sys

    what, dtypes = sys.argv[1], [dtype for dtype in DTYPES if len(sys.argv) < 4 or str(dtype).endswith(sys.argv[3])]
    count = int(sys.argv[2])
    for dtype in dtypes:
        for name in MODELS:
            hunted, start = Hunted(name, dtype), time.monotonic()
            if what == "certificates":
                results = {"certificate": certificates(hunted, 0, count)}
            elif what == "pairs":
                results = {} if hunted.casts else pairs(hunted, KINDS, 0, count)
            else:
                results = (
                    {}
                    if hunted.casts
                    else sets(hunted, ("per_input", "telescoping", "activation", "enclosure", "pivot"), 0, count)
                )
            took = time.monotonic() - start
            for kind, own in results.items():
                print(
                    f"{name:12s} {dtype!s:15s} {kind:14s} {own.cases:5d} cases {own.slack:9.2e} {len(own.broken):4d} broken {took:.0f} s",
                    *own.broken[:2],
                    sep="\n    " if own.broken else " ",
                    flush=True,
                )
