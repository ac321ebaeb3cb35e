"""The examples of the gallery print what they claim; a run that the site has made already is not made again."""

from __future__ import annotations

import re
from pathlib import Path

import made
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def printed(name: str, picture: str = "") -> str:
    """What an example prints; it draws its picture, too."""
    folder = made.example(name)
    assert (folder / (picture or f"{name}.png")).stat().st_size > 10_000
    return (folder / "printed").read_text()


@pytest.mark.hunt
def test_training_in_a_gauge_prints_one_row_per_way() -> None:
    output = printed("train_in_a_gauge")
    assert all(way in output for way in ("plain SGD", "path-norm regulariser", "ENorm", "path-conditioned", "Path-SGD"))


@pytest.mark.hunt
def test_the_path_picture_of_a_trajectory_does_not_move() -> None:
    output = printed("trajectory")
    path, weight = (float(line.split(" at most ")[1].split()[0]) for line in output.splitlines()[:2])
    assert path < 1e-4 < 0.1 < weight


@pytest.mark.hunt
def test_a_rescaled_photograph_network_is_pruned_alike_by_path_magnitude_only() -> None:
    output = printed("photographs")
    decibels = dict(re.findall(r"│ ([\w ,]+?) +│ +(-?[\d.]+) +│", output))
    assert decibels["relative_path_magnitude"] == decibels["relative_path_magnitude, rescaled"]
    assert decibels["trained network"] == decibels["rescaled"]
    assert float(decibels["magnitude, rescaled"]) < float(decibels["magnitude"]) - 1


@pytest.mark.hunt
def test_what_is_compensated_keeps_more_of_the_accuracy_at_the_same_bytes() -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("torchmetrics")
    output = printed("compress")
    rows = re.findall(r"^ *(\S.*?) +(\d) bits +([\d,]+) +([\d.]+) *$", output, re.MULTILINE)
    rounded = {(way, int(bits)): (size, float(accuracy)) for way, bits, size, accuracy in rows}
    rows = re.findall(r"^ *(\S.*?) +(\d+)% gone +([\d,]+) +([\d.]+) *$", output, re.MULTILINE)
    pruned = {(way, int(share)): (size, float(accuracy)) for way, share, size, accuracy in rows}
    assert rounded["rounded to nearest", 2][0] == rounded["compensated rounding, no data", 2][0]
    assert rounded["rounded to nearest", 2][1] < rounded["compensated rounding, no data", 2][1]
    assert pruned["LAMP, masks alone", 80][0] == pruned["LAMP, compensated, data", 80][0]
    assert pruned["LAMP, masks alone", 80][1] < pruned["LAMP, compensated, data", 80][1]


@pytest.mark.hunt
def test_a_penalty_on_the_path_norm_lets_digits_move_farther_before_their_class_is_in_doubt() -> None:
    output = printed("certified_radius")
    radii = [float(radius) for radius in re.findall(r"mean radius ([\d.]+) of 1", output)]
    assert len(radii) == 2 and 0.0 < radii[0] < radii[1] < 0.12


@pytest.mark.hunt
def test_the_demo_prints_the_table_of_the_readme() -> None:
    """All but times and the last digits: the rows, and that nothing of ours changes."""
    output = printed("demo", "out/demo.png")
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    rows = re.findall(r"^│ (.*?) +│.*│ +(.*?) │$", readme, re.MULTILINE)
    assert len(rows) == 8
    for name, changed in rows:
        assert re.search(rf"^│ {re.escape(name)} +│.*│ +{re.escape(changed)} │$", output, re.MULTILINE), name
