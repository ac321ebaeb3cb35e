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
from pathlift.storage.onnx.module import OnnxModule, Operator
from pathlift.storage.onnx.program import DTYPES, Array, Node, tensor_of
from pathlift.storage.packages import package

SEED = 20250

AGREEMENT = 1000
"""Outputs may differ by so many units of rounding of the largest, and by what rounding explains besides."""

CARRIED = 300.0
"""In units of the difference that it makes when every value is moved by one: roundings of long sums go one way."""


def mark_batch(module: OnnxModule) -> None:
    """Find the sizes in constant shapes that are the number of samples; ``keeps_batch`` of their nodes is set."""
    shapes = declared_shapes(module, None)
    if not shapes or not shapes[0] or (batch := shapes[0][0]) < 1 or any(shape[:1] != (batch,) for shape in shapes):
        return
    starts = {name for name, array in module.program.arrays.items() if array.ndim == 1 and array.size and array[0] == batch}
    reshapes = [node for node in module.program.nodes if node.kind == "Reshape" and not starts.isdisjoint(node.inputs[1:])]
    marked: list[Node] = []

    def note(operator: nn.Module, inputs: Any) -> None:
        assert isinstance(operator, Operator) and operator.node
        if isinstance(inputs[0], Tensor) and inputs[0].shape[:1] == (batch,):
            marked.append(operator.node)

    hooks = [module.get_submodule(".".join(node.path)).register_forward_pre_hook(note) for node in reshapes]
    known = _shapes(module, shapes)
    for hook in hooks:
        hook.remove()
    for node in marked:
        node.settings["keeps_batch"] = True
    grown = _shapes(module, [(batch + 1, *shape[1:]) for shape in shapes])
    grows = known is not None and [(batch + 1, *shape[1:]) for shape in known if shape[:1] == (batch,)] == grown
    for node in marked if not grows else ():
        del node.settings["keeps_batch"]
    if batch > 1 and not (grows and _alone_as_together(module, shapes)):
        module.samples = batch


def declared_shapes(module: OnnxModule, batch: int | None) -> list[tuple[int, ...]] | None:
    """Return the shapes of all inputs, with `batch` where the number of samples is open; None if a size is left open."""
    shapes = []
    for declared in module.inputs:
        sizes = declared.shape and (declared.shape[0] or batch, *declared.shape[1:])
        if sizes is None or None in sizes:
            return None
        shapes.append(tuple(size for size in sizes if size is not None))
    return shapes


def _shapes(module: OnnxModule, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]] | None:
    """Run a module without numbers; return the shapes of its outputs, None where it cannot be run so."""
    state = {name: tensor.to("meta") for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    pairs = zip(shapes, module.inputs, strict=True)
    values = [torch.empty(shape, dtype=declared.dtype, device="meta") for shape, declared in pairs]
    with torch.no_grad(), contextlib.suppress(PathliftError):  # whoever runs it on numbers is told
        returned = functional_call(module, state, tuple(values))
        return [tuple(value.shape) for value in (returned if isinstance(returned, tuple) else (returned,))]
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
    inputs = _drawn(module, shapes)
    try:
        outputs = _outputs(module, inputs)
    except (UnsupportedModelError, InputError):
        return
    run = _runtime if runtime else _evaluator
    expected = run(path, {declared.name: value for declared, value in zip(module.inputs, inputs, strict=True)})
    if expected is None:
        return
    unit = _unit(module, outputs)
    moved = _outputs(module, inputs, unit)
    for index, (one, two, other) in enumerate(zip(outputs, expected, moved, strict=True)):
        if two is None:
            continue
        off = _apart(one, two)
        if off is None or off > AGREEMENT * unit + CARRIED * (_apart(one, other) or 0.0):
            what = "of another shape" if off is None else f"differ by {off:.2g} relative"
            raise InputError(f"what is read of it is not what a runtime makes of it: the values of output {index + 1} {what}.")


def _alone_as_together(module: OnnxModule, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a sample comes out alone as it does among the others of a batch of the size that the file fixes."""
    inputs = _drawn(module, shapes)
    try:
        together, alone = _outputs(module, inputs), _outputs(module, [value[:1] for value in inputs])
    except PathliftError:
        return False
    apart = [_apart(one, two[:1]) if two.dim() else None for one, two in zip(alone, together, strict=True)]
    return all(off is not None and off <= 100 * AGREEMENT * _unit(module, together) for off in apart)


def _unit(module: OnnxModule, outputs: Sequence[Tensor]) -> float:
    """Return the unit of rounding of the coarsest type that a module computes in."""
    casts = {DTYPES.get(node.get("to", 0)) for part in module.program.all() for node in part.nodes}
    kinds = {tensor.dtype for tensor in (*module.parameters(), *module.buffers(), *outputs)} | casts
    return max(torch.finfo(kind).eps for kind in kinds | {torch.float32} if kind is not None and kind.is_floating_point)


def _drawn(module: OnnxModule, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    draws = np.random.default_rng(SEED)
    inputs = []
    for declared, shape in zip(module.inputs, shapes, strict=True):
        values = draws.normal(size=shape) if declared.dtype.is_floating_point else draws.integers(0, 2, size=shape)
        name = str(declared.dtype).removeprefix("torch.").replace("bfloat16", "float32")
        inputs.append(np.asarray(values, dtype=name))
    return inputs


def _outputs(module: OnnxModule, inputs: Sequence[Array], moved: float = 0.0) -> list[Tensor]:
    """Run a module; if asked for, with the results of all nodes moved a little, as rounding may move them."""
    draws = torch.Generator().manual_seed(SEED)

    def near(_operator: nn.Module, _inputs: Any, results: Any) -> Any:
        return tuple(
            value * (1 + moved * torch.randn(value.shape, generator=draws)).to(value.dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for value in results
        )

    operators = [child for child in module.modules() if isinstance(child, Operator) and child.node and moved]
    hooks = [operator.register_forward_hook(near) for operator in operators]
    try:
        with torch.no_grad():
            returned = module(*map(tensor_of, inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return list(returned) if isinstance(returned, tuple) else [returned]


def session(path: Path) -> Any:
    """Open a file in onnxruntime, which runs it as it stands, silently and with as many threads as PyTorch."""
    runtime = package("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _runtime(path: Path, inputs: dict[str, Array]) -> list[Tensor | None] | None:
    """Run a file in onnxruntime; None where that cannot."""
    try:
        return _numbers(session(path).run(None, inputs))
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            return None  # an operator or a version that it does not have
        raise


def _evaluator(path: Path, inputs: dict[str, Array]) -> list[Tensor | None]:
    """Run a file in onnx's own evaluator."""
    try:
        outputs = package("onnx.reference", "onnx").ReferenceEvaluator(str(path)).run(None, inputs)
    except Exception as error:
        raise InputError(f"onnx's evaluator cannot run it: {told(error)}") from error
    return _numbers(outputs)


def _numbers(outputs: Sequence[Any]) -> list[Tensor | None]:
    """Return what a runtime returns as tensors; None for texts and for lists of dictionaries."""
    arrays = map(np.asarray, outputs)
    return [None if array.dtype.kind in "OSU" else tensor_of(array) for array in arrays]


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
