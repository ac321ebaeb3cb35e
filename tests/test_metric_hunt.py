"""A search for a bound that is none: adversarial pairs of small networks against all paths in exact fractions.

For each bound and precision, weights are drawn from what Gaussians never reach (1e-40 beside 1e30, cancelling pairs, ties,
numbers below the normal range, zero variances, huge running means, slopes above 1 and below 0), and the second network from
the first by rescaling, rounding, pruning, a step to the next number, a new draw. `make search` looks longer; ``-s`` tells
what it found.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import pathlift
from habit import LONGER
from hunting import Skip
from pathlift.lipschitz.bound import BOUNDS

CASES, PAIRS = 5, 6
"""Parts of `CASES` architectures, each with `PAIRS` pairs, for each precision."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Pairs = list[tuple[Fraction, Fraction]]
"""What every path into a neuron weighs, in both networks."""


def fractions(tensor: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in tensor.detach().double().reshape(-1).tolist()]


# Paths and outputs, module by module


NORMS: dict[int, tuple[Tensor, Tensor]] = {}
"""Scale and shift of each batch norm by the number of the module: numbers of float64, as the theory evaluates them."""


def remember_norms(model: nn.Module, network: pathlift.Network) -> None:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = network.values(state)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d):
            own = [weight for weight in values if f"{name}.running_var" in weight.requires]
            scale, shift = sorted(own, key=lambda weight: f"{name}.running_mean" in weight.requires)
            NORMS[id(module)] = values[scale].double(), values[shift].double()


def rows_of(module: nn.Module) -> list[tuple[dict[int, Fraction], Fraction]]:
    """An affine map with an input of its own size: weights by input, and bias, of each neuron."""
    if isinstance(module, nn.BatchNorm1d):
        scale, shift = (fractions(part) for part in NORMS[id(module)])
        return [({index: own}, shift[index]) for index, own in enumerate(scale)]
    bias = [Fraction(0)] * len(module.weight) if module.bias is None else fractions(module.bias)
    if isinstance(module, nn.Linear):
        return [(dict(enumerate(fractions(row))), own) for row, own in zip(module.weight, bias, strict=True)]
    assert isinstance(module, nn.Conv1d)  # of one channel, 4 long, kernel 2
    return [
        ({index + tap: own for tap, own in enumerate(fractions(kernel))}, bias[out])
        for out, kernel in enumerate(module.weight)
        for index in range(3)
    ]


def slopes_of(module: nn.Module) -> tuple[Fraction, Fraction] | None:
    if isinstance(module, nn.ReLU):
        return Fraction(1), Fraction(0)
    return (Fraction(1), Fraction(module.negative_slope)) if isinstance(module, nn.LeakyReLU) else None


def paths_through(one: nn.Module, two: nn.Module, below: list[Pairs]) -> list[Pairs]:
    if isinstance(one, nn.Sequential):
        for inner, other in zip(one, two, strict=True):
            below = paths_through(inner, other, below)
        return below
    if isinstance(one, Skip):
        return [mine + own for mine, own in zip(below, paths_through(one.inner, two.inner, below), strict=True)]
    if isinstance(one, (nn.Flatten, nn.ReLU, nn.Identity)):
        return below
    if isinstance(one, nn.LeakyReLU):
        steepest = max(Fraction(1), abs(Fraction(one.negative_slope)))
        return [[(a * steepest, b * steepest) for a, b in own] for own in below]
    if isinstance(one, nn.PReLU):
        (slope,), (other,) = fractions(one.weight), fractions(two.weight)
        return [own + [(-a * slope, -b * other) for a, b in own] for own in below]
    if isinstance(one, nn.MaxPool1d):  # two channels of three places, windows of two
        return [below[3 * channel + place] + below[3 * channel + place + 1] for channel in range(2) for place in range(2)]
    found = []
    for (mine, bias), (theirs, other_bias) in zip(rows_of(one), rows_of(two), strict=True):
        own = [(a * mine[place], b * theirs[place]) for place in mine for a, b in below[place]]
        found.append([*own, (bias, other_bias)])
    return found


