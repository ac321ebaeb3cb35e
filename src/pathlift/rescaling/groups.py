"""Rescaling symmetries of a network: the groups of channels that share a factor, and what one does with them (SPEC §7).

`symmetries` finds them from the operators' rules alone. A rescaling multiplies the activation of each neuron by a positive
factor and leaves the function as it is; the factors of a network are a vector λ with one positive number per group.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pathlift.arguments import public, public_constructor
from pathlift.budget import limited
from pathlift.errors import InputError, MismatchError, name_differences
from pathlift.graph.network import Network
from pathlift.passes.propagate import blame
from pathlift.precision import plainly
from pathlift.reading import Inputs, capture, verify
from pathlift.reading.freeze import cloned
from pathlift.reading.wrappers import names_of
from pathlift.rescaling import gauges
from pathlift.rescaling.constraints import VARYING, Tied, tied
from pathlift.rescaling.relations import FIXED, NOTHING, Solution
from pathlift.results import Result

Factors: TypeAlias = Tensor | Sequence[float] | Mapping[str, Tensor | Sequence[float] | float]
"""One positive number per group; or module name to one per output channel, for as many modules as wanted."""


class RescaledState(Result, dict[str, Tensor]):
    """A state-dict of the same function: what `load_state_dict` takes.

    Attributes:
        factors: λ by which the network was rescaled, float64, shape (groups,).
        stopped: The seconds that the call was given were over before the best factors were found; the function is the same.
    """

    def __init__(self, network: Network, state: Mapping[str, Tensor], factors: Tensor, *, stopped: bool = False) -> None:
        """Name the tensors as the model's state-dict does.

        Args:
            network: The network whose state it is.
            state: Parameters and buffers by canonical name.
            factors: λ.
            stopped: Whether the search for them was cut short.
        """
        named = network.named(state)
        super().__init__({name: own.detach().clone() for name, own in named.items() if name in network.graph.saved})
        self._metadata = dict(network.graph.versions)  # what load_state_dict asks for
        self.factors = factors
        self.stopped = stopped

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the plain state-dict that it is, which ``torch.load`` reads with ``weights_only``.

        Returns:
            An ordered dictionary; ``factors`` are left behind.
        """
        return OrderedDict, (), {"_metadata": self._metadata}, None, iter(self.items())

    def __copy__(self) -> RescaledState:
        """Return the same tensors, with ``factors`` and all else that it knows."""
        made = type(self).__new__(type(self))
        made.update(self)
        vars(made).update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> RescaledState:
        """Copy all of it, ``factors`` too."""
        made = memo[id(self)] = self.__copy__()
        made.update(copy.deepcopy(dict(self), memo))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made


class BalancedState(RescaledState):
    """A rescaled state at the minimum of a convex function of log λ.

    Attributes:
        imbalance: The certificate: the largest |∂F/∂log λ| of a group, relative to the sum of the terms of F that its factor
            changes. It is 0 at the minimum and nowhere else.
        left: Numbers of the groups that have no finite optimum and keep their scale: no path of non-zero weights runs through
            them, or the network divides by a parameter of theirs, which can shrink with what it divides.
        steps: Newton steps.
    """

    def __init__(self, network: Network, state: Mapping[str, Tensor], gauge: gauges.Gauge) -> None:
        """Name the tensors as the model's state-dict does.

        Args:
            network: The network whose state it is.
            state: Parameters and buffers by canonical name.
            gauge: How they were found.
        """
        super().__init__(network, state, torch.exp2(gauge.free), stopped=gauge.stopped)
        self.imbalance = gauge.imbalance
        self.left = gauge.left
        self.steps = gauge.steps


@dataclass(frozen=True, repr=False)
class Family(Result):
    """Groups that scale the same axes of the same tensors, each its own channel.

    Attributes:
        groups: Their numbers.
        multiplied: Tensor and axis whose entries are multiplied by λ; axis None for a power of λ, entry by entry.
        divided: Tensor and axis whose entries are divided by λ.
    """

    groups: tuple[int, ...]
    multiplied: tuple[tuple[str, int | None], ...]
    divided: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True, repr=False)
class Pinned(Result):
    """Output channels of a module whose factor must be 1.

    Attributes:
        module: Path of the module.
        channels: Their numbers.
        reason: The operator, input or output that fixes them.
    """

    module: str
    channels: tuple[int, ...]
    reason: str


