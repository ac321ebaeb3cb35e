"""Models larger than memory, and many checkpoints of one model: the graph is captured once, weights come from disk.

A pass asks for the weights of a layer when it gets there, so `path_norm` and `path_magnitude` of a network with streamed
weights hold one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pathlift.arguments import declare, public
from pathlift.arguments.kinds import either, file
from pathlift.arguments.kinds import stream as stream_of
from pathlift.errors import MismatchError
from pathlift.graph.arguments import other as one_other
from pathlift.graph.network import LazyState, Network
from pathlift.metric.arguments import one_or_two
from pathlift.metric.metric import PathMetric, path_metric
from pathlift.norm import PathNorm, path_norm
from pathlift.reading import Inputs, capture
from pathlift.reading.second import Other, check_tensors, fit_to, other_state
from pathlift.storage.checkpoints import Checkpoint, checkpoint_paths

LIST = "modules, state-dicts or files of weights, in a list or another iterable"

several = either(LIST, ((str, Path), file), (object, stream_of(LIST, one_other)))

declare(__name__, {"others": several, "path_metrics.q": one_or_two})


class _OnDisk(LazyState):
    """The state of a network: tensors of a checkpoint, and buffers that no checkpoint holds."""

    def __init__(self, network: Network, checkpoint: Checkpoint) -> None:
        fitting = fit_to(network, checkpoint)
        fitting.tell(checkpoint.path)
        known = fitting.recipes
        aliases: dict[str, list[str]] = {}
        for alias, name in network.aliases.items():
            aliases.setdefault(name, []).append(alias)
        self.recipes = {
            name: next((known[key] for key in (name, *aliases.get(name, ())) if key in known), None) for name in network.state
        }
        self.checkpoint = checkpoint
        self.buffers = {name: network.state[name] for name, recipe in self.recipes.items() if recipe is None}
        check_tensors(network, {name: recipe(checkpoint.specs) for name, recipe in known.items()})
        needed = {name for weight in network.weights for name in weight.requires} | set(network.graph.baked)
        lost = sorted(name for name, tensor in self.buffers.items() if tensor.is_meta and name in needed)
        if lost:
            raise MismatchError(
                f"The buffer '{lost[0]}' is not in '{checkpoint.path}', and the model is on the meta device and has no value "
                "for it either. Save it with the checkpoint (persistent=True)."
            )
        for alias, name in network.aliases.items():
            if alias in known and name in known and not torch.equal(known[alias](checkpoint), known[name](checkpoint)):
                raise MismatchError(f"'{alias}' and '{name}' are one tensor in the model and differ in '{checkpoint.path}'.")
        for name, value in network.graph.baked.items():
            if value.is_meta or not torch.equal(self[name].cpu(), value.cpu()):
                raise MismatchError(
                    f"The buffer '{name}' is part of the graph (an index): it must have the values of the checkpoint when the "
                    "model is captured."
                )

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        recipe = self.recipes[name]
        return self.buffers[name].to(self.checkpoint.device) if recipe is None else recipe(self.checkpoint)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name; nothing is read."""
        return name in self.recipes

    def __iter__(self) -> Iterator[str]:
        """Iterate over canonical names."""
        return iter(self.recipes)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.recipes)

    def dtype(self, name: str) -> torch.dtype:
        """See `LazyState.dtype`."""
        recipe = self.recipes[name]
        return self.buffers[name].dtype if recipe is None else recipe(self.checkpoint.specs).dtype


@public
def stream(
    model: nn.Module | Network,
    inputs: Inputs | None = None,
    *,
    weights: Checkpoint | Path | str,
    device: torch.device | str = "cpu",
) -> Network:
    """Capture a model whose weights stay on disk and are read layer by layer, each time a pass needs them.

    The model itself needs no weights: build it under ``with torch.device("meta")``. Peak memory of `path_norm` is that of
    the largest layer (mapped from its file, so the system may drop its pages), of `path_magnitude` with ``out=`` that of the
    largest layer and its scores.

    Args:
        model: A module, on the meta device or not, or a captured `Network`. Only its graph is used.
        inputs: As for `capture`; not needed for a Network.
        weights: A file of weights, an index of several, a folder with either, or a `Checkpoint`.
        device: Where to compute; a layer is moved there when it is needed. A `Checkpoint` says for itself.

    Returns:
        A network that every function takes; those that change weights or compare networks may hold all of them in memory.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: A file is missing or damaged, or ``inputs`` is malformed.
        MismatchError: The checkpoint has other names or shapes.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> from pathlift import path_norm
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.device("meta"):
        ...     hollow = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(model.state_dict(), f"{folder}/model.safetensors")
        ...     streamed = path_norm(stream(hollow, (2,), weights=folder)).value
        >>> streamed == path_norm(model, (2,)).value
        True
    """
    network = capture(model, inputs)
    checkpoint = weights if isinstance(weights, Checkpoint) else Checkpoint(weights, device)
    return _on_disk(network, checkpoint)


