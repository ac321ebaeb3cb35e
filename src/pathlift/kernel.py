"""The path kernel: inner products, cosines, distances of the path-liftings of many networks of one architecture (§4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

import pathlift.drawing as drawing
from pathlift.arguments import declare, public
from pathlift.arguments.common import done_of_all
from pathlift.arguments.kinds import positive_count
from pathlift.errors import InputError
from pathlift.graph.compact import compacted
from pathlift.graph.network import Network
from pathlift.metric.exact import check_shapes, inner_product, squared_difference
from pathlift.norm import LOG10_OF_2
from pathlift.passes.propagate import blame
from pathlift.passes.scaled import Scaled
from pathlift.reading import Inputs, capture
from pathlift.reading.second import Other, other_state
from pathlift.rescaling.alignment import aligned
from pathlift.results import Result
from pathlift.streaming import each_of, held, several

NEAR = 1e-4
"""Where ‖Φ_i − Φ_j‖₂² is below this part of the larger norm squared, it is summed by tracks of its own."""

declare(__name__, {"models": several, "path_kernel.progress": done_of_all, "dimensions": positive_count})


@dataclass(frozen=True, eq=False, repr=False)
class PathKernel(Result, rows=("cosine", "log10_gram", "sign", "log10_distance"), axes=("network", "other")):
    """Inner products of the path-liftings of N networks; all tensors have shape (N, N), float64, on the CPU.

    Nothing changes when a network is rescaled.

    Attributes:
        cosine: ⟨Φ_i, Φ_j⟩/(‖Φ_i‖₂·‖Φ_j‖₂); NaN where a path-lifting is 0.
        log10_gram: log₁₀ |⟨Φ_i, Φ_j⟩|, −inf for 0.
        sign: The sign of ⟨Φ_i, Φ_j⟩: −1, 0 or 1.
        log10_distance: log₁₀ ‖Φ_i − Φ_j‖₂, −inf on the diagonal. Nearly equal networks lose no digits.
        passes: How many sums over all paths were taken.
    """

    cosine: Tensor
    log10_gram: Tensor
    sign: Tensor
    log10_distance: Tensor
    passes: int

    @property
    def distance(self) -> Tensor:
        """‖Φ_i − Φ_j‖₂; inf past float64's range."""
        return torch.pow(10.0, self.log10_distance)

    @property
    def log10_norm(self) -> Tensor:
        """log₁₀ ‖Φ_i‖₂, shape (N,)."""
        return self.log10_gram.diagonal() / 2

    @override
    def _draw(self, ax: drawing.Picture) -> None:
        drawing.matrix(ax, [str(number + 1) for number in range(len(self.cosine))], self.cosine.tolist(), "cosine of Φ")
        ax.set(xlabel="network", ylabel="network")

    @public
    def coordinates(self, dimensions: int = 2) -> tuple[Tensor, float]:
        """Draw the networks as points whose distances are as near to those of their path-liftings as they get (classical MDS).

        Args:
            dimensions: Of the drawing.

        Returns:
            Points (N, dimensions) in units of the largest distance, and the share of Σ distance² that they show. The signs of
            the axes are such that the entry of the largest magnitude is positive.

        Raises:
            InputError: ``dimensions`` is not between 1 and N.
        """
        return embedded(self.log10_distance, dimensions)


def embedded(log10_distance: Tensor, dimensions: int) -> tuple[Tensor, float]:
    """Embed points by classical multidimensional scaling.

    Args:
        log10_distance: log₁₀ of the distances, (N, N).
        dimensions: Of the embedding.

    Returns:
        See `PathKernel.coordinates`.

    Raises:
        InputError: ``dimensions`` is not between 1 and N.
    """
    count = len(log10_distance)
    if not 1 <= dimensions <= count:
        raise InputError(f"dimensions must lie between 1 and the number of networks ({count}), found {dimensions}.")
    largest = float(log10_distance.max())
    squares = torch.pow(10.0, 2 * (log10_distance - largest)) if math.isfinite(largest) else torch.zeros_like(log10_distance)
    centered = squares - squares.mean(0) - squares.mean(1, keepdim=True) + squares.mean()
    values, vectors = torch.linalg.eigh(-centered / 2)
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    points = vectors[:, :dimensions] * values[:dimensions].sqrt()
    signs = points.gather(0, points.abs().argmax(0, keepdim=True)).sign()
    total = float(values.sum())
    return points * torch.where(signs == 0, 1.0, signs), float(values[:dimensions].sum()) / total if total else 1.0


