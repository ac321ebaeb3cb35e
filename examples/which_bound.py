"""Every bound against the true drift of the outputs, before and after a random rescaling.

Trains a perceptron on scikit-learn's digits, takes a copy pruned by path-magnitude, one rounded to 8 bits per row and one
moved at random by 1 %, and prints the median over test inputs and outputs of bound / |R_θ(x) − R_θ'(x)|. Then both
networks are rescaled alike by factors from {1, 128, 4096}: same functions, same drift. Writes out/which_bound.png.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import matplotlib as mpl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pathlift
from pathlift.lipschitz.bound import Kind

FIGURE = Path("out/which_bound.png")
KINDS = tuple(kind for kind in get_args(Kind) if kind != "auto")


def trained(x: Tensor, y: Tensor) -> nn.Sequential:
    """Train a perceptron with two hidden layers."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(30):
        for batch in torch.randperm(len(x)).split(32):
            optimiser.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    return model.double().eval()


@torch.no_grad()
def changed(model: nn.Sequential) -> dict[str, nn.Sequential]:
    """Return the copies."""
    pruned, rounded, moved = (copy.deepcopy(model) for _ in range(3))
    scores = pathlift.path_magnitude(model, (64,))
    weights = [name for name in scores if name.endswith("weight")]
    limit = torch.cat([scores[name].flatten() for name in weights]).quantile(0.2)
    for name in weights:
        pruned.get_parameter(name).mul_(scores[name] > limit)
    for parameter in rounded.parameters():
        step = parameter.abs().amax(-1, keepdim=True) / 127
        parameter.copy_(torch.round(parameter / step) * step)
    for parameter in moved.parameters():
        parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    return {"pruned 20 %": pruned, "8 bits": rounded, "noise 1 %": moved}


@torch.no_grad()
def rescaled(models: list[nn.Sequential], seed: int = 0) -> list[nn.Sequential]:
    """Rescale the hidden neurons of all models by the same random factors."""
    twins = [copy.deepcopy(model) for model in models]
    generator = torch.Generator().manual_seed(seed)
    for place in (0, 2):
        factors = torch.tensor([1.0, 128.0, 4096.0])[torch.randint(3, (32,), generator=generator)].double()
        for twin in twins:
            twin[place].weight.mul_(factors[:, None])
            twin[place].bias.mul_(factors)
            twin[place + 2].weight.div_(factors)
    return twins


@torch.no_grad()
def ratios(model: nn.Sequential, other: nn.Sequential, x: Tensor) -> dict[str, float | None]:
    """Return the median of bound / drift for each kind, None where its hypotheses fail."""
    drift = (model(x) - other(x)).abs()
    found: dict[str, float | None] = {}
    for kind in KINDS:
        try:
            bound = pathlift.lipschitz_bound(model, other, x, kind=kind)
        except pathlift.MismatchError:  # signs that change: Theorem 4.1 does not apply
            found[kind] = None
            continue
        if not bool((drift <= bound * (1 + 1e-12) + 1e-12).all()):
            raise SystemExit(f"{kind} is violated: please report this")
        found[kind] = float((bound / drift.clamp(min=1e-300)).median())
    return found


def draw(results: dict[str, tuple[dict[str, float | None], dict[str, float | None]]]) -> None:
    """Draw the ratios, before and after."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 4), sharey=True, constrained_layout=True)
    for axis, (title, (before, after)) in zip(axes, results.items(), strict=True):
        for place, kind in enumerate(KINDS):
            for value, colour, marker, label in (
                (after[kind], "#c44e52", "x", "after rescaling"),
                (before[kind], "#4c72b0", "o", "as trained"),
            ):
                if value is not None:
                    axis.plot(value, place, marker, color=colour, mfc="none", label=label if place == 0 else None)
        axis.axvline(1.0, color="black", lw=0.8)
        axis.set(xscale="log", title=title, xlabel="bound / true drift (median)", yticks=range(len(KINDS)), yticklabels=KINDS)
        axis.grid(axis="x", alpha=0.3)
    handles = [
        mpl.lines.Line2D([], [], color=colour, marker=marker, ls="", mfc="none", label=label)
        for colour, marker, label in (("#4c72b0", "o", "as trained"), ("#c44e52", "x", "after rescaling"))
    ]
    axes[-1].legend(handles=handles, loc="lower right", frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = trained(x[:1297], y[:1297])
    test = x[1297:].double()
    results = {}
    for title, other in changed(model).items():
        twins = rescaled([model, other])
        results[title] = (ratios(model, other, test), ratios(*twins, test))
    table = Table(title="Median of bound / drift, before → after rescaling both by {1, 128, 4096}", title_justify="left")
    table.add_column("bound")
    for title in results:
        table.add_column(title, justify="right")
    for kind in KINDS:
        cells = []
        for before, after in results.values():
            one, two = before[kind], after[kind]
            cells.append("does not apply" if one is None or two is None else f"{one:.3g} → {two:.3g}")
        table.add_row(kind, *cells)
    console = Console(width=110)
    console.print(table)
    draw(results)
    console.print(f"Figure: {FIGURE}")


if __name__ == "__main__":
    main()
