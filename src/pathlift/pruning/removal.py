"""Whole channels out of a network for good: a smaller network with the same paths (mathematics §4, §6).

A channel can go when no path of the network runs through it: what reads it reads it with weights that are 0, or nothing but 0
reaches what reads it. The smaller network then has the paths of the larger one and no others, so that ‖Φ‖₁ is the same and, by
Theorem 4.1, so is the function. A channel whose own weights are 0 may still put out a constant, its bias or the shift of its
batch norm; paths start there, and it stays unless nothing reads it. `pathlift.prune` with ``shrink=True`` therefore masks the
weights that read a channel along with those that make it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pathlift.arguments import public
from pathlift.errors import InputError, PathliftError, one_line
from pathlift.graph.compact import compacted
from pathlift.graph.expressions import Expression, FunctionCall, StateTensor, substitute
from pathlift.graph.layers import Layer
from pathlift.graph.network import Network
from pathlift.graph.origins import is_moved, moved_back
from pathlift.norm import path_norm
from pathlift.passes.forward import carried, feed_of, flat_outputs, forward, weighted
from pathlift.passes.propagate import in_forward_order
from pathlift.passes.rounding import rounding_factor
from pathlift.precision import without_autocast
from pathlift.pruning.onnx_layers import Layered
from pathlift.pruning.selection import Masks, Scores, kept_of
from pathlift.reading import Inputs, capture
from pathlift.reading.examples import Examples, examples_of
from pathlift.reading.freeze import cloned
from pathlift.results import Result
from pathlift.storage.onnx import OnnxModule

if TYPE_CHECKING:
    from pathlift.pruning.tied import Slices, TiedChannels, Ties

EQUAL = 1e-9
"""Outputs in float64 differ by no more than this, relative to the largest, when only the order of sums is another."""


@dataclass(frozen=True, repr=False)
class ShrunkLayer(Result):
    """A layer that lost channels.

    Attributes:
        name: Path of the module.
        before: How many channels it had.
        after: How many it has.
    """

    name: str
    before: int
    after: int


@dataclass(frozen=True, repr=False)
class ChannelsLeft(Result):
    """Channels whose own weights are 0 and that stay.

    Attributes:
        name: Path of the module.
        channels: Their numbers.
        reason: Why they stay.
    """

    name: str
    channels: tuple[int, ...]
    reason: str


@dataclass(frozen=True, repr=False)
class ShrinkReport(
    Result,
    line=("channels_removed", "parameters", "multiply_adds", "bytes", "log10_path_norm", "left"),
    rows=("layers",),
):
    """What became smaller.

    Attributes:
        layers: The layers that lost channels.
        left: Channels whose weights are 0 and that stay, with the reason.
        parameters: Number of parameters.
        parameters_before: The same before.
        multiply_adds: Products that convolutions and matrix products add up for one sample.
        multiply_adds_before: The same before.
        bytes: Size of the tensors of the state-dict, which a file of weights holds.
        bytes_before: The same before.
        log10_path_norm: log₁₀ ‖Φ‖₁, of both networks.
        deviation: By how much outputs of both, computed in float64 on random inputs, differ relative to the largest.
    """

    layers: tuple[ShrunkLayer, ...]
    left: tuple[ChannelsLeft, ...]
    parameters: int
    parameters_before: int
    multiply_adds: int
    multiply_adds_before: int
    bytes: int
    bytes_before: int
    log10_path_norm: float
    deviation: float

    @property
    def channels_removed(self) -> int:
        """Channels that went, those of tied layers counted in each."""
        return sum(layer.before - layer.after for layer in self.layers)


@public
def shrink(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, ShrinkReport]:
    """Remove every channel through which no path runs: a smaller network of the same function and path-norm.

    The smaller network is captured and compared with the model: outputs in float64 on random inputs, and path-norms.

    Args:
        model: A module, masked or not; not changed.
        inputs: As for `capture`.

    Returns:
        A copy with smaller layers, in the modes of the model, and what became smaller. Channels that are tied to each other,
        in a residual stream say, go together or stay; a layer keeps at least one. What does not run in eval mode (an auxiliary
        head) is left as it is.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: Torch-Pruning (extra ``torch-pruning``) is missing or cannot follow the model, or the forward pass of the
            model relies on a number of channels.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> _ = model[2].weight.data[:, :3].zero_()
        >>> smaller, report = shrink(model, (2,))
        >>> smaller[0], report.multiply_adds_before, report.multiply_adds
        (Linear(in_features=2, out_features=5, bias=True), 24, 15)
    """
    with without_autocast():
        network = capture(model, inputs)
        examples = examples_of(model, inputs)
        ties, made = _ties(model, examples, network)
        before, channels = _sizes(made(), examples), _channels(ties.model)
        dead = _dead(network, ties.groups)
        left = _left(network, ties.groups, dead)
        ties.remove({path: numbers for path, numbers in dead.items() if len(numbers)})
        smaller = made()
        shrunk = _captured(smaller, inputs)
        deviation = _compare(network, shrunk)
        remaining = _channels(ties.model)
        layers = tuple(
            ShrunkLayer(path, count, remaining[path]) for path, count in channels.items() if count != remaining[path]
        )
        after = _sizes(smaller, examples)
        norm = path_norm(shrunk).log10
    return smaller, ShrinkReport(
        layers,
        left,
        parameters=after[0],
        parameters_before=before[0],
        multiply_adds=after[1],
        multiply_adds_before=before[1],
        bytes=after[2],
        bytes_before=before[2],
        log10_path_norm=norm,
        deviation=deviation,
    )


def _ties(model: nn.Module, examples: Examples, network: Network) -> tuple[Ties, Callable[[], nn.Module]]:
    """Find the tied channels of a copy of a model.

    Args:
        model: The user's.
        examples: Its inputs.
        network: The captured network.

    Returns:
        The tied channels, and what returns the copy without those that were removed.

    Raises:
        InputError: It cannot be cut.
    """
    from pathlift.pruning.tied import Ties

    if isinstance(model, OnnxModule):
        layered = Layered(model, examples)
        return Ties(layered.model, examples, weights=layered.weights), layered.smaller
    copy = cloned(model)
    return Ties(copy, examples, _parts(network)), lambda: copy


def _parts(network: Network) -> set[str]:
    """Return every name of a parameter that views another one, or that is viewed."""
    parts = set(network.graph.views)

    def noted(expression: Expression) -> Expression:
        if isinstance(expression, StateTensor):
            parts.add(expression.name)
        if isinstance(expression, FunctionCall):
            substitute((expression.args, dict(expression.kwargs)), noted)
        return expression

    for view in network.graph.views.values():
        substitute(view, noted)
    return parts | {alias for alias, name in network.aliases.items() if name in parts}


# ------------------------------------------------------------------------------------------------------- which can go


@torch.no_grad()
def _live(network: Network) -> dict[str, Tensor]:
    """Return where a parameter stands on an edge that is there and starts at a neuron that a path reaches.

    Edges are counted, not weighed: nothing underflows.

    Args:
        network: The network, not compact.

    Returns:
        Name of each parameter that is itself a weight to bool tensor.
    """
    there = weighted(network.values(), dtype=torch.float32, transform=_there)
    live: dict[str, Tensor] = {}

    def step(layer: Layer, below: Mapping[str, Tensor]) -> Tensor:
        if layer.kind == "input":
            return torch.ones((1, *layer.shape), dtype=torch.float32, device=network.device)
        for position, connection in enumerate(layer.connections):
            weight = connection.weight
            if weight is not None and (isinstance(weight.expression, StateTensor) or is_moved(network, weight)):
                shape = layer.shape if layer.concat is None else layer.concat.shape(position, layer.shape)
                above = torch.ones(shape, dtype=torch.float32, device=network.device)
                x, weights = below[connection.source][0], there(weight)
                _, edges = connection.edges.adjoint(x, weights, above, below=False, share=True)
                assert edges is not None
                found = weight.expression
                direct = {found.name: edges} if isinstance(found, StateTensor) else None
                for name, share in (direct or moved_back(network, weight, edges)).items():
                    live[name] = live.get(name, torch.zeros_like(share, dtype=torch.bool)) | (share > 0.5)
        reached = carried(layer, below, there, biases=there)
        return (reached > 0.5).float()

    in_forward_order(network, step)
    return live


def _there(value: Tensor) -> Tensor:
    return (value != 0).float()


def _weight(network: Network, slices: Slices) -> str:
    """Return the canonical name of the weight of a layer."""
    return network.aliases.get(slices.weight, slices.weight)


def _any(tensor: Tensor, dim: int) -> Tensor:
    """Return which slices along a dimension hold something true."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1).any(1).cpu()


