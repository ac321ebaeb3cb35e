"""What `make test` leaves to the hunt."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from _pytest.mark.structures import Mark

import conftest


class Item:
    """A collected test with a marker, as far as the hook looks at it."""

    def __init__(self, name: str, number: int, mark: Mark | None) -> None:
        self.nodeid, self.mark, self.added = f"{name}[{number}]", mark, list[str]()
        self.callspec = SimpleNamespace(indices={"number": number})

    def get_closest_marker(self, name: str) -> Mark | None:
        return self.mark if name == "one_in" else None

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.added.append(marker.name)


def test_of_every_n_parameters_one_stays_and_the_hunt_has_the_others() -> None:
    some = pytest.mark.one_in(3, first=1).mark
    several = [Item("a.py::law", number, some) for number in range(8)]
    all_kept = [Item("b.py::law", number, None) for number in range(4)]
    shuffled = [*several, *all_kept]
    random.Random(0).shuffle(shuffled)  # as pytest-randomly does before
    conftest.pytest_collection_modifyitems(shuffled)  # type: ignore[arg-type]
    assert [item.added for item in several] == [["hunt"], [], ["hunt"], ["hunt"], [], ["hunt"], ["hunt"], []]
    assert not any(item.added for item in all_kept)


def test_make_test_and_make_hunt_run_every_test_between_them() -> None:
    lines = (Path(__file__).parents[1] / "Makefile").read_text().splitlines()
    runs = [line for line in lines if "-m pytest" in line and "SEARCH" not in line and "doctest" not in line]
    assert [line.partition("pytest -n 2 ")[2] for line in runs] == ['-m "not hunt"', "-m hunt"]
