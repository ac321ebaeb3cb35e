"""ONNX files that have been damaged, bit by bit or field by field: ``python tests/onnx_mutants.py FOLDER FIRST COUNT``.

Prints a line for each: what became of it. The limits are those of the machine: memory by `resource`; seconds of the processor
are counted, and a watch ends the process where one file takes far longer, so that nothing that a file does can pass unseen.
"""

from __future__ import annotations

import faulthandler
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

SECONDS = 20
"""Of the processor, for one file; on the wall it may be ten times as many."""

MEMORY = 2 << 30

NUMBERS = (-(1 << 63), -(1 << 31), -2, -1, 0, 1, 2, 3, 7, 1 << 16, 1 << 31, 1 << 40, (1 << 63) - 1)
"""Numbers that sizes, axes and types are replaced by."""


def bases() -> list[tuple[Any, tuple[int, ...]]]:
    """Return programs to damage, with the shape of their input."""
    node, draw = helper.make_node, np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return draw.normal(size=shape).astype(np.float32)

    def program(nodes: list[Any], tensors: dict[str, Any], shape: tuple[int, ...], opset: int, functions: Any = ()) -> Any:
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", *shape])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
        )
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)

    image = [
        node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1], strides=[1, 1], group=1),
        node("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], ["n"], name="norm"), node("Relu", ["n"], ["r"]),
        node("MaxPool", ["r"], ["p"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), node("Shape", ["p"], ["s"]),
        node("Resize", ["p", "", "factors"], ["u"], mode="nearest"), node("Slice", ["u", "zero", "four", "axes"], ["cut"]),
        node("AveragePool", ["r"], ["a"], kernel_shape=[2, 2], auto_pad="SAME_UPPER"), node("Pad", ["a", "pads"], ["padded"]),
        node("Concat", ["cut", "cut"], ["both"], axis=1), node("Gather", ["s", "zero"], ["size"], axis=0),
        node("Concat", ["size", "rest"], ["sizes"], axis=0), node("Reshape", ["both", "sizes"], ["f"]),
        node("GlobalAveragePool", ["padded"], ["means"]), node("Flatten", ["means"], ["flat"]),
        node("Concat", ["f", "flat"], ["all"], axis=1), node("Gemm", ["all", "v"], ["y"], name="head", transB=1),
    ]  # fmt: skip
    tensors = {
        "w": array(4, 3, 3, 3), "b": array(4), "scale": array(4), "shift": array(4), "mean": array(4),
        "variance": np.ones(4, np.float32), "factors": np.array([1, 1, 2, 2], np.float32), "zero": np.array([0]),
        "four": np.array([4]), "axes": np.array([2]), "pads": np.array([0, 0, 0, 0, 0, 0, 1, 1]), "rest": np.array([-1]),
        "v": array(3, 8 * 4 * 4 + 4),
    }  # fmt: skip
    branch = [
        helper.make_graph([node(kind, ["h"], [name])], name, [], [helper.make_tensor_value_info(name, 1, None)])
        for kind, name in (("Neg", "minus"), ("Identity", "plus"))
    ]
    plain = [
        node("Constant", [], ["k"], value=numpy_helper.from_array(array(5, 4), "k")),
        node("Transpose", ["k"], ["t"], perm=[1, 0]),
        node("QuantizeLinear", ["t", "step"], ["q"]), node("DequantizeLinear", ["q", "step"], ["d"]),
        node("MatMul", ["x", "d"], ["h"]), node("Shape", ["h"], ["s"]), node("Gather", ["s", "one"], ["size"], axis=0),
        node("Equal", ["size", "five"], ["c"]), node("If", ["c"], ["z"], then_branch=branch[0], else_branch=branch[1]),
        node("Leaky", ["z"], ["l"], domain="own", alpha=0.2), node("Clip", ["l", "low", "high"], ["y"]),
    ]  # fmt: skip
    numbers = {"step": np.float32(0.1), "one": np.int64(1), "five": np.int64(5), "low": np.float32(-1), "high": np.float32(6)}
    leaky = node("LeakyRelu", ["a"], ["b"])
    leaky.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT))
    function = helper.make_function("own", "Leaky", ["a"], ["b"], [leaky], [helper.make_opsetid("", 17)], ["alpha"])
    return [(program(image, tensors, (3, 5, 5), 17), (3, 5, 5)), (program(plain, numbers, (4,), 17, [function]), (4,))]


def bits(draw: random.Random, program: Any) -> bytes:
    """Change a few bytes, or leave out, repeat or cut a piece."""
    content = bytearray(program.SerializeToString())
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.3:
        first, length = draw.randrange(len(content)), draw.randrange(64)
        content[first : first + length] = draw.choice([b"", content[first : first + length] * 2, draw.randbytes(length)])
    return bytes(content[: draw.randrange(len(content))] if draw.random() < 0.15 else content)


