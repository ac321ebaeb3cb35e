"""The examples run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")


@pytest.mark.hunt
def test_training_in_a_gauge_prints_one_row_per_way() -> None:
    script = Path(__file__).parent.parent / "examples" / "train_in_a_gauge.py"
    done = subprocess.run([sys.executable, str(script), "--epochs", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(way in done.stdout for way in ("plain SGD", "path-norm regulariser", "ENorm", "path-conditioned", "Path-SGD"))


@pytest.mark.hunt
def test_the_path_picture_of_a_trajectory_does_not_move(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = Path(__file__).parent.parent / "examples" / "trajectory.py"
    arguments = ["--seeds", "2", "--checkpoints", "3", "--plot", str(tmp_path / "t.png")]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path, weight = (float(line.split(" at most ")[1].split()[0]) for line in done.stdout.splitlines()[:2])
    assert path < 1e-4 < 0.1 < weight
    assert (tmp_path / "t.png").stat().st_size > 10_000
