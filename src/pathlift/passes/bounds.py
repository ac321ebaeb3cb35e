"""Bounds on |R_θ(x) − R_θ'(x)|, output by output: how far two networks of one architecture can differ (SPEC §5).

Through the pivot m (the smaller magnitude where signs agree, 0 elsewhere) both steps θ → m and m → θ' keep signs, so
Theorem 4.1 holds on each, and |R_θ(x) − R_θ'(x)|_out ≤ Σ_p |Φ_p(θ)−Φ_p(m)|·|x̄(p₀)| + Σ_p |Φ_p(θ')−Φ_p(m)|·|x̄(p₀)| for
every pair of weights: two non-negative difference tracks, fed with |x|.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from pathlift.capture import capture
from pathlift.edges import Dense, Identity
from pathlift.errors import InputError, MismatchError, Problem, UnsupportedModelError
from pathlift.network import Leaf, Network, Node, widen
from pathlift.passes.metric import Other, checked_pair, differing, other_state
from pathlift.passes.programs import DifferenceProgram, Values
from pathlift.passes.propagate import blame, in_range, propagate
from pathlift.passes.rounding import rounding_factor
from pathlift.passes.scaled import Scaled, power, total

Kind: TypeAlias = Literal["auto", "theorem", "per_input", "prior"]
KINDS = ("auto", "theorem", "per_input", "prior")


@torch.no_grad()
def lipschitz_bound(model: nn.Module | Network, other: Other, x: Tensor | Sequence[Tensor], *, kind: Kind = "auto") -> Tensor:
    """Bound |R_θ(x) − R_θ'(x)| for every sample and output.

    - ``theorem``: ‖x‖_∞·‖Φ^I(θ)−Φ^I(θ')‖₁ + ‖Φ^H(θ)−Φ^H(θ')‖₁ per output (Theorem B.1, equation (15)). Needs weights
      whose signs agree, θθ' ≥ 0.
    - ``per_input``: Σ_p |ΔΦ_p|·|x̄(p₀)|, the difference track fed with |x|, through the pivot: any pair.
    - ``prior``: (W·‖x‖_∞+1)·W·L²·R^{L−1}·‖θ−θ'‖_∞, equation (2): layered ReLU perceptrons only. Not invariant under rescaling.
    - ``auto``: the smallest of those that apply. ``per_input`` is never above ``theorem``.

    Everything is computed in float64 and rounded up by the relative error of a non-negative pass, (number of roundings on
    the longest chain)·2⁻⁵³. The bound is on exact real arithmetic; the rounding of the models' own forward passes is not
    part of it.

    Args:
        model: A module, or a captured `Network`: θ.
        other: θ', as for `path_metric`.
        x: Inputs with a batch dimension, shape (batch, …); a sequence of them when the model has several.
        kind: Which bound.

    Returns:
        float64 tensor of shape (batch, outputs): the outputs of a sample are flattened, several outputs one after the other.

    Raises:
        UnsupportedModelError: The model lies outside the theory, or ``prior`` is asked for another architecture.
        MismatchError: ``other`` has other parameters, or ``theorem`` is asked for weights whose signs differ.
        InputError: ``x`` or ``kind`` is malformed, or x is not finite.
        NumericalError: A weight is NaN or infinite.

    References:
        Gonon et al., "A rescaling-invariant Lipschitz bound based on path-metrics", ICML 2025, Theorems 4.1 and B.1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, pruned = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> _ = pruned.weight.data.copy_(torch.tensor([[3.0, 0.0]]))
        >>> round(lipschitz_bound(model, pruned, torch.tensor([[1.0, 0.5]])).item(), 9)
        0.5
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, found {kind!r}.")
    samples = (x,) if isinstance(x, Tensor) else tuple(x)
    network = capture(model, samples)
    feed = _feed(network, samples)
    state = other_state(network, other)
    network = network.compact if kind == "theorem" else network
    values, others = checked_pair(network, state)
    blame(values)
    blame(others)
    if kind == "prior":
        return _prior(network, values, others, feed)
    if kind == "theorem":
        return _theorem(network, values, others, feed)
    found = _through_pivot(network, values, others, feed=feed)
    if kind == "auto" and isinstance(_perceptron(network), list):
        found = torch.minimum(found, _prior(network, values, others, feed))
    return found