@public
@torch.no_grad()
def path_kernel(
    models: Sequence[Other] | Path | str,
    inputs: Inputs | None = None,
    *,
    model: nn.Module | Network | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PathKernel:
    """Compute the Gram matrix, cosines and ℓ² distances of the path-liftings of networks of one architecture.

    ⟨Φ(θ), Φ(θ')⟩ is the path program with every weight replaced by the product of its two values: one signed pass, exact for
    any pair. N(N+1)/2 pairs with one capture; networks given as files are read for each pair, two at a time. The distance of a
    pair whose liftings nearly agree is computed by the difference tracks of ``path_metric(…, q=2)``, in one gauge and without
    cancellation; where networks differ by little more than the rounding of float64, ask that for its error.

    Args:
        models: Modules, captured networks, state-dicts, or files and folders of weights, as for `path_norms`.
        inputs: As for `capture`; not needed when ``model`` or the first network is a Network.
        model: Gives the architecture, a module or a Network; the first of ``models`` by default.
        progress: Called with the number of pairs that are done and that of all pairs.

    Returns:
        The kernel.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: ``models`` is empty or names no architecture, ``inputs`` is malformed, or a file cannot be read.
        MismatchError: A network has other parameters, shapes or another graph.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> states = [{"weight": torch.tensor([row])} for row in ([3.0, 0.0], [0.0, -2.0], [6.0, 0.0])]
        >>> kernel = path_kernel(states, (2,), model=layer)
        >>> kernel.cosine.tolist()
        [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
        >>> [round(d, 6) for d in kernel.distance[0].tolist()]
        [0.0, 3.605551, 3.0]
    """
    models = list(each_of(models))
    if not models:
        raise InputError("path_kernel needs at least one network.")
    first = models[0] if model is None else model
    if not isinstance(first, (nn.Module, Network)):
        raise InputError("State-dicts and files do not tell the architecture: pass model=, a module or a captured Network.")
    network = capture(first, inputs)
    models = [other_state(network, item) if isinstance(item, nn.Module) else item for item in models]  # each is read once
    count, passes = len(models), 0
    gram = torch.full((count, count), -math.inf, dtype=torch.float64)  # log₂ of the magnitude
    sign = torch.zeros_like(gram)
    pairs = [(i, j) for i in range(count) for j in (i, *range(i))]
    distance = torch.full_like(gram, -math.inf)
    cosine = torch.full_like(gram, math.nan)
    for done, (i, j) in enumerate(pairs, 1):
        if i == j:
            mine = held(network, models[i])
            compact = compacted(mine)
            weights = compact.values()
            blame(weights)
        other = mine if i == j else held(network, models[j])
        other_weights = weights if i == j else compacted(other).values()
        check_shapes(compact, weights, other_weights)
        product, _ = inner_product(compact, weights, other_weights)
        passes += 2
        for row, column in ((i, j), (j, i)):
            gram[row, column] = _log2(product)
            sign[row, column] = 0.0 if product is None else math.copysign(1.0, float(product.tensor))
        if i == j:
            cosine[i, i] = 1.0 if product is not None else math.nan
        else:
            apart = _apart(gram[i, i], gram[j, j], gram[i, j], sign[i, j])
            if apart is None:
                squared, *_ = squared_difference(compact, weights, aligned(mine, other.state, other_weights).values)
                apart = _log2(squared) if squared is not None and float(squared.tensor) > 0 else -math.inf
                passes += 11
            distance[i, j] = distance[j, i] = apart / 2
            cosine[i, j] = cosine[j, i] = _cosine(gram[i, i], gram[j, j], gram[i, j], sign[i, j], apart)
        if progress is not None:
            progress(done, len(pairs))
    return PathKernel(cosine, gram * LOG10_OF_2, sign, distance * LOG10_OF_2, passes)


def _apart(first: Tensor, second: Tensor, product: Tensor, sign: Tensor) -> float | None:
    """Return log₂ ‖Φ_i − Φ_j‖₂² from log₂ of the inner products, None where it would lose digits."""
    top = float(torch.maximum(first, second))
    if math.isinf(top):
        return -math.inf
    rest = torch.exp2(first - top) + torch.exp2(second - top) - 2 * sign * torch.exp2(product - top)
    return math.log2(float(rest)) + top if float(rest) > NEAR else None


def _cosine(first: Tensor, second: Tensor, product: Tensor, sign: Tensor, apart: float) -> float:
    """Return the cosine; where it is near 1, 1 − (d² − (‖Φ_i‖ − ‖Φ_j‖)²)/(2‖Φ_i‖‖Φ_j‖), d the distance."""
    if math.isinf(float(first)) or math.isinf(float(second)):
        return math.nan
    plain = float(sign * torch.exp2(product - (first + second) / 2))
    if plain < 1 - NEAR:
        return plain
    middle = float(first + second) / 2
    gap = 2 * math.sinh(float(first - second) * math.log(2.0) / 4)
    return float(min(1.0, 1 - (2.0 ** (apart - middle) - gap**2) / 2))


def _log2(value: Scaled | None) -> float:
    return -math.inf if value is None else math.log2(abs(float(value.tensor))) + float(value.exponent)


__all__ = ["PathKernel", "path_kernel"]