def _dead(network: Network, groups: Sequence[TiedChannels]) -> dict[str, Tensor]:
    """Find the channels that no path runs through and that can go: until no more are found, since what made them goes, too.

    Args:
        network: The network.
        groups: Its tied channels.

    Returns:
        First layer of a group to numbers of channels; of channels that are all dead the first stays.
    """
    dead = {group.layer: torch.zeros(group.size, dtype=torch.bool, device="cpu") for group in groups if not group.fixed}
    state = dict(network.state)
    while True:
        live = _live(replace(network, state=state))
        more = False
        for group in groups:
            if group.fixed or not all(_weight(network, slices) in live for slices in group.read):
                continue
            alive = torch.zeros(group.size, dtype=torch.bool, device="cpu")
            for slices in group.read:
                read = _any(live[_weight(network, slices)], slices.dim)[slices.index]
                alive[slices.channels[read]] = True
            if not bool(alive.any()):
                alive[0] = True
            if bool((~alive & ~dead[group.layer]).any()):
                more = True
                dead[group.layer] = ~alive
                _silence(network, state, group, ~alive)
        if not more:
            return {path: channels.nonzero()[:, 0] for path, channels in dead.items()}


def _silence(network: Network, state: dict[str, Tensor], group: TiedChannels, gone: Tensor) -> None:
    """Set what makes some channels to 0, in new tensors."""
    for slices in group.made:
        name = _weight(network, slices)
        index = slices.index[gone[slices.channels]].to(state[name].device)
        state[name] = state[name].detach().index_fill(slices.dim, index, 0.0)


