"""Runs of scripts, each kept until the package or the script changes: the site shows them, and tests look at the same runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
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
    if not (folder / "printed").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "COLUMNS": "96", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
        (folder / "printed").write_text(done.stdout)
    return folder


def example(name: str) -> Path:
    """Run an example of the gallery; see `made`."""
    return made(name, ROOT / "examples" / f"{name}.py", *EXAMPLES[name])
