"""What a result keeps so that it can be improved: the bounds so far, and where the weights lie, without holding them.

A result holds no more memory than it shows. So it remembers each tensor of both networks by its storage, weakly, and by a
checksum of its bytes. While the weights are there and are what they were, the search goes on; else it is refused, because the
bounds so far are about other numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pathlift.errors import InputError, MismatchError
from pathlift.graph.network import Graph, LazyState, Network
from pathlift.metric.bracket import Bracket
from pathlift.reading.memory import contents

REMEDY = "Call path_metric with tighten= or estimate=, which does all at once."


class _Place:
    """Where a tensor lies, and what it was."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.size = tensor.untyped_storage().nbytes()
        self.dtype, self.device = tensor.dtype, tensor.device
        self.layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        self.checksum = zlib.crc32(contents(tensor))

    def tensor(self, which: str) -> Tensor:
        """Return the tensor.

        Args:
            which: The network that it belongs to, for messages.

        Returns:
            It.

        Raises:
            InputError: Nobody holds it any more.
            MismatchError: It has other values now.
        """
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise InputError(f"The weights of the {which} network are gone, and a result holds none. {REMEDY}")
        if storage.nbytes() == self.size:  # else there may be less than the tensor reaches over
            tensor = torch.empty(0, dtype=self.dtype, device=self.device).set_(storage, *self.layout)
            if zlib.crc32(contents(tensor)) == self.checksum:
                return tensor
        raise MismatchError(
            f"The weights of the {which} network have changed since these bounds were computed. Call path_metric anew."
        )


class _Places(dict[str, _Place]):
    """Where the tensors of a state lie, by name."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__({name: _Place(tensor) for name, tensor in state.items()})

    def tensors(self, which: str) -> dict[str, Tensor]:
        return {name: stored.tensor(which) for name, stored in self.items()}


@dataclass(frozen=True, eq=False)
class Standing:
    """What a bracket of two networks can be gone on from; of a copy, or of weights on disk, nothing is.

    Attributes:
        graph: That of both networks, without weights and without what was worked out from it.
        device: Where the passes run.
        first: θ.
        second: θ'.
        bracket: The bounds so far.
    """

    graph: Graph
    device: torch.device
    first: _Places
    second: _Places
    bracket: Bracket

    def networks(self) -> tuple[Network, dict[str, Tensor]]:
        """Return both networks while they are there and unchanged.

        Returns:
            The first, and the state of the second.

        Raises:
            InputError: The weights of one are gone.
            MismatchError: Those of one have changed.
        """
        return Network(replace(self.graph), self.first.tensors("first"), self.device), self.second.tensors("second")

    def __reduce__(self) -> tuple[object, ...]:
        """Leave nothing in a copy: it may outlive the weights, or be in another process."""
        return _nothing, ()


def _nothing() -> None:
    """What a copy holds."""


def standing(network: Network, state: Mapping[str, Tensor], bracket: Bracket) -> Standing | None:
    """Remember where two networks lie.

    Args:
        network: The first, as captured.
        state: The second.
        bracket: The bounds so far.

    Returns:
        What is needed to go on; None for weights that are read from disk for each pass.
    """
    if isinstance(network.state, LazyState) or isinstance(state, LazyState):
        return None
    return Standing(replace(network.graph), network.device, _Places(network.state), _Places(state), bracket)