def _left(network: Network, groups: Sequence[TiedChannels], dead: Mapping[str, Tensor]) -> tuple[ChannelsLeft, ...]:
    """Find the channels whose own weights are 0 and that stay, and say why."""
    left: dict[tuple[str, str], list[int]] = {}
    for group in groups:
        in_state = [slices for slices in group.made if _weight(network, slices) in network.state]
        gone = set(dead[group.layer].tolist()) if group.layer in dead else set()
        silent = [
            set(slices.index[~_any(network.state[_weight(network, slices)] != 0, slices.dim)[slices.index]].tolist())
            for slices in in_state
        ]
        for slices, numbers in zip(in_state, silent, strict=True):
            for number, channel in zip(slices.index.tolist(), slices.channels.tolist(), strict=True):
                if number not in numbers or channel in gone:
                    continue
                others = [
                    other.layer
                    for other, zero in zip(in_state, silent, strict=True)
                    if any(
                        index not in zero
                        for index, tied in zip(other.index.tolist(), other.channels.tolist(), strict=True)
                        if tied == channel
                    )
                ]
                left.setdefault((slices.layer, _why(group, others, len(gone))), []).append(number)
    return tuple(ChannelsLeft(layer, tuple(sorted(numbers)), reason) for (layer, reason), numbers in left.items())


