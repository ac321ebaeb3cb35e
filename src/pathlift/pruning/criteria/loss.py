"""Criteria made of derivatives of a loss on data: OBD by Hutchinson's estimator, SNIP, GraSP, diagonal Fisher.

The network is run from its captured graph, in inference mode as everywhere: batch norms use their running statistics, and
the user's module is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from pathlift.arguments import public, public_constructor
from pathlift.errors import InputError
from pathlift.graph.calling import Samples, leaves, mapped
from pathlift.graph.compact import compacted
from pathlift.graph.network import Network
from pathlift.passes.forward import feed_of, flat_outputs, forward
from pathlift.passes.propagate import blame
from pathlift.pruning.scope import eligible

Loss = Callable[[Tensor, Tensor], Tensor]


@public_constructor
@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs, targets and a loss.

    Attributes:
        x: Inputs, shape (samples, …); a tuple or dictionary as the model takes them.
        y: Targets, as the loss takes them.
        loss: Mean loss of outputs (samples, outputs), laid side by side if there are several, and targets.
    """

    x: Samples
    y: Tensor
    loss: Loss = F.cross_entropy

    def __post_init__(self) -> None:
        """Check that there is a target for each input.

        Raises:
            InputError: There are more or fewer.
        """
        for tensor in leaves(self.x):
            if len(tensor) != len(self.y):
                raise InputError(f"Found {len(tensor)} inputs and {len(self.y)} targets.")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.y)

    @public
    def split(self, size: int) -> Iterator[Batch]:
        """Cut into batches of at most ``size`` samples."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield replace(self, x=mapped(self.x, itemgetter(part)), y=self.y[part])


class _Loss:
    """The loss as a function of the parameters that can be pruned."""

    def __init__(self, network: Network, batch: Batch) -> None:
        names = eligible(network)
        blame(compacted(network).values())
        self.leaves = {name: network.state[name].detach().clone().requires_grad_() for name in names}
        values = network.values({**network.state, **self.leaves})
        outputs = forward(network, values, feed_of(network, batch.x), network.dtype)
        self.value = _value(batch, flat_outputs(network, outputs, len(batch)))

    def gradient(self, *, again: bool = False) -> list[Tensor]:
        """Return the gradient, through which ``again`` one can differentiate."""
        gradients = torch.autograd.grad(self.value, list(self.leaves.values()), create_graph=again, allow_unused=True)
        return self._filled(gradients)

    def hessian_times(self, gradient: Sequence[Tensor], direction: Sequence[Tensor]) -> list[Tensor]:
        """Return H·direction by differentiating the gradient once more."""
        along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        assert isinstance(along, Tensor)
        return self._filled(torch.autograd.grad(along, list(self.leaves.values()), retain_graph=True, allow_unused=True))

    def _filled(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Put zeros where the loss does not depend on a parameter."""
        pairs = zip(gradients, self.leaves.values(), strict=True)
        return [torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in pairs]

    def named(self, scores: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: score.detach() for name, score in zip(self.leaves, scores, strict=True)}

    def times(self, other: Sequence[Tensor]) -> list[Tensor]:
        """Return θ ⊙ other in float64, whose range also squares and products of three do not leave."""
        return [leaf.double() * towards.double() for leaf, towards in zip(self.leaves.values(), other, strict=True)]


def _value(batch: Batch, outputs: Tensor) -> Tensor:
    """Evaluate the loss, which is the user's and may be anything."""
    try:
        value = batch.loss(outputs, batch.y.to(outputs.device))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise InputError(
            f"The loss fails for outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(batch.y.shape)}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.dim():
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"The loss must be one number, a tensor without dimensions; found {kind}.")
    if not bool(torch.isfinite(value)):
        raise InputError(f"The loss of these data is {float(value)}: outputs or targets leave its range.")
    return value if value.requires_grad else value + 0 * outputs.sum()


