"""Channels that are tied to each other, told by Torch-Pruning, and their removal for good (extra ``torch-pruning``).

A channel is made by slices of some weights and read by slices of others; what adds up (a residual stream), what is laid side
by side and what a depthwise convolution passes on is tied. Torch-Pruning traces a copy of the model and says what belongs
together. It names layers; what is a weight of the theory, and whether a path runs through it, the network itself says.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pathlift.errors import InputError, one_line
from pathlift.reading.examples import Examples
from pathlift.storage.packages import MissingPackageError

try:
    import torch_pruning
    from torch_pruning.dependency import Group as Dependencies
    from torch_pruning.pruner import function
except ImportError as error:
    raise MissingPackageError("torch_pruning", "torch-pruning", error) from error

READ = {function.prune_conv_in_channels, function.prune_linear_in_channels}
MADE = {function.prune_conv_out_channels, function.prune_linear_out_channels, function.prune_depthwise_conv_out_channels}
"""How Torch-Pruning names the removal of what reads a channel, and of what makes it."""

OUTPUTS = "they are outputs of the network"


@dataclass(frozen=True, eq=False)
class Slices:
    """Slices of one weight that go with channels.

    Attributes:
        layer: Path of the module.
        weight: Name of its weight.
        dim: Dimension of its weight.
        index: Which slices.
        channels: To which channel of the group each belongs.
    """

    layer: str
    weight: str
    dim: int
    index: Tensor
    channels: Tensor


@dataclass(frozen=True, eq=False)
class TiedChannels:
    """Channels of some layers, of which the first ones go together, the second ones, and so on.

    Attributes:
        layer: Path of the first layer that makes them.
        size: How many there are.
        made: Slices of the weights that make them.
        read: Slices of the weights that read them.
        fixed: Why none of them can go; empty when they can.
    """

    layer: str
    size: int
    made: tuple[Slices, ...]
    read: tuple[Slices, ...]
    fixed: str


class Ties:
    """The tied channels of a model that may be changed."""

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        parts: Container[str] = (),
        weights: Mapping[str, tuple[str, bool]] | None = None,
    ) -> None:
        """Trace the model.

        Args:
            model: A copy of the user's.
            examples: Its inputs.
            parts: Names of parameters that are parts of others, or have such parts.
            weights: Path of a layer to another name of its weight, and whether it is the transpose under that name.

        Raises:
            InputError: Torch-Pruning cannot follow the model.
        """
        self.model = model
        self._parts = parts
        self._weights = weights or {}
        self._paths = {module: path for path, module in model.named_modules()}
        owners = Counter(
            id(tensor) for module in model.modules() for tensor in module._parameters.values() if tensor is not None
        )
        self._shared = {tensor for tensor, count in owners.items() if count > 1}
        with _traced(model, "follow"):
            self._graph = torch_pruning.DependencyGraph().build_dependency(
                model, examples.tensors, forward_fn=lambda traced, _: examples.run(traced), verbose=False
            )
            found = list(self._graph.get_all_groups(root_module_types=(_ConvNd, nn.Linear)))
        self._roots = {self._paths[group[0].dep.target.module]: group for group in found}
        self.groups = [self._group(path, group) for path, group in self._roots.items()]

    def _group(self, path: str, group: Dependencies) -> TiedChannels:
        made: list[Slices] = []
        read: list[Slices] = []
        reasons: list[str] = []
        for item in group:
            layer, handler = item.dep.target.module, item.dep.handler
            reasons.append(self._reason(layer, item.dep.target))
            if handler in MADE | READ and layer in self._paths:
                reading = handler in READ
                transposed = isinstance(layer, _ConvNd) and layer.transposed
                index, channels = (torch.tensor(numbers, device="cpu") for numbers in (item.idxs, item.root_idxs))
                found = self._paths[layer]
                name, turned = self._weights.get(found, (f"{found}.weight".lstrip("."), False))
                if int(index.max()) >= layer.weight.shape[reading ^ transposed]:  # of a group alone, or told wrongly
                    reasons.append(f"Torch-Pruning finds channels in '{found}' that it has not")
                    continue
                dim = int(reading ^ transposed ^ turned)
                (read if reading else made).append(Slices(found, name, dim, index, channels))
        if not read:
            reasons.append(OUTPUTS)
        return TiedChannels(path, len(group[0].idxs), tuple(made), tuple(read), next(filter(None, reasons), ""))

    def _reason(self, layer: nn.Module, node: Any) -> str:
        """Say why nothing can be removed from a layer; empty when it can."""
        if node.type == torch_pruning.ops.OPTYPE.PARAMETER:
            return "a parameter that belongs to no layer of a kind that can be cut weighs them"
        path = self._paths.get(layer)
        if path is None:  # an operator between the layers
            return OUTPUTS if isinstance(layer, torch_pruning.ops._OutputOp) else ""
        tensors = [*layer.parameters(), *layer.buffers()]
        if not isinstance(layer, (_ConvNd, nn.Linear, _BatchNorm, nn.PReLU)):
            return f"'{path}' is a {type(layer).__name__}, which is not cut" if tensors else ""
        if "weight" not in layer._parameters:
            return f"'{path}' computes its weight from other parameters"
        names = (f"{path}.{name}".lstrip(".") for name, _ in layer.named_parameters())
        if any(id(tensor) in self._shared for tensor in tensors) or any(name in self._parts for name in names):
            return f"'{path}' shares memory with another parameter"
        if isinstance(layer, _ConvNd) and layer.groups > 1 and not layer.groups == layer.in_channels == layer.out_channels:
            return f"'{path}' is a convolution in {layer.groups} groups, which can lose channels only in equal numbers"
        return ""

    def remove(self, channels: Mapping[str, Tensor]) -> None:
        """Remove channels, and all that is tied to them, from the model itself.

        Args:
            channels: Path of the first layer of a group to the numbers of its channels, not all of them.

        Raises:
            InputError: Torch-Pruning cannot.
        """
        trainable = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        with _traced(self.model, "cut"):
            for path, numbers in channels.items():
                root = self._roots[path][0].dep
                group = self._graph.get_pruning_group(root.target.module, root.handler, numbers.tolist())
                if not self._graph.check_pruning_group(group):
                    raise InputError(f"All channels that '{path}' is tied to would go.")
                group.prune()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trainable[name])


@contextlib.contextmanager
def _traced(model: nn.Module, what: str) -> Iterator[None]:
    """Let Torch-Pruning work on a model, whose modes and gradients it uses; what it cannot do becomes one sentence."""
    modes = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in trainable:
        parameter.requires_grad_(parameter.dtype.is_floating_point)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:  # what it does with a model that it was not made for is not ours to foresee
        raise InputError(f"Torch-Pruning cannot {what} this model: {one_line(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, wanted in trainable.items():
            parameter.requires_grad_(wanted)
