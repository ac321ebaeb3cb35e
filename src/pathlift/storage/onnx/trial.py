"""Trial runs of a module that was read: without numbers, to learn which sizes are the batch; with numbers, against a runtime.

A file may fix the number of samples, and write it into the sizes of a Reshape. Such a size is the number of samples wherever
the module then runs with another number just as well. And what was read is compared with what onnxruntime, or onnx's own
evaluator, makes of the file: the outputs must agree to rounding.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pathlift.errors import InputError, PathliftError, UnsupportedModelError, told
from pathlift.storage.onnx.host import Array
from pathlift.storage.onnx.module import OnnxModule, Operator, tensor_of
from pathlift.storage.onnx.operators import DTYPES
from pathlift.storage.packages import package

SEED = 20250

AGREEMENT = 1000
"""Outputs may differ by so many units of rounding of the largest, and by what rounding explains besides."""

CARRIED = 300.0
"""In units of the difference that it makes when every value is moved by one: roundings of long sums go one way."""


def mark_batch(module: OnnxModule) -> None:
    """Find the sizes in constant shapes that are the number of samples.

    Args:
        module: What was read; `Operator.keeps_batch` of its nodes is set.
    """
    shapes = declared_shapes(module, None)
    if shapes is None:
        return
    batch = shapes[0][0] if shapes and shapes[0] else 0
    if batch < 1 or any(not shape or shape[0] != batch for shape in shapes):
        return
    constants = {name for name, own in module.program.arrays.items() if own.ndim == 1 and own.size and own[0] == batch}
    steps = [step for step in module.program.steps if len(step.inputs) > 1 and step.inputs[1] in constants]
    nodes = [node for step in steps if (node := module.get_submodule(".".join(step.path))).kind == "Reshape"]
    found: list[Operator] = []

    def note(node: nn.Module, inputs: Any) -> None:
        value = inputs[0]
        if isinstance(node, Operator) and isinstance(value, Tensor) and value.dim() and value.shape[0] == batch:
            found.append(node)

    hooks = [node.register_forward_pre_hook(note) for node in nodes]
    known = _shapes(module, shapes)
    for hook in hooks:
        hook.remove()
    for node in found:
        node.keeps_batch = True
    other = _shapes(module, [(batch + 1, *shape[1:]) for shape in shapes])
    grown = known is not None and [(batch + 1, *shape[1:]) for shape in known if shape[:1] == (batch,)] == other
    for node in found:
        node.keeps_batch = grown
    if batch > 1 and not (grown and _alone_as_together(module, shapes)):
        module.samples = batch


def declared_shapes(module: OnnxModule, batch: int | None) -> list[tuple[int, ...]] | None:
    """Return the shapes of all inputs.

    Args:
        module: What was read.
        batch: Number of samples where the file leaves it open.

    Returns:
        The shapes; None if another size is open, or this one and there is no number for it.
    """
    shapes = []
    for own in module.inputs:
        sizes = own.shape and (own.shape[0] or batch, *own.shape[1:])
        if sizes is None or None in sizes:
            return None
        shapes.append(tuple(size for size in sizes if size is not None))
    return shapes


def _shapes(module: OnnxModule, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]] | None:
    """Run a module without numbers; return the shapes of its outputs, None where it cannot be run so."""
    state = {name: tensor.to("meta") for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    values = [torch.empty(shape, dtype=own.dtype, device="meta") for shape, own in zip(shapes, module.inputs, strict=True)]
    with torch.no_grad(), contextlib.suppress(PathliftError):  # whoever runs it on numbers is told
        returned = functional_call(module, state, tuple(values))
        return [tuple(own.shape) for own in (returned if isinstance(returned, tuple) else (returned,))]
    return None


def compare(module: OnnxModule, path: Path, *, always: bool) -> None:
    """Compare a module with what a runtime makes of its file, on random inputs.

    Nothing is compared where the module cannot run alone, the file leaves sizes open, or the runtime cannot run the file.

    Args:
        module: What was read.
        path: The file.
        always: Whether to use onnx's own evaluator, which is slow, where onnxruntime is not installed.

    Raises:
        InputError: They differ by more than rounding explains.
    """
    shapes = declared_shapes(module, 1)
    runtime = importlib.util.find_spec("onnxruntime") is not None
    if shapes is None or not (runtime or always):
        return
    draws = np.random.default_rng(SEED)
    inputs = [_drawn(draws, shape, own.dtype) for shape, own in zip(shapes, module.inputs, strict=True)]
    try:
        outputs = _outputs(module, inputs)
    except (UnsupportedModelError, InputError):
        return
    run = _runtime if runtime else _evaluator
    expected = run(path, {own.name: value for own, value in zip(module.inputs, inputs, strict=True)})
    if expected is None:
        return
    unit = _unit(module, outputs)
    moved = _outputs(module, inputs, unit)
    for place, (one, two, other) in enumerate(zip(outputs, expected, moved, strict=True)):
        off = _apart(one, two)
        if off is None or off > AGREEMENT * unit + CARRIED * (_apart(one, other) or 0.0):
            what = "of another shape" if off is None else f"differ by {off:.2g} relative"
            raise InputError(f"what is read of it is not what a runtime makes of it: the values of output {place + 1} {what}.")


def _alone_as_together(module: OnnxModule, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a sample comes out alone as it does among the others of a batch of the size that the file fixes."""
    draws = np.random.default_rng(SEED)
    inputs = [_drawn(draws, shape, own.dtype) for shape, own in zip(shapes, module.inputs, strict=True)]
    try:
        together, alone = _outputs(module, inputs), _outputs(module, [value[:1] for value in inputs])
    except PathliftError:
        return False
    found = [_apart(one, two[:1]) if two.dim() else None for one, two in zip(alone, together, strict=True)]
    return all(off is not None and off <= 100 * AGREEMENT * _unit(module, together) for off in found)


