"""The order of rooms: a file imports only from its own room and those below it, and no files import each other in a circle."""

from __future__ import annotations

from rooms import ROOMS, circles, imports, room, upward


def test_every_file_lies_in_a_room() -> None:
    assert {room(module) for module in imports()} == set(ROOMS)


def test_a_room_imports_only_from_those_below_it() -> None:
    assert upward(imports()) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(imports()) == []
