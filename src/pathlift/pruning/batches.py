"""What criteria and updates look at: inputs, or batches with targets, of whatever a user's data loader gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import TypeIs

from pathlift.errors import InputError
from pathlift.graph.calling import Form, Samples, form_of
from pathlift.pruning.criteria import Batch

Data: TypeAlias = "Batch | Sequence[Batch] | Samples"
"""Batches with targets and a loss, or inputs: one tensor, or tensors in containers as the model takes them."""


def have_targets(data: Data | None) -> TypeIs[Batch | Sequence[Batch]]:
    """Tell whether there are targets: in a `Batch`, or in several of them."""
    if isinstance(data, Batch):
        return True
    return isinstance(data, (list, tuple)) and len(data) > 0 and all(isinstance(item, Batch) for item in data)


def held(data: Data | Iterable[Samples | Batch] | None, form: Form) -> Data | None:
    """Return all data in memory.

    Args:
        data: Inputs, a `Batch`, or several of them one after the other. An item of several is inputs as the model takes them,
            or, where it has another form, such inputs and classes as data loaders give them.
        form: How the model takes its inputs.

    Returns:
        Batches with targets, or the inputs of all batches together.

    Raises:
        InputError: There is no batch, or they are of different kinds.
    """
    if data is None or isinstance(data, (Tensor, Batch)):
        return data
    several = [data] if isinstance(data, Mapping) else [_read(item, form) for item in data]
    if not several:
        raise InputError("data holds no batch: give at least one.")
    batches = [item for item in several if isinstance(item, Batch)]
    inputs = [item for item in several if not isinstance(item, Batch)]
    if batches and inputs:
        raise InputError(f"The batches of data are of different kinds: inputs of {_shapes(inputs[0], form)}, and a Batch.")
    if batches:
        return batches
    shapes = [_shapes(item, form) for item in inputs]
    odd = next((other for other in shapes if other != shapes[0]), None)
    if odd is not None:
        raise InputError(f"The batches of data are of different kinds: inputs of {shapes[0]}, and inputs of {odd}.")
    return together(inputs)


def _read(item: Samples | Batch, form: Form) -> Samples | Batch:
    """Return one batch: inputs as the model takes them, or these and classes."""
    if isinstance(item, (Tensor, Batch, Mapping)) or form.fits(item):
        return item
    if len(item) == 2 and isinstance(item[1], Tensor):
        inputs = next((given for given in (item[0], (item[0],)) if form.fits(given)), None)
        return item if inputs is None else Batch(inputs, item[1])
    return item[0] if len(item) == 1 else item


def _shapes(inputs: Samples, form: Form) -> str:
    """Write what samples look like, input by input."""
    shapes = [str(tuple(tensor.shape[1:])) for tensor in form.tensors(inputs)]
    return f"shape {' and '.join(shapes)} a sample"


def together(several: Sequence[Samples]) -> Samples:
    """Join inputs of the same form along their batch dimension."""
    if isinstance(several[0], Tensor):
        return torch.cat([tensor for tensor in several if isinstance(tensor, Tensor)])
    form = form_of(several[0])
    joined: Samples = form.filled([torch.cat(parts) for parts in zip(*(form.tensors(each) for each in several), strict=True)])
    return joined


def inputs_of(data: Data) -> list[Samples]:
    """Return the batches of inputs among the data."""
    if not have_targets(data):
        return [data]
    return [batch.x for batch in ([data] if isinstance(data, Batch) else data)]
