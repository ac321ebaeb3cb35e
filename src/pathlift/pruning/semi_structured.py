"""2:4 sparsity as PyTorch's semi-structured tensors, by which the sparse tensor cores of GPUs multiply."""

from __future__ import annotations

import torch
from torch import nn

from pathlift.arguments import public
from pathlift.errors import InputError, one_line
from pathlift.pruning.selection import NofM
from pathlift.reading.freeze import cloned


@public
def to_semi_structured(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of a model whose linear layers hold 2:4 weights as semi-structured tensors.

    `pathlift.prune` with ``selection="2:4"`` gives such weights. The tensors are for running the model; files, ONNX files among
    them, hold the pattern as plain weights with zeros, which is what other runtimes read.

    Args:
        model: A module on a CUDA device, in half precision say; not changed.

    Returns:
        The copy, and the names of the weights that are semi-structured now; linear layers without the pattern, or of sizes
        that PyTorch's kernels do not take, stay as they are, as do convolutions.

    Raises:
        InputError: No linear layer has the pattern, the model is on no CUDA device, or PyTorch can convert none of the weights.
    """
    made = cloned(model)
    fitting = {
        f"{path}.weight".lstrip("."): layer
        for path, layer in made.named_modules()
        if isinstance(layer, nn.Linear) and "weight" in layer._parameters and NofM(2, 4).holds(layer.weight)
    }
    if not fitting:
        raise InputError("No linear layer has 2:4 weights. Prune the model first: prune(model, inputs, selection='2:4').")
    elsewhere = next((name for name, layer in fitting.items() if layer.weight.device.type != "cuda"), None)
    if elsewhere is not None:
        device = fitting[elsewhere].weight.device
        raise InputError(
            f"'{elsewhere}' is on the device {device}, and PyTorch has semi-structured tensors on CUDA devices alone. Move the "
            "model there, in half precision: model.cuda().half(). Saved as they are, the weights have the 2:4 pattern too."
        )
    reasons = {name: _convert(layer) for name, layer in fitting.items()}
    converted = tuple(name for name, reason in reasons.items() if reason is None)
    if not converted:
        name, reason = next(iter(reasons.items()))
        raise InputError(f"PyTorch makes no semi-structured tensor of these weights. '{name}': {reason}")
    return made, converted


def _convert(layer: nn.Linear) -> str | None:
    """Put a semi-structured weight in place of the plain one, or say why that cannot be."""
    try:
        sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
    except RuntimeError as error:  # the type, the sizes or the device are not those of its kernels
        return one_line(error)
    layer.weight = nn.Parameter(sparse, requires_grad=False)
    return None
