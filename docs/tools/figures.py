"""One figure for each idea, with the numbers that pathlift computes, in black, grey and patterns, so that print is enough."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import torch
from torch import nn

import pathlift

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

mpl.rcParams.update({"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "pathlift", "axes.spines.top": False})
mpl.rcParams.update({"axes.spines.right": False, "figure.constrained_layout.use": True, "savefig.facecolor": "white"})

PLACES = {"x": (0.0, 0.0), "u": (1.2, 0.7), "v": (1.2, -0.7), "y": (2.4, 0.0)}


def three_neurons() -> nn.Sequential:
    """Return the worked example: x → u, v → y with weights 2, −3 and 5, 1, and a bias 1 at v."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [-3.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 1.0]))
        model[2].weight.copy_(torch.tensor([[5.0, 1.0]]))
    return model


def graph(axis: Axes, weights: dict[str, str], *, bold: tuple[str, ...] = (), title: str = "", bias: str = "") -> None:
    """Draw the network of three neurons with a text on each edge."""
    for edge, text in weights.items():
        (x0, y0), (x1, y1) = PLACES[edge[0]], PLACES[edge[1]]
        strong = edge in bold
        axis.annotate(
            "",
            (x1, y1),
            (x0, y0),
            arrowprops={"arrowstyle": "->", "lw": 2.6 if strong else 1.0, "color": "black" if strong else "0.55"},
        )
        axis.text((x0 + x1) / 2, (y0 + y1) / 2 + (0.17 if y0 + y1 > 0 else -0.25), text, ha="center", color="black")
    for name, (x, y) in PLACES.items():
        axis.plot(x, y, "o", ms=19, mfc="white", mec="black", zorder=3)
        axis.text(x, y, f"${name}$", ha="center", va="center", zorder=4)
    if bias:
        axis.text(1.2, -1.2, bias, ha="center")
    axis.set(xlim=(-0.4, 2.8), ylim=(-1.4, 1.2), title=title)
    axis.axis("off")


def path_lifting() -> None:
    """Draw the three paths of the example, one picture each."""
    lifting = pathlift.path_lifting(three_neurons(), (1,), torch.ones(1, 1))
    phi = dict(zip(lifting.names, lifting.phi.tolist(), strict=True))
    weights = {"xu": "2", "xv": "−3", "uy": "5", "vy": "1"}
    by_paths = {name: value for name, value in phi.items() if value}
    figure, axes = plt.subplots(1, len(by_paths), figsize=(9, 2.6))
    for axis, (name, value) in zip(axes, by_paths.items(), strict=True):
        from_bias = name.startswith("bias")
        first = abs(value) == 10
        bold = ("vy",) if from_bias else (("xu", "uy") if first else ("xv", "vy"))
        product = "1 · 1" if from_bias else ("2 · 5" if first else "(−3) · 1")
        start = "from the bias of v" if from_bias else f"through {'u' if first else 'v'}"
        graph(axis, weights, bold=bold, title=f"{start}: $\\Phi_p$ = {product} = {value:g}".replace("-", "−"), bias="bias 1")
        axis.title.set_fontsize(10)
    figure.savefig("path_lifting.svg")


