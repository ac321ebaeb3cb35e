"""The arguments of every public function, once each: by name, and by function and name where one name has several meanings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from pathlift.arguments.kinds import (
    Kind,
    any_generator,
    anything,
    batch,
    batches,
    choice,
    collection,
    device,
    either,
    file,
    flag,
    function,
    generator,
    generator_or_seed,
    instance,
    mapping,
    module_with_values,
    named,
    number,
    numbers,
    optional,
    plain_tensor,
    refusal,
    shapes,
    shown,
    stream,
    subclass,
    text,
    whole,
)
from pathlift.consequences.flatness import Loss
from pathlift.errors import InputError, MismatchError, nearest
from pathlift.graph.network import LazyState, Network
from pathlift.lipschitz.bound import Kind as Bounds
from pathlift.passes.box import Tolerance
from pathlift.pruning.catalogue import Criterion
from pathlift.pruning.criteria import Batch
from pathlift.rescaling import RescaledState, Symmetries
from pathlift.storage.checkpoints import Checkpoint

# ---- networks and their weights


def captured(name: str, value: Any) -> Network:
    """A network with one entry per neuron."""
    if not isinstance(value, Network):
        raise refusal(name, "a captured Network (network = capture(model, inputs) once, then give the network)", value)
    if any(layer.axes is not None for layer in value.layers):
        raise InputError(f"{name} is the compact form of a Network, which only passes over ones may read. Give the Network.")
    return value


def state(name: str, value: Any) -> Any:
    """Tensors by name. Entries that are no tensors are for the function: a state-dict may hold some beside the weights."""
    what = "a mapping from names to tensors, such as a state-dict"
    if not isinstance(value, Mapping):
        raise refusal(name, what, value)
    if isinstance(value, (LazyState, Checkpoint)):  # read when they are needed, and checked by then
        return value
    for key, tensor in value.items():
        inside = f"{name}['{named(name, what, key)}']"
        if isinstance(tensor, Tensor):
            plain_tensor(inside, tensor)
    return value


def ranked(name: str, value: Any) -> Tensor:
    """Scores of a parameter, which have an order."""
    found = plain_tensor(name, value)
    if bool(found.isnan().any()):
        raise InputError(f"{name} holds NaN, which is neither more nor less than other scores.")
    return found


module = instance("a torch.nn.Module", nn.Module)  # one that cannot be read is refused, or reported, with its problems
model = either("a torch.nn.Module, or a captured Network", (nn.Module, anything), (Network, captured))
model_or_groups = either(
    "a torch.nn.Module, a captured Network or its Symmetries",
    (nn.Module, anything), (Network, captured), (Symmetries, anything),
)  # fmt: skip
groups = instance("the Symmetries of a model: symmetries(model, inputs)", Symmetries)
other = either(
    "a module, a captured Network or a state-dict", (nn.Module, module_with_values), (Network, captured), (Mapping, state)
)
one_of_set = either(
    "Relative, Absolute, Rounding, Pruned, a module, a captured Network or a state-dict",
    (Tolerance, anything), (nn.Module, module_with_values), (Network, captured), (Mapping, state),
)  # fmt: skip
stored = either(
    "a module, a captured Network, a state-dict or a file of weights",
    (nn.Module, module_with_values), (Network, captured), (Mapping, state), ((str, Path), file),
)  # fmt: skip
several = stream("modules, state-dicts or files of weights, in a list or another iterable", stored)
weights = either("a module, or a mapping from names to tensors", (nn.Module, module_with_values), (Mapping, state))
masks = mapping("a mapping from parameter names to masks", plain_tensor)
scores = mapping("a mapping from parameter names to scores", ranked)

# ---- numbers

least_zero = number("a finite number of at least 0", lambda v: 0 <= v < math.inf)
positive = number("a positive finite number", lambda v: 0 < v < math.inf)
share = number("a share in [0, 1)", lambda v: 0 <= v < 1)
LARGEST_ORDER = 1000
"""Powers of a larger order leave every range; infinity has a way of its own."""

order = number("a number with 1 <= q <= 1000, or inf", lambda v: 1 <= v <= LARGEST_ORDER or v == math.inf)
finite_order = number("a finite number from 1 to 1000", lambda v: 1 <= v <= LARGEST_ORDER)
power = number("a positive number of at most 100", lambda v: 0 < v <= 100)
one_or_two = number("1 or 2 for the path-metric", lambda v: v in {1, 2})
count = whole("a whole number of at least 0", lambda v: v >= 0)
positive_count = whole("a positive whole number", lambda v: v >= 1)

# ---- data

samples = either(
    "a tensor with a batch dimension, shape (batch, …), or a tuple of them for several inputs",
    (Tensor, batch), ((list, tuple), batches),
)  # fmt: skip


def targets(name: str, value: Any) -> Tensor:
    """One target for each sample, as the loss takes it."""
    found = plain_tensor(name, value)
    if found.dim() == 0 or found.numel() == 0:
        raise refusal(name, "targets with a batch dimension, one for each sample", found)
    return found


def labelled(name: str, value: Any) -> Any:
    """A batch, which may come as (inputs, labels)."""
    batch(name, value[0] if isinstance(value, (list, tuple)) and value else value)
    return value


def streamed(each: Kind) -> Kind:
    """All inputs in one tensor, or batches one after the other."""
    what = "a tensor with a batch dimension, shape (batch, …), or an iterable of such batches"
    return either(what, (Tensor, batch), (object, stream(what, each)))


def data(name: str, value: Any) -> Any:
    """Inputs, or batches with targets."""
    if isinstance(value, Tensor):
        return batch(name, value)
    several_batches = isinstance(value, (list, tuple)) and value and all(isinstance(own, Batch) for own in value)
    if not (isinstance(value, Batch) or several_batches):
        raise refusal(name, "a tensor of inputs, a Batch or a list of them", value)
    return value


def factors(name: str, value: Any) -> Any:
    """Factors for the groups, or by module for its channels; which are too many or not positive, the groups say."""
    if isinstance(value, Mapping):
        return mapping("a mapping from modules to factors", channel_factors)(name, value)
    return numbers("one positive number per group, or a mapping from modules to them")(name, value)


channel_factors = either(
    "a positive number, or one per channel", ((int, float), positive), (object, numbers("positive numbers, one per channel"))
)
scoring = either(
    "a name of CRITERIA, a Criterion, a function of the network or scores by parameter name",
    (str, text("the name of a criterion")), (Criterion, anything), (Mapping, scores),
    (object, function("a name of CRITERIA, a Criterion, a function of the network or scores by parameter name", 1)),
)  # fmt: skip
ranking = either(
    "path_magnitude, magnitude, or scores by parameter name",
    (str, choice("path_magnitude", "magnitude")), (Mapping, scores),
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
gauge = function("a function of the Symmetries, such as Symmetries.balance", 1)

KINDS: Mapping[str, Kind] = {
    # networks
    "model": model,
    "align.model": model_or_groups,
    "equivalent.model": model_or_groups,
    "rescaling_distance.model": model_or_groups,
    "apply_masks.model": module_with_values,
    "check_support.model": module,
    "from_torch_prune.model": module,
    "importance_scores.model": module_with_values,
    "path_lifting.model": module,
    "PathMagnitudeImportance.model": module,
    "to_torch_prune.model": module_with_values,
    "with_state.model": module_with_values,
    "log_path_norm.model": weights,
    "network": captured,
    "groups": groups,
    "inputs": shapes,
    "until": text("the name of a module or of a value of the graph", 1),
    "other": other,
    "expected_bound.other": one_of_set,
    "lipschitz_bound.other": one_of_set,
    "tolerance": one_of_set,
    "equivalent.tolerance": least_zero,
    "models": several,
    "others": several,
    "state": state,
    "rescale_in_place.state": instance("what a method of the Symmetries returned", RescaledState),
    "weights": either(
        "a .safetensors file, an index, a folder with either, or a Checkpoint", (Checkpoint, anything), (object, file)
    ),
    "load_model.weights": file,
    # inputs and targets
    "x": samples,
    "attack.x": batch,
    "certify.x": streamed(labelled),
    "sharpness.x": batch,
    "batches": streamed(samples),
    "y": targets,
    "data": data,
    "loss": choice(*get_args(Loss)),
    "Batch.loss": function("a function of outputs and targets", 2, modules=True),
    # numbers
    "q": order,
    "expected_bound.q": finite_order,
    "log_path_norm.q": finite_order,
    "path_magnitude.q": finite_order,
    "path_metric.q": one_or_two,
    "path_metrics.q": one_or_two,
    "p": number("a number from 1 to 100", lambda v: 1 <= v <= 100),
    "Symmetries.balance.p": power,
    "r": number("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "Absolute.r": least_zero,
    "Relative.r": least_zero,
    "radius": least_zero,
    "sigma": least_zero,
    "amount": share,
    "Pruned.amount": number("a share from 0 to 1", lambda v: 0 <= v <= 1),
    "bits": whole("a whole number from 2 to 64", lambda v: 2 <= v <= 64),
    "step": least_zero,
    "steps": count,
    "prune.steps": positive_count,
    "Criterion.steps": positive_count,
    "samples": positive_count,
    "PathMetric.estimate.samples": whole("a whole number of at least 2: one path has no spread", lambda v: v >= 2),
    "input_bound": positive,
    "loss_lipschitz": positive,
    "loss_range": positive,
    "moments": whole("2, 4, 6 or 8", lambda v: v in {2, 4, 6, 8}),
    "path_metric.moments": whole("0, 2, 4, 6 or 8", lambda v: v in {0, 2, 4, 6, 8}),
    "path_metrics.moments": whole("0, 2, 4, 6 or 8", lambda v: v in {0, 2, 4, 6, 8}),
    "tighten": count,
    "ratio": number("a number of at least 1", lambda v: v >= 1),
    "seconds": least_zero,
    "path_metric.seconds": number("a positive number", lambda v: v > 0),
    "PathMetric.tighten.seconds": number("a positive number", lambda v: v > 0),
    "estimate": whole("0, or a whole number of at least 2: one path has no spread", lambda v: v == 0 or v >= 2),
    "confidence": number("a number between 0 and 1", lambda v: 0 < v < 1),
    "seed": whole("a whole number of at most 64 bits"),
    "limit": positive_count,
    "dimensions": positive_count,
    "every": positive_count,
    "size": positive_count,
    "n": positive_count,
    "m": positive_count,
    "choices": numbers("positive finite numbers, at least one", positive, least=1),
    "factors": factors,
    # words
    "kind": choice(*get_args(Bounds)),
    "per": choice("channel", "tensor"),
    "needs": choice("nothing", "inputs", "loss"),
    "name": text("a name"),
    "Network.kind_of.name": text("the name of a parameter or buffer"),
    "default_shape.name": text("torchvision:NAME, timm:NAME, package.module:factory, or a .onnx or .pt2 file"),
    "load_model.name": text("torchvision:NAME, timm:NAME, package.module:factory, or a .onnx or .pt2 file"),
    "what": text("a line of text"),
    "module": text("the path of a module"),
    # pruning
    "masks": masks,
    "scores": scores,
    "score": plain_tensor,
    "Criterion.score": function("a function of the network, the data and a generator", 3),
    "t": ranked,
    "default_mask": plain_tensor,
    "criterion": scoring,
    "Pruned.criterion": ranking,
    "selection": selection,
    "scope": scope,
    "invariant": flag,
    "bounded": flag,
    # files, devices, randomness, callbacks
    "path": file,
    "out": file,
    "tensors": mapping("a mapping from names to tensors", plain_tensor),
    "arguments": mapping("a mapping from names to values", anything),
    "trust": flag,
    "device": device,
    "generator": generator,
    "path_metric.generator": generator_or_seed,
    "PathMetric.estimate.generator": generator_or_seed,
    "attack.generator": any_generator,
    "optimizer": instance("an optimiser of torch.optim", Optimizer),
    "gauge": gauge,
    "progress": function("a function of the number that is done", 1),
    "path_kernel.progress": function("a function of the number that is done and that of all", 2),
    "prune.progress": function("a function of the number that is done and that of all", 2),
    "path_metric.progress": function("a function of a Step", 1),
    "PathMetric.tighten.progress": function("a function of a Step", 1),
}
"""Name of an argument, or of a function and an argument, to its kind."""

NEEDED: Mapping[tuple[str, str], str] = {
    ("path_metric", "generator"): "estimate",
}
"""Function and argument to the argument without which it would have no effect."""

EXCLUDED: Mapping[tuple[str, str], str] = {("Symmetries.randomize", "sigma"): "choices"}
"""Function and argument to the argument beside which it would have no effect."""


def kind_of(function_name: str, argument: str, *, may_be_none: bool) -> Kind:
    """Look an argument up.

    Args:
        function_name: Qualified name of the function, or of the class for its constructor.
        argument: Name of the argument.
        may_be_none: Whether None is its default, and so accepted.

    Returns:
        Its kind.
    """
    own = f"{function_name}.{argument}"
    kind = KINDS[own] if own in KINDS else KINDS[argument]
    return optional(kind) if may_be_none else kind


def check_together(function_name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse arguments that would have no effect beside the others, or without them.

    Args:
        function_name: As for `kind_of`.
        given: The arguments of a call, by name, that were written down.
        defaults: Those of all arguments that have one.

    Raises:
        InputError: One would be ignored.
    """
    if isinstance(given.get("model"), (Network, Symmetries)):
        surplus = [name for name in ("inputs", "until") if given.get(name) is not None]
        if surplus:
            raise InputError(f"A captured Network has its inputs and outputs: leave out {' and '.join(map(repr, surplus))}.")

    graph = given.get("self")
    graph = getattr(graph, "network", None) if isinstance(graph, Symmetries) else graph
    if isinstance(graph, Network):
        _check_named(graph, given)

    def says_something(name: str) -> bool:
        return name in given and bool(given[name] != defaults.get(name))

    for table, ignored in ((NEEDED, False), (EXCLUDED, True)):
        for (own, name), partner in table.items():
            if own == function_name and says_something(name) and says_something(partner) is ignored:
                how = "beside" if ignored else "without"
                raise InputError(f"{name} has no effect {how} {partner}: leave it out.")


def _check_named(graph: Network, given: Mapping[str, Any]) -> None:
    """Make sure that what a method of a network is given has the network's names and shapes."""
    name, tensors = given.get("name"), given.get("state")
    if name is not None and name not in graph.state:
        raise InputError(f"The network has no parameter or buffer '{name[:100]}'.{nearest(name[:100], graph.state)}")
    if isinstance(tensors, Mapping) and not isinstance(tensors, (LazyState, Checkpoint)):
        for key, own in graph.state.items():
            tensor = tensors.get(key)
            if not (isinstance(tensor, Tensor) and _alike(tensor, own)):
                found = "nothing" if key not in tensors else shown(tensor)
                raise MismatchError(f"'{key}' must be {shown(own)}, found {found}.")


def _alike(one: Tensor, two: Tensor) -> bool:
    """Whether one tensor can stand for another; where whole numbers count batches, averaged ones may stand."""
    return one.shape == two.shape and (one.is_floating_point() or not two.is_floating_point())
