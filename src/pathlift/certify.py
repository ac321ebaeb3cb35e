"""Certificates: the arg-max provably stays for every network of a set and every input of a ball (SPEC §5).

With c the class that the model gives to x, each difference of two logits R_c − R_j is a linear functional of the last
layer, so the enclosure bounds it from below as a whole: the row difference, not twice the bound on a logit. The class is
certified when all of these lower bounds are positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pathlift.bounds import checked_radius
from pathlift.errors import InputError, Problem, UnsupportedModelError
from pathlift.network import Network
from pathlift.passes.enclosure import ELEMENTS, Enclosure
from pathlift.passes.propagate import blame
from pathlift.passes.realise import feed_of, realise
from pathlift.reading import capture, captured_on
from pathlift.reading.second import Other, other_state
from pathlift.tolerance import Box, Tolerance, box, point

STEPS = 12
"""Steps of ascent over the free slopes, for samples that the first bounds do not certify."""


@dataclass(frozen=True)
class Certificate:
    """What is certified, sample by sample.

    Attributes:
        certified: (batch,) bool: the arg-max is the same for every network of the set and every input of the ball.
        predicted: (batch,) int64: the arg-max of the model itself.
        margin: (batch,) float64: the model's largest logit minus its second largest.
        bound: (batch,) float64: how much that margin can shrink, at most. ``certified`` is ``margin > bound``.
        covers: What the class stays under, in words.
    """

    certified: Tensor
    predicted: Tensor
    margin: Tensor
    bound: Tensor
    covers: str

    @property
    def share(self) -> float:
        """Share of samples that are certified."""
        return float(self.certified.double().mean())

    def __repr__(self) -> str:
        """Return a one-line summary."""
        return f"Certificate({int(self.certified.sum())} of {len(self.certified)} samples certified; covers {self.covers})"


@torch.no_grad()
def certify(
    model: nn.Module | Network,
    x: Tensor | Iterable[Tensor | Sequence[Tensor]],
    tolerance: Tolerance | Other | None = None,
    radius: float = 0.0,
    *,
    progress: Callable[[int], None] | None = None,
) -> Certificate:
    """Tell for which inputs the predicted class provably stays, for a whole set of networks and of inputs.

    min over θ' in the set and ‖x' − x‖_∞ ≤ radius of R_θ'(x')_c − R_θ'(x')_j is bounded from below for each class j by
    linear bounds that go backwards through the network (`pathlift.passes.enclosure`). Samples that the intervals of plain
    interval arithmetic do not certify are tried again with intervals that are narrowed by linear bounds of their own.

    The certificate covers the rounding of the model's own forward pass in its precision, summed in any order (not Winograd,
    FFT or TF32), and of this computation, which runs in float64. Without a tolerance and a radius it covers nothing else:
    only that the model's arithmetic gives the class that exact arithmetic gives. `Certificate.covers` says it in words.

    Args:
        model: A module, or a captured `Network`, that returns one vector of logits per sample.
        x: Inputs with a batch dimension, shape (batch, …); or an iterable of such batches, such as a data loader, whose
            batches may also be (inputs, labels). One batch is held at a time.
        tolerance: The set of networks: `Relative`, `Absolute`, `Rounding`, `Pruned`, or one other network (a module or a
            state-dict); None: the model alone.
        radius: Largest change of each element of the input; 0: the input itself.
        progress: Called with the number of samples done, as the work goes on.

    Returns:
        The certificate.

    Raises:
        UnsupportedModelError: The model lies outside the theory, or does not return one vector of logits.
        InputError: ``x``, ``tolerance`` or ``radius`` is malformed.
        MismatchError: The other network has other parameters.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pathlift import Relative
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> certify(model, torch.tensor([[3.0, 1.0], [2.0, 1.9]]), Relative(0.1)).certified
        tensor([ True, False])
    """
    reach = checked_radius(radius)
    batches = [x] if isinstance(x, Tensor) else (batch if isinstance(batch, Tensor) else batch[0] for batch in x)
    network: Network | None = capture(model) if isinstance(model, Network) else None
    weights: Box | None = None
    found = []
    for batch in batches:
        if batch.dim() == 0:
            raise InputError("x must be a tensor with a batch dimension, found a scalar.")
        network = captured_on(model, batch) if network is None else network
        if weights is None:
            weights = box_of(network, tolerance)
            blame(weights.lower)
            blame(weights.upper)
        found.append(_certify(network, weights, batch, reach, progress))
    if network is None or not found:
        raise InputError("x is empty: give at least one batch of inputs.")
    margin, worst, predicted = (torch.cat(parts) for parts in zip(*found, strict=True))
    bound = margin - worst
    return Certificate(margin > bound, predicted, margin, bound, _covered(network, tolerance, reach))


def _covered(network: Network, tolerance: Tolerance | Other | None, reach: float) -> str:
    """Say what a certificate covers."""
    dtype = str(_precision(network)).removeprefix("torch.")
    rounding = f"the rounding of the model's own forward pass in {dtype}"
    given = [] if tolerance is None else [str(tolerance) if isinstance(tolerance, Tolerance) else "one other network"]
    given += [f"changes of each input element up to {reach:g}"] if reach else []
    return f"{', '.join(given)} and {rounding}" if given else f"{rounding}, and nothing else"


def _certify(
    network: Network, weights: Box, x: Tensor, reach: float, progress: Callable[[int], None] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return margin, smallest margin in the set, and predicted class of one batch."""
    feed = feed_of(network, (x,))
    logits = logits_of(network)
    precision = _precision(network)
    nominal = realise(network, network.values(), feed, torch.float64)[logits][:, 0]
    top = nominal.topk(2, 1)
    predicted, margin = top.indices[:, 0], top.values[:, 0] - top.values[:, 1]
    worst = torch.full_like(margin, -math.inf)
    open_ = torch.arange(len(margin), device=margin.device)
    for refine in (False, True):
        for part in open_.split(_chunk(network, refine=refine)) if len(open_) else ():
            chosen = {name: value[part] for name, value in feed.items()}
            enclosure = Enclosure(network, weights, chosen, reach, precision, refine=refine)
            found = _gap(enclosure, logits, predicted[part], STEPS if refine else 0)
            worst[part] = torch.maximum(worst[part], torch.where(torch.isfinite(found), found, -math.inf))
            if progress is not None:
                progress(len(part) if refine else int((worst[part] > 0).sum()))
        open_ = (worst <= 0).nonzero()[:, 0]
    return margin, worst, predicted


