"""What the inputs of a model may be: shapes and examples to read it with, batches to feed it with, and targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pathlift.arguments import declare
from pathlift.arguments.kinds import Kind, batch, batches, either, module, plain_tensor, refusal, shapes, stream, text
from pathlift.errors import InputError


def streamed(each: Kind) -> Kind:
    """All inputs in one tensor, or batches one after the other."""
    what = "a tensor with a batch dimension, shape (batch, …), or an iterable of such batches"
    return either(what, (Tensor, batch), (Mapping, each), (object, stream(what, each)))


def targets(name: str, value: Any) -> Tensor:
    """One target for each sample, as the loss takes it."""
    tensor = plain_tensor(name, value)
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise refusal(name, "targets with a batch dimension, one for each sample", tensor)
    return tensor


def _not_read_again(given: Mapping[str, Any]) -> None:
    """Refuse shapes and ends for what is no module: a network, or its groups, has been read with some."""
    if given.get("model") is not None and not isinstance(given["model"], nn.Module):
        surplus = [name for name in ("inputs", "until") if given.get(name) is not None]
        if surplus:
            raise InputError(f"A captured Network has its inputs and outputs: leave out {' and '.join(map(repr, surplus))}.")


declare(__name__, {
    "check_support.model": module,
    "inputs": shapes,
    "until": text("the name of a module or of a value of the graph", 1),
    "x": batches,
    "y": targets,
}, check=_not_read_again)  # fmt: skip