def _feed(network: Network, samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Check the inputs and return |x| in float64 by input node, shape (batch, 1, …)."""
    nodes = [node for node in network.nodes if node.kind == "input"]
    if len(samples) != len(nodes):
        raise InputError(f"The model has {len(nodes)} inputs, found {len(samples)} tensors.")
    feed: dict[str, Tensor] = {}
    for place, (node, sample) in enumerate(zip(nodes, samples, strict=True)):
        if tuple(sample.shape[1:]) != node.shape[1:]:
            raise InputError(
                f"Input {place} has shape {tuple(sample.shape)}; expected (batch, {', '.join(map(str, node.shape[1:]))})."
            )
        if len(sample) == 0 or len(sample) != len(samples[0]):
            raise InputError(f"Input {place} has {len(sample)} samples; every input needs the same number, at least 1.")
        value = sample.detach().to(network.device, torch.float64)
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"Input {place} contains NaN or inf.")
        feed[node.name] = value.abs().unsqueeze(1)
    return feed


def _flat(network: Network, outputs: Sequence[Scaled | None], batch: int | None) -> Tensor:
    """Return the outputs of each sample side by side, (batch, outputs) or (outputs,)."""
    lead = () if batch is None else (batch,)
    pieces = []
    for name, value in zip(network.outputs, outputs, strict=True):
        node = network.node[name]
        if value is None:
            pieces.append(torch.zeros((*lead, math.prod(node.full_shape)), dtype=torch.float64, device=network.device))
        else:
            tensor = _rounded_up(value)
            tensor = node.spread(tensor) if batch is None else tensor
            pieces.append(tensor.reshape(*lead, -1))
    return torch.cat(pieces, -1)


def _rounded_up(value: Scaled) -> Tensor:
    """Return non-negative values as plain float64: inf past its range, never 0 for what is positive."""
    half = float(math.floor(value.exponent / 2))
    plain = value.tensor.double() * power(half) * power(value.exponent - half)
    return torch.where(value.tensor > 0, plain.clamp(min=torch.finfo(torch.float64).tiny), plain)


def _through_pivot(
    network: Network,
    values: Values,
    others: Values,
    *,
    feed: Mapping[str, Tensor] | None = None,
    from_inputs: bool = True,
    from_biases: bool = True,
) -> Tensor:
    """Σ_p (|Φ_p(θ)−Φ_p(m)| + |Φ_p(θ')−Φ_p(m)|)·|x̄(p₀)| per output, rounded up."""
    above, below = differing(network, values, others)
    batch = None if feed is None else len(next(iter(feed.values())))

    def track(first: Values, second: Values, changed: set[Leaf]) -> list[Scaled | None]:
        def attempt(dtype: torch.dtype) -> list[Scaled | None]:
            program = DifferenceProgram(
                network, first, second, dtype, changed, feed=feed, from_inputs=from_inputs, from_biases=from_biases
            )
            tracks = propagate(network, program)
            return [tracks[name][1] for name in network.outputs]

        return in_range(attempt, torch.float64, first, second)

    halves = [track(values, others, above)] if above else []
    halves += [track(others, values, below)] if below else []
    joined: list[Scaled | None] = []
    for place in range(len(network.outputs)):
        known = [half[place] for half in halves]
        parts = [value for value in known if value is not None]
        joined.append(total(parts, fresh=False)[0] if parts else None)
    return _flat(network, joined, batch) * (1.0 + rounding_factor(network))


def _theorem(network: Network, values: Values, others: Values, feed: Mapping[str, Tensor]) -> Tensor:
    """Equation (15): linear in ‖x‖_∞, so two passes fed with ones on the compact network serve the whole batch."""
    for leaf in network.leaves:
        if leaf.scalar is None:
            flipped = torch.sign(values[leaf]) * torch.sign(others[leaf]) < 0
            if bool(flipped.any()):
                place = tuple(int(index) for index in torch.nonzero(flipped)[0])
                raise MismatchError(
                    f"Theorem 4.1 needs weights whose signs agree; '{leaf.label}' changes its sign in {int(flipped.sum())} of "
                    f"{flipped.numel()} places, first at {place}. Use kind='per_input', which holds for any pair."
                )
    from_inputs = _through_pivot(network, values, others, from_biases=False)
    from_biases = _through_pivot(network, values, others, from_inputs=False)
    largest = torch.stack([value.flatten(1).amax(1) for value in feed.values()]).amax(0)[:, None]
    scaled = torch.where(largest > 0, largest * from_inputs, 0.0)  # 0·inf is 0 here
    return (scaled + from_biases) * (1.0 + 4 * 2.0**-53)


def _perceptron(network: Network) -> list[Node] | Node:
    """Return the linear layers of a layered ReLU perceptron in order, or the first node that does not belong to one."""
    layers: list[Node] = []
    below = network.nodes[0].name
    for place, node in enumerate(network.nodes):
        if node.kind == "input":
            if place > 0 or len(node.shape) != 2:
                return node
            continue
        if len(node.terms) != 1 or node.terms[0].source != below or node.concat is not None:
            return node
        term = node.terms[0]
        if isinstance(term.edges, Dense) and all(start.weight.score_name is not None for start in node.starts):
            layers.append(node)
        elif not (isinstance(term.edges, Identity) and term.weight is None and not node.starts):
            return node
        below = node.name
    return layers if layers and network.outputs == (below,) else network.nodes[-1]


def _prior(network: Network, values: Values, others: Values, feed: Mapping[str, Tensor]) -> Tensor:
    """Equation (2), with W the largest width and R ≥ 1 the largest ℓ¹ norm of a row, bias included, in either network."""
    layers = _perceptron(network)
    if isinstance(layers, Node):
        reason = "The bound (2) is for layered ReLU perceptrons: one chain of linear layers and ReLU, one vector as input."
        origin = layers.origin
        raise UnsupportedModelError((
            Problem(origin.module, origin.op, origin.where, reason, "Use kind='per_input' or kind='theorem'."),
        ))
    radius, distance = 1.0, 0.0
    width = max(network.nodes[0].shape[-1], *(node.shape[-1] for node in layers))
    for node in layers:
        leaves = [node.terms[0].weight, *(start.weight for start in node.starts)]
        for found in (values, others):
            tensors = [widen(found[leaf]).double() for leaf in leaves if leaf is not None]
            rows = sum(tensor.abs().reshape(node.shape[-1], -1).sum(1) for tensor in tensors)
            radius = max(radius, float(torch.as_tensor(rows).max()))
        for leaf in leaves:
            if leaf is not None:
                gap = (widen(values[leaf]).double() - widen(others[leaf]).double()).abs()
                distance = max(distance, float(gap.max()))
    depth = len(layers)
    largest = next(iter(feed.values())).flatten(1).amax(1)
    if distance == 0.0:
        return torch.zeros((len(largest), layers[-1].shape[-1]), dtype=torch.float64, device=largest.device)
    each = (width * largest + 1) * width * depth**2 * distance * torch.full_like(largest, radius).pow(depth - 1)
    return (each * (1.0 + rounding_factor(network)))[:, None].expand(-1, layers[-1].shape[-1]).clone()
