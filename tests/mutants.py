"""Mutants of passes/ and edges/: one small change of the code at a time, and which tests notice (`make mutants`).

First the quick tests are run once under `coverage`, to know which of them reach each line, and how long they take. Then mutants
are drawn at random from what `cosmic_ray` can change. Each lives in a forked child, which imports the changed source in the
place of the file, so that nothing is written to the tree, and runs the quickest tests that reach the line until one fails.

What is printed is not a verdict: a survivor is either equivalent (a bound that is a little wider, a size of blocks, a branch
that only saves time) or shows a test that is missing.
"""

from __future__ import annotations

import argparse
import ast
import importlib.machinery
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import cosmic_ray.plugins
import coverage
import pytest
import torch
import torchvision  # noqa: F401  # here, so that no child needs to
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "mutants"
ROOMS = [ROOT / "src" / "pathlift" / room for room in ("passes", "edges")]

TESTS = [
    "enumeration", "operators", "product", "enclosure", "rounding", "intervals", "blocks", "axes", "compact", "forward",
    "certified_arithmetic", "metric_proofs", "range", "expressions", "bounds", "metric_bounds", "metric_improved", "laws",
    "criteria", "streaming", "certify", "kernel", "programs", "symmetries", "traps", "together",
]  # fmt: skip

SOUND = [
    "rounding", "rounded", "intervals", "differences", "squares", "programs", "backward", "deviation", "convolution",
    "pattern", "window", "view", "affine", "lines", "nonlinear", "relaxation", "roundoff", "substitution", "tightening",
    "weights", "enclosure", "forms", "together",
]  # fmt: skip
"""Files on which the soundness of a bound rests: twice as many of their mutants are drawn."""

OPERATORS = [
    "ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add", "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_FloorDiv_Mul", "ReplaceBinaryOperator_Mod_Mul",
    "ReplaceBinaryOperator_Pow_Mul", "ReplaceBinaryOperator_BitAnd_BitOr", "ReplaceBinaryOperator_BitOr_BitAnd",
    "ReplaceBinaryOperator_LShift_RShift", "ReplaceBinaryOperator_RShift_LShift", "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_NotEq_Eq", "ReplaceComparisonOperator_Lt_LtE", "ReplaceComparisonOperator_Lt_GtE",
    "ReplaceComparisonOperator_LtE_Lt", "ReplaceComparisonOperator_LtE_Gt", "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_Gt_LtE", "ReplaceComparisonOperator_GtE_Gt", "ReplaceComparisonOperator_GtE_Lt",
    "ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is", "ReplaceUnaryOperator_Delete_USub",
    "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_Invert", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue",
    "ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak",
    "NumberReplacer", "ZeroIterationForLoop",
]  # fmt: skip
"""Of cosmic-ray's operators those after which the code still runs: no `x << y` in the place of `x + y`."""

SECONDS = 10.0
"""How long the tests of one mutant take, by the run under coverage."""


class Mutant(NamedTuple):
    """One change of one file."""

    file: str
    line: int
    operator: str
    occurrence: int

    def source(self) -> str:
        """Return the changed file."""
        operator = cosmic_ray.plugins.get_operator(f"core/{self.operator}")()
        mutated = mutate_code((ROOT / self.file).read_text(), operator, self.occurrence)
        assert mutated is not None
        return mutated

    def change(self) -> str:
        """Return the lines that differ."""
        before, after = (ROOT / self.file).read_text().splitlines(), self.source().splitlines()
        return "\n".join(f"    - {a.strip()}\n    + {b.strip()}" for a, b in zip(before, after, strict=False) if a != b)


