"""The names in an ONNX file as paths of modules, so that a state-dict shows the names of the file.

A dot in a name leads into a child module, as in PyTorch's own names. What a path cannot carry (an attribute of every module, a
character that is not plain, a dot where a tensor stands) is written as ``%`` and its code: `urllib.parse.unquote` gives the
name in the file back, so no two names share a path. No name can be read as anything but a name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

DEEPEST = 32
"""A path has at most so many parts: recursive functions walk along it."""

Path = tuple[str, ...]


def tensor_paths(names: Iterable[str], reserved: Collection[str]) -> dict[str, Path]:
    """Give every tensor a path; none leads through another. `reserved` are attributes that every module has."""
    paths = {name: _path(name, reserved) for name in names}
    taken = set(paths.values())
    return {name: _single(name) if _through(path, taken) else path for name, path in paths.items()}


def node_paths(names: Iterable[str], tensors: Collection[Path], reserved: Collection[str]) -> list[Path]:
    """Give every node, of which several may share a name, a path of its own that is, or leads through, none of a tensor."""
    tensors = set(tensors)
    taken = set(tensors)
    counts: dict[Path, int] = {}
    paths = []
    for name in names:
        first = _path(name, reserved)
        path = first = _single(name) if _through(first, tensors) else first
        while path in taken:
            counts[first] = counts.get(first, 0) + 1
            path = (*first[:-1], f"{first[-1]}_{counts[first]}")
        taken.add(path)
        paths.append(path)
    return paths


def _through(path: Path, taken: Collection[Path]) -> bool:
    return any(path[:length] in taken for length in range(1, len(path)))


def _path(name: str, reserved: Collection[str]) -> Path:
    parts = name.split(".")
    if not all(parts) or len(parts) > DEEPEST:
        return _single(name)
    return tuple(_coded(part[0]) + _plain(part[1:]) if part in reserved else _plain(part) for part in parts)


def _single(name: str) -> Path:
    """Return a path of one part: dots are written by their codes."""
    return (_plain(name).replace(".", _coded(".")),)


def _plain(text: str) -> str:
    return re.sub(r"[^\w/:;,=@#~+ .-]", lambda match: _coded(match[0]), text, flags=re.ASCII)


def _coded(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