def _why(group: TiedChannels, others: Sequence[str], gone: int) -> str:
    if group.fixed:
        return group.fixed
    if others:
        return f"tied to channels that '{others[0]}' makes"
    if gone == group.size - 1:
        return "a layer keeps at least one channel"
    return "they put out a constant, a bias or the shift of a batch norm, that others read"


# --------------------------------------------------------------------------------------------------- what became of it


def _captured(smaller: nn.Module, inputs: Inputs) -> Network:
    try:
        return capture(smaller, inputs)
    except PathliftError as error:
        raise InputError(
            "Without some of its channels the model does not run as before; its forward pass may rely on a number of channels "
            f"(view(-1, 512), say). {one_line(error)}"
        ) from error


def _compare(network: Network, shrunk: Network) -> float:
    """Make sure that the smaller network is the same function with the same path-norm.

    Args:
        network: The one before.
        shrunk: The smaller one.

    Returns:
        By how much outputs differ, relative to the largest.

    Raises:
        InputError: It is another function.
    """
    generator = torch.Generator().manual_seed(0)
    x = [
        torch.randn((2, *shape[1:]), generator=generator, dtype=torch.float64, device="cpu")
        if dtype.is_floating_point
        else torch.zeros((2, *shape[1:]), dtype=dtype, device="cpu")
        for shape, dtype in network.graph.examples
    ]
    samples = network.graph.form.filled(x)
    with torch.no_grad():
        outputs = [
            flat_outputs(each, forward(each, each.values(), feed_of(each, samples), torch.float64), 2)
            for each in (network, shrunk)
        ]
    norms = [path_norm(each).log10 for each in (network, shrunk)]
    allowed = sum(rounding_factor(compacted(each), each.dtype) for each in (network, shrunk))
    if outputs[0].shape == outputs[1].shape:
        largest = float(outputs[0].abs().max())
        deviation = float((outputs[0] - outputs[1]).abs().max()) / largest if largest else float(outputs[1].abs().max())
        equal = norms[0] == norms[1] or abs(norms[0] - norms[1]) * math.log(10) <= 2 * allowed
        if deviation <= EQUAL and equal:
            return deviation
    raise InputError(
        "Torch-Pruning follows the channels of this model otherwise than it computes: without those through which no path "
        "runs it would be another function."
    )


def _sizes(model: nn.Module, examples: Examples) -> tuple[int, int, int]:
    """Return the number of parameters, the multiply-adds for a sample and the bytes of the state-dict of a copy of a model."""
    modes = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:  # which stumbles over a parameter that a module is called with, if it takes gradients
        examples.run(model.eval().requires_grad_(False))
    for module, mode in modes.items():
        module.training = mode
    for parameter, wanted in trainable.items():
        parameter.requires_grad_(wanted)
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, counter.get_total_flops() // 2, sum(tensor.nbytes for tensor in tensors.values())


def _channels(model: nn.Module) -> dict[str, int]:
    """Return how many channels each layer makes."""
    attributes = ("out_channels", "out_features")
    made = (
        (path, getattr(layer, name)) for path, layer in model.named_modules() for name in attributes if hasattr(layer, name)
    )
    return dict(made)


# --------------------------------------------------------------------------------------------------- what shall go


