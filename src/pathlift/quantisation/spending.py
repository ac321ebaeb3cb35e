"""Bits for each layer within a budget: what each number of bits costs and takes, and the best choice of all (mathematics §9).

The cost of a layer is its expected error when it is rounded to nearest, with data scaled to what that does to the outputs; the
sum of these is minimised exactly (`pathlift.quantisation.allocation`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pathlift.arguments import public_constructor
from pathlift.errors import InputError
from pathlift.graph.network import Network
from pathlift.quantisation.allocation import allocated
from pathlift.quantisation.formats import Format, WholeNumbers
from pathlift.quantisation.layer import Covariances, Way, rounded
from pathlift.quantisation.matrices import Matrices
from pathlift.quantisation.sensitivity import Feed, OutputChange
from pathlift.quantisation.tensors import packed
from pathlift.quantisation.underway import Underway
from pathlift.statistics import InputMoments

MEASURED = 4
"""Bits with which it is measured what a tensor does to the outputs."""

SILENT = 1e-3
"""A tensor that does nothing on a few inputs may yet: its cost is scaled by no less than this share of what is usual."""


@public_constructor
@dataclass(frozen=True)
class Bytes:
    """A budget for all parameters and buffers of a network together, with weights packed to their bits.

    Attributes:
        count: Number of bytes.
    """

    count: int


def within(
    budget: float | Bytes,
    network: Network,
    matrices: Mapping[str, Matrices],
    most: Mapping[str, Format],
    way: Way,
    moments: Mapping[str, InputMoments],
    feeds: Sequence[Feed] = (),
) -> dict[str, Format]:
    """Choose the bits of each tensor.

    Args:
        budget: Bits of a weight, on average over all that are rounded; or bytes of the whole.
        network: The network.
        matrices: How weights are laid out.
        most: For each tensor the format with the most bits that it may get.
        way: How tensors are rounded.
        moments: What they are multiplied by.
        feeds: Inputs on which costs are scaled to what each tensor does to the outputs; none: they stay as expected.

    Returns:
        Name to format.

    Raises:
        InputError: The budget cannot be met.
    """
    plain = replace(way, rounding="nearest")
    options = {name: _options(form) for name, form in most.items()}
    change = OutputChange(network, feeds) if feeds else None
    # Measured without correction: that of the mean of a few inputs would leave nothing on these.
    uncorrected = replace(plain, correction="none")
    costs, sizes, ratios = [], [], list[float]()
    for name, forms in options.items():
        weight = network.state[name]
        covariances = Covariances(moments[name])
        outcomes = [rounded(weight, matrices[name], form, plain, moments[name], covariances) for form in forms]
        costs.append([outcome.cost for outcome in outcomes])
        if change is not None:
            form = forms[min(MEASURED - 2, len(forms) - 1)]
            alone = Underway(network, matrices, {name: form}, uncorrected)
            cost = alone.round(moments[name], covariances).cost
            ratios.append(change.by(alone.state) / cost if cost > 0 else math.nan)
        if isinstance(budget, Bytes):
            sizes.append([
                packed(weight.numel(), form, outcome.grid.scale.numel()) for form, outcome in zip(forms, outcomes, strict=True)
            ])
        else:
            sizes.append([weight.numel() * form.bits for form in forms])
    if change is not None:
        costs = _scaled(costs, ratios)
    weights, least = sum(network.state[name].numel() for name in options), sum(map(min, sizes))
    if isinstance(budget, Bytes):
        rest = bytes_of(network) - sum(network.state[name].nbytes for name in options)
        limit, narrowest, allowed = budget.count - rest, f"{least + rest:,} bytes with all the rest", f"{budget.count:,}"
    else:
        limit = math.floor(budget * weights + 1e-9)
        narrowest, allowed = f"{least / weights:.3g} bits a weight", f"{budget:g}"
    if least > limit:
        raise InputError(f"The budget cannot be met: the narrowest grids take {narrowest}, and it allows {allowed}.")
    chosen = allocated(costs, sizes, limit)
    return {name: forms[index] for (name, forms), index in zip(options.items(), chosen, strict=True)}


def _scaled(costs: list[list[float]], ratios: list[float]) -> list[list[float]]:
    """Return costs in units of what is measured, by the ratio of that to a cost of each tensor; NaN where that was 0."""
    found = torch.tensor(ratios)
    least = SILENT * found.nanmedian()
    found = torch.where(found.isnan(), 1.0, found).maximum(least.nan_to_num(0.0))
    return [[ratio * each for each in cost] for ratio, cost in zip(found.tolist(), costs, strict=True)]


def bytes_of(network: Network) -> int:
    """Return the bytes of all parameters and buffers that a state-dict holds."""
    return sum(tensor.nbytes for name, tensor in network.state.items() if name in network.graph.saved)


def _options(most: Format) -> list[Format]:
    """Return the formats that a tensor may get."""
    if isinstance(most, WholeNumbers):
        return [replace(most, bits=bits) for bits in range(2, most.bits + 1)]
    return [most]
