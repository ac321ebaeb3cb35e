"""The criteria by name, what each needs, and what it promises: the facts of the paper's Table 2, each of them tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pathlift.arguments import public, public_constructor
from pathlift.arguments.common import Randomness, source_of
from pathlift.errors import InputError, nearest
from pathlift.graph.calling import Samples
from pathlift.graph.network import Network
from pathlift.pruning import criteria
from pathlift.pruning.batches import Data, have_targets, inputs_of, together
from pathlift.pruning.criteria import Batch
from pathlift.pruning.selection import Selection, select_global, select_lamp, select_per_output

Score: TypeAlias = "Callable[[Network, Data | None, torch.Generator | None], Mapping[str, Tensor]]"
"""A score of the network, the data and a source of randomness."""

Told = Mapping[str, tuple[Tensor, Tensor]]
"""Input layer to mean and variance, broadcastable to its shape."""

RECOMMENDED = "relative_path_magnitude"
"""The criterion that `pathlift.prune` takes when none is named: it needs no data, no gauge moves it, and it empties no layer
while others are full."""

SAMPLES = 64
"""Samples for which `fisher` takes a gradient each."""


@dataclass(frozen=True, eq=False)
class Criterion:
    """A way of choosing weights: a score, a selection and a number of rounds.

    Attributes:
        name: Its name.
        what: One line on what it is.
        score: The function of the network, the data and a source of randomness.
        needs: What it looks at besides the weights.
        invariant: Whether no rescaling of neurons changes its masks.
        bounded: Whether the sum of its scores bounds what pruning changes, as (13) does.
        selection: How weights are chosen by these scores unless one says otherwise.
        steps: Rounds of scoring and pruning unless one says otherwise.
        propagated: The score of the network and of what its inputs look like, for one that propagates their moments: it takes
            the place of `score` where they are told.
    """

    name: str
    what: str
    score: Score
    needs: Literal["nothing", "inputs", "loss"] = "nothing"
    invariant: bool = False
    bounded: bool = False
    selection: Selection = select_global
    steps: int = 1
    propagated: Callable[[Network, Told], Mapping[str, Tensor]] | None = None

    @public
    def scores(self, network: Network, data: Data | None = None, generator: Randomness | None = None) -> Mapping[str, Tensor]:
        """Score the weights.

        Args:
            network: The network.
            data: What `needs` asks for.
            generator: Source of randomness, on the CPU, or a seed; PyTorch's own when None.

        Returns:
            Name to scores.

        Raises:
            InputError: It needs data, and there are none of the right kind.
        """
        if self.needs != "nothing" and data is None:
            what = "a batch of inputs" if self.needs == "inputs" else "Batch(x, y)"
            raise InputError(f"The criterion '{self.name}' looks at data: pass data={what}.")
        if self.needs == "loss" and not have_targets(data):
            raise InputError(f"The criterion '{self.name}' looks at a loss: pass data=Batch(x, y), found inputs alone.")
        return self.score(network, data, source_of(generator))


def _of_network(function: Callable[..., Mapping[str, Tensor]], **options: Any) -> Score:
    """Return the score of a criterion that looks at the network alone."""
    return lambda network, _data, _generator: function(network, **options)


def _inputs(data: Data | None) -> Samples:
    assert data is not None
    return together(inputs_of(data))


def _joined(data: Data | None) -> Batch:
    if isinstance(data, Batch):
        return data
    assert have_targets(data)
    several = list(data)
    if not several:
        raise InputError("Expected at least one Batch, found none.")
    x = _inputs(several)
    return Batch(x, torch.cat([batch.y for batch in several]), several[0].loss)


def _several(data: Data | None) -> Batch | Sequence[Batch]:
    assert have_targets(data)
    return data


_ALL = (
    Criterion(
        "path_magnitude",
        "share of the path-norm through a weight, (10)-(14)",
        _of_network(criteria.path_magnitude_scores),
        invariant=True,
        bounded=True,
    ),
    Criterion(
        "path_magnitude_iterated",
        "path-magnitude, scored anew in 50 rounds: greedy on the path-metric",
        _of_network(criteria.path_magnitude_scores),
        invariant=True,
        bounded=True,
        steps=50,
    ),
    Criterion(
        "path_magnitude_lamp",
        "path-magnitude, selected as LAMP does",
        _of_network(criteria.path_magnitude_scores),
        invariant=True,
        selection=select_lamp,
    ),
    Criterion(
        "path_magnitude_l2",
        "share of the l2 path-norm through a weight",
        _of_network(criteria.path_magnitude_scores, q=2),
        invariant=True,
    ),
    Criterion(
        "path_magnitude_data",
        "path-magnitude with the mean |x| of real inputs in place of ones",
        lambda network, data, _generator: criteria.path_magnitude_scores(network, x=_inputs(data)),
        needs="inputs",
        invariant=True,
        bounded=True,
    ),
    Criterion(
        RECOMMENDED,
        "l2 path mass of a weight relative to its channels, selected as LAMP does, in 10 rounds",
        _of_network(criteria.relative_path_magnitude),
        invariant=True,
        selection=select_lamp,
        steps=10,
    ),
    Criterion(
        "balanced_magnitude",
        "magnitude in the l2-balanced representative of the rescaling orbit",
        _of_network(criteria.balanced_magnitude),
        invariant=True,
    ),
    Criterion(
        "balanced_lamp",
        "balanced magnitude, selected as LAMP does, in 10 rounds",
        _of_network(criteria.balanced_magnitude),
        invariant=True,
        selection=select_lamp,
        steps=10,
    ),
    Criterion("magnitude", "|weight|", _of_network(criteria.magnitude)),
    Criterion(
        "lamp",
        "magnitude, selected by layer-adaptive sparsity",
        _of_network(criteria.magnitude),
        selection=select_lamp,
    ),
    Criterion("random", "chance", lambda network, _data, generator: criteria.random_scores(network, generator), invariant=True),
    Criterion(
        "synflow",
        "synaptic flow in 100 rounds",
        _of_network(criteria.synflow),
        invariant=True,
        steps=100,
    ),
    Criterion(
        "obd",
        "optimal brain damage, one vector of signs per batch (appendix E)",
        lambda network, data, generator: criteria.loss_sensitivity(network, _several(data), generator=generator),
        needs="loss",
    ),
    Criterion(
        "snip",
        "|weight x gradient|",
        lambda network, data, _generator: criteria.snip(network, _joined(data)),
        needs="loss",
        invariant=True,
    ),
    Criterion(
        "grasp",
        "gradient signal preservation",
        lambda network, data, _generator: criteria.grasp(network, _joined(data)),
        needs="loss",
    ),
    Criterion(
        "fisher",
        "weight^2 x mean gradient^2",
        lambda network, data, _generator: criteria.fisher(network, next(_joined(data).split(SAMPLES))),
        needs="loss",
        invariant=True,
    ),
    Criterion(
        "wanda",
        "|weight| x l2 norm of what it multiplies, by output channel",
        lambda network, data, _generator: criteria.wanda(network, _inputs(data)),
        needs="inputs",
        invariant=True,
        selection=select_per_output,
    ),
    Criterion(
        "output_error",
        "least expected error of the outputs when the others make up for a weight, without data",
        _of_network(criteria.output_error),
        invariant=True,
        propagated=lambda network, moments: criteria.output_error(network, moments=moments),
    ),
    Criterion(
        "output_error_data",
        "the same, measured on inputs",
        lambda network, data, _generator: criteria.output_error(network, x=_inputs(data)),
        needs="inputs",
        invariant=True,
    ),
)

CRITERIA: Mapping[str, Criterion] = {criterion.name: criterion for criterion in _ALL}
"""By name."""

public_constructor(Criterion)  # those above are made while the library loads, before there is a table of arguments


def criterion_of(name: str) -> Criterion:
    """Return a criterion by name.

    Args:
        name: A key of `CRITERIA`; hyphens stand for underscores.

    Returns:
        The criterion.

    Raises:
        InputError: There is no such name.
    """
    criterion = CRITERIA.get(name.replace("-", "_"))
    if criterion is None:
        raise InputError(f"There is no criterion '{name}'.{nearest(name, CRITERIA)}")
    return criterion
