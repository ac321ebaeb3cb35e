"""Numbers that no activation and no weight has a part in: sizes, axes, indices. They are computed by onnx's own evaluator.

They are arrays of NumPy's, not tensors, so that they are plain numbers where a model is traced. A small file must not unfold:
how large a result will be is told before it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pathlift.storage.packages import package

Array = np.ndarray[Any, Any]

LARGEST = 1 << 24
"""A result has at most so many elements."""

SMALL = 1 << 20
"""A tensor of one number that is repeated more often is left to PyTorch, where it takes no memory."""

HOST = frozenset({
    "Abs", "Add", "And", "ArgMax", "ArgMin", "Cast", "CastLike", "Ceil", "Concat", "ConstantOfShape", "CumSum", "Div", "Equal",
    "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual", "Identity", "Less",
    "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "NonZero", "Not", "Or", "Pow", "Range", "Reciprocal", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Round", "ScatterElements", "ScatterND", "Shape", "Sign",
    "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
})  # fmt: skip
"""Operators that are evaluated so when all their inputs are such numbers."""


def on_host(kind: str, arrays: Sequence[object]) -> bool:
    """Whether an operator is evaluated here.

    Args:
        kind: Its name.
        arrays: Its inputs.

    Returns:
        Whether all of them are plain numbers, and its result is not one number repeated very often.
    """
    if kind not in HOST or not all(own is None or isinstance(own, np.ndarray) for own in arrays):
        return False
    return kind != "ConstantOfShape" or _product(arrays[0]) <= SMALL


class TooLargeError(ValueError):
    """A result would have more elements than `LARGEST`."""


def evaluate(kind: str, version: int, settings: Mapping[str, Any], arrays: Sequence[Array | None], count: int) -> list[Array]:
    """Evaluate one operator.

    Args:
        kind: Name of the operator, one of `HOST`.
        version: Version of the standard.
        settings: Its attributes.
        arrays: Its inputs; None for those left out.
        count: How many results it has.

    Returns:
        The results.

    Raises:
        TooLargeError: They would be larger than anything that sizes and indices need.
    """
    if _elements(kind, [own for own in arrays if own is not None]) > LARGEST:
        raise TooLargeError(f"its result would have more than {LARGEST:,} elements.")
    onnx, reference = package("onnx", "onnx"), package("onnx.reference", "onnx")
    names = [f"x{place}" if own is not None else "" for place, own in enumerate(arrays)]
    results = [f"y{place}" for place in range(count)]
    written = {key: onnx.numpy_helper.from_array(own) if isinstance(own, np.ndarray) else own for key, own in settings.items()}
    node = onnx.helper.make_node(kind, names, results, **written)
    inputs = [onnx.ValueInfoProto(name=name) for name in names if name]
    graph = onnx.helper.make_graph([node], "one", inputs, [onnx.ValueInfoProto(name=name) for name in results])
    program = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])
    found = reference.ReferenceEvaluator(program).run(
        None, {name: own for name, own in zip(names, arrays, strict=True) if name}
    )
    return [np.asarray(own) for own in found]


def _elements(kind: str, arrays: Sequence[Array]) -> int:
    """Return a bound on the number of elements of a result."""
    sizes = [own.size for own in arrays]
    if kind == "ConstantOfShape":
        return _product(arrays[0])
    if kind == "Expand":
        return _product(np.broadcast_shapes(arrays[0].shape, tuple(int(size) for size in arrays[1].ravel())))
    if kind == "Tile":
        return sizes[0] * _product(arrays[1])
    if kind == "Range":
        start, limit, step = (float(own.item()) for own in arrays)
        return math.ceil(abs((limit - start) / step)) if step else LARGEST + 1
    if kind in {"Gather", "GatherND"}:
        return sizes[0] * sizes[1]
    if kind == "NonZero":
        return sizes[0] * arrays[0].ndim
    try:
        return max(sum(sizes), _product(np.broadcast_shapes(*(own.shape for own in arrays))))
    except ValueError:
        return sum(sizes)


def _product(sizes: Any) -> int:
    return math.prod(int(size) for size in np.ravel(sizes))
