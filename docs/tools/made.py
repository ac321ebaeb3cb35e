"""Runs of scripts, each kept until the package or the script changes: the site shows them, and tests look at the same runs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "docs"

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": (),
    "photographs": ("--plot", "photographs.png"),
    "which_bound": (),
    "certified_radius": ("--plot", "certified_radius.png"),
    "trajectory": ("--plot", "trajectory.png"),
    "train_in_a_gauge": ("--plot", "train_in_a_gauge.png"),
    "compress": ("--quick", "--plot", "compress.png"),
}
"""The examples of the gallery in their order, with their options."""


def made(kind: str, script: Path, *arguments: str) -> Path:
    """Run a script in a folder of its own unless that has been done; what it prints is in ``printed`` there.

    Another line of the package, of the script or of a page that it is given is another folder.

    Args:
        kind: The folder's name begins with it.
        script: The script.
        arguments: Its arguments.

    Returns:
        The folder.

    Raises:
        SystemExit: The script failed.
    """
    digest = hashlib.sha256("\0".join(arguments).encode())
    pages = [Path(argument) for argument in arguments if argument.endswith(".md")]
    for file in [script, *pages, *sorted((ROOT / "src" / "pathlift").rglob("*.[ph][yt]*"))]:
        digest.update(file.read_bytes())
    folder = BUILD / f"{kind}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="in-work-") as made_in:
        work = Path(made_in) / "run"
        work.mkdir()
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            cwd=work,
            env={**os.environ, "COLUMNS": "96", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
        (work / "printed").write_text(done.stdout)
        try:
            work.rename(folder)  # whole or not at all: the site and the tests may make it at the same time
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def example(name: str) -> Path:
    """Run an example of the gallery; see `made`."""
    return made(name, ROOT / "examples" / f"{name}.py", *EXAMPLES[name])