def _on_disk(network: Network, checkpoint: Checkpoint) -> Network:
    return replace(network, state=_OnDisk(network, checkpoint), device=checkpoint.device)


def held(network: Network, other: Other) -> Network:
    """Return a network with other weights, for the same graph; nothing is captured but modules.

    Args:
        network: The graph.
        other: The weights.

    Returns:
        The network; a checkpoint is read as passes need it.

    Raises:
        MismatchError: Names, shapes or graphs differ.
        InputError: A file cannot be read.
    """
    if isinstance(other, (str, Path)):
        other = Checkpoint(other, network.host)
    if isinstance(other, Checkpoint):
        return _on_disk(network, other)
    return replace(network, state=other_state(network, other), device=network.host)


def each_of(others: Iterable[Other] | Path | str) -> Iterator[Other]:
    """Iterate over networks; a folder of several checkpoints is these, in their natural order.

    Args:
        others: Networks, files and folders; or one file or folder.

    Yields:
        One network or file after the other.
    """
    for other in (others,) if isinstance(others, (str, Path)) else others:
        if isinstance(other, (str, Path)):
            yield from checkpoint_paths(Path(other))
        else:
            yield other


@public
def path_norms(
    model: nn.Module | Network, others: Iterable[Other] | Path | str, inputs: Inputs | None = None, *, q: float = 1
) -> Iterator[PathNorm]:
    """Compute the path-norms of many checkpoints of one architecture, one after the other: one capture, constant memory.

    Args:
        model: Gives the architecture: a module (on the meta device will do), or a captured `Network`.
        others: The checkpoints: files of weights, state-dicts, modules or networks. May be a generator. A folder of files that
            are no parts of one checkpoint stands for all of them, in their natural order.
        inputs: As for `capture`; not needed for a Network.
        q: Order, 1 ≤ q ≤ ∞.

    Yields:
        The path-norm of each, in their order.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: ``inputs`` or ``q`` is malformed, or a file cannot be read.
        MismatchError: A checkpoint has other names or shapes.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> weights = ({"weight": torch.full((1, 2), float(size))} for size in (1, 2))
        >>> [norm.value for norm in path_norms(layer, weights, (2,))]
        [2.0, 4.0]
    """
    network = capture(model, inputs)
    for other in each_of(others):
        yield path_norm(held(network, other), q=q)


@public
def path_metrics(
    model: nn.Module | Network,
    others: Iterable[Other] | Path | str,
    inputs: Inputs | None = None,
    *,
    q: float = 1,
    moments: int | None = None,
) -> Iterator[PathMetric]:
    """Compute how far many checkpoints are from one network, one after the other: one capture, constant memory.

    Args:
        model: θ: a module, or a captured `Network`.
        others: The checkpoints θ', as for `path_norms`.
        inputs: As for `capture`; not needed for a Network.
        q: Order, 1 or 2.
        moments: As for `path_metric`; 0 for one pass each.

    Yields:
        The path-metric to each, in their order: see `path_metric`.

    Raises:
        UnsupportedModelError: The model lies outside the theory.
        InputError: ``inputs`` or ``q`` is malformed, or a file cannot be read.
        MismatchError: A checkpoint has other names or shapes.
        NumericalError: A weight is NaN or infinite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 3.0)
        >>> weights = ({"weight": torch.full((1, 2), float(size))} for size in (1, 2))
        >>> [metric.value for metric in path_metrics(layer, weights, (2,))]
        [4.0, 2.0]
    """
    network = capture(model, inputs)
    for other in each_of(others):
        yield path_metric(network, held(network, other), q=q, moments=moments)


__all__ = ["path_metrics", "path_norms", "stream"]