def outputs_of(module: nn.Module, x: list[Fraction]) -> list[Fraction]:
    if isinstance(module, nn.Sequential):
        for inner in module:
            x = outputs_of(inner, x)
        return x
    if isinstance(module, Skip):
        return [a + b for a, b in zip(x, outputs_of(module.inner, x), strict=True)]
    if isinstance(module, (nn.Flatten, nn.Identity)):
        return x
    if isinstance(module, nn.PReLU):
        (slope,) = fractions(module.weight)
        return [max(v, Fraction(0)) + slope * min(v, Fraction(0)) for v in x]
    slopes = slopes_of(module)
    if slopes is not None:
        return [slopes[0] * max(v, Fraction(0)) + slopes[1] * min(v, Fraction(0)) for v in x]
    if isinstance(module, nn.MaxPool1d):
        return [max(x[3 * channel + place], x[3 * channel + place + 1]) for channel in range(2) for place in range(2)]
    return [sum((w * x[place] for place, w in weights.items()), bias) for weights, bias in rows_of(module)]


# Pairs of networks


def architecture(draw: random.Random) -> tuple[nn.Sequential, tuple[int, ...]]:
    bias = draw.random() < 0.7
    kind = draw.random()
    if kind < 0.2:
        return nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)), (1,)
    if kind < 0.35:
        layers = [nn.Conv1d(1, 2, 2, bias=bias), nn.ReLU(), nn.MaxPool1d(2, 1), nn.Flatten(), nn.Linear(4, 2, bias=bias)]
        return nn.Sequential(*layers), (1, 4)
    size = width = draw.randint(1, 2)
    layers: list[nn.Module] = []
    for index in range(depth := draw.randint(1, 3)):
        out = draw.randint(1, 3)
        layers.append(nn.Linear(width, out, bias=bias))
        width = out
        if draw.random() < 0.25:
            layers.append(nn.BatchNorm1d(width))
        if index < depth - 1:
            layers.append(
                draw.choice([nn.ReLU(), nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.5), nn.LeakyReLU(2.0), nn.PReLU()])
            )
        if draw.random() < 0.2:
            layers.append(Skip(nn.Sequential(nn.Linear(width, width, bias=bias), nn.ReLU())))
    return nn.Sequential(*layers), (size,)


def numbers(draw: random.Random, like: Tensor) -> Tensor:
    """Weights that try a bound."""
    kind = draw.choice(["plain", "plain", "wide", "ties", "pairs", "denormal", "zeros", "huge"])
    info, count = torch.finfo(like.dtype), like.numel()
    top, low = math.log10(info.max) / 3, math.log10(info.tiny)
    sign = [draw.choice([-1.0, 1.0]) for _ in range(count)]
    if kind == "wide":
        span = min(40.0, -low)
        values = [own * 10 ** draw.uniform(-span, min(30.0, top)) for own in sign]
    elif kind == "ties":
        values = [own * draw.choice([0.5, 1.0, 1.0, 2.0]) for own in sign]
    elif kind == "pairs":
        base = draw.gauss(0, 1)
        values = [own * base * (1 + draw.choice([0, 0, info.eps, -info.eps])) for own in sign]
    elif kind == "denormal":
        values = [own * draw.choice([0.0, info.smallest_normal * 2.0**-5, info.smallest_normal, 1.0]) for own in sign]
    elif kind == "zeros":
        values = [own * draw.choice([0.0, 0.0, 1.0, draw.gauss(0, 1)]) for own in sign]
    elif kind == "huge":
        values = [own * 10 ** draw.uniform(0, min(25.0, top)) for own in sign]
    else:
        values = [draw.gauss(0, 1) for _ in range(count)]
    return torch.tensor(values, dtype=torch.float64).clamp(info.min, info.max).to(like.dtype).reshape(like.shape)


def weigh(model: nn.Module, draw: random.Random) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            value = numbers(draw, tensor)
            tensor.copy_(value.abs() if name.endswith("running_var") else value)


def rescale(other: nn.Module, draw: random.Random, whole: bool) -> None:
    """Multiply a layer by factors and divide the next one that stands directly behind it."""
    layers = [layer for layer in other if not isinstance(layer, nn.Flatten)]
    for index in range(len(layers) - 2):
        low, kink, high = layers[index : index + 3]
        if isinstance(low, nn.Linear) and isinstance(kink, nn.ReLU) and isinstance(high, nn.Linear):
            factors = torch.tensor([
                2.0 ** draw.randint(-20, 20) if whole else draw.choice([1.7, 0.3, 3e4]) for _ in low.weight
            ])
            factors = factors.to(torch.float64)
            for tensor, factor in ((low.weight, factors[:, None]), (low.bias, factors), (high.weight, 1 / factors)):
                if tensor is not None:
                    tensor.copy_(tensor.double() * factor)


