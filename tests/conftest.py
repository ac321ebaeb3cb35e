"""Shared set-up: one thread per test process, and which tests wait for the hunt."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

torch.set_num_threads(1)  # parallel processes do not fight for cores


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``one_in(n, first=k)``, numbers k, k + n, k + 2 n, … of its parameters stay; the others get ``hunt``.

    Numbers are those of the parameters as they are written: tests may have been shuffled by now, and `make test` and
    `make hunt`, shuffled otherwise, must agree on who runs what.
    """
    several: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        several[item.nodeid.partition("[")[0]].append(item)
    for same in several.values():
        mark = same[0].get_closest_marker("one_in")
        if mark is None:
            continue
        (count,), first = mark.args, mark.kwargs.get("first", 0)
        assert first < count
        for number, item in enumerate(sorted(same, key=_parameters)):
            if number % count != first:
                item.add_marker(pytest.mark.hunt)


def _parameters(item: pytest.Item) -> tuple[int, ...]:
    return tuple(item.callspec.indices.values())  # type: ignore[attr-defined]
