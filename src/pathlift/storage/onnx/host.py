"""Numbers that no activation and no weight has a part in: sizes, axes, indices. They are computed by onnx's own evaluator.

They are arrays of NumPy's, not tensors, so that they are plain numbers where a model is traced. A small file must not unfold:
how large a result will be is inferred, by onnx too, before it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pathlift.errors import InputError
from pathlift.storage.onnx.program import Array
from pathlift.storage.packages import package

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
    """Whether an operator is evaluated here: it reads plain numbers only, and does not repeat one of them very often."""
    if kind not in HOST or not all(array is None or isinstance(array, np.ndarray) for array in arrays):
        return False
    return kind != "ConstantOfShape" or math.prod(np.ravel(np.asarray(arrays[0])).tolist()) <= SMALL


def evaluate(kind: str, version: int, settings: Mapping[str, Any], arrays: Sequence[Array | None], count: int) -> list[Array]:
    """Run one operator in onnx's evaluator, unless a result would have more than `LARGEST` elements."""
    onnx, reference = package("onnx", "onnx"), package("onnx.reference", "onnx")
    names = ["" if array is None else f"x{index}" for index, array in enumerate(arrays)]
    proto_of = onnx.numpy_helper.from_array
    settings = {name: proto_of(value) if isinstance(value, np.ndarray) else value for name, value in settings.items()}
    node = onnx.helper.make_node(kind, names, [f"y{index}" for index in range(count)], **settings)
    tensors = [proto_of(array, name) for name, array in zip(names, arrays, strict=True) if array is not None]
    graph = onnx.helper.make_graph([node], "one", [], [onnx.ValueInfoProto(name=name) for name in node.output], tensors)
    program = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])
    given = sum(array.size for array in arrays if array is not None)
    for value in onnx.shape_inference.infer_shapes(program, data_prop=True).graph.output:
        sizes = [size.dim_value if size.HasField("dim_value") else given for size in value.type.tensor_type.shape.dim]
        if math.prod(sizes) > LARGEST:
            raise InputError(f"its result would have {math.prod(sizes):,} elements, more than {LARGEST:,}.")
    return [np.asarray(array) for array in reference.ReferenceEvaluator(program).run(None, {})]
