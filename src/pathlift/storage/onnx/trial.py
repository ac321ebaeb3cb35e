"""Trial runs of a module that was read: without numbers, to learn which sizes are the batch; with numbers, against a runtime.

A file may fix the number of samples, and write it into the sizes of a Reshape. Such a size is the number of samples wherever
the module then runs with another number just as well. And what was read is compared with what onnxruntime, or onnx's own
evaluator, makes of the file: the outputs must agree to rounding.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pathlift.errors import InputError, PathliftError, UnsupportedModelError, one_line
from pathlift.storage.onnx.module import OnnxModule, Operator
from pathlift.storage.onnx.program import DTYPES, Array, Node, array_of, tensor_of
from pathlift.storage.packages import package

SEED = 20250

AGREEMENT = 100.0
"""Outputs may differ by so many units of rounding of the largest, and by what rounding explains besides."""

CARRIED = 100.0
"""In units of the difference that it makes when values are moved by one unit of rounding: those of long sums go one way."""

WIDEST = 0.1
"""Outputs that differ by more of the largest are others, unless one unit of rounding alone moves them by as much: then they say
nothing, and `capture` refuses what only rounding decides."""


class CannotRunError(Exception):
    """Nothing that is installed can run a file; the text says why."""


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

    Nothing is compared where the module cannot run alone, the file leaves sizes open, or no runtime can run the file.

    Args:
        module: What was read.
        path: The file.
        always: Whether to use onnx's own evaluator, which is slow, where onnxruntime is not installed or cannot run the file.

    Raises:
        InputError: They differ by more than rounding explains.
    """
    shapes = declared_shapes(module, 1)
    if shapes is None or not (always or has_runtime()):
        return
    inputs = _drawn(module, shapes)
    try:
        outputs = _outputs(module, inputs)
    except (UnsupportedModelError, InputError):
        return
    try:
        expected = run_file(path, dict(zip((declared.name for declared in module.inputs), inputs, strict=True)), slow=always)
    except CannotRunError as error:
        if always:
            raise InputError(str(error)) from error
        return
    unit = _unit(module, outputs)
    different = disagreement(outputs, expected, _outputs(module, inputs, unit), unit)
    if different is not None:
        index, off = different
        what = f"differ by {off:.2g} relative" if off < math.inf else "are of another shape, or are no numbers in other places"
        raise InputError(f"what is read of it is not what a runtime makes of it: the values of output {index + 1} {what}.")


def disagreement(
    outputs: Sequence[Tensor], others: Sequence[Tensor | None], moved: Sequence[Tensor], unit: float
) -> tuple[int, float] | None:
    """Find an output of a file that differs from that of a module by more than rounding explains.

    Args:
        outputs: Of the module.
        others: Of the file, None for what is no tensor.
        moved: Of the module, where every value is moved by about one unit of rounding.
        unit: Of rounding, of the coarsest type that is computed in.

    Returns:
        Its index and the difference, see `difference`; None if they agree.
    """
    if len(outputs) != len(others):
        return min(len(outputs), len(others)), math.inf
    for index, (one, two, other) in enumerate(zip(outputs, others, moved, strict=True)):
        if two is not None:
            off, carried = difference(one, two), difference(one, other)
            if off > min(AGREEMENT * unit + CARRIED * carried, max(WIDEST, carried)):
                return index, off
    return None


def difference(one: Tensor, two: Tensor) -> float:
    """Return the largest difference relative to the largest finite entry of both.

    Args:
        one: A tensor.
        two: Another.

    Returns:
        Infinity for other shapes, and where entries that are not finite are others.
    """
    if one.shape != two.shape:
        return math.inf
    one, two = one.double(), two.double()
    gap = torch.where((one == two) | (one.isnan() & two.isnan()), 0.0, (one - two).abs())
    if not bool(gap.any()):
        return 0.0
    entries = torch.cat([one.reshape(-1), two.reshape(-1)])
    largest = entries[entries.isfinite()].abs().max() if bool(entries.isfinite().any()) else torch.tensor(0.0)
    return float(gap.nan_to_num(nan=math.inf, posinf=math.inf).max() / largest)


def coarsest(dtypes: Iterable[torch.dtype | None]) -> float:
    """Return the unit of rounding of the coarsest of some types and float32."""
    return max(torch.finfo(dtype).eps for dtype in {*dtypes, torch.float32} if dtype is not None and dtype.is_floating_point)


def _alone_as_together(module: OnnxModule, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a sample comes out alone as it does among the others of a batch of the size that the file fixes."""
    inputs = _drawn(module, shapes)
    try:
        together, alone = _outputs(module, inputs), _outputs(module, [value[:1] for value in inputs])
    except PathliftError:
        return False
    firsts = [value[:1] if value.dim() else None for value in together]
    unit = _unit(module, alone)
    moved = _outputs(module, [value[:1] for value in inputs], unit)
    return None not in firsts and disagreement(alone, firsts, moved, unit) is None


def _unit(module: OnnxModule, outputs: Sequence[Tensor]) -> float:
    """Return the unit of rounding of the coarsest type that a module computes in."""
    casts = {DTYPES.get(node.get("to", 0)) for part in module.program.all() for node in part.nodes}
    return coarsest({tensor.dtype for tensor in (*module.parameters(), *module.buffers(), *outputs)} | casts)


def _drawn(module: OnnxModule, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    draws = np.random.default_rng(SEED)
    inputs = []
    for declared, shape in zip(module.inputs, shapes, strict=True):
        values = draws.normal(size=shape) if declared.dtype.is_floating_point else draws.integers(0, 2, size=shape)
        inputs.append(array_of(torch.from_numpy(np.asarray(values)), declared.dtype))
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


def has_runtime() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def run_file(path: Path, inputs: Mapping[str, Array], *, slow: bool) -> list[Tensor | None]:
    """Run a file in onnxruntime, as it stands, silently and with as many threads as PyTorch.

    Args:
        path: The file.
        inputs: By name.
        slow: Whether to run it by onnx's own evaluator, which is slow, where onnxruntime is not installed or cannot run it.

    Returns:
        What it returns; None for texts and for lists of dictionaries.

    Raises:
        CannotRunError: It cannot be run.
    """
    reasons = []
    if has_runtime():
        try:
            return _numbers(_session(path).run(None, inputs))
        except Exception as error:  # an operator, a type or a version that it does not have; a file that it refuses
            reasons.append(f"onnxruntime cannot run it: {one_line(error)}")
    if slow:
        try:
            return _numbers(package("onnx.reference", "onnx").ReferenceEvaluator(str(path)).run(None, inputs))
        except Exception as error:
            reasons.append(f"onnx's evaluator cannot run it: {one_line(error)}")
    raise CannotRunError("; ".join(reasons))


def _session(path: Path) -> Any:
    runtime = package("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _numbers(outputs: Sequence[Any]) -> list[Tensor | None]:
    arrays = map(np.asarray, outputs)
    return [None if array.dtype.kind in "OSU" else tensor_of(array) for array in arrays]
