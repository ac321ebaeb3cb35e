"""What scores, masks, criteria and the data that they look at may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pathlift.arguments import declare
from pathlift.arguments.common import done_of_all
from pathlift.arguments.kinds import (
    anything,
    batches,
    choice,
    collection,
    either,
    flag,
    function,
    mapping,
    module,
    module_with_values,
    number,
    plain_tensor,
    positive_count,
    refusal,
    stream,
    subclass,
    text,
)
from pathlift.errors import InputError
from pathlift.pruning.batches import have_targets
from pathlift.pruning.catalogue import Criterion
from pathlift.pruning.criteria import Batch


def ranked(name: str, value: Any) -> Tensor:
    """Scores of a parameter, which have an order."""
    tensor = plain_tensor(name, value)
    if bool(tensor.isnan().any()):
        raise InputError(f"{name} holds NaN, which is neither more nor less than other scores.")
    return tensor


masks = mapping("a mapping from parameter names to masks", plain_tensor)
scores = mapping("a mapping from parameter names to scores", ranked)


def data(name: str, value: Any) -> Any:
    """Inputs, or batches with targets."""
    if have_targets(value):
        return value
    if not isinstance(value, (Tensor, list, tuple, Mapping)):
        raise refusal(name, "inputs as the model takes them, a Batch or a list of these", value)
    return batches(name, value)


WHAT = "inputs as the model takes them, a Batch, or several of these one after the other"

loaded = either(WHAT, (Batch, anything), (object, batches))
"""One batch as data loaders give it."""


criterion = either(
    "a name of CRITERIA, a Criterion, a function of the network or scores by parameter name",
    (str, text("the name of a criterion")), (Criterion, anything), (Mapping, scores),
    (object, function("a name of CRITERIA, a Criterion, a function of the network or scores by parameter name", 1)),
)  # fmt: skip
selection = either(
    "the name of a selection, or a function of scores and an amount",
    (str, text("the name of a selection")), (object, function("a function of scores and an amount", 2)),
)  # fmt: skip
scope_item = either(
    "a name pattern, a module type or a module of the model",
    (str, text("a name pattern", 1)), (type, subclass("a module type", nn.Module)), (nn.Module, anything),
)  # fmt: skip
scope = either(
    "name patterns, module types or modules of the model, at least one",
    ((str, type, nn.Module), scope_item),
    (object, collection("name patterns, module types or modules of the model, at least one", scope_item)),
)  # fmt: skip

declare(__name__, {
    # models that are given or take masks
    "apply_masks.model": module_with_values,
    "from_torch_prune.model": module,
    "importance_scores.model": module_with_values,
    "PathMagnitudeImportance.model": module,
    "keep_masks.model": module_with_values,
    "to_torch_prune.model": module_with_values,
    # what is pruned, and by what
    "amount": number("a share in [0, 1)", lambda v: 0 <= v < 1),
    "criterion": criterion,
    "selection": selection,
    "scope": scope,
    "data": data,
    "masks": masks,
    "scores": scores,
    "prune.steps": positive_count,
    "prune.progress": done_of_all,
    "prune.shrink": flag,
    "prune.update": choice("none", "compensate"),
    "prune.data": either(WHAT, (Batch, anything), ((Tensor, Mapping), batches), (object, stream(WHAT, loaded))),
    "shrink.model": module_with_values,
    "to_semi_structured.model": module_with_values,
    "weight": plain_tensor,
    # a criterion of the user's own
    "Criterion.name": text("a name"),
    "what": text("a line of text"),
    "Criterion.score": function("a function of the network, the data and a generator", 3),
    "needs": choice("nothing", "inputs", "loss"),
    "invariant": flag,
    "bounded": flag,
    "Criterion.steps": positive_count,
    "propagated": function("a function of the network and of moments of its inputs", 2),
    # data with targets
    "Batch.loss": function("a function of outputs and targets", 2, modules=True),
    "size": positive_count,
    # n of each m, and what torch.nn.utils.prune hands over
    "n": positive_count,
    "m": positive_count,
    "score": plain_tensor,
    "t": ranked,
    "default_mask": plain_tensor,
})  # fmt: skip
