"""A weight of a pruned network is fitted anew by moments that are known, and what follows it is corrected (mathematics §9).

H is the second moment of what the weight multiplies; or its covariance, where a bias or a batch norm behind it takes up the
mean of the change. Running variances are estimated anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pathlift.compensation.correction import corrections, quadratic
from pathlift.compensation.least_squares import least_squares
from pathlift.errors import InputError
from pathlift.graph.network import Network
from pathlift.statistics.input_moments import InputMoments, input_moments
from pathlift.statistics.model import ActivationModel

WIDEST = 5000
"""Columns that are fitted together; the correction of means still holds blocks of wider rows together."""

WORK = 2.5e12
"""Products that the exact fit of one weight may take; blocks become narrower for more."""


@dataclass(eq=False)
class Update:
    """A pruned network whose weights that stay were fitted anew.

    Attributes:
        network: The network.
        compensated: Weights that were.
        corrected: Biases, running means and running variances that took up means and variances.
        left: Weights that were only pruned, and why.
        statistics: Where the second moments came from: ``data``, ``batch norm`` or ``propagation``.
    """

    network: Network
    statistics: str
    compensated: list[str] = field(default_factory=list)
    corrected: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, weight: Tensor, following: Mapping[str, Tensor]) -> None:
        """Take a weight that was fitted and what makes up for its change behind it, or note that it is left as it is.

        Args:
            name: The weight.
            weight: Its new value.
            following: New values of biases, running means and running variances.
        """
        changed = {name: weight, **following}
        beyond = next((other for other, value in changed.items() if not bool(torch.isfinite(value).all())), None)
        if beyond is not None:
            self.left[name] = f"What makes up for it in '{beyond}' is beyond the range of {changed[beyond].dtype}."
            return
        self.put({name: weight}, corrected=False)
        self.put(following, corrected=True)

    def put(self, changed: Mapping[str, Tensor], *, corrected: bool) -> None:
        """Take new values of parameters or buffers."""
        self.network = replace(self.network, state={**self.network.state, **changed})
        names = self.corrected if corrected else self.compensated
        names += [name for name in changed if name not in names]


def moments_of_masked(model: ActivationModel, masks: Mapping[str, Tensor], left: dict[str, str]) -> dict[str, InputMoments]:
    """Return what the weights in scope multiply.

    Args:
        model: The statistics.
        masks: The weights.
        left: Takes those that have no rows of several columns, and why.

    Returns:
        Name to moments; what follows is None where it is masked itself.
    """
    masked = {}
    for name in masks:
        try:
            moments = input_moments(model, name)
        except InputError as error:
            left[name] = str(error)
            continue
        masked[name] = replace(moments, following=None) if moments.following in masks else moments
    return masked


def fit_by_moments(update: Update, network: Network, moments: InputMoments, mask: Tensor, *, variance: bool) -> None:
    """Fit the entries of one weight that stay, and let what follows take up the mean.

    Args:
        update: The network so far; takes the new values.
        network: The network as it was.
        moments: What the weight multiplies.
        mask: True where an entry stays.
        variance: Estimate the running variance behind it anew, too.
    """
    if bool(mask.all()):
        return
    name, device = moments.name, moments.mean.device
    before = moments.split(network.state[name].detach().double().to(device))
    keep = moments.split(mask.to(device))
    centred = moments.following is not None
    pieces, spreads = [], []
    for block in blocks_of(before.shape[1], before.shape[2]):
        second = moments.blocks(block, centred=centred)
        old = before[:, :, block]
        new = least_squares(old, keep[:, :, block], second)
        pieces.append(new)
        spreads.append(torch.stack([quadratic(rows, second).clamp(min=0.0) for rows in (old, new)]))
    after = torch.cat(pieces, 2)
    spread = torch.stack(spreads).sum(0)
    variances = (spread[0], spread[1]) if variance and centred else None
    fitted = joined(moments, after, network.state[name], mask)
    shift = ((after - before) @ moments.mean[:, :, None]).reshape(-1)
    update.take(name, fitted, corrections(update.network, moments, shift, variances))


def joined(moments: InputMoments, rows: Tensor, tensor: Tensor, mask: Tensor) -> Tensor:
    """Return a weight made of rows, in its own type.

    Args:
        moments: What it multiplies, which know its layout.
        rows: Shape (groups, rows, columns).
        tensor: The weight as it was.
        mask: True where an entry stays.

    Returns:
        The weight.
    """
    made = moments.join(rows.to(tensor.device), tensor.detach().double()).to(tensor.dtype).reshape(tensor.shape)
    return torch.where(mask.to(tensor.device), made, torch.zeros_like(made))


def blocks_of(rows: int, columns: int) -> list[slice]:
    """Return the blocks of columns that are fitted together."""
    width = min(WIDEST, max(1, math.isqrt(int(24 * WORK / (rows * columns)))))
    count = math.ceil(columns / width)
    return [slice(columns * part // count, columns * (part + 1) // count) for part in range(count)]
