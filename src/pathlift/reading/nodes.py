"""What a node of the exporter's graph says of itself: its operator, the modules that it lies in, its line in the source."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

from pathlift.storage import onnx

IGNORED = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
}
"""Operators that check something and compute nothing."""

REFUSED = torch.ops.pathlift.refused.default
"""What stands in a graph for an operator of a file that is not read."""

INTERPRETER = str(Path(onnx.__file__).parent)
"""Where operators of ONNX files are run: no place to look for them."""


def operator_name(node: fx.Node) -> str:
    """Return the name of an operator with its overload, for messages."""
    if node.target is REFUSED:
        return str(node.args[1])
    return (
        str(node.target)
        if getattr(node.target, "_schema", None) is not None
        else str(getattr(node.target, "__name__", node.target))
    )


def base_name(node: fx.Node) -> str:
    """Return the name of an operator: ``relu_`` and ``aten.relu.default`` are both ``relu``."""
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    schema = getattr(node.target, "_schema", None)
    return name[:-1] if schema is not None and schema.is_mutable and name.endswith("_") else name


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that a call lies in."""
    paths = module_paths(node)
    return paths[-1] if paths else ""


def module_paths(node: fx.Node) -> list[str]:
    """Return the paths of the modules that a call lies in, from the outermost on."""
    stack = node.meta.get("nn_module_stack") or {}
    return [str(path).removeprefix("L['self']").removeprefix(".") for path, _ in stack.values()]


def source_line(node: fx.Node) -> str:
    """Return the innermost line of the stack trace that is neither PyTorch's own nor that of the reader of ONNX files."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    files = [line for line in lines if line.startswith("File ") and INTERPRETER not in line]
    outside = [line for line in files if "/torch/" not in line.replace("\\", "/")]
    for line in reversed(outside or files):
        parts = line.split('"')
        if len(parts) > 2:
            number = parts[2].split("line ")[-1].split(",")[0].strip()
            return f"{parts[1]}:{number}"
    return ""
