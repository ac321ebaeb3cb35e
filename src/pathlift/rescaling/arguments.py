"""What rescaling groups and factors may be, and whatever moves weights along them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pathlift.arguments import declare
from pathlift.arguments.kinds import (
    anything,
    either,
    file,
    function,
    instance,
    least_zero,
    mapping,
    module_with_values,
    number,
    numbers,
    positive,
    positive_count,
    text,
)
from pathlift.graph.arguments import captured, check_names, state
from pathlift.graph.network import Network
from pathlift.rescaling.groups import Symmetries
from pathlift.rescaling.states import RescaledState

model_or_groups = either(
    "a torch.nn.Module, a captured Network or its Symmetries",
    (nn.Module, anything), (Network, captured), (Symmetries, anything),
)  # fmt: skip
channel_factors = either(
    "a positive number, or one per channel", ((int, float), positive), (object, numbers("positive numbers, one per channel"))
)


def factors(name: str, value: Any) -> Any:
    """Factors for the groups, or by module for its channels; which are too many or not positive, the groups say."""
    if isinstance(value, Mapping):
        return mapping("a mapping from modules to factors", channel_factors)(name, value)
    return numbers("one positive number per group, or a mapping from modules to them")(name, value)


def _of_groups(given: Mapping[str, Any]) -> None:
    groups = given.get("self")
    network = getattr(groups, "network", None) if isinstance(groups, Symmetries) else None  # none yet in its constructor
    if network is not None:
        check_names(network, given)


declare(__name__, {
    "align.model": model_or_groups,
    "equivalent.model": model_or_groups,
    "rescaling_distance.model": model_or_groups,
    "with_state.model": module_with_values,
    "with_state.state": either("a state-dict or a file of weights", (Mapping, state), ((str, Path), file)),
    "groups": instance("the Symmetries of a model: symmetries(model, inputs)", Symmetries),
    "rescale_in_place.state": instance("what a method of the Symmetries returned", RescaledState),
    "equivalent.tolerance": least_zero,
    "p": number("a number from 1 to 100", lambda v: 1 <= v <= 100),
    "Symmetries.balance.p": number("a positive number of at most 100", lambda v: 0 < v <= 100),
    "sigma": least_zero,
    "choices": numbers("positive finite numbers, at least one", positive, least=1),
    "factors": factors,
    "module": text("the path of a module"),
    "optimizer": instance("an optimiser of torch.optim", Optimizer),
    "gauge": function("a function of the Symmetries, such as Symmetries.balance", 1),
    "every": positive_count,
}, excluded={("Symmetries.randomize", "sigma"): "choices"}, check=_of_groups)  # fmt: skip
