"""The bytes of an ``.onnx`` file as a program that has been looked at: nothing in it leads to another file or unfolds.

What is refused: operators outside the standard, all named together; weights in files that do not lie in the program's folder or
below it; values that are made twice or never; programs within the program, except the two branches of an ``If``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pathlift.errors import InputError
from pathlift.storage.packages import package
from pathlift.storage.sizes import check_unfolding

STANDARD = ("", "ai.onnx")
"""The domains of the operators of the standard: two names of one."""

OPSETS = range(7, 26)
"""Versions of the standard that are read."""

DEEPEST = 8
"""So many branches may lie within each other."""

INNER = {"Loop", "Scan", "SequenceMap"}
"""Operators that run a program of their own many times: that program is not looked at, and they are not read."""


def load_program(path: Path, *, weights: bool = True) -> Any:
    """Read a program and look at it.

    Args:
        path: The file.
        weights: Whether to read the weights that lie in other files, too.

    Returns:
        A ``ModelProto`` without functions; its operators are those of the standard.

    Raises:
        InputError: It is not what an ONNX file should be.
    """
    onnx = package("onnx", "onnx")
    program = onnx.load(str(path), load_external_data=False)
    opset_of(program)
    _check_operators(onnx, program.graph)
    _check_values(program.graph, frozenset(), 0)
    if weights:
        read_weights(onnx, program, path)
    del program.functions[:], program.training_info[:]
    return program


def opset_of(program: Any) -> int:
    """Return the version of the standard that a program is written in.

    Args:
        program: A ``ModelProto``.

    Returns:
        The version.

    Raises:
        InputError: It names none, or one that is not read.
    """
    version = max((own.version for own in program.opset_import if own.domain in STANDARD), default=0)
    if version not in OPSETS:
        found = f"version {version} of the standard (opset)" if version else "no version of the standard"
        raise InputError(f"it is written in {found}; versions {OPSETS[0]} to {OPSETS[-1]} are read.")
    return int(version)


def branches(node: Any) -> list[Any]:
    """Return the programs that a node chooses from.

    Args:
        node: A ``NodeProto``.

    Returns:
        Two graphs for an ``If``, none for any other operator.
    """
    return [own.g for own in node.attribute if own.HasField("g")] if node.op_type == "If" else []


def nodes_of(graph: Any) -> Iterator[Any]:
    """Iterate over the nodes of a graph and of the branches in it.

    Args:
        graph: A ``GraphProto``.

    Yields:
        Nodes, those of a branch after the node that they lie in.
    """
    for node in graph.node:
        yield node
        for branch in branches(node):
            yield from nodes_of(branch)


def stored(graph: Any) -> Iterator[tuple[str, Any]]:
    """Iterate over the tensors that a graph holds.

    Args:
        graph: A ``GraphProto``.

    Yields:
        Names of values and their ``TensorProto``, those of branches among them.
    """
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            yield node.output[0], node.attribute[0].t
        for branch in branches(node):
            yield from stored(branch)


def named(node: Any) -> str:
    """Return what a node is called: its name in the file, or what it makes.

    Args:
        node: A ``NodeProto``.

    Returns:
        A name that is not empty.
    """
    return node.name or next((name for name in node.output if name), "") or node.op_type or "node"


def _check_operators(onnx: Any, graph: Any) -> None:
    """Refuse operators that are not of the standard, all at once, and programs within the program."""
    unknown: dict[str, list[str]] = {}
    for node in nodes_of(graph):
        standard = node.domain in STANDARD and onnx.defs.has(node.op_type)
        if not standard:
            kind = f"{node.op_type!r}" + (f" of {node.domain!r}" if node.domain not in STANDARD else "")
            unknown.setdefault(kind, []).append(named(node))
        elif node.op_type not in {*INNER, "If"}:
            inner = next((own.name for own in node.attribute if own.HasField("g") or own.graphs), None)
            if inner is not None:
                raise InputError(f"the operator {node.op_type!r} runs programs of its own ({inner!r}), which are not read.")
        if any(own.ref_attr_name or own.graphs for own in node.attribute):
            raise InputError(f"the node {named(node)!r} has attributes without a value, or too many programs.")
        if node.domain:
            node.domain = ""
    if unknown:
        listed = "; ".join(f"{kind} ({_several(names)})" for kind, names in list(unknown.items())[:20])
        more = f"; and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        raise InputError(f"it has operators that are none of the ONNX standard: {listed}{more}.")


def _several(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:100]) for name in names[:5])
    return f"node{'s' if len(names) > 1 else ''} {shown}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


def _check_values(graph: Any, outer: frozenset[str], depth: int) -> None:
    """Refuse values that are made twice, or read before they are made."""
    if depth > DEEPEST:
        raise InputError(f"it has more than {DEEPEST} branches within each other.")
    weights = [tensor.name for tensor in graph.initializer]
    if graph.sparse_initializer:
        raise InputError("it holds sparse tensors, which are not read.")
    made = [name for node in graph.node for name in node.output if name]
    made += [*weights, *(own.name for own in graph.input if own.name not in set(weights))]
    twice = next((name for name, count in Counter(made).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"there are two values of the name {twice!r}.")
    known = {*outer, *weights, *(own.name for own in graph.input)}
    for node in graph.node:
        lost = next((name for name in node.input if name and name not in known), None)
        if lost is not None:
            raise InputError(f"the node {named(node)!r} reads {lost!r}, which nothing before it makes.")
        for branch in branches(node):
            _check_values(branch, frozenset(known), depth + 1)
        known.update(node.output)
    lost = next((own.name for own in graph.output if own.name not in known), None)
    if lost is not None:
        raise InputError(f"it returns {lost!r}, which nothing makes.")
    if not graph.output:
        raise InputError("it returns nothing.")


def read_weights(onnx: Any, program: Any, path: Path) -> None:
    """Read weights that are kept in other files, which must lie in the program's folder or below it.

    Args:
        onnx: The package.
        program: The program; its weights are in it afterwards.
        path: Its file.

    Raises:
        InputError: They lie elsewhere, or the files do not hold them.
    """
    external = [tensor for tensor in _tensors(program.graph) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    found = [(tensor, _entries(tensor), _beside(path, _entries(tensor).get("location", ""))) for tensor in external]
    size = sum(file.stat().st_size for file in {file for _, _, file in found})
    check_unfolding(size, sum(_length(entries, file) for _, entries, file in found))
    for tensor, entries, file in found:
        with file.open("rb") as opened:
            opened.seek(int(entries.get("offset", 0)))
            tensor.raw_data = opened.read(_length(entries, file))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
        for branch in branches(node):
            yield from _tensors(branch)


def _entries(tensor: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _beside(path: Path, location: str) -> Path:
    """Return a file by its place relative to the program's folder; links are followed, and must not lead out of it."""
    folder = Path(os.path.realpath(path.parent))
    file = Path(os.path.realpath(folder / location)) if location.isprintable() else folder
    if Path(location).is_absolute() or not file.is_relative_to(folder) or not file.is_file():
        raise InputError(f"its weights are said to be in {location[:200]!r}, which is no file in the folder of the program.")
    return file


def _length(entries: dict[str, str], file: Path) -> int:
    """Return how many bytes of a file a tensor takes."""
    size, offset = file.stat().st_size, int(entries.get("offset", 0))
    length = int(entries.get("length", size - offset))
    if offset < 0 or length < 0 or offset + length > size:
        raise InputError(f"weights are said to be {length} bytes at {offset} of '{file.name}', which has {size}.")
    return length