def _unit(module: OnnxModule, outputs: Sequence[Tensor]) -> float:
    """Return the unit of rounding of the coarsest type that a module computes in."""
    casts = [DTYPES.get(own.settings.get("to", 0)) for own in module.modules() if isinstance(own, Operator)]
    kinds = {own.dtype for own in (*module.parameters(), *module.buffers(), *outputs)}.union(casts)
    return max(torch.finfo(kind).eps for kind in kinds | {torch.float32} if kind is not None and kind.is_floating_point)


def _drawn(draws: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
    values = draws.normal(size=shape) if dtype.is_floating_point else draws.integers(0, 2, size=shape)
    return np.asarray(values, dtype=str(dtype).removeprefix("torch.") if dtype != torch.bfloat16 else "float32")


def _outputs(module: OnnxModule, inputs: Sequence[Array], moved: float = 0.0) -> list[Tensor]:
    """Run a module; if asked for, with the results of all nodes moved a little, as rounding may move them."""
    draws = torch.Generator().manual_seed(SEED)

    def near(_node: nn.Module, _inputs: Any, made: Any) -> Any:
        return tuple(
            own * (1 + moved * torch.randn(own.shape, generator=draws)).to(own.dtype)
            if isinstance(own, Tensor) and own.is_floating_point()
            else own
            for own in made
        )

    nodes = [own for own in module.modules() if isinstance(own, Operator) and own.kind and moved]
    hooks = [node.register_forward_hook(near) for node in nodes]
    try:
        with torch.no_grad():
            found = module(*map(tensor_of, inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return list(found) if isinstance(found, tuple) else [found]


def _runtime(path: Path, inputs: dict[str, Array]) -> list[Tensor] | None:
    """Run a file in onnxruntime; None where that cannot."""
    runtime = package("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return [tensor_of(np.asarray(own)) for own in session.run(None, inputs)]
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            return None  # an operator or a version that it does not have
        raise


def _evaluator(path: Path, inputs: dict[str, Array]) -> list[Tensor]:
    """Run a file in onnx's own evaluator."""
    try:
        found = package("onnx.reference", "onnx").ReferenceEvaluator(str(path)).run(None, inputs)
    except Exception as error:
        raise InputError(f"onnx's evaluator cannot run it: {told(error)}") from error
    return [tensor_of(np.asarray(own)) for own in found]


def _apart(one: Tensor, two: Tensor) -> float | None:
    """Return the largest difference, relative to the largest value; None for tensors of other shapes."""
    if one.shape != two.shape:
        return None
    one, two = one.double(), two.double()
    both = torch.isfinite(one) & torch.isfinite(two)
    if bool((torch.isfinite(one) != torch.isfinite(two)).any()):
        return 1.0
    if not bool(both.any()):
        return 0.0
    size = torch.maximum(one[both].abs().max(), two[both].abs().max()).clamp(min=1e-30)
    return float((one - two)[both].abs().max() / size)
