"""The bytes of an ``.onnx`` file as a program that has been looked at: nothing in it leads to another file or unfolds.

What is refused: operators outside the standard, all named together; weights in files that do not lie in the program's folder or
below it; values that are made twice or never; programs within the program, except the two branches of an ``If``. Functions of
the program's own are put in the place of the nodes that call them, and old versions of the standard are converted, both by
the onnx package.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pathlift.errors import InputError, one_line
from pathlift.storage.packages import package
from pathlift.storage.sizes import check_unfolding

STANDARD = ("", "ai.onnx")
"""The domains of the operators of the standard: two names of one."""

LEARNING = "ai.onnx.ml"
"""The domain of the operators that scikit-learn's exporter puts around a network."""

OPSETS = range(7, 26)
"""Versions of the standard that are read; onnx converts older ones to the first of them."""

DEEPEST = 8
"""So many branches may lie within each other."""

MOST_NODES = 1 << 17
"""So many nodes may come from one function, and functions may call each other 64 deep."""


def load_program(path: Path) -> Any:
    """Read a program as it stands, without weights in other files; lists of floats in it are tensors."""
    onnx = package("onnx", "onnx")
    program = onnx.load(str(path), load_external_data=False)
    _check_depth(program.graph, 0)
    for node in (*nodes_of(program.graph), *(node for function in program.functions for node in function.node)):
        if node.op_type == "Constant" and node.domain in STANDARD:
            tensor = _constant(node)
            if node.attribute[0].name == "value_floats":  # may be a weight, which has to be written back
                node.attribute[0].CopyFrom(onnx.helper.make_attribute("value", tensor))
    return program


def flattened(program: Any) -> Any:
    """Return a program without functions, in a version of the standard that is read, after a look at all of it."""
    onnx = package("onnx", "onnx")
    called = {(function.domain, function.name): function for function in program.functions}
    if any((node.domain, node.op_type) in called for node in nodes_of(program.graph)):
        _check_functions(program, called)
        program = _inlined(onnx, program)
        _check_depth(program.graph, 0)
    version = opset_of(program)
    _check_operators(onnx, program.graph)
    _check_values(program.graph, frozenset())
    if version < OPSETS[0]:
        try:
            program = package("onnx.version_converter", "onnx").convert_version(program, OPSETS[0])
        except RuntimeError as error:
            raise InputError(f"onnx cannot convert it from version {version} of the standard: {one_line(error)}") from error
        _check_values(program.graph, frozenset())
    return program


def _inlined(onnx: Any, program: Any) -> Any:
    """Return a program without functions; those in another version of the standard are converted, which asks for types."""
    typed = type(program).FromString(program.SerializeToString())
    known = (onnx.helper.make_tensor_value_info(held.name, held.data_type, held.dims) for held in program.graph.initializer)
    typed.graph.value_info.extend(known)
    try:
        return package("onnx.inliner", "onnx").inline_local_functions(typed, True)
    except RuntimeError as error:
        raise InputError(
            f"onnx cannot put its functions in the place of the nodes that call them: {one_line(error)}"
        ) from error


def opset_of(program: Any) -> int:
    """Return the version of the standard that a program is written in."""
    version = max((opset.version for opset in program.opset_import if opset.domain in STANDARD), default=0)
    if not 1 <= version <= OPSETS[-1]:
        named = f"version {version} of the standard (opset)" if version else "no version of the standard"
        raise InputError(f"it is written in {named}; versions up to {OPSETS[-1]} are read.")
    return int(version)


def branches(node: Any) -> dict[str, Any]:
    """Return the programs that a node chooses from, by the name of the attribute: those of an ``If``, else none."""
    return {attribute.name: attribute.g for attribute in node.attribute if node.op_type == "If" and attribute.HasField("g")}


def nodes_of(graph: Any) -> Iterator[Any]:
    """Iterate over the nodes of a graph, those of a branch after the node that they lie in."""
    for node in graph.node:
        yield node
        for branch in branches(node).values():
            yield from nodes_of(branch)


def constants(graph: Any, *, inner: bool = True) -> Iterator[tuple[str, Any, bool]]:
    """Yield the name, the ``TensorProto`` and whether it is an initialiser of every constant; also of those in branches."""
    for tensor in graph.initializer:
        yield tensor.name, tensor, True
    for node in graph.node:
        if node.op_type == "Constant":
            yield node.output[0], _constant(node), False
        for branch in branches(node).values() if inner else ():
            yield from constants(branch)


def name_of(node: Any) -> str:
    """Return what a node is called, never an empty text: its name in the file, or what it makes."""
    return node.name or next((name for name in node.output if name), "") or node.op_type or "node"


def read_weights(program: Any, path: Path) -> None:
    """Read weights that are kept in other files, which must lie in the program's folder or below it, into the program."""
    external = [tensor for _, tensor, _ in constants(program.graph) if tensor.data_location == 1]
    entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in external]
    files = [_beside(path, entry.get("location", "")) for entry in entries]
    lengths = [_length(entry, file) for entry, file in zip(entries, files, strict=True)]
    check_unfolding(sum(file.stat().st_size for file in set(files)), sum(lengths))
    for tensor, entry, file, length in zip(external, entries, files, lengths, strict=True):
        with file.open("rb") as content:
            content.seek(int(entry.get("offset", 0)))
            tensor.raw_data = content.read(length)
        tensor.data_location = 0
        del tensor.external_data[:]