@torch.enable_grad()
def loss_sensitivity(
    network: Network,
    batches: Batch | Sequence[Batch],
    *,
    vectors: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Score ½θ_i²·H_ii, the loss sensitivity of optimal brain damage, with H_ii estimated by z ⊙ Hz (appendix E).

    H is the Hessian of the loss and z a vector of independent signs (Hutchinson's estimator of the diagonal). The exact score
    is invariant under rescaling; the estimate with finitely many vectors is not. The paper uses one vector and one batch;
    several batches and vectors are averaged here.

    Args:
        network: The network.
        batches: One batch or several.
        vectors: Vectors per batch.
        generator: Source of randomness, on the CPU; PyTorch's own when None.

    Returns:
        Name to scores, for every parameter that can be pruned; of either sign.

    Raises:
        InputError: A batch is malformed, or ``vectors`` is not positive.
        NumericalError: A weight is NaN or infinite.

    References:
        LeCun, Denker, Solla, "Optimal brain damage", NeurIPS 1989; Bekas, Kokiopoulou, Saad, "An estimator for the diagonal
        of a matrix", Applied Numerical Mathematics 2007.
    """
    if isinstance(vectors, bool) or not isinstance(vectors, int) or vectors < 1:
        raise InputError(f"vectors must be a positive whole number, found {vectors!r}.")
    several = [batches] if isinstance(batches, Batch) else list(batches)
    if not several:
        raise InputError("loss_sensitivity needs at least one batch.")
    total: dict[str, Tensor] = {}
    for batch in several:
        loss = _Loss(network, batch)
        gradient = loss.gradient(again=True)
        for _ in range(vectors):
            signs = [(torch.randint(2, leaf.shape, generator=generator) * 2 - 1).to(leaf) for leaf in loss.leaves.values()]
            product = loss.hessian_times(gradient, signs)
            scores = [
                towards * leaf * sign / (2 * vectors * len(several))
                for towards, leaf, sign in zip(loss.times(product), loss.leaves.values(), signs, strict=True)
            ]
            for name, score in loss.named(scores).items():
                total[name] = total[name] + score if name in total else score
    return total


@torch.enable_grad()
def snip(network: Network, batch: Batch) -> dict[str, Tensor]:
    """Score |θ_i·∂L/∂θ_i|; invariant under rescaling.

    Args:
        network: The network.
        batch: Data and loss.

    Returns:
        Name to scores, for every parameter that can be pruned.

    Raises:
        InputError: The batch is malformed.
        NumericalError: A weight is NaN or infinite.

    References:
        Lee, Ajanthan, Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019.
    """
    loss = _Loss(network, batch)
    return loss.named([along.abs() for along in loss.times(loss.gradient())])


@torch.enable_grad()
def grasp(network: Network, batch: Batch) -> dict[str, Tensor]:
    """Score θ_i·(Hg)_i with g the gradient and H the Hessian of the loss: what keeps the gradient flowing stays.

    It is minus the score of the paper, which prunes the largest. Not invariant: a rescaling
    multiplies the connections H_ij·g_j of one sum by different factors.

    Args:
        network: The network.
        batch: Data and loss.

    Returns:
        Name to scores, for every parameter that can be pruned; of either sign.

    Raises:
        InputError: The batch is malformed.
        NumericalError: A weight is NaN or infinite.

    References:
        Wang, Zhang, Grosse, "Picking winning tickets before training by preserving gradient flow", ICLR 2020.
    """
    loss = _Loss(network, batch)
    gradient = loss.gradient(again=True)
    product = loss.hessian_times(gradient, [g.detach() for g in gradient])
    return loss.named(loss.times(product))


@torch.enable_grad()
def fisher(network: Network, batch: Batch) -> dict[str, Tensor]:
    """Score ½θ_i²·F_ii with F_ii the mean over the samples of (∂L/∂θ_i)², the diagonal of the empirical Fisher matrix.

    Invariant under rescaling. One backward pass per sample.

    Args:
        network: The network.
        batch: Data and loss.

    Returns:
        Name to scores, for every parameter that can be pruned.

    Raises:
        InputError: The batch is malformed.
        NumericalError: A weight is NaN or infinite.

    References:
        Theis, Korshunova, Tejani, Huszár, "Faster gaze prediction with dense networks and Fisher pruning", 2018.
    """
    total: dict[str, Tensor] = {}
    for single in batch.split(1):
        loss = _Loss(network, single)
        scores = [along.square() / (2 * len(batch)) for along in loss.times(loss.gradient())]
        for name, score in loss.named(scores).items():
            total[name] = total[name] + score if name in total else score
    return total
