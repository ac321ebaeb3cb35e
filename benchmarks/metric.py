"""How tightly the path-metric of real pairs of networks is enclosed, and what it costs.

    python benchmarks/metric.py --model resnet18            # the table of docs/benchmarks.md
    python benchmarks/metric.py --model vgg11
    python benchmarks/metric.py --figures ratio.png         # ratio against depth and against steps

Time is given in forwards: one inference pass of the same network on one image, measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pathlift

State = dict[str, Tensor]
console = Console(width=160)


def rounded(value: Tensor, bits: int, *, per_channel: bool = False) -> Tensor:
    """Round a weight symmetrically to nearest; vectors stay as they are."""
    if value.dim() < 2:
        return value
    size = value.abs().amax(list(range(1, value.dim())), keepdim=True) if per_channel else value.abs().max()
    step = (size / (2 ** (bits - 1) - 1)).clamp(min=1e-30)
    return torch.round(value / step) * step


def mapped(model: nn.Module, change: Callable[[Tensor], Tensor]) -> State:
    """Change every parameter."""
    names = dict(model.named_parameters())
    return {name: change(tensor).detach() if name in names else tensor.clone() for name, tensor in model.state_dict().items()}


def trained(model: nn.Module, steps: int, masks: State | None = None) -> State:
    """Train on random images and labels, which moves weights as training does; masked weights stay 0."""
    model = pathlift.rescaling.with_state(model, model.state_dict()).train()
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(steps):
        x, y = torch.randn(4, 3, 64, 64, generator=generator), torch.randint(1000, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            if masks is not None and name in masks:
                parameter.data.mul_(masks[name])
    return {name: tensor.detach().clone() for name, tensor in model.eval().state_dict().items()}


def pairs(make: Callable[[], nn.Module]) -> Iterator[tuple[str, nn.Module, State]]:
    """Yield the pairs of the table."""
    torch.manual_seed(0)
    model = make().eval()
    generator = torch.Generator().manual_seed(1)
    yield "8 bit rounding", model, mapped(model, lambda v: rounded(v, 8))
    yield "4 bit, per channel", model, mapped(model, lambda v: rounded(v, 4, per_channel=True))
    yield "10 % noise", model, mapped(model, lambda v: v * (1 + 0.1 * torch.randn(v.shape, generator=generator)))
    masks = {name: v.abs() > v.abs().median() for name, v in model.named_parameters() if v.dim() > 1}
    pruned = pathlift.rescaling.with_state(model, {n: v * masks[n] if n in masks else v for n, v in model.state_dict().items()})
    yield "half pruned, finetuned", model, trained(pruned, 5, {n: own.float() for n, own in masks.items()})
    first = pathlift.rescaling.with_state(model, trained(model, 5)).eval()
    yield "two checkpoints of a run", first, trained(first, 5)
    torch.manual_seed(1)
    yield "two seeds", model, {name: tensor.clone() for name, tensor in make().state_dict().items()}


def fastest(run: Callable[[], object], repeats: int = 5) -> float:
    """Return the shortest time in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def table(name: str, samples: int) -> None:
    """Print a small table for each pair of one network, as soon as it is known."""
    make = getattr(torchvision.models, name)
    headers = ("moments", "lower", "upper", "upper/lower", "estimate", "passes", "seconds", "forwards", "by")
    for label, model, state in pairs(make):
        found = Table(title=f"{name}: {label}", title_justify="left", box=None, padding=(0, 1))
        for header in headers:
            found.add_column(header, justify="left" if header == "by" else "right", no_wrap=True)
        x = torch.randn(1, 3, 224, 224)
        with torch.inference_mode():
            forward = fastest(lambda model=model, x=x: model(x), 10)
        network = pathlift.capture(model, (3, 224, 224))
        for moments in (0, 4, 8, None):
            pathlift.path_metric(network, state, moments=moments)
            start = time.perf_counter()
            metric = pathlift.path_metric(network, state, moments=moments)
            seconds = time.perf_counter() - start
            estimate = ""
            if moments == 8:
                own = pathlift.path_metric(network, state, moments=0, estimate=samples).sampled
                assert own is not None
                estimate = f"{10 ** (own.log10_value - metric.log10_lower):.3f} ± {(own.high - own.value) / own.value:.3f}"
            ratio = f"{metric.ratio:.4g}"
            ends = [f"{10 ** (log % 1):.3f}e{log // 1:+.0f}" for log in (metric.log10_lower, metric.log10_upper)]
            row = ("as needed" if moments is None else str(moments), *ends, ratio, estimate, str(metric.passes))
            found.add_row(*row, f"{seconds:.2f}", f"{seconds / forward:.0f}", metric.method)
        console.print(found)
    console.print("estimate: relative to the lower bound, with half the 95 % interval", style="dim")


def perceptron(depth: int) -> nn.Module:
    """Return a perceptron of width 32."""
    layers = [layer for _ in range(depth - 1) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(32, 4))


def figures(path: Path) -> None:
    """Draw ratio against depth and against steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "10 % noise": lambda v: v * (1 + 0.1 * torch.randn_like(v)),
        "8 bit": lambda v: rounded(v, 8),
        "two seeds": lambda v: torch.randn_like(v) * v.std(),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    depths = (10, 20, 40, 70, 100)
    for color, (name, change) in enumerate(changes.items()):
        for moments, style in ((4, ":"), (8, "-")):
            ratios = []
            for depth in depths:
                torch.manual_seed(depth)
                model = perceptron(depth)
                ratios.append(pathlift.path_metric(model, mapped(model, change), (32,), moments=moments).ratio)
            left.plot(depths, ratios, style, color=f"C{color}", marker=".", label=f"{name}, {moments} moments")
            console.print(f"{name}, {moments} moments, depths {depths}: " + ", ".join(f"{r:.3f}" for r in ratios))
        torch.manual_seed(0)
        model = perceptron(10)
        history = pathlift.path_metric(model, mapped(model, change), (32,), tighten=60).history
        steps = {step.number: step.ratio for step in history}
        right.plot(list(steps), list(steps.values()), color=f"C{color}", label=name)
        shown = {number: f"{steps[number]:.3f}" for number in (0, 5, 10, 20, 40, 60) if number in steps}
        console.print(f"{name}, depth 10, ratio by step: {shown}", markup=False)
    left.set(xlabel="depth", ylabel="upper / lower", title="perceptrons of width 32")
    right.set(xlabel="step of tightening", title="depth 10")
    for axis in (left, right):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the table or draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--figures", type=Path)
    options = parser.parse_args()
    if options.figures is not None:
        figures(options.figures)
    else:
        table(options.model, options.samples)


if __name__ == "__main__":
    main()
