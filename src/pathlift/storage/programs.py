"""Exported programs, ``.pt2`` files: loaded where they are trusted. Which inputs one takes is read without running it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from pathlift.errors import InputError, one_line
from pathlift.storage.downloads import check_downloaded
from pathlift.storage.present import check_present
from pathlift.storage.sizes import HEADER_BYTES, check_unfolding

Shapes: TypeAlias = "tuple[int, ...] | tuple[Shapes, ...] | list[Shapes] | dict[str, Shapes]"
"""The shape of one input without the batch dimension, or those of several in the containers that a model takes."""

CHUNK = 1 << 22
"""Bytes that are read at a time."""


def read_program(path: Path, *, trust: bool) -> nn.Module:
    """Load an exported program as a module.

    Args:
        path: The file.
        trust: Whether code from it may run.

    Returns:
        The module; its parameters have the names of the model that was exported.

    Raises:
        InputError: There is no such file, it is not trusted, or it is damaged.
    """
    check_present(path)
    check_downloaded(path)
    if not trust:
        raise InputError(
            f"'{path}' is a program, not only weights: PyTorch runs code from such a file while it loads it, and whoever wrote "
            "the file can do anything here. If you trust it, say so: --trust, in Python trust=True."
        )
    try:
        _check_sums(path)
        module: nn.Module = torch.export.load(path).module()
    except Exception as error:
        raise InputError(f"'{path}' is not a readable exported program: {one_line(error)}") from error
    return module


def program_inputs(path: Path) -> Shapes:
    """Return the shapes of the inputs that an exported program takes; nothing in the file is run.

    Args:
        path: The file.

    Returns:
        The shape of its input without the batch dimension, or several in the containers that it takes. A size that may vary is
        that of the example with which it was exported.

    Raises:
        InputError: There is no such file, it is damaged, or it does not tell.
    """
    check_present(path)
    check_downloaded(path)
    try:
        return _inputs(_description(path))
    except InputError as error:
        problem = str(error)
    except Exception as error:  # the bytes of a stranger: whatever reading them raises, they do not tell
        problem = f"it cannot be read: {one_line(error)}."
    raise InputError(f"'{path}' does not tell which inputs it takes: {problem} Give --shape, for example --shape 3,224,224.")


def _check_sums(path: Path) -> None:
    """Read all of an archive: PyTorch's reader does not look at its checksums."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        check_unfolding(path.stat().st_size, sum(entry.file_size for entry in entries))
        for entry in entries:
            with archive.open(entry) as opened:
                while opened.read(CHUNK):
                    pass


def _description(path: Path) -> Any:
    """Return the graph as the file describes it."""
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if "/models/" in entry.filename and entry.filename.endswith(".json")]
        if len(entries) != 1:
            raise InputError(f"it holds {len(entries)} models.")
        if entries[0].file_size > HEADER_BYTES:
            raise InputError(f"its description has more than {HEADER_BYTES:,} bytes.")
        return json.loads(archive.read(entries[0]))["graph_module"]


def _inputs(description: Any) -> Shapes:
    specs = description["signature"]["input_specs"]
    given = [spec["user_input"]["arg"] for spec in specs if "user_input" in spec]
    if any("as_tensor" not in argument for argument in given) or any("constant_input" in spec for spec in specs):
        raise InputError("one of them is no tensor.")
    values = description["graph"]["tensor_values"]
    names = [argument["as_tensor"]["name"] for argument in given]
    shapes = iter([_shape(name, values[name]["sizes"]) for name in names])
    _, tree = json.loads(description["module_call_graph"][0]["signature"]["in_spec"])
    positional, keywords = _nested(tree, shapes)
    if positional and keywords:
        raise InputError("it takes some by position and others by keyword.")
    alone = len(positional) == 1 and isinstance(positional[0], tuple) and all(isinstance(size, int) for size in positional[0])
    inputs: Shapes = keywords or (positional[0] if alone else positional)
    return inputs


def _shape(name: str, sizes: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the shape of an input without the batch dimension."""
    first, *others = sizes or [{}]
    if not others:
        raise InputError(f"'{name}' has no size beside the batch.")
    if first.get("as_int", 1) != 1:
        raise InputError(f"it runs on exactly {first['as_int']} samples at once, and one at a time is needed.")
    return tuple(_size(size) for size in others)


def _size(size: Mapping[str, Any]) -> int:
    number = size["as_int"] if "as_int" in size else size["as_expr"]["hint"]["as_int"]
    if not isinstance(number, int):
        raise InputError("a size is no number.")
    return number


def _nested(tree: Mapping[str, Any], shapes: Iterator[tuple[int, ...]]) -> Any:
    """Put shapes into the containers that a program takes."""
    if tree["type"] is None:
        return next(shapes)
    inner = [_nested(child, shapes) for child in tree["children_spec"]]
    match tree["type"]:
        case "builtins.tuple":
            return tuple(inner)
        case "builtins.list":
            return inner
        case "builtins.dict":
            return dict(zip(json.loads(tree["context"]), inner, strict=True))
    raise InputError(f"they lie in a container of another kind, {str(tree['type'])[:60]!r}.")
