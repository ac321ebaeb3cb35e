"""The examples run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")


def test_training_in_a_gauge_prints_one_row_per_way() -> None:
    script = Path(__file__).parent.parent / "examples" / "train_in_a_gauge.py"
    done = subprocess.run([sys.executable, str(script), "--epochs", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(way in done.stdout for way in ("plain SGD", "path-norm regulariser", "ENorm", "path-conditioned", "Path-SGD"))
