"""Selections that look at channels, whatever the order in which a parameter keeps them (`pathlift.graph.axes`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pathlift.errors import InputError
from pathlift.graph.axes import Axes, Piece


def along_channels(
    select: Callable[[Mapping[str, Tensor], float], dict[str, Tensor]],
    scores: Mapping[str, Tensor],
    amount: float,
    axes: Mapping[str, Axes],
) -> dict[str, Tensor]:
    """Apply a selection that looks at channels to parameters laid out as ordinary convolutions.

    Args:
        select: The selection; the first axis of what it is given counts output channels, the second input channels.
        scores: Name to scores of the parameter's shape.
        amount: Share of the weights that goes.
        axes: Name to axes.

    Returns:
        Name to mask of the parameter's shape.

    Raises:
        InputError: A parameter has no output channels of its own.
    """
    by_part: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[str, Piece]]] = {}
    for name, score in scores.items():
        if axes[name].conflict:
            raise InputError(
                f"{axes[name].conflict}. Leave it out (scope='!{name}'), or let weights compete one by one (selection "
                "'global', 'per_layer' or 'lamp')."
            )
        parts[name] = [(f"{name}[{number}]", piece) for number, piece in enumerate(axes[name].pieces)]
        by_part.update({key: piece.as_convolution(score) for key, piece in parts[name]})
        by_part.update({f"{name}[rest]": rest for rest in [_rest(score, axes[name])] if rest.numel()})
    kept = select(by_part, amount)
    masks = {}
    for name, score in scores.items():
        mask = torch.ones(score.shape, dtype=torch.bool, device=score.device)
        for key, piece in parts[name]:
            mask = piece.put(kept[key], mask)
        if f"{name}[rest]" in kept:
            mask.view(-1)[_outside(score, axes[name])] = kept[f"{name}[rest]"]
        masks[name] = mask.contiguous()
    return masks


def _outside(score: Tensor, axes: Axes) -> Tensor:
    """Return which elements of a parameter no operator reads; they lie on no path."""
    outside = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    for piece in axes.pieces:
        outside[... if piece.indices is None else piece.indices.reshape(-1)] = False
    return outside


def _rest(score: Tensor, axes: Axes) -> Tensor:
    return score.reshape(-1)[_outside(score, axes)]
