"""What `make test` leaves to the hunt."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from _pytest.mark.structures import Mark

import conftest
import test_bounds
import test_enclosure
import test_enumeration
import test_forward
import test_metric_bounds
import test_symmetries
from cases import NETWORKS, OPERATORS

LAWS = (
    test_enumeration.test_every_quantity_agrees_with_the_paths,
    test_enumeration.test_the_key_identity_holds,
    test_forward.test_the_graph_computes_what_the_model_computes,
    test_symmetries.test_every_operator_ties_what_its_paths_tie,
    test_enclosure.test_every_operator_stays_inside,
    test_bounds.test_bounds_hold_for_every_operator,
    test_metric_bounds.test_bounds_on_the_metric_hold_for_every_operator,
)
"""Tests of every operator: `make test` runs a part of each."""


class Item:
    """A collected test with a marker, as far as the hook looks at it."""

    def __init__(self, name: str, number: int, *marks: Mark) -> None:
        self.nodeid, self.marks, self.added = f"{name}[{number}]", {mark.name: mark for mark in marks}, list[str]()
        self.callspec = SimpleNamespace(indices={"number": number})

    def get_closest_marker(self, name: str) -> Mark | None:
        return self.marks.get(name)

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.added.append(marker.name)


def test_of_every_n_parameters_one_stays_and_the_hunt_has_the_others() -> None:
    some = pytest.mark.one_in(3, first=1).mark
    several = [Item("a.py::law", number, some) for number in range(8)]
    all_kept = [Item("b.py::law", number) for number in range(4)]
    fewer = [Item("c.py::law", number, some, pytest.mark.hunt_one_in(2).mark) for number in range(5)]
    hunted = [Item("d.py::law", number, pytest.mark.hunt.mark, pytest.mark.hunt_one_in(3).mark) for number in range(4)]
    long = Item("e.py::law", 0, pytest.mark.search.mark)
    shuffled = [*several, *all_kept, *fewer, *hunted, long]
    random.Random(0).shuffle(shuffled)  # as pytest-randomly does before
    conftest.pytest_collection_modifyitems(shuffled)  # type: ignore[arg-type]
    assert [item.added for item in several] == [["hunt"], [], ["hunt"], ["hunt"], [], ["hunt"], ["hunt"], []]
    assert not any(item.added for item in all_kept)
    assert [item.added for item in fewer] == [["hunt"], [], ["hunt", "search"], ["hunt"], []]
    assert [item.added for item in hunted] == [["hunt"], ["hunt", "search"], ["hunt", "search"], ["hunt"]]
    assert long.added == ["hunt"]


def test_every_operator_is_in_a_law_that_make_test_runs() -> None:
    left = set(range(len([*OPERATORS, *NETWORKS])))
    for law in LAWS:
        marks = {mark.name: mark for mark in law.pytestmark}  # type: ignore[attr-defined]
        assert marks["parametrize"].args == ("case", [*OPERATORS, *NETWORKS])
        some = marks.get("one_in", pytest.mark.one_in(1).mark)
        (count,), first = some.args, some.kwargs.get("first", 0)
        left -= set(range(first, len(OPERATORS) + len(NETWORKS), count))
    assert not left, [[*OPERATORS, *NETWORKS][number].name for number in sorted(left)]


def test_make_test_hunt_and_search_run_every_test_between_them() -> None:
    lines = (Path(__file__).parents[1] / "Makefile").read_text().splitlines()
    runs = [line for line in lines if "-m pytest" in line and "SEARCH" not in line]
    assert [line.partition("pytest $(SHARED) ")[2] for line in runs] == [
        '-m "not hunt" -rs --doctest-modules --doctest-ignore-import-errors tests src/pathlift',
        '-m "hunt and not search"',
        "-m search",
    ]