@public_constructor
@dataclass(frozen=True, eq=False, repr=False)
class Symmetries(Result, line=("dimension", "network"), shows=("dimension", "families", "pinned")):
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
    def tied(self) -> Tied:
        """The relations between the neurons of the network."""
        with plainly():  # the network remembers them
            return tied(self.network)

    @property
    def dimension(self) -> int:
        """The number of groups: of factors that can be chosen."""
        return self.tied.solution.dimension

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
        relations = self.tied
        solution = relations.solution
        touched: dict[int, tuple[list[tuple[str, int | None]], list[tuple[str, int | None]]]] = {}
        by_class: dict[int, list[tuple[int, float]]] = {}
        for row, column, entry in zip(
            solution.rows.tolist(), solution.columns.tolist(), solution.entries.tolist(), strict=True
        ):
            by_class.setdefault(row, []).append((column, entry))
        for name, scaling in relations.scalings.items():
            axes = scaling.axes(self.network.state[name].shape)
            for classes, axis, side in ((scaling.above, axes[0], 0), (scaling.below, axes[1], 1)):
                for number in torch.unique(classes).tolist():
                    for column, entry in by_class.get(number, []):
                        place = (side if entry > 0 else 1 - side, axis if abs(entry) == 1.0 else None)
                        own = touched.setdefault(column, ([], []))[place[0]]
                        if (name, place[1]) not in own:
                            own.append((name, place[1]))
        families: dict[tuple[tuple[tuple[str, int | None], ...], ...], list[int]] = {}
        for group in range(len(self)):
            up, down = touched.get(group, ([], []))
            families.setdefault((tuple(up), tuple(down)), []).append(group)
        return tuple(Family(tuple(groups), up, down) for (up, down), groups in families.items())

    @property
    def pinned(self) -> tuple[Pinned, ...]:
        """Channels of modules whose factor must be 1, and why."""
        relations = self.tied.relations
        why = relations.why_fixed()
        found: list[Pinned] = []
        for module, labels in self.tied.channels.items():
            classes = relations.find(labels.clamp(min=0))
            reasons: dict[str, list[int]] = {}
            for channel, (own, label, reason) in enumerate(zip(classes.tolist(), labels.tolist(), why(labels), strict=True)):
                if label == NOTHING:
                    reasons.setdefault("no output depends on it", []).append(channel)
                elif own == FIXED:
                    reasons.setdefault(reason or "it only hands on the input", []).append(channel)
            found += [Pinned(module, tuple(channels), reason) for reason, channels in reasons.items()]
        return tuple(found)

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
        solution = self.tied.solution
        return tuple(_group_of(solution, label) for label in self._channels(module).tolist())

    def _channels(self, module: str) -> Tensor:
        if module not in self.tied.channels:
            known = ", ".join(list(self.tied.channels)[:5])
            raise InputError(f"No module '{module}' with channels is captured. There are: {known} …")
        return self.tied.channels[module]

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
        generator: torch.Generator | None = None,
        *,
        sigma: float = 1.0,
    ) -> RescaledState:
        """Rescale by random factors.

        Args:
            choices: Draw each factor from these with equal chances; None for log-normal factors exp(sigma·N(0, 1)).
            generator: Source of randomness, on the CPU; PyTorch's own when None.
            sigma: Standard deviation of log λ.

        Returns:
            A new state-dict.

        Raises:
            InputError: A choice is not positive and finite, or there is none; see also `rescale`.
        """
        if choices is None:
            logs = torch.randn(len(self), dtype=torch.float64, generator=generator, device="cpu") * (sigma / math.log(2.0))
            return self._made(logs)
        values = torch.as_tensor(list(choices), dtype=torch.float64, device="cpu")
        drawn = values[torch.randint(len(values), (len(self),), generator=generator, device="cpu")]
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
        return self._made(gauges.normal(self.network, self.tied))

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
            gauge = gauges.balance(self.network, self.tied, p)
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
            logs, stopped = gauges.equalized(self.network, self.tied)
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
            gauge = gauges.conditioned(self.network, self.tied)
        return BalancedState(self.network, self._rescaled(gauge.free), gauge)

    # ---- checking and applying

    def _checked(self, factors: Factors) -> Tensor:
        if isinstance(factors, Mapping):
            return self._by_module(factors)
        values = torch.as_tensor(factors, dtype=torch.float64, device="cpu").detach().cpu()
        if tuple(values.shape) != (len(self),):
            raise InputError(f"factors must have shape ({len(self)},), one per group, found {tuple(values.shape)}.")
        _positive(values, "factors")
        return values

    def _by_module(self, factors: Mapping[str, Tensor | Sequence[float] | float]) -> Tensor:
        out = torch.ones(len(self), dtype=torch.float64, device="cpu")
        source: dict[int, str] = {}
        reasons = {(own.module, channel): own.reason for own in self.pinned for channel in own.channels}
        for module, given in factors.items():
            groups = self.channel_groups(module)
            values = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach().cpu()
            if values.dim() > 1 or (values.dim() == 1 and len(values) != len(groups)):
                raise InputError(f"'{module}' has {len(groups)} channels, found factors of shape {tuple(values.shape)}.")
            _positive(values.reshape(-1), f"factors['{module}']")
            for channel, (group, value) in enumerate(zip(groups, values.expand(len(groups)).tolist(), strict=True)):
                place = f"channel {channel} of '{module}'"
                if group is None and value != 1.0:
                    reason = reasons.get((module, channel), "its factor is not free: it follows from several groups")
                    raise InputError(f"{place} is pinned ({reason}); its factor must be 1, found {value}.")
                if group is None:
                    continue
                if group in source and float(out[group]) != value:
                    raise InputError(f"{place} shares its factor with {source[group]}: found {value} and {float(out[group])}.")
                out[group], source[group] = value, place
        return out

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
        relations = self.tied
        scales = relations.solution.scales(logs)
        for name, scaling in relations.scalings.items():
            yield name, scaling.join(scales[scaling.above] - scales[scaling.below], self.network.state[name].shape)

    def _rescaled(self, logs: Tensor) -> dict[str, Tensor]:
        """Return the parameters and buffers rescaled by 2^logs."""
        network = self.network
        verify(network)
        blame(network.values())
        state = dict(network.state)
        for name, own in self._weight_logs(logs):
            state[name] = _multiplied(name, network.state[name].detach(), own)
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
        tied(network)
    return Symmetries(network)


