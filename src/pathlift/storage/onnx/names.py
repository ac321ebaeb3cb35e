"""The names in an ONNX file as paths of modules, so that a state-dict shows the names of the file.

A dot in a name leads into a child module, as in PyTorch's own names. What a path cannot carry (an attribute of every module, a
character that is not plain, a tensor where a module must be) is written as ``%`` and its code: `urllib.parse.unquote` gives
the name in the file back. No name can be read as anything but a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate

DEEPEST = 32
"""A path has at most so many parts: recursive functions walk along it."""

Path = tuple[str, ...]


def tensor_paths(names: Iterable[str], reserved: frozenset[str]) -> dict[str, Path]:
    """Give every tensor a path.

    Args:
        names: Their names in the file.
        reserved: Attributes that every module has.

    Returns:
        Name to path; no path leads through another.
    """
    paths = {name: _path(name, reserved) for name in names}
    modules = {prefix for path in paths.values() for prefix in _prefixes(path)}
    return {name: _free(name, path, modules) if path in modules else path for name, path in paths.items()}


def node_paths(names: Iterable[str], tensors: Mapping[str, Path], reserved: frozenset[str]) -> list[Path]:
    """Give every node a path.

    Args:
        names: Their names in the file, in which one may come twice.
        tensors: The paths that tensors have.
        reserved: Attributes that every module has.

    Returns:
        The paths, in the same order, each another one; none is, or leads through, that of a tensor.
    """
    taken = set(tensors.values())
    known: dict[Path, int] = {}
    paths = []
    for name in names:
        path = _path(name, reserved)
        path = first = _free(name, path, taken)
        while path in known or path in taken:
            known[first] = known.get(first, 0) + 1
            path = (*first[:-1], f"{first[-1]}_{known[first]}")
        known.setdefault(path, 0)
        paths.append(path)
    return paths


def _path(name: str, reserved: frozenset[str]) -> Path:
    parts = name.split(".")
    if not all(parts) or len(parts) > DEEPEST:
        return _single(name)
    return tuple(_coded(part[0]) + _plain(part[1:]) if part in reserved else _plain(part) for part in parts)


def _free(name: str, path: Path, taken: set[Path]) -> Path:
    """Return a path for a name that is none of those taken, and leads through none."""
    for count in range(1, len(name) + 1):
        if taken.isdisjoint((*_prefixes(path), path)):
            break
        path = _single(name, count)
    return path


def _single(name: str, count: int = 1) -> Path:
    """Return a path of one part that no other name has: its first characters, and every dot, are written by their codes."""
    return (_coded(name[:count]).lower() + _plain(name[count:]).replace(".", "%2E"),)


def _plain(text: str) -> str:
    return re.sub(r"[^\w/:;,=@#~+ .-]", lambda found: _coded(found[0]), text, flags=re.ASCII)


def _coded(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _prefixes(path: Path) -> list[Path]:
    return list(accumulate(((part,) for part in path[:-1]), lambda one, two: one + two))