class WholeChannels:
    """A selection of channels that go together, with all the weights that make or read them."""

    def __init__(self, network: Network, groups: Sequence[TiedChannels]) -> None:
        """Take the groups of which channels may go.

        Args:
            network: The network.
            groups: Tied channels.
        """
        self.network, self.groups = network, groups

    def __call__(self, scores: Scores, amount: float) -> Masks:
        """Select: channels with the smallest sum of scores of what makes them go first, as many as fit into the amount.

        Args:
            scores: Name to score, of the parameter's shape; −inf where a weight is gone already.
            amount: Share of the weights that goes.

        Returns:
            Name to mask.
        """
        sums = [self._sums(group, scores) for group in self.groups]
        for total in sums:
            total[total.argmax()] = math.inf  # a layer keeps one
        order = torch.cat(sums).argsort(stable=True)
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order), device="cpu")
        most = len(order) - len(sums)
        rank_of = self._by_slice(ranks.split([len(total) for total in sums]), scores, most)
        numbers = sum(score.numel() for score in scores.values())

        def gone(count: int) -> int:
            return numbers - sum(_stay(score, rank_of.get(name, {}), count) for name, score in scores.items())

        count = bisect_right(range(most + 1), numbers - kept_of(numbers, amount), key=gone) - 1
        return {name: _mask(score, rank_of.get(name, {}), count) for name, score in scores.items()}

    def _sums(self, group: TiedChannels, scores: Scores) -> Tensor:
        total, there = torch.zeros((2, group.size), dtype=torch.float64, device="cpu")
        for slices in group.made:
            rows = scores[_weight(self.network, slices)].movedim(slices.dim, 0).flatten(1).double()
            present = rows > -math.inf
            sums = torch.where(present, rows, 0.0).sum(1).cpu()[slices.index]
            total.index_add_(0, slices.channels, sums)
            there.index_add_(0, slices.channels, present.sum(1).double().cpu()[slices.index])
        return torch.where(there > 0, total, -math.inf)

    def _by_slice(self, ranks: Sequence[Tensor], scores: Scores, most: int) -> dict[str, dict[int, Tensor]]:
        """Return, for each dimension of a weight, which channels go before each slice does, as a rank in their order."""
        of: dict[str, dict[int, Tensor]] = {}
        for group, rank in zip(self.groups, ranks, strict=True):
            for slices in (*group.made, *group.read):
                name = _weight(self.network, slices)
                everything = torch.full((scores[name].shape[slices.dim],), most, dtype=torch.long, device="cpu")
                known = of.setdefault(name, {}).setdefault(slices.dim, everything)
                known.scatter_reduce_(0, slices.index, rank[slices.channels], "amin")
        return of


def _stay(score: Tensor, ranks: Mapping[int, Tensor], count: int) -> int:
    """Return how many weights of a tensor stay when the first channels go."""
    sides = [int((ranks[dim] >= count).sum()) if dim in ranks else size for dim, size in enumerate(score.shape)]
    return math.prod(sides)


def _mask(score: Tensor, ranks: Mapping[int, Tensor], count: int) -> Tensor:
    mask = torch.ones(score.shape, dtype=torch.bool, device=score.device)
    for dim, rank in ranks.items():
        stays = (rank >= count).to(score.device)
        mask &= stays.reshape([-1 if other == dim else 1 for other in range(score.dim())])
    return mask


def whole_channels(model: nn.Module | None, inputs: Inputs | None, network: Network, names: Sequence[str]) -> WholeChannels:
    """Find the channels of a model that may go.

    Args:
        model: The module.
        inputs: As for `capture`.
        network: The captured network.
        names: The parameters that may be pruned.

    Returns:
        The selection.

    Raises:
        InputError: There is no module, or no channel may go.
    """
    if model is None or inputs is None:
        raise InputError("shrink=True makes a smaller module: give the module and its inputs, not a Network.")
    groups = _ties(model, examples_of(model, inputs), network)[0].groups
    chosen = set(names)
    within = [
        group
        for group in groups
        if not group.fixed and all(_weight(network, slices) in chosen for slices in (*group.made, *group.read))
    ]
    if not within:
        reasons = sorted({group.fixed or "a weight that makes or reads them is not in the scope" for group in groups})
        reasons = reasons or [
            "Torch-Pruning removes channels of modules such as nn.Conv2d and nn.Linear, and the model has none"
        ]
        raise InputError(f"There is no channel that can go: {'; '.join(reasons)}.")
    return WholeChannels(network, within)
