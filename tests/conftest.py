"""Shared set-up: one thread per test process, a seed for each test, and which tests wait for the hunt."""

from __future__ import annotations

import zlib
from collections import defaultdict

import pytest
import torch

from pathlift.statistics.shrinkage import Products

torch.set_num_threads(1)  # parallel processes do not fight for cores

collect_ignore = ["mutants.py"]  # a program with packages of its own


@pytest.fixture
def all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of the data are all inputs that there are: their second moments are no chance, and are not shrunk."""
    monkeypatch.setattr(Products, "variance", property(lambda products: torch.zeros_like(products.mean)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Weights that a test does not ask for by a seed are its own: the same in whatever order tests run."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``one_in(n, first=k)``, numbers k, k + n, k + 2 n, … of its parameters stay; the others get ``hunt``.

    With ``hunt_one_in(m, first=k)``, every m-th of these stays in the hunt; the others get ``search``, too, and wait for that.

    Numbers are those of the parameters as they are written: tests may have been shuffled by now, and `make test` and
    `make hunt`, shuffled otherwise, must agree on who runs what.
    """
    several: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        several[item.nodeid.partition("[")[0]].append(item)
    for same in several.values():
        ordered = sorted(same, key=_parameters)
        left = [item for number, item in enumerate(ordered) if _left_to_the_hunt(item) or not _stays(item, "one_in", number)]
        for number, item in enumerate(left):
            item.add_marker(pytest.mark.hunt)
            if not _stays(item, "hunt_one_in", number):
                item.add_marker(pytest.mark.search)


def _left_to_the_hunt(item: pytest.Item) -> bool:
    return item.get_closest_marker("hunt") is not None or item.get_closest_marker("search") is not None


def _stays(item: pytest.Item, name: str, number: int) -> bool:
    mark = item.get_closest_marker(name)
    if mark is None:
        return True
    (count,), first = mark.args, mark.kwargs.get("first", 0)
    assert first < count
    return bool(number % count == first)


def _parameters(item: pytest.Item) -> tuple[int, ...]:
    return tuple(item.callspec.indices.values()) if hasattr(item, "callspec") else ()
