"""What the hunts share: small networks with a twin in rational arithmetic, and numbers that Gaussians never reach."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor, nn

Vector = list[Fraction]


class Skip(nn.Module):
    """X + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Divide(nn.Module):
    """X / t with a parameter t."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / self.t


class Pairs(nn.Module):
    """The larger of two neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2)).amax(2)


class Tied(nn.Module):
    """X w − x wᵀ."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w - x @ self.w.t()


class Through(nn.Module):
    """A detour through another floating-point type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype)


class Centred(nn.Module):
    """A linear layer whose rows have their mean taken off, in the model's own precision."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight - self.weight.mean(1, keepdim=True)).t()


class Wider(nn.Module):
    """Linear interpolation to another length."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x.unsqueeze(1), size=self.size, mode="linear").squeeze(1)


class Pick(nn.Module):
    """Two of the values."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.places = [first, second]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, channel] for channel in self.places], 1)


class Mean(nn.Module):
    """The mean of groups of neighbours."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.size)).mean(2)


def numbers(tensor: Tensor) -> Vector:
    return [Fraction(value) for value in tensor.detach().double().reshape(-1).tolist()]


def _root(value: Fraction) -> Fraction:
    """√ of a rational to 300 bits."""
    shift = 600
    return Fraction(math.isqrt((value.numerator << shift) // value.denominator), 1 << (shift // 2))


def rational(module: nn.Module, x: Vector) -> Vector:
    """The module in exact arithmetic; a square root to 300 bits, a detour through another type is none."""
    zero = Fraction(0)
    if isinstance(module, nn.Sequential):
        for part in module:
            x = rational(part, x)
        return x
    if isinstance(module, nn.Linear):
        rows = [numbers(row) for row in module.weight]
        bias = [zero] * len(rows) if module.bias is None else numbers(module.bias)
        return [sum((w * v for w, v in zip(row, x, strict=True)), b) for row, b in zip(rows, bias, strict=True)]
    if isinstance(module, Centred):
        rows = [numbers(row) for row in module.weight]
        means = [sum(row, zero) / len(row) for row in rows]
        return [sum(((w - m) * v for w, v in zip(row, x, strict=True)), zero) for row, m in zip(rows, means, strict=True)]
    if isinstance(module, Tied):
        w = [numbers(row) for row in module.w]
        n = range(len(w))
        return [sum((x[i] * (w[i][o] - w[o][i]) for i in n), zero) for o in n]
    if isinstance(module, Skip):
        return [a + b for a, b in zip(x, rational(module.inner, x), strict=True)]
    if isinstance(module, Divide):
        return [v / t for v, t in zip(x, numbers(module.t), strict=True)]
    if isinstance(module, Pairs):
        return [max(x[i], x[i + 1]) for i in range(0, len(x), 2)]
    if isinstance(module, Wider):
        return _interpolated(x, module.size)
    if isinstance(module, Pick):
        return [x[channel] for channel in module.places]
    if isinstance(module, Mean):
        return [sum(x[i : i + module.size], zero) / module.size for i in range(0, len(x), module.size)]
    if isinstance(module, nn.PReLU):
        slopes = numbers(module.weight)
        slopes = slopes * len(x) if len(slopes) == 1 else slopes
        return [v if v > 0 else a * v for v, a in zip(x, slopes, strict=True)]
    if isinstance(module, nn.LeakyReLU):
        return [v if v > 0 else Fraction(module.negative_slope) * v for v in x]
    if isinstance(module, nn.Hardtanh):
        return [min(max(v, Fraction(module.min_val)), Fraction(module.max_val)) for v in x]
    if isinstance(module, nn.ReLU):
        return [max(v, zero) for v in x]
    if isinstance(module, nn.BatchNorm1d):
        gamma, beta, mean, variance = (
            numbers(tensor) for tensor in (module.weight, module.bias, module.running_mean, module.running_var)
        )
        scales = [g / _root(v + Fraction(module.eps)) for g, v in zip(gamma, variance, strict=True)]
        return [(v - m) * s + b for v, m, s, b in zip(x, mean, scales, beta, strict=True)]
    assert isinstance(module, (Through, nn.Sigmoid, nn.Softmax)), module  # what is behind the logits is increasing
    return x


def _interpolated(x: Vector, size: int) -> Vector:
    values = []
    for position in range(size):
        at = max(Fraction(0), (Fraction(2 * position + 1) * len(x) / size - 1) / 2)
        low = min(int(at), len(x) - 1)
        high = min(low + 1, len(x) - 1)
        values.append(x[low] + (at - low) * (x[high] - x[low]))
    return values


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "line": lambda: nn.Sequential(nn.Linear(2, 2)),
    "perceptron": lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)),
    "deep": lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)),
    "skip": lambda: nn.Sequential(nn.Linear(2, 2), Skip(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))), nn.ReLU(), nn.Linear(2, 2)),
    "norm": lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2)),
    "norm alone": lambda: nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)),
    "pool": lambda: nn.Sequential(nn.Linear(2, 4), Pairs(), nn.Linear(2, 2)),
    "slopes": lambda: nn.Sequential(nn.Linear(2, 2), nn.PReLU(2), nn.LeakyReLU(-0.5), nn.Linear(2, 2), nn.LeakyReLU(1.75)),
    "clamp": lambda: nn.Sequential(nn.Linear(2, 2), nn.Hardtanh(-0.75, 1.5), nn.Linear(2, 2)),
    "division": lambda: nn.Sequential(nn.Linear(2, 2), Divide(2)),
    "tied": lambda: nn.Sequential(Tied(2), nn.ReLU(), nn.Linear(2, 2)),
    "centred": lambda: nn.Sequential(Centred(2, 2), nn.ReLU(), nn.Linear(2, 2)),
    "mean": lambda: nn.Sequential(nn.Linear(2, 8), Mean(4), nn.Linear(2, 2)),
    "cast": lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), Through(torch.bfloat16)),
    "wider": lambda: nn.Sequential(nn.Linear(2, 60), Wider(97), Pick(90, 93)),
    "bare": lambda: nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)),
    "bent": lambda: nn.Sequential(nn.PReLU(2), nn.LeakyReLU(0.3)),
    "sigmoid": lambda: nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()),
    "softmax": lambda: nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)),
    "narrow": lambda: nn.Sequential(nn.Linear(2, 2), Through(torch.float16), nn.ReLU(), nn.Linear(2, 2)),
}
"""The networks; each ends with two outputs."""

