"""Recurrent networks with ReLU, written out step by step: h_t = relu(W·x_t + b + U·h_{t−1} + b')."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None) -> Tensor:
    h = h + 0 * x[..., :1]  # a constant state is made of neurons too
    return torch.relu(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh))


def _unrolled(
    x: Tensor,
    first: Tensor,
    parameters: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """Return the states of the last layer at all steps, and the last state of each layer and direction."""
    assert not train or not dropout
    steps = list((x.transpose(0, 1) if batch_first else x).unbind(0))
    size, directions = 4 if has_biases else 2, 2 if bidirectional else 1
    last = []
    for layer in range(num_layers):
        runs = []
        for direction in range(directions):
            number = layer * directions + direction
            h, states = first[number], []
            for step in reversed(steps) if direction else steps:
                h = _cell(step, h, *parameters[number * size : (number + 1) * size])
                states.append(h)
            last.append(h)
            runs.append(states[::-1] if direction else states)
        steps = [torch.cat(pieces, -1) for pieces in zip(*runs, strict=True)]
    return torch.stack(steps, 1 if batch_first else 0), torch.stack(last)


UNROLLED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.rnn_relu.input: _unrolled,
    torch.ops.aten.rnn_relu_cell.default: _cell,
}
"""Operator to what it is written out as, while a model is exported."""
