"""State-dicts of rescaled networks, and models with them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathlift.arguments import public
from pathlift.errors import InputError, MismatchError, name_differences
from pathlift.graph.network import Network
from pathlift.reading.freeze import cloned
from pathlift.rescaling.gauges import Gauge
from pathlift.results import Result
from pathlift.storage.checkpoints import Checkpoint
from pathlift.storage.names import fit


class RescaledState(Result, dict[str, Tensor], rows=("tensors",)):
    """A state-dict of the same function: what `load_state_dict` takes.

    Pickled, or saved by ``torch.save``, it becomes a plain ordered dictionary of its tensors, which ``torch.load`` reads with
    ``weights_only`` where there is no pathlift; ``copy`` and ``deepcopy`` keep all that it knows.

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
        super().__init__({name: tensor.detach().clone() for name, tensor in named.items() if name in network.graph.saved})
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

    def __init__(self, network: Network, state: Mapping[str, Tensor], gauge: Gauge) -> None:
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


def state_of(network: Network) -> RescaledState:
    """Return the state of a network under the names of the model's state-dict, its own factors all 1.

    Args:
        network: The network.

    Returns:
        Parameters and buffers.
    """
    return RescaledState(network, network.state, torch.ones(0))


@public
def with_state(model: nn.Module, state: Mapping[str, Tensor] | Path | str) -> nn.Module:
    """Return a copy of a model with other parameters.

    Args:
        model: Any module; not changed.
        state: A state-dict of it, or a file of weights.

    Returns:
        The copy. Wrappers that compile, scatter or synchronise become plain modules of the same names.

    Raises:
        MismatchError: A name or a shape is not the model's.
        InputError: A file cannot be read.
    """
    made = cloned(model)
    before = made.state_dict()
    if isinstance(state, (str, Path)):
        state = Checkpoint(state)
    specs = state.specs if isinstance(state, Checkpoint) else state
    fitting = fit(before, specs, before.get, made, inside=isinstance(state, Checkpoint))
    fitting.tell(state.path if isinstance(state, Checkpoint) else "the state-dict")
    given = {name: recipe(state) for name, recipe in fitting.recipes.items()}
    missing, surplus = [name for name in before if name not in given], [name for name in given if name not in before]
    if missing or surplus:
        raise MismatchError(f"The state-dict does not fit the model. {name_differences(missing, surplus, 'the model')}.")
    named = OrderedDict(given)
    vars(named)["_metadata"] = getattr(before, "_metadata", {})  # versions, which some modules ask for
    try:
        made.load_state_dict(named)
    except RuntimeError as error:
        raise MismatchError(f"The state-dict does not fit the model. {' '.join(str(error).split())}") from error
    return made


def multiplied(name: str, tensor: Tensor, logs: Tensor) -> Tensor:
    """Return a parameter times 2^logs, in its own type; exact for whole logs.

    Args:
        name: Of the parameter.
        tensor: The parameter.
        logs: Of its shape.

    Returns:
        The product.

    Raises:
        InputError: A weight would leave the range of its type.
    """
    factor = torch.exp2(logs).to(tensor.device)
    out = (tensor.double() * factor).to(tensor.dtype)
    lost = torch.isfinite(tensor) & (~torch.isfinite(out) | ((tensor != 0) & (out.abs() < torch.finfo(tensor.dtype).tiny)))
    lost &= tensor.abs() >= torch.finfo(tensor.dtype).tiny
    if bool(lost.any()):
        index = tuple(lost.nonzero()[0].tolist())
        raise InputError(
            f"'{name}'{list(index)} = {float(tensor[index])} times {float(factor[index]):.6g} is outside the range of "
            f"{str(tensor.dtype).removeprefix('torch.')}. Choose smaller factors, or convert the model to float64 first."
        )
    return out
