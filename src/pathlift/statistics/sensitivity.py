"""What a small change of a layer does to the outputs: g = ∂ E‖ΔR‖² / ∂ E(Δz)², for independent errors (mathematics §9).

The variance of a small random error goes through the network as variances do (`pathlift.statistics.transfer`), but for kinks,
which multiply it by E f'(z)² (for ReLU the probability that the neuron is active), and maxima, which pass on that of the
antecedent that is the largest. Errors at two taps of one channel are correlated by ρ, a number. This map is linear, and g is
its transpose applied to ones: the ℓ² path-norm's backward pass with each kink multiplied by its activity, and batch norm by
(γ/σ)².
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pathlift.edges import Reduce, Window
from pathlift.errors import NumericalError
from pathlift.graph.layers import Extremum, Layer
from pathlift.passes.forward import antecedents
from pathlift.statistics.propagation import Propagation, Step
from pathlift.statistics.transfer import fitted


def sensitivities(propagation: Propagation) -> dict[str, Tensor]:
    """Return g of every layer, by an error that is alike at all positions where its moments are.

    Args:
        propagation: A propagation that has run.

    Returns:
        Layer name to g, of the shape of its moments; 0 where nothing reaches an output.

    Raises:
        NumericalError: g leaves the range of float64.
    """
    network = propagation.network
    errors: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad():
        for layer in network.layers:
            errors[layer.name] = _error(propagation, layer, errors)
        ends = [errors[name].expand(network.layer[name].shape).sum() for name in network.outputs]
        total = sum(ends[1:], ends[0])
        names = [name for name, error in errors.items() if error.requires_grad]
        slopes = torch.autograd.grad(total, [errors[name] for name in names], allow_unused=True)
    slope_of = dict(zip(names, slopes, strict=True))
    sensitivity = {}
    for name, error in errors.items():
        slope = slope_of.get(name)
        sensitivity[name] = torch.zeros_like(error).detach() if slope is None else slope
        if not bool(torch.isfinite(sensitivity[name]).all()):
            raise NumericalError(
                f"The sensitivity of the outputs to the layer '{name}' leaves the range of float64. Rescale the network first "
                "(symmetries(...).normalize())."
            )
    return sensitivity


def _error(propagation: Propagation, layer: Layer, errors: Mapping[str, Tensor]) -> Tensor:
    """Return the variance of the error of a layer from that of the layers below; it is 0, and only its derivative counts."""
    shape = propagation.classes[layer.name].shape
    zero = torch.zeros(shape, dtype=torch.float64, device=propagation.network.device, requires_grad=True)
    step = propagation.steps[layer.name]
    if not layer.connections:
        return zero
    if isinstance(layer.nonlinearity, Extremum):
        return fitted(_of_extremum(propagation, layer, step, errors), shape) + zero
    pieces = []
    for connection, transfer in propagation.transfers(layer):
        pieces.append(transfer.variance(errors[connection.source], propagation.rho))
    if layer.concat is not None:
        shapes = [layer.concat.shape(position, layer.shape) for position in range(len(pieces))]
        brought = torch.cat([piece.expand(each) for piece, each in zip(pieces, shapes, strict=True)], layer.concat.dim)
    else:
        brought = sum(pieces[1:], pieces[0])
    if step.response is not None:
        brought = brought * step.response.gain
    return fitted(brought, shape) + zero


def _of_extremum(propagation: Propagation, layer: Layer, step: Step, errors: Mapping[str, Tensor]) -> Tensor:
    """Return Σ_j P(j is the largest)·e_j over the antecedents of each neuron."""
    network = propagation.network
    full = {
        connection.source: errors[connection.source].expand(network.layer[connection.source].shape)
        for connection in layer.connections
    }
    if step.shares is None:
        (connection,) = layer.connections
        assert isinstance(connection.edges, (Window, Reduce))
        x = full[connection.source]
        return connection.edges.sum(x, None) / connection.edges.sum(torch.ones_like(x), None)
    distinct = replace(layer, connections=propagation.distinct(layer))
    below = {name: error.unsqueeze(0) for name, error in full.items()}
    zeros = [torch.zeros_like(propagation.placed(bias)) for bias in layer.biases]
    assert isinstance(layer.nonlinearity, Extremum)
    parts = antecedents(distinct, below, zeros, Extremum(largest=True, zero=layer.nonlinearity.zero))[0]
    parts = torch.where(torch.isfinite(parts), parts, 0.0)
    return (torch.stack([share.expand(layer.shape) for share in step.shares]) * parts).sum(0)
