"""Programs in ``.onnx`` files as PyTorch modules, so that nothing in such a file is taken for code or leads to another file.

The importer writes Python source in which the names of nodes stand, follows calls of functions without an end and makes a file
beside the one it reads. So it is given a program in memory that has been looked at first: every node has an identifier for a
name, its operators are those of the standard, and weights in other files have been read from beside the program alone.
"""

from __future__ import annotations

import keyword
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import fx, nn

from pathlift.errors import InputError, told
from pathlift.storage.packages import package
from pathlift.storage.sizes import check_unfolding

STANDARD = ("", "ai.onnx")
"""The domains of the operators of the standard: two names of one."""


def read_onnx(path: Path) -> nn.Module:
    """Read a program.

    Args:
        path: The file.

    Returns:
        A module that computes it; the names of its children are those of the nodes, written as identifiers.

    Raises:
        InputError: There is no such file, it is damaged, or it holds what cannot be converted.
    """
    importer, onnx = package("onnx2torch", "onnx"), package("onnx", "onnx")
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    try:
        program = onnx.load(str(path), load_external_data=False)
        _check(program.graph)
        _name(program.graph)
        _read_weights(onnx, program, path)
        del program.functions[:], program.training_info[:]
        model: nn.Module = importer.convert(program)
    except InputError as error:
        raise InputError(f"'{path}' cannot be converted from ONNX: {error}") from error
    except Exception as error:  # the bytes of a stranger: whatever converting them raises, they cannot be converted
        raise InputError(f"'{path}' cannot be converted from ONNX: {told(error)}") from error
    return model


def _check(graph: Any) -> None:
    """Refuse operators that are not of the standard, programs within the program, and values that are made twice."""
    for node in graph.node:
        if node.domain not in STANDARD:
            raise InputError(f"the operator {node.op_type!r} of {node.domain!r} is none of the ONNX standard.")
        node.domain = ""
        inner = next((own.name for own in node.attribute if own.HasField("g") or own.graphs), None)
        if inner is not None:
            raise InputError(f"the operator {node.op_type!r} runs programs of its own ({inner!r}), which are not read.")
    weights = {tensor.name for tensor in graph.initializer}
    made = [name for node in graph.node for name in node.output if name]
    made += [*weights, *(own.name for own in graph.input if own.name not in weights)]
    twice = next((name for name, count in Counter(made).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"there are two values of the name {twice!r}.")


def _name(graph: Any) -> None:
    """Give every node a name of its own that Python cannot read as anything but a name, and the importer as no other thing."""
    taken = {"initializers", *dir(fx.GraphModule(nn.Module(), fx.Graph()))}
    taken |= {own.name for own in (*graph.input, *graph.initializer)}
    counts = Counter[str]()
    for node in graph.node:
        kind, name = (re.sub(r"\W+", "_", own, flags=re.ASCII).strip("_") for own in (node.op_type, node.name))
        if not name or name[0].isdigit() or keyword.iskeyword(name) or name.startswith("onnx_initializer_"):
            name = "_".join(own for own in ("node", kind, name) if own)
        node.name = name
        while not taken.isdisjoint((node.name, f"{node.name}_split_output")):
            counts[name] += 1
            node.name = f"{name}_{counts[name]}"
        taken |= {node.name, f"{node.name}_split_output"}


def _read_weights(onnx: Any, program: Any, path: Path) -> None:
    """Read weights that are kept in other files, which must lie in the program's folder or below it."""
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
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors


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