@public
def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with other parameters.

    Args:
        model: Any module; not changed.
        state: A state-dict of it.

    Returns:
        The copy. Wrappers that compile, scatter or synchronise become plain modules of the same names.

    Raises:
        MismatchError: A name or a shape is not the model's.
    """
    made = cloned(model)
    own = made.state_dict()
    found = names_of(own, state, inside=False)
    missing, surplus = [name for name in own if name not in found], [name for name in found if name not in own]
    if missing or surplus:
        raise MismatchError(f"The state-dict does not fit the model. {name_differences(missing, surplus, 'the model')}.")
    named = OrderedDict(found)
    vars(named)["_metadata"] = getattr(own, "_metadata", {})  # versions, which some modules ask for
    try:
        made.load_state_dict(named)
    except RuntimeError as error:
        raise MismatchError(f"The state-dict does not fit the model. {' '.join(str(error).split())}") from error
    return made


def _group_of(solution: Solution, label: int) -> int | None:
    if label in (VARYING, NOTHING):
        return None
    number = int(solution.classes[label])
    (places,) = torch.nonzero(solution.rows == number, as_tuple=True)
    single = number > 0 and len(places) == 1 and float(solution.entries[places[0]]) == 1.0
    return int(solution.columns[places[0]]) if single else None


def _positive(values: Tensor, what: str) -> None:
    bad = ~(torch.isfinite(values) & (values > 0))
    if bool(bad.any()):
        place = int(bad.nonzero()[0, 0])
        raise InputError(f"{what} must be positive and finite, found {float(values[place])} at {place}.")


def _multiplied(name: str, tensor: Tensor, logs: Tensor) -> Tensor:
    """Return a parameter times 2^logs, in its own type; exact for whole logs."""
    factor = torch.exp2(logs).to(tensor.device)
    out = (tensor.double() * factor).to(tensor.dtype)
    lost = torch.isfinite(tensor) & (~torch.isfinite(out) | ((tensor != 0) & (out.abs() < torch.finfo(tensor.dtype).tiny)))
    lost &= tensor.abs() >= torch.finfo(tensor.dtype).tiny
    if bool(lost.any()):
        place = tuple(lost.nonzero()[0].tolist())
        raise InputError(
            f"'{name}'{list(place)} = {float(tensor[place])} times {float(factor[place]):.6g} is outside the range of "
            f"{str(tensor.dtype).removeprefix('torch.')}. Choose smaller factors, or convert the model to float64 first."
        )
    return out


def axes_text(places: tuple[tuple[str, int | None], ...]) -> str:
    """Write tensors and axes as they are indexed, at most six of them."""
    shown = [name if axis is None else f"{name}[{', '.join([':'] * axis + ['i'])}]" for name, axis in places[:6]]
    return ", ".join(shown) + (f" and {len(places) - 6} more" if len(places) > 6 else "")