def _gap(enclosure: Enclosure, logits: str, predicted: Tensor, steps: int) -> Tensor:
    """Return a lower bound on the smallest difference between the predicted logit and another, (samples,)."""
    classes = enclosure.network.node[logits].shape[-1]
    batch = len(predicted)
    identity = torch.eye(classes, dtype=torch.float64, device=predicted.device)
    rows = identity[predicted].unsqueeze(1) - identity  # (samples, classes, classes)
    others = torch.ones((batch, classes), dtype=torch.bool, device=predicted.device)
    others.scatter_(1, predicted.unsqueeze(1), False)
    rows = rows[others].reshape(batch, classes - 1, 1, classes)
    if steps:
        return enclosure.tightened({logits: rows}, steps=steps).amin(1)
    return enclosure.lower({logits: rows}, joint=True).amin(1)


def _chunk(network: Network, *, refine: bool) -> int:
    """Return how many samples are worked on at a time; ascent keeps the coefficients of all layers."""
    widest = max(math.prod(node.shape) for node in network.nodes)
    rows = network.node[network.outputs[0]].shape[-1]
    return max(1, ELEMENTS // (rows * widest * (8 if refine else 1)))


def logits_of(network: Network) -> str:
    """Return the output node, which must hold one vector of at least two logits per sample.

    Args:
        network: The graph.

    Returns:
        Its name.

    Raises:
        UnsupportedModelError: The network has several inputs, or other outputs.
    """
    name = network.outputs[0]
    node = network.node[name]
    inputs = sum(own.kind == "input" for own in network.nodes)
    if len(network.outputs) == 1 and len(node.shape) == 2 and node.shape[0] == 1 and node.shape[1] > 1 and inputs == 1:
        return name
    shapes = ", ".join(str(network.node[own].shape) for own in network.outputs)
    reason = f"A certificate is about the arg-max of one vector of logits per input; this model takes {inputs} inputs and "
    reason += f"returns {len(network.outputs)} outputs of shape {shapes} per sample."
    raise UnsupportedModelError((
        Problem("", "output", "", reason, "Wrap the model so that it returns a tensor of shape (batch, classes)."),
    ))


def _precision(network: Network) -> torch.dtype:
    """Return the coarsest precision among the parameters and inputs: that of the model's own arithmetic."""
    found = [dtype for _, dtype in network.examples]
    found += [tensor.dtype for name, tensor in network.state.items() if name in network.parameters]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype in found:
            return dtype
    return torch.float64


def box_of(network: Network, tolerance: Tolerance | Other | None) -> Box:
    """Return the set of networks that a user means.

    Args:
        network: The graph.
        tolerance: See `certify`.

    Returns:
        The box.

    Raises:
        InputError: It is none of what may be given.
    """
    if tolerance is None:
        return point(network, network.state)
    if isinstance(tolerance, Tolerance):
        return box(network, tolerance)
    if isinstance(tolerance, (nn.Module, Network, Mapping)):
        return point(network, other_state(network, tolerance))
    raise InputError(
        f"tolerance must be Relative, Absolute, Rounding, Pruned, a module or a state-dict, found {type(tolerance).__name__}."
    )
