"""The rooms of the house from the ground up: `python tests/rooms.py` draws who stands on whom."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "pathlift"

FLOORS = (
    (
        "version",
        "failures",
        "results",
        "errors",
        "drawing",
        "forks",
        "precision",
        "fused",
        "budget",
        "arguments",
        "output",
        "storage",
    ),
    ("edges", "graph", "rules", "passes", "reading"),
    ("norm", "magnitude", "rescaling", "saving", "metric", "streaming", "kernel", "statistics"),
    ("compensation", "pruning", "quantisation", "lipschitz", "certification", "consequences", "reference", "lifting", "report"),
    ("public", "", "callbacks", "lightning", "hugging_face", "experiments", "study", "cli", "__main__"),
)
"""A room imports only from those before it; "" is `pathlift` itself."""

ROOMS = [name for floor in FLOORS for name in floor]


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    parts = {path: path.relative_to(SOURCE.parent).with_suffix("").parts for path in SOURCE.rglob("*.py")}
    return {".".join(names[:-1] if names[-1] == "__init__" else names): path for path, names in sorted(parts.items())}


@functools.cache
def imports() -> dict[str, set[str]]:
    """Return what each module imports of the package, wherever in its source the import stands."""
    files = modules()
    imported: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pathlift":
                assert node.module is not None
                within = [f"{node.module}.{alias.name}" for alias in node.names]
                imported[name] |= {one if one in files else node.module for one in within}
            elif isinstance(node, ast.Import):
                imported[name] |= {alias.name for alias in node.names if alias.name.split(".")[0] == "pathlift"}
    return imported


def room(module: str) -> str:
    """Return the room that a module lies in: the first part of its name."""
    return module.split(".")[1] if "." in module else ""


def upward(imported: dict[str, set[str]]) -> list[str]:
    """Return the imports of a room from one that is not below it."""
    return [
        f"{module} imports {other}"
        for module, several in imported.items()
        for other in sorted(several)
        if ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]


def circles(imported: dict[str, set[str]]) -> list[list[str]]:
    """Return the modules that import each other in a circle: strongly connected parts of the graph of imports."""
    reach = {module: set(several) for module, several in imported.items()}
    for middle in reach:
        for several in reach.values():
            if middle in several:
                several |= reach[middle]
    return [
        part for module in reach
        if len(part := sorted(other for other in reach if other in reach[module] and module in reach[other])) > 1
        and part[0] == module
    ]  # fmt: skip


def drawing() -> str:
    """Return the rooms, one a line from the ground up, each with those that it stands on."""
    below: dict[str, set[str]] = {name: set() for name in ROOMS}
    for module, several in imports().items():
        below[room(module)] |= {room(other) for other in several} - {room(module)}
    width = max(map(len, ROOMS))
    lines = []
    for name in ROOMS:
        stands_on = ", ".join(other or "pathlift" for other in sorted(below[name], key=ROOMS.index))
        lines.append(f"  {name or 'pathlift':{width}}  ← {stands_on}" if stands_on else f"  {name}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(drawing())
    print("\n".join(upward(imports())), circles(imports()))