def spoken(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return where annotations and messages of errors stand, which no test is about."""
    nodes: list[ast.AST | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            nodes.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            nodes.append(node.returns)
        elif isinstance(node, ast.Raise):
            nodes.append(node)
    present = [node for node in nodes if node is not None]
    return [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)) for node in present]  # type: ignore[attr-defined]


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    source = path.read_text()
    tree, skipped = get_ast(source), spoken(source)
    for name in OPERATORS:
        operator = cosmic_ray.plugins.get_operator(f"core/{name}")()
        positions = (start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node))
        for occurrence, start in enumerate(positions):
            if name == "NumberReplacer" and occurrence % 4 in (1, 2):  # of n + 1 and n − 1 one, by turns
                continue
            if not any(first <= start < last for first, last in skipped):
                yield Mutant(str(path.relative_to(ROOT)), start[0], name, occurrence)


def drawn(each: int, seed: int) -> list[Mutant]:
    """Draw so many mutants of each file, twice as many where soundness lies, in random order."""
    draw = random.Random(seed)
    chosen = []
    for room in ROOMS:
        for path in sorted(room.rglob("*.py")):
            every = list(mutants(path))
            wanted = 2 * each if path.stem in SOUND or path.parent.name in SOUND else each
            chosen += draw.sample(every, min(wanted, len(every)))
    draw.shuffle(chosen)
    return chosen


class Timing:
    """A plugin of pytest: tells coverage which test runs, and how long each took."""

    def __init__(self, cover: coverage.Coverage) -> None:
        self.cover = cover
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Run one test."""
        self.cover.switch_context(item.nodeid)
        start = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - start
        return result


class Failure:
    """A plugin of pytest: remembers the first test that fails."""

    name = "import"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """See one part of a test."""
        if report.failed:
            self.name = report.nodeid


PLAIN = ["-q", "-p", "no:randomly", "-p", "no:cacheprovider"]


def reached() -> tuple[dict[str, dict[int, list[str]]], dict[str, float]]:
    """Return which tests reach each line of each file, and how long each test takes; kept in build/mutants."""
    kept = OUT / "reached.json"
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    if not kept.exists() or kept.stat().st_mtime < max(file.stat().st_mtime for file in files):
        OUT.mkdir(parents=True, exist_ok=True)
        cover = coverage.Coverage(data_file=str(OUT / "coverage"), source=[str(room) for room in ROOMS], config_file=False)
        timing = Timing(cover)
        child = os.fork()  # so that nothing of the package is imported here
        if child == 0:
            cover.start()
            code = pytest.main([*PLAIN, "-m", "not hunt", *(f"tests/test_{name}.py" for name in TESTS)], plugins=[timing])
            cover.stop()
            data = cover.get_data()
            lines = {str(Path(file).relative_to(ROOT)): data.contexts_by_lineno(file) for file in data.measured_files()}
            kept.write_text(json.dumps([lines, timing.seconds])) if code == 0 else None
            os._exit(int(code))
        assert os.waitpid(child, 0)[1] == 0, "the tests fail as they are"
    lines, seconds = json.loads(kept.read_text())
    return {file: {int(line): tests for line, tests in of.items()} for file, of in lines.items()}, seconds


def chosen_tests(mutant: Mutant, lines: dict[int, list[str]], seconds: dict[str, float]) -> list[str]:
    """Return tests that reach the line, or that reach any line of the file if it is run on import alone.

    The quickest test of each test file comes first, then the second of each, and so on: different files see different things.
    """
    above = [line for line in lines if line <= mutant.line]
    tests = {test for test in lines[max(above)] if test} if above else set()
    tests = tests or {test for names in lines.values() for test in names if test}
    by_file: dict[str, list[str]] = {}
    for test in sorted(tests, key=lambda test: seconds[test]):
        by_file.setdefault(test.partition("::")[0], []).append(test)
    rounds = zip_longest(*by_file.values())
    chosen, spent = [], 0.0
    for test in (test for each in rounds for test in each if test is not None):
        if spent + seconds[test] <= SECONDS or not chosen:
            chosen.append(test)
            spent += seconds[test]
    return chosen


def verdict(mutant: Mutant, tests: list[str]) -> str:
    """Return the name of the first test that fails on a mutant, "time" if none ends, "" if none fails."""
    source, path = mutant.source(), str(ROOT / mutant.file)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        loader = importlib.machinery.SourceFileLoader
        get_code = loader.get_code

        def changed(self: importlib.machinery.SourceFileLoader, name: str) -> object:
            return compile(source, path, "exec") if self.path == path else get_code(self, name)

        loader.get_code = changed  # type: ignore[method-assign, assignment]
        failure = Failure()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            code = pytest.main([*PLAIN, "-x", *tests], plugins=[failure])
        os.write(writing, (failure.name if code else "").encode())
        os._exit(0)
    os.close(writing)
    end = time.monotonic() + 10 * SECONDS
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            return "time"
        time.sleep(0.05)
    with os.fdopen(reading) as pipe:
        return pipe.read()


def main() -> None:
    """Draw mutants, run them, and print those that survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=4, help="mutants of each file, twice as many where soundness lies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="when to stop")
    options = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    lines, seconds = reached()
    start, killed, survived = time.monotonic(), 0, 0
    for mutant in drawn(options.each, options.seed):
        if time.monotonic() - start > 60 * options.minutes:
            break
        tests = chosen_tests(mutant, lines.get(mutant.file, {}), seconds)
        failed = verdict(mutant, tests)
        killed, survived = (killed + 1, survived) if failed else (killed, survived + 1)
        print(f"{mutant.file}:{mutant.line} {mutant.operator} {mutant.occurrence}: {failed or f'SURVIVES {len(tests)} tests'}")
        if not failed:
            print(mutant.change())
        sys.stdout.flush()
    print(f"{killed + survived} mutants, {killed} killed, {survived} survive.")


if __name__ == "__main__":
    main()
