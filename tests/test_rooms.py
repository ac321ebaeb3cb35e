"""The order of rooms: a file imports only from its own room and those below it, and no files import each other in a circle."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType

from rooms import ROOMS, circles, imports, modules, room, upward


def test_every_file_lies_in_a_room() -> None:
    assert {room(module) for module in imports()} == set(ROOMS)


def test_a_room_imports_only_from_those_below_it() -> None:
    assert upward(imports()) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(imports()) == []


def test_no_public_name_is_that_of_a_module_beside_it() -> None:
    """``pathlift.metric`` is a package: a function of that name would be whichever of the two was imported last."""
    files = set(modules())
    for package, path in modules().items():
        if path.name == "__init__.py":
            public = import_module("pathlift.public" if package == "pathlift" else package)
            beside = [name for name in getattr(public, "__all__", ()) if f"{package}.{name}" in files]
            assert all(isinstance(getattr(public, name), ModuleType) for name in beside), (package, beside)


def test_no_function_at_the_top_is_called_like_a_module_anywhere() -> None:
    public = import_module("pathlift.public")
    functions = {name for name in public.__all__ if inspect.isfunction(getattr(public, name))}
    assert "path_norm" in functions
    assert not functions & {module.rpartition(".")[2] for module in modules()}