def rescaling() -> None:
    """Draw a neuron rescaled by 10: other weights, the same products."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.8))
    graph(axes[0], {"xu": "2", "xv": "−3", "uy": "5", "vy": "1"}, bold=("xu", "uy"), title="paths 10, −3, 1", bias="bias 1")
    graph(
        axes[1],
        {"xu": "20", "xv": "−3", "uy": "0.5", "vy": "1"},
        bold=("xu", "uy"),
        title="$u$ rescaled by 10: paths 10, −3, 1",
        bias="bias 1",
    )
    figure.savefig("rescaling.svg")


def metric() -> None:
    """Draw weight distance and path-metric of a network to its rescaled copies, and to copies with noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    groups = pathlift.symmetries(model, (8,))
    norm = pathlift.path_norm(model, (8,)).value
    figure, axis = plt.subplots(figsize=(6, 3.8))
    points: dict[str, list[tuple[float, float]]] = {
        "rescaled at random, same function: rounding is left": [],
        "noise: another function": [],
    }
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        other = {
            "rescaled at random, same function: rounding is left": dict(
                groups.randomize(sigma=0.3 * (seed + 1), generator=generator)
            ),
            "noise: another function": {
                name: weight * (1 + 0.02 * (seed + 1) * torch.randn(weight.shape, generator=generator))
                for name, weight in model.state_dict().items()
            },
        }
        for title, state in other.items():
            distance = float((torch.cat([weight.reshape(-1) for weight in state.values()]) - flat).norm() / flat.norm())
            upper = pathlift.path_metric(groups.network, state).upper / norm
            points[title].append((distance, max(upper, 1e-16)))
    for (title, pairs), marker in zip(points.items(), ("o", "x"), strict=True):
        axis.loglog(*zip(*pairs, strict=True), marker, mfc="none", mec="black", color="black", label=title)
    axis.set(xlabel="distance of the weights, relative", ylabel="path-metric / path-norm (upper bound)", ylim=(1e-11, 10))
    axis.legend(frameon=False, loc="lower right")
    figure.savefig("metric.svg")


def signs() -> None:
    """Draw two networks with equal path-liftings and different functions: no bound can follow from the path-metric alone."""
    x = np.linspace(-2, 2, 201)
    figure, axis = plt.subplots(figsize=(5, 3))
    axis.plot(x, np.maximum(x, 0), "-k", label="edges 1, 1: $\\Phi$ = 1·1 = 1")
    axis.plot(x, -np.maximum(-x, 0), "--", color="0.35", label="edges −1, −1: $\\Phi$ = (−1)·(−1) = 1")
    axis.set(xlabel="$x$", ylabel="$R_\\theta(x)$")
    axis.legend(frameon=False, loc="upper left")
    figure.savefig("signs.svg")


def moments() -> None:
    """Draw √s between polynomials that touch it, and how the bounds on one path-metric close with the number of moments."""
    s = np.linspace(0, 4, 400)
    t = 1.0
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    axes[0].plot(s, np.sqrt(s), "-k", lw=2, label="$\\sqrt{s}$")
    axes[0].plot(s, (t + s / t) / 2, "--k", label="above: touches at $t^2$ (2 moments)")
    axes[0].plot(s, s * (1.5 / t - s / (2 * t**3)), ":k", label="below: $s$ times the tangent of $s^{-1/2}$")
    axes[0].set(xlabel="$s = r^2$", ylim=(-0.2, 4))
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    other = {name: weight * (1 + 0.3 * torch.randn_like(weight)) for name, weight in model.state_dict().items()}
    numbers = (0, 2, 4, 6, 8)
    found = [pathlift.path_metric(model, other, (6,), moments=number) for number in numbers]
    middles = [(each.lower * each.upper) ** 0.5 for each in found]
    below, above = ([abs(end - middle) for end, middle in zip(ends, middles, strict=True)] for ends in _ends(found))
    axes[1].errorbar(range(len(numbers)), middles, yerr=[below, above], fmt="none", ecolor="black", capsize=6)
    axes[1].set(
        xticks=range(len(numbers)),
        xticklabels=numbers,
        xlabel="moments",
        ylabel="$\\|\\Phi(\\theta)-\\Phi(\\theta')\\|_1$ lies in",
    )
    figure.savefig("moments.svg")


def _ends(found: list[pathlift.metric.PathMetric]) -> tuple[list[float], list[float]]:
    return [each.lower for each in found], [each.upper for each in found]


def compact() -> None:
    """Draw path activations of a convolution over an image: only positions near the border differ."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
    torch.manual_seed(0)
    side = 12
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape))
        activations = model(torch.ones(1, 1, side, side))[0, 0].numpy()
    values, classes = np.unique(activations.round(5), return_inverse=True)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    axes[0].imshow(activations, cmap="gray")
    axes[0].set(title=f"path activations of {side}×{side} positions", xticks=[], yticks=[])
    axes[1].imshow(classes.reshape(side, side), cmap="gray")
    axes[1].set(title=f"{len(values)} different values", xticks=[], yticks=[])
    figure.savefig("compact.svg")


if __name__ == "__main__":
    for draw in (path_lifting, rescaling, metric, signs, moments, compact):
        draw()