FEET = {torch.float64: (-60, 40), torch.float32: (-42, 30), torch.bfloat16: (-38, 30), torch.float16: (-7, 4)}
"""Powers of ten that a weight may have."""


class Pool:
    """Numbers of one type, ordinary and extreme, drawn from a seed."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.made = torch.Generator().manual_seed(seed)
        self.wild = False
        self.unit = 1.0
        self.kept = torch.ones(1, dtype=torch.float64)

    def chance(self, share: float) -> bool:
        return float(torch.rand((), generator=self.made)) < share

    def pick(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.made))

    def one(self) -> float:
        """A number: small integers and simple fractions (ties), a copy or the opposite of an earlier one, or any power."""
        way = self.pick(8)
        if way < 2:
            value = (self.pick(9) - 4) / 2 ** self.pick(3)
        elif way < 5 and len(self.kept) > 1:
            value = float(self.kept[self.pick(len(self.kept))]) * (-1) ** self.pick(2)
            if self.chance(0.5):  # the next number beside it
                value = float(torch.nextafter(torch.tensor(value, dtype=self.dtype), torch.tensor(math.inf, dtype=self.dtype)))
        elif way < 7 or not self.wild:
            value = float(torch.randn((), generator=self.made))
        else:
            low, high = FEET[self.dtype]
            value = (1 + float(torch.rand((), generator=self.made))) * 10.0 ** (low + self.pick(high - low + 1))
        value = value * (self.unit if way != 3 and way != 4 else 1.0)
        rounded = float(torch.tensor(value, dtype=torch.float64).to(self.dtype))
        value = rounded if abs(rounded) < torch.finfo(self.dtype).max / 16 else 1.0
        self.kept = torch.cat([self.kept[-16:], torch.tensor([value], dtype=torch.float64)])
        return value

    def tensor(self, shape: torch.Size) -> Tensor:
        values = [self.one() for _ in range(shape.numel())]
        return torch.tensor(values, dtype=torch.float64).reshape(shape).to(self.dtype)


def fill(model: nn.Module, pool: Pool) -> None:
    """Give every parameter and buffer other numbers, in place."""
    kind = torch.finfo(pool.dtype)
    pool.wild = pool.chance(0.5)
    # The products of two numbers may be where numbers of the type end, or where they begin.
    small, large = 2.0 ** int(math.log2(kind.tiny * kind.eps) / 2), 2.0 ** int(math.log2(kind.max) / 2)
    pool.unit = (1.0, 1.0, 1.0, 1.0, small, large)[pool.pick(6)]
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if tensor.is_floating_point():
                drawn = pool.tensor(tensor.shape)
                tensor.copy_(drawn.abs() if name.endswith("running_var") else drawn)
        for module in model.modules():
            if isinstance(module, Divide):
                module.t.copy_(torch.where(module.t == 0, torch.ones_like(module.t), module.t))
            if isinstance(module, Centred):  # numbers that are nearly their mean
                for row in module.weight:
                    row.copy_(torch.stack([beside(row[0], pool.pick(4)) for _ in row]))
            if isinstance(module, nn.BatchNorm1d) and pool.chance(0.6):  # μ·s and β nearly cancel, and so do x and μ
                mean = torch.randn(2, generator=pool.made).to(pool.dtype) * pool.unit * 2.0 ** (4 + pool.pick(9))
                module.running_mean.copy_(torch.where(torch.isfinite(mean), mean, module.running_mean))
                scale = module.weight.double() / (module.running_var.double() + module.eps).sqrt()
                shift = (module.running_mean.double() * scale).to(pool.dtype)
                module.bias.copy_(torch.where(torch.isfinite(shift), shift, module.bias))
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        if isinstance(model, nn.Sequential) and isinstance(model[-1], (nn.Sigmoid, nn.Softmax)):
            last[0].weight[1] = last[0].weight[0]
            last[0].bias[1] = beside(last[0].bias[0], 1 + pool.pick(30))


def beside(value: Tensor, steps: int) -> Tensor:
    """The number so many steps above."""
    for _ in range(steps):
        value = torch.nextafter(value, torch.full_like(value, torch.finfo(value.dtype).max))
    return value


def change(model: nn.Module, x: Tensor, pool: Pool) -> Callable[[], None]:
    """Give one number of the model or of the input another value, in place: a step of a climb.

    Returns:
        What takes the step back.
    """
    tensors = [*model.parameters(), x]
    tensor = tensors[pool.pick(len(tensors))].detach().view(-1)
    index = pool.pick(len(tensor))
    before = tensor[index].clone()
    way = pool.pick(4)
    if way == 0:
        tensor[index] = before * 2.0 ** (pool.pick(9) - 4)
    elif way == 1:
        tensor[index] = torch.nextafter(before, torch.tensor(math.inf * (-1) ** pool.pick(2), dtype=before.dtype))
    else:
        tensor[index] = pool.one()
    if not bool(tensor[index].abs() < torch.finfo(before.dtype).max / 16) or bool(tensor[index] == 0):
        tensor[index] = 1.0

    def back() -> None:
        tensor[index] = before

    return back
