"""From scores to masks: which weights stay when a share of them goes.

All selections keep the weights with the largest scores and differ in what competes with what. Scores are compared as
they are, without tolerance; among equal ones the first in the model's order stay, so that a mask is a function of the
scores alone. A mask is True where the weight stays.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import neg
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pathlift.arguments import public, public_constructor
from pathlift.errors import InputError, nearest

Scores: TypeAlias = "Mapping[str, Tensor]"
Masks: TypeAlias = "dict[str, Tensor]"
Selection: TypeAlias = "Callable[[Scores, float], Masks]"
"""A function of scores by name and the share of weights that goes."""

BLOCK = 1 << 18
"""Scores that are looked at together: they stay in the cache."""


def kept_of(count: int, amount: float) -> int:
    """Return how many of ``count`` weights stay: what goes is rounded down."""
    return count - math.floor(amount * count + 1e-9)


def _keys(block: Tensor) -> Tensor:
    """Map floats to integers in the same order; both zeros to one."""
    block = block + 0.0
    kind, bits = (torch.int64, 63) if block.dtype == torch.float64 else (torch.int32, 31)
    raw = block.view(kind)
    keys: Tensor = raw ^ ((raw >> bits) & (2**bits - 1))
    return keys


def _threshold(scores: Sequence[Tensor], keep: int, dtype: torch.dtype) -> tuple[int, int]:
    """Find the ``keep``-th largest key and how many are larger: by digits of 16 bits, without sorting or copying all."""
    width = 64 if dtype == torch.float64 else 32
    blocks = [part for score in scores for part in score.reshape(-1).split(BLOCK)]
    prefix, above = 0, 0
    for shift in range(width - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.long)
        for block in blocks:
            keys = _keys(block.to(dtype))
            if shift < width - 16:
                keys = keys[(keys >> (shift + 16)) == prefix]
                digits = (keys >> shift) & 0xFFFF
            else:
                digits = (keys >> shift) + (1 << 15)
            counts += torch.bincount(digits, minlength=1 << 16).cpu()
        from_top = counts.flip(0).cumsum(0)
        rank = int(torch.searchsorted(from_top, keep - above))
        above += int(from_top[rank - 1]) if rank else 0
        digit = (1 << 16) - 1 - rank
        prefix = digit - (1 << 15) if shift == width - 16 else (prefix << 16) | digit
    return prefix, above


def keep_largest(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Mark the ``keep`` largest entries of several tensors together; among equal ones the first.

    Linear in the number of entries; besides the masks it needs the memory of one block.

    Args:
        scores: Tensors of any shapes, without NaN.
        keep: How many entries stay, at most all.

    Returns:
        Bool tensors of the same shapes and devices.
    """
    if keep == 0:
        return [torch.zeros(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    dtype = torch.float64 if any(score.dtype == torch.float64 for score in scores) else torch.float32
    threshold, above = _threshold(scores, keep, dtype)
    equal = keep - above
    masks = []
    for score in scores:
        mask = torch.empty(score.numel(), dtype=torch.bool, device=score.device)
        for part, block in zip(mask.split(BLOCK), score.reshape(-1).split(BLOCK), strict=True):
            keys = _keys(block.to(dtype))
            torch.gt(keys, threshold, out=part)
            ties = keys == threshold
            count = int(ties.sum())
            if 0 < equal < count:
                ties &= ties.cumsum(0) <= equal
            if equal:
                part |= ties
                equal -= min(equal, count)
        masks.append(mask.view(score.shape))
    return masks


def select_global(scores: Scores, amount: float) -> Masks:
    """Let all weights compete: the lowest share of the whole network goes."""
    keep = kept_of(sum(score.numel() for score in scores.values()), amount)
    return dict(zip(scores, keep_largest(list(scores.values()), keep), strict=True))


def select_per_layer(scores: Scores, amount: float) -> Masks:
    """Prune every tensor by the same share."""
    return {name: keep_largest([score], kept_of(score.numel(), amount))[0] for name, score in scores.items()}


def select_per_output(scores: Scores, amount: float) -> Masks:
    """Prune every output channel (slice of the first axis, see `BY_CHANNEL`) by the same share, as Wanda does."""
    masks = {}
    for name, score in scores.items():
        rows = score.reshape(len(score), -1)
        keep = kept_of(rows.shape[1], amount)
        order = rows.argsort(dim=1, descending=True, stable=True)[:, :keep]
        masks[name] = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, value=True).view(score.shape)
    return masks


def select_lamp(scores: Scores, amount: float) -> Masks:
    """Let all weights compete by score² over the sum of score² of those of their tensor that are not smaller (LAMP).

    The largest weight of each tensor has the value 1, so no tensor is emptied while others are not.

    Args:
        scores: Name to score.
        amount: Share of the weights that goes.

    Returns:
        Name to mask.

    References:
        Lee, Park, Mo, Ahn, Shin, "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021.
    """
    ordered = [_descending(score) for score in scores.values()]
    deep = any(_reach(values) > 1e150 for values in ordered)
    relative = [_relative(values, deep=deep) for values in ordered]
    counts = _joint_counts(relative, kept_of(sum(len(values) for values in ordered), amount))
    return dict(zip(scores, map(_largest, scores.values(), ordered, counts), strict=True))


Numbers: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def _descending(score: Tensor) -> Numbers:
    """Sort all scores of a tensor; NumPy does it some twenty times faster than PyTorch on the CPU."""
    flat = score.detach().reshape(-1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return np.sort(flat.numpy())[::-1] if flat.device.type == "cpu" else flat.sort(descending=True).values.cpu().numpy()


def _above(ordered: Numbers, limit: float) -> int:
    """Count the numbers above a limit, of numbers in descending order."""
    return bisect_left(ordered, -limit, key=neg)


def _reach(ordered: Numbers) -> float:
    """Return the largest number over the smallest positive one, of numbers in descending order."""
    count = _above(ordered, 0.0)
    return float(ordered[0]) / float(ordered[count - 1]) if count and math.isfinite(ordered[0]) else 1.0


def _relative(ordered: Numbers, *, deep: bool) -> Numbers:
    """Return score² over the sum of score² of all that are not smaller, for scores in descending order.

    Args:
        ordered: The scores.
        deep: Return the root instead: the squares would vanish.

    Returns:
        Numbers from 0 to 1 in descending order, and −1 for what is gone already.
    """
    relative = np.zeros(len(ordered))
    relative[_above(ordered, -math.inf) :] = -1.0
    size = ordered[: _above(ordered, 0.0)].astype(np.float64)
    if np.isinf(size[:1]).any():
        size = np.isinf(size).astype(np.float64)
    size /= size[:1]
    squares = np.square(size, out=None if deep else size)
    sums = torch.from_numpy(squares).cumsum(0).numpy()  # at least 1, the square of the largest
    relative[: len(size)] = size / (np.sqrt(sums) if deep else sums)
    return relative


def _joint_counts(values: Sequence[Numbers], keep: int) -> list[int]:
    """Count in each of several descending sequences of numbers in [0, 1] (or −1) those among the ``keep`` largest of all.

    Args:
        values: The sequences.
        keep: How many numbers are counted.

    Returns:
        One count for each; of equal numbers those in the first sequences count.
    """

    def number(bits: int) -> float:  # the numbers in [0, 1] are in the order of their bits
        return -1.0 if bits < 0 else float(np.int64(bits).view(np.float64))

    low, high = -1, int(np.float64(1.0).view(np.int64))
    while low < high:
        middle = (low + high) // 2
        if sum(_above(numbers, number(middle)) for numbers in values) <= keep:
            high = middle
        else:
            low = middle + 1
    counts = [_above(numbers, number(high)) for numbers in values]
    left = keep - sum(counts)
    for index, numbers in enumerate(values):
        equal = min(left, bisect_right(numbers, -number(high), key=neg) - counts[index])
        counts[index] += equal
        left -= equal
    return counts


def _largest(score: Tensor, ordered: Numbers, count: int) -> Tensor:
    """Mark the ``count`` largest entries of a tensor, whose order is known; among equal ones the first."""
    if count == 0:
        return torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    limit = float(ordered[count - 1])
    equal = count - _above(ordered, limit)
    if bisect_right(ordered, -limit, key=neg) == count:
        return score >= limit
    ties = score == limit
    return (score > limit) | (ties & (ties.reshape(-1).cumsum(0) <= equal).view(score.shape))


def select_erk(scores: Scores, amount: float) -> Masks:
    """Keep a share of each tensor that is proportional to (Σ of its sides)/(Π of its sides), and the largest scores in it.

    Tensors that would need more than all of their weights stay whole (Erdős–Rényi kernel).

    Args:
        scores: Name to score.
        amount: Share of the weights that goes.

    Returns:
        Name to mask.

    References:
        Evci, Gale, Menick, Castro, Elsen, "Rigging the lottery: making all tickets winners", ICML 2020.
    """
    dense: set[str] = set()
    keep = kept_of(sum(score.numel() for score in scores.values()), amount)
    while True:
        rest = {name: score for name, score in scores.items() if name not in dense}
        budget = keep - sum(scores[name].numel() for name in dense)
        shares = {name: float(sum(score.shape)) for name, score in rest.items()}
        scale = budget / sum(shares.values()) if rest else 0.0
        full = {name for name, score in rest.items() if shares[name] * scale > score.numel()}
        if not full:
            break
        dense |= full
    counts = {name: scores[name].numel() if name in dense else math.floor(shares[name] * scale) for name in scores}
    for name in sorted(rest, key=lambda name: shares[name] * scale - counts[name], reverse=True)[: keep - sum(counts.values())]:
        counts[name] += 1
    return {name: keep_largest([score], counts[name])[0] for name, score in scores.items()}


def select_channels(scores: Scores, amount: float) -> Masks:
    """Remove whole output channels (slices of the first axis, see `BY_CHANNEL`), those with the smallest sum of scores first.

    With path-magnitudes the sum is the mass of the paths that come into the channel through its weights, A(v)·G(v) but for
    the paths that start at its bias. As many channels go as fit into the amount.

    Args:
        scores: Name to score.
        amount: Share of the weights that goes.

    Returns:
        Name to mask.
    """
    sums = {name: score.reshape(len(score), -1).double().sum(1) for name, score in scores.items()}
    order = torch.cat([mass.cpu() for mass in sums.values()]).argsort(stable=True)
    sizes = torch.cat([torch.full((len(score),), score[0].numel()) for score in scores.values()])
    total = int(sizes.sum())
    gone = torch.zeros(len(sizes), dtype=torch.bool)
    gone[order[sizes[order].cumsum(0) <= total - kept_of(total, amount)]] = True
    masks = {}
    for (name, score), removed in zip(scores.items(), gone.split([len(s) for s in scores.values()]), strict=True):
        stays = ~removed.to(score.device)
        masks[name] = stays.reshape(-1, *[1] * (score.dim() - 1)).expand(score.shape).clone()
    return masks


@public_constructor
@dataclass(frozen=True)
class NofM:
    """Keep n of every m consecutive weights along the input axis: 2:4 for the sparse tensor cores of GPUs.

    Blocks run along the second axis (input channels, see `BY_CHANNEL`). A tensor whose input count is no multiple of m stays
    dense.

    Attributes:
        n: How many stay.
        m: Block length.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            InputError: Not 0 < n < m.
        """
        if not 0 < self.n < self.m:
            raise InputError(f"A selection n:m needs 0 < n < m, found {self.n}:{self.m}.")

    @property
    def amount(self) -> float:
        """The share of a block that goes."""
        return 1 - self.n / self.m

    @public
    def fits(self, score: Tensor) -> bool:
        """Tell whether a tensor can be cut into blocks."""
        return score.dim() > 1 and score.shape[1] % self.m == 0

    @public
    def holds(self, weight: Tensor) -> bool:
        """Tell whether a weight, of shape (outputs, inputs, …), has at most n that are not 0 in each block of m inputs."""
        return self.fits(weight) and bool(((weight != 0).movedim(1, -1).reshape(-1, self.m).sum(1) <= self.n).all())

    def __call__(self, scores: Scores, amount: float) -> Masks:
        """Select.

        Args:
            scores: Name to score.
            amount: Must be 1 − n/m.

        Returns:
            Name to mask.

        Raises:
            InputError: ``amount`` is another one, or no tensor can be cut into blocks.
        """
        if abs(amount - self.amount) > 1e-9:
            raise InputError(f"{self.n}:{self.m} sparsity prunes {self.amount:g} of the weights, found amount {amount:g}.")
        if not any(self.fits(score) for score in scores.values()):
            raise InputError(f"No tensor has a number of input channels that is a multiple of {self.m}.")
        return {
            name: self._mask(score) if self.fits(score) else torch.ones_like(score, dtype=torch.bool)
            for name, score in scores.items()
        }

    def _mask(self, score: Tensor) -> Tensor:
        last = score.movedim(1, -1)
        blocks = last.reshape(-1, self.m)
        order = blocks.argsort(dim=1, descending=True, stable=True)[:, : self.n]
        mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, order, value=True)
        return mask.view(last.shape).movedim(-1, 1).contiguous()


SELECTIONS: dict[str, Selection] = {
    "global": select_global,
    "per_layer": select_per_layer,
    "per_output": select_per_output,
    "lamp": select_lamp,
    "erk": select_erk,
    "channels": select_channels,
}
"""By name; ``"2:4"`` and the like are `NofM`."""


BY_CHANNEL: frozenset[Selection] = frozenset({select_per_output, select_erk, select_channels})
"""Selections that, like `NofM`, tell the axes apart: `pathlift.prune` gives them scores in the layout (output channels, input
channels of a group, *kernel), whatever the order in which a parameter has them (`pathlift.graph.axes`)."""


def selection_of(name: str | Selection) -> Selection:
    """Return a selection by name.

    Args:
        name: A key of `SELECTIONS`, ``"n:m"``, or a selection itself.

    Returns:
        The selection.

    Raises:
        InputError: There is no such name.
    """
    if not isinstance(name, str):
        if not callable(name):
            raise InputError(f"selection must be a name, 'n:m' or a function of scores and a share, found {name!r}.")
        return name
    first, colon, second = name.partition(":")
    if colon and first.isdigit() and second.isdigit():
        return NofM(int(first), int(second))
    if name not in SELECTIONS:
        raise InputError(f"There is no selection '{name}'.{nearest(name, [*SELECTIONS, '2:4'])}")
    return SELECTIONS[name]
