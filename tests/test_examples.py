"""The examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")


def printed(example: str, *arguments: str, plot: Path) -> str:
    """What an example prints; it draws its picture, too."""
    pytest.importorskip("matplotlib")
    script = Path(__file__).parent.parent / "examples" / example
    command = [sys.executable, str(script), *arguments, "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert plot.stat().st_size > 10_000
    return done.stdout


@pytest.mark.hunt
def test_training_in_a_gauge_prints_one_row_per_way(tmp_path: Path) -> None:
    output = printed("train_in_a_gauge.py", "--epochs", "1", plot=tmp_path / "t.png")
    assert all(way in output for way in ("plain SGD", "path-norm regulariser", "ENorm", "path-conditioned", "Path-SGD"))


@pytest.mark.hunt
def test_the_path_picture_of_a_trajectory_does_not_move(tmp_path: Path) -> None:
    output = printed("trajectory.py", "--seeds", "2", "--checkpoints", "3", plot=tmp_path / "t.png")
    path, weight = (float(line.split(" at most ")[1].split()[0]) for line in output.splitlines()[:2])
    assert path < 1e-4 < 0.1 < weight


@pytest.mark.hunt
def test_a_rescaled_photograph_network_is_pruned_alike_by_path_magnitude_only(tmp_path: Path) -> None:
    output = printed("photographs.py", "--steps", "60", plot=tmp_path / "p.png")
    decibels = dict(re.findall(r"│ ([\w ,]+?) +│ +(-?[\d.]+) +│", output))
    assert decibels["relative_path_magnitude"] == decibels["relative_path_magnitude, rescaled"]
    assert decibels["trained network"] == decibels["rescaled"]
    assert float(decibels["magnitude, rescaled"]) < float(decibels["magnitude"]) - 1


@pytest.mark.hunt
def test_what_is_compensated_keeps_more_of_the_accuracy_at_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("torchmetrics")
    output = printed("compress.py", "--quick", plot=tmp_path / "c.png")
    rows = re.findall(r"^ *(\S.*?) +(\d) bits +([\d,]+) +([\d.]+) *$", output, re.MULTILINE)
    rounded = {(way, int(bits)): (size, float(accuracy)) for way, bits, size, accuracy in rows}
    rows = re.findall(r"^ *(\S.*?) +(\d+)% gone +([\d,]+) +([\d.]+) *$", output, re.MULTILINE)
    pruned = {(way, int(share)): (size, float(accuracy)) for way, share, size, accuracy in rows}
    assert rounded["rounded to nearest", 2][0] == rounded["compensated rounding, no data", 2][0]
    assert rounded["rounded to nearest", 2][1] < rounded["compensated rounding, no data", 2][1]
    assert pruned["LAMP, masks alone", 80][0] == pruned["LAMP, compensated, data", 80][0]
    assert pruned["LAMP, masks alone", 80][1] < pruned["LAMP, compensated, data", 80][1]


@pytest.mark.hunt
def test_a_penalty_on_the_path_norm_lets_digits_move_farther_before_their_class_is_in_doubt(tmp_path: Path) -> None:
    output = printed("certified_radius.py", "--samples", "8", plot=tmp_path / "r.png")
    radii = [float(radius) for radius in re.findall(r"mean radius ([\d.]+) of 1", output)]
    assert len(radii) == 2 and 0.0 < radii[0] < radii[1] < 0.12