def second(model: nn.Module, draw: random.Random) -> nn.Module:
    other, how = pathlift.rescaling.with_state(model, model.state_dict()), draw.choice(list(CHANGES))
    with torch.no_grad():
        CHANGES[how](other, draw)
    for tensor in other.state_dict().values():
        if not bool(torch.isfinite(tensor).all()):
            return pathlift.rescaling.with_state(model, model.state_dict())
    return other


def each(function: Callable[[Tensor, random.Random], Tensor]) -> Callable[[nn.Module, random.Random], None]:
    def change(other: nn.Module, draw: random.Random) -> None:
        for parameter in other.parameters():
            parameter.copy_(function(parameter, draw))

    return change


def some(like: Tensor, draw: random.Random, part: float) -> Tensor:
    return torch.tensor([draw.random() < part for _ in range(like.numel())]).reshape(like.shape)


CHANGES: dict[str, Callable[[nn.Module, random.Random], None]] = {
    "drawn anew": weigh,
    "rescaled": lambda other, draw: rescale(other, draw, False),
    "rescaled again": lambda other, draw: rescale(other, draw, False),
    "rescaled by powers of two": lambda other, draw: rescale(other, draw, True),
    "next number": each(lambda own, draw: torch.where(some(own, draw, 0.5), _next(own), own)),
    "noise": each(lambda own, draw: own * (1 + 10 ** draw.uniform(-12, 0) * torch.randn_like(own.float()).to(own.dtype))),
    "pruned": each(lambda own, draw: torch.where(some(own, draw, 0.4), torch.zeros_like(own), own)),
    "grown": each(lambda own, draw: torch.where(some(own, draw, 0.5), own * 2, own)),
    "signs": each(lambda own, draw: torch.where(some(own, draw, 0.3), -own, own)),
    "one tiny weight": each(lambda own, draw: torch.where(own == 0, torch.finfo(own.dtype).tiny * some(own, draw, 0.5), own)),
}


def _next(own: Tensor) -> Tensor:
    step = own * (1 + torch.finfo(own.dtype).eps)
    return torch.where(torch.isfinite(step), step, own)


# The comparison


def log10(value: Fraction) -> float:
    """log₁₀ of a fraction of any size, right to 1e-14."""
    if value == 0:
        return -math.inf
    shift = value.numerator.bit_length() - value.denominator.bit_length()
    return math.log10(float(value / Fraction(2) ** shift)) + shift * math.log10(2.0)


class Hunt:
    """The smallest slack that was seen, by bound, and what fails."""

    def __init__(self) -> None:
        self.slack: dict[str, float] = defaultdict(lambda: math.inf)
        self.failed: list[str] = []
        self.refused: dict[str, int] = defaultdict(int)

    def compare(self, name: str, lower: float, upper: float, where: str) -> None:
        """Both are log₁₀."""
        if lower == -math.inf or upper == math.inf:
            return
        slack = upper - lower
        self.slack[name] = min(self.slack[name], slack)
        if not slack >= -1e-14 * (1 + abs(lower)):
            self.failed.append(f"{name}: {where}: {lower!r} > {upper!r}")


def hunted(seed: int, dtype: torch.dtype, hunt: Hunt) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, shape = architecture(draw)
    model = model.to(dtype).eval()
    network = pathlift.capture(model, shape)
    for index in range(PAIRS):
        with torch.no_grad():
            weigh(model, draw)
        compared(model, second(model, draw), network, shape, draw, hunt, f"seed {seed}, pair {index}, {dtype}")


