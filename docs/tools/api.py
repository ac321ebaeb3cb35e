"""The public names of the package, and the types that their signatures name."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src"
TRAINING = ("rescale_after_steps", "rescale_in_place", "path_sgd")
PACKAGES = ("pruning", "rescaling", "metric", "lipschitz", "certification", "consequences", "quantisation", "report", "storage")


def top() -> list[str]:
    """Return the names at the top of pathlift."""
    return list(importlib.import_module("pathlift.public").__all__)


def package(name: str) -> list[str]:
    """Return the names that a package has and the top has not."""
    return [each for each in importlib.import_module(f"pathlift.{name}").__all__ if each not in top()]


def public_objects() -> Iterator[Any]:
    """Yield everything that a page of the reference is about."""
    yield from (getattr(importlib.import_module("pathlift"), name) for name in top())
    for room in PACKAGES:
        yield from (getattr(importlib.import_module(f"pathlift.{room}"), name) for name in package(room))
    training = importlib.import_module("pathlift.rescaling.training")
    yield from (getattr(training, name) for name in TRAINING)


def _annotations(thing: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each annotation as it is written, with the names that its module knows."""
    parts = [thing]
    if inspect.isclass(thing):
        parts += [each for name, each in vars(thing).items() if not name.startswith("_") or name == "__init__"]
    for part in parts:
        part = getattr(part, "fget", None) or getattr(part, "__func__", None) or part
        part = inspect.unwrap(part) if callable(part) else part
        module = inspect.getmodule(part)
        for name, annotation in getattr(part, "__annotations__", {}).items():
            if isinstance(annotation, str) and module is not None and not name.startswith("_"):
                yield annotation, vars(module)


def _mentioned(thing: Any) -> Iterator[tuple[str, Any]]:
    for annotation, known in _annotations(thing):
        for node in ast.walk(ast.parse(annotation, mode="eval")):
            if isinstance(node, ast.Name) and len(node.id) > 1 and node.id in known:
                yield node.id, known[node.id]


def types() -> tuple[list[str], list[str]]:
    """Return the classes and the aliases of ours that public signatures mention and that are no public names themselves.

    Returns:
        Dotted paths of the classes, and of the aliases.
    """
    waiting, seen = list(public_objects()), set[str]()
    public = {f"{each.__module__}.{each.__qualname__}" for each in waiting if hasattr(each, "__qualname__")}
    classes: list[str] = []
    aliases: list[str] = []
    while waiting:
        for name, thing in _mentioned(waiting.pop(0)):
            if inspect.isclass(thing) and thing.__module__.startswith("pathlift."):
                path = f"{thing.__module__}.{thing.__qualname__}"
                if path not in public and path not in seen:
                    classes.append(path)
                    waiting.append(thing)
            elif not inspect.isclass(thing) and (path := _home(name, thing)):
                if path not in seen:
                    aliases.append(path)
            else:
                continue
            seen.add(path)
    return sorted(classes, key=_last), sorted(aliases, key=_last)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _home(name: str, thing: Any) -> str | None:
    """Return where an alias of a type is written, as a dotted path."""
    for file in sorted((SOURCE / "pathlift").rglob("*.py")):
        if re.search(rf"^{name}(: TypeAlias)? = ", file.read_text(), re.MULTILINE):
            module = ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
            if vars(importlib.import_module(module)).get(name) is thing:
                return f"{module}.{name}"
    return None
