"""The code of a page of the documentation, run from top to bottom, and what it printed.

A block of Python and a line ``$ pathlift …`` of a console are run in the page's own folder, one after the other, with the names
of the blocks before. What is shown below a block in the built site is what this printed: no page has a number typed into it.
``python docs/tools/snippets.py PAGE FOLDER`` prints the outputs as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>python|console)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str]]:
    """Return kind and content of the blocks of a page that are run."""
    return [(match["kind"], _dedented(match)) for match in FENCE.finditer(text)]


def _dedented(match: re.Match[str]) -> str:
    return re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)


def run(text: str, folder: Path) -> list[str]:
    """Run the blocks of a page.

    Args:
        text: The page.
        folder: Where its files are read and written.

    Returns:
        What each block printed.
    """
    names: dict[str, Any] = {"__name__": "__page__"}
    back = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        return [_run_python(code, names) if kind == "python" else _run_console(code) for kind, code in blocks(text)]
    finally:
        os.chdir(back)
        sys.path.remove(str(folder))


def _run_python(code: str, names: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        exec(compile(code, "example.py", "exec"), names)
    return printed.getvalue().rstrip()


def _run_console(code: str) -> str:
    return "\n\n".join(command(line[2:]) for line in code.splitlines() if line.startswith("$ pathlift ")).rstrip()


def command(line: str) -> str:
    """Run a command line and return what it printed.

    Args:
        line: As in a shell, beginning with ``pathlift``.

    Returns:
        Standard output and standard error.

    Raises:
        RuntimeError: It ends otherwise than with 0, or 1 for "no".
    """
    from pathlift.cli import main

    answer, before = io.StringIO(), sys.argv
    with contextlib.redirect_stdout(answer), contextlib.redirect_stderr(answer), warnings.catch_warnings():
        try:
            sys.argv = shlex.split(line, comments=True)
            main()
        except SystemExit as end:
            if end.code not in {None, 0, 1}:
                raise RuntimeError(f"{line} ended with {end.code}: {answer.getvalue()}") from end
        finally:
            sys.argv = before
    return "\n".join(row.rstrip() for row in answer.getvalue().splitlines()).strip("\n")


def filled(text: str, outputs: list[str]) -> str:
    """Return a page with the output of each block below it."""
    remaining = iter(outputs)

    def fill(match: re.Match[str]) -> str:
        output = next(remaining)
        if not output:
            return match[0]
        indent = match["indent"]
        body = "".join(f"{indent}{line}\n" for line in output.splitlines())
        return f"{match[0]}\n\n{indent}```text\n{body}{indent}```"

    return FENCE.sub(fill, text)


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "96")
    print(json.dumps(run(Path(sys.argv[1]).read_text(), Path(sys.argv[2]).absolute())))