def compared(
    model: nn.Module,
    other: nn.Module,
    network: pathlift.Network,
    shape: tuple[int, ...],
    draw: random.Random,
    hunt: Hunt,
    where: str,
) -> None:
    """Compare every bound on one pair with the truth."""
    NORMS.clear()
    for own in (model, other):
        remember_norms(own, network)
    size = math.prod(shape)
    ends = paths_through(
        model, other, [[(Fraction(index == p), Fraction(index == p)) for p in range(size)] for index in range(size)]
    )
    ends = [[(a, b) for a, b in own if a or b] for own in ends]
    each_output = [sum((abs(a - b) for a, b in own), Fraction(0)) for own in ends]
    metric = sum(each_output, Fraction(0))
    try:
        bounds = pathlift.metric.path_metric_bounds(network, other, moments=8)
    except pathlift.NumericalError:
        hunt.refused["path_metric_bounds"] += 1
        bounds = ()
    for bound in bounds:
        if bound.reason:
            continue
        ends_of = (bound.log10, log10(metric)) if bound.side == "lower" else (log10(metric), bound.log10)
        hunt.compare(f"{bound.name}, {bound.side}", *ends_of, where)
    for options in ({}, {"moments": draw.choice([0, 2, 4, 6, 8])}, *([{"tighten": 2}] if draw.random() < 0.15 else [])):
        try:
            distance = pathlift.path_metric(network, other, **options)
        except pathlift.NumericalError:
            hunt.refused["path_metric"] += 1
            continue
        name = f"path_metric {options}{' exact' if distance.exact else ''}"
        hunt.compare(f"{name}, lower", distance.log10_lower, log10(metric), where)
        hunt.compare(f"{name}, upper", log10(metric), distance.log10_upper, where)
        if math.isfinite(distance.upper) and Fraction(distance.upper) < metric:
            hunt.failed.append(f"{name}: {where}: upper as a float")
        if Fraction(distance.lower) > metric:
            hunt.failed.append(f"{name}: {where}: lower as a float")
        for index, truth in enumerate(each_output):
            hunt.compare(
                f"{name}, lower of an output", float(distance.log10_lower_per_output.reshape(-1)[index]), log10(truth), where
            )
            hunt.compare(
                f"{name}, upper of an output", log10(truth), float(distance.log10_upper_per_output.reshape(-1)[index]), where
            )
    squares = sum(((a - b) ** 2 for own in ends for a, b in own), Fraction(0))
    try:
        distance = pathlift.path_metric(network, other, q=2)
        hunt.compare("path_metric q = 2, lower", distance.log10_lower, log10(squares) / 2, where)
        hunt.compare("path_metric q = 2, upper", log10(squares) / 2, distance.log10_upper, where)
        if distance.exact and squares:
            assert abs(math.log10(distance.value) - log10(squares) / 2) < 1e-5 or distance.value in (0.0, math.inf), where
    except pathlift.NumericalError:
        hunt.refused["path_metric q = 2"] += 1
    outputs_within(model, other, network, shape, draw, hunt, where)


def outputs_within(
    model: nn.Module,
    other: nn.Module,
    network: pathlift.Network,
    shape: tuple[int, ...],
    draw: random.Random,
    hunt: Hunt,
    where: str,
) -> None:
    x = torch.tensor([[draw.choice([0.0, draw.gauss(0, 1), 1e6, -1e-6]) for _ in range(math.prod(shape))] for _ in range(2)])
    x = x.double()
    kinds = ["auto", *BOUNDS]
    changes = []
    for row in x:
        one, two = (outputs_of(own, fractions(row)) for own in (model, other))
        changes += [abs(a - b) for a, b in zip(one, two, strict=True)]
    for kind in draw.sample(kinds, 5):
        try:
            bound = pathlift.lipschitz_bound(network, other, x.reshape(2, *shape), kind=kind).reshape(-1).tolist()
        except (pathlift.MismatchError, pathlift.UnsupportedModelError, pathlift.NumericalError) as error:
            hunt.refused[f"{kind} {type(error).__name__}"] += 1
            continue
        for change, own in zip(changes, bound, strict=True):
            assert not math.isnan(own), (kind, where)
            if change and own < math.inf:
                hunt.compare(f"lipschitz {kind}", log10(change), math.log10(own) if own > 0 else -math.inf, where)
                if Fraction(own) < change:
                    hunt.failed.append(f"lipschitz {kind}: {where}")


@pytest.mark.hunt
@pytest.mark.hunt_one_in(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", range(LONGER))
def test_no_pair_of_networks_breaks_a_bound(part: int, dtype: torch.dtype) -> None:
    hunt, start = Hunt(), time.monotonic()
    for index in range(CASES):
        hunted(10_000 * part + index, dtype, hunt)
    minutes = (time.monotonic() - start) / 60
    print(f"\n{dtype}: {CASES * PAIRS / minutes:.0f} pairs a minute; refused: {dict(hunt.refused)}; smallest slack in log10:")
    for name, slack in sorted(hunt.slack.items()):
        print(f"    {name:50s} {slack:.3g}")
    assert not hunt.failed, "\n".join(hunt.failed)
