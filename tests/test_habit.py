"""What `make test` leaves to the hunt."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.mark.structures import Mark

import conftest


class Item:
    """A collected test with a marker, as far as the hook looks at it."""

    def __init__(self, nodeid: str, mark: Mark | None) -> None:
        self.nodeid, self.mark, self.added = nodeid, mark, list[str]()

    def get_closest_marker(self, name: str) -> Mark | None:
        return self.mark if name == "one_in" else None

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.added.append(marker.name)


def test_of_every_n_parameters_one_stays_and_the_hunt_has_the_others() -> None:
    some, whole = pytest.mark.one_in(3, first=1).mark, [Item(f"b.py::law[{number}]", None) for number in range(4)]
    several = [Item(f"a.py::law[{number}]", some) for number in range(8)]
    conftest.pytest_collection_modifyitems([*several, *whole])
    assert [item.added for item in several] == [["hunt"], [], ["hunt"], ["hunt"], [], ["hunt"], ["hunt"], []]
    assert not any(item.added for item in whole)


def test_make_test_and_make_hunt_run_every_test_between_them() -> None:
    lines = (Path(__file__).parents[1] / "Makefile").read_text().splitlines()
    runs = [line for line in lines if "-m pytest" in line and "SEARCH" not in line and "doctest" not in line]
    assert [line.partition("pytest -n 2 ")[2] for line in runs] == ['-m "not hunt"', "-m hunt"]