def fields(draw: random.Random, program: Any) -> bytes:
    """Change a few fields, anywhere."""
    for _ in range(draw.choice([1, 1, 2, 4])):
        message = program
        for _ in range(draw.randrange(1, 7)):  # down to a message within
            below = [
                inner
                for field, value in message.ListFields()
                if field.message_type is not None
                for inner in (value if hasattr(value, "append") or hasattr(value, "add") else [value])
            ]
            if not below:
                break
            message = draw.choice(below)
        known = message.ListFields()
        if known:
            _change(draw, message, *draw.choice(known))
    return bytes(program.SerializeToString())


def _change(draw: random.Random, message: Any, field: Any, value: Any) -> None:
    several = hasattr(value, "append") or hasattr(value, "add")
    if draw.random() < 0.15:
        message.ClearField(field.name)
    elif field.message_type is not None:
        if several and len(value):
            chosen = draw.choice(value)
            draw.choice([lambda: value.append(chosen), lambda: value.remove(chosen)])()
    else:
        kinds = {str: lambda: draw.choice(["", "x", "y", "h", "r", "Conv", "If", "Loop", "Resize", "a" * 500]),
                 bytes: lambda: draw.randbytes(draw.randrange(40)), float: lambda: draw.choice([0.0, -1.0, 1e38, float("nan")]),
                 int: lambda: draw.choice(NUMBERS)}  # fmt: skip
        new = kinds[type(value[0] if several else value)] if not several or len(value) else int
        try:
            if several:
                value[draw.randrange(len(value))] = new()
            else:
                setattr(message, field.name, new())
        except (ValueError, TypeError):  # not a number of this field's
            message.ClearField(field.name)


def structure(draw: random.Random, program: Any) -> bytes:
    """Change what is connected with what, shapes, operators and versions."""
    graph, kinds = program.graph, sorted({schema.name for schema in onnx.defs.get_all_schemas()})
    names = [name for node in graph.node for name in (*node.input, *node.output)] + ["", "x"]
    for _ in range(draw.choice([1, 1, 2, 3])):
        node, tensor = draw.choice(graph.node), draw.choice(graph.initializer)
        way = draw.randrange(9)
        if way == 0 and node.input:  # other inputs, cycles among them
            node.input[draw.randrange(len(node.input))] = draw.choice(names)
        elif way == 1:
            inputs = list(node.input)
            draw.shuffle(inputs)
            node.input[:] = inputs
        elif way == 2:
            node.op_type = draw.choice(kinds)
        elif way == 3 and tensor.dims:
            tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(NUMBERS)
        elif way == 4:  # a tensor of another shape and type
            shape = [draw.choice([0, 1, 2, 3, 5]) for _ in range(draw.randrange(5))]
            kind = draw.choice([np.float32, np.float64, np.int64, np.bool_, np.float16, np.uint8])
            tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, kind), tensor.name))
        elif way == 5:  # numbers that decide what is computed
            array = numpy_helper.to_array(tensor) if not any(size > 1 << 20 for size in tensor.dims) else np.ones(1)
            huge = draw.choice(NUMBERS) if array.dtype == np.int64 else draw.choice([0, 1, -1, 2, 1000, 1e9, 1e30])
            tensor.CopyFrom(numpy_helper.from_array(np.full(array.shape, huge).astype(array.dtype), tensor.name))
        elif way == 6:
            sizes = graph.input[0].type.tensor_type.shape.dim
            sizes[draw.randrange(len(sizes))].dim_value = draw.choice(NUMBERS)
        elif way == 7 and node.attribute:
            attribute = draw.choice(node.attribute)
            if attribute.ints:
                attribute.ints[draw.randrange(len(attribute.ints))] = draw.choice(NUMBERS)
            else:
                attribute.i = draw.choice(NUMBERS)
        else:
            program.opset_import[0].version = draw.choice([0, 1, 5, 6, 7, 9, 11, 13, 21, 25, 30])
    return bytes(program.SerializeToString())


WAYS: tuple[Callable[[random.Random, Any], bytes], ...] = (bits, fields, structure)


def mutant(number: int) -> tuple[bytes, tuple[int, ...]]:
    """Return a damaged file and the shape of its input."""
    draw = random.Random(number)
    program, shape = draw.choice(bases())
    try:
        return WAYS[number % len(WAYS)](draw, program), shape
    except (ValueError, TypeError, IndexError):  # what cannot be written down any more
        return bits(draw, draw.choice(bases())[0]), shape


def main(folder: Path, first: int, count: int) -> None:
    import pathlift
    from pathlift.storage.models import load_model

    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    path = folder / "mutant.onnx"
    for number in range(first, first + count):
        content, shape = mutant(number)
        path.write_bytes(content)
        faulthandler.dump_traceback_later(10 * SECONDS, exit=True)
        start = time.process_time()
        print(number, end=" ", flush=True)
        try:
            print("read", pathlift.path_norm(load_model(str(path)), shape).log10, flush=True)
        except pathlift.PathliftError as error:
            print("refused", repr(str(error))[:300], flush=True)
        except Exception as error:
            print("raised", repr(error)[:300], flush=True)
        faulthandler.cancel_dump_traceback_later()
        assert time.process_time() - start < SECONDS, number


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
