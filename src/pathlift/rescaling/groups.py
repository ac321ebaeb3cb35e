"""Rescaling symmetries of a network: the groups of channels that share a factor, and what one does with them (mathematics §7).

`symmetries` finds them from the operators' rules alone. A rescaling multiplies the activation of each neuron by a positive
factor and leaves the function as it is; the factors of a network are a vector λ with one positive number per group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pathlift.arguments import public, public_constructor
from pathlift.arguments.common import Randomness, source_of
from pathlift.budget import limited
from pathlift.errors import InputError
from pathlift.graph.network import Network
from pathlift.passes.propagate import blame
from pathlift.precision import plainly
from pathlift.reading import Inputs, capture, verify
from pathlift.rescaling import gauges
from pathlift.rescaling.constraints import ScaleConstraints, scale_constraints
from pathlift.rescaling.factors import Factors, by_group, by_module
from pathlift.rescaling.families import Family, Pinned, axes_text, families_of, group_of, pinned_by
from pathlift.rescaling.states import BalancedState, RescaledState, multiplied
from pathlift.results import Result


@public_constructor
@dataclass(frozen=True, eq=False, repr=False)
class Symmetries(Result, line=("dimension", "network"), shows=("dimension", "families", "pinned"), rows=("families",)):
    """The group of positive neuron-wise rescalings of a network; ``len`` is its dimension.

    A group is a set of channels that must share one factor λ, because they are added, concatenated and read together,
    normalised, pooled or computed by one weight. Batch norm has two factors, one for its input and one for its output. Where
    one weight is used several times, the factor of a channel may be a product of powers of the groups' factors. Channels
    that no output depends on are in no group.

    Attributes:
        network: The captured network.
    """

    network: Network

    @property
    def constraints(self) -> ScaleConstraints:
        """What the function of the network asks of the scales of its neurons."""
        with plainly():  # the graph remembers them
            return scale_constraints(self.network)

    @property
    def dimension(self) -> int:
        """The number of groups: of factors that can be chosen."""
        return self.constraints.solution.dimension

    def __len__(self) -> int:
        """Return the dimension."""
        return self.dimension

    def __str__(self) -> str:
        """Return a table of families of groups and of pinned channels."""
        lines = [f"{len(self)} rescaling groups"]
        for family in self.families:
            lines.append(f"  {len(family.groups):>6} × λ   multiplies {axes_text(family.multiplied)}")
            lines += [f"               divides    {axes_text(family.divided)}"] if family.divided else []
        for pinned in self.pinned:
            lines.append(f"  {len(pinned.channels):>6} pinned {pinned.module}: {pinned.reason}")
        return "\n".join(lines)

    @public
    def at(self, state: Mapping[str, Tensor]) -> Symmetries:
        """Return the symmetries of the same graph with other parameters.

        Args:
            state: Parameters and buffers by canonical name, as complete as ``network.state``.

        Returns:
            The symmetries; nothing is looked for again.
        """
        return Symmetries(replace(self.network, state=dict(state)))

    # ---- what there is

    @property
    def families(self) -> tuple[Family, ...]:
        """The groups, put together by the tensors and axes that they scale."""
        return families_of(self.constraints, self.network)

    @property
    def pinned(self) -> tuple[Pinned, ...]:
        """Channels of modules whose factor must be 1, and why."""
        return pinned_by(self.constraints)

    @public
    def channel_groups(self, module: str) -> tuple[int | None, ...]:
        """Return the group of each output channel of a module.

        Args:
            module: Path of a convolution, linear layer or batch norm.

        Returns:
            Group numbers; None for a channel that is pinned, or whose factor is a product of several.

        Raises:
            InputError: There is no such module.
        """
        solution = self.constraints.solution
        return tuple(group_of(solution, label) for label in self._channels(module).tolist())

    def _channels(self, module: str) -> Tensor:
        if module not in self.constraints.channels:
            known = ", ".join(list(self.constraints.channels)[:5])
            raise InputError(f"No module '{module}' with channels is captured. There are: {known} …")
        return self.constraints.channels[module]

    # ---- rescalings

    @public
    def rescale(self, factors: Factors) -> RescaledState:
        """Return the parameters θ' = λ∘θ of the same function.

        A weight from channel u to channel v is multiplied by λ_v/λ_u, a bias by λ_v; a batch norm with λ on its input and μ
        on its output gets running_mean·λ, weight·μ/λ and bias·μ and keeps running_var. Factors that are powers of two change
        no digit.

        Args:
            factors: See `Factors`; each positive and finite.

        Returns:
            A new state-dict; the model is not changed.

        Raises:
            InputError: A factor is not positive and finite, there are too many or too few, a channel is pinned, or a weight
                would leave the range of its type.
            NumericalError: A weight is NaN or infinite.
        """
        return self._made(torch.log2(self._checked(factors)))

    @public
    def randomize(
        self,
        choices: Sequence[float] | None = None,
        generator: Randomness | None = None,
        *,
        sigma: float = 1.0,
    ) -> RescaledState:
        """Rescale by random factors.

        Args:
            choices: Draw each factor from these with equal chances; None for log-normal factors exp(sigma·N(0, 1)).
            generator: Source of randomness, on the CPU, or a seed; PyTorch's own when None.
            sigma: Standard deviation of log λ.

        Returns:
            A new state-dict.

        Raises:
            InputError: A choice is not positive and finite, or there is none; see also `rescale`.
        """
        source = source_of(generator)
        if choices is None:
            logs = torch.randn(len(self), dtype=torch.float64, generator=source, device="cpu") * (sigma / math.log(2.0))
            return self._made(logs)
        values = torch.as_tensor(list(choices), dtype=torch.float64, device="cpu")
        drawn = values[torch.randint(len(values), (len(self),), generator=source, device="cpu")]
        return self._made(torch.log2(drawn))

    @public
    def normalize(self) -> RescaledState:
        """Return the normal form by path activations: the largest one of each group is 1.

        In a network whose channels each have one path activation (perceptrons, and all networks whose images have one
        pixel) this is N(θ): every hidden neuron's incoming weights and bias have ℓ¹ norm 1. In a convolutional network,
        where N(θ) has other weights at every position, it is the representative with one factor per channel that is
        nearest to it: no path activation exceeds 1 and each group attains 1. It is the same from every start in the orbit.

        Returns:
            A new state-dict. A group without path activation (dead) keeps its scale.

        Raises:
            InputError: A weight would leave the range of its type: the last layer takes up the whole path-norm, which is 10⁷⁶
                for a ResNet-50. Convert the model to float64 first.
            NumericalError: A weight is NaN or infinite.
        """
        verify(self.network)
        return self._made(gauges.normal(self.network, self.constraints))

    @public
    def balance(self, p: float = 2.0, *, seconds: float | None = None) -> BalancedState:
        """Return the representative with the smallest Σ|θ_i|^p over all parameters.

        The sum is strictly convex in log λ, so the representative is unique. Running means are no parameters and not in
        the sum. Weights on no path of non-zero weights do not count, and groups that have only such weights keep their
        scale.

        Args:
            p: Positive power.
            seconds: Time to spend; when it is up, the best representative so far is returned, ``stopped``, with the
                imbalance that it has. None: no limit.

        Returns:
            A new state-dict, with a certificate.

        Raises:
            InputError: ``p`` is not a positive finite number.
        """
        verify(self.network)
        with limited(seconds):
            gauge = gauges.balance(self.network, self.constraints, p)
        return BalancedState(self.network, self._rescaled(gauge.free), gauge)

    @public
    def equalize(self, *, seconds: float | None = None) -> RescaledState:
        """Equalise weight ranges before quantisation with one step size per tensor (Nagel et al., 2019).

        Every channel of a weight of two or more dimensions gets the same largest magnitude where it comes in as where it
        goes out; a channel whose outgoing weights are none (a batch norm follows) gets the range of its tensor. It needs
        no pattern of layers.

        Args:
            seconds: Time to spend; when it is up, the best representative so far is returned, ``stopped``. None: no limit.

        Returns:
            A new state-dict.
        """
        verify(self.network)
        with limited(seconds):
            logs, stopped = gauges.equalized(self.network, self.constraints)
        return RescaledState(self.network, self._rescaled(logs), torch.exp2(logs), stopped=stopped)

    @public
    def condition(self, *, seconds: float | None = None) -> BalancedState:
        """Rescale as path-conditioned training does before (or between) training steps (Lebeurrier, Vayer, Gribonval 2026).

        With G = ∂Φᵀ∂Φ, the kernel of the path-lifting on parameters, it minimises the log-det (Burg) Bregman divergence
        between diag(G), up to a common factor, and the identity: n·log Σ_i G_ii·λ_i^−2 + 2·Σ_i log λ_i over the
        rescalings, where λ_i is the factor of weight i and n the number of weights with G_ii > 0. Convex in log λ.

        Args:
            seconds: As for `balance`.

        Returns:
            A new state-dict, with a certificate.
        """
        verify(self.network)
        with limited(seconds):
            gauge = gauges.conditioned(self.network, self.constraints)
        return BalancedState(self.network, self._rescaled(gauge.free), gauge)

    # ---- checking and applying

    def _checked(self, factors: Factors) -> Tensor:
        """Return λ by group."""
        if isinstance(factors, Mapping):
            return by_module(factors, self.channel_groups, self.pinned, len(self))
        return by_group(factors, len(self))

    def _made(self, logs: Tensor) -> RescaledState:
        return RescaledState(self.network, self._rescaled(logs), torch.exp2(logs))

    @public
    def weight_factors(self, factors: Factors) -> dict[str, Tensor]:
        """Return what a rescaling multiplies each weight with.

        Args:
            factors: See `Factors`.

        Returns:
            Name of each tensor that takes part to a float64 tensor of its shape, on the CPU.

        Raises:
            InputError: A factor is not positive and finite, there are too many or too few, or a channel is pinned.
        """
        verify(self.network)
        return {name: torch.exp2(logs) for name, logs in self._weight_logs(torch.log2(self._checked(factors)))}

    def _weight_logs(self, logs: Tensor) -> Iterator[tuple[str, Tensor]]:
        scales = self.constraints.solution.scales(logs)
        for name, scaling in self.constraints.scalings.items():
            yield name, scaling.logs(scales, self.network.state[name].shape)

    def _rescaled(self, logs: Tensor) -> dict[str, Tensor]:
        """Return the parameters and buffers rescaled by 2^logs."""
        network = self.network
        verify(network)
        blame(network.values())
        state = dict(network.state)
        for name, weight_logs in self._weight_logs(logs):
            state[name] = multiplied(name, network.state[name].detach(), weight_logs)
        return state


@public
def symmetries(model: nn.Module | Network, inputs: Inputs | None = None, *, seconds: float | None = None) -> Symmetries:
    """Find the positive neuron-wise rescalings that leave the function of a network as it is.

    Args:
        model: A module, or a captured `Network`.
        inputs: As for `capture`; not needed for a Network.
        seconds: Time to spend on the search, None for no limit. It is nearly linear in the neurons and weights.

    Returns:
        The groups. Printing them gives a table.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: ``inputs`` is malformed.
        OutOfTimeError: The seconds are over: groups that are half known are no answer.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> groups = symmetries(model, (2,))
        >>> len(groups)
        3
        >>> _ = model.load_state_dict(groups.rescale([1.0, 128.0, 0.5]))
    """
    network = capture(model, inputs)
    with limited(seconds):
        scale_constraints(network)
    return Symmetries(network)