def _beside(path: Path, location: str) -> Path:
    """Return a file by its place relative to the program's folder; links are followed, and must not lead out of it."""
    folder = Path(os.path.realpath(path.parent))
    file = Path(os.path.realpath(folder / location)) if location.isprintable() else folder
    if Path(location).is_absolute() or not file.is_relative_to(folder) or not file.is_file():
        raise InputError(f"its weights are said to be in {location[:200]!r}, which is no file in the folder of the program.")
    return file


def _length(entry: dict[str, str], file: Path) -> int:
    """Return how many bytes of a file a tensor takes."""
    size, offset = file.stat().st_size, int(entry.get("offset", 0))
    length = int(entry.get("length", size - offset))
    if offset < 0 or length < 0 or offset + length > size:
        raise InputError(f"weights are said to be {length} bytes at {offset} of '{file.name}', which has {size}.")
    return length


def _constant(node: Any) -> Any:
    """Return the value of a ``Constant`` as a ``TensorProto``, however the file has it."""
    if len(node.attribute) != 1 or len(node.output) != 1:
        raise InputError(f"the constant {name_of(node)!r} has no value, or several.")
    attribute, helper = node.attribute[0], package("onnx.helper", "onnx")
    if attribute.name == "value":
        return attribute.t
    kinds = {"value_float": 1, "value_floats": 1, "value_int": 7, "value_ints": 7}
    if attribute.name not in kinds:
        raise InputError(f"the constant {name_of(node)!r} is text or a sparse tensor, which is not read.")
    value = helper.get_attribute_value(attribute)
    shape, values = ([len(value)], value) if attribute.name.endswith("s") else ([], [value])
    return helper.make_tensor(node.output[0], kinds[attribute.name], shape, values)


# ---- a look at all of it


def _check_depth(graph: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise InputError(f"it has more than {DEEPEST} branches within each other.")
    for node in graph.node:
        for branch in branches(node).values():
            _check_depth(branch, depth + 1)


def _check_functions(program: Any, called: dict[tuple[str, str], Any]) -> None:
    """Refuse functions that call themselves, or unfold to very many nodes."""
    sizes: dict[tuple[str, str], int] = {}

    def size(node: Any, within: tuple[tuple[str, str], ...]) -> int:
        key = (node.domain, node.op_type)
        if key in called and key not in sizes:
            if key in within or len(within) > 64:
                raise InputError(f"its function {node.op_type!r} calls itself, or others more than 64 deep.")
            sizes[key] = sum(size(inner, (*within, key)) for inner in called[key].node)
        return sizes.get(key, 1)

    for node in nodes_of(program.graph):
        if size(node, ()) > MOST_NODES:
            raise InputError(f"its function {node.op_type!r} unfolds to more than {MOST_NODES:,} nodes.")


def _check_operators(onnx: Any, graph: Any) -> None:
    """Refuse operators that are not of the standard, all at once, and programs within the program."""
    unknown: dict[str, list[str]] = {}
    for node in nodes_of(graph):
        domain = "" if node.domain in STANDARD else node.domain
        if domain not in {"", LEARNING} or not onnx.defs.has(node.op_type, domain):
            kind = f"{node.op_type!r}" + (f" of {domain!r}" if domain else "")
            unknown.setdefault(kind, []).append(repr(name_of(node)[:100]))
        if any(attribute.ref_attr_name or attribute.graphs for attribute in node.attribute):
            raise InputError(f"the node {name_of(node)!r} has attributes without a value, or too many programs.")
        if node.op_type == "If" and {"then_branch", "else_branch"} != set(branches(node)):
            raise InputError(f"the node {name_of(node)!r} has no two branches.")
    if unknown:
        listed = [f"{kind} (node{'s' if names[1:] else ''} {_several(names, 5)})" for kind, names in unknown.items()]
        raise InputError(f"it has operators that are none of the ONNX standard: {_several(listed, 20)}.")


def _several(texts: list[str], most: int) -> str:
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def _check_values(graph: Any, outer: frozenset[str]) -> None:
    """Refuse values that are made twice, or read before they are made."""
    if graph.sparse_initializer:
        raise InputError("it holds sparse tensors, which are not read.")
    initialisers = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in initialisers]
    made = [name for node in graph.node for name in node.output if name]
    made += [*inputs, *(tensor.name for tensor in graph.initializer)]
    twice = next((name for name, count in Counter(made).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"there are two values of the name {twice!r}.")
    known = {*outer, *initialisers, *inputs}
    for node in graph.node:
        lost = next((name for name in node.input if name and name not in known), None)
        if lost is not None:
            raise InputError(f"the node {name_of(node)!r} reads {lost!r}, which nothing before it makes.")
        for branch in branches(node).values():
            _check_values(branch, frozenset(known))
        known.update(node.output)
    lost = next((value.name for value in graph.output if value.name not in known), None)
    if lost is not None:
        raise InputError(f"it returns {lost!r}, which nothing makes.")
    if not graph.output:
        raise InputError("it returns nothing.")
