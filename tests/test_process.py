"""What happens around a call: the state of the process, threads, copies, interrupts, memory (CONTRIBUTING, house rules)."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pathlift
from pathlift.cli.pruning import CRITERIA


def in_python(code: str, *options: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, *options, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------------------ imports


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["--version"], []])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['pathlift', *%r]\n"
        "from pathlift.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    assert in_python(code % (arguments,))


def test_the_help_names_every_criterion() -> None:
    assert CRITERIA.split(", ") == list(pathlift.CRITERIA)


def test_names_come_when_they_are_asked_for_and_files_do_not_hide_them() -> None:
    code = (
        "import sys, pathlift\n"
        "assert 'torch' not in sys.modules\n"
        "import pkgutil\n"
        "for file in pkgutil.iter_modules(pathlift.__path__):\n"
        "    if file.name not in ('__main__', 'lightning'): __import__(f'pathlift.{file.name}')\n"
        "from types import ModuleType\n"
        "print([name for name in pathlift.__all__ if isinstance(getattr(pathlift, name), ModuleType)])\n"
        "assert set(pathlift.__all__) <= set(dir(pathlift)) and not hasattr(pathlift, 'nonsense')\n"
        "from pathlift import *\n"
        "assert path_norm is pathlift.path_norm"
    )
    assert in_python(code) == "[]"
